/* How near the CPU kernels come to the machine: matmul and decode attention against the limits of
 * the same minute.
 *
 *     bench_kernels [threads=N] [ms=N] [csv=FILE] [only=TEXT] [m=ROWS] [isa=NAME] [clock=cpu]
 *                   [best=1] [packed=1]
 *
 * Every case alternates with short measurements of its limits (read bandwidth through the same
 * threads; multiply-adds from registers), so that a busy or throttled machine slows both alike. The
 * share is limit time / measured time of a few milliseconds between two measurements of the limits,
 * whose mean counts, and of all such shares the median; limit time = max(bytes / bandwidth,
 * operations / peak). (Medians of times and of limits apart are not of the same moments: virtual
 * processors that share a core now and then have two speeds.) best=1 takes the best tenth instead
 * of medians, for experiments on a machine that others use; such figures are not kept. Weights and
 * caches rotate through more memory than the last level of cache holds. A product's time has the
 * packing of its inputs in it; packed=1: of kernels alone, over inputs packed before.
 * only=invariance: attention with its fixed spans against one span a sequence. */
#include "base/clock.h"
#include "base/mem.h"
#include "base/rand.h"
#include "kernels/backend.h"
#include "kernels/cpu/activations.h"

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum {
    ROTATE_BYTES = 192 << 20,
    SLICES_MAX = 5000,
    SLICE_RUNS_MAX = 4000,
    COPIES_MAX = 512,
    PEAK_LOOPS = 2000
};

static struct {
    int threads, ms, m;
    bool cpu_clock, best, packed;
    const char *csv, *only, *isa;
    struct pool *pool;
    struct backend *backend;
    float *memory; /* [ROTATE_BYTES], read by the bandwidth probe */
    FILE *out;
} bench = {.threads = 0, .ms = 200};

static volatile float sink;

/* With clock=cpu: seconds that the threads ran, each; for a machine that others use too. Spinning
 * counts as running, so it is meant for threads=1. */
static double now_s(void)
{
    struct timespec t;
    if (!bench.cpu_clock) return (double)clock_monotonic_ns() * 1e-9;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return ((double)t.tv_sec + (double)t.tv_nsec * 1e-9) / bench.threads;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* The median, or with best=1 a value of the better end. */
static double typical(double *v, int n, bool small_is_good)
{
    qsort(v, (size_t)n, sizeof *v, by_value);
    if (bench.best) return n ? v[small_is_good ? n / 10 : n - 1 - n / 10] : 0;
    return n ? v[n / 2] : 0;
}

static void die(const char *what)
{
    fprintf(stderr, "bench_kernels: %s: %s\n", what, err_detail());
    exit(1);
}

/* --- limits --- */

enum { READ_CHUNK = 256 << 10 };

/* Plain read of 256 KiB: four independent sums. */
__attribute__((target("avx512f"))) static void read_avx512(const float *p)
{
    typedef float v16 __attribute__((vector_size(64)));
    const v16 *v = (const v16 *)p;
    v16 a = {0}, b = {0}, c = {0}, d = {0};
    for (int i = 0; i < READ_CHUNK / 64; i += 4)
        a += v[i], b += v[i + 1], c += v[i + 2], d += v[i + 3];
    a += b + c + d;
    sink = a[0];
}

__attribute__((target("avx2"))) static void read_avx2(const float *p)
{
    typedef float v8 __attribute__((vector_size(32)));
    const v8 *v = (const v8 *)p;
    v8 a = {0}, b = {0}, c = {0}, d = {0};
    for (int i = 0; i < READ_CHUNK / 32; i += 4)
        a += v[i], b += v[i + 1], c += v[i + 2], d += v[i + 3];
    a += b + c + d;
    sink = a[0];
}

static void read_chunk(const void *args, int chunk, void *scratch)
{
    const float *p = *(const float *const *)args + (size_t)chunk * READ_CHUNK / 4;
    (void)scratch;
    if (__builtin_cpu_supports("avx512f"))
        read_avx512(p);
    else
        read_avx2(p);
}

/* Bytes per second of a plain read of 24 MiB somewhere in the rotating memory. */
static double read_rate(void)
{
    static int turn;
    enum { CHUNKS = 96 };
    const float *from = bench.memory + (size_t)(turn++ % 8) * CHUNKS * READ_CHUNK / 4;
    double t = now_s();
    pool_run(bench.pool, &(struct pool_job){.compute = read_chunk,
                                            .args = &from,
                                            .args_bytes = sizeof from,
                                            .n_chunks = CHUNKS});
    return (double)CHUNKS * READ_CHUNK / (now_s() - t);
}

#define DOT_INT8(i)  "vpdpbusd %%zmm31, %%zmm30, %%zmm" #i "\n\t"
#define DOT_BF16(i)  "vdpbf16ps %%zmm31, %%zmm30, %%zmm" #i "\n\t"
#define DOT_FLOAT(i) "vfmadd231ps %%zmm31, %%zmm30, %%zmm" #i "\n\t"
#define TIMES12(X)   X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11)
#define PEAK(NAME, DOT)                                                                            \
    __attribute__((target("avx512f"))) static void NAME(const void *args, int chunk,               \
                                                        void *scratch)                             \
    {                                                                                              \
        (void)args, (void)chunk, (void)scratch;                                                    \
        __asm__ volatile(                                                                          \
            "vpxord %%zmm30, %%zmm30, %%zmm30\n\tvpxord %%zmm31, %%zmm31, %%zmm31\n\t" ::          \
                : "xmm30", "xmm31");                                                               \
        for (int i = 0; i < PEAK_LOOPS; i++)                                                       \
            __asm__ volatile(TIMES12(DOT)::                                                        \
                                 : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", \
                                   "xmm8", "xmm9", "xmm10", "xmm11");                              \
    }
PEAK(peak_int8, DOT_INT8)
PEAK(peak_bf16, DOT_BF16)
PEAK(peak_float, DOT_FLOAT)

/* Operations (2 per multiply-add) per second from registers. */
static double peak_rate(pool_fn *fn, int operations_per_instruction)
{
    int chunks = 8 * bench.threads;
    double t = now_s();
    pool_run(
        bench.pool,
        &(struct pool_job){.compute = fn, .args = &t, .args_bytes = sizeof t, .n_chunks = chunks});
    return (double)chunks * PEAK_LOOPS * 12 * operations_per_instruction / (now_s() - t);
}

/* --- one case --- */

struct bench_case {
    const char *kind, *name;
    int m;
    double bytes, operations;
    pool_fn *peak;
    int peak_operations;
    void (*run)(void *arg, int turn);
    void *arg;
};

struct limits {
    double rate, peak;
};

static struct limits limits_measure(const struct bench_case *c)
{
    double rate = read_rate();
    return (struct limits){rate, peak_rate(c->peak, c->peak_operations)};
}

static double share_of_bound(const struct bench_case *c, struct limits l, double time)
{
    double by_bytes = c->bytes / l.rate, by_compute = c->operations / l.peak;
    return (by_bytes > by_compute ? by_bytes : by_compute) / time;
}

static void report(const struct bench_case *c, double time, struct limits l, double share)
{
    printf("%-11s %-28s M=%-4d %9.1f us  %6.1f GB/s of %5.1f = %3.0f%%   %7.0f GOP/s of %5.0f = "
           "%3.0f%%   bound %3.0f%%\n",
           c->kind, c->name, c->m, time * 1e6, c->bytes / time * 1e-9, l.rate * 1e-9,
           100 * c->bytes / l.rate / time, c->operations / time * 1e-9, l.peak * 1e-9,
           100 * c->operations / l.peak / time, 100 * share);
    fflush(stdout);
    if (!bench.out) return;
    fprintf(bench.out, "%s,%s,%d,%d,%.3f,%.3f,%.3f,%.1f,%.1f,%.4f\n", c->kind, c->name, c->m,
            bench.threads, time * 1e6, c->bytes / time * 1e-9, l.rate * 1e-9,
            c->operations / time * 1e-9, l.peak * 1e-9, share);
}

/* Runs until about as long has passed as measuring the limits takes; the typical time. */
static double slice_run(const struct bench_case *c, int *turn)
{
    static double times[SLICE_RUNS_MAX];
    int n = 0;
    for (double start = now_s(), t = start; t - start < 4e-3 && n < SLICE_RUNS_MAX;) {
        c->run(c->arg, (*turn)++);
        double end = now_s();
        times[n++] = end - t;
        t = end;
    }
    return typical(times, n, true);
}

static void run_case(const struct bench_case *c)
{
    static double times[SLICES_MAX], rates[SLICES_MAX], peaks[SLICES_MAX], shares[SLICES_MAX];
    int n = 0, turn = 0;
    double start = now_s();
    c->run(c->arg, turn++);
    struct limits before = limits_measure(c);
    while ((now_s() - start < bench.ms * 1e-3 || n < 7) && n < SLICES_MAX) {
        times[n] = slice_run(c, &turn);
        struct limits after = limits_measure(c);
        rates[n] = (before.rate + after.rate) / 2, peaks[n] = (before.peak + after.peak) / 2;
        shares[n] = share_of_bound(c, (struct limits){rates[n], peaks[n]}, times[n]);
        before = after;
        n++;
    }
    struct limits l = {typical(rates, n, false), typical(peaks, n, false)};
    report(c, typical(times, n, true), l, typical(shares, n, false));
}

static bool wanted(const char *kind, const char *name)
{
    char both[128];
    snprintf(both, sizeof both, "%s %s", kind, name);
    return !bench.only || strstr(both, bench.only);
}

/* --- matmul --- */

struct format_row {
    const char *name;
    enum weight_format format;
    pool_fn *peak;
    int peak_operations;
    int group; /* of INT4_GROUPS */
};
static const struct format_row formats[] = {
    {"int8", WEIGHT_INT8, peak_int8, 128, 0},
    {"int4", WEIGHT_INT4, peak_int8, 128, 0},
    {"bf16", WEIGHT_BF16, peak_bf16, 64, 0},
    {"f32", WEIGHT_F32, peak_float, 32, 0},
    {"f16", WEIGHT_F16, peak_float, 32, 0},
    {"codes128", WEIGHT_INT4_GROUPS, peak_int8, 128, 128},
    {"codes32", WEIGHT_INT4_GROUPS, peak_int8, 128, 32},
};
static const int shapes[][2] = {{1152, 896},   {9728, 896},  {896, 4864},  {3072, 2048},
                                {16384, 2048}, {2048, 8192}, {6144, 4096}, {1000, 1111}};
/* unless m= names one */
static const int heights[] = {1, 2, 4, 8, 16, 32, 64, 512};
enum { N_MAX = 16384, K_MAX = 8192, M_MAX = 512 };

struct matmul_case {
    struct weight *weights[COPIES_MAX];
    int n_copies, n, k, m;
    float *x, *y;
};

static void matmul_run(void *arg, int turn)
{
    struct matmul_case *c = arg;
    struct tensor out = {c->y, DTYPE_F32, c->m, c->n, c->n},
                  x = {c->x, DTYPE_F32, c->m, c->k, c->k};
    if (bench.packed)
        cpu_packed_matmul(cpu_of(bench.backend), out, c->weights[turn % c->n_copies]);
    else
        backend_cpu.matmul(bench.backend, out, x, c->weights[turn % c->n_copies]);
}

/* Packing takes far longer than copying what was packed. */
static enum err weight_copy(const struct weight *from, struct weight **out)
{
    struct weight *w;
    TRY(MEM_NEW(&w));
    *w = *from;
    TRY(weight_alloc(bench.backend, w, false));
    memcpy(w->panels, from->panels, w->packed_bytes);
    if (w->scale)
        memcpy(w->scale, from->scale, (size_t)w->n_panels * PANEL_OUTPUTS * sizeof *w->scale);
    if (w->zeros)
        memcpy(w->zeros, from->zeros,
               (size_t)(w->n_panels * PANEL_OUTPUTS * (w->n_steps / w->group_steps)));
    *out = w;
    return OK;
}

/* Codes of a checkpoint with zero points: numbers of the source read as bytes. */
static enum err codes_create(const struct format_row *f, int n, int k, const float *source,
                             struct weight **out)
{
    int64_t n_slots = (k + f->group - 1) / f->group * f->group;
    const uint8_t *bytes = (const uint8_t *)source;
    size_t n_groups = (size_t)(n * (n_slots / f->group));
    uint16_t *scales;
    uint8_t *zeros;
    TRY(MEM_NEW_ARRAY(n_groups, &scales));
    TRY(MEM_NEW_ARRAY(n_groups, &zeros));
    for (size_t i = 0; i < n_groups; i++)
        scales[i] = (uint16_t)(0x2000 + bytes[4 * i]), zeros[i] = bytes[4 * i + 1] & 15;
    struct int4_matrix m = {.n_out = n, .n_in = k, .n_slots = n_slots, .group = f->group};
    m.codes = bytes, m.scales = scales, m.zeros = zeros;
    enum err e = backend_cpu.weight_create_int4(bench.backend, &m, NULL, out);
    mem_free(scales);
    mem_free(zeros);
    return e;
}

static void matmul_shape(const struct format_row *f, int n, int k, float *source, float *x,
                         float *y)
{
    char name[32], kind[32];
    struct matmul_case c = {.n = n, .k = k, .x = x, .y = y};
    struct matrix_view view = {source, DTYPE_F32, n, k, k, 1};
    snprintf(name, sizeof name, "%dx%d", n, k);
    snprintf(kind, sizeof kind, "%s%s", f->name, bench.packed ? "/packed" : "");
    if (!wanted(f->name, name)) return;
    size_t total = 0;
    for (; total < ROTATE_BYTES && c.n_copies < COPIES_MAX; c.n_copies++) {
        if (c.n_copies ? weight_copy(c.weights[0], &c.weights[c.n_copies])
            : f->group ? codes_create(f, n, k, source, &c.weights[0])
                       : backend_cpu.weight_create(bench.backend, &view, 1, NULL, f->format,
                                                   &c.weights[0]))
            die(name);
        total += backend_cpu.weight_bytes(c.weights[c.n_copies]);
    }
    for (size_t i = 0; i < sizeof heights / sizeof *heights; i++) {
        c.m = bench.m ? bench.m : heights[i];
        struct norm_input in = {.x = {x, DTYPE_F32, c.m, k, k}};
        if (bench.packed)
            activations_pack_once(cpu_of(bench.backend), c.weights[0], &in, 0, c.m);
        run_case(
            &(struct bench_case){kind, name, c.m, (double)backend_cpu.weight_bytes(c.weights[0]),
                                 2.0 * c.m * n * k, f->peak, f->peak_operations, matmul_run, &c});
        if (bench.m) break;
    }
    while (c.n_copies > 0)
        backend_cpu.weight_destroy(bench.backend, c.weights[--c.n_copies]);
}

static void matmuls(void)
{
    float *source = bench.memory, *x, *y;
    if (mem_alloc_huge((size_t)M_MAX * K_MAX * 4, (void **)&x) ||
        mem_alloc_huge((size_t)M_MAX * N_MAX * 4, (void **)&y))
        die("memory");
    for (int i = 0; i < M_MAX * K_MAX; i++)
        x[i] = source[i];
    for (size_t f = 0; f < sizeof formats / sizeof *formats; f++)
        for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++)
            matmul_shape(&formats[f], shapes[s][0], shapes[s][1], source, x, y);
    mem_free_huge(x, (size_t)M_MAX * K_MAX * 4);
    mem_free_huge(y, (size_t)M_MAX * N_MAX * 4);
}

/* --- decode attention --- */

struct attention_case {
    struct kv_cache *kv;
    struct attention_args args;
    struct batch batch;
    struct tensor qkv, out;
    int32_t *tables;
    int n_contexts, blocks;
};

static void attention_run(void *arg, int turn)
{
    struct attention_case *c = arg;
    c->batch.block_table = c->tables + (size_t)(turn % c->n_contexts) * (size_t)c->blocks;
    backend_cpu.attend(bench.backend, c->out, c->qkv, c->kv, &c->args, &c->batch);
}

/* What it costs that a context is cut at fixed places, whoever computes it: the same attention with
 * one span a sequence, which threads share by KV heads alone, against the fixed spans, by turns. */
static void invariance_measure(const char *name, struct attention_case *c)
{
    static double ratios[SLICES_MAX], times[SLICES_MAX];
    struct cpu_backend *cpu = cpu_of(bench.backend);
    int fixed = cpu->attention_span, turn = 0, n = 0;
    struct bench_case run = {.run = attention_run, .arg = c};
    if (!wanted("invariance", name)) return;
    slice_run(&run, &turn);
    for (double start = now_s(); n < SLICES_MAX && (now_s() - start < bench.ms * 1e-3 || n < 7);
         n++) {
        double before = slice_run(&run, &turn);
        cpu->attention_span = (c->batch.context_len[0] + fixed - 1) / fixed * fixed;
        double whole = slice_run(&run, &turn);
        cpu->attention_span = fixed;
        times[n] = (before + slice_run(&run, &turn)) / 2;
        ratios[n] = times[n] / whole;
    }
    printf("invariance %-29s %9.1f us, of one span's time %.3f\n", name,
           typical(times, n, true) * 1e6, typical(ratios, n, true));
    fflush(stdout);
}

/* One sequence at a time over a rotating set of contexts, whose blocks lie in random order, or,
 * with a minus before the block size, one after another. */
static void attention_shape(int n_kv, int group, int head_dim, int context, int block_size,
                            enum dtype dtype)
{
    bool in_order = block_size < 0;
    block_size = abs(block_size);
    char name[64];
    static int32_t starts[2] = {0, 1}, position, length, slot;
    static const int32_t ids[1];
    static float row[256 * 512], out[256 * 512];
    snprintf(name, sizeof name, "%dx%dx%d/%d %s %s%d", n_kv, group, head_dim, context,
             dtype_name(dtype), in_order ? "in order " : "b", block_size);
    if (!wanted("attention", name) && !wanted("invariance", name)) return;
    struct kv_cache_args args = {1, n_kv, head_dim, block_size, 0, dtype};
    size_t context_bytes =
        (size_t)n_kv * (size_t)head_dim * 2 * dtype_bytes(dtype) * (size_t)context;
    struct attention_case c = {.n_contexts = (int)(ROTATE_BYTES / context_bytes) + 1,
                               .blocks = context / block_size};
    args.n_blocks = c.n_contexts * c.blocks;
    if (backend_cpu.kv_create(bench.backend, &args, &c.kv) ||
        MEM_NEW_ARRAY(args.n_blocks, &c.tables))
        die(name);
    struct rand r = rand_seeded(1);
    for (int32_t i = 0; i < args.n_blocks; i++) {
        int32_t at = (int32_t)rand_below(&r, (uint64_t)i + 1);
        c.tables[i] = c.tables[at], c.tables[at] = i;
        if (in_order) c.tables[i] = i;
    }
    int n_heads = n_kv * group, width = (n_heads + 2 * n_kv) * head_dim;
    for (int i = 0; i < width; i++)
        row[i] = (float)rand_unit(&r) - 0.5f;
    size_t block_bytes = backend_cpu.kv_bytes(bench.backend, &args) / (size_t)args.n_blocks;
    uint16_t *host;
    if (mem_alloc(block_bytes, (void **)&host)) die(name);
    for (size_t i = 0; i < block_bytes / 2; i++)
        host[i] = (uint16_t)(0x3c00 | (rand_next(&r) & 0x80ff));
    for (int32_t i = 0; i < args.n_blocks; i++)
        backend_cpu.kv_load(bench.backend, c.kv, i, host);
    position = context - 1, length = context;
    c.args = (struct attention_args){.n_heads = n_heads,
                                     .n_kv_heads = n_kv,
                                     .head_dim = head_dim,
                                     .scale = 0.1f,
                                     .group = group};
    c.batch =
        (struct batch){1, 1, 0, c.blocks, ids, ids, &position, starts, &length, NULL, &slot, NULL};
    c.qkv = (struct tensor){row, DTYPE_F32, 1, width, width};
    c.out = (struct tensor){out, DTYPE_F32, 1, n_heads * head_dim, n_heads * head_dim};
    if (wanted("attention", name))
        run_case(&(struct bench_case){"attention", name, 1, (double)context_bytes,
                                      4.0 * n_heads * head_dim * context, peak_bf16, 64,
                                      attention_run, &c});
    invariance_measure(name, &c);
    backend_cpu.kv_destroy(bench.backend, c.kv);
    mem_free(c.tables);
    mem_free(host);
}

static void attentions(void)
{
    static const int models[][3] = {{2, 7, 64}, {8, 4, 64}, {8, 4, 128}},
                     contexts[] = {4096, 16384}, sizes[] = {16, 32, 64, 256, -32};
    for (int m = 0; m < 3; m++)
        for (int c = 0; c < 2; c++)
            for (int s = 0; s < 5; s++) {
                attention_shape(models[m][0], models[m][1], models[m][2], contexts[c], sizes[s],
                                DTYPE_BF16);
                attention_shape(models[m][0], models[m][1], models[m][2], contexts[c], sizes[s],
                                DTYPE_I8);
            }
}

/* --- how far apart the cores are --- */

enum { ROUND_TRIPS = 20000 };
static _Alignas(64) _Atomic int ball;

static void *ball_return(void *arg)
{
    for (int i = 1; i < 2 * ROUND_TRIPS; i += 2) {
        while (atomic_load_explicit(&ball, memory_order_acquire) != i)
            ;
        atomic_store_explicit(&ball, i + 1, memory_order_release);
    }
    return arg;
}

/* Nanoseconds in which a line goes to another core and back; 0 when there is no thread for it. */
static double round_trip_ns(void)
{
    pthread_t thread;
    atomic_store(&ball, 0);
    if (bench.threads < 2 || pthread_create(&thread, NULL, ball_return, NULL)) return 0;
    int64_t start = clock_monotonic_ns();
    for (int i = 0; i < 2 * ROUND_TRIPS; i += 2) {
        atomic_store_explicit(&ball, i + 1, memory_order_release);
        while (atomic_load_explicit(&ball, memory_order_acquire) != i + 2)
            ;
    }
    int64_t ns = clock_monotonic_ns() - start;
    pthread_join(thread, NULL);
    return (double)ns / ROUND_TRIPS;
}

static void arguments(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        if (!strncmp(argv[i], "threads=", 8))
            bench.threads = (int)strtol(argv[i] + 8, NULL, 10);
        else if (!strncmp(argv[i], "m=", 2))
            bench.m = (int)strtol(argv[i] + 2, NULL, 10);
        else if (!strcmp(argv[i], "best=1"))
            bench.best = true;
        else if (!strcmp(argv[i], "packed=1"))
            bench.packed = true;
        else if (!strcmp(argv[i], "clock=cpu"))
            bench.cpu_clock = true;
        else if (!strncmp(argv[i], "ms=", 3))
            bench.ms = (int)strtol(argv[i] + 3, NULL, 10);
        else if (!strncmp(argv[i], "csv=", 4))
            bench.csv = argv[i] + 4;
        else if (!strncmp(argv[i], "only=", 5))
            bench.only = argv[i] + 5;
        else if (!strncmp(argv[i], "isa=", 4))
            bench.isa = argv[i] + 4;
        else {
            fprintf(stderr, "usage: bench_kernels [threads=N] [ms=N] [csv=FILE] [only=TEXT] "
                            "[m=ROWS] [isa=NAME] [clock=cpu] [best=1] [packed=1]\n");
            exit(2);
        }
    }
    if (bench.threads < 1) bench.threads = pool_cores();
}

int main(int argc, char **argv)
{
    arguments(argc, argv);
    struct backend_options options = {.n_threads = bench.threads,
                                      .n_tokens_max = M_MAX,
                                      .n_rows_max = 16,
                                      .n_slots_max = 16,
                                      .vocab_size = 1024,
                                      .isa = bench.isa};
    if (backend_cpu.open(&options, &bench.backend)) die("open");
    bench.pool = cpu_of(bench.backend)->pool; /* one of its own would spin beside it */
    if (mem_alloc_huge(ROTATE_BYTES, (void **)&bench.memory)) die("memory");
    struct rand r = rand_seeded(7);
    for (size_t i = 0; i < ROTATE_BYTES / 4; i += 2) {
        uint64_t w = rand_next(&r);
        bench.memory[i] = (float)(int32_t)w * 0x1p-35f,
        bench.memory[i + 1] = (float)(int32_t)(w >> 32) * 0x1p-35f;
    }
    if (bench.csv && !(bench.out = fopen(bench.csv, "we"))) die(bench.csv);
    if (bench.out)
        fprintf(bench.out,
                "kind,shape,m,threads,us,gb_s,read_gb_s,gop_s,peak_gop_s,share_of_bound\n");
    for (double start = now_s(); now_s() - start < 0.3;)
        peak_rate(peak_float, 32); /* clocks settle */
    printf("threads %d: read %.1f GB/s, int8 %.0f, bf16 %.0f, float %.0f GOP/s, a line there and "
           "back %.0f ns\n",
           bench.threads, read_rate() * 1e-9, peak_rate(peak_int8, 128) * 1e-9,
           peak_rate(peak_bf16, 64) * 1e-9, peak_rate(peak_float, 32) * 1e-9, round_trip_ns());
    matmuls();
    if (bench.m <= 1) attentions(); /* their rows count as one */
    if (bench.out) fclose(bench.out);
    backend_cpu.close(bench.backend);
    mem_free_huge(bench.memory, ROTATE_BYTES);
    return 0;
}
