/* Attention over a paged cache in tiles of 16 tokens: the driver of the lane kernels.
 *
 * The work is cut into units: up to 32 query rows (heads of tokens) that share a KV head of one
 * sequence. A unit walks the chunks of its context; K and V come from memory once a unit. When
 * units are too few for the threads, as in decoding a few long sequences, each span of each unit is
 * an item of its own and a second job merges the spans. Both ways do the same operations in the
 * same order (see attention.h), so they give the same bits. */
#include "kernels/cpu/attention.h"
#include "kernels/half.h"

#include <math.h>
#include <string.h>

enum {
    UNIT_ROWS = 32,
    ROWS_MAX = 8,       /* of one call */
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
    int n_after;       /* rows of the sequence and head that follow */
    int32_t low, high; /* tokens that any of its rows sees */
    const int32_t *blocks;
};

/* One of them. */
struct unit_row {
    const float *q, *q_next; /* the query, and that of the row a unit further on or its own */
    float *out;
    int32_t low, high; /* tokens that it sees */
};

/* What a row knows of the context so far, beside its weighted values. */
struct row_state {
    float max, sum;
};
struct row_states {
    struct row_state row[UNIT_ROWS];
    float out[UNIT_ROWS * HEAD_DIM_MAX];
};
/* Tiles of a chunk, which all row blocks of a unit share. */
struct chunk_tiles {
    int32_t from; /* the token that they begin with */
    int n;
    const uint8_t *k[CHUNK_TILES], *v[CHUNK_TILES];
    const uint8_t *k_ahead[CHUNK_TILES], *v_ahead[CHUNK_TILES];
    const float *k_scale[CHUNK_TILES], *v_scale[CHUNK_TILES];
};
/* Scratch of a thread. */
struct unit_scratch {
    float scores[ROWS_MAX * ATTENTION_CHUNK], chunk_out[ROWS_MAX * HEAD_DIM_MAX];
    float chunk_max[ROWS_MAX], chunk_sum[ROWS_MAX];
    float q[UNIT_ROWS * HEAD_DIM_MAX];
    struct unit_row rows[UNIT_ROWS];
    struct row_states span, total;
    struct chunk_tiles tiles;
    struct chunk_call call;
    const uint8_t *far[2 * UNIT_ROWS], *far_k[CHUNK_TILES], *far_v[CHUNK_TILES];
    int n_far, far_next;
};

size_t attention_scratch_bytes(void)
{
    return sizeof(struct unit_scratch);
}

/* Tokens that those at a position see: [low, high). */
static void range_find(const struct tiles_job *t, int32_t position, int32_t *out_low,
                       int32_t *out_high)
{
    int32_t window = t->j.args->window;
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
    u.n_after = rows - u.n_rows;
    const int32_t *positions = batch->positions + u.token0;
    int32_t ignored;
    range_find(t, positions[u.row0 / u.n_heads], &u.low, &ignored);
    range_find(t, positions[(u.row0 + u.n_rows - 1) / u.n_heads], &ignored, &u.high);
    *out = u;
    return true;
}

static void rows_find(const struct tiles_job *t, const struct unit *u, struct unit_row *rows)
{
    int n = t->j.args->head_dim;
    int token = u->token0 + u->row0 / u->n_heads, head = u->row0 % u->n_heads;
    int tokens_on = UNIT_ROWS / u->n_heads, heads_on = UNIT_ROWS % u->n_heads;
    for (int r = 0; r < u->n_rows; r++) {
        int next = token + tokens_on, next_head = head + heads_on;
        if (next_head >= u->n_heads) next++, next_head -= u->n_heads;
        const float *qkv = (const float *)t->j.qkv.data + (int64_t)u->head0 * n;
        rows[r].q = qkv + token * t->j.qkv.stride + (int64_t)head * n;
        rows[r].q_next =
            r < u->n_after ? qkv + next * t->j.qkv.stride + (int64_t)next_head * n : rows[r].q;
        rows[r].out =
            (float *)t->j.out.data + token * t->j.out.stride + (int64_t)(u->head0 + head) * n;
        range_find(t, t->j.batch->positions[token], &rows[r].low, &rows[r].high);
        if (++head == u->n_heads) head = 0, token++;
    }
}

/* What is far away and soon needed, in pieces as long as a tile: the lines that unit_store will
 * write, since stores that miss hold up all others, and the queries of the next unit. */
static void far_find(const struct unit *u, int width, size_t tile_bytes, struct unit_scratch *s)
{
    const uint8_t *last = NULL;
    s->n_far = s->far_next = 0;
    for (int r = 0; r < u->n_rows; r++) {
        const uint8_t *out = (const uint8_t *)s->rows[r].out;
        if (last && out > last && out + (size_t)width * sizeof(float) <= last + tile_bytes)
            continue;
        last = out;
        s->far[s->n_far++] = out;
        s->far[s->n_far++] = (const uint8_t *)s->rows[r].q_next;
    }
}

/* Gives n of them, near ones when there are no more. */
static const uint8_t *const *far_take(struct unit_scratch *s, int n, const uint8_t *const *near,
                                      const uint8_t **out)
{
    if (s->far_next == s->n_far) return near;
    for (int i = 0; i < n; i++)
        out[i] = s->far_next < s->n_far ? s->far[s->far_next++] : near[i];
    return out;
}

/* Everything of a unit that its chunks share. */
static void unit_begin(const struct tiles_job *t, const struct unit *u, struct unit_scratch *s)
{
    const struct attention_args *a = t->j.args;
    int n = a->head_dim;
    query_kernel *convert = t->kernels->query[t->j.kv->args.dtype];
    rows_find(t, u, s->rows);
    far_find(u, n, t->j.kv->tile_bytes, s);
    for (int r = 0; r < u->n_rows; r++) {
        if (convert)
            convert(s->q + r * n, s->rows[r].q, n);
        else
            memcpy(s->q + r * n, s->rows[r].q, (size_t)n * sizeof(float));
    }
    s->call = (struct chunk_call){.width = n,
                                  .q_stride = n * (int64_t)sizeof(float),
                                  .scale = a->scale,
                                  .softcap = a->softcap,
                                  .scores = s->scores,
                                  .max = s->chunk_max,
                                  .sum = s->chunk_sum};
}

static void states_clear(struct row_states *states, int n_rows)
{
    for (int r = 0; r < n_rows; r++)
        states->row[r] = (struct row_state){-INFINITY, 0};
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

/* The tiles that the unit sees of the chunk at base. */
static void tiles_find(const struct tiles_job *t, const struct unit *u, int32_t base,
                       struct chunk_tiles *out)
{
    const struct kv_cache *kv = t->j.kv;
    int ahead = AHEAD_BYTES / (int)kv->tile_bytes;
    ahead = ahead < 1 ? 1 : ahead > CHUNK_TILES / 2 ? CHUNK_TILES / 2 : ahead;
    bool scaled = kv->args.dtype == DTYPE_I8;
    int32_t from = u->low > base ? u->low / TILE * TILE : base,
            end = u->high < base + ATTENTION_CHUNK ? u->high : base + ATTENTION_CHUNK;
    int n = (end - from + TILE - 1) / TILE;
    out->from = from;
    out->n = n;
    for (int i = 0; i < n; i++) {
        out->k[i] = tile_at(t, u, from + i * TILE);
        out->v[i] = out->k[i] + kv->v_offset;
        out->k_ahead[i] = stream_at(t, u, from, n, i + ahead);
        out->v_ahead[i] = stream_at(t, u, from, n, n + i + ahead);
        if (!scaled) continue;
        out->k_scale[i] = (const float *)(const void *)(out->k[i] + kv->scale_offset);
        out->v_scale[i] = (const float *)(const void *)(out->v[i] + kv->scale_offset);
    }
}

/* Adds (max, sum, out) of a later piece of context to the state so far. keep and add: what the
 * exponentials of either are by the larger of both maxima. */
static void state_blend(const struct row_kernels *rows, struct row_state *state, float *out,
                        struct row_state piece, const float *piece_out, float keep, float add,
                        int n)
{
    if (piece.sum == 0.0f && piece.max == -INFINITY) return;
    if (state->max == -INFINITY) {
        *state = piece;
        memcpy(out, piece_out, (size_t)n * sizeof *out);
        return;
    }
    rows->blend(out, piece_out, keep, add, n);
    state->sum = state->sum * keep + piece.sum * add;
    state->max = piece.max > state->max ? piece.max : state->max;
}

static void state_merge(const struct row_kernels *rows, struct row_state *state, float *out,
                        struct row_state piece, const float *piece_out, int n)
{
    float keep, add;
    rows->shares(&keep, &add, &state->max, &piece.max, 1);
    state_blend(rows, state, out, piece, piece_out, keep, add, n);
}

/* The same for the rows of a call. */
static void call_merge(const struct row_kernels *rows, const struct chunk_call *c,
                       struct row_state *row, float *out)
{
    float so_far[ROWS_MAX] = {0}, keep[ROWS_MAX], add[ROWS_MAX];
    for (int r = 0; r < c->rows; r++)
        so_far[r] = row[r].max;
    rows->shares(keep, add, so_far, c->max, ROWS_MAX);
    for (int r = 0; r < c->rows; r++)
        if (c->low[r] < c->high[r]) /* else this row sees nothing of the chunk */
            state_blend(rows, &row[r], out + r * c->width, (struct row_state){c->max[r], c->sum[r]},
                        c->out + r * c->width, keep[r], add[r], c->width);
}

/* Rows [r0, r0 + rows) of the unit by the tiles of one chunk. */
static void rows_by_chunk(const struct tiles_job *t, int r0, int rows, struct row_states *states,
                          struct unit_scratch *s)
{
    const struct chunk_tiles *tiles = &s->tiles;
    struct chunk_call *c = &s->call;
    int32_t from = ATTENTION_CHUNK, to = 0, size = tiles->n * TILE;
    struct row_state *row = states->row + r0;
    float *out = states->out + r0 * c->width;
    bool begun = false;
    for (int r = 0; r < rows; r++) {
        int32_t low = s->rows[r0 + r].low - tiles->from, high = s->rows[r0 + r].high - tiles->from;
        c->low[r] = low > 0 ? low : 0;
        c->high[r] = high < size ? high : size;
        begun |= row[r].max != -INFINITY;
        if (c->low[r] >= c->high[r]) continue;
        from = c->low[r] < from ? c->low[r] : from;
        to = c->high[r] > to ? c->high[r] : to;
    }
    if (from >= to) return;
    int first = from / TILE;
    for (int r = 0; r < rows; r++)
        c->low[r] -= first * TILE, c->high[r] -= first * TILE;
    c->rows = rows;
    c->odd = (tiles->from / TILE + first) % 2;
    c->n_tiles = (to - first * TILE + TILE - 1) / TILE;
    c->k = tiles->k + first, c->v = tiles->v + first;
    if (r0 == 0) { /* the tiles of the others are near by now */
        c->k_ahead = tiles->k_ahead + first;
        c->v_ahead = tiles->v_ahead + first;
    } else {
        c->k_ahead = far_take(s, c->n_tiles, c->k, s->far_k);
        c->v_ahead = far_take(s, c->n_tiles, c->v, s->far_v);
    }
    if (t->j.kv->args.dtype == DTYPE_I8)
        c->k_scale = tiles->k_scale + first, c->v_scale = tiles->v_scale + first;
    c->q = s->q + r0 * c->width;
    c->out = begun ? s->chunk_out : out; /* the first piece is merged by being there */
    t->kernels->chunk[t->j.kv->args.dtype](c);
    if (begun) {
        call_merge(t->j.rows, c, row, out);
        return;
    }
    for (int r = 0; r < rows; r++)
        if (c->low[r] < c->high[r]) row[r] = (struct row_state){c->max[r], c->sum[r]};
}

/* All chunks of one span. */
static void span_compute(const struct tiles_job *t, const struct unit *u, int span,
                         struct row_states *out, struct unit_scratch *s)
{
    int block = t->kernels->rows_max[t->j.kv->args.dtype];
    states_clear(out, u->n_rows);
    for (int chunk = 0; chunk < t->span / ATTENTION_CHUNK; chunk++) {
        int32_t base = span * t->span + chunk * ATTENTION_CHUNK;
        if (base + ATTENTION_CHUNK <= u->low || base >= u->high) continue;
        tiles_find(t, u, base, &s->tiles);
        for (int r = 0; r < u->n_rows; r += block) {
            int rows = u->n_rows - r < block ? u->n_rows - r : block;
            rows_by_chunk(t, r, rows, out, s);
        }
    }
}

static void unit_store(const struct unit_row *rows, int n_rows, const struct row_states *states,
                       int width)
{
    const float *from = states->out;
    for (int r = 0; r < n_rows; r++, from += width) {
        float *restrict to = rows[r].out, by = 1.0f / states->row[r].sum;
        for (int d = 0; d < width; d++)
            to[d] = from[d] * by;
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
    unit_begin(t, &u, s);
    int first = u.low / t->span;
    span_compute(t, &u, first, &s->total, s);
    for (int span = first + 1; span * t->span < u.high; span++) {
        span_compute(t, &u, span, &s->span, s);
        for (int r = 0; r < u.n_rows; r++)
            state_merge(t->j.rows, &s->total.row[r], s->total.out + r * n, s->span.row[r],
                        s->span.out + r * n, n);
    }
    unit_store(s->rows, u.n_rows, &s->total, n);
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
    unit_begin(t, &u, s);
    span_compute(t, &u, span, &s->span, s);
    float *to = partial_at(t, item / t->spans, span);
    for (int r = 0; r < u.n_rows; r++, to += n + 2) {
        memcpy(to, s->span.out + r * n, (size_t)n * sizeof *to);
        to[n] = s->span.row[r].max;
        to[n + 1] = s->span.row[r].sum;
    }
}

static void spans_merge(const void *args, int index, void *scratch)
{
    const struct tiles_job *t = args;
    struct unit_scratch *s = scratch;
    struct unit u;
    int n = t->j.args->head_dim;
    if (!unit_find(t, index, &u)) return;
    rows_find(t, &u, s->rows);
    states_clear(&s->total, u.n_rows);
    for (int span = u.low / t->span; span * t->span < u.high; span++) {
        const float *from = partial_at(t, index, span);
        for (int r = 0; r < u.n_rows; r++, from += n + 2)
            state_merge(t->j.rows, &s->total.row[r], s->total.out + r * n,
                        (struct row_state){from[n], from[n + 1]}, from, n);
    }
    unit_store(s->rows, u.n_rows, &s->total, n);
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
