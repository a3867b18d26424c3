/* Recycled memory by size class: powers of two, so that growing arrays (tokens, block tables, keys)
 * stop asking the system once the engine has seen its busiest moment.
 *
 * Knows nothing of what is kept in it. One thread. */
#pragma once
#include "base/err.h"
#include <stddef.h>
#include <stdint.h>

enum { POOL_CLASSES = 40 };
struct pool_piece;
struct pool {
    struct pool_piece *free[POOL_CLASSES];
};

void pool_fini(struct pool *p); /* pieces still taken are their owners' leak */
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
