/* What all kernels share: types, vectors of eight, reductions over a block, the swizzle. */
#pragma once
#define _Noreturn [[noreturn]] /* the word of C, in the headers that C++ reads too */
#include "kernels/cuda/kernels.h"
#ifdef __CUDACC__
#include "kernels/cuda/ptx.cuh"
extern __shared__ __align__(1024) unsigned char cuda_smem[];
#else
#include "cuda_emu.h"
static inline uint8_t fp8_encode(float v) { return emu_fp8_encode(v); }
static inline float fp8_decode(uint8_t v) { return emu_fp8_decode(v); }
#endif

typedef __nv_bfloat16 bf16;
enum { WARP_LANES = 32, REDUCE_SCRATCH_BYTES = 34 * 4 };
#define FULL_WARP 0xffffffffu
#define LOG2_E    1.44269504f

static __device__ __forceinline__ float to_float(bf16 v) { return __bfloat162float(v); }
static __device__ __forceinline__ float to_float(float v) { return v; }
static __device__ __forceinline__ void from_float(bf16 *out, float v) { *out = __float2bfloat16_rn(v); }
static __device__ __forceinline__ void from_float(float *out, float v) { *out = v; }
static __device__ __forceinline__ float bf16_low(uint32_t word) { return __uint_as_float(word << 16); }
static __device__ __forceinline__ float bf16_high(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }
static __device__ __forceinline__ uint32_t bf16_pack(float low, float high)
{
    union {
        bf16 h[2];
        uint32_t word;
    } u;
    u.h[0] = __float2bfloat16_rn(low);
    u.h[1] = __float2bfloat16_rn(high);
    return u.word;
}
static __device__ __forceinline__ float half_value(uint16_t bits)
{
    __half half;
    *(uint16_t *)&half = bits;
    return __half2float(half);
}
/* The value as it will be read back from BF16. */
static __device__ __forceinline__ float bf16_round(float v) { return to_float(__float2bfloat16_rn(v)); }

/* Up to eight neighbours of a row; n < 8 only at its end. Whole vectors when rows are aligned. */
static __device__ __forceinline__ void load8(float *v, const bf16 *p, int n, bool aligned)
{
    if (aligned && n == 8) {
        uint4 w = *(const uint4 *)p;
        v[0] = bf16_low(w.x), v[1] = bf16_high(w.x), v[2] = bf16_low(w.y), v[3] = bf16_high(w.y);
        v[4] = bf16_low(w.z), v[5] = bf16_high(w.z), v[6] = bf16_low(w.w), v[7] = bf16_high(w.w);
        return;
    }
    for (int i = 0; i < 8; i++) v[i] = i < n ? to_float(p[i]) : 0;
}
static __device__ __forceinline__ void store8(bf16 *p, const float *v, int n, bool aligned)
{
    if (aligned && n == 8) {
        *(uint4 *)p = {bf16_pack(v[0], v[1]), bf16_pack(v[2], v[3]), bf16_pack(v[4], v[5]), bf16_pack(v[6], v[7])};
        return;
    }
    for (int i = 0; i < n; i++) p[i] = __float2bfloat16_rn(v[i]);
}
static inline bool rows_aligned(struct tensor t) { return t.stride % 8 == 0 && (uintptr_t)t.data % 16 == 0; }

static __device__ __forceinline__ float warp_sum(float v)
{
    for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(FULL_WARP, v, d);
    return v;
}
static __device__ __forceinline__ float warp_max(float v)
{
    for (int d = 16; d; d >>= 1) v = fmaxf(v, __shfl_xor_sync(FULL_WARP, v, d));
    return v;
}
/* Over the block, in an order that depends on its size alone. scratch: 33 floats, free before. */
static __device__ __forceinline__ float block_sum(float v, float *scratch)
{
    v = warp_sum(v);
    __syncthreads();
    if (threadIdx.x % WARP_LANES == 0) scratch[threadIdx.x / WARP_LANES] = v;
    __syncthreads();
    float sum = 0;
    for (int i = 0; i < (int)blockDim.x / WARP_LANES; i++) sum += scratch[i];
    return sum;
}
static __device__ __forceinline__ float block_max(float v, float *scratch)
{
    v = warp_max(v);
    __syncthreads();
    if (threadIdx.x % WARP_LANES == 0) scratch[threadIdx.x / WARP_LANES] = v;
    __syncthreads();
    float m = scratch[0];
    for (int i = 1; i < (int)blockDim.x / WARP_LANES; i++) m = fmaxf(m, scratch[i]);
    return m;
}

/* Codes of eight bits: value = code * scale, the largest of the row at the end of the range. */
static __device__ __forceinline__ float code_range(enum dtype t) { return t == DTYPE_I8 ? 127.0f : 448.0f; }
/* A row too small for its scale to have an inverse becomes zeros. */
static __device__ __forceinline__ float code_inverse(float scale) { return scale >= 1e-36f ? 1.0f / scale : 0.0f; }
static __device__ __forceinline__ uint8_t code_of(float v, enum dtype t)
{
    return t == DTYPE_I8 ? (uint8_t)(int8_t)rintf(v) : fp8_encode(v);
}
/* An int8 without a conversion, which the device is slow at: as the last mantissa bits of 2^23. */
static __device__ __forceinline__ float code_value(uint8_t code, enum dtype t)
{
    return t == DTYPE_I8 ? __uint_as_float(0x4b000000u | (code ^ 0x80u)) - 8388736.0f : fp8_decode(code);
}

/* Rows of head_dim BF16 in tiles: the 16-byte chunk c of row r lies at c ^ (r & mask), so that the
 * eight rows of an ldmatrix fall on different banks. The mask keeps the chunk within the row. */
static __host__ __device__ constexpr int swizzle_mask(int head_dim)
{
    int chunks = head_dim / 8, pow2 = chunks & -chunks;
    return (pow2 < 8 ? pow2 : 8) - 1;
}
static __device__ __forceinline__ int swizzled(int head_dim, int row, int chunk)
{
    return row * head_dim + ((chunk ^ (row & swizzle_mask(head_dim))) * 8);
}
