/* The step plan and its result as plain structs, and their bytes.
 *
 * A plan says differences only: what closes, opens, grows and runs. Sequences in the decode set run
 * one token a step without being named, so a step in which nothing changes is a few bytes whatever
 * the number of sequences. The order of execution within a step is the order of the fields.
 *
 * Arrays belong to whoever built or decoded the plan: a step arena. Nothing here is trusted: the
 * decoder checks shapes and lengths, the worker checks every id against its own limits. */
#pragma once
#include "base/arena.h"
#include "base/buf.h"
#include <stdint.h>

enum {
    PLAN_PROTOCOL = 1,
    PLAN_TRANSFERS_MAX = 1024 /* between host and disk, of a kind, under way at once */
};

struct sampling_params {
    float temperature; /* 0 = greedy */
    int32_t top_k;     /* 0 = off */
    float top_p, min_p;
    float repetition_penalty, presence_penalty, frequency_penalty;
    uint64_t seed;           /* the draw of position p is rand_at(seed, p, 0) */
    int32_t n_logprobs;      /* -1 = none, 0 = the chosen token's, k = and the k best */
    int32_t n_prompt_logprobs;
    int32_t min_tokens;      /* stop_ids are banned before that many output tokens */
    int32_t n_bias;
    const int32_t *bias_tokens; /* [n_bias] */
    const float *bias_values;   /* [n_bias] */
    int32_t n_stop_ids;
    const int32_t *stop_ids; /* [n_stop_ids] */
};
void sampling_params_default(struct sampling_params *p); /* greedy off: temperature 1, nothing cut */

struct plan_open {
    uint32_t slot, n_prompt, n_computed, n_tokens_max;
    uint32_t n_tokens, n_blocks;
    const int32_t *tokens; /* [n_tokens] known: prompt, then what was already emitted */
    const int32_t *blocks; /* [n_blocks] block table so far */
    struct sampling_params sampling;
};

struct plan_fork {
    uint32_t from, to, n_tokens, n_computed;
    uint32_t n_append, n_blocks;
    const int32_t *append; /* [n_append] known tokens after the n_tokens taken from `from` */
    const int32_t *blocks; /* [n_blocks] whole block table of the new one */
};

enum { PLAN_RUN_STAY = 1, PLAN_RUN_SAMPLE = 2 };
/* The slot computes its next n_tokens tokens: known ones, then the drafts (which come after its last
 * known token). With SAMPLE the token after the last is sampled. With drafts, each is kept while it
 * equals the sample at its place, so a run gives 1 to n_drafts + 1 tokens.
 *
 * A worker with a draft model guesses by itself: n_ahead > 0 asks it to have so many drafts of its
 * own after this run, n_own > 0 to verify up to so many of those it has, beyond n_tokens. Both are
 * wishes: a run without them, or with fewer, gives the same tokens in more steps. */
struct plan_run {
    uint32_t slot, n_tokens, flags, n_drafts;
    const int32_t *drafts; /* [n_drafts] */
    uint32_t n_own, n_ahead; /* n_own only without n_drafts */
};
struct plan_pair { /* blocks moved, or a slot and its new block */
    uint32_t from, to;
};

struct step_plan {
    uint64_t epoch, step;
    uint32_t n_closes, n_saves, n_loads, n_copies, n_opens, n_forks, n_extends, n_pauses, n_runs;
    uint32_t *closes;           /* slots */
    struct plan_pair *saves;    /* device block -> host block */
    struct plan_pair *loads;    /* host block -> device block */
    struct plan_pair *copies;   /* device block -> device block */
    struct plan_open *opens;
    struct plan_fork *forks;
    struct plan_pair *extends;  /* slot, block appended to its table */
    uint32_t *pauses;           /* slots that leave the decode set */
    struct plan_run *runs;
    bool idle;                  /* the decode set rests in this step */
    uint32_t n_fetches, n_spills;
    struct plan_pair *fetches;  /* started: disk block -> host block */
    struct plan_pair *spills;   /* started: host block -> disk block */
};

enum { STEP_TOKEN_SCORED = 1 }; /* the logprob of a prompt token, not a new token */
struct step_token {
    uint32_t slot;
    int32_t token;
    uint32_t flags;
    bool has_logprob;
    float logprob;
    uint32_t n_top;
    const int32_t *top_tokens;  /* [n_top] */
    const float *top_logprobs;  /* [n_top] */
};
struct step_result {
    uint64_t epoch, step;
    uint32_t n_tokens;
    struct step_token *tokens; /* [n_tokens], grouped by slot in the order they follow each other */
    uint32_t compute_us, wait_us, collective_us;
    uint32_t n_drafted;
    struct plan_pair *drafted; /* [n_drafted] slot of a run with n_own, how many it verified */
    /* The draft model's last round, if it was since the result before: time, forward passes,
     * tokens; and the time of the first pass, which also catches up with known tokens. */
    uint32_t draft_us, draft_passes, draft_tokens, draft_first_us;
};

/* Transfers between host and disk that a rank has ended, in the order they were started. */
struct moved {
    uint64_t epoch, n_fetched, n_spilled; /* since the epoch began */
    uint32_t n_fetches_failed, n_spills_failed, fetch_ns;
    const uint64_t *fetches_failed, *spills_failed; /* numbers from 0, of the new ones */
};

/* Appends the bytes of a heddle.cluster.ToWorker with this plan. Allocates only in the buffer. */
enum err plan_encode(const struct step_plan *plan, struct buf *out);
/* Decodes a ToWorker's plan or a FromWorker's result; arrays go to the arena. ERR_FORMAT. */
enum err plan_decode(const void *bytes, size_t n, struct arena *arena, struct step_plan *out);
enum err step_result_encode(const struct step_result *result, bool ack_only, struct buf *out);
enum err step_result_decode(const void *bytes, size_t n, struct arena *arena, struct step_result *out);
/* The bytes of a FromWorker with a Moved. */
enum err moved_encode(const struct moved *moved, struct buf *out);
enum err moved_decode(const void *bytes, size_t n, struct arena *arena, struct moved *out);
