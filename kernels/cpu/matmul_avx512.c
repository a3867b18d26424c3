/* AVX-512 without extensions: the floating formats. BF16 here widens both operands to floats, so it
 * sums even and odd inputs apart from vdpbf16ps; a process uses one of them for every row. */
#include "kernels/cpu/matmul_avx512.h"
#include "kernels/cpu/quantize.h"
#include "kernels/cpu/words_avx512.h"

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

ALWAYS_INLINE __m512i step_floats(const float *x, int64_t step, int64_t n)
{
    return _mm512_castps_si512(floats_at(x, step, n));
}
WORDS_KERNEL(pack_f32, 1, step_floats)

/* The scale of one row; *out_inverse as quantize_scale has it. */
static inline float row_scale_of(const float *x, int64_t n, float *out_inverse)
{
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i max0 = _mm512_setzero_si512(), max1 = max0;
    for (int64_t i = 0; i < n; i += 32) {
        floats_fetch(x, i, 32);
        __m512i low = _mm512_castps_si512(floats_at(x, i, n));
        __m512i high = _mm512_castps_si512(floats_at(x, i + 16, n));
        max0 = _mm512_max_epu32(max0, _mm512_and_si512(low, magnitude));
        max1 = _mm512_max_epu32(max1, _mm512_and_si512(high, magnitude));
    }
    return quantize_scale(_mm512_reduce_max_epu32(_mm512_max_epu32(max0, max1)), out_inverse);
}

/* 64 inputs of a row as 16 steps (STEPS_BY_LANE); their sums are added to *sum. The conversion
 * rounds to the nearest, ties to even. */
ALWAYS_INLINE __m512i quantize_vectors(const __m512 x[4], float inverse, __m512i *sum)
{
    const __m512 factor = _mm512_set1_ps(inverse);
    const __mmask16 mask = inverse > 0.0f ? 0xffff : 0;
    __m512i q[4];
    UNROLL for (int k = 0; k < 4; k++)
    {
        q[k] = _mm512_maskz_cvtps_epi32(mask, _mm512_mul_ps(x[k], factor));
    }
    *sum = _mm512_add_epi32(
        *sum, _mm512_add_epi32(_mm512_add_epi32(q[0], q[1]), _mm512_add_epi32(q[2], q[3])));
    return _mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
}

ALWAYS_INLINE __m512i quantize_64(const float *x, int64_t i, int64_t n, float inverse, __m512i *sum)
{
    __m512 v[4];
    if (i + 64 <= n) {
        UNROLL for (int k = 0; k < 4; k++)
        {
            v[k] = _mm512_loadu_ps(x + i + 16 * k);
        }
    } else {
        for (int k = 0; k < 4; k++)
            v[k] = floats_at(x, i + 16 * k, n);
    }
    return quantize_vectors(v, inverse, sum);
}

/* `count` rows from `row` on, whose words begin at `words`; a row `apart` has its words in a row.
 */
ALWAYS_INLINE void pack_int8_rows(const struct activations *a, const float *x, int64_t stride,
                                  int64_t row, int rows, uint32_t *words, const int count,
                                  const bool apart)
{
    __m512i sum[4], v[4];
    float inverse[4];
    UNROLL for (int k = 0; k < count; k++)
    {
        a->row_scale[row + k] = row_scale_of(x + k * stride, a->n_inputs, &inverse[k]);
        sum[k] = _mm512_setzero_si512();
    }
    for (int64_t s = 0; s < a->n_steps; s += 16) {
        int64_t n = a->n_steps - s < 16 ? a->n_steps - s : 16;
        UNROLL for (int k = 0; k < 4; k++)
        {
            v[k] = k < count ? quantize_64(x + k * stride, s * 4, a->n_inputs, inverse[k], &sum[k])
                             : v[0];
        }
        if (apart)
            words_store_row(words + s, v[0], n, STEPS_BY_LANE);
        else
            words_store(words + s * rows, rows, v, count, n, STEPS_BY_LANE);
        if ((s + n) % a->group_steps) continue;
        UNROLL for (int k = 0; k < count; k++)
        {
            a->correction[(row + k) * a->n_groups + s / a->group_steps] =
                -a->offset * _mm512_reduce_add_epi32(sum[k]);
            sum[k] = _mm512_setzero_si512();
        }
    }
}

/* As quantize_rows_int8: the same operations for each input. */
static void pack_int8(const struct activations *a, const float *x, int64_t stride, int64_t first,
                      int rows, uint32_t *words)
{
    bool apart = a->row_major || rows == 1;
    if (a->group_steps % 16 && a->n_groups > 1) { /* a vector would span two groups */
        quantize_rows_int8(a, x, stride, first, rows, words);
        return;
    }
    for (int r = 0; r < rows; r += apart || rows - r < 4 ? 1 : 4) {
        const float *from = x + r * stride;
        if (apart)
            pack_int8_rows(a, from, stride, first + r, rows, words + r * a->n_steps, 1, true);
        else if (rows - r < 4)
            pack_int8_rows(a, from, stride, first + r, rows, words + r, 1, false);
        else
            pack_int8_rows(a, from, stride, first + r, rows, words + r, 4, false);
    }
}

const struct matmul_kernels matmul_avx512 = {
    .panel = {[WEIGHT_F32] = panel_f32_any,
              [WEIGHT_F16] = panel_f16_any,
              [WEIGHT_BF16] = panel_widened_any},
    .rows_max = {[WEIGHT_F32] = 12, [WEIGHT_F16] = 12, [WEIGHT_BF16] = 12},
    .pack_rows = {[WEIGHT_F32] = pack_f32,
                  [WEIGHT_F16] = pack_f32,
                  [WEIGHT_INT8] = pack_int8,
                  [WEIGHT_INT4] = pack_int8,
                  [WEIGHT_INT4_GROUPS] = pack_int8},
};
