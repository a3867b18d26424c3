/* AVX-512 BF16: vdpbf16ps multiplies pairs of inputs and adds both products to a float. */
#include "kernels/cpu/matmul_avx512.h"
#include "kernels/cpu/words_avx512.h"

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

ALWAYS_INLINE __m512i step_pairs(const float *x, int64_t step, int64_t n)
{
    return (__m512i)_mm512_cvtne2ps_pbh(floats_at(x, 2 * step + 16, n), floats_at(x, 2 * step, n));
}
WORDS_KERNEL(pack_bf16, 2, step_pairs)

const struct matmul_kernels matmul_bf16 = {
    .panel = {[WEIGHT_BF16] = panel_bf16_any},
    .rows_max = {[WEIGHT_BF16] = PANEL_ROWS_MAX},
    .pack_rows = {[WEIGHT_BF16] = pack_bf16},
};
