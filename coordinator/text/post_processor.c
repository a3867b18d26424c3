/* The post-processors of a tokenizer file. Knows nothing of the model. */
#include "coordinator/text/post_processor.h"
#include "base/mem.h"
#include "coordinator/text/part.h"
#include "coordinator/text/vocab.h"

#include <string.h>

enum { SPECIALS_MAX = 256 };

static enum err read_id(const json_t *value, int32_t *out)
{
    int64_t id = json_is_integer(value) ? json_integer_value(value) : -1;
    if (id < 0 || id >= VOCAB_IDS_MAX)
        FAIL(ERR_FORMAT, "an id of the post-processor is not an integer in range");
    *out = (int32_t)id;
    return OK;
}

/* [text, id] of Bert's and Roberta's post-processors. */
static enum err read_named(const json_t *object, const char *key, struct token_list *out)
{
    int32_t id = 0;
    TRY(read_id(json_array_get(json_object_get(object, key), 1), &id));
    return token_list_add(out, id);
}

/* The ids that a template's special token stands for. */
static enum err read_special(const json_t *template, const char *name, struct token_list *out)
{
    const json_t *special = json_object_get(json_object_get(template, "special_tokens"), name);
    const json_t *ids = json_object_get(special, "ids");
    if (!json_is_array(ids)) FAIL(ERR_FORMAT, "the template's token '%s' has no ids", name);
    for (size_t i = 0; i < json_array_size(ids); i++) {
        int32_t id = 0;
        TRY(read_id(json_array_get(ids, i), &id));
        TRY(token_list_add(out, id));
    }
    return OK;
}

static enum err read_template(const json_t *object, struct post_processor *p)
{
    const json_t *single = json_object_get(object, "single");
    bool seen = false;
    if (!json_is_array(single))
        FAIL(ERR_UNSUPPORTED, "a TemplateProcessing whose \"single\" is no list is not supported");
    for (size_t i = 0; i < json_array_size(single); i++) {
        const json_t *item = json_array_get(single, i);
        const json_t *special = json_object_get(item, "SpecialToken");
        if (special) {
            const char *name = json_string_value(json_object_get(special, "id"));
            if (!name) FAIL(ERR_FORMAT, "a SpecialToken of the template has no id");
            TRY(read_special(object, name, seen ? &p->after : &p->before));
        } else if (json_object_get(item, "Sequence") && !seen) {
            seen = true;
        } else {
            FAIL(ERR_UNSUPPORTED, "a template that repeats the text is not supported");
        }
    }
    if (!seen) FAIL(ERR_UNSUPPORTED, "a template without the text is not supported");
    return OK;
}

/* Puts inner's tokens nearer to the text than those of out. */
static enum err wrap(const struct post_processor *inner, struct post_processor *out)
{
    struct token_list before = {.limit = SPECIALS_MAX};
    enum err e = OK;
    for (size_t i = 0; i < out->before.n && !e; i++)
        e = token_list_add(&before, out->before.ids[i]);
    for (size_t i = 0; i < inner->before.n && !e; i++)
        e = token_list_add(&before, inner->before.ids[i]);
    for (size_t i = inner->after.n; i-- && !e;) {
        e = token_list_add(&out->after, 0);
        if (e) break;
        memmove(out->after.ids + 1, out->after.ids, (out->after.n - 1) * sizeof(int32_t));
        out->after.ids[0] = inner->after.ids[i];
    }
    token_list_fini(&out->before);
    out->before = before;
    return e;
}

static enum err read_any(const json_t *object, int depth, struct post_processor *p)
{
    const char *type;
    TRY(part_type(object, "post-processor", &type));
    if (!strcmp(type, "ByteLevel")) return OK; /* moves offsets only */
    if (!strcmp(type, "TemplateProcessing")) return read_template(object, p);
    if (!strcmp(type, "BertProcessing") || !strcmp(type, "RobertaProcessing")) {
        TRY(read_named(object, "cls", &p->before));
        return read_named(object, "sep", &p->after);
    }
    if (strcmp(type, "Sequence"))
        FAIL(ERR_UNSUPPORTED, "the post-processor '%s' is not supported", type);
    const json_t *list = json_object_get(object, "processors");
    if (!json_is_array(list)) FAIL(ERR_FORMAT, "a Sequence has no \"processors\"");
    if (depth == PART_DEPTH_MAX) FAIL(ERR_UNSUPPORTED, "post-processors nested too deep");
    /* A later processor's tokens stand outside those of an earlier one. */
    for (size_t i = 0; i < json_array_size(list); i++) {
        struct post_processor outer = {{.limit = SPECIALS_MAX}, {.limit = SPECIALS_MAX}};
        enum err e = read_any(json_array_get(list, i), depth + 1, &outer);
        if (!e) e = wrap(p, &outer);
        struct post_processor inner = *p;
        *p = outer;
        post_processor_fini(&inner);
        if (e) return e;
    }
    return OK;
}

enum err post_processor_read(const json_t *object, struct post_processor *out)
{
    struct post_processor p = {{.limit = SPECIALS_MAX}, {.limit = SPECIALS_MAX}};
    enum err e = OK;
    if (object && !json_is_null(object)) e = read_any(object, 0, &p);
    if (e)
        post_processor_fini(&p);
    else
        *out = p;
    return e;
}

void post_processor_fini(struct post_processor *p)
{
    token_list_fini(&p->before);
    token_list_fini(&p->after);
}
