/* A sequence: one choice's tokens, what of them is computed, and where it lives; and the job that
 * the choices of one request share.
 *
 * There are no phases: a sequence has known tokens and planned ones (those whose KV the plans sent
 * so far compute). Whoever has fewer planned than known gets some more in a step.
 *
 * Never knows a clock, a wire or a plan's bytes. */
#pragma once
#include "coordinator/engine/engine.h"
#include "coordinator/engine/kv_blocks.h"
#include "coordinator/engine/pool.h"
#include <string.h>

enum sequence_state {
    SEQUENCE_PARKED,   /* waits for its sibling's prompt */
    SEQUENCE_WAITING,  /* stands in a lane */
    SEQUENCE_FETCHING, /* waits for blocks from the disk of `group` */
    SEQUENCE_RUNNING,  /* has a slot */
    SEQUENCE_DRAINING, /* its slot is closed, tokens of plans in flight may still come */
    SEQUENCE_DONE
};

enum draft_kind { DRAFT_NGRAM, DRAFT_MODEL, DRAFT_KINDS };
enum sequence_link { LINK_PLACE, LINK_WORK, LINK_AGE, LINK_COUNT };
struct sequence;
struct sequence_list {
    struct sequence *first, *last;
    uint32_t n;
};

struct lane;
struct beam;
struct draft;
enum { JOB_STOPS_NEAR = 4 };
struct job { /* the first line of cache is what each token's news needs */
    _Alignas(64) struct sink *sink;
    uint64_t request_id;
    int64_t queued_us, prefill_us;
    int32_t stop_ids[JOB_STOPS_NEAR]; /* the first of them; the rest in the request */
    int32_t n_stop_ids;
    uint32_t n_min_tokens;
    bool admitted, started, buffered, done, no_match, private_blocks;

    struct request *request;
    struct beam *beam;            /* beam search, or NULL; such a job is buffered */
    uint32_t n_sequences, n_left; /* n_left: not finished yet */
    uint32_t n_to_emit;           /* best_of and beams: choices to give at the end */
    uint32_t deadline_index;      /* position + 1 in the engine's list of deadlines */
    struct sequence **sequences;  /* [n_sequences] NULL once forgotten */
    struct sequence *only;        /* the array, when there is one */
    struct job *next_done;        /* of those to destroy after the flush; of the free ones */
};

/* Whether and what to draft for a sequence next: draft.c. */
struct drafting {
    uint8_t rest;    /* tokens to decode before asking again whether drafts pay */
    uint8_t kind;    /* of those sent and not answered */
    uint8_t n_waits; /* rounds that the draft model may still need to catch up */
    uint8_t n_ahead; /* own drafts that its last run asked the group to prepare */
    bool try_again;  /* drafts next, though they do not pay: perhaps they will */
    uint8_t n_tries[DRAFT_KINDS];
    uint16_t accept[DRAFT_KINDS]; /* chance that a draft is kept, of 65535 */
    uint32_t n_seen;              /* tokens that the draft model need not be shown any more */
};

/* What is kept of a choice's logprobs until it is given; per token where the choice is buffered. */
struct logprobs {
    double sum;
    struct strip chosen; /* float */
    struct strip top_tokens, top_scores, top_counts;
};

enum { TAIL_TOKENS = 32 };
/* The first lines of cache are all that a token's news needs, and they lie close together:
 * that is why the last tokens stand in `tail` until there is a line full of them. */
struct sequence {
    _Alignas(64) struct job *job;
    uint64_t join_step;  /* first step as a member of the decode set */
    struct strip tokens; /* int32_t, known; the last 1 to TAIL_TOKENS may stand in tail alone */
    uint32_t n_planned;  /* tokens whose KV is computed by plans up to the last (see decoding) */
    uint32_t n_end;      /* it never knows more tokens than that */
    uint32_t slot, n_full_next; /* n_full_next: computed tokens that fill its next block */
    uint8_t state;
    bool decoding;    /* in the decode set: planned grows by one a step from join_step on */
    bool may_preempt; /* it got a token since it last got its slot */
    bool resumed;     /* its tokens were lost with a group or a preemption */
    bool synced;      /* runs only when all its results are in: drafts, beams */
    bool has_host;    /* its KV lies in host blocks of `group` */
    bool counted;     /* in the queue's counts */
    bool run_scores;  /* each token of its run needs a row of logits */

    struct strip blocks; /* uint32_t, the table */
    struct lane *lane;
    uint32_t n_prompt, n_cached;
    uint32_t n_drafting; /* drafts sent and not answered */
    int32_t choice;
    uint32_t n_score_next; /* prompt logprobs: the next to come from the slot */
    uint32_t n_scored;     /* of them given to the client */
    bool elder;            /* it was admitted because it had waited too long */

    _Alignas(64) int32_t tail[TAIL_TOKENS]; /* token i at i % TAIL_TOKENS */
    struct strip keys;                      /* struct hash128 of its first full blocks */
    struct hash128 last_key;                /* of block n_chained - 1, when that is not 0 */
    uint32_t key_block_size, n_chained, n_registered, n_window_freed;
    struct drafting drafting;
    uint32_t group;
    struct sequence_list *lists[LINK_COUNT]; /* the list it stands in, or NULL */
    struct {
        struct sequence *previous, *next;
    } links[LINK_COUNT];
    struct sequence *parent; /* of a beam that waits for its fork */
    uint64_t order;          /* of arrival; older ones are smaller */
    int64_t waiting_since_us;
    struct strip host;              /* uint32_t, host blocks */
    uint64_t first_step, last_step; /* first and last that it samples in, in this slot */
    uint32_t placed, n_placed; /* group + 1 that it waits for, and what it has to compute there */
    uint32_t n_host_computed;  /* tokens whose KV lies in host blocks */
    uint64_t run_step;         /* the plan whose run run_index is its own */
    uint32_t run_index;
    uint64_t fetch_number;  /* waits until so many fetches are done */
    int64_t fetch_until_us; /* or until then */
    struct logprobs logprobs;
    enum finish finish;
    int32_t stop_token;
    enum err error;
    const char *error_text; /* static */
    bool given;             /* among the choices emitted at the end */
    bool has_fetched;       /* waited for the disk once; it does not again */
};
_Static_assert(
    sizeof(struct sequence) / 64 % 2,
    "an odd number of lines, so that they spread over the cache: pad it by one, or take one away");

/* Tokens that may stand in its tail alone: the last ones, up to a whole line of them. */
static inline uint32_t sequence_tail(const struct sequence *s)
{
    return s->tokens.n ? (s->tokens.n - 1) % TAIL_TOKENS + 1 : 0;
}
/* All its known tokens in one array. */
static inline const int32_t *sequence_tokens(struct sequence *s)
{
    uint32_t n_tail = sequence_tail(s);
    int32_t *tokens = s->tokens.items;
    if (n_tail) memcpy(tokens + s->tokens.n - n_tail, s->tail, n_tail * sizeof *tokens);
    return tokens;
}
static inline uint32_t *sequence_blocks(const struct sequence *s)
{
    return s->blocks.items;
}
static inline uint32_t sequence_generated(const struct sequence *s)
{
    return s->tokens.n - s->n_prompt;
}
/* Tokens whose KV plans before `step` compute. */
static inline uint32_t sequence_planned(const struct sequence *s, uint64_t step)
{
    return s->decoding && step > s->join_step ? s->n_planned + (uint32_t)(step - s->join_step)
                                              : s->n_planned;
}

void sequence_list_append(struct sequence_list *l, enum sequence_link k, struct sequence *s);
void sequence_list_prepend(struct sequence_list *l, enum sequence_link k, struct sequence *s);
void sequence_list_before(struct sequence_list *l, enum sequence_link k, struct sequence *at,
                          struct sequence *s);
void sequence_unlink(struct sequence *s, enum sequence_link k); /* none is fine */

/* Its tokens become these, with room for n_room more. */
enum err sequence_set_tokens(struct pool *p, struct sequence *s, const int32_t *tokens, uint32_t n,
                             uint32_t n_room);
static inline enum err sequence_append(struct pool *p, struct sequence *s, int32_t token)
{
    uint32_t n = s->tokens.n;
    if (n == s->tokens.capacity) TRY(strip_reserve(p, &s->tokens, (size_t)n + 1, sizeof token));
    if (n && n % TAIL_TOKENS == 0) /* a full line, written long ago: it can be read at once */
        memcpy((int32_t *)s->tokens.items + n - TAIL_TOKENS, s->tail, sizeof s->tail);
    s->tail[n % TAIL_TOKENS] = token;
    s->tokens.n = n + 1;
    return OK;
}
/* Keys of its first n full blocks, all tokens known. */
enum err sequence_hash(struct pool *p, struct sequence *s, uint32_t block_size, uint64_t salt,
                       uint32_t n);
/* The key of its i-th full block. Once the known ones were hashed, the next costs no memory. */
enum err sequence_key(struct pool *p, struct sequence *s, uint32_t block_size, uint64_t salt,
                      uint32_t i, struct hash128 *out);
/* Its tokens are others now: keys are forgotten. */
static inline void sequence_drop_keys(struct sequence *s)
{
    s->keys.n = s->n_chained = 0;
}
/* Whether one of its many stop ids, beyond those near, is this token. */
bool sequence_stops_far(const struct sequence *s, int32_t token);
static inline bool sequence_stops_at(const struct sequence *s, int32_t token)
{
    const struct job *job = s->job;
    if (job->n_min_tokens && s->tokens.n - s->n_prompt <= job->n_min_tokens) return false;
    for (int32_t i = 0; i < job->n_stop_ids && i < JOB_STOPS_NEAR; i++)
        if (job->stop_ids[i] == token) return true;
    return job->n_stop_ids > JOB_STOPS_NEAR && sequence_stops_far(s, token);
}
void sequence_fini(struct pool *p, struct sequence *s);
