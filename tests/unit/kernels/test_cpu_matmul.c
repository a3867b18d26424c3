/* Goal: matmul equals the sum written down in double precision, for every weight format,
 * instruction set and odd shape; a row's result has the same bits alone and in any batch; INT8 and
 * INT4 have the same bits on every instruction set. Method: the test rounds inputs itself (to f16,
 * bf16, int8 or 4 bits) where the format says so, so that only the order of additions is left to
 * the tolerance. */
#define AMX_EMULATED
#include "kernels/cpu/matmul_amx.c"
#include "unit/kernels/cpu_test.h"

struct format_case {
    enum weight_format format;
    const char *name;
    double tolerance;    /* of sum |x w|: error of the additions */
    double quantization; /* rms of the error against the unrounded product, relative to its rms */
};
static const struct format_case formats[] = {
    {WEIGHT_F32, "f32", 1e-6, 1e-6},   {WEIGHT_F16, "f16", 1e-6, 1e-3},
    {WEIGHT_BF16, "bf16", 2e-6, 6e-3}, {WEIGHT_INT8, "int8", 1e-6, 2e-2},
    {WEIGHT_INT4, "int4", 2e-6, 0.14},
};
enum { FORMAT_CASES = 5 };

struct shape {
    int64_t n, k;
};
static const struct shape shapes[] = {{1, 1},    {31, 7},   {33, 130}, {96, 64},
                                      {70, 301}, {65, 650}, {603, 20}};
enum { SHAPES = 7, ROWS = 29 };

/* The weights as the format keeps them, learnt from the backend itself: rows of the identity. INT8
 * and INT4 activations of the identity are exact (127 / 127), so column k of the product is exact
 * up to float rounding. */
static double *weights_kept(struct backend *b, const struct weight *w, int64_t n, int64_t k)
{
    double *kept;
    float *x = test_floats(NULL, k, 0), *y = test_floats(NULL, n, 0);
    CHECK(MEM_NEW_ARRAY(n * k, &kept));
    for (int64_t i = 0; i < k; i++) {
        x[i] = 1;
        backend_cpu.matmul(b, test_tensor(y, 1, n), test_tensor(x, 1, k), w);
        for (int64_t j = 0; j < n; j++)
            kept[j * k + i] = y[j];
        x[i] = 0;
    }
    mem_free(x);
    mem_free(y);
    return kept;
}

/* The activations as the format sees them: [ROWS][k]. */
static double *activations_seen(enum weight_format format, const float *x, int64_t k)
{
    double *seen;
    CHECK(MEM_NEW_ARRAY(ROWS * k, &seen));
    for (int r = 0; r < ROWS; r++) {
        float max = 0;
        for (int64_t i = 0; i < k; i++)
            max = fmaxf(max, fabsf(x[r * k + i]));
        float scale = max / 127.0f;
        for (int64_t i = 0; i < k; i++) {
            float v = x[r * k + i];
            seen[r * k + i] = format == WEIGHT_F32 || format == WEIGHT_F16 ? v
                              : format == WEIGHT_BF16
                                  ? bf16_round(v)
                                  : (double)scale * nearbyintf(v * (1.0f / scale));
        }
    }
    return seen;
}

static void check_product(const char *isa, const struct format_case *f, struct shape s,
                          const float *weights, const double *kept, const float *x, const float *y)
{
    double error = 0, total = 0, *seen = activations_seen(f->format, x, s.k);
    for (int64_t r = 0; r < ROWS; r++)
        for (int64_t j = 0; j < s.n; j++) {
            double sum = 0, size = 0, exact = 0;
            for (int64_t i = 0; i < s.k; i++) {
                double t = seen[r * s.k + i] * kept[j * s.k + i];
                sum += t, size += fabs(t);
                exact += (double)x[r * s.k + i] * weights[j * s.k + i];
            }
            double d = y[r * s.n + j] - sum;
            if (!(fabs(d) <= f->tolerance * (size + 1e-3)))
                fail_msg("%s %s %lldx%lld row %lld column %lld: %.9g, should be %.9g", isa, f->name,
                         (long long)s.n, (long long)s.k, (long long)r, (long long)j, y[r * s.n + j],
                         sum);
            error += (y[r * s.n + j] - exact) * (y[r * s.n + j] - exact), total += exact * exact;
        }
    mem_free(seen);
    if (!(sqrt(error / total) <= f->quantization))
        fail_msg("%s %s %lldx%lld: rms error of rounding %g", isa, f->name, (long long)s.n,
                 (long long)s.k, sqrt(error / total));
}

static void equals_double_sums(void **state)
{
    (void)state;
    for (int isa = 0; isa < TEST_ISAS; isa++) {
        struct backend *b = test_open(test_isas[isa]);
        for (int c = 0; b && c < FORMAT_CASES * SHAPES; c++) {
            struct rand r = rand_seeded((uint64_t)c);
            struct shape s = shapes[c / FORMAT_CASES];
            float *weights = test_floats(&r, s.n * s.k, 0.1f), *x = test_floats(&r, ROWS * s.k, 1);
            float *y = test_floats(NULL, ROWS * s.n, 0);
            struct matrix_view view = test_view(weights, s.n, s.k);
            struct weight *w;
            CHECK(b->ops->weight_create(b, &view, 1, NULL, formats[c % FORMAT_CASES].format, &w));
            double *kept = weights_kept(b, w, s.n, s.k);
            b->ops->matmul(b, test_tensor(y, ROWS, s.n), test_tensor(x, ROWS, s.k), w);
            check_product(test_isas[isa], &formats[c % FORMAT_CASES], s, weights, kept, x, y);
            b->ops->weight_destroy(b, w);
            mem_free(weights), mem_free(x), mem_free(y), mem_free(kept);
        }
        if (b) b->ops->close(b);
    }
}

/* Every row of a product of 160 rows has the same bits alone and in batches of other heights. */
static void rows_do_not_see_each_other(void **state)
{
    enum { M = 160, N = 40, K = 1160 };
    static const int heights[] = {1, 2, 3, 5, 7, 8, 11, 12, 13, 25, 145};
    (void)state;
    for (int c = 0; c < TEST_ISAS * FORMAT_CASES; c++) {
        struct backend *b = test_open(test_isas[c / FORMAT_CASES]);
        if (!b) continue;
        struct rand r = rand_seeded(7);
        float *weights = test_floats(&r, N * K, 0.1f), *x = test_floats(&r, M * K, 1);
        float *all = test_floats(NULL, M * N, 0), *some = test_floats(NULL, M * N, 0);
        struct matrix_view view = test_view(weights, N, K);
        struct weight *w;
        CHECK(b->ops->weight_create(b, &view, 1, weights, formats[c % FORMAT_CASES].format, &w));
        b->ops->matmul(b, test_tensor(all, M, N), test_tensor(x, M, K), w);
        for (size_t h = 0; h < sizeof heights / sizeof *heights; h++)
            for (int at = 0; at + heights[h] <= M && at < 20; at += 15) {
                b->ops->matmul(b, test_tensor(some, heights[h], N),
                               test_tensor(x + at * K, heights[h], K), w);
                test_same_bits(formats[c % FORMAT_CASES].name, some, all + at * N,
                               (int64_t)heights[h] * N);
            }
        b->ops->weight_destroy(b, w);
        b->ops->close(b);
        mem_free(weights), mem_free(x), mem_free(all), mem_free(some);
    }
}

/* Integer sums are exact, so INT8 and INT4 agree bit for bit across instruction sets. */
static void isas_agree_on_integers(void **state)
{
    enum { M = 17, N = 75, K = 650 };
    (void)state;
    for (int f = 3; f < FORMAT_CASES; f++) {
        float *first = NULL;
        for (int isa = 0; isa < TEST_ISAS; isa++) {
            struct backend *b = test_open(test_isas[isa]);
            if (!b) continue;
            struct rand r = rand_seeded(11);
            float *weights = test_floats(&r, N * K, 0.1f), *x = test_floats(&r, M * K, 1);
            float *y = test_floats(NULL, M * N, 0);
            struct matrix_view view = test_view(weights, N, K);
            struct weight *w;
            CHECK(b->ops->weight_create(b, &view, 1, weights, formats[f].format, &w));
            b->ops->matmul(b, test_tensor(y, M, N), test_tensor(x, M, K), w);
            if (first) test_same_bits(test_isas[isa], y, first, M * N);
            if (first)
                mem_free(y);
            else
                first = y;
            b->ops->weight_destroy(b, w);
            b->ops->close(b);
            mem_free(weights), mem_free(x);
        }
        mem_free(first);
    }
}

/* Extreme activations: all zero, tiny, huge, and a NaN that must stay in its row. */
static void extremes(void **state)
{
    enum { M = 5, N = 40, K = 96 };
    (void)state;
    for (int c = 0; c < TEST_ISAS * FORMAT_CASES; c++) {
        struct backend *b = test_open(test_isas[c / FORMAT_CASES]);
        if (!b) continue;
        struct rand r = rand_seeded(3);
        float *weights = test_floats(&r, N * K, 0.1f), *x = test_floats(&r, M * K, 1),
              *y = test_floats(NULL, M * N, 0);
        for (int i = 0; i < K; i++)
            x[i] = 0, x[K + i] *= 1e-41f, x[2 * K + i] *= 1e30f;
        x[3 * K + 17] = NAN;
        struct matrix_view view = test_view(weights, N, K);
        struct weight *w;
        CHECK(b->ops->weight_create(b, &view, 1, NULL, formats[c % FORMAT_CASES].format, &w));
        b->ops->matmul(b, test_tensor(y, M, N), test_tensor(x, M, K), w);
        for (int j = 0; j < N; j++) {
            if (y[j] != 0.0f) fail_msg("%s: zeros give %g", formats[c % FORMAT_CASES].name, y[j]);
            if (!(fabsf(y[N + j]) < 1e-37f))
                fail_msg("%s: tiny gives %g", formats[c % FORMAT_CASES].name, y[N + j]);
            assert_true(isfinite(y[2 * N + j]) && isnan(y[3 * N + j]) && isfinite(y[4 * N + j]));
        }
        b->ops->weight_destroy(b, w);
        b->ops->close(b);
        mem_free(weights), mem_free(x), mem_free(y);
    }
}

/* Parts of several types, transposed and absent, stacked, with a bias: equals one plain matrix. */
static void parts_are_stacked(void **state)
{
    enum { K = 37, N1 = 5, N2 = 30, N3 = 9, N = N1 + N2 + N3 };
    struct rand r = rand_seeded(5);
    float *a = test_floats(&r, N1 * K, 1), *c = test_floats(&r, K * N2, 1),
          *bias = test_floats(&r, N, 1);
    float *x = test_floats(&r, 2 * K, 1), *y = test_floats(NULL, 2 * N, 0);
    uint16_t half[N2 * K];
    (void)state;
    for (int i = 0; i < N2 * K; i++)
        half[i] = f16_from_float(c[i]), c[i] = f16_to_float(half[i]);
    struct matrix_view parts[3] = {test_view(a, N1, K),
                                   {half, DTYPE_F16, N2, K, 1, N2}, /* stored [K][N2] */
                                   {NULL, DTYPE_BF16, N3, K, K, 1}};
    struct backend *b = test_open("reference");
    struct weight *w;
    CHECK(b->ops->weight_create(b, parts, 3, bias, WEIGHT_AUTO, &w));
    b->ops->matmul(b, test_tensor(y, 2, N), test_tensor(x, 2, K), w);
    double want[2 * N];
    for (int i = 0; i < 2 * N; i++) {
        int row = i / N, n = i % N;
        want[i] = bias[n];
        for (int k = 0; k < K; k++)
            want[i] += (double)x[row * K + k] * (n < N1        ? a[n * K + k]
                                                 : n < N1 + N2 ? c[k * N2 + n - N1]
                                                               : 0);
    }
    test_close("stacked parts", y, want, 2 * N, 1e-5);
    assert_true(b->ops->weight_bytes(w) >= N * K * 4);
    b->ops->weight_destroy(b, w);
    b->ops->close(b);
    mem_free(a), mem_free(c), mem_free(bias), mem_free(x), mem_free(y);
}

/* More rows than are packed at once, and any number of threads: the same bits. */
static void threads_and_slices(void **state)
{
    enum { M = 1500, N = 70, K = 64 };
    struct rand r = rand_seeded(9);
    float *weights = test_floats(&r, N * K, 0.3f), *x = test_floats(&r, M * K, 1);
    float *one = test_floats(NULL, M * N, 0), *many = test_floats(NULL, M * N, 0);
    struct matrix_view view = test_view(weights, N, K);
    (void)state;
    for (int f = 0; f < FORMAT_CASES; f++)
        for (int threads = 1; threads <= 3; threads += 2) {
            struct backend *b = test_open_with(NULL, threads, 16);
            struct weight *w;
            CHECK(b->ops->weight_create(b, &view, 1, NULL, formats[f].format, &w));
            float *y = threads == 1 ? one : many;
            b->ops->matmul(b, test_tensor(y, M, N), test_tensor(x, M, K), w);
            if (threads > 1) test_same_bits("threads", many, one, M * N);
            b->ops->matmul(b, test_tensor(many, 1, N), test_tensor(x + (M - 1) * K, 1, K), w);
            test_same_bits("slices", many, one + (M - 1) * N, N);
            b->ops->weight_destroy(b, w);
            b->ops->close(b);
        }
    mem_free(weights), mem_free(x), mem_free(one), mem_free(many);
}

/* A weight adopted from foreign bytes gives the bits of the one they came from, also when it has
 * settled and those bytes are no more. */
static void adopted_weights_settle(void **state)
{
    enum { M = 13, N = 75, K = 260 };
    struct rand r = rand_seeded(21);
    float *weights = test_floats(&r, N * K, 0.3f), *x = test_floats(&r, M * K, 1),
          *bias = test_floats(&r, N, 1), *want = test_floats(NULL, M * N, 0),
          *got = test_floats(NULL, M * N, 0);
    struct matrix_view view = test_view(weights, N, K);
    struct backend *b = test_open_with(NULL, 2, 16);
    (void)state;
    for (int f = 3; f < 5; f++) {
        struct weight *from, *to;
        struct packed_weight p;
        struct hash128 digest;
        void *bytes;
        CHECK(b->ops->weight_create(b, &view, 1, bias, formats[f].format, &from));
        b->ops->matmul(b, test_tensor(want, M, N), test_tensor(x, M, K), from);
        b->ops->weight_export(from, &p);
        CHECK(mem_alloc_aligned(64, p.panels_bytes, &bytes));
        memcpy(bytes, p.panels, p.panels_bytes);
        p.panels = bytes;
        CHECK(b->ops->weight_adopt(b, &p, &to));
        b->ops->matmul(b, test_tensor(got, M, N), test_tensor(x, M, K), to);
        test_same_bits("adopted", got, want, M * N);
        CHECK(b->ops->weight_settle(b, to, &digest));
        assert_true(hash_equal(digest, b->ops->packed_digest(&p)));
        memset(bytes, 0x55, p.panels_bytes);
        memset(got, 0, M * N * sizeof *got);
        b->ops->matmul(b, test_tensor(got, M, N), test_tensor(x, M, K), to);
        test_same_bits("settled", got, want, M * N);
        b->ops->weight_destroy(b, from);
        b->ops->weight_destroy(b, to);
        mem_free(bytes);
    }
    b->ops->close(b);
    mem_free(weights), mem_free(x), mem_free(bias), mem_free(want), mem_free(got);
}

static void refusals(void **state)
{
    struct backend *b = test_open("reference");
    float data[6] = {0};
    struct weight *w;
    struct matrix_view two[2] = {test_view(data, 2, 3), test_view(data, 3, 2)};
    struct matrix_view wrong = {data, DTYPE_I32, 2, 3, 3, 1}, empty = test_view(data, 0, 3);
    (void)state;
    assert_int_equal(b->ops->weight_create(b, two, 2, NULL, WEIGHT_F32, &w), ERR_FORMAT);
    assert_int_equal(b->ops->weight_create(b, &wrong, 1, NULL, WEIGHT_F32, &w), ERR_UNSUPPORTED);
    assert_int_equal(b->ops->weight_create(b, &empty, 1, NULL, WEIGHT_F32, &w), ERR_FORMAT);
    assert_int_equal(b->ops->weight_create(b, two, 1, NULL, WEIGHT_FP8, &w), ERR_UNSUPPORTED);
    b->ops->close(b);
    struct backend_options o = {.vocab_size = 4, .isa = "sse9"};
    assert_int_equal(backend_cpu.open(&o, &b), ERR_UNSUPPORTED);
}

/* Every allocation of open and of weight_create may fail, and nothing is left behind. */
static void allocations_fail(void **state)
{
    float data[64] = {1};
    struct matrix_view view = test_view(data, 8, 8);
    int64_t live = mem_live();
    (void)state;
    for (int64_t n = 1; n < 100; n++) {
        struct backend_options o = {
            .n_threads = 2, .vocab_size = 8, .n_slots_max = 1, .isa = "reference"};
        struct backend *b = NULL;
        struct weight *w = NULL;
        mem_fail_at(n);
        enum err e = backend_cpu.open(&o, &b);
        if (!e) e = b->ops->weight_create(b, &view, 1, data, WEIGHT_INT8, &w);
        mem_fail_at(0);
        if (b) b->ops->weight_destroy(b, w);
        if (b) b->ops->close(b);
        assert_int_equal(mem_live(), live);
        if (!e) return;
        assert_int_equal(e, ERR_NO_MEMORY);
    }
    fail_msg("never succeeded");
}

/* matmul_argmax finds what greedy sampling finds in the rows of matmul: with equal largest outputs
 * far apart, rows of NaN, infinities, several chunks of rows and of outputs. */
static void argmax_is_greedy(void **state)
{
    enum { N = 1000, K = 40, M = 160, FEW = 3 };
    struct rand r = rand_seeded(8);
    float *w = test_floats(&r, N * K, 1), *x = test_floats(&r, M * K, 1);
    float *y = test_floats(NULL, M * N, 0), *bias = test_floats(&r, N, 1), value[M];
    int32_t index[M], few[FEW];
    (void)state;
    memcpy(w + 900 * K, w + 70 * K, K * sizeof *w); /* equal outputs, both large for row 3 */
    memcpy(x + 3 * K, w + 70 * K, K * sizeof *w);
    bias[900] = bias[70];
    bias[500] = 1e38f;
    for (int d = 0; d < K; d++)
        x[5 * K + d] = NAN, x[7 * K + d] = 3e38f;
    for (int isa = 0; isa < TEST_ISAS; isa++)
        for (int f = 0; f < 2; f++) {
            struct backend *b = test_open_with(test_isas[isa], 1 + f, N);
            if (!b) continue;
            struct matrix_view view = test_view(w, N, K);
            struct weight *packed;
            bias[500] = f ? 1e38f : 0;
            CHECK(backend_cpu.weight_create(b, &view, 1, bias, f ? WEIGHT_F32 : WEIGHT_INT8,
                                            &packed));
            backend_cpu.matmul(b, test_tensor(y, M, N), test_tensor(x, M, K), packed);
            backend_cpu.matmul_argmax(b, test_tensor(x, M, K), packed, index, value);
            /* few rows go by several panels a chunk */
            backend_cpu.matmul_argmax(b, test_tensor(x, FEW, K), packed, few, value);
            assert_memory_equal(few, index, sizeof few);
            for (int m = 0; m < M; m++) {
                struct sample_row greedy = {.slot = -1, .n_logprobs = -1, .forced_token = -1};
                struct sample_result result;
                backend_cpu.sample(b, test_tensor(y + m * N, 1, N), &greedy, 1, &result);
                assert_int_equal(index[m], result.token);
                if (isfinite(y[m * N + index[m]])) assert_true(value[m] == y[m * N + index[m]]);
            }
            if (!f) assert_int_equal(index[3], 70);
            backend_cpu.weight_destroy(b, packed);
            b->ops->close(b);
        }
    mem_free(w), mem_free(x), mem_free(y), mem_free(bias);
}

/* The AMX kernels with their tile instructions in C (see amx.h), in the place of the reference's:
 * the same bits for INT8 and INT4, the same sums for BF16, and no row that depends on its batch. */
static void amx_in_emulation(void **state)
{
    enum { AMX_TEST_ROWS = 45 };
    static const enum weight_format amx_formats[] = {WEIGHT_INT8, WEIGHT_INT4, WEIGHT_BF16};
    (void)state;
    for (int i = 0; i < 3 * SHAPES; i++) {
        enum weight_format f = amx_formats[i / SHAPES];
        int64_t n = shapes[i % SHAPES].n, k = shapes[i % SHAPES].k;
        struct rand r = rand_seeded((uint64_t)i);
        float *w = test_floats(&r, n * k, 1), *bias = test_floats(&r, n, 1);
        float *x = test_floats(&r, AMX_TEST_ROWS * k, 1);
        float *want = test_floats(NULL, AMX_TEST_ROWS * n, 0);
        float *got = test_floats(NULL, AMX_TEST_ROWS * n, 0), *alone = test_floats(NULL, n, 0);
        struct backend *b = test_open_with("reference", 1, 512);
        struct matrix_view view = test_view(w, n, k);
        struct weight *packed;
        CHECK(backend_cpu.weight_create(b, &view, 1, bias, f, &packed));
        backend_cpu.matmul(b, test_tensor(want, AMX_TEST_ROWS, n), test_tensor(x, AMX_TEST_ROWS, k),
                           packed);
        cpu_of(b)->matmul.panel[f] = matmul_amx_emulated.panel[f];
        cpu_of(b)->matmul.rows_max[f] = matmul_amx_emulated.rows_max[f];
        cpu_of(b)->matmul.row_major[f] = matmul_amx_emulated.row_major[f];
        backend_cpu.matmul(b, test_tensor(got, AMX_TEST_ROWS, n), test_tensor(x, AMX_TEST_ROWS, k),
                           packed);
        if (f != WEIGHT_BF16) test_same_bits("amx", got, want, AMX_TEST_ROWS * n);
        for (int64_t j = 0; j < AMX_TEST_ROWS * n; j++)
            if (fabsf(got[j] - want[j]) > 2e-6f * (float)k + 1e-6f * fabsf(want[j]))
                fail_msg("%lld x %lld: %g, not %g", (long long)n, (long long)k, got[j], want[j]);
        for (int row = 0; row < AMX_TEST_ROWS; row += 11) {
            backend_cpu.matmul(b, test_tensor(alone, 1, n), test_tensor(x + row * k, 1, k), packed);
            test_same_bits("amx, a row alone", alone, got + row * n, n);
        }
        backend_cpu.weight_destroy(b, packed);
        b->ops->close(b);
        mem_free(w), mem_free(bias), mem_free(x), mem_free(want), mem_free(got), mem_free(alone);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(argmax_is_greedy),
        cmocka_unit_test(amx_in_emulation),
        cmocka_unit_test(equals_double_sums),
        cmocka_unit_test(rows_do_not_see_each_other),
        cmocka_unit_test(isas_agree_on_integers),
        cmocka_unit_test(extremes),
        cmocka_unit_test(parts_are_stacked),
        cmocka_unit_test(threads_and_slices),
        cmocka_unit_test(refusals),
        cmocka_unit_test(adopted_weights_settle),
        cmocka_unit_test(allocations_fail),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
