/* What a step costs the coordinator.
 *
 * decode: 10,000 running sequences of mixed lengths where nothing changes but decode: the time of
 * one engine_step (schedule, build, encode, send), the bytes of its plan, the time of its result.
 * admit: a prompt of 100,000 tokens against a cache of a million blocks, of which it finds all.
 *
 * Rows of CSV: name, n, mean, p50, p99, unit, bar. */
#include "base/mem.h"
#include "base/rand.h"
#include "coordinator/engine/engine.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { SLOTS = 10000, STEPS = 1000, VOCABULARY = 32000 };

struct rig {
    struct engine *engine;
    struct arena arena;
    struct buf plans[8]; /* sent in this turn */
    uint32_t n_sent;
    struct step_token *tokens;
    bool *decoding; /* [SLOTS] the decode set of the false worker */
    uint32_t n_plans;
    uint64_t n_emitted;
    struct sink sink;
    struct step_result results[8]; /* of plans sent and not answered, a ring */
    struct step_token *result_tokens[8];
    uint32_t first, n_results;
    size_t plan_bytes;
};

/* Of this thread alone: neighbours on the machine do not count. */
static int64_t cpu_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void check(enum err e)
{
    if (!e) return;
    fprintf(stderr, "bench: %s\n", err_detail());
    exit(1);
}

static void count_emission(struct sink *sink, const struct emission *news)
{
    struct rig *rig = (struct rig *)((char *)sink - offsetof(struct rig, sink));
    rig->n_emitted += news->n_tokens;
}

static void forget_request(struct request *r)
{
    mem_free(r->tokens);
    mem_free(r);
}

static enum err keep_plan(void *ctx, uint32_t group, const void *bytes, size_t n)
{
    struct rig *rig = ctx;
    (void)group;
    rig->plan_bytes = n;
    rig->n_plans++;
    return buf_add(&rig->plans[rig->n_sent++], bytes, n);
}

/* The false worker: who samples in the plan just sent. */
static void work(struct rig *rig, struct buf *plan)
{
    struct step_plan p;
    arena_reset(&rig->arena);
    check(plan_decode(plan->data, plan->n, &rig->arena, &p));
    uint32_t at = (rig->first + rig->n_results++) % 8, n = 0;
    struct step_token *tokens = rig->result_tokens[at];
    for (uint32_t i = 0; i < p.n_closes; i++)
        rig->decoding[p.closes[i]] = false;
    for (uint32_t i = 0; i < p.n_pauses; i++)
        rig->decoding[p.pauses[i]] = false;
    for (uint32_t slot = 0; slot < SLOTS; slot++)
        if (rig->decoding[slot]) tokens[n++] = (struct step_token){.slot = slot, .token = 7};
    for (uint32_t i = 0; i < p.n_runs; i++) {
        if (p.runs[i].flags & PLAN_RUN_SAMPLE)
            tokens[n++] = (struct step_token){.slot = p.runs[i].slot, .token = 7};
        rig->decoding[p.runs[i].slot] = p.runs[i].flags & PLAN_RUN_STAY;
    }
    rig->results[at] = (struct step_result){
        .epoch = p.epoch, .step = p.step, .n_tokens = n, .tokens = tokens, .compute_us = 1000};
    buf_clear(plan);
}

/* One turn of the pipeline: the oldest result, then the next plan. Times in ns. */
static void turn(struct rig *rig, int64_t *out_learn_ns, int64_t *out_step_ns)
{
    int64_t t0 = cpu_ns(), t1;
    if (rig->n_results) {
        check(engine_result(rig->engine, 0, &rig->results[rig->first], 1000));
        rig->first = (rig->first + 1) % 8;
        rig->n_results--;
    }
    t1 = cpu_ns();
    engine_step(rig->engine, 1000);
    *out_step_ns = cpu_ns() - t1;
    *out_learn_ns = t1 - t0;
    for (uint32_t i = 0; i < rig->n_sent; i++)
        work(rig, &rig->plans[i]);
    rig->n_sent = 0;
}

static void open_rig(struct rig *rig, uint32_t n_blocks, uint32_t n_slots, uint32_t n_step_tokens,
                     uint32_t depth)
{
    struct engine_config config = {
        .n_groups = 1, .prefix_cache = true, .pipeline_depth = depth, .hash_salt = 99};
    struct engine_hooks hooks = {.send_plan = keep_plan, .ctx = rig};
    struct group_info info = {.epoch = 1,
                              .n_ranks = 1,
                              .block_size = 16,
                              .n_blocks = n_blocks,
                              .n_slots_max = n_slots,
                              .step_tokens_max = n_step_tokens,
                              .step_rows_max = n_step_tokens,
                              .context_max = 1 << 20,
                              .vocab_size = VOCABULARY,
                              .block_bytes = 1 << 20};
    *rig = (struct rig){.sink = {.emit = count_emission}};
    arena_init(&rig->arena, 1 << 20, 0);
    check(MEM_NEW_ARRAY(SLOTS, &rig->decoding));
    for (int i = 0; i < 8; i++)
        check(MEM_NEW_ARRAY(SLOTS, &rig->result_tokens[i]));
    check(engine_create(&config, &hooks, &rig->engine));
    engine_group_up(rig->engine, 0, &info);
}

static void close_rig(struct rig *rig)
{
    engine_destroy(rig->engine);
    arena_fini(&rig->arena);
    mem_free(rig->decoding);
    for (int i = 0; i < 8; i++)
        buf_fini(&rig->plans[i]), mem_free(rig->result_tokens[i]);
}

static struct request *make_request(struct rig *rig, uint64_t id, uint32_t n_tokens,
                                    uint32_t n_output, uint64_t content)
{
    struct request *r;
    check(MEM_NEW(&r));
    *r = (struct request){.id = id,
                          .sink = &rig->sink,
                          .n_tokens = n_tokens,
                          .max_tokens = n_output,
                          .n_choices = 1,
                          .destroy = forget_request};
    sampling_params_default(&r->sampling);
    check(MEM_NEW_ARRAY(n_tokens, &r->tokens));
    struct rand dice = rand_seeded(content);
    for (uint32_t i = 0; i < n_tokens; i++)
        r->tokens[i] = (int32_t)(rand_next(&dice) % VOCABULARY);
    return r;
}

static int compare(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? -1 : x > y;
}

static void row(const char *name, int64_t *v, int n, const char *unit, const char *bar)
{
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += (double)v[i];
    qsort(v, (size_t)n, sizeof *v, compare);
    printf("%s,%d,%.1f,%lld,%lld,%s,%s\n", name, n, sum / n, (long long)v[n / 2],
           (long long)v[n * 99 / 100], unit, bar);
}

static void bench_decode(void)
{
    static struct rig rig;
    static int64_t step_ns[STEPS], learn_ns[STEPS], bytes[STEPS], per_ps[STEPS];
    int64_t learn, step;
    open_rig(&rig, 4000000, SLOTS, 1 << 20, 2);
    for (uint32_t i = 0; i < SLOTS; i++)
        check(engine_submit(rig.engine, make_request(&rig, i + 1, 20 + i % 61, 100000, i), 1));
    struct engine_stats s;
    do {
        turn(&rig, &learn, &step);
        engine_stats(rig.engine, &s);
    } while (s.n_running < SLOTS);
    for (int i = 0; i < 200; i++)
        turn(&rig, &learn, &step);
    int64_t made = mem_made();
    for (int i = 0; i < STEPS; i++) {
        turn(&rig, &learn_ns[i], &step_ns[i]);
        bytes[i] = (int64_t)rig.plan_bytes;
        per_ps[i] = step_ns[i] * 1000 / SLOTS;
    }
    row("plan_10000_decoding", step_ns, STEPS, "ns", "p99 <= 50000");
    row("plan_per_sequence", per_ps, STEPS, "ps", "mean <= 5000");
    row("plan_bytes_10000", bytes, STEPS, "bytes", "<= 40000");
    row("learn_10000", learn_ns, STEPS, "ns", "");
    printf("allocations_in_%d_steps,1,%lld,,,count,0\n", STEPS,
           (long long)(mem_made() - made));
    close_rig(&rig);
}

static void bench_admit(void)
{
    enum { PROMPT = 100000, FILL = 160, TRIES = 200 };
    static struct rig rig;
    static int64_t submit_ns[TRIES], step_ns[TRIES], both_ns[TRIES];
    int64_t learn, step;
    struct engine_stats s;
    open_rig(&rig, 1100000, 64, 1 << 20, 1);
    for (uint32_t i = 0; i < FILL; i++) {
        check(engine_submit(rig.engine, make_request(&rig, i + 1, PROMPT, 1, i), 1));
        for (int k = 0; k < 3; k++)
            turn(&rig, &learn, &step);
    }
    for (uint32_t i = 0; i < TRIES; i++) {
        struct request *r = make_request(&rig, 1000 + i, PROMPT, 1, i % FILL);
        int64_t t0 = cpu_ns();
        check(engine_submit(rig.engine, r, 1));
        submit_ns[i] = cpu_ns() - t0;
        turn(&rig, &learn, &step_ns[i]);
        both_ns[i] = submit_ns[i] + step_ns[i];
        for (int k = 0; k < 2; k++)
            turn(&rig, &learn, &step);
    }
    engine_stats(rig.engine, &s);
    if (s.n_cached_tokens < (uint64_t)TRIES * (PROMPT - 16))
        fprintf(stderr, "bench: only %llu tokens found\n", (unsigned long long)s.n_cached_tokens);
    row("submit_100k", submit_ns, TRIES, "ns", "");
    row("admit_match_open_100k", step_ns, TRIES, "ns", "");
    row("submit_to_plan_100k", both_ns, TRIES, "ns", "<= 1000000");
    printf("cache_blocks,1,%llu,,,blocks,1000000\n",
           (unsigned long long)(s.blocks_cached + s.blocks_held));
    close_rig(&rig);
}

int main(void)
{
    printf("name,n,mean,p50,p99,unit,bar\n");
    bench_decode();
    if (!getenv("ENGINE_BENCH_DECODE")) bench_admit();
    return 0;
}
