/* Sixteen floats as two 256-bit registers: the vocabulary that attention_lanes.h is written in. */
#pragma once
#include "kernels/cpu/cpu.h"

#include <immintrin.h>
#include <stdint.h>

#define LANES_INLINE static inline __attribute__((always_inline)) KERNEL_UNCHECKED
typedef struct {
    __m256 a, b;
} lanes;

enum { LANES_ROWS_MAX = 2 }; /* query rows that one kernel call holds in registers */

LANES_INLINE lanes lanes_zero(void)
{
    return (lanes){_mm256_setzero_ps(), _mm256_setzero_ps()};
}
LANES_INLINE lanes lanes_all(float x)
{
    return (lanes){_mm256_set1_ps(x), _mm256_set1_ps(x)};
}
LANES_INLINE lanes lanes_load(const float *p)
{
    return (lanes){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)};
}
LANES_INLINE void lanes_store(float *p, lanes x)
{
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
LANES_INLINE lanes lanes_load_f16(const uint16_t *p)
{
    return (lanes){_mm256_cvtph_ps(_mm_loadu_si128((const void *)p)),
                   _mm256_cvtph_ps(_mm_loadu_si128((const void *)(p + 8)))};
}
LANES_INLINE __m256 lanes_byte(const uint32_t *p, const int j)
{
    __m256i x = _mm256_slli_epi32(_mm256_loadu_si256((const void *)p), 24 - 8 * j);
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(x, 24));
}
/* Byte j of 16 words. */
LANES_INLINE lanes lanes_load_byte(const uint32_t *p, const int j)
{
    return (lanes){lanes_byte(p, j), lanes_byte(p + 8, j)};
}
LANES_INLINE lanes lanes_load_low(const uint32_t *p)
{
    return (lanes){
        _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const void *)p), 16)),
        _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const void *)(p + 8)), 16))};
}
LANES_INLINE lanes lanes_load_high(const uint32_t *p)
{
    const __m256i high = _mm256_set1_epi32((int)0xffff0000);
    return (lanes){
        _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const void *)p), high)),
        _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const void *)(p + 8)), high))};
}
#define LANES_BINARY(NAME, OP)                                                                     \
    LANES_INLINE lanes NAME(lanes x, lanes y)                                                      \
    {                                                                                              \
        return (lanes){OP(x.a, y.a), OP(x.b, y.b)};                                                \
    }
LANES_BINARY(lanes_add, _mm256_add_ps)
LANES_BINARY(lanes_sub, _mm256_sub_ps)
LANES_BINARY(lanes_mul, _mm256_mul_ps)
LANES_BINARY(lanes_div, _mm256_div_ps)
LANES_BINARY(lanes_max, _mm256_max_ps)
/* x * y + z */
LANES_INLINE lanes lanes_fma(lanes x, lanes y, lanes z)
{
    return (lanes){_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
LANES_INLINE lanes lanes_round(lanes x)
{
    return (lanes){_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                   _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
LANES_INLINE __m256 lanes_power2(__m256 n)
{
    __m256i bits = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
}
/* x * 2^n for whole n in -126..127 */
LANES_INLINE lanes lanes_scale2(lanes x, lanes n)
{
    return (lanes){_mm256_mul_ps(x.a, lanes_power2(n.a)), _mm256_mul_ps(x.b, lanes_power2(n.b))};
}
/* x in lanes [low, high), other elsewhere. */
LANES_INLINE lanes lanes_between(lanes x, int low, int high, lanes other)
{
    const __m256i at = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), eight = _mm256_set1_epi32(8);
    __m256i l = _mm256_set1_epi32(low - 1), h = _mm256_set1_epi32(high),
            at2 = _mm256_add_epi32(at, eight);
    __m256i in_a = _mm256_and_si256(_mm256_cmpgt_epi32(at, l), _mm256_cmpgt_epi32(h, at));
    __m256i in_b = _mm256_and_si256(_mm256_cmpgt_epi32(at2, l), _mm256_cmpgt_epi32(h, at2));
    return (lanes){_mm256_blendv_ps(other.a, x.a, _mm256_castsi256_ps(in_a)),
                   _mm256_blendv_ps(other.b, x.b, _mm256_castsi256_ps(in_b))};
}
LANES_INLINE float lanes_max_of(lanes x)
{
    float v[8], max;
    _mm256_storeu_ps(v, _mm256_max_ps(x.a, x.b));
    max = v[0];
    for (int i = 1; i < 8; i++)
        max = v[i] > max ? v[i] : max;
    return max;
}
LANES_INLINE float lanes_sum_of(lanes x)
{
    float v[8];
    _mm256_storeu_ps(v, _mm256_add_ps(x.a, x.b));
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}
