/* Paged causal attention of sequences with many rows: prefill in chunks of any size.
 *
 * A tile is 128 rows, and a row one head of one token: the heads that share a kv head lie side by
 * side, so keys and values are read once for all of them. Eight warps, 16 rows each; keys in tiles
 * of 64 (32 for wide heads), the next one on its way by cp.async while this one is worked on. A warp
 * rests while keys go by that none of its rows may see. The host lists the tiles, longest first. Dao: "FlashAttention-2: Faster attention with better
 * parallelism and work partitioning". */
#include "kernels/cuda/attention.cuh"

enum { PREFILL_WARPS = PREFILL_ROWS / 16, PREFILL_THREADS = PREFILL_WARPS * WARP_LANES };

template <int DIM> struct prefill_shape {
    static constexpr int KEYS = DIM > 128 ? 32 : 64, TILE = KEYS * DIM; /* elements of K, or of V */
    static constexpr int QUERY_BYTES = PREFILL_ROWS * DIM * 2, SCALE_BYTES = 2 * 2 * KEYS * 4;
    static constexpr int SMEM_BYTES = QUERY_BYTES + 2 * 2 * TILE * 2 + SCALE_BYTES;
};

struct prefill_work {
    struct head_range heads;
    int first_token, n_tokens, len, row_first, token_last; /* the last token of the tile, in the sequence */
    const int32_t *table;
};

static __device__ __forceinline__ bool prefill_work_find(const struct attend_call &c, struct prefill_work *w)
{
    int seq = c.batch.tiles[blockIdx.x * 2];
    w->row_first = c.batch.tiles[blockIdx.x * 2 + 1] * PREFILL_ROWS;
    w->first_token = c.batch.seq_start[seq];
    w->n_tokens = c.batch.seq_start[seq + 1] - w->first_token;
    w->heads = heads_of(c.args, blockIdx.y);
    if (w->row_first >= w->n_tokens * w->heads.n) return false;
    w->len = c.batch.context_len[seq];
    w->token_last = min(w->n_tokens - 1, (w->row_first + PREFILL_ROWS - 1) / w->heads.n);
    w->table = c.batch.block_table + (int64_t)seq * c.batch.shape->blocks_stride;
    return true;
}

/* Row r of the tile: where its query lies in a row of q, or of out; negative when there is none. */
static __device__ __forceinline__ int row_token(const struct prefill_work &w, int r)
{
    int token = (w.row_first + r) / w.heads.n;
    return token < w.n_tokens ? token : -1;
}
static __device__ __forceinline__ int row_head(const struct prefill_work &w, int r)
{
    return w.heads.first + (w.row_first + r) % w.heads.n;
}

template <int DIM>
static __device__ __forceinline__ void queries_load(const struct attend_call &c, const struct prefill_work &w, bf16 *q)
{
    const bf16 *qkv = (const bf16 *)c.qkv.data;
    for (int i = threadIdx.x; i < PREFILL_ROWS * (DIM / 8); i += PREFILL_THREADS) {
        int row = i / (DIM / 8), chunk = i % (DIM / 8), token = row_token(w, row);
        const bf16 *from =
            token < 0 ? qkv : qkv + (int64_t)(w.first_token + token) * c.qkv.stride + row_head(w, row) * DIM + chunk * 8;
        cp_async16_or_zero(q + swizzled(DIM, row, chunk), from, token >= 0);
    }
}

/* Starts the copy of one tile; keys behind the end become zeros. */
template <int DIM>
static __device__ __forceinline__ void keys_load(const struct attend_call &c, const struct prefill_work &w, int tile, bf16 *k)
{
    typedef prefill_shape<DIM> shape;
    for (int i = threadIdx.x; i < shape::KEYS * (DIM / 8); i += PREFILL_THREADS) {
        int row = i / (DIM / 8), chunk = i % (DIM / 8), token = tile * shape::KEYS + row;
        bool take = token < w.len;
        int at = take ? token : 0, offset = at % c.kv.block_size;
        struct block_rows from = rows_at(c.kv, w.table[at / c.kv.block_size], blockIdx.y, offset, 2);
        cp_async16_or_zero(k + row * DIM + chunk * 8, from.k + chunk * 16, take); /* as stored: swizzled */
        cp_async16_or_zero(k + shape::TILE + row * DIM + chunk * 8, from.v + chunk * 16, take);
    }
}

/* The same of an 8-bit cache: codes are widened on their way, at once. */
template <int DIM>
static __device__ __forceinline__ void codes_load(const struct attend_call &c, const struct prefill_work &w, int tile,
                                                  bf16 *k, float *scales)
{
    typedef prefill_shape<DIM> shape;
    const uint4 none = {0, 0, 0, 0};
    for (int i = threadIdx.x; i < shape::KEYS * (DIM / 16); i += PREFILL_THREADS) {
        int row = i / (DIM / 16), chunk = i % (DIM / 16), token = tile * shape::KEYS + row;
        bool take = token < w.len;
        int at = take ? token : 0, offset = at % c.kv.block_size;
        struct block_rows from = rows_at(c.kv, w.table[at / c.kv.block_size], blockIdx.y, offset, 1);
        widen16<DIM>(k, row, chunk * 2, take ? *(const uint4 *)(from.k + chunk * 16) : none, c.kv.dtype);
        widen16<DIM>(k + shape::TILE, row, chunk * 2, take ? *(const uint4 *)(from.v + chunk * 16) : none, c.kv.dtype);
        if (chunk == 0) {
            scales[row] = take ? *from.k_scales : 0.0f;
            scales[shape::KEYS + row] = take ? *from.v_scales : 0.0f;
        }
    }
}

template <int DIM>
static __device__ __forceinline__ void rows_write(const struct attend_call &c, const struct prefill_work &w,
                                                  const float (&o)[DIM / 8][4], const float (&l)[2])
{
    int warp = threadIdx.x / WARP_LANES, lane = threadIdx.x % WARP_LANES;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = warp * 16 + lane / 4 + r * 8, token = row_token(w, row);
        float sum = quad_sum(l[r]), by = sum > 0 ? 1.0f / sum : 0.0f;
        if (token < 0) continue;
        bf16 *out = (bf16 *)c.out.data + (int64_t)(w.first_token + token) * c.out.stride + row_head(w, row) * DIM;
#pragma unroll
        for (int i = 0; i < DIM / 8; i++)
            *(uint32_t *)(out + i * 8 + lane % 4 * 2) = bf16_pack(o[i][r * 2] * by, o[i][r * 2 + 1] * by);
    }
}

template <int DIM, bool EIGHT>
static __global__ void __launch_bounds__(PREFILL_THREADS, 1) prefill_kernel(struct attend_call c)
{
    dependency_wait();
    typedef prefill_shape<DIM> shape;
    struct prefill_work w;
    if (!prefill_work_find(c, &w)) return;
    bf16 *q = (bf16 *)cuda_smem, *ring = q + PREFILL_ROWS * DIM;
    float *scales = (float *)(ring + 2 * 2 * shape::TILE);
    int warp = threadIdx.x / WARP_LANES, lane = threadIdx.x % WARP_LANES, before = w.len - w.n_tokens;
    int first_seen = c.args.window > 0 ? max(0, before + w.row_first / w.heads.n + 1 - c.args.window) : 0;
    int tile_first = first_seen / shape::KEYS, tile_end = (before + w.token_last + shape::KEYS) / shape::KEYS;
    struct score_rule rule = {c.args.scale, c.args.softcap, {0, 0}, {0, 0}};
    for (int r = 0; r < 2; r++) {
        int token = row_token(w, warp * 16 + lane / 4 + r * 8);
        rule.limit[r] = token < 0 ? 0 : before + token + 1;
        rule.low[r] = c.args.window > 0 ? rule.limit[r] - c.args.window : 0;
    }
    int warp_first = warp * 16, warp_last = min(warp_first + 15, w.n_tokens * w.heads.n - w.row_first - 1);
    int seen_end = warp_last < warp_first ? 0 : before + row_token(w, warp_last) + 1;
    int seen_first = c.args.window > 0 && seen_end ? before + row_token(w, warp_first) + 1 - c.args.window : 0;
    auto load = [&](int tile) {
        bf16 *to = ring + (tile & 1) * 2 * shape::TILE;
        if (EIGHT) codes_load<DIM>(c, w, tile, to, scales + (tile & 1) * 2 * shape::KEYS);
        else keys_load<DIM>(c, w, tile, to);
        cp_async_commit();
    };
    queries_load<DIM>(c, w, q);
    load(tile_first);
    float o[DIM / 8][4], m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0};
    uint32_t held[DIM > 128 ? 1 : DIM / 16][4];
#pragma unroll
    for (int i = 0; i < DIM / 8; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) o[i][j] = 0;
    for (int tile = tile_first; tile < tile_end; tile++) {
        cp_async_wait<0>();
        __syncthreads(); /* this tile is there, and the other half of the ring may be filled */
        if (tile + 1 < tile_end) load(tile + 1);
        if (DIM <= 128 && tile == tile_first) {
#pragma unroll
            for (int step = 0; step < DIM / 16; step++)
                query_fragment<DIM>(held[step % (DIM > 128 ? 1 : DIM / 16)], q + warp * 16 * DIM, step, lane);
        }
        const bf16 *k = ring + (tile & 1) * 2 * shape::TILE;
        const float *k_scales = EIGHT ? scales + (tile & 1) * 2 * shape::KEYS : nullptr;
        if (tile * shape::KEYS < seen_end && (tile + 1) * shape::KEYS > seen_first) {
            float s[shape::KEYS / 8][4];
            tile_scores<DIM, shape::KEYS>(s, held, q + warp * 16 * DIM, k, lane);
            softmax_step<DIM, shape::KEYS>(s, o, m, l, tile * shape::KEYS, rule, k_scales,
                                           EIGHT ? k_scales + shape::KEYS : nullptr, lane);
            add_values<DIM, shape::KEYS>(o, s, k + shape::TILE, lane);
        }
    }
    cp_async_wait<0>(); /* a sequence without keys started a copy all the same */
    rows_write<DIM>(c, w, o, l);
}

int launch_prefill(const struct attend_call *c, void *stream)
{
    dim3 grid((unsigned)c->n_tiles, (unsigned)c->kv.n_kv_heads);
#define X(dim)                                                                                                        \
    if (c->args.head_dim == dim)                                                                                      \
        return c->kv.dtype == DTYPE_BF16                                                                              \
                   ? LAUNCH((prefill_kernel<dim, false>), grid, dim3(PREFILL_THREADS), prefill_shape<dim>::SMEM_BYTES, stream, *c) \
                   : LAUNCH((prefill_kernel<dim, true>), grid, dim3(PREFILL_THREADS), prefill_shape<dim>::SMEM_BYTES, stream, *c);
    HEAD_DIMS(X)
#undef X
    return cudaErrorInvalidValue;
}
