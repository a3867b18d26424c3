/* Whole-model speed of one rank without its link: prefill and decode of the real worker, beside the
 * read bandwidth of the same minute.
 *
 * usage: bench_model MODEL_DIR [name=value …], names as in `defaults` below; prints one CSV row a
 * round: model, format, threads, prompt, batch, context, prefill tokens/s, decode tokens/s, bytes
 * read a step, decode GB/s, read GB/s, share, peak of the format's products in GOP/s, prefill's
 * share of it. */
#include "base/clock.h"
#include "base/mem.h"
#include "proto/plan.h"
#include "worker/worker.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct settings {
    const char *quantization, *head, *dtype, *kv_dtype, *load_format, *isa;
    int threads, prompt, decode, batch, context, rounds, block;
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
    int more = s->decode + s->batch; /* a slot decodes while those after it are filled */
    int n_blocks = (n_prompt + more + b->info.block_size) / b->info.block_size;
    struct plan_open open = {.slot = (uint32_t)slot, .n_prompt = (uint32_t)n_prompt, .n_tokens = (uint32_t)n_prompt,
                             .n_tokens_max = (uint32_t)(n_prompt + more + 1), .tokens = b->tokens,
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

/* --- the machine's own speed, in the same seconds --- */

enum { READ_BYTES = 256 << 20, SUMS = 4 };
typedef uint64_t vec __attribute__((vector_size(64), aligned(64)));

struct reading {
    const char *data;
    uint64_t sum;
};

/* Whole lines in order. More streams at once were slower where it was tried. */
__attribute__((target_clones("arch=x86-64-v4", "avx2", "default"))) static uint64_t read_lines(const char *data)
{
    vec sums[SUMS] = {{0}};
    for (size_t i = 0; i < READ_BYTES; i += sizeof sums)
        for (size_t k = 0; k < SUMS; k++) sums[k] += *(const vec *)(const void *)(data + i + k * sizeof(vec));
    vec all = sums[0] + sums[1] + sums[2] + sums[3];
    return all[0] + all[1] + all[2] + all[3] + all[4] + all[5] + all[6] + all[7];
}

static void *read_all(void *ctx)
{
    struct reading *r = ctx;
    r->sum = read_lines(r->data);
    return NULL;
}

/* GB/s of plain reads by n threads over memory of their own, huge pages. */
static double read_once(int n_threads)
{
    static char *memory;
    struct reading parts[64];
    pthread_t threads[64];
    if (n_threads > 64) n_threads = 64;
    if (!memory) {
        die(mem_alloc_huge((size_t)n_threads * READ_BYTES, (void **)&memory));
        memset(memory, 1, (size_t)n_threads * READ_BYTES);
    }
    int64_t t = clock_monotonic_ns();
    for (int i = 0; i < n_threads; i++) {
        parts[i] = (struct reading){memory + (size_t)i * READ_BYTES, 0};
        if (i) pthread_create(&threads[i], NULL, read_all, &parts[i]);
    }
    read_all(&parts[0]);
    for (int i = 1; i < n_threads; i++) pthread_join(threads[i], NULL);
    return (double)n_threads * READ_BYTES / (double)(clock_monotonic_ns() - t);
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *values, int n)
{
    qsort(values, (size_t)n, sizeof *values, compare);
    return values[n / 2];
}

/* --- the arithmetic's own speed --- */

enum { PEAK_LOOPS = 100000, PEAK_PIECES = 15 };

#define PEAK_BF16(i)  "vdpbf16ps %%zmm31, %%zmm30, %%zmm" #i "\n\t"
#define PEAK_INT8(i)  "vpdpbusd %%zmm31, %%zmm30, %%zmm" #i "\n\t"
#define PEAK_FLOAT(i) "vfmadd231ps %%zmm31, %%zmm30, %%zmm" #i "\n\t"
#define TIMES12(X)    X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define PEAK(NAME, DOT)                                                                                                \
    __attribute__((target("avx512f"))) static void NAME(void)                                                          \
    {                                                                                                                  \
        __asm__ volatile("vpxord %%zmm30, %%zmm30, %%zmm30\n\tvpxord %%zmm31, %%zmm31, %%zmm31" ::: "xmm30", "xmm31");   \
        for (int i = 0; i < PEAK_LOOPS; i++)                                                                           \
            __asm__ volatile(TIMES12(DOT)::: "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8",   \
                             "xmm9", "xmm10", "xmm11");                                                                \
    }
PEAK(peak_bf16, PEAK_BF16)
PEAK(peak_int8, PEAK_INT8)
PEAK(peak_float, PEAK_FLOAT)

struct peak {
    void (*loops)(void);
    int operations;  /* of one instruction */
    double rate;     /* GOP/s of this thread */
    pthread_t thread;
};

/* A thread that has just been made may share a core at first: the median of many pieces. */
static void *peak_run(void *ctx)
{
    struct peak *p = ctx;
    double rates[PEAK_PIECES];
    for (int i = 0; i < PEAK_PIECES; i++) {
        int64_t t = clock_monotonic_ns();
        p->loops();
        rates[i] = 12.0 * PEAK_LOOPS * p->operations / (double)(clock_monotonic_ns() - t);
    }
    p->rate = median(rates, PEAK_PIECES);
    return NULL;
}

/* GOP/s of products from registers by n threads, in the format that the weights are multiplied in; 0
 * where this program knows no such instruction of the machine. */
static double peak_once(int n_threads, const char *format)
{
    struct peak all[64], one = {0};
    double sum = 0;
    if (!strncmp(format, "int", 3) && __builtin_cpu_supports("avx512vnni")) one = (struct peak){peak_int8, 128, 0, 0};
    else if (!strncmp(format, "bf16", 4) && __builtin_cpu_supports("avx512bf16")) one = (struct peak){peak_bf16, 64, 0, 0};
    else if (!strncmp(format, "f", 1) && __builtin_cpu_supports("avx512f")) one = (struct peak){peak_float, 32, 0, 0};
    if (!one.loops || n_threads > 64) return 0;
    for (int i = 0; i < n_threads; i++) {
        all[i] = one;
        if (i) pthread_create(&all[i].thread, NULL, peak_run, &all[i]);
    }
    peak_run(&all[0]);
    for (int i = 1; i < n_threads; i++) pthread_join(all[i].thread, NULL);
    for (int i = 0; i < n_threads; i++) sum += all[i].rate;
    return sum;
}

/* Operations a token of a prompt of n: two a weight of the layers, and its part of attention. */
static double token_operations(const struct worker_info *i, int n)
{
    double q = (double)i->n_heads * i->head_dim, kv = (double)i->n_kv_heads * i->head_dim;
    double layer = 2.0 * i->hidden * (2 * q + 2 * kv + 3.0 * i->ffn) + 4.0 * q * n / 2;
    return layer * i->n_layers;
}

/* --- decoding --- */

enum { SEED_BLOCKS = 16, PIECES_MAX = 256, PIECE_STEPS = 8 };

/* A slot whose context is there without having been computed all: its first blocks are, the others
 * are copies of them, which cost the same to read. */
static void context_make(struct bench *b, const struct settings *s, int slot)
{
    int n_blocks = (s->context + s->decode + s->batch + b->info.block_size) / b->info.block_size;
    int seed = SEED_BLOCKS * b->info.block_size, n_copied = s->context / b->info.block_size;
    if (s->context <= 2 * seed) {
        prefill(b, s, slot, s->context, true);
        return;
    }
    struct settings head = *s;
    head.decode = s->decode + s->context - seed;
    prefill(b, &head, slot, seed, false);
    struct plan_pair *copies;
    die(arena_alloc_array(&b->arena, (size_t)n_blocks, sizeof *copies, (void **)&copies));
    int32_t *blocks = block_list(b, slot * n_blocks, n_blocks);
    uint32_t n = 0, old = (uint32_t)slot;
    for (int i = SEED_BLOCKS; i <= n_copied; i++)
        copies[n++] = (struct plan_pair){(uint32_t)blocks[i % SEED_BLOCKS], (uint32_t)blocks[i]};
    run(b, &(struct step_plan){.n_closes = 1, .closes = &old, .n_copies = n, .copies = copies});
    struct plan_open open = {.slot = (uint32_t)slot, .n_prompt = (uint32_t)s->context, .n_tokens = (uint32_t)s->context,
                             .n_computed = (uint32_t)s->context - 1, .n_tokens_max = (uint32_t)(s->context + s->decode + s->batch + 1),
                             .tokens = b->tokens, .n_blocks = (uint32_t)n_blocks, .blocks = blocks};
    sampling_params_default(&open.sampling);
    open.sampling.temperature = 0;
    struct plan_run r = {.slot = (uint32_t)slot, .n_tokens = 1, .flags = PLAN_RUN_SAMPLE | PLAN_RUN_STAY};
    run(b, &(struct step_plan){.n_opens = 1, .opens = &open, .n_runs = 1, .runs = &r});
}

/* Median microseconds of a step in which `batch` sequences of `context` tokens decode one each, and
 * the median of the memory's speed between pieces of eight such steps. */
static double decode(struct bench *b, const struct settings *s, double *out_read)
{
    static double us[PIECES_MAX * PIECE_STEPS], read[PIECES_MAX + 1];
    int n_pieces = s->decode / PIECE_STEPS < PIECES_MAX ? s->decode / PIECE_STEPS : PIECES_MAX;
    for (int i = 0; i < s->batch; i++) context_make(b, s, i);
    read_once(s->threads);
    for (int p = 0; p < n_pieces; p++) {
        read[p] = read_once(s->threads);
        for (int i = 0; i < PIECE_STEPS; i++) us[p * PIECE_STEPS + i] = run(b, &(struct step_plan){.n_runs = 0});
    }
    read[n_pieces] = read_once(s->threads);
    close_slots(b, s->batch);
    *out_read = median(read, n_pieces + 1);
    return median(us, n_pieces * PIECE_STEPS);
}

static void round_once(struct bench *b, const struct settings *s, const char *model)
{
    double us = 0, read, peak = 0;
    for (int i = 0; i < 2; i++) { /* the better of two, as peers' benchmarks report theirs */
        double before = peak_once(s->threads, b->info.weight_format);
        double once = prefill(b, s, 0, s->prompt, false);
        close_slots(b, 1);
        double after = peak_once(s->threads, b->info.weight_format);
        if (!i || once < us) us = once, peak = before > after ? before : after;
    }
    double step_us = decode(b, s, &read);
    double kv = (double)b->info.block_bytes / b->info.block_size * (s->context + s->decode / 2) * s->batch;
    double bytes = (double)b->info.weight_bytes + kv, gb = bytes / step_us * 1e-3;
    double share = peak > 0 ? token_operations(&b->info, s->prompt) * s->prompt / us * 1e-3 / peak : 0;
    printf("%s,%s,%d,%d,%d,%d,%.1f,%.2f,%.0f,%.1f,%.1f,%.3f,%.0f,%.3f\n", model, b->info.weight_format, s->threads, s->prompt,
           s->batch, s->context, s->prompt / us * 1e6, s->batch / step_us * 1e6, bytes, gb, read, gb / read, peak, share);
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
                 {"block", &s->block, NULL},
                 {"quantization", NULL, &s->quantization}, {"head", NULL, &s->head}, {"dtype", NULL, &s->dtype}, {"kv", NULL, &s->kv_dtype},
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
    config.head_quantization = s.head;
    config.dtype = s.dtype;
    config.kv_dtype = s.kv_dtype;
    config.isa = s.isa;
    config.block_size = s.block;
    config.step_tokens_max = 512;
    config.n_sequences_max = s.batch;
    config.context_max = (s.context > s.prompt ? s.context : s.prompt) + s.decode + s.batch + 64;
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
