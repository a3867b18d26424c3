/* Goal: the element-wise operations, norms, embeddings and products of the CUDA backend are right.
 * Method: each through the backend's table, on shapes with odd sizes, strides and tails, against a
 * reference in double. Tolerances: a BF16 result is off by at most half a step, 2^-8 of its value;
 * 8-bit and 4-bit weights add the error of their codes. */
#include "tests/cuda/gear.h"

#define STEP (1.0 / 256)

static void norm_reference(const float *x, int cols, const struct norm_args *args,
                           const float *weight, const float *bias, double *out)
{
    double mean = 0, squares = 0;
    for (int c = 0; c < cols && args->kind == NORM_LAYER; c++)
        mean += (double)x[c] / cols;
    for (int c = 0; c < cols; c++)
        squares += ((double)x[c] - mean) * ((double)x[c] - mean) / cols;
    double by = 1 / sqrt(squares + (double)args->epsilon);
    for (int c = 0; c < cols; c++)
        out[c] = ((double)x[c] - mean) * by * (double)weight[c] + (bias ? (double)bias[c] : 0);
}

static void norm_case(struct backend *b, int rows, int cols, int stride, enum norm_kind kind,
                      bool delta, bool bias)
{
    struct both x = both_rand(b, rows, cols, stride, DTYPE_BF16, 4),
                d = both_rand(b, rows, cols, stride, DTYPE_BF16, 2);
    struct both w = both_rand(b, 1, cols, cols, DTYPE_F32, 2),
                v = both_rand(b, 1, cols, cols, DTYPE_F32, 1);
    struct both out = both_new(b, rows, cols, stride, DTYPE_BF16);
    struct norm_args args = {kind, 1e-5f, w.t.data, bias ? v.t.data : NULL};
    double *want = take((size_t)(rows * cols) * 8), *sum = take((size_t)(rows * cols) * 8);
    for (int i = 0; i < rows * cols; i++)
        sum[i] = (double)(x.host[i] = delta ? rounded(x.host[i] + d.host[i]) : x.host[i]);
    for (int r = 0; r < rows; r++)
        norm_reference(x.host + r * cols, cols, &args, w.host, bias ? v.host : NULL,
                       want + r * cols);
    b->ops->add_norm(b, x.t, delta ? d.t : (struct tensor){.data = NULL}, &args, out.t);
    expect_near(b, &x, sum, 0, 0, "x after add_norm");
    expect_near(b, &out, want, STEP, 2e-5, "add_norm");
    both_free(b, &x), both_free(b, &d), both_free(b, &w), both_free(b, &v), both_free(b, &out);
    mem_free(want), mem_free(sum);
}

static void test_norm(void **state)
{
    struct backend *b = gear_open();
    static const int cols[] = {1, 7, 8, 64, 100, 257, 520, 2048, 4104};
    (void)state;
    for (size_t i = 0; i < sizeof cols / sizeof *cols; i++)
        for (int kind = NORM_RMS; kind <= NORM_LAYER; kind++) {
            norm_case(b, 3, cols[i], cols[i], (enum norm_kind)kind, true, kind == NORM_LAYER);
            norm_case(b, 2, cols[i], (cols[i] + 7) / 8 * 8, (enum norm_kind)kind, false, false);
        }
    gear_close(b);
}

static double act_reference(double x, enum activation kind)
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

static void activate_case(struct backend *b, int rows, int cols, enum activation kind, bool gated)
{
    int in_cols = gated ? 2 * cols : cols;
    struct both in = both_rand(b, rows, in_cols, in_cols, DTYPE_BF16, 6),
                out = both_new(b, rows, cols, cols, DTYPE_BF16);
    double *want = take((size_t)(rows * cols) * 8);
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < cols; c++)
            want[r * cols + c] = act_reference((double)in.host[r * in_cols + c], kind) *
                                 (gated ? (double)in.host[r * in_cols + cols + c] : 1);
    b->ops->activate(b, out.t, in.t, kind, gated);
    expect_near(b, &out, want, STEP, 1e-5, "activate");
    both_free(b, &in), both_free(b, &out), mem_free(want);
}

static void test_activate(void **state)
{
    struct backend *b = gear_open();
    (void)state;
    for (int kind = ACTIVATION_SILU; kind <= ACTIVATION_RELU; kind++)
        for (int gated = 0; gated < 2; gated++) {
            activate_case(b, 3, 8, (enum activation)kind, gated);
            activate_case(b, 2, 37, (enum activation)kind, gated);
            activate_case(b, 1, 2568, (enum activation)kind, gated);
        }
    gear_close(b);
}

static void test_add_and_scale(void **state)
{
    struct backend *b = gear_open();
    double want[3 * 300];
    (void)state;
    for (int f32 = 0; f32 < 2; f32++) {
        enum dtype t = f32 ? DTYPE_F32 : DTYPE_BF16;
        struct both x = both_rand(b, 3, 300, 304, t, 3), y = both_rand(b, 3, 300, 300, t, 3);
        for (int i = 0; i < 900; i++)
            want[i] = (double)x.host[i] + (double)y.host[i];
        b->ops->add(b, x.t, y.t);
        expect_near(b, &x, want, f32 ? 1e-7 : STEP, 0, "add");
        for (int i = 0; i < 900; i++)
            want[i] = 5 * tanh((double)y.host[i] * 0.7 / 5);
        b->ops->scale(b, y.t, 0.7f, 5);
        expect_near(b, &y, want, f32 ? 1e-5 : STEP, 1e-6, "scale with a cap");
        both_free(b, &x), both_free(b, &y);
    }
    gear_close(b);
}

/* A batch of one sequence with n tokens, for the operations that look at ids, positions and rows.
 */
/* out and picked have rows of a stride of their own, and begin some elements behind their memory.
 */
static void embed_case(struct backend *b, int cols, int stride, int picked_stride, int shift,
                       int picked_shift)
{
    enum { N = 5, ROWS = 11, COLS_MAX = 1100 };
    static float table_host[ROWS * COLS_MAX];
    static double want[N * COLS_MAX], kept[2 * COLS_MAX];
    int32_t ids[N] = {3, -1, 10, 99, 0}, slots[N] = {2, 6, 2, 2, 2}, positions[N] = {0, 1, 2, 3, 8};
    int32_t starts[2] = {0, N}, len = N, blocks = 0, places[N] = {-1, -1, -1, -1, -1},
            rows_out[2] = {1, 4};
    struct batch batch = {N,         1,      2,    1,       ids,    slots,
                          positions, starts, &len, &blocks, places, rows_out};
    struct both out = both_new(b, N + 1, cols, stride, DTYPE_BF16),
                picked = both_new(b, 2 + 1, cols, picked_stride, DTYPE_BF16);
    struct weight *table;
    assert_true(cols <= COLS_MAX && cols + shift <= stride && cols + picked_shift <= picked_stride);
    memset(out.host, 0, (size_t)((N + 1) * cols) * 4);
    both_send(b, &out); /* and NaN between the rows */
    out.t.rows = N, picked.t.rows = 2; /* the last one is room to begin later */
    out.t.data = (uint16_t *)out.t.data + shift;
    picked.t.data = (uint16_t *)picked.t.data + picked_shift;
    for (int i = 0; i < ROWS * cols; i++)
        table_host[i] = rounded(rand_float(1));
    must(b->ops->table_create(b, (struct matrix_view){table_host, DTYPE_F32, ROWS, cols, cols, 1},
                              &table));
    b->ops->feed(b, 6, 7);
    b->ops->batch_begin(b, &batch);
    b->ops->embed(b, out.t, table, &batch);
    for (int i = 0; i < N; i++) {
        int id = ids[i] == -1 ? 7 : ids[i];
        for (int c = 0; c < cols; c++)
            want[i * cols + c] = id < ROWS ? (double)table_host[id * cols + c] : 0;
    }
    expect_near(b, &out, want, 0, 0, "embed");
    b->ops->add_positions(b, out.t, table, 2, &batch);
    for (int i = 0; i < N; i++)
        for (int c = 0; c < cols; c++)
            want[i * cols + c] += (double)table_host[(positions[i] + 2) * cols + c];
    expect_near(b, &out, want, STEP, 1e-6, "add_positions");
    b->ops->gather(b, picked.t, out.t, &batch);
    float *now = both_get(b, &out);
    for (int i = 0; i < 2 * cols; i++)
        kept[i] = (double)now[rows_out[i / cols] * cols + i % cols];
    expect_near(b, &picked, kept, 0, 0, "gather");
    struct both wide = picked;
    wide.t.cols = picked_stride - picked_shift;
    float *all = both_get(b, &wide);
    for (int i = 0; i < 2 * (picked_stride - picked_shift); i++) /* nothing behind a row */
        if (i % (picked_stride - picked_shift) >= cols) assert_true(all[i] == 0);
    mem_free(all);
    must(b->ops->ticket_wait(b, b->ops->step_end(b)));
    out.t.data = (uint16_t *)out.t.data - shift;
    picked.t.data = (uint16_t *)picked.t.data - picked_shift;
    mem_free(now), both_free(b, &out), both_free(b, &picked);
    b->ops->weight_destroy(b, table);
}

static void test_embed_and_gather(void **state)
{
    static const int cases[][5] = {
        {70, 70, 70, 0, 0}, {72, 72, 80, 0, 0}, {72, 76, 72, 0, 0}, {72, 72, 75, 0, 0},
        {64, 72, 72, 3, 0}, {64, 72, 72, 0, 5}, {70, 80, 72, 0, 0}, {1100, 1104, 1104, 0, 0},
    };
    struct backend *b = gear_open();
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        embed_case(b, cases[i][0], cases[i][1], cases[i][2], cases[i][3], cases[i][4]);
    gear_close(b);
}

struct product {
    int rows, n_in, n_out[2], x_stride, out_stride;
    enum weight_format format;
    bool bias, f32_out;
    enum dtype stored; /* the checkpoint's type */
    bool transposed;
};

/* How far a result may be off: the product of the sizes of its terms times what each may be off. */
static double product_slack(enum weight_format f)
{
    return f == WEIGHT_INT4 ? 0.13 : f == WEIGHT_INT8 ? 0.012 : f == WEIGHT_FP8 ? 0.07 : 0.0;
}

static void stored_write(void *to, enum dtype t, int64_t i, float *v)
{
    uint16_t half = bf16_of(*v);
    _Float16 f16 = (_Float16)*v;
    if (t == DTYPE_F32) ((float *)to)[i] = *v;
    if (t == DTYPE_BF16) ((uint16_t *)to)[i] = half, *v = of_bf16(half);
    if (t == DTYPE_F16) memcpy((uint16_t *)to + i, &f16, 2), *v = (float)f16;
}

static void product_case(struct backend *b, const struct product *p)
{
    int n_out = p->n_out[0] + p->n_out[1], out_stride = p->out_stride ? p->out_stride : n_out;
    float *w = take((size_t)(n_out * p->n_in) * 4), *bias = take((size_t)n_out * 4);
    uint8_t *stored = take((size_t)(n_out * p->n_in) * 4);
    struct matrix_view parts[2];
    for (int i = 0, first = 0; i < 2; first += p->n_out[i++]) {
        int rows = p->n_out[i];
        uint8_t *to = stored + (size_t)(first * p->n_in) * dtype_bytes(p->stored);
        parts[i] = (struct matrix_view){
            to, p->stored, rows, p->n_in, p->transposed ? 1 : p->n_in, p->transposed ? rows : 1};
        for (int r = 0; r < rows; r++)
            for (int k = 0; k < p->n_in; k++) {
                float *v = &w[(first + r) * p->n_in + k];
                *v = rand_float(1);
                stored_write(to, p->stored, r * parts[i].row_stride + k * parts[i].col_stride, v);
            }
    }
    for (int i = 0; i < n_out; i++)
        bias[i] = rounded(rand_float(3));
    struct weight *weight;
    must(b->ops->weight_create(b, parts, p->n_out[1] ? 2 : 1, p->bias ? bias : NULL, p->format,
                               &weight));
    struct both x =
        both_rand(b, p->rows, p->n_in, p->x_stride ? p->x_stride : p->n_in, DTYPE_BF16, 1);
    struct both out = both_new(b, p->rows, n_out, out_stride, p->f32_out ? DTYPE_F32 : DTYPE_BF16);
    double *want = take((size_t)(p->rows * n_out) * 8),
           off = sqrt(p->n_in) * (product_slack(p->format) + 0.003);
    for (int r = 0; r < p->rows; r++)
        for (int c = 0; c < n_out; c++) {
            double *sum = &want[r * n_out + c];
            *sum = p->bias ? (double)bias[c] : 0;
            for (int k = 0; k < p->n_in; k++)
                *sum += (double)x.host[r * p->n_in + k] * (double)w[c * p->n_in + k];
        }
    b->ops->matmul(b, out.t, x.t, weight);
    expect_near(b, &out, want, STEP, off + 1e-6, "matmul");
    assert_true(b->ops->weight_bytes(weight) > 0 || !p->n_in);
    both_free(b, &x), both_free(b, &out), mem_free(want), mem_free(w), mem_free(bias),
        mem_free(stored);
    b->ops->weight_destroy(b, weight);
}

static void products(struct backend *b, enum weight_format format)
{
    const struct product list[] = {
        {1, 64, {16, 0}, 0, 0, format, false, false, DTYPE_F32, false},
        {3, 96, {48, 32}, 0, 0, format, true, true, DTYPE_BF16, false},
        {70, 128, {80, 0}, 0, 0, format, true, false, DTYPE_F16, true},
        {17, 200, {24, 0}, 208, 0, format, false, true, DTYPE_BF16, true},
        {5, 37, {19, 3}, 0, 0, format, true, false, DTYPE_F32, false},   /* odd everything */
        {3, 37, {24, 0}, 40, 0, format, false, false, DTYPE_F32, false}, /* aligned rows, an odd end
                                                                          */
        {4, 256, {33, 0}, 256, 40, format, true, true, DTYPE_F32, false},
        {2, 130, {9, 0}, 131, 9, format, false, false, DTYPE_BF16, false}, /* rows not aligned */
        {2, 5248, {5, 0}, 0, 0, format, false, true, DTYPE_BF16, false},   /* longer than what is
                                                                              fetched ahead */
    };
    for (size_t i = 0; i < sizeof list / sizeof *list; i++)
        product_case(b, &list[i]);
}

static void test_matmul(void **state)
{
    (void)state;
    static const enum weight_format formats[] = {WEIGHT_AUTO, WEIGHT_BF16, WEIGHT_F16,
                                                 WEIGHT_INT8, WEIGHT_INT4, WEIGHT_FP8};
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++)
        for (int fixed = 0; fixed < 2; fixed++) {
            struct backend_options o = gear_options();
            o.deterministic = fixed;
            struct backend *b = gear_open_with(&o);
            products(b, formats[i]);
            gear_close(b);
        }
}

/* Without inputs only the bias is left; without outputs nothing is. */
static void test_matmul_empty(void **state)
{
    struct backend *b = gear_open();
    float bias[4] = {1, 2, 3, 4}, none = 0;
    double want[4] = {1, 2, 3, 4};
    struct weight *w;
    (void)state;
    for (int format = WEIGHT_F16; format <= WEIGHT_FP8; format++) {
        must(b->ops->weight_create(b, &(struct matrix_view){&none, DTYPE_F32, 4, 0, 0, 1}, 1, bias,
                                   (enum weight_format)format, &w));
        struct both x = both_new(b, 1, 0, 8, DTYPE_BF16), out = both_new(b, 1, 4, 8, DTYPE_BF16);
        b->ops->matmul(b, out.t, x.t, w);
        expect_near(b, &out, want, 0, 0, "matmul without inputs");
        b->ops->weight_destroy(b, w);
        both_free(b, &x), both_free(b, &out);
    }
    gear_close(b);
}

/* A weight in 8 bits takes the codes that the norm before it left, and only while they are those of
 * its input: what comes in between makes them void. */
static void test_codes_ahead(void **state)
{
    enum { N = 6, K = 64, M = 32 };
    (void)state;
    for (int f = WEIGHT_INT8; f <= WEIGHT_FP8; f += WEIGHT_FP8 - WEIGHT_INT8) {
        struct backend *b = gear_open();
        float w[M * K];
        double want[N * M];
        struct weight *weight;
        for (int i = 0; i < M * K; i++)
            w[i] = rand_float(1);
        must(b->ops->weight_create(b, &(struct matrix_view){w, DTYPE_F32, M, K, K, 1}, 1, NULL,
                                   (enum weight_format)f, &weight));
        struct both x = both_rand(b, N, K, K, DTYPE_BF16, 2),
                    ones = both_new(b, 1, K, K, DTYPE_F32);
        struct both normed = both_new(b, N, K, K, DTYPE_BF16),
                    out = both_new(b, N, M, M, DTYPE_BF16);
        for (int i = 0; i < K; i++)
            ones.host[i] = 1;
        both_send(b, &ones);
        struct norm_args args = {NORM_RMS, 1e-6f, ones.t.data, NULL};
        for (int again = 0; again < 2; again++) { /* the second time x is doubled after the norm */
            b->ops->add_norm(b, x.t, (struct tensor){.data = NULL}, &args, normed.t);
            if (again) b->ops->add(b, normed.t, normed.t);
            b->ops->matmul(b, out.t, normed.t, weight);
            float *in = both_get(b, &normed);
            for (int i = 0; i < N * M; i++) {
                want[i] = 0;
                for (int k = 0; k < K; k++)
                    want[i] += (double)in[i / M * K + k] * (double)w[i % M * K + k];
            }
            expect_near(b, &out, want, STEP, 8 * product_slack((enum weight_format)f) * (again + 1),
                        "matmul of codes made ahead");
            mem_free(in);
        }
        both_free(b, &x), both_free(b, &ones), both_free(b, &normed), both_free(b, &out);
        b->ops->weight_destroy(b, weight);
        gear_close(b);
    }
}

/* Codes that a graph was recorded to make are not made yet; those made before it are void after it;
 * and a graph makes its own, whatever codes there were when it was recorded. */
static void test_codes_and_graphs(void **state)
{
    enum { N = 3, K = 64, M = 16 };
    struct backend *b = gear_open();
    float w[M * K];
    struct weight *weight;
    void *graph = NULL;
    (void)state;
    for (int i = 0; i < M * K; i++)
        w[i] = rand_float(1);
    must(b->ops->weight_create(b, &(struct matrix_view){w, DTYPE_F32, M, K, K, 1}, 1, NULL,
                               WEIGHT_INT8, &weight));
    struct both x = both_rand(b, N, K, K, DTYPE_BF16, 2), y = both_rand(b, N, K, K, DTYPE_BF16, 2),
                up = both_rand(b, N, K, K, DTYPE_BF16, 2), out = both_new(b, N, M, M, DTYPE_BF16);
    for (int part = 0; part < 3; part++) {
        if (part == 0) b->ops->activate(b, y.t, x.t, ACTIVATION_RELU, false);  /* codes of y */
        if (part == 1) b->ops->activate(b, up.t, x.t, ACTIVATION_SILU, false); /* others */
        must(b->ops->capture_begin(b));
        if (part == 0) b->ops->matmul(b, out.t, y.t, weight);
        if (part == 2) b->ops->activate(b, y.t, x.t, ACTIVATION_RELU, false);
        if (part >= 1) b->ops->activate(b, up.t, x.t, ACTIVATION_SILU, false);
        if (part == 1) b->ops->activate(b, y.t, x.t, ACTIVATION_RELU, false);
        must(b->ops->capture_end(b, &graph));
        if (part == 0) b->ops->activate(b, up.t, x.t, ACTIVATION_SILU, false); /* others */
        if (part == 2) b->ops->activate(b, y.t, x.t, ACTIVATION_GELU_ERF, false);
        if (part != 1) must(b->ops->replay(b, graph));
        if (part != 0) b->ops->matmul(b, out.t, y.t, weight);
        double want[N * M];
        float *in = both_get(b, &y);
        for (int i = 0; i < N * M; i++) {
            want[i] = 0;
            for (int k = 0; k < K; k++)
                want[i] += (double)in[i / M * K + k] * (double)w[i % M * K + k];
        }
        expect_near(b, &out, want, STEP, 8 * product_slack(WEIGHT_INT8), "matmul beside a graph");
        b->ops->graph_destroy(b, graph);
        mem_free(in);
    }
    both_free(b, &x), both_free(b, &y), both_free(b, &up), both_free(b, &out);
    b->ops->weight_destroy(b, weight);
    gear_close(b);
}

static void test_weights_refused(void **state)
{
    struct backend *b = gear_open();
    float data[4] = {1, 2, 3, 4};
    struct weight *w = NULL;
    (void)state;
    struct matrix_view parts[2] = {{data, DTYPE_F32, 2, 2, 2, 1}, {data, DTYPE_F32, 1, 1, 1, 1}};
    assert_int_equal(b->ops->weight_create(b, parts, 1, NULL, WEIGHT_F32, &w), ERR_UNSUPPORTED);
    assert_non_null(strstr(err_detail(), "f32"));
    assert_int_equal(b->ops->weight_create(b, parts, 2, NULL, WEIGHT_BF16, &w), ERR_INVALID);
    assert_null(w);
    gear_close(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_norm),
        cmocka_unit_test(test_activate),
        cmocka_unit_test(test_add_and_scale),
        cmocka_unit_test(test_embed_and_gather),
        cmocka_unit_test(test_matmul),
        cmocka_unit_test(test_matmul_empty),
        cmocka_unit_test(test_codes_ahead),
        cmocka_unit_test(test_codes_and_graphs),
        cmocka_unit_test(test_weights_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
