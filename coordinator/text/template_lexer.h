/* Tokens of a template's source, on demand: text between tags with its whitespace rules applied,
 * and what stands inside tags. It must never know the grammar. */
#pragma once
#include "coordinator/text/template_ast.h"

enum lexeme_kind {
    LEXEME_END,
    LEXEME_TEXT, /* text between tags */
    LEXEME_VARIABLE_BEGIN,
    LEXEME_VARIABLE_END,
    LEXEME_BLOCK_BEGIN,
    LEXEME_BLOCK_END,
    LEXEME_NAME,
    LEXEME_STRING,
    LEXEME_INT,
    LEXEME_FLOAT,
    LEXEME_OPERATOR,
};

struct lexeme {
    enum lexeme_kind kind;
    int line;
    struct span text;   /* of a name, an operator, text between tags */
    struct value value; /* of a literal */
};

struct lexer {
    struct arena *arena;
    struct span source;
    struct template_syntax syntax;
    size_t at;
    int line;
    enum { LEXER_TEXT, LEXER_VARIABLE, LEXER_BLOCK, LEXER_TAG } state;
    int balance;        /* open brackets inside a tag */
    bool line_starting; /* the last tag took the newline after it */
    char brackets[TEMPLATE_NESTING_MAX];
};

void lexer_init(struct lexer *l, struct arena *arena, struct span source,
                const struct template_syntax *syntax);
/* ERR_INVALID with the line. */
enum err lexer_next(struct lexer *l, struct lexeme *out);
