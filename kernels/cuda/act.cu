/* act(gate) * up, or act alone, with its rows in 8 bits where the next weight will want them.
 *
 * One block a row when the row's largest value is needed; else blocks share rows. */
#include "kernels/cuda/common.cuh"

struct activate_call {
    bf16 *out;
    const bf16 *in;
    int64_t out_stride, in_stride;
    int cols; /* of out */
    bool aligned, gated;
    enum activation kind;
    struct quantize_to quantize;
};

static __device__ __forceinline__ float act(float x, enum activation kind)
{
    switch (kind) {
    case ACTIVATION_SILU: return x / (1.0f + __expf(-x));
    case ACTIVATION_GELU_TANH: /* Hendrycks, Gimpel: "Gaussian error linear units", section 2 */
        return 0.5f * x * (1.0f + tanhf(0.7978845608f * (x + 0.044715f * x * x * x)));
    case ACTIVATION_GELU_ERF: return 0.5f * x * (1.0f + erff(x * 0.7071067812f));
    default: return fmaxf(x, 0.0f);
    }
}

static __global__ void __launch_bounds__(256) activate_kernel(struct activate_call c)
{
    dependency_wait();
    const bf16 *in = c.in + blockIdx.x * c.in_stride;
    bf16 *out = c.out + blockIdx.x * c.out_stride;
    float largest = 0;
    for (int i = (blockIdx.y * blockDim.x + threadIdx.x) * 8; i < c.cols; i += gridDim.y * blockDim.x * 8) {
        int n = min(8, c.cols - i);
        float gate[8], up[8];
        load8(gate, in + i, n, c.aligned);
        if (c.gated) load8(up, in + c.cols + i, n, c.aligned);
        for (int j = 0; j < 8; j++) {
            gate[j] = bf16_round(c.gated ? act(gate[j], c.kind) * up[j] : act(gate[j], c.kind));
            largest = fmaxf(largest, fabsf(gate[j]));
        }
        store8(out + i, gate, n, c.aligned);
    }
    if (!c.quantize.data) return;
    float scale = block_max(largest, (float *)cuda_smem) / code_range(c.quantize.dtype);
    float inverse = code_inverse(scale);
    uint8_t *codes = (uint8_t *)c.quantize.data + blockIdx.x * c.quantize.stride;
    if (threadIdx.x == 0) c.quantize.scales[blockIdx.x] = scale;
    for (int i = threadIdx.x * 8; i < (int)c.quantize.stride; i += blockDim.x * 8)
        for (int j = i; j < min(i + 8, (int)c.quantize.stride); j++)
            codes[j] = j < c.cols ? code_of(to_float(out[j]) * inverse, c.quantize.dtype) : 0;
}

int launch_activate(struct tensor out, struct tensor in, enum activation kind, bool gated,
                    struct quantize_to quantize, void *stream)
{
    struct activate_call c = {(bf16 *)out.data, (const bf16 *)in.data, out.stride, in.stride, (int)out.cols,
                              rows_aligned(in) && rows_aligned(out) && out.cols % 8 == 0, gated, kind, quantize};
    int threads = 256, parts = ((int)out.cols + threads * 8 - 1) / (threads * 8);
    dim3 grid((unsigned)out.rows, quantize.data ? 1 : parts);
    return LAUNCH(activate_kernel, grid, dim3(threads), REDUCE_SCRATCH_BYTES, stream, c);
}
