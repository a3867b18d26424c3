/* AVX-512 VNNI: INT8 and INT4 by vpdpbusd, whose first operand is unsigned and second signed.
 *
 * Weights are the unsigned one, stored with an offset (128, or 8 for nibbles) that the accumulators
 * cancel from the start: they begin at -offset * sum(x). INT4 and INT4_GROUPS unpack nibbles in
 * registers at every height, and adds a group's exact sum times its scale to float accumulators;
 * with 6 rows both kinds of sums stay in registers, which is faster than 12 rows with the float
 * sums in memory. */
#include "kernels/cpu/matmul_avx512.h"

enum { INT4_ROWS_MAX = 6, FEW_ROWS_MAX = 2 };

/* Few rows wait for memory, and how far a core reads ahead is bounded by its instructions in
 * flight: their loads are operands. masked = the 64 bytes at `at` & mask; acc += weight * the word
 * at x. */
#define MASKED(mask, at)                                                                           \
    ({                                                                                             \
        __m512i masked;                                                                            \
        __asm__("vpandd %2, %1, %0" : "=v"(masked) : "v"(mask), "m"(*(const uint8_t(*)[64])(at))); \
        masked;                                                                                    \
    })
#define DOT_INT8_WORD(acc, w, x)                                                                   \
    __asm__ volatile("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*(x)))

ALWAYS_INLINE void panel_int8(const struct panel_call *c, const int rows)
{
    __m512i sum[PANEL_ROWS_MAX][2];
    const uint8_t *weights = c->weights;
    const uint32_t *words = c->words;
    const uint8_t *ahead = c->prefetch;
    int32_t *parked = c->scratch;
    if (c->first) {
        UNROLL for (int r = 0; r < rows; r++)
        {
            sum[r][0] = sum[r][1] = _mm512_set1_epi32(c->correction[r * c->correction_stride]);
        }
    } else {
        UNROLL for (int r = 0; r < rows; r++)
        {
            sum[r][0] = _mm512_loadu_si512(parked + r * 32);
            sum[r][1] = _mm512_loadu_si512(parked + r * 32 + 16);
        }
    }
    for (int64_t s = 0; s < c->n_steps; s += 2) {
        UNROLL for (int u = 0; u < 2; u++)
        {
            __m512i w0 = _mm512_loadu_si512(weights), w1 = _mm512_loadu_si512(weights + 64);
            if (rows > FEW_ROWS_MAX) PREFETCH(c, ahead);
            UNROLL for (int r = 0; r < rows; r++)
            {
                if (rows <= FEW_ROWS_MAX) {
                    DOT_INT8_WORD(sum[r][0], w0, words + r);
                    DOT_INT8_WORD(sum[r][1], w1, words + r);
                    continue;
                }
                __m512i x = broadcast_word(words, r);
                DOT_INT8(sum[r][0], w0, x);
                DOT_INT8(sum[r][1], w1, x);
            }
            weights += 128;
            words += rows;
            ahead += c->prefetch_bytes;
        }
    }
    if (!c->last) {
        UNROLL for (int r = 0; r < rows; r++)
        {
            _mm512_storeu_si512(parked + r * 32, sum[r][0]);
            _mm512_storeu_si512(parked + r * 32 + 16, sum[r][1]);
        }
        return;
    }
    __m512 result[PANEL_ROWS_MAX][2];
    UNROLL for (int r = 0; r < rows; r++)
    {
        result[r][0] = _mm512_cvtepi32_ps(sum[r][0]);
        result[r][1] = _mm512_cvtepi32_ps(sum[r][1]);
    }
    results_store(c, rows, result);
}
ALL_HEIGHTS(panel_int8)

/* One line for each pair of steps, or both lines of a stream. With five rows or more a pair takes
 * long enough for single lines to be asked for in L1, where they surely come; at a higher rate such
 * requests block the loads. */
ALWAYS_INLINE void fetch(const uint8_t *ahead, const bool both, const int rows)
{
    if (!both && rows >= 5)
        _mm_prefetch((const char *)ahead, _MM_HINT_T0);
    else
        _mm_prefetch((const char *)ahead, _MM_HINT_T1);
    if (both) _mm_prefetch((const char *)ahead + 64, _MM_HINT_T1);
}

/* The exact sums of one group: pairs of steps. */
ALWAYS_INLINE void group_sums_many(const uint8_t *weights, const uint32_t *words, const int rows,
                                   const int64_t steps, const uint8_t *ahead,
                                   int64_t prefetch_bytes, const bool both,
                                   __m512i sum[PANEL_ROWS_MAX][2])
{
    const __m512i low = _mm512_set1_epi8(15);
    for (int64_t s = 0; s < steps; s += 2) {
        __m512i v0 = _mm512_loadu_si512(weights), v1 = _mm512_loadu_si512(weights + 64);
        fetch(ahead, both, rows);
        ahead += prefetch_bytes;
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

/* The same of few rows. High nibbles stay where they are and are summed apart, sixteen times too
 * large, which a shift of the sums undoes exactly. */
ALWAYS_INLINE void group_sums_few(const uint8_t *weights, const uint32_t *words, const int rows,
                                  const int64_t steps, const uint8_t *ahead, int64_t prefetch_bytes,
                                  const bool both, __m512i sum[PANEL_ROWS_MAX][2])
{
    const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8((char)0xf0);
    __m512i by16[FEW_ROWS_MAX][2];
    UNROLL for (int r = 0; r < rows; r++)
    {
        by16[r][0] = by16[r][1] = _mm512_setzero_si512();
    }
    for (int64_t s = 0; s < steps; s += 2) {
        __m512i w0 = MASKED(low, weights), w1 = MASKED(low, weights + 64);
        if (rows > 1) fetch(ahead, both, rows);
        ahead += prefetch_bytes;
        UNROLL for (int r = 0; r < rows; r++)
        {
            DOT_INT8_WORD(sum[r][0], w0, words + r);
            DOT_INT8_WORD(sum[r][1], w1, words + r);
        }
        w0 = MASKED(high, weights), w1 = MASKED(high, weights + 64);
        UNROLL for (int r = 0; r < rows; r++)
        {
            DOT_INT8_WORD(by16[r][0], w0, words + rows + r);
            DOT_INT8_WORD(by16[r][1], w1, words + rows + r);
        }
        weights += 128;
        words += 2 * rows;
    }
    UNROLL for (int r = 0; r < rows; r++)
    {
        sum[r][0] = _mm512_add_epi32(sum[r][0], _mm512_srai_epi32(by16[r][0], 4));
        sum[r][1] = _mm512_add_epi32(sum[r][1], _mm512_srai_epi32(by16[r][1], 4));
    }
}

ALWAYS_INLINE void group_sums(const uint8_t *weights, const uint32_t *words, const int rows,
                              const int64_t steps, const uint8_t *ahead, int64_t prefetch_bytes,
                              const bool both, __m512i sum[PANEL_ROWS_MAX][2])
{
    if (rows <= FEW_ROWS_MAX)
        group_sums_few(weights, words, rows, steps, ahead, prefetch_bytes, both, sum);
    else
        group_sums_many(weights, words, rows, steps, ahead, prefetch_bytes, both, sum);
}

ALWAYS_INLINE __m512 group_scale(const uint8_t *group, int half)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(group + 32 * half)));
}

/* Where the sums of a group begin: -offset * sum(x), or with zero points -sum(x) for each output's
 * own, both factors of which fit in 16 bits. */
ALWAYS_INLINE void group_begin(const struct panel_call *c, int64_t g, const int rows,
                               const bool zeros, __m512i sum[PANEL_ROWS_MAX][2])
{
    UNROLL for (int r = 0; r < rows; r++)
    {
        sum[r][0] = sum[r][1] = _mm512_set1_epi32(c->correction[r * c->correction_stride + g]);
    }
    if (!zeros) return;
    const uint8_t *z = c->zeros + g * PANEL_OUTPUTS;
    __m512i low = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)z));
    __m512i high = _mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)(z + 16)));
    UNROLL for (int r = 0; r < rows; r++)
    {
        sum[r][0] = _mm512_madd_epi16(low, sum[r][0]);
        sum[r][1] = _mm512_madd_epi16(high, sum[r][1]);
    }
}

/* INT4 and INT4_GROUPS. The steps of a group are a constant, so that its loop is unrolled. */
ALWAYS_INLINE void panel_codes(const struct panel_call *c, const int rows, const int64_t steps,
                               const bool zeros)
{
    __m512 total[INT4_ROWS_MAX][2];
    sums_begin(c, rows, total);
    /* the lines of a group's steps, and one for the scales */
    const int64_t group_ahead = steps / 2 * c->prefetch_bytes + (c->prefetch_bytes ? 64 : 0);
    for (int64_t g = 0; g * steps < c->n_steps; g++) {
        const uint8_t *group = c->weights + g * (GROUP_HEADER + steps * 64);
        __m512i sum[PANEL_ROWS_MAX][2];
        group_begin(c, g, rows, zeros, sum);
        const uint32_t *words = c->words + g * steps * rows;
        const uint8_t *ahead = c->prefetch + g * group_ahead, *w = group + GROUP_HEADER;
        if (rows > 1) _mm_prefetch((const char *)ahead + group_ahead - 64, _MM_HINT_T1);
        if (c->prefetch_second)
            group_sums(w, words, rows, steps, ahead, c->prefetch_bytes, true, sum);
        else
            group_sums(w, words, rows, steps, ahead, c->prefetch_bytes, false, sum);
        __m512 scale0 = group_scale(group, 0), scale1 = group_scale(group, 1);
        UNROLL for (int r = 0; r < rows; r++)
        {
            total[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][0]), scale0, total[r][0]);
            total[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][1]), scale1, total[r][1]);
        }
    }
    sums_end(c, rows, total);
}

ALWAYS_INLINE void panel_int4(const struct panel_call *c, const int rows)
{
    panel_codes(c, rows, GROUP_STEPS, false);
}

ALWAYS_INLINE void panel_int4_groups(const struct panel_call *c, const int rows)
{
    if (c->group_steps == GROUP_STEPS)
        panel_codes(c, rows, GROUP_STEPS, true);
    else if (c->group_steps == GROUP_STEPS / 2)
        panel_codes(c, rows, GROUP_STEPS / 2, true);
    else
        panel_codes(c, rows, GROUP_STEPS / 4, true);
}

#define INT4_HEIGHTS(NAME)                                                                         \
    ONE_HEIGHT(NAME, 1, )                                                                          \
    ONE_HEIGHT(NAME, 2, )                                                                          \
    ONE_HEIGHT(NAME, 3, KERNEL_UNCHECKED)                                                          \
    ONE_HEIGHT(NAME, 4, KERNEL_UNCHECKED)                                                          \
    ONE_HEIGHT(NAME, 5, KERNEL_UNCHECKED)                                                          \
    ONE_HEIGHT(NAME, 6, KERNEL_UNCHECKED)                                                          \
    static void NAME##_any(const struct panel_call *c, int rows)                                   \
    {                                                                                              \
        static void (*const heights[INT4_ROWS_MAX])(const struct panel_call *) = {                 \
            NAME##_1, NAME##_2, NAME##_3, NAME##_4, NAME##_5, NAME##_6};                           \
        heights[rows - 1](c);                                                                      \
    }
INT4_HEIGHTS(panel_int4)
INT4_HEIGHTS(panel_int4_groups)

const struct matmul_kernels matmul_vnni = {
    .panel = {[WEIGHT_INT8] = panel_int8_any,
              [WEIGHT_INT4] = panel_int4_any,
              [WEIGHT_INT4_GROUPS] = panel_int4_groups_any},
    .rows_max = {[WEIGHT_INT8] = PANEL_ROWS_MAX,
                 [WEIGHT_INT4] = INT4_ROWS_MAX,
                 [WEIGHT_INT4_GROUPS] = INT4_ROWS_MAX},
};
