/* Attention over a BF16 cache by vdpbf16ps: pairs of dimensions in scores, pairs of tokens in
 * values.
 *
 * Queries are BF16 pairs; weights are rounded to BF16, and their sum is taken of the rounded ones,
 * so that they still add up to 1. */
#define LANES_HEADER "kernels/cpu/lanes_avx512.h"
#include "kernels/cpu/attention_lanes.h"

#define DOT(sum, a, b) __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b))

LANES_INLINE void scores_pairs(const struct chunk_call *c, const int rows)
{
    for (int t = 0; t < c->n_tiles; t++) {
        const uint32_t *k = (const uint32_t *)c->k[t];
        const uint8_t *ahead = c->k_ahead[t];
        lanes sum[LANES_ROWS_MAX][2];
        UNROLL for (int r = 0; r < rows; r++)
        {
            sum[r][0] = sum[r][1] = lanes_zero();
        }
        for (int d = 0; d < c->width / 2; d += 2, k += 32, ahead += 128) {
            __m512i k0 = _mm512_loadu_si512(k), k1 = _mm512_loadu_si512(k + 16);
            LANES_FETCH(ahead);
            LANES_FETCH(ahead + 64);
            UNROLL for (int r = 0; r < rows; r++)
            {
                const int32_t *q = (const int32_t *)((const uint8_t *)c->q + r * c->q_stride);
                __m512i q0 = _mm512_set1_epi32(q[d]), q1 = _mm512_set1_epi32(q[d + 1]);
                DOT(sum[r][0], k0, q0);
                DOT(sum[r][1], k1, q1);
            }
        }
        UNROLL for (int r = 0; r < rows; r++)
        {
            lanes_store(c->scores + r * ATTENTION_CHUNK + t * 16, lanes_add(sum[r][0], sum[r][1]));
        }
    }
}

/* As softmax_row; the pairs overwrite the first half of the row's scores. */
LANES_INLINE void softmax_pairs(const struct chunk_call *c, int r)
{
    const lanes nothing = lanes_all(-3.0e38f);
    float *s = c->scores + r * ATTENTION_CHUNK;
    uint16_t *pairs = (uint16_t *)s;
    lanes max = nothing, sum = lanes_zero();
    for (int t = 0; t < c->n_tiles; t++) {
        lanes x = lanes_mul(lanes_load(s + t * 16), lanes_all(c->scale));
        if (c->softcap > 0) x = lanes_softcap(x, c->softcap);
        x = lanes_between(x, c->low[r] - t * 16, c->high[r] - t * 16, nothing);
        lanes_store(s + t * 16, x);
        max = lanes_max(max, x);
    }
    c->max[r] = lanes_max_of(max);
    max = lanes_all(c->max[r]);
    for (int t = 0; t < c->n_tiles; t++) {
        lanes p = lanes_exp(lanes_sub(lanes_load(s + t * 16), max));
        p = lanes_between(p, c->low[r] - t * 16, c->high[r] - t * 16, lanes_zero());
        __m256i half = (__m256i)_mm512_cvtneps_pbh(p);
        _mm256_storeu_si256((void *)(pairs + t * 16), half);
        sum =
            lanes_add(sum, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)));
    }
    c->sum[r] = lanes_sum_of(sum);
}

LANES_INLINE void values_pairs_wide(const struct chunk_call *c, const int rows, const int wide,
                                    int d, bool fetch)
{
    lanes sum[LANES_ROWS_MAX][4];
    UNROLL for (int r = 0; r < rows; r++)
    {
        UNROLL for (int j = 0; j < wide; j++) sum[r][j] = lanes_zero();
    }
    for (int t = 0; t < c->n_tiles; t++) {
        const uint32_t *v = (const uint32_t *)c->v[t] + d;
        const uint8_t *ahead = c->v_ahead[t];
        for (int i = 0; i < 8; i++, v += c->width) {
            __m512i x[4];
            UNROLL for (int j = 0; j < wide; j++) x[j] = _mm512_loadu_si512(v + j * 16);
            if (fetch)
                for (int b = 0; b < c->width * 4; b += 64, ahead += 64)
                    LANES_FETCH(ahead);
            UNROLL for (int r = 0; r < rows; r++)
            {
                const int32_t *pairs = (const int32_t *)(c->scores + r * ATTENTION_CHUNK) + t * 8;
                __m512i p = _mm512_set1_epi32(pairs[i]);
                UNROLL for (int j = 0; j < wide; j++) DOT(sum[r][j], x[j], p);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
    {
        UNROLL for (int j = 0; j < wide; j++)
            lanes_store(c->out + r * c->width + d + j * 16, sum[r][j]);
    }
}
VALUES_BY_WIDTH(values_pairs)

CHUNK_KERNEL_8(chunk_pairs, scores_pairs, softmax_pairs, values_pairs)

const struct attention_kernels attention_bf16 = {
    .chunk = {[DTYPE_BF16] = chunk_pairs},
    .rows_max = {[DTYPE_BF16] = 8},
    .q_pairs = {[DTYPE_BF16] = true},
};
