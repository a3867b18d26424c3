/* One matrix product of our own: out = x w^T + bias, tiles of mma.m16n8k16.
 *
 * Used where the library is absent, where every element must be summed in the same order whatever
 * the batch (k ascending, in steps of 32, never split), for int4 weights, and for experts. Four
 * warps, a tile of ROWS x 64; x and w come by cp.async in a ring of three; codes are widened on
 * their way into shared memory. */
#pragma once
#include "kernels/cuda/common.cuh"

enum { GEMM_COLS = 64, GEMM_RING = 3, GEMM_THREADS = 128 };

template <int ROWS> struct gemm_shape {
    static constexpr int X = ROWS * GEMM_K_TILE, W = GEMM_COLS * GEMM_K_TILE; /* elements of a stage */
    static constexpr int SMEM_BYTES = GEMM_RING * (X + W) * 2;
};

/* The rows of out this block makes: entry i of the rows of expert e, or row i. */
struct gemm_rows {
    const int32_t *rows_of; /* NULL: row i is i */
    int first, end, x_rows_per;
};
static __device__ __forceinline__ int row_at(const struct gemm_rows &g, int i)
{
    return g.rows_of ? g.rows_of[i] : i;
}

/* 16 bytes of a row of x; zeros behind its end. Rows that are not aligned come word by word. */
static __device__ __forceinline__ void x_chunk_load(bf16 *to, const bf16 *row, int k, int n_in, bool aligned, bool take)
{
    if (aligned && (k + 8 <= n_in || !take)) {
        cp_async16_or_zero(to, take ? row + k : row, take);
        return;
    }
    for (int j = 0; j < 8; j++) from_float(to + j, take && k + j < n_in ? to_float(row[k + j]) : 0.0f);
}

/* How the weights are stored; all but BF16 are widened on their way into shared memory. */
enum gemm_kind { GEMM_BF16, GEMM_INT4, GEMM_F16, GEMM_I8, GEMM_FP8 };
static __device__ __forceinline__ int64_t gemm_bytes(enum gemm_kind kind, int64_t n)
{
    return kind == GEMM_INT4 ? n / 2 : kind == GEMM_I8 || kind == GEMM_FP8 ? n : n * 2;
}

/* Eight int4 codes times their group's scale. */
static __device__ __forceinline__ void int4_widen8(bf16 *to, uint32_t codes, float scale)
{
    float v[8];
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = (float)((int)(codes >> (j * 4) & 15) - 8) * scale;
    *(uint4 *)to = {bf16_pack(v[0], v[1]), bf16_pack(v[2], v[3]), bf16_pack(v[4], v[5]), bf16_pack(v[6], v[7])};
}

/* Eight weights of a row, as BF16. Codes of eight bits keep their scale for the end. */
template <enum gemm_kind KIND> static __device__ __forceinline__ void widen8(bf16 *to, const struct gemm_matrix &m, int64_t at)
{
    const uint8_t *from = (const uint8_t *)m.w + gemm_bytes(KIND, at);
    if (KIND == GEMM_INT4) {
        int4_widen8(to, *(const uint32_t *)from, __half2float(((const __half *)m.scales_16)[at / INT4_GROUP]));
        return;
    }
    float v[8];
    if (KIND == GEMM_F16) {
        const uint4 w = *(const uint4 *)from;
        const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = half_value((uint16_t)(words[j / 2] >> (j % 2 * 16)));
    } else {
        const uint2 w = *(const uint2 *)from;
#pragma unroll
        for (int j = 0; j < 8; j++)
            v[j] = code_value((uint8_t)((j < 4 ? w.x : w.y) >> (j % 4 * 8)), KIND == GEMM_I8 ? DTYPE_I8 : DTYPE_FP8_E4M3);
    }
    *(uint4 *)to = {bf16_pack(v[0], v[1]), bf16_pack(v[2], v[3]), bf16_pack(v[4], v[5]), bf16_pack(v[6], v[7])};
}

template <int ROWS, enum gemm_kind KIND>
static __device__ __forceinline__ void stage_load(const struct gemm_call &c, const struct gemm_matrix &matrix,
                                                  const struct gemm_rows &g, int col_first, int row_first, int k,
                                                  bf16 *x_to, bf16 *w_to)
{
    const bf16 *x = (const bf16 *)c.x.data;
    bool aligned = c.x.stride % 8 == 0 && (uintptr_t)x % 16 == 0;
    for (int i = threadIdx.x; i < ROWS * 4; i += GEMM_THREADS) {
        int r = i / 4, chunk = i % 4, at = row_first + r;
        bool take = at < g.end && k + chunk * 8 < (int)c.x.cols;
        int64_t row = at < g.end ? row_at(g, at) / g.x_rows_per : 0;
        x_chunk_load(x_to + swizzled(GEMM_K_TILE, r, chunk), x + row * c.x.stride, k + chunk * 8, (int)c.x.cols, aligned, take);
    }
    for (int i = threadIdx.x; i < GEMM_COLS * 4; i += GEMM_THREADS) {
        int r = i / 4, chunk = i % 4;
        bool take = col_first + r < (int)c.out.cols;
        int64_t row = take ? col_first + r : col_first, at = row * c.n_in_padded + k + chunk * 8;
        bf16 *to = w_to + swizzled(GEMM_K_TILE, r, chunk);
        if (KIND == GEMM_BF16) cp_async16_or_zero(to, (const bf16 *)matrix.w + at, take);
        else widen8<KIND>(to, matrix, at);
    }
}

template <int ROWS>
static __device__ __forceinline__ void stage_multiply(float (*sums)[4], const bf16 *x, const bf16 *w, int row_warp,
                                                      int col_warp, int lane)
{
    constexpr int N = ROWS == 64 ? 4 : 2; /* eights of columns of a warp */
#pragma unroll
    for (int step = 0; step < GEMM_K_TILE / 16; step++) {
        uint32_t a[ROWS == 64 ? 2 : 1][4];
#pragma unroll
        for (int m = 0; m < (ROWS == 64 ? 2 : 1); m++)
            ldmatrix_x4(a[m], x + swizzled(GEMM_K_TILE, row_warp + m * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            uint32_t b[4];
            ldmatrix_x4(b, w + swizzled(GEMM_K_TILE, col_warp + n * 8 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
#pragma unroll
            for (int m = 0; m < (ROWS == 64 ? 2 : 1); m++) {
                mma_bf16_16816(sums[m * N + n], a[m], b);
                mma_bf16_16816(sums[m * N + n + 1], a[m], b + 2);
            }
        }
    }
}

static __device__ __forceinline__ void out_store(const struct gemm_call &c, int64_t row, int col, float v)
{
    if (c.bias) v += c.bias[col];
    if (c.out.dtype == DTYPE_F32) ((float *)c.out.data)[row * c.out.stride + col] = v;
    else from_float((bf16 *)c.out.data + row * c.out.stride + col, v);
}

/* grid (columns / 64, rows / ROWS, experts). 64 rows: warps 2 x 2, each 32 x 32; 16 rows: each 16 x 16. */
template <int ROWS, enum gemm_kind KIND>
static __global__ void __launch_bounds__(GEMM_THREADS) gemm_kernel(struct gemm_call c)
{
    typedef gemm_shape<ROWS> shape;
    constexpr int M = ROWS == 64 ? 2 : 1, N = ROWS == 64 ? 4 : 2;
    int expert = blockIdx.z, n_out = (int)c.out.cols, col_first = blockIdx.x * GEMM_COLS;
    struct gemm_rows g = {c.rows_of, c.matrices ? c.offsets[expert] : 0,
                          c.matrices ? c.offsets[expert + 1] : (int)c.out.rows, c.matrices ? c.x_rows_per : 1};
    int row_first = g.first + blockIdx.y * ROWS;
    if (row_first >= g.end) return;
    struct gemm_matrix matrix = {c.w, c.scales_16, nullptr};
    if (c.matrices) matrix = c.matrices[expert];
    bf16 *ring = (bf16 *)cuda_smem;
    int warp = threadIdx.x / WARP_LANES, lane = threadIdx.x % WARP_LANES;
    int row_warp = ROWS == 64 ? warp / 2 * 32 : 0, col_warp = ROWS == 64 ? warp % 2 * 32 : warp * 16;
    int n_steps = (int)(c.n_in_padded / GEMM_K_TILE);
    float sums[M * N][4];
#pragma unroll
    for (int i = 0; i < M * N; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) sums[i][j] = 0;
    auto load = [&](int step) {
        bf16 *to = ring + step % GEMM_RING * (shape::X + shape::W);
        if (step < n_steps)
            stage_load<ROWS, KIND>(c, matrix, g, col_first, row_first, step * GEMM_K_TILE, to, to + shape::X);
        cp_async_commit();
    };
    for (int i = 0; i < GEMM_RING - 1; i++) load(i);
    for (int step = 0; step < n_steps; step++) {
        cp_async_wait<GEMM_RING - 2>();
        __syncthreads(); /* this stage is there, and the one before is free */
        load(step + GEMM_RING - 1);
        const bf16 *x = ring + step % GEMM_RING * (shape::X + shape::W);
        stage_multiply<ROWS>(sums, x, x + shape::X, row_warp, col_warp, lane);
    }
    cp_async_wait<0>();
#pragma unroll
    for (int i = 0; i < M * N; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            int row = row_first + row_warp + i / N * 16 + lane / 4 + j / 2 * 8;
            int col = col_first + col_warp + i % N * 8 + lane % 4 * 2 + j % 2;
            if (row < g.end && col < n_out)
                out_store(c, row_at(g, row), col, matrix.scales ? sums[i][j] * matrix.scales[col] : sums[i][j]);
        }
}

template <enum gemm_kind KIND> static cudaError_t gemm_launch(const struct gemm_call *c, void *stream)
{
    int rows = c->matrices ? c->rows_max : (int)c->out.rows, n_experts = c->matrices ? c->n_experts : 1;
    unsigned cols = (unsigned)((c->out.cols + GEMM_COLS - 1) / GEMM_COLS);
    if (rows <= 16)
        return LAUNCH((gemm_kernel<16, KIND>), dim3(cols, (rows + 15) / 16, n_experts), dim3(GEMM_THREADS),
                      gemm_shape<16>::SMEM_BYTES, stream, *c);
    return LAUNCH((gemm_kernel<64, KIND>), dim3(cols, (rows + 63) / 64, n_experts), dim3(GEMM_THREADS),
                  gemm_shape<64>::SMEM_BYTES, stream, *c);
}
