/* Filters of sequences: choosing, ordering, joining. Those that Jinja2 makes lazily are made at
 * once here, but like its generators they can be walked only once and have no length. */
#include "coordinator/text/template_builtins.h"
#include "coordinator/text/template_render.h"

#include <stdio.h>
#include <string.h>

#define FILTER(name)                                                                               \
    static enum err filter_##name(struct render *r, struct value self, const struct args *args,    \
                                  struct value *out)

enum { ATTRIBUTE_PARTS_MAX = 16 };

/* ---- Keys ---- */

/* item.a.b for "a.b", item[0] for 0 or "0". */
static enum err get_path(struct render *r, struct value item, struct value path, struct value *out)
{
    struct span rest = path.string;
    if (path.kind != VALUE_STRING) return value_item(r, item, path, out);
    for (int n = 0;; n++) {
        const char *dot = rest.n ? memchr(rest.data, '.', rest.n) : NULL;
        size_t len = dot ? (size_t)(dot - rest.data) : rest.n;
        int64_t number = len > 0 && len < 10 ? 0 : -1;
        for (size_t i = 0; i < len && number >= 0; i++)
            number = rest.data[i] >= '0' && rest.data[i] <= '9' ? number * 10 + (rest.data[i] - '0')
                                                                : -1;
        struct value part = number >= 0 ? value_int(number) : value_span(rest.data, len);
        if (n == ATTRIBUTE_PARTS_MAX) FAIL(ERR_INVALID, "an attribute of too many parts");
        TRY(value_item(r, item, part, &item));
        if (!dot) break;
        rest.data += len + 1, rest.n -= len + 1;
    }
    *out = item;
    return OK;
}

static enum err fold_case(struct render *r, bool case_sensitive, struct value *inout)
{
    struct value bound;
    struct args none = {0};
    bool found;
    if (case_sensitive || inout->kind != VALUE_STRING) return OK;
    TRY(builtin_method(r, *inout, "lower", &bound, &found));
    return template_call(r, bound, &none, inout);
}

/* What an item is ordered by: a row of its attributes, or the item alone. */
static enum err sort_key(struct render *r, struct value item, const struct value *attribute,
                         bool case_sensitive, struct value *out)
{
    struct value key = item;
    TRY(value_new_list(&r->arena, LIST_LIST, out));
    bool several = attribute && attribute->kind == VALUE_STRING;
    struct span rest = several ? attribute->string : (struct span){"", 0};
    do {
        const char *comma = rest.n ? memchr(rest.data, ',', rest.n) : NULL;
        size_t len = comma ? (size_t)(comma - rest.data) : rest.n;
        if (attribute && attribute->kind != VALUE_NONE)
            TRY(get_path(r, item, several ? value_span(rest.data, len) : *attribute, &key));
        TRY(fold_case(r, case_sensitive, &key));
        TRY(list_add(&r->arena, out->list, key));
        if (!comma) break;
        rest.data += len + 1, rest.n -= len + 1;
    } while (true);
    return OK;
}

static enum err all_keys(struct render *r, const struct list *list, const struct value *attribute,
                         bool case_sensitive, struct value **out)
{
    struct value *keys;
    TRY(arena_alloc_array(&r->arena, list->n + 1, sizeof *keys, (void **)&keys));
    for (size_t i = 0; i < list->n; i++) {
        TRY(render_charge(r, 1));
        TRY(sort_key(r, list->items[i], attribute, case_sensitive, &keys[i]));
    }
    *out = keys;
    return OK;
}

struct sorting {
    struct render *r;
    struct value *keys, *items, *spare_keys, *spare_items;
    bool reverse;
};

static enum err merge_halves(struct sorting *s, size_t start, size_t middle, size_t end)
{
    size_t a = start, b = middle;
    for (size_t to = start; to < end; to++) {
        bool second = a == middle;
        if (!second && b < end) {
            int order = 0;
            TRY(render_charge(s->r, 1));
            TRY(value_compare(s->keys[b], s->keys[a], &order));
            second = s->reverse ? order > 0 : order < 0;
        }
        size_t from = second ? b++ : a++;
        s->spare_keys[to] = s->keys[from];
        s->spare_items[to] = s->items[from];
    }
    return OK;
}

enum err list_sort(struct render *r, struct value *keys, struct value *items, size_t n,
                   bool reverse)
{
    struct sorting s = {.r = r, .keys = keys, .items = items, .reverse = reverse};
    TRY(arena_alloc_array(&r->arena, n + 1, sizeof *keys, (void **)&s.spare_keys));
    TRY(arena_alloc_array(&r->arena, n + 1, sizeof *items, (void **)&s.spare_items));
    for (size_t width = 1; width < n; width *= 2) {
        for (size_t start = 0; start < n; start += 2 * width) {
            size_t middle = start + width < n ? start + width : n;
            TRY(merge_halves(&s, start, middle, middle + width < n ? middle + width : n));
        }
        memcpy(keys, s.spare_keys, n * sizeof *keys);
        memcpy(items, s.spare_items, n * sizeof *items);
    }
    return OK;
}

/* ---- Whole sequences ---- */

static enum err copy_list(struct render *r, struct value self, enum list_kind kind,
                          struct value *out)
{
    struct list *list;
    TRY(value_iterate(r, self, &list));
    TRY(render_charge(r, list->n / 4));
    TRY(value_new_list(&r->arena, kind, out));
    for (size_t i = 0; i < list->n; i++)
        TRY(list_add(&r->arena, out->list, list->items[i]));
    return OK;
}

FILTER(list)
{
    (void)args;
    return copy_list(r, self, LIST_LIST, out);
}

FILTER(first)
{
    struct list *list;
    (void)args;
    if (self.kind == VALUE_LIST && self.list->kind == LIST_GENERATOR) {
        bool some = self.list->taken < self.list->n;
        *out = some ? self.list->items[self.list->taken++]
                    : value_undefined("No first item, sequence was empty.");
        return OK;
    }
    TRY(value_iterate(r, self, &list));
    *out = list->n ? list->items[0] : value_undefined("No first item, sequence was empty.");
    return OK;
}

FILTER(last)
{
    struct list *list;
    (void)args;
    if (self.kind == VALUE_LIST && self.list->kind == LIST_GENERATOR)
        FAIL(ERR_INVALID, "'generator' object is not reversible");
    TRY(value_iterate(r, self, &list));
    *out =
        list->n ? list->items[list->n - 1] : value_undefined("No last item, sequence was empty.");
    return OK;
}

FILTER(join)
{
    struct list *list;
    struct buf text;
    struct span separator = {"", 0};
    const struct value *d = args_get(args, 0, "d"), *attribute = args_get(args, 1, "attribute");
    enum err e = OK;
    if (d) TRY(value_to_string(r, *d, &separator));
    TRY(value_iterate(r, self, &list));
    TRY(render_charge(r, list->n));
    buf_init(&text, r->limits.output_bytes_max);
    for (size_t i = 0; i < list->n && !e; i++) {
        struct value item = list->items[i];
        if (attribute && attribute->kind != VALUE_NONE) e = get_path(r, item, *attribute, &item);
        if (!e && i) e = buf_add(&text, separator.data, separator.n);
        if (!e) e = value_write(item, &text);
    }
    if (!e) e = render_charge(r, text.n / 64);
    if (!e) e = value_copy_string(&r->arena, buf_string(&text), text.n, out);
    buf_fini(&text);
    return e;
}

FILTER(reverse)
{
    struct args none = {0};
    struct list *list;
    if (self.kind == VALUE_LIST && self.list->kind == LIST_GENERATOR)
        FAIL(ERR_INVALID, "argument must be iterable");
    TRY(value_iterate(r, self, &list));
    TRY(render_charge(r, list->n));
    TRY(value_new_list(&r->arena, LIST_GENERATOR, out));
    for (size_t i = list->n; i--;)
        TRY(list_add(&r->arena, out->list, list->items[i]));
    if (self.kind != VALUE_STRING) return OK;
    (void)args;
    return builtin_filter("join")->call(r, *out, &none, out);
}

FILTER(items)
{
    struct value view, bound;
    struct args none = {0};
    bool found;
    (void)args;
    if (self.kind == VALUE_UNDEFINED) return value_new_list(&r->arena, LIST_GENERATOR, out);
    if (self.kind != VALUE_DICT) FAIL(ERR_INVALID, "Can only get item pairs from a mapping.");
    TRY(builtin_method(r, self, "items", &bound, &found));
    TRY(template_call(r, bound, &none, &view));
    view.list->kind = LIST_GENERATOR;
    *out = view;
    return OK;
}

FILTER(sort)
{
    struct value *keys;
    bool reverse = args_bool(args, 0, "reverse", false);
    bool case_sensitive = args_bool(args, 1, "case_sensitive", false);
    TRY(copy_list(r, self, LIST_LIST, out));
    TRY(all_keys(r, out->list, args_get(args, 2, "attribute"), case_sensitive, &keys));
    return list_sort(r, keys, out->list->items, out->list->n, reverse);
}

FILTER(dictsort)
{
    struct value pairs, *keys;
    struct args none = {0};
    struct value place = value_int(0);
    struct span by = span_of("key");
    bool case_sensitive = args_bool(args, 0, "case_sensitive", false);
    TRY(args_text(args, 1, "by", &by));
    if (span_equal(by, "value"))
        place = value_int(1);
    else if (!span_equal(by, "key"))
        FAIL(ERR_INVALID, "You can only sort by either \"key\" or \"value\"");
    if (self.kind == VALUE_UNDEFINED) return value_undefined_error(self);
    TRY(filter_items(r, self, &none, &pairs));
    TRY(copy_list(r, pairs, LIST_LIST, out));
    TRY(all_keys(r, out->list, &place, case_sensitive, &keys));
    return list_sort(r, keys, out->list->items, out->list->n, args_bool(args, 2, "reverse", false));
}

FILTER(unique)
{
    struct list *list;
    struct value *keys;
    size_t n = 0;
    TRY(value_iterate(r, self, &list));
    TRY(all_keys(r, list, args_get(args, 1, "attribute"),
                 args_bool(args, 0, "case_sensitive", false), &keys));
    TRY(value_new_list(&r->arena, LIST_GENERATOR, out));
    for (size_t i = 0; i < list->n; i++) {
        bool seen = false;
        TRY(render_charge(r, 1 + n / 8));
        for (size_t k = 0; k < n && !seen; k++)
            seen = value_equal(keys[k], keys[i]);
        if (seen) continue;
        keys[n++] = keys[i];
        TRY(list_add(&r->arena, out->list, list->items[i]));
    }
    return OK;
}

FILTER(groupby)
{
    struct value sorted, *keys, group, row, name;
    struct list *list;
    const struct value *attribute = args_get(args, 0, "attribute");
    bool case_sensitive = args_bool(args, 2, "case_sensitive", false);
    if (!attribute) FAIL(ERR_INVALID, "groupby needs an attribute");
    TRY(copy_list(r, self, LIST_LIST, &sorted));
    list = sorted.list;
    TRY(all_keys(r, list, attribute, case_sensitive, &keys));
    TRY(list_sort(r, keys, list->items, list->n, false));
    TRY(value_new_list(&r->arena, LIST_LIST, out));
    for (size_t i = 0; i < list->n; i++) {
        if (!i || !value_equal(keys[i], keys[i - 1])) {
            TRY(get_path(r, list->items[i], *attribute, &name));
            TRY(value_new_list(&r->arena, LIST_GROUP, &group));
            TRY(value_new_list(&r->arena, LIST_LIST, &row));
            TRY(list_add(&r->arena, group.list, name));
            TRY(list_add(&r->arena, group.list, row));
            TRY(list_add(&r->arena, out->list, group));
        }
        TRY(list_add(&r->arena, row.list, list->items[i]));
    }
    return OK;
}

static enum err extreme(struct render *r, struct value self, const struct args *args, int sign,
                        struct value *out)
{
    struct list *list;
    struct value *keys;
    size_t best = 0;
    TRY(value_iterate(r, self, &list));
    TRY(all_keys(r, list, args_get(args, 1, "attribute"),
                 args_bool(args, 0, "case_sensitive", false), &keys));
    for (size_t i = 1; i < list->n; i++) {
        int order;
        TRY(value_compare(keys[i], keys[best], &order));
        if (order * sign > 0) best = i;
    }
    *out = list->n ? list->items[best] : value_undefined("No aggregated item, sequence was empty.");
    return OK;
}

FILTER(min)
{
    return extreme(r, self, args, -1, out);
}
FILTER(max)
{
    return extreme(r, self, args, 1, out);
}

FILTER(sum)
{
    struct list *list;
    const struct value *attribute = args_get(args, 0, "attribute");
    const struct value *start = args_get(args, 1, "start");
    struct value total = start ? *start : value_int(0);
    TRY(value_iterate(r, self, &list));
    for (size_t i = 0; i < list->n; i++) {
        struct value item = list->items[i];
        TRY(render_charge(r, 1));
        if (attribute && attribute->kind != VALUE_NONE) TRY(get_path(r, item, *attribute, &item));
        TRY(value_binary(r, BINARY_ADD, total, item, &total));
    }
    *out = total;
    return OK;
}

/* ---- Rows ---- */

FILTER(batch)
{
    struct list *list;
    struct value row = {0};
    int64_t n;
    const struct value *fill = args_get(args, 1, "fill_with");
    TRY(args_int(args, 0, "linecount", 0, &n));
    if (n < 1 || n > 100000) FAIL(ERR_INVALID, "batch needs a count from 1 to 100000");
    TRY(value_iterate(r, self, &list));
    TRY(value_new_list(&r->arena, LIST_GENERATOR, out));
    for (size_t i = 0; i < list->n; i++) {
        TRY(render_charge(r, 1));
        if (i % (size_t)n == 0) {
            TRY(value_new_list(&r->arena, LIST_LIST, &row));
            TRY(list_add(&r->arena, out->list, row));
        }
        TRY(list_add(&r->arena, row.list, list->items[i]));
    }
    while (list->n && fill && fill->kind != VALUE_NONE && row.list->n < (size_t)n)
        TRY(list_add(&r->arena, row.list, *fill));
    return OK;
}

FILTER(slice)
{
    struct list *list;
    int64_t n;
    size_t at = 0;
    const struct value *fill = args_get(args, 1, "fill_with");
    TRY(args_int(args, 0, "slices", 0, &n));
    if (n < 1 || n > 100000) FAIL(ERR_INVALID, "slice needs a count from 1 to 100000");
    TRY(value_iterate(r, self, &list));
    TRY(render_charge(r, list->n + (size_t)n));
    TRY(value_new_list(&r->arena, LIST_GENERATOR, out));
    size_t each = list->n / (size_t)n, longer = list->n % (size_t)n;
    for (size_t i = 0; i < (size_t)n; i++) {
        struct value row;
        TRY(value_new_list(&r->arena, LIST_LIST, &row));
        for (size_t k = each + (i < longer); k; k--)
            TRY(list_add(&r->arena, row.list, list->items[at++]));
        if (fill && fill->kind != VALUE_NONE && i >= longer)
            TRY(list_add(&r->arena, row.list, *fill));
        TRY(list_add(&r->arena, out->list, row));
    }
    return OK;
}

/* ---- Choosing ---- */

static void name_of(struct value v, char name[64])
{
    bool text = v.kind == VALUE_STRING && v.string.n < 64;
    snprintf(name, 64, "%.*s", text ? (int)v.string.n : 0, text ? v.string.data : "");
}

/* Keeps the items for which a test holds (or does not); attribute: of whose attribute. */
static enum err choose(struct render *r, struct value self, const struct args *args, bool attribute,
                       bool wanted, struct value *out)
{
    struct list *list;
    const struct test_row *test = NULL;
    size_t first = attribute; /* where the test's name is */
    char name[64];
    if (args->n < first) FAIL(ERR_INVALID, "an attribute's name is missing");
    if (args->n > first) {
        name_of(args->items[first], name);
        test = builtin_test(name);
        if (!test)
            FAIL(ERR_UNSUPPORTED, "chat template, line %d: the test '%s' is not supported", r->line,
                 name);
    }
    TRY(value_new_list(&r->arena, LIST_GENERATOR, out));
    if (!value_is_true(self)) return OK;
    TRY(value_iterate(r, self, &list));
    struct args rest = {.items = args->items + first + 1, .n = test ? args->n - first - 1 : 0};
    for (size_t i = 0; i < list->n; i++) {
        struct value item = list->items[i];
        TRY(render_charge(r, 1));
        if (attribute) TRY(get_path(r, item, args->items[0], &item));
        bool holds = value_is_true(item);
        if (test) TRY(test->call(r, item, &rest, &holds));
        if (holds == wanted) TRY(list_add(&r->arena, out->list, list->items[i]));
    }
    return OK;
}

FILTER(select)
{
    return choose(r, self, args, false, true, out);
}
FILTER(reject)
{
    return choose(r, self, args, false, false, out);
}
FILTER(selectattr)
{
    return choose(r, self, args, true, true, out);
}
FILTER(rejectattr)
{
    return choose(r, self, args, true, false, out);
}

static enum err map_attribute(struct render *r, const struct list *list, const struct args *args,
                              struct value attribute, struct value *out)
{
    const struct value *fallback = args_get(args, SIZE_MAX, "default");
    for (size_t i = 0; i < list->n; i++) {
        struct value item;
        TRY(render_charge(r, 1));
        TRY(get_path(r, list->items[i], attribute, &item));
        if (fallback && item.kind == VALUE_UNDEFINED) item = *fallback;
        TRY(list_add(&r->arena, out->list, item));
    }
    return OK;
}

FILTER(map)
{
    struct list *list;
    char name[64];
    const struct value *attribute = args_get(args, SIZE_MAX, "attribute");
    TRY(value_new_list(&r->arena, LIST_GENERATOR, out));
    if (!value_is_true(self)) return OK;
    TRY(value_iterate(r, self, &list));
    if (!args->n && attribute) return map_attribute(r, list, args, *attribute, out);
    if (!args->n) FAIL(ERR_INVALID, "map requires a filter argument");
    name_of(args->items[0], name);
    const struct filter_row *filter = builtin_filter(name);
    if (!filter)
        FAIL(ERR_UNSUPPORTED, "chat template, line %d: the filter '%s' is not supported", r->line,
             name);
    struct args rest = {
        .items = args->items + 1, .n = args->n - 1, .named = args->named, .n_named = args->n_named};
    for (size_t i = 0; i < list->n; i++) {
        struct value item;
        TRY(render_charge(r, 1));
        TRY(filter->call(r, list->items[i], &rest, &item));
        TRY(list_add(&r->arena, out->list, item));
    }
    return OK;
}

#define ROW(filter)                                                                                \
    {                                                                                              \
#filter, filter_##filter                                                                   \
    }
const struct filter_row SEQUENCE_FILTERS[] = {
    ROW(list),       ROW(first),    ROW(last),    ROW(join),    ROW(reverse), ROW(items),
    ROW(sort),       ROW(dictsort), ROW(unique),  ROW(groupby), ROW(min),     ROW(max),
    ROW(sum),        ROW(batch),    ROW(slice),   ROW(select),  ROW(reject),  ROW(selectattr),
    ROW(rejectattr), ROW(map),      {NULL, NULL},
};
