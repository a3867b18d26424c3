/* x w^T + bias: which product serves which format, and the 8-bit codes that go before it.
 *
 *   BF16   cuBLASLt; own tiles where it is absent or every sum must keep one order
 *   F16    x narrowed to F16, cuBLASLt into F32, rounded
 *   INT8   x in 8 bits by token, cuBLASLt into I32, scaled
 *   FP8    x in 8 bits by token, cuBLASLt with both scales; or into F32, then scaled
 *   INT4   few rows: own, codes read once; many: expanded to BF16, then as BF16; INT4_GROUPS too,
 *          after x was put in the order of its slots, where they have one
 * The operation before usually wrote the codes already (quantized ahead). */
#include "kernels/cuda/cuda.h"

#include <string.h>

enum { EXPAND_ROWS_MIN = 65 };
static const size_t SCRATCH_BYTES = (size_t)64 << 20;

static bool use_library(const struct cuda_backend *b)
{
    return b->lt && !b->options.deterministic;
}

static enum dtype code_type(enum weight_format f)
{
    return f == WEIGHT_INT8 ? DTYPE_I8 : f == WEIGHT_FP8 ? DTYPE_FP8_E4M3 : DTYPE_F32;
}

/* The raw products of one row, and its F16 copy, in scratch. */
static size_t scratch_row_bytes(const struct weight *w)
{
    size_t raw = (size_t)w->n_out_padded * 4, half = (size_t)w->n_in_padded * 2;
    return w->format == WEIGHT_F16 ? raw + half : raw;
}

static struct gemm gemm_of(const struct weight *w, enum dtype type, enum dtype out_type,
                           int64_t rows)
{
    return (struct gemm){.n_out = w->n_out,
                         .n_in = type == DTYPE_BF16 ? w->n_product : w->n_in_padded,
                         .rows = rows,
                         .type = type,
                         .out_type = out_type,
                         .w = w->data,
                         .w_stride = w->n_in_padded};
}

/* The product into scratch, before scales and bias; its rows are padded. */
static struct gemm raw_of(const struct weight *w, enum dtype type, int64_t rows)
{
    struct gemm g = gemm_of(w, type, type == DTYPE_I8 ? DTYPE_I32 : DTYPE_F32, rows);
    g.n_out = g.out_stride = w->n_out_padded;
    g.x_stride = w->n_in_padded;
    return g;
}

static void *bias_for(const struct weight *w, enum dtype out_type)
{
    return out_type == DTYPE_F32 ? (void *)w->bias : w->bias_16;
}

static void prepare_direct(struct cuda_backend *b, struct weight *w, enum dtype type)
{
    static const enum dtype outs[] = {DTYPE_BF16, DTYPE_F32};
    bool all = true;
    for (int i = 0; i < 2; i++) {
        struct gemm g = gemm_of(w, type, outs[i], b->options.n_tokens_max);
        g.bias = bias_for(w, outs[i]);
        if (type == DTYPE_FP8_E4M3) g.x_scales = g.w_scales = w->scales;
        all = lt_prepare(b->lt, &g) && all;
    }
    w->library = all;
}

enum err cuda_matmul_prepare(struct cuda_backend *b, struct weight *w)
{
    size_t tokens = (size_t)b->options.n_tokens_max, scratch = 0;
    if (!w->n_in || !w->n_out) return OK; /* an empty share of a weight */
    enum dtype codes = code_type(w->format);
    if (codes != DTYPE_F32) {
        if (b->quantize_type != DTYPE_F32 && b->quantize_type != codes)
            FAIL(ERR_UNSUPPORTED, "weights in int8 and in fp8 on one device");
        b->quantize_type = codes;
        size_t scales = b->x_scales ? tokens * sizeof(float) : 0;
        TRY(cuda_reserve(b, &b->x_8, &b->x_8_bytes, tokens * (size_t)w->n_in_padded));
        TRY(cuda_reserve(b, (void **)&b->x_scales, &scales, tokens * sizeof(float)));
    }
    if (w->format == WEIGHT_BF16 && use_library(b)) prepare_direct(b, w, DTYPE_BF16);
    if (w->format == WEIGHT_FP8 && w->n_out == w->n_out_padded)
        prepare_direct(b, w, DTYPE_FP8_E4M3);
    bool raw = w->format == WEIGHT_F16 || w->format == WEIGHT_INT8 || w->format == WEIGHT_FP8;
    if (raw) {
        enum dtype type = w->format == WEIGHT_F16 ? DTYPE_F16 : codes;
        struct gemm g = raw_of(w, type, (int64_t)tokens);
        if (!lt_prepare(b->lt, &g))
            FAIL(ERR_UNSUPPORTED, "cuBLASLt has no kernel for a %s weight of %lld x %lld",
                 dtype_name(type), (long long)w->n_out, (long long)w->n_in);
        size_t row = scratch_row_bytes(w);
        scratch = row * tokens < SCRATCH_BYTES ? row * tokens
                  : row * 16 > SCRATCH_BYTES   ? row * 16
                                               : SCRATCH_BYTES;
    }
    if (w->order)
        TRY(cuda_reserve(b, &b->ordered, &b->ordered_bytes, tokens * (size_t)w->n_in_padded * 2));
    if ((w->format == WEIGHT_INT4 || w->format == WEIGHT_INT4_GROUPS) && use_library(b)) {
        scratch = (size_t)(w->n_out * w->n_in_padded) * 2;
        prepare_direct(b, w, DTYPE_BF16);
    }
    return cuda_reserve(b, &b->scratch, &b->scratch_bytes, scratch);
}

static int64_t code_stride(int64_t cols)
{
    return (cols + 31) / 32 * 32;
}

struct quantize_to cuda_quantize_target(struct cuda_backend *b, struct tensor out)
{
    int64_t stride = code_stride(out.cols);
    if (b->quantize_type == DTYPE_F32 || out.dtype != DTYPE_BF16 ||
        out.rows > b->options.n_tokens_max || (size_t)(out.rows * stride) > b->x_8_bytes)
        return (struct quantize_to){0};
    b->quantized.of = out.data;
    b->quantized.rows = out.rows;
    b->quantized.cols = out.cols;
    return (struct quantize_to){b->x_8, b->x_scales, b->quantize_type, stride};
}

void cuda_written(struct cuda_backend *b, struct tensor out)
{
    if (b->quantized.of == out.data) b->quantized.of = NULL;
}

/* Codes of x, from the operation before or made now. */
static bool codes_ready(struct cuda_backend *b, struct tensor x)
{
    if (b->quantized.of == x.data && b->quantized.cols == x.cols && b->quantized.rows >= x.rows)
        return true;
    struct quantize_to to = cuda_quantize_target(b, x);
    ASSERT(to.data != NULL);
    return cuda_ok(b, (cudaError_t)launch_quantize(x, to, b->stream), "quantize");
}

static struct tensor rows_of(struct tensor t, int64_t first, int64_t n)
{
    t.data = (uint8_t *)t.data + first * t.stride * (int64_t)dtype_bytes(t.dtype);
    t.rows = n;
    return t;
}

/* Raw products in scratch, a slice of rows at a time, then scales and bias. */
static void matmul_raw(struct cuda_backend *b, struct tensor out, struct tensor x,
                       const struct weight *w)
{
    enum dtype type = w->format == WEIGHT_F16 ? DTYPE_F16 : code_type(w->format);
    int64_t rows_max = (int64_t)(b->scratch_bytes / scratch_row_bytes(w));
    if (type != DTYPE_F16 && !codes_ready(b, x)) return;
    for (int64_t first = 0; first < x.rows && !b->failed; first += rows_max) {
        int64_t n = x.rows - first < rows_max ? x.rows - first : rows_max;
        struct gemm g = raw_of(w, type, n);
        g.out = b->scratch;
        if (type == DTYPE_F16) {
            uint8_t *half = (uint8_t *)b->scratch + n * w->n_out_padded * 4;
            g.x = half;
            int r = launch_to_f16(half, w->n_in_padded, rows_of(x, first, n), b->stream);
            cuda_ok(b, (cudaError_t)r, "narrowing to f16");
        } else {
            g.x = (uint8_t *)b->x_8 + first * w->n_in_padded;
        }
        if (!cuda_ok(b, lt_matmul(b->lt, &g), "matmul")) return;
        struct raw_product raw = {b->scratch,   g.out_type,
                                  g.out_stride, type == DTYPE_F16 ? NULL : b->x_scales + first,
                                  w->scales,    w->bias};
        int r = launch_rescale(rows_of(out, first, n), &raw, b->stream);
        cuda_ok(b, (cudaError_t)r, "scaling a product");
    }
}

static void matmul_fp8(struct cuda_backend *b, struct tensor out, struct tensor x,
                       const struct weight *w)
{
    if (!codes_ready(b, x)) return;
    struct gemm g = gemm_of(w, DTYPE_FP8_E4M3, out.dtype, x.rows);
    g.x = b->x_8;
    g.x_stride = w->n_in_padded;
    g.out = out.data;
    g.out_stride = out.stride;
    g.bias = bias_for(w, out.dtype);
    g.x_scales = b->x_scales;
    g.w_scales = w->scales;
    cuda_ok(b, lt_matmul(b->lt, &g), "matmul");
}

/* The library wants rows that begin at 16 bytes; views that do not go through own tiles. */
static bool library_can(struct tensor out, struct tensor x)
{
    return x.stride % 8 == 0 && (uintptr_t)x.data % 16 == 0 &&
           out.stride * (int64_t)dtype_bytes(out.dtype) % 16 == 0 && (uintptr_t)out.data % 16 == 0;
}

static struct gemm_call own_call(struct tensor out, struct tensor x, const struct weight *w)
{
    return (struct gemm_call){.out = out,
                              .x = x,
                              .w = w->data,
                              .scales_16 = w->scales_16,
                              .zeros = w->zeros,
                              .group_shift = w->group_shift,
                              .bias = w->bias,
                              .n_in_padded = w->n_in_padded};
}

static void matmul_bf16(struct cuda_backend *b, struct tensor out, struct tensor x,
                        const struct weight *w, const void *data)
{
    if (use_library(b) && library_can(out, x) && w->library) {
        struct gemm g = gemm_of(w, DTYPE_BF16, out.dtype, x.rows);
        g.w = data;
        g.x = x.data;
        g.x_stride = x.stride;
        g.out = out.data;
        g.out_stride = out.stride;
        g.bias = bias_for(w, out.dtype);
        cuda_ok(b, lt_matmul(b->lt, &g), "matmul");
        return;
    }
    struct gemm_call call = own_call(out, x, w);
    call.w = data;
    call.scales_16 = call.zeros = NULL;
    cuda_ok(b, (cudaError_t)launch_gemm(&call, b->stream), "matmul");
}

static void matmul_int4(struct cuda_backend *b, struct tensor out, struct tensor x,
                        const struct weight *w)
{
    if (w->order) {
        struct tensor y = {b->ordered, DTYPE_BF16, x.rows, w->n_in_padded, w->n_in_padded};
        int r = launch_reorder(b->ordered, x, w->order, w->n_in_padded, b->stream);
        if (!cuda_ok(b, (cudaError_t)r, "reordering activations")) return;
        x = y;
    }
    struct gemm_call call = own_call(out, x, w);
    bool fixed =
        b->options.deterministic; /* one order of sums whatever the rows: the tiles alone */
    if (x.rows <= GEMV_ROWS_MAX && !fixed) {
        cuda_ok(b, (cudaError_t)launch_gemv_int4(&call, b->stream), "matmul");
    } else if (x.rows < EXPAND_ROWS_MIN || !use_library(b)) {
        cuda_ok(b, (cudaError_t)launch_gemm_int4(&call, b->stream), "matmul");
    } else {
        int r = launch_int4_expand(b->scratch, &call, b->stream);
        if (cuda_ok(b, (cudaError_t)r, "expanding a weight")) matmul_bf16(b, out, x, w, b->scratch);
    }
}

void cuda_matmul(struct backend *base, struct tensor out, struct tensor x, const struct weight *w)
{
    struct cuda_backend *b = cuda_of(base);
    ASSERT_CMP(x.cols, ==, w->n_in);
    ASSERT_CMP(out.cols, ==, w->n_out);
    ASSERT_CMP(x.rows, ==, out.rows);
    ASSERT_CMP(x.dtype, ==, DTYPE_BF16);
    ASSERT_CMP(x.rows, <=, b->options.n_tokens_max);
    if (b->failed || !x.rows || !w->n_out) return;
    switch (w->n_in ? w->format : WEIGHT_BF16) { /* without inputs only the bias is left */
    case WEIGHT_BF16:
        matmul_bf16(b, out, x, w, w->data);
        break;
    case WEIGHT_INT4:
    case WEIGHT_INT4_GROUPS:
        matmul_int4(b, out, x, w);
        break;
    case WEIGHT_FP8:
        if (w->library && library_can(out, out)) {
            matmul_fp8(b, out, x, w);
            break;
        } /* fall through */
    default:
        matmul_raw(b, out, x, w);
    }
    cuda_written(b, out);
}
