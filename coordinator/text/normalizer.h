/* The normalizers of a tokenizer file: text to text, before it is cut into pieces.
 *
 * Immutable once read. It must never know tokens. */
#pragma once
#include "coordinator/text/part.h"

struct normalizer_step;
struct normalizer {
    struct normalizer_step *steps; /* [n_steps], owned */
    size_t n_steps;
};

/* object is the file's "normalizer", null for none. */
enum err normalizer_read(const json_t *object, struct normalizer *out);
void normalizer_fini(struct normalizer *n); /* accepts zeroed memory */
/* Rewrites text, valid UTF-8, in place; spare is memory to work in. */
enum err normalizer_apply(const struct normalizer *n, struct regex_scratch *s, struct buf *text,
                          struct buf *spare);
