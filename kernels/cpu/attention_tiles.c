/* Attention over a paged cache in tiles of 16 tokens: the driver of the lane kernels.
 *
 * The work is cut into units: up to 32 query rows (heads of tokens) that share a KV head of one
 * sequence. A unit walks the chunks of its context; K and V come from memory once a unit. When
 * units are too few for the threads, as in decoding a few long sequences, each span of each unit is
 * an item of its own and a second job merges the spans. Both ways do the same operations in the
 * same order (see attention.h), so they give the same bits. */
#include "kernels/cpu/attention.h"
#include "kernels/cpu/vector_math.h"
#include "kernels/half.h"

#include <math.h>
#include <string.h>

enum {
    UNIT_ROWS = 32,
    AHEAD_BYTES = 8192, /* what is fetched into L2 lies so far ahead: measured, flat from here on */
    UNITS_PER_THREAD = 4, /* with fewer units than this a thread, spans are dealt out */
};

struct tiles_job {
    struct attention_job j;
    const struct attention_kernels *kernels;
    const int32_t *unit_start; /* [n_seqs + 1] units of one KV head before each sequence */
    float *partial;            /* [units][spans][rows][width + 2] of the split form */
    int units_per_head, span, spans, rows, block_shift; /* span: tokens of one */
};

/* Query rows [row0, row0 + n_rows) of one sequence and KV head, row = token * n_heads + head. */
struct unit {
    int seq, kv_head, head0, n_heads, row0, n_rows, token0;
    int32_t low, high; /* tokens that any of its rows sees */
    const int32_t *blocks;
};

/* Sums of one row block: scratch of a thread. */
struct row_state {
    float max, sum;
};
struct unit_scratch {
    float scores[8 * ATTENTION_CHUNK], chunk_out[8 * HEAD_DIM_MAX];
    float chunk_max[8], chunk_sum[8];
    float q[UNIT_ROWS * HEAD_DIM_MAX];
    float span_out[UNIT_ROWS * HEAD_DIM_MAX], total_out[UNIT_ROWS * HEAD_DIM_MAX];
    struct row_state span[UNIT_ROWS], total[UNIT_ROWS];
    struct chunk_call call;
};

size_t attention_scratch_bytes(void)
{
    return sizeof(struct unit_scratch);
}

static int32_t row_position(const struct tiles_job *t, const struct unit *u, int row)
{
    return t->j.batch->positions[u->token0 + row / u->n_heads];
}

/* Tokens that a row sees: [low, high). */
static void row_range(const struct tiles_job *t, const struct unit *u, int row, int32_t *out_low,
                      int32_t *out_high)
{
    int32_t position = row_position(t, u, row), window = t->j.args->window;
    *out_high = position + 1;
    *out_low = window > 0 && position >= window ? position - window + 1 : 0;
}

/* False when this unit has no rows: a KV head of an uneven shard may serve fewer query heads. */
static bool unit_find(const struct tiles_job *t, int index, struct unit *out)
{
    const struct attention_args *a = t->j.args;
    const struct batch *batch = t->j.batch;
    int at = index % t->units_per_head, low = 0, high = batch->n_seqs - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (t->unit_start[middle] <= at)
            low = middle;
        else
            high = middle - 1;
    }
    struct unit u = {.seq = low, .kv_head = index / t->units_per_head};
    int first = (u.kv_head + a->kv_offset) * a->group - a->head_offset, end = first + a->group;
    u.head0 = first > 0 ? first : 0;
    u.n_heads = (end < a->n_heads ? end : a->n_heads) - u.head0;
    u.token0 = batch->seq_start[u.seq];
    u.blocks = batch->block_table + (int64_t)u.seq * batch->blocks_per_seq_max;
    u.row0 = (at - t->unit_start[u.seq]) * UNIT_ROWS;
    int rows = u.n_heads > 0 ? (batch->seq_start[u.seq + 1] - u.token0) * u.n_heads - u.row0 : 0;
    if (rows <= 0) return false;
    u.n_rows = rows < UNIT_ROWS ? rows : UNIT_ROWS;
    int32_t ignored;
    row_range(t, &u, u.row0, &u.low, &ignored);
    row_range(t, &u, u.row0 + u.n_rows - 1, &ignored, &u.high);
    *out = u;
    return true;
}

static void queries_load(const struct tiles_job *t, const struct unit *u, struct unit_scratch *s)
{
    int n = t->j.args->head_dim;
    query_kernel *convert = t->kernels->query[t->j.kv->args.dtype];
    for (int r = 0; r < u->n_rows; r++) {
        int row = u->row0 + r, token = u->token0 + row / u->n_heads,
            head = u->head0 + row % u->n_heads;
        const float *q = (const float *)t->j.qkv.data + token * t->j.qkv.stride + (int64_t)head * n;
        if (convert)
            convert(s->q + r * n, q, n);
        else
            memcpy(s->q + r * n, q, (size_t)n * sizeof *q);
        s->total[r] = (struct row_state){-INFINITY, 0};
    }
}

/* K tile (V at + v_offset) of the tile that holds a token; beyond the unit's context, its last. */
static const uint8_t *tile_at(const struct tiles_job *t, const struct unit *u, int32_t token)
{
    const struct kv_cache *kv = t->j.kv;
    if (token >= u->high) token = u->high - 1;
    int32_t block = token >> t->block_shift, in_block = token & (kv->args.block_size - 1);
    const uint8_t *piece = kv_head(kv, t->j.args->layer, u->blocks[block], u->kv_head);
    return piece + (size_t)(in_block / TILE) * kv->tile_bytes;
}

/* Where tile i of a stream of n K tiles, n V tiles, then the next chunk's K tiles lies. */
static const uint8_t *stream_at(const struct tiles_job *t, const struct unit *u, int32_t base,
                                int n, int i)
{
    if (i < n) return tile_at(t, u, base + i * TILE);
    if (i < 2 * n) return tile_at(t, u, base + (i - n) * TILE) + t->j.kv->v_offset;
    return tile_at(t, u, base + (i - n) * TILE);
}

static void tiles_find(const struct tiles_job *t, const struct unit *u, int32_t base, int n,
                       bool fetch, struct chunk_call *c)
{
    int ahead = AHEAD_BYTES / (int)t->j.kv->tile_bytes;
    ahead = ahead < 1 ? 1 : ahead > CHUNK_TILES / 2 ? CHUNK_TILES / 2 : ahead;
    const struct kv_cache *kv = t->j.kv;
    bool scaled = kv->args.dtype == DTYPE_I8;
    c->n_tiles = n;
    for (int i = 0; i < n; i++) {
        c->k[i] = tile_at(t, u, base + i * TILE);
        c->v[i] = c->k[i] + kv->v_offset;
        c->k_ahead[i] = fetch ? stream_at(t, u, base, n, i + ahead) : c->k[i];
        c->v_ahead[i] = fetch ? stream_at(t, u, base, n, n + i + ahead) : c->v[i];
        c->k_scale[i] = scaled ? (const float *)(const void *)(c->k[i] + kv->scale_offset) : NULL;
        c->v_scale[i] = scaled ? (const float *)(const void *)(c->v[i] + kv->scale_offset) : NULL;
    }
}

/* Adds (max, sum, out) of a later piece of context to the state so far. */
static void state_merge(const struct row_kernels *rows, struct row_state *state, float *out,
                        struct row_state piece, const float *piece_out, int n)
{
    if (piece.sum == 0.0f && piece.max == -INFINITY) return;
    if (state->max == -INFINITY) {
        *state = piece;
        memcpy(out, piece_out, (size_t)n * sizeof *out);
        return;
    }
    float max = piece.max > state->max ? piece.max : state->max;
    float keep = exp_approx(state->max - max), add = exp_approx(piece.max - max);
    rows->blend(out, piece_out, keep, add, n);
    state->sum = state->sum * keep + piece.sum * add;
    state->max = max;
}

/* Rows [r0, r0 + rows) of the unit by the chunk that begins at token base. */
static void rows_by_chunk(const struct tiles_job *t, const struct unit *u, int r0, int rows,
                          int32_t base, struct unit_scratch *s)
{
    struct chunk_call *c = &s->call;
    int32_t low[8], high[8], from = ATTENTION_CHUNK, to = 0;
    int n = t->j.args->head_dim;
    for (int r = 0; r < rows; r++) {
        row_range(t, u, u->row0 + r0 + r, &low[r], &high[r]);
        low[r] = low[r] > base ? low[r] - base : 0;
        high[r] = high[r] < base + ATTENTION_CHUNK ? high[r] - base : ATTENTION_CHUNK;
        if (low[r] >= high[r]) continue;
        from = low[r] < from ? low[r] : from;
        to = high[r] > to ? high[r] : to;
    }
    if (from >= to) return;
    from = from / TILE * TILE;
    *c = (struct chunk_call){.rows = rows,
                             .width = n,
                             .q = s->q + r0 * n,
                             .q_stride = n * (int64_t)sizeof(float),
                             .scale = t->j.args->scale,
                             .softcap = t->j.args->softcap,
                             .scores = s->scores,
                             .max = s->chunk_max,
                             .sum = s->chunk_sum,
                             .out = s->chunk_out};
    tiles_find(t, u, base + from, (to - from + TILE - 1) / TILE, r0 == 0, c);
    for (int r = 0; r < rows; r++)
        c->low[r] = low[r] - from, c->high[r] = high[r] - from;
    t->kernels->chunk[t->j.kv->args.dtype](c);
    for (int r = 0; r < rows; r++) {
        if (low[r] >= high[r]) continue; /* this row sees nothing of the chunk */
        state_merge(t->j.rows, &s->span[r0 + r], s->span_out + (r0 + r) * n,
                    (struct row_state){s->chunk_max[r], s->chunk_sum[r]}, s->chunk_out + r * n, n);
    }
}

/* All chunks of one span into span and span_out. */
static void span_compute(const struct tiles_job *t, const struct unit *u, int span,
                         struct unit_scratch *s)
{
    int block = t->kernels->rows_max[t->j.kv->args.dtype];
    for (int r = 0; r < u->n_rows; r++)
        s->span[r] = (struct row_state){-INFINITY, 0};
    for (int chunk = 0; chunk < t->span / ATTENTION_CHUNK; chunk++) {
        int32_t base = span * t->span + chunk * ATTENTION_CHUNK;
        if (base + ATTENTION_CHUNK <= u->low || base >= u->high) continue;
        for (int r = 0; r < u->n_rows; r += block)
            rows_by_chunk(t, u, r, u->n_rows - r < block ? u->n_rows - r : block, base, s);
    }
}

static float *row_out(const struct tiles_job *t, const struct unit *u, int r)
{
    int row = u->row0 + r, token = u->token0 + row / u->n_heads, head = u->head0 + row % u->n_heads;
    return (float *)t->j.out.data + token * t->j.out.stride + (int64_t)head * t->j.args->head_dim;
}

/* Asks for the lines that unit_store will write: stores that miss hold up all others. */
static void unit_store_fetch(const struct tiles_job *t, const struct unit *u)
{
    for (int r = 0; r < u->n_rows; r++) {
        const float *out = row_out(t, u, r);
        for (int d = 0; d < t->j.args->head_dim; d += 16)
            __asm__ volatile("prefetchw %0" ::"m"(out[d]));
    }
}

static void unit_store(const struct tiles_job *t, const struct unit *u, struct unit_scratch *s)
{
    int n = t->j.args->head_dim;
    for (int r = 0; r < u->n_rows; r++) {
        float *from = s->total_out + r * n;
        t->j.rows->scale(from, n, 1.0f / s->total[r].sum, 0);
        memcpy(row_out(t, u, r), from, (size_t)n * sizeof *from);
    }
}

/* --- whole units --- */

static void unit_run(const void *args, int index, void *scratch)
{
    const struct tiles_job *t = args;
    struct unit_scratch *s = scratch;
    struct unit u;
    int n = t->j.args->head_dim;
    if (!unit_find(t, index, &u)) return;
    queries_load(t, &u, s);
    unit_store_fetch(t, &u);
    for (int span = u.low / t->span; span * t->span < u.high; span++) {
        span_compute(t, &u, span, s);
        for (int r = 0; r < u.n_rows; r++)
            state_merge(t->j.rows, &s->total[r], s->total_out + r * n, s->span[r],
                        s->span_out + r * n, n);
    }
    unit_store(t, &u, s);
}

/* --- units cut into spans --- */

static float *partial_at(const struct tiles_job *t, int index, int span)
{
    return t->partial + ((int64_t)index * t->spans + span) * t->rows * (t->j.args->head_dim + 2);
}

static void span_run(const void *args, int item, void *scratch)
{
    const struct tiles_job *t = args;
    struct unit_scratch *s = scratch;
    struct unit u;
    int span = item % t->spans, n = t->j.args->head_dim;
    if (!unit_find(t, item / t->spans, &u) || span * t->span >= u.high ||
        (span + 1) * t->span <= u.low)
        return;
    queries_load(t, &u, s);
    span_compute(t, &u, span, s);
    float *to = partial_at(t, item / t->spans, span);
    for (int r = 0; r < u.n_rows; r++, to += n + 2) {
        memcpy(to, s->span_out + r * n, (size_t)n * sizeof *to);
        to[n] = s->span[r].max;
        to[n + 1] = s->span[r].sum;
    }
}

static void spans_merge(const void *args, int index, void *scratch)
{
    const struct tiles_job *t = args;
    struct unit_scratch *s = scratch;
    struct unit u;
    int n = t->j.args->head_dim;
    if (!unit_find(t, index, &u)) return;
    for (int r = 0; r < u.n_rows; r++)
        s->total[r] = (struct row_state){-INFINITY, 0};
    for (int span = u.low / t->span; span * t->span < u.high; span++) {
        const float *from = partial_at(t, index, span);
        for (int r = 0; r < u.n_rows; r++, from += n + 2)
            state_merge(t->j.rows, &s->total[r], s->total_out + r * n,
                        (struct row_state){from[n], from[n + 1]}, from, n);
    }
    unit_store(t, &u, s);
}

/* --- the choice between them --- */

static int units_count(struct tiles_job *t, int32_t *unit_start)
{
    const struct batch *batch = t->j.batch;
    int total = 0;
    for (int s = 0; s < batch->n_seqs; s++) {
        int rows = (batch->seq_start[s + 1] - batch->seq_start[s]) * t->j.args->group;
        int spans = (batch->context_len[s] + t->span - 1) / t->span;
        unit_start[s] = total;
        total += (rows + UNIT_ROWS - 1) / UNIT_ROWS;
        t->rows = rows > t->rows ? rows : t->rows;
        t->spans = spans > t->spans ? spans : t->spans;
    }
    t->rows = t->rows < UNIT_ROWS ? t->rows : UNIT_ROWS;
    unit_start[batch->n_seqs] = total;
    t->unit_start = unit_start;
    t->units_per_head = total;
    return total * t->j.args->n_kv_heads;
}

void attend_tiles(struct cpu_backend *cpu, const struct attention_job *job)
{
    const struct kv_cache *kv = job->kv;
    struct tiles_job t = {.j = *job,
                          .kernels = cpu->attention,
                          .partial = cpu->attention_partial,
                          .span = cpu->attention_span,
                          .block_shift = __builtin_ctz((unsigned)kv->args.block_size)};
    ASSERT_CMP(job->batch->n_seqs, <=, cpu->n_seqs_max);
    int units = units_count(&t, cpu->unit_start);
    size_t bytes = (size_t)units * (size_t)t.spans * (size_t)t.rows *
                   (size_t)(job->args->head_dim + 2) * sizeof(float);
    bool split = units < UNITS_PER_THREAD * pool_n_threads(cpu->pool) &&
                 pool_n_threads(cpu->pool) > 1 && t.spans > 1 && bytes <= ATTENTION_PARTIAL_BYTES;
    /* No commit, so no rescue: a late thread would read the next step's batch. */
    struct pool_job run = {
        .compute = unit_run, .args = &t, .args_bytes = sizeof t, .n_chunks = units};
    if (split) {
        struct pool_job spans = {
            .compute = span_run, .args = &t, .args_bytes = sizeof t, .n_chunks = units * t.spans};
        pool_run(cpu->pool, &spans);
        run.compute = spans_merge;
    }
    pool_run(cpu->pool, &run);
}

bool attend_tiles_can(const struct cpu_backend *cpu, const struct attention_job *job)
{
    const struct kv_cache *kv = job->kv;
    return cpu->attention && cpu->attention->chunk[kv->args.dtype] && kv->tile == TILE &&
           kv->args.head_dim % 16 == 0;
}
