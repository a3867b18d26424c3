/* Microkernels in plain C: what the others are compared with.
 *
 * INT8 and INT4 accumulate exactly and must be met bit for bit; the floating formats within the
 * tolerances of tests. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/half.h"
#include "kernels/cpu/quantize.h"

#include <math.h>

enum { N = PANEL_OUTPUTS };

static void accumulators_begin(const struct panel_call *c, int r, float *sum)
{
    if (c->first)
        memset(sum, 0, N * sizeof *sum);
    else
        memcpy(sum, (float *)c->scratch + r * N, N * sizeof *sum);
}

/* out = sum * row_scale * column_scale + bias, in this order, where the format has them. */
static void accumulators_end(const struct panel_call *c, int r, const float *sum)
{
    if (!c->last) {
        memcpy((float *)c->scratch + r * N, sum, N * sizeof *sum);
        return;
    }
    for (int n = 0; n < N; n++) {
        float v = sum[n];
        if (c->row_scale) v *= c->row_scale[r];
        if (c->column_scale) v *= c->column_scale[n];
        if (c->bias) v += c->bias[n];
        c->out[r * c->out_stride + n] = v;
    }
}

static void panel_f32(const struct panel_call *c, int rows)
{
    for (int r = 0; r < rows; r++) {
        float sum[N];
        accumulators_begin(c, r, sum);
        for (int64_t s = 0; s < c->n_steps; s++) {
            float x = float_from_bits(c->words[s * rows + r]);
            const float *w = (const float *)c->weights + s * N;
            for (int n = 0; n < N; n++)
                sum[n] += x * w[n];
        }
        accumulators_end(c, r, sum);
    }
}

static void panel_f16(const struct panel_call *c, int rows)
{
    for (int r = 0; r < rows; r++) {
        float sum[N];
        accumulators_begin(c, r, sum);
        for (int64_t s = 0; s < c->n_steps; s++) {
            float x = float_from_bits(c->words[s * rows + r]);
            const uint16_t *w = (const uint16_t *)c->weights + s * N;
            for (int n = 0; n < N; n++)
                sum[n] += x * f16_to_float(w[n]);
        }
        accumulators_end(c, r, sum);
    }
}

static void panel_bf16(const struct panel_call *c, int rows)
{
    for (int r = 0; r < rows; r++) {
        float sum[N];
        accumulators_begin(c, r, sum);
        for (int64_t s = 0; s < c->n_steps; s++) {
            uint32_t word = c->words[s * rows + r];
            float low = float_from_bits(word << 16), high = float_from_bits(word & 0xffff0000);
            const uint32_t *w = (const uint32_t *)c->weights + s * N;
            for (int n = 0; n < N; n++)
                sum[n] +=
                    low * float_from_bits(w[n] << 16) + high * float_from_bits(w[n] & 0xffff0000);
        }
        accumulators_end(c, r, sum);
    }
}

static void dot4(int32_t *sum, const uint8_t *weights, uint32_t word)
{
    for (int i = 0; i < 4; i++) {
        int32_t x = (int8_t)(word >> 8 * i);
        for (int n = 0; n < N; n++)
            sum[n] += x * weights[n * 4 + i];
    }
}

static void panel_int8(const struct panel_call *c, int rows)
{
    for (int r = 0; r < rows; r++) {
        int32_t sum[N], *saved = (int32_t *)c->scratch + r * N;
        for (int n = 0; n < N; n++)
            sum[n] = c->first ? c->correction[r * c->correction_stride] : saved[n];
        for (int64_t s = 0; s < c->n_steps; s++)
            dot4(sum, c->weights + s * 128, c->words[s * rows + r]);
        memcpy(saved, sum, sizeof sum);
        if (!c->last) continue;
        float sum_float[N];
        for (int n = 0; n < N; n++)
            sum_float[n] = (float)sum[n];
        accumulators_end(c, r, sum_float);
    }
}

/* One group: 32 steps, then the group's scales. */
static void group_int4(const uint8_t *group, const uint32_t *words, int rows, int32_t correction,
                       float *sum)
{
    int32_t exact[N];
    uint8_t low[128], high[128];
    for (int n = 0; n < N; n++)
        exact[n] = correction;
    for (int s = 0; s < GROUP_STEPS; s += 2) {
        const uint8_t *pair = group + 64 + s / 2 * 128;
        for (int i = 0; i < 128; i++)
            low[i] = pair[i] & 15, high[i] = pair[i] >> 4;
        dot4(exact, low, words[s * rows]);
        dot4(exact, high, words[(s + 1) * rows]);
    }
    for (int n = 0; n < N; n++) {
        uint16_t half;
        memcpy(&half, group + n * 2, 2);
        sum[n] = fmaf((float)exact[n], f16_to_float(half), sum[n]);
    }
}

static void panel_int4(const struct panel_call *c, int rows)
{
    for (int r = 0; r < rows; r++) {
        float sum[N];
        accumulators_begin(c, r, sum);
        for (int64_t g = 0; g * GROUP_STEPS < c->n_steps; g++)
            group_int4(c->weights + g * (64 + GROUP_STEPS * 64),
                       c->words + g * GROUP_STEPS * rows + r, rows,
                       c->correction[r * c->correction_stride + g], sum);
        accumulators_end(c, r, sum);
    }
}

const struct matmul_kernels matmul_reference = {
    .panel = {[WEIGHT_F32] = panel_f32,
              [WEIGHT_F16] = panel_f16,
              [WEIGHT_BF16] = panel_bf16,
              [WEIGHT_INT8] = panel_int8,
              [WEIGHT_INT4] = panel_int4},
    .rows_max = {[WEIGHT_F32] = PANEL_ROWS_MAX,
                 [WEIGHT_F16] = PANEL_ROWS_MAX,
                 [WEIGHT_BF16] = PANEL_ROWS_MAX,
                 [WEIGHT_INT8] = PANEL_ROWS_MAX,
                 [WEIGHT_INT4] = PANEL_ROWS_MAX},
    .pack_rows = {[WEIGHT_F32] = quantize_row_pack_f32,
                  [WEIGHT_F16] = quantize_row_pack_f32,
                  [WEIGHT_BF16] = quantize_row_pack_bf16,
                  [WEIGHT_INT8] = quantize_row_pack_int8,
                  [WEIGHT_INT4] = quantize_row_pack_int8},
};
