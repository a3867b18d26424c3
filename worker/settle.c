/* One thread through a list of weights; its verdict is a state that is set once. */
#include "worker/settle.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/mem.h"

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    WEIGHTS_START = 256,
    NICE_MORE = 10,
    QUIET_MS = 1000, /* without a step: then nobody is waiting for the first one */
    GLANCE_US = 5000,
    SLOW_US = 1000, /* a part of a cache that takes longer makes steps wait */
    REST_US_MAX = 50000
};

struct moving {
    struct weight *weight;
    struct packed_parts parts;
    struct hash128 want;
};

struct settle {
    struct backend *backend;
    const struct safetensors *file;
    struct moving *list; /* [n_max] */
    size_t n, n_max;
    struct kv_cache *caches[SETTLE_CACHES_MAX];
    int n_caches;
    pthread_t thread;
    bool started, joined;
    _Atomic bool stopping, allowed;
    _Atomic int verdict; /* enum err; why is written before it */
    char why[512];
};

enum err settle_create(struct backend *b, const struct safetensors *file, struct settle **out)
{
    struct settle *s;
    TRY(MEM_NEW(&s));
    s->backend = b;
    s->file = file;
    *out = s;
    return OK;
}

enum err settle_add(struct settle *s, struct weight *w, const struct packed_parts *parts,
                    struct hash128 want)
{
    ASSERT(!s->started);
    if (s->n == s->n_max) {
        size_t n_max = s->n_max ? 2 * s->n_max : WEIGHTS_START, bytes;
        if (!size_mul(n_max, sizeof *s->list, &bytes)) FAIL(ERR_NO_MEMORY, "%zu weights", n_max);
        TRY(mem_resize((void **)&s->list, bytes));
        s->n_max = n_max;
    }
    s->list[s->n++] = (struct moving){w, *parts, want};
    return OK;
}

void settle_add_cache(struct settle *s, struct kv_cache *kv)
{
    ASSERT(!s->started);
    ASSERT_CMP(s->n_caches, <, SETTLE_CACHES_MAX);
    s->caches[s->n_caches++] = kv;
}

/* Where the weights lie in the file: soon done, for nothing is written. */
static enum err verify_all(struct settle *s)
{
    const struct backend_ops *ops = s->backend->ops;
    int64_t begin = clock_monotonic_us();
    for (size_t i = 0; i < s->n && !atomic_load(&s->stopping); i++) {
        struct moving *m = &s->list[i];
        struct packed_weight p;
        ops->weight_export(m->weight, &p);
        TRY(packed_verify(s->file, &m->parts, m->want, ops->packed_digest(&p)));
    }
    if (s->n)
        log_debug("%zu packed weights verified after %.2f s", s->n,
                  (double)(clock_monotonic_us() - begin) / 1e6);
    return OK;
}

/* What was copied is compared once more: the file may have been written to meanwhile. */
static enum err move_all(struct settle *s)
{
    int64_t begin = clock_monotonic_us();
    for (size_t i = 0; i < s->n && !atomic_load(&s->stopping); i++) {
        struct moving *m = &s->list[i];
        struct hash128 have;
        TRY(s->backend->ops->weight_settle(s->backend, m->weight, &have));
        TRY(packed_verify(s->file, &m->parts, m->want, have));
    }
    if (s->n)
        log_debug("%zu packed weights in memory of their own after %.2f s", s->n,
                  (double)(clock_monotonic_us() - begin) / 1e6);
    return OK;
}

/* A part holds up the steps that use it while it moves, and where the system has to find the memory
 * that takes a while: then they get the longer part of the time. */
static void caches_move(struct settle *s)
{
    const struct backend_ops *ops = s->backend->ops;
    int64_t begin = clock_monotonic_us();
    for (int i = 0; i < s->n_caches; i++)
        for (int part = 0; !atomic_load(&s->stopping); part++) {
            int64_t began = clock_monotonic_us();
            if (!ops->kv_settle(s->backend, s->caches[i], part)) break;
            int64_t us = clock_monotonic_us() - began;
            if (us > SLOW_US) clock_sleep_us(2 * us < REST_US_MAX ? 2 * us : REST_US_MAX);
        }
    log_debug("%d KV caches in huge pages after %.2f s", s->n_caches,
              (double)(clock_monotonic_us() - begin) / 1e6);
}

static void first_step_wait(struct settle *s)
{
    int64_t end = clock_monotonic_us() + QUIET_MS * 1000ll;
    while (!atomic_load(&s->allowed) && clock_monotonic_us() < end)
        clock_sleep_us(GLANCE_US);
}

/* Requests go first: on Linux a nice value is a thread's own. */
static void step_back(void)
{
    id_t thread = (id_t)syscall(SYS_gettid);
    errno = 0;
    int now = getpriority(PRIO_PROCESS, thread);
    if (!errno) (void)setpriority(PRIO_PROCESS, thread, now + NICE_MORE);
}

static void *settle_main(void *arg)
{
    struct settle *s = arg;
    step_back();
    enum err e = verify_all(s);
    if (!e) first_step_wait(s);
    if (!e) e = move_all(s);
    if (!e) caches_move(s);
    if (!e) return NULL;
    snprintf(s->why, sizeof s->why, "%s", err_detail());
    atomic_store(&s->verdict, (int)e);
    return NULL;
}

enum err settle_start(struct settle *s)
{
    int code = pthread_create(&s->thread, NULL, settle_main, s);
    if (code) FAIL(ERR_NO_MEMORY, "a thread for the weights: %s", strerror(code));
    s->started = true;
    return OK;
}

void settle_allow(struct settle *s)
{
    if (s) atomic_store_explicit(&s->allowed, true, memory_order_relaxed);
}

enum err settle_check(struct settle *s)
{
    enum err e = s ? (enum err)atomic_load(&s->verdict) : OK;
    return e ? err_set(e, "%s", s->why) : OK;
}

enum err settle_wait(struct settle *s)
{
    settle_allow(s);
    if (s && s->started && !s->joined) pthread_join(s->thread, NULL), s->joined = true;
    return settle_check(s);
}

void settle_stop(struct settle *s)
{
    if (!s) return;
    atomic_store(&s->stopping, true);
    (void)settle_wait(s);
}

void settle_destroy(struct settle *s)
{
    if (!s) return;
    settle_stop(s);
    mem_free(s->list);
    mem_free(s);
}
