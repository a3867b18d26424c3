/* What the two attention kernels share: sixteen rows of queries against a tile of keys, one warp.
 *
 * Online softmax in base 2 (Milakov, Gimelshein: "Online normalizer calculation for softmax"; Dao:
 * "FlashAttention-2"). A lane holds two rows of the tile, lane / 4 and lane / 4 + 8, and of each
 * eight keys two columns, as mma.m16n8k16 lays them out. A row's numbers depend on its own keys
 * alone: a tile that is masked for a row leaves it bit by bit as it was. */
#pragma once
#include "kernels/cuda/common.cuh"

/* The heads of this rank that read one kv head: group is constant, shards may cut it anywhere. */
struct head_range {
    int first, n;
};
static __device__ __forceinline__ struct head_range heads_of(const struct attention_args &a, int kv_head)
{
    int first = max(0, (kv_head + a.kv_offset) * a.group - a.head_offset);
    int end = min(a.n_heads, (kv_head + a.kv_offset + 1) * a.group - a.head_offset);
    return {first, max(0, end - first)};
}

/* A sequence small enough for the decode kernel. */
static __device__ __forceinline__ bool is_decode(const struct attend_call &c, int n_tokens)
{
    return !c.tiles_only && n_tokens * c.args.group <= DECODE_ROWS;
}

struct score_rule {
    float scale, softcap;
    int limit[2], low[2]; /* keys a row may see: low <= key < limit */
};

static __device__ __forceinline__ float score_finish(const struct score_rule &rule, float s)
{
    float x = s * rule.scale;
    return (rule.softcap > 0 ? rule.softcap * tanhf(x / rule.softcap) : x) * LOG2_E;
}

template <int DIM> static __device__ __forceinline__ void query_fragment(uint32_t *a, const bf16 *q, int step, int lane)
{
    ldmatrix_x4(a, q + swizzled(DIM, lane % 16, step * 2 + lane / 16));
}

/* Products of 16 query rows and KEYS keys. held: the queries' fragments, when they fit registers. */
template <int DIM, int KEYS>
static __device__ __forceinline__ void tile_scores(float (&s)[KEYS / 8][4], const uint32_t (*held)[4], const bf16 *q,
                                                   const bf16 *k, int lane)
{
#pragma unroll
    for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) s[n][j] = 0;
#pragma unroll
    for (int step = 0; step < DIM / 16; step++) {
        uint32_t a[4];
        if (DIM > 128) query_fragment<DIM>(a, q, step, lane);
        else
            for (int j = 0; j < 4; j++) a[j] = held[step][j];
#pragma unroll
        for (int n = 0; n < KEYS / 16; n++) {
            uint32_t b[4];
            ldmatrix_x4(b, k + swizzled(DIM, n * 16 + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
            mma_bf16_16816(s[n * 2], a, b);
            mma_bf16_16816(s[n * 2 + 1], a, b + 2);
        }
    }
}

/* Scores become weights; maximum, sum and the rows so far are brought to the new maximum.
 * k_scales, v_scales: [KEYS] of an 8-bit cache, or NULL. */
template <int DIM, int KEYS>
static __device__ __forceinline__ void softmax_step(float (&s)[KEYS / 8][4], float (&o)[DIM / 8][4], float (&m)[2],
                                                    float (&l)[2], int key_first, const struct score_rule &rule,
                                                    const float *k_scales, const float *v_scales, int lane)
{
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float most = m[r], sum = 0;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                int at = n * 8 + lane % 4 * 2 + j, key = key_first + at;
                float x = k_scales ? s[n][r * 2 + j] * k_scales[at] : s[n][r * 2 + j];
                x = key >= rule.low[r] && key < rule.limit[r] ? score_finish(rule, x) : -INFINITY;
                s[n][r * 2 + j] = x;
                most = fmaxf(most, x);
            }
        most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 1));
        most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 2));
        float base = most == -INFINITY ? 0.0f : most, keep = exp2f(m[r] - base);
        m[r] = most;
#pragma unroll
        for (int n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                float p = exp2f(s[n][r * 2 + j] - base);
                sum += p;
                s[n][r * 2 + j] = !v_scales ? p : p > 0 ? p * v_scales[n * 8 + lane % 4 * 2 + j] : 0.0f;
            }
        l[r] = l[r] * keep + sum;
#pragma unroll
        for (int i = 0; i < DIM / 8; i++) o[i][r * 2] *= keep, o[i][r * 2 + 1] *= keep;
    }
}

/* o += weights * V. */
template <int DIM, int KEYS>
static __device__ __forceinline__ void add_values(float (&o)[DIM / 8][4], const float (&s)[KEYS / 8][4], const bf16 *v,
                                                  int lane)
{
#pragma unroll
    for (int step = 0; step < KEYS / 16; step++) {
        uint32_t a[4] = {bf16_pack(s[step * 2][0], s[step * 2][1]), bf16_pack(s[step * 2][2], s[step * 2][3]),
                         bf16_pack(s[step * 2 + 1][0], s[step * 2 + 1][1]),
                         bf16_pack(s[step * 2 + 1][2], s[step * 2 + 1][3])};
#pragma unroll
        for (int n = 0; n < DIM / 16; n++) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, v + swizzled(DIM, step * 16 + lane % 16, n * 2 + lane / 16));
            mma_bf16_16816(o[n * 2], a, b);
            mma_bf16_16816(o[n * 2 + 1], a, b + 2);
        }
    }
}

static __device__ __forceinline__ float quad_sum(float v)
{
    v += __shfl_xor_sync(FULL_WARP, v, 1);
    return v + __shfl_xor_sync(FULL_WARP, v, 2);
}

/* Sixteen codes of one row become two chunks of BF16 in their swizzled places. */
template <int DIM>
static __device__ __forceinline__ void widen16(bf16 *to, int row, int first_chunk, uint4 codes, enum dtype dtype)
{
    const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
    uint32_t wide[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        uint32_t pair = words[i / 2] >> (i % 2 * 16);
        wide[i] = bf16_pack(code_value((uint8_t)pair, dtype), code_value((uint8_t)(pair >> 8), dtype));
    }
    *(uint4 *)(to + swizzled(DIM, row, first_chunk)) = {wide[0], wide[1], wide[2], wide[3]};
    *(uint4 *)(to + swizzled(DIM, row, first_chunk + 1)) = {wide[4], wide[5], wide[6], wide[7]};
}

/* Where the rows of K of one kv head begin in a block; V lies v_offset bytes behind. */
struct block_rows {
    const uint8_t *k, *v;
    const float *k_scales, *v_scales;
};
static __device__ __forceinline__ struct block_rows rows_at(const struct kv_layout &kv, int block, int kv_head,
                                                            int offset, int element_bytes)
{
    const uint8_t *base = (const uint8_t *)kv.data + (size_t)block * kv.block_bytes;
    size_t k = (size_t)kv_head * kv.block_size + offset, v = k + (size_t)kv.n_kv_heads * kv.block_size;
    size_t row_bytes = (size_t)kv.head_dim * element_bytes;
    const float *scales = (const float *)(base + (size_t)2 * kv.n_kv_heads * kv.block_size * row_bytes);
    return {base + k * row_bytes, base + v * row_bytes, scales + k, scales + v};
}

#ifdef HEDDLE_HEAD_DIMS_FEW /* the mutants of the tests, which compile often */
#define HEAD_DIMS(X) X(64) X(128)
#else
#define HEAD_DIMS(X) X(16) X(32) X(64) X(80) X(96) X(128) X(256)
#endif
