/* Rows of activations into words by 512-bit vectors: 16 steps of up to four rows at a time.
 *
 * A vector holds 16 steps of one row; four of them are transposed, so that what neighbours in a row
 * panel, the words of a step, leaves in one store. One row alone is stored as it is. Included by
 * the *_avx512.c and *_bf16.c files alone. */
#pragma once
#include "kernels/cpu/cpu.h"

#include <immintrin.h>

/* 16 floats at i, zeros from n on. */
static inline __m512 floats_at(const float *x, int64_t i, int64_t n)
{
    int64_t left = n - i;
    if (left >= 16) return _mm512_loadu_ps(x + i);
    return _mm512_maskz_loadu_ps(left <= 0 ? 0 : (__mmask16)((1u << left) - 1), x + i);
}

/* The hardware follows few rows at a time: what a row gives next is asked for, INPUTS_AHEAD before.
 */
enum { INPUTS_AHEAD = 512 };

static inline void floats_fetch(const float *x, int64_t i, int64_t n)
{
    for (int64_t at = i; at < i + n; at += 16)
        _mm_prefetch((const char *)(x + INPUTS_AHEAD + at), _MM_HINT_T0);
}

/* Which step lies in 32-bit element 4 i + j of a vector: the (4 i + j)-th, or, as packing bytes
 * leaves them, the (4 j + i)-th. */
enum step_order { STEPS_IN_ORDER, STEPS_BY_LANE };

/* One row, n <= 16 steps. */
static inline void words_store_row(uint32_t *words, __m512i v, int64_t n, enum step_order order)
{
    if (order == STEPS_BY_LANE)
        v = _mm512_permutexvar_epi32(
            _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), v);
    _mm512_mask_storeu_epi32(words, n >= 16 ? 0xffff : (__mmask16)((1u << n) - 1), v);
}

/* Vectors of `count` <= 4 rows, n <= 16 steps, into words[step * rows + row]. */
static inline __attribute__((always_inline)) void words_transpose(uint32_t *words, int rows,
                                                                  const __m512i v[4],
                                                                  const int count, const int64_t n,
                                                                  const enum step_order order)
{
    __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpacklo_epi32(v[2], v[3]);
    __m512i c = _mm512_unpackhi_epi32(v[0], v[1]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    /* t[j]: in 128-bit lane i the elements 4 i + j of the four rows */
    const __m512i t[4] = {_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b),
                          _mm512_unpacklo_epi64(c, d), _mm512_unpackhi_epi64(c, d)};
    __mmask8 mask = (__mmask8)((1u << count) - 1);
#define STORE_LANE(I)                                                                              \
    for (int j = 0; j < 4; j++) {                                                                  \
        int step = order == STEPS_BY_LANE ? 4 * j + (I) : 4 * (I) + j;                             \
        __m128i four = _mm512_extracti32x4_epi32(t[j], I);                                         \
        if (step < n && count == 4)                                                                \
            _mm_storeu_si128((__m128i *)(words + (int64_t)step * rows), four);                     \
        else if (step < n)                                                                         \
            _mm_mask_storeu_epi32(words + (int64_t)step * rows, mask, four);                       \
    }
    STORE_LANE(0)
    STORE_LANE(1)
    STORE_LANE(2)
    STORE_LANE(3)
#undef STORE_LANE
}

static inline __attribute__((always_inline)) void words_store(uint32_t *words, int rows,
                                                              const __m512i v[4], int count,
                                                              int64_t n,
                                                              const enum step_order order)
{
    if (count == 4 && n >= 16)
        words_transpose(words, rows, v, 4, 16, order);
    else
        words_transpose(words, rows, v, count, n, order);
}

/* Defines NAME, a quantize_kernel without scales: VECTOR(x, step, n) is 16 steps of a row of n
 * inputs, INPUTS a step. */
#define WORDS_KERNEL(NAME, INPUTS, VECTOR)                                                         \
    static inline __attribute__((always_inline)) void NAME##_rows(                                 \
        const struct activations *a, const float *x, int64_t stride, int rows, uint32_t *words,    \
        const int count, const bool apart)                                                         \
    {                                                                                              \
        for (int64_t s = 0; s < a->n_steps; s += 16) {                                             \
            bool whole = (s + 16) * (INPUTS) <= a->n_inputs;                                       \
            __m512i v[4];                                                                          \
            for (int k = 0; k < 4; k++)                                                            \
                v[k] = k >= count ? v[0]                                                           \
                       : whole    ? VECTOR(x + k * stride, s, (s + 16) * (INPUTS))                 \
                                  : VECTOR(x + k * stride, s, a->n_inputs);                           \
            for (int k = 0; k < count; k++)                                                        \
                floats_fetch(x + k * stride, s * (INPUTS), 16 * (INPUTS));                         \
            if (apart)                                                                             \
                words_store_row(words + s, v[0], a->n_steps - s, STEPS_IN_ORDER);                  \
            else                                                                                   \
                words_store(words + s * rows, rows, v, count, a->n_steps - s, STEPS_IN_ORDER);     \
        }                                                                                          \
    }                                                                                              \
    static void NAME(const struct activations *a, const float *x, int64_t stride, int64_t first,   \
                     int rows, uint32_t *words)                                                    \
    {                                                                                              \
        bool apart = a->row_major || rows == 1;                                                    \
        (void)first;                                                                               \
        for (int r = 0; r < rows; r += apart || rows - r < 4 ? 1 : 4) {                            \
            const float *from = x + r * stride;                                                    \
            if (apart)                                                                             \
                NAME##_rows(a, from, stride, rows, words + r * a->n_steps, 1, true);               \
            else if (rows - r < 4)                                                                 \
                NAME##_rows(a, from, stride, rows, words + r, 1, false);                           \
            else                                                                                   \
                NAME##_rows(a, from, stride, rows, words + r, 4, false);                           \
        }                                                                                          \
    }
