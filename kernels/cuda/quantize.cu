/* Element by element: additions, scaling, and the ways in and out of 8 bits. */
#include "kernels/cuda/common.cuh"

/* One block a row: the codes of x and the row's scale. */
static __global__ void __launch_bounds__(256)
    quantize_kernel(const bf16 *x, int64_t x_stride, int cols, bool aligned, struct quantize_to to)
{
    dependency_wait();
    const bf16 *row = x + blockIdx.x * x_stride;
    uint8_t *codes = (uint8_t *)to.data + blockIdx.x * to.stride;
    float largest = 0;
    for (int i = threadIdx.x * 8; i < cols; i += blockDim.x * 8) {
        float v[8];
        load8(v, row + i, min(8, cols - i), aligned);
        for (int j = 0; j < 8; j++) largest = fmaxf(largest, fabsf(v[j]));
    }
    float scale = block_max(largest, (float *)cuda_smem) / code_range(to.dtype), inverse = code_inverse(scale);
    if (threadIdx.x == 0) to.scales[blockIdx.x] = scale;
    for (int i = threadIdx.x; i < (int)to.stride; i += blockDim.x)
        codes[i] = i < cols ? code_of(to_float(row[i]) * inverse, to.dtype) : 0;
}

int launch_quantize(struct tensor x, struct quantize_to quantize, void *stream)
{
    return LAUNCH(quantize_kernel, dim3((unsigned)x.rows), dim3(256), REDUCE_SCRATCH_BYTES, stream,
                  (const bf16 *)x.data, x.stride, (int)x.cols, rows_aligned(x), quantize);
}

static __global__ void __launch_bounds__(256)
    to_f16_kernel(__half *to, int64_t to_stride, const bf16 *x, int64_t x_stride, int cols)
{
    dependency_wait();
    int i = blockIdx.y * blockDim.x + threadIdx.x;
    if (i >= (int)to_stride) return;
    float v = i < cols ? to_float(x[blockIdx.x * x_stride + i]) : 0;
    to[blockIdx.x * to_stride + i] = __float2half_rn(fminf(fmaxf(v, -65504.0f), 65504.0f));
}

int launch_to_f16(void *to, int64_t to_stride, struct tensor x, void *stream)
{
    dim3 grid((unsigned)x.rows, (unsigned)((to_stride + 255) / 256));
    return LAUNCH(to_f16_kernel, grid, dim3(256), 0, stream, (__half *)to, to_stride, (const bf16 *)x.data, x.stride,
                  (int)x.cols);
}

template <class T, class R>
static __global__ void __launch_bounds__(256) rescale_kernel(T *out, int64_t out_stride, int cols, struct raw_product raw)
{
    dependency_wait();
    int c = blockIdx.y * blockDim.x + threadIdx.x;
    if (c >= cols) return;
    float v = (float)((const R *)raw.data)[blockIdx.x * raw.stride + c];
    if (raw.row_scale) v *= raw.row_scale[blockIdx.x];
    if (raw.col_scale) v *= raw.col_scale[c];
    if (raw.bias) v += raw.bias[c];
    from_float(out + blockIdx.x * out_stride + c, v);
}

template <class T, class R> static int rescale(struct tensor out, const struct raw_product *raw, void *stream)
{
    dim3 grid((unsigned)out.rows, (unsigned)((out.cols + 255) / 256));
    return LAUNCH((rescale_kernel<T, R>), grid, dim3(256), 0, stream, (T *)out.data, out.stride, (int)out.cols, *raw);
}

int launch_rescale(struct tensor out, const struct raw_product *raw, void *stream)
{
    bool f32 = out.dtype == DTYPE_F32;
    if (raw->dtype == DTYPE_I32)
        return f32 ? rescale<float, int32_t>(out, raw, stream) : rescale<bf16, int32_t>(out, raw, stream);
    return f32 ? rescale<float, float>(out, raw, stream) : rescale<bf16, float>(out, raw, stream);
}

template <class T>
static __global__ void __launch_bounds__(256) add_kernel(T *x, int64_t x_stride, const T *y, int64_t y_stride, int cols)
{
    dependency_wait();
    int c = blockIdx.y * blockDim.x + threadIdx.x;
    if (c >= cols) return;
    T *p = x + blockIdx.x * x_stride + c;
    from_float(p, to_float(*p) + to_float(y[blockIdx.x * y_stride + c]));
}

template <class T>
static __global__ void __launch_bounds__(256) scale_kernel(T *x, int64_t x_stride, int cols, float by, float softcap)
{
    dependency_wait();
    int c = blockIdx.y * blockDim.x + threadIdx.x;
    if (c >= cols) return;
    T *p = x + blockIdx.x * x_stride + c;
    float v = to_float(*p) * by;
    from_float(p, softcap > 0 ? softcap * tanhf(v / softcap) : v);
}

int launch_add(struct tensor x, struct tensor y, void *stream)
{
    dim3 grid((unsigned)x.rows, (unsigned)((x.cols + 255) / 256));
    if (x.dtype == DTYPE_F32)
        return LAUNCH(add_kernel<float>, grid, dim3(256), 0, stream, (float *)x.data, x.stride,
                      (const float *)y.data, y.stride, (int)x.cols);
    return LAUNCH(add_kernel<bf16>, grid, dim3(256), 0, stream, (bf16 *)x.data, x.stride, (const bf16 *)y.data,
                  y.stride, (int)x.cols);
}

int launch_scale(struct tensor x, float by, float softcap, void *stream)
{
    dim3 grid((unsigned)x.rows, (unsigned)((x.cols + 255) / 256));
    if (x.dtype == DTYPE_F32)
        return LAUNCH(scale_kernel<float>, grid, dim3(256), 0, stream, (float *)x.data, x.stride, (int)x.cols, by,
                      softcap);
    return LAUNCH(scale_kernel<bf16>, grid, dim3(256), 0, stream, (bf16 *)x.data, x.stride, (int)x.cols, by, softcap);
}
