/* AVX-512 without extensions: the floating formats. BF16 here widens both operands to floats, so it
 * sums even and odd inputs apart from vdpbf16ps; a process uses one of them for every row. */
#include "kernels/cpu/matmul_avx512.h"
#include "kernels/cpu/quantize.h"

#define STEP_F32(W, X)                                                                             \
    {                                                                                              \
        __m512 w0 = _mm512_loadu_ps(W), w1 = _mm512_loadu_ps((W) + 64);                            \
        UNROLL for (int r = 0; r < rows; r++)                                                      \
        {                                                                                          \
            __m512 x = _mm512_castsi512_ps(broadcast_word(X, r));                                  \
            DOT_FLOAT(sum[r][0], w0, x);                                                           \
            DOT_FLOAT(sum[r][1], w1, x);                                                           \
        }                                                                                          \
    }

#define STEP_F16(W, X)                                                                             \
    {                                                                                              \
        __m512 w0 = _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(W)));                        \
        __m512 w1 = _mm512_cvtph_ps(_mm256_loadu_si256((const void *)((W) + 32)));                 \
        UNROLL for (int r = 0; r < rows; r++)                                                      \
        {                                                                                          \
            __m512 x = _mm512_castsi512_ps(broadcast_word(X, r));                                  \
            DOT_FLOAT(sum[r][0], w0, x);                                                           \
            DOT_FLOAT(sum[r][1], w1, x);                                                           \
        }                                                                                          \
    }

/* Even inputs are the low halves of the words, odd ones the high halves. */
#define STEP_WIDENED(W, X)                                                                         \
    {                                                                                              \
        const __m512i high = _mm512_set1_epi32((int)0xffff0000);                                   \
        __m512i p0 = _mm512_loadu_si512(W), p1 = _mm512_loadu_si512((W) + 64);                     \
        __m512i e0 = _mm512_slli_epi32(p0, 16), e1 = _mm512_slli_epi32(p1, 16);                    \
        p0 = _mm512_and_si512(p0, high), p1 = _mm512_and_si512(p1, high);                          \
        UNROLL for (int r = 0; r < rows; r++)                                                      \
        {                                                                                          \
            __m512i x = _mm512_set1_epi32((int)((X)[r] << 16));                                    \
            DOT_FLOAT(sum[r][0], e0, x);                                                           \
            DOT_FLOAT(sum[r][1], e1, x);                                                           \
            x = _mm512_set1_epi32((int)((X)[r] & 0xffff0000));                                     \
            DOT_FLOAT(sum[r][0], p0, x);                                                           \
            DOT_FLOAT(sum[r][1], p1, x);                                                           \
        }                                                                                          \
    }

FLOAT_PANEL(panel_f32, 128, STEP_F32)
FLOAT_PANEL(panel_f16, 64, STEP_F16)
FLOAT_PANEL(panel_widened, 128, STEP_WIDENED)
ALL_HEIGHTS(panel_f32)
ALL_HEIGHTS(panel_f16)
ALL_HEIGHTS(panel_widened)

/* 16 floats at i, zeros from n on. */
static inline __m512 floats_at(const float *x, int64_t i, int64_t n)
{
    int64_t left = n - i;
    __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
    return _mm512_maskz_loadu_ps(mask, x + i);
}

/* As quantize_row_pack_int8, 16 inputs at a time: the same operations in each lane. */
static void pack_int8(const struct activations *a, const float *x, int64_t row, int rows,
                      uint32_t *words)
{
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i max = _mm512_setzero_si512();
    for (int64_t i = 0; i < a->n_inputs; i += 16)
        max = _mm512_max_epu32(
            max, _mm512_and_si512(_mm512_castps_si512(floats_at(x, i, a->n_inputs)), magnitude));
    float inverse;
    a->row_scale[row] = quantize_scale(_mm512_reduce_max_epu32(max), &inverse);
    int32_t *correction = a->correction + row * a->n_groups;
    int64_t group_steps = a->group_steps;
    const __m512 factor = _mm512_set1_ps(inverse), magic = _mm512_set1_ps(12582912.0f);
    for (int64_t g = 0; g < a->n_steps; g += group_steps) {
        __m512i sum = _mm512_setzero_si512();
        for (int64_t s = g; s < g + group_steps; s += 4) {
            __m512 v = _mm512_mul_ps(floats_at(x, s * 4, a->n_inputs), factor);
            __m512i q = _mm512_cvtps_epi32(_mm512_sub_ps(_mm512_add_ps(v, magic), magic));
            q = inverse > 0.0f ? q : _mm512_setzero_si512();
            sum = _mm512_add_epi32(sum, q);
            _Alignas(16) uint32_t four[4];
            _mm_store_si128((__m128i *)four, _mm512_cvtepi32_epi8(q));
            for (int i = 0; i < 4 && s + i < a->n_steps; i++)
                words[(s + i) * rows] = four[i];
        }
        *correction++ = -a->offset * _mm512_reduce_add_epi32(sum);
    }
}

const struct matmul_kernels matmul_avx512 = {
    .panel = {[WEIGHT_F32] = panel_f32_any,
              [WEIGHT_F16] = panel_f16_any,
              [WEIGHT_BF16] = panel_widened_any},
    .rows_max = {[WEIGHT_F32] = 12, [WEIGHT_F16] = 12, [WEIGHT_BF16] = 12},
    .pack_rows =
        {[WEIGHT_INT8] = pack_int8, [WEIGHT_INT4] = pack_int8, [WEIGHT_INT4_GROUPS] = pack_int8},
    .pack_panel = {[WEIGHT_INT8] = words_pack_int8, [WEIGHT_INT4] = words_pack_int8},
};
