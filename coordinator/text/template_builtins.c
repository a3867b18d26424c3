/* Global functions, arguments of calls, and the look-up of filters by name. */
#include "coordinator/text/template_builtins.h"
#include "base/mem.h"
#include "coordinator/text/template_render.h"
#include "coordinator/text/unicode.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

/* ---- Arguments ---- */

const struct value *args_get(const struct args *args, size_t place, const char *name)
{
    if (place < args->n) return &args->items[place];
    for (size_t i = 0; name && i < args->n_named; i++)
        if (!strcmp(args->named[i].name, name)) return &args->named[i].value;
    return NULL;
}

enum err args_int(const struct args *args, size_t place, const char *name, int64_t fallback,
                  int64_t *out)
{
    const struct value *v = args_get(args, place, name);
    if (v && v->kind != VALUE_INT && v->kind != VALUE_BOOL)
        FAIL(ERR_INVALID, "the argument '%s' must be an integer, not %s", name,
             value_type_name(*v));
    *out = v ? value_as_int(*v) : fallback;
    return OK;
}

bool args_bool(const struct args *args, size_t place, const char *name, bool fallback)
{
    const struct value *v = args_get(args, place, name);
    return v ? value_is_true(*v) : fallback;
}

enum err args_text(const struct args *args, size_t place, const char *name, struct span *out)
{
    const struct value *v = args_get(args, place, name);
    if (v && v->kind != VALUE_STRING)
        FAIL(ERR_INVALID, "the argument '%s' must be a string, not %s", name, value_type_name(*v));
    if (v) *out = v->string;
    return OK;
}

const struct filter_row *builtin_filter(const char *name)
{
    const struct filter_row *tables[] = {TEXT_FILTERS, SEQUENCE_FILTERS};
    for (size_t i = 0; i < 2; i++)
        for (const struct filter_row *row = tables[i]; row->name; row++)
            if (!strcmp(row->name, name)) return row;
    return NULL;
}

/* ---- Global functions ---- */

enum { RANGE_MAX = 100000 };

static enum err call_range(struct render *r, struct value self, const struct args *args,
                           struct value *out)
{
    int64_t start = 0, stop, step = 1;
    (void)self;
    if (!args->n || args->n > 3) FAIL(ERR_INVALID, "range takes from 1 to 3 arguments");
    TRY(args_int(args, 0, "start", 0, &stop));
    if (args->n > 1) {
        start = stop;
        TRY(args_int(args, 1, "stop", 0, &stop));
    }
    TRY(args_int(args, 2, "step", 1, &step));
    if (!step) FAIL(ERR_INVALID, "range() arg 3 must not be zero");
    TRY(value_new_list(&r->arena, LIST_RANGE, out));
    for (int64_t i = start; step > 0 ? i < stop : i > stop;) {
        if (out->list->n == RANGE_MAX)
            FAIL(ERR_INVALID, "range too big: the limit is %d", RANGE_MAX);
        TRY(list_add(&r->arena, out->list, value_int(i)));
        if (__builtin_add_overflow(i, step, &i)) break;
    }
    return render_charge(r, out->list->n / 4);
}

/* The entries of a list of pairs. */
static enum err add_pairs(struct render *r, struct dict *dict, struct value pairs)
{
    struct list *list, *pair;
    TRY(value_iterate(r, pairs, &list));
    for (size_t i = 0; i < list->n; i++) {
        TRY(value_iterate(r, list->items[i], &pair));
        TRY(render_charge(r, 1 + dict->n / 16));
        if (pair->n != 2) FAIL(ERR_INVALID, "a dict is made of mappings, pairs and names");
        TRY(dict_set(&r->arena, dict, pair->items[0], pair->items[1]));
    }
    return OK;
}

static enum err add_entries(struct render *r, struct dict *dict, const struct args *args)
{
    for (size_t i = 0; i < args->n; i++) {
        if (args->items[i].kind == VALUE_UNDEFINED) return value_undefined_error(args->items[i]);
        if (args->items[i].kind != VALUE_DICT) {
            TRY(add_pairs(r, dict, args->items[i]));
            continue;
        }
        const struct dict *from = args->items[i].dict;
        TRY(render_charge(r, from->n * from->n / 64 + 1));
        for (size_t k = 0; k < from->n; k++)
            TRY(dict_set(&r->arena, dict, from->entries[k].key, from->entries[k].value));
    }
    for (size_t i = 0; i < args->n_named; i++)
        TRY(dict_set(&r->arena, dict, value_string(args->named[i].name), args->named[i].value));
    return OK;
}

static enum err call_dict(struct render *r, struct value self, const struct args *args,
                          struct value *out)
{
    (void)self;
    TRY(value_new_dict(&r->arena, out));
    return add_entries(r, out->dict, args);
}

static enum err call_namespace(struct render *r, struct value self, const struct args *args,
                               struct value *out)
{
    TRY(call_dict(r, self, args, out));
    out->kind = VALUE_NAMESPACE;
    return OK;
}

static enum err call_raise(struct render *r, struct value self, const struct args *args,
                           struct value *out)
{
    struct span words = {"the template raised an exception", 32};
    (void)self;
    (void)out;
    if (args->n) TRY(value_to_string(r, args->items[0], &words));
    r->raised = true;
    FAIL(ERR_INVALID, "%.*s", words.n < 1000 ? (int)words.n : 1000, words.data);
}

static enum err call_strftime(struct render *r, struct value self, const struct args *args,
                              struct value *out)
{
    char format[256], text[1024];
    struct span given = {0};
    struct tm tm;
    time_t now = (time_t)r->limits.now_unix_s;
    (void)self;
    TRY(args_text(args, 0, "format", &given));
    if (!given.data || given.n >= sizeof format)
        FAIL(ERR_INVALID, "strftime_now takes a format of at most 255 bytes");
    snprintf(format, sizeof format, "%.*s", (int)given.n, given.data);
    if (!gmtime_r(&now, &tm)) FAIL(ERR_INVALID, "the time is out of range");
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
    size_t n = strftime(text, sizeof text, format, &tm);
#pragma GCC diagnostic pop
    struct buf valid;
    buf_init(&valid, 0);
    enum err e = unicode_add_valid(&valid, text, n);
    if (!e) e = value_copy_string(&r->arena, buf_string(&valid), valid.n, out);
    buf_fini(&valid);
    return e;
}

static enum err new_cycler(struct render *r, enum value_kind kind, const struct value *items,
                           size_t n, struct value *out)
{
    struct cycler *c;
    TRY(arena_alloc(&r->arena, sizeof *c, (void **)&c));
    TRY(arena_alloc_array(&r->arena, n + 1, sizeof *c->items, (void **)&c->items));
    if (n) memcpy(c->items, items, n * sizeof *items);
    c->n = n;
    *out = (struct value){.kind = kind, .cycler = c};
    return OK;
}

static enum err call_joiner(struct render *r, struct value self, const struct args *args,
                            struct value *out)
{
    const struct value *given = args_get(args, 0, "sep");
    struct value separator = given ? *given : value_string(", ");
    (void)self;
    return new_cycler(r, VALUE_JOINER, &separator, 1, out);
}

static enum err call_cycler(struct render *r, struct value self, const struct args *args,
                            struct value *out)
{
    (void)self;
    if (!args->n) FAIL(ERR_INVALID, "cycler needs at least one item");
    return new_cycler(r, VALUE_CYCLER, args->items, args->n, out);
}

static const struct function GLOBALS[] = {
    {.name = "range", .call = call_range},
    {.name = "dict", .call = call_dict},
    {.name = "namespace", .call = call_namespace},
    {.name = "raise_exception", .call = call_raise},
    {.name = "strftime_now", .call = call_strftime},
    {.name = "joiner", .call = call_joiner},
    {.name = "cycler", .call = call_cycler},
};

const struct function *builtin_global(const char *name)
{
    for (size_t i = 0; i < sizeof GLOBALS / sizeof *GLOBALS; i++)
        if (!strcmp(GLOBALS[i].name, name)) return &GLOBALS[i];
    return NULL;
}
