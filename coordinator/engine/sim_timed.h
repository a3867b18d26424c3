/* The simulator with a cost model instead of a token model: what latency and fairness come of the
 * scheduler's choices, in simulated time.
 *
 * A step takes base + tokens x token + rows x row microseconds; a group works one plan after the
 * other; the real engine schedules, with its pipeline. */
#pragma once
#include "base/err.h"
#include "coordinator/engine/sim_router.h"
#include <stddef.h>
#include <stdint.h>

struct cost_model {
    double base_us, token_us, row_us; /* a step; each token computed; each row sampled */
    int64_t wire_us;                  /* one way */
};

struct timed_request {
    int64_t arrival_us;
    uint32_t n_prompt, n_output;
    uint64_t tenant;
    const int32_t *tokens; /* [n_prompt] or NULL: content of its own */
    /* results */
    int64_t first_us, last_us; /* of its tokens, -1 = none */
    int64_t gap_max_us;
    uint32_t n_tokens, n_cached;
    bool refused;
};

struct timed_run {
    struct cost_model cost;
    uint32_t n_groups, n_blocks, block_size, n_slots, n_step_tokens, context_max;
    bool prefix_cache;
    enum router_kind router; /* ROUTER_EXACT: one engine; else an engine a group behind a router */
    struct timed_request *requests; /* [n], by arrival */
    uint32_t n;
    /* fills in the tokens of one that has none: called when it arrives; [n_prompt] */
    void (*fill)(void *ctx, uint32_t index, int32_t *tokens);
    void *ctx;
    /* results */
    int64_t *gaps_us; /* [n_gaps] of all streams, caller frees with mem_free */
    int64_t *gap_at_us;
    uint32_t n_gaps, gaps_capacity;
    uint64_t n_steps, n_preemptions, n_hit_tokens, n_prompt_tokens, step_tokens, step_budget;
    int64_t end_us;
};
/* Runs until every request ended. */
enum err timed_run(struct timed_run *t);

/* p in [0, 1]; sorts. 0 of nothing. */
int64_t percentile_us(int64_t *values, uint32_t n, double p);

/* Blocks of a Mooncake trace, and how many of them a cache without bound finds. */
enum err trace_unbounded(const char *path, uint64_t *out_blocks, uint64_t *out_hits);
/* Whether the text is a trace: ERR_FORMAT names the line. */
enum err trace_check(const char *text, size_t n);
/* `heddle sim --trace FILE`: see sim_trace.c. */
int trace_main(int argc, char **argv);
