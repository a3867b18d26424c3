/* The KV cache: its layout, writing a token, reading one element, moving blocks.
 *
 * For each layer and head the K of all blocks lies together, then the V of all blocks: a decode
 * step streams through neighbouring blocks without a gap. Within a piece tokens are grouped in
 * tiles of 16, so that a vector lane is a token in K and a dimension in V. Blocks shorter than 16
 * tokens are one tile each. See struct kv_cache. */
#include "base/mem.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/quantize.h"
#include "kernels/half.h"

#include <string.h>

enum { TILE_TOKENS = 16 };

static enum err kv_shape(const struct kv_cache_args *args, struct kv_cache *kv)
{
    if (args->dtype != DTYPE_F32 && args->dtype != DTYPE_F16 && args->dtype != DTYPE_BF16 &&
        args->dtype != DTYPE_I8)
        FAIL(ERR_UNSUPPORTED, "a KV cache of type %s is not supported on the CPU",
             dtype_name(args->dtype));
    if (args->block_size < 1 || args->block_size & (args->block_size - 1) ||
        args->block_size > 4096)
        FAIL(ERR_INVALID, "a KV block of %d tokens: not a power of two up to 4096",
             args->block_size);
    if (args->n_layers < 0 || args->n_kv_heads < 0 || args->head_dim < 1 ||
        args->head_dim > HEAD_DIM_MAX || args->n_blocks < 0)
        FAIL(ERR_INVALID, "a KV cache of %d layers, %d heads of %d, %d blocks", args->n_layers,
             args->n_kv_heads, args->head_dim, args->n_blocks);
    memset(kv, 0, sizeof *kv);
    kv->args = *args;
    kv->tile = args->block_size < TILE_TOKENS ? args->block_size : TILE_TOKENS;
    kv->pair = args->dtype == DTYPE_BF16 ? 2 : args->dtype == DTYPE_I8 ? 4 : 1;
    kv->v_pair = kv->pair < kv->tile ? kv->pair : kv->tile;
    kv->width = (args->head_dim + kv->pair - 1) / kv->pair * kv->pair;
    kv->element_bytes = (int)dtype_bytes(args->dtype);
    kv->tile_bytes = (size_t)(kv->tile * kv->width * kv->element_bytes);
    kv->scale_offset = kv->tile_bytes;
    if (args->dtype == DTYPE_I8) kv->tile_bytes += (size_t)kv->tile * sizeof(float);
    size_t half = (size_t)(args->block_size / kv->tile) * kv->tile_bytes;
    half = (half + 63) & ~(size_t)63;
    kv->half_bytes = half;
    if (!size_mul(half, (size_t)args->n_blocks, &kv->v_offset) ||
        !size_mul(kv->v_offset, 2 * (size_t)args->n_kv_heads, &kv->layer_bytes) ||
        !size_mul(kv->layer_bytes, (size_t)args->n_layers, &kv->bytes))
        FAIL(ERR_NO_MEMORY, "a KV cache of %d layers, %d blocks", args->n_layers, args->n_blocks);
    return OK;
}

size_t cpu_kv_bytes(struct backend *b, const struct kv_cache_args *args)
{
    struct kv_cache kv;
    (void)b;
    return kv_shape(args, &kv) ? 0 : kv.bytes;
}

enum err cpu_kv_create(struct backend *b, const struct kv_cache_args *args, struct kv_cache **out)
{
    struct kv_cache shape, *kv;
    TRY(kv_shape(args, &shape));
    TRY(MEM_NEW(&kv));
    *kv = shape;
    kv->rows = cpu_of(b)->rows;
    enum err e = mem_alloc_huge(kv->bytes, (void **)&kv->data);
    if (e) {
        mem_free(kv);
        return e;
    }
    kv_pages_begin(b, kv);
    *out = kv;
    return OK;
}

void cpu_kv_destroy(struct backend *b, struct kv_cache *kv)
{
    if (!kv) return;
    pool_quiesce(cpu_of(b)->pool);
    mem_free_huge(kv->data, kv->bytes);
    mem_free(kv);
}

/* Element index of dimension d of the token at offset in its block. */
static size_t k_index(const struct kv_cache *kv, int offset, int d)
{
    size_t tile = (size_t)(offset / kv->tile) * (kv->tile_bytes / (size_t)kv->element_bytes);
    return tile + (size_t)((d / kv->pair * kv->tile + offset % kv->tile) * kv->pair + d % kv->pair);
}

static size_t v_index(const struct kv_cache *kv, int offset, int d)
{
    size_t tile = (size_t)(offset / kv->tile) * (kv->tile_bytes / (size_t)kv->element_bytes);
    int in_tile = offset % kv->tile;
    return tile +
           (size_t)((in_tile / kv->v_pair * kv->width + d) * kv->v_pair + in_tile % kv->v_pair);
}

/* I8: the scale of a token; `half` is a block's K or V. */
static float *scale_at(const struct kv_cache *kv, const uint8_t *half, int offset)
{
    const uint8_t *tile = half + (size_t)(offset / kv->tile) * kv->tile_bytes;
    return (float *)(uintptr_t)(tile + kv->scale_offset) + offset % kv->tile;
}

static void element_write(const struct kv_cache *kv, uint8_t *base, size_t index, float x,
                          float inverse)
{
    uint16_t half;
    switch (kv->args.dtype) {
    case DTYPE_F32:
        memcpy(base + index * 4, &x, 4);
        return;
    case DTYPE_I8:
        base[index] = (uint8_t)(int8_t)((x * inverse + 12582912.0f) - 12582912.0f);
        return;
    case DTYPE_BF16:
        half = bf16_from_float(x);
        break;
    default:
        half = f16_from_float(x);
    }
    memcpy(base + index * 2, &half, 2);
}

/* The scale of one token's K or V in an I8 cache. */
static float token_scale(const float *x, int n, float *out_inverse)
{
    uint32_t max_bits = 0;
    for (int d = 0; d < n; d++) {
        uint32_t u = float_bits(x[d]) & 0x7fffffff;
        max_bits = u > max_bits ? u : max_bits;
    }
    return quantize_scale(max_bits, out_inverse);
}

/* Later tokens of the tile are read with weight 0; what an earlier owner of the block left in their
 * V must not be a NaN, for 0 * NaN is NaN. Scores of such tokens are replaced, so K may be
 * anything; of I8 only the scales can be a NaN. */
static void tile_clear_after(const struct kv_cache *kv, uint8_t *piece, int offset)
{
    int in_tile = offset % kv->tile, after = kv->tile - 1 - in_tile;
    if (kv->args.dtype == DTYPE_I8) {
        float *scale = scale_at(kv, piece + kv->v_offset, offset);
        memset(scale + 1, 0, (size_t)after * sizeof *scale);
        return;
    }
    if (kv->v_pair == 2 && in_tile % 2 == 0) {
        uint16_t *odd = (uint16_t *)(piece + kv->v_offset) + v_index(kv, offset, 0) + 1;
        for (int d = 0; d < kv->width; d++)
            odd[2 * d] = 0;
        after--;
    }
    size_t bytes = (size_t)after * (size_t)(kv->width * kv->element_bytes);
    size_t end = (size_t)(offset / kv->tile + 1) * (size_t)(kv->tile * kv->width);
    if (after > 0) memset(piece + kv->v_offset + end * (size_t)kv->element_bytes - bytes, 0, bytes);
}

/* BF16: a word of K is two dimensions of a token, V interleaves two tokens. */
static void write_bf16(const struct kv_cache *kv, uint8_t *piece, int offset, const float *k,
                       const float *v)
{
    _Alignas(64) uint16_t halves[HEAD_DIM_MAX + 2];
    uint32_t *k_words = (uint32_t *)(void *)piece + k_index(kv, offset, 0) / 2, word;
    uint16_t *to = (uint16_t *)(void *)(piece + kv->v_offset) + v_index(kv, offset, 0);
    int n = kv->args.head_dim;
    kv->rows->to_bf16(halves, k, n);
    halves[n] = 0;
    for (int d = 0; d < kv->width; d += 2, k_words += kv->tile) {
        memcpy(&word, halves + d, 4);
        *k_words = word;
    }
    kv->rows->to_bf16(halves, v, n);
    halves[n] = 0;
    for (int d = 0; d < kv->width; d++)
        to[d * kv->v_pair] = halves[d];
}

void kv_write(struct kv_cache *kv, int layer, int head, int32_t cache_slot, const float *k,
              const float *v, bool last)
{
    int size = kv->args.block_size, offset = cache_slot % size, n = kv->args.head_dim;
    ASSERT_CMP(cache_slot, >=, 0);
    ASSERT_CMP(cache_slot / size, <, kv->args.n_blocks);
    uint8_t *piece = kv_head(kv, layer, cache_slot / size, head);
    float k_inverse = 0, v_inverse = 0;
    if (kv->args.dtype == DTYPE_BF16) {
        write_bf16(kv, piece, offset, k, v);
        if (last) tile_clear_after(kv, piece, offset);
        return;
    }
    if (kv->args.dtype == DTYPE_I8) {
        *scale_at(kv, piece, offset) = token_scale(k, n, &k_inverse);
        *scale_at(kv, piece + kv->v_offset, offset) = token_scale(v, n, &v_inverse);
    }
    for (int d = 0; d < kv->width; d++) {
        element_write(kv, piece, k_index(kv, offset, d), d < n ? k[d] : 0, k_inverse);
        element_write(kv, piece + kv->v_offset, v_index(kv, offset, d), d < n ? v[d] : 0,
                      v_inverse);
    }
    if (last) tile_clear_after(kv, piece, offset);
}

static float element_read(const struct kv_cache *kv, const uint8_t *base, size_t index)
{
    if (kv->args.dtype == DTYPE_I8) return (float)(int8_t)base[index];
    return load_float(base + index * (size_t)kv->element_bytes, kv->args.dtype);
}

float kv_read_k(const struct kv_cache *kv, const uint8_t *piece, int offset, int d)
{
    float x = element_read(kv, piece, k_index(kv, offset, d));
    return kv->args.dtype == DTYPE_I8 ? x * *scale_at(kv, piece, offset) : x;
}

float kv_read_v(const struct kv_cache *kv, const uint8_t *piece, int offset, int d)
{
    float x = element_read(kv, piece + kv->v_offset, v_index(kv, offset, d));
    if (kv->args.dtype != DTYPE_I8) return x;
    return x * *scale_at(kv, piece + kv->v_offset, offset);
}

/* Copies a block of all layers and heads between the cache and a buffer [layers][heads][K, V]. */
static void block_move(const struct kv_cache *kv, int32_t block, uint8_t *host, bool save)
{
    ASSERT(block >= 0 && block < kv->args.n_blocks);
    for (int layer = 0; layer < kv->args.n_layers; layer++)
        for (int head = 0; head < kv->args.n_kv_heads; head++)
            for (int half = 0; half < 2; half++, host += kv->half_bytes) {
                uint8_t *at = kv_head(kv, layer, block, head) + (half ? kv->v_offset : 0);
                memcpy(save ? host : at, save ? at : host, kv->half_bytes);
            }
}

void cpu_kv_copy(struct backend *b, struct kv_cache *kv, const int32_t *src, const int32_t *dst,
                 int n)
{
    (void)b;
    for (int i = 0; i < n; i++) {
        ASSERT(src[i] >= 0 && src[i] < kv->args.n_blocks && dst[i] >= 0 &&
               dst[i] < kv->args.n_blocks);
        for (int layer = 0; src[i] != dst[i] && layer < kv->args.n_layers; layer++)
            for (int head = 0; head < kv->args.n_kv_heads; head++) {
                uint8_t *to = kv_head(kv, layer, dst[i], head);
                const uint8_t *from = kv_head(kv, layer, src[i], head);
                memcpy(to, from, kv->half_bytes);
                memcpy(to + kv->v_offset, from + kv->v_offset, kv->half_bytes);
            }
    }
}

void cpu_kv_save(struct backend *b, struct kv_cache *kv, int32_t block, void *host)
{
    (void)b;
    block_move(kv, block, host, true);
}

void cpu_kv_load(struct backend *b, struct kv_cache *kv, int32_t block, const void *host)
{
    (void)b;
    block_move(kv, block, (uint8_t *)(uintptr_t)host, false);
}
