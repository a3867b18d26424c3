/* Goal: a plan with any number out of range is ERR_FORMAT with words, whatever else it holds; the
 * rank survives it and serves the next incarnation.
 * Method: one right plan, then each of its numbers made wrong in turn. */
#include "base/log.h"
#include "golden.h"
#include "ranks.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

static struct golden golden;
static struct ranks ranks;

struct parts {
    struct step_plan plan;
    struct plan_open open;
    struct plan_fork fork;
    struct plan_run runs[2];
    struct plan_pair save, load, copy, extend;
    uint32_t close, pause;
    int32_t tokens[8], blocks[4], fork_blocks[4], append[2], drafts[2], stop_ids[1], bias_tokens[1];
    float bias_values[1];
};

/* Slot 0 is open from the step before; this plan touches everything. */
static void parts_fill(struct parts *p)
{
    *p = (struct parts){.tokens = {1, 2, 3, 4, 5, 6, 7, 8},
                        .blocks = {4, 5, 6, 7},
                        .fork_blocks = {8, 9, 10, 11},
                        .append = {1, 2},
                        .drafts = {3, 4},
                        .stop_ids = {2},
                        .bias_tokens = {5},
                        .bias_values = {1},
                        .close = 2,
                        .pause = 0};
    p->open = (struct plan_open){.slot = 1,
                                 .n_prompt = 8,
                                 .n_tokens_max = 60,
                                 .n_tokens = 8,
                                 .n_blocks = 4,
                                 .tokens = p->tokens,
                                 .blocks = p->blocks};
    sampling_params_default(&p->open.sampling);
    p->open.sampling.n_bias = p->open.sampling.n_stop_ids = 1;
    p->open.sampling.bias_tokens = p->bias_tokens;
    p->open.sampling.bias_values = p->bias_values;
    p->open.sampling.stop_ids = p->stop_ids;
    p->fork = (struct plan_fork){.from = 0,
                                 .to = 3,
                                 .n_tokens = 4,
                                 .n_computed = 4,
                                 .n_append = 2,
                                 .n_blocks = 4,
                                 .append = p->append,
                                 .blocks = p->fork_blocks};
    p->runs[0] = (struct plan_run){
        .slot = 1, .n_tokens = 10, .flags = PLAN_RUN_SAMPLE, .n_drafts = 2, .drafts = p->drafts};
    p->runs[1] = (struct plan_run){.slot = 3, .n_tokens = 1};
    p->save = (struct plan_pair){0, 0};
    p->load = (struct plan_pair){0, 1};
    p->copy = (struct plan_pair){0, 2};
    p->extend = (struct plan_pair){3, 12};
    p->plan = (struct step_plan){.n_closes = 1,
                                 .closes = &p->close,
                                 .n_saves = 1,
                                 .saves = &p->save,
                                 .n_loads = 1,
                                 .loads = &p->load,
                                 .n_copies = 1,
                                 .copies = &p->copy,
                                 .n_opens = 1,
                                 .opens = &p->open,
                                 .n_forks = 1,
                                 .forks = &p->fork,
                                 .n_extends = 1,
                                 .extends = &p->extend,
                                 .n_pauses = 1,
                                 .pauses = &p->pause,
                                 .n_runs = 2,
                                 .runs = p->runs};
}

/* Opens slots 0 and 2, so that they can be forked, paused and closed. */
static void begin_again(void)
{
    struct step_result result;
    static const int32_t tokens[] = {1, 2, 3, 4}, blocks[] = {0, 1};
    struct plan_open opens[2];
    struct plan_run run = {.slot = 0, .n_tokens = 4};
    if (ranks_reopen(&ranks)) fail_msg("%s", err_detail());
    for (uint32_t i = 0; i < 2; i++) {
        opens[i] = (struct plan_open){.slot = 2 * i,
                                      .n_prompt = 4,
                                      .n_tokens_max = 60,
                                      .n_tokens = 4,
                                      .n_blocks = 1,
                                      .tokens = tokens,
                                      .blocks = blocks + i};
        sampling_params_default(&opens[i].sampling);
    }
    struct step_plan plan = {.n_opens = 2, .opens = opens, .n_runs = 1, .runs = &run};
    if (ranks_step(&ranks, &plan, &result)) fail_msg("%s", err_detail());
}

static void test_the_right_plan_runs(void **state)
{
    (void)state;
    struct parts p;
    struct step_result result;
    begin_again();
    parts_fill(&p);
    if (ranks_step(&ranks, &p.plan, &result)) fail_msg("%s", err_detail());
    assert_true(result.n_tokens >= 1 && result.n_tokens <= 3);
    assert_int_equal(result.tokens[0].slot, 1);
}

#define WRONG(field, value, words)                                                                 \
    do {                                                                                           \
        struct parts p;                                                                            \
        struct step_result result;                                                                 \
        begin_again();                                                                             \
        parts_fill(&p);                                                                            \
        p.field = (value);                                                                         \
        enum err e_ = ranks_step(&ranks, &p.plan, &result);                                        \
        if (e_ != ERR_FORMAT) fail_msg("%s = %s: %s", #field, #value, err_name(e_));               \
        if (!strstr(err_detail(), words)) fail_msg("%s = %s: '%s'", #field, #value, err_detail()); \
    } while (0)

static void test_wrong_slots(void **state)
{
    (void)state;
    WRONG(close, 4, "closes slot 4, but this rank has 4");
    WRONG(close, 3, "closes slot 3, which is not open");
    WRONG(close, UINT32_MAX, "closes slot");
    WRONG(open.slot, 4, "opens slot 4");
    WRONG(open.slot, 0, "open already");
    WRONG(fork.from, 3, "which is not open");
    WRONG(fork.from, 99, "forks slot 99");
    WRONG(fork.to, 0, "open already");
    WRONG(fork.to, 1u << 31, "opens slot");
    WRONG(extend.from, 2, "extends slot 2, which is not open");
    WRONG(pause, 2, "pauses slot 2, which is not open");
    WRONG(runs[0].slot, 2, "runs slot 2, which is not open");
    WRONG(runs[1].slot, 1, "runs slot 1 twice");
    WRONG(runs[1].slot, 4096, "runs slot 4096");
}

static void test_wrong_blocks(void **state)
{
    (void)state;
    WRONG(save.from, 64, "saves block 64, but this group has 64");
    WRONG(save.to, 8, "saves to host block 8");
    WRONG(load.from, 8, "loads from host block 8");
    WRONG(load.to, UINT32_MAX, "loads block");
    WRONG(copy.from, 64, "copies from block 64");
    WRONG(copy.to, 1u << 31, "copies to block");
    WRONG(extend.to, 64, "extends by block 64");
    WRONG(blocks[3], 64, "names block 64");
    WRONG(blocks[0], -1, "names block -1");
    WRONG(fork_blocks[2], INT32_MAX, "names block");
    WRONG(open.n_blocks, 1u << 20, "blocks for one sequence");
}

static void test_wrong_lengths(void **state)
{
    (void)state;
    WRONG(open.n_tokens, 0, "slot 1 with 0 tokens");
    WRONG(open.n_tokens_max, 7, "slot 1 with 8 tokens");
    WRONG(open.n_tokens_max, 257, "may grow to 257 tokens, at most 256");
    WRONG(open.n_tokens_max, UINT32_MAX, "may grow to");
    WRONG(open.n_prompt, 9, "9 of the prompt");
    WRONG(open.n_computed, 9, "9 computed");
    WRONG(fork.n_tokens, 5, "fork takes 5 and 2 more tokens of slot 0");
    WRONG(fork.n_append, 1u << 30, "fork takes");
    WRONG(fork.n_computed, 7, "7 computed");
    WRONG(runs[0].n_tokens, 0, "runs 0 tokens");
    WRONG(runs[0].n_tokens, 11, "runs 11 tokens");
    WRONG(runs[0].n_tokens, UINT32_MAX, "runs");
    WRONG(runs[0].n_tokens, 9, "drafts");
    WRONG(runs[0].n_drafts, 3, "drafts");
    WRONG(runs[0].flags, 0, "drafts");
    WRONG(runs[1].n_tokens, 3, "runs 3 tokens");
    WRONG(runs[1].flags, PLAN_RUN_SAMPLE, "samples after token");
    WRONG(open.n_tokens_max, 9, "is full at 9 tokens");
}

static void test_wrong_values(void **state)
{
    (void)state;
    WRONG(tokens[7], 512, "token 512, but the vocabulary has 512");
    WRONG(tokens[0], -1, "token -1");
    WRONG(append[1], 1 << 30, "token");
    WRONG(drafts[1], 512, "draft token 512");
    WRONG(stop_ids[0], -5, "token -5");
    WRONG(bias_tokens[0], 512, "token 512");
    WRONG(bias_values[0], NAN, "logit bias");
    WRONG(open.sampling.n_bias, -1, "logit biases");
    WRONG(open.sampling.n_bias, 1 << 20, "logit biases");
    WRONG(open.sampling.n_stop_ids, 1 << 20, "stop ids");
    WRONG(open.sampling.n_logprobs, 33, "logprobs");
    WRONG(open.sampling.n_prompt_logprobs, 1000, "logprobs");
    WRONG(open.sampling.temperature, NAN, "temperature is not finite");
    WRONG(open.sampling.temperature, -1, "temperature");
    WRONG(open.sampling.repetition_penalty, 0, "repetition_penalty");
    WRONG(open.sampling.top_p, INFINITY, "top_p is not finite");
}

static void test_wrong_epoch_and_step(void **state)
{
    (void)state;
    struct step_plan plan = {0};
    struct step_result result;
    begin_again();
    plan.epoch = ranks.epoch + 1;
    plan.step = ranks.step + 1;
    assert_int_equal(worker_begin(ranks.workers[0], &plan), ERR_FORMAT);
    assert_non_null(strstr(err_detail(), "epoch"));
    begin_again();
    ranks.step += 5;
    assert_int_equal(ranks_step(&ranks, &plan, &result), ERR_FORMAT);
    assert_non_null(strstr(err_detail(), "is next"));
    struct buf out;
    buf_init(&out, 0);
    begin_again();
    assert_int_equal(worker_step(ranks.workers[0], "\xff\xff\xff garbage", 11, &out), ERR_FORMAT);
    buf_fini(&out);
}

static int start(void **state)
{
    struct worker_config c;
    (void)state;
    golden_open("llama", &golden);
    worker_config_default(&c);
    c.model_dir = golden.dir;
    c.device = "cpu";
    c.n_threads = 1;
    c.n_sequences_max = 4;
    c.step_tokens_max = 64;
    c.draft_tokens_max = 2;
    c.block_size = 16;
    c.kv_cache_bytes = 64 * 16 * 512;
    c.host_swap_bytes = 8 * 16 * 512;
    return ranks_create(&ranks, &c, 1) ? -1 : 0;
}

static int stop(void **state)
{
    (void)state;
    ranks_destroy(&ranks);
    golden_close(&golden);
    return 0;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_the_right_plan_runs), cmocka_unit_test(test_wrong_slots),
        cmocka_unit_test(test_wrong_blocks),        cmocka_unit_test(test_wrong_lengths),
        cmocka_unit_test(test_wrong_values),        cmocka_unit_test(test_wrong_epoch_and_step),
    };
    log_set_level(LOG_ERROR);
    return cmocka_run_group_tests(tests, start, stop);
}
