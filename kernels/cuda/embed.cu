/* Rows by index: embeddings in, wanted rows out. Tables are BF16 [n_rows][cols]. Sixteen bytes at a
 * time where rows are aligned. */
#include "kernels/cuda/common.cuh"

static __global__ void __launch_bounds__(128)
    embed_kernel(bf16 *out, int64_t out_stride, const bf16 *table, int64_t n_rows, int cols, bool aligned, const int32_t *ids)
{
    dependency_wait();
    int64_t id = ids[blockIdx.x];
    bool known = id >= 0 && id < n_rows;
    for (int c = threadIdx.x * 8; c < cols; c += blockDim.x * 8) {
        int n = min(8, cols - c);
        float v[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        if (known) load8(v, table + id * cols + c, n, aligned);
        store8(out + blockIdx.x * out_stride + c, v, n, aligned);
    }
}

static __global__ void __launch_bounds__(128)
    add_positions_kernel(bf16 *x, int64_t x_stride, const bf16 *table, int64_t n_rows, int cols, bool aligned,
                         int offset, const int32_t *positions)
{
    dependency_wait();
    int64_t row = (int64_t)positions[blockIdx.x] + offset;
    if (row < 0 || row >= n_rows) return;
    for (int c = threadIdx.x * 8; c < cols; c += blockDim.x * 8) {
        int n = min(8, cols - c);
        float v[8], add[8];
        bf16 *p = x + blockIdx.x * x_stride + c;
        load8(v, p, n, aligned);
        load8(add, table + row * cols + c, n, aligned);
        for (int j = 0; j < 8; j++) v[j] += add[j];
        store8(p, v, n, aligned);
    }
}

/* Rows of any type, as 16-bit words, eight of them at once where rows are aligned. */
static __global__ void __launch_bounds__(128)
    gather_kernel(uint16_t *out, int64_t out_stride, const uint16_t *x, int64_t x_stride, int words, bool aligned,
                  const int32_t *rows)
{
    dependency_wait();
    const uint16_t *from = x + rows[blockIdx.x] * x_stride;
    uint16_t *to = out + blockIdx.x * out_stride;
    int whole = aligned ? words / 8 * 8 : 0;
    for (int c = threadIdx.x * 8; c < whole; c += blockDim.x * 8) *(uint4 *)(to + c) = *(const uint4 *)(from + c);
    for (int c = whole + threadIdx.x; c < words; c += blockDim.x) to[c] = from[c];
}

/* Whether rows of a table, and those of x, all begin at sixteen bytes. */
static bool all_aligned(struct tensor x, const void *table)
{
    return rows_aligned(x) && x.cols % 8 == 0 && (uintptr_t)table % 16 == 0;
}

int launch_embed(struct tensor out, const void *table, int64_t n_rows, const int32_t *ids, void *stream)
{
    return LAUNCH(embed_kernel, dim3((unsigned)out.rows), dim3(128), 0, stream, (bf16 *)out.data, out.stride,
                  (const bf16 *)table, n_rows, (int)out.cols, all_aligned(out, table), ids);
}

int launch_add_positions(struct tensor x, const void *table, int64_t n_rows, int offset, const int32_t *positions,
                         void *stream)
{
    return LAUNCH(add_positions_kernel, dim3((unsigned)x.rows), dim3(128), 0, stream, (bf16 *)x.data, x.stride,
                  (const bf16 *)table, n_rows, (int)x.cols, all_aligned(x, table), offset, positions);
}

int launch_gather(struct tensor out, struct tensor x, const int32_t *rows, void *stream)
{
    int64_t words = (int64_t)dtype_bytes(x.dtype) / 2;
    bool aligned = rows_aligned(out) && rows_aligned(x);
    return LAUNCH(gather_kernel, dim3((unsigned)out.rows), dim3(128), 0, stream, (uint16_t *)out.data,
                  out.stride * words, (const uint16_t *)x.data, x.stride * words, (int)(x.cols * words), aligned,
                  rows);
}
