/* Between the projection and attention: norm of heads, rope on q and k, k and v into the cache.
 *
 * One warp a head of a token. A head is held in shared memory as F32; it comes and goes sixteen bytes
 * at a time. Rope:
 * Su et al., "RoFormer", section 3.4; the tables already hold any scaling of the context. */
#include "kernels/cuda/common.cuh"

enum { ROPE_WARPS = 8 };

struct rope_call {
    bf16 *qkv;
    int64_t stride;
    bool aligned;
    struct kv_layout kv;
    struct attention_args args;
    struct device_batch batch;
};

static __device__ __forceinline__ void head_norm(float *head, int dim, const float *weight, float epsilon, int lane)
{
    float sum = 0;
    for (int i = lane; i < dim; i += WARP_LANES) sum += head[i] * head[i];
    float by = 1.0f / sqrtf(warp_sum(sum) / dim + epsilon);
    for (int i = lane; i < dim; i += WARP_LANES) head[i] *= by * weight[i];
    __syncwarp();
}

static __device__ __forceinline__ void head_rotate(float *head, const struct attention_args &a, int position, int lane)
{
    int half = a.rotary_dim / 2;
    for (int i = lane; i < half; i += WARP_LANES) {
        int first = a.rope_pairs ? 2 * i : i, second = a.rope_pairs ? 2 * i + 1 : i + half;
        float c = a.rope_cos[(int64_t)position * half + i], s = a.rope_sin[(int64_t)position * half + i];
        float x = head[first], y = head[second];
        head[first] = x * c - y * s;
        head[second] = y * c + x * s;
    }
    __syncwarp();
}

/* Writes one row of K (which = 0) or V (which = 1) at the token's place in the cache. */
static __device__ void cache_write(const struct kv_layout &kv, const float *head, int which, int kv_head, int slot,
                                   int lane)
{
    int block = slot / kv.block_size, row = slot % kv.block_size, dim = kv.head_dim;
    uint8_t *base = (uint8_t *)kv.data + (size_t)block * kv.block_bytes;
    size_t first = ((size_t)which * kv.n_kv_heads + kv_head) * kv.block_size;
    if (kv.dtype == DTYPE_BF16) {
        bf16 *to = (bf16 *)base + first * dim;
        for (int i = lane * 8; i < dim; i += WARP_LANES * 8) store8(to + swizzled(dim, row, i / 8), head + i, 8, true);
        return;
    }
    float largest = 0;
    for (int i = lane; i < dim; i += WARP_LANES) largest = fmaxf(largest, fabsf(head[i]));
    float scale = warp_max(largest) / code_range(kv.dtype), inverse = code_inverse(scale);
    uint8_t *to = base + (first + row) * dim;
    for (int i = lane * 4; i < dim; i += WARP_LANES * 4) {
        uint32_t word = 0;
        for (int j = 0; j < 4; j++) word |= (uint32_t)code_of(head[i + j] * inverse, kv.dtype) << (j * 8);
        *(uint32_t *)(to + i) = word;
    }
    float *scales = (float *)(base + (size_t)2 * kv.n_kv_heads * kv.block_size * dim);
    if (lane == 0) scales[first + row] = scale;
}

/* grid (tokens, heads / 8) */
static __global__ void __launch_bounds__(ROPE_WARPS *WARP_LANES) qkv_prepare_kernel(struct rope_call c)
{
    dependency_wait();
    const struct attention_args &a = c.args;
    int token = blockIdx.x, warp = threadIdx.x / WARP_LANES, lane = threadIdx.x % WARP_LANES, dim = a.head_dim;
    int n_heads = a.n_heads + 2 * a.n_kv_heads, slot = c.batch.cache_slot[token];
    float *head = (float *)cuda_smem + warp * dim;
    int h = blockIdx.y * ROPE_WARPS + warp;
    if (h < n_heads) {
        bool is_q = h < a.n_heads, is_v = h >= a.n_heads + a.n_kv_heads;
        bf16 *row = c.qkv + token * c.stride + (int64_t)h * dim;
        for (int i = lane * 8; i < dim; i += WARP_LANES * 8) {
            float v[8];
            load8(v, row + i, 8, c.aligned);
            *(float4 *)(head + i) = {v[0], v[1], v[2], v[3]};
            *(float4 *)(head + i + 4) = {v[4], v[5], v[6], v[7]};
        }
        __syncwarp();
        const float *norm = is_q ? a.q_norm : is_v ? nullptr : a.k_norm;
        if (norm) head_norm(head, dim, norm, a.norm_epsilon, lane);
        if (a.rope_cos && !is_v) head_rotate(head, a, c.batch.positions[token], lane);
        if (is_q) {
            for (int i = lane * 8; i < dim; i += WARP_LANES * 8) store8(row + i, head + i, 8, c.aligned);
        } else if (slot >= 0) {
            cache_write(c.kv, head, is_v, (h - a.n_heads) % a.n_kv_heads, slot, lane);
        }
    }
}

int launch_qkv_prepare(struct tensor qkv, struct kv_layout kv, const struct attention_args *args,
                       const struct device_batch *batch, void *stream)
{
    struct rope_call c = {(bf16 *)qkv.data, qkv.stride, rows_aligned(qkv), kv, *args, *batch};
    unsigned heads = (unsigned)(args->n_heads + 2 * args->n_kv_heads);
    return LAUNCH(qkv_prepare_kernel, dim3((unsigned)qkv.rows, (heads + ROPE_WARPS - 1) / ROPE_WARPS), dim3(ROPE_WARPS * WARP_LANES),
                  ROPE_WARPS * args->head_dim * sizeof(float), stream, c);
}
