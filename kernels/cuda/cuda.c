/* The CUDA backend: its table, its opening and closing, its memory and its errors. */
#include "kernels/cuda/cuda.h"
#include "base/log.h"
#include "base/mem.h"
#include "kernels/cuda/probe.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum err cuda_check(cudaError_t result, const char *what)
{
    if (result == cudaSuccess) return OK;
    if (result == cudaErrorMemoryAllocation)
        FAIL(ERR_NO_MEMORY, "CUDA: out of device memory: %s", what);
    FAIL(ERR_DEVICE, "CUDA: %s: %s", what, cudaGetErrorString(result));
}

bool cuda_ok(struct cuda_backend *b, cudaError_t result, const char *what)
{
    if (result == cudaSuccess) return !b->failed;
    if (b->failed) return false;
    b->failed = ERR_DEVICE;
    snprintf(b->why, sizeof b->why, "CUDA: %s: %s", what, cudaGetErrorString(result));
    return false;
}

enum err cuda_alloc(struct cuda_backend *b, size_t bytes, void **out)
{
    void *mem;
    char what[64];
    if (!bytes) bytes = 1;
    snprintf(what, sizeof what, "%zu bytes", bytes);
    TRY(cuda_check(cudaMalloc(&mem, bytes), what));
    enum err e = cuda_check(cudaMemsetAsync(mem, 0, bytes, b->stream), "clearing memory");
    if (!e) e = cuda_check(cudaStreamSynchronize(b->stream), "clearing memory");
    if (e)
        cudaFree(mem);
    else
        *out = mem;
    return e;
}

void cuda_free(struct cuda_backend *b, void *mem)
{
    if (mem && !b->failed) cudaFree(mem);
}

void cuda_quiesce(struct cuda_backend *b)
{
    if (b->stream && !b->failed) cuda_sync(&b->base);
}

enum err cuda_reserve(struct cuda_backend *b, void **mem, size_t *have, size_t bytes)
{
    if (bytes <= *have) return OK;
    TRY(cuda_check(cudaStreamSynchronize(b->stream), "waiting for the device"));
    cuda_free(b, *mem);
    *mem = NULL;
    *have = 0;
    TRY(cuda_alloc(b, bytes, mem));
    *have = bytes;
    return OK;
}

static void cuda_close(struct backend *base)
{
    struct cuda_backend *b = cuda_of(base);
    if (!b) return;
    cuda_quiesce(b);
    lt_close(b->lt);
    cuda_trace_close(b);
    cuda_steps_close(b);
    cuda_free(b, b->split_out);
    cuda_free(b, b->split_ml);
    cuda_free(b, b->x_8);
    cuda_free(b, b->x_scales);
    cuda_free(b, b->scratch);
    cuda_free(b, b->ordered);
    cuda_free(b, b->moe_scratch);
    if (b->stream && !b->failed) cudaStreamDestroy(b->stream);
    if (b->side && !b->failed) cudaStreamDestroy(b->side);
    mem_free(b);
}

static enum err options_check(const struct backend_options *o)
{
    if (o->n_slots_max < 1 || o->n_tokens_max < 1 || o->n_rows_max < 1 || o->vocab_size < 1)
        FAIL(ERR_INVALID, "CUDA: limits of %d slots, %d tokens, %d rows, %d words", o->n_slots_max,
             o->n_tokens_max, o->n_rows_max, o->vocab_size);
    return OK;
}

static enum err device_open(struct cuda_backend *b)
{
    int device = b->options.device;
    TRY(cuda_check(cudaSetDevice(device), "choosing the device"));
    TRY(cuda_check(cudaDeviceGetAttribute(&b->n_sms, cudaDevAttrMultiProcessorCount, device),
                   "asking the device"));
    TRY(cuda_check(cudaStreamCreateWithFlags(&b->stream, cudaStreamNonBlocking),
                   "making a stream"));
    TRY(cuda_check(cudaStreamCreateWithFlags(&b->side, cudaStreamNonBlocking), "making a stream"));
    b->base.stream = b->stream;
    TRY(cuda_steps_open(b));
    TRY(cuda_trace_open(b));
    TRY(cuda_overlap_try(b));
    if (lt_open(b, &b->lt) != OK) log_warn("CUDA: products by own kernels: %s", err_detail());
    return OK;
}

static enum err cuda_open(const struct backend_options *options, struct backend **out)
{
    struct cuda_backend *b;
    int capability;
    const char *wait = getenv("HEDDLE_CUDA_WAIT_MS");
    int device = options->device < 0 ? 0 : options->device; /* negative: whichever comes first */
    TRY(cuda_probe(device, &capability));
    TRY(options_check(options));
    TRY(MEM_NEW(&b));
    b->base = (struct backend){&heddle_backend_cuda, DTYPE_BF16, NULL};
    b->options = *options;
    b->options.device = device;
    b->capability = capability;
    b->quantize_type = DTYPE_F32;
    b->wait_ms_max = wait && strtol(wait, NULL, 10) > 0 ? (int)strtol(wait, NULL, 10) : WAIT_MS_MAX;
    enum err e = device_open(b);
    if (e)
        cuda_close(&b->base);
    else
        *out = &b->base;
    return e;
}

static enum err cuda_memory(struct backend *base, size_t *out_free, size_t *out_total)
{
    size_t available, total;
    (void)base;
    TRY(cuda_check(cudaMemGetInfo(&available, &total), "asking for free memory"));
    *out_free = available;
    *out_total = total;
    return OK;
}

static enum err cuda_alloc_op(struct backend *base, size_t bytes, void **out)
{
    return cuda_alloc(cuda_of(base), bytes, out);
}

static void cuda_release(struct backend *base, void *mem)
{
    cuda_quiesce(cuda_of(base));
    cuda_free(cuda_of(base), mem);
}

static enum err cuda_upload(struct backend *base, void *dst, const void *src, size_t bytes)
{
    struct cuda_backend *b = cuda_of(base);
    b->quantized.of = NULL;
    TRY(cuda_check(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, b->stream),
                   "uploading"));
    return cuda_sync(base);
}

static enum err cuda_download(struct backend *base, void *dst, const void *src, size_t bytes)
{
    struct cuda_backend *b = cuda_of(base);
    TRY(cuda_check(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, b->stream),
                   "downloading"));
    return cuda_sync(base);
}

const struct backend_ops heddle_backend_cuda = {
    .abi = BACKEND_ABI,
    .name = "cuda",
    .open = cuda_open,
    .close = cuda_close,
    .memory = cuda_memory,
    .alloc = cuda_alloc_op,
    .release = cuda_release,
    .upload = cuda_upload,
    .download = cuda_download,
    .weight_create = cuda_weight_create,
    .weight_create_int4 = cuda_weight_create_int4,
    .weight_destroy = cuda_weight_destroy,
    .weight_bytes = cuda_weight_bytes,
    .table_create = cuda_table_create,
    .block_size_default = cuda_block_size_default,
    .kv_bytes = cuda_kv_bytes,
    .kv_create = cuda_kv_create,
    .kv_destroy = cuda_kv_destroy,
    .batch_begin = cuda_batch_begin,
    .embed = cuda_embed,
    .add_positions = cuda_add_positions,
    .add_norm = cuda_add_norm,
    .add = cuda_add,
    .scale = cuda_scale,
    .matmul = cuda_matmul,
    .activate = cuda_activate,
    .qkv_prepare = cuda_qkv_prepare,
    .attend = cuda_attend,
    .gather = cuda_gather,
    .sample = cuda_sample,
    .feed = cuda_feed,
    .kv_copy = cuda_kv_copy,
    .kv_save = cuda_kv_save,
    .kv_load = cuda_kv_load,
    .step_end = cuda_step_end,
    .ticket_wait = cuda_ticket_wait,
    .ticket_ready = cuda_ticket_ready,
    .sync = cuda_sync,
    .capture_begin = cuda_capture_begin,
    .capture_end = cuda_capture_end,
    .replay = cuda_replay,
    .graph_destroy = cuda_graph_destroy,
    .moe_create = cuda_moe_create,
    .moe_destroy = cuda_moe_destroy,
    .moe_forward = cuda_moe_forward,
};
