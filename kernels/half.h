/* The 16-bit floats, one value at a time: conversions that the CPU backend and the reading of
 * checkpoints share.
 *
 * Rounding is to nearest, ties to even, as vcvtps2ph and vcvtneps2bf16 do. Subnormal f16 are kept;
 * NaN stays NaN. */
#pragma once
#include "kernels/tensor.h"
#include <string.h>

static inline uint32_t float_bits(float x)
{
    uint32_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

static inline float float_from_bits(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

static inline float bf16_to_float(uint16_t h)
{
    return float_from_bits((uint32_t)h << 16);
}

/* vcvtneps2bf16 and vdpbf16ps take subnormal floats for zero; so does this, to agree with them. */
static inline uint16_t bf16_from_float(float x)
{
    uint32_t u = float_bits(x);
    if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)(u >> 16 | 0x40);
    if (!(u & 0x7f800000)) return (uint16_t)(u >> 16 & 0x8000);
    return (uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

static inline float bf16_round(float x)
{
    return bf16_to_float(bf16_from_float(x));
}

static inline float f16_to_float(uint16_t h)
{
    uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = h >> 10 & 31, fraction = h & 1023;
    if (exponent == 31) return float_from_bits(sign | 0x7f800000 | fraction << 13);
    if (exponent) return float_from_bits(sign | (exponent + 112) << 23 | fraction << 13);
    float magnitude = (float)fraction * 0x1p-24f;
    return sign ? -magnitude : magnitude;
}

static inline uint16_t f16_from_float(float x)
{
    uint32_t u = float_bits(x), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x38800000) { /* subnormal: adding 0.5 lets the float unit do the rounding */
        float y = float_from_bits(magnitude) + 0.5f;
        return (uint16_t)(sign | (float_bits(y) - 0x3f000000));
    }
    return (uint16_t)(sign | (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000) >> 13);
}

static inline float load_float(const void *p, enum dtype dtype)
{
    if (dtype == DTYPE_F32) {
        float x;
        memcpy(&x, p, sizeof x);
        return x;
    }
    uint16_t h;
    memcpy(&h, p, sizeof h);
    return dtype == DTYPE_BF16 ? bf16_to_float(h) : f16_to_float(h);
}
