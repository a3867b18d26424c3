/* Goal: rope, the cache and attention are right for any mix of sequences, and graphs and prefixes
 * do not change what a token attends to.
 * Method: random sequences grow over several steps, in chunks and token by token, through block
 * tables in random order; after each step every output row is compared with attention in double
 * over that sequence's whole history, as it should lie in the cache (rounded as the cache rounds).
 * Cases: head sizes, groups cut unevenly between shards, windows, caps, 8-bit caches, block sizes,
 * lengths that wrap the kernel's ring, sequences without tokens, rope of both kinds, head norms. */
#include "tests/cuda/gear.h"

enum { SEQS_MAX = 6, HISTORY_MAX = 700, POSITIONS = 800 };

struct shape {
    int n_heads, n_kv_heads, dim, group, head_offset, kv_offset, block_size, rotary;
    enum dtype cache;
    bool pairs, head_norm;
    float softcap;
    int window;
    double tolerance;
};

struct world {
    struct backend *b;
    struct shape s;
    struct kv_cache *kv;
    struct attention_args args;
    struct both cosines, sines, q_norm, k_norm;
    int n_seqs, blocks_max, len[SEQS_MAX];
    int32_t *table;                   /* [n_seqs][blocks_max] */
    float *k[SEQS_MAX], *v[SEQS_MAX]; /* [HISTORY_MAX][n_kv_heads][dim] */
};

static void world_open(struct world *w, const struct shape *s, int n_seqs, bool fixed)
{
    struct backend_options o = gear_options();
    memset(w, 0, sizeof *w);
    o.deterministic = fixed;
    w->b = gear_open_with(&o);
    w->s = *s;
    w->n_seqs = n_seqs;
    w->blocks_max = HISTORY_MAX / s->block_size + 1;
    int n_blocks = w->blocks_max * n_seqs + 3;
    struct kv_cache_args kv = {2, s->n_kv_heads, s->dim, s->block_size, n_blocks, s->cache};
    must(w->b->ops->kv_create(w->b, &kv, &w->kv));
    assert_true(w->b->ops->kv_bytes(w->b, &kv) > 0);
    w->table = take((size_t)(n_seqs * w->blocks_max) * 4);
    for (int i = 0; i < n_seqs * w->blocks_max; i++)
        w->table[i] = i + 2;
    for (int i = n_seqs * w->blocks_max - 1; i > 0; i--) {
        int j = rand_int(0, i), t = w->table[i];
        w->table[i] = w->table[j], w->table[j] = t;
    }
    size_t history = (size_t)(HISTORY_MAX * s->n_kv_heads * s->dim) * 4;
    for (int q = 0; q < n_seqs; q++)
        w->k[q] = take(history), w->v[q] = take(history);
    w->cosines = both_new(w->b, POSITIONS, s->rotary / 2 ? s->rotary / 2 : 1,
                          s->rotary / 2 ? s->rotary / 2 : 1, DTYPE_F32);
    w->sines = both_new(w->b, POSITIONS, w->cosines.t.cols, w->cosines.t.cols, DTYPE_F32);
    for (int p = 0; p < POSITIONS; p++)
        for (int i = 0; i < s->rotary / 2; i++) {
            double angle = p * pow(10000, -2.0 * i / s->rotary);
            w->cosines.host[p * (s->rotary / 2) + i] = (float)cos(angle);
            w->sines.host[p * (s->rotary / 2) + i] = (float)sin(angle);
        }
    both_send(w->b, &w->cosines), both_send(w->b, &w->sines);
    w->q_norm = both_rand(w->b, 1, s->dim, s->dim, DTYPE_F32, 1.5f),
    w->k_norm = both_rand(w->b, 1, s->dim, s->dim, DTYPE_F32, 1.5f);
    w->args = (struct attention_args){.layer = 1,
                                      .n_heads = s->n_heads,
                                      .n_kv_heads = s->n_kv_heads,
                                      .head_dim = s->dim,
                                      .scale = 1 / sqrtf((float)s->dim),
                                      .softcap = s->softcap,
                                      .window = s->window,
                                      .rope_cos = s->rotary ? w->cosines.t.data : NULL,
                                      .rope_sin = s->rotary ? w->sines.t.data : NULL,
                                      .rotary_dim = s->rotary,
                                      .rope_pairs = s->pairs,
                                      .q_norm = s->head_norm ? w->q_norm.t.data : NULL,
                                      .k_norm = s->head_norm ? w->k_norm.t.data : NULL,
                                      .norm_epsilon = 1e-6f,
                                      .group = s->group,
                                      .head_offset = s->head_offset,
                                      .kv_offset = s->kv_offset};
}

static void world_close(struct world *w)
{
    struct backend *b = w->b;
    b->ops->kv_destroy(b, w->kv);
    both_free(b, &w->cosines), both_free(b, &w->sines), both_free(b, &w->q_norm),
        both_free(b, &w->k_norm);
    for (int q = 0; q < w->n_seqs; q++)
        mem_free(w->k[q]), mem_free(w->v[q]);
    mem_free(w->table);
    gear_close(b);
}

/* Norm and rope of one head in double; result in place. */
static void head_reference(const struct world *w, double *head, const float *norm, int position)
{
    int half = w->s.rotary / 2;
    if (norm) {
        double sum = 0;
        for (int i = 0; i < w->s.dim; i++)
            sum += head[i] * head[i] / w->s.dim;
        for (int i = 0; i < w->s.dim; i++)
            head[i] *= (double)norm[i] / sqrt(sum + 1e-6);
    }
    for (int i = 0; i < half; i++) {
        int first = w->s.pairs ? 2 * i : i, second = w->s.pairs ? 2 * i + 1 : i + half;
        double c = (double)w->cosines.host[position * half + i],
               s = (double)w->sines.host[position * half + i];
        double x = head[first], y = head[second];
        head[first] = x * c - y * s, head[second] = y * c + x * s;
    }
}

static void history_add(struct world *w, int q, int position, const float *row)
{
    int dim = w->s.dim;
    double head[256];
    for (int h = 0; h < 2 * w->s.n_kv_heads; h++) {
        bool is_v = h >= w->s.n_kv_heads;
        const float *from = row + (w->s.n_heads + h) * dim;
        float *to =
            (is_v ? w->v[q] : w->k[q]) + (position * w->s.n_kv_heads + h % w->s.n_kv_heads) * dim;
        for (int i = 0; i < dim; i++)
            head[i] = (double)from[i];
        if (!is_v) head_reference(w, head, w->s.head_norm ? w->k_norm.host : NULL, position);
        for (int i = 0; i < dim; i++)
            to[i] = w->s.cache == DTYPE_BF16 ? rounded((float)head[i]) : (float)head[i];
    }
}

static void attend_reference(const struct world *w, int q, int position, int h, const float *query,
                             double *out)
{
    int dim = w->s.dim, kv = (h + w->s.head_offset) / w->s.group - w->s.kv_offset;
    int low = w->s.window && position + 1 > w->s.window ? position + 1 - w->s.window : 0;
    double head[256], score[HISTORY_MAX], most = -INFINITY, sum = 0;
    for (int i = 0; i < dim; i++)
        head[i] = (double)query[i];
    head_reference(w, head, w->s.head_norm ? w->q_norm.host : NULL, position);
    for (int t = low; t <= position; t++) {
        const float *k = w->k[q] + (t * w->s.n_kv_heads + kv) * dim;
        score[t] = 0;
        for (int i = 0; i < dim; i++)
            score[t] += (double)rounded((float)head[i]) * (double)k[i];
        score[t] *= (double)w->args.scale;
        if (w->s.softcap > 0)
            score[t] = (double)w->s.softcap * tanh(score[t] / (double)w->s.softcap);
        most = fmax(most, score[t]);
    }
    for (int i = 0; i < dim; i++)
        out[i] = 0;
    for (int t = low; t <= position; t++) {
        double p = exp(score[t] - most);
        sum += p;
        for (int i = 0; i < dim; i++)
            out[i] += p * (double)w->v[q][(t * w->s.n_kv_heads + kv) * dim + i];
    }
    for (int i = 0; i < dim; i++)
        out[i] /= sum;
}

struct arrays {
    int32_t ids[160], slots[160], positions[160], places[160], starts[SEQS_MAX + 1], lens[SEQS_MAX],
        rows[1];
    struct batch batch;
};

static void arrays_fill(struct world *w, const int *n_new, struct arrays *a)
{
    int n = 0;
    memset(a, 0, sizeof *a);
    for (int q = 0; q < w->n_seqs; q++) {
        a->starts[q] = n;
        for (int i = 0; i < n_new[q]; i++, n++) {
            int position = w->len[q] + i;
            a->ids[n] = 1, a->slots[n] = q, a->positions[n] = position;
            a->places[n] =
                w->table[q * w->blocks_max + position / w->s.block_size] * w->s.block_size +
                position % w->s.block_size;
        }
        a->lens[q] = w->len[q] + n_new[q];
    }
    a->starts[w->n_seqs] = n;
    a->batch = (struct batch){n,         w->n_seqs,    0,         w->blocks_max, a->ids,
                              a->slots,  a->positions, a->starts, a->lens,       w->table,
                              a->places, a->rows};
}

/* One step of all sequences; optionally recorded as a graph and replayed. Checks every row. */
static void world_step(struct world *w, const int *n_new, bool graph)
{
    struct arrays *a = take(sizeof *a);
    arrays_fill(w, n_new, a);
    int n = a->batch.n_tokens, dim = w->s.dim, heads = w->s.n_heads + 2 * w->s.n_kv_heads;
    struct backend *b = w->b;
    struct both qkv = both_rand(b, n, heads * dim, heads * dim, DTYPE_BF16, 2),
                out = both_new(b, n, w->s.n_heads * dim, w->s.n_heads * dim, DTYPE_BF16);
    double *want = take((size_t)(n * w->s.n_heads * dim) * 8);
    void *recorded = NULL;
    b->ops->batch_begin(b, &a->batch);
    if (graph) must(b->ops->capture_begin(b));
    b->ops->qkv_prepare(b, qkv.t, w->kv, &w->args, &a->batch);
    b->ops->attend(b, out.t, qkv.t, w->kv, &w->args, &a->batch);
    if (graph) {
        must(b->ops->capture_end(b, &recorded));
        must(b->ops->replay(b, recorded));
    }
    must(b->ops->ticket_wait(b, b->ops->step_end(b)));
    for (int q = 0; q < w->n_seqs; q++)
        for (int i = 0; i < n_new[q]; i++)
            history_add(w, q, w->len[q] + i, qkv.host + (a->starts[q] + i) * heads * dim);
    for (int q = 0; q < w->n_seqs; q++) {
        for (int i = 0; i < n_new[q] * w->s.n_heads; i++) {
            int token = a->starts[q] + i / w->s.n_heads, h = i % w->s.n_heads;
            attend_reference(w, q, w->len[q] + i / w->s.n_heads, h,
                             qkv.host + (token * heads + h) * dim,
                             want + (token * w->s.n_heads + h) * dim);
        }
        w->len[q] += n_new[q];
    }
    expect_near(b, &out, want, 1.0 / 128, w->s.tolerance, "attend");
    b->ops->graph_destroy(b, recorded);
    both_free(b, &qkv), both_free(b, &out), mem_free(want), mem_free(a);
}

/* Prompts of different lengths, in chunks that end anywhere, mixed with decoding; then decoding
 * alone. */
static void world_run(const struct shape *s, int n_steps, bool fixed)
{
    struct world w;
    world_open(&w, s, 4, fixed);
    for (int step = 0; step < n_steps; step++) {
        int n_new[SEQS_MAX] = {step < 5 ? rand_int(17, 90) : 1, step % 2, step == 0 ? 16 : 1,
                               rand_int(0, 5)};
        world_step(&w, n_new, false);
    }
    int one[SEQS_MAX] = {1, 1, 1, 1};
    world_step(&w, one, !fixed);
    world_close(&w);
}

#define NEAR 0.02
static const struct shape shapes[] = {
    /* heads kv dim group offsets block rotary cache pairs norm cap window */
    {8, 2, 128, 4, 0, 0, 16, 128, DTYPE_BF16, false, false, 0, 0, NEAR},
    {6, 2, 64, 3, 0, 0, 32, 64, DTYPE_BF16, false, true, 0, 0, NEAR},
    {3, 3, 32, 1, 0, 0, 16, 16, DTYPE_BF16, true, false, 0, 40,
     NEAR}, /* a head each; part rotated; window */
    {5, 2, 80, 4, 2, 0, 48, 80, DTYPE_BF16, false, false, 30, 0,
     NEAR}, /* shard starts within a group; cap */
    {4, 2, 96, 3, 7, 2, 16, 0, DTYPE_BF16, false, false, 0, 0, NEAR}, /* kv offset; no rope */
    {7, 1, 16, 7, 0, 0, 64, 16, DTYPE_BF16, true, true, 20, 100, NEAR},
    {2, 1, 256, 2, 0, 0, 16, 64, DTYPE_BF16, false, false, 50, 33, NEAR},
    {20, 1, 32, 20, 0, 0, 16, 32, DTYPE_BF16, false, false, 0, 0,
     NEAR}, /* group wider than a decode tile */
    {8, 2, 128, 4, 0, 0, 16, 128, DTYPE_I8, false, false, 0, 0, 0.06},
    {4, 4, 64, 1, 0, 0, 32, 64, DTYPE_FP8_E4M3, false, false, 0, 70, 0.3},
    {6, 3, 96, 2, 0, 0, 16, 96, DTYPE_I8, true, true, 25, 0, 0.06},
    {2, 1, 256, 2, 0, 0, 32, 256, DTYPE_FP8_E4M3, false, false, 0, 0, 0.3},
    {5, 5, 16, 1, 0, 0, 16, 16, DTYPE_I8, false, false, 0, 0, 0.06},
    {4, 2, 64, 2, 0, 0, 16, 32, DTYPE_BF16, false, true, 0, 0, NEAR}, /* norm, half of it rotated */
};

/* HEDDLE_CUDA_QUICK: the plugin was built for two sizes of heads only. */
static bool left_out(const struct shape *s)
{
    return getenv("HEDDLE_CUDA_QUICK") && s->dim != 64 && s->dim != 128;
}

static void test_shapes(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++)
        if (!left_out(&shapes[i])) world_run(&shapes[i], 7, false);
}

static void test_shapes_deterministic(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i += 2)
        if (!left_out(&shapes[i])) world_run(&shapes[i], 6, true);
}

/* More sequences and heads than the partial results of split keys have room for. */
static void test_room_of_splits(void **state)
{
    struct world w;
    struct shape s = shapes[1];
    int grow[SEQS_MAX] = {60, 1, 10, 50, 1}, one[SEQS_MAX] = {1, 1, 1, 1, 1};
    (void)state;
    s.n_heads = s.n_kv_heads = 5, s.group = 1;
    world_open(&w, &s, 5, false);
    for (int step = 0; step < 4; step++)
        world_step(&w, grow, false);
    for (int step = 0; step < 3; step++)
        world_step(&w, one, false);
    world_close(&w);
}

/* Long enough that each warp's ring wraps several times even when keys are split. */
static void test_long(void **state)
{
    (void)state;
    for (int i = 0; i < 2; i++) {
        struct world w;
        struct shape s = shapes[i ? 8 : 0];
        int grow[SEQS_MAX] = {130, 1}, one[SEQS_MAX] = {1, 1};
        world_open(&w, &s, 2, false);
        for (int step = 0; step < 5; step++)
            world_step(&w, grow, false);
        world_step(&w, one, true);
        world_close(&w);
    }
}

/* A device of sm_80 has no bulk copies: the same through cp.async. */
static void test_older_device(void **state)
{
    const char *played = getenv("HEDDLE_FAKE_GPU");
    (void)state;
    if (played) skip();
    setenv("HEDDLE_FAKE_GPU", "sm=80", 1);
    world_run(&shapes[0], 6, false);
    world_run(&shapes[8], 6, false);
    if (!left_out(&shapes[6])) world_run(&shapes[6], 6, false);
    unsetenv("HEDDLE_FAKE_GPU");
}

static uint8_t *attend_bytes(struct world *w, const struct both *qkv, int first, int n,
                             struct both *out)
{
    struct arrays *a = take(sizeof *a);
    int n_new[SEQS_MAX] = {n}, heads = w->s.n_heads + 2 * w->s.n_kv_heads;
    arrays_fill(w, n_new, a);
    struct tensor part = qkv->t, to = out->t;
    part.data = (uint8_t *)part.data + (size_t)(first * heads * w->s.dim) * 2, part.rows = n;
    to.data = (uint8_t *)to.data + (size_t)(first * w->s.n_heads * w->s.dim) * 2, to.rows = n;
    w->b->ops->batch_begin(w->b, &a->batch);
    w->b->ops->qkv_prepare(w->b, part, w->kv, &w->args, &a->batch);
    w->b->ops->attend(w->b, to, part, w->kv, &w->args, &a->batch);
    must(w->b->ops->ticket_wait(w->b, w->b->ops->step_end(w->b)));
    w->len[0] += n;
    mem_free(a);
    return NULL;
}

/* With options.deterministic a token's row is the same bit by bit however its prompt was cut. */
static void test_chunks_bitwise(void **state)
{
    enum { N = 130 };
    static const int cuts[3][4] = {{N}, {1, 64, 63, 2}, {100, 1, 1, 28}};
    float *rows[3];
    (void)state;
    for (int c = 0; c < 3; c++) {
        struct world w;
        gear_rand = rand_seeded(77);
        world_open(&w, &shapes[1], 1, true);
        gear_rand = rand_seeded(5);
        int heads = w.s.n_heads + 2 * w.s.n_kv_heads;
        struct both qkv = both_rand(w.b, N, heads * w.s.dim, heads * w.s.dim, DTYPE_BF16, 2),
                    out =
                        both_new(w.b, N, w.s.n_heads * w.s.dim, w.s.n_heads * w.s.dim, DTYPE_BF16);
        for (int i = 0, at = 0; i < 4 && cuts[c][i]; at += cuts[c][i++])
            attend_bytes(&w, &qkv, at, cuts[c][i], &out);
        rows[c] = both_get(w.b, &out);
        assert_memory_equal(rows[c], rows[0], (size_t)(N * w.s.n_heads * w.s.dim) * 4);
        both_free(w.b, &qkv), both_free(w.b, &out);
        world_close(&w);
    }
    for (int c = 0; c < 3; c++)
        mem_free(rows[c]);
}

/* Blocks copied, saved and loaded serve as the originals did. */
static void test_blocks_move(void **state)
{
    (void)state;
    for (int i = 0; i < 2; i++) {
        struct world w;
        int grow[SEQS_MAX] = {100, 40}, one[SEQS_MAX] = {1, 1};
        world_open(&w, &shapes[i ? 8 : 0], 2, false);
        struct backend *b = w.b;
        world_step(&w, grow, false);
        struct kv_cache_args one_block = {2, w.s.n_kv_heads, w.s.dim, w.s.block_size, 1, w.s.cache};
        void *saved = take(b->ops->kv_bytes(b, &one_block));
        int32_t from[2] = {w.table[0], w.table[1]},
                to[2] = {0, 1}; /* blocks 0 and 1 are nobody's */
        b->ops->kv_copy(b, w.kv, from, to, 2);
        w.table[0] = 0, w.table[1] = 1;
        b->ops->kv_save(b, w.kv, w.table[2], saved);
        must(b->ops->sync(b));
        b->ops->kv_load(b, w.kv, from[0], saved);
        w.table[2] = from[0];
        world_step(&w, one, false);
        mem_free(saved);
        world_close(&w);
    }
}

/* What a sequence left in a block must not reach the next one that uses it: here NaN everywhere. */
static void test_stale_blocks(void **state)
{
    (void)state;
    for (int i = 0; i < 4; i++) {
        struct world w;
        int grow[SEQS_MAX] = {90, 37}, one[SEQS_MAX] = {1, 1};
        world_open(&w, &shapes[i % 2 ? 8 : 0], 2, i >= 2);
        struct arrays *a = take(sizeof *a);
        arrays_fill(&w, grow, a);
        int n = a->batch.n_tokens, cols = (w.s.n_heads + 2 * w.s.n_kv_heads) * w.s.dim;
        struct both bad = both_new(w.b, n, cols, cols, DTYPE_BF16);
        for (int j = 0; j < n * cols; j++)
            bad.host[j] = NAN;
        both_send(w.b, &bad);
        w.b->ops->batch_begin(w.b, &a->batch);
        w.b->ops->qkv_prepare(w.b, bad.t, w.kv, &w.args, &a->batch);
        must(w.b->ops->ticket_wait(w.b, w.b->ops->step_end(w.b)));
        grow[0] = 21, grow[1] = 3; /* fewer tokens in the same blocks */
        world_step(&w, grow, false);
        world_step(&w, one, false);
        both_free(w.b, &bad), mem_free(a);
        world_close(&w);
    }
}

static void test_refused(void **state)
{
    struct backend *b = gear_open();
    struct kv_cache *kv = NULL;
    struct kv_cache_args ok = {1, 1, 64, 16, 2, DTYPE_BF16}, odd = ok, small = ok, other = ok;
    (void)state;
    odd.head_dim = 72, small.block_size = 8, other.dtype = DTYPE_F32;
    assert_int_equal(b->ops->kv_create(b, &odd, &kv), ERR_UNSUPPORTED);
    assert_non_null(strstr(err_detail(), "72"));
    assert_int_equal(b->ops->kv_create(b, &small, &kv), ERR_INVALID);
    assert_int_equal(b->ops->kv_create(b, &other, &kv), ERR_UNSUPPORTED);
    assert_null(kv);
    gear_close(b);
}

/* A step that reads a prompt cannot be a graph; refusing leaves the backend usable. */
static void test_prefill_graph_refused(void **state)
{
    struct world w;
    int grow[SEQS_MAX] = {40}, one[SEQS_MAX] = {1};
    struct arrays *a = take(sizeof *a);
    void *graph = NULL;
    (void)state;
    world_open(&w, &shapes[0], 1, false);
    arrays_fill(&w, grow, a);
    int cols = 12 * 128;
    struct both qkv = both_rand(w.b, 40, cols, cols, DTYPE_BF16, 1),
                out = both_new(w.b, 40, 8 * 128, 8 * 128, DTYPE_BF16);
    w.b->ops->batch_begin(w.b, &a->batch);
    must(w.b->ops->capture_begin(w.b));
    w.b->ops->attend(w.b, out.t, qkv.t, w.kv, &w.args, &a->batch);
    assert_int_equal(w.b->ops->capture_end(w.b, &graph), ERR_UNSUPPORTED);
    must(w.b->ops->ticket_wait(w.b, w.b->ops->step_end(w.b)));
    world_step(&w, one, false);
    both_free(w.b, &qkv), both_free(w.b, &out), mem_free(a);
    world_close(&w);
}

/* A graph finds its own list of tiles, whatever a step of other heads left behind: a draft model
 * reads a prompt between two replays of the model's graph. */
static void test_graph_beside_other_heads(void **state)
{
    struct shape wide = {20, 1, 64, 20, 0, 0, 16, 64, DTYPE_BF16, false, false, 0, 0, NEAR};
    int grow[SEQS_MAX] = {20, 9}, one[SEQS_MAX] = {1, 1}, prompt[SEQS_MAX] = {70, 0};
    struct world w, other;
    struct arrays *a = take(sizeof *a);
    void *graph = NULL;
    float *rows[2];
    (void)state;
    world_open(&w, &wide, 2, false);
    world_step(&w, grow, false);
    struct backend *b = w.b;
    other = w;
    other.args.group = other.args.n_heads = 4;
    int cols = 22 * 64;
    struct both qkv = both_rand(b, 70, cols, cols, DTYPE_BF16, 1),
                out = both_new(b, 2, 20 * 64, 20 * 64, DTYPE_BF16),
                lost = both_new(b, 70, 4 * 64, 4 * 64, DTYPE_BF16);
    struct tensor two = qkv.t;
    two.rows = 2;
    for (int i = 0; i < 3; i++) {
        arrays_fill(&w, i == 1 ? prompt : one, a);
        b->ops->batch_begin(b, &a->batch);
        if (i == 0) {
            must(b->ops->capture_begin(b));
            b->ops->attend(b, out.t, two, w.kv, &w.args, &a->batch);
            must(b->ops->capture_end(b, &graph));
        }
        if (i == 1)
            b->ops->attend(b, lost.t, qkv.t, w.kv, &other.args, &a->batch);
        else
            must(b->ops->replay(b, graph));
        must(b->ops->ticket_wait(b, b->ops->step_end(b)));
        if (i == 1)
            both_send(b, &out); /* what the second replay leaves out stays NaN or zero */
        else
            rows[i / 2] = both_get(b, &out);
    }
    assert_memory_equal(rows[0], rows[1], (size_t)(2 * 20 * 64) * 4);
    b->ops->graph_destroy(b, graph);
    both_free(b, &qkv), both_free(b, &out), both_free(b, &lost);
    mem_free(rows[0]), mem_free(rows[1]), mem_free(a);
    world_close(&w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_shapes),
        cmocka_unit_test(test_shapes_deterministic),
        cmocka_unit_test(test_room_of_splits),
        cmocka_unit_test(test_long),
        cmocka_unit_test(test_older_device),
        cmocka_unit_test(test_chunks_bitwise),
        cmocka_unit_test(test_blocks_move),
        cmocka_unit_test(test_stale_blocks),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_prefill_graph_refused),
        cmocka_unit_test(test_graph_beside_other_heads),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
