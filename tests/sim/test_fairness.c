/* Goal: one tenant's flood does not slow the others; a long prompt does not stall those who decode;
 * the budget of a step is used while somebody waits. Method: the real scheduler in simulated time
 * under a cost model (a step 20 ms, a token 4 us), with and without the disturbance. */
#include "base/mem.h"
#include "base/rand.h"
#include "coordinator/engine/sim_timed.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { POLITE = 9, ROWS = 60000 };
static struct timed_request rows[ROWS];

static int by_arrival(const void *a, const void *b)
{
    const struct timed_request *x = a, *y = b;
    return x->arrival_us < y->arrival_us ? -1 : x->arrival_us > y->arrival_us;
}

/* Exponential gaps: rate requests a second until end_s. */
static uint32_t add_tenant(uint32_t n, uint64_t tenant, double rate, double end_s,
                           uint32_t n_prompt, uint32_t n_output)
{
    struct rand dice = rand_seeded(tenant + 7);
    for (double at = 0; n < ROWS;) {
        at += -log(1 - rand_unit(&dice)) / rate;
        if (at > end_s) break;
        rows[n++] = (struct timed_request){.arrival_us = (int64_t)(at * 1e6),
                                           .n_prompt = n_prompt,
                                           .n_output = n_output,
                                           .tenant = tenant};
    }
    return n;
}

static struct timed_run run_rows(uint32_t n, uint32_t n_slots, uint32_t n_step_tokens)
{
    struct timed_run run = {.cost = {20000, 4, 4, 200},
                            .n_groups = 1,
                            .n_blocks = 60000,
                            .block_size = 16,
                            .n_slots = n_slots,
                            .n_step_tokens = n_step_tokens,
                            .context_max = 1 << 17,
                            .prefix_cache = true,
                            .requests = rows,
                            .n = n};
    qsort(rows, n, sizeof *rows, by_arrival);
    if (timed_run(&run)) {
        printf("the run failed: %s\n", err_detail());
        exit(1);
    }
    return run;
}

static void drop(struct timed_run *run)
{
    mem_free(run->gaps_us);
    mem_free(run->gap_at_us);
}

static int64_t polite_p99_us(uint32_t n)
{
    int64_t *first;
    uint32_t n_first = 0;
    if (MEM_NEW_ARRAY(n, &first)) exit(1);
    for (uint32_t i = 0; i < n; i++)
        if (rows[i].tenant < POLITE) first[n_first++] = rows[i].first_us - rows[i].arrival_us;
    int64_t p99 = percentile_us(first, n_first, 0.99);
    mem_free(first);
    return p99;
}

static int flood(uint32_t n_prompt, uint32_t n_output)
{
    uint32_t n = 0;
    for (uint64_t t = 0; t < POLITE; t++)
        n = add_tenant(n, t, 1, 60, 150, 100);
    struct timed_run alone = run_rows(n, 256, 768);
    int64_t alone_us = polite_p99_us(n);
    drop(&alone);
    for (uint32_t i = n = 0; i < POLITE; i++)
        n = add_tenant(n, i, 1, 60, 150, 100);
    n = add_tenant(n, POLITE, 100, 60, n_prompt, n_output);
    struct timed_run both = run_rows(n, 256, 768);
    int64_t flooded_us = polite_p99_us(n);
    double fill = (double)both.step_tokens / (double)both.step_budget;
    printf("flood of %u + %u tokens at 100x: polite p99 TTFT %.1f ms, alone %.1f ms, ratio %.3f; "
           "budget fill %.3f, %llu preemptions\n",
           n_prompt, n_output, (double)flooded_us / 1e3, (double)alone_us / 1e3,
           (double)flooded_us / (double)alone_us, fill, (unsigned long long)both.n_preemptions);
    drop(&both);
    return (double)flooded_us > 1.2 * (double)alone_us;
}

/* A backlog of prompts alone: every step must be full. */
static int backlog(void)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < 400; i++)
        rows[n++] = (struct timed_request){
            .arrival_us = 1, .n_prompt = 700 + 13 * (i % 50), .n_output = 20};
    struct timed_run run = run_rows(n, 256, 768);
    double fill = (double)run.step_tokens / (double)run.step_budget;
    printf("backlog: budget fill %.3f\n", fill);
    drop(&run);
    return fill < 0.9;
}

/* 32 decode; an 8k prompt comes: the gaps while it is computed against the median. */
static int long_prompt(void)
{
    uint32_t n = 0, n_during = 0;
    for (uint32_t i = 0; i < 32; i++)
        rows[n++] = (struct timed_request){.arrival_us = 1, .n_prompt = 100, .n_output = 400};
    rows[n++] =
        (struct timed_request){.arrival_us = 2000000, .n_prompt = 8192, .n_output = 2, .tenant = 1};
    struct timed_run run = run_rows(n, 256, 768);
    int64_t *during, first_us = 2000000, last_us = rows[n - 1].first_us;
    if (MEM_NEW_ARRAY(run.n_gaps, &during)) return 1;
    for (uint32_t i = 0; i < run.n_gaps; i++)
        if (run.gap_at_us[i] >= first_us && run.gap_at_us[i] <= last_us)
            during[n_during++] = run.gaps_us[i];
    int64_t p99 = percentile_us(during, n_during, 0.99),
            median = percentile_us(run.gaps_us, run.n_gaps, 0.5);
    printf("8k prompt: p99 gap of the others %.1f ms (%u gaps), median %.1f ms\n",
           (double)p99 / 1e3, n_during, (double)median / 1e3);
    mem_free(during);
    drop(&run);
    return n_during < 100 || p99 >= 2 * median;
}

int main(void)
{
    int failed = flood(150, 100) + flood(1500, 100) + flood(150, 1000);
    return failed + backlog() + long_prompt();
}
