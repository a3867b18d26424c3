/* Attention over a BF16 cache by vdpbf16ps: pairs of dimensions in scores, pairs of tokens in
 * values.
 *
 * Queries are BF16 pairs; weights are rounded to BF16, and their sum is taken of the rounded ones,
 * so that they still add up to 1. */
#define LANES_HEADER "kernels/cpu/lanes_avx512.h"
#include "kernels/cpu/attention_lanes.h"

/* sum += a * the pair in memory, the same for all lanes */
#define DOT_EACH(sum, a, pair)                                                                     \
    __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(a), "m"(pair))

/* Scores times log2 e. Even and odd pairs of dimensions have sums of their own. */
LANES_INLINE void scores_pairs(const struct chunk_call *c, const int rows)
{
    const uint8_t *q = c->q;
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
            lanes s = lanes_add(sum[r][0], sum[r][1]);
            s = lanes_mul(s, lanes_all(c->softcap > 0 ? c->scale : c->scale * LOG2_E));
            if (c->softcap > 0) s = lanes_mul(lanes_softcap(s, c->softcap), lanes_all(LOG2_E));
            lanes_store(c->scores + r * ATTENTION_CHUNK + t * TILE, s);
        }
    }
}

/* As softmax_row, of scores times log2 e; pairs of weights overwrite the first half of the row. */
LANES_INLINE void softmax_pairs(const struct chunk_call *c, int r)
{
    const lanes nothing = lanes_all(-3.0e38f);
    const __m256bh ones = (__m256bh)_mm256_set1_epi16(0x3f80);
    float *s = c->scores + r * ATTENTION_CHUNK;
    uint16_t *pairs = (uint16_t *)s;
    lanes max = nothing;
    /* tiles [inner, inner_end) are seen wholly */
    int inner = (c->low[r] + TILE - 1) / TILE, inner_end = c->high[r] / TILE;
    for (int t = 0; t < c->n_tiles; t++) {
        lanes x = lanes_load(s + t * TILE);
        if (t < inner || t >= inner_end)
            x = lanes_between(x, c->low[r] - t * TILE, c->high[r] - t * TILE, nothing);
        max = lanes_max(max, x);
    }
    float most = lanes_max_of(max);
    max = lanes_all(most);
    __m256 sum = _mm256_setzero_ps();
    for (int t = 0; t < c->n_tiles; t++) {
        lanes p = lanes_exp2(lanes_sub(lanes_load(s + t * TILE), max));
        if (t < inner || t >= inner_end)
            p = lanes_between(p, c->low[r] - t * TILE, c->high[r] - t * TILE, lanes_zero());
        __m256bh half = _mm512_cvtneps_pbh(p);
        _mm256_storeu_si256((void *)(pairs + t * TILE), (__m256i)half);
        sum = _mm256_dpbf16_ps(sum, half, ones);
    }
    c->max[r] = most * LN_2;
    c->sum[r] = lanes_sum_of(_mm512_zextps256_ps512(sum));
}

/* `wide` vectors of dimensions from d on, of rows [r0, r0 + rows). */
LANES_INLINE void values_wide(const struct chunk_call *c, const int r0, const int rows,
                              const int wide, int d)
{
    lanes sum[LANES_ROWS_MAX][4];
    UNROLL for (int r = 0; r < rows; r++)
    {
        UNROLL for (int j = 0; j < wide; j++) sum[r][j] = lanes_zero();
    }
    for (int t = 0; t < c->n_tiles; t++) {
        const uint32_t *v = (const uint32_t *)c->v[t] + d;
        const uint8_t *ahead = c->v_ahead[t] + (size_t)d * 4;
        const uint32_t *pairs = (const uint32_t *)(c->scores + r0 * ATTENTION_CHUNK) + t * 8;
        for (int i = 0; i < 8; i++, v += c->width, ahead += c->width * 4) {
            UNROLL for (int j = 0; j < wide; j++)
            {
                __m512i x = _mm512_loadu_si512(v + j * 16);
                if (r0 == 0) LANES_FETCH(ahead + j * 64);
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
            lanes_store(c->out + (r0 + r) * c->width + d + j * 16, sum[r][j]);
    }
}

/* 28 sums at most, so that V is read in order: eight rows go in two halves. */
LANES_INLINE void values_pairs(const struct chunk_call *c, const int rows)
{
    const int first = rows > 7 ? 4 : rows;
    int d = 0;
    for (; d + 64 <= c->width; d += 64) {
        values_wide(c, 0, first, 4, d);
        if (rows > first) values_wide(c, first, rows - first, 4, d);
    }
    for (; d < c->width; d += 16) {
        values_wide(c, 0, first, 1, d);
        if (rows > first) values_wide(c, first, rows - first, 1, d);
    }
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
