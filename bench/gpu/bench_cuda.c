/* Times the CUDA backend's operations on this card, against limits measured on the same card in the
 * same run: its copy bandwidth and the best product that cuBLASLt makes.
 *
 * Output: CSV, a row a case; the last column is the share of the limit that binds the case. Run by
 * tools/gpu_suite.sh; on the emulated device the figures mean nothing and it says so. */
#include "base/clock.h"
#include "base/mem.h"
#include "kernels/backend.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TOKENS_MAX = 4096, ROUNDS = 20 };

static struct backend *b;
static double copy_gbs, product_tflops; /* the card's limits, measured first */

static void must(enum err e)
{
    if (!e) return;
    fprintf(stderr, "%s: %s\n", err_name(e), err_detail());
    exit(1);
}

/* Milliseconds of one call: the stream is filled, then waited for. */
static double time_ms(void (*work)(void *), void *context)
{
    work(context);
    must(b->ops->sync(b));
    int64_t start = clock_monotonic_ns();
    for (int i = 0; i < ROUNDS; i++)
        work(context);
    must(b->ops->sync(b));
    return (double)(clock_monotonic_ns() - start) / 1e6 / ROUNDS;
}

static void row(const char *what, const char *shape, double ms, double bytes, double flops)
{
    double gbs = bytes / ms / 1e6, tflops = flops / ms / 1e9;
    double by_copy = copy_gbs > 0 ? gbs / copy_gbs : 0,
           by_product = product_tflops > 0 ? tflops / product_tflops : 0;
    printf("%s,%s,%.4f,%.5g,%.5g,%.3f\n", what, shape, ms, gbs, tflops,
           by_copy > by_product ? by_copy : by_product);
    fflush(stdout);
}

static struct tensor tensor_new(int64_t rows, int64_t cols, enum dtype t)
{
    struct tensor x = {NULL, t, rows, cols, cols};
    must(b->ops->alloc(b, (size_t)(rows * cols) * dtype_bytes(t), &x.data));
    return x;
}

struct copy_case {
    struct kv_cache *kv;
    int32_t from[256], to[256];
};
static void copy_run(void *context)
{
    struct copy_case *c = context;
    b->ops->kv_copy(b, c->kv, c->from, c->to, 256);
}

static void limits_copy(void)
{
    struct copy_case c;
    struct kv_cache_args args = {8, 8, 128, 64, 512, DTYPE_BF16};
    must(b->ops->kv_create(b, &args, &c.kv));
    for (int i = 0; i < 256; i++)
        c.from[i] = i, c.to[i] = 256 + i;
    double ms = time_ms(copy_run, &c),
           bytes = (double)b->ops->kv_bytes(b, &args); /* half read, half written */
    copy_gbs = bytes / ms / 1e6;
    row("limit: copy", "blocks", ms, bytes, 0);
    b->ops->kv_destroy(b, c.kv);
}

struct product {
    struct tensor out, x;
    struct weight *w;
};
static void product_run(void *context)
{
    struct product *p = context;
    b->ops->matmul(b, p->out, p->x, p->w);
}

static double product_time(int rows, int n_out, int n_in, enum weight_format format,
                           const char *what)
{
    struct product p = {tensor_new(rows, n_out, DTYPE_BF16), tensor_new(rows, n_in, DTYPE_BF16),
                        NULL};
    char shape[64];
    float *w;
    must(mem_alloc((size_t)n_out * (size_t)n_in * 4, (void **)&w));
    for (int64_t i = 0; i < (int64_t)n_out * n_in; i++)
        w[i] = (float)(i * 2654435761u % 1024) / 4096 - 0.125f;
    enum err e = b->ops->weight_create(b, &(struct matrix_view){w, DTYPE_F32, n_out, n_in, n_in, 1},
                                       1, NULL, format, &p.w);
    mem_free(w);
    double ms = 0;
    if (e) {
        fprintf(stderr, "%s left out: %s\n", what, err_detail());
    } else {
        ms = time_ms(product_run, &p);
        snprintf(shape, sizeof shape, "%dx%dx%d", rows, n_out, n_in);
        row(what, shape, ms, (double)b->ops->weight_bytes(p.w) + 2.0 * rows * (n_in + n_out),
            2.0 * rows * n_out * n_in);
        b->ops->weight_destroy(b, p.w);
    }
    b->ops->release(b, p.out.data);
    b->ops->release(b, p.x.data);
    return ms;
}

struct attention {
    struct tensor qkv, out;
    struct kv_cache *kv;
    struct attention_args args;
    struct batch batch;
};
static void attention_run(void *context)
{
    struct attention *a = context;
    b->ops->attend(b, a->out, a->qkv, a->kv, &a->args, &a->batch);
}

/* Sequences of `context` tokens, of which the last n_new are computed now. */
static void attention_time(int n_seqs, int context, int n_new, enum dtype cache, const char *what)
{
    enum { HEADS = 32, KV = 8, DIM = 128, BLOCK = 16 };
    int blocks = context / BLOCK, n = n_seqs * n_new;
    int32_t *ints;
    char shape[64];
    struct kv_cache_args kv = {1, KV, DIM, BLOCK, blocks * n_seqs, cache};
    struct attention a = {.qkv = tensor_new(n, (HEADS + 2 * KV) * DIM, DTYPE_BF16),
                          .out = tensor_new(n, HEADS * DIM, DTYPE_BF16)};
    a.args = (struct attention_args){
        .n_heads = HEADS, .n_kv_heads = KV, .head_dim = DIM, .scale = 0.088f, .group = HEADS / KV};
    must(b->ops->kv_create(b, &kv, &a.kv));
    must(
        mem_alloc(((size_t)n * 4 + (size_t)n_seqs * (size_t)(blocks + 2) + 1) * 4, (void **)&ints));
    int32_t *ids = ints, *slots = ids + n, *positions = slots + n, *places = positions + n,
            *starts = places + n, *lens = starts + n_seqs + 1, *table = lens + n_seqs;
    for (int i = 0; i < n; i++)
        ids[i] = 1, slots[i] = i / n_new, positions[i] = context - n_new + i % n_new,
        places[i] = -1;
    for (int q = 0; q < n_seqs; q++) {
        starts[q] = q * n_new, lens[q] = context;
        for (int i = 0; i < blocks; i++)
            table[q * blocks + i] =
                (int32_t)(((int64_t)(q * blocks + i) * 7919) % (blocks * n_seqs));
    }
    starts[n_seqs] = n;
    a.batch = (struct batch){n,         n_seqs, 0,    blocks, ids,    slots,
                             positions, starts, lens, table,  places, NULL};
    b->ops->batch_begin(b, &a.batch);
    double ms = time_ms(attention_run, &a), seen = (double)context - (n_new - 1) / 2.0;
    snprintf(shape, sizeof shape, "%d x %d of %d", n_seqs, n_new, context);
    row(what, shape, ms, (double)b->ops->kv_bytes(b, &kv), 4.0 * n * seen * HEADS * DIM);
    must(b->ops->ticket_wait(b, b->ops->step_end(b)));
    b->ops->kv_destroy(b, a.kv);
    b->ops->release(b, a.qkv.data);
    b->ops->release(b, a.out.data);
    mem_free(ints);
}

static void open_device(int tokens_max, int vocab)
{
    struct backend_options o = {.n_slots_max = 128,
                                .n_tokens_max = tokens_max,
                                .n_rows_max = 128,
                                .vocab_size = vocab,
                                .numa_node = -1};
    must(backend_open("cuda", &o, &b));
    printf("what,shape,ms,gb_s,tflop_s,share\n");
}

/* One small case of each kind: that the program itself works, on the emulated device. */
static int tiny(void)
{
    open_device(64, 512);
    double ms = product_time(16, 64, 64, WEIGHT_BF16, "limit: product bf16");
    product_tflops = 2.0 * 16 * 64 * 64 / ms / 1e9;
    product_time(4, 64, 128, WEIGHT_INT4, "product int4");
    attention_time(2, 32, 1, DTYPE_BF16, "decode bf16");
    attention_time(2, 32, 1, DTYPE_FP8_E4M3, "decode fp8");
    attention_time(1, 32, 16, DTYPE_BF16, "prefill bf16");
    b->ops->close(b);
    return 0;
}

int main(int argc, char **argv)
{
    bool quick = argc > 1 && !strcmp(argv[1], "--quick");
    if (argc > 1 && !strcmp(argv[argc - 1], "--tiny")) return tiny();
    open_device(TOKENS_MAX, 128256);
    limits_copy();
    double ms = product_time(4096, 8192, 8192, WEIGHT_BF16, "limit: product bf16");
    product_tflops = 2.0 * 4096 * 8192 * 8192 / ms / 1e9;
    static const struct {
        enum weight_format format;
        const char *name;
    } formats[] = {{WEIGHT_BF16, "product bf16"},
                   {WEIGHT_FP8, "product fp8"},
                   {WEIGHT_INT8, "product int8"},
                   {WEIGHT_INT4, "product int4"}};
    static const int rows[] = {1, 4, 16, 64, 256, 2048};
    for (size_t f = 0; f < (quick ? 1 : 4); f++)
        for (size_t r = 0; r < (quick ? 2 : 6); r++) {
            product_time(rows[r], 6144, 4096, formats[f].format, formats[f].name);
            product_time(rows[r], 28672, 4096, formats[f].format, formats[f].name);
            product_time(rows[r], 4096, 14336, formats[f].format, formats[f].name);
        }
    attention_time(1, 4096, 1, DTYPE_BF16, "decode bf16");
    attention_time(64, 1024, 1, DTYPE_BF16, "decode bf16");
    if (!quick) attention_time(64, 4096, 1, DTYPE_BF16, "decode bf16");
    if (!quick) attention_time(64, 4096, 1, DTYPE_FP8_E4M3, "decode fp8");
    attention_time(1, 2048, 2048, DTYPE_BF16, "prefill bf16");
    if (!quick) attention_time(1, 8192, 4096, DTYPE_BF16, "prefill bf16");
    b->ops->close(b);
    return 0;
}
