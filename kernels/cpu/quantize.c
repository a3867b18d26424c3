/* Rows of activations into the words that microkernels broadcast; the plain C version.
 *
 * INT8 and INT4 quantize a row by its largest magnitude: q = round(x * (1 / (max / 127))). The
 * operations and their order are the same in every ISA, so their words are equal bit for bit. A row
 * that holds a NaN or an infinity gets the scale NaN, and so NaN outputs, whatever its words. */
#include "kernels/cpu/quantize.h"
#include "kernels/cpu/cpu.h"
#include "kernels/half.h"

static void row_f32(const struct activations *a, const float *x, int64_t row, int step_words,
                    uint32_t *words)
{
    (void)row;
    for (int64_t i = 0; i < a->n_steps; i++)
        words[i * step_words] = i < a->n_inputs ? float_bits(x[i]) : 0;
}

static void row_bf16(const struct activations *a, const float *x, int64_t row, int step_words,
                     uint32_t *words)
{
    (void)row;
    for (int64_t i = 0; i < a->n_steps; i++) {
        uint32_t low = 2 * i < a->n_inputs ? bf16_from_float(x[2 * i]) : 0;
        uint32_t high = 2 * i + 1 < a->n_inputs ? bf16_from_float(x[2 * i + 1]) : 0;
        words[i * step_words] = low | high << 16;
    }
}

float quantize_scale(uint32_t max_bits, float *out_inverse)
{
    float max = float_from_bits(max_bits);
    float scale = max / 127.0f;
    *out_inverse = 0.0f;
    if (max_bits >= 0x7f800000) return float_from_bits(0x7fc00000);
    if (scale < 0x1p-120f) return 0.0f; /* its inverse might overflow; such a row is zero */
    *out_inverse = 1.0f / scale;
    return scale;
}

static void row_int8(const struct activations *a, const float *x, int64_t row, int step_words,
                     uint32_t *words)
{
    uint32_t max_bits = 0;
    for (int64_t i = 0; i < a->n_inputs; i++) {
        uint32_t u = float_bits(x[i]) & 0x7fffffff;
        max_bits = u > max_bits ? u : max_bits;
    }
    float inverse;
    a->row_scale[row] = quantize_scale(max_bits, &inverse);
    int32_t sum = 0;
    int32_t *correction = a->correction + row * a->n_groups;
    for (int64_t step = 0; step < a->n_steps; step++) {
        uint32_t word = 0;
        for (int64_t i = step * 4; inverse > 0.0f && i < step * 4 + 4; i++) {
            int64_t from = a->order ? a->order[i] : i < a->n_inputs ? i : -1;
            float v = from < 0 ? 0.0f : x[from];
            /* adding 1.5 * 2^23 rounds to the nearest integer, ties to even */
            int32_t q = (int32_t)((v * inverse + 12582912.0f) - 12582912.0f);
            word |= (uint32_t)(uint8_t)q << i % 4 * 8;
            sum += q;
        }
        words[step * step_words] = word;
        if ((step + 1) % a->group_steps) continue;
        *correction++ = -a->offset * sum;
        sum = 0;
    }
}

/* A row panel from its rows. */
#define ROWS(NAME, ROW)                                                                            \
    void NAME(const struct activations *a, const float *x, int64_t stride, int64_t first,          \
              int rows, uint32_t *words)                                                           \
    {                                                                                              \
        for (int r = 0; r < rows; r++)                                                             \
            ROW(a, x + r * stride, first + r, a->row_major ? 1 : rows,                             \
                words + (a->row_major ? r * a->n_steps : r));                                      \
    }
ROWS(quantize_rows_f32, row_f32)
ROWS(quantize_rows_bf16, row_bf16)
ROWS(quantize_rows_int8, row_int8)
