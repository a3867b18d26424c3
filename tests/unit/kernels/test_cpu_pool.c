/* Goal: every chunk of every job takes effect exactly once, with any number of threads, also when a
 * thread is held up in the middle of a chunk; jobs of one chunk and of none work; scratch is
 * private; a thread prepares once a job, before its chunks, and not when the job is over. Method:
 * chunks add into counters; a stalled thread is one that sleeps in its first chunk, which another
 * thread must then compute again. */
#include "base/clock.h"
#include "kernels/cpu/pool.h"
#include "unit/kernels/cpu_test.h"

#include <pthread.h>
#include <stdatomic.h>

enum { CHUNKS = 997 };

struct sums {
    _Atomic int *times;
    _Atomic int *computed;
    int value;
};

static void count(const void *args, int chunk, void *scratch)
{
    const struct sums *s = args;
    *(int *)scratch = chunk;
    atomic_fetch_add(&s->times[chunk], s->value);
    assert_int_equal(*(int *)scratch, chunk);
}

static void prepare(const void *args, int chunk, void *scratch)
{
    const struct sums *s = args;
    if (s->computed) atomic_fetch_add(s->computed, 1);
    *(int *)scratch = chunk * 3;
}

static void publish(const void *args, int chunk, void *scratch)
{
    const struct sums *s = args;
    atomic_fetch_add(&s->times[chunk], *(int *)scratch + s->value);
}

static void every_chunk_once(void **state)
{
    static const int threads[] = {1, 2, 3, 7};
    static _Atomic int times[CHUNKS];
    (void)state;
    for (int t = 0; t < 4; t++) {
        struct pool *p;
        CHECK(pool_create(threads[t], 64, &p));
        assert_int_equal(pool_n_threads(p), threads[t]);
        for (int n = 0; n < CHUNKS; n = n * 3 + 1)
            for (int round = 0; round < 20; round++) {
                struct sums s = {times, NULL, round + 1};
                memset((void *)times, 0, sizeof times);
                struct pool_job job = {.compute = round % 2 ? prepare : count,
                                       .commit = round % 2 ? publish : NULL,
                                       .args = &s,
                                       .args_bytes = sizeof s,
                                       .n_chunks = n};
                pool_run(p, &job);
                for (int i = 0; i < CHUNKS; i++)
                    assert_int_equal(times[i], i < n ? (round % 2 ? i * 3 : 0) + round + 1 : 0);
            }
        pool_quiesce(p);
        pool_destroy(p);
    }
}

static _Atomic int stalls_left;
static pthread_t caller;

/* The caller is slow enough for the other thread to wake; that one is held up in its first chunk.
 */
static void stall_once(const void *args, int chunk, void *scratch)
{
    prepare(args, chunk, scratch);
    if (pthread_equal(pthread_self(), caller)) {
        if (atomic_load(&stalls_left) > 0) clock_sleep_us(3000);
    } else if (atomic_fetch_sub(&stalls_left, 1) > 0) {
        clock_sleep_us(300000);
    }
}

/* One of two threads sleeps for 300 ms in a chunk that takes microseconds: the job must not. */
static void stalled_chunks_are_rescued(void **state)
{
    static _Atomic int times[8], computed;
    struct pool *p;
    int fast = 0;
    (void)state;
    caller = pthread_self();
    CHECK(pool_create(2, 64, &p));
    for (int round = 0; round < 5; round++) {
        struct sums s = {times, &computed, 1};
        memset((void *)times, 0, sizeof times);
        atomic_store(&computed, 0);
        atomic_store(&stalls_left, 1);
        int64_t start = clock_monotonic_us();
        struct pool_job job = {.compute = stall_once,
                               .commit = publish,
                               .args = &s,
                               .args_bytes = sizeof s,
                               .n_chunks = 8};
        pool_run(p, &job);
        fast += clock_monotonic_us() - start < 200000;
        for (int i = 0; i < 8; i++)
            assert_int_equal(times[i], i * 3 + 1);
        /* jobs go on while the sleeper sleeps, and its late result is dropped */
        for (int i = 0; i < 30; i++) {
            memset((void *)times, 0, sizeof times);
            job.n_chunks = 8 - i % 7;
            pool_run(p, &job);
            for (int c = 0; c < 8; c++)
                assert_int_equal(times[c], c < job.n_chunks ? c * 3 + 1 : 0);
        }
        pool_quiesce(p);
        for (int c = 0; c < 8; c++)
            assert_int_equal(times[c], c < job.n_chunks ? c * 3 + 1 : 0);
    }
    pool_destroy(p);
#ifndef __SANITIZE_THREAD__
    if (!fast) fail_msg("no stalled job was rescued");
#endif
}

struct prepared {
    _Atomic int *open, *late; /* open: while what prepare reads is there */
    _Atomic int *preparations, *wrong;
    int stamp;
};

/* Slow, but for the caller: it can take all chunks meanwhile. */
static void prepare_slowly(const void *args, int chunk, void *scratch)
{
    const struct prepared *p = args;
    (void)chunk;
    if (!pthread_equal(pthread_self(), caller)) clock_sleep_us(p->stamp % 3 * 100);
    if (!atomic_load(p->open)) atomic_fetch_add(p->late, 1);
    atomic_fetch_add(p->preparations, 1);
    *(int *)scratch = p->stamp;
}

static void use_prepared(const void *args, int chunk, void *scratch)
{
    const struct prepared *p = args;
    (void)chunk;
    if (*(int *)scratch != p->stamp) atomic_fetch_add(p->wrong, 1);
    if (pthread_equal(pthread_self(), caller)) clock_sleep_us(20);
}

static void nothing(const void *args, int chunk, void *scratch)
{
    (void)args, (void)chunk, (void)scratch;
}

static void preparations_end_with_their_job(void **state)
{
    static _Atomic int open, late, preparations, wrong;
    int all = 0;
    (void)state;
    caller = pthread_self();
    for (int threads = 1; threads <= 3; threads++) {
        struct pool *p;
        CHECK(pool_create(threads, 64, &p));
        for (int round = 1; round <= 200; round++) {
            struct prepared args = {&open, &late, &preparations, &wrong, round};
            struct pool_job job = {.compute = use_prepared,
                                   .commit = round % 2 ? nothing : NULL,
                                   .prepare = prepare_slowly,
                                   .args = &args,
                                   .args_bytes = sizeof args,
                                   .n_chunks = round % 9};
            atomic_store(&open, 1);
            atomic_store(&preparations, 0);
            pool_run(p, &job);
            atomic_store(&open, 0);
            /* with a commit the caller may rescue a chunk of each of the others */
            int most = job.commit || job.n_chunks > threads ? threads : job.n_chunks;
            assert_in_range(atomic_load(&preparations), job.n_chunks > 0, most);
            all += preparations;
        }
        pool_quiesce(p);
        pool_destroy(p);
    }
    assert_int_equal(late, 0);
    assert_int_equal(wrong, 0);
    assert_in_range(all, 600 - 66 + 1, 1800); /* other threads than the caller have prepared too */
}

static void cores_are_counted(void **state)
{
    struct pool *p;
    (void)state;
    assert_in_range(pool_cores(), 1, POOL_THREADS_MAX);
    assert_int_equal(pool_create(POOL_THREADS_MAX + 1, 64, &p), ERR_INVALID);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_chunk_once),
        cmocka_unit_test(stalled_chunks_are_rescued),
        cmocka_unit_test(preparations_end_with_their_job),
        cmocka_unit_test(cores_are_counted),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
