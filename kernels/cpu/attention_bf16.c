/* Attention over a BF16 cache by vdpbf16ps: pairs of dimensions in scores, pairs of tokens in
 * values.
 *
 * Queries are BF16 pairs; weights are rounded to BF16, and their sum is taken of the rounded ones,
 * so that they still add up to 1. */
#define LANES_HEADER "kernels/cpu/lanes_avx512.h"
#include "kernels/cpu/attention_lanes.h"

#include <math.h>

/* sum += a * the pair in memory, the same for all lanes */
#define DOT_EACH(sum, a, pair)                                                                     \
    __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(a), "m"(pair))

enum { PAIR = 2 }; /* tiles whose weights are converted together */

/* x of the tokens that row r sees in tile t, -inf elsewhere: e^-inf is an exact 0. */
LANES_INLINE lanes lanes_seen(const struct chunk_call *c, int r, int t, lanes x)
{
    return lanes_between(x, c->low[r] - t * TILE, c->high[r] - t * TILE, lanes_all(-INFINITY));
}

/* The scores of one row again, capped, and their maximum. */
static __attribute__((noinline)) lanes cap_row(const struct chunk_call *c, int r)
{
    float *s = c->scores + r * ATTENTION_CHUNK;
    lanes max = lanes_all(-INFINITY);
    for (int t = 0; t < c->n_tiles; t++) {
        lanes x = lanes_mul(lanes_load(s + t * TILE), lanes_all(LN_2));
        x = lanes_mul(lanes_softcap(x, c->softcap), lanes_all(LOG2_E));
        x = lanes_seen(c, r, t, x);
        lanes_store(s + t * TILE, x);
        max = lanes_max(max, x);
    }
    return max;
}

/* Scores times log2 e, -inf where a row sees nothing, and their maximum. Even and odd pairs of
 * dimensions have sums of their own. */
LANES_INLINE void scores_pairs(const struct chunk_call *c, const int rows)
{
    const uint8_t *q = c->q;
    const lanes scale = lanes_all(c->scale * LOG2_E);
    lanes max[LANES_ROWS_MAX];
    int inner = 0, inner_end = c->n_tiles; /* tiles that all rows see wholly */
    UNROLL for (int r = 0; r < rows; r++)
    {
        int low = (c->low[r] + TILE - 1) / TILE, high = c->high[r] / TILE;
        inner = low > inner ? low : inner;
        inner_end = high < inner_end ? high : inner_end;
        max[r] = lanes_all(-INFINITY);
    }
    for (int t = 0; t < c->n_tiles; t++) {
        const uint32_t *k = (const uint32_t *)c->k[t];
        const uint8_t *ahead = c->k_ahead[t];
        lanes sum[LANES_ROWS_MAX][2];
        UNROLL for (int r = 0; r < rows; r++)
        {
            sum[r][0] = sum[r][1] = lanes_zero();
        }
        for (int d = 0; d < c->width / 2; d += 2, k += 2 * TILE, ahead += 128) {
            __m512i k0 = _mm512_loadu_si512(k), k1 = _mm512_loadu_si512(k + TILE);
            LANES_FETCH(ahead);
            LANES_FETCH(ahead + 64);
            UNROLL for (int r = 0; r < rows; r++)
            {
                const uint32_t *pairs = (const uint32_t *)(q + r * c->q_stride) + d;
                DOT_EACH(sum[r][0], k0, pairs[0]);
                DOT_EACH(sum[r][1], k1, pairs[1]);
            }
        }
        UNROLL for (int r = 0; r < rows; r++)
        {
            sum[r][0] = lanes_mul(lanes_add(sum[r][0], sum[r][1]), scale);
        }
        if (t < inner || t >= inner_end)
            UNROLL for (int r = 0; r < rows; r++) sum[r][0] = lanes_seen(c, r, t, sum[r][0]);
        UNROLL for (int r = 0; r < rows; r++)
        {
            lanes_store(c->scores + r * ATTENTION_CHUNK + t * TILE, sum[r][0]);
            max[r] = lanes_max(max[r], sum[r][0]);
        }
    }
    UNROLL for (int r = 0; r < rows; r++) c->max[r] = lanes_max_of(max[r]);
    if (c->softcap > 0)
        for (int r = 0; r < rows; r++)
            c->max[r] = lanes_max_of(cap_row(c, r));
}

/* Weights e^(s - max) as pairs, over the first half of the row's scores, and their sum. Tiles of an
 * even number of the chunk go to one half of the sums, odd ones to the other. */
LANES_INLINE void softmax_pairs(const struct chunk_call *c, int r)
{
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    float *s = c->scores + r * ATTENTION_CHUNK;
    uint16_t *pairs = (uint16_t *)s;
    const lanes max = lanes_all(c->max[r]);
    lanes sum = lanes_zero();
    int t = 0;
    if (c->odd) {
        lanes p = lanes_exp2(lanes_sub(lanes_load(s), max));
        __m512bh half = _mm512_cvtne2ps_pbh(p, lanes_zero());
        _mm256_storeu_si256((void *)pairs, _mm512_extracti64x4_epi64((__m512i)half, 1));
        sum = _mm512_dpbf16_ps(sum, half, ones);
        t = 1;
    }
    for (; t + PAIR <= c->n_tiles; t += PAIR) {
        lanes p0 = lanes_exp2(lanes_sub(lanes_load(s + t * TILE), max)),
              p1 = lanes_exp2(lanes_sub(lanes_load(s + t * TILE + TILE), max));
        __m512bh both = _mm512_cvtne2ps_pbh(p1, p0);
        _mm512_storeu_si512(pairs + t * TILE, (__m512i)both);
        sum = _mm512_dpbf16_ps(sum, both, ones);
    }
    if (t < c->n_tiles) {
        lanes p = lanes_exp2(lanes_sub(lanes_load(s + t * TILE), max));
        __m512bh half = _mm512_cvtne2ps_pbh(lanes_zero(), p);
        _mm256_storeu_si256((void *)(pairs + t * TILE), _mm512_castsi512_si256((__m512i)half));
        sum = _mm512_dpbf16_ps(sum, half, ones);
    }
    c->max[r] *= LN_2;
    c->sum[r] = lanes_sum_of(sum);
}

/* `wide` vectors of dimensions from d on. */
LANES_INLINE void values_wide(const struct chunk_call *c, const int rows, const int wide, int d)
{
    lanes sum[LANES_ROWS_MAX][4];
    UNROLL for (int r = 0; r < rows; r++)
    {
        UNROLL for (int j = 0; j < wide; j++) sum[r][j] = lanes_zero();
    }
    for (int t = 0; t < c->n_tiles; t++) {
        const uint32_t *v = (const uint32_t *)c->v[t] + d;
        const uint8_t *ahead = c->v_ahead[t] + (size_t)d * 4;
        const uint32_t *pairs = (const uint32_t *)c->scores + t * 8;
        for (int i = 0; i < 8; i++, v += c->width, ahead += c->width * 4) {
            UNROLL for (int j = 0; j < wide; j++)
            {
                __m512i x = _mm512_loadu_si512(v + j * 16);
                LANES_FETCH(ahead + j * 64);
                UNROLL for (int r = 0; r < rows; r++)
                {
                    DOT_EACH(sum[r][j], x, pairs[r * ATTENTION_CHUNK + i]);
                }
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
    {
        UNROLL for (int j = 0; j < wide; j++)
            lanes_store(c->out + r * c->width + d + j * 16, sum[r][j]);
    }
}

/* 28 sums at most, so that V is read in order. */
LANES_INLINE void values_pairs(const struct chunk_call *c, const int rows)
{
    int d = 0;
    if (rows <= 7)
        for (; d + 64 <= c->width; d += 64)
            values_wide(c, rows, 4, d);
    for (; d + 32 <= c->width; d += 32)
        values_wide(c, rows, 2, d);
    for (; d < c->width; d += 16)
        values_wide(c, rows, 1, d);
}

/* Subnormals become 0 here, as they would in the product. */
static void query_pairs(void *to, const float *q, int n)
{
    for (int d = 0; d < n; d += 16)
        _mm256_storeu_si256((void *)((uint16_t *)to + d),
                            (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(q + d)));
}

CHUNK_KERNEL_8(chunk_pairs, scores_pairs, softmax_pairs, values_pairs)

const struct attention_kernels attention_bf16 = {
    .chunk = {[DTYPE_BF16] = chunk_pairs},
    .rows_max = {[DTYPE_BF16] = 8},
    .query = {[DTYPE_BF16] = query_pairs},
};
