/* Goal: knowing what every group holds is worth something where memory is short. Method:
 * conversations that grow turn by turn, four groups whose caches hold a part of them, under load;
 * the engine that owns all groups against routers that guess, in simulated time. */
#include "base/hash.h"
#include "base/mem.h"
#include "base/rand.h"
#include "coordinator/engine/sim_timed.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { SESSIONS = 160, TURNS = 6, ROWS = SESSIONS * TURNS };
static struct timed_request rows[ROWS];

static int by_arrival(const void *a, const void *b)
{
    const struct timed_request *x = a, *y = b;
    return x->arrival_us < y->arrival_us ? -1 : x->arrival_us > y->arrival_us;
}

/* Each session has a content of its own after what all begin with; a turn's prompt is the one
 * before and some more. */
static void fill(void *ctx, uint32_t index, int32_t *tokens)
{
    uint64_t session = rows[index].tenant;
    (void)ctx;
    for (uint32_t i = 0; i < rows[index].n_prompt; i++)
        tokens[i] = (int32_t)(hash_u64((i < 256 ? 0 : (session + 1) << 32) | i) % 50000);
}

static void make(void)
{
    struct rand dice = rand_seeded(11);
    uint32_t n = 0;
    for (uint64_t s = 0; s < SESSIONS; s++) {
        double at = rand_unit(&dice) * 40;
        uint32_t n_prompt = 600 + (uint32_t)rand_below(&dice, 2000);
        for (int turn = 0; turn < TURNS; turn++) {
            rows[n++] = (struct timed_request){.arrival_us = (int64_t)(at * 1e6),
                                               .n_prompt = n_prompt,
                                               .n_output = 60,
                                               .tenant = s};
            at += 2 - 8 * log(1 - rand_unit(&dice));
            n_prompt += 200 + (uint32_t)rand_below(&dice, 600);
        }
    }
    qsort(rows, n, sizeof *rows, by_arrival);
}

struct outcome {
    double hits, p50_ms, p99_ms;
};

static struct outcome play(enum router_kind router)
{
    struct timed_run run = {.cost = {10000, 60, 10, 200},
                            .n_groups = 4,
                            .n_blocks = 2500,
                            .block_size = 16,
                            .n_slots = 32,
                            .n_step_tokens = 1024,
                            .context_max = 1 << 16,
                            .prefix_cache = true,
                            .router = router,
                            .requests = rows,
                            .n = ROWS,
                            .fill = fill};
    static int64_t first_us[ROWS];
    if (timed_run(&run)) {
        printf("the run failed: %s\n", err_detail());
        exit(1);
    }
    for (uint32_t i = 0; i < ROWS; i++)
        first_us[i] = rows[i].first_us - rows[i].arrival_us;
    struct outcome o = {(double)run.n_hit_tokens / (double)run.n_prompt_tokens,
                        (double)percentile_us(first_us, ROWS, 0.5) / 1e3,
                        (double)percentile_us(first_us, ROWS, 0.99) / 1e3};
    printf("%s: found %.3f of the prompts, TTFT p50 %.1f ms, p99 %.1f ms\n", router_names[router],
           o.hits, o.p50_ms, o.p99_ms);
    mem_free(run.gaps_us);
    mem_free(run.gap_at_us);
    return o;
}

int main(void)
{
    make();
    struct outcome exact = play(ROUTER_EXACT);
    int failed = 0;
    for (int k = ROUTER_GUESS; k < ROUTER_COUNT; k++) {
        struct outcome other = play((enum router_kind)k);
        failed += exact.p50_ms > 1.02 * other.p50_ms || exact.p99_ms > 0.8 * other.p99_ms;
    }
    return failed;
}
