/* Loops over one row: activations, norms, sums, conversions. Written once in plain C; the files
 * that include this one are compiled for different instruction sets.
 *
 * Every operation is the same in all of them and none is fused (-ffp-contract=off), sums have a
 * fixed number of lanes: so the bits are equal whatever the ISA. Knows nothing of tensors. */
#pragma once
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/vector_math.h"

#include <float.h>
#include <math.h>
#include <string.h>

enum { SUM_LANES = 32 };

/* Pairwise over the lanes. */
static float lanes_total(float *lane)
{
    for (int n = SUM_LANES / 2; n > 0; n /= 2)
        for (int j = 0; j < n; j++)
            lane[j] += lane[j + n];
    return lane[0];
}

static float row_sum(const float *x, int64_t n)
{
    float lane[SUM_LANES] = {0};
    int64_t i = 0;
    for (; i + SUM_LANES <= n; i += SUM_LANES)
        for (int j = 0; j < SUM_LANES; j++)
            lane[j] += x[i + j];
    for (int j = 0; i < n; i++, j++)
        lane[j] += x[i];
    return lanes_total(lane);
}

/* Sum of (x - shift)^2. */
static float row_squares(const float *x, int64_t n, float shift)
{
    float lane[SUM_LANES] = {0};
    int64_t i = 0;
    for (; i + SUM_LANES <= n; i += SUM_LANES)
        for (int j = 0; j < SUM_LANES; j++) {
            float v = x[i + j] - shift;
            lane[j] += v * v;
        }
    for (int j = 0; i < n; i++, j++) {
        float v = x[i] - shift;
        lane[j] += v * v;
    }
    return lanes_total(lane);
}

static void add(float *restrict x, const float *restrict y, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        x[i] += y[i];
}

/* RMS norm: Zhang, Sennrich, "Root mean square layer normalization", 2019, equation 4. Layer norm:
 * Ba, Kiros, Hinton, "Layer normalization", 2016, equation 4. */
static void norm(float *restrict x, const float *delta, const struct norm_args *args,
                 float *restrict out, int64_t n)
{
    const float *restrict weight = args->weight, *restrict bias = args->bias;
    if (delta) add(x, delta, n);
    float mean = args->kind == NORM_LAYER ? row_sum(x, n) / (float)n : 0.0f;
    float scale = 1.0f / sqrtf(row_squares(x, n, mean) / (float)n + args->epsilon);
    for (int64_t i = 0; i < n; i++)
        out[i] = (x[i] - mean) * scale * weight[i];
    if (!bias) return;
    for (int64_t i = 0; i < n; i++)
        out[i] += bias[i];
}

static void scale(float *restrict x, int64_t n, float by, float softcap)
{
    for (int64_t i = 0; i < n; i++)
        x[i] *= by;
    if (softcap <= 0.0f) return;
    float inverse = 1.0f / softcap;
    for (int64_t i = 0; i < n; i++)
        x[i] = softcap * tanh_approx(x[i] * inverse);
}

enum { STEP_LANES = 64 }; /* elements that go through a long chain of operations side by side */

/* SiLU: x / (1 + e^-x) of some elements, one operation after the other for all of them: a
 * vector alone waits for most of its 100 cycles. e^-x is exp_approx's, but where that does not
 * show: beside 1, below e^-87. From x = -88.3 down, where 2^n has no float, all is about -4e-37. */
static inline __attribute__((always_inline)) void silu_step(float *out, const float *gate,
                                                            const float *up, const int lanes)
{
    float x[STEP_LANES], n[STEP_LANES], r[STEP_LANES], p[STEP_LANES];
#define EACH for (int j = 0; j < lanes; j++)
    EACH x[j] = gate[j] < -88.3f ? -88.3f : gate[j];
    EACH r[j] = x[j] > 87.0f ? 87.0f : x[j];
    EACH n[j] = 12582912.0f - r[j] * 1.44269504f;
    EACH p[j] = n[j] - 12582912.0f;
    EACH r[j] = -r[j] - p[j] * 0.693359375f;
    EACH r[j] = r[j] + p[j] * 2.12194440e-4f;
    EACH p[j] = 1.9875691500e-4f * r[j] + 1.3981999507e-3f;
    EACH p[j] = p[j] * r[j] + 8.3334519073e-3f;
    EACH p[j] = p[j] * r[j] + 4.1665795894e-2f;
    EACH p[j] = p[j] * r[j] + 1.6666665459e-1f;
    EACH p[j] = p[j] * r[j] + 5.0000001201e-1f;
    EACH p[j] = p[j] * (r[j] * r[j]) + (r[j] + 1.0f);
    EACH p[j] = float_from_bits(float_bits(p[j]) + (float_bits(n[j]) << 23)); /* times 2^n */
    EACH p[j] = x[j] / (1.0f + p[j]);
    EACH out[j] = p[j] * up[j];
#undef EACH
}

/* out = silu(gate) * up, or silu(gate) when up is NULL. */
static void silu(float *out, const float *gate, const float *up, int64_t n)
{
    enum { HALF = STEP_LANES / 2 };
    float ones[STEP_LANES], last_gate[HALF] = {0}, last_up[HALF] = {0};
    int64_t i = 0, on = up != NULL; /* whether up moves with the others */
    for (int j = 0; !up && j < STEP_LANES; j++)
        ones[j] = 1.0f;
    if (!up) up = ones;
    for (; i + STEP_LANES <= n; i += STEP_LANES)
        silu_step(out + i, gate + i, up + i * on, STEP_LANES);
    for (; i + HALF <= n; i += HALF)
        silu_step(out + i, gate + i, up + i * on, HALF);
    if (i == n) return;
    memcpy(last_gate, gate + i, (size_t)(n - i) * sizeof *gate);
    memcpy(last_up, up + i * on, (size_t)(n - i) * sizeof *up);
    silu_step(last_gate, last_gate, last_up, HALF);
    memcpy(out + i, last_gate, (size_t)(n - i) * sizeof *out);
}

/* GELU: Hendrycks, Gimpel, 2016, section 2: x Phi(x), and its tanh form. out may be gate. */
static void activate(float *out, const float *gate, const float *restrict up, int64_t n,
                     enum activation kind)
{
    switch (kind) {
    case ACTIVATION_SILU:
        silu(out, gate, up, n);
        return;
    case ACTIVATION_GELU_TANH:
#pragma GCC ivdep
        for (int64_t i = 0; i < n; i++) {
            float x = gate[i];
            out[i] = 0.5f * x * (1.0f + tanh_approx(0.7978845608f * (x + 0.044715f * x * x * x)));
        }
        break;
    case ACTIVATION_GELU_ERF:
        for (int64_t i = 0; i < n; i++)
            out[i] = 0.5f * gate[i] * (1.0f + erff(gate[i] * 0.7071067812f));
        break;
    case ACTIVATION_RELU:
#pragma GCC ivdep
        for (int64_t i = 0; i < n; i++)
            out[i] = gate[i] > 0.0f ? gate[i] : 0.0f * gate[i];
        break;
    }
    if (!up) return;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; i++)
        out[i] *= up[i];
}

static void blend(float *restrict x, const float *restrict y, float keep, float more, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        x[i] = x[i] * keep + y[i] * more;
}

/* What e^a and e^b become beside e^(the larger of both). */
static void shares(float *restrict keep, float *restrict add, const float *restrict a,
                   const float *restrict b, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        float most = b[i] > a[i] ? b[i] : a[i];
        keep[i] = exp_approx(a[i] - most);
        add[i] = exp_approx(b[i] - most);
    }
}

static void to_bf16(uint16_t *restrict out, const float *restrict x, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        out[i] = bf16_from_float(x[i]);
}

/* The largest value, taking NaN for -inf and +inf for the largest float, as sampling does. */
static float largest(const float *x, int64_t n)
{
    float lane[SUM_LANES];
    int64_t i = 0;
    for (int j = 0; j < SUM_LANES; j++)
        lane[j] = -INFINITY;
    for (; i + SUM_LANES <= n; i += SUM_LANES)
        for (int j = 0; j < SUM_LANES; j++)
            lane[j] = x[i + j] > lane[j] ? x[i + j] : lane[j];
    for (int j = 0; i < n; i++, j++)
        lane[j] = x[i] > lane[j] ? x[i] : lane[j];
    for (int k = SUM_LANES / 2; k > 0; k /= 2)
        for (int j = 0; j < k; j++)
            lane[j] = lane[j + k] > lane[j] ? lane[j + k] : lane[j];
    return lane[0] > FLT_MAX ? FLT_MAX : lane[0];
}

/* Su et al., "RoFormer", 2021, equation 34, of the pairs (i, i + half). */
static void rotate_halves(float *restrict x, const float *restrict c, const float *restrict s,
                          int64_t half)
{
    float *restrict y = x + half;
    for (int64_t i = 0; i < half; i++) {
        float low = x[i], high = y[i];
        x[i] = low * c[i] - high * s[i];
        y[i] = high * c[i] + low * s[i];
    }
}

#define ROW_KERNELS(NAME)                                                                          \
    const struct row_kernels NAME = {add,     norm,          scale,   activate, blend,             \
                                     to_bf16, rotate_halves, largest, shares};
