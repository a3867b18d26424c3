/* Expressions of a template to values. Knows nothing of statements. */
#include "coordinator/text/template_builtins.h"
#include "coordinator/text/template_render.h"
#include "coordinator/text/unicode.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum err render_charge(struct render *r, size_t n)
{
    r->steps += n + value_take_work() / 8;
    if (r->steps > r->limits.steps_max)
        FAIL(ERR_INVALID, "more than %zu steps (the limit steps_max)", r->limits.steps_max);
    return OK;
}

enum err value_undefined_error(struct value v)
{
    FAIL(ERR_INVALID, "%s", v.hint ? v.hint : "a value is undefined");
}

/* "'name' is undefined", kept for the error that may come of it. */
static enum err undefined_because(struct render *r, struct value *out, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
static enum err undefined_because(struct render *r, struct value *out, const char *format, ...)
{
    char words[256];
    struct value text;
    va_list args;
    va_start(args, format);
    vsnprintf(words, sizeof words, format, args);
    va_end(args);
    TRY(value_copy_string(&r->arena, words, strlen(words), &text));
    *out = value_undefined(text.string.data);
    return OK;
}

/* ---- Names and parts ---- */

static enum err evaluate_name(struct render *r, const char *name, struct value *out)
{
    for (const struct scope *s = r->scope; s; s = s->parent)
        for (size_t i = s->n; i--;)
            if (!strcmp(s->items[i].name, name)) {
                *out = s->items[i].value;
                return OK;
            }
    const struct value *found = dict_find_text(r->context, name);
    const struct function *global = found ? NULL : builtin_global(name);
    if (found)
        *out = *found;
    else if (global)
        *out = (struct value){.kind = VALUE_FUNCTION, .function = (void *)global};
    else
        return undefined_because(r, out, "'%.100s' is undefined", name);
    return OK;
}

static enum err loop_attribute(const struct loop *loop, const char *name, struct value *out,
                               bool *out_found)
{
    int64_t i = (int64_t)loop->index, n = (int64_t)loop->n;
    const struct {
        const char *name;
        struct value value;
    } fields[] = {
        {"index", value_int(i + 1)},
        {"index0", value_int(i)},
        {"revindex", value_int(n - i)},
        {"revindex0", value_int(n - i - 1)},
        {"first", value_bool(i == 0)},
        {"last", value_bool(i + 1 == n)},
        {"length", value_int(n)},
        {"depth", value_int(loop->depth)},
        {"depth0", value_int(loop->depth - 1)},
        {"previtem", i ? loop->items[i - 1] : value_undefined("there is no previous item")},
        {"nextitem", i + 1 < n ? loop->items[i + 1] : value_undefined("there is no next item")},
    };
    for (size_t k = 0; k < sizeof fields / sizeof *fields; k++) {
        if (strcmp(fields[k].name, name)) continue;
        *out = fields[k].value;
        *out_found = true;
    }
    return OK;
}

/* Attributes that are neither methods nor entries. */
static enum err find_field(struct value v, const char *name, struct value *out, bool *out_found)
{
    const struct value *entry = NULL;
    if (v.kind == VALUE_LOOP) return loop_attribute(v.loop, name, out, out_found);
    if (v.kind == VALUE_DICT || v.kind == VALUE_NAMESPACE) entry = dict_find_text(v.dict, name);
    if (v.kind == VALUE_LIST && v.list->kind == LIST_GROUP)
        entry = !strcmp(name, "grouper") ? &v.list->items[0]
                : !strcmp(name, "list")  ? &v.list->items[1]
                                         : NULL;
    if (v.kind == VALUE_CYCLER && !strcmp(name, "current") && v.cycler->n)
        entry = &v.cycler->items[v.cycler->at];
    *out_found = entry;
    if (entry) *out = *entry;
    if (v.kind == VALUE_MACRO && !strcmp(name, "name")) {
        *out = value_string(v.macro->name);
        *out_found = true;
    }
    return OK;
}

enum err value_attribute(struct render *r, struct value v, const char *name, struct value *out)
{
    bool found = false;
    if (v.kind == VALUE_UNDEFINED) return value_undefined_error(v);
    if (v.kind == VALUE_DICT || v.kind == VALUE_NAMESPACE) TRY(render_charge(r, v.dict->n / 16));
    TRY(builtin_method(r, v, name, out, &found));
    if (!found) TRY(find_field(v, name, out, &found));
    if (found) return OK;
    return undefined_because(r, out, "'%s object' has no attribute '%.100s'", value_type_name(v),
                             name);
}

/* An index counted from the end when negative; false when there is no such item. */
static bool find_index(struct value key, size_t n, size_t *out)
{
    if (key.kind != VALUE_INT && key.kind != VALUE_BOOL) return false;
    int64_t i = value_as_int(key);
    if (i < 0) i += (int64_t)n;
    if (i < 0 || (uint64_t)i >= n) return false;
    *out = (size_t)i;
    return true;
}

enum err value_item(struct render *r, struct value v, struct value key, struct value *out)
{
    size_t i;
    if (v.kind == VALUE_UNDEFINED) return value_undefined_error(v);
    if (v.kind == VALUE_DICT) {
        TRY(render_charge(r, v.dict->n / 16));
        const struct value *found = dict_find(v.dict, key);
        if (found) {
            *out = *found;
            return OK;
        }
    }
    if (v.kind == VALUE_LIST && v.list->kind != LIST_VIEW && v.list->kind != LIST_GENERATOR &&
        find_index(key, v.list->n, &i)) {
        *out = v.list->items[i];
        return OK;
    }
    if (v.kind == VALUE_STRING) {
        TRY(render_charge(r, v.string.n / 64));
        if (find_index(key, text_length(v.string), &i)) {
            size_t start = text_offset(v.string, i);
            struct span rest = {v.string.data + start, v.string.n - start};
            *out = value_span(rest.data, text_offset(rest, 1));
            return OK;
        }
    }
    if (key.kind == VALUE_STRING) {
        char name[256]; /* no attribute has a longer name */
        snprintf(name, sizeof name, "%.*s", key.string.n < 255 ? (int)key.string.n : 255,
                 key.string.data);
        return value_attribute(r, v, name, out);
    }
    return undefined_because(r, out, "'%s object' has no such element", value_type_name(v));
}

/* ---- Slices ---- */

static enum err slice_bound(struct render *r, const struct node *node, bool *out_given,
                            int64_t *out)
{
    struct value v = value_none();
    if (node) TRY(template_evaluate(r, node, &v));
    *out_given = v.kind != VALUE_NONE;
    if (!*out_given) return OK;
    if (v.kind != VALUE_INT && v.kind != VALUE_BOOL)
        FAIL(ERR_INVALID, "slice indices must be integers or None");
    *out = value_as_int(v);
    return OK;
}

struct slice {
    int64_t start, stop, step;
};

/* Python's rules for slices of n items (slice.indices). */
static enum err slice_indices(struct render *r, const struct node *node, int64_t n,
                              struct slice *out)
{
    bool has_start, has_stop, has_step;
    int64_t start = 0, stop = 0, step = 1;
    TRY(slice_bound(r, node->b, &has_start, &start));
    TRY(slice_bound(r, node->c, &has_stop, &stop));
    TRY(slice_bound(r, node->d, &has_step, &step));
    if (!has_step) step = 1;
    if (step == 0) FAIL(ERR_INVALID, "slice step cannot be zero");
    int64_t low = step < 0 ? -1 : 0, high = step < 0 ? n - 1 : n;
    if (start < 0)
        start = start < -n ? low : start + n < low ? low : start + n;
    else if (start > high)
        start = high;
    if (stop < 0)
        stop = stop < -n ? low : stop + n < low ? low : stop + n;
    else if (stop > high)
        stop = high;
    if (!has_start) start = step < 0 ? high : low;
    if (!has_stop) stop = step < 0 ? low : high;
    if (step > n) step = n + 1; /* so that adding it cannot overflow */
    if (step < -n) step = -n - 1;
    *out = (struct slice){start, stop, step};
    return OK;
}

static enum err slice_text(struct render *r, struct span s, const struct slice *c,
                           struct value *out)
{
    struct buf text;
    if (c->step == 1) {
        size_t from = text_offset(s, (size_t)c->start), to = text_offset(s, (size_t)c->stop);
        *out = value_span(s.data + from, to > from ? to - from : 0);
        return OK;
    }
    size_t *offsets, n = text_length(s);
    TRY(arena_alloc_array(&r->arena, n + 1, sizeof *offsets, (void **)&offsets));
    for (size_t i = 0, at = 0; i < n; i++) {
        uint32_t code;
        offsets[i] = at;
        at += unicode_next(s.data + at, s.n - at, &code);
    }
    offsets[n] = s.n;
    buf_init(&text, 0);
    enum err e = OK;
    for (int64_t i = c->start; !e && (c->step > 0 ? i < c->stop : i > c->stop); i += c->step)
        e = buf_add(&text, s.data + offsets[i], offsets[i + 1] - offsets[i]);
    if (!e) e = value_copy_string(&r->arena, buf_string(&text), text.n, out);
    buf_fini(&text);
    return e;
}

static enum err evaluate_slice(struct render *r, const struct node *node, struct value *out)
{
    struct value v;
    struct slice c;
    TRY(template_evaluate(r, node->a, &v));
    if (v.kind == VALUE_UNDEFINED) return value_undefined_error(v);
    if (v.kind == VALUE_STRING) {
        TRY(render_charge(r, v.string.n / 64));
        TRY(slice_indices(r, node, (int64_t)text_length(v.string), &c));
        return slice_text(r, v.string, &c, out);
    }
    if (v.kind != VALUE_LIST || v.list->kind == LIST_GENERATOR || v.list->kind == LIST_VIEW)
        FAIL(ERR_INVALID, "'%s' object is not subscriptable", value_type_name(v));
    TRY(slice_indices(r, node, (int64_t)v.list->n, &c));
    TRY(value_new_list(&r->arena, v.list->kind == LIST_GROUP ? LIST_TUPLE : v.list->kind, out));
    for (int64_t i = c.start; c.step > 0 ? i < c.stop : i > c.stop; i += c.step) {
        TRY(render_charge(r, 1));
        TRY(list_add(&r->arena, out->list, v.list->items[i]));
    }
    return OK;
}

/* ---- Walking ---- */

enum err value_iterate(struct render *r, struct value v, struct list **out)
{
    struct value list;
    if (v.kind == VALUE_LIST && v.list->kind != LIST_GENERATOR) {
        *out = v.list;
        return OK;
    }
    TRY(value_new_list(&r->arena, LIST_LIST, &list));
    *out = list.list;
    switch (v.kind) {
    case VALUE_UNDEFINED:
        return OK;
    case VALUE_LIST:
        list.list->items = v.list->items + v.list->taken;
        list.list->n = list.list->capacity = v.list->n - v.list->taken;
        v.list->taken = v.list->n;
        return OK;
    case VALUE_DICT:
        TRY(render_charge(r, v.dict->n));
        for (size_t i = 0; i < v.dict->n; i++)
            TRY(list_add(&r->arena, list.list, v.dict->entries[i].key));
        return OK;
    case VALUE_STRING:
        TRY(render_charge(r, v.string.n));
        for (size_t at = 0, len; at < v.string.n; at += len) {
            uint32_t code;
            len = unicode_next(v.string.data + at, v.string.n - at, &code);
            TRY(list_add(&r->arena, list.list, value_span(v.string.data + at, len)));
        }
        return OK;
    default:
        FAIL(ERR_INVALID, "'%s' object is not iterable", value_type_name(v));
    }
}

enum err value_contains(struct render *r, struct value container, struct value item, bool *out)
{
    struct list *list;
    if (container.kind == VALUE_STRING) {
        struct span s = container.string;
        if (item.kind == VALUE_UNDEFINED) return value_undefined_error(item);
        if (item.kind != VALUE_STRING)
            FAIL(ERR_INVALID, "'in <string>' requires string as left operand, not %s",
                 value_type_name(item));
        TRY(render_charge(r, s.n / 64));
        *out = !item.string.n || (s.n && memmem(s.data, s.n, item.string.data, item.string.n));
        return OK;
    }
    if (container.kind == VALUE_DICT) {
        TRY(render_charge(r, container.dict->n / 16));
        *out = dict_find(container.dict, item) != NULL;
        return OK;
    }
    if (container.kind != VALUE_LIST && container.kind != VALUE_UNDEFINED)
        FAIL(ERR_INVALID, "argument of type '%s' is not iterable", value_type_name(container));
    TRY(value_iterate(r, container, &list));
    TRY(render_charge(r, list->n / 16));
    *out = false;
    for (size_t i = 0; i < list->n && !*out; i++)
        *out = value_equal(list->items[i], item);
    return OK;
}

/* ---- Calls ---- */

static enum err add_argument(struct render *r, struct args *args, struct value v)
{
    struct list list = {.items = args->items, .n = args->n, .capacity = args->capacity};
    TRY(list_add(&r->arena, &list, v));
    args->items = list.items, args->n = list.n, args->capacity = list.capacity;
    return OK;
}

static enum err add_named(struct render *r, struct args *args, const char *name, struct value v)
{
    struct binding *named;
    TRY(render_charge(r, args->n_named));
    for (size_t i = 0; i < args->n_named; i++)
        if (!strcmp(args->named[i].name, name))
            FAIL(ERR_INVALID, "the argument '%.100s' is given twice", name);
    TRY(arena_alloc_array(&r->arena, args->n_named + 1, sizeof *named, (void **)&named));
    if (args->n_named) memcpy(named, args->named, args->n_named * sizeof *named);
    named[args->n_named] = (struct binding){name, v};
    args->named = named;
    args->n_named++;
    return OK;
}

static enum err spread_named(struct render *r, struct args *args, struct value v)
{
    if (v.kind != VALUE_DICT)
        FAIL(ERR_INVALID, "argument after ** must be a mapping, not %s", value_type_name(v));
    for (size_t i = 0; i < v.dict->n; i++) {
        struct value key = v.dict->entries[i].key, copy;
        if (key.kind != VALUE_STRING) FAIL(ERR_INVALID, "keywords must be strings");
        TRY(value_copy_string(&r->arena, key.string.data, key.string.n, &copy));
        TRY(add_named(r, args, copy.string.data, v.dict->entries[i].value));
    }
    return OK;
}

enum err template_arguments(struct render *r, const struct node *nodes, struct args *out)
{
    struct args args = {0};
    for (const struct node *node = nodes; node; node = node->next) {
        struct value v;
        struct list *list;
        TRY(template_evaluate(r, node->a, &v));
        if (node->kind == NODE_ARGUMENT) TRY(add_argument(r, &args, v));
        if (node->kind == NODE_KEYWORD) TRY(add_named(r, &args, node->text, v));
        if (node->kind == NODE_SPREAD_KEYWORDS) TRY(spread_named(r, &args, v));
        if (node->kind != NODE_SPREAD) continue;
        TRY(value_iterate(r, v, &list));
        for (size_t i = 0; i < list->n; i++)
            TRY(add_argument(r, &args, list->items[i]));
    }
    *out = args;
    return OK;
}

enum err template_call(struct render *r, struct value callee, const struct args *args,
                       struct value *out)
{
    switch (callee.kind) {
    case VALUE_FUNCTION:
        return callee.function->call(r, callee.function->self, args, out);
    case VALUE_MACRO:
        return template_call_macro(r, callee.macro, args, out);
    case VALUE_LOOP:
        return template_call_loop(r, callee.loop, args, out);
    case VALUE_JOINER: /* nothing the first time, then its separator */
        *out = callee.cycler->at++ ? callee.cycler->items[0] : value_string("");
        return OK;
    case VALUE_UNDEFINED:
        return value_undefined_error(callee);
    default:
        FAIL(ERR_INVALID, "'%s' object is not callable", value_type_name(callee));
    }
}

static enum err evaluate_call(struct render *r, const struct node *node, struct value *out)
{
    struct value callee;
    struct args args;
    TRY(template_evaluate(r, node->a, &callee));
    if (callee.kind == VALUE_UNDEFINED) return value_undefined_error(callee);
    TRY(template_arguments(r, node->args, &args));
    r->line = node->line;
    return template_call(r, callee, &args, out);
}

static enum err evaluate_filter(struct render *r, const struct node *node, struct value *out)
{
    struct value v;
    struct args args;
    TRY(template_evaluate(r, node->a, &v));
    TRY(template_arguments(r, node->args, &args));
    r->line = node->line;
    return node->filter->call(r, v, &args, out);
}

enum err template_apply_filters(struct render *r, const struct node *filters, struct value in,
                                struct value *out)
{
    struct args args;
    if (filters->a) TRY(template_apply_filters(r, filters->a, in, &in));
    TRY(template_arguments(r, filters->args, &args));
    r->line = filters->line;
    return filters->filter->call(r, in, &args, out);
}

static enum err evaluate_test(struct render *r, const struct node *node, struct value *out)
{
    struct value v;
    struct args args;
    bool result = false;
    TRY(template_evaluate(r, node->a, &v));
    TRY(template_arguments(r, node->args, &args));
    TRY(node->test->call(r, v, &args, &result));
    *out = value_bool(result);
    return OK;
}

/* ---- The rest ---- */

static enum err evaluate_items(struct render *r, const struct node *node, enum list_kind kind,
                               struct value *out)
{
    TRY(value_new_list(&r->arena, kind, out));
    for (const struct node *item = node->items; item; item = item->next) {
        struct value v;
        TRY(template_evaluate(r, item, &v));
        TRY(list_add(&r->arena, out->list, v));
    }
    return OK;
}

static bool is_hashable(struct value v)
{
    return v.kind != VALUE_DICT && (v.kind != VALUE_LIST || v.list->kind == LIST_TUPLE);
}

static enum err evaluate_dict(struct render *r, const struct node *node, struct value *out)
{
    TRY(value_new_dict(&r->arena, out));
    for (const struct node *item = node->items; item; item = item->next->next) {
        struct value key, v;
        TRY(template_evaluate(r, item, &key));
        TRY(template_evaluate(r, item->next, &v));
        if (!is_hashable(key)) FAIL(ERR_INVALID, "unhashable type: '%s'", value_type_name(key));
        TRY(render_charge(r, out->dict->n / 16));
        TRY(dict_set(&r->arena, out->dict, key, v));
    }
    return OK;
}

static enum err compare_once(struct render *r, enum binary_operator op, struct value a,
                             struct value b, bool *out)
{
    int order = 0;
    switch (op) {
    case COMPARE_EQUAL:
        *out = value_equal(a, b);
        return OK;
    case COMPARE_NOT_EQUAL:
        *out = !value_equal(a, b);
        return OK;
    case COMPARE_IN:
        return value_contains(r, b, a, out);
    case COMPARE_NOT_IN:
        TRY(value_contains(r, b, a, out));
        *out = !*out;
        return OK;
    default:
        break;
    }
    if (a.kind == VALUE_UNDEFINED) return value_undefined_error(a);
    if (b.kind == VALUE_UNDEFINED) return value_undefined_error(b);
    TRY(value_compare(a, b, &order));
    bool nan =
        (a.kind == VALUE_FLOAT && isnan(a.number)) || (b.kind == VALUE_FLOAT && isnan(b.number));
    *out = !nan && (op == COMPARE_LESS         ? order < 0
                    : op == COMPARE_LESS_EQUAL ? order <= 0
                    : op == COMPARE_GREATER    ? order > 0
                                               : order >= 0);
    return OK;
}

static enum err evaluate_comparison(struct render *r, const struct node *node, struct value *out)
{
    struct value a, b;
    bool result = true;
    TRY(template_evaluate(r, node->a, &a));
    for (const struct node *item = node->items; item && result; item = item->next, a = b) {
        TRY(template_evaluate(r, item->a, &b));
        r->line = item->line;
        TRY(compare_once(r, item->op, a, b, &result));
    }
    *out = value_bool(result);
    return OK;
}

static enum err evaluate_sign(struct render *r, const struct node *node, struct value *out)
{
    struct value v;
    TRY(template_evaluate(r, node->a, &v));
    if (v.kind == VALUE_UNDEFINED) return value_undefined_error(v);
    if (!value_is_number(v))
        FAIL(ERR_INVALID, "bad operand type for unary sign: '%s'", value_type_name(v));
    bool negative = node->kind == NODE_NEGATIVE;
    if (v.kind == VALUE_FLOAT) {
        *out = value_float(negative ? -v.number : v.number);
        return OK;
    }
    int64_t i = value_as_int(v);
    if (negative && i == INT64_MIN) FAIL(ERR_INVALID, "an integer beyond 64 bits");
    *out = value_int(negative ? -i : i);
    return OK;
}

static enum err evaluate_conditional(struct render *r, const struct node *node, struct value *out)
{
    struct value condition;
    TRY(template_evaluate(r, node->b, &condition));
    if (value_is_true(condition)) return template_evaluate(r, node->a, out);
    if (node->c) return template_evaluate(r, node->c, out);
    *out = value_undefined("the inline if has no else");
    return OK;
}

static enum err evaluate_logical(struct render *r, const struct node *node, struct value *out)
{
    TRY(template_evaluate(r, node->a, out));
    if (value_is_true(*out) == (node->kind == NODE_OR)) return OK;
    return template_evaluate(r, node->b, out);
}

static enum err evaluate_two(struct render *r, const struct node *node, struct value *out)
{
    struct value a, b;
    TRY(template_evaluate(r, node->a, &a));
    TRY(template_evaluate(r, node->b, &b));
    r->line = node->line;
    if (node->kind == NODE_INDEX) return value_item(r, a, b, out);
    return value_binary(r, node->op, a, b, out);
}

static enum err evaluate(struct render *r, const struct node *node, struct value *out)
{
    struct value v;
    switch (node->kind) {
    case NODE_LITERAL:
        *out = node->value;
        return OK;
    case NODE_NAME:
        return evaluate_name(r, node->text, out);
    case NODE_ATTRIBUTE:
        TRY(template_evaluate(r, node->a, &v));
        r->line = node->line;
        return value_attribute(r, v, node->text, out);
    case NODE_INDEX:
    case NODE_BINARY:
        return evaluate_two(r, node, out);
    case NODE_SLICE:
        return evaluate_slice(r, node, out);
    case NODE_CALL:
        return evaluate_call(r, node, out);
    case NODE_FILTER:
        return evaluate_filter(r, node, out);
    case NODE_TEST:
        return evaluate_test(r, node, out);
    case NODE_NOT:
        TRY(template_evaluate(r, node->a, &v));
        *out = value_bool(!value_is_true(v));
        return OK;
    case NODE_NEGATIVE:
    case NODE_POSITIVE:
        return evaluate_sign(r, node, out);
    case NODE_AND:
    case NODE_OR:
        return evaluate_logical(r, node, out);
    case NODE_COMPARE:
        return evaluate_comparison(r, node, out);
    case NODE_CONDITIONAL:
        return evaluate_conditional(r, node, out);
    case NODE_LIST:
        return evaluate_items(r, node, LIST_LIST, out);
    case NODE_TUPLE:
        return evaluate_items(r, node, LIST_TUPLE, out);
    case NODE_DICT:
        return evaluate_dict(r, node, out);
    default:
        FAIL(ERR_INTERNAL, "node %d is no expression", (int)node->kind);
    }
}

enum err template_evaluate(struct render *r, const struct node *node, struct value *out)
{
    struct value result;
    TRY(render_charge(r, 1));
    r->line = node->line;
    if (++r->depth > r->limits.depth_max)
        FAIL(ERR_INVALID, "nested deeper than %d (the limit depth_max)", r->limits.depth_max);
    enum err e = evaluate(r, node, &result);
    r->depth--;
    if (!e) *out = result;
    return e;
}
