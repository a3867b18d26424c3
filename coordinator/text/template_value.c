/* Values of templates: making, comparing, writing. Knows nothing of syntax or scopes. */
#include "coordinator/text/template_value.h"
#include "base/mem.h"
#include "base/utf8.h"
#include "coordinator/text/unicode.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- Making ---- */

enum err value_copy_string(struct arena *a, const char *s, size_t n, struct value *out)
{
    char *copy;
    TRY(arena_copy_string(a, s ? s : "", n, &copy));
    *out = value_span(copy, n);
    return OK;
}

enum err value_new_list(struct arena *a, enum list_kind kind, struct value *out)
{
    struct list *list;
    TRY(arena_alloc(a, sizeof *list, (void **)&list));
    list->kind = kind;
    *out = (struct value){.kind = VALUE_LIST, .list = list};
    return OK;
}

enum err value_new_dict(struct arena *a, struct value *out)
{
    struct dict *dict;
    TRY(arena_alloc(a, sizeof *dict, (void **)&dict));
    *out = (struct value){.kind = VALUE_DICT, .dict = dict};
    return OK;
}

enum err list_add(struct arena *a, struct list *list, struct value item)
{
    if (list->n == list->capacity) {
        size_t capacity = list->capacity ? 2 * list->capacity : 4;
        struct value *items;
        TRY(arena_alloc_array(a, capacity, sizeof *items, (void **)&items));
        if (list->n) memcpy(items, list->items, list->n * sizeof *items);
        list->items = items, list->capacity = capacity;
    }
    list->items[list->n++] = item;
    return OK;
}

const struct value *dict_find(const struct dict *dict, struct value key)
{
    for (size_t i = 0; i < dict->n; i++)
        if (value_equal(dict->entries[i].key, key)) return &dict->entries[i].value;
    return NULL;
}

const struct value *dict_find_text(const struct dict *dict, const char *key)
{
    return dict_find(dict, value_string(key));
}

static enum err dict_add(struct arena *a, struct dict *dict, struct value key, struct value value)
{
    if (dict->n == dict->capacity) {
        size_t capacity = dict->capacity ? 2 * dict->capacity : 4;
        void *entries;
        TRY(arena_alloc_array(a, capacity, sizeof *dict->entries, &entries));
        if (dict->n) memcpy(entries, dict->entries, dict->n * sizeof *dict->entries);
        dict->entries = entries, dict->capacity = capacity;
    }
    dict->entries[dict->n].key = key;
    dict->entries[dict->n++].value = value;
    return OK;
}

enum err dict_set(struct arena *a, struct dict *dict, struct value key, struct value value)
{
    for (size_t i = 0; i < dict->n; i++) {
        if (!value_equal(dict->entries[i].key, key)) continue;
        dict->entries[i].value = value;
        return OK;
    }
    return dict_add(a, dict, key, value);
}

static enum err list_from_json(struct arena *a, const json_t *json, int depth, struct value *out)
{
    TRY(value_new_list(a, LIST_LIST, out));
    for (size_t i = 0; i < json_array_size(json); i++) {
        struct value item;
        TRY(value_from_json(a, json_array_get(json, i), depth + 1, &item));
        TRY(list_add(a, out->list, item));
    }
    return OK;
}

static enum err dict_from_json(struct arena *a, const json_t *json, int depth, struct value *out)
{
    const char *key;
    json_t *item;
    TRY(value_new_dict(a, out));
    json_object_foreach((json_t *)json, key, item)
    {
        struct value value;
        TRY(value_from_json(a, item, depth + 1, &value));
        TRY(dict_add(a, out->dict, value_string(key), value)); /* keys of an object are distinct */
    }
    return OK;
}

enum err value_from_json(struct arena *a, const json_t *json, int depth, struct value *out)
{
    if (depth > VALUE_DEPTH_MAX)
        FAIL(ERR_INVALID, "the template's variables are nested deeper than %d", VALUE_DEPTH_MAX);
    switch (json_typeof(json)) {
    case JSON_OBJECT:
        return dict_from_json(a, json, depth, out);
    case JSON_ARRAY:
        return list_from_json(a, json, depth, out);
    case JSON_STRING:
        *out = value_span(json_string_value(json), json_string_length(json));
        return OK;
    case JSON_INTEGER:
        *out = value_int(json_integer_value(json));
        return OK;
    case JSON_REAL:
        *out = value_float(json_real_value(json));
        return OK;
    case JSON_TRUE:
    case JSON_FALSE:
        *out = value_bool(json_is_true(json));
        return OK;
    default:
        *out = value_none();
        return OK;
    }
}

/* ---- Asking ---- */

bool value_is_true(struct value v)
{
    switch (v.kind) {
    case VALUE_UNDEFINED:
    case VALUE_NONE:
        return false;
    case VALUE_BOOL:
        return v.boolean;
    case VALUE_INT:
        return v.integer != 0;
    case VALUE_FLOAT:
        return v.number != 0;
    case VALUE_STRING:
        return v.string.n != 0;
    case VALUE_LIST:
        return v.list->kind == LIST_GENERATOR || v.list->n != 0;
    case VALUE_DICT:
        return v.dict->n != 0;
    default:
        return true;
    }
}

bool value_is_number(struct value v)
{
    return v.kind == VALUE_BOOL || v.kind == VALUE_INT || v.kind == VALUE_FLOAT;
}

bool value_is_text(struct value v, const char *text)
{
    return v.kind == VALUE_STRING && span_equal(v.string, text);
}

int64_t value_as_int(struct value v)
{
    return v.kind == VALUE_BOOL ? v.boolean : v.integer;
}

double value_as_number(struct value v)
{
    return v.kind == VALUE_FLOAT ? v.number : (double)value_as_int(v);
}

static bool list_equal(const struct list *a, const struct list *b)
{
    bool a_tuple = a->kind == LIST_TUPLE || a->kind == LIST_GROUP;
    bool b_tuple = b->kind == LIST_TUPLE || b->kind == LIST_GROUP;
    if (a == b) return true;
    if (a->n != b->n || a_tuple != b_tuple || a->kind == LIST_GENERATOR ||
        b->kind == LIST_GENERATOR)
        return false;
    for (size_t i = 0; i < a->n; i++)
        if (!value_equal(a->items[i], b->items[i])) return false;
    return true;
}

static bool dict_equal(const struct dict *a, const struct dict *b)
{
    if (a->n != b->n) return false;
    for (size_t i = 0; i < a->n; i++) {
        const struct value *other = dict_find(b, a->entries[i].key);
        if (!other || !value_equal(a->entries[i].value, *other)) return false;
    }
    return true;
}

enum { VALUE_WORK_MAX = 1 << 23 };
/* More than any budget of steps. */
#define VALUE_WORK_ENDLESS ((size_t)1 << 48)
static _Thread_local size_t work;

size_t value_take_work(void)
{
    size_t done = work;
    work = 0;
    return done;
}

bool value_equal(struct value a, struct value b)
{
    if (++work > VALUE_WORK_MAX) {
        work = VALUE_WORK_ENDLESS;
        return false;
    }
    if (value_is_number(a) && value_is_number(b)) {
        if (a.kind != VALUE_FLOAT && b.kind != VALUE_FLOAT)
            return value_as_int(a) == value_as_int(b);
        return value_as_number(a) == value_as_number(b);
    }
    if (a.kind != b.kind) return false;
    switch (a.kind) {
    case VALUE_UNDEFINED:
    case VALUE_NONE:
        return true;
    case VALUE_STRING:
        return a.string.n == b.string.n &&
               (!a.string.n || !memcmp(a.string.data, b.string.data, a.string.n));
    case VALUE_LIST:
        return list_equal(a.list, b.list);
    case VALUE_DICT:
        return dict_equal(a.dict, b.dict);
    default:
        return a.list == b.list; /* the same object */
    }
}

static int compare_text(struct span a, struct span b)
{
    size_t n = a.n < b.n ? a.n : b.n; /* UTF-8 orders as its code points do */
    int c = n ? memcmp(a.data, b.data, n) : 0;
    return c ? c : a.n < b.n ? -1 : a.n > b.n;
}

enum err value_compare(struct value a, struct value b, int *out)
{
    if (value_is_number(a) && value_is_number(b)) {
        if (a.kind != VALUE_FLOAT && b.kind != VALUE_FLOAT) {
            int64_t x = value_as_int(a), y = value_as_int(b);
            *out = x < y ? -1 : x > y;
        } else {
            double x = value_as_number(a), y = value_as_number(b);
            *out = x < y ? -1 : x > y;
        }
        return OK;
    }
    if (a.kind == VALUE_STRING && b.kind == VALUE_STRING) {
        *out = compare_text(a.string, b.string);
        return OK;
    }
    if (a.kind == VALUE_LIST && b.kind == VALUE_LIST) {
        for (size_t i = 0; i < a.list->n && i < b.list->n; i++)
            if (!value_equal(a.list->items[i], b.list->items[i]))
                return value_compare(a.list->items[i], b.list->items[i], out);
        *out = a.list->n < b.list->n ? -1 : a.list->n > b.list->n;
        return OK;
    }
    FAIL(ERR_INVALID, "'<' not supported between instances of '%s' and '%s'", value_type_name(a),
         value_type_name(b));
}

const char *value_type_name(struct value v)
{
    static const char *const names[] = {
        "Undefined", "NoneType",  "bool",        "int",   "float",  "str",    "list",
        "dict",      "Namespace", "LoopContext", "Macro", "method", "Joiner", "Cycler"};
    static const char *const lists[] = {"list",  "tuple",     "tuple",
                                        "range", "dict view", "generator"};
    return v.kind == VALUE_LIST ? lists[v.list->kind] : names[v.kind];
}

/* ---- Writing ---- */

/* Python's repr of a float: the shortest digits that read back the same, with an exponent below
 * 1e-4 and from 1e16 on. */
enum err value_write_float(double f, struct buf *out)
{
    char text[40], *mark;
    if (isnan(f)) return buf_add_string(out, "nan");
    if (isinf(f)) return buf_add_string(out, f < 0 ? "-inf" : "inf");
    for (int precision = 0; precision < 17; precision++) {
        snprintf(text, sizeof text, "%.*e", precision, f);
        if (strtod(text, NULL) == f) break;
    }
    mark = strchr(text, 'e');
    int exponent = (int)strtol(mark + 1, NULL, 10);
    int n_digits = (int)(mark - text) - (text[0] == '-') - (strchr(text, '.') ? 1 : 0);
    if (exponent < -4 || exponent >= 16) return buf_add_string(out, text);
    int decimals = n_digits - 1 - exponent;
    return buf_printf(out, "%.*f", decimals > 1 ? decimals : 1, f);
}

static enum err write_escape(uint32_t code, struct buf *out)
{
    if (code < 0x100) return buf_printf(out, "\\x%02x", code);
    return code < 0x10000 ? buf_printf(out, "\\u%04x", code) : buf_printf(out, "\\U%08x", code);
}

static enum err write_text_repr(struct span s, struct buf *out)
{
    bool single = s.n && memchr(s.data, '\'', s.n), twice = s.n && memchr(s.data, '"', s.n);
    char quote = single && !twice ? '"' : '\'';
    TRY(buf_add_char(out, quote));
    for (size_t at = 0, len; at < s.n; at += len) {
        uint32_t code;
        len = unicode_next(s.data + at, s.n - at, &code);
        const char *known = code == '\n'   ? "\\n"
                            : code == '\r' ? "\\r"
                            : code == '\t' ? "\\t"
                            : code == '\\' ? "\\\\"
                                           : NULL;
        if (known)
            TRY(buf_add_string(out, known));
        else if (code == (uint32_t)quote)
            TRY(buf_printf(out, "\\%c", quote));
        else if (code == ' ' || !(unicode_is_space(code) || unicode_is_other(code)))
            TRY(buf_add(out, s.data + at, len));
        else
            TRY(write_escape(code, out));
    }
    return buf_add_char(out, quote);
}

static enum err write_items(const struct list *list, int depth, const char *open, const char *close,
                            struct buf *out)
{
    TRY(buf_add_string(out, open));
    for (size_t i = 0; i < list->n; i++) {
        if (i) TRY(buf_add_string(out, ", "));
        TRY(value_write_repr(list->items[i], depth + 1, out));
    }
    return buf_add_string(out, close);
}

static enum err write_list_repr(const struct list *list, int depth, struct buf *out)
{
    switch (list->kind) {
    case LIST_LIST:
        return write_items(list, depth, "[", "]", out);
    case LIST_TUPLE:
    case LIST_GROUP:
        return write_items(list, depth, "(", list->n == 1 ? ",)" : ")", out);
    case LIST_VIEW:
        TRY(buf_add_string(out, list->view_name));
        return write_items(list, depth, "([", "])", out);
    case LIST_RANGE: {
        int64_t start = list->n ? list->items[0].integer : 0;
        int64_t step = list->n > 1 ? list->items[1].integer - start : 1;
        int64_t stop = list->n ? list->items[list->n - 1].integer + step : 0;
        TRY(buf_printf(out, "range(%lld, %lld", (long long)start, (long long)stop));
        return step == 1 ? buf_add_char(out, ')') : buf_printf(out, ", %lld)", (long long)step);
    }
    default:
        return buf_add_string(out, "<generator object>");
    }
}

static enum err write_dict_repr(const struct dict *dict, int depth, struct buf *out)
{
    TRY(buf_add_char(out, '{'));
    for (size_t i = 0; i < dict->n; i++) {
        if (i) TRY(buf_add_string(out, ", "));
        TRY(value_write_repr(dict->entries[i].key, depth + 1, out));
        TRY(buf_add_string(out, ": "));
        TRY(value_write_repr(dict->entries[i].value, depth + 1, out));
    }
    return buf_add_char(out, '}');
}

enum err value_write_repr(struct value v, int depth, struct buf *out)
{
    if (depth > VALUE_DEPTH_MAX)
        FAIL(ERR_INVALID, "a value is nested deeper than %d", VALUE_DEPTH_MAX);
    switch (v.kind) {
    case VALUE_UNDEFINED:
        return buf_add_string(out, "Undefined");
    case VALUE_NONE:
        return buf_add_string(out, "None");
    case VALUE_BOOL:
        return buf_add_string(out, v.boolean ? "True" : "False");
    case VALUE_INT:
        return buf_printf(out, "%lld", (long long)v.integer);
    case VALUE_FLOAT:
        return value_write_float(v.number, out);
    case VALUE_STRING:
        return write_text_repr(v.string, out);
    case VALUE_LIST:
        return write_list_repr(v.list, depth, out);
    case VALUE_DICT:
        return write_dict_repr(v.dict, depth, out);
    case VALUE_NAMESPACE:
        TRY(buf_add_string(out, "<Namespace "));
        TRY(write_dict_repr(v.dict, depth, out));
        return buf_add_char(out, '>');
    default:
        return buf_printf(out, "<%s object>", value_type_name(v));
    }
}

enum err value_write(struct value v, struct buf *out)
{
    if (v.kind == VALUE_STRING) return buf_add(out, v.string.data, v.string.n);
    return v.kind == VALUE_UNDEFINED ? OK : value_write_repr(v, 0, out);
}

/* ---- Characters ---- */

size_t text_length(struct span s)
{
    size_t n = 0;
    for (size_t i = 0; i < s.n; i++)
        n += ((unsigned char)s.data[i] & 0xc0) != 0x80;
    return n;
}

size_t text_offset(struct span s, size_t at)
{
    size_t i = 0;
    for (; i < s.n; i++)
        if (((unsigned char)s.data[i] & 0xc0) != 0x80 && at-- == 0) return i;
    return i;
}
