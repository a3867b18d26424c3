/* What the tests of the CUDA backend share: the backend, tensors in its memory, random numbers.
 *
 * The backend comes from HEDDLE_PLUGIN_DIR: the emulated plugin in every test run, the real one on
 * a machine with a GPU. References are written in double beside each test. */
#pragma once
#include "kernels/backend.h"

#include "base/mem.h"
#include "base/rand.h"
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static struct rand gear_rand = {.key = 1};

static inline float rand_float(float scale)
{
    return (float)(rand_unit(&gear_rand) * 2 - 1) * scale;
}
static inline int rand_int(int low, int high)
{
    return low + (int)rand_below(&gear_rand, (uint64_t)(high - low + 1));
}

static inline uint16_t bf16_of(float v)
{
    uint32_t u;
    memcpy(&u, &v, 4);
    return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
static inline float of_bf16(uint16_t v)
{
    uint32_t u = (uint32_t)v << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static inline float rounded(float v)
{
    return of_bf16(bf16_of(v));
}

/* Fewer cases: where every access is watched, or many mistakes are tried one after another. */
static inline bool gear_quick(void)
{
    return getenv("HEDDLE_CUDA_QUICK") != NULL;
}

static inline void must(enum err e)
{
    if (e) fail_msg("%s: %s", err_name(e), err_detail());
}

static inline void *take(size_t bytes)
{
    void *mem = NULL;
    must(mem_alloc(bytes ? bytes : 1, &mem));
    return mem;
}

static inline struct backend *gear_open_with(const struct backend_options *options)
{
    struct backend *b = NULL;
    must(backend_open("cuda", options, &b));
    return b;
}
static inline struct backend_options gear_options(void)
{
    return (struct backend_options){.n_slots_max = 8,
                                    .n_tokens_max = 160,
                                    .n_rows_max = 16,
                                    .vocab_size = 6000,
                                    .numa_node = -1};
}
static inline struct backend *gear_open(void)
{
    struct backend_options o = gear_options();
    return gear_open_with(&o);
}
static inline void gear_close(struct backend *b)
{
    must(b->ops->sync(b));
    b->ops->close(b);
}

/* A matrix on both sides: host floats, already rounded to the device's type. */
struct both {
    float *host; /* [rows][cols] */
    struct tensor t;
};

static inline struct both both_new(struct backend *b, int64_t rows, int64_t cols, int64_t stride,
                                   enum dtype dtype)
{
    struct both m = {take((size_t)(rows * cols) * 4), {NULL, dtype, rows, cols, stride}};
    must(b->ops->alloc(b, (size_t)(rows * stride) * dtype_bytes(dtype), &m.t.data));
    return m;
}
static inline void both_send(struct backend *b, struct both *m)
{
    size_t n = (size_t)(m->t.rows * m->t.stride), item = dtype_bytes(m->t.dtype);
    uint8_t *raw = take(n * item);
    memset(raw, 0xff, n * item); /* NaN between the rows: nobody may read it */
    for (int64_t r = 0; r < m->t.rows; r++)
        for (int64_t c = 0; c < m->t.cols; c++) {
            float *v = &m->host[r * m->t.cols + c];
            uint16_t half = bf16_of(*v);
            memcpy(raw + (size_t)(r * m->t.stride + c) * item,
                   item == 2 ? (void *)&half : (void *)v, item);
            if (item == 2) *v = of_bf16(half);
        }
    must(b->ops->upload(b, m->t.data, raw, n * item));
    mem_free(raw);
}
static inline struct both both_rand(struct backend *b, int64_t rows, int64_t cols, int64_t stride,
                                    enum dtype dtype, float scale)
{
    struct both m = both_new(b, rows, cols, stride, dtype);
    for (int64_t i = 0; i < rows * cols; i++)
        m.host[i] = rand_float(scale);
    both_send(b, &m);
    return m;
}
/* What the device has, as floats [rows][cols]; freed by the caller. */
static inline float *both_get(struct backend *b, const struct both *m)
{
    size_t n = (size_t)(m->t.rows * m->t.stride), item = dtype_bytes(m->t.dtype);
    uint8_t *raw = take(n * item);
    float *out = take((size_t)(m->t.rows * m->t.cols) * 4);
    must(b->ops->download(b, raw, m->t.data, n * item));
    for (int64_t r = 0; r < m->t.rows; r++)
        for (int64_t c = 0; c < m->t.cols; c++) {
            const uint8_t *at = raw + (size_t)(r * m->t.stride + c) * item;
            uint16_t half;
            memcpy(&half, at, 2);
            if (item == 2)
                out[r * m->t.cols + c] = of_bf16(half);
            else
                memcpy(&out[r * m->t.cols + c], at, 4);
        }
    mem_free(raw);
    return out;
}
static inline void both_free(struct backend *b, struct both *m)
{
    b->ops->release(b, m->t.data);
    mem_free(m->host);
}

/* Every element of the device's m within `relative` of want plus `absolute`. */
static inline void expect_near(struct backend *b, const struct both *m, const double *want,
                               double relative, double absolute, const char *what)
{
    float *got = both_get(b, m);
    for (int64_t i = 0; i < m->t.rows * m->t.cols; i++) {
        double e = fabs((double)got[i] - want[i]);
        if (!(e <= relative * fabs(want[i]) + absolute))
            fail_msg("%s: row %lld column %lld is %g, expected %g (error %g)", what,
                     (long long)(i / m->t.cols), (long long)(i % m->t.cols), (double)got[i],
                     want[i], e);
    }
    mem_free(got);
}
