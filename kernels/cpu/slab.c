/* Stretches in a list, newest first; pieces are cut off the newest that has room. */
#include "kernels/cpu/slab.h"
#include "base/mem.h"

enum { SLAB_BYTES = 64 << 20, PIECE_ALIGNMENT = 4096 };

struct slab {
    uint8_t *memory;
    size_t bytes, used;
    int64_t n_pieces;
    struct slab *next;
};

static enum err slab_create(struct slabs *slabs, size_t bytes)
{
    struct slab *s;
    TRY(MEM_NEW(&s));
    s->bytes = bytes > SLAB_BYTES ? bytes : SLAB_BYTES; /* untouched pages cost nothing */
    enum err e = mem_alloc_huge(s->bytes, (void **)&s->memory);
    if (e) {
        mem_free(s);
        return e;
    }
    s->next = slabs->first;
    slabs->first = s;
    return OK;
}

enum err slab_take(struct slabs *slabs, size_t bytes, uint8_t **out, struct slab **out_slab)
{
    size_t needed;
    if (!size_add(bytes, PIECE_ALIGNMENT - 1, &needed))
        FAIL(ERR_NO_MEMORY, "a weight of %zu bytes", bytes);
    needed &= ~(size_t)(PIECE_ALIGNMENT - 1);
    struct slab *s = slabs->first;
    while (s && s->bytes - s->used < needed)
        s = s->next;
    if (!s) {
        TRY(slab_create(slabs, needed));
        s = slabs->first;
    }
    *out = s->memory + s->used;
    *out_slab = s;
    s->used += needed;
    s->n_pieces++;
    return OK;
}

void slab_give(struct slabs *slabs, struct slab *slab)
{
    if (!slab || --slab->n_pieces > 0) return;
    struct slab **at = &slabs->first;
    while (*at != slab)
        at = &(*at)->next;
    *at = slab->next;
    mem_free_huge(slab->memory, slab->bytes);
    mem_free(slab);
}
