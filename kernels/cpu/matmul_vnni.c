/* AVX-512 VNNI: INT8 and INT4 by vpdpbusd, whose first operand is unsigned and second signed.
 *
 * Weights are the unsigned one, stored with an offset (128, or 8 for nibbles) that the accumulators
 * cancel from the start: they begin at -offset * sum(x). INT4 unpacks nibbles in registers at every
 * height, and adds a group's exact sum times its scale to float accumulators, which stay in
 * registers up to 6 rows and lie in the parked tile above. */
#include "kernels/cpu/matmul_avx512.h"

#include <string.h>

enum { GROUP_BYTES = 64 + GROUP_STEPS * 64, ROWS_IN_REGISTERS = 6 };

ALWAYS_INLINE void panel_int8(const struct panel_call *c, const int rows)
{
    __m512i sum[PANEL_ROWS_MAX][2];
    const uint8_t *weights = c->weights;
    const uint32_t *words = c->words;
    const uint8_t *ahead = c->prefetch;
    int32_t *parked = c->scratch;
    UNROLL for (int r = 0; r < rows; r++)
    {
        if (c->first) {
            sum[r][0] = sum[r][1] = _mm512_set1_epi32(c->correction[r * c->correction_stride]);
        } else {
            sum[r][0] = _mm512_loadu_si512(parked + r * 32);
            sum[r][1] = _mm512_loadu_si512(parked + r * 32 + 16);
        }
    }
    for (int64_t s = 0; s < c->n_steps; s += 2) {
        UNROLL for (int u = 0; u < 2; u++)
        {
            __m512i w0 = _mm512_loadu_si512(weights), w1 = _mm512_loadu_si512(weights + 64);
            PREFETCH(ahead);
            UNROLL for (int r = 0; r < rows; r++)
            {
                __m512i x = broadcast_word(words, r);
                DOT_INT8(sum[r][0], w0, x);
                DOT_INT8(sum[r][1], w1, x);
            }
            weights += 128;
            words += rows;
            ahead += c->prefetch_bytes;
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
    {
        if (c->last) {
            result_store(c, r, 0, _mm512_cvtepi32_ps(sum[r][0]));
            result_store(c, r, 1, _mm512_cvtepi32_ps(sum[r][1]));
        } else {
            _mm512_storeu_si512(parked + r * 32, sum[r][0]);
            _mm512_storeu_si512(parked + r * 32 + 16, sum[r][1]);
        }
    }
}
ALL_HEIGHTS(panel_int8)

/* The exact sums of one group: 16 pairs of steps. */
ALWAYS_INLINE void group_sums(const uint8_t *weights, const uint32_t *words, const int rows,
                              const uint8_t *ahead, int64_t prefetch_bytes,
                              __m512i sum[PANEL_ROWS_MAX][2])
{
    const __m512i low = _mm512_set1_epi8(15);
    for (int s = 0; s < GROUP_STEPS; s += 2) {
        __m512i v0 = _mm512_loadu_si512(weights), v1 = _mm512_loadu_si512(weights + 64);
        PREFETCH(ahead);
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

ALWAYS_INLINE __m512 group_scale(const uint8_t *group, int half)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(group + 32 * half)));
}

/* Few rows: the float sums stay in registers over all groups. */
ALWAYS_INLINE void panel_int4_few(const struct panel_call *c, const int rows)
{
    __m512 total[ROWS_IN_REGISTERS][2];
    float *parked = c->scratch;
    UNROLL for (int r = 0; r < rows; r++)
    {
        total[r][0] = c->first ? _mm512_setzero_ps() : _mm512_loadu_ps(parked + r * 32);
        total[r][1] = c->first ? _mm512_setzero_ps() : _mm512_loadu_ps(parked + r * 32 + 16);
    }
    for (int64_t g = 0; g * GROUP_STEPS < c->n_steps; g++) {
        const uint8_t *group = c->weights + g * GROUP_BYTES;
        __m512i sum[PANEL_ROWS_MAX][2];
        UNROLL for (int r = 0; r < rows; r++)
        {
            sum[r][0] = _mm512_set1_epi32(c->correction[r * c->correction_stride + g]);
            sum[r][1] = sum[r][0];
        }
        group_sums(group + 64, c->words + g * GROUP_STEPS * rows, rows,
                   c->prefetch + g * 16 * c->prefetch_bytes, c->prefetch_bytes, sum);
        __m512 scale0 = group_scale(group, 0), scale1 = group_scale(group, 1);
        UNROLL for (int r = 0; r < rows; r++)
        {
            total[r][0] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][0]), scale0, total[r][0]);
            total[r][1] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[r][1]), scale1, total[r][1]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
    {
        if (c->last) {
            result_store(c, r, 0, total[r][0]);
            result_store(c, r, 1, total[r][1]);
        } else {
            _mm512_storeu_ps(parked + r * 32, total[r][0]);
            _mm512_storeu_ps(parked + r * 32 + 16, total[r][1]);
        }
    }
}

/* One group of many rows is a function of its own: within a loop over groups, compilers spill. */
struct group_call {
    const uint8_t *group;
    const uint32_t *words;
    const int32_t *correction;
    int64_t correction_stride;
    float *total; /* [rows][32]; no branch on the first group: it would cost the registers */
    const uint8_t *prefetch;
    int64_t prefetch_bytes;
};

ALWAYS_INLINE void total_add(const struct group_call *c, int r, int half, __m512i sum, __m512 scale)
{
    float *at = c->total + r * 32 + 16 * half;
    _mm512_storeu_ps(at, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, _mm512_loadu_ps(at)));
}

ALWAYS_INLINE void group_many(const struct group_call *c, const int rows)
{
    __m512i sum[PANEL_ROWS_MAX][2];
    UNROLL for (int r = 0; r < rows; r++)
    {
        sum[r][0] = sum[r][1] = _mm512_set1_epi32(c->correction[r * c->correction_stride]);
    }
    group_sums(c->group + 64, c->words, rows, c->prefetch, c->prefetch_bytes, sum);
    __m512 scale0 = group_scale(c->group, 0), scale1 = group_scale(c->group, 1);
    UNROLL for (int r = 0; r < rows; r++)
    {
        total_add(c, r, 0, sum[r][0], scale0);
        total_add(c, r, 1, sum[r][1], scale1);
    }
}

ALWAYS_INLINE void panel_int4_many(const struct panel_call *c, int rows,
                                   void (*one)(const struct group_call *))
{
    struct group_call call = {c->weights, c->words,    c->correction,    c->correction_stride,
                              c->scratch, c->prefetch, c->prefetch_bytes};
    if (c->first) memset(call.total, 0, (size_t)rows * 32 * sizeof *call.total);
    for (int64_t s = 0; s < c->n_steps; s += GROUP_STEPS) {
        one(&call);
        call.group += GROUP_BYTES;
        call.words += GROUP_STEPS * rows;
        call.correction++;
        call.prefetch += 16 * call.prefetch_bytes;
    }
    if (!c->last) return;
    for (int r = 0; r < rows; r++) {
        result_store(c, r, 0, _mm512_loadu_ps(call.total + r * 32));
        result_store(c, r, 1, _mm512_loadu_ps(call.total + r * 32 + 16));
    }
}

#define FEW(ROWS, ATTRIBUTES)                                                                      \
    static __attribute__((noinline)) ATTRIBUTES void panel_int4_##ROWS(const struct panel_call *c) \
    {                                                                                              \
        panel_int4_few(c, ROWS);                                                                   \
    }
#define MANY(ROWS)                                                                                 \
    static __attribute__((noinline, noclone))                                                      \
    KERNEL_UNCHECKED void group_int4_##ROWS(const struct group_call *c)                            \
    {                                                                                              \
        group_many(c, ROWS);                                                                       \
    }                                                                                              \
    static __attribute__((noinline))                                                               \
    KERNEL_UNCHECKED void panel_int4_##ROWS(const struct panel_call *c)                            \
    {                                                                                              \
        panel_int4_many(c, ROWS, group_int4_##ROWS);                                               \
    }
FEW(1, )
FEW(2, )
FEW(3, KERNEL_UNCHECKED)
FEW(4, KERNEL_UNCHECKED)
FEW(5, KERNEL_UNCHECKED)
FEW(6, KERNEL_UNCHECKED)
MANY(7)
MANY(8)
MANY(9)
MANY(10)
MANY(11)
MANY(12)
HEIGHT_SWITCH(panel_int4)

const struct matmul_kernels matmul_vnni = {
    .panel = {[WEIGHT_INT8] = panel_int8_any, [WEIGHT_INT4] = panel_int4_any},
    .rows_max = {[WEIGHT_INT8] = PANEL_ROWS_MAX, [WEIGHT_INT4] = PANEL_ROWS_MAX},
};
