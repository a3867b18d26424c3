/* A panel of rows into words [n_steps][rows], 16 steps of all rows at a time: each row gives a
 * vector of 16 words, the vectors are transposed in registers and stored step by step. Storing word
 * by word instead took a cycle an input, several times what the conversion takes. Included by the
 * files of the ISAs alone. */
#pragma once
#include "kernels/cpu/matmul_avx512.h"

enum { WORDS = 16 };

/* 16 floats at i, zeros from n on. */
ALWAYS_INLINE __m512 floats_at(const float *x, int64_t i, int64_t n)
{
    int64_t left = n - i;
    __mmask16 mask = left >= 16 ? 0xffff : left <= 0 ? 0 : (__mmask16)((1u << left) - 1);
    return _mm512_maskz_loadu_ps(mask, x + i);
}

/* Vectors of rows become vectors of steps: element r of v[s] was element s of v[r]. */
ALWAYS_INLINE void words_transpose(__m512i v[WORDS])
{
    __m512i t[WORDS];
    UNROLL for (int i = 0; i < WORDS; i += 2)
    {
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    }
    UNROLL for (int i = 0; i < WORDS; i += 4)
    {
        v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    /* now v[4 a + s] holds, in quarter q, step 4 q + s of rows 4 a .. 4 a + 3 */
    UNROLL for (int s = 0; s < 4; s++)
    {
        __m512i low = _mm512_shuffle_i32x4(v[s], v[s + 4], 0x88);
        __m512i high = _mm512_shuffle_i32x4(v[s + 8], v[s + 12], 0x88);
        __m512i odd_low = _mm512_shuffle_i32x4(v[s], v[s + 4], 0xdd);
        __m512i odd_high = _mm512_shuffle_i32x4(v[s + 8], v[s + 12], 0xdd);
        t[s] = _mm512_shuffle_i32x4(low, high, 0x88);
        t[s + 8] = _mm512_shuffle_i32x4(low, high, 0xdd);
        t[s + 4] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);
        t[s + 12] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);
    }
    UNROLL for (int s = 0; s < WORDS; s++) v[s] = t[s];
}

/* Stores the first 16 of the `left` steps that the panel still has, of `rows` (at most 12) rows; v
 * of the others is anything. Whole vectors are the faster stores: what one writes beyond its step,
 * later steps overwrite. Overwrites v. */
ALWAYS_INLINE void words_store(uint32_t *to, __m512i v[WORDS], int rows, int64_t left)
{
    if (rows == 1) {
        __mmask16 mask = left < WORDS ? (__mmask16)((1u << left) - 1) : 0xffff;
        _mm512_mask_storeu_epi32(to, mask, v[0]);
        return;
    }
    words_transpose(v);
    if ((left - WORDS) * rows >= WORDS) {
        UNROLL for (int s = 0; s < WORDS; s++) _mm512_storeu_si512(to + s * rows, v[s]);
        return;
    }
    for (int s = 0; s < WORDS && s < left; s++)
        _mm512_mask_storeu_epi32(to + s * rows, (__mmask16)((1u << rows) - 1), v[s]);
}
