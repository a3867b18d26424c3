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
enum gemm_kind { GEMM_BF16, GEMM_INT4, GEMM_INT4_GROUPS, GEMM_F16, GEMM_I8, GEMM_FP8 };
static __device__ __forceinline__ constexpr bool is_int4(enum gemm_kind kind)
{
    return kind == GEMM_INT4 || kind == GEMM_INT4_GROUPS;
}
static __device__ __forceinline__ int64_t gemm_bytes(enum gemm_kind kind, int64_t n)
{
    return is_int4(kind) ? n / 2 : kind == GEMM_I8 || kind == GEMM_FP8 ? n : n * 2;
}

/* A code without a conversion: its four bits become the first of the mantissa of 16, which makes
 * 16 + code; less 16 + the code of zero it is the value, exactly. */
constexpr float CODE4_PLUS = 16, CODE4_ZERO = CODE4_PLUS + 8;
static __device__ __forceinline__ float code4_value(uint32_t word, int i, float zero)
{
    uint32_t at_19 = i < 5 ? word << (19 - i * 4) : word >> (i * 4 - 19);
    return __uint_as_float((at_19 & 0x00780000u) | 0x41800000u) - zero;
}

/* Eight int4 codes times their group's scale. */
static __device__ __forceinline__ void int4_widen8(bf16 *to, uint32_t codes, float zero, float scale)
{
    float v[8];
#pragma unroll
    for (int j = 0; j < 8; j++) v[j] = code4_value(codes, j, zero) * scale;
    *(uint4 *)to = {bf16_pack(v[0], v[1]), bf16_pack(v[2], v[3]), bf16_pack(v[4], v[5]), bf16_pack(v[6], v[7])};
}

/* Eight weights of a row as they are stored, on their way. */
struct codes8 {
    uint4 words;
    float scale, zero; /* of int4; zero is only read where groups have their own */
};
template <enum gemm_kind KIND>
static __device__ __forceinline__ struct codes8 codes_fetch(const struct gemm_matrix &m, int64_t at, int group_shift)
{
    const uint8_t *from = (const uint8_t *)m.w + gemm_bytes(KIND, at);
    struct codes8 c = {{0, 0, 0, 0}, 0, CODE4_ZERO};
    if (KIND == GEMM_INT4) {
        c.words.x = *(const uint32_t *)from;
        c.scale = __half2float(((const __half *)m.scales_16)[at / INT4_GROUP]);
    } else if (KIND == GEMM_INT4_GROUPS) {
        c.words.x = *(const uint32_t *)from;
        c.scale = __half2float(((const __half *)m.scales_16)[at >> group_shift]);
        c.zero = CODE4_PLUS + (float)((const uint8_t *)m.zeros)[at >> group_shift];
    } else if (KIND == GEMM_F16) {
        c.words = *(const uint4 *)from;
    } else {
        uint2 w = *(const uint2 *)from;
        c.words.x = w.x, c.words.y = w.y;
    }
    return c;
}

/* The same as BF16. Codes of eight bits keep their scale for the end. */
template <enum gemm_kind KIND> static __device__ __forceinline__ void codes_widen(bf16 *to, const struct codes8 &c)
{
    if (is_int4(KIND)) {
        int4_widen8(to, c.words.x, KIND == GEMM_INT4 ? CODE4_ZERO : c.zero, c.scale);
        return;
    }
    const uint4 w = c.words;
    float v[8];
    if (KIND == GEMM_F16) {
        const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = half_value((uint16_t)(words[j / 2] >> (j % 2 * 16)));
    } else {
#pragma unroll
        for (int j = 0; j < 8; j++)
            v[j] = code_value((uint8_t)((j < 4 ? w.x : w.y) >> (j % 4 * 8)), KIND == GEMM_I8 ? DTYPE_I8 : DTYPE_FP8_E4M3);
    }
    *(uint4 *)to = {bf16_pack(v[0], v[1]), bf16_pack(v[2], v[3]), bf16_pack(v[4], v[5]), bf16_pack(v[6], v[7])};
}

enum { GEMM_FETCHES = GEMM_COLS * (GEMM_K_TILE / 8) / GEMM_THREADS }; /* eights of weights a thread brings */

/* Starts a stage: x, and weights in BF16, land in shared memory by themselves; codes come to `held`. */
template <int ROWS, enum gemm_kind KIND>
static __device__ __forceinline__ void stage_load(const struct gemm_call &c, const struct gemm_matrix &matrix,
                                                  const struct gemm_rows &g, int col_first, int row_first, int k,
                                                  bf16 *x_to, bf16 *w_to, struct codes8 (&held)[GEMM_FETCHES])
{
    const bf16 *x = (const bf16 *)c.x.data;
    bool aligned = c.x.stride % 8 == 0 && (uintptr_t)x % 16 == 0;
    for (int i = threadIdx.x; i < ROWS * 4; i += GEMM_THREADS) {
        int r = i / 4, chunk = i % 4, at = row_first + r;
        bool take = at < g.end && k + chunk * 8 < (int)c.x.cols;
        int64_t row = at < g.end ? row_at(g, at) / g.x_rows_per : 0;
        x_chunk_load(x_to + swizzled(GEMM_K_TILE, r, chunk), x + row * c.x.stride, k + chunk * 8, (int)c.x.cols, aligned, take);
    }
#pragma unroll
    for (int f = 0; f < GEMM_FETCHES; f++) {
        int i = threadIdx.x + f * GEMM_THREADS, r = i / 4, chunk = i % 4;
        bool take = col_first + r < (int)c.out.cols;
        int64_t row = take ? col_first + r : col_first, at = row * c.n_in_padded + k + chunk * 8;
        if (KIND == GEMM_BF16) cp_async16_or_zero(w_to + swizzled(GEMM_K_TILE, r, chunk), (const bf16 *)matrix.w + at, take);
        else held[f] = codes_fetch<KIND>(matrix, at, c.group_shift);
    }
}

/* Codes that have come go to their stage. */
template <enum gemm_kind KIND>
static __device__ __forceinline__ void stage_widen(bf16 *w_to, const struct codes8 (&held)[GEMM_FETCHES])
{
#pragma unroll
    for (int f = 0; f < GEMM_FETCHES && KIND != GEMM_BF16; f++) {
        int i = threadIdx.x + f * GEMM_THREADS;
        codes_widen<KIND>(w_to + swizzled(GEMM_K_TILE, i / 4, i % 4), held[f]);
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
static __global__ void __launch_bounds__(GEMM_THREADS, 4) gemm_kernel(struct gemm_call c)
{
    dependency_wait();
    typedef gemm_shape<ROWS> shape;
    constexpr int M = ROWS == 64 ? 2 : 1, N = ROWS == 64 ? 4 : 2;
    int expert = blockIdx.z, n_out = (int)c.out.cols, col_first = blockIdx.x * GEMM_COLS;
    struct gemm_rows g = {c.rows_of, c.matrices ? c.offsets[expert] : 0,
                          c.matrices ? c.offsets[expert + 1] : (int)c.out.rows, c.matrices ? c.x_rows_per : 1};
    int row_first = g.first + blockIdx.y * ROWS;
    if (row_first >= g.end) return;
    struct gemm_matrix matrix = {c.w, c.scales_16, c.zeros, nullptr};
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
    struct codes8 held[GEMM_FETCHES];
    auto stage = [&](int step) { return ring + step % GEMM_RING * (shape::X + shape::W); };
    auto load = [&](int step) {
        if (step < n_steps)
            stage_load<ROWS, KIND>(c, matrix, g, col_first, row_first, step * GEMM_K_TILE, stage(step),
                                   stage(step) + shape::X, held);
        cp_async_commit();
    };
    auto widen = [&](int step) {
        if (step < n_steps) stage_widen<KIND>(stage(step) + shape::X, held);
    };
    for (int i = 0; i < GEMM_RING - 1; i++) load(i), widen(i);
    for (int step = 0; step < n_steps; step++) {
        cp_async_wait<GEMM_RING - 2>();
        __syncthreads(); /* this stage is there, and the one before is free */
        load(step + GEMM_RING - 1);
        stage_multiply<ROWS>(sums, stage(step), stage(step) + shape::X, row_warp, col_warp, lane);
        widen(step + GEMM_RING - 1); /* the product hid the way of its codes */
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
