/* The KV cache on the device and the operations around it. */
#include "base/mem.h"
#include "kernels/cuda/cuda.h"

#include <math.h>
#include <string.h>

enum {
    BLOCK_SIZE_DEFAULT = 16,
    TILE_TOKENS = 16,
    SPLIT_BLOCKS = 6 /* of a multiprocessor at most */
};

int cuda_block_size_default(struct backend *base)
{
    (void)base;
    return BLOCK_SIZE_DEFAULT;
}

static enum err kv_check(const struct kv_cache_args *a)
{
    if (a->dtype != DTYPE_BF16 && a->dtype != DTYPE_I8 && a->dtype != DTYPE_FP8_E4M3)
        FAIL(ERR_UNSUPPORTED, "a KV cache of type %s is not supported on CUDA: bf16, int8 or fp8",
             dtype_name(a->dtype));
    if (a->block_size < TILE_TOKENS || a->block_size % TILE_TOKENS || a->block_size > 4096)
        FAIL(ERR_INVALID, "a KV block of %d tokens: CUDA needs a multiple of %d up to 4096",
             a->block_size, TILE_TOKENS);
    if (!attention_supports(a->head_dim))
        FAIL(ERR_UNSUPPORTED,
             "heads of %d are not supported on CUDA: 16, 32, 64, 80, 96, 128 or 256", a->head_dim);
    if (a->n_layers < 0 || a->n_kv_heads < 0 || a->n_blocks < 0)
        FAIL(ERR_INVALID, "a KV cache of %d layers, %d heads, %d blocks", a->n_layers,
             a->n_kv_heads, a->n_blocks);
    return OK;
}

/* Bytes of one block of one layer: rows of K and V, and for 8 bits a scale for each. */
static size_t block_bytes(const struct kv_cache_args *a)
{
    size_t rows = (size_t)2 * (size_t)a->n_kv_heads * (size_t)a->block_size;
    size_t scale = a->dtype == DTYPE_BF16 ? 0 : sizeof(float);
    return rows * ((size_t)a->head_dim * dtype_bytes(a->dtype) + scale);
}

size_t cuda_kv_bytes(struct backend *base, const struct kv_cache_args *args)
{
    size_t bytes;
    (void)base;
    if (kv_check(args)) return 0;
    return size_mul(block_bytes(args) * (size_t)args->n_layers, (size_t)args->n_blocks, &bytes)
               ? bytes
               : 0;
}

/* Partial results of split attention: keys are split only as long as there are at most SPLIT_BLOCKS
 * blocks for each multiprocessor. */
static enum err splits_reserve(struct cuda_backend *b, int head_dim)
{
    size_t rows = (size_t)(SPLIT_BLOCKS * b->n_sms) * DECODE_ROWS;
    TRY(cuda_reserve(b, (void **)&b->split_out, &b->split_out_bytes,
                     rows * (size_t)head_dim * sizeof(float)));
    return cuda_reserve(b, (void **)&b->split_ml, &b->split_ml_bytes, rows * 2 * sizeof(float));
}

enum err cuda_kv_create(struct backend *base, const struct kv_cache_args *args,
                        struct kv_cache **out)
{
    struct cuda_backend *b = cuda_of(base);
    struct kv_cache *kv;
    size_t bytes, table;
    TRY(kv_check(args));
    if (!size_mul(block_bytes(args) * (size_t)args->n_layers, (size_t)args->n_blocks, &bytes) ||
        !size_mul((size_t)b->options.n_slots_max, (size_t)args->n_blocks, &table))
        FAIL(ERR_NO_MEMORY, "a KV cache of %d layers, %d blocks", args->n_layers, args->n_blocks);
    TRY(cuda_step_table_reserve(b, table));
    TRY(splits_reserve(b, args->head_dim));
    TRY(MEM_NEW(&kv));
    kv->args = *args;
    kv->block_bytes = block_bytes(args);
    enum err e = cuda_alloc(b, bytes, (void **)&kv->data);
    if (e)
        mem_free(kv);
    else
        *out = kv;
    return e;
}

void cuda_kv_destroy(struct backend *base, struct kv_cache *kv)
{
    if (!kv) return;
    cuda_quiesce(cuda_of(base));
    cuda_free(cuda_of(base), kv->data);
    mem_free(kv);
}

static size_t layer_bytes(const struct kv_cache *kv)
{
    return kv->block_bytes * (size_t)kv->args.n_blocks;
}

void cuda_kv_copy(struct backend *base, struct kv_cache *kv, const int32_t *src, const int32_t *dst,
                  int n)
{
    struct cuda_backend *b = cuda_of(base);
    struct kv_pairs pairs;
    if (!kv->block_bytes || !kv->args.n_layers) return;
    for (int done = 0; done < n && !b->failed; done += pairs.n) {
        pairs.n = n - done < KV_PAIRS_MAX ? n - done : KV_PAIRS_MAX;
        memcpy(pairs.from, src + done, (size_t)pairs.n * sizeof *src);
        memcpy(pairs.to, dst + done, (size_t)pairs.n * sizeof *dst);
        int r = launch_kv_copy(kv->data, kv->block_bytes, layer_bytes(kv), kv->args.n_layers,
                               &pairs, b->stream);
        cuda_ok(b, (cudaError_t)r, "kv_copy");
    }
}

void cuda_kv_save(struct backend *base, struct kv_cache *kv, int32_t block, void *host)
{
    struct cuda_backend *b = cuda_of(base);
    if (b->failed) return;
    cudaError_t r = cudaMemcpy2DAsync(
        host, kv->block_bytes, kv->data + (size_t)block * kv->block_bytes, layer_bytes(kv),
        kv->block_bytes, (size_t)kv->args.n_layers, cudaMemcpyDeviceToHost, b->stream);
    cuda_ok(b, r, "kv_save");
}

void cuda_kv_load(struct backend *base, struct kv_cache *kv, int32_t block, const void *host)
{
    struct cuda_backend *b = cuda_of(base);
    if (b->failed) return;
    cudaError_t r = cudaMemcpy2DAsync(kv->data + (size_t)block * kv->block_bytes, layer_bytes(kv),
                                      host, kv->block_bytes, kv->block_bytes,
                                      (size_t)kv->args.n_layers, cudaMemcpyHostToDevice, b->stream);
    cuda_ok(b, r, "kv_load");
}

static struct kv_layout layout(const struct kv_cache *kv, int layer)
{
    return (struct kv_layout){.data = kv->data + (size_t)layer * layer_bytes(kv),
                              .block_bytes = kv->block_bytes,
                              .block_size = kv->args.block_size,
                              .n_kv_heads = kv->args.n_kv_heads,
                              .head_dim = kv->args.head_dim,
                              .dtype = kv->args.dtype};
}

void cuda_qkv_prepare(struct backend *base, struct tensor qkv, struct kv_cache *kv,
                      const struct attention_args *args, const struct batch *batch)
{
    struct cuda_backend *b = cuda_of(base);
    (void)batch;
    ASSERT_CMP(args->head_dim, ==, kv->args.head_dim);
    ASSERT_CMP(args->n_kv_heads, ==, kv->args.n_kv_heads);
    cuda_written(b, qkv);
    if (b->failed || !qkv.rows || !qkv.cols) return;
    int r = launch_qkv_prepare(qkv, layout(kv, args->layer), args, &b->batch, b->stream);
    cuda_ok(b, (cudaError_t)r, "qkv_prepare");
}

/* Into how many parts the keys of each sequence are cut. A block alone draws all that its
 * multiprocessor can from memory, so the time is that of the multiprocessor with the most blocks:
 * its shares of keys, and for each block what beginning and ending one costs, taken as a 25th of an
 * uncut one; where keys are cut, one such piece more for putting the parts together. */
static int split_count(const struct cuda_backend *b, int n_blocks)
{
    int best = 1;
    double least = INFINITY;
    for (int n = 1; n == 1 || (n <= SPLITS_MAX && n * n_blocks <= SPLIT_BLOCKS * b->n_sms); n++) {
        double rounds = (n * n_blocks + b->n_sms - 1) / b->n_sms;
        double keys = rounds / n * (rounds < 2 ? 8.0 / 7 : 1),
               cost = keys + (rounds + (n > 1)) / 25;
        if (cost < least) least = cost, best = n;
    }
    return best;
}

void cuda_attend(struct backend *base, struct tensor out, struct tensor qkv, struct kv_cache *kv,
                 const struct attention_args *args, const struct batch *batch)
{
    struct cuda_backend *b = cuda_of(base);
    cuda_written(b, out);
    if (b->failed || !batch->n_tokens || !args->n_heads || !args->n_kv_heads) return;
    cuda_tiles_prepare(b, batch, args->group);
    struct attend_call call = {.out = out,
                               .qkv = qkv,
                               .kv = layout(kv, args->layer),
                               .args = *args,
                               .batch = b->batch,
                               .n_seqs = batch->n_seqs,
                               .n_tiles = b->n_tiles,
                               .n_splits = split_count(b, batch->n_seqs * args->n_kv_heads),
                               .bulk_copy = b->capability >= 90,
                               .tiles_only = b->options.deterministic,
                               .split_out = b->split_out,
                               .split_ml = b->split_ml};
    bool any_decode = false;
    for (int q = 0; q < batch->n_seqs && !call.tiles_only; q++)
        any_decode |= (batch->seq_start[q + 1] - batch->seq_start[q]) * args->group <= DECODE_ROWS;
    if (any_decode) cuda_ok(b, (cudaError_t)launch_decode(&call, b->stream), "decode attention");
    if (call.n_tiles)
        cuda_ok(b, (cudaError_t)launch_prefill(&call, b->stream), "prefill attention");
}
