/* The tree of a template: what the parser makes and the interpreter walks.
 *
 * Nodes live in the template's arena and never change. Lists of nodes are linked by `next`. */
#pragma once
#include "coordinator/text/template_value.h"

enum node_kind {
    /* expressions */
    NODE_LITERAL,   /* value */
    NODE_NAME,      /* text */
    NODE_ATTRIBUTE, /* a.text */
    NODE_INDEX,     /* a[b] */
    NODE_SLICE,     /* a[b:c:d], each may be NULL */
    NODE_CALL,      /* a(args) */
    NODE_FILTER,    /* a|text(args), a NULL inside a filter block */
    NODE_TEST,      /* a is text(args) */
    NODE_NOT,
    NODE_NEGATIVE,
    NODE_POSITIVE,
    NODE_AND,
    NODE_OR,
    NODE_BINARY,      /* a operator b */
    NODE_COMPARE,     /* a, then items: NODE_OPERAND each */
    NODE_OPERAND,     /* operator a */
    NODE_CONDITIONAL, /* a if b else c (NULL) */
    NODE_LIST,        /* items */
    NODE_TUPLE,       /* items */
    NODE_DICT,        /* items: key, value, key, value ... */
    /* arguments of calls: positional a; text = a; *a; **a */
    NODE_ARGUMENT,
    NODE_KEYWORD,
    NODE_SPREAD,
    NODE_SPREAD_KEYWORDS,
    /* statements */
    NODE_TEXT,         /* value */
    NODE_OUTPUT,       /* a */
    NODE_IF,           /* a, body, otherwise */
    NODE_FOR,          /* target a in b if c: body, otherwise */
    NODE_SET,          /* target a = b */
    NODE_SET_BLOCK,    /* target a, filters b, body */
    NODE_MACRO,        /* text, items: parameters, body */
    NODE_PARAMETER,    /* text = a (NULL) */
    NODE_CALL_BLOCK,   /* items: parameters of the caller, a: the call, body */
    NODE_FILTER_BLOCK, /* filters a, body */
    NODE_WITH,         /* items: NODE_SET, body */
    NODE_SCOPE,        /* body */
    NODE_BREAK,
    NODE_CONTINUE,
};

enum binary_operator {
    BINARY_ADD,
    BINARY_SUBTRACT,
    BINARY_MULTIPLY,
    BINARY_DIVIDE,
    BINARY_FLOOR_DIVIDE,
    BINARY_MODULO,
    BINARY_POWER,
    BINARY_CONCAT,
    COMPARE_EQUAL,
    COMPARE_NOT_EQUAL,
    COMPARE_LESS,
    COMPARE_LESS_EQUAL,
    COMPARE_GREATER,
    COMPARE_GREATER_EQUAL,
    COMPARE_IN,
    COMPARE_NOT_IN,
};

struct filter_row;
struct test_row;

struct node {
    enum node_kind kind;
    enum binary_operator op;
    int line;
    bool recursive;   /* of a loop */
    const char *text; /* a name */
    struct value value;
    struct node *a, *b, *c, *d;
    struct node *items, *args, *body, *otherwise;
    struct node *next;
    const struct filter_row *filter;
    const struct test_row *test;
};

/* How the lexer treats the text around tags. */
struct template_syntax {
    bool trim_blocks;   /* the newline after a tag goes */
    bool lstrip_blocks; /* blanks before a tag at the beginning of a line go */
    bool keep_trailing_newline;
};

struct chat_template {
    struct arena arena;
    char *source; /* owned by the arena, line ends made \n */
    size_t n;
    struct node *body;
    const char **names; /* [n_names] variables that are read */
    size_t n_names, names_capacity;
};

enum {
    TEMPLATE_SOURCE_BYTES_MAX = 1 << 22,
    TEMPLATE_NODES_MAX = 1 << 20,
    TEMPLATE_NESTING_MAX = 200
};

enum err chat_template_compile_syntax(const char *source, size_t n,
                                      const struct template_syntax *syntax,
                                      struct chat_template **out);
/* Fills t->body from t->source. */
enum err template_parse(struct chat_template *t, const struct template_syntax *syntax);
