/* Transcendental functions that compilers turn into vector code: the same bits in any lane, any
 * loop, any ISA (no fused operations, no calls). Within about 2 ulp of the exact value for exp. */
#pragma once
#include "kernels/half.h"

/* e^x: x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial for e^r, and 2^n by exponent bits. Below
 * -87.3 the result is 0, above 88.72 infinity. NaN stays NaN. */
static inline float exp_approx(float x)
{
    float clamped = x < -87.3f ? -87.3f : x;
    clamped = clamped > 88.72f ? 88.72f : clamped;
    float shifted = clamped * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
    float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + (r + 1.0f);
    /* 2^n in two halves, for n = 128 has no float of its own */
    uint32_t bits = float_bits(shifted) - 0x4b400000u;
    uint32_t half = (uint32_t)((int32_t)bits >> 1);
    p = p * float_from_bits((half + 127u) << 23) * float_from_bits((bits - half + 127u) << 23);
    p = x < -87.3f ? 0.0f : p;
    return x > 88.72f ? float_from_bits(0x7f800000) : p;
}

/* tanh x = 1 - 2 / (e^2x + 1); near 0, where that cancels, the odd series to x^7. */
static inline float tanh_approx(float x)
{
    float x2 = x * x;
    float series = x + x * x2 * (-0.333333333f + x2 * (0.133333333f - x2 * 0.0539682540f));
    float general = 1.0f - 2.0f / (exp_approx(2.0f * x) + 1.0f);
    return x2 < 0.04f ? series : general;
}
