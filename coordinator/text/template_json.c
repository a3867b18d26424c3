/* The tojson filter: json.dumps as transformers calls it. */
#include "base/utf8.h"
#include "coordinator/text/template_builtins.h"
#include "coordinator/text/template_render.h"
#include "coordinator/text/unicode.h"

#include <math.h>
#include <string.h>

static enum err write_code(uint32_t code, struct buf *out)
{
    if (code < 0x10000) return buf_printf(out, "\\u%04x", code);
    code -= 0x10000;
    return buf_printf(out, "\\u%04x\\u%04x", 0xd800 + (code >> 10), 0xdc00 + (code & 0x3ff));
}

static enum err write_text(struct span s, const struct json_style *style, struct buf *out)
{
    static const char escapes[] = "\"\"\\\\\nn\rr\tt\bb\ff";
    TRY(buf_add_char(out, '"'));
    for (size_t at = 0, len; at < s.n; at += len) {
        uint32_t code;
        const char *escape = NULL;
        len = unicode_next(s.data + at, s.n - at, &code);
        for (size_t i = 0; escapes[i] && code < 0x80; i += 2)
            if ((uint32_t)escapes[i] == code) escape = &escapes[i + 1];
        if (escape) {
            TRY(buf_add_char(out, '\\'));
            TRY(buf_add_char(out, *escape));
        } else if (code < 0x20 || (style->ensure_ascii && code > 0x7e)) {
            TRY(write_code(code, out));
        } else {
            TRY(buf_add(out, s.data + at, len));
        }
    }
    return buf_add_char(out, '"');
}

static enum err write_line(const struct json_style *style, int depth, struct buf *out)
{
    if (style->indent < 0) return OK;
    TRY(buf_add_char(out, '\n'));
    for (int64_t i = 0; i < style->indent * depth; i++)
        TRY(buf_add_char(out, ' '));
    return OK;
}

static enum err write_float(double f, struct buf *out)
{
    if (isnan(f)) return buf_add_string(out, "NaN");
    if (isinf(f)) return buf_add_string(out, f < 0 ? "-Infinity" : "Infinity");
    return value_write_float(f, out);
}

static enum err write_list(struct render *r, const struct list *list,
                           const struct json_style *style, int depth, struct buf *out)
{
    TRY(buf_add_char(out, '['));
    for (size_t i = 0; i < list->n; i++) {
        if (i) TRY(buf_add(out, style->item_separator.data, style->item_separator.n));
        TRY(write_line(style, depth + 1, out));
        TRY(value_write_json(r, list->items[i], style, depth + 1, out));
    }
    if (list->n) TRY(write_line(style, depth, out));
    return buf_add_char(out, ']');
}

/* Keys that are no strings become what JSON would write for them, in quotes. */
static enum err write_key(struct value key, const struct json_style *style, struct buf *out)
{
    if (key.kind == VALUE_STRING) return write_text(key.string, style, out);
    TRY(buf_add_char(out, '"'));
    switch (key.kind) {
    case VALUE_NONE:
        TRY(buf_add_string(out, "null"));
        break;
    case VALUE_BOOL:
        TRY(buf_add_string(out, key.boolean ? "true" : "false"));
        break;
    case VALUE_INT:
        TRY(buf_printf(out, "%lld", (long long)key.integer));
        break;
    case VALUE_FLOAT:
        TRY(write_float(key.number, out));
        break;
    default:
        FAIL(ERR_INVALID, "keys must be str, int, float, bool or None, not %s",
             value_type_name(key));
    }
    return buf_add_char(out, '"');
}

/* The order in which the entries are written: as they came, or by key. */
static enum err order_entries(struct render *r, const struct dict *dict, bool sorted,
                              struct value **out)
{
    struct value *keys, *places;
    TRY(arena_alloc_array(&r->arena, dict->n + 1, sizeof *keys, (void **)&keys));
    TRY(arena_alloc_array(&r->arena, dict->n + 1, sizeof *places, (void **)&places));
    for (size_t i = 0; i < dict->n; i++) {
        keys[i] = dict->entries[i].key;
        places[i] = value_int((int64_t)i);
    }
    if (sorted) TRY(list_sort(r, keys, places, dict->n, false));
    *out = places;
    return OK;
}

static enum err write_dict(struct render *r, const struct dict *dict,
                           const struct json_style *style, int depth, struct buf *out)
{
    struct value *order;
    TRY(order_entries(r, dict, style->sort_keys, &order));
    TRY(buf_add_char(out, '{'));
    for (size_t i = 0; i < dict->n; i++) {
        size_t at = (size_t)order[i].integer;
        if (i) TRY(buf_add(out, style->item_separator.data, style->item_separator.n));
        TRY(write_line(style, depth + 1, out));
        TRY(write_key(dict->entries[at].key, style, out));
        TRY(buf_add(out, style->key_separator.data, style->key_separator.n));
        TRY(value_write_json(r, dict->entries[at].value, style, depth + 1, out));
    }
    if (dict->n) TRY(write_line(style, depth, out));
    return buf_add_char(out, '}');
}

enum err value_write_json(struct render *r, struct value v, const struct json_style *style,
                          int depth, struct buf *out)
{
    if (depth > VALUE_DEPTH_MAX)
        FAIL(ERR_INVALID, "a value is nested deeper than %d", VALUE_DEPTH_MAX);
    TRY(render_charge(r, 1));
    switch (v.kind) {
    case VALUE_NONE:
        return buf_add_string(out, "null");
    case VALUE_BOOL:
        return buf_add_string(out, v.boolean ? "true" : "false");
    case VALUE_INT:
        return buf_printf(out, "%lld", (long long)v.integer);
    case VALUE_FLOAT:
        return write_float(v.number, out);
    case VALUE_STRING:
        TRY(render_charge(r, v.string.n / 64));
        return write_text(v.string, style, out);
    case VALUE_DICT:
        return write_dict(r, v.dict, style, depth, out);
    case VALUE_LIST:
        if (v.list->kind == LIST_LIST || v.list->kind == LIST_TUPLE || v.list->kind == LIST_GROUP)
            return write_list(r, v.list, style, depth, out);
        break;
    default:
        break;
    }
    FAIL(ERR_INVALID, "Object of type %s is not JSON serializable", value_type_name(v));
}
