/* Microkernels of 512-bit vectors: 1..12 rows by a panel of 32 outputs, two vectors a row.
 *
 * One skeleton for the formats whose sums are floats; the integer ones are beside their files. Each
 * height is its own function, so that 24 accumulators stay in registers. The multiply-adds are
 * inline assembly because compilers spill the accumulators when they schedule intrinsics. Included
 * by the *_avx512.c, *_vnni.c and *_bf16.c files alone. */
#pragma once
#include "kernels/cpu/cpu.h"

#include <immintrin.h>

#define ALWAYS_INLINE static inline __attribute__((always_inline)) KERNEL_UNCHECKED
#define UNROLL        _Pragma("GCC unroll 16")
/* acc += weight * activation */
#define DOT_FLOAT(acc, w, x) __asm__ volatile("vfmadd231ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x))
#define DOT_BF16(acc, w, x)  __asm__ volatile("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x))
#define DOT_INT8(acc, w, x)  __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x))

/* out = v * row_scale * column_scale + bias, each where the format has it, never fused. What there
 * is is asked once: a call of few steps is as long as its beginning and end. */
ALWAYS_INLINE void results_store(const struct panel_call *c, const int rows, __m512 v[][2])
{
    const float *row_scale = c->row_scale, *column_scale = c->column_scale, *bias = c->bias;
    const int64_t stride = c->out_stride;
    float *out = c->out;
    if (row_scale) {
        UNROLL for (int r = 0; r < rows; r++)
        {
            __m512 scale = _mm512_set1_ps(row_scale[r]);
            v[r][0] = _mm512_mul_ps(v[r][0], scale), v[r][1] = _mm512_mul_ps(v[r][1], scale);
        }
    }
    if (column_scale) {
        __m512 low = _mm512_loadu_ps(column_scale), high = _mm512_loadu_ps(column_scale + 16);
        UNROLL for (int r = 0; r < rows; r++)
        {
            v[r][0] = _mm512_mul_ps(v[r][0], low), v[r][1] = _mm512_mul_ps(v[r][1], high);
        }
    }
    if (bias) {
        __m512 low = _mm512_loadu_ps(bias), high = _mm512_loadu_ps(bias + 16);
        UNROLL for (int r = 0; r < rows; r++)
        {
            v[r][0] = _mm512_add_ps(v[r][0], low), v[r][1] = _mm512_add_ps(v[r][1], high);
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
    {
        _mm512_storeu_ps(out + r * stride, v[r][0]);
        _mm512_storeu_ps(out + r * stride + 16, v[r][1]);
    }
}

/* Float sums between calls. */
ALWAYS_INLINE void sums_begin(const struct panel_call *c, const int rows, __m512 sum[][2])
{
    const float *parked = c->scratch;
    if (c->first) {
        UNROLL for (int r = 0; r < rows; r++)
        {
            sum[r][0] = sum[r][1] = _mm512_setzero_ps();
        }
    } else {
        UNROLL for (int r = 0; r < rows; r++)
        {
            sum[r][0] = _mm512_loadu_ps(parked + r * 32);
            sum[r][1] = _mm512_loadu_ps(parked + r * 32 + 16);
        }
    }
}

ALWAYS_INLINE void sums_end(const struct panel_call *c, const int rows, __m512 sum[][2])
{
    float *parked = c->scratch;
    if (c->last) {
        results_store(c, rows, sum);
        return;
    }
    UNROLL for (int r = 0; r < rows; r++)
    {
        _mm512_storeu_ps(parked + r * 32, sum[r][0]);
        _mm512_storeu_ps(parked + r * 32 + 16, sum[r][1]);
    }
}

/* Into L2: a block just ahead would push the current one out of L1. */
#define PREFETCH(c, at)                                                                            \
    (_mm_prefetch((const char *)(at), _MM_HINT_T1),                                                \
     _mm_prefetch((const char *)(at) + (c)->prefetch_second, _MM_HINT_T1))

ALWAYS_INLINE __m512i broadcast_word(const uint32_t *words, int r)
{
    return _mm512_set1_epi32((int)words[r]);
}

/* The skeleton. STEP(words, weights) does one step of all rows into sum[][]. */
#define FLOAT_PANEL(NAME, STEP_BYTES, STEP)                                                        \
    ALWAYS_INLINE void NAME(const struct panel_call *c, const int rows)                            \
    {                                                                                              \
        __m512 sum[PANEL_ROWS_MAX][2];                                                             \
        const uint8_t *weights = c->weights;                                                       \
        const uint32_t *words = c->words;                                                          \
        const uint8_t *ahead = c->prefetch;                                                        \
        sums_begin(c, rows, sum);                                                                  \
        for (int64_t s = 0; s < c->n_steps; s += 2) {                                              \
            PREFETCH(c, ahead);                                                                    \
            STEP(weights, words);                                                                  \
            PREFETCH(c, ahead + c->prefetch_bytes);                                                \
            STEP(weights + (STEP_BYTES), words + rows);                                            \
            weights += 2 * (STEP_BYTES);                                                           \
            words += 2 * rows;                                                                     \
            ahead += 2 * c->prefetch_bytes;                                                        \
        }                                                                                          \
        sums_end(c, rows, sum);                                                                    \
    }

/* NAME_1 .. NAME_12 from the inline NAME, and NAME_any that picks one by the number of rows. */
#define ONE_HEIGHT(NAME, ROWS, ATTRIBUTES)                                                         \
    static __attribute__((noinline)) ATTRIBUTES void NAME##_##ROWS(const struct panel_call *c)     \
    {                                                                                              \
        NAME(c, ROWS);                                                                             \
    }
#define ALL_HEIGHTS(NAME)                                                                          \
    ONE_HEIGHT(NAME, 1, )                                                                          \
    ONE_HEIGHT(NAME, 2, )                                                                          \
    ONE_HEIGHT(NAME, 3, KERNEL_UNCHECKED)                                                          \
    ONE_HEIGHT(NAME, 4, KERNEL_UNCHECKED)                                                          \
    ONE_HEIGHT(NAME, 5, KERNEL_UNCHECKED)                                                          \
    ONE_HEIGHT(NAME, 6, KERNEL_UNCHECKED)                                                          \
    ONE_HEIGHT(NAME, 7, KERNEL_UNCHECKED)                                                          \
    ONE_HEIGHT(NAME, 8, KERNEL_UNCHECKED)                                                          \
    ONE_HEIGHT(NAME, 9, KERNEL_UNCHECKED)                                                          \
    ONE_HEIGHT(NAME, 10, KERNEL_UNCHECKED)                                                         \
    ONE_HEIGHT(NAME, 11, KERNEL_UNCHECKED)                                                         \
    ONE_HEIGHT(NAME, 12, KERNEL_UNCHECKED)                                                         \
    HEIGHT_SWITCH(NAME)
#define HEIGHT_SWITCH(NAME)                                                                        \
    static void NAME##_any(const struct panel_call *c, int rows)                                   \
    {                                                                                              \
        static void (*const heights[])(const struct panel_call *) = {                              \
            NAME##_1, NAME##_2, NAME##_3, NAME##_4,  NAME##_5,  NAME##_6,                          \
            NAME##_7, NAME##_8, NAME##_9, NAME##_10, NAME##_11, NAME##_12};                        \
        heights[rows - 1](c);                                                                      \
    }
