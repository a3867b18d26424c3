/* One step under way: the flat arrays that the backend reads, the rows that are sampled, and what
 * becomes of the samples. All memory is taken at start; filling and settling allocate nothing.
 *
 * Knows slots and the backend's structs; never the wire or the weights. */
#pragma once
#include "kernels/backend.h"
#include "worker/slots.h"

/* What a row of logits is for. */
struct step_row {
    uint32_t slot, generation, run; /* index into runs of this step */
    uint32_t index; /* place in the sequence of the token that the row decides or scores */
    uint32_t draft; /* how many drafts of its run lie before it */
    bool scored;    /* the token is known; only its logprob is wanted */
    bool
        needs_logits; /* more than the largest one's token is wanted of it; the same on all ranks */
};

enum { STEP_PIECES = 16 };
struct step {
    uint64_t epoch, number, ticket;
    bool busy, settled;
    bool needs_host; /* its samples decide lengths: settle before the slots change again */
    struct batch batch;
    int32_t *token_ids, *token_slot, *positions, *cache_slot, *rows_out; /* [step_tokens_max] */
    int32_t *seq_start, *context_len; /* [n_slots + 1], [n_slots] */
    int32_t *block_table;             /* [n_slots][blocks of the longest table of the step] */
    struct slot_run *runs;            /* [n_slots] */
    uint32_t *kept_known;             /* [n_slots] n_known of each run's slot before the step */
    struct step_row *rows;            /* [step_tokens_max] */
    struct sample_row *sample_rows;   /* [step_tokens_max] */
    struct sample_result *results;    /* [step_tokens_max] */
    int32_t *greedy;                  /* [step_tokens_max] tokens of rows without logits */
    struct step_token *tokens;        /* [step_tokens_max] of the result */
    struct plan_pair *drafted;        /* [n_slots] of the result */
    uint32_t n_runs, n_rows, n_tokens_out, n_drafted;
    void *pieces[STEP_PIECES];
    int64_t begun_us, wait_us, collective_us;
};

enum err step_init(struct step *s, const struct slots *slots);
void step_fini(struct step *s); /* accepts zeroed memory */
/* The row that decides the token after n_before known ones (and drafts) of a slot. feeds: the token
 * goes to the device's feedback table; speaks: with the logprobs asked for. */
void step_row_sampled(const struct slot *t, uint32_t slot, uint32_t n_before, bool feeds,
                      bool speaks, struct sample_row *out);
/* Fills everything from the runs that slots_apply listed, and moves the slots on: computed counts,
 * and a pending token where one is sampled. speaks: this rank answers with logprobs. */
void step_fill(struct step *s, struct slots *slots, bool speaks);
/* Whether every sequence has one token and samples after it: such steps repeat. */
bool step_is_decode(const struct step *s);
/* Makes the batch n sequences long. The rows beyond its own read token 0 of block 0, write nowhere
 * and are not sampled. n: at most n_slots; only where step_is_decode. */
void step_pad(struct step *s, int n);
/* Whether rows [first, first + n) want nothing but their largest logit's token. Every rank says the
 * same, whether it speaks or not. */
bool step_is_greedy(const struct step *s, uint32_t first, uint32_t n);
/* After the ticket was waited for: samples become tokens of their slots and of the result. */
void step_settle(struct step *s, struct slots *slots);
/* Whether the plan's application needs the tokens of this unsettled step on the host. */
bool step_blocks(const struct step *s, const struct step_plan *next);
