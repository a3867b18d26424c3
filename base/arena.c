/* Bump allocation in a list of chunks. Knows nothing of what is put into it. */
#include "base/arena.h"
#include "base/mem.h"

#include <string.h>

struct arena_chunk {
    struct arena_chunk *next;
    size_t used, size;
    _Alignas(16) unsigned char bytes[];
};

void arena_init(struct arena *a, size_t chunk_bytes, size_t limit_bytes)
{
    *a = (struct arena){.chunk_bytes = chunk_bytes ? chunk_bytes : 4096, .limit_bytes = limit_bytes};
}

void arena_fini(struct arena *a)
{
    for (struct arena_chunk *c = a->first, *next; c; c = next) {
        next = c->next;
        mem_free(c);
    }
    a->first = a->current = NULL;
    a->total_bytes = 0;
}

void arena_reset(struct arena *a)
{
    for (struct arena_chunk *c = a->first; c; c = c->next) c->used = 0;
    a->current = a->first;
}

/* Makes a chunk with room for bytes the current one: an old one after it, or a new one. */
static enum err chunk_next(struct arena *a, size_t bytes)
{
    while (a->current && a->current->next) {
        a->current = a->current->next;
        if (a->current->size - a->current->used >= bytes) return OK;
    }
    size_t size = bytes > a->chunk_bytes ? bytes : a->chunk_bytes, whole;
    if (!size_add(size, sizeof(struct arena_chunk), &whole))
        FAIL(ERR_NO_MEMORY, "arena piece of %zu bytes", bytes);
    if (a->limit_bytes && size > a->limit_bytes - a->total_bytes)
        FAIL(ERR_FULL, "arena limit of %zu bytes", a->limit_bytes);
    struct arena_chunk *c;
    TRY(mem_alloc(whole, (void **)&c));
    c->size = size;
    a->total_bytes += size;
    if (a->current) a->current->next = c;
    else a->first = c;
    a->current = c;
    return OK;
}

enum err arena_alloc(struct arena *a, size_t bytes, void **out)
{
    if (bytes > SIZE_MAX - 64) FAIL(ERR_NO_MEMORY, "arena piece of %zu bytes", bytes);
    bytes = (bytes + 15) & ~(size_t)15;
    if (!a->current || a->current->size - a->current->used < bytes) TRY(chunk_next(a, bytes));
    struct arena_chunk *c = a->current;
    *out = memset(c->bytes + c->used, 0, bytes);
    c->used += bytes;
    return OK;
}

enum err arena_alloc_array(struct arena *a, size_t n, size_t item_bytes, void **out)
{
    size_t bytes;
    if (!size_mul(n, item_bytes, &bytes)) FAIL(ERR_NO_MEMORY, "arena array of %zu items", n);
    return arena_alloc(a, bytes, out);
}

enum err arena_copy_string(struct arena *a, const char *s, size_t n, char **out)
{
    void *p;
    TRY(arena_alloc(a, n + 1, &p));
    memcpy(p, s, n);
    *out = p;
    return OK;
}
