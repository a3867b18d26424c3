/* The steps in flight: what the host writes for the device, and the results it reads one step late.
 *
 * A step owns one slot of a ring of pinned memory from its first operation until its event has
 * passed. The arrays of a batch travel as one copy and are spread by one kernel to addresses that
 * never change. Waiting asks again and again with a deadline: a device that does not answer is an
 * error, never a hang. */
#include "base/clock.h"
#include "base/log.h"
#include "base/mem.h"
#include "kernels/cuda/cuda.h"

#include <string.h>

static size_t ints_max(const struct cuda_backend *b)
{
    size_t tokens = (size_t)b->options.n_tokens_max, slots = (size_t)b->options.n_slots_max;
    return 6 * tokens + 2 * slots + 16;
}

static void batch_place(struct cuda_backend *b)
{
    size_t tokens = (size_t)b->options.n_tokens_max, slots = (size_t)b->options.n_slots_max;
    int32_t *at = b->batch_ints;
    struct device_batch *d = &b->batch;
    d->shape = (struct batch_shape *)at, at += sizeof *d->shape / sizeof *at;
    d->token_ids = at, at += tokens;
    d->token_seq = at, at += tokens;
    d->positions = at, at += tokens;
    d->cache_slot = at, at += tokens;
    d->rows_out = at, at += tokens;
    d->seq_start = at, at += slots + 1;
    d->context_len = at, at += slots;
    d->tiles = at;
}

static enum err pinned(size_t bytes, void **out)
{
    return cuda_check(cudaMallocHost(out, bytes), "pinned host memory");
}

enum err cuda_steps_open(struct cuda_backend *b)
{
    const struct backend_options *o = &b->options;
    size_t tokens = (size_t)o->n_tokens_max, slots = (size_t)o->n_slots_max,
           edits = (size_t)o->vocab_size * 40;
    b->tile_ints = 2 * (tokens * (GROUP_MAX / PREFILL_ROWS) + slots);
    b->edit_bytes = edits + (1 << 20) + tokens * sizeof(struct sample_task);
    TRY(cuda_alloc(b, (ints_max(b) + b->tile_ints) * sizeof(int32_t), (void **)&b->batch_ints));
    TRY(cuda_alloc(b, slots * sizeof(int32_t), (void **)&b->feedback));
    TRY(cuda_alloc(b, b->edit_bytes, (void **)&b->edits));
    TRY(cuda_alloc(b, tokens * sizeof *b->results, (void **)&b->results));
    TRY(mem_alloc_array((size_t)o->vocab_size, sizeof *b->token_count, (void **)&b->token_count));
    for (int i = 0; i < STEPS_IN_FLIGHT; i++) {
        struct cuda_step *s = &b->steps[i];
        TRY(cuda_check(cudaEventCreateWithFlags(&s->done, cudaEventDisableTiming),
                       "making an event"));
        TRY(pinned(b->edit_bytes, (void **)&s->edits));
        TRY(pinned(tokens * sizeof *s->results, (void **)&s->results));
    }
    batch_place(b);
    return cuda_step_table_reserve(b, slots);
}

void cuda_steps_close(struct cuda_backend *b)
{
    for (int i = 0; i < STEPS_IN_FLIGHT; i++) {
        struct cuda_step *s = &b->steps[i];
        if (b->failed) break; /* as cuda_free */
        if (s->done) cudaEventDestroy(s->done);
        if (s->staging) cudaFreeHost(s->staging);
        if (s->edits) cudaFreeHost(s->edits);
        if (s->results) cudaFreeHost(s->results);
    }
    cuda_free(b, b->batch_ints);
    cuda_free(b, b->batch.block_table);
    cuda_free(b, b->landing);
    cuda_free(b, b->feedback);
    cuda_free(b, b->edits);
    cuda_free(b, b->results);
    mem_free(b->token_count);
}

/* Set-up only: graphs recorded before would read the old table. */
enum err cuda_step_table_reserve(struct cuda_backend *b, size_t ints)
{
    if (ints <= b->table_ints) return OK;
    size_t landing = ints_max(b) + b->tile_ints + ints, bytes = landing * sizeof(int32_t);
    TRY(cuda_check(cudaStreamSynchronize(b->stream), "waiting for the device"));
    b->table_ints = b->landing_ints = 0;
    cuda_free(b, b->batch.block_table);
    cuda_free(b, b->landing);
    b->batch.block_table = b->landing = NULL;
    TRY(cuda_alloc(b, ints * sizeof(int32_t), (void **)&b->batch.block_table));
    TRY(cuda_alloc(b, bytes, (void **)&b->landing));
    for (int i = 0; i < STEPS_IN_FLIGHT; i++) {
        if (b->steps[i].staging) cudaFreeHost(b->steps[i].staging);
        b->steps[i].staging = NULL;
        TRY(pinned(bytes, (void **)&b->steps[i].staging));
    }
    b->table_ints = ints;
    b->landing_ints = landing;
    return OK;
}

static bool is_overdue(const struct cuda_backend *b, const struct cuda_step *s)
{
    return clock_monotonic_us() - s->begun_us > (int64_t)b->wait_ms_max * 1000;
}

/* Asks the event until it has passed: at first at once, then every 20 us. */
static void event_wait(struct cuda_backend *b, const struct cuda_step *s)
{
    int64_t start = clock_monotonic_us();
    for (cudaError_t r; !b->failed && (r = cudaEventQuery(s->done)) != cudaSuccess;) {
        int64_t waited = clock_monotonic_us() - start;
        if (r != cudaErrorNotReady) {
            cuda_ok(b, r, "a step");
        } else if (is_overdue(b, s)) {
            b->failed =
                err_set(ERR_DEVICE, "CUDA: a step did not end within %d ms", b->wait_ms_max);
            memcpy(b->why, err_detail(), strnlen(err_detail(), sizeof b->why - 1) + 1);
        } else if (waited > 100) {
            clock_sleep_us(20);
        }
    }
}

static void step_deliver(struct cuda_backend *b, struct cuda_step *s)
{
    const struct sample_result *from = s->results;
    if (!s->ticket) return;
    event_wait(b, s);
    cuda_trace_deliver(b, s);
    for (int i = 0; i < s->n_deliver && !b->failed; from += s->deliver[i++].n)
        memcpy(s->deliver[i].to, from, (size_t)s->deliver[i].n * sizeof *from);
    s->ticket = 0;
    s->n_deliver = s->n_results = 0;
    s->staging_ints = s->edits_used = 0;
}

struct cuda_step *cuda_step_now(struct cuda_backend *b)
{
    struct cuda_step *s = &b->steps[(b->ticket_last + 1) % STEPS_IN_FLIGHT];
    if (s->ticket) step_deliver(b, s); /* the host is a whole ring ahead */
    return s;
}

/* Appends a part to what the step uploads; NULL data: the caller fills the returned memory. */
static int32_t *part_put(struct cuda_step *s, const int32_t *data, size_t n)
{
    int32_t *to = s->staging + s->staging_ints;
    if (data && n) memcpy(to, data, n * sizeof *to);
    s->staging_ints += n;
    return to;
}

static void parts_put(struct cuda_step *s, const struct batch *batch, int32_t *n)
{
    size_t tokens = (size_t)batch->n_tokens, seqs = (size_t)batch->n_seqs;
    size_t blocks = seqs * (size_t)batch->blocks_per_seq_max;
    part_put(s, batch->token_ids, tokens);
    part_put(s, batch->token_slot, tokens);
    int32_t *seq_of = part_put(s, NULL, tokens);
    for (int q = 0; q < batch->n_seqs; q++)
        for (int32_t t = batch->seq_start[q]; t < batch->seq_start[q + 1]; t++)
            seq_of[t] = q;
    part_put(s, batch->positions, tokens);
    part_put(s, batch->cache_slot, tokens);
    part_put(s, batch->seq_start, seqs + 1);
    part_put(s, batch->context_len, seqs);
    part_put(s, batch->rows_out, (size_t)batch->n_rows_out);
    part_put(s, batch->block_table, blocks);
    const size_t sizes[STEP_PARTS] = {
        [STEP_IDS] = tokens,         [STEP_SLOTS] = tokens,
        [STEP_SEQS] = tokens,        [STEP_POSITIONS] = tokens,
        [STEP_CACHE_SLOTS] = tokens, [STEP_STARTS] = seqs + 1,
        [STEP_LENS] = seqs,          [STEP_ROWS] = (size_t)batch->n_rows_out,
        [STEP_BLOCKS] = blocks};
    for (int p = 0; p < STEP_PARTS; p++)
        n[p] = (int32_t)sizes[p];
}

/* A sequence's last tile sees the most keys and goes first, so that the last to run are short.
 * Returns the integers written; *out_long: some sequence in them has more than one token. */
static size_t tiles_list(const struct cuda_backend *b, const struct batch *batch, int group,
                         int32_t *tiles, size_t room, bool *out_long)
{
    size_t n = 0;
    *out_long = false;
    for (int q = 0; q < batch->n_seqs; q++) {
        int32_t tokens = batch->seq_start[q + 1] - batch->seq_start[q];
        int64_t rows = (int64_t)tokens * group;
        if (rows == 0 || (!b->options.deterministic && rows <= DECODE_ROWS)) continue;
        *out_long |= tokens > 1;
        for (int64_t t = (rows + PREFILL_ROWS - 1) / PREFILL_ROWS - 1; t >= 0; t--, n += 2) {
            ASSERT_CMP(n + 2, <=, b->tile_ints);
            ASSERT_CMP(n + 2, <=, room);
            tiles[n] = q, tiles[n + 1] = (int32_t)t;
        }
    }
    return n;
}

void cuda_tiles_prepare(struct cuda_backend *b, const struct batch *batch, int group)
{
    struct cuda_step *s = cuda_step_now(b);
    bool is_long;
    if (b->tiles_group == group || !group) return;
    ASSERT_CMP(group, <=, GROUP_MAX);
    int32_t *tiles = s->staging + s->staging_ints;
    size_t n = tiles_list(b, batch, group, tiles, b->landing_ints - s->staging_ints, &is_long);
    b->tiles_group = group;
    b->n_tiles = (int)(n / 2);
    s->staging_ints += n;
    if (n == 0) return;
    if (b->capturing && is_long) {
        b->capture_refused = true; /* these tiles are of one step, a graph is of many */
        return;
    }
    cudaStream_t stream = b->capturing ? b->side : b->stream;
    cudaError_t r =
        cudaMemcpyAsync(b->batch.tiles, tiles, n * sizeof *tiles, cudaMemcpyHostToDevice, stream);
    if (r == cudaSuccess && b->capturing) r = cudaStreamSynchronize(stream);
    cuda_ok(b, r, "the tiles");
}

void cuda_batch_begin(struct backend *base, const struct batch *batch)
{
    struct cuda_backend *b = cuda_of(base);
    struct cuda_step *s = cuda_step_now(b);
    b->tiles_group = 0;
    b->n_tiles = 0;
    b->batch_host = *batch;
    b->quantized.of = NULL;
    if (b->failed) return;
    ASSERT_CMP(batch->n_tokens, <=, b->options.n_tokens_max);
    ASSERT_CMP(batch->n_seqs, <=, b->options.n_slots_max);
    ASSERT_CMP(batch->n_rows_out, <=, b->options.n_tokens_max);
    ASSERT_CMP((size_t)batch->n_seqs * (size_t)batch->blocks_per_seq_max, <=, b->table_ints);
    struct prep_call call = {
        .landing = b->landing,
        .shape = {batch->n_tokens, batch->n_seqs, batch->n_rows_out, batch->blocks_per_seq_max},
        .batch = b->batch,
        .feedback = b->feedback,
        .n_slots = b->options.n_slots_max};
    size_t first = s->staging_ints;
    parts_put(s, batch, call.part_ints);
    size_t bytes = (s->staging_ints - first) * sizeof(int32_t);
    cudaError_t r =
        cudaMemcpyAsync(b->landing, s->staging + first, bytes, cudaMemcpyHostToDevice, b->stream);
    if (!cuda_ok(b, r, "the batch")) return;
    cuda_trace_begin(b, s, batch);
    cuda_ok(b, (cudaError_t)launch_prep(&call, b->stream), "preparing the step");
}

void cuda_feed(struct backend *base, int32_t slot, int32_t token)
{
    struct cuda_backend *b = cuda_of(base);
    ASSERT_CMP(slot, >=, 0);
    ASSERT_CMP(slot, <, b->options.n_slots_max);
    if (!b->failed)
        cuda_ok(b, (cudaError_t)launch_feed(b->feedback, slot, token, b->stream),
                "feeding a token");
}

uint64_t cuda_step_end(struct backend *base)
{
    struct cuda_backend *b = cuda_of(base);
    struct cuda_step *s = cuda_step_now(b);
    if (s->is_traced && !s->n_deliver) cuda_trace_worked(b, s);
    if (!b->failed) cuda_ok(b, cudaEventRecord(s->done, b->stream), "the end of a step");
    s->begun_us = clock_monotonic_us();
    s->ticket = ++b->ticket_last;
    return s->ticket;
}

static enum err failure(const struct cuda_backend *b)
{
    if (b->failed) FAIL(b->failed, "%s", b->why);
    return OK;
}

enum err cuda_ticket_wait(struct backend *base, uint64_t ticket)
{
    struct cuda_backend *b = cuda_of(base);
    struct cuda_step *s = &b->steps[ticket % STEPS_IN_FLIGHT];
    ASSERT_CMP(ticket, <=, b->ticket_last);
    if (s->ticket == ticket) step_deliver(b, s);
    return failure(b);
}

bool cuda_ticket_ready(struct backend *base, uint64_t ticket)
{
    struct cuda_backend *b = cuda_of(base);
    const struct cuda_step *s = &b->steps[ticket % STEPS_IN_FLIGHT];
    if (s->ticket != ticket || b->failed) return true;
    return cudaEventQuery(s->done) != cudaErrorNotReady || is_overdue(b, s);
}

enum err cuda_sync(struct backend *base)
{
    struct cuda_backend *b = cuda_of(base);
    int64_t start = clock_monotonic_us();
    for (cudaError_t r; !b->failed && (r = cudaStreamQuery(b->stream)) != cudaSuccess;) {
        if (r != cudaErrorNotReady)
            cuda_ok(b, r, "the device");
        else if (clock_monotonic_us() - start > (int64_t)b->wait_ms_max * 1000)
            b->failed = err_set(ERR_DEVICE, "CUDA: no end within %d ms", b->wait_ms_max);
        else if (clock_monotonic_us() - start > 100)
            clock_sleep_us(20);
    }
    return failure(b);
}
