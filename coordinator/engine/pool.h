/* Recycled memory: arrays by size class, powers of two, so that tokens, block tables and keys stop
 * asking the system once the engine has seen its busiest moment; and items of one size, many at
 * once.
 *
 * Knows nothing of what is kept in it. One thread. */
#pragma once
#include "base/err.h"
#include <stddef.h>
#include <stdint.h>

enum { POOL_CLASSES = 40 };
struct pool_piece;
struct slab;
struct pool {
    struct pool_piece *free[POOL_CLASSES];
    struct slab *chunks;           /* what was asked of the system, to be given back at the end */
    uint32_t n_next[POOL_CLASSES]; /* pieces to ask for at once next time, less one */
};

void pool_fini(struct pool *p); /* no small piece may be used any more */
/* A piece of at least bytes, not zeroed; *out_bytes is its true size. */
enum err pool_take(struct pool *p, size_t bytes, void **out, size_t *out_bytes);
void pool_give(struct pool *p, void *piece,
               size_t bytes); /* bytes: as told by pool_take; accepts NULL */

/* An array in a pool: n of capacity items in use. */
struct strip {
    void *items;
    uint32_t n, capacity;
    size_t bytes;
};
/* Room for n items; items keep their values. */
enum err strip_reserve(struct pool *p, struct strip *s, size_t n, size_t item_bytes);
void strip_free(struct pool *p, struct strip *s);

/* Items of one size, each on lines of cache of its own. */
struct slabs {
    size_t item_bytes, n_next; /* of the next slab: items */
    struct slab *all;
    void *free; /* begins with the next one */
};
/* item_bytes: a multiple of 64, better an odd one, so that the items spread over the cache. */
void slabs_init(struct slabs *l, size_t item_bytes);
void slabs_fini(struct slabs *l);
enum err slabs_take(struct slabs *l, void **out); /* not cleared */
void slabs_give(struct slabs *l, void *item);
