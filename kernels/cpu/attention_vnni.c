/* Attention over an I8 cache by vpdpbusd: four dimensions at a time in scores, four tokens in
 * values.
 *
 * K and V are multiplied as the bytes they are. What they are multiplied by, queries and weights,
 * becomes 16 bits with one scale for a query, and one for a row's weights of a chunk, in two planes
 * of 8: x = scale * (256 high + low). That is finer than the bytes of K and V by a factor of 256,
 * and its sums are exact. The first operand is unsigned, so K and V are moved up by 128, and the
 * sums begin at -128 times that of the plane. */
#define LANES_HEADER "kernels/cpu/lanes_avx512.h"
#include "kernels/cpu/attention_lanes.h"
#include "kernels/cpu/quantize.h"
#include "kernels/half.h"

/* sum += bytes (unsigned) times the four in memory (signed), the same for all lanes */
#define DOT_EACH(sum, bytes, four)                                                                 \
    __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(bytes), "m"(four))

enum { PLANE_MAX = 127 * 256 }; /* largest magnitude, so that a rounded high plane is a byte */

/* What follows the planes [n] high and [n] low of a query. */
struct query_tail {
    float scale;
    int32_t begin[2]; /* of the sums, high and low */
};

static void query_planes(void *to, const float *q, int n)
{
    int8_t *high = to, *low = high + n;
    struct query_tail *tail = (void *)(low + n);
    uint32_t max_bits = 0;
    int32_t sum[2] = {0, 0};
    for (int d = 0; d < n; d++) {
        uint32_t u = float_bits(q[d]) & 0x7fffffff;
        max_bits = u > max_bits ? u : max_bits;
    }
    float inverse;
    tail->scale = quantize_scale(max_bits, &inverse) * (127.0f / PLANE_MAX);
    inverse *= PLANE_MAX / 127.0f;
    for (int d = 0; d < n; d++) {
        int32_t x = inverse > 0.0f ? (int32_t)((q[d] * inverse + 12582912.0f) - 12582912.0f) : 0;
        int32_t upper = (x + 128) >> 8;
        high[d] = (int8_t)upper, low[d] = (int8_t)(x - upper * 256);
        sum[0] += high[d], sum[1] += low[d];
    }
    tail->begin[0] = -128 * sum[0], tail->begin[1] = -128 * sum[1];
}

/* 256 high + low, rounded once. */
LANES_INLINE lanes planes_joined(__m512i high, __m512i low)
{
    return lanes_fma(_mm512_cvtepi32_ps(high), lanes_all(256.0f), _mm512_cvtepi32_ps(low));
}

LANES_INLINE __m512i bytes_unsigned(const uint32_t *words)
{
    return _mm512_xor_si512(_mm512_loadu_si512(words), _mm512_set1_epi8((char)0x80));
}

/* Scores times log2 e. */
LANES_INLINE void scores_bytes(const struct chunk_call *c, const int rows)
{
    const uint8_t *q = c->q;
    const int64_t n = c->width;
    for (int t = 0; t < c->n_tiles; t++) {
        const uint32_t *k = (const uint32_t *)c->k[t];
        const uint8_t *ahead = c->k_ahead[t];
        __m512i sum[LANES_ROWS_MAX][2];
        UNROLL for (int r = 0; r < rows; r++)
        {
            const struct query_tail *tail = (const void *)(q + r * c->q_stride + 2 * n);
            sum[r][0] = _mm512_set1_epi32(tail->begin[0]);
            sum[r][1] = _mm512_set1_epi32(tail->begin[1]);
        }
        for (int64_t d = 0; d < n; d += 4, k += TILE, ahead += 64) {
            __m512i x = bytes_unsigned(k);
            LANES_FETCH(ahead);
            UNROLL for (int r = 0; r < rows; r++)
            {
                const uint8_t *fours = q + r * c->q_stride + d;
                DOT_EACH(sum[r][0], x, *(const uint32_t *)fours);
                DOT_EACH(sum[r][1], x, *(const uint32_t *)(fours + n));
            }
        }
        LANES_FETCH(ahead); /* the scales */
        lanes k_scale = lanes_load(c->k_scale[t]);
        UNROLL for (int r = 0; r < rows; r++)
        {
            const struct query_tail *tail = (const void *)(q + r * c->q_stride + 2 * n);
            float by = tail->scale * c->scale;
            lanes s = lanes_mul(planes_joined(sum[r][0], sum[r][1]), k_scale);
            s = lanes_mul(s, lanes_all(c->softcap > 0 ? by : by * LOG2_E));
            if (c->softcap > 0) s = lanes_mul(lanes_softcap(s, c->softcap), lanes_all(LOG2_E));
            lanes_store(c->scores + r * ATTENTION_CHUNK + t * TILE, s);
        }
    }
}

/* What follows the planes of a row's weights: of each tile [16] high and [16] low. */
struct weights_tail {
    float scale;
    int32_t begin[2];
};
enum { WEIGHTS_BYTES = ATTENTION_CHUNK * 2 };

/* Weights times V's scales, floats in place of the scores, to planes over the first half of them.
 */
LANES_INLINE void weights_to_planes(float *s, int n_tiles, float most, lanes poison)
{
    /* a NaN among them becomes one of the scale, and so of the result */
    float scale = most / PLANE_MAX, inverse = scale > 0x1p-120f ? 1.0f / scale : 0.0f;
    struct weights_tail *tail = (void *)((uint8_t *)s + WEIGHTS_BYTES);
    __m512i sum[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    for (int t = 0; t < n_tiles; t++) {
        __m512i x = _mm512_cvtps_epi32(lanes_mul(lanes_load(s + t * TILE), lanes_all(inverse)));
        __m512i high = _mm512_srai_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(128)), 8);
        __m512i low = _mm512_sub_epi32(x, _mm512_slli_epi32(high, 8));
        sum[0] = _mm512_add_epi32(sum[0], high), sum[1] = _mm512_add_epi32(sum[1], low);
        _mm_storeu_si128((void *)((uint8_t *)s + t * 32), _mm512_cvtepi32_epi8(high));
        _mm_storeu_si128((void *)((uint8_t *)s + t * 32 + 16), _mm512_cvtepi32_epi8(low));
    }
    tail->scale = scale + lanes_sum_of(poison);
    tail->begin[0] = -128 * _mm512_reduce_add_epi32(sum[0]);
    tail->begin[1] = -128 * _mm512_reduce_add_epi32(sum[1]);
}

/* As softmax_row, of scores times log2 e. */
LANES_INLINE void softmax_bytes(const struct chunk_call *c, int r)
{
    const lanes nothing = lanes_all(-3.0e38f);
    float *s = c->scores + r * ATTENTION_CHUNK;
    lanes max = nothing, sum = lanes_zero(), most = lanes_zero(), poison = lanes_zero();
    /* tiles [inner, inner_end) are seen wholly */
    int inner = (c->low[r] + TILE - 1) / TILE, inner_end = c->high[r] / TILE;
    for (int t = 0; t < c->n_tiles; t++) {
        lanes x = lanes_load(s + t * TILE);
        if (t < inner || t >= inner_end)
            x = lanes_between(x, c->low[r] - t * TILE, c->high[r] - t * TILE, nothing);
        max = lanes_max(max, x);
    }
    c->max[r] = lanes_max_of(max);
    max = lanes_all(c->max[r]);
    for (int t = 0; t < c->n_tiles; t++) {
        lanes p = lanes_exp2(lanes_sub(lanes_load(s + t * TILE), max));
        lanes scaled = lanes_mul(p, lanes_load(c->v_scale[t]));
        if (t < inner || t >= inner_end) {
            int low = c->low[r] - t * TILE, high = c->high[r] - t * TILE;
            p = lanes_between(p, low, high, lanes_zero());
            scaled = lanes_between(scaled, low, high, lanes_zero());
        }
        sum = lanes_add(sum, p);
        most = lanes_max(most, scaled);
        poison = lanes_fma(scaled, lanes_zero(), poison);
        lanes_store(s + t * TILE, scaled);
    }
    c->max[r] *= LN_2;
    c->sum[r] = lanes_sum_of(sum);
    weights_to_planes(s, c->n_tiles, lanes_max_of(most), poison);
}

/* `wide` vectors of dimensions from d on; with d = 0 all of V that comes next is fetched. */
LANES_INLINE void values_bytes_wide(const struct chunk_call *c, const int rows, const int wide,
                                    const int d)
{
    __m512i sum[LANES_ROWS_MAX][2][2];
    const uint8_t *weights = (const uint8_t *)c->scores;
    const int64_t stride = ATTENTION_CHUNK * sizeof(float);
    UNROLL for (int r = 0; r < rows; r++)
    {
        const struct weights_tail *tail = (const void *)(weights + r * stride + WEIGHTS_BYTES);
        UNROLL for (int j = 0; j < wide; j++)
        {
            sum[r][j][0] = _mm512_set1_epi32(tail->begin[0]);
            sum[r][j][1] = _mm512_set1_epi32(tail->begin[1]);
        }
    }
    for (int t = 0; t < c->n_tiles; t++) {
        const uint32_t *v = (const uint32_t *)c->v[t] + d;
        const uint8_t *ahead = c->v_ahead[t];
        if (d == 0) LANES_FETCH(ahead + c->width * TILE); /* the scales */
        for (int i = 0; i < 4; i++, v += c->width) {
            for (int j = 0; d == 0 && j < c->width; j += TILE, ahead += 64)
                LANES_FETCH(ahead);
            UNROLL for (int j = 0; j < wide; j++)
            {
                __m512i x = bytes_unsigned(v + j * 16);
                UNROLL for (int r = 0; r < rows; r++)
                {
                    const uint8_t *fours = weights + r * stride + t * 32 + i * 4;
                    DOT_EACH(sum[r][j][0], x, *(const uint32_t *)fours);
                    DOT_EACH(sum[r][j][1], x, *(const uint32_t *)(fours + 16));
                }
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
    {
        const struct weights_tail *tail = (const void *)(weights + r * stride + WEIGHTS_BYTES);
        UNROLL for (int j = 0; j < wide; j++) lanes_store(
            c->out + r * c->width + d + j * 16,
            lanes_mul(planes_joined(sum[r][j][0], sum[r][j][1]), lanes_all(tail->scale)));
    }
}

/* 28 sums at most: eight rows go one vector at a time. */
LANES_INLINE void values_bytes(const struct chunk_call *c, const int rows)
{
    int d = 0;
    if (rows < 8)
        for (; d + 32 <= c->width; d += 32)
            values_bytes_wide(c, rows, 2, d);
    for (; d < c->width; d += 16)
        values_bytes_wide(c, rows, 1, d);
}

CHUNK_KERNEL_8(chunk_bytes, scores_bytes, softmax_bytes, values_bytes)

const struct attention_kernels attention_vnni = {
    .chunk = {[DTYPE_I8] = chunk_bytes},
    .rows_max = {[DTYPE_I8] = 8},
    .query = {[DTYPE_I8] = query_planes},
};
