/* Added tokens: pieces that are found in the text itself, before anything else looks at it.
 *
 * A trie per set finds the longest token at the leftmost place. Two sets: one is searched for in
 * the text as it came, the other after normalization. Immutable once read. It must never know the
 * model. */
#pragma once
#include "coordinator/text/normalizer.h"

#include <stdint.h>

struct added_token {
    char *text; /* owned */
    size_t n;
    int32_t id;
    bool special, single_word, left_strip, right_strip, normalized;
};

struct trie_node {
    int32_t child, sibling; /* -1: none */
    int32_t token;          /* index of the token that ends here, -1: none */
    unsigned char byte;
};

struct trie {
    struct trie_node *nodes; /* [n], node 0 is the root */
    size_t n, capacity;
    int32_t roots[256]; /* children of the root, -1: none */
};

struct added_tokens {
    struct added_token *items; /* [n], owned */
    size_t n;
    struct trie raw, normalized;
};

/* A part of a text: a token (id >= 0), or bytes between tokens (id -1). */
struct section {
    int32_t id;
    size_t start, end;
};

struct sections {
    struct section *items; /* [n] */
    size_t n, capacity;
};

enum { ADDED_TOKENS_MAX = 1 << 20 };

/* Reads the file's "added_tokens" (NULL: none); special tokens take precedence over others of the
 * same text. */
enum err added_tokens_read(const json_t *list, const struct normalizer *normalizer,
                           struct added_tokens *out);
void added_tokens_fini(struct added_tokens *a); /* accepts zeroed memory */
/* Divides text[n] at the tokens of one set. Special ones are passed over unless parse_special. */
enum err added_tokens_find(const struct added_tokens *a, const struct trie *set, const char *text,
                           size_t n, bool parse_special, struct sections *out);
void sections_fini(struct sections *s); /* accepts zeroed memory */
