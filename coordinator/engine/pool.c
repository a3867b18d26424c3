/* Recycled memory by size class. Large pieces go back to the system: they are rare and dear. */
#include "coordinator/engine/pool.h"
#include "base/mem.h"

#include <string.h>

enum { CLASS_MIN_BITS = 6, KEEP_BITS_MAX = 24 };

struct pool_piece {
    struct pool_piece *next;
};

static int class_of(size_t bytes)
{
    int bits = CLASS_MIN_BITS;
    while (bits < POOL_CLASSES - 1 && ((size_t)1 << bits) < bytes)
        bits++;
    return bits;
}

enum err pool_take(struct pool *p, size_t bytes, void **out, size_t *out_bytes)
{
    int class = class_of(bytes);
    if (((size_t)1 << class) < bytes) FAIL(ERR_NO_MEMORY, "a piece of %zu bytes", bytes);
    struct pool_piece *piece = p->free[class];
    if (piece)
        p->free[class] = piece->next;
    else
        TRY(mem_alloc((size_t)1 << class, (void **)&piece));
    *out = piece;
    *out_bytes = (size_t)1 << class;
    return OK;
}

void pool_give(struct pool *p, void *piece, size_t bytes)
{
    if (!piece) return;
    int class = class_of(bytes);
    if (class > KEEP_BITS_MAX) {
        mem_free(piece);
        return;
    }
    struct pool_piece *q = piece;
    q->next = p->free[class];
    p->free[class] = q;
}

void pool_fini(struct pool *p)
{
    for (int class = 0; class < POOL_CLASSES; class ++)
        for (struct pool_piece *q = p->free[class], *next; q; q = next) {
            next = q->next;
            mem_free(q);
        }
    *p = (struct pool){0};
}

enum err strip_reserve(struct pool *p, struct strip *s, size_t n, size_t item_bytes)
{
    void *items;
    size_t bytes, want;
    if (n <= s->capacity) return OK;
    if (n > UINT32_MAX || !size_mul(n, item_bytes, &want))
        FAIL(ERR_NO_MEMORY, "array of %zu items", n);
    TRY(pool_take(p, want, &items, &bytes));
    if (s->n) memcpy(items, s->items, s->n * item_bytes);
    pool_give(p, s->items, s->bytes);
    s->items = items;
    s->bytes = bytes;
    s->capacity = (uint32_t)(bytes / item_bytes > UINT32_MAX ? UINT32_MAX : bytes / item_bytes);
    return OK;
}

void strip_free(struct pool *p, struct strip *s)
{
    pool_give(p, s->items, s->bytes);
    *s = (struct strip){0};
}
