/* The pre-tokenizers of a tokenizer file: a normalized text cut into words.
 *
 * Immutable once read; what changes while cutting is in struct words, one per thread. It must never
 * know tokens. */
#pragma once
#include "coordinator/text/part.h"

struct word {
    size_t start, end; /* bytes of words.text */
    bool first;        /* begins where the whole text began */
};

/* A text and its division; the words do not overlap and are in order. */
struct words {
    struct buf text, spare;
    struct word *items, *next; /* [n], [n_next]: the division and the one being made */
    size_t n, capacity, n_next, next_capacity;
};

struct pretokenizer_step;
struct pretokenizer {
    struct pretokenizer_step *steps; /* [n_steps], owned */
    size_t n_steps;
};

/* object is the file's "pre_tokenizer", null for none. */
enum err pretokenizer_read(const json_t *object, struct pretokenizer *out);
void pretokenizer_fini(struct pretokenizer *p); /* accepts zeroed memory */

void words_fini(struct words *w); /* accepts zeroed memory */
/* Cuts w->text, set by the caller, into w->items. first tells whether it begins the whole text. */
enum err pretokenizer_apply(const struct pretokenizer *p, struct regex_scratch *s, struct words *w,
                            bool first);
