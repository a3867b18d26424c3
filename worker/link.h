/* A rank's end of its stream to the coordinator.
 *
 * The link dials, joins, beats the heart from a thread of its own and dials again after a loss; the
 * worker's loop asks it for the next event and answers. While the stream is lost the worker keeps
 * its weights: the next event after LINK_LOST or LINK_HALT is a LINK_WELCOME with a new epoch.
 *
 *     link_open
 *     for (;;) switch (link_next(...).kind)
 *         LINK_WELCOME  forget every sequence, open the collective (link_exchange), link_ready
 *         LINK_PLAN     run it, link_send_result
 *         LINK_HALT     a peer is lost: close the collective; weights stay; wait for LINK_WELCOME
 *         LINK_LOST     the coordinator is lost: the same
 *         LINK_DRAIN    finish, link_leave, stop      LINK_REFUSED  log the reason, stop
 *
 * Knows bytes and epochs; never a model, a tensor or what a plan says. */
#pragma once
#include "base/err.h"
#include "proto/rpc.h"
#include <stdatomic.h>
#include <stdint.h>

/* What this rank tells of itself; the words of heddle.cluster.Join. Strings are copied. */
struct link_join {
    const char *model_digest, *model_name, *host, *device, *draft_digest;
    uint32_t replica, rank, size;
    uint32_t block_size, slots_max, step_tokens_max, step_rows_max, context_max, vocab_size, window;
    uint32_t draft_tokens_max, step_prompt_max;
    uint64_t blocks_max, host_blocks_max, disk_blocks_max, weight_bytes, block_bytes;
    uint32_t save_ns, load_ns, fetch_ns;
    bool has_draft_model;
};

struct link_config {
    const char *address, *token;
    struct rpc_tls tls;
    struct link_join join;
    uint32_t patience_ms; /* how long to look for a coordinator, at start and after a loss; 0 = for
                             ever */
    uint32_t n_plans_max; /* that may wait here; more is the coordinator's fault and ends the
                             stream; 0 = 256 */
};

enum link_event_kind {
    LINK_NONE,
    LINK_WELCOME,
    LINK_PLAN,
    LINK_HALT,
    LINK_LOST,
    LINK_DRAIN,
    LINK_REFUSED
};
struct link_event {
    enum link_event_kind kind; /* LINK_NONE: timeout_us passed */
    uint64_t epoch;            /* of a welcome or plan; of a halt, the one that ended */
    uint32_t group;            /* welcome */
    uint64_t n_blocks, n_host_blocks;
    char group_key[40];  /* welcome: random, names this incarnation's shared memory */
    struct span bytes;   /* plan: the whole ToWorker; valid until the next link_next */
    const char *text;    /* halt, lost, refused: why; valid until the next link_next */
    int64_t received_us; /* clock_monotonic_us when a plan came in */
};

struct link;
/* Starts dialling and returns at once; the outcome is an event (LINK_WELCOME, LINK_REFUSED, or
 * LINK_LOST with "gave up" after patience_ms, which is final). */
enum err link_open(const struct link_config *config, struct link **out);
void link_close(struct link *l); /* accepts NULL */

/* Waits up to timeout_us (-1 = for ever) for the next event. Plans of an ended epoch never come:
 * after a halt or loss what waited is dropped. */
enum err link_next(struct link *l, int64_t timeout_us, struct link_event *out);
/* The same, but plans stay where they are (a drain too, which comes after them): for a worker whose
 * hands are full. */
enum err link_next_but_plans(struct link *l, int64_t timeout_us, struct link_event *out);

/* All-gather by key among the group's ranks: out_all[rank] points into *arena-like* memory of the
 * link, valid until the next link_exchange or link_next. Bytes <= LINK_EXCHANGE_BYTES_MAX.
 * ERR_TIMEOUT; ERR_PEER when the epoch ended meanwhile. */
enum { LINK_EXCHANGE_BYTES_MAX = 64 << 10, LINK_RANKS_MAX = 256 };
enum err link_exchange(struct link *l, const char *key, const void *mine, size_t n,
                       int64_t timeout_us, struct span out_all[]);
enum err link_ready(struct link *l, uint64_t epoch);
/* Bytes of a FromWorker (step_result_encode: rank 0's result or another's ack; moved_encode, from
 * any thread). Copies. ERR_PEER
 * when the stream is lost: the worker goes on to link_next. */
enum err link_send_result(struct link *l, const void *bytes, size_t n);
/* This rank cannot go on (device lost, out of memory): said before exit or before a new Welcome. */
void link_fault(struct link *l, const char *reason, bool fatal);
/* Says good-bye and waits up to timeout_ms for what was queued to leave. */
void link_leave(struct link *l, const char *reason, int timeout_ms);

/* The epoch that lives now, 0 = none. Collectives that wait for a peer poll it: when it differs
 * from theirs the peer will never come. Lives as long as the link. */
const atomic_uint_fast64_t *link_epoch(const struct link *l);
