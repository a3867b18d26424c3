/* Reading the parts of a tokenizer file. Knows nothing of what each part does. */
#include "coordinator/text/part.h"
#include "base/mem.h"
#include "coordinator/text/unicode.h"

#include <string.h>

static const json_t *present(const json_t *object, const char *key)
{
    const json_t *value = json_object_get(object, key);
    return value && !json_is_null(value) ? value : NULL;
}

enum err part_type(const json_t *object, const char *where, const char **out)
{
    const json_t *type = json_object_get(object, "type");
    if (!json_is_string(type)) FAIL(ERR_FORMAT, "a %s has no \"type\"", where);
    *out = json_string_value(type);
    return OK;
}

enum err part_string(const json_t *object, const char *key, const char *fallback, char **out)
{
    const json_t *value = present(object, key);
    if (value && !json_is_string(value)) FAIL(ERR_FORMAT, "'%s' must be a string", key);
    const char *s = value ? json_string_value(value) : fallback;
    if (value && json_string_length(value) != strlen(s))
        FAIL(ERR_FORMAT, "'%s' must not hold a NUL character", key);
    if (strlen(s) > PART_STRING_BYTES_MAX)
        FAIL(ERR_FORMAT, "'%s' is longer than %d bytes", key, PART_STRING_BYTES_MAX);
    char *copy = mem_strdup(s);
    if (!copy) FAIL(ERR_NO_MEMORY, "out of memory for '%s'", key);
    *out = copy;
    return OK;
}

enum err part_bool(const json_t *object, const char *key, bool fallback, bool *out)
{
    const json_t *value = present(object, key);
    if (value && !json_is_boolean(value)) FAIL(ERR_FORMAT, "'%s' must be true or false", key);
    *out = value ? json_is_true(value) : fallback;
    return OK;
}

enum err part_int(const json_t *object, const char *key, int64_t max, int64_t fallback,
                  int64_t *out)
{
    const json_t *value = present(object, key);
    int64_t i = value ? json_integer_value(value) : fallback;
    if ((value && !json_is_integer(value)) || i < 0 || i > max)
        FAIL(ERR_FORMAT, "'%s' must be an integer from 0 to %lld", key, (long long)max);
    *out = i;
    return OK;
}

enum err pattern_read(const json_t *object, const char *key, struct pattern *out)
{
    const json_t *value = present(object, key);
    const json_t *regex = json_object_get(value, "Regex");
    const json_t *literal = json_is_string(value) ? value : json_object_get(value, "String");
    struct pattern p = {0};
    if (json_is_string(regex)) {
        TRY(regex_compile(json_string_value(regex), json_string_length(regex), &p.regex));
    } else if (json_is_string(literal)) {
        p.n = json_string_length(literal);
        TRY(mem_alloc(p.n + 1, (void **)&p.literal));
        memcpy(p.literal, json_string_value(literal), p.n);
    } else {
        FAIL(ERR_FORMAT, "'%s' must be {\"String\": ...} or {\"Regex\": ...}", key);
    }
    *out = p;
    return OK;
}

void pattern_fini(struct pattern *p)
{
    mem_free(p->literal);
    regex_destroy(p->regex);
    *p = (struct pattern){0};
}

enum err pattern_find(const struct pattern *p, struct regex_scratch *s, const char *text, size_t n,
                      size_t from, size_t *out_start, size_t *out_end, bool *out_found)
{
    if (p->regex) return regex_find(p->regex, s, text, n, from, out_start, out_end, out_found);
    const char *at = p->n ? memmem(text + from, n - from, p->literal, p->n) : NULL;
    *out_found = at;
    if (at) *out_start = (size_t)(at - text), *out_end = *out_start + p->n;
    return OK;
}

enum err pattern_replace(const struct pattern *p, struct regex_scratch *s, const char *content,
                         const char *text, size_t n, struct buf *out)
{
    size_t done = 0, from = 0, start = 0, end = 0;
    bool found = true;
    while (from <= n) {
        TRY(pattern_find(p, s, text, n, from, &start, &end, &found));
        if (!found) break;
        TRY(buf_add(out, text + done, start - done));
        TRY(buf_add_string(out, content));
        done = from = end;
        if (start < end) continue;
        uint32_t code; /* an empty match: go on after the next character */
        if (end >= n) break;
        from += unicode_next(text + end, n - end, &code);
    }
    return buf_add(out, text + done, n - done);
}
