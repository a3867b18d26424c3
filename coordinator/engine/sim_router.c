/* Routers that guess. The guessing one is of the kind in wide use: a table of the prefixes sent to
 * each replica, a threshold of what must match, and the least busy replica when the loads differ
 * too much. */
#include "coordinator/engine/sim_router.h"
#include "base/hash.h"
#include "base/mem.h"

#include <string.h>

enum { CHUNK_TOKENS = 128, BEGINNING_TOKENS = 512, TABLE_START = 1 << 12 };
enum { BUSIER_BY = 8 }; /* requests; and by half of the least busy one's */

const char *const router_names[ROUTER_COUNT] = {"exact", "guess", "hash", "turns"};

struct router_entry {
    uint64_t key, groups; /* groups: a bit each; 0 = empty */
};

enum err router_init(struct router *r, enum router_kind kind, uint32_t n_groups)
{
    *r = (struct router){.kind = kind, .n_groups = n_groups, .mask = TABLE_START - 1};
    if (!n_groups || n_groups > ROUTER_GROUPS_MAX) FAIL(ERR_INVALID, "%u groups", n_groups);
    return MEM_NEW_ARRAY(TABLE_START, &r->entries);
}

void router_fini(struct router *r)
{
    mem_free(r->entries);
    *r = (struct router){0};
}

static struct router_entry *find(struct router_entry *entries, uint32_t mask, uint64_t key)
{
    uint32_t i = (uint32_t)key & mask;
    while (entries[i].groups && entries[i].key != key)
        i = (i + 1) & mask;
    return &entries[i];
}

static enum err grow(struct router *r)
{
    struct router_entry *wider;
    uint32_t mask = 2 * r->mask + 1;
    if (2 * r->n <= r->mask) return OK;
    TRY(MEM_NEW_ARRAY((size_t)mask + 1, &wider));
    for (uint32_t i = 0; i <= r->mask; i++)
        if (r->entries[i].groups) *find(wider, mask, r->entries[i].key) = r->entries[i];
    mem_free(r->entries);
    r->entries = wider;
    r->mask = mask;
    return OK;
}

static uint32_t least_busy(const struct router *r)
{
    uint32_t best = 0;
    for (uint32_t i = 1; i < r->n_groups; i++)
        if (r->n_alive[i] < r->n_alive[best]) best = i;
    return best;
}

/* Leading chunks of the prompt that went to each group. */
static void matches(struct router *r, const int32_t *tokens, uint32_t n_chunks, uint32_t *out)
{
    struct hash128 key = {0};
    uint64_t groups = r->n_groups == 64 ? UINT64_MAX : ((uint64_t)1 << r->n_groups) - 1;
    for (uint32_t k = 0; k < n_chunks && groups; k++) {
        key = hash_chain(key, tokens + (size_t)k * CHUNK_TOKENS, CHUNK_TOKENS * sizeof *tokens);
        groups &= find(r->entries, r->mask, key.low)->groups;
        for (uint32_t i = 0; i < r->n_groups; i++)
            out[i] += groups >> i & 1;
    }
}

static enum err remember(struct router *r, const int32_t *tokens, uint32_t n_chunks, uint32_t group)
{
    struct hash128 key = {0};
    for (uint32_t k = 0; k < n_chunks; k++) {
        key = hash_chain(key, tokens + (size_t)k * CHUNK_TOKENS, CHUNK_TOKENS * sizeof *tokens);
        TRY(grow(r));
        struct router_entry *e = find(r->entries, r->mask, key.low);
        r->n += !e->groups;
        e->key = key.low;
        e->groups |= (uint64_t)1 << group;
    }
    return OK;
}

static enum err guess(struct router *r, const int32_t *tokens, uint32_t n, uint32_t *out_group)
{
    uint32_t found[ROUTER_GROUPS_MAX] = {0}, n_chunks = n / CHUNK_TOKENS;
    uint32_t idle = least_busy(r), best = idle;
    matches(r, tokens, n_chunks, found);
    for (uint32_t i = 0; i < r->n_groups; i++)
        if (found[i] > found[best] || (found[i] == found[best] && r->n_alive[i] < r->n_alive[best]))
            best = i;
    bool far_busier = r->n_alive[best] > r->n_alive[idle] + BUSIER_BY &&
                      2 * r->n_alive[best] > 3 * r->n_alive[idle];
    if (2 * found[best] < n_chunks || far_busier) best = idle;
    *out_group = best;
    return remember(r, tokens, n_chunks, best);
}

enum err router_send(struct router *r, const int32_t *tokens, uint32_t n, uint32_t *out_group)
{
    uint32_t group = 0;
    if (r->kind == ROUTER_TURNS)
        group = r->n_turns++ % r->n_groups;
    else if (r->kind == ROUTER_HASH) {
        uint32_t n_first = n < BEGINNING_TOKENS ? n : BEGINNING_TOKENS;
        group = (uint32_t)(hash_bytes(tokens, n_first * sizeof *tokens, 0).low % r->n_groups);
    } else if (r->kind == ROUTER_GUESS)
        TRY(guess(r, tokens, n, &group));
    r->n_alive[group]++;
    *out_group = group;
    return OK;
}
