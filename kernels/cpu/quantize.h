/* Rows of activations into words: the parts that the files of the ISAs share. */
#pragma once
#include "kernels/cpu/cpu.h"

/* See quantize_kernel. int8 also takes inputs in the weight's own order, where it has one. */
void quantize_rows_f32(const struct activations *a, const float *x, int64_t stride, int64_t first,
                       int rows, uint32_t *words);
void quantize_rows_bf16(const struct activations *a, const float *x, int64_t stride, int64_t first,
                        int rows, uint32_t *words);
void quantize_rows_int8(const struct activations *a, const float *x, int64_t stride, int64_t first,
                        int rows, uint32_t *words);
/* The scale of a row whose largest magnitude has these bits, and its inverse (0 = all words zero).
 */
float quantize_scale(uint32_t max_bits, float *out_inverse);
