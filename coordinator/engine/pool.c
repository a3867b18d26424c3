/* Recycled memory by size class. Small pieces are cut from chunks that grow with the demand; the
 * largest go back to the system: they are rare and dear. */
#include "coordinator/engine/pool.h"
#include "base/mem.h"

#include <string.h>

enum { CLASS_MIN_BITS = 6, CHUNK_BITS_MAX = 22, KEEP_BITS_MAX = 24 };
enum {
    LINE_BYTES = 64,
    SLAB_BYTES_FIRST = 1 << 15,
    SLAB_BYTES_MAX = 1 << 21,
    HUGE_BYTES_MIN = 1 << 21
};

struct pool_piece {
    struct pool_piece *next;
};

struct slab {
    _Alignas(64) struct slab *next;
    size_t bytes;
};

/* Large ones in huge pages: what ten thousand sequences touch in turn is more than the processor
 * remembers small pages. */
static enum err slab_create(struct slab **list, size_t bytes, void **out_items)
{
    struct slab *slab;
    bytes += sizeof *slab;
    if (bytes < HUGE_BYTES_MIN)
        TRY(mem_alloc_aligned(LINE_BYTES, bytes, (void **)&slab));
    else
        TRY(mem_alloc_huge(bytes, (void **)&slab));
    *slab = (struct slab){.next = *list, .bytes = bytes};
    *list = slab;
    *out_items = slab + 1;
    return OK;
}

static void slabs_free(struct slab *slab)
{
    for (struct slab *next; slab; slab = next) {
        next = slab->next;
        if (slab->bytes < HUGE_BYTES_MIN)
            mem_free(slab);
        else
            mem_free_huge(slab, slab->bytes);
    }
}

static int class_of(size_t bytes)
{
    int bits = CLASS_MIN_BITS;
    while (bits < POOL_CLASSES - 1 && ((size_t)1 << bits) < bytes)
        bits++;
    return bits;
}

static void keep(struct pool *p, int class, void *piece)
{
    struct pool_piece *q = piece;
    q->next = p->free[class];
    p->free[class] = q;
}

/* As many pieces as last time and once more, cut from one chunk. */
static enum err cut_chunk(struct pool *p, int class)
{
    size_t bytes = (size_t)1 << class, n = (size_t)p->n_next[class] + 1;
    char *items;
    TRY(slab_create(&p->chunks, n * bytes, (void **)&items));
    for (size_t i = n; i-- > 0;)
        keep(p, class, items + i * bytes);
    if (2 * n * bytes <= (size_t)1 << CHUNK_BITS_MAX) p->n_next[class] = (uint32_t)(2 * n - 1);
    return OK;
}

enum err pool_take(struct pool *p, size_t bytes, void **out, size_t *out_bytes)
{
    int class = class_of(bytes);
    if (((size_t)1 << class) < bytes) FAIL(ERR_NO_MEMORY, "a piece of %zu bytes", bytes);
    if (!p->free[class] && class < CHUNK_BITS_MAX) TRY(cut_chunk(p, class));
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
    keep(p, class, piece);
}

void pool_fini(struct pool *p)
{
    for (int class = CHUNK_BITS_MAX; class < POOL_CLASSES; class ++)
        for (struct pool_piece *q = p->free[class], *next; q; q = next) {
            next = q->next;
            mem_free(q);
        }
    slabs_free(p->chunks);
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

void slabs_init(struct slabs *l, size_t item_bytes)
{
    ASSERT(item_bytes % LINE_BYTES == 0 && item_bytes < SLAB_BYTES_FIRST);
    *l = (struct slabs){.item_bytes = item_bytes, .n_next = SLAB_BYTES_FIRST / item_bytes};
}

void slabs_fini(struct slabs *l)
{
    slabs_free(l->all);
    l->all = NULL;
    l->free = NULL;
}

enum err slabs_take(struct slabs *l, void **out)
{
    if (!l->free) {
        char *items;
        TRY(slab_create(&l->all, l->n_next * l->item_bytes, (void **)&items));
        for (size_t i = l->n_next; i-- > 0;) /* the first is taken first */
            slabs_give(l, items + i * l->item_bytes);
        if (l->n_next * l->item_bytes < SLAB_BYTES_MAX) l->n_next *= 2;
    }
    *out = l->free;
    l->free = *(void **)l->free;
    return OK;
}

void slabs_give(struct slabs *l, void *item)
{
    *(void **)item = l->free;
    l->free = item;
}
