/* Goal: the row operations equal their formulas in double precision for odd widths, strided tensors
 * and empty batches; any number of threads gives the same bits.
 * Method: random rows, formulas written down again here; exp and tanh over their whole range. */
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/vector_math.h"
#include "unit/kernels/cpu_test.h"

enum { ROWS = 9, COLS = 77, STRIDE = 90 };

static struct tensor strided(float *x)
{
    return (struct tensor){x, DTYPE_F32, ROWS, COLS, STRIDE};
}

static void norms(void **state)
{
    struct backend *b = test_open("reference");
    (void)state;
    for (int c = 0; c < 8; c++) {
        struct rand r = rand_seeded((uint64_t)c);
        float *x = test_floats(&r, ROWS * STRIDE, 2), *delta = test_floats(&r, ROWS * STRIDE, 1);
        float *weight = test_floats(&r, COLS, 1), *bias = test_floats(&r, COLS, 1),
              *out = test_floats(NULL, ROWS * STRIDE, 0);
        double sums[ROWS][COLS];
        struct norm_args args = {c & 1 ? NORM_LAYER : NORM_RMS, 1e-5f, weight, c & 2 ? bias : NULL};
        for (int i = 0; i < ROWS * COLS; i++)
            sums[i / COLS][i % COLS] = (double)x[i / COLS * STRIDE + i % COLS] +
                                       (c & 4 ? delta[i / COLS * STRIDE + i % COLS] : 0);
        struct tensor none = {0};
        b->ops->add_norm(b, strided(x), c & 4 ? strided(delta) : none, &args, strided(out));
        for (int row = 0; row < ROWS; row++) {
            double mean = 0, square = 0, want[COLS];
            for (int i = 0; i < COLS; i++)
                mean += sums[row][i] / COLS;
            if (!(c & 1)) mean = 0;
            for (int i = 0; i < COLS; i++)
                square += (sums[row][i] - mean) * (sums[row][i] - mean) / COLS;
            for (int i = 0; i < COLS; i++)
                want[i] =
                    (sums[row][i] - mean) / sqrt(square + 1e-5) * weight[i] + (c & 2 ? bias[i] : 0);
            test_close("norm", out + row * STRIDE, want, COLS, 1e-5);
            test_close("residual", x + row * STRIDE, sums[row], COLS, 1e-6);
        }
        mem_free(x), mem_free(delta), mem_free(weight), mem_free(bias), mem_free(out);
    }
    b->ops->close(b);
}

static double activation(enum activation kind, double x)
{
    switch (kind) {
    case ACTIVATION_SILU:
        return x / (1 + exp(-x));
    case ACTIVATION_GELU_TANH:
        return 0.5 * x * (1 + tanh(sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case ACTIVATION_GELU_ERF:
        return 0.5 * x * (1 + erf(x / sqrt(2)));
    default:
        return x > 0 ? x : 0;
    }
}

static void activations(void **state)
{
    struct backend *b = test_open("reference");
    (void)state;
    for (int c = 0; c < 8; c++) {
        struct rand r = rand_seeded((uint64_t)c);
        int gated = c & 1;
        float *in = test_floats(&r, ROWS * 2 * STRIDE, 4),
              *out = test_floats(NULL, ROWS * STRIDE, 0);
        for (int i = 0; i < 20; i++)
            in[i] *= 30; /* the tails */
        struct tensor t = {in, DTYPE_F32, ROWS, gated ? 2 * COLS : COLS, 2 * STRIDE};
        b->ops->activate(b, strided(out), t, (enum activation)(c / 2), gated);
        for (int row = 0; row < ROWS; row++) {
            double want[COLS];
            for (int i = 0; i < COLS; i++)
                want[i] = activation((enum activation)(c / 2), in[row * 2 * STRIDE + i]) *
                          (gated ? in[row * 2 * STRIDE + COLS + i] : 1);
            test_close("activation", out + row * STRIDE, want, COLS, 1e-5);
        }
        mem_free(in), mem_free(out);
    }
    b->ops->close(b);
}

static void sums_scales_and_gathers(void **state)
{
    static const int32_t rows_out[] = {0, 3, 8};
    struct backend *b = test_open("reference");
    struct rand r = rand_seeded(1);
    float *x = test_floats(&r, ROWS * STRIDE, 20), *y = test_floats(&r, ROWS * STRIDE, 1),
          *out = test_floats(NULL, 3 * COLS, 0);
    double want[ROWS * STRIDE];
    (void)state;
    for (int i = 0; i < ROWS * STRIDE; i++)
        want[i] = i % STRIDE < COLS ? 30 * tanh(((double)x[i] + y[i]) * 0.5 / 30) : x[i];
    b->ops->add(b, strided(x), strided(y));
    b->ops->scale(b, strided(x), 0.5f, 30);
    test_close("add and scale", x, want, ROWS * STRIDE, 1e-5);
    struct batch batch = {.n_tokens = ROWS, .n_rows_out = 3, .rows_out = rows_out};
    b->ops->gather(b, test_tensor(out, 3, COLS), strided(x), &batch);
    for (int i = 0; i < 3; i++)
        test_same_bits("gather", out + i * COLS, x + rows_out[i] * STRIDE, COLS);
    /* nothing to do is fine everywhere */
    struct tensor empty = {x, DTYPE_F32, 0, COLS, STRIDE};
    struct batch none = {0};
    b->ops->add(b, empty, empty);
    b->ops->gather(b, empty, strided(x), &none);
    b->ops->batch_begin(b, &none);
    CHECK(b->ops->sync(b));
    b->ops->close(b);
    mem_free(x), mem_free(y), mem_free(out);
}

static void tables(void **state)
{
    static const int32_t ids[] = {5, 0, 19, 5}, positions[] = {7, 0, 3, 1};
    struct backend *b = test_open("reference");
    uint16_t half[20 * 6];
    float learned[10 * 6], out[4 * 6];
    double want[4 * 6];
    struct rand r = rand_seeded(4);
    struct weight *words, *places;
    (void)state;
    for (int i = 0; i < 20 * 6; i++)
        half[i] = bf16_from_float(test_normal(&r));
    for (int i = 0; i < 10 * 6; i++)
        learned[i] = test_normal(&r);
    /* the table of words lies transposed: element (id, d) at d * 20 + id */
    CHECK(b->ops->table_create(b, (struct matrix_view){half, DTYPE_BF16, 20, 6, 1, 20}, &words));
    CHECK(b->ops->table_create(b, test_view(learned, 10, 6), &places));
    struct batch batch = {.n_tokens = 4, .token_ids = ids, .positions = positions};
    b->ops->embed(b, test_tensor(out, 4, 6), words, &batch);
    b->ops->add_positions(b, test_tensor(out, 4, 6), places, 2, &batch);
    for (int i = 0; i < 24; i++)
        want[i] = (double)bf16_to_float(half[i % 6 * 20 + ids[i / 6]]) +
                  learned[(positions[i / 6] + 2) * 6 + i % 6];
    test_close("embedding", out, want, 24, 1e-6);
    b->ops->weight_destroy(b, words);
    b->ops->weight_destroy(b, places);
    struct weight *none;
    assert_int_equal(
        b->ops->table_create(b, (struct matrix_view){half, DTYPE_I8, 20, 6, 6, 1}, &none),
        ERR_UNSUPPORTED);
    b->ops->close(b);
}

static void functions_over_their_range(void **state)
{
    (void)state;
    for (double x = -104; x < 88.72; x += 0.00731) {
        float f = (float)x;
        double e = exp(f), t = tanh(f);
        if (fabs(exp_approx(f) - e) > 3e-7 * e + 1.5e-38)
            fail_msg("exp(%g) = %g", f, exp_approx(f));
        if (fabs(tanh_approx(f) - t) > 1e-6 * fabs(t) + 1e-9)
            fail_msg("tanh(%g) = %g", f, tanh_approx(f));
    }
    assert_true(isinf(exp_approx(1e9f)) && exp_approx(-1e9f) == 0 && isnan(exp_approx(NAN)) &&
                exp_approx(0) == 1);
    assert_true(tanh_approx(1e9f) == 1 && tanh_approx(-1e9f) == -1 && tanh_approx(0) == 0);
}

static float silu(float x)
{
    float y;
    rows_plain.activate(&y, &x, NULL, 1, ACTIVATION_SILU);
    return y;
}

static void silu_over_its_range(void **state)
{
    (void)state;
    for (double x = -88.3; x < 100; x += 0.00731) {
        float f = (float)x;
        double want = f / (1 + exp(-(double)f));
        if (fabs(silu(f) - want) > 3e-7 * fabs(want)) fail_msg("silu(%g) = %g", f, silu(f));
    }
    assert_true(silu(-INFINITY) > -1e-36f && silu(-3e38f) > -1e-36f && silu(-88.7f) > -1e-36f);
    assert_true(silu(3e38f) == 3e38f && isinf(silu(INFINITY)) && isnan(silu(NAN)));
}

static void halves_round_to_nearest(void **state)
{
    (void)state;
    for (uint32_t h = 0; h < 65536; h++) {
        float f = f16_to_float((uint16_t)h), g = bf16_to_float((uint16_t)h);
        if (f == f) assert_int_equal(f16_from_float(f), h);
        if (g == g && (fabsf(g) >= 0x1p-126f || g == 0)) assert_int_equal(bf16_from_float(g), h);
        assert_true(f == f ? 1 : isnan(f16_to_float(f16_from_float(f))));
    }
    assert_int_equal(f16_from_float(1.0f + 0x1p-11f), 0x3c00); /* a tie goes to even */
    assert_int_equal(f16_from_float(1.0f + 0x1p-11f + 0x1p-20f), 0x3c01);
    assert_int_equal(f16_from_float(65520.0f), 0x7c00);
    assert_int_equal(f16_from_float(0x1p-25f), 0);
    assert_int_equal(f16_from_float(0x1.8p-25f), 1);
    assert_int_equal(bf16_from_float(1.0f + 0x1p-8f), 0x3f80);
    assert_int_equal(bf16_from_float(1.0f + 0x1.8p-8f), 0x3f81);
}

/* Every loop over a row at every ISA against the plain one: widths around the vectors, the range
 * of exp, infinities and NaN. */
static void isas_give_the_same_bits(void **state)
{
    enum { N = 131 };
    struct rand r = rand_seeded(5);
    float *x = test_floats(&r, N, 20), *y = test_floats(&r, N, 2), *w = test_floats(&r, N, 1);
    float want[N], got[N], moved[N];
    uint16_t want_half[N], got_half[N];
    (void)state;
    x[0] = INFINITY, x[1] = -INFINITY, x[2] = NAN, x[3] = 0, x[4] = 1e-40f;
    for (int isa = 1; isa < 3; isa++) {
        struct backend *b = test_open(test_isas[isa]);
        if (!b) continue;
        const struct row_kernels *k = cpu_of(b)->rows, *plain = &rows_plain;
        assert_ptr_not_equal(k, plain);
        for (int n = 5; n <= N; n += 7) {
            for (int kind = 0; kind < 8; kind++) {
                plain->activate(want, x, kind & 4 ? y : NULL, n, (enum activation)(kind & 3));
                memcpy(got, x, sizeof got);
                k->activate(got, got, kind & 4 ? y : NULL, n, (enum activation)(kind & 3));
                test_same_bits("activate", got, want, n);
                struct norm_args args = {kind & 1 ? NORM_LAYER : NORM_RMS, 1e-5f, w,
                                         kind & 2 ? y : NULL};
                memcpy(moved, y, sizeof moved);
                plain->norm(moved, kind & 4 ? w : NULL, &args, want, n);
                memcpy(moved, y, sizeof moved);
                k->norm(moved, kind & 4 ? w : NULL, &args, got, n);
                test_same_bits("norm", got, want, n);
            }
            memcpy(want, x, sizeof want), memcpy(got, x, sizeof got);
            plain->scale(want, n, 0.7f, 30), k->scale(got, n, 0.7f, 30);
            plain->rotate_halves(want, y, w, n / 2), k->rotate_halves(got, y, w, n / 2);
            test_same_bits("scale and rotate", got, want, n);
            plain->to_bf16(want_half, x, n), k->to_bf16(got_half, x, n);
            assert_memory_equal(got_half, want_half, (size_t)n * 2);
        }
        b->ops->close(b);
    }
    mem_free(x), mem_free(y), mem_free(w);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(norms),
        cmocka_unit_test(activations),
        cmocka_unit_test(tables),
        cmocka_unit_test(sums_scales_and_gathers),
        cmocka_unit_test(functions_over_their_range),
        cmocka_unit_test(silu_over_its_range),
        cmocka_unit_test(isas_give_the_same_bits),
        cmocka_unit_test(halves_round_to_nearest),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
