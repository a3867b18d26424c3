/* The product of gemm.cuh for BF16 weights, of one matrix or of many experts. */
#include "kernels/cuda/gemm.cuh"

int launch_gemm(const struct gemm_call *call, void *stream) { return gemm_launch<false>(call, stream); }
