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

/* out = v * row_scale * column_scale + bias, each where the format has it, never fused. */
ALWAYS_INLINE void result_store(const struct panel_call *c, int r, int half, __m512 v)
{
    if (c->row_scale) v = _mm512_mul_ps(v, _mm512_set1_ps(c->row_scale[r]));
    if (c->column_scale) v = _mm512_mul_ps(v, _mm512_loadu_ps(c->column_scale + 16 * half));
    if (c->bias) v = _mm512_add_ps(v, _mm512_loadu_ps(c->bias + 16 * half));
    _mm512_storeu_ps(c->out + r * c->out_stride + 16 * half, v);
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
        float *parked = c->scratch;                                                                \
        UNROLL for (int r = 0; r < rows; r++)                                                      \
        {                                                                                          \
            sum[r][0] = c->first ? _mm512_setzero_ps() : _mm512_loadu_ps(parked + r * 32);         \
            sum[r][1] = c->first ? _mm512_setzero_ps() : _mm512_loadu_ps(parked + r * 32 + 16);    \
        }                                                                                          \
        for (int64_t s = 0; s < c->n_steps; s += 2) {                                              \
            PREFETCH(c, ahead);                                                                    \
            STEP(weights, words);                                                                  \
            PREFETCH(c, ahead + c->prefetch_bytes);                                                \
            STEP(weights + (STEP_BYTES), words + rows);                                            \
            weights += 2 * (STEP_BYTES);                                                           \
            words += 2 * rows;                                                                     \
            ahead += 2 * c->prefetch_bytes;                                                        \
        }                                                                                          \
        UNROLL for (int r = 0; r < rows; r++)                                                      \
        {                                                                                          \
            if (c->last) {                                                                         \
                result_store(c, r, 0, sum[r][0]);                                                  \
                result_store(c, r, 1, sum[r][1]);                                                  \
            } else {                                                                               \
                _mm512_storeu_ps(parked + r * 32, sum[r][0]);                                      \
                _mm512_storeu_ps(parked + r * 32 + 16, sum[r][1]);                                 \
            }                                                                                      \
        }                                                                                          \
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
