/* Products with int4 weights: groups of 128 inputs share an f16 scale, code 8 stands for zero; or,
 * of checkpoints' own codes, groups of 32 to 128 have a zero point each.
 *
 * Few rows: a warp for two output columns, weights read once and used for all rows. More: the tiles of
 * gemm.cuh. Many: the matrix is expanded to BF16 once and the library multiplies. */
#include "kernels/cuda/gemm.cuh"

int launch_gemm_int4(const struct gemm_call *call, void *stream)
{
    return call->zeros ? gemm_launch<GEMM_INT4_GROUPS>(call, stream) : gemm_launch<GEMM_INT4>(call, stream);
}

enum { GEMV_WARPS = 4, GEMV_COLS = 2, GEMV_AHEAD = 2 };

/* Eight inputs from k on of each row, times the codes of each column; sums without the scale. */
template <int ROWS>
static __device__ __forceinline__ void gemv_step(float (&sums)[GEMV_COLS][ROWS], const struct gemm_call &c,
                                                 const uint32_t *codes, const float *zeros, int k, bool aligned)
{
    int n = min(8, (int)c.x.cols - k);
    float x[ROWS][8];
#pragma unroll
    for (int r = 0; r < ROWS; r++) load8(x[r], (const bf16 *)c.x.data + r * c.x.stride + k, n, aligned);
#pragma unroll
    for (int col = 0; col < GEMV_COLS; col++)
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float w = code4_value(codes[col], i, zeros[col]);
#pragma unroll
            for (int r = 0; r < ROWS; r++) sums[col][r] += w * x[r][i];
        }
}

/* Sixteen bytes, 32 codes, of each column of this warp, and their scales; zeros behind the end. A
 * piece never leaves its group. */
struct gemv_piece {
    uint4 codes[GEMV_COLS];
    float scales[GEMV_COLS], zeros[GEMV_COLS];
};
template <bool GROUPS>
static __device__ __forceinline__ void gemv_fetch(struct gemv_piece &p, const struct gemm_call &c, int col_first, int k)
{
#pragma unroll
    for (int i = 0; i < GEMV_COLS; i++) {
        int64_t at = (int64_t)(col_first + i) * c.n_in_padded + k;
        bool take = k < (int)c.n_in_padded && col_first + i < (int)c.out.cols;
        p.codes[i] = {0, 0, 0, 0};
        p.scales[i] = 0;
        p.zeros[i] = CODE4_ZERO;
        if (take) p.codes[i] = *(const uint4 *)((const uint8_t *)c.w + at / 2);
        if (take && !GROUPS) p.scales[i] = __half2float(((const __half *)c.scales_16)[at / INT4_GROUP]);
        if (take && GROUPS) {
            p.scales[i] = __half2float(((const __half *)c.scales_16)[at >> c.group_shift]);
            p.zeros[i] = CODE4_PLUS + (float)((const uint8_t *)c.zeros)[at >> c.group_shift];
        }
    }
}

template <int ROWS, bool GROUPS>
static __device__ __forceinline__ void gemv_add(float (&sums)[GEMV_COLS][ROWS], const struct gemm_call &c,
                                                const struct gemv_piece &p, int k, bool aligned)
{
    float part[GEMV_COLS][ROWS], zeros[GEMV_COLS];
#pragma unroll
    for (int col = 0; col < GEMV_COLS; col++) zeros[col] = GROUPS ? p.zeros[col] : CODE4_ZERO;
#pragma unroll
    for (int col = 0; col < GEMV_COLS; col++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) part[col][r] = 0;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        uint32_t words[GEMV_COLS];
#pragma unroll
        for (int col = 0; col < GEMV_COLS; col++)
            words[col] = j == 0 ? p.codes[col].x : j == 1 ? p.codes[col].y : j == 2 ? p.codes[col].z : p.codes[col].w;
        /* behind the end there are only zeros to add; without the question registers spill */
        if (k + j * 8 < (int)c.x.cols) gemv_step<ROWS>(part, c, words, zeros, k + j * 8, aligned);
    }
#pragma unroll
    for (int col = 0; col < GEMV_COLS; col++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) sums[col][r] += part[col][r] * p.scales[col];
}

/* grid (n_out / 8): a warp makes two columns, so that x is read once for both. The next pieces are on
 * their way while one is worked on: what decides the speed is how many bytes are. */
template <int ROWS, bool GROUPS>
static __global__ void __launch_bounds__(GEMV_WARPS *WARP_LANES) gemv_kernel(struct gemm_call c)
{
    int col_first = (blockIdx.x * GEMV_WARPS + threadIdx.x / WARP_LANES) * GEMV_COLS, lane = threadIdx.x % WARP_LANES;
    if (col_first >= (int)c.out.cols) {
        dependency_wait();
        return;
    }
    bool aligned = c.x.stride % 8 == 0 && (uintptr_t)c.x.data % 16 == 0;
    struct gemv_piece ring[GEMV_AHEAD];
    float sums[GEMV_COLS][ROWS];
#pragma unroll
    for (int col = 0; col < GEMV_COLS; col++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) sums[col][r] = 0;
#pragma unroll
    for (int i = 0; i < GEMV_AHEAD; i++) gemv_fetch<GROUPS>(ring[i], c, col_first, (i * WARP_LANES + lane) * 32);
    dependency_wait(); /* weights are nobody's result: the first ones come while the kernel before ends */
    for (int k = lane * 32; k < (int)c.n_in_padded; k += GEMV_AHEAD * WARP_LANES * 32)
#pragma unroll
        for (int i = 0; i < GEMV_AHEAD; i++) {
            int at = k + i * WARP_LANES * 32;
            struct gemv_piece piece = ring[i];
            gemv_fetch<GROUPS>(ring[i], c, col_first, at + GEMV_AHEAD * WARP_LANES * 32);
            gemv_add<ROWS, GROUPS>(sums, c, piece, at, aligned);
        }
#pragma unroll
    for (int col = 0; col < GEMV_COLS; col++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float sum = warp_sum(sums[col][r]);
            if (lane == 0 && col_first + col < (int)c.out.cols) out_store(c, r, col_first + col, sum);
        }
}

template <int ROWS> static cudaError_t gemv_of(const struct gemm_call *c, void *stream)
{
    dim3 grid((unsigned)((c->out.cols + GEMV_WARPS * GEMV_COLS - 1) / (GEMV_WARPS * GEMV_COLS)));
    if (c->zeros) return LAUNCH((gemv_kernel<ROWS, true>), grid, dim3(GEMV_WARPS * WARP_LANES), 0, stream, *c);
    return LAUNCH((gemv_kernel<ROWS, false>), grid, dim3(GEMV_WARPS * WARP_LANES), 0, stream, *c);
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

template <bool GROUPS>
static __global__ void __launch_bounds__(256) int4_expand_kernel(bf16 *out, struct gemm_call c, int64_t n_words)
{
    dependency_wait();
    int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n_words) return;
    int64_t group = GROUPS ? i * 8 >> c.group_shift : i * 8 / INT4_GROUP;
    float zero = CODE4_ZERO;
    if (GROUPS) zero = CODE4_PLUS + (float)((const uint8_t *)c.zeros)[group];
    int4_widen8(out + i * 8, ((const uint32_t *)c.w)[i], zero, __half2float(((const __half *)c.scales_16)[group]));
}

int launch_int4_expand(void *out_bf16, const struct gemm_call *c, void *stream)
{
    int64_t n_words = c->out.cols * c->n_in_padded / 8;
    dim3 grid((unsigned)((n_words + 255) / 256));
    if (c->zeros) return LAUNCH(int4_expand_kernel<true>, grid, dim3(256), 0, stream, (bf16 *)out_bf16, *c, n_words);
    return LAUNCH(int4_expand_kernel<false>, grid, dim3(256), 0, stream, (bf16 *)out_bf16, *c, n_words);
}

static __global__ void __launch_bounds__(256) reorder_kernel(bf16 *out, struct tensor x, const int32_t *order, int n)
{
    dependency_wait();
    int i = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y;
    if (i >= n) return;
    int from = order[i];
    bf16 v;
    from_float(&v, 0.0f);
    if (from >= 0) v = ((const bf16 *)x.data)[row * x.stride + from];
    out[(int64_t)row * n + i] = v;
}

int launch_reorder(void *out_bf16, struct tensor x, const int32_t *order, int64_t n, void *stream)
{
    return LAUNCH(reorder_kernel, dim3((unsigned)((n + 255) / 256), (unsigned)x.rows), dim3(256), 0, stream,
                  (bf16 *)out_bf16, x, order, (int)n);
}
