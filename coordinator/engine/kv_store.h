/* Where a group keeps KV blocks outside the device: host memory, behind it the disk, and the
 * transfers between the two.
 *
 * Between device and host blocks move within a step, in a plan's order. Between host and disk they
 * move beside the steps: a plan starts a transfer, the ranks say when it is done, in the order in
 * which transfers of its kind were started. Until then nothing names its two blocks, except that a
 * host block being written to disk may be read. A failed transfer loses the copy, never more.
 *
 * Integers only: never a tensor, never a plan's bytes. One thread. Nothing allocates after init. */
#pragma once
#include "coordinator/engine/kv_tier.h"
#include "proto/plan.h"

enum { STORE_BACKOFF_MAX = 16 };

struct kv_queue { /* transfers of one kind, a ring from the oldest */
    struct plan_pair *pairs;
    bool *failed;
    uint64_t n_started, n_done; /* ever; those between are under way */
    uint64_t *rank_done;        /* [n_ranks] */
    uint32_t capacity;
};

struct kv_store {
    struct kv_tier host, disk;
    struct kv_queue fetches, spills; /* disk -> host, host -> disk */
    uint32_t n_ranks;
    uint32_t spill_pause, spill_backoff; /* plans without a spill after failures: 2^backoff */
    uint64_t n_saves, n_loads, n_fetches, n_spills, n_fetches_failed, n_spills_failed;
};

enum err kv_store_init(struct kv_store *s, uint32_t n_host, uint32_t n_disk, uint32_t n_ranks);
void kv_store_fini(struct kv_store *s); /* accepts zeroed memory */
void kv_store_acked(struct kv_store *s, uint64_t step);

/* What the tiers below the device have of a prefix. */
enum store_place { STORE_NOWHERE, STORE_HOST, STORE_COMING, STORE_DISK };
enum store_place kv_store_find(const struct kv_store *s, struct hash128 key, uint32_t *out_host);

/* A place on the host for a block that leaves the device in plan `step`. TIER_NONE: it is there
 * already, or there is no room. */
uint32_t kv_store_save(struct kv_store *s, struct hash128 key, uint64_t step, uint64_t acked_step);
/* Host blocks of one's own, for a sequence swapped out in plan `step`: all n or none. */
bool kv_store_take(struct kv_store *s, uint32_t n, uint64_t acked_step, uint32_t *out);
/* Starts bringing a block from disk to host; false when it is not there, or no host block or
 * no transfer is free. */
bool kv_store_fetch(struct kv_store *s, struct hash128 key, uint64_t acked_step,
                    struct plan_pair *out);
/* Starts a copy of the oldest host block that is not on disk yet, unless seven eighths of the host
 * blocks could be given away at once: prompts come in bursts. */
bool kv_store_spill(struct kv_store *s, uint64_t acked_step, struct plan_pair *out);
static inline uint64_t kv_queue_waiting(const struct kv_queue *q)
{
    return q->n_started - q->n_done;
}

/* News of one rank. ERR_FORMAT when it speaks of transfers that were not started or were done. */
enum err kv_store_moved(struct kv_store *s, uint32_t rank, const struct moved *news);
void kv_store_check(const struct kv_store *s);
