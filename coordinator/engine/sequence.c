/* Sequences: lists, tokens, keys of blocks. */
#include "coordinator/engine/sequence.h"
#include "base/mem.h"

#include <string.h>

void sequence_list_before(struct sequence_list *l, enum sequence_link k, struct sequence *at,
                          struct sequence *s)
{
    ASSERT(!s->lists[k]);
    struct sequence *previous = at ? at->links[k].previous : l->last;
    s->links[k].previous = previous;
    s->links[k].next = at;
    if (previous)
        previous->links[k].next = s;
    else
        l->first = s;
    if (at)
        at->links[k].previous = s;
    else
        l->last = s;
    s->lists[k] = l;
    l->n++;
}

void sequence_list_append(struct sequence_list *l, enum sequence_link k, struct sequence *s)
{
    sequence_list_before(l, k, NULL, s);
}

void sequence_list_prepend(struct sequence_list *l, enum sequence_link k, struct sequence *s)
{
    sequence_list_before(l, k, l->first, s);
}

void sequence_unlink(struct sequence *s, enum sequence_link k)
{
    struct sequence_list *l = s->lists[k];
    if (!l) return;
    if (s->links[k].previous)
        s->links[k].previous->links[k].next = s->links[k].next;
    else
        l->first = s->links[k].next;
    if (s->links[k].next)
        s->links[k].next->links[k].previous = s->links[k].previous;
    else
        l->last = s->links[k].previous;
    s->links[k].previous = s->links[k].next = NULL;
    s->lists[k] = NULL;
    l->n--;
}

enum err sequence_append(struct pool *p, struct sequence *s, int32_t token)
{
    TRY(strip_reserve(p, &s->tokens, (size_t)s->tokens.n + 1, sizeof token));
    sequence_tokens(s)[s->tokens.n++] = token;
    return OK;
}

enum err sequence_hash(struct pool *p, struct sequence *s, uint32_t block_size, uint64_t salt,
                       uint32_t n)
{
    if (s->key_block_size != block_size) s->keys.n = 0;
    s->key_block_size = block_size;
    if (n <= s->keys.n) return OK;
    ASSERT_CMP((uint64_t)n * block_size, <=, s->tokens.n);
    TRY(strip_reserve(p, &s->keys, n, sizeof(struct hash128)));
    struct hash128 *keys = s->keys.items;
    uint64_t root[2] = {salt, s->job->request->cache_salt};
    struct hash128 key =
        s->keys.n ? keys[s->keys.n - 1] : hash_bytes(root, sizeof root, block_size);
    for (uint32_t i = s->keys.n; i < n; i++) {
        key = hash_chain(key, sequence_tokens(s) + (size_t)i * block_size,
                         block_size * sizeof(int32_t));
        keys[i] = key;
    }
    s->keys.n = n;
    return OK;
}

bool sequence_stops_at(const struct sequence *s, int32_t token)
{
    const struct job *job = s->job;
    if (job->n_min_tokens && sequence_generated(s) <= job->n_min_tokens) return false;
    for (int32_t i = 0; i < job->n_stop_ids && i < JOB_STOPS_NEAR; i++)
        if (job->stop_ids[i] == token) return true;
    for (int32_t i = JOB_STOPS_NEAR; i < job->n_stop_ids; i++)
        if (job->request->sampling.stop_ids[i] == token) return true;
    return false;
}

enum { SLAB_SEQUENCES = 63 };
struct slab {
    _Alignas(64) struct slab *next;
    struct sequence sequences[SLAB_SEQUENCES];
};

enum err sequence_take(struct sequence_slabs *l, struct sequence **out)
{
    if (!l->free) {
        struct slab *slab;
        TRY(mem_alloc_aligned(64, sizeof *slab, (void **)&slab));
        slab->next = l->slabs;
        l->slabs = slab;
        for (int i = SLAB_SEQUENCES; i-- > 0;)
            sequence_give(l, &slab->sequences[i]);
    }
    *out = l->free;
    l->free = l->free->parent;
    return OK;
}

void sequence_give(struct sequence_slabs *l, struct sequence *s)
{
    s->parent = l->free;
    l->free = s;
}

void sequence_slabs_fini(struct sequence_slabs *l)
{
    for (struct slab *slab = l->slabs, *next; slab; slab = next) {
        next = slab->next;
        mem_free(slab);
    }
    *l = (struct sequence_slabs){0};
}

void sequence_fini(struct pool *p, struct sequence *s)
{
    strip_free(p, &s->tokens);
    strip_free(p, &s->keys);
    strip_free(p, &s->blocks);
    strip_free(p, &s->host);
    strip_free(p, &s->scores);
    strip_free(p, &s->top_tokens);
    strip_free(p, &s->top_scores);
    strip_free(p, &s->top_counts);
}
