/* Rows of activations into words: the parts that the files of the ISAs share. */
#pragma once
#include "kernels/cpu/cpu.h"

/* Packs one row into the lane words[step * rows]; row indexes row_scale and correction. */
void quantize_row_pack_f32(const struct activations *a, const float *x, int64_t row, int rows,
                           uint32_t *words);
void quantize_row_pack_bf16(const struct activations *a, const float *x, int64_t row, int rows,
                            uint32_t *words);
void quantize_row_pack_int8(const struct activations *a, const float *x, int64_t row, int rows,
                            uint32_t *words);
/* Whole panels of rows, AVX-512 and AVX-512 BF16. */
void words_pack_int8(const struct activations *a, const float *x, int64_t stride, int64_t row,
                     int rows, uint32_t *words);
void words_pack_bf16(const struct activations *a, const float *x, int64_t stride, int64_t row,
                     int rows, uint32_t *words);
void quantize_row_pack_ordered(const struct activations *a, const float *x, int64_t row, int rows,
                               uint32_t *words);
/* The scale of a row whose largest magnitude has these bits, and its inverse (0 = all words zero).
 */
float quantize_scale(uint32_t max_bits, float *out_inverse);
