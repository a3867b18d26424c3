/* Panels of rows rounded to pairs of BF16: the bits of pack_bf16 and its row kernels. */
#include "kernels/cpu/quantize.h"
#include "kernels/cpu/words_avx512.h"

/* 32 inputs from i on. */
ALWAYS_INLINE __m512i pairs_at(const float *x, int64_t i, int64_t n)
{
    if (i + 32 <= n)
        return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + 16), _mm512_loadu_ps(x + i));
    return (__m512i)_mm512_cvtne2ps_pbh(floats_at(x, i + 16, n), floats_at(x, i, n));
}

void words_pack_bf16(const struct activations *a, const float *x, int64_t stride, int64_t row,
                     int rows, uint32_t *words)
{
    __m512i v[WORDS];
    (void)row;
    for (int r = rows; r < WORDS; r++)
        v[r] = _mm512_setzero_si512();
    for (int64_t s = 0; s < a->n_steps; s += WORDS) {
        for (int r = 0; r < rows; r++)
            v[r] = pairs_at(x + r * stride, s * 2, a->n_inputs);
        words_store(words + s * rows, v, rows, a->n_steps - s);
    }
}
