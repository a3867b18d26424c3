/* Sixteen floats as one 512-bit register: the vocabulary that attention_lanes.h is written in. */
#pragma once
#include "kernels/cpu/cpu.h"

#include <immintrin.h>
#include <stdint.h>

#define LANES_INLINE static inline __attribute__((always_inline)) KERNEL_UNCHECKED
typedef __m512 lanes;

enum { LANES_ROWS_MAX = 8 }; /* query rows that one kernel call holds in registers */

LANES_INLINE lanes lanes_zero(void)
{
    return _mm512_setzero_ps();
}
LANES_INLINE lanes lanes_all(float x)
{
    return _mm512_set1_ps(x);
}
LANES_INLINE lanes lanes_load(const float *p)
{
    return _mm512_loadu_ps(p);
}
LANES_INLINE void lanes_store(float *p, lanes x)
{
    _mm512_storeu_ps(p, x);
}
LANES_INLINE lanes lanes_load_f16(const uint16_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)p));
}
/* Byte j of 16 words. */
LANES_INLINE lanes lanes_load_byte(const uint32_t *p, const unsigned j)
{
    __m512i x = _mm512_slli_epi32(_mm512_loadu_si512(p), 24 - 8 * j);
    return _mm512_cvtepi32_ps(_mm512_srai_epi32(x, 24));
}
/* The low and the high halves of 16 words, each a BF16. */
LANES_INLINE lanes lanes_load_low(const uint32_t *p)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
}
LANES_INLINE lanes lanes_load_high(const uint32_t *p)
{
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32((int)0xffff0000)));
}
LANES_INLINE lanes lanes_add(lanes a, lanes b)
{
    return _mm512_add_ps(a, b);
}
LANES_INLINE lanes lanes_sub(lanes a, lanes b)
{
    return _mm512_sub_ps(a, b);
}
LANES_INLINE lanes lanes_mul(lanes a, lanes b)
{
    return _mm512_mul_ps(a, b);
}
LANES_INLINE lanes lanes_div(lanes a, lanes b)
{
    return _mm512_div_ps(a, b);
}
LANES_INLINE lanes lanes_max(lanes a, lanes b)
{
    return _mm512_max_ps(a, b);
}
/* a * b + c */
LANES_INLINE lanes lanes_fma(lanes a, lanes b, lanes c)
{
    return _mm512_fmadd_ps(a, b, c);
}
LANES_INLINE lanes lanes_round(lanes x)
{
    return _mm512_roundscale_ps(x, 0);
}
/* x * 2^n for whole n; below the smallest normal it may give 0. */
LANES_INLINE lanes lanes_scale2(lanes x, lanes n)
{
    return _mm512_scalef_ps(x, n);
}
/* x in lanes [low, high), other elsewhere. */
LANES_INLINE lanes lanes_between(lanes x, int low, int high, lanes other)
{
    uint32_t mask = (high >= 16  ? 0xffffu
                     : high <= 0 ? 0
                                 : (1u << high) - 1) &
                    ~(low >= 16  ? 0xffffu
                      : low <= 0 ? 0
                                 : (1u << low) - 1);
    return _mm512_mask_blend_ps((__mmask16)mask, other, x);
}
LANES_INLINE float lanes_max_of(lanes x)
{
    return _mm512_reduce_max_ps(x);
}
LANES_INLINE float lanes_sum_of(lanes x)
{
    return _mm512_reduce_add_ps(x);
}

static const float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

/* 2^x for x <= 0: 2^f of f = x - floor(x) by a polynomial through six Chebyshev nodes (relative
 * error 1e-7), then the exponent. */
LANES_INLINE lanes lanes_exp2(lanes x)
{
    enum { TO_FLOOR = 1 };
    lanes f = _mm512_reduce_ps(x, TO_FLOOR), p = lanes_all(1.89375406e-3f);
    p = lanes_fma(p, f, lanes_all(8.94959042e-3f));
    p = lanes_fma(p, f, lanes_all(5.58603371e-2f));
    p = lanes_fma(p, f, lanes_all(0.240141818f));
    p = lanes_fma(p, f, lanes_all(0.69315449f));
    p = lanes_fma(p, f, lanes_all(0.999999898f));
    return _mm512_scalef_ps(p, x);
}
