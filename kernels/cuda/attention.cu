/* Paged attention of sequences with few rows: decode, and the check of a few guessed tokens.
 *
 * grid (kv_heads, sequences, splits), fixed for a batch size: lengths are read from device memory,
 * so that a recorded graph serves every step. The heads of a group are packed into the 16 rows of
 * mma.m16n8k16, so that a key is read once for all of them. Each warp walks its own tiles of 16
 * keys through its own ring in shared memory, filled ahead by cp.async, or by one bulk copy a tile
 * where the device has it: the cache is stored swizzled, so a tile is one run of bytes. Warps are
 * merged in shared memory, splits by a second kernel, both in fixed order. */
#include "kernels/cuda/attention.cuh"

template <int DIM, bool EIGHT> struct decode_shape {
    static constexpr int WARPS = DIM > 128 ? 2 : 4, THREADS = WARPS * WARP_LANES, STAGES = DIM <= 64 ? 4 : 2;
    static constexpr int TILE_BYTES = 16 * DIM * (EIGHT ? 1 : 2), SCALE_BYTES = EIGHT ? 2 * 16 * 4 : 0;
    static constexpr int STAGE_BYTES = 2 * TILE_BYTES + SCALE_BYTES;
    static constexpr int RING_BYTES = WARPS * STAGES * STAGE_BYTES;
    static constexpr int WIDE_BYTES = EIGHT ? WARPS * 2 * 16 * DIM * 2 : 0; /* codes made BF16 */
    static constexpr int MERGE_BYTES = WARPS * 16 * (DIM + 2) * 4;          /* in place of the ring */
    static constexpr int WORK_BYTES = RING_BYTES + WIDE_BYTES > MERGE_BYTES ? RING_BYTES + WIDE_BYTES : MERGE_BYTES;
    static constexpr int QUERY_BYTES = 16 * DIM * 2, BARRIER_BYTES = WARPS * STAGES * (int)sizeof(mbar);
    static constexpr int SMEM_BYTES = WORK_BYTES + QUERY_BYTES + BARRIER_BYTES;
};

/* One block's share: the keys of one split of one sequence, for the heads of one kv head. */
struct decode_work {
    struct head_range heads;
    int first_token, n_rows, len, n_tokens, tile_first, tile_end;
    const int32_t *table;
};

static __device__ __forceinline__ bool decode_work_find(const struct attend_call &c, struct decode_work *w)
{
    int seq = blockIdx.y, n_splits = gridDim.z;
    w->first_token = c.batch.seq_start[seq];
    w->n_tokens = c.batch.seq_start[seq + 1] - w->first_token;
    w->heads = heads_of(c.args, blockIdx.x);
    w->n_rows = w->n_tokens * w->heads.n;
    if (w->n_rows == 0 || !is_decode(c, w->n_tokens)) return false;
    w->len = c.batch.context_len[seq];
    w->table = c.batch.block_table + (int64_t)seq * c.batch.shape->blocks_stride;
    int low = c.args.window > 0 ? max(0, w->len - w->n_tokens + 1 - c.args.window) / 16 : 0;
    int n = (w->len + 15) / 16 - low, each = (n + n_splits - 1) / n_splits;
    w->tile_first = low + min(n, (int)blockIdx.z * each);
    w->tile_end = low + min(n, ((int)blockIdx.z + 1) * each);
    return true;
}

/* Starts the copy of one tile of K and V into a stage of this warp's ring. */
template <int DIM, bool EIGHT>
static __device__ __forceinline__ void tile_load_async(const struct block_rows &from, uint8_t *stage, int lane)
{
    typedef decode_shape<DIM, EIGHT> shape;
#pragma unroll 4
    for (int i = lane * 16; i < shape::TILE_BYTES; i += WARP_LANES * 16) {
        cp_async16(stage + i, from.k + i);
        cp_async16(stage + shape::TILE_BYTES + i, from.v + i);
    }
    if (EIGHT && lane < 8)
        cp_async16(stage + 2 * shape::TILE_BYTES + lane * 16,
                   lane < 4 ? from.k_scales + lane * 4 : from.v_scales + (lane - 4) * 4);
}

#if HAVE_BULK_COPY
template <int DIM, bool EIGHT>
static __device__ __forceinline__ void tile_load_bulk(const struct block_rows &from, uint8_t *stage, mbar *full)
{
    typedef decode_shape<DIM, EIGHT> shape;
    mbar_expect(full, shape::STAGE_BYTES);
    bulk_copy(stage, from.k, shape::TILE_BYTES, full);
    bulk_copy(stage + shape::TILE_BYTES, from.v, shape::TILE_BYTES, full);
    if (EIGHT) {
        bulk_copy(stage + 2 * shape::TILE_BYTES, from.k_scales, 64, full);
        bulk_copy(stage + 2 * shape::TILE_BYTES + 64, from.v_scales, 64, full);
    }
}
#endif

template <int DIM, bool EIGHT, bool BULK>
static __device__ __forceinline__ void tile_load(const struct attend_call &c, const struct decode_work &w, int tile,
                                                 uint8_t *stage, mbar *full, int lane)
{
    int token = tile * 16, block_size = c.kv.block_size;
    struct block_rows from = rows_at(c.kv, w.table[token / block_size], blockIdx.x, token % block_size, EIGHT ? 1 : 2);
#if HAVE_BULK_COPY
    if constexpr (BULK) {
        if (lane == 0) tile_load_bulk<DIM, EIGHT>(from, stage, full);
    } else
#endif
        tile_load_async<DIM, EIGHT>(from, stage, lane);
}

/* Keys behind the end hold whatever an earlier sequence left; 0 * NaN must not reach the sum. */
template <int DIM> static __device__ __forceinline__ void values_clear(bf16 *v, int from_row, int lane)
{
    for (int i = from_row * (DIM / 8) + lane; i < 16 * (DIM / 8); i += WARP_LANES) *(uint4 *)(v + i * 8) = {0, 0, 0, 0};
    __syncwarp();
}

template <int DIM> static __device__ __forceinline__ void tile_widen(bf16 *to, const uint8_t *codes, enum dtype dtype, int lane)
{
    for (int i = lane; i < 2 * 16 * (DIM / 16); i += WARP_LANES) {
        int row = i / (DIM / 16), chunk = i % (DIM / 16) * 2; /* rows 16 to 31 are V's */
        widen16<DIM>(to + row / 16 * 16 * DIM, row % 16, chunk, *(const uint4 *)(codes + i * 16), dtype);
    }
    __syncwarp();
}

template <int DIM>
static __device__ __forceinline__ void queries_load(const struct attend_call &c, const struct decode_work &w, bf16 *q,
                                                    int n_threads)
{
    for (int i = threadIdx.x; i < 16 * (DIM / 8); i += n_threads) {
        int row = i / (DIM / 8), chunk = i % (DIM / 8);
        uint4 words = {0, 0, 0, 0};
        if (row < w.n_rows) {
            int64_t token = w.first_token + row / w.heads.n, head = w.heads.first + row % w.heads.n;
            words = *(const uint4 *)((const bf16 *)c.qkv.data + token * c.qkv.stride + head * DIM + chunk * 8);
        }
        *(uint4 *)(q + swizzled(DIM, row, chunk)) = words;
    }
}

/* Walks this warp's tiles. */
template <int DIM, bool EIGHT, bool BULK>
static __device__ __forceinline__ void decode_tiles(const struct attend_call &c, const struct decode_work &w,
                                                    const bf16 *q, float (&o)[DIM / 8][4], float (&m)[2], float (&l)[2])
{
    typedef decode_shape<DIM, EIGHT> shape;
    int warp = threadIdx.x / WARP_LANES, lane = threadIdx.x % WARP_LANES;
    uint8_t *ring = cuda_smem + warp * shape::STAGES * shape::STAGE_BYTES;
    bf16 *wide = (bf16 *)(cuda_smem + shape::RING_BYTES) + warp * 2 * 16 * DIM;
    mbar *full = (mbar *)(cuda_smem + shape::WORK_BYTES + shape::QUERY_BYTES) + warp * shape::STAGES;
    uint32_t held[DIM > 128 ? 1 : DIM / 16][4];
    if (DIM <= 128) {
#pragma unroll
        for (int step = 0; step < DIM / 16; step++) query_fragment<DIM>(held[step % (DIM > 128 ? 1 : DIM / 16)], q, step, lane);
    }
    struct score_rule rule = {c.args.scale, c.args.softcap, {0, 0}, {0, 0}};
    for (int r = 0; r < 2; r++) {
        int row = lane / 4 + r * 8, token = row < w.n_rows ? row / w.heads.n : -1;
        rule.limit[r] = token < 0 ? 0 : w.len - w.n_tokens + token + 1;
        rule.low[r] = c.args.window > 0 ? rule.limit[r] - c.args.window : 0;
    }
    int n = (w.tile_end - w.tile_first - warp + shape::WARPS - 1) / shape::WARPS;
    auto tile_of = [&](int i) { return w.tile_first + warp + i * shape::WARPS; };
    auto stage_of = [&](int i) { return ring + i % shape::STAGES * shape::STAGE_BYTES; };
    for (int i = 0; i < shape::STAGES - 1; i++) {
        if (i < n) tile_load<DIM, EIGHT, BULK>(c, w, tile_of(i), stage_of(i), full + i % shape::STAGES, lane);
        cp_async_commit();
    }
    for (int i = 0; i < n; i++) {
        int ahead = i + shape::STAGES - 1;
        if (ahead < n)
            tile_load<DIM, EIGHT, BULK>(c, w, tile_of(ahead), stage_of(ahead), full + ahead % shape::STAGES, lane);
        cp_async_commit();
        cp_async_wait<shape::STAGES - 1>();
#if HAVE_BULK_COPY
        if (BULK) mbar_wait(full + i % shape::STAGES, i / shape::STAGES & 1);
#endif
        __syncwarp();
        uint8_t *stage = stage_of(i);
        bf16 *k = EIGHT ? wide : (bf16 *)stage, *v = k + 16 * DIM;
        const float *k_scales = EIGHT ? (const float *)(stage + 2 * shape::TILE_BYTES) : nullptr;
        if (EIGHT) tile_widen<DIM>(wide, stage, c.kv.dtype, lane);
        int key_first = tile_of(i) * 16;
        if (key_first + 16 > w.len) values_clear<DIM>(v, w.len - key_first, lane);
        float s[2][4];
        tile_scores<DIM, 16>(s, held, q, k, lane);
        softmax_step<DIM, 16>(s, o, m, l, key_first, rule, k_scales, EIGHT ? k_scales + 16 : nullptr, lane);
        add_values<DIM, 16>(o, s, v, lane);
        __syncwarp(); /* the stage may be filled again */
    }
    cp_async_wait<0>();
}

/* Merges the warps and writes the rows: final when there is one split, else partial. */
template <int DIM, int WARPS>
static __device__ __forceinline__ void decode_merge(const struct attend_call &c, const struct decode_work &w)
{
    const float *so = (const float *)cuda_smem, *sml = so + WARPS * 16 * DIM;
    int n_splits = gridDim.z;
    int64_t first = ((int64_t)blockIdx.y * gridDim.x + blockIdx.x) * DECODE_ROWS;
    for (int i = threadIdx.x; i < w.n_rows * DIM; i += WARPS * WARP_LANES) {
        int row = i / DIM, d = i % DIM;
        float most = -INFINITY, sum = 0, value = 0;
        for (int k = 0; k < WARPS; k++) most = fmaxf(most, sml[(k * 16 + row) * 2]);
        for (int k = 0; k < WARPS; k++) {
            float m = sml[(k * 16 + row) * 2], by = m == -INFINITY ? 0.0f : exp2f(m - most);
            sum += sml[(k * 16 + row) * 2 + 1] * by;
            value += so[(k * 16 + row) * DIM + d] * by;
        }
        if (n_splits == 1) {
            int64_t token = w.first_token + row / w.heads.n, head = w.heads.first + row % w.heads.n;
            from_float((bf16 *)c.out.data + token * c.out.stride + head * DIM + d, sum > 0 ? value / sum : 0.0f);
            continue;
        }
        int64_t at = (first + row) * n_splits + blockIdx.z;
        c.split_out[at * DIM + d] = value;
        if (d == 0) c.split_ml[at * 2] = most, c.split_ml[at * 2 + 1] = sum;
    }
}

template <int DIM, bool EIGHT, bool BULK>
static __global__ void __launch_bounds__(decode_shape<DIM, EIGHT>::THREADS, 1) decode_kernel(struct attend_call c)
{
    dependency_wait();
    typedef decode_shape<DIM, EIGHT> shape;
    struct decode_work w;
    if (!decode_work_find(c, &w)) return;
    bf16 *q = (bf16 *)(cuda_smem + shape::WORK_BYTES);
    queries_load<DIM>(c, w, q, shape::THREADS);
#if HAVE_BULK_COPY
    if (BULK && threadIdx.x < shape::WARPS * shape::STAGES) {
        mbar_init((mbar *)(cuda_smem + shape::WORK_BYTES + shape::QUERY_BYTES) + threadIdx.x, 1);
        fence_async();
    }
#endif
    __syncthreads();
    float o[DIM / 8][4], m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < DIM / 8; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) o[i][j] = 0;
    decode_tiles<DIM, EIGHT, BULK>(c, w, q, o, m, l);
    __syncthreads(); /* the ring becomes the place to merge in */
    int warp = threadIdx.x / WARP_LANES, lane = threadIdx.x % WARP_LANES;
    float *so = (float *)cuda_smem, *sml = so + shape::WARPS * 16 * DIM;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        int row = warp * 16 + lane / 4 + r * 8;
        float sum = quad_sum(l[r]);
        if (lane % 4 == 0) sml[row * 2] = m[r], sml[row * 2 + 1] = sum;
#pragma unroll
        for (int i = 0; i < DIM / 8; i++)
            *(float2 *)(so + row * DIM + i * 8 + lane % 4 * 2) = {o[i][r * 2], o[i][r * 2 + 1]};
    }
    __syncthreads();
    decode_merge<DIM, shape::WARPS>(c, w);
}

/* grid (kv_heads, sequences): the splits of every row, in their order. */
static __global__ void __launch_bounds__(128) combine_kernel(struct attend_call c)
{
    dependency_wait();
    int seq = blockIdx.y, dim = c.args.head_dim, n_splits = c.n_splits;
    int first_token = c.batch.seq_start[seq], n_tokens = c.batch.seq_start[seq + 1] - first_token;
    struct head_range heads = heads_of(c.args, blockIdx.x);
    if (!is_decode(c, n_tokens)) return;
    int64_t first = ((int64_t)seq * gridDim.x + blockIdx.x) * DECODE_ROWS;
    for (int i = threadIdx.x; i < n_tokens * heads.n * dim; i += blockDim.x) {
        int row = i / dim, d = i % dim;
        int64_t at = (first + row) * n_splits;
        float most = -INFINITY, sum = 0, value = 0;
        for (int k = 0; k < n_splits; k++) most = fmaxf(most, c.split_ml[(at + k) * 2]);
        for (int k = 0; k < n_splits; k++) {
            float m = c.split_ml[(at + k) * 2], by = m == -INFINITY ? 0.0f : exp2f(m - most);
            sum += c.split_ml[(at + k) * 2 + 1] * by;
            value += c.split_out[(at + k) * dim + d] * by;
        }
        int64_t token = first_token + row / heads.n, head = heads.first + row % heads.n;
        from_float((bf16 *)c.out.data + token * c.out.stride + head * dim + d, sum > 0 ? value / sum : 0.0f);
    }
}

template <int DIM> static cudaError_t decode_of(const struct attend_call *c, void *stream)
{
    dim3 grid((unsigned)c->kv.n_kv_heads, (unsigned)c->n_seqs, (unsigned)c->n_splits);
    if (c->kv.dtype == DTYPE_BF16) {
        typedef decode_shape<DIM, false> shape;
        if (c->bulk_copy)
            return LAUNCH((decode_kernel<DIM, false, true>), grid, dim3(shape::THREADS), shape::SMEM_BYTES, stream, *c);
        return LAUNCH((decode_kernel<DIM, false, false>), grid, dim3(shape::THREADS), shape::SMEM_BYTES, stream, *c);
    }
    typedef decode_shape<DIM, true> shape;
    if (c->bulk_copy)
        return LAUNCH((decode_kernel<DIM, true, true>), grid, dim3(shape::THREADS), shape::SMEM_BYTES, stream, *c);
    return LAUNCH((decode_kernel<DIM, true, false>), grid, dim3(shape::THREADS), shape::SMEM_BYTES, stream, *c);
}

bool attention_supports(int head_dim)
{
#define X(dim) \
    if (head_dim == dim) return true;
    HEAD_DIMS(X)
#undef X
    return false;
}

int launch_decode(const struct attend_call *c, void *stream)
{
    cudaError_t e = cudaErrorInvalidValue;
#define X(dim) \
    if (c->args.head_dim == dim) e = decode_of<dim>(c, stream);
    HEAD_DIMS(X)
#undef X
    if (e != cudaSuccess || c->n_splits == 1) return e;
    dim3 grid((unsigned)c->kv.n_kv_heads, (unsigned)c->n_seqs);
    return LAUNCH(combine_kernel, grid, dim3(128), 0, stream, *c);
}
