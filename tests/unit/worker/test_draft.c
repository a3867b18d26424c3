/* Goal: a draft model changes no token, on one rank or several, and its own KV is right in every
 * way a block can come to a sequence. Method: the model as its own draft model must be kept always,
 * whatever was cut, shared, copied, swapped, forked or left out before, because one wrong key would
 * change a draft; other models as draft models must be kept sometimes, and never change a token. */
#include "base/log.h"
#include "golden.h"
#include "ranks.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

enum { BLOCK = 16, N_BLOCKS = 10, N_NEW = 40, K = 4 };

struct trace {
    uint32_t n, n_steps, n_proposed, n_accepted, n_fed;
    int32_t tokens[96];
    float logprobs[96];
};

static struct golden golden;
static struct ranks ranks;
static char draft_dir[600];

static void die(enum err e)
{
    if (e) fail_msg("%s: %s", err_name(e), err_detail());
}

static struct worker_config config_of(const char *model, const char *draft)
{
    struct worker_config c;
    const char *source = getenv("HEDDLE_SOURCE_DIR");
    golden_open(model, &golden);
    worker_config_default(&c);
    c.model_dir = golden.dir;
    c.device = "cpu";
    c.isa = getenv("HEDDLE_TEST_ISA");
    c.n_threads = 1;
    c.n_sequences_max = 12;
    c.step_tokens_max = 192;
    c.step_rows_max = 5; /* so that rows are split */
    c.draft_tokens_max = K;
    c.block_size = BLOCK;
    c.kv_cache_bytes = 16 << 20;
    c.host_swap_bytes = 2 << 20;
    c.collective_timeout_ms = 20000;
    snprintf(draft_dir, sizeof draft_dir, "%s/tests/golden/%s", source ? source : ".", draft);
    c.draft_model_dir = draft_dir;
    return c;
}

static void start(const char *model, const char *draft, int size)
{
    struct worker_config c = config_of(model, draft);
    die(ranks_create(&ranks, &c, size));
}

static void stop(void)
{
    ranks_destroy(&ranks);
    golden_close(&golden);
}

static struct sampling_params params(float temperature, uint64_t seed)
{
    struct sampling_params p;
    sampling_params_default(&p);
    p.temperature = temperature;
    p.top_p = 0.95f;
    p.seed = seed;
    p.n_logprobs = 0;
    return p;
}

/* Ten blocks of their own for each slot. */
static const int32_t *blocks_of(uint32_t slot)
{
    static int32_t blocks[16][N_BLOCKS];
    for (int i = 0; i < N_BLOCKS; i++)
        blocks[slot][i] = (int32_t)slot * N_BLOCKS + N_BLOCKS - 1 - i;
    return blocks[slot];
}

static struct plan_open open_on(uint32_t slot, const struct golden_prompt *p,
                                const struct sampling_params *sampling)
{
    return (struct plan_open){.slot = slot,
                              .n_prompt = (uint32_t)p->n_ids,
                              .n_tokens_max = 159,
                              .n_tokens = (uint32_t)p->n_ids,
                              .n_blocks = N_BLOCKS,
                              .tokens = p->ids,
                              .blocks = blocks_of(slot),
                              .sampling = *sampling};
}

static void hear(struct trace *t, const struct step_result *r, uint32_t slot)
{
    uint32_t before = t->n;
    for (uint32_t i = 0; i < r->n_tokens; i++) {
        if (r->tokens[i].slot != slot || r->tokens[i].flags) continue;
        assert_true(t->n < 96);
        t->logprobs[t->n] = r->tokens[i].logprob;
        t->tokens[t->n++] = r->tokens[i].token;
    }
    t->n_fed += r->draft_tokens;
    for (uint32_t i = 0; i < r->n_drafted; i++) {
        if (r->drafted[i].from != slot) continue;
        t->n_proposed += r->drafted[i].to;
        t->n_accepted += t->n - before - 1;
        assert_true(t->n - before - 1 <= r->drafted[i].to);
    }
    t->n_steps++;
}

static void step(struct step_plan plan, struct step_result *out)
{
    die(ranks_step(&ranks, &plan, out));
}

/* One run of one slot beside whatever else the plan does. */
static void run(struct trace *t, struct step_plan plan, uint32_t slot, uint32_t n_tokens,
                uint32_t n_own, uint32_t n_ahead)
{
    struct plan_run r = {.slot = slot,
                         .n_tokens = n_tokens,
                         .flags = PLAN_RUN_SAMPLE,
                         .n_own = n_own,
                         .n_ahead = n_ahead};
    struct step_result result;
    plan.n_runs = 1;
    plan.runs = &r;
    step(plan, &result);
    hear(t, &result, slot);
}

static void close_slot(uint32_t slot)
{
    struct step_result result;
    step((struct step_plan){.n_closes = 1, .closes = &slot}, &result);
}

static void run_plain(const struct golden_prompt *p, const struct sampling_params *s, uint32_t slot,
                      struct trace *t)
{
    struct plan_open open = open_on(slot, p, s);
    memset(t, 0, sizeof *t);
    run(t, (struct step_plan){.n_opens = 1, .opens = &open}, slot, open.n_tokens, 0, 0);
    while (t->n < N_NEW)
        run(t, (struct step_plan){0}, slot, 1, 0, 0);
    close_slot(slot);
}

static void same(const struct trace *a, const struct trace *b)
{
    for (uint32_t i = 0; i < N_NEW; i++) {
        if (a->tokens[i] != b->tokens[i])
            fail_msg("token %u: %d and %d", i, a->tokens[i], b->tokens[i]);
        assert_memory_equal(&a->logprobs[i], &b->logprobs[i], sizeof(float));
    }
}

/* Up to until tokens with k drafts a step. */
static void draft_until(struct trace *t, uint32_t slot, uint32_t until, uint32_t k)
{
    while (t->n < until)
        run(t, (struct step_plan){0}, slot, 1, k, k);
}

/* The whole way: prompt in chunks (0 = at once), then k drafts a step. */
static void run_drafted(const struct golden_prompt *p, const struct sampling_params *s,
                        uint32_t slot, uint32_t chunk, uint32_t k, struct trace *t)
{
    struct plan_open open = open_on(slot, p, s);
    struct step_plan first = {.n_opens = 1, .opens = &open};
    uint32_t n_left = open.n_tokens;
    memset(t, 0, sizeof *t);
    for (; chunk && n_left > chunk; n_left -= chunk) {
        struct plan_run r = {.slot = slot, .n_tokens = chunk};
        struct step_result result;
        first.n_runs = 1, first.runs = &r;
        step(first, &result);
        assert_int_equal(result.n_tokens, 0);
        first = (struct step_plan){0};
    }
    run(t, first, slot, n_left, 0, k);
    draft_until(t, slot, N_NEW, k);
    close_slot(slot);
}

static void kept_always(const struct trace *t, uint32_t k)
{
    assert_int_equal(t->n_accepted, t->n_proposed);
    assert_int_equal(t->n_steps, 1 + (N_NEW - 1 + k) / (k + 1));
}

/* --- itself as its draft model --- */

static void every_length_is_kept(float temperature)
{
    struct trace plain, drafted;
    for (uint32_t k = 1; k <= K; k++) {
        struct sampling_params s = params(temperature, k);
        s.repetition_penalty = 1.1f; /* the draft's rows read the drafts before them */
        run_plain(&golden.prompts[2], &s, 1, &plain);
        run_drafted(&golden.prompts[2], &s, 3, k == 2 ? 7 : 0, k, &drafted);
        same(&plain, &drafted);
        kept_always(&drafted, k);
    }
}

/* Plain steps, drafts asked for and not used, more asked than are there, members of the decode set.
 */
static void every_order_is_kept(void)
{
    struct sampling_params s = params(0.8f, 5);
    struct trace plain, t = {0};
    struct step_result result;
    uint32_t slot = 2;
    run_plain(&golden.prompts[1], &s, 1, &plain);
    struct plan_open open = open_on(slot, &golden.prompts[1], &s);
    struct plan_run stay = {.slot = slot, .n_tokens = 1, .flags = PLAN_RUN_SAMPLE | PLAN_RUN_STAY};
    run(&t, (struct step_plan){.n_opens = 1, .opens = &open}, slot, open.n_tokens, 0, 0);
    run(&t, (struct step_plan){0}, slot, 1, 3, 2); /* none are there yet */
    assert_int_equal(t.n_proposed, 0);
    run(&t, (struct step_plan){0}, slot, 1, 4, 4); /* only two are */
    assert_int_equal(t.n_proposed, 2);
    run(&t, (struct step_plan){0}, slot, 1, 0, 3); /* four wait in vain */
    run(&t, (struct step_plan){0}, slot, 1, 1, 0);
    assert_int_equal(t.n_proposed, 3);
    step((struct step_plan){.n_runs = 1, .runs = &stay}, &result);
    hear(&t, &result, slot);
    for (int i = 0; i < 5; i++) {
        step((struct step_plan){0}, &result);
        hear(&t, &result, slot);
    }
    step((struct step_plan){.n_pauses = 1, .pauses = &slot}, &result);
    run(&t, (struct step_plan){0}, slot, 1, 4, 4);
    uint32_t n_before = t.n_proposed;
    draft_until(&t, slot, N_NEW, K);
    assert_true(t.n_proposed > n_before + 8);
    assert_int_equal(t.n_accepted, t.n_proposed);
    same(&plain, &t);
    close_slot(slot);
}

/* Drafts of the coordinator in between: what they wrote is not what the draft model saw. */
static void lists_and_own_drafts_mix(void)
{
    struct sampling_params s = params(0, 1);
    struct trace plain, t = {0};
    struct step_result result;
    uint32_t slot = 4;
    run_plain(&golden.prompts[0], &s, 1, &plain);
    struct plan_open open = open_on(slot, &golden.prompts[0], &s);
    run(&t, (struct step_plan){.n_opens = 1, .opens = &open}, slot, open.n_tokens, 0, K);
    for (int turn = 0; t.n + 6 < N_NEW; turn++) {
        int32_t wrong[2] = {plain.tokens[t.n], (plain.tokens[t.n + 1] + 1) % golden.vocab_size};
        struct plan_run r = {.slot = slot,
                             .n_tokens = 3,
                             .flags = PLAN_RUN_SAMPLE,
                             .n_drafts = 2,
                             .drafts = wrong,
                             .n_ahead = K};
        if (turn % 2) {
            run(&t, (struct step_plan){0}, slot, 1, K, K);
            continue;
        }
        uint32_t n = t.n;
        step((struct step_plan){.n_runs = 1, .runs = &r}, &result);
        hear(&t, &result, slot);
        assert_int_equal(t.n, n + 2);
    }
    draft_until(&t, slot, N_NEW, K);
    assert_int_equal(t.n_accepted, t.n_proposed);
    same(&plain, &t);
    close_slot(slot);
}

/* A second sequence on the first one's leading blocks: with the draft model's KV in them it
 * computes only the rest; without, all. */
static void a_shared_prefix_is_kept(bool drafted_before)
{
    const struct golden_prompt *p = &golden.prompts[golden.n_prompts - 1];
    struct sampling_params s = params(0.9f, 9);
    struct trace plain, first = {0}, t = {0};
    int32_t shared[N_BLOCKS];
    uint32_t n_cached = 4 * BLOCK;
    run_plain(p, &s, 1, &plain);
    struct plan_open open = open_on(5, p, &s), second = open_on(6, p, &s);
    run(&first, (struct step_plan){.n_opens = 1, .opens = &open}, 5, open.n_tokens, 0,
        drafted_before ? K : 0);
    if (drafted_before) run(&first, (struct step_plan){0}, 5, 1, K, 0);
    close_slot(5);
    memcpy(shared, blocks_of(6), sizeof shared);
    memcpy(shared, blocks_of(5), 4 * sizeof *shared);
    second.blocks = shared;
    second.n_computed = n_cached;
    run(&t, (struct step_plan){.n_opens = 1, .opens = &second}, 6, open.n_tokens - n_cached, 0, 1);
    run(&t, (struct step_plan){0}, 6, 1, 1, K);
    uint32_t n_known = open.n_tokens + 1;
    assert_int_equal(t.n_fed, drafted_before ? n_known - n_cached : n_known);
    draft_until(&t, 6, N_NEW, K);
    assert_int_equal(t.n_accepted, t.n_proposed);
    same(&plain, &t);
    close_slot(6);
}

/* Swapped out, overwritten, back in other blocks: both pools' blocks travel. */
static void a_swap_is_kept(void)
{
    const struct golden_prompt *p = &golden.prompts[2];
    struct sampling_params s = params(0.9f, 4);
    struct trace plain, other, t = {0};
    struct step_result result;
    struct plan_pair saves[N_BLOCKS], loads[N_BLOCKS];
    int32_t known[160];
    uint32_t slot = 8;
    run_plain(p, &s, 1, &plain);
    struct plan_open open = open_on(slot, p, &s);
    run(&t, (struct step_plan){.n_opens = 1, .opens = &open}, slot, open.n_tokens, 0, K);
    draft_until(&t, slot, 8, K);
    for (uint32_t i = 0; i < N_BLOCKS; i++) {
        saves[i] = (struct plan_pair){(uint32_t)blocks_of(8)[i], i};
        loads[i] = (struct plan_pair){i, (uint32_t)blocks_of(10)[i]};
    }
    step((struct step_plan){.n_closes = 1, .closes = &slot, .n_saves = N_BLOCKS, .saves = saves},
         &result);
    run_drafted(&golden.prompts[1], &s, 8, 0, 2, &other);
    memcpy(known, p->ids, (size_t)p->n_ids * sizeof *known);
    memcpy(known + p->n_ids, t.tokens, t.n * sizeof *known);
    open = open_on(10, p, &s);
    open.tokens = known;
    open.n_tokens = (uint32_t)p->n_ids + t.n;
    open.n_computed = open.n_tokens - 1;
    t.n_fed = 0;
    run(&t, (struct step_plan){.n_loads = N_BLOCKS, .loads = loads, .n_opens = 1, .opens = &open},
        10, 1, K, 1);
    run(&t, (struct step_plan){0}, 10, 1, 1, K);
    assert_true(t.n_fed <= BLOCK + K); /* and not the prompt again */
    draft_until(&t, 10, N_NEW, K);
    assert_int_equal(t.n_accepted, t.n_proposed);
    same(&plain, &t);
    close_slot(10);
}

/* A fork whose last block is copied; both go on with drafts. */
static void a_fork_is_kept(void)
{
    const struct golden_prompt *p = &golden.prompts[2];
    struct sampling_params s = params(0.9f, 3);
    struct trace plain, parent = {0}, child;
    int32_t blocks[N_BLOCKS];
    run_plain(p, &s, 1, &plain);
    struct plan_open open = open_on(6, p, &s);
    run(&parent, (struct step_plan){.n_opens = 1, .opens = &open}, 6, open.n_tokens, 0, K);
    draft_until(&parent, 6, 10, K);
    child = parent;
    uint32_t n = open.n_tokens + parent.n, full = (n - 1) / BLOCK;
    memcpy(blocks, blocks_of(7), sizeof blocks);
    memcpy(blocks, blocks_of(6), full * sizeof *blocks);
    struct plan_pair copy = {(uint32_t)blocks_of(6)[full], (uint32_t)blocks[full]};
    struct plan_fork fork = {.from = 6,
                             .to = 7,
                             .n_tokens = n - 1,
                             .n_computed = n - 1,
                             .n_append = 1,
                             .append = &parent.tokens[parent.n - 1],
                             .n_blocks = N_BLOCKS,
                             .blocks = blocks};
    run(&child, (struct step_plan){.n_copies = 1, .copies = &copy, .n_forks = 1, .forks = &fork}, 7,
        1, K, K);
    draft_until(&child, 7, N_NEW, K);
    draft_until(&parent, 6, N_NEW, K);
    assert_int_equal(child.n_accepted, child.n_proposed);
    assert_int_equal(parent.n_accepted, parent.n_proposed);
    same(&plain, &child);
    same(&plain, &parent);
    close_slot(6);
    close_slot(7);
}

/* Many at once, with different lengths, beside one that does not draft. */
static void neighbours_are_kept(void)
{
    enum { N = 6 };
    struct trace plain[N], t[N] = {{0}};
    struct plan_open opens[N];
    struct plan_run runs[N];
    struct step_result result;
    for (uint32_t i = 0; i < N; i++) {
        struct sampling_params s = params(0.2f * (float)i, i);
        const struct golden_prompt *p = &golden.prompts[i % 3];
        run_plain(p, &s, i, &plain[i]);
        opens[i] = open_on(i, p, &s);
        runs[i] = (struct plan_run){.slot = i,
                                    .n_tokens = opens[i].n_tokens,
                                    .flags = PLAN_RUN_SAMPLE,
                                    .n_ahead = i % (K + 1)};
    }
    struct step_plan plan = {.n_opens = N, .opens = opens, .n_runs = N, .runs = runs};
    for (; plan.n_runs; plan.n_opens = 0) {
        step(plan, &result);
        plan.n_runs = 0;
        for (uint32_t i = 0; i < N; i++) {
            if (t[i].n >= N_NEW) continue;
            hear(&t[i], &result, i);
            if (t[i].n >= N_NEW) continue;
            runs[plan.n_runs++] = (struct plan_run){.slot = i,
                                                    .n_tokens = 1,
                                                    .flags = PLAN_RUN_SAMPLE,
                                                    .n_own = i % (K + 1),
                                                    .n_ahead = i % (K + 1)};
        }
    }
    for (uint32_t i = 0; i < N; i++) {
        assert_int_equal(t[i].n_accepted, t[i].n_proposed);
        assert_int_equal(t[i].n_proposed > 0, i % (K + 1) > 0);
        same(&plain[i], &t[i]);
        close_slot(i);
    }
}

static void test_a_model_keeps_its_own_drafts(void **state)
{
    (void)state;
    static const char *const models[] = {"llama", "gpt2_bf16", "mistral", "qwen2_window"};
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        start(models[i], models[i], 1);
        every_length_is_kept(0);
        every_length_is_kept(1);
        every_order_is_kept();
        lists_and_own_drafts_mix();
        a_shared_prefix_is_kept(true);
        a_shared_prefix_is_kept(false);
        a_swap_is_kept();
        a_fork_is_kept();
        neighbours_are_kept();
        stop();
    }
}

/* --- others --- */

static void other_draft(const char *model, const char *draft, int size, bool sharded)
{
    struct trace plain, drafted;
    uint32_t n_accepted = 0, n_proposed = 0;
    start(model, draft, size);
    assert_int_equal(ranks.workers[0]->draft->sharded, sharded);
    for (uint32_t seed = 0; seed < 6; seed++) {
        struct sampling_params s = params(seed ? 0.3f * (float)seed : 0, seed);
        const struct golden_prompt *p = &golden.prompts[seed % 3];
        run_plain(p, &s, 1, &plain);
        run_drafted(p, &s, 2, 0, 1 + seed % K, &drafted);
        same(&plain, &drafted);
        n_accepted += drafted.n_accepted, n_proposed += drafted.n_proposed;
    }
    assert_true(n_proposed > 0 && n_accepted <= n_proposed);
    if (!strcmp(model, draft)) assert_int_equal(n_accepted, n_proposed);
    stop();
}

static void test_no_draft_model_changes_a_token(void **state)
{
    (void)state;
    other_draft("llama", "qwen2", 1, false);
    other_draft("llama_bf16", "opt", 1, false); /* fewer positions, none of them rotated */
    other_draft("llama", "llama_bf16", 2, true);
    other_draft("qwen3", "qwen3", 2, true);
    other_draft("opt", "opt", 3, true);
}

/* Four heads on five ranks: the draft model is whole on each, and rank 0's drafts count even where
 * the others' differ. */
static void test_ranks_agree_on_whole_drafts(void **state)
{
    (void)state;
    struct trace plain, drafted;
    struct sampling_params s = params(0, 1);
    start("opt", "llama", 5);
    assert_false(ranks.workers[4]->draft->sharded);
    run_plain(&golden.prompts[0], &s, 1, &plain);
    for (int r = 1; r < 5; r++)
        ranks.workers[r]->draft->model->final_norm.epsilon = 1e6f; /* their drafts are nonsense */
    run_drafted(&golden.prompts[0], &s, 2, 0, K, &drafted);
    same(&plain, &drafted);
    stop();
}

/* --- limits --- */

static void test_a_draft_model_that_does_not_fit_is_refused(void **state)
{
    (void)state;
    struct worker_config c = config_of("llama", "qwen3"); /* 512 and 384 tokens */
    struct worker *w;
    struct worker_info info;
    assert_int_equal(worker_create(&c, &w), ERR_INVALID);
    assert_non_null(strstr(err_detail(), "qwen3"));
    assert_non_null(strstr(err_detail(), "golden/llama "));
    assert_non_null(strstr(err_detail(), "512"));
    assert_non_null(strstr(err_detail(), "384"));
    golden_close(&golden);
    c = config_of("llama", "qwen2");
    c.draft_tokens_max = 0;
    assert_int_equal(worker_plan_memory(&c, &info), ERR_INVALID);
    c.draft_tokens_max = K;
    c.draft_model_dir = "/nowhere/at/all";
    assert_int_not_equal(worker_plan_memory(&c, &info), OK);
    assert_non_null(strstr(err_detail(), "/nowhere/at/all"));
    golden_close(&golden);
}

static void test_memory_counts_both(void **state)
{
    (void)state;
    struct worker_config c = config_of("llama", "qwen2");
    struct worker_info alone, both;
    c.rank = 0, c.size = 1;
    die(worker_plan_memory(&c, &both));
    c.draft_model_dir = NULL;
    die(worker_plan_memory(&c, &alone));
    assert_int_equal(both.block_bytes, alone.block_bytes + both.draft_block_bytes);
    assert_true(both.n_blocks < alone.n_blocks);
    assert_true(both.draft_weight_bytes > 0 && both.draft_work_bytes > 0);
    assert_string_equal(both.draft_name, "qwen2");
    assert_string_equal(alone.draft_name, "");
    golden_close(&golden);
}

static void test_steps_with_drafts_allocate_nothing(void **state)
{
    (void)state;
    struct sampling_params s = params(0.7f, 2);
    struct plan_run r = {.flags = PLAN_RUN_SAMPLE, .n_ahead = K};
    struct buf plan_bytes, result_bytes;
    int64_t made = 0;
    start("llama", "qwen2", 1);
    struct plan_open open = open_on(0, &golden.prompts[0], &s);
    buf_init(&plan_bytes, 0);
    buf_init(&result_bytes, 0);
    die(buf_reserve(&plan_bytes, 1 << 16));
    die(buf_reserve(&result_bytes, 1 << 16));
    r.n_tokens = open.n_tokens;
    for (uint64_t i = 1; i <= 12; i++) {
        struct step_plan plan = {.epoch = ranks.epoch,
                                 .step = i,
                                 .n_opens = i == 1,
                                 .opens = &open,
                                 .n_runs = 1,
                                 .runs = &r};
        buf_clear(&plan_bytes);
        buf_clear(&result_bytes);
        die(plan_encode(&plan, &plan_bytes));
        int64_t before = mem_made();
        die(worker_step(ranks.workers[0], plan_bytes.data, plan_bytes.n, &result_bytes));
        if (i > 1) made += mem_made() - before;
        r.n_tokens = 1, r.n_own = K;
    }
    assert_int_equal(made, 0);
    buf_fini(&plan_bytes);
    buf_fini(&result_bytes);
    stop();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_a_model_keeps_its_own_drafts),
        cmocka_unit_test(test_no_draft_model_changes_a_token),
        cmocka_unit_test(test_ranks_agree_on_whole_drafts),
        cmocka_unit_test(test_a_draft_model_that_does_not_fit_is_refused),
        cmocka_unit_test(test_memory_counts_both),
        cmocka_unit_test(test_steps_with_drafts_allocate_nothing),
    };
    log_set_level(LOG_WARN);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
