/* Goal: codes of a checkpoint multiply as (code - zero) * scale, bit for bit, on every instruction
 * set, for every group size, with and without zero points and an order of inputs; and rows do not
 * see each other. Method: matrices of random codes; the weight that a kernel uses is read off by
 * products with one input of 127, which an 8-bit activation holds exactly (127 (code - zero) scale
 * has 23 bits at most); products of random rows are met in double precision. */
#include "unit/kernels/cpu_test.h"

enum { ROWS = 13, SHAPES = 4, KINDS = 4 };

/* What a loader would hand over, and the weights it stands for. */
struct made {
    struct int4_matrix m;
    uint8_t *codes, *zeros;
    uint16_t *scales;
    int32_t *order;
    float *weights; /* [n_out][n_in] */
};

static const struct shape {
    int64_t n, k;
} shapes[SHAPES] = {{1, 32}, {33, 130}, {34, 384}, {35, 301}};

/* A random order of the inputs with holes: each group of slots loses some to nothing. */
static void order_make(struct made *t, struct rand *r)
{
    int32_t next = 0;
    for (int64_t s = 0; s < t->m.n_slots; s++) {
        int64_t left = t->m.n_slots - s;
        bool hole = left > t->m.n_in - next && (next >= t->m.n_in || rand_next(r) % 8 == 0);
        t->order[s] = hole ? -1 : next++;
    }
    for (int64_t s = t->m.n_slots - 1; s > 0; s--) {
        int64_t other = (int64_t)(rand_next(r) % (uint64_t)(s + 1));
        int32_t swap = t->order[s];
        t->order[s] = t->order[other], t->order[other] = swap;
    }
    t->m.order = t->order;
}

static float slot_weight(const struct made *t, int64_t row, int64_t s)
{
    int64_t group = row * (t->m.n_slots / t->m.group) + s / t->m.group;
    uint8_t byte = t->codes[row * (t->m.n_slots / 2) + s / 2];
    int code = s % 2 ? byte >> 4 : byte & 15, zero = t->m.zeros ? t->zeros[group] : 8;
    return (float)(code - zero) * f16_to_float(t->scales[group]);
}

static struct made make(struct shape s, int group, bool zeros, bool order, uint64_t seed)
{
    struct rand r = rand_seeded(seed);
    struct made t = {.m = {.n_out = s.n, .n_in = s.k, .group = group}};
    t.m.n_slots = ((s.k + group - 1) / group + order) * group;
    int64_t n_groups = s.n * (t.m.n_slots / group);
    CHECK(MEM_NEW_ARRAY(s.n * t.m.n_slots / 2, &t.codes));
    CHECK(MEM_NEW_ARRAY(n_groups, &t.zeros));
    CHECK(MEM_NEW_ARRAY(n_groups, &t.scales));
    CHECK(MEM_NEW_ARRAY(t.m.n_slots, &t.order));
    CHECK(MEM_NEW_ARRAY(s.n * s.k, &t.weights));
    for (int64_t i = 0; i < s.n * t.m.n_slots / 2; i++)
        t.codes[i] = (uint8_t)rand_next(&r);
    for (int64_t i = 0; i < n_groups; i++) {
        t.zeros[i] = (uint8_t)(rand_next(&r) % 16);
        t.scales[i] =
            f16_from_float(0.01f * test_normal(&r)); /* negative ones, subnormal ones too */
    }
    t.m.codes = t.codes, t.m.scales = t.scales, t.m.zeros = zeros ? t.zeros : NULL;
    if (order) order_make(&t, &r);
    for (int64_t row = 0; row < s.n; row++)
        for (int64_t slot = 0; slot < t.m.n_slots; slot++) {
            int64_t in = order ? t.order[slot] : slot < s.k ? slot : -1;
            if (in >= 0) t.weights[row * s.k + in] = slot_weight(&t, row, slot);
        }
    return t;
}

static void drop(struct made *t)
{
    mem_free(t->codes), mem_free(t->zeros), mem_free(t->scales), mem_free(t->order);
    mem_free(t->weights);
}

static void check_weights(struct backend *b, const struct weight *w, const struct made *t)
{
    int64_t n = t->m.n_out, k = t->m.n_in;
    float *x = test_floats(NULL, k, 0), *y = test_floats(NULL, n, 0);
    for (int64_t i = 0; i < k; i++) {
        x[i] = 127;
        b->ops->matmul(b, test_tensor(y, 1, n), test_tensor(x, 1, k), w);
        for (int64_t j = 0; j < n; j++)
            if (y[j] != 127 * t->weights[j * k + i])
                fail_msg("group %d: weight %lld, %lld is %.9g, should be %.9g", t->m.group,
                         (long long)j, (long long)i, y[j] / 127, t->weights[j * k + i]);
        x[i] = 0;
    }
    mem_free(x), mem_free(y);
}

static void check_rows(struct backend *b, const struct weight *w, const struct made *t,
                       const float *bias, uint64_t seed)
{
    int64_t n = t->m.n_out, k = t->m.n_in;
    struct rand r = rand_seeded(seed);
    float *x = test_floats(&r, ROWS * k, 1), *y = test_floats(NULL, ROWS * n, 0);
    float *one = test_floats(NULL, n, 0);
    b->ops->matmul(b, test_tensor(y, ROWS, n), test_tensor(x, ROWS, k), w);
    for (int64_t row = 0; row < ROWS; row++) {
        float max = 0;
        for (int64_t i = 0; i < k; i++)
            max = fmaxf(max, fabsf(x[row * k + i]));
        float scale = max / 127.0f, inverse = 1.0f / scale;
        for (int64_t j = 0; j < n; j++) {
            double sum = bias[j], size = fabs(sum);
            for (int64_t i = 0; i < k; i++) {
                double term =
                    (double)scale * nearbyintf(x[row * k + i] * inverse) * t->weights[j * k + i];
                sum += term, size += fabs(term);
            }
            if (!(fabs(y[row * n + j] - sum) <= 2e-6 * (size + 1e-3)))
                fail_msg("group %d: row %lld column %lld: %.9g, should be %.9g", t->m.group,
                         (long long)row, (long long)j, y[row * n + j], sum);
        }
        b->ops->matmul(b, test_tensor(one, 1, n), test_tensor(x + row * k, 1, k), w);
        test_same_bits("a row alone", one, y + row * n, n);
    }
    mem_free(x), mem_free(y), mem_free(one);
}

static void codes_are_kept(void **state)
{
    static const int groups[] = {32, 64, 128};
    (void)state;
    for (int isa = 0; isa < TEST_ISAS; isa++) {
        struct backend *b = test_open(test_isas[isa]);
        for (int c = 0; b && c < 3 * SHAPES * KINDS; c++) {
            int kind = c % KINDS, group = groups[c / KINDS % 3];
            struct shape s = shapes[c / KINDS / 3];
            struct made t = make(s, group, kind & 1, kind & 2, (uint64_t)c);
            struct rand r = rand_seeded(9);
            float *bias = test_floats(&r, s.n, 1);
            struct weight *plain, *biased;
            CHECK(b->ops->weight_create_int4(b, &t.m, NULL, &plain));
            CHECK(b->ops->weight_create_int4(b, &t.m, bias, &biased));
            check_weights(b, plain, &t);
            check_rows(b, biased, &t, bias, (uint64_t)c);
            b->ops->weight_destroy(b, plain);
            b->ops->weight_destroy(b, biased);
            mem_free(bias);
            drop(&t);
        }
        if (b) b->ops->close(b);
    }
}

/* Sums are exact: every instruction set has the bits of the reference. */
static void isas_agree(void **state)
{
    enum { M = 17, N = 75, K = 650 };
    float *first = NULL;
    (void)state;
    for (int isa = 0; isa < TEST_ISAS; isa++) {
        struct backend *b = test_open(test_isas[isa]);
        if (!b) continue;
        struct made t = make((struct shape){N, K}, 64, true, false, 5);
        struct rand r = rand_seeded(6);
        float *x = test_floats(&r, M * K, 1), *y = test_floats(NULL, M * N, 0);
        struct weight *w;
        CHECK(b->ops->weight_create_int4(b, &t.m, NULL, &w));
        b->ops->matmul(b, test_tensor(y, M, N), test_tensor(x, M, K), w);
        if (first) test_same_bits(test_isas[isa], y, first, M * N);
        b->ops->weight_destroy(b, w);
        b->ops->close(b);
        mem_free(x);
        drop(&t);
        if (first)
            mem_free(y);
        else
            first = y;
    }
    mem_free(first);
}

/* Products of many rows by long weights go through blocks of K and several row panels. */
static void long_sums(void **state)
{
    enum { M = 160, N = 40, K = 4224 };
    static const int heights[] = {1, 5, 7, 25, 145};
    (void)state;
    for (int c = 0; c < TEST_ISAS * 3; c++) {
        struct backend *b = test_open(test_isas[c / 3]);
        if (!b) continue;
        struct made t = make((struct shape){N, K}, 32 << c % 3, true, c % 3 == 1, 7);
        struct rand r = rand_seeded(8);
        float *x = test_floats(&r, M * K, 1), *all = test_floats(NULL, M * N, 0);
        float *some = test_floats(NULL, M * N, 0);
        struct weight *w;
        CHECK(b->ops->weight_create_int4(b, &t.m, NULL, &w));
        b->ops->matmul(b, test_tensor(all, M, N), test_tensor(x, M, K), w);
        for (size_t h = 0; h < sizeof heights / sizeof *heights; h++) {
            b->ops->matmul(b, test_tensor(some, heights[h], N),
                           test_tensor(x + 15 * K, heights[h], K), w);
            test_same_bits(test_isas[c / 3], some, all + 15 * N, (int64_t)heights[h] * N);
        }
        assert_true(b->ops->weight_bytes(w) >= (size_t)(N * K / 2));
        b->ops->weight_destroy(b, w);
        b->ops->close(b);
        mem_free(x), mem_free(all), mem_free(some);
        drop(&t);
    }
}

static void refusals(void **state)
{
    struct backend *b = test_open("reference");
    struct made t = make((struct shape){33, 130}, 32, true, true, 1);
    struct weight *w;
    struct int4_matrix bad = t.m;
    (void)state;
    bad.group = 48;
    assert_int_equal(b->ops->weight_create_int4(b, &bad, NULL, &w), ERR_UNSUPPORTED);
    bad = t.m, bad.n_slots -= 8;
    assert_int_equal(b->ops->weight_create_int4(b, &bad, NULL, &w), ERR_FORMAT);
    t.order[3] = 130;
    assert_int_equal(b->ops->weight_create_int4(b, &t.m, NULL, &w), ERR_FORMAT);
    t.order[3] = -2;
    assert_int_equal(b->ops->weight_create_int4(b, &t.m, NULL, &w), ERR_FORMAT);
    drop(&t);
    b->ops->close(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(codes_are_kept),
        cmocka_unit_test(isas_agree),
        cmocka_unit_test(long_sums),
        cmocka_unit_test(refusals),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
