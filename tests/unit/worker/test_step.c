/* Goal: what a sequence generates depends on itself alone, not on chunks, neighbours, cached
 * prefixes, drafts, forks, swaps or a fresh start from its known tokens (bitwise); a step allocates
 * nothing, and the memory of the blocks behind those in use is found beside it.
 * Method: the same sequence is run in the plainest way and in each of the others on a tiny
 * checkpoint; tokens, logprobs and the eight best must be equal bit by bit. */
#include "base/clock.h"
#include "base/log.h"
#include "golden.h"
#include "kernels/cpu/cpu.h"
#include "ranks.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/mman.h>

#include <cmocka.h>

enum { BLOCK = 16, N_NEW = 24, TOPS = 8 };

struct trace {
    int n;
    int32_t tokens[64];
    float logprobs[64];
    int32_t tops[64][TOPS];
    float top_logprobs[64][TOPS];
};

static struct golden golden;
static struct ranks ranks;

static void die(enum err e)
{
    if (e) fail_msg("%s: %s", err_name(e), err_detail());
}

static struct worker_config config_small(const struct golden *g)
{
    struct worker_config c;
    worker_config_default(&c);
    c.model_dir = g->dir;
    c.device = "cpu";
    c.isa = getenv("HEDDLE_TEST_ISA");
    c.n_threads = 1;
    c.n_sequences_max = 12;
    c.step_tokens_max = 192;
    c.step_rows_max = 5; /* so that rows are split */
    c.draft_tokens_max = 4;
    c.block_size = BLOCK;
    c.kv_cache_bytes = 8 << 20;
    c.host_swap_bytes = 1 << 20;
    c.collective_timeout_ms = 20000;
    return c;
}

static void start(const char *model, int size)
{
    golden_open(model, &golden);
    struct worker_config c = config_small(&golden);
    die(ranks_create(&ranks, &c, size));
}

static void stop(void)
{
    ranks_destroy(&ranks);
    golden_close(&golden);
}

static const struct golden_prompt *long_prompt(void)
{
    return &golden.prompts[golden.n_prompts - 1];
}

static struct sampling_params sampled(void)
{
    struct sampling_params p;
    sampling_params_default(&p);
    p.temperature = 0.9f;
    p.top_k = 40;
    p.top_p = 0.95f;
    p.seed = 7777;
    p.n_logprobs = TOPS;
    p.n_prompt_logprobs = -1;
    return p;
}

static struct plan_open open_on(uint32_t slot, const struct golden_prompt *p, const int32_t *blocks,
                                const struct sampling_params *sampling)
{
    return (struct plan_open){.slot = slot,
                              .n_prompt = (uint32_t)p->n_ids,
                              .n_tokens_max = 160,
                              .n_tokens = (uint32_t)p->n_ids,
                              .n_blocks = 10,
                              .tokens = p->ids,
                              .blocks = blocks,
                              .sampling = *sampling};
}

/* Ten blocks of their own for each slot. */
static const int32_t *blocks_of(uint32_t slot)
{
    static int32_t blocks[16][10];
    for (int i = 0; i < 10; i++)
        blocks[slot][i] = (int32_t)slot * 10 + 9 - i;
    return blocks[slot];
}

static void step(struct step_plan plan, struct step_result *out)
{
    die(ranks_step(&ranks, &plan, out));
}

static void close_slots(const uint32_t *slots, uint32_t n)
{
    struct step_result result;
    step((struct step_plan){.n_closes = n, .closes = (uint32_t *)(uintptr_t)slots}, &result);
    assert_int_equal(result.n_tokens, 0);
}

static void trace_add(struct trace *t, const struct step_result *result, uint32_t slot)
{
    for (uint32_t i = 0; i < result->n_tokens; i++) {
        const struct step_token *from = &result->tokens[i];
        if (from->slot != slot || from->flags) continue;
        assert_true(t->n < 64);
        assert_true(from->has_logprob);
        assert_int_equal(from->n_top, TOPS);
        t->tokens[t->n] = from->token;
        t->logprobs[t->n] = from->logprob;
        memcpy(t->tops[t->n], from->top_tokens, sizeof t->tops[0]);
        memcpy(t->top_logprobs[t->n], from->top_logprobs, sizeof t->top_logprobs[0]);
        t->n++;
    }
}

static void decode(struct trace *t, uint32_t slot, int until)
{
    struct step_result result;
    while (t->n < until) {
        step((struct step_plan){0}, &result);
        trace_add(t, &result, slot);
    }
}

/* Prefill in chunks of the given size (0 = whole), then one token a step. */
static void run_plain(const struct golden_prompt *p, const struct sampling_params *s, uint32_t slot,
                      uint32_t chunk, struct trace *out)
{
    struct plan_open open = open_on(slot, p, blocks_of(slot), s);
    struct step_result result;
    uint32_t n = (uint32_t)p->n_ids, done = 0;
    memset(out, 0, sizeof *out);
    while (done < n) {
        uint32_t m = chunk && n - done > chunk ? chunk : n - done;
        struct plan_run run = {.slot = slot,
                               .n_tokens = m,
                               .flags = done + m == n ? PLAN_RUN_SAMPLE | PLAN_RUN_STAY : 0};
        step((struct step_plan){.n_opens = !done, .opens = &open, .n_runs = 1, .runs = &run},
             &result);
        assert_int_equal(result.n_tokens, done + m == n);
        done += m;
    }
    trace_add(out, &result, slot);
    decode(out, slot, N_NEW);
    close_slots(&slot, 1);
}

static void expect_same(const struct trace *a, const struct trace *b, int n)
{
    assert_true(a->n >= n && b->n >= n);
    for (int i = 0; i < n; i++) {
        if (a->tokens[i] != b->tokens[i])
            fail_msg("token %d: %d and %d", i, a->tokens[i], b->tokens[i]);
        assert_memory_equal(&a->logprobs[i], &b->logprobs[i], sizeof(float));
        assert_memory_equal(a->tops[i], b->tops[i], sizeof a->tops[i]);
        assert_memory_equal(a->top_logprobs[i], b->top_logprobs[i], sizeof a->top_logprobs[i]);
    }
}

/* --- the ways to run a sequence --- */

static void chunks_change_nothing(void)
{
    struct sampling_params s = sampled();
    struct trace whole, chunked;
    run_plain(long_prompt(), &s, 3, 0, &whole);
    static const uint32_t sizes[] = {1, 7, 16, 33, 64};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        run_plain(long_prompt(), &s, 5, sizes[i], &chunked);
        expect_same(&whole, &chunked, N_NEW);
    }
}

static void neighbours_change_nothing(void)
{
    struct sampling_params s = sampled();
    struct trace alone, crowded = {0};
    struct plan_open opens[11];
    struct plan_run runs[11];
    struct step_result result;
    uint32_t slots[11];
    run_plain(&golden.prompts[2], &s, 0, 0, &alone);
    for (uint32_t i = 0; i < 11; i++) {
        const struct golden_prompt *p = i == 6 ? &golden.prompts[2] : &golden.prompts[i % 2];
        struct sampling_params other = s;
        if (i != 6) other.seed = i, other.temperature = 0.1f * (float)i;
        opens[i] = open_on(i, p, blocks_of(i), &other);
        runs[i] = (struct plan_run){
            .slot = i, .n_tokens = (uint32_t)p->n_ids, .flags = PLAN_RUN_SAMPLE | PLAN_RUN_STAY};
        slots[i] = i;
    }
    step((struct step_plan){.n_opens = 11, .opens = opens, .n_runs = 11, .runs = runs}, &result);
    assert_int_equal(result.n_tokens, 11);
    trace_add(&crowded, &result, 6);
    decode(&crowded, 6, N_NEW);
    expect_same(&alone, &crowded, N_NEW);
    close_slots(slots, 11);
}

/* A second sequence with the first one's leading blocks: their tokens are computed already. */
static void cached_prefix_changes_nothing(void)
{
    struct sampling_params s = sampled();
    const struct golden_prompt *p = long_prompt();
    struct trace plain, cached = {0};
    struct step_result result;
    uint32_t n_cached = 4 * BLOCK, slots[] = {1, 2};
    run_plain(p, &s, 0, 0, &plain);
    struct plan_open first = open_on(1, p, blocks_of(1), &s), second = open_on(2, p, NULL, &s);
    struct plan_run run = {.slot = 1, .n_tokens = (uint32_t)p->n_ids, .flags = PLAN_RUN_SAMPLE};
    step((struct step_plan){.n_opens = 1, .opens = &first, .n_runs = 1, .runs = &run}, &result);
    int32_t shared[10];
    memcpy(shared, blocks_of(2), sizeof shared);
    memcpy(shared, blocks_of(1), 4 * sizeof *shared);
    second.blocks = shared;
    second.n_computed = n_cached;
    run = (struct plan_run){.slot = 2,
                            .n_tokens = (uint32_t)p->n_ids - n_cached,
                            .flags = PLAN_RUN_SAMPLE | PLAN_RUN_STAY};
    step((struct step_plan){.n_opens = 1, .opens = &second, .n_runs = 1, .runs = &run}, &result);
    trace_add(&cached, &result, 2);
    decode(&cached, 2, N_NEW);
    expect_same(&plain, &cached, N_NEW);
    close_slots(slots, 2);
}

/* Half way its slot is closed; it goes on elsewhere from prompt + tokens so far. */
static void fresh_start_changes_nothing(void)
{
    struct sampling_params s = sampled();
    const struct golden_prompt *p = &golden.prompts[2];
    struct trace plain, resumed = {0};
    struct step_result result;
    int32_t known[128];
    uint32_t slot = 9;
    int half = N_NEW / 2;
    run_plain(p, &s, 0, 0, &plain);
    memcpy(known, p->ids, (size_t)p->n_ids * sizeof *known);
    memcpy(known + p->n_ids, plain.tokens, (size_t)half * sizeof *known);
    struct plan_open open = open_on(slot, p, blocks_of(slot), &s);
    open.tokens = known;
    open.n_tokens = (uint32_t)(p->n_ids + half);
    struct plan_run run = {
        .slot = slot, .n_tokens = open.n_tokens, .flags = PLAN_RUN_SAMPLE | PLAN_RUN_STAY};
    step((struct step_plan){.n_opens = 1, .opens = &open, .n_runs = 1, .runs = &run}, &result);
    resumed = plain;
    resumed.n = half;
    trace_add(&resumed, &result, slot);
    decode(&resumed, slot, N_NEW);
    expect_same(&plain, &resumed, N_NEW);
    close_slots(&slot, 1);
}

/* Drafts, right, wrong and half right, verified several at a time. */
static void drafts_change_nothing(void)
{
    struct sampling_params s = sampled();
    const struct golden_prompt *p = &golden.prompts[1];
    struct trace plain, drafted = {0};
    struct step_result result;
    uint32_t slot = 4;
    s.repetition_penalty = 1.2f; /* reads the drafts before each place */
    run_plain(p, &s, 0, 0, &plain);
    struct plan_open open = open_on(slot, p, blocks_of(slot), &s);
    struct plan_run run = {.slot = slot, .n_tokens = (uint32_t)p->n_ids, .flags = PLAN_RUN_SAMPLE};
    step((struct step_plan){.n_opens = 1, .opens = &open, .n_runs = 1, .runs = &run}, &result);
    trace_add(&drafted, &result, slot);
    for (int turn = 0; drafted.n + 5 <= N_NEW; turn++) {
        int32_t drafts[4];
        int right = turn % 5, before = drafted.n; /* how many of the four are right */
        for (int i = 0; i < 4; i++)
            drafts[i] = i < right ? plain.tokens[drafted.n + i]
                                  : (plain.tokens[drafted.n + i] + 1) % golden.vocab_size;
        run = (struct plan_run){
            .slot = slot, .n_tokens = 5, .flags = PLAN_RUN_SAMPLE, .n_drafts = 4, .drafts = drafts};
        step((struct step_plan){.n_runs = 1, .runs = &run}, &result);
        trace_add(&drafted, &result, slot);
        assert_int_equal(drafted.n, before + right + 1);
    }
    /* and on as usual afterwards */
    while (drafted.n < N_NEW) {
        run = (struct plan_run){.slot = slot, .n_tokens = 1, .flags = PLAN_RUN_SAMPLE};
        step((struct step_plan){.n_runs = 1, .runs = &run}, &result);
        trace_add(&drafted, &result, slot);
    }
    expect_same(&plain, &drafted, N_NEW);
    close_slots(&slot, 1);
}

/* A fork after ten tokens, its last block copied: parent and child go on alike. */
static void forks_change_nothing(void)
{
    struct sampling_params s = sampled();
    const struct golden_prompt *p = &golden.prompts[2];
    struct trace plain, parent = {0}, child = {0};
    struct step_result result;
    uint32_t slots[] = {6, 7};
    run_plain(p, &s, 0, 0, &plain);
    struct plan_open open = open_on(6, p, blocks_of(6), &s);
    struct plan_run run = {
        .slot = 6, .n_tokens = (uint32_t)p->n_ids, .flags = PLAN_RUN_SAMPLE | PLAN_RUN_STAY};
    step((struct step_plan){.n_opens = 1, .opens = &open, .n_runs = 1, .runs = &run}, &result);
    trace_add(&parent, &result, 6);
    decode(&parent, 6, 10);
    child = parent;
    uint32_t n = (uint32_t)p->n_ids + 10, full = (n - 1) / BLOCK;
    int32_t blocks[10], last = parent.tokens[9];
    memcpy(blocks, blocks_of(7), sizeof blocks);
    memcpy(blocks, blocks_of(6), full * sizeof *blocks);
    struct plan_pair copy = {(uint32_t)blocks_of(6)[full], (uint32_t)blocks[full]};
    struct plan_fork fork = {.from = 6,
                             .to = 7,
                             .n_tokens = n - 1,
                             .n_computed = n - 1,
                             .n_append = 1,
                             .append = &last,
                             .n_blocks = 10,
                             .blocks = blocks};
    run = (struct plan_run){.slot = 7, .n_tokens = 1, .flags = PLAN_RUN_SAMPLE | PLAN_RUN_STAY};
    step((struct step_plan){.n_copies = 1,
                            .copies = &copy,
                            .n_forks = 1,
                            .forks = &fork,
                            .n_runs = 1,
                            .runs = &run},
         &result);
    assert_int_equal(result.n_tokens, 2);
    trace_add(&parent, &result, 6);
    trace_add(&child, &result, 7);
    while (parent.n < N_NEW) {
        step((struct step_plan){0}, &result);
        trace_add(&parent, &result, 6);
        trace_add(&child, &result, 7);
    }
    expect_same(&plain, &parent, N_NEW);
    expect_same(&plain, &child, N_NEW);
    close_slots(slots, 2);
}

/* Blocks leave for host memory, are overwritten, come back elsewhere. */
static void swaps_change_nothing(void)
{
    struct sampling_params s = sampled();
    const struct golden_prompt *p = &golden.prompts[2];
    struct trace plain, swapped = {0};
    struct step_result result;
    struct plan_pair saves[10], loads[10];
    int32_t known[128];
    uint32_t slot = 8;
    run_plain(p, &s, 0, 0, &plain);
    struct plan_open open = open_on(slot, p, blocks_of(slot), &s);
    struct plan_run run = {
        .slot = slot, .n_tokens = (uint32_t)p->n_ids, .flags = PLAN_RUN_SAMPLE | PLAN_RUN_STAY};
    step((struct step_plan){.n_opens = 1, .opens = &open, .n_runs = 1, .runs = &run}, &result);
    trace_add(&swapped, &result, slot);
    decode(&swapped, slot, 8);
    for (uint32_t i = 0; i < 10; i++) {
        saves[i] = (struct plan_pair){(uint32_t)blocks_of(slot)[i], i};
        loads[i] = (struct plan_pair){i, (uint32_t)blocks_of(10)[i]};
    }
    step((struct step_plan){.n_closes = 1, .closes = &slot, .n_saves = 10, .saves = saves},
         &result);
    struct trace scratch;
    run_plain(long_prompt(), &s, slot, 0, &scratch); /* overwrites the blocks */
    memcpy(known, p->ids, (size_t)p->n_ids * sizeof *known);
    memcpy(known + p->n_ids, swapped.tokens, 8 * sizeof *known);
    open = open_on(10, p, blocks_of(10), &s);
    open.tokens = known;
    open.n_tokens = (uint32_t)p->n_ids + 8;
    open.n_computed = open.n_tokens - 1;
    run = (struct plan_run){.slot = 10, .n_tokens = 1, .flags = PLAN_RUN_SAMPLE | PLAN_RUN_STAY};
    step(
        (struct step_plan){
            .n_loads = 10, .loads = loads, .n_opens = 1, .opens = &open, .n_runs = 1, .runs = &run},
        &result);
    trace_add(&swapped, &result, 10);
    decode(&swapped, 10, N_NEW);
    expect_same(&plain, &swapped, N_NEW);
    slot = 10;
    close_slots(&slot, 1);
}

/* Two sequences, one paused, then both: the pause is not felt. */
static void pauses_change_nothing(void)
{
    struct sampling_params s = sampled();
    const struct golden_prompt *p = &golden.prompts[1];
    struct trace plain, paused = {0};
    struct step_result result;
    uint32_t slot = 2;
    run_plain(p, &s, 0, 0, &plain);
    struct plan_open open = open_on(slot, p, blocks_of(slot), &s);
    struct plan_run run = {
        .slot = slot, .n_tokens = (uint32_t)p->n_ids, .flags = PLAN_RUN_SAMPLE | PLAN_RUN_STAY};
    step((struct step_plan){.n_opens = 1, .opens = &open, .n_runs = 1, .runs = &run}, &result);
    trace_add(&paused, &result, slot);
    step((struct step_plan){.idle = true}, &result);
    assert_int_equal(result.n_tokens, 0);
    decode(&paused, slot, 5);
    step((struct step_plan){.n_pauses = 1, .pauses = &slot}, &result);
    assert_int_equal(result.n_tokens, 0);
    step((struct step_plan){0}, &result);
    assert_int_equal(result.n_tokens, 0);
    run = (struct plan_run){.slot = slot, .n_tokens = 1, .flags = PLAN_RUN_SAMPLE | PLAN_RUN_STAY};
    step((struct step_plan){.n_runs = 1, .runs = &run}, &result);
    trace_add(&paused, &result, slot);
    decode(&paused, slot, N_NEW);
    expect_same(&plain, &paused, N_NEW);
    close_slots(&slot, 1);
}

static void test_same_sequence_same_tokens(void **state)
{
    (void)state;
    static const char *const models[] = {"llama", "llama_bf16", "mistral", "gpt2_bf16", "qwen3"};
    for (size_t i = 0; i < sizeof models / sizeof *models; i++) {
        start(models[i], 1);
        chunks_change_nothing();
        neighbours_change_nothing();
        cached_prefix_changes_nothing();
        fresh_start_changes_nothing();
        drafts_change_nothing();
        forks_change_nothing();
        swaps_change_nothing();
        pauses_change_nothing();
        stop();
    }
}

static void test_same_on_two_ranks(void **state)
{
    (void)state;
    start("qwen2_heads14", 2);
    chunks_change_nothing();
    neighbours_change_nothing();
    drafts_change_nothing();
    forks_change_nothing();
    stop();
}

static void test_formats_keep_the_law(void **state)
{
    (void)state;
    static const char *const formats[] = {"int8", "int4"};
    for (int i = 0; i < 2; i++) {
        golden_open("llama_bf16", &golden);
        struct worker_config c = config_small(&golden);
        c.quantization = formats[i];
        c.kv_dtype = "int8";
        die(ranks_create(&ranks, &c, 1));
        chunks_change_nothing();
        neighbours_change_nothing();
        cached_prefix_changes_nothing();
        stop();
    }
}

/* --- parameters --- */

static double log_softmax(const float *logits, int n, int which)
{
    double most = logits[0], sum = 0;
    for (int i = 1; i < n; i++)
        most = fmax(most, logits[i]);
    for (int i = 0; i < n; i++)
        sum += exp(logits[i] - most);
    return logits[which] - most - log(sum);
}

static void test_prompt_logprobs(void **state)
{
    (void)state;
    start("llama3", 1);
    const struct golden_prompt *p = long_prompt();
    struct sampling_params s;
    struct step_result result;
    sampling_params_default(&s);
    s.temperature = 0;
    s.n_logprobs = -1;
    s.n_prompt_logprobs = 3;
    static const uint32_t chunks[] = {90, 40};
    for (int c = 0; c < 2; c++) {
        struct plan_open open = open_on(1, p, blocks_of(1), &s);
        float got[128];
        uint32_t n = (uint32_t)p->n_ids, slot = 1, next = 1;
        for (uint32_t done = 0; done < n;) {
            uint32_t m = n - done < chunks[c] ? n - done : chunks[c];
            struct plan_run run = {
                .slot = 1, .n_tokens = m, .flags = done + m == n ? PLAN_RUN_SAMPLE : 0};
            step((struct step_plan){.n_opens = !done, .opens = &open, .n_runs = 1, .runs = &run},
                 &result);
            for (uint32_t i = 0; i < result.n_tokens; i++) {
                const struct step_token *t = &result.tokens[i];
                if (!(t->flags & STEP_TOKEN_SCORED)) continue;
                assert_int_equal(t->token, p->ids[next]);
                assert_true(t->has_logprob);
                assert_int_equal(t->n_top, 3);
                assert_true(t->top_logprobs[0] >= t->top_logprobs[1] &&
                            t->top_logprobs[1] >= t->top_logprobs[2]);
                got[next++] = t->logprob;
            }
            done += m;
        }
        assert_int_equal(next, n);
        assert_int_equal(result.tokens[result.n_tokens - 1].flags, 0);
        assert_int_equal(result.tokens[result.n_tokens - 1].token, p->greedy[0]);
        assert_false(result.tokens[result.n_tokens - 1].has_logprob);
        for (int i = 0; i + 1 < p->n_positions; i++) {
            int at = p->positions[i];
            double want = log_softmax(p->logits + (size_t)i * (size_t)golden.vocab_size,
                                      golden.vocab_size, p->ids[at + 1]);
            assert_true(fabs(got[at + 1] - want) < 1e-4);
        }
        close_slots(&slot, 1);
    }
    stop();
}

static int32_t first_token(const struct sampling_params *s)
{
    struct trace t;
    struct sampling_params with = *s;
    with.n_logprobs = TOPS;
    run_plain(&golden.prompts[1], &with, 1, 0, &t);
    return t.tokens[0];
}

static void test_bias_bans_and_penalties(void **state)
{
    (void)state;
    start("llama", 1);
    struct sampling_params s = sampled();
    s.temperature = 0;
    int32_t best = first_token(&s), other = (best + 11) % golden.vocab_size;
    assert_int_equal(best, golden.prompts[1].greedy[0]);
    float up = 100, down = -100;
    s.n_bias = 1, s.bias_tokens = &other, s.bias_values = &up;
    assert_int_equal(first_token(&s), other);
    s.bias_tokens = &best, s.bias_values = &down;
    assert_int_not_equal(first_token(&s), best);
    s.n_bias = 0;
    s.n_stop_ids = 1, s.stop_ids = &best, s.min_tokens = 1;
    assert_int_not_equal(first_token(&s), best);
    s.min_tokens = 0;
    assert_int_equal(first_token(&s), best);
    /* a strong presence penalty: no token comes twice */
    struct trace t;
    s.n_stop_ids = 0;
    s.presence_penalty = 1000;
    run_plain(&golden.prompts[1], &s, 1, 0, &t);
    for (int i = 0; i < t.n; i++)
        for (int j = 0; j < i; j++)
            assert_int_not_equal(t.tokens[i], t.tokens[j]);
    stop();
}

/* --- no allocation --- */

static void test_steps_allocate_nothing(void **state)
{
    (void)state;
    start("llama_bf16", 1);
    struct sampling_params s = sampled();
    struct plan_open opens[4];
    struct plan_run runs[4];
    struct buf plan_bytes, result_bytes;
    buf_init(&plan_bytes, 0);
    buf_init(&result_bytes, 0);
    die(buf_reserve(&plan_bytes, 1 << 16));
    die(buf_reserve(&result_bytes, 1 << 16));
    for (uint32_t i = 0; i < 4; i++) {
        opens[i] = open_on(i, &golden.prompts[i % 3], blocks_of(i), &s);
        runs[i] = (struct plan_run){
            .slot = i, .n_tokens = opens[i].n_tokens, .flags = PLAN_RUN_SAMPLE | PLAN_RUN_STAY};
    }
    struct step_plan first = {
        .epoch = ranks.epoch, .step = 1, .n_opens = 4, .opens = opens, .n_runs = 4, .runs = runs};
    struct step_plan plain = {.epoch = ranks.epoch};
    int64_t made = 0;
    for (uint64_t i = 1; i <= 20; i++) {
        plain.step = i;
        buf_clear(&plan_bytes);
        buf_clear(&result_bytes);
        die(plan_encode(i == 1 ? &first : &plain, &plan_bytes));
        int64_t before = mem_made();
        die(worker_step(ranks.workers[0], plan_bytes.data, plan_bytes.n, &result_bytes));
        if (i > 1) made += mem_made() - before;
        assert_true(result_bytes.n > 0);
    }
    assert_int_equal(made, 0);
    buf_fini(&plan_bytes);
    buf_fini(&result_bytes);
    stop();
}

/* Whether the K of layer 0, head 0 of a block has its page. */
static bool is_resident(const struct worker *w, int32_t block)
{
    unsigned char page;
    uintptr_t at = (uintptr_t)kv_head(w->decoder.kv, 0, block, 0);
    assert_int_equal(mincore((void *)(at & ~(uintptr_t)4095), 1, &page), 0);
    return page & 1;
}

static void test_memory_is_found_beside_steps(void **state)
{
    (void)state;
    if (madvise(NULL, 0, 23)) skip(); /* MADV_POPULATE_WRITE: Linux 5.14 */
    golden_open("llama_bf16", &golden);
    struct worker_config c = config_small(&golden);
    c.kv_cache_bytes = 256 << 20; /* of which little is touched */
    die(ranks_create(&ranks, &c, 1));
    const struct worker *w = ranks.workers[0];
    const struct kv_cache *kv = w->decoder.kv;
    struct sampling_params s = sampled();
    int32_t first = (int32_t)((8 << 20) / kv->half_bytes), blocks[10]; /* 8 MiB into every K and V */
    assert_true(first + 100 < kv->args.n_blocks);
    for (int i = 0; i < 10; i++)
        blocks[i] = first + i;
    struct plan_open open = open_on(0, long_prompt(), blocks, &s);
    struct plan_run run = {.n_tokens = open.n_tokens, .flags = PLAN_RUN_SAMPLE};
    struct step_result result;
    assert_false(is_resident(w, first / 2));
    step((struct step_plan){.n_opens = 1, .opens = &open, .n_runs = 1, .runs = &run}, &result);
    int64_t end = clock_monotonic_us() + 20000000;
    while (!(is_resident(w, first / 2) && is_resident(w, first + 30)) && clock_monotonic_us() < end)
        clock_sleep_us(1000);
    assert_true(is_resident(w, first / 2) && is_resident(w, first + 30));
    stop();
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_same_sequence_same_tokens),
        cmocka_unit_test(test_same_on_two_ranks),
        cmocka_unit_test(test_formats_keep_the_law),
        cmocka_unit_test(test_prompt_logprobs),
        cmocka_unit_test(test_bias_bans_and_penalties),
        cmocka_unit_test(test_steps_allocate_nothing),
        cmocka_unit_test(test_memory_is_found_beside_steps),
    };
    log_set_level(LOG_WARN);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
