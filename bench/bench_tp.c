/* What tensor parallelism on one host costs: the real worker as one rank with N threads, and as N
 * ranks (processes) with one thread each over shared memory, in turns. Each round reads a prompt in
 * one step, then decodes.
 *
 * usage: bench_tp MODEL_DIR [ranks [tokens [rounds]]]; dummy weights. One CSV row a round: model,
 * ranks, decoded tokens/s of one rank with N threads, of N ranks, their ratio, microseconds of a
 * step in collectives; the same four of the prompt. */
#include "base/clock.h"
#include "base/log.h"
#include "base/mem.h"
#include "worker/rank.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { RANKS_MAX = 16, TOKENS_MAX = 4096, PROMPT = 256 };

/* What the processes share: a meeting place, and each round's medians. */
struct hall {
    pthread_barrier_t ranks, all;
    char bytes[RANKS_MAX][BOOTSTRAP_BYTES_MAX];
    double step_us, collective_us, prompt_us, prompt_collective_us;
    int size, rounds, tokens;
    const char *model;
};

struct seat {
    struct hall *hall;
    int rank;
};

static void die(enum err e)
{
    if (!e) return;
    fprintf(stderr, "bench_tp: %s: %s\n", err_name(e), err_detail());
    exit(1);
}

static enum err exchange(void *ctx, const char *key, const void *mine, size_t n, void *out)
{
    struct seat *s = ctx;
    (void)key;
    memcpy(s->hall->bytes[s->rank], mine, n);
    pthread_barrier_wait(&s->hall->ranks);
    for (int r = 0; r < s->hall->size; r++)
        memcpy((char *)out + (size_t)r * n, s->hall->bytes[r], n);
    pthread_barrier_wait(&s->hall->ranks);
    return OK;
}

static struct worker *rank_create(const struct hall *h, int rank, int size, int threads,
                                  struct seat *seat)
{
    struct worker_config c;
    struct worker_info info;
    struct worker *w;
    char key[64];
    worker_config_default(&c);
    c.model_dir = h->model;
    c.rank = rank;
    c.size = size;
    c.device = "cpu";
    c.n_threads = threads;
    c.load_format = "dummy";
    c.n_sequences_max = 1;
    c.step_tokens_max = PROMPT;
    c.context_max = PROMPT + h->tokens + 64;
    snprintf(key, sizeof key, "bench-tp-%d", (int)getppid());
    struct bootstrap boot = {.group_key = key, .exchange = exchange, .ctx = seat};
    die(worker_create(&c, &w));
    worker_info(w, &info);
    die(worker_open_group(w, 1, (uint64_t)(c.context_max / info.block_size + 1), 0, &boot));
    return w;
}

static uint64_t step_number;
static int64_t step(struct worker *w, struct step_plan plan, int64_t *collective_us)
{
    struct step_result result;
    plan.epoch = 1;
    plan.step = ++step_number;
    int64_t begin = clock_monotonic_ns();
    die(worker_begin(w, &plan));
    die(worker_end(w, &result));
    *collective_us += result.collective_us;
    return clock_monotonic_ns() - begin;
}

/* Microseconds of a step that reads a whole prompt. */
static double prefill(struct worker *w, double *out_collective_us)
{
    static int32_t tokens[PROMPT], blocks[4096];
    static uint32_t slot;
    int64_t collective_us = 0;
    int n = (w->info.context_max - 1) / w->info.block_size + 1;
    for (int i = 0; i < PROMPT; i++)
        tokens[i] = i + 3;
    for (int i = 0; i < n && i < 4096; i++)
        blocks[i] = i;
    struct plan_open open = {.n_prompt = PROMPT,
                             .n_tokens_max = (uint32_t)w->info.context_max,
                             .n_tokens = PROMPT,
                             .n_blocks = (uint32_t)n,
                             .tokens = tokens,
                             .blocks = blocks};
    struct plan_run run = {.n_tokens = PROMPT, .flags = PLAN_RUN_SAMPLE | PLAN_RUN_STAY};
    sampling_params_default(&open.sampling);
    open.sampling.temperature = 0;
    open.sampling.n_logprobs = open.sampling.n_prompt_logprobs = -1;
    struct step_plan plan = {.n_closes = step_number > 0,
                             .closes = &slot,
                             .n_opens = 1,
                             .opens = &open,
                             .n_runs = 1,
                             .runs = &run};
    int64_t ns = step(w, plan, &collective_us);
    *out_collective_us = (double)collective_us;
    return (double)ns * 1e-3;
}

static int compare(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* Median microseconds of a decode step. */
static double decode(struct worker *w, int n, double *out_collective_us)
{
    static int64_t ns[TOKENS_MAX];
    int64_t collective_us = 0;
    for (int i = 0; i < n; i++)
        ns[i] = step(w, (struct step_plan){0}, &collective_us);
    qsort(ns, (size_t)n, sizeof *ns, compare);
    *out_collective_us = (double)collective_us / n;
    return (double)ns[n / 2] * 1e-3;
}

static void rank_process(struct hall *h, int rank)
{
    struct seat seat = {h, rank};
    struct worker *w = rank_create(h, rank, h->size, 1, &seat);
    double collective_us, prompt_us, prompt_collective_us;
    prefill(w, &prompt_collective_us);
    pthread_barrier_wait(&h->all);
    for (int round = 0; round < h->rounds; round++) {
        pthread_barrier_wait(&h->all); /* the single rank has had its turn */
        prompt_us = prefill(w, &prompt_collective_us);
        if (rank == 0) h->prompt_us = prompt_us, h->prompt_collective_us = prompt_collective_us;
        double us = decode(w, h->tokens, &collective_us);
        if (rank == 0) h->step_us = us, h->collective_us = collective_us;
        pthread_barrier_wait(&h->all);
    }
    worker_destroy(w);
    exit(0);
}

static void hall_init(struct hall *h)
{
    pthread_barrierattr_t shared;
    pthread_barrierattr_init(&shared);
    pthread_barrierattr_setpshared(&shared, PTHREAD_PROCESS_SHARED);
    pthread_barrier_init(&h->ranks, &shared, (unsigned)h->size);
    pthread_barrier_init(&h->all, &shared, (unsigned)h->size + 1);
}

int main(int argc, char **argv)
{
    struct hall *h =
        mmap(NULL, sizeof *h, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (argc < 2 || h == MAP_FAILED)
        return fprintf(stderr, "usage: bench_tp MODEL_DIR [ranks [tokens [rounds]]]\n"), 2;
    h->model = argv[1];
    h->size = argc > 2 ? (int)strtol(argv[2], NULL, 10) : 2;
    h->tokens = argc > 3 ? (int)strtol(argv[3], NULL, 10) : 48;
    h->rounds = argc > 4 ? (int)strtol(argv[4], NULL, 10) : 5;
    if (h->size < 1 || h->size > RANKS_MAX || h->tokens < 1 || h->tokens > TOKENS_MAX) return 2;
    log_set_level(LOG_WARN);
    hall_init(h);
    for (int r = 0; r < h->size; r++)
        if (fork() == 0) rank_process(h, r);
    struct seat seat = {h, 0};
    double ignored;
    struct worker *w = rank_create(h, 0, 1, h->size, &seat);
    prefill(w, &ignored);
    pthread_barrier_wait(&h->all);
    for (int round = 0; round < h->rounds; round++) {
        double prompt_us = prefill(w, &ignored);
        double one_us = decode(w, h->tokens, &ignored);
        pthread_barrier_wait(&h->all);
        pthread_barrier_wait(&h->all);
        printf("%s,%d,%.2f,%.2f,%.3f,%.1f,%.1f,%.1f,%.3f,%.1f\n", h->model, h->size, 1e6 / one_us,
               1e6 / h->step_us, one_us / h->step_us, h->collective_us, PROMPT * 1e6 / prompt_us,
               PROMPT * 1e6 / h->prompt_us, prompt_us / h->prompt_us, h->prompt_collective_us);
        fflush(stdout);
    }
    while (wait(NULL) > 0)
        continue;
    worker_destroy(w);
    return 0;
}
