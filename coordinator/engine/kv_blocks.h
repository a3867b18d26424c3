/* The KV blocks of one group: who holds which, and which prefixes can be found again.
 *
 * A block is free (content worthless), cached (nobody holds it, its prefix can be found), or held
 * (by sequences, or by a plan that was not acknowledged yet). free + cached + held = total always.
 * A block that nobody refers to any more waits in limbo until the last plan that may name it was
 * acknowledged; only then it is free or cached. Cached blocks are evicted oldest first; a sequence
 * gives its blocks back last one first, so a prefix always outlives what follows it.
 *
 * Integers only: never a tensor, never a token's meaning. One thread. Nothing allocates after
 * kv_blocks_init. */
#pragma once
#include "base/err.h"
#include "base/hash.h"
#include <stdint.h>

enum { KV_NONE = UINT32_MAX };

struct kv_block {       /* one line of cache */
    struct hash128 key; /* of the whole prefix that ends with this block, while registered */
    uint64_t free_step; /* the plan after whose acknowledgement it leaves limbo */
    uint32_t n_refs;
    uint32_t previous, next; /* in the list of cached ones */
    uint8_t registered, in_limbo, cached;
    uint8_t spare[25];
};

struct kv_index_entry { /* open addressing; block + 1, 0 = empty */
    uint32_t block, tag;
};

struct kv_limbo { /* ids and the step they wait for, a ring */
    uint32_t *ids;
    uint64_t *steps;
    uint32_t first, n, capacity;
};

struct kv_blocks {
    uint32_t n_total, n_free, n_cached, n_held, block_size;
    struct kv_block *blocks; /* [n_total] */
    size_t blocks_bytes, index_bytes;
    uint32_t *free;          /* [n_free] a stack */
    uint32_t oldest, newest; /* cached blocks */
    struct kv_index_entry *index;
    uint32_t index_mask, n_registered;
    struct kv_limbo limbo;
    uint64_t n_evicted;
};

/* ERR_NO_MEMORY leaves nothing behind. */
enum err kv_blocks_init(struct kv_blocks *kv, uint32_t n_blocks, uint32_t block_size);
void kv_blocks_fini(struct kv_blocks *kv); /* accepts zeroed memory */

/* How many blocks kv_blocks_take can give now. */
static inline uint32_t kv_blocks_available(const struct kv_blocks *kv)
{
    return kv->n_free + kv->n_cached;
}

/* Asks for the memory of the n-th block to be taken from now. */
static inline void kv_blocks_prefetch_free(const struct kv_blocks *kv, uint32_t n)
{
    if (n < kv->n_free) __builtin_prefetch(&kv->blocks[kv->free[kv->n_free - 1 - n]], 1);
}
/* A block of one's own, held once, content worthless. KV_NONE when none is available. When
 * n_evicted grew, a prefix was forgotten for it: its key still stands in the block. */
uint32_t kv_blocks_take(struct kv_blocks *kv);
void kv_blocks_ref(struct kv_blocks *kv, uint32_t block);
/* One reference less; at zero it goes to limbo until `step` was acknowledged. */
void kv_blocks_unref(struct kv_blocks *kv, uint32_t block, uint64_t step);
/* Plans up to step were acknowledged: their limbo becomes free or cached. */
void kv_blocks_acked(struct kv_blocks *kv, uint64_t step);

/* The block whose prefix has this key, or KV_NONE. */
uint32_t kv_blocks_find(const struct kv_blocks *kv, struct hash128 key);
void kv_blocks_prefetch(const struct kv_blocks *kv, struct hash128 key);
/* Number of leading keys that are here, and how many of their blocks nobody holds. Their blocks go
 * to out_blocks [n] unless that is NULL. */
uint32_t kv_blocks_match(const struct kv_blocks *kv, const struct hash128 *keys, uint32_t n,
                         uint32_t *out_cached, uint32_t *out_blocks);
/* Makes a held block findable. The first of equal ones stays; the later ones remain private. */
void kv_blocks_register(struct kv_blocks *kv, uint32_t block, struct hash128 key);

/* Asserts every count and list against each other. Slow: for tests and the simulator. */
void kv_blocks_check(const struct kv_blocks *kv);
