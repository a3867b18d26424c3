/* Goal: every chunk of every job takes effect exactly once, with any number of threads, also when a
 * thread is held up in the middle of a chunk; jobs of one chunk and of none work; scratch is
 * private. Method: chunks add into counters; a stalled thread is one that sleeps in its first
 * chunk, which another thread must then compute again. */
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
                struct pool_job job = {round % 2 ? prepare : count, round % 2 ? publish : NULL, &s,
                                       sizeof s, n};
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
        struct pool_job job = {stall_once, publish, &s, sizeof s, 8};
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
        cmocka_unit_test(cores_are_counted),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
