/* The configuration file: one YAML mapping from option names to scalars, read with libyaml. */
#include "base/conf.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <yaml.h>

enum { KEY_BYTES_MAX = 128 };

/* What the next scalar is: a key of the mapping, or the value of the key before it. */
struct reading {
    char key[KEY_BYTES_MAX];
    bool have_key;
    int depth;
};

static enum err scalar(struct conf *c, struct reading *r, const char *path, const yaml_event_t *event)
{
    const char *text = (const char *)event->data.scalar.value;
    int line = (int)event->start_mark.line + 1;
    if (r->depth != 1) FAIL(ERR_INVALID, "%s:%d: expected 'option: value'", path, line);
    if (!r->have_key) {
        if (snprintf(r->key, sizeof r->key, "%s", text) >= KEY_BYTES_MAX)
            FAIL(ERR_INVALID, "%s:%d: option name too long", path, line);
        r->have_key = true;
        return OK;
    }
    r->have_key = false;
    if (conf_set(c, r->key, text, CONF_FROM_FILE)) {
        char why[512];
        snprintf(why, sizeof why, "%s", err_detail());
        FAIL(ERR_INVALID, "%s:%d: %s", path, line, why);
    }
    return OK;
}

static enum err take(struct conf *c, struct reading *r, const char *path, const yaml_event_t *event)
{
    int line = (int)event->start_mark.line + 1;
    switch (event->type) {
    case YAML_SCALAR_EVENT: return scalar(c, r, path, event);
    case YAML_MAPPING_START_EVENT:
        if (++r->depth > 1) FAIL(ERR_INVALID, "%s:%d: options do not nest", path, line);
        return OK;
    case YAML_MAPPING_END_EVENT: r->depth--; return OK;
    case YAML_SEQUENCE_START_EVENT:
    case YAML_ALIAS_EVENT: FAIL(ERR_INVALID, "%s:%d: lists and aliases are not understood here", path, line);
    default: return OK;
    }
}

enum err conf_read_yaml(struct conf *c, const char *path)
{
    enum err e = OK;
    yaml_parser_t parser;
    struct reading reading = {.have_key = false};
    FILE *file = fopen(path, "rb");
    if (!file) FAIL(ERR_INVALID, "%s: %s", path, strerror(errno));
    if (!yaml_parser_initialize(&parser)) {
        fclose(file);
        FAIL(ERR_NO_MEMORY, "%s: no memory for the YAML parser", path);
    }
    yaml_parser_set_input_file(&parser, file);
    for (bool done = false; !done && !e;) {
        yaml_event_t event;
        if (!yaml_parser_parse(&parser, &event)) {
            e = err_set(ERR_INVALID, "%s:%d: not YAML: %s", path, (int)parser.problem_mark.line + 1,
                        parser.problem ? parser.problem : "unreadable");
            break;
        }
        done = event.type == YAML_STREAM_END_EVENT;
        e = take(c, &reading, path, &event);
        yaml_event_delete(&event);
    }
    yaml_parser_delete(&parser);
    fclose(file);
    return e;
}
