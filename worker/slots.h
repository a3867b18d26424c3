/* What this rank knows of the sequences that live: tokens, block tables, parameters.
 *
 * A plan is applied in two halves: everything in it is checked against this rank's own limits, with
 * words for what is wrong; only then runs are listed, ascending by slot. A plan that fails leaves
 * the slots unusable (the rank must leave its group), but never touches memory that is not theirs.
 * Knows tokens and blocks as integers; never tensors. */
#pragma once
#include "proto/plan.h"
#include <stdbool.h>
#include <stdint.h>

enum {
    SLOT_BIAS_MAX = 1024, /* logit biases of one sequence */
    SLOT_STOP_MAX = 4096, /* stop ids of one sequence */
    TOKEN_PENDING = -1    /* sampled by a step that is still under way; the device knows it */
};

struct slots_limits {
    uint32_t n_slots, context_max, draft_max, block_size, n_blocks, n_host_blocks, vocab_size;
    uint32_t n_disk_blocks;
    uint32_t step_tokens_max, logprobs_max;
};

struct slot {
    bool open, decoding; /* decoding: runs one token a step without being named */
    uint32_t generation; /* counts openings, so that a late result finds its own sequence only */
    uint32_t n_prompt, n_known, n_computed, n_tokens_max, n_blocks;
    /* Of the draft model (draft.h): drafts behind the known tokens, how many are wanted after this
     * step, leading tokens whose KV it has computed, and how far draft_valid says so. */
    uint32_t n_drafts, n_ahead, n_draft_computed, n_draft_marked;
    int32_t *tokens;                 /* [context_max + draft_max + 1], n_known of them valid */
    int32_t *blocks;                 /* [blocks_per_slot], n_blocks of them valid */
    struct sampling_params sampling; /* its arrays are the four below */
    int32_t *bias_tokens, *stop_ids; /* [SLOT_BIAS_MAX], [SLOT_STOP_MAX] */
    float *bias_values;              /* [SLOT_BIAS_MAX] */
};

/* What one slot does in this step. */
struct slot_run {
    uint32_t slot, n_tokens, n_drafts;
    bool sample;
    const int32_t *drafts; /* [n_drafts], the plan's; NULL: the slot's own */
    bool own;              /* the plan asked for own drafts; n_drafts is what became of it */
};

struct slots {
    struct slots_limits limits;
    uint32_t blocks_per_slot;
    uint32_t n_blocks_used; /* 1 + the highest block that any slot has had */
    struct slot *all;      /* [n_slots] */
    struct slot_run *runs; /* [n_slots] of the last plan, ascending slots */
    uint32_t n_runs, n_run_tokens;
    bool *named; /* [n_slots] scratch */
    /* [n_blocks] leading tokens of a block whose KV the draft model has computed as well as the
     * target; NULL: there is none. */
    uint16_t *draft_valid;
    uint32_t n_ahead; /* slots of the last plan that want drafts after it */
    void *pieces[5];  /* the arrays behind all slots */
};

enum err slots_init(struct slots *s, const struct slots_limits *limits);
void slots_fini(struct slots *s); /* accepts zeroed memory */
/* A new incarnation: every slot closed, the group's block counts (not above those at init). */
void slots_reset(struct slots *s, uint32_t n_blocks, uint32_t n_host_blocks);
/* Applies closes, opens, forks, extends, pauses and lists the runs; checks the block moves, which
 * are the caller's to make. ERR_FORMAT says what is wrong. */
enum err slots_apply(struct slots *s, const struct step_plan *plan);
