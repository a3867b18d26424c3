/* The thread pool: one ticket word per thread, jobs in a ring by generation.
 *
 * A ticket word is generation:24 | end:20 | next:20, a contiguous range of chunks. A thread waits
 * for its own word to change, takes from its own range first, so that the prefetchers run on from
 * chunk to chunk, and then steals from the others. A chunk with a commit is computed by whoever has
 * time and published by the thread that claims it first, the others drop their copy. A thread that
 * comes back late finds another generation and drops its chunk too; what it read meanwhile may have
 * been overwritten, but it never wrote anything.
 *
 * Cores may be 300 ns apart. What a chunk costs is therefore on lines that only its own thread
 * writes: the counts of finished chunks, and the claims, whose ranges lie a line apart. */
#include "kernels/cpu/pool.h"
#include "base/clock.h"
#include "base/mem.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    RING = 8,
    SPIN_NS = 50000,
    RESCUE_NS = 30000,
    CHUNK_BITS = 20,
    CHUNK_MASK = (1 << CHUNK_BITS) - 1
};
#ifdef __SANITIZE_THREAD__
enum { RESCUE = 0 }; /* a late thread reads what others write, by design; its result is dropped */
#else
enum { RESCUE = 1 };
#endif

struct job_copy {
    struct pool_job job;
    _Alignas(16) unsigned char args[POOL_ARGS_BYTES];
};

enum { CLAIMS_APART = 8 }; /* a line */

struct job_slot {
    _Atomic uint32_t generation; /* 0 while being filled */
    uint64_t serial;             /* counts the jobs and never wraps */
    struct job_copy copy;
    /* [chunk + CLAIMS_APART * its range]: serial of the last job that published it */
    _Alignas(64) _Atomic uint64_t claim[POOL_CHUNKS_MAX + CLAIMS_APART * POOL_THREADS_MAX];
};

struct pool_thread {
    _Alignas(64) _Atomic uint64_t ticket;
    _Alignas(64) _Atomic uint64_t finished; /* serial:44 | chunks of it that it finished:20 */
    _Atomic uint64_t preparing;             /* serial of the job whose prepare it is in, or 0 */
    _Atomic int busy;
    uint32_t generation; /* of the copy */
    uint64_t serial;
    uint64_t prepared; /* serial of the last job whose prepare it ran */
    struct job_copy copy;
    struct pool *pool;
    int index;
    void *scratch;
    pthread_t thread;
};

struct pool {
    int n_threads, n_started;
    size_t scratch_bytes;
    struct pool_thread *threads;
    struct job_slot *ring;
    uint64_t serial;
    _Alignas(64) _Atomic uint32_t generation;
    _Atomic int n_sleepers, quit;
};

/* The thread's own copy of the job `generation`; false when the slot has gone on to another. */
static bool job_copied(struct pool_thread *t, uint32_t generation)
{
    const struct job_slot *slot = &t->pool->ring[generation % RING];
    if (t->generation == generation && t->serial == slot->serial) return true;
    t->serial = slot->serial;
    t->copy.job = slot->copy.job;
    size_t bytes = t->copy.job.args_bytes;
    memcpy(t->copy.args, slot->copy.args, bytes <= POOL_ARGS_BYTES ? bytes : 0);
    atomic_thread_fence(memory_order_acquire);
    t->generation = generation;
    if (atomic_load_explicit(&slot->generation, memory_order_relaxed) != generation)
        t->generation = 0;
    return t->generation != 0;
}

static _Atomic uint64_t *claim_of(struct pool_thread *t, struct job_slot *slot, int chunk)
{
    int64_t n_threads = t->pool->n_threads;
    int64_t range = ((chunk + 1) * n_threads - 1) / t->copy.job.n_chunks;
    return &slot->claim[chunk + CLAIMS_APART * range];
}

/* True for the one thread that may publish the chunk. */
static bool chunk_claim(struct pool_thread *t, struct job_slot *slot, int chunk)
{
    _Atomic uint64_t *claim = claim_of(t, slot, chunk);
    uint64_t last = atomic_load_explicit(claim, memory_order_relaxed);
    return last < t->serial && atomic_compare_exchange_strong(claim, &last, t->serial);
}

/* Once a job: what prepare reads may be gone when the job is done. It is not while this thread's
 * chunk is unpublished, and pool_run, which looks after the last chunk was, waits for those that
 * say that they prepare. False when the chunk has been published by another thread. */
static bool chunk_prepare(struct pool_thread *t, struct job_slot *slot, int chunk)
{
    const struct pool_job *job = &t->copy.job;
    if (!job->prepare || t->prepared == t->serial) return true;
    atomic_store(&t->preparing, t->serial);
    bool open = !job->commit || atomic_load(claim_of(t, slot, chunk)) < t->serial;
    if (open) {
        job->prepare(t->copy.args, chunk, t->scratch);
        t->prepared = t->serial;
    }
    atomic_store_explicit(&t->preparing, 0, memory_order_release);
    return open;
}

/* Runs one chunk of the job `generation`, or drops it when someone else has published it. */
static void chunk_run(struct pool_thread *t, uint32_t generation, int chunk)
{
    const struct pool_job *job = &t->copy.job;
    struct job_slot *slot = &t->pool->ring[generation % RING];
    if (!job_copied(t, generation) || !chunk_prepare(t, slot, chunk)) return;
    job->compute(t->copy.args, chunk, t->scratch);
    if (job->commit) {
        if (!chunk_claim(t, slot, chunk)) return;
        job->commit(t->copy.args, chunk, t->scratch);
    }
    uint64_t finished = atomic_load_explicit(&t->finished, memory_order_relaxed);
    if (finished >> CHUNK_BITS != t->serial) finished = t->serial << CHUNK_BITS;
    atomic_store_explicit(&t->finished, finished + 1, memory_order_release);
}

/* Chunks of the current job that are done. */
static int chunks_finished(const struct pool *p)
{
    uint64_t n = 0;
    for (int i = 0; i < p->n_threads; i++) {
        uint64_t finished = atomic_load_explicit(&p->threads[i].finished, memory_order_acquire);
        if (finished >> CHUNK_BITS == p->serial) n += finished & CHUNK_MASK;
    }
    return (int)n;
}

/* Takes chunks until none is left in any range. */
static void chunks_take(struct pool_thread *t)
{
    struct pool *p = t->pool;
    for (int v = 0; v < p->n_threads; v++) {
        _Atomic uint64_t *word = &p->threads[(t->index + v) % p->n_threads].ticket;
        for (;;) {
            uint64_t w = atomic_load_explicit(word, memory_order_acquire);
            if ((w & CHUNK_MASK) >= (w >> CHUNK_BITS & CHUNK_MASK)) break;
            w = atomic_fetch_add_explicit(word, 1, memory_order_acq_rel);
            if ((w & CHUNK_MASK) >= (w >> CHUNK_BITS & CHUNK_MASK)) break;
            chunk_run(t, (uint32_t)(w >> 2 * CHUNK_BITS), (int)(w & CHUNK_MASK));
        }
    }
}

/* Waits for a job after `seen`, whose generation it returns; 0 when the pool is to end. */
static uint32_t generation_wait(struct pool_thread *t, uint32_t seen)
{
    struct pool *p = t->pool;
    int64_t start = 0;
    for (int i = 1;; i++) {
        uint64_t ticket = atomic_load_explicit(&t->ticket, memory_order_acquire);
        if (ticket >> 2 * CHUNK_BITS != seen) return (uint32_t)(ticket >> 2 * CHUNK_BITS);
        _mm_pause();
        if (i % 64) continue;
        int64_t now = clock_monotonic_ns();
        if (!start) start = now;
        if (now - start < SPIN_NS) continue;
        if (atomic_load(&p->quit)) return 0;
        atomic_fetch_add(&p->n_sleepers, 1);
        syscall(SYS_futex, &p->generation, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
        atomic_fetch_sub(&p->n_sleepers, 1);
        start = 0;
    }
}

static void *thread_main(void *arg)
{
    struct pool_thread *t = arg;
    uint32_t seen = 0;
    while ((seen = generation_wait(t, seen))) {
        atomic_store(&t->busy, 1);
        chunks_take(t);
        atomic_store_explicit(&t->busy, 0, memory_order_release);
    }
    return NULL;
}

static void generation_bump(struct pool *p, uint32_t generation)
{
    atomic_store(&p->generation, generation);
    if (atomic_load(&p->n_sleepers) > 0)
        syscall(SYS_futex, &p->generation, FUTEX_WAKE_PRIVATE, p->n_threads, NULL, NULL, 0);
}

/* First chunk of the range that thread i of n begins with. */
static int range_first(const struct pool_job *job, int i, int n)
{
    return (int)((int64_t)job->n_chunks * i / n);
}

/* Computes again whatever its thread has not published; false when there was nothing to help with.
 */
static bool chunks_rescue(struct pool *p, uint32_t generation, const struct pool_job *job)
{
    const struct job_slot *slot = &p->ring[generation % RING];
    bool any = false;
    if (!RESCUE || !job->commit) return false;
    for (int i = 0, n = p->n_threads; i < n; i++) {
        int first = range_first(job, i, n), end = range_first(job, i + 1, n);
        for (int c = first; c < end; c++) {
            if (atomic_load(&slot->claim[c + CLAIMS_APART * i]) >= slot->serial) continue;
            chunk_run(&p->threads[0], generation, c);
            any = true;
        }
    }
    return any;
}

/* Waits for the chunks that other threads hold. A chunk is thought stalled once the wait exceeds
 * what a chunk of this job usually takes. */
static void chunks_wait(struct pool *p, uint32_t generation, const struct pool_job *job,
                        int64_t start_ns)
{
    int64_t wait_start = 0, usual = 0;
    for (int i = 1; chunks_finished(p) < job->n_chunks; i++) {
        _mm_pause();
        if (i % 32) continue;
        int64_t now = clock_monotonic_ns();
        if (!wait_start) {
            wait_start = now;
            usual = 2 * (now - start_ns) * p->n_threads / job->n_chunks;
        }
        if (now - wait_start < RESCUE_NS || now - wait_start < usual) continue;
        if (!chunks_rescue(p, generation, job)) sched_yield();
    }
}

static void preparations_wait(struct pool *p)
{
    for (int i = 1; i < p->n_threads; i++)
        for (int n = 1; atomic_load(&p->threads[i].preparing) == p->serial; n++) {
            _mm_pause();
            if (n % 256 == 0) sched_yield();
        }
}

static void job_publish(struct pool *p, uint32_t generation, const struct pool_job *job)
{
    struct job_slot *slot = &p->ring[generation % RING];
    atomic_store_explicit(&slot->generation, 0, memory_order_relaxed);
    atomic_thread_fence(memory_order_release);
    slot->serial = ++p->serial;
    slot->copy.job = *job;
    memcpy(slot->copy.args, job->args, job->args_bytes);
    atomic_store_explicit(&slot->generation, generation, memory_order_release);
    for (int i = p->n_threads - 1; i >= 0; i--) {
        uint64_t first = (uint64_t)range_first(job, i, p->n_threads);
        uint64_t end = (uint64_t)range_first(job, i + 1, p->n_threads);
        atomic_store_explicit(&p->threads[i].ticket,
                              (uint64_t)generation << 2 * CHUNK_BITS | end << CHUNK_BITS | first,
                              memory_order_release);
    }
}

void pool_run(struct pool *p, const struct pool_job *job)
{
    ASSERT_CMP(job->args_bytes, <=, POOL_ARGS_BYTES);
    ASSERT_CMP(job->n_chunks, <, CHUNK_MASK - POOL_THREADS_MAX);
    if (job->n_chunks <= 0) return;
    if (p->n_threads == 1 || job->n_chunks == 1) {
        if (job->prepare) job->prepare(job->args, 0, p->threads[0].scratch);
        for (int i = 0; i < job->n_chunks; i++) {
            job->compute(job->args, i, p->threads[0].scratch);
            if (job->commit) job->commit(job->args, i, p->threads[0].scratch);
        }
        return;
    }
    if (job->commit) ASSERT_CMP(job->n_chunks, <=, POOL_CHUNKS_MAX);
    int64_t start_ns = clock_monotonic_ns();
    uint32_t generation = (atomic_load(&p->generation) + 1) & 0xffffff;
    if (!generation) generation = RING; /* 0 marks a slot that is being filled */
    job_publish(p, generation, job);
    generation_bump(p, generation);
    chunks_take(&p->threads[0]);
    chunks_wait(p, generation, job, start_ns);
    if (job->prepare) preparations_wait(p);
}

void pool_quiesce(struct pool *p)
{
    for (int i = 1; i < p->n_threads; i++)
        while (atomic_load_explicit(&p->threads[i].busy, memory_order_acquire))
            sched_yield();
}

enum err pool_create(int n_threads, size_t scratch_bytes, struct pool **out)
{
    enum err e = OK;
    struct pool *p;
    ASSERT_CMP(n_threads, >=, 1);
    if (n_threads > POOL_THREADS_MAX)
        FAIL(ERR_INVALID, "%d threads: at most %d", n_threads, POOL_THREADS_MAX);
    TRY(mem_alloc_aligned(64, sizeof *p, (void **)&p));
    p->n_threads = n_threads;
    p->scratch_bytes = (scratch_bytes + 4095) & ~(size_t)4095;
    TRY_OUT(mem_alloc_aligned(64, (size_t)n_threads * sizeof *p->threads, (void **)&p->threads));
    TRY_OUT(mem_alloc_aligned(64, RING * sizeof *p->ring, (void **)&p->ring));
    for (int i = 0; i < n_threads; i++) {
        p->threads[i].pool = p;
        p->threads[i].index = i;
        TRY_OUT(mem_alloc_aligned(4096, p->scratch_bytes, &p->threads[i].scratch));
    }
    for (p->n_started = 1; p->n_started < n_threads; p->n_started++) {
        struct pool_thread *t = &p->threads[p->n_started];
        int code = pthread_create(&t->thread, NULL, thread_main, t);
        if (code)
            FAIL_OUT(ERR_NO_MEMORY, "thread %d of %d: %s", p->n_started, n_threads, strerror(code));
    }
    *out = p;
    p = NULL;
out:
    pool_destroy(p);
    return e;
}

void pool_destroy(struct pool *p)
{
    if (!p) return;
    atomic_store(&p->quit, 1);
    atomic_fetch_add(&p->generation, 1);
    syscall(SYS_futex, &p->generation, FUTEX_WAKE_PRIVATE, POOL_THREADS_MAX, NULL, NULL, 0);
    for (int i = 1; i < p->n_started; i++)
        pthread_join(p->threads[i].thread, NULL);
    for (int i = 0; p->threads && i < p->n_threads; i++)
        mem_free(p->threads[i].scratch);
    mem_free(p->threads);
    mem_free(p->ring);
    mem_free(p);
}

int pool_n_threads(const struct pool *p)
{
    return p->n_threads;
}

int pool_cores(void)
{
    cpu_set_t set;
    int n = sched_getaffinity(0, sizeof set, &set) ? 1 : CPU_COUNT(&set);
    long long quota, period;
    FILE *f = fopen("/sys/fs/cgroup/cpu.max", "re");
    if (f) {
        if (fscanf(f, "%lld %lld", &quota, &period) == 2 && quota > 0 && period > 0 &&
            (quota + period - 1) / period < n)
            n = (int)((quota + period - 1) / period);
        fclose(f);
    }
    return n < 1 ? 1 : n > POOL_THREADS_MAX ? POOL_THREADS_MAX : n;
}
