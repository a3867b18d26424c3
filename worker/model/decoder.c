/* Attention block, feed-forward block, logits: sequences of backend operations.
 *
 * The residual stream x and the last block's output delta are kept apart; the norm joins them where
 * the next block begins, within the product that alone reads it where the backend can (struct
 * norm_input), so nothing is added twice and nothing is copied. */
#include "worker/model/decoder.h"
#include "base/clock.h"
#include "base/mem.h"

struct widths {
    int64_t qkv, att, ffn, scratch; /* elements a token */
    bool fused;                     /* the backend does a gated feed-forward in one pass */
};

static struct widths widths_of(const struct model_config *c, struct group g,
                               const struct backend *b)
{
    struct shard_heads heads = shard_heads(c->n_heads, c->n_kv_heads, g.rank, g.size);
    struct widths w = {.fused = b->ops->feed_forward != NULL};
    w.att = shard_count(heads.q) * c->head_dim;
    w.qkv = w.att + 2 * shard_count(heads.kv) * c->head_dim;
    w.ffn = shard_count(shard_rounded(c->ffn, 128, g.rank, g.size));
    int64_t before = c->gated ? w.fused ? 0 : 2 * w.ffn : w.ffn;
    int64_t feed =
        before + w.ffn; /* experts have their scratch in the backend, but for the scores */
    if (c->n_experts) feed = (c->n_experts * 4 + 1) / (int64_t)dtype_bytes(b->activation_dtype);
    w.scratch = w.qkv + w.att > feed ? w.qkv + w.att : feed;
    return w;
}

uint64_t decoder_bytes(const struct model_config *c, struct group g, const struct backend *b,
                       int n_tokens_max, int logits_rows_max)
{
    struct widths w = widths_of(c, g, b);
    uint64_t a = dtype_bytes(b->activation_dtype), n = (uint64_t)n_tokens_max;
    uint64_t embedded = c->embed_dim != c->hidden ? (uint64_t)c->embed_dim : 0;
    return n * a * (3 * (uint64_t)c->hidden + (uint64_t)w.scratch + embedded) +
           (uint64_t)logits_rows_max * (uint64_t)c->vocab_size * 4;
}

void decoder_collective_sizes(const struct decoder *d, size_t *out_reduce, size_t *out_gather)
{
    const struct model_config *c = &d->model->config;
    *out_reduce = (size_t)d->n_tokens_max * (size_t)c->hidden *
                  dtype_bytes(d->model->backend->activation_dtype);
    *out_gather = (size_t)d->logits_rows_max * (size_t)c->vocab_size * 4;
}

enum err decoder_init(struct decoder *d, struct model *model, int n_tokens_max, int logits_rows_max)
{
    struct backend *b = model->backend;
    const struct model_config *c = &model->config;
    size_t a = dtype_bytes(b->activation_dtype), n = (size_t)n_tokens_max,
           hidden = n * (size_t)c->hidden * a;
    enum err e = OK;
    *d = (struct decoder){
        .model = model, .n_tokens_max = n_tokens_max, .logits_rows_max = logits_rows_max};
    TRY_OUT(b->ops->alloc(b, hidden, &d->x));
    TRY_OUT(b->ops->alloc(b, hidden, &d->h));
    TRY_OUT(b->ops->alloc(b, hidden, &d->delta));
    TRY_OUT(b->ops->alloc(b, n * a * (size_t)widths_of(c, model->group, b).scratch, &d->scratch));
    if (c->embed_dim != c->hidden)
        TRY_OUT(b->ops->alloc(b, n * a * (size_t)c->embed_dim, &d->embedded));
    TRY_OUT(
        b->ops->alloc(b, (size_t)logits_rows_max * (size_t)c->vocab_size * 4, (void **)&d->logits));
out:
    if (e) decoder_fini(d);
    return e;
}

void decoder_fini(struct decoder *d)
{
    void *all[] = {d->x, d->h, d->delta, d->scratch, d->embedded, d->logits};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (all[i]) d->model->backend->ops->release(d->model->backend, all[i]);
    *d = (struct decoder){0};
}

static struct tensor view(const struct decoder *d, void *data, int64_t rows, int64_t cols)
{
    return (struct tensor){data, d->model->backend->activation_dtype, rows, cols, cols};
}

static struct tensor rows_view(struct tensor t, int64_t first, int64_t rows)
{
    if (t.data) t.data = (char *)t.data + (size_t)(first * t.stride) * dtype_bytes(t.dtype);
    t.rows = rows;
    return t;
}

static void swap(struct tensor *a, struct tensor *b)
{
    struct tensor t = *a;
    *a = *b;
    *b = t;
}

/* Where partial sums go: straight into the collective's memory where it has some of its own. */
static struct tensor partial_of(struct decoder *d, struct tensor delta)
{
    struct collective *c = d->collective;
    if (d->model->group.size > 1 && c->ops->reduce_buffer) {
        void *direct =
            c->ops->reduce_buffer(c, (size_t)(delta.rows * delta.cols) * dtype_bytes(delta.dtype));
        if (direct) delta.data = direct;
    }
    return delta;
}

/* delta = partial summed over the ranks: the one place with an all-reduce in it. The sum may stay
 * in the collective's memory unless it has to outlive the collective that follows (last). */
static enum err ranks_sum(struct decoder *d, struct tensor delta, struct tensor partial, bool last,
                          struct tensor *out_delta)
{
    struct collective *c = d->collective;
    int64_t begin = clock_monotonic_ns();
    if (d->model->group.size == 1) {
        *out_delta = delta; /* which the partial is */
        return OK;
    }
    if (c->ops->all_reduce_near && !last)
        TRY(c->ops->all_reduce_near(c, &delta, partial));
    else
        TRY(c->ops->all_reduce_sum(c, delta, partial));
    d->collective_ns += clock_monotonic_ns() - begin;
    *out_delta = delta;
    return OK;
}

static struct tensor normed(struct backend *b, const struct norm_input *in)
{
    if (!in->norm) return in->x;
    b->ops->add_norm(b, in->x, in->delta, in->norm, in->h);
    return in->h;
}

static void norm_matmul(struct backend *b, struct tensor out, const struct norm_input *in,
                        const struct weight *w)
{
    if (b->ops->norm_matmul)
        b->ops->norm_matmul(b, out, in, w);
    else
        b->ops->matmul(b, out, normed(b, in), w);
}

/* delta = x w^T, summed. */
static enum err linear_in(struct decoder *d, struct tensor x, const struct weight *w, bool last,
                          struct tensor *out_delta)
{
    struct backend *b = d->model->backend;
    struct tensor delta = view(d, d->delta, x.rows, d->model->config.hidden);
    struct tensor partial = partial_of(d, delta);
    b->ops->matmul(b, partial, x, w);
    return ranks_sum(d, delta, partial, last, out_delta);
}

/* Each rank holds a slice of every expert and routes alike, so the sums of slices are summed as
 * those of a dense layer are. */
static enum err experts(struct decoder *d, const struct layer *layer, struct tensor in, bool last,
                        struct tensor *out_delta)
{
    struct backend *b = d->model->backend;
    int n = d->model->config.n_experts;
    struct tensor scores = {d->scratch, DTYPE_F32, in.rows, n, n};
    struct tensor delta = view(d, d->delta, in.rows, d->model->config.hidden);
    struct tensor partial = partial_of(d, delta);
    b->ops->matmul(b, scores, in, layer->router);
    b->ops->moe_forward(b, partial, in, scores, layer->moe);
    return ranks_sum(d, delta, partial, last, out_delta);
}

static enum err feed_forward(struct decoder *d, const struct layer *layer,
                             const struct norm_input *in, bool last, struct tensor *out_delta)
{
    struct backend *b = d->model->backend;
    const struct model_config *c = &d->model->config;
    if (layer->moe) return experts(d, layer, normed(b, in), last, out_delta);
    int64_t ffn = shard_count(d->model->ffn), rows = in->x.rows;
    struct tensor act = view(d, d->scratch, rows, ffn);
    if (c->gated && b->ops->feed_forward) {
        struct tensor delta = view(d, d->delta, rows, c->hidden), partial = partial_of(d, delta);
        b->ops->feed_forward(b, partial, in, layer->up, layer->down, act, c->activation);
        return ranks_sum(d, delta, partial, last, out_delta);
    }
    struct tensor before =
        view(d, (char *)d->scratch + (size_t)(rows * ffn) * dtype_bytes(act.dtype), rows,
             c->gated ? 2 * ffn : ffn);
    norm_matmul(b, before, in, layer->up);
    b->ops->activate(b, act, before, c->activation, c->gated);
    return linear_in(d, act, layer->down, last, out_delta);
}

static struct tensor embed(struct decoder *d, const struct batch *batch)
{
    struct model *m = d->model;
    struct backend *b = m->backend;
    struct tensor x = view(d, d->x, batch->n_tokens, m->config.hidden);
    if (m->project_in) {
        struct tensor narrow = view(d, d->embedded, batch->n_tokens, m->config.embed_dim);
        b->ops->embed(b, narrow, m->embed, batch);
        b->ops->matmul(b, x, narrow, m->project_in);
    } else {
        b->ops->embed(b, x, m->embed, batch);
    }
    if (m->positions)
        b->ops->add_positions(b, x, m->positions, m->config.arch->position_offset, batch);
    return x;
}

/* After the last layer's attention only the rows with wanted logits go on. */
static void keep_rows_out(struct decoder *d, const struct batch *batch, struct tensor *x,
                          struct tensor *h, struct tensor *att)
{
    struct backend *b = d->model->backend;
    if (batch->n_rows_out == batch->n_tokens) return;
    struct tensor few =
        view(d, d->scratch, batch->n_rows_out, att->cols); /* qkv was read: its place is free */
    b->ops->gather(b, few, *att, batch);
    *att = few;
    few = rows_view(*h, 0, batch->n_rows_out);
    b->ops->gather(b, few, *x, batch);
    *h = rows_view(*x, 0, batch->n_rows_out);
    *x = few;
}

enum err decoder_forward(struct decoder *d, const struct batch *batch)
{
    struct model *m = d->model;
    struct backend *b = m->backend;
    const struct model_config *c = &m->config;
    struct widths w = widths_of(c, m->group, b);
    bool pre = c->norm_place == NORM_PRE;
    struct tensor x = embed(d, batch), h = view(d, d->h, batch->n_tokens, c->hidden), delta = {0};
    struct tensor qkv = view(d, d->scratch, batch->n_tokens, w.qkv);
    struct tensor att =
        view(d, (char *)d->scratch + (size_t)(batch->n_tokens * w.qkv) * dtype_bytes(x.dtype),
             batch->n_tokens, w.att);
    d->collective_ns = 0;
    for (int i = 0; i < c->n_layers; i++) {
        const struct layer *layer = &m->layers[i];
        struct norm_input in = {x, delta, h, pre ? &layer->attention_norm : NULL};
        norm_matmul(b, qkv, &in, layer->qkv);
        b->ops->qkv_prepare(b, qkv, d->kv, &layer->attention, batch);
        if (i == c->n_layers - 1 && !batch->n_rows_out) return OK;
        b->ops->attend(b, att, qkv, d->kv, &layer->attention, batch);
        if (i == c->n_layers - 1) keep_rows_out(d, batch, &x, &h, &att);
        TRY(linear_in(d, att, layer->out, false, &delta));
        if (!pre) {
            b->ops->add_norm(b, x, delta, &layer->attention_norm, h);
            swap(&x, &h);
        }
        in = (struct norm_input){x, delta, h, pre ? &layer->ffn_norm : NULL};
        TRY(feed_forward(d, layer, &in, i == c->n_layers - 1, &delta));
        if (!pre) {
            b->ops->add_norm(b, x, delta, &layer->ffn_norm, h);
            swap(&x, &h);
            delta.data = NULL;
        }
    }
    d->rows = x;
    d->rows_delta = delta;
    return OK;
}

/* The final norm of some rows. Its scratch is the part of d->h or d->x that holds no rows. */
static struct norm_input final_norm(struct decoder *d, int first, int n)
{
    struct model *m = d->model;
    struct backend *b = m->backend;
    struct norm_input in = {rows_view(d->rows, first, n), rows_view(d->rows_delta, first, n),
                            view(d, d->rows.data == d->x ? d->h : d->x, n, m->config.hidden),
                            m->final_norm.weight ? &m->final_norm : NULL};
    if (!in.norm && in.delta.data) b->ops->add(b, in.x, in.delta);
    return in;
}

/* What the output projection multiplies: normed rows, as wide as the embedding. */
static struct norm_input head_input(struct decoder *d, int first, int n)
{
    struct model *m = d->model;
    struct norm_input in = final_norm(d, first, n);
    ASSERT_CMP(n, <=, d->logits_rows_max);
    if (!m->project_out) return in;
    struct tensor narrow = view(d, d->embedded, n, m->config.embed_dim);
    norm_matmul(m->backend, narrow, &in, m->project_out);
    return (struct norm_input){.x = narrow};
}

static enum err ranks_gather(struct decoder *d, struct tensor out, struct tensor part,
                             const int32_t *column_start)
{
    int64_t begin = clock_monotonic_ns();
    TRY(d->collective->ops->all_gather(d->collective, out, part, column_start));
    d->collective_ns += clock_monotonic_ns() - begin;
    return OK;
}

enum err decoder_logits(struct decoder *d, int first, int n, struct tensor *out_logits)
{
    struct model *m = d->model;
    int64_t vocab = m->config.vocab_size;
    struct norm_input in = head_input(d, first, n);
    struct tensor logits = {d->logits, DTYPE_F32, n, vocab, vocab}, part = logits;
    part.data = d->logits + m->vocab.begin;
    part.cols = shard_count(m->vocab);
    norm_matmul(m->backend, part, &in, m->lm_head);
    if (m->group.size > 1) TRY(ranks_gather(d, logits, part, m->vocab_start));
    *out_logits = logits;
    return OK;
}

bool decoder_has_argmax(const struct decoder *d)
{
    const struct model *m = d->model;
    /* of ranks, each row's pairs lie where its logits would: see decoder_argmax */
    return m->backend->ops->matmul_argmax && m->config.vocab_size >= 3 + 2 * m->group.size;
}

/* Every rank's best of each row, [rows][ranks][2] of value and token, which a float holds exactly.
 * Ranks hold the vocabulary in order, so an equal value of a later one does not win. */
static void best_of_ranks(const float *all, int n_ranks, int n, int32_t *out_tokens)
{
    for (int i = 0; i < n; i++, all += 2 * n_ranks) {
        const float *best = all;
        for (int r = 1; r < n_ranks; r++)
            if (all[2 * r] > best[0]) best = all + 2 * r;
        out_tokens[i] = (int32_t)best[1];
    }
}

enum err decoder_argmax(struct decoder *d, int first, int n, int32_t *out_tokens)
{
    struct model *m = d->model;
    int32_t start[COLLECTIVE_RANKS_MAX + 1];
    int size = m->group.size;
    struct norm_input in = head_input(d, first, n);
    struct backend *b = m->backend;
    float *value = d->logits, *mine = value + n, *all = mine + 2 * n; /* far less than the logits */
    if (b->ops->norm_matmul_argmax)
        b->ops->norm_matmul_argmax(b, &in, m->lm_head, out_tokens, value);
    else
        b->ops->matmul_argmax(b, normed(b, &in), m->lm_head, out_tokens, value);
    if (size == 1) return OK;
    for (int i = 0; i < n; i++) {
        mine[2 * i] = value[i];
        mine[2 * i + 1] = (float)(out_tokens[i] + m->vocab.begin);
    }
    for (int r = 0; r <= size; r++)
        start[r] = 2 * r;
    TRY(ranks_gather(d, (struct tensor){all, DTYPE_F32, n, 2 * size, 2 * size},
                     (struct tensor){mine, DTYPE_F32, n, 2, 2}, start));
    best_of_ranks(all, size, n, out_tokens);
    return OK;
}
