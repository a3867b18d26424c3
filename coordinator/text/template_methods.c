/* Methods of dicts, lists, loops and cyclers; those of strings have a file of their own. */
#include "coordinator/text/template_builtins.h"
#include "coordinator/text/template_render.h"

#include <string.h>

/* what: 0 keys, 1 values, 2 pairs */
static enum err dict_view(struct render *r, struct value self, int what, struct value *out)
{
    static const char *const names[] = {"dict_keys", "dict_values", "dict_items"};
    TRY(render_charge(r, self.dict->n));
    TRY(value_new_list(&r->arena, LIST_VIEW, out));
    out->list->view_name = names[what];
    for (size_t i = 0; i < self.dict->n; i++) {
        struct value key = self.dict->entries[i].key, v = self.dict->entries[i].value, pair;
        if (what == 2) {
            TRY(value_new_list(&r->arena, LIST_TUPLE, &pair));
            TRY(list_add(&r->arena, pair.list, key));
            TRY(list_add(&r->arena, pair.list, v));
        }
        TRY(list_add(&r->arena, out->list, what == 0 ? key : what == 1 ? v : pair));
    }
    return OK;
}

static enum err dict_keys(struct render *r, struct value self, const struct args *args,
                          struct value *out)
{
    (void)args;
    return dict_view(r, self, 0, out);
}

static enum err dict_values(struct render *r, struct value self, const struct args *args,
                            struct value *out)
{
    (void)args;
    return dict_view(r, self, 1, out);
}

static enum err dict_items(struct render *r, struct value self, const struct args *args,
                           struct value *out)
{
    (void)args;
    return dict_view(r, self, 2, out);
}

static enum err dict_get(struct render *r, struct value self, const struct args *args,
                         struct value *out)
{
    if (!args->n) FAIL(ERR_INVALID, "get needs a key");
    TRY(render_charge(r, self.dict->n / 16));
    const struct value *found = dict_find(self.dict, args->items[0]);
    const struct value *fallback = args_get(args, 1, "default");
    *out = found ? *found : fallback ? *fallback : value_none();
    return OK;
}

static enum err dict_copy(struct render *r, struct value self, const struct args *args,
                          struct value *out)
{
    (void)args;
    struct args all = {.items = &self, .n = 1};
    return builtin_global("dict")->call(r, self, &all, out);
}

/* What would change a value that others see: refused, as the sandbox refuses it. */
static enum err refuse_change(struct render *r, struct value self, const struct args *args,
                              struct value *out)
{
    (void)r;
    (void)args;
    (void)out;
    FAIL(ERR_INVALID, "changing a '%s' object is not safe", value_type_name(self));
}

static enum err list_pop(struct render *r, struct value self, const struct args *args,
                         struct value *out)
{
    struct list *list = self.list;
    int64_t at;
    (void)r;
    if (list->kind != LIST_LIST) return refuse_change(r, self, args, out);
    TRY(args_int(args, 0, "index", -1, &at));
    if (at < 0) at += (int64_t)list->n;
    if (at < 0 || (uint64_t)at >= list->n) FAIL(ERR_INVALID, "pop index out of range");
    *out = list->items[at];
    /* A loop may be walking over the old items: the rest moves to a new place. */
    struct value *items;
    TRY(render_charge(r, list->n / 16));
    TRY(arena_alloc_array(&r->arena, list->n, sizeof *items, (void **)&items));
    memcpy(items, list->items, (size_t)at * sizeof *items);
    memcpy(items + at, list->items + at + 1, (list->n - (size_t)at - 1) * sizeof *items);
    list->capacity = list->n--;
    list->items = items;
    return OK;
}

static enum err list_index(struct render *r, struct value self, const struct args *args,
                           struct value *out)
{
    if (!args->n) FAIL(ERR_INVALID, "index needs a value");
    TRY(render_charge(r, self.list->n / 16));
    for (size_t i = 0; i < self.list->n; i++)
        if (value_equal(self.list->items[i], args->items[0])) {
            *out = value_int((int64_t)i);
            return OK;
        }
    FAIL(ERR_INVALID, "the value is not in the list");
}

static enum err list_count(struct render *r, struct value self, const struct args *args,
                           struct value *out)
{
    int64_t n = 0;
    if (!args->n) FAIL(ERR_INVALID, "count needs a value");
    TRY(render_charge(r, self.list->n / 16));
    for (size_t i = 0; i < self.list->n; i++)
        n += value_equal(self.list->items[i], args->items[0]);
    *out = value_int(n);
    return OK;
}

static enum err list_copy(struct render *r, struct value self, const struct args *args,
                          struct value *out)
{
    (void)args;
    TRY(render_charge(r, self.list->n / 4));
    TRY(value_new_list(&r->arena, LIST_LIST, out));
    for (size_t i = 0; i < self.list->n; i++)
        TRY(list_add(&r->arena, out->list, self.list->items[i]));
    return OK;
}

static enum err loop_cycle(struct render *r, struct value self, const struct args *args,
                           struct value *out)
{
    (void)r;
    if (!args->n) FAIL(ERR_INVALID, "no items for cycling given");
    *out = args->items[self.loop->index % args->n];
    return OK;
}

static enum err loop_changed(struct render *r, struct value self, const struct args *args,
                             struct value *out)
{
    struct value now;
    TRY(value_new_list(&r->arena, LIST_TUPLE, &now));
    for (size_t i = 0; i < args->n; i++)
        TRY(list_add(&r->arena, now.list, args->items[i]));
    *out = value_bool(!self.loop->has_changed || !value_equal(self.loop->last_changed, now));
    self.loop->has_changed = true;
    self.loop->last_changed = now;
    return OK;
}

static enum err cycler_next(struct render *r, struct value self, const struct args *args,
                            struct value *out)
{
    (void)r;
    (void)args;
    *out = self.cycler->items[self.cycler->at];
    self.cycler->at = (self.cycler->at + 1) % self.cycler->n;
    return OK;
}

static enum err cycler_reset(struct render *r, struct value self, const struct args *args,
                             struct value *out)
{
    (void)r;
    (void)args;
    self.cycler->at = 0;
    *out = value_none();
    return OK;
}

static const struct function DICT_METHODS[] = {
    {.name = "keys", .call = dict_keys},
    {.name = "values", .call = dict_values},
    {.name = "items", .call = dict_items},
    {.name = "get", .call = dict_get},
    {.name = "copy", .call = dict_copy},
    {.name = "pop", .call = refuse_change},
    {.name = "update", .call = refuse_change},
    {.name = "setdefault", .call = refuse_change},
    {.name = "clear", .call = refuse_change},
    {.name = "popitem", .call = refuse_change},
    {.name = NULL},
};

static const struct function LIST_METHODS[] = {
    {.name = "pop", .call = list_pop},          {.name = "index", .call = list_index},
    {.name = "count", .call = list_count},      {.name = "copy", .call = list_copy},
    {.name = "append", .call = refuse_change},  {.name = "extend", .call = refuse_change},
    {.name = "insert", .call = refuse_change},  {.name = "remove", .call = refuse_change},
    {.name = "reverse", .call = refuse_change}, {.name = "sort", .call = refuse_change},
    {.name = "clear", .call = refuse_change},   {.name = NULL},
};

static const struct function LOOP_METHODS[] = {
    {.name = "cycle", .call = loop_cycle},
    {.name = "changed", .call = loop_changed},
    {.name = NULL},
};

static const struct function CYCLER_METHODS[] = {
    {.name = "next", .call = cycler_next},
    {.name = "reset", .call = cycler_reset},
    {.name = NULL},
};

static const struct function *methods_of(struct value v)
{
    switch (v.kind) {
    case VALUE_STRING:
        return STRING_METHODS;
    case VALUE_DICT:
        return DICT_METHODS;
    case VALUE_LIST:
        return v.list->kind == LIST_GENERATOR || v.list->kind == LIST_VIEW ? NULL : LIST_METHODS;
    case VALUE_LOOP:
        return LOOP_METHODS;
    case VALUE_CYCLER:
        return CYCLER_METHODS;
    default:
        return NULL;
    }
}

enum err builtin_method(struct render *r, struct value v, const char *name, struct value *out,
                        bool *out_found)
{
    const struct function *row = methods_of(v);
    while (row && row->name && strcmp(row->name, name))
        row++;
    *out_found = row && row->name;
    if (!*out_found) return OK;
    struct function *bound;
    TRY(arena_alloc(&r->arena, sizeof *bound, (void **)&bound));
    *bound = (struct function){row->name, row->call, v};
    *out = (struct value){.kind = VALUE_FUNCTION, .function = bound};
    return OK;
}
