/* Products with int4 weights: groups of 128 inputs share an f16 scale, code 8 stands for zero.
 *
 * Few rows: one warp an output column, weights read once and used for all rows. More: the tiles of
 * gemm.cuh. Many: the matrix is expanded to BF16 once and the library multiplies. */
#include "kernels/cuda/gemm.cuh"

int launch_gemm_int4(const struct gemm_call *call, void *stream) { return gemm_launch<GEMM_INT4>(call, stream); }

enum { GEMV_WARPS = 4 };

/* Thirty-two codes of one row of w against the rows of x. */
template <int ROWS>
static __device__ __forceinline__ void gemv_step(float (&sums)[ROWS], const struct gemm_call &c, uint4 codes, float scale,
                                                 int k, bool aligned)
{
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
        float w[8];
#pragma unroll
        for (int i = 0; i < 8; i++) w[i] = (float)((int)(words[j] >> (i * 4) & 15) - 8) * scale;
        int at = k + j * 8, n = min(8, (int)c.x.cols - at);
        if (n <= 0) break;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float x[8];
            load8(x, (const bf16 *)c.x.data + r * c.x.stride + at, n, aligned);
#pragma unroll
            for (int i = 0; i < 8; i++) sums[r] += w[i] * x[i];
        }
    }
}

/* grid (n_out / 4): one warp a column. A lane reads 16 bytes of codes, 32 inputs, at a time. */
template <int ROWS> static __global__ void __launch_bounds__(GEMV_WARPS *WARP_LANES) gemv_kernel(struct gemm_call c)
{
    int col = blockIdx.x * GEMV_WARPS + threadIdx.x / WARP_LANES, lane = threadIdx.x % WARP_LANES;
    if (col >= (int)c.out.cols) return;
    bool aligned = c.x.stride % 8 == 0 && (uintptr_t)c.x.data % 16 == 0;
    const uint8_t *codes = (const uint8_t *)c.w + col * c.n_in_padded / 2;
    const __half *scales = (const __half *)c.scales_16 + col * (c.n_in_padded / INT4_GROUP);
    float sums[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) sums[r] = 0;
    for (int k = lane * 32; k < (int)c.n_in_padded; k += WARP_LANES * 32)
        gemv_step<ROWS>(sums, c, *(const uint4 *)(codes + k / 2), __half2float(scales[k / INT4_GROUP]), k, aligned);
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float sum = warp_sum(sums[r]);
        if (lane == 0) out_store(c, r, col, sum);
    }
}

template <int ROWS> static cudaError_t gemv_of(const struct gemm_call *c, void *stream)
{
    dim3 grid((unsigned)((c->out.cols + GEMV_WARPS - 1) / GEMV_WARPS));
    return LAUNCH(gemv_kernel<ROWS>, grid, dim3(GEMV_WARPS * WARP_LANES), 0, stream, *c);
}

int launch_gemv_int4(const struct gemm_call *c, void *stream)
{
    switch (c->out.rows) {
    case 1: return gemv_of<1>(c, stream);
    case 2: return gemv_of<2>(c, stream);
    case 3: return gemv_of<3>(c, stream);
    case 4: return gemv_of<4>(c, stream);
    default: return cudaErrorInvalidValue;
    }
}

static __global__ void __launch_bounds__(256)
    int4_expand_kernel(bf16 *out, const uint32_t *w, const __half *scales, int64_t n_words)
{
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n_words) int4_widen8(out + i * 8, w[i], __half2float(scales[i * 8 / INT4_GROUP]));
}

int launch_int4_expand(void *out_bf16, const void *w, const void *scales_16, int64_t n_out, int64_t n_in_padded,
                       void *stream)
{
    int64_t n_words = n_out * n_in_padded / 8;
    return LAUNCH(int4_expand_kernel, dim3((unsigned)((n_words + 255) / 256)), dim3(256), 0, stream, (bf16 *)out_bf16,
                  (const uint32_t *)w, (const __half *)scales_16, n_words);
}
