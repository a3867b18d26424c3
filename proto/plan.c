/* Plans and results out of protobuf bytes.
 *
 * protobuf-c unpacks into an arena, so that a step frees nothing; the checks here are those of
 * shape: arrays that belong together are equally long, counts add up, numbers fit their fields.
 * Never trusts a length, never knows whether a slot or a block exists. */
#include "proto/plan.h"

#include "proto/cluster.pb-c.h"

#include <string.h>

enum { FLAG_LOGPROB = 2 }; /* on the wire only: this entry has a logprob */

void sampling_params_default(struct sampling_params *p)
{
    *p = (struct sampling_params){.temperature = 1,
                                  .top_p = 1,
                                  .repetition_penalty = 1,
                                  .n_logprobs = -1,
                                  .n_prompt_logprobs = -1};
}

static void *arena_take(void *arena, size_t n)
{
    void *p = NULL;
    return arena_alloc(arena, n, &p) ? NULL : p;
}

static void arena_leave(void *arena, void *p)
{
    (void)arena, (void)p;
} /* dropped with the arena */

static enum err same_length(const char *what, size_t a, size_t b)
{
    if (a != b) FAIL(ERR_FORMAT, "plan: %s: arrays of %zu and %zu entries", what, a, b);
    if (a > UINT32_MAX) FAIL(ERR_FORMAT, "plan: %s: %zu entries", what, a);
    return OK;
}

static enum err take_pairs(struct arena *arena, const char *what, const size_t n[2],
                           uint32_t *const words[2], struct plan_pair **out)
{
    struct plan_pair *pairs;
    TRY(same_length(what, n[0], n[1]));
    TRY(arena_alloc_array(arena, n[0], sizeof *pairs, (void **)&pairs));
    for (size_t i = 0; i < n[0]; i++)
        pairs[i] = (struct plan_pair){words[0][i], words[1][i]};
    *out = pairs;
    return OK;
}

static enum err take_sampling(const Heddle__Cluster__Sampling *s, struct sampling_params *out)
{
    sampling_params_default(out);
    if (!s) return OK;
    TRY(same_length("bias", s->n_bias_tokens, s->n_bias_values));
    if (s->n_bias_tokens > INT32_MAX || s->n_stop_ids > INT32_MAX || s->min_tokens > INT32_MAX)
        FAIL(ERR_FORMAT, "plan: sampling of a slot has a count above 2^31");
    *out = (struct sampling_params){.temperature = s->temperature,
                                    .top_k = s->top_k,
                                    .top_p = s->top_p,
                                    .min_p = s->min_p,
                                    .repetition_penalty = s->repetition_penalty,
                                    .presence_penalty = s->presence_penalty,
                                    .frequency_penalty = s->frequency_penalty,
                                    .seed = s->seed,
                                    .n_logprobs = s->logprobs,
                                    .n_prompt_logprobs = s->prompt_logprobs,
                                    .min_tokens = (int32_t)s->min_tokens,
                                    .n_bias = (int32_t)s->n_bias_tokens,
                                    .bias_tokens = (const int32_t *)s->bias_tokens,
                                    .bias_values = s->bias_values,
                                    .n_stop_ids = (int32_t)s->n_stop_ids,
                                    .stop_ids = (const int32_t *)s->stop_ids};
    return OK;
}

static enum err take_opens(const Heddle__Cluster__StepPlan *w, struct arena *arena,
                           struct step_plan *out)
{
    TRY(same_length("opens", w->n_opens, w->n_opens));
    TRY(arena_alloc_array(arena, w->n_opens, sizeof *out->opens, (void **)&out->opens));
    for (size_t i = 0; i < w->n_opens; i++) {
        const Heddle__Cluster__Open *from = w->opens[i];
        struct plan_open *to = &out->opens[i];
        TRY(same_length("tokens", from->n_tokens, from->n_tokens));
        TRY(same_length("blocks", from->n_blocks, from->n_blocks));
        *to = (struct plan_open){.slot = from->slot,
                                 .n_prompt = from->prompt,
                                 .n_computed = from->computed,
                                 .n_tokens_max = from->tokens_max,
                                 .n_tokens = (uint32_t)from->n_tokens,
                                 .n_blocks = (uint32_t)from->n_blocks,
                                 .tokens = (const int32_t *)from->tokens,
                                 .blocks = (const int32_t *)from->blocks};
        TRY(take_sampling(from->sampling, &to->sampling));
    }
    out->n_opens = (uint32_t)w->n_opens;
    return OK;
}

static enum err take_forks(const Heddle__Cluster__StepPlan *w, struct arena *arena,
                           struct step_plan *out)
{
    TRY(same_length("forks", w->n_forks, w->n_forks));
    TRY(arena_alloc_array(arena, w->n_forks, sizeof *out->forks, (void **)&out->forks));
    for (size_t i = 0; i < w->n_forks; i++) {
        const Heddle__Cluster__Fork *from = w->forks[i];
        TRY(same_length("append", from->n_append, from->n_append));
        TRY(same_length("blocks", from->n_blocks, from->n_blocks));
        out->forks[i] = (struct plan_fork){.from = from->from,
                                           .to = from->to,
                                           .n_tokens = from->tokens,
                                           .n_computed = from->computed,
                                           .n_append = (uint32_t)from->n_append,
                                           .n_blocks = (uint32_t)from->n_blocks,
                                           .append = (const int32_t *)from->append,
                                           .blocks = (const int32_t *)from->blocks};
    }
    out->n_forks = (uint32_t)w->n_forks;
    return OK;
}

static enum err take_runs(const Heddle__Cluster__StepPlan *w, struct arena *arena,
                          struct step_plan *out)
{
    size_t n = w->n_run_slots, used = 0;
    TRY(same_length("run_tokens", n, w->n_run_tokens));
    TRY(same_length("run_flags", n, w->n_run_flags));
    if (w->n_run_drafts) TRY(same_length("run_drafts", n, w->n_run_drafts));
    if (w->n_run_own) TRY(same_length("run_own", n, w->n_run_own));
    if (w->n_run_ahead) TRY(same_length("run_ahead", n, w->n_run_ahead));
    TRY(arena_alloc_array(arena, n, sizeof *out->runs, (void **)&out->runs));
    for (size_t i = 0; i < n; i++) {
        uint32_t n_drafts = w->n_run_drafts ? w->run_drafts[i] : 0;
        if (n_drafts > w->n_drafts - used)
            FAIL(ERR_FORMAT, "plan: run %zu names %u drafts, %zu are left", i, n_drafts,
                 w->n_drafts - used);
        out->runs[i] =
            (struct plan_run){.slot = w->run_slots[i],
                              .n_tokens = w->run_tokens[i],
                              .flags = w->run_flags[i],
                              .n_drafts = n_drafts,
                              .drafts = n_drafts ? (const int32_t *)w->drafts + used : NULL,
                              .n_own = w->n_run_own ? w->run_own[i] : 0,
                              .n_ahead = w->n_run_ahead ? w->run_ahead[i] : 0};
        used += n_drafts;
    }
    if (used != w->n_drafts)
        FAIL(ERR_FORMAT, "plan: %zu drafts belong to no run", w->n_drafts - used);
    out->n_runs = (uint32_t)n;
    return OK;
}

static enum err take_all_pairs(const Heddle__Cluster__StepPlan *w, struct arena *arena,
                               struct step_plan *out)
{
    TRY(take_pairs(arena, "saves", (size_t[]){w->n_save_blocks, w->n_save_host},
                   (uint32_t *[]){w->save_blocks, w->save_host}, &out->saves));
    TRY(take_pairs(arena, "loads", (size_t[]){w->n_load_host, w->n_load_blocks},
                   (uint32_t *[]){w->load_host, w->load_blocks}, &out->loads));
    TRY(take_pairs(arena, "copies", (size_t[]){w->n_copy_from, w->n_copy_to},
                   (uint32_t *[]){w->copy_from, w->copy_to}, &out->copies));
    TRY(take_pairs(arena, "extends", (size_t[]){w->n_extend_slots, w->n_extend_blocks},
                   (uint32_t *[]){w->extend_slots, w->extend_blocks}, &out->extends));
    TRY(take_pairs(arena, "fetches", (size_t[]){w->n_fetch_disk, w->n_fetch_host},
                   (uint32_t *[]){w->fetch_disk, w->fetch_host}, &out->fetches));
    TRY(take_pairs(arena, "spills", (size_t[]){w->n_spill_host, w->n_spill_disk},
                   (uint32_t *[]){w->spill_host, w->spill_disk}, &out->spills));
    if (w->n_fetch_disk > PLAN_TRANSFERS_MAX || w->n_spill_host > PLAN_TRANSFERS_MAX)
        FAIL(ERR_FORMAT, "plan: starts %zu fetches and %zu spills, at most %d", w->n_fetch_disk,
             w->n_spill_host, PLAN_TRANSFERS_MAX);
    out->n_fetches = (uint32_t)w->n_fetch_disk, out->n_spills = (uint32_t)w->n_spill_host;
    out->n_saves = (uint32_t)w->n_save_blocks, out->n_loads = (uint32_t)w->n_load_host;
    out->n_copies = (uint32_t)w->n_copy_from, out->n_extends = (uint32_t)w->n_extend_slots;
    return OK;
}

enum err plan_decode(const void *bytes, size_t n, struct arena *arena, struct step_plan *out)
{
    ProtobufCAllocator allocator = {arena_take, arena_leave, arena};
    const Heddle__Cluster__ToWorker *message =
        heddle__cluster__to_worker__unpack(&allocator, n, bytes);
    if (!message) FAIL(ERR_FORMAT, "plan: %zu bytes are not a message to a worker", n);
    if (message->kind_case != HEDDLE__CLUSTER__TO_WORKER__KIND_PLAN || !message->plan)
        FAIL(ERR_FORMAT, "message of kind %d where a plan was expected", (int)message->kind_case);
    const Heddle__Cluster__StepPlan *w = message->plan;
    struct step_plan plan = {.epoch = w->epoch,
                             .step = w->step,
                             .closes = w->closes,
                             .pauses = w->pauses,
                             .idle = w->idle};
    TRY(same_length("closes", w->n_closes, w->n_closes));
    TRY(same_length("pauses", w->n_pauses, w->n_pauses));
    plan.n_closes = (uint32_t)w->n_closes, plan.n_pauses = (uint32_t)w->n_pauses;
    TRY(take_all_pairs(w, arena, &plan));
    TRY(take_opens(w, arena, &plan));
    TRY(take_forks(w, arena, &plan));
    TRY(take_runs(w, arena, &plan));
    *out = plan;
    return OK;
}

/* Gives entry i its logprob and alternatives; the counters say how far the arrays are used. */
static enum err take_logprob(const Heddle__Cluster__StepResult *w, struct step_token *t,
                             size_t *n_used, size_t *n_top_used)
{
    size_t at = (*n_used)++;
    if (at >= w->n_logprobs) FAIL(ERR_FORMAT, "result: more entries ask for a logprob than came");
    t->has_logprob = true;
    t->logprob = w->logprobs[at];
    t->n_top = w->n_top_counts ? w->top_counts[at] : 0;
    if (t->n_top > w->n_top_tokens - *n_top_used)
        FAIL(ERR_FORMAT, "result: %u alternatives where %zu are left", t->n_top,
             w->n_top_tokens - *n_top_used);
    if (t->n_top) {
        t->top_tokens = (const int32_t *)w->top_tokens + *n_top_used;
        t->top_logprobs = w->top_logprobs + *n_top_used;
    }
    *n_top_used += t->n_top;
    return OK;
}

static enum err check_result(const Heddle__Cluster__StepResult *w)
{
    TRY(same_length("result tokens", w->n_slots, w->n_tokens));
    if (w->n_flags) TRY(same_length("result flags", w->n_slots, w->n_flags));
    if (w->n_top_counts) TRY(same_length("top counts", w->n_logprobs, w->n_top_counts));
    TRY(same_length("top logprobs", w->n_top_tokens, w->n_top_logprobs));
    if (w->n_logprobs > w->n_slots)
        FAIL(ERR_FORMAT, "result: %zu logprobs for %zu tokens", w->n_logprobs, w->n_slots);
    return OK;
}

enum err step_result_decode(const void *bytes, size_t n, struct arena *arena,
                            struct step_result *out)
{
    ProtobufCAllocator allocator = {arena_take, arena_leave, arena};
    const Heddle__Cluster__FromWorker *m =
        heddle__cluster__from_worker__unpack(&allocator, n, bytes);
    if (!m) FAIL(ERR_FORMAT, "result: %zu bytes are not a message of a worker", n);
    const Heddle__Cluster__StepResult *w =
        m->kind_case == HEDDLE__CLUSTER__FROM_WORKER__KIND_RESULT ? m->result
        : m->kind_case == HEDDLE__CLUSTER__FROM_WORKER__KIND_ACK  ? m->ack
                                                                  : NULL;
    if (!w) FAIL(ERR_FORMAT, "message of kind %d where a result was expected", (int)m->kind_case);
    TRY(check_result(w));
    struct step_token *tokens;
    size_t n_used = 0, n_top_used = 0;
    TRY(arena_alloc_array(arena, w->n_slots, sizeof *tokens, (void **)&tokens));
    for (size_t i = 0; i < w->n_slots; i++) {
        uint32_t flags = w->n_flags ? w->flags[i] : 0;
        if (flags & ~(uint32_t)(STEP_TOKEN_SCORED | FLAG_LOGPROB))
            FAIL(ERR_FORMAT, "result: entry %zu has unknown flags %u", i, flags);
        tokens[i] = (struct step_token){.slot = w->slots[i],
                                        .token = (int32_t)w->tokens[i],
                                        .flags = flags & STEP_TOKEN_SCORED};
        if (flags & FLAG_LOGPROB) TRY(take_logprob(w, &tokens[i], &n_used, &n_top_used));
    }
    if (n_used != w->n_logprobs || n_top_used != w->n_top_tokens)
        FAIL(ERR_FORMAT, "result: logprobs that belong to no token");
    struct plan_pair *drafted;
    TRY(take_pairs(arena, "drafted", (size_t[]){w->n_drafted_slots, w->n_drafted},
                   (uint32_t *[]){w->drafted_slots, w->drafted}, &drafted));
    *out = (struct step_result){.epoch = w->epoch,
                                .step = w->step,
                                .n_drafted = (uint32_t)w->n_drafted,
                                .drafted = drafted,
                                .draft_us = w->draft_us,
                                .draft_passes = w->draft_passes,
                                .draft_tokens = w->draft_tokens,
                                .draft_first_us = w->draft_first_us,
                                .n_tokens = (uint32_t)w->n_slots,
                                .tokens = tokens,
                                .compute_us = w->compute_us,
                                .wait_us = w->wait_us,
                                .collective_us = w->collective_us};
    return OK;
}

enum err moved_decode(const void *bytes, size_t n, struct arena *arena, struct moved *out)
{
    ProtobufCAllocator allocator = {arena_take, arena_leave, arena};
    const Heddle__Cluster__FromWorker *m =
        heddle__cluster__from_worker__unpack(&allocator, n, bytes);
    if (!m || m->kind_case != HEDDLE__CLUSTER__FROM_WORKER__KIND_MOVED || !m->moved)
        FAIL(ERR_FORMAT, "%zu bytes are not a message of ended transfers", n);
    const Heddle__Cluster__Moved *w = m->moved;
    if (w->n_fetches_failed > PLAN_TRANSFERS_MAX || w->n_spills_failed > PLAN_TRANSFERS_MAX)
        FAIL(ERR_FORMAT, "moved: %zu and %zu failures, at most %d", w->n_fetches_failed,
             w->n_spills_failed, PLAN_TRANSFERS_MAX);
    *out = (struct moved){.epoch = w->epoch,
                          .n_fetched = w->fetched,
                          .n_spilled = w->spilled,
                          .n_fetches_failed = (uint32_t)w->n_fetches_failed,
                          .n_spills_failed = (uint32_t)w->n_spills_failed,
                          .fetch_ns = w->fetch_ns,
                          .fetches_failed = w->fetches_failed,
                          .spills_failed = w->spills_failed};
    return OK;
}
