/* One tier of KV blocks outside the device: which of them hold which prefix, and who goes next.
 *
 * A block is free, kept (its prefix can be found, it may be evicted), moving (a copy to or from it
 * is under way on the workers), private (one sequence's, swapped out), or in limbo (given back, but
 * a plan that was not acknowledged may still name it). The five counts add up to all blocks,
 * always. Kept ones stand in one of two lists from the oldest to the newest; those whose content is
 * also one tier below are evicted first.
 *
 * Integers only. One thread. Nothing allocates after kv_tier_init. */
#pragma once
#include "base/err.h"
#include "base/hash.h"
#include <stdbool.h>
#include <stdint.h>

enum { TIER_NONE = UINT32_MAX };
enum tier_state {
    TIER_FREE,
    TIER_PRIVATE,
    TIER_LIMBO,
    TIER_KEPT,
    TIER_SENDING,  /* findable, readable: copied to the tier below */
    TIER_RECEIVING /* findable, not readable yet */
};

struct tier_block {
    struct hash128 key;
    uint64_t busy_step; /* no plan after this one may have to name it before it is overwritten */
    uint32_t previous, next; /* in its list */
    uint8_t state;
    bool below; /* its content is in the tier below, too */
    bool risen; /* it came from the tier below and was not used since */
};

struct tier_list {
    uint32_t oldest, newest, n;
};

struct kv_tier {
    uint32_t n_total, n_free, n_private, n_limbo, n_moving;
    struct tier_block *blocks; /* [n_total] */
    uint32_t *free;            /* [n_free] a stack */
    struct tier_list lists[2]; /* by `below` */
    uint32_t *index;           /* block + 1, 0 = empty; open addressing */
    uint32_t index_mask;
    struct {
        uint32_t *ids; /* [n_total] a ring of n_limbo */
        uint64_t *steps;
        uint32_t first;
    } limbo;
    uint64_t n_evicted; /* kept ones that were forgotten to make room */
};

/* ERR_NO_MEMORY leaves nothing behind. */
enum err kv_tier_init(struct kv_tier *t, uint32_t n_blocks);
void kv_tier_fini(struct kv_tier *t); /* accepts zeroed memory */

static inline uint32_t kv_tier_kept(const struct kv_tier *t)
{
    return t->lists[0].n + t->lists[1].n;
}
/* The block with this key, whatever it does, or TIER_NONE. */
uint32_t kv_tier_find(const struct kv_tier *t, struct hash128 key);
/* A block whose content is worthless, in state `state`: a free one, else the oldest that is kept
 * and that no plan after acked_step names. out_evicted says whether a prefix was forgotten for it,
 * out_key which. TIER_NONE when there is none. */
uint32_t kv_tier_take(struct kv_tier *t, enum tier_state state, uint64_t acked_step,
                      bool *out_evicted, struct hash128 *out_key);
/* Gives it a key that nothing else here has. Its state must be one with a key. */
void kv_tier_name(struct kv_tier *t, uint32_t block, struct hash128 key);
/* A moving or freshly named block comes to rest, as the newest. */
void kv_tier_keep(struct kv_tier *t, uint32_t block, bool below);
/* A kept block begins to move. */
void kv_tier_move(struct kv_tier *t, uint32_t block, enum tier_state state);
/* Kept: it is the newest now, and named by plan `step`. Others: only the latter. */
void kv_tier_touch(struct kv_tier *t, uint32_t block, uint64_t step);
/* Forgets a kept, moving or private block: it is free. */
void kv_tier_drop(struct kv_tier *t, uint32_t block);
/* A private block is free once `step` was acknowledged. */
void kv_tier_give(struct kv_tier *t, uint32_t block, uint64_t step);
void kv_tier_acked(struct kv_tier *t, uint64_t step);
/* Asserts every count and list against each other. Slow: for tests and the simulator. */
void kv_tier_check(const struct kv_tier *t);
