/* What a request is checked against before it is accepted, as a value that can be copied: the
 * engine's thread owns it, the inbox keeps a snapshot so that a front thread gets its answer at
 * once.
 *
 * Never knows a group or a sequence. */
#pragma once
#include "coordinator/engine/engine.h"

/* A group gives at most so many alternatives of a sample; a beam search needs two a beam. */
enum { BEAM_CANDIDATES_MAX = 32 };

struct engine_limits {
    uint32_t tokens_capacity; /* most tokens of one sequence; 0 = no group came up yet */
    uint32_t context_max, n_blocks_max, block_size, n_slots_max, vocab_size;
    uint32_t n_queued, n_queued_limit; /* sequences accepted and not yet running */
    uint64_t n_queued_tokens, n_queued_tokens_limit;
    bool prefix_cache;
    uint64_t token_ns; /* a queued token's cost over all groups, 0 = unknown */
    uint64_t leave_ns; /* between two sequences that leave the queue while it is not empty, 0 =
                          unknown */
};

enum { RETRY_AFTER_MAX_S = 600 };
/* When there will be room for n sequences of n_tokens in all, by the speed at which the queue was
 * left so far: 1 .. RETRY_AFTER_MAX_S; 0 when there is room now. */
uint32_t limits_retry_after_s(const struct engine_limits *l, uint32_t n, uint64_t n_tokens);

/* Sequences that the request runs: n, best_of or beams. */
uint32_t request_sequences(const struct request *r);
/* KV blocks that a beam search may need at once. */
uint64_t limits_beam_blocks(const struct request *r, uint32_t block_size, bool prefix_cache);
/* Alternatives that each beam asks for. */
uint32_t beam_candidates(const struct request *r);
/* ERR_INVALID, ERR_NOT_READY, ERR_TOO_LONG, ERR_FULL, ERR_DEADLINE. */
enum err limits_check(const struct engine_limits *l, const struct request *r, int64_t now_us);
