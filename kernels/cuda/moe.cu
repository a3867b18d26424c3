/* Mixture of experts: who works on which token. The products themselves are gemm.cuh's, grouped. */
#include "kernels/cuda/common.cuh"

/* One warp a row: top_k times the largest score that is left, ties to the lower expert. */
static __global__ void __launch_bounds__(WARP_LANES)
    moe_route_kernel(struct tensor weights, struct tensor experts, struct tensor scores, int top_k, bool renormalize)
{
    int row = blockIdx.x, lane = threadIdx.x, n = (int)scores.cols;
    const float *from = (const float *)scores.data + row * scores.stride;
    float *left = (float *)cuda_smem, *weight = (float *)weights.data + row * weights.stride, total = 0;
    int32_t *expert = (int32_t *)experts.data + row * experts.stride;
    for (int i = lane; i < n; i += WARP_LANES) left[i] = from[i];
    __syncwarp();
    for (int k = 0; k < top_k; k++) {
        float best = -INFINITY;
        int at = n;
        for (int i = lane; i < n; i += WARP_LANES)
            if (left[i] > best) best = left[i], at = i;
        for (int d = 16; d; d >>= 1) {
            float other = __shfl_xor_sync(FULL_WARP, best, d);
            int other_at = __shfl_xor_sync(FULL_WARP, at, d);
            if (other > best || (other == best && other_at < at)) best = other, at = other_at;
        }
        if (at == n) at = 0, best = 0; /* nothing but -inf and NaN is left */
        if (lane == 0) expert[k] = at, weight[k] = best, left[at] = -INFINITY;
        total += best;
        __syncwarp();
    }
    if (renormalize && lane < top_k && total > 0) /* top_k is at most a warp */
        weight[lane] /= total;
}

int launch_moe_route(struct tensor weights, struct tensor experts, struct tensor scores, int top_k,
                     bool renormalize, void *stream)
{
    if (top_k > WARP_LANES) return cudaErrorInvalidValue;
    return LAUNCH(moe_route_kernel, dim3((unsigned)scores.rows), dim3(WARP_LANES), scores.cols * sizeof(float), stream,
                  weights, experts, scores, top_k, renormalize);
}

/* One block; thread e counts expert e's entries, the offsets follow, then it lists them in order. */
static __global__ void __launch_bounds__(1024)
    moe_sort_kernel(const int32_t *experts, int n, int n_experts, int32_t *offsets, int32_t *rows_of)
{
    int *counts = (int *)cuda_smem, mine = threadIdx.x, n_mine = 0;
    for (int i = 0; i < n && mine < n_experts; i++) n_mine += experts[i] == mine;
    if (mine < n_experts) counts[mine] = n_mine;
    __syncthreads();
    if (mine >= n_experts) return;
    int at = 0;
    for (int e = 0; e < mine; e++) at += counts[e];
    offsets[mine] = at;
    if (mine == n_experts - 1) offsets[n_experts] = at + n_mine;
    for (int i = 0; i < n; i++)
        if (experts[i] == mine) rows_of[at++] = i;
}

int launch_moe_sort(const int32_t *experts, int n, int n_experts, int32_t *offsets, int32_t *rows_of, void *stream)
{
    if (n_experts > 1024) return cudaErrorInvalidValue;
    return LAUNCH(moe_sort_kernel, dim3(1), dim3((unsigned)((n_experts + 31) / 32 * 32)), n_experts * sizeof(int), stream,
                  experts, n, n_experts, offsets, rows_of);
}
