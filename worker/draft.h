/* The draft model of a rank: a second, small model that guesses the tokens to come, so that the
 * first one verifies several in one step.
 *
 * Its KV cache has the block numbers of the target's: block b of one is block b of the other, so
 * tables, copies, swaps and shared prefixes hold for both and the coordinator counts them once. Its
 * KV is computed when drafts are wanted and not before, so a sequence that is not drafted costs
 * nothing; slots.draft_valid says which of a block's tokens have it.
 *
 * A draft is never more than a guess: the target keeps it while it equals its own sample. All ranks
 * hold the same drafts, for they compute the same sums; where the draft model's heads do not
 * divide, each computes the whole and rank 0's drafts count.
 *
 * Leviathan et al., "Fast Inference from Transformers via Speculative Decoding", 2022; drafts are
 * drawn with the numbers that the target will draw with, so a draft model that agrees is kept at
 * any temperature. Knows slots and one model; never plans' meaning, requests or costs. */
#pragma once
#include "worker/memory.h"
#include "worker/model/decoder.h"
#include "worker/step.h"

struct draft {
    struct model *model;
    struct decoder decoder;
    struct backend *backend;
    struct collective *collective; /* of the target's group; NULL where there is none */
    int rank, size;
    bool sharded, greedy;
    bool pending; /* slots want drafts before the next plan */
    uint32_t context_max, block_size;
    uint64_t block_bytes, host_offset; /* of a block on the host: behind the target's part */
    uint16_t *host_valid;              /* [n_host_blocks] as slots.draft_valid */
    uint32_t *list, *wanted;           /* [n_slots] of this round: slots, how many drafts each */
    uint32_t n_list, n_tokens, n_seqs, n_rows, stride;
    struct batch batch;
    int32_t *token_ids, *token_slot, *positions, *cache_slot; /* [n_tokens_max] */
    int32_t *rows_out, *seq_start, *context_len, *block_table;
    struct sample_row *rows;       /* [n_slots] */
    struct sample_result *results; /* [n_slots] */
    uint32_t *row_list;            /* [n_slots] index into list */
    int32_t *tokens;               /* [n_slots] */
    void *agreed;                  /* device [n_slots] int32 */
    void *pieces[15];
    int64_t us, first_us; /* of the last round, until told */
    uint32_t passes, tokens_fed;
};

enum err draft_create(const struct worker_config *config, const struct memory_plan *plan,
                      const struct model_config *model, struct backend *backend,
                      struct slots *slots, struct draft **out);
void draft_destroy(struct draft *d); /* accepts NULL */
/* A new incarnation of the group, or its end (NULL). */
void draft_open_group(struct draft *d, struct collective *collective);

/* Copies, saves and loads of a plan, on its own pool. host: [n_host_blocks] of plan.block_bytes. */
void draft_move(struct draft *d, struct slots *slots, const struct step_plan *plan, void *host);
/* Drafts for the slots whose last run wanted some: their tokens lie behind the known ones. Every
 * rank calls it between the same two steps; the step before it has been settled. */
enum err draft_ahead(struct draft *d, struct slots *slots);

/* The target writes positions from .. to of a slot: what the draft model had there is of other
 * tokens. */
void draft_written(struct slots *slots, struct slot *t, uint32_t from, uint32_t to);
/* The slot has n_known tokens now; what lies beyond was a guess. */
static inline void draft_kept(struct slot *t)
{
    if (t->n_draft_computed >= t->n_known) t->n_draft_computed = t->n_known - 1;
}
