/* Panels of rows quantized to int8 words, for INT8 and INT4: the bits of quantize_row_pack_int8. */
#include "kernels/cpu/words_avx512.h"
#include "kernels/cpu/quantize.h"

/* Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves the integer in the low
 * bits of the sum. */
static const float magic = 12582912.0f;
enum { MAGIC_BITS = 0x4b400000 };

static float row_inverse(const struct activations *a, const float *x, int64_t row)
{
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i max[4];
    UNROLL for (int j = 0; j < 4; j++) max[j] = _mm512_setzero_si512();
    int64_t i = 0;
    for (; i + 64 <= a->n_inputs; i += 64)
        UNROLL for (int j = 0; j < 4; j++)
        {
            __m512i bits = _mm512_castps_si512(_mm512_loadu_ps(x + i + j * 16));
            max[j] = _mm512_max_epu32(max[j], _mm512_and_si512(bits, magnitude));
        }
    for (; i < a->n_inputs; i += 16) {
        __m512i bits = _mm512_castps_si512(floats_at(x, i, a->n_inputs));
        max[0] = _mm512_max_epu32(max[0], _mm512_and_si512(bits, magnitude));
    }
    max[0] = _mm512_max_epu32(_mm512_max_epu32(max[0], max[1]), _mm512_max_epu32(max[2], max[3]));
    float inverse;
    a->row_scale[row] = quantize_scale(_mm512_reduce_max_epu32(max[0]), &inverse);
    return inverse;
}

/* 64 inputs from i on as 16 words; adds their 64 integers, each and MAGIC_BITS, to sum. */
ALWAYS_INLINE __m512i words_at(const float *x, int64_t i, int64_t n, __m512 factor, __m512i *sum)
{
    __m128i part[4];
    UNROLL for (int j = 0; j < 4; j++)
    {
        __m512 v = i + 64 <= n ? _mm512_loadu_ps(x + i + 16 * j) : floats_at(x, i + 16 * j, n);
        v = _mm512_add_ps(_mm512_mul_ps(v, factor), _mm512_set1_ps(magic));
        *sum = _mm512_add_epi32(*sum, _mm512_castps_si512(v));
        part[j] = _mm512_cvtepi32_epi8(_mm512_castps_si512(v));
    }
    __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(part[0]), part[1], 1);
    __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(part[2]), part[3], 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

/* Steps [first, end) of one group of inputs, or of the whole row; a row whose inverse is 0 holds
 * zeros, or something that is no number and must not be looked at. */
static void group_pack(const struct activations *a, const float *x, int64_t stride, int rows,
                       const float *inverse, int64_t first, int64_t end, uint32_t *words,
                       int32_t *out_sums)
{
    __m512i sum[PANEL_ROWS_MAX], v[WORDS];
    for (int r = 0; r < rows; r++)
        sum[r] = _mm512_setzero_si512();
    for (int r = rows; r < WORDS; r++)
        v[r] = _mm512_setzero_si512();
    int64_t n_vectors = 0;
    for (int64_t s = first; s < end; s += WORDS) {
        n_vectors += 4;
        for (int r = 0; r < rows; r++) {
            v[r] = _mm512_setzero_si512();
            if (inverse[r] > 0.0f)
                v[r] = words_at(x + r * stride, s * 4, a->n_inputs, _mm512_set1_ps(inverse[r]),
                                &sum[r]);
        }
        words_store(words + s * rows, v, rows, a->n_steps - s);
    }
    const __m512i added = _mm512_set1_epi32((int)((uint32_t)n_vectors * (uint32_t)MAGIC_BITS));
    for (int r = 0; r < rows; r++)
        out_sums[r] =
            inverse[r] > 0.0f ? _mm512_reduce_add_epi32(_mm512_sub_epi32(sum[r], added)) : 0;
}

void words_pack_int8(const struct activations *a, const float *x, int64_t stride, int64_t row,
                     int rows, uint32_t *words)
{
    float inverse[PANEL_ROWS_MAX];
    int32_t sums[PANEL_ROWS_MAX];
    for (int r = 0; r < rows; r++)
        inverse[r] = row_inverse(a, x + r * stride, row + r);
    for (int64_t g = 0; g < a->n_groups; g++) {
        group_pack(a, x, stride, rows, inverse, g * a->group_steps, (g + 1) * a->group_steps, words,
                   sums);
        for (int r = 0; r < rows; r++)
            a->correction[(row + r) * a->n_groups + g] = -a->offset * sums[r];
    }
}
