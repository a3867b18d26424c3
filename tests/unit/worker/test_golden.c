/* Goal: every architecture computes what transformers computes, on one rank and on several.
 * Method: checkpoints and logits of tests/golden. The whole prompt in one step gives logits of
 * every kept position; greedy decoding gives 64 tokens. Logits may differ (root of squares over
 * root of squares) by 1e-4 where all is f32, also of a bf16 checkpoint, and by 2e-2 where weights,
 * KV and matmul inputs are bf16, by 6e-2 where inputs meet 4-bit codes in 8 bits; tokens must
 * agree where the gap between best and second best exceeds what that allows. */
#include "base/log.h"
#include "golden.h"
#include "ranks.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

/* Or those that HEDDLE_TEST_MODELS names: folders made by tools/make_golden.py, between colons. */
static const char *models[64] = {
    "llama",          "llama_bf16",   "llama3",       "llama3_bf16",
    "llama3_sharded", "qwen2",        "qwen2_bf16",   "qwen2_heads14",
    "qwen3",          "qwen3_bf16",   "mistral",      "mistral_bf16",
    "gpt2",           "gpt2_bf16",    "opt",          "opt_bf16",
    "opt_post",       "qwen2_window", "llama_yarn",   "gpt2_scales",
    "mixtral",        "qwen3_moe",    "gptq",         "gptq_zeros",
    "gptq_v2",        "gptq_order",   "gptq_channel", "gptq_order_head",
    "gptq_mixed",     "gptq_experts", "awq",          "awq_bias",
    "packed4",        "packed4_zeros"};
static int n_models = 34;

static void models_choose(char *list)
{
    if (!list) return;
    n_models = 0;
    for (char *at = strtok_r(list, ":", &list); at && n_models < 64;
         at = strtok_r(NULL, ":", &list))
        models[n_models++] = at;
}

static struct worker_config config_of(const struct golden *g)
{
    struct worker_config c;
    worker_config_default(&c);
    c.model_dir = g->dir;
    c.device = "cpu";
    c.isa = getenv("HEDDLE_TEST_ISA");
    c.n_threads = 1;
    c.n_sequences_max = 4;
    c.step_tokens_max = 128;
    c.block_size = 16;
    c.kv_cache_bytes = 16 << 20;
    c.collective_timeout_ms = 20000;
    return c;
}

static double tolerance_of(const struct golden *g)
{
    return g->quantized ? 6e-2 : g->bf16 ? 2e-2 : 1e-4;
}

static void die(enum err e, const char *model)
{
    if (e) fail_msg("%s: %s: %s", model, err_name(e), err_detail());
}

/* Tokens generated on several ranks: each is two all-reduces a layer, slow where cores are few. */
enum { GREEDY_MANY_RANKS = 24 };

/* Greedy by temperature 0; blocks from first_block on. */
static struct plan_open open_of(const struct golden_prompt *p, const int32_t *blocks, int n_blocks)
{
    struct plan_open o = {.slot = 1,
                          .n_prompt = (uint32_t)p->n_ids,
                          .n_tokens_max = (uint32_t)(p->n_ids + p->n_greedy + 1),
                          .n_tokens = (uint32_t)p->n_ids,
                          .n_blocks = (uint32_t)n_blocks,
                          .tokens = p->ids,
                          .blocks = blocks};
    sampling_params_default(&o.sampling);
    o.sampling.temperature = 0;
    o.sampling.n_logprobs = -1;
    o.sampling.n_prompt_logprobs = -1;
    return o;
}

static void greedy_check(struct ranks *r, const struct golden *g, const struct golden_prompt *p,
                         const char *model)
{
    int32_t blocks[10];
    struct step_result result;
    for (int i = 0; i < 10; i++)
        blocks[i] = 9 - i; /* any order will do */
    struct plan_open open = open_of(p, blocks, 10);
    struct plan_run run = {
        .slot = 1, .n_tokens = (uint32_t)p->n_ids, .flags = PLAN_RUN_SAMPLE | PLAN_RUN_STAY};
    uint32_t close = 1;
    double scale = 0;
    for (int v = 0; v < g->vocab_size; v++)
        scale =
            fmax(scale,
                 fabs(p->logits[(size_t)(p->n_positions - 1) * (size_t)g->vocab_size + (size_t)v]));
    int n = r->size > 2 && p->n_greedy > GREEDY_MANY_RANKS ? GREEDY_MANY_RANKS : p->n_greedy;
    for (int i = 0; i < n; i++) {
        struct step_plan plan = {.n_opens = i == 0, .opens = &open, .n_runs = i == 0, .runs = &run};
        die(ranks_step(r, &plan, &result), model);
        assert_int_equal(result.n_tokens, 1);
        assert_int_equal(result.tokens[0].slot, 1);
        if (p->gaps[i] <= 2 * tolerance_of(g) * scale && result.tokens[0].token != p->greedy[i])
            break;
        if (result.tokens[0].token != p->greedy[i])
            fail_msg("%s, %d ranks: token %d after %d is %d, expected %d (gap %g)", model, r->size,
                     i, p->n_ids, result.tokens[0].token, p->greedy[i], p->gaps[i]);
    }
    struct step_plan plan = {.n_closes = 1, .closes = &close};
    die(ranks_step(r, &plan, &result), model);
    assert_int_equal(result.n_tokens, 0);
}

/* Logits of every kept position, straight from the decoder of one rank. */
static void logits_check(struct ranks *r, const struct golden *g, const struct golden_prompt *p,
                         const char *model, double tolerance)
{
    struct worker *w = r->workers[0];
    struct step *s = &w->steps[0];
    int32_t blocks[10];
    for (int i = 0; i < 10; i++)
        blocks[i] = i;
    struct plan_open open = open_of(p, blocks, 10);
    struct plan_run run = {.slot = 1, .n_tokens = (uint32_t)p->n_ids};
    uint32_t close = 1;
    struct step_plan plan = {.n_opens = 1, .opens = &open, .n_runs = 1, .runs = &run};
    die(slots_apply(&w->slots, &plan), model);
    step_fill(s, &w->slots, true);
    for (int i = 0; i < p->n_positions; i++)
        s->rows_out[i] = p->positions[i];
    s->batch.n_rows_out = p->n_positions;
    w->backend->ops->batch_begin(w->backend, &s->batch);
    die(decoder_forward(&w->decoder, &s->batch), model);
    double worst = 0, squares = 0, error = 0;
    for (int i = 0; i < p->n_positions; i++) {
        struct tensor logits;
        die(decoder_logits(&w->decoder, i, 1, &logits), model);
        for (int v = 0; v < g->vocab_size; v++) {
            double want = p->logits[(size_t)i * (size_t)g->vocab_size + (size_t)v];
            double off = ((float *)logits.data)[v] - want;
            worst = fmax(worst, fabs(off));
            squares += want * want;
            error += off * off;
        }
    }
    error = sqrt(error / squares);
    w->backend->ops->ticket_wait(w->backend, w->backend->ops->step_end(w->backend));
    if (getenv("HEDDLE_TEST_VERBOSE"))
        print_message("%s %d: worst %g, relative %g\n", model, p->n_ids, worst, error);
    if (!(error <= tolerance))
        fail_msg("%s, prompt of %d: logits differ by %g (worst %g)", model, p->n_ids, error, worst);
    struct step_plan closing = {.n_closes = 1, .closes = &close};
    die(slots_apply(&w->slots, &closing), model);
}

static void logits_with(const char *dtype)
{
    for (int i = 0; i < n_models; i++) {
        struct golden g;
        struct ranks r;
        golden_open(models[i], &g);
        struct worker_config c = config_of(&g);
        c.dtype = c.kv_dtype = dtype;
        die(ranks_create(&r, &c, 1), models[i]);
        for (int p = 0; p < g.n_prompts; p++)
            logits_check(&r, &g, &g.prompts[p], models[i],
                         dtype && !g.quantized ? 1e-4 : tolerance_of(&g));
        ranks_destroy(&r);
        golden_close(&g);
    }
}

static void test_logits_as_stored(void **state)
{
    (void)state;
    logits_with(NULL);
}

static void test_logits_in_f32(void **state)
{
    (void)state;
    logits_with("f32");
}

static void greedy_on(int size, int every)
{
    for (int i = 0; i < n_models; i++) {
        struct golden g;
        struct ranks r;
        golden_open(models[i], &g);
        struct worker_config c = config_of(&g);
        die(ranks_create(&r, &c, size), models[i]);
        for (int p = g.n_prompts - 1; p >= 0; p -= every)
            greedy_check(&r, &g, &g.prompts[p], models[i]);
        ranks_destroy(&r);
        golden_close(&g);
    }
}

static void test_greedy_one_rank(void **state)
{
    (void)state;
    greedy_on(1, 1);
}

static void test_greedy_two_ranks(void **state)
{
    (void)state;
    greedy_on(2, 4);
}

static void test_greedy_three_ranks(void **state)
{
    (void)state;
    greedy_on(3, 4);
}

static void test_greedy_four_ranks(void **state)
{
    (void)state;
    greedy_on(4, 4);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_logits_as_stored),   cmocka_unit_test(test_logits_in_f32),
        cmocka_unit_test(test_greedy_one_rank),    cmocka_unit_test(test_greedy_two_ranks),
        cmocka_unit_test(test_greedy_three_ranks), cmocka_unit_test(test_greedy_four_ranks),
    };
    log_set_level(LOG_ERROR);
    models_choose(getenv("HEDDLE_TEST_MODELS"));
    return cmocka_run_group_tests(tests, NULL, NULL);
}
