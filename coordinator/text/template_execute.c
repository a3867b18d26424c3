/* Statements of a template: output, branches, loops, assignments, macros. */
#include "coordinator/text/template_builtins.h"
#include "coordinator/text/template_render.h"

#include <string.h>

/* ---- Scopes and output ---- */

enum err render_new_scope(struct render *r, struct scope *parent, struct scope **out)
{
    struct scope *scope;
    TRY(arena_alloc(&r->arena, sizeof *scope, (void **)&scope));
    scope->parent = parent;
    *out = scope;
    return OK;
}

enum err render_bind(struct render *r, struct scope *scope, const char *name, struct value value)
{
    for (size_t i = 0; i < scope->n; i++) {
        if (strcmp(scope->items[i].name, name)) continue;
        scope->items[i].value = value;
        return OK;
    }
    if (scope->n == scope->capacity) {
        size_t capacity = scope->capacity ? 2 * scope->capacity : 4;
        struct binding *items;
        TRY(arena_alloc_array(&r->arena, capacity, sizeof *items, (void **)&items));
        if (scope->n) memcpy(items, scope->items, scope->n * sizeof *items);
        scope->items = items, scope->capacity = capacity;
    }
    scope->items[scope->n++] = (struct binding){name, value};
    return OK;
}

enum err render_write(struct render *r, const char *s, size_t n)
{
    TRY(render_charge(r, n / 64));
    return buf_add(r->out, s, n);
}

static enum err write_value(struct render *r, struct value v)
{
    size_t before = r->out->n;
    TRY(value_write(v, r->out));
    return render_charge(r, (r->out->n - before) / 64);
}

/* Runs a body in a scope and gives what it wrote as a string. */
static enum err capture(struct render *r, const struct node *body, struct scope *scope,
                        struct value *out)
{
    struct buf text, *outer = r->out;
    struct scope *saved = r->scope;
    buf_init(&text, r->limits.output_bytes_max);
    r->out = &text;
    r->scope = scope;
    enum err e = template_execute(r, body);
    if (!e) e = value_copy_string(&r->arena, buf_string(&text), text.n, out);
    r->out = outer;
    r->scope = saved;
    buf_fini(&text);
    return e;
}

/* ---- Assignments ---- */

static enum err assign(struct render *r, const struct node *target, struct value v)
{
    struct list *list;
    size_t i = 0;
    if (target->kind == NODE_NAME) return render_bind(r, r->scope, target->text, v);
    if (target->kind == NODE_ATTRIBUTE) {
        struct value ns, key = value_string(target->text);
        TRY(template_evaluate(r, target->a, &ns));
        if (ns.kind != VALUE_NAMESPACE)
            FAIL(ERR_INVALID, "cannot assign attribute on non-namespace object");
        TRY(render_charge(r, ns.dict->n / 16));
        return dict_set(&r->arena, ns.dict, key, v);
    }
    TRY(value_iterate(r, v, &list));
    for (const struct node *item = target->items; item; item = item->next, i++) {
        if (i >= list->n) FAIL(ERR_INVALID, "not enough values to unpack (got %zu)", list->n);
        TRY(assign(r, item, list->items[i]));
    }
    if (i < list->n) FAIL(ERR_INVALID, "too many values to unpack (expected %zu)", i);
    return OK;
}

static enum err execute_set_block(struct render *r, const struct node *node)
{
    struct scope *scope;
    struct value v;
    TRY(render_new_scope(r, r->scope, &scope));
    TRY(capture(r, node->body, scope, &v));
    if (node->b) TRY(template_apply_filters(r, node->b, v, &v));
    return assign(r, node->a, v);
}

/* ---- Loops ---- */

/* The items for which the loop's condition holds. */
static enum err filter_items(struct render *r, const struct node *node, struct list **inout)
{
    struct value kept, condition;
    struct scope *outer = r->scope;
    struct list *list = *inout;
    enum err e = OK;
    TRY(value_new_list(&r->arena, LIST_LIST, &kept));
    for (size_t i = 0, n = list->n; i < n && !e; i++) {
        struct value item = list->items[i];
        e = render_new_scope(r, outer, &r->scope);
        if (!e) e = assign(r, node->a, item);
        if (!e) e = template_evaluate(r, node->c, &condition);
        if (!e && value_is_true(condition)) e = list_add(&r->arena, kept.list, item);
        r->scope = outer;
    }
    *inout = kept.list;
    return e;
}

static enum err run_loop(struct render *r, const struct node *node, struct loop *loop)
{
    struct scope *outer = r->scope;
    enum err e = OK;
    for (loop->index = 0; loop->index < loop->n && !e; loop->index++) {
        TRY(render_charge(r, 1));
        e = render_new_scope(r, outer, &r->scope);
        if (!e)
            e = render_bind(r, r->scope, "loop", (struct value){.kind = VALUE_LOOP, .loop = loop});
        if (!e) e = assign(r, node->a, loop->items[loop->index]);
        if (!e) e = template_execute(r, node->body);
        r->scope = outer;
        bool stop = r->jump == JUMP_BREAK;
        r->jump = JUMP_NONE;
        if (stop) break;
    }
    r->scope = outer;
    return e;
}

/* Runs a loop over v; depth counts how often a recursive one has called itself. */
static enum err walk(struct render *r, const struct node *node, struct value v, int depth)
{
    struct list *list;
    struct loop *loop;
    TRY(value_iterate(r, v, &list));
    if (node->c) TRY(filter_items(r, node, &list));
    if (!list->n) return template_execute(r, node->otherwise);
    TRY(arena_alloc(&r->arena, sizeof *loop, (void **)&loop));
    *loop = (struct loop){
        .items = list->items, .n = list->n, .depth = depth, .node = node, .scope = r->scope};
    return run_loop(r, node, loop);
}

static enum err execute_for(struct render *r, const struct node *node)
{
    struct value v;
    TRY(template_evaluate(r, node->b, &v));
    return walk(r, node, v, 1);
}

/* loop(items) inside a recursive loop: the same body over other items, as a string. */
enum err template_call_loop(struct render *r, const struct loop *loop, const struct args *args,
                            struct value *out)
{
    struct buf text, *outer = r->out;
    struct scope *saved = r->scope;
    if (!loop->node->recursive) FAIL(ERR_INVALID, "the loop is not marked as recursive");
    if (!args->n) FAIL(ERR_INVALID, "a recursive loop needs what to walk over");
    if (++r->depth > r->limits.depth_max)
        FAIL(ERR_INVALID, "nested deeper than %d (the limit depth_max)", r->limits.depth_max);
    buf_init(&text, r->limits.output_bytes_max);
    r->out = &text;
    r->scope = loop->scope;
    enum err e = walk(r, loop->node, args->items[0], loop->depth + 1);
    if (!e) e = value_copy_string(&r->arena, buf_string(&text), text.n, out);
    r->out = outer;
    r->scope = saved;
    buf_fini(&text);
    r->depth--;
    return e;
}

/* ---- Macros ---- */

static enum err new_macro(struct render *r, const struct node *node, const char *name,
                          struct value *out)
{
    struct macro *macro;
    TRY(arena_alloc(&r->arena, sizeof *macro, (void **)&macro));
    *macro = (struct macro){name, node->items, node->body, r->scope};
    *out = (struct value){.kind = VALUE_MACRO, .macro = macro};
    return OK;
}

static bool is_parameter(const struct macro *macro, const char *name)
{
    for (const struct node *p = macro->parameters; p; p = p->next)
        if (!strcmp(p->text, name)) return true;
    return false;
}

/* Arguments that no parameter takes: in varargs and kwargs where the template reads those. */
static enum err bind_rest(struct render *r, const struct macro *macro, const struct args *args,
                          size_t taken, struct scope *scope)
{
    struct value rest, named;
    TRY(value_new_list(&r->arena, LIST_TUPLE, &rest));
    TRY(value_new_dict(&r->arena, &named));
    for (size_t i = taken; i < args->n; i++)
        TRY(list_add(&r->arena, rest.list, args->items[i]));
    for (size_t i = 0; i < args->n_named; i++) {
        const char *name = args->named[i].name;
        if (is_parameter(macro, name)) continue;
        if (!strcmp(name, "caller"))
            TRY(render_bind(r, scope, "caller", args->named[i].value));
        else
            TRY(dict_set(&r->arena, named.dict, value_string(name), args->named[i].value));
    }
    if (rest.list->n && !chat_template_uses(r->t, "varargs"))
        FAIL(ERR_INVALID, "macro '%.100s' takes not more than %zu argument(s)", macro->name, taken);
    if (named.dict->n && !chat_template_uses(r->t, "kwargs"))
        FAIL(ERR_INVALID, "macro '%.100s' takes no keyword argument '%.100s'", macro->name,
             named.dict->entries[0].key.string.data);
    TRY(render_bind(r, scope, "varargs", rest));
    return render_bind(r, scope, "kwargs", named);
}

static enum err bind_parameters(struct render *r, const struct macro *macro,
                                const struct args *args, struct scope *scope)
{
    size_t place = 0;
    for (const struct node *p = macro->parameters; p; p = p->next, place++) {
        const struct value *given = place < args->n ? &args->items[place] : NULL;
        struct value v = value_undefined("a macro's parameter was not provided");
        for (size_t i = 0; i < args->n_named; i++)
            if (!strcmp(args->named[i].name, p->text)) {
                if (given)
                    FAIL(ERR_INVALID, "macro '%.100s' got two values for '%.100s'", macro->name,
                         p->text);
                given = &args->named[i].value;
            }
        if (given)
            v = *given;
        else if (p->a)
            TRY(template_evaluate(r, p->a, &v));
        TRY(render_bind(r, scope, p->text, v));
    }
    size_t taken = args->n < place ? args->n : place;
    return bind_rest(r, macro, args, taken, scope);
}

static enum err run_macro(struct render *r, const struct macro *macro, const struct args *args,
                          struct value *out)
{
    struct scope *scope, *saved = r->scope;
    TRY(render_new_scope(r, macro->scope, &scope));
    r->scope = scope; /* defaults see the parameters before them */
    enum err e = bind_parameters(r, macro, args, scope);
    if (!e) e = capture(r, macro->body, scope, out);
    r->scope = saved;
    return e;
}

enum err template_call_macro(struct render *r, const struct macro *macro, const struct args *args,
                             struct value *out)
{
    if (++r->depth > r->limits.depth_max)
        FAIL(ERR_INVALID, "nested deeper than %d (the limit depth_max)", r->limits.depth_max);
    enum err e = run_macro(r, macro, args, out);
    r->depth--;
    return e;
}

/* {% call(parameters) macro(...) %}body{% endcall %}: the macro may call caller(). */
static enum err execute_call_block(struct render *r, const struct node *node)
{
    struct value callee, caller, result;
    struct args args;
    TRY(new_macro(r, node, "caller", &caller));
    TRY(template_evaluate(r, node->a->a, &callee));
    TRY(template_arguments(r, node->a->args, &args));
    struct binding *named;
    TRY(arena_alloc_array(&r->arena, args.n_named + 1, sizeof *named, (void **)&named));
    if (args.n_named) memcpy(named, args.named, args.n_named * sizeof *named);
    named[args.n_named++] = (struct binding){"caller", caller};
    args.named = named;
    TRY(template_call(r, callee, &args, &result));
    return write_value(r, result);
}

/* ---- The rest ---- */

static enum err execute_filter_block(struct render *r, const struct node *node)
{
    struct scope *scope;
    struct value v;
    TRY(render_new_scope(r, r->scope, &scope));
    TRY(capture(r, node->body, scope, &v));
    TRY(template_apply_filters(r, node->a, v, &v));
    return write_value(r, v);
}

/* Runs a body in a scope of its own; with's values are computed outside of it. */
static enum err execute_scope(struct render *r, const struct node *node)
{
    struct scope *outer = r->scope, *scope;
    enum err e = OK;
    TRY(render_new_scope(r, outer, &scope));
    for (const struct node *item = node->items; item && !e; item = item->next) {
        struct value v;
        e = template_evaluate(r, item->b, &v);
        r->scope = scope;
        if (!e) e = assign(r, item->a, v);
        r->scope = outer;
    }
    r->scope = scope;
    if (!e) e = template_execute(r, node->body);
    r->scope = outer;
    return e;
}

static enum err execute_if(struct render *r, const struct node *node)
{
    struct value v;
    for (;;) {
        TRY(template_evaluate(r, node->a, &v));
        if (value_is_true(v)) return template_execute(r, node->body);
        const struct node *next = node->otherwise;
        if (!next || next->kind != NODE_IF || next->next) return template_execute(r, next);
        node = next; /* elif, without going deeper */
    }
}

static enum err execute_one(struct render *r, const struct node *node)
{
    struct value v;
    r->line = node->line;
    switch (node->kind) {
    case NODE_TEXT:
        return render_write(r, node->value.string.data, node->value.string.n);
    case NODE_OUTPUT:
        TRY(template_evaluate(r, node->a, &v));
        return write_value(r, v);
    case NODE_IF:
        return execute_if(r, node);
    case NODE_FOR:
        return execute_for(r, node);
    case NODE_SET:
        TRY(template_evaluate(r, node->b, &v));
        return assign(r, node->a, v);
    case NODE_SET_BLOCK:
        return execute_set_block(r, node);
    case NODE_MACRO:
        TRY(new_macro(r, node, node->text, &v));
        return render_bind(r, r->scope, node->text, v);
    case NODE_CALL_BLOCK:
        return execute_call_block(r, node);
    case NODE_FILTER_BLOCK:
        return execute_filter_block(r, node);
    case NODE_WITH:
    case NODE_SCOPE:
        return execute_scope(r, node);
    case NODE_BREAK:
        r->jump = JUMP_BREAK;
        return OK;
    case NODE_CONTINUE:
        r->jump = JUMP_CONTINUE;
        return OK;
    default:
        FAIL(ERR_INTERNAL, "node %d is no statement", (int)node->kind);
    }
}

enum err template_execute(struct render *r, const struct node *body)
{
    enum err e = OK;
    if (!body) return OK;
    if (++r->depth > r->limits.depth_max)
        FAIL(ERR_INVALID, "nested deeper than %d (the limit depth_max)", r->limits.depth_max);
    for (const struct node *node = body; node && !e && r->jump == JUMP_NONE; node = node->next) {
        e = render_charge(r, 1);
        if (!e) e = execute_one(r, node);
    }
    r->depth--;
    return e;
}
