/* Tensors as the kernels see them: memory on one device, a type, and a shape.
 *
 * A tensor is a view; it owns nothing. Rows are tokens; the last dimension is contiguous. */
#pragma once
#include <stddef.h>
#include <stdint.h>

enum dtype { DTYPE_F32, DTYPE_F16, DTYPE_BF16, DTYPE_I32, DTYPE_I8, DTYPE_FP8_E4M3, DTYPE_COUNT };

static inline size_t dtype_bytes(enum dtype t)
{
    static const unsigned char bytes[DTYPE_COUNT] = {4, 2, 2, 4, 1, 1};
    return bytes[t];
}
const char *dtype_name(enum dtype t);

/* Activations: [rows][cols], row i at data + i * stride elements. */
struct tensor {
    void *data;
    enum dtype dtype;
    int64_t rows, cols, stride;
};

/* A matrix in host memory as a checkpoint stores it: element (r, c) lies at
 * data + (r * row_stride + c * col_stride) * dtype_bytes(dtype). A transposed weight, or the slice
 * of a rank, is only another view; nothing is copied until the backend packs it. */
struct matrix_view {
    const void *data; /* NULL = zeros */
    enum dtype dtype; /* F32, F16 or BF16 */
    int64_t rows, cols, row_stride, col_stride;
};
