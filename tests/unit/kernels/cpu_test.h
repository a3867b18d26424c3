/* What the tests of the CPU backend share: opening it at every ISA this machine has, random
 * tensors, batches over paged sequences, and closeness with a message that says where. */
#pragma once
#include "base/mem.h"
#include "base/rand.h"
#include "kernels/backend.h"
#include "kernels/half.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static const char *const test_isas[] = {"reference", "avx2", "avx512", "vnni", "bf16", "amx"};
enum { TEST_ISAS = 6 };

#define CHECK(expression)                                                                          \
    do {                                                                                           \
        if ((expression) != OK) fail_msg("%s: %s", #expression, err_detail());                     \
    } while (0)

/* NULL when this CPU lacks the instruction set. */
static inline struct backend *test_open_with(const char *isa, int n_threads, int vocab)
{
    struct backend_options o = {.n_threads = n_threads,
                                .numa_node = -1,
                                .n_slots_max = 8,
                                .n_tokens_max = 2048,
                                .n_rows_max = 16,
                                .vocab_size = vocab,
                                .isa = isa};
    struct backend *b = NULL;
    enum err e = backend_cpu.open(&o, &b);
    if (e && e != ERR_DEVICE) fail_msg("open %s: %s", isa ? isa : "best", err_detail());
    return e ? NULL : b;
}

static inline struct backend *test_open(const char *isa)
{
    return test_open_with(isa, 1, 512);
}

static inline float test_normal(struct rand *r)
{
    double sum = 0;
    for (int i = 0; i < 6; i++)
        sum += rand_unit(r) - 0.5;
    return (float)(sum * 1.4142135);
}

static inline float *test_floats(struct rand *r, int64_t n, float scale)
{
    float *x;
    CHECK(mem_alloc_aligned(64, (size_t)(n + 16) * sizeof *x, (void **)&x));
    for (int64_t i = 0; i < n; i++)
        x[i] = r ? scale * test_normal(r) : 0;
    return x;
}

static inline struct tensor test_tensor(float *data, int64_t rows, int64_t cols)
{
    return (struct tensor){data, DTYPE_F32, rows, cols, cols};
}

static inline struct matrix_view test_view(const float *data, int64_t rows, int64_t cols)
{
    return (struct matrix_view){data, DTYPE_F32, rows, cols, cols, 1};
}

static inline void test_close(const char *what, const float *got, const double *want, int64_t n,
                              double tolerance)
{
    for (int64_t i = 0; i < n; i++)
        if (!(fabs(got[i] - want[i]) <= tolerance * (1 + fabs(want[i]))))
            fail_msg("%s: element %lld is %.9g, should be %.9g within %g", what, (long long)i,
                     got[i], want[i], tolerance);
}

static inline void test_same_bits(const char *what, const float *a, const float *b, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        if (float_bits(a[i]) != float_bits(b[i]))
            fail_msg("%s: element %lld differs: %.9g and %.9g", what, (long long)i, a[i], b[i]);
}
