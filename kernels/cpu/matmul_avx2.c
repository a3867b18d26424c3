/* AVX2 with FMA: 6 rows (floats) or 4 rows (integers) by 16 outputs; a panel is two such halves.
 *
 * There is no unsigned-by-signed dot product that cannot saturate, so INT8 widens both operands to
 * 16 bits: bytes 0 and 2 of a step in one vpmaddwd, bytes 1 and 3 in another. Sums are exact and so
 * equal those of VNNI bit for bit. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/quantize.h"

#include <immintrin.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline))
#define UNROLL        _Pragma("GCC unroll 8")

enum { ROWS_FLOAT = 6, ROWS_INT = 4 };

/* Eight outputs at column `at` of the panel. */
ALWAYS_INLINE void result_store(const struct panel_call *c, int r, int at, __m256 v)
{
    if (c->row_scale) v = _mm256_mul_ps(v, _mm256_set1_ps(c->row_scale[r]));
    if (c->column_scale) v = _mm256_mul_ps(v, _mm256_loadu_ps(c->column_scale + at));
    if (c->bias) v = _mm256_add_ps(v, _mm256_loadu_ps(c->bias + at));
    _mm256_storeu_ps(c->out + r * c->out_stride + at, v);
}

ALWAYS_INLINE void sums_begin(const struct panel_call *c, const int rows, int at, __m256 sum[][2])
{
    const float *parked = (const float *)c->scratch + at;
    UNROLL for (int r = 0; r < rows; r++)
    {
        sum[r][0] = c->first ? _mm256_setzero_ps() : _mm256_loadu_ps(parked + r * 32);
        sum[r][1] = c->first ? _mm256_setzero_ps() : _mm256_loadu_ps(parked + r * 32 + 8);
    }
}

ALWAYS_INLINE void sums_end(const struct panel_call *c, const int rows, int at, __m256 sum[][2])
{
    float *parked = (float *)c->scratch + at;
    UNROLL for (int r = 0; r < rows; r++)
    {
        if (c->last) {
            result_store(c, r, at, sum[r][0]);
            result_store(c, r, at + 8, sum[r][1]);
        } else {
            _mm256_storeu_ps(parked + r * 32, sum[r][0]);
            _mm256_storeu_ps(parked + r * 32 + 8, sum[r][1]);
        }
    }
}

ALWAYS_INLINE void step_floats(__m256 sum[][2], __m256 w0, __m256 w1, const float *x,
                               const int rows)
{
    UNROLL for (int r = 0; r < rows; r++)
    {
        __m256 v = _mm256_broadcast_ss(x + r);
        sum[r][0] = _mm256_fmadd_ps(v, w0, sum[r][0]);
        sum[r][1] = _mm256_fmadd_ps(v, w1, sum[r][1]);
    }
}

ALWAYS_INLINE void half_f32(const struct panel_call *c, const int rows, int at)
{
    __m256 sum[ROWS_FLOAT][2];
    const float *w = (const float *)c->weights + at, *x = (const float *)c->words;
    sums_begin(c, rows, at, sum);
    for (int64_t s = 0; s < c->n_steps; s++, w += 32, x += rows)
        step_floats(sum, _mm256_loadu_ps(w), _mm256_loadu_ps(w + 8), x, rows);
    sums_end(c, rows, at, sum);
}

ALWAYS_INLINE void half_f16(const struct panel_call *c, const int rows, int at)
{
    __m256 sum[ROWS_FLOAT][2];
    const uint16_t *w = (const uint16_t *)c->weights + at;
    const float *x = (const float *)c->words;
    sums_begin(c, rows, at, sum);
    for (int64_t s = 0; s < c->n_steps; s++, w += 32, x += rows)
        step_floats(sum, _mm256_cvtph_ps(_mm_loadu_si128((const void *)w)),
                    _mm256_cvtph_ps(_mm_loadu_si128((const void *)(w + 8))), x, rows);
    sums_end(c, rows, at, sum);
}

ALWAYS_INLINE void half_bf16(const struct panel_call *c, const int rows, int at)
{
    __m256 sum[ROWS_FLOAT][2];
    const uint32_t *w = (const uint32_t *)c->weights + at, *x = c->words;
    const __m256i high = _mm256_set1_epi32((int)0xffff0000);
    sums_begin(c, rows, at, sum);
    for (int64_t s = 0; s < c->n_steps; s++, w += 32, x += rows) {
        float even[ROWS_FLOAT], odd[ROWS_FLOAT];
        __m256i w0 = _mm256_loadu_si256((const void *)w),
                w1 = _mm256_loadu_si256((const void *)(w + 8));
        UNROLL for (int r = 0; r < rows; r++)
        {
            even[r] = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128((int)(x[r] << 16))));
            odd[r] = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128((int)(x[r] & 0xffff0000))));
        }
        step_floats(sum, _mm256_castsi256_ps(_mm256_slli_epi32(w0, 16)),
                    _mm256_castsi256_ps(_mm256_slli_epi32(w1, 16)), even, rows);
        step_floats(sum, _mm256_castsi256_ps(_mm256_and_si256(w0, high)),
                    _mm256_castsi256_ps(_mm256_and_si256(w1, high)), odd, rows);
    }
    sums_end(c, rows, at, sum);
}

/* One step of 16 outputs: v0 and v1 hold 8 outputs of 4 unsigned bytes each. */
ALWAYS_INLINE void step_bytes(__m256i sum[][2], __m256i v0, __m256i v1, const uint32_t *x,
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

ALWAYS_INLINE void half_int8(const struct panel_call *c, const int rows, int at)
{
    __m256i sum[ROWS_INT][2];
    int32_t *parked = (int32_t *)c->scratch + at;
    const uint8_t *w = c->weights + at * 4;
    UNROLL for (int r = 0; r < rows; r++)
    {
        __m256i begin = _mm256_set1_epi32(c->correction[r * c->correction_stride]);
        sum[r][0] = c->first ? begin : _mm256_loadu_si256((const void *)(parked + r * 32));
        sum[r][1] = c->first ? begin : _mm256_loadu_si256((const void *)(parked + r * 32 + 8));
    }
    for (int64_t s = 0; s < c->n_steps; s++, w += 128)
        step_bytes(sum, _mm256_loadu_si256((const void *)w),
                   _mm256_loadu_si256((const void *)(w + 32)), c->words + s * rows, rows);
    UNROLL for (int r = 0; r < rows; r++)
    {
        if (c->last) {
            result_store(c, r, at, _mm256_cvtepi32_ps(sum[r][0]));
            result_store(c, r, at + 8, _mm256_cvtepi32_ps(sum[r][1]));
        } else {
            _mm256_storeu_si256((void *)(parked + r * 32), sum[r][0]);
            _mm256_storeu_si256((void *)(parked + r * 32 + 8), sum[r][1]);
        }
    }
}

ALWAYS_INLINE __m256i zeros_load(const uint8_t *zeros)
{
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)zeros));
}

/* The exact sums of one group, 16 outputs from lane `at` on. They begin at the correction; with
 * zero points that is -sum(x) for each output's own, and both factors fit in 16 bits. */
ALWAYS_INLINE void group_sums(const struct panel_call *c, int64_t g, const uint8_t *group,
                              const int rows, int at, const int64_t steps, const bool zeros,
                              __m256i sum[][2])
{
    const __m256i low = _mm256_set1_epi8(15);
    const uint8_t *w = group + GROUP_HEADER + at * 4;
    const uint32_t *words = c->words + g * steps * rows;
    UNROLL for (int r = 0; r < rows; r++)
    {
        sum[r][0] = sum[r][1] = _mm256_set1_epi32(c->correction[r * c->correction_stride + g]);
    }
    if (zeros) {
        const uint8_t *z = c->zeros + g * PANEL_OUTPUTS + at;
        __m256i z0 = zeros_load(z), z1 = zeros_load(z + 8);
        UNROLL for (int r = 0; r < rows; r++)
        {
            sum[r][0] = _mm256_madd_epi16(z0, sum[r][0]);
            sum[r][1] = _mm256_madd_epi16(z1, sum[r][1]);
        }
    }
    for (int64_t s = 0; s < steps; s += 2, w += 128) {
        __m256i v0 = _mm256_loadu_si256((const void *)w),
                v1 = _mm256_loadu_si256((const void *)(w + 32));
        step_bytes(sum, _mm256_and_si256(v0, low), _mm256_and_si256(v1, low), words + s * rows,
                   rows);
        v0 = _mm256_and_si256(_mm256_srli_epi16(v0, 4), low),
        v1 = _mm256_and_si256(_mm256_srli_epi16(v1, 4), low);
        step_bytes(sum, v0, v1, words + (s + 1) * rows, rows);
    }
}

ALWAYS_INLINE void half_codes(const struct panel_call *c, const int rows, int at,
                              const int64_t steps, const bool zeros)
{
    __m256 total[ROWS_INT][2];
    sums_begin(c, rows, at, total);
    for (int64_t g = 0; g * steps < c->n_steps; g++) {
        const uint8_t *group = c->weights + g * (GROUP_HEADER + steps * 64);
        __m256i sum[ROWS_INT][2];
        group_sums(c, g, group, rows, at, steps, zeros, sum);
        __m256 scale0 = _mm256_cvtph_ps(_mm_loadu_si128((const void *)(group + at * 2)));
        __m256 scale1 = _mm256_cvtph_ps(_mm_loadu_si128((const void *)(group + at * 2 + 16)));
        UNROLL for (int r = 0; r < rows; r++)
        {
            total[r][0] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][0]), scale0, total[r][0]);
            total[r][1] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[r][1]), scale1, total[r][1]);
        }
    }
    sums_end(c, rows, at, total);
}

ALWAYS_INLINE void half_int4(const struct panel_call *c, const int rows, int at)
{
    half_codes(c, rows, at, GROUP_STEPS, false);
}

ALWAYS_INLINE void half_int4_groups(const struct panel_call *c, const int rows, int at)
{
    half_codes(c, rows, at, c->group_steps, true);
}

#define ONE_HEIGHT(NAME, ROWS)                                                                     \
    case ROWS:                                                                                     \
        half_##NAME(c, ROWS, 0);                                                                   \
        half_##NAME(c, ROWS, 16);                                                                  \
        return;
#define PANEL(NAME, MORE)                                                                          \
    static void panel_##NAME(const struct panel_call *c, int rows)                                 \
    {                                                                                              \
        switch (rows) {                                                                            \
            ONE_HEIGHT(NAME, 1)                                                                    \
            ONE_HEIGHT(NAME, 2)                                                                    \
            ONE_HEIGHT(NAME, 3)                                                                    \
            ONE_HEIGHT(NAME, 4)                                                                    \
            MORE                                                                                   \
        }                                                                                          \
    }
PANEL(f32, ONE_HEIGHT(f32, 5) ONE_HEIGHT(f32, 6))
PANEL(f16, ONE_HEIGHT(f16, 5) ONE_HEIGHT(f16, 6))
PANEL(bf16, ONE_HEIGHT(bf16, 5) ONE_HEIGHT(bf16, 6))
PANEL(int8, )
PANEL(int4, )
PANEL(int4_groups, )

const struct matmul_kernels matmul_avx2 = {
    .panel = {[WEIGHT_F32] = panel_f32,
              [WEIGHT_F16] = panel_f16,
              [WEIGHT_BF16] = panel_bf16,
              [WEIGHT_INT8] = panel_int8,
              [WEIGHT_INT4] = panel_int4,
              [WEIGHT_INT4_GROUPS] = panel_int4_groups},
    .rows_max = {[WEIGHT_F32] = ROWS_FLOAT,
                 [WEIGHT_F16] = ROWS_FLOAT,
                 [WEIGHT_BF16] = ROWS_FLOAT,
                 [WEIGHT_INT8] = ROWS_INT,
                 [WEIGHT_INT4] = ROWS_INT,
                 [WEIGHT_INT4_GROUPS] = ROWS_INT},
};
