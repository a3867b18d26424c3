/* A stand-in of cuBLASLt: products by plain loops, run when the stream comes to them.
 *
 * It refuses what the library documents as refused: A not transposed, strides that are not multiples
 * of 16 bytes, 8-bit sizes that are not multiples of 16 (FP8) or 4 (INT8), mixed types, and the
 * outer-vector scale mode below and above sm_90. HEDDLE_FAKE_GPU "lt_outer=0" refuses that mode. */
#include "cuda_emu.h"

#include "cublasLt.h"

struct lt_handle {
    int unused;
};
struct lt_preference {
    int unused;
};
struct lt_layout {
    cudaDataType_t type;
    uint64_t rows, cols;
    int64_t stride;
};
struct lt_desc {
    cublasComputeType_t compute;
    cublasOperation_t transposed;
    cublasLtEpilogue_t epilogue;
    const void *bias, *a_scale, *b_scale;
    cudaDataType_t bias_type;
    cublasLtMatmulMatrixScale_t a_mode, b_mode;
};

/* Everything of one product by value: descriptors may change before the stream comes to it. */
struct product {
    struct lt_desc desc;
    struct lt_layout a, b, d;
    const void *A, *B;
    void *D;
};

static size_t type_bytes(cudaDataType_t t)
{
    return t == CUDA_R_32F || t == CUDA_R_32I ? 4 : t == CUDA_R_8I || t == CUDA_R_8F_E4M3 ? 1 : 2;
}

static float get(const void *p, cudaDataType_t t, int64_t i)
{
    switch (t) {
    case CUDA_R_32F: return ((const float *)p)[i];
    case CUDA_R_16F: return __half2float(((const __half *)p)[i]);
    case CUDA_R_16BF: return __bfloat162float(((const __nv_bfloat16 *)p)[i]);
    case CUDA_R_8I: return (float)((const int8_t *)p)[i];
    default: return emu_fp8_decode(((const uint8_t *)p)[i]);
    }
}

static void put(void *p, cudaDataType_t t, int64_t i, float v)
{
    switch (t) {
    case CUDA_R_32F: ((float *)p)[i] = v; break;
    case CUDA_R_16F: ((__half *)p)[i] = __float2half_rn(v); break;
    default: ((__nv_bfloat16 *)p)[i] = __float2bfloat16_rn(v);
    }
}

static void multiply_whole(const product &x)
{
    for (uint64_t n = 0; n < x.d.cols; n++)
        for (uint64_t m = 0; m < x.d.rows; m++) {
            const int8_t *a = (const int8_t *)x.A + (int64_t)m * x.a.stride, *b = (const int8_t *)x.B + (int64_t)n * x.b.stride;
            int32_t sum = 0;
            for (uint64_t k = 0; k < x.a.rows; k++) sum += a[k] * b[k];
            ((int32_t *)x.D)[(int64_t)n * x.d.stride + (int64_t)m] = sum;
        }
}

static void multiply(const product &x)
{
    if (x.desc.compute == CUBLAS_COMPUTE_32I) return multiply_whole(x);
    uint64_t depth = x.a.rows;
    std::vector<float> a(depth * x.d.rows), b(depth);
    for (uint64_t m = 0; m < x.d.rows; m++)
        for (uint64_t k = 0; k < depth; k++) a[m * depth + k] = get(x.A, x.a.type, (int64_t)m * x.a.stride + (int64_t)k);
    for (uint64_t n = 0; n < x.d.cols; n++) {
        for (uint64_t k = 0; k < depth; k++) b[k] = get(x.B, x.b.type, (int64_t)n * x.b.stride + (int64_t)k);
        for (uint64_t m = 0; m < x.d.rows; m++) {
            float sum = 0;
            for (uint64_t k = 0; k < depth; k++) sum += a[m * depth + k] * b[k];
            if (x.desc.a_mode) sum *= ((const float *)x.desc.a_scale)[m] * ((const float *)x.desc.b_scale)[n];
            if (x.desc.epilogue == CUBLASLT_EPILOGUE_BIAS) sum += get(x.desc.bias, x.desc.bias_type, (int64_t)m);
            put(x.D, x.d.type, (int64_t)n * x.d.stride + (int64_t)m, sum);
        }
    }
}

static bool supported(const lt_desc *desc, const lt_layout *a, const lt_layout *b, const lt_layout *d)
{
    uint64_t unit = a->type == CUDA_R_8F_E4M3 ? 16 : a->type == CUDA_R_8I ? 4 : 1;
    if (desc->transposed != CUBLAS_OP_T || a->type != b->type || a->rows != b->rows) return false;
    if (d->rows != a->cols || d->cols != b->cols || !a->rows || !a->cols) return false;
    if (a->rows % unit || a->cols % unit || (uint64_t)d->stride < d->rows) return false;
    if ((uint64_t)a->stride < a->rows || (uint64_t)b->stride < b->rows) return false;
    if ((a->type == CUDA_R_8I) != (desc->compute == CUBLAS_COMPUTE_32I && d->type == CUDA_R_32I)) return false;
    if (a->type == CUDA_R_16F && d->type == CUDA_R_16BF) return false;
    if (a->type == CUDA_R_16BF && d->type == CUDA_R_16F) return false;
    if (desc->a_mode != desc->b_mode) return false;
    if (desc->epilogue == CUBLASLT_EPILOGUE_BIAS && desc->bias_type != d->type) return false;
    if (!desc->a_mode) return true;
    return emu_setting("sm", 90) == 90 && emu_setting("lt_outer", 1) && a->type == CUDA_R_8F_E4M3;
}

extern "C" {
cublasStatus_t cublasLtCreate(cublasLtHandle_t *out)
{
    *out = new lt_handle{};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle)
{
    delete handle;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *out, cublasComputeType_t compute, cudaDataType_t)
{
    *out = new lt_desc{compute, CUBLAS_OP_N, CUBLASLT_EPILOGUE_DEFAULT, nullptr, nullptr, nullptr, CUDA_R_32F,
                       CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F, CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t desc)
{
    delete desc;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t a,
                                              const void *value, size_t bytes)
{
    void *to = nullptr;
    size_t size = 4;
    switch (a) {
    case CUBLASLT_MATMUL_DESC_TRANSA: to = &desc->transposed; break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE: to = &desc->epilogue; break;
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: to = &desc->bias, size = 8; break;
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: to = &desc->bias_type; break;
    case CUBLASLT_MATMUL_DESC_A_SCALE_POINTER: to = &desc->a_scale, size = 8; break;
    case CUBLASLT_MATMUL_DESC_B_SCALE_POINTER: to = &desc->b_scale, size = 8; break;
    case CUBLASLT_MATMUL_DESC_A_SCALE_MODE: to = &desc->a_mode; break;
    case CUBLASLT_MATMUL_DESC_B_SCALE_MODE: to = &desc->b_mode; break;
    }
    if (!to || bytes != size) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(to, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *out, cudaDataType_t type, uint64_t rows,
                                          uint64_t cols, int64_t stride)
{
    *out = new lt_layout{type, rows, cols, stride};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout)
{
    delete layout;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t a,
                                                const void *value, size_t bytes)
{
    if (bytes != 8) return CUBLAS_STATUS_INVALID_VALUE;
    memcpy(a == CUBLASLT_MATRIX_LAYOUT_COLS ? (void *)&layout->cols : (void *)&layout->stride, value, bytes);
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *out)
{
    *out = new lt_preference{};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference)
{
    delete preference;
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t, cublasLtMatmulPreferenceAttributes_t,
                                                    const void *, size_t)
{
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t desc, cublasLtMatrixLayout_t a,
                                              cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t, int wanted,
                                              cublasLtMatmulHeuristicResult_t *out, int *out_n)
{
    *out_n = 0;
    if (!supported(desc, a, b, d)) return CUBLAS_STATUS_NOT_SUPPORTED;
    for (; *out_n < std::min(wanted, 1); ++*out_n) out[*out_n] = {};
    return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t desc, const void *, const void *A,
                              cublasLtMatrixLayout_t a, const void *B, cublasLtMatrixLayout_t b, const void *,
                              const void *, cublasLtMatrixLayout_t, void *D, cublasLtMatrixLayout_t d,
                              const cublasLtMatmulAlgo_t *, void *, size_t, cudaStream_t stream)
{
    if (!supported(desc, a, b, d)) return CUBLAS_STATUS_NOT_SUPPORTED;
    size_t misaligned = (uintptr_t)A % 16 | (uintptr_t)B % 16 | (uintptr_t)D % 16 | (b->stride * type_bytes(b->type)) % 16 |
                        (d->cols > 1 ? d->stride * type_bytes(d->type) % 16 : 0);
    if (misaligned) return CUBLAS_STATUS_NOT_SUPPORTED;
    product x{*desc, *a, *b, *d, A, B, D};
    emu_stream_call(stream, [](void *p) { multiply(*(const product *)p); }, &x, sizeof x);
    return CUBLAS_STATUS_SUCCESS;
}
}
