/* A false group of workers: applies plans to slots and blocks of its own, strictly, and computes
 * tokens from the prefix hashes that it finds in the blocks.
 *
 * Knows plans only; never the engine. */
#pragma once
#include "base/arena.h"
#include "proto/plan.h"
#include <stdbool.h>

enum { SIM_VOCABULARY = 61, SIM_EOS = 0, SIM_DRAFTS_MAX = 16 };

/* The model: what follows a prefix. All of it is a function of the prefix and the seed. */
uint64_t model_prefix(uint64_t prefix, int32_t token);
int32_t model_next(uint64_t prefix, int32_t last, uint32_t n_output,
                   const struct sampling_params *p);
float model_logprob(uint64_t prefix, int32_t token);
/* The n best tokens of a prefix, best first. */
void model_top(uint64_t prefix, uint32_t n, int32_t *out_tokens, float *out_logprobs);

struct sim_slot {
    bool open, decoding;
    bool retired;         /* a fork of it writes into its last block now: it must not run again */
    uint32_t from_serial; /* of the slot it was forked from, 0 = none */
    uint32_t n_prompt, n_known, n_computed, n_max, n_blocks, serial;
    int32_t *tokens;    /* [context] */
    uint64_t *prefixes; /* [context] of the tokens up to each */
    uint32_t *blocks;   /* [blocks_per_slot] */
    struct sampling_params sampling;
    int32_t stop_ids[8];
    uint32_t n_ahead, n_own; /* drafts asked for after this step; there before it */
    int32_t own[SIM_DRAFTS_MAX];
};

struct sim_run {
    bool named, sample, own;
    uint32_t n_tokens, n_drafts, n_asked; /* n_asked: own drafts that the plan made room for */
    const int32_t *drafts;
};

enum { SIM_TRANSFERS_MAX = 256 };
struct sim_transfers {
    struct plan_pair pairs[SIM_TRANSFERS_MAX];
    uint32_t first, n;
};

struct sim_worker {
    uint32_t n_slots, n_blocks, n_host, block_size, context, window, blocks_per_slot;
    uint32_t step_tokens_max, step_prompt_max, step_rows_max;
    bool has_draft_model;
    uint64_t step;
    struct sim_slot *slots;
    struct sim_run *runs;     /* [n_slots] */
    uint64_t *kv, *host;      /* [blocks, block_size] prefix hashes, 0 = never written */
    uint32_t *owner, *serial; /* [n_blocks] the slot that wrote last, and its serial */
    uint32_t next_serial;
    struct arena results; /* of the last result */
    uint64_t n_computed;  /* tokens, ever */
    uint32_t n_disk;
    uint64_t *disk;                /* [n_disk, block_size] */
    struct sim_transfers io[2];    /* fetches, spills: under way, oldest first */
    struct moved moved;            /* what ended; its failures are those not told yet */
    uint64_t failed[2][SIM_TRANSFERS_MAX];
    const char *fault;    /* what was wrong with a plan, or NULL */
    char words[256];
};

enum err sim_worker_init(struct sim_worker *w, uint32_t n_slots, uint32_t n_blocks, uint32_t n_host,
                         uint32_t block_size, uint32_t context);
void sim_worker_fini(struct sim_worker *w);
/* Gives it a disk. */
enum err sim_worker_disk(struct sim_worker *w, uint32_t n_disk);
/* The oldest transfer of a kind (0 fetch, 1 spill) ends; a failed one leaves rubbish. */
void sim_worker_transfer(struct sim_worker *w, int kind, bool fails);
/* False with w->fault when the plan is wrong. The result lives until the next call. */
bool sim_worker_apply(struct sim_worker *w, const struct step_plan *plan, struct step_result *out);
