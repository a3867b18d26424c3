/* x += delta, then out = norm(x), and the same rows in 8 bits where a weight will want them.
 *
 * One block a row. The row is read again for each pass; it lies in the L1 cache by then. What is
 * normed is the stored x, rounded to BF16, so that fused and separate additions agree. */
#include "kernels/cuda/common.cuh"

struct norm_call {
    bf16 *x;
    const bf16 *delta;
    bf16 *out;
    int64_t x_stride, delta_stride, out_stride;
    int cols;
    bool aligned;
    struct norm_args args;
    struct quantize_to quantize;
};

/* The thread's part of the row after the addition: its sum and its sum of squares. */
static __device__ __forceinline__ float2 add_delta(const struct norm_call &c, bf16 *x, const bf16 *delta)
{
    float2 sums = {0, 0};
    for (int i = threadIdx.x * 8; i < c.cols; i += blockDim.x * 8) {
        int n = min(8, c.cols - i);
        float v[8], d[8];
        load8(v, x + i, n, c.aligned);
        if (delta) {
            load8(d, delta + i, n, c.aligned);
            for (int j = 0; j < 8; j++) v[j] = bf16_round(v[j] + d[j]);
            store8(x + i, v, n, c.aligned);
        }
        for (int j = 0; j < 8; j++) sums.x += v[j], sums.y += v[j] * v[j];
    }
    return sums;
}

static __device__ __forceinline__ float squares_around(const struct norm_call &c, const bf16 *x, float mean)
{
    float sum = 0;
    for (int i = threadIdx.x * 8; i < c.cols; i += blockDim.x * 8) {
        int n = min(8, c.cols - i);
        float v[8];
        load8(v, x + i, n, c.aligned);
        for (int j = 0; j < n; j++) sum += (v[j] - mean) * (v[j] - mean);
    }
    return sum;
}

static __global__ void __launch_bounds__(512) add_norm_kernel(struct norm_call c)
{
    dependency_wait();
    float *scratch = (float *)cuda_smem;
    bf16 *x = c.x + blockIdx.x * c.x_stride, *out = c.out + blockIdx.x * c.out_stride;
    float2 sums = add_delta(c, x, c.delta ? c.delta + blockIdx.x * c.delta_stride : nullptr);
    float mean = 0, squares;
    if (c.args.kind == NORM_LAYER) {
        mean = block_sum(sums.x, scratch) / c.cols;
        squares = block_sum(squares_around(c, x, mean), scratch);
    } else {
        squares = block_sum(sums.y, scratch);
    }
    float by = 1.0f / sqrtf(squares / c.cols + c.args.epsilon), largest = 0;
    for (int i = threadIdx.x * 8; i < c.cols; i += blockDim.x * 8) {
        int n = min(8, c.cols - i);
        float v[8];
        load8(v, x + i, n, c.aligned);
        for (int j = 0; j < n; j++) {
            v[j] = (v[j] - mean) * by * c.args.weight[i + j];
            if (c.args.bias) v[j] += c.args.bias[i + j];
            v[j] = bf16_round(v[j]);
            largest = fmaxf(largest, fabsf(v[j]));
        }
        store8(out + i, v, n, c.aligned);
    }
    if (!c.quantize.data) return;
    float range = code_range(c.quantize.dtype), scale = block_max(largest, scratch) / range;
    float inverse = code_inverse(scale);
    uint8_t *codes = (uint8_t *)c.quantize.data + blockIdx.x * c.quantize.stride;
    if (threadIdx.x == 0) c.quantize.scales[blockIdx.x] = scale;
    for (int i = threadIdx.x * 8; i < (int)c.quantize.stride; i += blockDim.x * 8)
        for (int j = i; j < min(i + 8, (int)c.quantize.stride); j++)
            codes[j] = j < c.cols ? code_of(to_float(out[j]) * inverse, c.quantize.dtype) : 0;
}

int launch_add_norm(struct tensor x, struct tensor delta, const struct norm_args *args, struct tensor out,
                    struct quantize_to quantize, void *stream)
{
    struct norm_call c = {(bf16 *)x.data, (const bf16 *)delta.data, (bf16 *)out.data, x.stride, delta.stride,
                          out.stride, (int)x.cols, false, *args, quantize};
    c.aligned = rows_aligned(x) && rows_aligned(out) && (!delta.data || rows_aligned(delta));
    int threads = x.cols > 4096 ? 512 : x.cols > 512 ? 256 : 64;
    return LAUNCH(add_norm_kernel, dim3((unsigned)x.rows), dim3(threads), REDUCE_SCRATCH_BYTES, stream, c);
}
