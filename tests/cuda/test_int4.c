/* Goal: codes of a checkpoint multiply as (code - zero) * scale on the device, for every group
 * size, with zero points and an order of inputs: exactly with few rows, rounded once to BF16 where
 * tensor cores or the library multiply, also inside experts. Method: products with rows of the
 * identity read the weights off; experts of codes are met by experts of the same weights in BF16.
 */
#include "tests/cuda/gear.h"

enum { OUT = 37, SLOTS_MAX = 512 };

struct made {
    struct int4_matrix m;
    uint8_t codes[OUT * 4 * SLOTS_MAX / 2], zeros[OUT * 4 * SLOTS_MAX / 32];
    uint16_t scales[OUT * 4 * SLOTS_MAX / 32];
    int32_t order[SLOTS_MAX];
    float weights[OUT * 4 * SLOTS_MAX]; /* [n_out][n_in] */
};

static void order_make(struct made *t)
{
    int n = (int)t->m.n_slots;
    for (int s = 0; s < n; s++)
        t->order[s] = s < t->m.n_in ? s : -1;
    for (int s = n - 1; s > 0; s--) {
        int other = rand_int(0, s), keep = t->order[s];
        t->order[s] = t->order[other], t->order[other] = keep;
    }
    t->m.order = t->order;
}

static void make(struct made *t, int n_out, int n_in, int group, bool zeros, bool order)
{
    int64_t n_slots = ((n_in + group - 1) / group + order) * group, n_groups = n_slots / group;
    t->m = (struct int4_matrix){.n_out = n_out, .n_in = n_in, .n_slots = n_slots, .group = group};
    t->m.codes = t->codes, t->m.scales = t->scales, t->m.zeros = zeros ? t->zeros : NULL;
    assert_true(n_slots <= SLOTS_MAX && n_out <= OUT * 4);
    for (int64_t i = 0; i < n_out * n_slots / 2; i++)
        t->codes[i] = (uint8_t)rand_int(0, 255);
    for (int64_t i = 0; i < n_out * n_groups; i++) {
        _Float16 scale = (_Float16)rand_float(0.1f);
        t->zeros[i] = (uint8_t)rand_int(0, 15);
        memcpy(&t->scales[i], &scale, 2);
    }
    if (order) order_make(t);
    for (int64_t row = 0; row < n_out; row++)
        for (int64_t s = 0; s < n_slots; s++) {
            int64_t in = order ? t->order[s] : s < n_in ? s : -1, at = row * n_groups + s / group;
            int byte = t->codes[(row * n_slots + s) / 2], code = s % 2 ? byte >> 4 : byte & 15;
            _Float16 scale;
            memcpy(&scale, &t->scales[at], 2);
            if (in >= 0)
                t->weights[row * n_in + in] =
                    (float)(code - (zeros ? t->zeros[at] : 8)) * (float)scale;
        }
}

/* Rows of the identity, `rows` at a time: each output is one weight. */
static void read_off(struct backend *b, const struct weight *w, const struct made *t, int rows,
                     const float *bias, bool exact)
{
    int n_in = (int)t->m.n_in, n_out = (int)t->m.n_out;
    struct both x = both_new(b, rows, n_in, (n_in + 7) / 8 * 8, DTYPE_BF16);
    struct both y = both_new(b, rows, n_out, (n_out + 7) / 8 * 8, DTYPE_F32);
    for (int first = 0; first < n_in; first += rows) {
        memset(x.host, 0, (size_t)(rows * n_in) * 4);
        for (int r = 0; r < rows && first + r < n_in; r++)
            x.host[r * n_in + first + r] = 1;
        both_send(b, &x);
        b->ops->matmul(b, y.t, x.t, w);
        float *out = both_get(b, &y);
        for (int r = 0; r < rows && first + r < n_in; r++)
            for (int c = 0; c < n_out; c++) {
                float want = t->weights[c * n_in + first + r];
                if (!exact) want = rounded(want);
                if (bias) want += bias[c];
                if (out[r * n_out + c] != want)
                    fail_msg("%d rows, groups of %d: weight %d, %d is %.9g, should be %.9g", rows,
                             t->m.group, c, first + r, (double)out[r * n_out + c], (double)want);
            }
        mem_free(out);
    }
    both_free(b, &x), both_free(b, &y);
}

static void test_products(void **state)
{
    static const struct {
        int n_in, group;
        bool zeros, order;
    } cases[] = {{256, 128, false, false}, {256, 128, true, false}, {130, 64, true, false},
                 {224, 32, true, false},   {200, 32, false, true},  {301, 64, true, true},
                 {384, 128, true, true},   {96, 32, false, false}};
    struct made *t = take(sizeof *t);
    (void)state;
    for (int fixed = 0; fixed < 2; fixed++) {
        struct backend_options o = gear_options();
        o.deterministic = fixed;
        struct backend *b = gear_open_with(&o);
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            struct weight *plain, *biased;
            float bias[OUT];
            if (gear_quick() && (i % 3 || fixed)) continue;
            make(t, OUT, cases[i].n_in, cases[i].group, cases[i].zeros, cases[i].order);
            for (int c = 0; c < OUT; c++)
                bias[c] = rand_float(1);
            must(b->ops->weight_create_int4(b, &t->m, NULL, &plain));
            must(b->ops->weight_create_int4(b, &t->m, bias, &biased));
            assert_true(b->ops->weight_bytes(plain) >= (size_t)(OUT * t->m.n_slots / 2));
            read_off(b, plain, t, 1, NULL, !fixed);
            read_off(b, biased, t, 4, bias, !fixed);
            read_off(b, plain, t, 40, NULL, false);
            read_off(b, plain, t, 130, NULL, false); /* expanded where the library multiplies */
            b->ops->weight_destroy(b, plain);
            b->ops->weight_destroy(b, biased);
        }
        gear_close(b);
    }
    mem_free(t);
}

/* Experts of codes and experts of the same weights in BF16 give the same bits. */
static void test_experts(void **state)
{
    enum { HIDDEN = 96, FFN = 64, EXPERTS = 3, TOP = 2, ROWS = 9 };
    struct backend *b = gear_open();
    struct weight *up[2][EXPERTS], *down[2][EXPERTS];
    struct made *t = take(sizeof *t);
    float *out[2];
    (void)state;
    for (int e = 0; e < EXPERTS; e++) {
        struct matrix_view v = {t->weights, DTYPE_F32, 2 * FFN, HIDDEN, HIDDEN, 1};
        make(t, 2 * FFN, HIDDEN, 32, true, false);
        must(b->ops->weight_create_int4(b, &t->m, NULL, &up[0][e]));
        must(b->ops->weight_create(b, &v, 1, NULL, WEIGHT_BF16, &up[1][e]));
        make(t, HIDDEN, FFN, 64, true, false);
        v.rows = HIDDEN, v.cols = v.row_stride = FFN;
        must(b->ops->weight_create_int4(b, &t->m, NULL, &down[0][e]));
        must(b->ops->weight_create(b, &v, 1, NULL, WEIGHT_BF16, &down[1][e]));
    }
    struct both x = both_rand(b, ROWS, HIDDEN, HIDDEN, DTYPE_BF16, 1);
    struct both scores = both_rand(b, ROWS, EXPERTS, EXPERTS, DTYPE_F32, 1);
    struct both y = both_new(b, ROWS, HIDDEN, HIDDEN, DTYPE_BF16);
    for (int k = 0; k < 2; k++) {
        struct moe_args args = {EXPERTS, TOP, true, ACTIVATION_SILU, up[k], down[k]};
        struct moe *m;
        must(b->ops->moe_create(b, &args, &m));
        b->ops->moe_forward(b, y.t, x.t, scores.t, m);
        out[k] = both_get(b, &y);
        b->ops->moe_destroy(b, m);
    }
    assert_memory_equal(out[0], out[1], ROWS * HIDDEN * sizeof(float));
    make(t, 2 * FFN, HIDDEN, 32, true, true); /* an order is more than experts can do here */
    b->ops->weight_destroy(b, up[0][1]);
    must(b->ops->weight_create_int4(b, &t->m, NULL, &up[0][1]));
    struct moe *none;
    struct moe_args args = {EXPERTS, TOP, true, ACTIVATION_SILU, up[0], down[0]};
    assert_int_equal(b->ops->moe_create(b, &args, &none), ERR_UNSUPPORTED);
    for (int e = 0; e < EXPERTS; e++)
        for (int k = 0; k < 2; k++)
            b->ops->weight_destroy(b, up[k][e]), b->ops->weight_destroy(b, down[k][e]);
    mem_free(out[0]), mem_free(out[1]), mem_free(t);
    both_free(b, &x), both_free(b, &scores), both_free(b, &y);
    gear_close(b);
}

static void test_refused(void **state)
{
    struct backend *b = gear_open();
    struct made *t = take(sizeof *t);
    struct weight *w;
    (void)state;
    make(t, OUT, 96, 32, true, true);
    t->order[5] = 96;
    assert_int_equal(b->ops->weight_create_int4(b, &t->m, NULL, &w), ERR_FORMAT);
    t->order[5] = 0, t->m.group = 48;
    assert_int_equal(b->ops->weight_create_int4(b, &t->m, NULL, &w), ERR_UNSUPPORTED);
    t->m.group = 128;
    t->m.n_slots = 96;
    assert_int_equal(b->ops->weight_create_int4(b, &t->m, NULL, &w), ERR_FORMAT);
    mem_free(t);
    gear_close(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_products),
                                       cmocka_unit_test(test_experts),
                                       cmocka_unit_test(test_refused)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
