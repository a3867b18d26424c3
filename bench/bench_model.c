/* Whole-model speed of one rank without its link: prefill and decode of the real worker, beside the
 * read bandwidth of the same minute.
 *
 * usage: bench_model MODEL_DIR [name=value …], names as in `defaults` below; prints one CSV row a
 * round: model, format, threads, prompt, batch, context, prefill tokens/s, decode tokens/s, bytes
 * read a step, decode GB/s, read GB/s, share. */
#include "base/clock.h"
#include "base/mem.h"
#include "proto/plan.h"
#include "worker/worker.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct settings {
    const char *quantization, *dtype, *kv_dtype, *load_format, *isa;
    int threads, prompt, decode, batch, context, rounds;
};

struct bench {
    struct worker *w;
    struct worker_info info;
    struct arena arena;
    struct buf plan, result;
    uint64_t step;
    int32_t *tokens;
};

static void die(enum err e)
{
    if (!e) return;
    fprintf(stderr, "bench_model: %s: %s\n", err_name(e), err_detail());
    exit(1);
}

/* Sends one plan through the worker; returns its microseconds. */
static double run(struct bench *b, struct step_plan *plan)
{
    plan->epoch = 1;
    plan->step = ++b->step;
    buf_clear(&b->plan);
    buf_clear(&b->result);
    die(plan_encode(plan, &b->plan));
    int64_t t = clock_monotonic_ns();
    die(worker_step(b->w, b->plan.data, b->plan.n, &b->result));
    return (double)(clock_monotonic_ns() - t) * 1e-3;
}

static int32_t *block_list(struct bench *b, int first, int n)
{
    int32_t *list;
    die(arena_alloc_array(&b->arena, (size_t)n, sizeof *list, (void **)&list));
    for (int i = 0; i < n; i++) list[i] = first + i;
    return list;
}

/* Opens a slot and computes its prompt in chunks of the step budget. Returns microseconds. */
static double prefill(struct bench *b, const struct settings *s, int slot, int n_prompt, bool stay)
{
    int n_blocks = (n_prompt + s->decode + b->info.block_size) / b->info.block_size;
    struct plan_open open = {.slot = (uint32_t)slot, .n_prompt = (uint32_t)n_prompt, .n_tokens = (uint32_t)n_prompt,
                             .n_tokens_max = (uint32_t)(n_prompt + s->decode + 1), .tokens = b->tokens,
                             .n_blocks = (uint32_t)n_blocks, .blocks = block_list(b, slot * n_blocks, n_blocks)};
    double us = 0;
    sampling_params_default(&open.sampling);
    open.sampling.temperature = 0;
    for (int done = 0; done < n_prompt;) {
        int n = n_prompt - done < b->info.step_tokens_max ? n_prompt - done : b->info.step_tokens_max;
        bool last = done + n == n_prompt;
        struct plan_run r = {.slot = (uint32_t)slot, .n_tokens = (uint32_t)n,
                             .flags = last ? PLAN_RUN_SAMPLE | (stay ? PLAN_RUN_STAY : 0) : 0};
        struct step_plan plan = {.n_opens = !done, .opens = &open, .n_runs = 1, .runs = &r};
        us += run(b, &plan);
        done += n;
    }
    return us;
}

static void close_slots(struct bench *b, int n)
{
    uint32_t slots[1024];
    for (int i = 0; i < n; i++) slots[i] = (uint32_t)i;
    struct step_plan plan = {.n_closes = (uint32_t)n, .closes = slots};
    run(b, &plan);
}

struct reading {
    const uint64_t *data;
    size_t n;
    uint64_t sum;
};

static void *read_all(void *ctx)
{
    struct reading *r = ctx;
    uint64_t a = 0, b = 0, c = 0, d = 0;
    for (size_t i = 0; i + 4 <= r->n; i += 4) a += r->data[i], b += r->data[i + 1], c += r->data[i + 2], d += r->data[i + 3];
    r->sum = a + b + c + d;
    return NULL;
}

/* GB/s of plain reads by n threads over 512 MiB each, best of 3. */
static double read_bandwidth(int n_threads)
{
    enum { BYTES = 512 << 20 };
    static uint64_t *memory;
    struct reading parts[64];
    pthread_t threads[64];
    double best = 0;
    if (!memory) {
        die(mem_alloc_huge((size_t)n_threads * BYTES, (void **)&memory));
        memset(memory, 1, (size_t)n_threads * BYTES);
    }
    for (int round = 0; round < 3; round++) {
        int64_t t = clock_monotonic_ns();
        for (int i = 0; i < n_threads; i++) {
            parts[i] = (struct reading){memory + (size_t)i * BYTES / 8, BYTES / 8, 0};
            pthread_create(&threads[i], NULL, read_all, &parts[i]);
        }
        for (int i = 0; i < n_threads; i++) pthread_join(threads[i], NULL);
        double gb = (double)n_threads * BYTES / (double)(clock_monotonic_ns() - t);
        if (gb > best) best = gb;
    }
    return best;
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Median microseconds of a step in which `batch` sequences of `context` tokens decode one each. */
static double decode(struct bench *b, const struct settings *s)
{
    static double us[4096];
    int n = s->decode < 4096 ? s->decode : 4096;
    for (int i = 0; i < s->batch; i++) prefill(b, s, i, s->context, true);
    for (int i = 0; i < n; i++) us[i] = run(b, &(struct step_plan){.n_runs = 0});
    close_slots(b, s->batch);
    qsort(us, (size_t)n, sizeof *us, compare);
    return us[n / 2];
}

static void round_once(struct bench *b, const struct settings *s, const char *model)
{
    double us = prefill(b, s, 0, s->prompt, false), read;
    close_slots(b, 1);
    double step_us = decode(b, s);
    read = read_bandwidth(s->threads);
    double kv = (double)b->info.block_bytes / b->info.block_size * (s->context + s->decode / 2) * s->batch;
    double bytes = (double)b->info.weight_bytes + kv, gb = bytes / step_us * 1e-3;
    printf("%s,%s,%d,%d,%d,%d,%.1f,%.2f,%.0f,%.1f,%.1f,%.3f\n", model, b->info.weight_format, s->threads, s->prompt,
           s->batch, s->context, s->prompt / us * 1e6, s->batch / step_us * 1e6, bytes, gb, read, gb / read);
    fflush(stdout);
    arena_reset(&b->arena);
}

static void read_setting(struct settings *s, const char *word)
{
    const struct {
        const char *name;
        int *number;
        const char **text;
    } names[] = {{"threads", &s->threads, NULL},  {"prompt", &s->prompt, NULL},     {"decode", &s->decode, NULL},
                 {"batch", &s->batch, NULL},      {"context", &s->context, NULL},   {"rounds", &s->rounds, NULL},
                 {"quantization", NULL, &s->quantization}, {"dtype", NULL, &s->dtype}, {"kv", NULL, &s->kv_dtype},
                 {"load", NULL, &s->load_format}, {"isa", NULL, &s->isa}};
    size_t n = strcspn(word, "=");
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (strlen(names[i].name) != n || memcmp(names[i].name, word, n) || !word[n]) continue;
        if (names[i].number) *names[i].number = (int)strtol(word + n + 1, NULL, 10);
        else *names[i].text = word + n + 1;
        return;
    }
    fprintf(stderr, "bench_model: no setting '%s'\n", word);
    exit(2);
}

int main(int argc, char **argv)
{
    struct settings s = {.load_format = "dummy", .threads = 2, .prompt = 512, .decode = 64, .batch = 1, .context = 16, .rounds = 1};
    struct worker_config config;
    struct bench b = {0};
    if (argc < 2) return fprintf(stderr, "usage: bench_model MODEL_DIR [name=value …]\n"), 2;
    for (int i = 2; i < argc; i++) read_setting(&s, argv[i]);
    worker_config_default(&config);
    config.model_dir = argv[1];
    config.rank = 0;
    config.size = 1;
    config.device = "cpu";
    config.n_threads = s.threads;
    config.load_format = s.load_format;
    config.quantization = s.quantization;
    config.dtype = s.dtype;
    config.kv_dtype = s.kv_dtype;
    config.isa = s.isa;
    config.step_tokens_max = 512;
    config.n_sequences_max = s.batch;
    config.context_max = (s.context > s.prompt ? s.context : s.prompt) + s.decode + 64;
    die(worker_create(&config, &b.w));
    worker_info(b.w, &b.info);
    die(worker_open_group(b.w, 1, b.info.n_blocks, 0, NULL));
    arena_init(&b.arena, 1 << 16, 0);
    die(mem_alloc_array((size_t)config.context_max, sizeof *b.tokens, (void **)&b.tokens));
    for (int i = 0; i < config.context_max; i++) b.tokens[i] = (int32_t)((unsigned)i * 2654435761u % (unsigned)b.info.vocab_size);
    prefill(&b, &s, 0, s.prompt, false); /* warm up */
    close_slots(&b, 1);
    for (int i = 0; i < s.rounds; i++) round_once(&b, &s, argv[1]);
    worker_destroy(b.w);
    arena_fini(&b.arena);
    buf_fini(&b.plan);
    buf_fini(&b.result);
    mem_free(b.tokens);
    return 0;
}
