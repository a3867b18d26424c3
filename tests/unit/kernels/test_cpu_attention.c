/* Goal: norm of heads, rope, the paged cache and attention equal the formulas in double precision,
 * for every cache type, block size, instruction set, head mapping, window and softcap; a token's
 * result has the same bits however its context was cut into steps and whoever shared them.
 * Method: a dense model of the cache in the test keeps every K and V in double; pages are handed
 * out in a shuffled order. */
#include "unit/kernels/cpu_test.h"

enum { SEQS = 3, TOKENS = 700, ROWS_MAX = 400 };

struct layout {
    int n_heads, n_kv_heads, head_dim, rotary_dim, group, head_offset, kv_offset, window;
    float softcap;
    bool pairs, norms;
};

/* One model: qkv rows of every token of every sequence, and what attention must give. */
struct model {
    struct layout l;
    int block_size, n_blocks, blocks_per_seq;
    float *qkv[SEQS], *q_norm, *k_norm, *cos, *sin;
    double *want[SEQS]; /* [TOKENS][n_heads * head_dim] */
    int32_t *blocks;    /* [SEQS][blocks_per_seq] */
    int length[SEQS];
};

static float scale_of(const struct layout *l)
{
    return 1 / sqrtf((float)l->head_dim);
}

static int row_floats(const struct layout *l)
{
    return (l->n_heads + 2 * l->n_kv_heads) * l->head_dim;
}

static void head_prepared(const struct model *m, const float *x, const float *norm, int position,
                          double *out)
{
    const struct layout *l = &m->l;
    double sum = 0, scale = 1;
    for (int d = 0; d < l->head_dim; d++)
        sum += (double)x[d] * x[d];
    if (norm) scale = 1 / sqrt(sum / l->head_dim + 1e-6);
    for (int d = 0; d < l->head_dim; d++)
        out[d] = x[d] * scale * (norm ? norm[d] : 1);
    int half = l->rotary_dim / 2;
    for (int i = 0; i < half; i++) {
        int a = l->pairs ? 2 * i : i, b = l->pairs ? 2 * i + 1 : i + half;
        double c = m->cos[position * half + i], s = m->sin[position * half + i], u = out[a],
               v = out[b];
        out[a] = u * c - v * s;
        out[b] = v * c + u * s;
    }
}

/* What the cache can hold of x: rounded to its type. */
static void rounded(double *x, int n, enum dtype dtype)
{
    float max = 0;
    for (int d = 0; d < n; d++)
        max = fmaxf(max, fabsf((float)x[d]));
    for (int d = 0; d < n; d++) {
        if (dtype == DTYPE_BF16) x[d] = bf16_round((float)x[d]);
        if (dtype == DTYPE_F16) x[d] = f16_to_float(f16_from_float((float)x[d]));
        if (dtype == DTYPE_I8) x[d] = nearbyintf((float)x[d] / (max / 127)) * (max / 127);
    }
}

static void attention_wanted(const struct model *m, const double *q, const double *k,
                             const double *v, int position, double *out)
{
    const struct layout *l = &m->l;
    int first = l->window && position >= l->window ? position - l->window + 1 : 0, n = l->head_dim;
    double max = -INFINITY, sum = 0, s[TOKENS];
    for (int t = first; t <= position; t++) {
        s[t] = 0;
        for (int d = 0; d < n; d++)
            s[t] += q[d] * k[t * n + d];
        s[t] *= scale_of(l);
        if (l->softcap > 0) s[t] = l->softcap * tanh(s[t] / l->softcap);
        max = fmax(max, s[t]);
    }
    for (int d = 0; d < n; d++)
        out[d] = 0;
    for (int t = first; t <= position; t++) {
        double p = exp(s[t] - max);
        sum += p;
        for (int d = 0; d < n; d++)
            out[d] += p * v[t * n + d];
    }
    for (int d = 0; d < n; d++)
        out[d] /= sum;
}

static void sequence_wanted(struct model *m, int seq, enum dtype dtype)
{
    const struct layout *l = &m->l;
    int n = l->head_dim, width = row_floats(l);
    double *k, *v, q[256];
    CHECK(MEM_NEW_ARRAY(TOKENS * n, &k));
    CHECK(MEM_NEW_ARRAY(TOKENS * n, &v));
    for (int kv = 0; kv < l->n_kv_heads; kv++) {
        for (int t = 0; t < m->length[seq]; t++) {
            const float *row = m->qkv[seq] + t * width;
            head_prepared(m, row + (l->n_heads + kv) * n, m->k_norm, t, k + t * n);
            for (int d = 0; d < n; d++)
                v[t * n + d] = row[(l->n_heads + l->n_kv_heads + kv) * n + d];
            rounded(k + t * n, n, dtype);
            rounded(v + t * n, n, dtype);
        }
        for (int h = 0; h < l->n_heads; h++) {
            if ((h + l->head_offset) / l->group - l->kv_offset != kv) continue;
            for (int t = 0; t < m->length[seq]; t++) {
                head_prepared(m, m->qkv[seq] + t * width + h * n, m->q_norm, t, q);
                attention_wanted(m, q, k, v, t, m->want[seq] + (t * l->n_heads + h) * n);
            }
        }
    }
    mem_free(k), mem_free(v);
}

static void model_init(struct model *m, struct layout l, int block_size, int tokens,
                       enum dtype dtype, bool wanted)
{
    struct rand r = rand_seeded((uint64_t)(l.n_heads * 1000 + l.head_dim + block_size));
    memset(m, 0, sizeof *m);
    m->l = l;
    m->block_size = block_size;
    m->blocks_per_seq = (TOKENS + block_size - 1) / block_size;
    m->n_blocks = SEQS * m->blocks_per_seq;
    CHECK(MEM_NEW_ARRAY(m->n_blocks, &m->blocks));
    for (int i = 0; i < m->n_blocks; i++) {
        int at = (int)rand_below(&r, (uint64_t)i + 1);
        m->blocks[i] = m->blocks[at], m->blocks[at] = i;
    }
    m->cos = test_floats(&r, TOKENS * l.head_dim, 1),
    m->sin = test_floats(&r, TOKENS * l.head_dim, 1);
    if (l.norms)
        m->q_norm = test_floats(&r, l.head_dim, 1), m->k_norm = test_floats(&r, l.head_dim, 1);
    for (int s = 0; s < SEQS; s++) {
        m->length[s] = tokens - s * 37 > 0 ? tokens - s * 37 : 1;
        m->qkv[s] = test_floats(&r, (int64_t)m->length[s] * row_floats(&l), 1);
        CHECK(MEM_NEW_ARRAY(m->length[s] * l.n_heads * l.head_dim, &m->want[s]));
        if (wanted) sequence_wanted(m, s, dtype);
    }
}

static void model_fini(struct model *m)
{
    for (int s = 0; s < SEQS; s++)
        mem_free(m->qkv[s]), mem_free(m->want[s]);
    mem_free(m->blocks), mem_free(m->cos), mem_free(m->sin), mem_free(m->q_norm),
        mem_free(m->k_norm);
}

static struct kv_cache *cache_open(struct backend *b, const struct model *m, enum dtype dtype)
{
    struct kv_cache_args args = {2,    m->l.n_kv_heads, m->l.head_dim, m->block_size, m->n_blocks,
                                 dtype};
    struct kv_cache *kv;
    CHECK(b->ops->kv_create(b, &args, &kv));
    return kv;
}

/* Runs tokens [from[s], to[s]) of every sequence as one step; out[s] receives their rows. */
static void step(struct backend *b, struct kv_cache *kv, const struct model *m, const int *from,
                 const int *to, float **out)
{
    static int32_t ids[ROWS_MAX * SEQS * 2], slots[ROWS_MAX * SEQS * 2],
        positions[ROWS_MAX * SEQS * 2];
    static int32_t cache[ROWS_MAX * SEQS * 2];
    int32_t starts[SEQS + 1] = {0}, lengths[SEQS], *table;
    const struct layout *l = &m->l;
    int width = row_floats(l), wide = l->n_heads * l->head_dim, n = 0, n_seqs = 0;
    for (int s = 0; s < SEQS; s++)
        n += to[s] - from[s];
    float *rows = test_floats(NULL, (int64_t)n * width, 0),
          *y = test_floats(NULL, (int64_t)n * wide, 0);
    n = 0;
    CHECK(MEM_NEW_ARRAY(SEQS * m->blocks_per_seq, &table));
    for (int s = 0; s < SEQS; s++) {
        if (to[s] <= from[s]) continue;
        memcpy(table + n_seqs * m->blocks_per_seq, m->blocks + s * m->blocks_per_seq,
               (size_t)m->blocks_per_seq * 4);
        for (int t = from[s]; t < to[s]; t++, n++) {
            memcpy(rows + n * width, m->qkv[s] + t * width, (size_t)width * 4);
            positions[n] = t;
            cache[n] = table[n_seqs * m->blocks_per_seq + t / m->block_size] * m->block_size +
                       t % m->block_size;
        }
        lengths[n_seqs] = to[s];
        starts[++n_seqs] = n;
    }
    struct batch batch = {n,       n_seqs, 0,         m->blocks_per_seq,
                          ids,     slots,  positions, starts,
                          lengths, table,  cache,     NULL};
    struct attention_args args = {.layer = 1,
                                  .n_heads = l->n_heads,
                                  .n_kv_heads = l->n_kv_heads,
                                  .head_dim = l->head_dim,
                                  .scale = scale_of(l),
                                  .softcap = l->softcap,
                                  .window = l->window,
                                  .rope_cos = l->rotary_dim ? m->cos : NULL,
                                  .rope_sin = m->sin,
                                  .rotary_dim = l->rotary_dim,
                                  .rope_pairs = l->pairs,
                                  .q_norm = m->q_norm,
                                  .k_norm = m->k_norm,
                                  .norm_epsilon = 1e-6f,
                                  .group = l->group,
                                  .head_offset = l->head_offset,
                                  .kv_offset = l->kv_offset};
    b->ops->batch_begin(b, &batch);
    b->ops->qkv_prepare(b, test_tensor(rows, n, width), kv, &args, &batch);
    b->ops->attend(b, test_tensor(y, n, wide), test_tensor(rows, n, width), kv, &args, &batch);
    CHECK(b->ops->ticket_wait(b, b->ops->step_end(b)));
    float *from_y = y;
    for (int s = 0; s < SEQS; s++)
        for (int t = from[s]; t < to[s]; t++, from_y += wide)
            memcpy(out[s] + (int64_t)t * wide, from_y, (size_t)wide * 4);
    mem_free(rows), mem_free(y), mem_free(table);
}

struct run {
    float *out[SEQS];
};

/* The whole context in steps of at most `chunk` tokens a sequence. */
static struct run run_in_chunks(struct backend *b, const struct model *m, enum dtype dtype,
                                int chunk)
{
    struct run run;
    struct kv_cache *kv = cache_open(b, m, dtype);
    int from[SEQS] = {0}, to[SEQS], left = 1;
    for (int s = 0; s < SEQS; s++)
        run.out[s] = test_floats(NULL, (int64_t)TOKENS * m->l.n_heads * m->l.head_dim, 0);
    while (left) {
        left = 0;
        for (int s = 0; s < SEQS; s++) {
            to[s] = from[s] + chunk < m->length[s] ? from[s] + chunk : m->length[s];
            left += m->length[s] - to[s];
        }
        step(b, kv, m, from, to, run.out);
        memcpy(from, to, sizeof from);
    }
    b->ops->kv_destroy(b, kv);
    return run;
}

static void run_free(struct run *run)
{
    for (int s = 0; s < SEQS; s++)
        mem_free(run->out[s]);
}

static const struct layout layouts[] = {
    {4, 2, 16, 16, 2, 0, 0, 0, 0, false, true},  /* as Qwen3 */
    {7, 1, 64, 64, 7, 0, 0, 0, 0, false, false}, /* as Qwen2.5-0.5B on one of two ranks */
    {3, 3, 24, 8, 1, 0, 0, 0, 0, true, false},   /* partial rope in pairs, head_dim of no vector */
    {5, 3, 32, 0, 2, 1, 0, 50, 0, false, false}, /* uneven shard, sliding window, no rope */
    {4, 1, 128, 128, 8, 4, 0, 300, 20, false, true} /* window and softcap as Gemma */
};
enum { LAYOUTS = 5 };
/* K and V the test rounds itself; the tolerance is for ties, and for q and weights in BF16. */
struct cache_case {
    enum dtype dtype;
    double tolerance;
};
static const struct cache_case caches[] = {
    {DTYPE_F32, 1e-5}, {DTYPE_F16, 5e-4}, {DTYPE_BF16, 3e-2}, {DTYPE_I8, 2e-2}};
enum { CACHES = 4 };

static void check_run(const char *what, const struct model *m, const struct run *run,
                      double tolerance)
{
    for (int s = 0; s < SEQS; s++)
        test_close(what, run->out[s], m->want[s],
                   (int64_t)m->length[s] * m->l.n_heads * m->l.head_dim, tolerance);
}

static void equals_double_attention(void **state)
{
    static const int sizes[] = {1, 4, 16, 32, 256};
    (void)state;
    for (int isa = 0; isa < TEST_ISAS; isa++) {
        struct backend *b = test_open(test_isas[isa]);
        for (int c = 0; b && c < LAYOUTS * CACHES; c++) {
            struct model m;
            const struct cache_case *cache = &caches[c % CACHES];
            model_init(&m, layouts[c / CACHES], sizes[(c + isa) % 5], isa ? 75 : 40, cache->dtype,
                       true);
            struct run run = run_in_chunks(b, &m, cache->dtype, 19);
            check_run(test_isas[isa], &m, &run, cache->tolerance);
            run_free(&run);
            model_fini(&m);
        }
        if (b) b->ops->close(b);
    }
}

/* Contexts of several merge chunks, one of them longer than any window. */
static void long_contexts(void **state)
{
    (void)state;
    for (int c = 0; c < LAYOUTS; c++) {
        const struct cache_case *cache = &caches[c % CACHES];
        struct backend *b = test_open(NULL);
        struct model m;
        model_init(&m, layouts[c], 32, c == 2 ? 600 : 330, cache->dtype, true);
        struct run run = run_in_chunks(b, &m, cache->dtype, 300);
        check_run("long", &m, &run, cache->tolerance);
        run_free(&run);
        model_fini(&m);
        b->ops->close(b);
    }
}

/* One token at a time, uneven chunks, all at once; one thread or three: the same bits. Over the
 * instruction sets every layout meets every cache type. */
static void steps_do_not_matter(void **state)
{
    static const int chunks[] = {1, 37, 150};
    (void)state;
    for (int c = 0; c < TEST_ISAS * LAYOUTS; c++) {
        int isa = c / LAYOUTS;
        enum dtype dtype = caches[(c + isa) % CACHES].dtype;
        struct backend *b = test_open(test_isas[isa]);
        if (!b) continue;
        struct model m;
        model_init(&m, layouts[c % LAYOUTS], 32, isa ? 270 : 40, dtype, false);
        struct run whole = run_in_chunks(b, &m, dtype, ROWS_MAX);
        b->ops->close(b);
        for (int i = 0; i < 3; i++) {
            b = test_open_with(test_isas[isa], i == 2 ? 3 : 1, 16);
            struct run run = run_in_chunks(b, &m, dtype, chunks[i]);
            for (int s = 0; s < SEQS; s++)
                test_same_bits(test_isas[isa], run.out[s], whole.out[s],
                               (int64_t)m.length[s] * m.l.n_heads * m.l.head_dim);
            run_free(&run);
            b->ops->close(b);
        }
        run_free(&whole);
        model_fini(&m);
    }
}

/* A block that a broken sequence filled with NaN is given to another: its tokens stay clean. */
static void neighbours_survive_nan(void **state)
{
    (void)state;
    for (int isa = 0; isa < TEST_ISAS; isa++)
        for (int c = 0; c < CACHES; c++) {
            struct backend *b = test_open(test_isas[isa]);
            if (!b) continue;
            struct model m;
            model_init(&m, layouts[1], 16, 20, caches[c].dtype, true);
            struct kv_cache *kv = cache_open(b, &m, caches[c].dtype);
            struct run run;
            int from[SEQS] = {0}, to[SEQS] = {16, 0, 0};
            for (int s = 0; s < SEQS; s++)
                run.out[s] = test_floats(NULL, TOKENS * 7 * 64, 0);
            float *good = m.qkv[0], *bad = test_floats(NULL, TOKENS * row_floats(&m.l), 0);
            for (int i = 0; i < 16 * row_floats(&m.l); i++)
                bad[i] = NAN;
            m.qkv[0] = bad;
            step(b, kv, &m, from, to, run.out);
            m.qkv[0] = good;
            for (int t = 0; t < 13; t++) {
                from[0] = t, to[0] = t + 1;
                step(b, kv, &m, from, to, run.out);
            }
            test_close("after NaN", run.out[0], m.want[0], 13 * 7 * 64, caches[c].tolerance);
            b->ops->kv_destroy(b, kv);
            run_free(&run);
            mem_free(bad);
            model_fini(&m);
            b->ops->close(b);
        }
}

/* Copies and saves of blocks carry whole contexts; an empty batch does nothing. */
static void blocks_move(void **state)
{
    (void)state;
    for (int c = 0; c < CACHES; c++) {
        struct backend *b = test_open(NULL);
        struct model m;
        model_init(&m, layouts[0], 32, 100, caches[c].dtype, true);
        struct kv_cache *kv = cache_open(b, &m, caches[c].dtype);
        struct kv_cache_args args = {2, 2, 16, 32, m.n_blocks, caches[c].dtype};
        struct run run;
        int from[SEQS] = {0}, to[SEQS] = {0};
        for (int s = 0; s < SEQS; s++)
            run.out[s] = test_floats(NULL, TOKENS * 4 * 16, 0);
        step(b, kv, &m, from, to, run.out);
        to[0] = 99;
        step(b, kv, &m, from, to, run.out);
        /* sequence 0 moves to other blocks: two by copy, one by save and load */
        int32_t *old = m.blocks,
                fresh[3] = {m.blocks[2 * m.blocks_per_seq], m.blocks[2 * m.blocks_per_seq + 1],
                            m.blocks[2 * m.blocks_per_seq + 2]};
        void *host;
        CHECK(mem_alloc(b->ops->kv_bytes(b, &args) / (size_t)m.n_blocks, &host));
        b->ops->kv_copy(b, kv, old, fresh, 2);
        b->ops->kv_save(b, kv, old[2], host);
        b->ops->kv_load(b, kv, fresh[2], host);
        memcpy(old, fresh, sizeof fresh);
        from[0] = 99, to[0] = 100;
        step(b, kv, &m, from, to, run.out);
        test_close("moved", run.out[0] + 99 * 64, m.want[0] + 99 * 64, 64, caches[c].tolerance);
        mem_free(host);
        b->ops->kv_destroy(b, kv);
        run_free(&run);
        model_fini(&m);
        b->ops->close(b);
    }
}

static void refusals(void **state)
{
    struct backend *b = test_open("reference");
    struct kv_cache *kv;
    struct kv_cache_args odd = {1, 1, 16, 24, 2, DTYPE_F32},
                         type = {1, 1, 16, 32, 2, DTYPE_FP8_E4M3};
    (void)state;
    assert_int_equal(b->ops->kv_create(b, &odd, &kv), ERR_INVALID);
    assert_int_equal(b->ops->kv_create(b, &type, &kv), ERR_UNSUPPORTED);
    assert_int_equal(b->ops->kv_bytes(b, &(struct kv_cache_args){2, 3, 16, 32, 5, DTYPE_F32}),
                     2 * 3 * 16 * 32 * 5 * 8);
    b->ops->close(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(equals_double_attention),
        cmocka_unit_test(long_contexts),
        cmocka_unit_test(steps_do_not_matter),
        cmocka_unit_test(neighbours_survive_nan),
        cmocka_unit_test(blocks_move),
        cmocka_unit_test(refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
