/* One chunk of attention in lanes: scores, softmax within the chunk, weighted values.
 *
 * Written once over the lanes of the including file's ISA. A lane is a token in scores and a
 * dimension in values; two chains of sums a row hide the latency of multiply-adds. Which rows share
 * a call never changes a row's operations or their order. */
#pragma once
#include LANES_HEADER /* the lanes of the including file */
#include "kernels/cpu/attention.h"

#define UNROLL _Pragma("GCC unroll 16")

/* Into L2: blocks lie in any order, and a core waits for fewer lines at once on their way into L1.
 */
#define LANES_FETCH(at) _mm_prefetch((const char *)(at), _MM_HINT_T1)

/* e^x for x <= 0; below -87 it is 0. */
LANES_INLINE lanes lanes_exp(lanes x)
{
    lanes clamped = lanes_max(x, lanes_all(-87.0f));
    lanes n = lanes_round(lanes_mul(clamped, lanes_all(1.44269504f)));
    lanes r = lanes_fma(n, lanes_all(-0.693359375f), clamped);
    r = lanes_fma(n, lanes_all(2.12194440e-4f), r);
    lanes p = lanes_all(1.9875691500e-4f);
    p = lanes_fma(p, r, lanes_all(1.3981999507e-3f));
    p = lanes_fma(p, r, lanes_all(8.3334519073e-3f));
    p = lanes_fma(p, r, lanes_all(4.1665795894e-2f));
    p = lanes_fma(p, r, lanes_all(1.6666665459e-1f));
    p = lanes_fma(p, r, lanes_all(5.0000001201e-1f));
    p = lanes_fma(lanes_mul(p, r), r, lanes_add(r, lanes_all(1.0f)));
    return lanes_scale2(p, n);
}

/* cap * tanh(x / cap) as cap * (1 - 2 / (e^2y + 1)), by |y| so that e^-2|y| cannot overflow. */
LANES_INLINE lanes lanes_softcap(lanes x, float cap)
{
    lanes y = lanes_mul(x, lanes_all(1.0f / cap));
    lanes magnitude = lanes_max(y, lanes_sub(lanes_zero(), y));
    lanes e = lanes_exp(lanes_mul(magnitude, lanes_all(-2.0f)));
    lanes t = lanes_div(lanes_sub(lanes_all(1.0f), e), lanes_add(lanes_all(1.0f), e));
    /* small y: the quotient cancels, y (1 - y^2 / 3) does not */
    lanes y2 = lanes_mul(y, y);
    lanes small = lanes_mul(
        magnitude, lanes_fma(y2, lanes_fma(y2, lanes_all(0.133333333f), lanes_all(-0.333333333f)),
                             lanes_all(1.0f)));
    float a[16], b[16], s[16], v[16];
    lanes_store(a, t), lanes_store(b, small), lanes_store(s, y2), lanes_store(v, y);
    for (int i = 0; i < 16; i++)
        a[i] = cap * (v[i] < 0 ? -1.0f : 1.0f) * (s[i] < 0.01f ? b[i] : a[i]);
    return lanes_load(a);
}

/* scores[r][16 tile + lane] = q . k, raw. LOAD gives 16 tokens of one dimension. */
#define SCORES(NAME, ELEMENT, LOAD)                                                                \
    LANES_INLINE void NAME(const struct chunk_call *c, const int rows)                             \
    {                                                                                              \
        for (int t = 0; t < c->n_tiles; t++) {                                                     \
            const ELEMENT *k = (const ELEMENT *)c->k[t];                                           \
            const uint8_t *ahead = c->k_ahead[t];                                                  \
            const float *q[LANES_ROWS_MAX];                                                        \
            lanes sum[LANES_ROWS_MAX][2];                                                          \
            UNROLL for (int r = 0; r < rows; r++)                                                  \
            {                                                                                      \
                q[r] = (const float *)((const uint8_t *)c->q + r * c->q_stride);                   \
                sum[r][0] = sum[r][1] = lanes_zero();                                              \
            }                                                                                      \
            for (int d = 0; d < c->width; d += 2, ahead += 32 * sizeof(ELEMENT)) {                 \
                LANES_FETCH(ahead);                                                                \
                if (sizeof(ELEMENT) == 4) LANES_FETCH(ahead + 64);                                 \
                lanes k0 = LOAD(k + d * 16), k1 = LOAD(k + d * 16 + 16);                           \
                UNROLL for (int r = 0; r < rows; r++)                                              \
                {                                                                                  \
                    sum[r][0] = lanes_fma(k0, lanes_all(q[r][d]), sum[r][0]);                      \
                    sum[r][1] = lanes_fma(k1, lanes_all(q[r][d + 1]), sum[r][1]);                  \
                }                                                                                  \
            }                                                                                      \
            UNROLL for (int r = 0; r < rows; r++)                                                  \
            {                                                                                      \
                lanes_store(c->scores + r * ATTENTION_CHUNK + t * 16,                              \
                            lanes_add(sum[r][0], sum[r][1]));                                      \
            }                                                                                      \
        }                                                                                          \
    }

/* out[r][dimensions] = sum of weight * v, `wide` vectors of dimensions at a time. */
#define VALUES(NAME, ELEMENT, LOAD)                                                                \
    LANES_INLINE void NAME##_wide(const struct chunk_call *c, const int rows, const int wide,      \
                                  int d)                                                           \
    {                                                                                              \
        lanes sum[LANES_ROWS_MAX][4];                                                              \
        UNROLL for (int r = 0; r < rows; r++)                                                      \
        {                                                                                          \
            UNROLL for (int j = 0; j < wide; j++) sum[r][j] = lanes_zero();                        \
        }                                                                                          \
        for (int t = 0; t < c->n_tiles; t++) {                                                     \
            const ELEMENT *v = (const ELEMENT *)c->v[t] + d;                                       \
            const uint8_t *ahead = c->v_ahead[t] + (size_t)d * sizeof(ELEMENT);                    \
            for (int i = 0; i < 16;                                                                \
                 i++, v += c->width, ahead += c->width * (int)sizeof(ELEMENT)) {                   \
                LANES_FETCH(ahead);                                                                \
                if (wide * 16 * sizeof(ELEMENT) > 64) LANES_FETCH(ahead + 64);                     \
                lanes x[4];                                                                        \
                UNROLL for (int j = 0; j < wide; j++) x[j] = LOAD(v + j * 16);                     \
                UNROLL for (int r = 0; r < rows; r++)                                              \
                {                                                                                  \
                    lanes p = lanes_all(c->scores[r * ATTENTION_CHUNK + t * 16 + i]);              \
                    UNROLL for (int j = 0; j < wide; j++) sum[r][j] =                              \
                        lanes_fma(p, x[j], sum[r][j]);                                             \
                }                                                                                  \
            }                                                                                      \
        }                                                                                          \
        UNROLL for (int r = 0; r < rows; r++)                                                      \
        {                                                                                          \
            UNROLL for (int j = 0; j < wide; j++)                                                  \
                lanes_store(c->out + r * c->width + d + j * 16, sum[r][j]);                        \
        }                                                                                          \
    }                                                                                              \
    VALUES_BY_WIDTH(NAME)

/* All dimensions, four vectors at a time while registers last. */
#define VALUES_BY_WIDTH(NAME)                                                                      \
    LANES_INLINE void NAME(const struct chunk_call *c, const int rows)                             \
    {                                                                                              \
        int d = 0;                                                                                 \
        if (rows * 2 <= LANES_ROWS_MAX)                                                            \
            for (; d + 64 <= c->width; d += 64)                                                    \
                NAME##_wide(c, rows, 4, d);                                                        \
        for (; d + 32 <= c->width; d += 32)                                                        \
            NAME##_wide(c, rows, 2, d);                                                            \
        for (; d < c->width; d += 16)                                                              \
            NAME##_wide(c, rows, 1, d);                                                            \
    }

/* Scores to weights e^(s - max) of one row, in place; tokens that the row does not see get 0. */
LANES_INLINE void softmax_row(const struct chunk_call *c, int r)
{
    const lanes nothing = lanes_all(-3.0e38f);
    float *s = c->scores + r * ATTENTION_CHUNK;
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
        sum = lanes_add(sum, p);
        if (c->v_scale) p = lanes_mul(p, lanes_load(c->v_scale[t]));
        lanes_store(s + t * 16, p);
    }
    c->sum[r] = lanes_sum_of(sum);
}

/* BF16 without its dot product: words of two dimensions (K) or two tokens (V) are widened. */
LANES_INLINE void scores_widened(const struct chunk_call *c, const int rows)
{
    for (int t = 0; t < c->n_tiles; t++) {
        const uint32_t *k = (const uint32_t *)c->k[t];
        const float *q[LANES_ROWS_MAX];
        lanes sum[LANES_ROWS_MAX][2];
        UNROLL for (int r = 0; r < rows; r++)
        {
            q[r] = (const float *)((const uint8_t *)c->q + r * c->q_stride);
            sum[r][0] = sum[r][1] = lanes_zero();
        }
        for (int d = 0; d < c->width; d += 2, k += 16) {
            lanes k0 = lanes_load_low(k), k1 = lanes_load_high(k);
            UNROLL for (int r = 0; r < rows; r++)
            {
                sum[r][0] = lanes_fma(k0, lanes_all(q[r][d]), sum[r][0]);
                sum[r][1] = lanes_fma(k1, lanes_all(q[r][d + 1]), sum[r][1]);
            }
        }
        UNROLL for (int r = 0; r < rows; r++)
        {
            lanes_store(c->scores + r * ATTENTION_CHUNK + t * 16, lanes_add(sum[r][0], sum[r][1]));
        }
    }
}

LANES_INLINE void values_widened_wide(const struct chunk_call *c, const int rows, const int wide,
                                      int d)
{
    lanes sum[LANES_ROWS_MAX][4];
    UNROLL for (int r = 0; r < rows; r++)
    {
        UNROLL for (int j = 0; j < wide; j++) sum[r][j] = lanes_zero();
    }
    for (int t = 0; t < c->n_tiles; t++) {
        const uint32_t *v = (const uint32_t *)c->v[t] + d;
        for (int i = 0; i < 16; i += 2, v += c->width)
            UNROLL for (int j = 0; j < wide; j++)
            {
                lanes even = lanes_load_low(v + j * 16), odd = lanes_load_high(v + j * 16);
                UNROLL for (int r = 0; r < rows; r++)
                {
                    const float *p = c->scores + r * ATTENTION_CHUNK + t * 16 + i;
                    sum[r][j] = lanes_fma(lanes_all(p[0]), even, sum[r][j]);
                    sum[r][j] = lanes_fma(lanes_all(p[1]), odd, sum[r][j]);
                }
            }
    }
    UNROLL for (int r = 0; r < rows; r++)
    {
        UNROLL for (int j = 0; j < wide; j++)
            lanes_store(c->out + r * c->width + d + j * 16, sum[r][j]);
    }
}
VALUES_BY_WIDTH(values_widened)

/* I8: words of four dimensions (K) or four tokens (V), and a scale for each token. */
LANES_INLINE void scores_i8(const struct chunk_call *c, const int rows)
{
    for (int t = 0; t < c->n_tiles; t++) {
        const uint32_t *k = (const uint32_t *)c->k[t];
        const uint8_t *ahead = c->k_ahead[t];
        const float *q[LANES_ROWS_MAX];
        lanes sum[LANES_ROWS_MAX][2];
        UNROLL for (int r = 0; r < rows; r++)
        {
            q[r] = (const float *)((const uint8_t *)c->q + r * c->q_stride);
            sum[r][0] = sum[r][1] = lanes_zero();
        }
        for (int d = 0; d < c->width; d += 4, k += TILE, ahead += 64) {
            LANES_FETCH(ahead);
            UNROLL for (int j = 0; j < 4; j++)
            {
                lanes x = lanes_load_byte(k, j);
                UNROLL for (int r = 0; r < rows; r++) sum[r][j % 2] =
                    lanes_fma(x, lanes_all(q[r][d + j]), sum[r][j % 2]);
            }
        }
        UNROLL for (int r = 0; r < rows; r++)
        {
            lanes s = lanes_mul(lanes_add(sum[r][0], sum[r][1]), lanes_load(c->k_scale[t]));
            lanes_store(c->scores + r * ATTENTION_CHUNK + t * 16, s);
        }
    }
}

LANES_INLINE void values_i8_wide(const struct chunk_call *c, const int rows, const int wide, int d)
{
    lanes sum[LANES_ROWS_MAX][4];
    UNROLL for (int r = 0; r < rows; r++)
    {
        UNROLL for (int j = 0; j < wide; j++) sum[r][j] = lanes_zero();
    }
    for (int t = 0; t < c->n_tiles; t++) {
        const uint32_t *v = (const uint32_t *)c->v[t] + d;
        const uint8_t *ahead = c->v_ahead[t] + (size_t)d * 4;
        const float *p = c->scores + t * TILE;
        for (int i = 0; i < TILE; i += 4, v += c->width, ahead += c->width * 4)
            UNROLL for (int j = 0; j < wide; j++)
            {
                LANES_FETCH(ahead + j * 64);
                UNROLL for (int k = 0; k < 4; k++)
                {
                    lanes x = lanes_load_byte(v + j * 16, k);
                    UNROLL for (int r = 0; r < rows; r++) sum[r][j] =
                        lanes_fma(lanes_all(p[r * ATTENTION_CHUNK + i + k]), x, sum[r][j]);
                }
            }
    }
    UNROLL for (int r = 0; r < rows; r++)
    {
        UNROLL for (int j = 0; j < wide; j++)
            lanes_store(c->out + r * c->width + d + j * 16, sum[r][j]);
    }
}
VALUES_BY_WIDTH(values_i8)

SCORES(scores_f32, float, lanes_load)
SCORES(scores_f16, uint16_t, lanes_load_f16)
VALUES(values_f32, float, lanes_load)
VALUES(values_f16, uint16_t, lanes_load_f16)

/* NAME_1, NAME_2, .. for each number of rows, and NAME that picks one of them. */
#define CHUNK_HEIGHT(NAME, SCORES_OF, SOFTMAX, VALUES_OF, ROWS, ATTRIBUTES)                        \
    static __attribute__((noinline)) ATTRIBUTES void NAME##_##ROWS(const struct chunk_call *c)     \
    {                                                                                              \
        SCORES_OF(c, ROWS);                                                                        \
        for (int r = 0; r < (ROWS); r++)                                                           \
            SOFTMAX(c, r);                                                                         \
        VALUES_OF(c, ROWS);                                                                        \
    }
#define CHUNK_KERNEL_2(NAME, S, M, V)                                                              \
    CHUNK_HEIGHT(NAME, S, M, V, 1, )                                                               \
    CHUNK_HEIGHT(NAME, S, M, V, 2, )                                                               \
    static void NAME(const struct chunk_call *c)                                                   \
    {                                                                                              \
        static chunk_kernel *const heights[] = {NAME##_1, NAME##_2};                               \
        heights[c->rows - 1](c);                                                                   \
    }
#define CHUNK_KERNEL_8(NAME, S, M, V)                                                              \
    CHUNK_HEIGHT(NAME, S, M, V, 1, )                                                               \
    CHUNK_HEIGHT(NAME, S, M, V, 2, KERNEL_UNCHECKED)                                               \
    CHUNK_HEIGHT(NAME, S, M, V, 3, KERNEL_UNCHECKED)                                               \
    CHUNK_HEIGHT(NAME, S, M, V, 4, KERNEL_UNCHECKED)                                               \
    CHUNK_HEIGHT(NAME, S, M, V, 5, KERNEL_UNCHECKED)                                               \
    CHUNK_HEIGHT(NAME, S, M, V, 6, KERNEL_UNCHECKED)                                               \
    CHUNK_HEIGHT(NAME, S, M, V, 7, KERNEL_UNCHECKED)                                               \
    CHUNK_HEIGHT(NAME, S, M, V, 8, KERNEL_UNCHECKED)                                               \
    static void NAME(const struct chunk_call *c)                                                   \
    {                                                                                              \
        static chunk_kernel *const heights[] = {NAME##_1, NAME##_2, NAME##_3, NAME##_4,            \
                                                NAME##_5, NAME##_6, NAME##_7, NAME##_8};           \
        heights[c->rows - 1](c);                                                                   \
    }
