/* Expressions of the template language: a parser by recursive descent, from the loosest binding
 * (conditional) to the tightest (postfix). Knows nothing of statements. */
#include "coordinator/text/template_builtins.h"
#include "coordinator/text/template_parser.h"

#include <string.h>

static enum err parse_unary(struct parser *p, bool filters, struct node **out);

/* ---- Primaries ---- */

static enum err remember_name(struct parser *p, const char *name)
{
    struct chat_template *t = p->t;
    for (size_t i = 0; i < t->n_names; i++)
        if (!strcmp(t->names[i], name)) return OK;
    if (t->n_names == t->names_capacity) {
        size_t capacity = t->names_capacity ? 2 * t->names_capacity : 16;
        const char **names;
        if (capacity > 4096) return OK; /* enough to tell what a template uses */
        TRY(arena_alloc_array(&t->arena, capacity, sizeof *names, (void **)&names));
        if (t->n_names) memcpy(names, t->names, t->n_names * sizeof *names);
        t->names = names, t->names_capacity = capacity;
    }
    t->names[t->n_names++] = name;
    return OK;
}

static enum err parse_name(struct parser *p, struct node **out)
{
    static const struct {
        const char *name;
        struct value value;
    } constants[] = {
        {"true", {.kind = VALUE_BOOL, .boolean = true}},
        {"True", {.kind = VALUE_BOOL, .boolean = true}},
        {"false", {.kind = VALUE_BOOL}},
        {"False", {.kind = VALUE_BOOL}},
        {"none", {.kind = VALUE_NONE}},
        {"None", {.kind = VALUE_NONE}},
    };
    struct node *node;
    TRY(parser_node(p, NODE_NAME, &node));
    for (size_t i = 0; i < sizeof constants / sizeof *constants; i++) {
        if (!parser_at_name(p, constants[i].name)) continue;
        node->kind = NODE_LITERAL;
        node->value = constants[i].value;
        *out = node;
        return parser_advance(p);
    }
    TRY(parser_copy_name(p, &node->text));
    TRY(remember_name(p, node->text));
    *out = node;
    return OK;
}

/* "a" "b" is "ab". */
static enum err parse_strings(struct parser *p, struct node **out)
{
    TRY(parser_node(p, NODE_LITERAL, out));
    struct value value = p->now.value;
    TRY(parser_advance(p));
    while (p->now.kind == LEXEME_STRING) {
        struct span a = value.string, b = p->now.value.string;
        char *both;
        TRY(arena_alloc(&p->t->arena, a.n + b.n + 1, (void **)&both));
        memcpy(both, a.data, a.n);
        memcpy(both + a.n, b.data, b.n);
        value = value_span(both, a.n + b.n);
        TRY(parser_advance(p));
    }
    (*out)->value = value;
    return OK;
}

/* Items with commas between them up to the closing bracket, which may follow a comma. */
static enum err parse_items(struct parser *p, const char *close, bool pairs, struct node **out)
{
    struct node **last = out;
    while (!parser_at(p, close)) {
        TRY(parse_expression(p, true, last));
        last = &(*last)->next;
        if (pairs) {
            TRY(parser_expect(p, ":"));
            TRY(parse_expression(p, true, last));
            last = &(*last)->next;
        }
        if (!parser_at(p, close)) TRY(parser_expect(p, ","));
    }
    return parser_expect(p, close);
}

static enum err parse_parenthesis(struct parser *p, struct node **out)
{
    TRY(parser_expect(p, "("));
    if (parser_at(p, ")")) {
        TRY(parser_node(p, NODE_TUPLE, out));
        return parser_advance(p);
    }
    TRY(parse_tuple(p, true, out));
    return parser_expect(p, ")");
}

static enum err parse_primary(struct parser *p, struct node **out)
{
    switch (p->now.kind) {
    case LEXEME_NAME:
        return parse_name(p, out);
    case LEXEME_STRING:
        return parse_strings(p, out);
    case LEXEME_INT:
    case LEXEME_FLOAT:
        TRY(parser_node(p, NODE_LITERAL, out));
        (*out)->value = p->now.value;
        return parser_advance(p);
    default:
        break;
    }
    if (parser_at(p, "(")) return parse_parenthesis(p, out);
    if (parser_at(p, "[")) {
        TRY(parser_node(p, NODE_LIST, out));
        TRY(parser_advance(p));
        return parse_items(p, "]", false, &(*out)->items);
    }
    if (parser_at(p, "{")) {
        TRY(parser_node(p, NODE_DICT, out));
        TRY(parser_advance(p));
        return parse_items(p, "}", true, &(*out)->items);
    }
    if (p->now.kind == LEXEME_OPERATOR)
        return parser_error(p, p->now.line, "unexpected '%.*s'", (int)p->now.text.n,
                            p->now.text.data);
    return parser_error(p, p->now.line, "an expression is missing");
}

/* ---- Postfixes ---- */

static enum err parse_argument(struct parser *p, struct node **out)
{
    enum node_kind kind = NODE_ARGUMENT;
    if (parser_at(p, "*")) kind = NODE_SPREAD;
    if (parser_at(p, "**")) kind = NODE_SPREAD_KEYWORDS;
    TRY(parser_node(p, kind, out));
    if (kind != NODE_ARGUMENT)
        TRY(parser_advance(p));
    else if (p->now.kind == LEXEME_NAME && p->next.kind == LEXEME_OPERATOR &&
             span_equal(p->next.text, "=")) {
        (*out)->kind = NODE_KEYWORD;
        TRY(parser_copy_name(p, &(*out)->text));
        TRY(parser_advance(p));
    }
    return parse_expression(p, true, &(*out)->a);
}

static enum err parse_arguments(struct parser *p, struct node **out)
{
    struct node **last = out;
    TRY(parser_expect(p, "("));
    while (!parser_at(p, ")")) {
        TRY(parse_argument(p, last));
        last = &(*last)->next;
        if (!parser_at(p, ")")) TRY(parser_expect(p, ","));
    }
    return parser_advance(p);
}

static enum err parse_call(struct parser *p, struct node *callee, struct node **out)
{
    struct node *node;
    TRY(parser_node(p, NODE_CALL, &node));
    node->a = callee;
    TRY(parse_arguments(p, &node->args));
    *out = node;
    return OK;
}

/* One of b, c, d of a slice, absent before ":" and "]". */
static enum err parse_bound(struct parser *p, struct node **out)
{
    if (parser_at(p, ":") || parser_at(p, "]") || parser_at(p, ",")) return OK;
    return parse_expression(p, true, out);
}

static enum err parse_subscript(struct parser *p, struct node *of, struct node **out)
{
    struct node *node;
    TRY(parser_node(p, NODE_INDEX, &node));
    node->a = of;
    TRY(parser_expect(p, "["));
    TRY(parse_bound(p, &node->b));
    if (parser_at(p, ":")) {
        node->kind = NODE_SLICE;
        TRY(parser_advance(p));
        TRY(parse_bound(p, &node->c));
        if (parser_at(p, ":")) {
            TRY(parser_advance(p));
            TRY(parse_bound(p, &node->d));
        }
    } else if (!node->b) {
        return parser_error(p, node->line, "an index is missing");
    }
    if (parser_at(p, ",")) return parser_error(p, node->line, "an index of several parts");
    *out = node;
    return parser_expect(p, "]");
}

static enum err parse_attribute(struct parser *p, struct node *of, struct node **out)
{
    struct node *node;
    TRY(parser_node(p, NODE_ATTRIBUTE, &node));
    TRY(parser_advance(p));
    node->a = of;
    *out = node;
    if (p->now.kind != LEXEME_INT) return parser_copy_name(p, &node->text);
    node->kind = NODE_INDEX; /* a.0 is a[0] */
    TRY(parser_node(p, NODE_LITERAL, &node->b));
    node->b->value = p->now.value;
    return parser_advance(p);
}

static enum err parse_postfix(struct parser *p, struct node **inout)
{
    for (;;) {
        if (parser_at(p, "."))
            TRY(parse_attribute(p, *inout, inout));
        else if (parser_at(p, "["))
            TRY(parse_subscript(p, *inout, inout));
        else if (parser_at(p, "("))
            TRY(parse_call(p, *inout, inout));
        else
            return OK;
    }
}

/* A name, perhaps of several with dots between them. */
static enum err parse_dotted(struct parser *p, const char **out)
{
    TRY(parser_copy_name(p, out));
    if (parser_at(p, "."))
        return parser_error(p, p->now.line, "'%s.' names no filter or test", *out);
    return OK;
}

static enum err parse_filter(struct parser *p, struct node *of, struct node **out)
{
    struct node *node;
    TRY(parser_node(p, NODE_FILTER, &node));
    node->a = of;
    TRY(parse_dotted(p, &node->text));
    node->filter = builtin_filter(node->text);
    if (!node->filter)
        return parser_error(p, node->line, "the filter '%s' is not supported", node->text);
    if (parser_at(p, "(")) TRY(parse_arguments(p, &node->args));
    *out = node;
    return OK;
}

/* Whether the argument of a test without parentheses begins here: "is divisibleby 3". */
static bool at_test_argument(const struct parser *p)
{
    if (p->now.kind == LEXEME_NAME)
        return !parser_at_name(p, "else") && !parser_at_name(p, "or") &&
               !parser_at_name(p, "and") && !parser_at_name(p, "if") && !parser_at_name(p, "in") &&
               !parser_at_name(p, "not") && !parser_at_name(p, "is") &&
               !parser_at_name(p, "recursive");
    return p->now.kind == LEXEME_STRING || p->now.kind == LEXEME_INT ||
           p->now.kind == LEXEME_FLOAT || parser_at(p, "[") || parser_at(p, "{");
}

static enum err parse_test(struct parser *p, struct node *of, struct node **out)
{
    struct node *node, *negation = NULL;
    TRY(parser_advance(p));
    if (parser_at_name(p, "not")) {
        TRY(parser_node(p, NODE_NOT, &negation));
        TRY(parser_advance(p));
    }
    TRY(parser_node(p, NODE_TEST, &node));
    node->a = of;
    TRY(parse_dotted(p, &node->text));
    node->test = builtin_test(node->text);
    if (!node->test)
        return parser_error(p, node->line, "the test '%s' is not supported", node->text);
    if (parser_at(p, "(")) {
        TRY(parse_arguments(p, &node->args));
    } else if (at_test_argument(p)) {
        TRY(parser_node(p, NODE_ARGUMENT, &node->args));
        TRY(parse_primary(p, &node->args->a));
        TRY(parse_postfix(p, &node->args->a));
    }
    if (negation) negation->a = node;
    *out = negation ? negation : node;
    return OK;
}

static enum err parse_filters_and_tests(struct parser *p, struct node **inout)
{
    for (;;) {
        if (parser_at(p, "|")) {
            TRY(parser_advance(p));
            TRY(parse_filter(p, *inout, inout));
        } else if (parser_at_name(p, "is")) {
            TRY(parse_test(p, *inout, inout));
        } else if (parser_at(p, "(")) {
            TRY(parse_call(p, *inout, inout));
        } else {
            return OK;
        }
    }
}

enum err parse_filters(struct parser *p, struct node **out)
{
    struct node *node = NULL;
    do {
        if (node) TRY(parser_advance(p));
        TRY(parse_filter(p, node, &node));
    } while (parser_at(p, "|"));
    *out = node;
    return OK;
}

/* ---- Operators ---- */

static enum err parse_signed(struct parser *p, bool filters, struct node **out)
{
    if (parser_at(p, "-") || parser_at(p, "+")) {
        TRY(parser_node(p, parser_at(p, "-") ? NODE_NEGATIVE : NODE_POSITIVE, out));
        TRY(parser_advance(p));
        TRY(parse_unary(p, false, &(*out)->a));
    } else {
        TRY(parse_primary(p, out));
    }
    TRY(parse_postfix(p, out));
    return filters ? parse_filters_and_tests(p, out) : OK;
}

static enum err parse_unary(struct parser *p, bool filters, struct node **out)
{
    TRY(parser_enter(p));
    TRY(parse_signed(p, filters, out));
    p->nesting--;
    return OK;
}

/* The binary operators, loosest first; "~" binds tighter than "+". */
static const struct {
    const char *sign;
    enum binary_operator op;
    int level;
} BINARIES[] = {
    {"+", BINARY_ADD, 0},      {"-", BINARY_SUBTRACT, 0}, {"~", BINARY_CONCAT, 1},
    {"*", BINARY_MULTIPLY, 2}, {"/", BINARY_DIVIDE, 2},   {"//", BINARY_FLOOR_DIVIDE, 2},
    {"%", BINARY_MODULO, 2},   {"**", BINARY_POWER, 3},
};

static bool at_binary(const struct parser *p, int level, enum binary_operator *out)
{
    for (size_t i = 0; i < sizeof BINARIES / sizeof *BINARIES; i++) {
        if (BINARIES[i].level != level || !parser_at(p, BINARIES[i].sign)) continue;
        *out = BINARIES[i].op;
        return true;
    }
    return false;
}

static enum err parse_binary(struct parser *p, int level, struct node **out)
{
    enum binary_operator op;
    if (level == 4) return parse_unary(p, true, out);
    TRY(parse_binary(p, level + 1, out));
    while (at_binary(p, level, &op)) {
        struct node *node;
        TRY(parser_node(p, NODE_BINARY, &node));
        TRY(parser_advance(p));
        node->op = op;
        node->a = *out;
        TRY(parse_binary(p, level + 1, &node->b));
        *out = node;
    }
    return OK;
}

static bool at_comparison(const struct parser *p, enum binary_operator *out, int *out_n)
{
    static const struct {
        const char *sign;
        enum binary_operator op;
    } signs[] = {
        {"==", COMPARE_EQUAL},      {"!=", COMPARE_NOT_EQUAL}, {"<", COMPARE_LESS},
        {"<=", COMPARE_LESS_EQUAL}, {">", COMPARE_GREATER},    {">=", COMPARE_GREATER_EQUAL},
    };
    *out_n = 1;
    for (size_t i = 0; i < sizeof signs / sizeof *signs; i++) {
        if (!parser_at(p, signs[i].sign)) continue;
        *out = signs[i].op;
        return true;
    }
    if (parser_at_name(p, "in")) {
        *out = COMPARE_IN;
        return true;
    }
    *out_n = 2;
    *out = COMPARE_NOT_IN;
    return parser_at_name(p, "not") && p->next.kind == LEXEME_NAME &&
           span_equal(p->next.text, "in");
}

static enum err parse_comparison(struct parser *p, struct node **out)
{
    enum binary_operator op;
    int n;
    TRY(parse_binary(p, 0, out));
    if (!at_comparison(p, &op, &n)) return OK;
    struct node *node;
    TRY(parser_node(p, NODE_COMPARE, &node));
    node->a = *out;
    struct node **last = &node->items;
    while (at_comparison(p, &op, &n)) {
        TRY(parser_node(p, NODE_OPERAND, last));
        (*last)->op = op;
        while (n--)
            TRY(parser_advance(p));
        TRY(parse_binary(p, 0, &(*last)->a));
        last = &(*last)->next;
    }
    *out = node;
    return OK;
}

static enum err parse_not(struct parser *p, struct node **out)
{
    if (!parser_at_name(p, "not")) return parse_comparison(p, out);
    TRY(parser_enter(p));
    TRY(parser_node(p, NODE_NOT, out));
    TRY(parser_advance(p));
    TRY(parse_not(p, &(*out)->a));
    p->nesting--;
    return OK;
}

static enum err parse_logical(struct parser *p, bool is_or, struct node **out)
{
    TRY(is_or ? parse_logical(p, false, out) : parse_not(p, out));
    while (parser_at_name(p, is_or ? "or" : "and")) {
        struct node *node;
        TRY(parser_node(p, is_or ? NODE_OR : NODE_AND, &node));
        TRY(parser_advance(p));
        node->a = *out;
        TRY(is_or ? parse_logical(p, false, &node->b) : parse_not(p, &node->b));
        *out = node;
    }
    return OK;
}

enum err parse_expression(struct parser *p, bool conditional, struct node **out)
{
    TRY(parser_enter(p));
    TRY(parse_logical(p, true, out));
    while (conditional && parser_at_name(p, "if")) {
        struct node *node;
        TRY(parser_node(p, NODE_CONDITIONAL, &node));
        TRY(parser_advance(p));
        node->a = *out;
        TRY(parse_logical(p, true, &node->b));
        if (parser_at_name(p, "else")) {
            TRY(parser_advance(p));
            TRY(parse_expression(p, true, &node->c));
        }
        *out = node;
    }
    p->nesting--;
    return OK;
}

static bool at_tuple_end(const struct parser *p)
{
    return p->now.kind == LEXEME_VARIABLE_END || p->now.kind == LEXEME_BLOCK_END ||
           parser_at(p, ")") || parser_at(p, "=") || parser_at_name(p, "in");
}

enum err parse_tuple(struct parser *p, bool conditional, struct node **out)
{
    struct node *tuple, **last;
    TRY(parse_expression(p, conditional, out));
    if (!parser_at(p, ",")) return OK;
    TRY(parser_node(p, NODE_TUPLE, &tuple));
    tuple->items = *out;
    last = &tuple->items->next;
    while (parser_at(p, ",")) {
        TRY(parser_advance(p));
        if (at_tuple_end(p)) break;
        TRY(parse_expression(p, conditional, last));
        last = &(*last)->next;
    }
    *out = tuple;
    return OK;
}

/* ---- Targets and parameters ---- */

static enum err parse_one_target(struct parser *p, bool attributes, struct node **out)
{
    if (parser_at(p, "(")) {
        TRY(parser_enter(p));
        TRY(parser_advance(p));
        TRY(parse_target(p, false, out));
        p->nesting--;
        return parser_expect(p, ")");
    }
    TRY(parser_node(p, NODE_NAME, out));
    TRY(parser_copy_name(p, &(*out)->text));
    if (!attributes || !parser_at(p, ".")) return OK;
    struct node *of = *out;
    TRY(parser_node(p, NODE_ATTRIBUTE, out));
    TRY(parser_advance(p));
    (*out)->a = of;
    return parser_copy_name(p, &(*out)->text);
}

enum err parse_target(struct parser *p, bool attributes, struct node **out)
{
    struct node *tuple, **last;
    TRY(parse_one_target(p, attributes, out));
    if (!parser_at(p, ",")) return OK;
    TRY(parser_node(p, NODE_TUPLE, &tuple));
    tuple->items = *out;
    last = &tuple->items->next;
    while (parser_at(p, ",")) {
        TRY(parser_advance(p));
        if (at_tuple_end(p)) break;
        TRY(parse_one_target(p, false, last));
        last = &(*last)->next;
    }
    *out = tuple;
    return OK;
}

enum err parse_parameters(struct parser *p, struct node **out)
{
    struct node **last = out;
    TRY(parser_expect(p, "("));
    while (!parser_at(p, ")")) {
        TRY(parser_node(p, NODE_PARAMETER, last));
        TRY(parser_copy_name(p, &(*last)->text));
        if (parser_at(p, "=")) {
            TRY(parser_advance(p));
            TRY(parse_expression(p, true, &(*last)->a));
        }
        last = &(*last)->next;
        if (!parser_at(p, ")")) TRY(parser_expect(p, ","));
    }
    return parser_advance(p);
}
