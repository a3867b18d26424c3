/* Goal: a mixture of experts computes what its definition says, for every instruction set and
 * format, and a row's result is the same bit by bit whoever shares its batch. Method: random
 * experts and scores against double arithmetic, with ties among scores, an expert that nobody and
 * one that everybody chooses, more rows than a slice holds. */
#include "cpu_test.h"

enum { HIDDEN = 40, FFN = 52, EXPERTS = 7, ROWS_MAX = 300 };

struct experts {
    float *gate_up[EXPERTS], *down[EXPERTS]; /* [2 FFN][HIDDEN], [HIDDEN][FFN] */
    struct weight *up_weight[EXPERTS], *down_weight[EXPERTS];
    struct moe *moe;
    struct moe_args args;
};

static void experts_open(struct backend *b, struct experts *x, enum weight_format format, int top_k,
                         bool renormalize)
{
    struct rand r = rand_seeded(3);
    for (int e = 0; e < EXPERTS; e++) {
        x->gate_up[e] = test_floats(&r, 2 * FFN * HIDDEN, 0.3f);
        x->down[e] = test_floats(&r, HIDDEN * FFN, 0.3f);
        struct matrix_view parts[2] = {test_view(x->gate_up[e], FFN, HIDDEN),
                                       test_view(x->gate_up[e] + FFN * HIDDEN, FFN, HIDDEN)};
        struct matrix_view down = test_view(x->down[e], HIDDEN, FFN);
        CHECK(b->ops->weight_create(b, parts, 2, NULL, format, &x->up_weight[e]));
        CHECK(b->ops->weight_create(b, &down, 1, NULL, format, &x->down_weight[e]));
    }
    x->args = (struct moe_args){EXPERTS,         top_k,        renormalize,
                                ACTIVATION_SILU, x->up_weight, x->down_weight};
    CHECK(b->ops->moe_create(b, &x->args, &x->moe));
}

static void experts_close(struct backend *b, struct experts *x)
{
    b->ops->moe_destroy(b, x->moe);
    for (int e = 0; e < EXPERTS; e++) {
        b->ops->weight_destroy(b, x->up_weight[e]);
        b->ops->weight_destroy(b, x->down_weight[e]);
        mem_free(x->gate_up[e]), mem_free(x->down[e]);
    }
}

static double dot(const float *a, const double *b, int n)
{
    double sum = 0;
    for (int i = 0; i < n; i++)
        sum += (double)a[i] * b[i];
    return sum;
}

/* out += by * expert(x) */
static void expert_add(const struct experts *w, int e, const float *x, double by, double *out)
{
    double in[HIDDEN], act[FFN];
    for (int i = 0; i < HIDDEN; i++)
        in[i] = (double)x[i];
    for (int f = 0; f < FFN; f++) {
        double g = dot(w->gate_up[e] + f * HIDDEN, in, HIDDEN);
        act[f] = g / (1 + exp(-g)) * dot(w->gate_up[e] + (FFN + f) * HIDDEN, in, HIDDEN);
    }
    for (int i = 0; i < HIDDEN; i++)
        out[i] += by * dot(w->down[e] + i * FFN, act, FFN);
}

static void row_reference(const struct experts *w, const float *x, const float *score, double *out)
{
    bool taken[EXPERTS] = {false};
    int chosen[EXPERTS];
    double all = 0, sum = 0;
    for (int e = 0; e < EXPERTS; e++)
        all += exp((double)score[e]);
    for (int k = 0; k < w->args.top_k; k++) {
        int best = -1;
        for (int e = 0; e < EXPERTS; e++)
            if (!taken[e] && (best < 0 || score[e] > score[best])) best = e;
        taken[chosen[k] = best] = true;
        sum += exp((double)score[best]);
    }
    for (int i = 0; i < HIDDEN; i++)
        out[i] = 0;
    for (int k = 0; k < w->args.top_k; k++)
        expert_add(w, chosen[k], x,
                   exp((double)score[chosen[k]]) / (w->args.renormalize ? sum : all), out);
}

/* Expert 2 wins everywhere, expert 5 nowhere; 0 and 1 often tie. */
static float *scores_make(struct rand *r, int rows)
{
    float *s = test_floats(r, rows * EXPERTS, 1);
    for (int i = 0; i < rows; i++) {
        s[i * EXPERTS + 2] = 9;
        s[i * EXPERTS + 5] = -9;
        if (i % 3 == 0) s[i * EXPERTS] = s[i * EXPERTS + 1] = 3;
    }
    return s;
}

static void case_run(struct backend *b, enum weight_format format, int rows, int top_k,
                     bool renormalize, double tolerance)
{
    struct rand r = rand_seeded((uint64_t)rows);
    struct experts w;
    experts_open(b, &w, format, top_k, renormalize);
    float *x = test_floats(&r, rows * HIDDEN, 1), *scores = scores_make(&r, rows);
    float *out = test_floats(NULL, rows * HIDDEN, 0), alone[HIDDEN];
    double want[HIDDEN];
    b->ops->moe_forward(b, test_tensor(out, rows, HIDDEN), test_tensor(x, rows, HIDDEN),
                        test_tensor(scores, rows, EXPERTS), w.moe);
    for (int i = 0; i < rows; i++) {
        row_reference(&w, x + i * HIDDEN, scores + i * EXPERTS, want);
        test_close("moe", out + i * HIDDEN, want, HIDDEN, tolerance);
        if (i % 37) continue;
        b->ops->moe_forward(b, test_tensor(alone, 1, HIDDEN),
                            test_tensor(x + i * HIDDEN, 1, HIDDEN),
                            test_tensor(scores + i * EXPERTS, 1, EXPERTS), w.moe);
        test_same_bits("a row alone", alone, out + i * HIDDEN, HIDDEN);
    }
    mem_free(x), mem_free(scores), mem_free(out);
    experts_close(b, &w);
}

static void test_definition(void **state)
{
    (void)state;
    for (int i = 0; i < TEST_ISAS; i++) {
        struct backend *b = test_open(test_isas[i]);
        if (!b) continue;
        case_run(b, WEIGHT_F32, 1, 2, true, 1e-5);
        case_run(b, WEIGHT_F32, 9, EXPERTS, false, 1e-5);
        case_run(b, WEIGHT_F32, ROWS_MAX, 2, true, 1e-5);
        case_run(b, WEIGHT_INT8, 5, 3, false, 0.4);
        b->ops->close(b);
    }
}

static void test_refused(void **state)
{
    struct backend *b = test_open("reference");
    struct experts w;
    struct moe *none = NULL;
    (void)state;
    experts_open(b, &w, WEIGHT_F32, 2, true);
    struct moe_args bad = w.args;
    bad.top_k = EXPERTS + 1;
    assert_int_equal(b->ops->moe_create(b, &bad, &none), ERR_INVALID);
    bad = w.args, bad.down = w.up_weight;
    assert_int_equal(b->ops->moe_create(b, &bad, &none), ERR_INVALID);
    assert_null(none);
    experts_close(b, &w);
    b->ops->close(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_definition),
                                       cmocka_unit_test(test_refused)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
