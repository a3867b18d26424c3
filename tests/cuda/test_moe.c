/* Goal: a layer of experts computes what its definition says, in every format of weights, and a row
 * is the same bit by bit whoever shares its batch; a recorded layer follows new scores.
 * Method: random experts against double arithmetic. Scores with ties, NaN and -inf, an expert that
 * every row chooses and one that none does, more rows than a tile and than a slice hold, sizes that
 * fill no tile. Tolerances: BF16 rounds gate, up and the product of both; codes add their own. */
#include "tests/cuda/gear.h"

enum { EXPERTS_MAX = 40 };

struct layer {
    int hidden, ffn, n_experts, top_k;
    bool renormalize;
    float *up[EXPERTS_MAX], *down[EXPERTS_MAX]; /* [2 ffn][hidden], [hidden][ffn] */
    struct weight *up_weight[EXPERTS_MAX], *down_weight[EXPERTS_MAX];
    struct moe_args args;
    struct moe *moe;
};

static float *matrix(int rows, int cols, float scale)
{
    float *m = take((size_t)(rows * cols) * 4);
    for (int i = 0; i < rows * cols; i++)
        m[i] = rounded(rand_float(scale));
    return m;
}

static void layer_open(struct backend *b, struct layer *l, enum weight_format format)
{
    for (int e = 0; e < l->n_experts; e++) {
        l->up[e] = matrix(2 * l->ffn, l->hidden, 0.4f);
        l->down[e] = matrix(l->hidden, l->ffn, 0.4f);
        struct matrix_view up = {l->up[e], DTYPE_F32, 2 * l->ffn, l->hidden, l->hidden, 1};
        struct matrix_view down = {l->down[e], DTYPE_F32, l->hidden, l->ffn, l->ffn, 1};
        must(b->ops->weight_create(b, &up, 1, NULL, format, &l->up_weight[e]));
        must(b->ops->weight_create(b, &down, 1, NULL, format, &l->down_weight[e]));
    }
    l->args = (struct moe_args){l->n_experts,    l->top_k,     l->renormalize,
                                ACTIVATION_SILU, l->up_weight, l->down_weight};
    must(b->ops->moe_create(b, &l->args, &l->moe));
}

static void layer_close(struct backend *b, struct layer *l)
{
    b->ops->moe_destroy(b, l->moe);
    for (int e = 0; e < l->n_experts; e++) {
        b->ops->weight_destroy(b, l->up_weight[e]), b->ops->weight_destroy(b, l->down_weight[e]);
        mem_free(l->up[e]), mem_free(l->down[e]);
    }
}

static void expert_add(const struct layer *l, int e, const float *x, double by, double *out)
{
    double act[128];
    for (int f = 0; f < l->ffn; f++) {
        double gate = 0, up = 0;
        for (int i = 0; i < l->hidden; i++) {
            gate += (double)l->up[e][f * l->hidden + i] * (double)x[i];
            up += (double)l->up[e][(l->ffn + f) * l->hidden + i] * (double)x[i];
        }
        act[f] = gate / (1 + exp(-gate)) * up;
    }
    for (int i = 0; i < l->hidden; i++)
        for (int f = 0; f < l->ffn; f++)
            out[i] += by * (double)l->down[e][i * l->ffn + f] * act[f];
}

static void row_reference(const struct layer *l, const float *x, const float *score, double *out)
{
    int chosen[32];
    bool taken[EXPERTS_MAX] = {false};
    double all = 0, sum = 0;
    for (int e = 0; e < l->n_experts; e++)
        all += score[e] == score[e] ? exp((double)score[e]) : 0;
    for (int k = 0; k < l->top_k; k++) {
        int best = -1;
        for (int e = 0; e < l->n_experts; e++)
            if (!taken[e] && score[e] == score[e] && (best < 0 || score[e] > score[best])) best = e;
        chosen[k] = best;
        if (best < 0) continue;
        taken[best] = true;
        sum += exp((double)score[best]);
    }
    for (int i = 0; i < l->hidden; i++)
        out[i] = 0;
    for (int k = 0; k < l->top_k; k++)
        if (chosen[k] >= 0)
            expert_add(l, chosen[k], x,
                       exp((double)score[chosen[k]]) / (l->renormalize ? sum : all), out);
}

static void scores_make(struct backend *b, struct both *s)
{
    int n = (int)s->t.cols;
    for (int r = 0; r < s->t.rows; r++) {
        float *row = s->host + r * n;
        for (int e = 0; e < n; e++)
            row[e] = rand_float(2);
        row[2] = 4, row[n - 2] = -9;
        if (r % 3 == 0) row[0] = row[1] = 2.5f;
        if (r % 5 == 4) row[n - 1] = NAN, row[1] = -INFINITY;
    }
    both_send(b, s);
}

static struct both part_of(struct both m, int row)
{
    m.t.data = (uint8_t *)m.t.data + (size_t)(row * m.t.stride) * dtype_bytes(m.t.dtype);
    m.host += row * m.t.cols;
    m.t.rows = 1;
    return m;
}

static void layer_case(struct layer l, enum weight_format format, int rows, double slack)
{
    struct backend_options o = gear_options();
    o.n_tokens_max = rows;
    struct backend *b = gear_open_with(&o);
    layer_open(b, &l, format);
    struct both x = both_rand(b, rows, l.hidden, l.hidden, DTYPE_BF16, 1),
                out = both_new(b, rows, l.hidden, l.hidden + 8, DTYPE_BF16),
                scores = both_new(b, rows, l.n_experts, l.n_experts, DTYPE_F32);
    double *want = take((size_t)(rows * l.hidden) * 8);
    void *graph = NULL;
    scores_make(b, &scores);
    must(b->ops->capture_begin(b));
    b->ops->moe_forward(b, out.t, x.t, scores.t, l.moe);
    must(b->ops->capture_end(b, &graph));
    for (int round = 0; round < 2; round++) { /* the graph reads what lies there now */
        if (round) scores_make(b, &scores);
        must(b->ops->replay(b, graph));
        for (int r = 0; r < rows; r++)
            row_reference(&l, x.host + r * l.hidden, scores.host + r * l.n_experts,
                          want + r * l.hidden);
        expect_near(b, &out, want, 3.0 / 256, slack, "experts");
    }
    float *together = both_get(b, &out);
    for (int r = 0; r < rows; r += 29) {
        struct both one = part_of(out, r);
        b->ops->moe_forward(b, one.t, part_of(x, r).t, part_of(scores, r).t, l.moe);
        float *alone = both_get(b, &one);
        assert_memory_equal(alone, together + r * l.hidden, (size_t)l.hidden * 4);
        mem_free(alone);
    }
    b->ops->graph_destroy(b, graph);
    both_free(b, &x), both_free(b, &out), both_free(b, &scores), mem_free(want), mem_free(together);
    layer_close(b, &l);
    gear_close(b);
}

static void test_definition(void **state)
{
    const struct layer small = {
        .hidden = 40, .ffn = 28, .n_experts = 5, .top_k = 2, .renormalize = true};
    const struct layer many = {.hidden = 64, .ffn = 33, .n_experts = 40, .top_k = 8};
    const struct layer one = {.hidden = 72, .ffn = 100, .n_experts = 4, .top_k = 1};
    (void)state;
    layer_case(small, WEIGHT_BF16, 1, 0.05);
    layer_case(small, WEIGHT_BF16, 90, 0.05); /* tiles of 64 rows, and expert 2 has them all */
    layer_case(many, WEIGHT_BF16, 7, 0.05);
    layer_case(one, WEIGHT_BF16, 17, 0.08);
    if (!getenv("HEDDLE_CUDA_QUICK")) layer_case(small, WEIGHT_BF16, 1100, 0.06); /* two slices */
}

static void test_formats(void **state)
{
    const struct layer small = {
        .hidden = 40, .ffn = 28, .n_experts = 5, .top_k = 2, .renormalize = true};
    const struct layer wide = {.hidden = 140, .ffn = 100, .n_experts = 4, .top_k = 3};
    (void)state;
    layer_case(small, WEIGHT_F16, 20, 0.05);
    layer_case(small, WEIGHT_INT8, 20, 0.08);
    layer_case(small, WEIGHT_FP8, 20, 0.25);
    layer_case(small, WEIGHT_INT4, 3, 0.6);
    layer_case(wide, WEIGHT_INT4, 70, 2.5);
    layer_case(wide, WEIGHT_INT8, 3, 0.2);
}

static void test_refused(void **state)
{
    struct backend *b = gear_open();
    struct layer l = {.hidden = 32, .ffn = 16, .n_experts = 3, .top_k = 2};
    struct moe *none = NULL;
    (void)state;
    layer_open(b, &l, WEIGHT_BF16);
    struct moe_args bad = l.args;
    bad.top_k = 4;
    assert_int_equal(b->ops->moe_create(b, &bad, &none), ERR_INVALID);
    bad = l.args, bad.n_experts = MOE_EXPERTS_MAX + 1;
    assert_int_equal(b->ops->moe_create(b, &bad, &none), ERR_INVALID);
    bad = l.args, bad.down = l.up_weight;
    assert_int_equal(b->ops->moe_create(b, &bad, &none), ERR_INVALID);
    assert_non_null(strstr(err_detail(), "shape"));
    assert_null(none);
    layer_close(b, &l);
    gear_close(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_definition),
        cmocka_unit_test(test_formats),
        cmocka_unit_test(test_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
