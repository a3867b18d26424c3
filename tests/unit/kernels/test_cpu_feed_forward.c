/* Goal: a gated feed-forward in one pass gives the bits of its parts, for every instruction set,
 * weight formats alike and mixed, widths that are no whole panels, any number of rows and threads,
 * more rows than one slice, with a norm before it and without.
 * Method: both ways on copies of the same rows; act begins as NaN, so that a word that nobody wrote
 * is seen. */
#include "kernels/cpu/cpu.h"
#include "unit/kernels/cpu_test.h"

struct feed_case {
    int m, k, f, threads;
    bool norm;
    enum activation kind;
};
static const struct feed_case cases[] = {
    {1, 40, 96, 2, true, ACTIVATION_SILU},        {27, 40, 45, 1, false, ACTIVATION_SILU},
    {13, 131, 100, 3, true, ACTIVATION_GELU_ERF}, {300, 64, 127, 2, false, ACTIVATION_SILU},
    {5, 33, 1, 1, true, ACTIVATION_SILU},         {12, 96, 32, 2, true, ACTIVATION_GELU_TANH},
    {2, 64, 2, 1, false, ACTIVATION_SILU},        {3, 40, 544, 1, true, ACTIVATION_SILU},
    {2, 33, 1056, 2, false, ACTIVATION_SILU}, /* chunks of panels */
};
static const enum weight_format formats[][2] = {
    {WEIGHT_F32, WEIGHT_F32},   {WEIGHT_F16, WEIGHT_F16},   {WEIGHT_BF16, WEIGHT_BF16},
    {WEIGHT_INT8, WEIGHT_INT8}, {WEIGHT_INT4, WEIGHT_INT4}, {WEIGHT_INT8, WEIGHT_BF16},
    {WEIGHT_INT4, WEIGHT_BF16}, {WEIGHT_BF16, WEIGHT_INT8},
};
enum { CASES = sizeof cases / sizeof *cases, FORMAT_PAIRS = sizeof formats / sizeof *formats };

static struct weight *weight_make(struct backend *b, struct rand *r, enum weight_format format,
                                  int n_out, int n_in)
{
    struct weight *w;
    float *values = test_floats(r, (int64_t)n_out * n_in, 0.3f), *bias = test_floats(r, n_out, 1);
    struct matrix_view view = test_view(values, n_out, n_in);
    CHECK(b->ops->weight_create(b, &view, 1, bias, format, &w));
    mem_free(values), mem_free(bias);
    return w;
}

static void check_case(const char *isa, const enum weight_format format[2],
                       const struct feed_case *c)
{
    struct backend *b = test_open_with(isa, c->threads, 64);
    if (!b) return;
    struct rand r = rand_seeded((uint64_t)(c->m * 1000 + c->f));
    struct weight *up = weight_make(b, &r, format[0], 2 * c->f, c->k);
    struct weight *down = weight_make(b, &r, format[1], c->k, c->f);
    float *x = test_floats(&r, c->m * c->k, 1), *again = test_floats(NULL, c->m * c->k, 0);
    float *h = test_floats(NULL, c->m * c->k, 0), *scales = test_floats(&r, c->k, 1);
    float *both = test_floats(NULL, c->m * 2 * c->f, 0), *act = test_floats(NULL, c->m * c->f, 0);
    float *want = test_floats(NULL, c->m * c->k, 0), *got = test_floats(NULL, c->m * c->k, 0);
    struct norm_args norm = {NORM_RMS, 1e-6f, scales, NULL};
    struct tensor rows = test_tensor(x, c->m, c->k), none = {0};
    struct norm_input in = {test_tensor(again, c->m, c->k), none, test_tensor(h, c->m, c->k),
                            c->norm ? &norm : NULL};
    memcpy(again, x, (size_t)(c->m * c->k) * sizeof *x);
    if (c->norm) {
        b->ops->add_norm(b, rows, none, &norm, test_tensor(h, c->m, c->k));
        rows.data = h;
    }
    b->ops->matmul(b, test_tensor(both, c->m, 2 * c->f), rows, up);
    b->ops->activate(b, test_tensor(act, c->m, c->f), test_tensor(both, c->m, 2 * c->f), c->kind,
                     true);
    b->ops->matmul(b, test_tensor(want, c->m, c->k), test_tensor(act, c->m, c->f), down);
    for (int i = 0; i < c->m * c->f; i++)
        act[i] = NAN;
    b->ops->feed_forward(b, test_tensor(got, c->m, c->k), &in, up, down,
                         test_tensor(act, c->m, c->f), c->kind);
    test_same_bits(isa ? isa : "best", got, want, (int64_t)c->m * c->k);
    b->ops->weight_destroy(b, up), b->ops->weight_destroy(b, down);
    b->ops->close(b);
    mem_free(x), mem_free(again), mem_free(h), mem_free(scales), mem_free(both), mem_free(act);
    mem_free(want), mem_free(got);
}

static void equals_its_parts(void **state)
{
    (void)state;
    for (int isa = 0; isa < TEST_ISAS; isa++)
        for (int i = 0; i < FORMAT_PAIRS * CASES; i++)
            check_case(test_isas[isa], formats[i % FORMAT_PAIRS], &cases[i / FORMAT_PAIRS]);
}

static void more_rows_than_a_slice(void **state)
{
    static const struct feed_case c = {ACTIVATION_ROWS + 87, 40, 70, 3, true, ACTIVATION_SILU};
    (void)state;
    check_case(NULL, formats[2], &c);
    check_case(NULL, formats[3], &c);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(equals_its_parts),
        cmocka_unit_test(more_rows_than_a_slice),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
