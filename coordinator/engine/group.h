/* One group of workers as the engine sees it: its slots, its blocks, the plans in flight, and the
 * plan being built.
 *
 * A decode step in which nothing changes costs nothing per sequence: sequences of the decode set
 * advance by themselves, one position a plan. Each stands in a wheel of block_size buckets, at the
 * step in which it needs its next block, and near its end in a second wheel at the step in which it
 * must not run any more. A plan looks at one bucket of each.
 *
 * Never knows requests, tenants or queues: only sequences that have a slot. */
#pragma once
#include "coordinator/engine/kv_store.h"
#include "coordinator/engine/sequence.h"

enum { FLIGHTS_MAX = 8 };
struct flight { /* a plan that was sent and not answered */
    uint64_t step;
    uint32_t n_samples; /* slots that sample in it */
    uint32_t n_tokens;  /* computed in it */
    uint32_t n_prompt_tokens;
    uint32_t n_syncs;     /* runs with drafts, or that prepare some: the next plan waits for them */
    uint32_t n_drafted;   /* runs that verify drafts */
    uint32_t n_ahead;     /* runs that prepare own drafts */
    uint32_t n_unused;    /* tokens kept free for own drafts that were not there; known at last */
    enum draft_kind kind; /* of its drafts; the model's where there are both */
    bool was_queued;      /* it was sent before the plan before it was answered */
    int64_t sent_us;
};

/* What steps and drafts cost here and how often drafts are kept (draft_cost.c, draft.c). */
enum { COST_BUCKETS = 26 };
struct average {
    float value;
    uint8_t n; /* values it was made of, 0 = none */
};
struct draft_costs {
    float factor; /* by which everything takes longer just now; 0 = nothing was measured */
    struct average step_us[COST_BUCKETS], step_tokens[COST_BUCKETS];
    struct average pass_share; /* a pass of the draft model, of a step with as many sequences */
    struct average token_us;   /* one known token more in its first pass */
    struct average wait_us[DRAFT_KINDS + 1]; /* before a plan with drafts; the last: without any */
    float accept[DRAFT_KINDS];
    uint32_t n_tries[DRAFT_KINDS];
    float credit_us; /* for trying where it does not pay */
    bool ignored;    /* the configuration asks for drafts whatever they cost */
};

struct wheel { /* slots by step modulo n_buckets */
    uint32_t n_buckets;
    uint32_t *heads;           /* [n_buckets] slot or KV_NONE */
    uint32_t *next, *previous; /* [n_slots] */
    uint32_t *counts;          /* [n_buckets] */
    uint32_t *bucket;          /* [n_slots] or KV_NONE */
};

/* Of a slot of the decode set. Apart from the sequences: a plan looks at hundreds of these. */
struct due {
    uint64_t room_step; /* the step that needs its next block */
    uint64_t end_step;  /* the step in which it must not run any more */
};

struct group {
    bool up, broken; /* broken: failed, waiting for engine_group_down */
    uint32_t index;
    struct group_info info;
    struct kv_blocks kv;
    struct kv_store store;
    uint32_t n_slots, n_budget, n_rows_max, n_depth;
    uint64_t next_step,
        acked_step; /* next_step: of the next plan to build, or the one being built */
    bool building;
    struct flight flights[FLIGHTS_MAX]; /* at step % FLIGHTS_MAX */
    struct sequence **slots;            /* [n_slots] whose tokens come from it, or NULL */
    uint64_t *seen_step;                /* [n_slots] last result that named it */
    uint32_t *free_slots, n_free_slots;
    struct kv_limbo slot_limbo;
    struct wheel extend, end;
    struct due *due;          /* [n_slots] */
    uint32_t *bucket, n_full; /* [n_slots] scratch; n_full of them filled a block in this result */
    uint32_t *extend_at; /* [n_slots] index + 1 in the plan's extends, where that names the slot */
    uint32_t n_decoding;
    struct sequence_list running; /* by LINK_PLACE: all that have a slot */
    /* by LINK_WORK, what they wait for: */
    struct sequence_list prefilling, stalled, ready, waiting_result, draining, leaving, forking;
    struct sequence_list fetching; /* by LINK_WORK: no slot yet, their prefix comes from disk */
    int64_t fetch_alarm_us;        /* when the first of them gives up waiting; 0 = none */
    uint32_t *late_slots, n_late_slots; /* [n_slots] to close with the next plan */
    uint64_t n_pending_tokens;          /* prompt tokens admitted and not planned */
    uint64_t n_placed_tokens;           /* of those that wait and were given to this group */
    uint32_t n_moves_tried;             /* in this plan: others' looked at closely */
    struct step_plan plan;
    uint32_t n_extends_max, n_drafts_max, n_drafts;
    int32_t *drafts; /* [n_drafts_max] of all runs of the plan */
    uint32_t n_tokens_left, n_rows_left, n_step_samples, n_step_tokens,
        n_step_prompt; /* of the plan */
    uint32_t n_step_syncs, n_step_drafted, n_step_ahead;
    enum draft_kind step_kind;
    uint32_t n_syncs_last, n_ahead_last; /* of the last plan sent, of the last one answered */
    struct draft_costs costs;
    uint32_t token_ns; /* moving average of a prompt token's cost, for swap decisions */
    uint32_t fetch_ns; /* of a block, as its slowest rank said last */
};

enum err group_init(struct group *g, uint32_t index, const struct group_info *info,
                    uint32_t n_slots, uint32_t n_budget, uint32_t n_depth);
void group_fini(struct group *g); /* sequences must have left */

static inline uint32_t group_in_flight(const struct group *g)
{
    return (uint32_t)(g->next_step - 1 - g->acked_step);
}
/* The last plan that may name what is given back now. */
static inline uint64_t group_last_step(const struct group *g)
{
    return g->building ? g->next_step : g->next_step - 1;
}
/* Most tokens a sequence can have here. */
static inline uint32_t group_tokens_capacity(const struct group *g, uint32_t context_max)
{
    uint64_t n = (uint64_t)g->info.n_blocks * g->info.block_size;
    if (n > g->info.context_max) n = g->info.context_max;
    if (context_max && n > context_max) n = context_max;
    return (uint32_t)n;
}

/* Takes a slot for it; false when none is free. */
bool group_seat(struct group *g, struct sequence *s);
/* Its slot is closed by the next plan; blocks go back. It stays reachable by results up to its
 * last step. */
void group_unseat(struct group *g, struct sequence *s);
/* The same, but the slot is closed one plan later: others fork from it in this one. */
void group_unseat_late(struct group *g, struct sequence *s);
/* Moves to a free slot in the plan being built; the old one is closed one plan later. */
void group_reseat(struct group *g, struct sequence *s);
/* Closes in the plan being built the slots that waited for it. */
void group_close_late(struct group *g);
/* The slot's tokens have no reader any more. */
void group_forget(struct group *g, struct sequence *s);
/* Plans up to step were answered. */
void group_acked(struct group *g, uint64_t step);

/* Enters the decode set after a run in the plan being built: its first step there is the next. */
void group_join(struct group *g, struct sequence *s);
/* When its last tokens are near, the end wheel will stop it. */
void group_watch_end(struct group *g, uint32_t slot, uint64_t step);
/* Leaves it before the plan being built: n_planned becomes a plain number. */
void group_part(struct group *g, struct sequence *s);

/* Writing the plan (plan_build.c). The arrays are sized for the group; overflowing one is our own
 * mistake and asserted. */
enum err plan_init(struct group *g);
void plan_fini(struct group *g);
void plan_clear(struct group *g);
void plan_add_close(struct group *g, uint32_t slot);
void plan_add_pause(struct group *g, uint32_t slot);
void plan_add_extend(struct group *g, uint32_t slot, uint32_t block);
void plan_drop_extend(struct group *g, uint32_t slot); /* of one that is closed instead */
void plan_add_copy(struct group *g, uint32_t from, uint32_t to);
void plan_add_save(struct group *g, uint32_t block, uint32_t host);
void plan_add_load(struct group *g, uint32_t host, uint32_t block);
void plan_add_fetch(struct group *g, struct plan_pair pair);
void plan_add_spill(struct group *g, struct plan_pair pair);
void plan_add_open(struct group *g, const struct plan_open *open);
void plan_add_fork(struct group *g, const struct plan_fork *fork);
struct plan_run *plan_add_run(struct group *g, uint32_t slot, uint32_t n_tokens, uint32_t flags);
