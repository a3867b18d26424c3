/* One rendering of a template: its scopes, its output and its budgets. */
#pragma once
#include "coordinator/text/chat_template.h"
#include "coordinator/text/template_ast.h"

struct binding {
    const char *name;
    struct value value;
};

/* Names of one block; what is not found here is looked for in the parent. */
struct scope {
    struct scope *parent;
    struct binding *items; /* [capacity] */
    size_t n, capacity;
};

struct macro {
    const char *name;
    const struct node *parameters, *body;
    struct scope *scope; /* where it was defined */
};

struct loop {
    const struct value *items; /* [n] */
    size_t n, index;
    int depth;               /* calls of a recursive loop to itself, from 1 */
    const struct node *node; /* the statement, and the scope it stands in */
    struct scope *scope;
    struct value last_changed; /* what changed() saw; undefined at first */
    bool has_changed;
};

/* Arguments of a call. */
struct args {
    struct value *items; /* [capacity] positional, the first n are set */
    size_t n, capacity;
    struct binding *named; /* [n_named] */
    size_t n_named;
};

struct render {
    const struct chat_template *t;
    struct arena arena;
    struct chat_template_limits limits;
    struct buf *out; /* where output goes now */
    struct scope *scope;
    const struct dict *context;
    size_t steps;
    int depth;
    int line;    /* of what was evaluated last */
    bool raised; /* the error is the template's own */
    enum { JUMP_NONE, JUMP_BREAK, JUMP_CONTINUE } jump;
};

/* Counts n steps. ERR_INVALID at the limit. */
enum err render_charge(struct render *r, size_t n);
enum err render_write(struct render *r, const char *s, size_t n);
enum err render_bind(struct render *r, struct scope *scope, const char *name, struct value value);
enum err render_new_scope(struct render *r, struct scope *parent, struct scope **out);

enum err template_evaluate(struct render *r, const struct node *node, struct value *out);
enum err template_execute(struct render *r, const struct node *body);
enum err template_arguments(struct render *r, const struct node *nodes, struct args *out);
enum err template_call(struct render *r, struct value callee, const struct args *args,
                       struct value *out);
enum err template_call_macro(struct render *r, const struct macro *macro, const struct args *args,
                             struct value *out);
enum err template_call_loop(struct render *r, const struct loop *loop, const struct args *args,
                            struct value *out);
/* Applies a chain of filters whose innermost has no operand to a value. */
enum err template_apply_filters(struct render *r, const struct node *filters, struct value in,
                                struct value *out);

/* value.name and value[key] as Jinja2 looks them up; undefined where there is none. */
enum err value_attribute(struct render *r, struct value v, const char *name, struct value *out);
enum err value_item(struct render *r, struct value v, struct value key, struct value *out);
/* What a loop walks over. A generator gives what is left of it and is then empty. */
enum err value_iterate(struct render *r, struct value v, struct list **out);
enum err value_contains(struct render *r, struct value container, struct value item, bool *out);
enum err value_binary(struct render *r, enum binary_operator op, struct value a, struct value b,
                      struct value *out);
/* Words the error of touching an undefined value. */
enum err value_undefined_error(struct value v);
/* str(v), in the arena unless v is a string. */
enum err value_to_string(struct render *r, struct value v, struct span *out);
