/* Packing of weights on the host: half types, codes of eight and four bits. Knows rows of numbers,
 * never a device.
 *
 * Billions of weights pass through here on one thread, so rounding is arithmetic on whole rows, no
 * call for each: what is added to 1.5 * 2^23 keeps its integer part, ties to even. */
#include "kernels/cuda/pack.h"

#include <math.h>
#include <string.h>

enum { GROUP = 128 };

static uint32_t bits_of(float f)
{
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}

static float float_of(uint32_t u)
{
    float f;
    memcpy(&f, &u, 4);
    return f;
}

/* To the nearest integer, ties to even; |v| at most 2^22. */
static inline float rounded(float v)
{
    return (v + 0x1.8p23f) - 0x1.8p23f;
}

/* Ties to even; NaN stays NaN. */
uint16_t pack_bf16(float v)
{
    uint32_t u = bits_of(v);
    if (v != v) return 0x7fff;
    return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

uint16_t pack_f16(float v)
{
    uint32_t u = bits_of(v), sign = u >> 16 & 0x8000;
    float a = fabsf(v);
    if (v != v) return (uint16_t)(sign | 0x7e00);
    if (a >= 65520.0f) return (uint16_t)(sign | 0x7c00);
    if (a < 0x1p-14f) return (uint16_t)(sign | (uint32_t)nearbyintf(a * 0x1p24f));
    uint32_t b = bits_of(a), rounded = b + 0xfff + ((b >> 13) & 1);
    return (uint16_t)(sign | ((rounded >> 13) - (112 << 10)));
}

float unpack_f16(uint16_t v)
{
    uint32_t e = v >> 10 & 31, m = v & 1023;
    float r = e == 31 ? (m ? NAN : INFINITY)
              : e     ? ldexpf((float)(1024 + m), (int)e - 25)
                      : ldexpf((float)m, -24);
    return v & 0x8000 ? -r : r;
}

/* E4M3 of the OCP 8-bit floating point specification: bias 7, no infinity, largest 448. */
uint8_t pack_fp8(float v)
{
    uint32_t u = bits_of(v), sign = u >> 24 & 0x80, a = u & 0x7fffffff;
    if (a > 0x7f800000) return (uint8_t)(sign | 0x7f);
    if (a >= bits_of(448.0f)) return (uint8_t)(sign | 0x7e);
    if (a < bits_of(0x1p-6f)) return (uint8_t)(sign | (uint32_t)rounded(float_of(a) * 0x1p9f));
    return (uint8_t)(sign | (((a + 0x7ffff + (a >> 20 & 1)) >> 20) - (120 << 3)));
}

static float element(const struct matrix_view *view, int64_t at)
{
    uint16_t half;
    float f;
    if (view->dtype == DTYPE_F32) {
        memcpy(&f, (const uint8_t *)view->data + at * 4, 4);
        return f;
    }
    memcpy(&half, (const uint8_t *)view->data + at * 2, 2);
    return view->dtype == DTYPE_F16 ? unpack_f16(half) : float_of((uint32_t)half << 16);
}

void pack_row_read(const struct matrix_view *view, int64_t r, float *out)
{
    if (!view->data) {
        memset(out, 0, (size_t)view->cols * sizeof *out);
        return;
    }
    for (int64_t c = 0; c < view->cols; c++)
        out[c] = element(view, r * view->row_stride + c * view->col_stride);
}

static float largest(const float *row, int64_t n)
{
    float most = 0;
    for (int64_t i = 0; i < n; i++)
        most = fmaxf(most, fabsf(row[i]));
    return most;
}

/* A row too small for its scale to have an inverse becomes zeros. */
static float inverse_of(float scale)
{
    return scale >= 1e-36f ? 1.0f / scale : 0.0f;
}

float pack_row_int8(const float *row, int64_t n_in, int64_t n_in_padded, uint8_t *codes)
{
    float scale = largest(row, n_in) / 127.0f, inverse = inverse_of(scale);
    memset(codes, 0, (size_t)n_in_padded);
    for (int64_t i = 0; i < n_in; i++)
        codes[i] = (uint8_t)(int8_t)rounded(row[i] * inverse);
    return scale;
}

float pack_row_fp8(const float *row, int64_t n_in, int64_t n_in_padded, uint8_t *codes)
{
    float scale = largest(row, n_in) / 448.0f, inverse = inverse_of(scale);
    memset(codes, 0, (size_t)n_in_padded);
    for (int64_t i = 0; i < n_in; i++)
        codes[i] = pack_fp8(row[i] * inverse);
    return scale;
}

static inline float round_code(float v)
{
    float low = v > -8.0f ? v : -8.0f;
    return rounded(low < 7.0f ? low : 7.0f);
}

/* Squares of what the codes of a group miss; in lanes, which the compiler may work on together. */
static float group_error(const float *group, int64_t n, float scale)
{
    enum { LANES = 8 };
    float sums[LANES] = {0}, inverse = 1.0f / scale, error = 0;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) {
            float e = group[i + j] - round_code(group[i + j] * inverse) * scale;
            sums[j] += e * e;
        }
    for (; i < n; i++) {
        float e = group[i] - round_code(group[i] * inverse) * scale;
        sums[0] += e * e;
    }
    for (int j = 0; j < LANES; j++)
        error += sums[j];
    return error;
}

/* The f16 scale whose codes -8 .. 7 come closest: from the one that lays the largest value on -8,
 * down to one that clips it by a third. */
static uint16_t group_scale(const float *group, int64_t n)
{
    float extreme = 0, best_error = INFINITY;
    uint16_t best = 0;
    for (int64_t i = 0; i < n; i++)
        if (fabsf(group[i]) > fabsf(extreme)) extreme = group[i];
    for (int step = 0; step < 8; step++) {
        uint16_t half = pack_f16(extreme / -8.0f * (1.05f - 0.05f * (float)step));
        float scale = unpack_f16(half);
        if (fabsf(scale) < 0x1p-24f || !isfinite(scale)) continue;
        float error = group_error(group, n, scale);
        if (error < best_error) best_error = error, best = half;
    }
    return best;
}

void pack_row_int4(const float *row, int64_t n_in, int64_t n_in_padded, uint8_t *codes,
                   uint16_t *scales)
{
    memset(codes, 0x88, (size_t)n_in_padded / 2);
    for (int64_t g = 0; g * GROUP < n_in_padded; g++) {
        int64_t n = n_in - g * GROUP < GROUP ? n_in - g * GROUP : GROUP;
        scales[g] = group_scale(row + g * GROUP, n);
        float scale = unpack_f16(scales[g]);
        for (int64_t i = g * GROUP; i < g * GROUP + n && scale != 0; i++) {
            uint8_t code = (uint8_t)((int)round_code(row[i] / scale) + 8);
            codes[i / 2] = i % 2 ? (uint8_t)((codes[i / 2] & 0x0f) | code << 4)
                                 : (uint8_t)((codes[i / 2] & 0xf0) | code);
        }
    }
}
