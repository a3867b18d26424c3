/* Checks of a request against the limits. */
#include "coordinator/engine/limits.h"

enum { CHOICES_MAX = 1024, BEAMS_MAX = BEAM_CANDIDATES_MAX / 2, STOP_IDS_MAX = 4096 };

uint32_t request_sequences(const struct request *r)
{
    if (r->beam_width) return r->beam_width;
    return r->n_best_of > r->n_choices ? r->n_best_of : r->n_choices;
}

static enum err check_shape(const struct request *r)
{
    uint32_t n = r->n_best_of > r->n_choices ? r->n_best_of : r->n_choices;
    if (!r->id || !r->sink || !r->sink->emit) FAIL(ERR_INVALID, "a request needs an id and a sink");
    if (!r->n_tokens) FAIL(ERR_INVALID, "the prompt is empty");
    if (!r->n_choices || n > CHOICES_MAX)
        FAIL(ERR_INVALID, "%u choices; at most %d", n, (int)CHOICES_MAX);
    if (r->beam_width > BEAMS_MAX)
        FAIL(ERR_INVALID, "%u beams; at most %d", r->beam_width, (int)BEAMS_MAX);
    if (r->beam_width && r->n_choices > r->beam_width)
        FAIL(ERR_INVALID, "%u choices of %u beams", r->n_choices, r->beam_width);
    if (r->beam_width && r->sampling.n_prompt_logprobs >= 0)
        FAIL(ERR_INVALID, "beam search gives no prompt logprobs");
    if (!r->max_tokens && (r->sampling.n_prompt_logprobs < 0 || n > 1 || r->beam_width))
        FAIL(ERR_INVALID, "max_tokens must be at least 1");
    if (r->sampling.n_stop_ids < 0 || r->sampling.n_stop_ids > STOP_IDS_MAX)
        FAIL(ERR_INVALID, "%d stop ids; at most %d", r->sampling.n_stop_ids, (int)STOP_IDS_MAX);
    return OK;
}

uint64_t limits_beam_blocks(const struct request *r, uint32_t block_size, bool prefix_cache)
{
    /* All beams live at once; twice while they are exchanged. Found again, the prompt is shared. */
    uint64_t n_prompt = r->n_tokens / block_size + 1,
             n_output = (uint64_t)r->max_tokens / block_size + 3;
    bool shared = prefix_cache && !r->no_prefix_cache;
    return 2 * n_output * r->beam_width + n_prompt * (shared ? 2 : 2 * r->beam_width);
}

static enum err check_length(const struct engine_limits *l, const struct request *r)
{
    uint64_t n = (uint64_t)r->n_tokens + (r->max_tokens ? 1 : 0);
    if (!l->tokens_capacity) FAIL(ERR_NOT_READY, "no group of workers has come up yet");
    if (n > l->tokens_capacity)
        FAIL(ERR_TOO_LONG,
             "the prompt has %u tokens; at most %u fit (context %u, %u KV blocks of %u)",
             r->n_tokens, l->tokens_capacity - (r->max_tokens ? 1 : 0), l->context_max,
             l->n_blocks_max, l->block_size);
    if (!r->beam_width) return OK;
    uint64_t n_blocks = limits_beam_blocks(r, l->block_size, l->prefix_cache);
    if (n_blocks > l->n_blocks_max || 2 * r->beam_width > l->n_slots_max)
        FAIL(ERR_TOO_LONG,
             "%u beams of %u tokens need %llu KV blocks and %u slots; there are %u and %u",
             r->beam_width, r->max_tokens, (unsigned long long)n_blocks, 2 * r->beam_width,
             l->n_blocks_max, l->n_slots_max);
    return OK;
}

uint32_t limits_retry_after_s(const struct engine_limits *l, uint32_t n, uint64_t n_tokens)
{
    uint64_t n_leave = 0, n_all = (uint64_t)l->n_queued + n;
    if (l->n_queued_limit && n_all > l->n_queued_limit) n_leave = n_all - l->n_queued_limit;
    if (l->n_queued_tokens_limit && l->n_queued_tokens + n_tokens > l->n_queued_tokens_limit) {
        uint64_t n_over = l->n_queued_tokens + n_tokens - l->n_queued_tokens_limit;
        uint64_t n_mean = l->n_queued_tokens / (l->n_queued ? l->n_queued : 1) + 1;
        if (n_over / n_mean + 1 > n_leave) n_leave = n_over / n_mean + 1;
    }
    if (!n_leave) return 0;
    if (n_leave > l->n_queued) n_leave = l->n_queued;
    uint64_t s = n_leave * (l->leave_ns / 1000) / 1000000 + 1;
    return s < RETRY_AFTER_MAX_S ? (uint32_t)s : RETRY_AFTER_MAX_S;
}

static enum err check_room(const struct engine_limits *l, const struct request *r, int64_t now_us)
{
    uint64_t n = request_sequences(r), n_tokens = n * r->n_tokens;
    if ((l->n_queued_limit && l->n_queued + n > l->n_queued_limit) ||
        (l->n_queued_tokens_limit && l->n_queued_tokens + n_tokens > l->n_queued_tokens_limit))
        FAIL(ERR_FULL,
             "the queue holds %u sequences (limit %u) and %llu tokens (limit %llu); there will be "
             "room in about %u s",
             l->n_queued, l->n_queued_limit, (unsigned long long)l->n_queued_tokens,
             (unsigned long long)l->n_queued_tokens_limit,
             limits_retry_after_s(l, (uint32_t)n, n_tokens));
    int64_t wait_us = (int64_t)(l->n_queued_tokens * l->token_ns / 1000);
    if (r->deadline_us && now_us + wait_us >= r->deadline_us)
        FAIL(ERR_DEADLINE, "the deadline is %lld us away and the queue takes about %lld us",
             (long long)(r->deadline_us - now_us), (long long)wait_us);
    return OK;
}

enum err limits_check(const struct engine_limits *l, const struct request *r, int64_t now_us)
{
    TRY(check_shape(r));
    TRY(check_length(l, r));
    return check_room(l, r, now_us);
}
