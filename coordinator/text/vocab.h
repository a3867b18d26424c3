/* A set of pieces: text to id and id to text.
 *
 * Filled while a tokenizer is read, then immutable. Ids may have gaps. It must never know what a
 * piece means. */
#pragma once
#include "base/arena.h"
#include "base/buf.h"

#include <stdint.h>

enum { VOCAB_IDS_MAX = 1 << 22, VOCAB_PIECE_BYTES_MAX = 1 << 16 };

struct vocab {
    struct arena arena;
    struct span *pieces; /* [n_ids], data NULL at gaps; texts end with a NUL */
    size_t n_ids, capacity;
    size_t n_pieces;
    struct vocab_slot {
        int32_t id; /* -1 = empty */
        uint32_t hash;
    } * slots;      /* [n_slots], open addressing */
    size_t n_slots; /* a power of two, 0 while empty */
    size_t piece_bytes_max;
};

void vocab_init(struct vocab *v);
void vocab_fini(struct vocab *v); /* accepts zeroed memory */
/* A text already known keeps its text and gets the new id when looked up. ERR_FORMAT: id out of
 * range, id already taken by another text, text too long. */
enum err vocab_add(struct vocab *v, const char *text, size_t n, int64_t id);
/* Room for so many pieces, so that the tables need not grow step by step. */
enum err vocab_reserve(struct vocab *v, size_t n_pieces);
int32_t vocab_find(const struct vocab *v, const char *text, size_t n); /* -1 when absent */

/* One of many pieces looked for at once: the memory of each is on its way while others are asked
 * for, so that a thousand cost a third of a thousand calls of vocab_find. */
struct vocab_question {
    const char *text;
    size_t n;
    uint32_t hash;
    int32_t id; /* the answer, as vocab_find gives it */
};
void vocab_find_all(const struct vocab *v, struct vocab_question *questions, size_t n);
/* data is NULL for an id without a piece. */
struct span vocab_piece(const struct vocab *v, int32_t id);
