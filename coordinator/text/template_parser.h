/* Between the two halves of the parser: statements and expressions. */
#pragma once
#include "coordinator/text/template_lexer.h"

struct parser {
    struct chat_template *t;
    struct lexer lexer;
    struct lexeme now, next; /* the lexeme being looked at and the one behind it */
    size_t n_nodes;
    int nesting, n_loops;
};

enum err parser_error(const struct parser *p, int line, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
enum err parser_advance(struct parser *p);
enum err parser_node(struct parser *p, enum node_kind kind, struct node **out);
enum err parser_copy_name(struct parser *p, const char **out); /* of the lexeme now; advances */
bool parser_at(const struct parser *p, const char *op);
bool parser_at_name(const struct parser *p, const char *name);
enum err parser_expect(struct parser *p, const char *op);
enum err parser_enter(struct parser *p); /* one level deeper; leave by p->nesting-- */

/* A whole expression, with or without "a if b else c" at its top. */
enum err parse_expression(struct parser *p, bool conditional, struct node **out);
/* An expression, or several with commas between them, which are a tuple. */
enum err parse_tuple(struct parser *p, bool conditional, struct node **out);
/* What assignments write to: a name, a tuple of names, or name.attribute where allowed. */
enum err parse_target(struct parser *p, bool attributes, struct node **out);
/* name|name(...)|... with nothing before the first name. */
enum err parse_filters(struct parser *p, struct node **out);
/* "(" name, name = default ... ")" */
enum err parse_parameters(struct parser *p, struct node **out);
