/* Microkernels in plain C: what the others are compared with.
 *
 * INT8 and INT4 accumulate exactly and must be met bit for bit; the floating formats within the
 * tolerances of tests. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/quantize.h"
#include "kernels/half.h"

#include <math.h>

enum { N = PANEL_OUTPUTS, R = PANEL_ROWS_MAX };

static void accumulators_begin(const struct panel_call *c, int rows, float sum[R][N])
{
    if (c->first)
        memset(sum, 0, (size_t)rows * sizeof *sum);
    else
        memcpy(sum, c->scratch, (size_t)rows * sizeof *sum);
}

/* out = sum * row_scale * column_scale + bias, in this order, where the format has them. */
static void accumulators_end(const struct panel_call *c, int rows, float sum[R][N])
{
    if (!c->last) {
        memcpy(c->scratch, sum, (size_t)rows * sizeof *sum);
        return;
    }
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < N; n++) {
            float v = sum[r][n];
            if (c->row_scale) v *= c->row_scale[r];
            if (c->column_scale) v *= c->column_scale[n];
            if (c->bias) v += c->bias[n];
            c->out[r * c->out_stride + n] = v;
        }
}

static void row_add(float *restrict sum, float x, const float *restrict w)
{
    for (int n = 0; n < N; n++)
        sum[n] += x * w[n];
}

static void panel_f32(const struct panel_call *c, int rows)
{
    float sum[R][N];
    accumulators_begin(c, rows, sum);
    for (int64_t s = 0; s < c->n_steps; s++)
        for (int r = 0; r < rows; r++)
            row_add(sum[r], float_from_bits(c->words[s * rows + r]),
                    (const float *)c->weights + s * N);
    accumulators_end(c, rows, sum);
}

static void panel_f16(const struct panel_call *c, int rows)
{
    float sum[R][N], w[N];
    accumulators_begin(c, rows, sum);
    for (int64_t s = 0; s < c->n_steps; s++) {
        const uint16_t *halves = (const uint16_t *)c->weights + s * N;
        for (int n = 0; n < N; n++)
            w[n] = f16_to_float(halves[n]);
        for (int r = 0; r < rows; r++)
            row_add(sum[r], float_from_bits(c->words[s * rows + r]), w);
    }
    accumulators_end(c, rows, sum);
}

static void panel_bf16(const struct panel_call *c, int rows)
{
    float sum[R][N], low[N], high[N];
    accumulators_begin(c, rows, sum);
    for (int64_t s = 0; s < c->n_steps; s++) {
        const uint32_t *pairs = (const uint32_t *)c->weights + s * N;
        for (int n = 0; n < N; n++) {
            low[n] = float_from_bits(pairs[n] << 16);
            high[n] = float_from_bits(pairs[n] & 0xffff0000);
        }
        for (int r = 0; r < rows; r++) {
            uint32_t word = c->words[s * rows + r];
            row_add(sum[r], float_from_bits(word << 16), low);
            row_add(sum[r], float_from_bits(word & 0xffff0000), high);
        }
    }
    accumulators_end(c, rows, sum);
}

/* One step of `rows` rows. The products of a step fit in 16 bits times 4: 32-bit sums are exact. */
static void step_int8(int32_t sum[R][N], const uint8_t *weights, const uint32_t *words, int rows)
{
    int16_t w[4][N];
    for (int n = 0; n < N; n++)
        for (int i = 0; i < 4; i++)
            w[i][n] = weights[n * 4 + i];
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < 4; i++) {
            int16_t x = (int8_t)(words[r] >> 8 * i);
            for (int n = 0; n < N; n++)
                sum[r][n] += x * w[i][n];
        }
}

static void panel_int8(const struct panel_call *c, int rows)
{
    int32_t exact[R][N];
    float sum[R][N];
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < N; n++)
            exact[r][n] = c->first ? c->correction[r * c->correction_stride]
                                   : ((int32_t *)c->scratch)[r * N + n];
    for (int64_t s = 0; s < c->n_steps; s++)
        step_int8(exact, c->weights + s * 128, c->words + s * rows, rows);
    memcpy(c->scratch, exact, (size_t)rows * sizeof *exact);
    if (!c->last) return;
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < N; n++)
            sum[r][n] = (float)exact[r][n];
    accumulators_end(c, rows, sum);
}

/* One group: its scales, then its steps. The sum begins at the correction, which in INT4_GROUPS is
 * -sum(x) for each output's own zero point. */
static void group_int4(const struct panel_call *c, int64_t g, int rows, float sum[R][N])
{
    const uint8_t *group = c->weights + g * (GROUP_HEADER + c->group_steps * 64);
    const uint32_t *words = c->words + g * c->group_steps * rows;
    int32_t exact[R][N];
    uint8_t low[128], high[128];
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < N; n++)
            exact[r][n] =
                c->correction[r * c->correction_stride + g] * (c->zeros ? c->zeros[g * N + n] : 1);
    for (int64_t s = 0; s < c->group_steps; s += 2) {
        const uint8_t *pair = group + GROUP_HEADER + s / 2 * 128;
        for (int i = 0; i < 128; i++)
            low[i] = pair[i] & 15, high[i] = pair[i] >> 4;
        step_int8(exact, low, words + s * rows, rows);
        step_int8(exact, high, words + (s + 1) * rows, rows);
    }
    for (int n = 0; n < N; n++) {
        uint16_t half;
        memcpy(&half, group + n * 2, 2);
        float scale = f16_to_float(half);
        for (int r = 0; r < rows; r++)
            sum[r][n] = fmaf((float)exact[r][n], scale, sum[r][n]);
    }
}

static void panel_int4(const struct panel_call *c, int rows)
{
    float sum[R][N];
    accumulators_begin(c, rows, sum);
    for (int64_t g = 0; g * c->group_steps < c->n_steps; g++)
        group_int4(c, g, rows, sum);
    accumulators_end(c, rows, sum);
}

const struct matmul_kernels matmul_reference = {
    .panel = {[WEIGHT_F32] = panel_f32,
              [WEIGHT_F16] = panel_f16,
              [WEIGHT_BF16] = panel_bf16,
              [WEIGHT_INT8] = panel_int8,
              [WEIGHT_INT4] = panel_int4,
              [WEIGHT_INT4_GROUPS] = panel_int4},
    .rows_max = {[WEIGHT_F32] = PANEL_ROWS_MAX,
                 [WEIGHT_F16] = PANEL_ROWS_MAX,
                 [WEIGHT_BF16] = PANEL_ROWS_MAX,
                 [WEIGHT_INT8] = PANEL_ROWS_MAX,
                 [WEIGHT_INT4] = PANEL_ROWS_MAX,
                 [WEIGHT_INT4_GROUPS] = PANEL_ROWS_MAX},
    .pack_rows = {[WEIGHT_F32] = quantize_rows_f32,
                  [WEIGHT_F16] = quantize_rows_f32,
                  [WEIGHT_BF16] = quantize_rows_bf16,
                  [WEIGHT_INT8] = quantize_rows_int8,
                  [WEIGHT_INT4] = quantize_rows_int8,
                  [WEIGHT_INT4_GROUPS] = quantize_rows_int8},
};
