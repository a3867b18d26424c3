/* One thread through a list of weights, then behind the steps' use of caches; its verdict is a state
 * that is set once. */
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
    pthread_mutex_t lock;
    pthread_cond_t changed;
    bool started, joined;
    bool rests; /* under lock: has nothing to do, or has ended */
    _Atomic bool stopping, allowed;
    _Atomic uint32_t n_blocks; /* of every cache that have been used; written under lock */
    _Atomic int verdict; /* enum err; why is written before it */
    char why[512];
};

enum err settle_create(struct backend *b, const struct safetensors *file, struct settle **out)
{
    struct settle *s;
    TRY(MEM_NEW(&s));
    s->backend = b;
    s->file = file;
    pthread_mutex_init(&s->lock, NULL);
    pthread_cond_init(&s->changed, NULL);
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

/* A part that moves holds up the steps that use it, and where the system has to find the memory that
 * takes a while: then they get the longer part of the time. Later parts are new, and have to be there
 * in time. */
static void caches_move(struct settle *s, uint32_t n_blocks, bool rests)
{
    const struct backend_ops *ops = s->backend->ops;
    int64_t begin = clock_monotonic_us();
    int n_parts = 0;
    for (int i = 0; i < s->n_caches; i++)
        for (; !atomic_load(&s->stopping); n_parts++) {
            int64_t began = clock_monotonic_us();
            if (!ops->kv_settle(s->backend, s->caches[i], (int)n_blocks)) break;
            int64_t us = clock_monotonic_us() - began;
            if (rests && us > SLOW_US) clock_sleep_us(2 * us < REST_US_MAX ? 2 * us : REST_US_MAX);
        }
    if (n_parts)
        log_debug("%d parts of KV caches in huge pages after %.2f s, %u blocks in use", n_parts,
                  (double)(clock_monotonic_us() - begin) / 1e6, n_blocks);
}

static void rest(struct settle *s) /* under lock */
{
    s->rests = true;
    pthread_cond_broadcast(&s->changed);
}

/* Until more than n_blocks are in use; false: until it shall stop. */
static bool use_wait(struct settle *s, uint32_t n_blocks)
{
    pthread_mutex_lock(&s->lock);
    rest(s);
    while (!atomic_load(&s->stopping) && atomic_load(&s->n_blocks) <= n_blocks)
        pthread_cond_wait(&s->changed, &s->lock);
    s->rests = false;
    pthread_mutex_unlock(&s->lock);
    return !atomic_load(&s->stopping);
}

static void caches_follow(struct settle *s)
{
    uint32_t n_blocks = atomic_load(&s->n_blocks);
    caches_move(s, n_blocks, true);
    while (s->n_caches && use_wait(s, n_blocks)) {
        n_blocks = atomic_load(&s->n_blocks);
        caches_move(s, n_blocks, false);
    }
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
    if (!e) caches_follow(s);
    if (e) {
        snprintf(s->why, sizeof s->why, "%s", err_detail());
        atomic_store(&s->verdict, (int)e);
    }
    pthread_mutex_lock(&s->lock);
    rest(s);
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

enum err settle_start(struct settle *s)
{
    int code = pthread_create(&s->thread, NULL, settle_main, s);
    if (code) FAIL(ERR_NO_MEMORY, "a thread for the weights: %s", strerror(code));
    s->started = true;
    return OK;
}

/* A lock that is taken means that the thread is awake, and the next step says it again. */
void settle_step(struct settle *s, uint32_t n_blocks)
{
    if (!s) return;
    atomic_store_explicit(&s->allowed, true, memory_order_relaxed);
    if (n_blocks <= atomic_load(&s->n_blocks) || pthread_mutex_trylock(&s->lock)) return;
    atomic_store(&s->n_blocks, n_blocks);
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
}

enum err settle_check(struct settle *s)
{
    enum err e = s ? (enum err)atomic_load(&s->verdict) : OK;
    return e ? err_set(e, "%s", s->why) : OK;
}

enum err settle_wait(struct settle *s)
{
    if (!s || !s->started) return settle_check(s);
    atomic_store(&s->allowed, true);
    pthread_mutex_lock(&s->lock);
    while (!s->rests)
        pthread_cond_wait(&s->changed, &s->lock);
    pthread_mutex_unlock(&s->lock);
    return settle_check(s);
}

void settle_stop(struct settle *s)
{
    if (!s || !s->started || s->joined) return;
    pthread_mutex_lock(&s->lock);
    atomic_store(&s->stopping, true);
    atomic_store(&s->allowed, true);
    pthread_cond_broadcast(&s->changed);
    pthread_mutex_unlock(&s->lock);
    pthread_join(s->thread, NULL);
    s->joined = true;
}

void settle_destroy(struct settle *s)
{
    if (!s) return;
    settle_stop(s);
    pthread_cond_destroy(&s->changed);
    pthread_mutex_destroy(&s->lock);
    mem_free(s->list);
    mem_free(s);
}
