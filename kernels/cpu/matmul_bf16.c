/* AVX-512 BF16: vdpbf16ps multiplies pairs of inputs and adds both products to a float. */
#include "kernels/cpu/matmul_avx512.h"
#include "kernels/cpu/quantize.h"

#define STEP_BF16(W, X)                                                                            \
    {                                                                                              \
        __m512i w0 = _mm512_loadu_si512(W), w1 = _mm512_loadu_si512((W) + 64);                     \
        UNROLL for (int r = 0; r < rows; r++)                                                      \
        {                                                                                          \
            __m512i x = broadcast_word(X, r);                                                      \
            DOT_BF16(sum[r][0], w0, x);                                                            \
            DOT_BF16(sum[r][1], w1, x);                                                            \
        }                                                                                          \
    }
FLOAT_PANEL(panel_bf16, 128, STEP_BF16)
ALL_HEIGHTS(panel_bf16)

/* 32 inputs become 16 words. */
static void pack_bf16(const struct activations *a, const float *x, int64_t row, int rows,
                      uint32_t *words)
{
    (void)row;
    for (int64_t i = 0; i < a->n_steps * 2; i += 32) {
        int64_t left = a->n_inputs - i;
        __mmask32 mask = left >= 32 ? 0xffffffffu : left <= 0 ? 0 : (__mmask32)((1u << left) - 1);
        __m512 low = _mm512_maskz_loadu_ps((__mmask16)mask, x + i);
        __m512 high = _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), x + i + 16);
        _Alignas(64) uint32_t pairs[16];
        _mm512_store_si512(pairs, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        int64_t n = a->n_steps - i / 2 < 16 ? a->n_steps - i / 2 : 16;
        for (int64_t j = 0; j < n; j++)
            words[(i / 2 + j) * rows] = pairs[j];
    }
}

const struct matmul_kernels matmul_bf16 = {
    .panel = {[WEIGHT_BF16] = panel_bf16_any},
    .rows_max = {[WEIGHT_BF16] = PANEL_ROWS_MAX},
    .pack_rows = {[WEIGHT_BF16] = pack_bf16},
    .pack_panel = {[WEIGHT_BF16] = words_pack_bf16},
};
