/* An engine and one or more false groups, driven by hand: plans are computed when the test says so.
 */
#pragma once
#include "base/mem.h"
#include "coordinator/engine/engine.h"
#include "coordinator/engine/sim_worker.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
// clang-format off
#include <cmocka.h>
// clang-format on

enum { RIG_GROUPS = 3, RIG_PLANS = 16, RIG_TOKENS = 4096 };

struct rig_request {
    struct sink sink;
    struct request request;
    int32_t stop_ids[4];
    int32_t tokens[RIG_TOKENS]; /* of choice 0 */
    struct step_token scored[RIG_TOKENS];
    uint32_t n_tokens, n_scored, n_ended, n_choice_tokens[8];
    enum finish finish;
    enum err error;
    uint32_t n_cached;
    int32_t stop_token;
    bool last, destroyed;
};

struct rig {
    struct engine *engine;
    struct sim_worker workers[RIG_GROUPS];
    struct group_info info[RIG_GROUPS];
    struct buf plans[RIG_GROUPS][RIG_PLANS];
    uint32_t n_plans[RIG_GROUPS], n_done[RIG_GROUPS]; /* ever; the plans are a ring */
    struct step_plan seen;                            /* the last plan computed */
    struct arena arena;
    uint32_t compute_us; /* that every step is said to take */
    uint32_t n_failed; /* groups reported as failed */
    int64_t now_us;
    uint64_t n_sent;
};

static inline enum err rig_send(void *ctx, uint32_t group, const void *bytes, size_t n)
{
    struct rig *rig = ctx;
    rig->n_sent++;
    assert_true(rig->n_plans[group] - rig->n_done[group] < RIG_PLANS);
    struct buf *b = &rig->plans[group][rig->n_plans[group]++ % RIG_PLANS];
    buf_clear(b);
    return buf_add(b, bytes, n);
}

static inline void rig_failed(void *ctx, uint32_t group, uint64_t epoch, const char *why)
{
    (void)group, (void)epoch, (void)why;
    ((struct rig *)ctx)->n_failed++;
}

static inline struct group_info rig_info(uint32_t n_blocks, uint32_t n_slots)
{
    return (struct group_info){.epoch = 1,
                               .n_ranks = 1,
                               .block_size = 4,
                               .n_blocks = n_blocks,
                               .n_slots_max = n_slots,
                               .step_tokens_max = 64,
                               .step_rows_max = 64,
                               .context_max = 512,
                               .vocab_size = SIM_VOCABULARY,
                               .block_bytes = 1024};
}

static inline void rig_up(struct rig *rig, uint32_t group, struct group_info info)
{
    rig->info[group] = info;
    rig->n_plans[group] = rig->n_done[group] = 0;
    sim_worker_fini(&rig->workers[group]);
    assert_int_equal(sim_worker_init(&rig->workers[group], info.n_slots_max, info.n_blocks,
                                     info.n_host_blocks, info.block_size, info.context_max),
                     OK);
    rig->workers[group].window = info.window;
    rig->workers[group].step_tokens_max = info.step_tokens_max;
    rig->workers[group].step_prompt_max = info.step_prompt_max;
    rig->workers[group].step_rows_max = info.step_rows_max;
    engine_group_up(rig->engine, group, &info);
}

static inline void rig_open(struct rig *rig, const struct engine_config *config)
{
    struct engine_hooks hooks = {rig_send, rig_failed, rig};
    *rig = (struct rig){.now_us = 1000};
    arena_init(&rig->arena, 1 << 16, 0);
    assert_int_equal(engine_create(config, &hooks, &rig->engine), OK);
}

static inline void rig_close(struct rig *rig)
{
    engine_destroy(rig->engine);
    for (int g = 0; g < RIG_GROUPS; g++) {
        sim_worker_fini(&rig->workers[g]);
        for (int i = 0; i < RIG_PLANS; i++)
            buf_fini(&rig->plans[g][i]);
    }
    arena_fini(&rig->arena);
}

/* The group's oldest plan as a result, not yet told to the engine. */
static inline struct step_result rig_compute(struct rig *rig, uint32_t group)
{
    struct step_result r;
    assert_true(rig->n_done[group] < rig->n_plans[group]);
    struct buf *b = &rig->plans[group][rig->n_done[group]++ % RIG_PLANS];
    arena_reset(&rig->arena);
    assert_int_equal(plan_decode(b->data, b->n, &rig->arena, &rig->seen), OK);
    if (!sim_worker_apply(&rig->workers[group], &rig->seen, &r))
        fail_msg("%s", rig->workers[group].fault);
    r.compute_us = rig->compute_us;
    return r;
}

/* One result of each group that owes one; false when none does. */
static inline bool rig_turn(struct rig *rig)
{
    bool any = false;
    engine_step(rig->engine, rig->now_us);
    for (uint32_t g = 0; g < RIG_GROUPS; g++) {
        if (rig->n_done[g] == rig->n_plans[g]) continue;
        struct step_result r = rig_compute(rig, g);
        rig->now_us += 100;
        if (engine_result(rig->engine, g, &r, rig->now_us)) fail_msg("%s", err_detail());
        any = true;
    }
    engine_step(rig->engine, rig->now_us);
    engine_check(rig->engine);
    return any;
}

static inline void rig_run(struct rig *rig)
{
    for (int i = 0; rig_turn(rig); i++)
        assert_true(i < 10000);
}

static inline void rig_emit(struct sink *sink, const struct emission *e)
{
    struct rig_request *q = (struct rig_request *)sink;
    assert_false(q->last);
    for (uint32_t i = 0; i < e->n_tokens; i++) {
        if (e->tokens[i].flags & STEP_TOKEN_SCORED)
            q->scored[q->n_scored++] = e->tokens[i];
        else if (!e->choice)
            q->tokens[q->n_tokens++] = e->tokens[i].token;
        if (!(e->tokens[i].flags & STEP_TOKEN_SCORED)) q->n_choice_tokens[e->choice]++;
    }
    if (e->finish)
        q->n_ended++, q->finish = e->finish, q->error = e->error, q->stop_token = e->stop_token;
    q->n_cached = e->n_cached;
    q->last = e->last;
}

static inline void rig_destroy(struct request *r)
{
    struct rig_request *q =
        (struct rig_request *)((char *)r - offsetof(struct rig_request, request));
    assert_false(q->destroyed);
    q->destroyed = true;
    mem_free(r->tokens);
}

/* A request of n tokens: content decides them. Free with free() after its end. */
static inline struct rig_request *rig_request(uint64_t id, uint32_t n, uint32_t max_tokens,
                                              uint64_t content)
{
    struct rig_request *q;
    assert_int_equal(MEM_NEW(&q), OK);
    q->sink.emit = rig_emit;
    q->request = (struct request){.id = id,
                                  .sink = &q->sink,
                                  .n_tokens = n,
                                  .max_tokens = max_tokens,
                                  .n_choices = 1,
                                  .destroy = rig_destroy};
    sampling_params_default(&q->request.sampling);
    q->request.sampling.seed = 2 * id; /* even: no repetition */
    assert_int_equal(MEM_NEW_ARRAY(n, &q->request.tokens), OK);
    for (uint32_t i = 0; i < n; i++)
        q->request.tokens[i] = (int32_t)((content * 31 + i * 7 + i * i * content) % SIM_VOCABULARY);
    return q;
}

static inline void rig_free(struct rig_request *q)
{
    assert_true(q->destroyed);
    mem_free(q);
}

/* What choice 0 must be: by direct computation. */
static inline void rig_check_tokens(const struct rig_request *q, const int32_t *prompt,
                                    uint32_t n_prompt, uint64_t seed)
{
    struct sampling_params p = q->request.sampling;
    uint64_t prefix = 1;
    int32_t last = 0;
    p.seed = seed;
    p.n_stop_ids = 0;
    for (uint32_t i = 0; i < n_prompt; i++)
        prefix = model_prefix(prefix, last = prompt[i]);
    for (uint32_t i = 0; i < q->n_tokens; i++) {
        last = model_next(prefix, last, i, &p);
        assert_int_equal(q->tokens[i], last);
        prefix = model_prefix(prefix, last);
    }
}
