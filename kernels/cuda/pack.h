/* Weights as the device stores them, made on the host from a checkpoint's views. */
#pragma once
#include "kernels/backend.h"

uint16_t pack_f16(float v);
uint16_t pack_bf16(float v);
uint8_t pack_fp8(float v); /* E4M3, saturating */
float unpack_f16(uint16_t v);
/* Row r of a view as F32 [view->cols]; zeros where the view has no data. */
void pack_row_read(const struct matrix_view *view, int64_t r, float *out);
/* One row [n_in] into codes [n_in_padded], the rest zero. Returns the row's scale. */
float pack_row_int8(const float *row, int64_t n_in, int64_t n_in_padded, uint8_t *codes);
float pack_row_fp8(const float *row, int64_t n_in, int64_t n_in_padded, uint8_t *codes);
/* Two codes to a byte, low half first, code 8 = 0; an f16 scale for each 128 inputs. */
void pack_row_int4(const float *row, int64_t n_in, int64_t n_in_padded, uint8_t *codes,
                   uint16_t *scales);
