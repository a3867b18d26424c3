/* Goal: a rank on the CUDA backend decodes what transformers decodes, with steps replayed as graphs
 * and launched before the last one's tokens are known.
 * Method: goldens of tests/golden, several prompts at once. The same plans run step by step without
 * graphs, then two steps deep with them; tokens must agree with the golden and logprobs with each
 * other. Padding must not touch a block: one that is full stays the same to the bit. Then a step
 * that ends after its group, a step that never ends, and a device that fails. */
#include "base/clock.h"
#include "base/log.h"
#include "tests/unit/worker/golden.h"
#include "tests/unit/worker/ranks.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/lsan_interface.h>
#else
static void __lsan_disable(void) {}
static void __lsan_enable(void) {}
#endif

enum { SEQUENCES = 3, BLOCKS_EACH = 8, STEPS = 24, BLOCK_SIZE = 16 };

static void die(enum err e)
{
    if (e) fail_msg("%s: %s", err_name(e), err_detail());
}

static struct worker_config config_of(const struct golden *g, bool eager)
{
    struct worker_config c;
    worker_config_default(&c);
    c.model_dir = g->dir;
    c.device = "cuda";
    c.n_sequences_max = 6;
    c.step_tokens_max = 128;
    c.block_size = BLOCK_SIZE;
    c.kv_cache_bytes = 16 << 20;
    c.eager = eager;
    c.n_threads = 1;
    return c;
}

/* What a run gives: of each sequence its tokens and their logprobs. */
struct story {
    int n[SEQUENCES];
    int32_t tokens[SEQUENCES][STEPS + 1];
    float logprobs[SEQUENCES][STEPS + 1];
};

struct opening {
    struct plan_open open;
    struct plan_run run;
    int32_t blocks[BLOCKS_EACH];
};

static void opening_make(struct opening *o, const struct golden_prompt *p, uint32_t slot)
{
    for (int i = 0; i < BLOCKS_EACH; i++)
        o->blocks[i] = (int32_t)slot + i * SEQUENCES; /* slot 0 begins with block 0 */
    o->open = (struct plan_open){.slot = slot,
                                 .n_prompt = (uint32_t)p->n_ids,
                                 .n_tokens_max = (uint32_t)p->n_ids + STEPS + 2,
                                 .n_tokens = (uint32_t)p->n_ids,
                                 .n_blocks = BLOCKS_EACH,
                                 .tokens = p->ids,
                                 .blocks = o->blocks};
    sampling_params_default(&o->open.sampling);
    o->open.sampling.temperature = 0;
    o->open.sampling.n_logprobs = 0;
    o->open.sampling.n_prompt_logprobs = -1;
    o->run = (struct plan_run){
        .slot = slot, .n_tokens = (uint32_t)p->n_ids, .flags = PLAN_RUN_SAMPLE | PLAN_RUN_STAY};
}

static void result_take(struct story *s, const struct step_result *r)
{
    for (uint32_t i = 0; i < r->n_tokens; i++) {
        uint32_t slot = r->tokens[i].slot;
        assert_true(slot < SEQUENCES && s->n[slot] <= STEPS);
        s->tokens[slot][s->n[slot]] = r->tokens[i].token;
        s->logprobs[slot][s->n[slot]++] = r->tokens[i].logprob;
    }
}

static void end_one(struct worker *w, struct story *s)
{
    struct step_result result;
    die(worker_end(w, &result));
    result_take(s, &result);
}

static void block_read(struct worker *w, int32_t block, char *out)
{
    w->backend->ops->kv_save(w->backend, w->decoder.kv, block, out);
    die(w->backend->ops->sync(w->backend));
}

/* A sequence opens every fourth step, so that steps of one, two and three rows are met. */
static void story_run(struct worker *w, const struct golden_prompt *const prompts[SEQUENCES],
                      int depth, struct story *out)
{
    struct opening openings[SEQUENCES];
    size_t block_bytes = (size_t)w->plan.block_bytes;
    char *before, *after;
    memset(out, 0, sizeof *out);
    die(mem_alloc(block_bytes, (void **)&before));
    die(mem_alloc(block_bytes, (void **)&after));
    for (uint64_t step = 0; step < STEPS; step++) {
        struct step_plan plan = {.epoch = 1, .step = step + 1};
        if (step % 4 == 0 && step / 4 < SEQUENCES) {
            struct opening *o = &openings[step / 4];
            opening_make(o, prompts[step / 4], (uint32_t)step / 4);
            plan.n_opens = plan.n_runs = 1, plan.opens = &o->open, plan.runs = &o->run;
        }
        if (w->n_busy == depth) end_one(w, out);
        die(worker_begin(w, &plan));
        if (step == 2) block_read(w, 0, before);
    }
    while (w->n_busy)
        end_one(w, out);
    block_read(w, 0, after);
    if (prompts[0]->n_ids >= BLOCK_SIZE) assert_memory_equal(before, after, block_bytes);
    mem_free(before), mem_free(after);
}

static struct worker *worker_start(const struct golden *g, bool eager)
{
    struct worker_config c = config_of(g, eager);
    struct worker *w;
    die(worker_create(&c, &w));
    struct bootstrap boot = {.group_key = "alone"};
    die(worker_open_group(w, 1, w->info.n_blocks, 0, &boot));
    return w;
}

static void golden_check(const char *model, const struct golden *g,
                         const struct golden_prompt *const prompts[SEQUENCES],
                         const struct story *s)
{
    for (int q = 0; q < SEQUENCES; q++) {
        const struct golden_prompt *p = prompts[q];
        double scale = 0;
        for (int v = 0; v < g->vocab_size; v++)
            scale = fmax(scale, fabs(p->logits[(p->n_positions - 1) * g->vocab_size + v]));
        assert_int_equal(s->n[q], STEPS - 4 * q);
        for (int i = 0; i < s->n[q] && i < p->n_greedy; i++) {
            if (s->tokens[q][i] == p->greedy[i]) continue;
            if (p->gaps[i] <= 0.06 * scale) break; /* bf16 may fall to the other side */
            fail_msg("%s: token %d of sequence %d is %d, expected %d (gap %g of %g)", model, i, q,
                     s->tokens[q][i], p->greedy[i], p->gaps[i], scale);
        }
    }
}

static void stories_compare(const char *model, const struct story *a, const struct story *b)
{
    for (int q = 0; q < SEQUENCES; q++)
        for (int i = 0; i < a->n[q]; i++) {
            if (a->tokens[q][i] != b->tokens[q][i]) break; /* a near tie; the golden decides */
            if (fabsf(a->logprobs[q][i] - b->logprobs[q][i]) > 0.1f)
                fail_msg("%s: logprob %d of sequence %d is %g with graphs, %g without", model, i, q,
                         (double)a->logprobs[q][i], (double)b->logprobs[q][i]);
        }
}

static void model_check(const char *model)
{
    const struct golden_prompt *prompts[SEQUENCES];
    struct golden g;
    struct story plain, replayed;
    golden_open(model, &g);
    int longest = 0;
    for (int i = 0; i < g.n_prompts; i++)
        if (g.prompts[i].n_ids > g.prompts[longest].n_ids && g.prompts[i].n_ids < 90) longest = i;
    for (int q = 0; q < SEQUENCES; q++)
        prompts[q] = &g.prompts[(longest + q) % g.n_prompts];
    struct worker *w = worker_start(&g, true);
    story_run(w, prompts, 1, &plain);
    assert_int_equal(w->graphs.n_replayed, 0);
    worker_destroy(w);
    w = worker_start(&g, false);
    story_run(w, prompts, STEPS_IN_FLIGHT, &replayed);
    assert_int_equal(w->graphs.n_recorded, 3); /* for 1, 2 and 4 rows */
    int prompt_steps = 0;                      /* one of a single token is a step like any other */
    for (int q = 0; q < SEQUENCES; q++)
        prompt_steps += prompts[q]->n_ids > 1;
    assert_int_equal(w->graphs.n_replayed, STEPS - prompt_steps - 3);
    worker_destroy(w);
    golden_check(model, &g, prompts, &plain);
    golden_check(model, &g, prompts, &replayed);
    stories_compare(model, &replayed, &plain);
    golden_close(&g);
}

static void test_graphs(void **state)
{
    static const char *const models[] = {"llama_bf16",  "llama3_bf16", "mistral_bf16", "qwen2_bf16",
                                         "mixtral_all", "gptq_order",  "awq_bias"};
    (void)state;
    for (size_t i = 0; i < sizeof models / sizeof *models; i++)
        model_check(models[i]);
}

static void test_sizes(void **state)
{
    int sizes[GRAPHS_MAX];
    (void)state;
    assert_int_equal(graph_sizes(0, sizes), 0);
    for (int most = 1; most < 3000; most++) {
        int n = graph_sizes(most, sizes);
        assert_true(n >= 1 && n <= GRAPHS_MAX);
        assert_int_equal(sizes[0], 1);
        assert_int_equal(sizes[n - 1], most < GRAPH_ROWS_MAX ? most : GRAPH_ROWS_MAX);
        for (int i = 1; i < n; i++) {
            assert_true(sizes[i] > sizes[i - 1]);
            assert_true(sizes[i] <= 2 * sizes[i - 1]); /* never more than half of it padding */
        }
    }
}

static void play(const char *device)
{
    device ? setenv("HEDDLE_FAKE_GPU", device, 1) : unsetenv("HEDDLE_FAKE_GPU");
}

static struct worker *busy_worker(struct golden *g, struct opening *o)
{
    golden_open("llama_bf16", g);
    struct worker *w = worker_start(g, false);
    opening_make(o, &g->prompts[0], 0);
    struct step_plan plan = {
        .epoch = 1, .step = 1, .n_opens = 1, .opens = &o->open, .n_runs = 1, .runs = &o->run};
    die(worker_begin(w, &plan));
    return w;
}

/* Steps that were launched are dropped with their group; the next group begins as if new. */
static void test_group_ends(void **state)
{
    struct golden g;
    struct opening o;
    struct story first = {0}, second = {0};
    (void)state;
    struct worker *w = busy_worker(&g, &o);
    die(worker_begin(w, &(struct step_plan){.epoch = 1, .step = 2}));
    die(worker_close_group(w));
    assert_int_equal(w->n_busy, 0);
    struct bootstrap boot = {.group_key = "again"};
    for (int epoch = 2; epoch < 4; epoch++) {
        struct step_plan plan = {.epoch = (uint64_t)epoch,
                                 .step = 7,
                                 .n_opens = 1,
                                 .opens = &o.open,
                                 .n_runs = 1,
                                 .runs = &o.run};
        die(worker_open_group(w, (uint64_t)epoch, w->info.n_blocks, 0, &boot));
        die(worker_begin(w, &plan));
        end_one(w, epoch == 2 ? &first : &second);
    }
    assert_int_equal(first.tokens[0][0], g.prompts[0].greedy[0]);
    assert_int_equal(second.tokens[0][0], g.prompts[0].greedy[0]);
    worker_destroy(w);
    golden_close(&g);
}

static void test_failing_device(void **state)
{
    struct golden g;
    struct opening o;
    struct step_result result;
    (void)state;
    __lsan_disable(); /* its memory is left to the end of the process */
    struct worker *w = busy_worker(&g, &o);
    play("fail_now=20");
    assert_int_equal(worker_end(w, &result), ERR_DEVICE);
    assert_non_null(strstr(err_detail(), "illegal memory access"));
    assert_int_equal(worker_close_group(w), ERR_DEVICE);
    play("reset=1");
    golden_close(&g);
    __lsan_enable();
}

/* A device that never ends a step does not keep the rank: it says so after CLOSE_MS. */
static void test_hung_device(void **state)
{
    struct golden g;
    struct opening o;
    (void)state;
    __lsan_disable();
    struct worker *w = busy_worker(&g, &o);
    play("hang=1");
    int64_t begun = clock_monotonic_us();
    assert_false(worker_ready(w));
    assert_int_equal(worker_close_group(w), ERR_DEVICE);
    assert_true(clock_monotonic_us() - begun >= CLOSE_MS * 1000ll);
    assert_true(clock_monotonic_us() - begun < CLOSE_MS * 1000ll + 20000000);
    play(NULL);
    golden_close(&g);
    __lsan_enable();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sizes),          cmocka_unit_test(test_graphs),
        cmocka_unit_test(test_group_ends),     cmocka_unit_test(test_hung_device),
        cmocka_unit_test(test_failing_device),
    };
    const struct CMUnitTest native[] = {cmocka_unit_test(test_sizes),
                                        cmocka_unit_test(test_graphs)};
    log_set_level(LOG_WARN);
    if (getenv("HEDDLE_GPU_NATIVE")) /* a real one cannot be told to fail */
        return cmocka_run_group_tests(native, NULL, NULL);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
