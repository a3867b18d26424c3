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

enum err sequence_set_tokens(struct pool *p, struct sequence *s, const int32_t *tokens, uint32_t n,
                             uint32_t n_room)
{
    s->tokens.n = 0;
    TRY(strip_reserve(p, &s->tokens, (size_t)n + n_room, sizeof *tokens));
    memcpy(s->tokens.items, tokens, n * sizeof *tokens);
    s->tokens.n = n;
    memcpy(s->tail, tokens + n - sequence_tail(s), sequence_tail(s) * sizeof *tokens);
    return OK;
}

static struct hash128 root_key(const struct sequence *s, uint32_t block_size, uint64_t salt)
{
    uint64_t root[2] = {salt, s->job->request->cache_salt};
    return hash_bytes(root, sizeof root, block_size);
}

static void keys_of_size(struct sequence *s, uint32_t block_size)
{
    if (s->key_block_size != block_size) sequence_drop_keys(s);
    s->key_block_size = block_size;
}

enum err sequence_hash(struct pool *p, struct sequence *s, uint32_t block_size, uint64_t salt,
                       uint32_t n)
{
    keys_of_size(s, block_size);
    if (n <= s->keys.n) return OK;
    ASSERT_CMP((uint64_t)n * block_size, <=, s->tokens.n);
    TRY(strip_reserve(p, &s->keys, n, sizeof(struct hash128)));
    struct hash128 *keys = s->keys.items;
    struct hash128 key = s->keys.n ? keys[s->keys.n - 1] : root_key(s, block_size, salt);
    const int32_t *tokens = sequence_tokens(s);
    for (uint32_t i = s->keys.n; i < n; i++) {
        key = hash_chain(key, tokens + (size_t)i * block_size, block_size * sizeof(int32_t));
        keys[i] = key;
    }
    s->keys.n = n;
    return OK;
}

enum err sequence_key(struct pool *p, struct sequence *s, uint32_t block_size, uint64_t salt,
                      uint32_t i, struct hash128 *out)
{
    keys_of_size(s, block_size);
    if (i + 1 != s->n_chained || !s->n_chained) {
        bool chained = s->n_chained && i == s->n_chained;
        if (!chained) TRY(sequence_hash(p, s, block_size, salt, i));
        if (!chained && i < s->keys.n) {
            *out = ((const struct hash128 *)s->keys.items)[i];
            return OK;
        }
        struct hash128 parent = chained ? s->last_key
                                : i     ? ((const struct hash128 *)s->keys.items)[i - 1]
                                        : root_key(s, block_size, salt);
        size_t at = (size_t)i * block_size;
        bool whole = at + block_size <= s->tokens.n - sequence_tail(s);
        const int32_t *tokens = whole ? s->tokens.items : sequence_tokens(s);
        s->last_key = hash_chain(parent, tokens + at, block_size * sizeof(int32_t));
        s->n_chained = i + 1;
    }
    *out = s->last_key;
    return OK;
}

bool sequence_stops_far(const struct sequence *s, int32_t token)
{
    const struct job *job = s->job;
    for (int32_t i = JOB_STOPS_NEAR; i < job->n_stop_ids; i++)
        if (job->request->sampling.stop_ids[i] == token) return true;
    return false;
}

void sequence_fini(struct pool *p, struct sequence *s)
{
    strip_free(p, &s->tokens);
    strip_free(p, &s->keys);
    strip_free(p, &s->blocks);
    strip_free(p, &s->host);
    strip_free(p, &s->logprobs.chosen);
    strip_free(p, &s->logprobs.top_tokens);
    strip_free(p, &s->logprobs.top_scores);
    strip_free(p, &s->logprobs.top_counts);
}
