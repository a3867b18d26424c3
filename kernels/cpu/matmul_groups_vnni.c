/* AVX-512 VNNI: INT4_GROUPS, 4-bit codes with zero points in groups of 32, 64 or 128 inputs.
 *
 * As INT4 in matmul_vnni.c, but the accumulators of a group begin at zero * -sum(x) of each output
 * instead of one number for all. Both factors fit in 16 bits, so that is one vpmaddwd. */
#include "kernels/cpu/matmul_avx512.h"

enum { ROWS_MAX = 6 };

ALWAYS_INLINE __m512i zeros_load(const uint8_t *zeros)
{
    return _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)zeros));
}

/* The exact sums of one group, added to sum. */
ALWAYS_INLINE void group_add(const uint8_t *weights, const uint32_t *words, int64_t steps,
                             const int rows, const uint8_t *ahead, const struct panel_call *c,
                             __m512i sum[ROWS_MAX][2])
{
    const __m512i low = _mm512_set1_epi8(15);
    for (int64_t s = 0; s < steps; s += 2) {
        __m512i v0 = _mm512_loadu_si512(weights), v1 = _mm512_loadu_si512(weights + 64);
        PREFETCH(c, ahead);
        ahead += c->prefetch_bytes;
        __m512i w0 = _mm512_and_si512(v0, low), w1 = _mm512_and_si512(v1, low);
        UNROLL for (int r = 0; r < rows; r++)
        {
            __m512i x = broadcast_word(words, r);
            DOT_INT8(sum[r][0], w0, x);
            DOT_INT8(sum[r][1], w1, x);
        }
        w0 = _mm512_and_si512(_mm512_srli_epi16(v0, 4), low);
        w1 = _mm512_and_si512(_mm512_srli_epi16(v1, 4), low);
        UNROLL for (int r = 0; r < rows; r++)
        {
            __m512i x = broadcast_word(words, rows + r);
            DOT_INT8(sum[r][0], w0, x);
            DOT_INT8(sum[r][1], w1, x);
        }
        weights += 128;
        words += 2 * rows;
    }
}

ALWAYS_INLINE void panel(const struct panel_call *c, const int rows, const int64_t steps)
{
    __m512 total[ROWS_MAX][2];
    const int64_t group_bytes = GROUP_HEADER + steps * 64;
    const uint8_t *group = c->weights, *zeros = c->zeros, *ahead = c->prefetch;
    const uint32_t *words = c->words;
    sums_begin(c, rows, total);
    for (int64_t g = 0; g * steps < c->n_steps; g++) {
        __m512i sum[ROWS_MAX][2], z0 = zeros_load(zeros), z1 = zeros_load(zeros + 16);
        UNROLL for (int r = 0; r < rows; r++)
        {
            __m512i x = _mm512_set1_epi32(c->correction[r * c->correction_stride + g]);
            sum[r][0] = _mm512_madd_epi16(z0, x);
            sum[r][1] = _mm512_madd_epi16(z1, x);
        }
        group_add(group + GROUP_HEADER, words, steps, rows, ahead, c, sum);
        __m512 scale0 = _mm512_cvtph_ps(_mm256_loadu_si256((const void *)group));
        __m512 scale1 = _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(group + 32)));
        UNROLL for (int r = 0; r < rows; r++)
        {
            total[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][0]), scale0, total[r][0]);
            total[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][1]), scale1, total[r][1]);
        }
        group += group_bytes;
        zeros += PANEL_OUTPUTS;
        words += steps * rows;
        ahead += steps / 2 * c->prefetch_bytes + (c->prefetch_bytes ? GROUP_HEADER : 0);
    }
    sums_end(c, rows, total);
}

/* The steps of a group are constants, so that its loop is unrolled. */
#define HEIGHT(ROWS, ATTRIBUTES)                                                                   \
    static __attribute__((noinline)) ATTRIBUTES void panel_##ROWS(const struct panel_call *c)      \
    {                                                                                              \
        if (c->group_steps == 32)                                                                  \
            panel(c, ROWS, 32);                                                                    \
        else if (c->group_steps == 16)                                                             \
            panel(c, ROWS, 16);                                                                    \
        else                                                                                       \
            panel(c, ROWS, 8);                                                                     \
    }
HEIGHT(1, )
HEIGHT(2, )
HEIGHT(3, KERNEL_UNCHECKED)
HEIGHT(4, KERNEL_UNCHECKED)
HEIGHT(5, KERNEL_UNCHECKED)
HEIGHT(6, KERNEL_UNCHECKED)

void panel_int4_groups_vnni(const struct panel_call *c, int rows)
{
    static void (*const heights[ROWS_MAX])(const struct panel_call *) = {panel_1, panel_2, panel_3,
                                                                         panel_4, panel_5, panel_6};
    heights[rows - 1](c);
}
