/* SentencePiece's precompiled character map: a double-array trie from byte strings to texts.
 *
 * The format is u32 trie_bytes, the trie's units (u32 little-endian), then texts ending in NUL
 * which the trie's values point into. Everything read from it is range-checked. */
#pragma once
#include "base/buf.h"

#include <stdint.h>

struct charsmap {
    uint32_t *units; /* [n_units], owned */
    size_t n_units;
    char *texts; /* [n_texts + 1], owned */
    size_t n_texts;
};

/* From base64, as tokenizer.json writes it. */
enum err charsmap_read(const char *base64, size_t n, struct charsmap *out);
void charsmap_fini(struct charsmap *m);
/* Appends s with its clusters and characters replaced. */
enum err charsmap_apply(const struct charsmap *m, const char *s, size_t n, struct buf *out);
