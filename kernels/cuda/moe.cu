/* Mixture of experts: who works on which token, and what comes of it. The products between are
 * gemm.cuh's, grouped. All grids depend on the number of rows alone, so a graph can hold them. */
#include "kernels/cuda/common.cuh"

/* One warp a row: top_k times the largest score that is left, ties to the lower expert; then their
 * share of the softmax, of all scores or of the chosen. NaN counts as the least. */
static __global__ void __launch_bounds__(WARP_LANES)
    moe_route_kernel(float *weights, int32_t *experts, const float *scores, int64_t stride, int n, int top_k,
                     bool renormalize)
{
    dependency_wait();
    int row = blockIdx.x, lane = threadIdx.x;
    const float *from = scores + row * stride;
    float *left = (float *)cuda_smem, all = 0, chosen = 0, first = 0, mine = 0;
    for (int i = lane; i < n; i += WARP_LANES) left[i] = from[i] == from[i] ? from[i] : -INFINITY;
    for (int k = 0; k < top_k; k++) { /* a lane looks at its own scores alone */
        float best = -INFINITY;
        int at = n;
        for (int i = lane; i < n; i += WARP_LANES)
            if (left[i] > best) best = left[i], at = i;
        for (int d = 16; d; d >>= 1) {
            float other = __shfl_xor_sync(FULL_WARP, best, d);
            int other_at = __shfl_xor_sync(FULL_WARP, at, d);
            if (other > best || (other == best && other_at < at)) best = other, at = other_at;
        }
        if (k == 0) first = at < n ? best : 0;
        float weight = at < n ? __expf(best - first) : 0;
        if (lane == 0) experts[row * top_k + k] = at < n ? at : k; /* nothing but -inf is left: weight 0 */
        if (lane == k) mine = weight;
        if (at < n && at % WARP_LANES == lane) left[at] = -INFINITY;
        chosen += weight;
    }
    for (int i = lane; i < n && !renormalize; i += WARP_LANES) all += from[i] == from[i] ? __expf(from[i] - first) : 0;
    all = renormalize ? chosen : warp_sum(all);
    if (lane < top_k) weights[row * top_k + lane] = all > 0 ? mine / all : 0;
}

int launch_moe_route(float *weights, int32_t *experts, struct tensor scores, int top_k, bool renormalize, void *stream)
{
    if (top_k > WARP_LANES) return cudaErrorInvalidValue;
    return LAUNCH(moe_route_kernel, dim3((unsigned)scores.rows), dim3(WARP_LANES), scores.cols * sizeof(float), stream,
                  weights, experts, (const float *)scores.data, scores.stride, (int)scores.cols, top_k, renormalize);
}

enum { SORT_THREADS = 1024 };

/* One block counts, sums up, and hands out places. count: [n_experts] in shared memory. */
static __global__ void __launch_bounds__(SORT_THREADS)
    moe_sort_kernel(const int32_t *experts, int n, int n_experts, int32_t *offsets, int32_t *rows_of)
{
    dependency_wait();
    int *count = (int *)cuda_smem, tid = threadIdx.x;
    for (int e = tid; e < n_experts; e += SORT_THREADS) count[e] = 0;
    __syncthreads();
    for (int i = tid; i < n; i += SORT_THREADS) atomicAdd(&count[experts[i]], 1);
    __syncthreads();
    if (tid < WARP_LANES) { /* each lane sums its share of the experts */
        int each = (n_experts + WARP_LANES - 1) / WARP_LANES, first = min(n_experts, tid * each);
        int end = min(n_experts, first + each), mine = 0;
        for (int e = first; e < end; e++) mine += count[e];
        int at = mine;
        for (int d = 1; d < WARP_LANES; d <<= 1) {
            int other = __shfl_up_sync(FULL_WARP, at, d);
            if (tid >= d) at += other;
        }
        at -= mine;
        for (int e = first; e < end; e++) {
            int here = count[e];
            offsets[e] = count[e] = at;
            at += here;
        }
        if (tid == WARP_LANES - 1) offsets[n_experts] = at;
    }
    __syncthreads();
    for (int i = tid; i < n; i += SORT_THREADS) rows_of[atomicAdd(&count[experts[i]], 1)] = i;
}

int launch_moe_sort(const int32_t *experts, int n, int n_experts, int32_t *offsets, int32_t *rows_of, void *stream)
{
    return LAUNCH(moe_sort_kernel, dim3(1), dim3(SORT_THREADS), n_experts * sizeof(int), stream, experts, n, n_experts,
                  offsets, rows_of);
}

/* grid (rows, columns / 1024): four neighbours a thread; the experts in the order of their choice. */
static __global__ void __launch_bounds__(256)
    moe_combine_kernel(bf16 *out, int64_t out_stride, int cols, const float *y, int64_t y_stride, const float *weights,
                       int top_k)
{
    dependency_wait();
    int64_t row = blockIdx.x;
    int c = (blockIdx.y * blockDim.x + threadIdx.x) * 4, n = min(4, cols - c);
    float sum[4] = {0, 0, 0, 0};
    for (int k = 0; k < top_k && n > 0; k++) {
        const float *from = y + (row * top_k + k) * y_stride + c; /* y_stride is a multiple of 4 */
        float4 v = *(const float4 *)from;
        float by = weights[row * top_k + k];
        if (by == 0) continue; /* an expert of no weight may have overflowed */
        sum[0] += by * v.x, sum[1] += by * v.y, sum[2] += by * v.z, sum[3] += by * v.w;
    }
    for (int j = 0; j < n; j++) from_float(out + row * out_stride + c + j, sum[j]);
}

int launch_moe_combine(struct tensor out, const float *y, int64_t y_stride, const float *weights, int top_k, void *stream)
{
    dim3 grid((unsigned)out.rows, (unsigned)((out.cols + 1023) / 1024));
    return LAUNCH(moe_combine_kernel, grid, dim3(256), 0, stream, (bf16 *)out.data, out.stride, (int)out.cols, y,
                  y_stride, weights, top_k);
}
