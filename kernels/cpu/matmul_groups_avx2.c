/* AVX2: INT4_GROUPS, 4 rows by 16 outputs. As INT4 in matmul_avx2.c, but the accumulators of a
 * group begin at zero * -sum(x) of each output; both factors fit in 16 bits. */
#include "kernels/cpu/cpu.h"

#include <immintrin.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define UNROLL        _Pragma("GCC unroll 8")

enum { ROWS_MAX = 4 };

ALWAYS_INLINE __m256i zeros_load(const uint8_t *zeros)
{
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)zeros));
}

/* One step of 16 outputs: v0 and v1 hold 8 outputs of 4 unsigned bytes each. */
ALWAYS_INLINE void step_add(__m256i sum[][2], __m256i v0, __m256i v1, const uint32_t *x,
                            const int rows)
{
    const __m256i even = _mm256_set1_epi16(0x00ff);
    __m256i e0 = _mm256_and_si256(v0, even), o0 = _mm256_srli_epi16(v0, 8);
    __m256i e1 = _mm256_and_si256(v1, even), o1 = _mm256_srli_epi16(v1, 8);
    UNROLL for (int r = 0; r < rows; r++)
    {
        __m256i word = _mm256_set1_epi32((int)x[r]);
        __m256i xe = _mm256_srai_epi16(_mm256_slli_epi16(word, 8), 8),
                xo = _mm256_srai_epi16(word, 8);
        sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(e0, xe));
        sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(o0, xo));
        sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(e1, xe));
        sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(o1, xo));
    }
}

/* The exact sums of one group, 16 outputs from lane `at` on. */
ALWAYS_INLINE void group_sums(const struct panel_call *c, int64_t g, const uint8_t *group,
                              const int rows, int at, __m256i sum[][2])
{
    const __m256i low = _mm256_set1_epi8(15);
    const uint8_t *w = group + GROUP_HEADER + at * 4, *zeros = c->zeros + g * PANEL_OUTPUTS + at;
    const uint32_t *words = c->words + g * c->group_steps * rows;
    __m256i z0 = zeros_load(zeros), z1 = zeros_load(zeros + 8);
    UNROLL for (int r = 0; r < rows; r++)
    {
        __m256i x = _mm256_set1_epi32(c->correction[r * c->correction_stride + g]);
        sum[r][0] = _mm256_madd_epi16(z0, x);
        sum[r][1] = _mm256_madd_epi16(z1, x);
    }
    for (int64_t s = 0; s < c->group_steps; s += 2, w += 128) {
        __m256i v0 = _mm256_loadu_si256((const void *)w),
                v1 = _mm256_loadu_si256((const void *)(w + 32));
        step_add(sum, _mm256_and_si256(v0, low), _mm256_and_si256(v1, low), words + s * rows, rows);
        v0 = _mm256_and_si256(_mm256_srli_epi16(v0, 4), low),
        v1 = _mm256_and_si256(_mm256_srli_epi16(v1, 4), low);
        step_add(sum, v0, v1, words + (s + 1) * rows, rows);
    }
}

/* Eight outputs at column `at` of the panel. */
ALWAYS_INLINE void result_store(const struct panel_call *c, int r, int at, __m256 v)
{
    if (c->row_scale) v = _mm256_mul_ps(v, _mm256_set1_ps(c->row_scale[r]));
    if (c->bias) v = _mm256_add_ps(v, _mm256_loadu_ps(c->bias + at));
    _mm256_storeu_ps(c->out + r * c->out_stride + at, v);
}

ALWAYS_INLINE void half_panel(const struct panel_call *c, const int rows, int at)
{
    __m256 total[ROWS_MAX][2];
    float *parked = (float *)c->scratch + at;
    UNROLL for (int r = 0; r < rows; r++)
    {
        total[r][0] = c->first ? _mm256_setzero_ps() : _mm256_loadu_ps(parked + r * 32);
        total[r][1] = c->first ? _mm256_setzero_ps() : _mm256_loadu_ps(parked + r * 32 + 8);
    }
    for (int64_t g = 0; g * c->group_steps < c->n_steps; g++) {
        const uint8_t *group = c->weights + g * (GROUP_HEADER + c->group_steps * 64);
        __m256i sum[ROWS_MAX][2];
        group_sums(c, g, group, rows, at, sum);
        __m256 scale0 = _mm256_cvtph_ps(_mm_loadu_si128((const void *)(group + at * 2)));
        __m256 scale1 = _mm256_cvtph_ps(_mm_loadu_si128((const void *)(group + at * 2 + 16)));
        UNROLL for (int r = 0; r < rows; r++)
        {
            total[r][0] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][0]), scale0, total[r][0]);
            total[r][1] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][1]), scale1, total[r][1]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
    {
        if (c->last) {
            result_store(c, r, at, total[r][0]);
            result_store(c, r, at + 8, total[r][1]);
        } else {
            _mm256_storeu_ps(parked + r * 32, total[r][0]);
            _mm256_storeu_ps(parked + r * 32 + 8, total[r][1]);
        }
    }
}

#define ONE_HEIGHT(ROWS)                                                                           \
    case ROWS:                                                                                     \
        half_panel(c, ROWS, 0);                                                                    \
        half_panel(c, ROWS, 16);                                                                   \
        return;

void panel_int4_groups_avx2(const struct panel_call *c, int rows)
{
    switch (rows) {
        ONE_HEIGHT(1)
        ONE_HEIGHT(2)
        ONE_HEIGHT(3)
        ONE_HEIGHT(4)
    }
}
