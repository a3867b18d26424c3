/* Rows by index: embeddings in, wanted rows out. Tables are BF16 [n_rows][cols]. */
#include "kernels/cuda/common.cuh"

static __global__ void __launch_bounds__(128)
    embed_kernel(bf16 *out, int64_t out_stride, const bf16 *table, int64_t n_rows, int cols, const int32_t *ids)
{
    dependency_wait();
    int64_t id = ids[blockIdx.x];
    bool known = id >= 0 && id < n_rows;
    for (int c = threadIdx.x; c < cols; c += blockDim.x)
        from_float(out + blockIdx.x * out_stride + c, known ? to_float(table[id * cols + c]) : 0.0f);
}

static __global__ void __launch_bounds__(128)
    add_positions_kernel(bf16 *x, int64_t x_stride, const bf16 *table, int64_t n_rows, int cols, int offset,
                         const int32_t *positions)
{
    dependency_wait();
    int64_t row = (int64_t)positions[blockIdx.x] + offset;
    if (row < 0 || row >= n_rows) return;
    for (int c = threadIdx.x; c < cols; c += blockDim.x) {
        bf16 *p = x + blockIdx.x * x_stride + c;
        from_float(p, to_float(*p) + to_float(table[row * cols + c]));
    }
}

/* Rows of any type, as 16-bit words. */
static __global__ void __launch_bounds__(128)
    gather_kernel(uint16_t *out, int64_t out_stride, const uint16_t *x, int64_t x_stride, int words, const int32_t *rows)
{
    dependency_wait();
    const uint16_t *from = x + rows[blockIdx.x] * x_stride;
    for (int c = threadIdx.x; c < words; c += blockDim.x) out[blockIdx.x * out_stride + c] = from[c];
}

int launch_embed(struct tensor out, const void *table, int64_t n_rows, const int32_t *ids, void *stream)
{
    return LAUNCH(embed_kernel, dim3((unsigned)out.rows), dim3(128), 0, stream, (bf16 *)out.data, out.stride,
                  (const bf16 *)table, n_rows, (int)out.cols, ids);
}

int launch_add_positions(struct tensor x, const void *table, int64_t n_rows, int offset, const int32_t *positions,
                         void *stream)
{
    return LAUNCH(add_positions_kernel, dim3((unsigned)x.rows), dim3(128), 0, stream, (bf16 *)x.data, x.stride,
                  (const bf16 *)table, n_rows, (int)x.cols, offset, positions);
}

int launch_gather(struct tensor out, struct tensor x, const int32_t *rows, void *stream)
{
    int64_t words = (int64_t)dtype_bytes(x.dtype) / 2;
    return LAUNCH(gather_kernel, dim3((unsigned)out.rows), dim3(128), 0, stream, (uint16_t *)out.data,
                  out.stride * words, (const uint16_t *)x.data, x.stride * words, (int)(x.cols * words), rows);
}
