/* Attention in 512-bit vectors for every cache type; BF16 here without its dot product. */
#define LANES_HEADER "kernels/cpu/lanes_avx512.h"
#include "kernels/cpu/attention_lanes.h"

CHUNK_KERNEL_8(chunk_f32, scores_f32, softmax_row, values_f32)
CHUNK_KERNEL_8(chunk_f16, scores_f16, softmax_row, values_f16)
CHUNK_KERNEL_8(chunk_bf16, scores_widened, softmax_row, values_widened)
CHUNK_KERNEL_8(chunk_i8, scores_i8, softmax_row, values_i8)

const struct attention_kernels attention_avx512 = {
    .chunk = {[DTYPE_F32] = chunk_f32,
              [DTYPE_F16] = chunk_f16,
              [DTYPE_BF16] = chunk_bf16,
              [DTYPE_I8] = chunk_i8},
    .rows_max = {[DTYPE_F32] = 8, [DTYPE_F16] = 8, [DTYPE_BF16] = 8, [DTYPE_I8] = 8},
};
