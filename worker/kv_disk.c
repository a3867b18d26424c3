/* A file of KV blocks and the thread beside the steps. */
#include "worker/kv_disk.h"
#include "base/clock.h"
#include "base/hash.h"
#include "base/log.h"
#include "base/mem.h"
#include "worker/kv_disk_impl.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

enum { PAGE = 4096, NEWS_MAX = 32, MEASURED = 8, AVERAGE_OF = 8 };

static uint64_t stride_of(uint64_t block_bytes)
{
    return (block_bytes + PAGE - 1) / PAGE * PAGE;
}

uint64_t kv_disk_blocks(uint64_t bytes, uint64_t block_bytes)
{
    uint64_t n = bytes / stride_of(block_bytes);
    return n < INT32_MAX ? n : INT32_MAX;
}

/* ---- The file ---- */

static enum err file_create(const char *dir, int *out)
{
    char path[4096];
    int fd = open(dir, O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    if (fd < 0 && (errno == EOPNOTSUPP || errno == EISDIR || errno == EINVAL)) {
        if (snprintf(path, sizeof path, "%s/heddle-kv-XXXXXX", dir) >= (int)sizeof path)
            FAIL(ERR_INVALID, "--kv-disk: a path of %zu characters", strlen(dir));
        fd = mkostemp(path, O_CLOEXEC);
        if (fd >= 0) unlink(path);
    }
    if (fd < 0) FAIL(ERR_IO, "--kv-disk %s: %s", dir, strerror(errno));
    *out = fd;
    return OK;
}

/* All of it now: a disk that is full later cannot surprise us. */
static enum err file_fill(int fd, const char *dir, uint64_t bytes)
{
    struct statvfs v;
    if (!fstatvfs(fd, &v) && (uint64_t)v.f_bavail * v.f_frsize < bytes)
        FAIL(ERR_IO, "--kv-disk %s: %llu bytes are asked for, %llu are free", dir,
             (unsigned long long)bytes, (unsigned long long)v.f_bavail * v.f_frsize);
    int code = posix_fallocate(fd, 0, (off_t)bytes);
    if (code)
        FAIL(ERR_IO, "--kv-disk %s: no room for %llu bytes: %s", dir, (unsigned long long)bytes,
             strerror(code));
    return OK;
}

static bool file_write(struct kv_disk *d, uint32_t block, const char *from)
{
    uint64_t at = block * d->stride;
    for (uint64_t done = 0; done < d->block_bytes;) {
        ssize_t n = pwrite(d->fd, from + done, d->block_bytes - done, (off_t)(at + done));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return false;
        done += (uint64_t)n;
    }
    return true;
}

static bool file_read(struct kv_disk *d, uint32_t block, char *to)
{
    uint64_t at = block * d->stride;
    for (uint64_t done = 0; done < d->block_bytes;) {
        ssize_t n = pread(d->fd, to + done, d->block_bytes - done, (off_t)(at + done));
        if (n < 0 && errno == EINTR) continue;
        if (n == 0) errno = ENODATA;
        if (n <= 0) return false;
        done += (uint64_t)n;
    }
    return true;
}

/* ---- Transfers ---- */

/* One line for the first failure, the second, the fourth... */
static void complain(struct kv_disk *d, const char *what, uint32_t block, const char *why)
{
    d->n_failures++;
    if ((d->n_failures & (d->n_failures - 1)) == 0)
        log_warn(
            "kv disk: block %u could not be %s: %s (%llu failures so far); it is computed again",
            block, what, why, (unsigned long long)d->n_failures);
}

/* Copies between host memory and the staging block, unless the epoch is over. */
static bool host_copy(struct kv_disk *d, uint64_t serial, uint32_t host, bool to_host)
{
    char *at = d->host + host * d->block_bytes;
    pthread_mutex_lock(&d->host_lock);
    bool alive = serial == d->serial;
    if (alive && to_host) memcpy(at, d->staging, d->block_bytes);
    if (alive && !to_host) memcpy(d->staging, at, d->block_bytes);
    pthread_mutex_unlock(&d->host_lock);
    return alive;
}

static bool spill(struct kv_disk *d, uint64_t serial, struct plan_pair p)
{
    if (!host_copy(d, serial, p.from, false)) return false;
    struct hash128 *sum = &d->sums[p.to];
    *sum = hash_bytes(d->staging, d->block_bytes, p.to);
    if (file_write(d, p.to, d->staging)) return true;
    complain(d, "written", p.to, strerror(errno));
    *sum = (struct hash128){0};
    return false;
}

static bool fetch(struct kv_disk *d, uint64_t serial, struct plan_pair p)
{
    int64_t begin = clock_monotonic_us();
    if (!file_read(d, p.from, d->staging)) {
        complain(d, "read", p.from, strerror(errno));
        return false;
    }
    if (!hash_equal(d->sums[p.from], hash_bytes(d->staging, d->block_bytes, p.from))) {
        complain(d, "read", p.from, "its checksum is wrong");
        return false;
    }
    if (!host_copy(d, serial, p.to, true)) return false;
    uint64_t ns = (uint64_t)(clock_monotonic_us() - begin) * 1000 + 1, old = d->fetch_ns;
    ns = (old * (AVERAGE_OF - 1) + ns) / AVERAGE_OF;
    d->fetch_ns = ns < UINT32_MAX ? (uint32_t)ns : UINT32_MAX;
    return true;
}

/* ---- The thread ---- */

static void note_end(struct disk_queue *q, bool ok)
{
    q->first = (q->first + 1) % PLAN_TRANSFERS_MAX;
    q->n--;
    if (!ok) q->failed[q->n_failed++] = q->n_done;
    q->n_done++;
    q->n_untold++;
}

/* Tells what has ended. Entered and left with the lock held, which is given up meanwhile. */
static void tell(struct kv_disk *d)
{
    struct disk_queue *f = &d->queues[DISK_FETCH], *s = &d->queues[DISK_SPILL];
    struct moved news = {.epoch = d->epoch,
                         .n_fetched = f->n_done,
                         .n_spilled = s->n_done,
                         .n_fetches_failed = f->n_failed,
                         .n_spills_failed = s->n_failed,
                         .fetch_ns = d->fetch_ns,
                         .fetches_failed = d->told[DISK_FETCH],
                         .spills_failed = d->told[DISK_SPILL]};
    for (int k = 0; k < 2; k++) {
        struct disk_queue *q = &d->queues[k];
        memcpy(d->told[k], q->failed, q->n_failed * sizeof *q->failed);
        q->n_failed = q->n_untold = 0;
    }
    pthread_mutex_unlock(&d->lock);
    pthread_mutex_lock(&d->listen_lock);
    if (d->tell) d->tell(d->ctx, &news);
    pthread_mutex_unlock(&d->listen_lock);
    pthread_mutex_lock(&d->lock);
}

static void work(struct kv_disk *d)
{
    int kind = d->queues[DISK_FETCH].n ? DISK_FETCH : DISK_SPILL;
    struct disk_queue *q = &d->queues[kind];
    struct plan_pair pair = q->pairs[q->first];
    uint64_t serial = d->serial;
    pthread_mutex_unlock(&d->lock);
    bool ok = kind == DISK_FETCH ? fetch(d, serial, pair) : spill(d, serial, pair);
    pthread_mutex_lock(&d->lock);
    if (serial == d->serial) note_end(q, ok);
}

static void *run(void *argument)
{
    struct kv_disk *d = argument;
    pthread_mutex_lock(&d->lock);
    while (!d->stop) {
        const struct disk_queue *f = &d->queues[DISK_FETCH], *s = &d->queues[DISK_SPILL];
        uint32_t n_untold = f->n_untold + s->n_untold;
        if (n_untold && (n_untold >= NEWS_MAX || (f->n_untold && !f->n) || (!f->n && !s->n)))
            tell(d);
        else if (f->n || s->n)
            work(d);
        else
            pthread_cond_wait(&d->wake, &d->lock);
    }
    pthread_mutex_unlock(&d->lock);
    return NULL;
}

/* ---- The worker's side ---- */

static void queue_add(struct disk_queue *q, const struct plan_pair *pairs, uint32_t n)
{
    for (uint32_t i = 0; i < n; i++)
        q->pairs[(q->first + q->n++) % PLAN_TRANSFERS_MAX] = pairs[i];
}

enum err kv_disk_start(struct kv_disk *d, const struct step_plan *plan)
{
    struct disk_queue *f = &d->queues[DISK_FETCH], *s = &d->queues[DISK_SPILL];
    pthread_mutex_lock(&d->lock);
    bool room = plan->n_fetches <= PLAN_TRANSFERS_MAX - f->n - f->n_untold &&
                plan->n_spills <= PLAN_TRANSFERS_MAX - s->n - s->n_untold;
    if (room) {
        queue_add(f, plan->fetches, plan->n_fetches);
        queue_add(s, plan->spills, plan->n_spills);
        pthread_cond_signal(&d->wake);
    }
    pthread_mutex_unlock(&d->lock);
    if (!room)
        FAIL(ERR_FORMAT, "plan: %u fetches and %u spills more than %d that may wait",
             plan->n_fetches, plan->n_spills, PLAN_TRANSFERS_MAX);
    return OK;
}

void kv_disk_reset(struct kv_disk *d, uint64_t epoch)
{
    pthread_mutex_lock(&d->lock);
    pthread_mutex_lock(&d->host_lock);
    d->serial++;
    d->epoch = epoch;
    for (int k = 0; k < 2; k++)
        d->queues[k].first = d->queues[k].n = d->queues[k].n_failed = d->queues[k].n_untold = 0,
        d->queues[k].n_done = 0;
    pthread_mutex_unlock(&d->host_lock);
    pthread_mutex_unlock(&d->lock);
}

void kv_disk_listen(struct kv_disk *d, void (*tell)(void *, const struct moved *), void *ctx)
{
    pthread_mutex_lock(&d->listen_lock);
    d->tell = tell;
    d->ctx = ctx;
    pthread_mutex_unlock(&d->listen_lock);
}

uint32_t kv_disk_fetch_ns(const struct kv_disk *d)
{
    return d->fetch_ns;
}

/* Writes a few blocks and reads them back past the page cache. */
static enum err measure(struct kv_disk *d, const char *dir)
{
    uint64_t n = d->n_blocks < MEASURED ? d->n_blocks : MEASURED;
    for (uint64_t i = 0; i < n; i++)
        if (!file_write(d, (uint32_t)i, d->staging))
            FAIL(ERR_IO, "--kv-disk %s: %s", dir, strerror(errno));
    if (fdatasync(d->fd)) FAIL(ERR_IO, "--kv-disk %s: %s", dir, strerror(errno));
    (void)posix_fadvise(d->fd, 0, 0, POSIX_FADV_DONTNEED);
    int64_t begin = clock_monotonic_us();
    for (uint64_t i = 0; i < n; i++)
        if (!file_read(d, (uint32_t)i, d->staging))
            FAIL(ERR_IO, "--kv-disk %s: %s", dir, strerror(errno));
    uint64_t ns = (uint64_t)(clock_monotonic_us() - begin) * 1000 / n + 1;
    d->fetch_ns = ns < UINT32_MAX ? (uint32_t)ns : UINT32_MAX;
    return OK;
}

static enum err start(struct kv_disk *d, const char *dir)
{
    uint64_t bytes;
    if (__builtin_mul_overflow(d->n_blocks, d->stride, &bytes) || bytes > INT64_MAX)
        FAIL(ERR_INVALID, "--kv-disk-space: %llu blocks", (unsigned long long)d->n_blocks);
    TRY(file_create(dir, &d->fd));
    TRY(file_fill(d->fd, dir, bytes));
    TRY(mem_alloc_aligned(PAGE, d->stride, (void **)&d->staging));
    TRY(MEM_NEW_ARRAY(d->n_blocks, &d->sums));
    TRY(measure(d, dir));
    if (pthread_create(&d->thread, NULL, run, d)) FAIL(ERR_NO_MEMORY, "no thread for the KV disk");
    d->has_thread = true;
    log_info("kv disk: %.2f GiB in %s, %llu blocks, %.2f ms each to read",
             (double)bytes / (double)(1ull << 30), dir, (unsigned long long)d->n_blocks,
             (double)d->fetch_ns * 1e-6);
    return OK;
}

enum err kv_disk_open(const char *dir, uint64_t n_blocks, void *host, uint64_t n_host,
                      uint64_t block_bytes, struct kv_disk **out)
{
    struct kv_disk *d;
    (void)n_host;
    TRY(MEM_NEW(&d));
    d->fd = -1;
    d->n_blocks = n_blocks;
    d->block_bytes = block_bytes;
    d->stride = stride_of(block_bytes);
    d->host = host;
    pthread_mutex_init(&d->lock, NULL);
    pthread_mutex_init(&d->host_lock, NULL);
    pthread_mutex_init(&d->listen_lock, NULL);
    pthread_cond_init(&d->wake, NULL);
    enum err e = start(d, dir);
    if (e)
        kv_disk_close(d);
    else
        *out = d;
    return e;
}

void kv_disk_close(struct kv_disk *d)
{
    if (!d) return;
    pthread_mutex_lock(&d->lock);
    d->stop = true;
    pthread_cond_signal(&d->wake);
    pthread_mutex_unlock(&d->lock);
    if (d->has_thread) pthread_join(d->thread, NULL);
    if (d->fd >= 0) close(d->fd);
    mem_free(d->staging);
    mem_free(d->sums);
    pthread_mutex_destroy(&d->lock);
    pthread_mutex_destroy(&d->host_lock);
    pthread_mutex_destroy(&d->listen_lock);
    pthread_cond_destroy(&d->wake);
    mem_free(d);
}
