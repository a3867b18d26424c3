/* The product of gemm.cuh for BF16 weights, and that of many experts in any format. */
#include "kernels/cuda/gemm.cuh"

int launch_gemm(const struct gemm_call *call, void *stream) { return gemm_launch<GEMM_BF16>(call, stream); }

int launch_gemm_experts(const struct gemm_call *call, enum weight_format format, void *stream)
{
    switch (format) {
    case WEIGHT_BF16: return gemm_launch<GEMM_BF16>(call, stream);
    case WEIGHT_F16: return gemm_launch<GEMM_F16>(call, stream);
    case WEIGHT_INT8: return gemm_launch<GEMM_I8>(call, stream);
    case WEIGHT_FP8: return gemm_launch<GEMM_FP8>(call, stream);
    case WEIGHT_INT4: return gemm_launch<GEMM_INT4>(call, stream);
    case WEIGHT_INT4_GROUPS: return gemm_launch<GEMM_INT4_GROUPS>(call, stream);
    default: return cudaErrorInvalidValue;
    }
}
