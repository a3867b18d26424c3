/* Goal: products that norm their rows on the way in give the bits of add_norm and then the product,
 * and leave the residual as add_norm does, for every instruction set, weight format, kind of norm
 * and number of rows, beyond one slice too; scratch that is too small for wide rows is not used.
 * Method: both ways on copies of the same rows, strided; the scratch rows begin as NaN. */
#include "kernels/cpu/cpu.h"
#include "unit/kernels/cpu_test.h"

enum { N = 70, GAP = 6 };

struct rows_case {
    int m, k, threads;
    bool layer_norm, bias, delta;
};
static const struct rows_case cases[] = {
    {1, 160, 1, false, false, true}, {8, 96, 2, true, true, true},
    {9, 131, 3, false, true, false}, {30, 300, 2, true, false, true},
    {50, 64, 1, false, false, true},
};
enum { CASES = 5, SLICED_ROWS = ACTIVATION_ROWS + 87, WIDE = 11000 };

/* Both copies of what the products begin with. */
struct rows {
    float *x[2], *delta, *h, *weight, *bias;
    struct norm_args norm;
    int m, k, stride;
    bool with_delta;
};

static struct tensor strided(const struct rows *r, float *data)
{
    return (struct tensor){data, DTYPE_F32, r->m, r->k, r->stride};
}

static struct rows rows_make(const struct rows_case *c)
{
    struct rand rand = rand_seeded((uint64_t)(c->m * 1000 + c->k));
    struct rows r = {.m = c->m, .k = c->k, .stride = c->k + GAP, .with_delta = c->delta};
    int64_t n = (int64_t)r.m * r.stride;
    r.x[0] = test_floats(&rand, n, 2), r.x[1] = test_floats(NULL, n, 0);
    memcpy(r.x[1], r.x[0], (size_t)n * sizeof(float));
    r.delta = test_floats(&rand, n, 1), r.h = test_floats(NULL, n, 0);
    r.weight = test_floats(&rand, r.k, 1), r.bias = test_floats(&rand, r.k, 1);
    for (int64_t i = 0; i < n; i++)
        r.h[i] = NAN;
    r.norm = (struct norm_args){c->layer_norm ? NORM_LAYER : NORM_RMS, 1e-6f, r.weight,
                                c->bias ? r.bias : NULL};
    return r;
}

static void rows_free(struct rows *r)
{
    mem_free(r->x[0]), mem_free(r->x[1]), mem_free(r->delta), mem_free(r->h);
    mem_free(r->weight), mem_free(r->bias);
}

/* Weights of a format; INT4_GROUPS has zero points and an order of its own. */
static struct weight *weight_make(struct backend *b, enum weight_format format, int k)
{
    struct rand r = rand_seeded((uint64_t)k);
    struct weight *w;
    float *values = test_floats(&r, N * k, 0.2f), *bias = test_floats(&r, N, 1);
    struct matrix_view view = test_view(values, N, k);
    if (format != WEIGHT_INT4_GROUPS) {
        CHECK(b->ops->weight_create(b, &view, 1, bias, format, &w));
    } else {
        int n_slots = (k + 31) / 32 * 32, groups = n_slots / 32;
        int32_t *order;
        uint8_t *codes, *zeros;
        uint16_t *scales;
        CHECK(MEM_NEW_ARRAY(n_slots, &order));
        CHECK(MEM_NEW_ARRAY(N * n_slots / 2, &codes));
        CHECK(MEM_NEW_ARRAY(N * groups, &zeros));
        CHECK(MEM_NEW_ARRAY(N * groups, &scales));
        for (int i = 0; i < n_slots; i++)
            order[i] = i < k ? (i * 37 + 5) % k : -1; /* k has no factor 37 */
        for (int i = 0; i < N * n_slots / 2; i++)
            codes[i] = (uint8_t)rand_next(&r);
        for (int i = 0; i < N * groups; i++)
            zeros[i] = rand_next(&r) & 15, scales[i] = (uint16_t)(0x2000 + (rand_next(&r) & 255));
        struct int4_matrix m = {N, k, n_slots, 32, order, codes, scales, zeros};
        CHECK(b->ops->weight_create_int4(b, &m, bias, &w));
        mem_free(order), mem_free(codes), mem_free(zeros), mem_free(scales);
    }
    mem_free(values), mem_free(bias);
    return w;
}

static void check_case(const char *isa, enum weight_format format, const struct rows_case *c)
{
    struct backend *b = test_open_with(isa, c->threads, N);
    if (!b) return;
    struct rows r = rows_make(c);
    struct weight *w = weight_make(b, format, r.k);
    struct tensor delta = r.with_delta ? strided(&r, r.delta) : (struct tensor){0};
    struct norm_input in = {strided(&r, r.x[1]), delta, strided(&r, r.h), &r.norm};
    float *normed = test_floats(NULL, (int64_t)r.m * r.stride, 0);
    float *want = test_floats(NULL, r.m * N, 0), *got = test_floats(NULL, r.m * N, 0), value[2][64];
    int32_t index[2][64];
    b->ops->add_norm(b, strided(&r, r.x[0]), delta, &r.norm, strided(&r, normed));
    b->ops->matmul(b, test_tensor(want, r.m, N), strided(&r, normed), w);
    b->ops->norm_matmul(b, test_tensor(got, r.m, N), &in, w);
    test_same_bits(isa ? isa : "best", got, want, (int64_t)r.m * N);
    test_same_bits("the residual", r.x[1], r.x[0], (int64_t)r.m * r.stride);
    in.delta.data = NULL; /* x has it now */
    if (r.m <= 64) {
        b->ops->matmul_argmax(b, strided(&r, normed), w, index[0], value[0]);
        b->ops->norm_matmul_argmax(b, &in, w, index[1], value[1]);
        test_same_bits("largest", value[1], value[0], r.m);
        assert_memory_equal(index[1], index[0], (size_t)r.m * sizeof **index);
    }
    in.norm = NULL, in.x = strided(&r, normed);
    b->ops->matmul(b, test_tensor(want, r.m, N), in.x, w);
    b->ops->norm_matmul(b, test_tensor(got, r.m, N), &in, w);
    test_same_bits("without a norm", got, want, (int64_t)r.m * N);
    b->ops->weight_destroy(b, w);
    b->ops->close(b);
    rows_free(&r);
    mem_free(normed), mem_free(want), mem_free(got);
}

static void equals_two_steps(void **state)
{
    static const enum weight_format formats[] = {WEIGHT_F32,  WEIGHT_F16,  WEIGHT_BF16,
                                                 WEIGHT_INT8, WEIGHT_INT4, WEIGHT_INT4_GROUPS};
    (void)state;
    for (int isa = 0; isa < TEST_ISAS; isa++)
        for (int i = 0; i < 6 * CASES; i++)
            check_case(test_isas[isa], formats[i % 6], &cases[i / 6]);
}

static void slices_and_wide_rows(void **state)
{
    (void)state;
    for (int threads = 1; threads <= 3; threads += 2) {
        check_case(NULL, WEIGHT_INT8,
                   &(struct rows_case){SLICED_ROWS, 64, threads, false, false, true});
        check_case(NULL, WEIGHT_BF16,
                   &(struct rows_case){SLICED_ROWS, 40, threads, true, true, true});
        check_case(NULL, WEIGHT_INT8, &(struct rows_case){24, WIDE, threads, false, false, true});
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(equals_two_steps),
        cmocka_unit_test(slices_and_wide_rows),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
