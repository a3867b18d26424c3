/* Whole blocks of the cache from place to place, all layers: the copy on write of forked sequences. */
#include "kernels/cuda/common.cuh"

/* grid (pairs, layers). Blocks are multiples of 16 bytes. */
static __global__ void __launch_bounds__(256)
    kv_copy_kernel(uint8_t *data, size_t block_bytes, size_t layer_bytes, struct kv_pairs pairs)
{
    dependency_wait();
    uint8_t *layer = data + blockIdx.y * layer_bytes;
    const uint4 *from = (const uint4 *)(layer + (size_t)pairs.from[blockIdx.x] * block_bytes);
    uint4 *to = (uint4 *)(layer + (size_t)pairs.to[blockIdx.x] * block_bytes);
    for (size_t i = threadIdx.x; i < block_bytes / 16; i += blockDim.x) to[i] = from[i];
}

int launch_kv_copy(void *data, size_t block_bytes, size_t layer_bytes, int n_layers, const struct kv_pairs *pairs,
                   void *stream)
{
    return LAUNCH(kv_copy_kernel, dim3((unsigned)pairs->n, (unsigned)n_layers), dim3(256), 0, stream, (uint8_t *)data,
                  block_bytes, layer_bytes, *pairs);
}
