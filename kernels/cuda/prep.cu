/* The step's beginning on the device: its integers arrive as one array, are spread to their fixed
 * places, and tokens that only the device knows yet are put in from the feedback table. */
#include "kernels/cuda/common.cuh"

static __device__ int32_t *part_place(const struct device_batch &b, int part)
{
    switch (part) {
    case STEP_IDS: return b.token_ids;
    case STEP_SEQS: return b.token_seq;
    case STEP_POSITIONS: return b.positions;
    case STEP_CACHE_SLOTS: return b.cache_slot;
    case STEP_STARTS: return b.seq_start;
    case STEP_LENS: return b.context_len;
    case STEP_ROWS: return b.rows_out;
    case STEP_TILES: return b.tiles;
    case STEP_BLOCKS: return b.block_table;
    default: return nullptr;
    }
}

/* A known id is itself; -1 is the token last sampled for the slot, 0 when the slot is out of range. */
static __device__ int32_t token_of(const struct prep_call &c, int32_t id, int32_t slot)
{
    if (id >= 0) return id;
    return slot >= 0 && slot < c.n_slots ? c.feedback[slot] : 0;
}

/* grid: x strides over the part, y = part */
static __global__ void __launch_bounds__(256) prep_kernel(struct prep_call c)
{
    dependency_wait();
    int part = blockIdx.y, n = c.part_ints[part], before = 0;
    for (int p = 0; p < part; p++) before += c.part_ints[p];
    const int32_t *from = c.landing + before;
    int32_t *to = part_place(c.batch, part);
    if (part == 0 && blockIdx.x == 0 && threadIdx.x == 0) *c.batch.shape = c.shape;
    if (!to) return;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        to[i] = part == STEP_IDS ? token_of(c, from[i], from[n + i]) : from[i];
}

int launch_prep(const struct prep_call *call, void *stream)
{
    int most = 1;
    for (int p = 0; p < STEP_PARTS; p++) most = max(most, (int)call->part_ints[p]);
    dim3 grid((unsigned)min((most + 255) / 256, 64), STEP_PARTS);
    return LAUNCH(prep_kernel, grid, dim3(256), 0, stream, *call);
}

static __global__ void feed_kernel(int32_t *feedback, int32_t slot, int32_t token)
{
    dependency_wait();
    feedback[slot] = token;
}

int launch_feed(int32_t *feedback, int32_t slot, int32_t token, void *stream)
{
    return LAUNCH(feed_kernel, dim3(1), dim3(1), 0, stream, feedback, slot, token);
}
