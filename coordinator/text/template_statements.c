/* Statements of the template language: one row of a table for each tag. */
#include "base/err.h"
#include "coordinator/text/template_parser.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* ---- What both halves use ---- */

enum err parser_error(const struct parser *p, int line, const char *format, ...)
{
    char words[512];
    va_list args;
    (void)p;
    va_start(args, format);
    vsnprintf(words, sizeof words, format, args);
    va_end(args);
    bool lacking = strstr(words, "not supported");
    FAIL(lacking ? ERR_UNSUPPORTED : ERR_INVALID, "chat template, line %d: %s", line, words);
}

enum err parser_advance(struct parser *p)
{
    p->now = p->next;
    return p->now.kind == LEXEME_END ? OK : lexer_next(&p->lexer, &p->next);
}

enum err parser_node(struct parser *p, enum node_kind kind, struct node **out)
{
    struct node *node;
    if (p->n_nodes++ == TEMPLATE_NODES_MAX)
        return parser_error(p, p->now.line, "more than %d nodes", TEMPLATE_NODES_MAX);
    TRY(arena_alloc(&p->t->arena, sizeof *node, (void **)&node));
    node->kind = kind;
    node->line = p->now.line;
    *out = node;
    return OK;
}

enum err parser_copy_name(struct parser *p, const char **out)
{
    char *copy;
    if (p->now.kind != LEXEME_NAME) return parser_error(p, p->now.line, "a name is missing");
    TRY(arena_copy_string(&p->t->arena, p->now.text.data, p->now.text.n, &copy));
    *out = copy;
    return parser_advance(p);
}

bool parser_at(const struct parser *p, const char *op)
{
    return p->now.kind == LEXEME_OPERATOR && span_equal(p->now.text, op);
}

bool parser_at_name(const struct parser *p, const char *name)
{
    return p->now.kind == LEXEME_NAME && span_equal(p->now.text, name);
}

enum err parser_expect(struct parser *p, const char *op)
{
    if (!parser_at(p, op)) {
        bool named = p->now.kind == LEXEME_NAME || p->now.kind == LEXEME_OPERATOR;
        return parser_error(p, p->now.line, "'%s' expected%s%.*s", op, named ? ", not " : "",
                            named ? (int)(p->now.text.n < 40 ? p->now.text.n : 40) : 0,
                            named ? p->now.text.data : "");
    }
    return parser_advance(p);
}

enum err parser_enter(struct parser *p)
{
    if (p->nesting++ >= TEMPLATE_NESTING_MAX)
        return parser_error(p, p->now.line, "nested deeper than %d", TEMPLATE_NESTING_MAX);
    return OK;
}

static enum err expect_block_end(struct parser *p)
{
    if (p->now.kind != LEXEME_BLOCK_END) return parser_error(p, p->now.line, "'%%}' expected");
    return parser_advance(p);
}

/* ---- Tags ---- */

static enum err parse_body(struct parser *p, const char *const *ends, struct node **out);

/* The body up to {% end %}, whose tag is passed. */
static enum err parse_block(struct parser *p, const char *end, struct node **out)
{
    const char *const ends[] = {end, NULL};
    TRY(expect_block_end(p));
    TRY(parse_body(p, ends, out));
    TRY(parser_advance(p));
    return expect_block_end(p);
}

static enum err parse_if(struct parser *p, struct node *node)
{
    static const char *const ends[] = {"elif", "else", "endif", NULL};
    static const char *const end[] = {"endif", NULL};
    node->kind = NODE_IF;
    for (;;) {
        TRY(parse_tuple(p, false, &node->a));
        if (parser_at_name(p, "if")) return parser_error(p, p->now.line, "'%%}' expected");
        TRY(expect_block_end(p));
        TRY(parse_body(p, ends, &node->body));
        if (!parser_at_name(p, "elif")) break;
        TRY(parser_advance(p));
        TRY(parser_node(p, NODE_IF, &node->otherwise));
        node = node->otherwise;
    }
    if (parser_at_name(p, "else")) {
        TRY(parser_advance(p));
        TRY(expect_block_end(p));
        TRY(parse_body(p, end, &node->otherwise));
    }
    TRY(parser_advance(p));
    return expect_block_end(p);
}

static enum err parse_for(struct parser *p, struct node *node)
{
    static const char *const ends[] = {"else", "endfor", NULL};
    static const char *const end[] = {"endfor", NULL};
    node->kind = NODE_FOR;
    TRY(parse_target(p, false, &node->a));
    if (!parser_at_name(p, "in")) return parser_error(p, p->now.line, "'in' expected");
    TRY(parser_advance(p));
    TRY(parse_tuple(p, false, &node->b));
    if (parser_at_name(p, "if")) {
        TRY(parser_advance(p));
        TRY(parse_expression(p, true, &node->c));
    }
    node->recursive = parser_at_name(p, "recursive");
    if (node->recursive) TRY(parser_advance(p));
    TRY(expect_block_end(p));
    p->n_loops++;
    TRY(parse_body(p, ends, &node->body));
    p->n_loops--;
    if (parser_at_name(p, "else")) {
        TRY(parser_advance(p));
        TRY(expect_block_end(p));
        TRY(parse_body(p, end, &node->otherwise));
    }
    TRY(parser_advance(p));
    return expect_block_end(p);
}

static enum err parse_set(struct parser *p, struct node *node)
{
    node->kind = NODE_SET;
    TRY(parse_target(p, true, &node->a));
    if (parser_at(p, "=")) {
        TRY(parser_advance(p));
        TRY(parse_tuple(p, true, &node->b));
        return expect_block_end(p);
    }
    node->kind = NODE_SET_BLOCK;
    if (node->a->kind == NODE_TUPLE)
        return parser_error(p, node->line, "a block cannot be set to several names");
    if (parser_at(p, "|")) {
        TRY(parser_advance(p));
        TRY(parse_filters(p, &node->b));
    }
    return parse_block(p, "endset", &node->body);
}

static enum err parse_macro(struct parser *p, struct node *node)
{
    int n_loops = p->n_loops;
    p->n_loops = 0;
    node->kind = NODE_MACRO;
    TRY(parser_copy_name(p, &node->text));
    TRY(parse_parameters(p, &node->items));
    TRY(parse_block(p, "endmacro", &node->body));
    p->n_loops = n_loops;
    return OK;
}

static enum err parse_call_block(struct parser *p, struct node *node)
{
    int n_loops = p->n_loops;
    p->n_loops = 0;
    node->kind = NODE_CALL_BLOCK;
    if (parser_at(p, "(")) TRY(parse_parameters(p, &node->items));
    TRY(parse_expression(p, true, &node->a));
    if (node->a->kind != NODE_CALL)
        return parser_error(p, node->line, "{%% call %%} must be followed by a call");
    TRY(parse_block(p, "endcall", &node->body));
    p->n_loops = n_loops;
    return OK;
}

static enum err parse_filter_block(struct parser *p, struct node *node)
{
    node->kind = NODE_FILTER_BLOCK;
    TRY(parse_filters(p, &node->a));
    return parse_block(p, "endfilter", &node->body);
}

static enum err parse_with(struct parser *p, struct node *node)
{
    struct node **last = &node->items;
    node->kind = NODE_WITH;
    while (p->now.kind != LEXEME_BLOCK_END) {
        if (last != &node->items) TRY(parser_expect(p, ","));
        TRY(parser_node(p, NODE_SET, last));
        TRY(parse_target(p, false, &(*last)->a));
        TRY(parser_expect(p, "="));
        TRY(parse_expression(p, true, &(*last)->b));
        last = &(*last)->next;
    }
    return parse_block(p, "endwith", &node->body);
}

/* {% generation %} marks what the assistant wrote; rendering passes it through. */
static enum err parse_generation(struct parser *p, struct node *node)
{
    node->kind = NODE_SCOPE;
    return parse_block(p, "endgeneration", &node->body);
}

static enum err parse_jump(struct parser *p, struct node *node, enum node_kind kind)
{
    node->kind = kind;
    if (!p->n_loops) return parser_error(p, node->line, "a jump outside of a loop");
    return expect_block_end(p);
}

static enum err parse_break(struct parser *p, struct node *node)
{
    return parse_jump(p, node, NODE_BREAK);
}

static enum err parse_continue(struct parser *p, struct node *node)
{
    return parse_jump(p, node, NODE_CONTINUE);
}

static const struct {
    const char *name;
    enum err (*parse)(struct parser *p, struct node *node);
} TAGS[] = {
    {"if", parse_if},           {"for", parse_for},
    {"set", parse_set},         {"macro", parse_macro},
    {"call", parse_call_block}, {"filter", parse_filter_block},
    {"with", parse_with},       {"generation", parse_generation},
    {"break", parse_break},     {"continue", parse_continue},
};

/* One tag; the lexeme now is its name. */
static enum err parse_tag(struct parser *p, struct node **out)
{
    struct node *node;
    TRY(parser_enter(p));
    TRY(parser_node(p, NODE_SCOPE, &node));
    for (size_t i = 0; i < sizeof TAGS / sizeof *TAGS; i++) {
        if (!parser_at_name(p, TAGS[i].name)) continue;
        TRY(parser_advance(p));
        TRY(TAGS[i].parse(p, node));
        p->nesting--;
        *out = node;
        return OK;
    }
    int n = p->now.text.n < 60 ? (int)p->now.text.n : 60;
    if (p->now.kind != LEXEME_NAME) return parser_error(p, node->line, "a tag's name is missing");
    if (n > 2 && (!memcmp(p->now.text.data, "end", 3) || !memcmp(p->now.text.data, "el", 2)))
        return parser_error(p, node->line, "the tag '%.*s' closes nothing that is open", n,
                            p->now.text.data);
    return parser_error(p, node->line, "the tag '%.*s' is not supported", n, p->now.text.data);
}

static bool at_end(const struct parser *p, const char *const *ends)
{
    for (size_t i = 0; ends && ends[i]; i++)
        if (parser_at_name(p, ends[i])) return true;
    return false;
}

static enum err parse_output(struct parser *p, struct node **out)
{
    TRY(parser_node(p, NODE_OUTPUT, out));
    TRY(parser_advance(p));
    TRY(parse_tuple(p, true, &(*out)->a));
    if (p->now.kind != LEXEME_VARIABLE_END) return parser_error(p, p->now.line, "'}}' expected");
    return parser_advance(p);
}

/* Text, outputs and tags up to one of `ends` (the lexeme now is its name), or to the end of the
 * template when ends is NULL. */
static enum err parse_body(struct parser *p, const char *const *ends, struct node **out)
{
    struct node **last = out;
    int line = p->now.line;
    for (;; last = &(*last)->next) {
        switch (p->now.kind) {
        case LEXEME_TEXT:
            TRY(parser_node(p, NODE_TEXT, last));
            (*last)->value = value_span(p->now.text.data, p->now.text.n);
            TRY(parser_advance(p));
            break;
        case LEXEME_VARIABLE_BEGIN:
            TRY(parse_output(p, last));
            break;
        case LEXEME_BLOCK_BEGIN:
            TRY(parser_advance(p));
            if (at_end(p, ends)) return OK;
            TRY(parse_tag(p, last));
            break;
        default:
            if (ends) return parser_error(p, line, "a block is not closed by '%s'", ends[0]);
            return OK;
        }
    }
}

enum err template_parse(struct chat_template *t, const struct template_syntax *syntax)
{
    struct parser p = {.t = t};
    lexer_init(&p.lexer, &t->arena, (struct span){t->source, t->n}, syntax);
    TRY(lexer_next(&p.lexer, &p.now));
    if (p.now.kind == LEXEME_END) return OK;
    TRY(lexer_next(&p.lexer, &p.next));
    return parse_body(&p, NULL, &t->body);
}
