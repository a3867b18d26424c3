/* Collectives of ranks on one host: own shared memory, no system call on the usual path.
 *
 * Each rank publishes its vector in a slot, raises its flag to the number of the operation, waits
 * for everybody's flag and sums all slots itself (one-shot); from four ranks up it sums one slice
 * and the slices are then copied (two-shot). Slots come in two sets used in turn: a rank that
 * raises its flag to e + 1 has finished reading e, so one wait an operation is enough. Long vectors
 * that lie in the slots already are summed in place, a slice a rank, and read there by all.
 *
 * Waiting: spin, then yield, then sleep in the kernel. A peer that dies lets go of its lock on the
 * segment (the kernel sees to that); who waits for it finds out, raises the abort word for all, and
 * everyone fails with ERR_PEER. Knows floats and flags; never what is summed. */
#include "base/clock.h"
#include "base/hash.h"
#include "base/mem.h"
#include "parallel/collective.h"
#include "parallel/sum.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    LINE = 64,
    TWO_SHOT_FROM = 4,
    NEAR_BYTES_MIN = 1 << 16, /* below, a second wait costs more than the sums */
    SLOT_BYTES_MAX = 2 << 20, /* longer tensors go in pieces, which also stay in the cache */
    SLOT_BYTES_MIN = 1 << 16,
    SPINS = 4000,
    YIELD_US = 1000,
    SLEEP_US = 20000,
    TIMEOUT_MS_DEFAULT = 30000
};

struct rank_line {
    _Alignas(LINE) _Atomic uint32_t published; /* operation whose input lies in the slot */
    _Alignas(LINE) _Atomic uint32_t reduced;   /* two-shot: operation whose slice is summed */
};
struct segment {
    _Alignas(LINE) _Atomic uint32_t abort;
    _Alignas(LINE) _Atomic uint32_t sleepers;
    struct rank_line ranks[COLLECTIVE_RANKS_MAX];
    _Alignas(4096) char data[]; /* [2][size][slot_bytes] inputs, then [2][slot_bytes] sums */
};

struct shm {
    struct collective head;
    struct segment *segment;
    size_t segment_bytes, slot_bytes;
    int fd;
    uint32_t operation; /* number of the last one */
    int64_t timeout_us;
    int spins;
    const struct bootstrap *boot;
    struct bootstrap boot_copy;
};

static struct shm *shm_of(struct collective *c)
{
    return (struct shm *)c;
}

static char *slot_of(const struct shm *s, uint32_t operation, int rank)
{
    size_t set = (operation & 1) * (size_t)s->head.group.size;
    return s->segment->data + (set + (size_t)rank) * s->slot_bytes;
}

static char *sums_of(const struct shm *s, uint32_t operation)
{
    return s->segment->data + (2 * (size_t)s->head.group.size + (operation & 1)) * s->slot_bytes;
}

/* --- waiting --- */

static void wake_all(struct shm *s)
{
    for (int r = 0; r < s->head.group.size; r++) {
        syscall(SYS_futex, &s->segment->ranks[r].published, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
        syscall(SYS_futex, &s->segment->ranks[r].reduced, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    }
}

static void raise_flag(struct shm *s, _Atomic uint32_t *flag, uint32_t value)
{
    atomic_store(flag, value); /* before the look at sleepers: sequentially consistent */
    if (atomic_load(&s->segment->sleepers))
        syscall(SYS_futex, flag, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static bool reached(const _Atomic uint32_t *flag, uint32_t value)
{
    return (int32_t)(atomic_load_explicit(flag, memory_order_acquire) - value) >= 0;
}

/* Every living rank holds a lock on its byte of the segment. */
static bool is_alive(const struct shm *s, int rank)
{
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = rank, .l_len = 1};
    return fcntl(s->fd, F_OFD_GETLK, &lock) || lock.l_type != F_UNLCK;
}

static void abort_raise(struct shm *s)
{
    atomic_store(&s->segment->abort, 1);
    wake_all(s);
}

static enum err peer_lost(struct shm *s, int rank, const char *why)
{
    abort_raise(s);
    FAIL(ERR_PEER, "collective shm: rank %d waits for rank %d, which %s", s->head.group.rank, rank,
         why);
}

static enum err wait_asleep(struct shm *s, _Atomic uint32_t *flag, uint32_t value, int rank)
{
    int64_t end = clock_monotonic_us() + s->timeout_us;
    struct timespec nap = {0, SLEEP_US * 1000};
    enum err e = OK;
    atomic_fetch_add(&s->segment->sleepers, 1);
    while (!reached(flag, value)) {
        uint32_t seen = atomic_load(flag);
        if (atomic_load(&s->segment->abort))
            e = peer_lost(s, rank, "will not come: the operation was aborted");
        else if (!is_alive(s, rank) && !reached(flag, value))
            e = peer_lost(s, rank, "is gone");
        else if (s->boot_copy.ended && s->boot_copy.ended(s->boot_copy.ctx))
            e = peer_lost(s, rank, "will not come: the group has ended");
        else if (clock_monotonic_us() > end)
            e = peer_lost(s, rank, "did not come in time");
        if (e) break;
        if ((int32_t)(seen - value) < 0) syscall(SYS_futex, flag, FUTEX_WAIT, seen, &nap, NULL, 0);
    }
    atomic_fetch_sub(&s->segment->sleepers, 1);
    return e;
}

static void relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

static enum err wait_flag(struct shm *s, _Atomic uint32_t *flag, uint32_t value, int rank)
{
    for (int i = 0; i < s->spins; i++) {
        if (reached(flag, value)) return OK;
        relax();
    }
    for (int64_t end = clock_monotonic_us() + YIELD_US; clock_monotonic_us() < end;) {
        if (reached(flag, value)) return OK;
        if (atomic_load_explicit(&s->segment->abort, memory_order_relaxed)) break;
        sched_yield();
    }
    return wait_asleep(s, flag, value, rank);
}

static enum err publish_and_wait(struct shm *s, uint32_t operation)
{
    struct segment *g = s->segment;
    raise_flag(s, &g->ranks[s->head.group.rank].published, operation);
    for (int r = 0; r < s->head.group.size; r++)
        TRY(wait_flag(s, &g->ranks[r].published, operation, r));
    return OK;
}

/* --- all-reduce --- */

static enum err reduce_piece(struct shm *s, float *out, const float *x, int64_t n)
{
    uint32_t operation = ++s->operation;
    int size = s->head.group.size, rank = s->head.group.rank;
    const float *parts[COLLECTIVE_RANKS_MAX];
    float *mine = (float *)slot_of(s, operation, rank);
    if (x != mine) memcpy(mine, x, (size_t)n * sizeof *x);
    for (int r = 0; r < size; r++)
        parts[r] = (const float *)slot_of(s, operation, r);
    TRY(publish_and_wait(s, operation));
    if (size < TWO_SHOT_FROM) {
        sum_in_rank_order(out, parts, size, n);
        return OK;
    }
    int64_t begin = n * rank / size, end = n * (rank + 1) / size;
    float *sums = (float *)sums_of(s, operation);
    for (int r = 0; r < size; r++)
        parts[r] += begin;
    sum_in_rank_order(sums + begin, parts, size, end - begin);
    raise_flag(s, &s->segment->ranks[rank].reduced, operation);
    for (int r = 0; r < size; r++)
        TRY(wait_flag(s, &s->segment->ranks[r].reduced, operation, r));
    memcpy(out, sums, (size_t)n * sizeof *out);
    return OK;
}

static enum err shm_all_reduce(struct collective *c, struct tensor out, struct tensor x)
{
    struct shm *s = shm_of(c);
    int64_t n = x.rows * x.cols, most = (int64_t)(s->slot_bytes / sizeof(float));
    ASSERT(x.dtype == DTYPE_F32 && out.dtype == DTYPE_F32 && x.stride == x.cols &&
           out.stride == out.cols);
    for (int64_t at = 0; at < n; at += most)
        TRY(reduce_piece(s, (float *)out.data + at, (const float *)x.data + at,
                         n - at < most ? n - at : most));
    return OK;
}

/* Rank r sums slice r of all slots into the first one. */
static enum err reduce_in_place(struct shm *s, int64_t n, void **out_sum)
{
    uint32_t operation = ++s->operation;
    int size = s->head.group.size, rank = s->head.group.rank;
    const float *parts[COLLECTIVE_RANKS_MAX];
    int64_t begin = n * rank / size / 16 * 16, end = n * (rank + 1) / size / 16 * 16;
    if (rank == size - 1) end = n;
    for (int r = 0; r < size; r++)
        parts[r] = (const float *)slot_of(s, operation, r) + begin;
    float *sums = (float *)slot_of(s, operation, 0);
    TRY(publish_and_wait(s, operation));
    sum_in_rank_order(sums + begin, parts, size, end - begin);
    raise_flag(s, &s->segment->ranks[rank].reduced, operation);
    for (int r = 0; r < size; r++)
        TRY(wait_flag(s, &s->segment->ranks[r].reduced, operation, r));
    *out_sum = sums;
    return OK;
}

static enum err shm_all_reduce_near(struct collective *c, struct tensor *out, struct tensor x)
{
    struct shm *s = shm_of(c);
    size_t bytes = (size_t)(x.rows * x.cols) * sizeof(float);
    bool inside = x.data == slot_of(s, s->operation + 1, c->group.rank);
    if (bytes < NEAR_BYTES_MIN || bytes > s->slot_bytes || !inside)
        return shm_all_reduce(c, *out, x);
    return reduce_in_place(s, x.rows * x.cols, &out->data);
}

static void *shm_reduce_buffer(struct collective *c, size_t bytes)
{
    struct shm *s = shm_of(c);
    return bytes <= s->slot_bytes ? slot_of(s, s->operation + 1, c->group.rank) : NULL;
}

/* --- all-gather and broadcast --- */

/* Bytes at .. at + n of the view, as if its rows were packed, to or from `packed`. */
static void copy_packed(struct tensor view, size_t at, size_t n, char *packed, bool into_view)
{
    size_t row_bytes = (size_t)view.cols * dtype_bytes(view.dtype),
           stride = (size_t)view.stride * dtype_bytes(view.dtype);
    while (n) {
        size_t column = at % row_bytes, m = row_bytes - column < n ? row_bytes - column : n;
        char *place = (char *)view.data + at / row_bytes * stride + column;
        if (into_view)
            memcpy(place, packed, m);
        else
            memcpy(packed, place, m);
        packed += m, at += m, n -= m;
    }
}

static size_t piece_of(size_t total, size_t at, size_t most)
{
    return at >= total ? 0 : total - at < most ? total - at : most;
}

static struct tensor columns_view(struct tensor t, const int32_t *start, int rank)
{
    t.data = (char *)t.data + (size_t)start[rank] * dtype_bytes(t.dtype);
    t.cols = start[rank + 1] - start[rank];
    return t;
}

static enum err shm_all_gather(struct collective *c, struct tensor out, struct tensor part,
                               const int32_t *start)
{
    struct shm *s = shm_of(c);
    int size = c->group.size, rank = c->group.rank;
    size_t element = dtype_bytes(out.dtype), longest = 0;
    ASSERT_CMP(part.cols, ==, start[rank + 1] - start[rank]);
    for (int r = 0; r < size; r++) {
        size_t bytes = (size_t)out.rows * (size_t)(start[r + 1] - start[r]) * element;
        if (bytes > longest) longest = bytes;
    }
    for (size_t at = 0; at < longest; at += s->slot_bytes) {
        uint32_t operation = ++s->operation;
        size_t mine = (size_t)out.rows * (size_t)part.cols * element;
        copy_packed(part, at, piece_of(mine, at, s->slot_bytes), slot_of(s, operation, rank),
                    false);
        TRY(publish_and_wait(s, operation));
        for (int r = 0; r < size; r++) {
            struct tensor theirs = columns_view(out, start, r);
            size_t total = (size_t)out.rows * (size_t)theirs.cols * element;
            if (r == rank && theirs.data == part.data) continue;
            copy_packed(theirs, at, piece_of(total, at, s->slot_bytes), slot_of(s, operation, r),
                        true);
        }
    }
    return OK;
}

static enum err shm_broadcast(struct collective *c, void *mem, size_t bytes, int root)
{
    struct shm *s = shm_of(c);
    for (size_t at = 0; at < bytes; at += s->slot_bytes) {
        uint32_t operation = ++s->operation;
        size_t n = piece_of(bytes, at, s->slot_bytes);
        if (c->group.rank == root) memcpy(slot_of(s, operation, root), (char *)mem + at, n);
        TRY(publish_and_wait(s, operation));
        if (c->group.rank != root) memcpy((char *)mem + at, slot_of(s, operation, root), n);
    }
    return OK;
}

/* --- opening --- */

/* What ranks tell each other while the segment is made. */
struct report {
    int32_t failed;
    char why[124];
};

static enum err reports_exchange(struct shm *s, const char *key, enum err mine)
{
    struct report report = {.failed = mine != OK}, all[COLLECTIVE_RANKS_MAX];
    if (mine) snprintf(report.why, sizeof report.why, "%s", err_detail());
    TRY(s->boot->exchange(s->boot->ctx, key, &report, sizeof report, all));
    for (int r = 0; r < s->head.group.size; r++)
        if (all[r].failed)
            FAIL(ERR_PEER, "collective shm: rank %d: %.*s", r, (int)sizeof all[r].why, all[r].why);
    return OK;
}

static enum err segment_create(struct shm *s, const char *name)
{
    s->fd = shm_open(name, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
    if (s->fd < 0 && errno == EEXIST) { /* left by a killed run with the same random key */
        shm_unlink(name);
        s->fd = shm_open(name, O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
    }
    if (s->fd < 0) FAIL(ERR_IO, "/dev/shm%s: %s", name, strerror(errno));
    /* reserved now: a full /dev/shm is an error here, not a bus error later */
    int why = ftruncate(s->fd, (off_t)s->segment_bytes)
                  ? errno
                  : posix_fallocate(s->fd, 0, (off_t)s->segment_bytes);
    if (why)
        FAIL(ERR_NO_MEMORY, "/dev/shm: no room for %zu MiB: %s", s->segment_bytes >> 20,
             strerror(why));
    return OK;
}

static enum err segment_map(struct shm *s, const char *name)
{
    struct flock lock = {
        .l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = s->head.group.rank, .l_len = 1};
    if (s->fd < 0) s->fd = shm_open(name, O_RDWR | O_CLOEXEC, 0);
    if (s->fd < 0) FAIL(ERR_IO, "/dev/shm%s: %s", name, strerror(errno));
    if (fcntl(s->fd, F_OFD_SETLK, &lock))
        FAIL(ERR_IO, "/dev/shm%s: cannot lock: %s", name, strerror(errno));
    void *map =
        mmap(NULL, s->segment_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, s->fd, 0);
    if (map == MAP_FAILED) FAIL(ERR_NO_MEMORY, "/dev/shm%s: cannot map: %s", name, strerror(errno));
    s->segment = map;
    return OK;
}

static void shm_close(struct collective *c)
{
    struct shm *s = shm_of(c);
    if (!s) return;
    if (s->segment) munmap(s->segment, s->segment_bytes);
    if (s->fd >= 0) close(s->fd);
    mem_free(s);
}

static void sizes_set(struct shm *s, const struct collective_options *options)
{
    size_t most = options->reduce_bytes_max > options->gather_bytes_max ? options->reduce_bytes_max
                                                                        : options->gather_bytes_max;
    size_t n = (size_t)s->head.group.size;
    s->slot_bytes = most < SLOT_BYTES_MIN   ? SLOT_BYTES_MIN
                    : most > SLOT_BYTES_MAX ? SLOT_BYTES_MAX
                                            : most;
    s->slot_bytes = (s->slot_bytes + 4095) & ~(size_t)4095;
    s->segment_bytes =
        sizeof(struct segment) + (2 * n + (n >= TWO_SHOT_FROM ? 2 : 0)) * s->slot_bytes;
    s->timeout_us =
        (int64_t)(options->timeout_ms ? options->timeout_ms : TIMEOUT_MS_DEFAULT) * 1000;
    cpu_set_t cores;
    /* spinning is for ranks that have a core each */
    bool crowded =
        sched_getaffinity(0, sizeof cores, &cores) || sysconf(_SC_NPROCESSORS_ONLN) < (long)n;
    s->spins = crowded ? 0 : SPINS;
}

static enum err shm_start(struct shm *s)
{
    char name[64];
    struct hash128 key = hash_bytes(s->boot->group_key, strlen(s->boot->group_key), 0x5ea1);
    snprintf(name, sizeof name, "/heddle-%016llx%016llx", (unsigned long long)key.high,
             (unsigned long long)key.low);
    enum err e = s->head.group.rank == 0 ? segment_create(s, name) : OK;
    e = reports_exchange(s, "shm made", e);
    if (!e) e = reports_exchange(s, "shm mapped", segment_map(s, name));
    if (s->head.group.rank == 0) shm_unlink(name);
    return e;
}

static enum err shm_open_all(struct backend *b, struct group g, const struct bootstrap *boot,
                             const struct collective_options *options, struct collective **out)
{
    struct shm *s;
    (void)b;
    TRY(MEM_NEW(&s));
    s->head = (struct collective){&coll_shm, g};
    s->fd = -1;
    s->boot = boot;
    s->boot_copy = *boot;
    sizes_set(s, options);
    enum err e = shm_start(s);
    s->boot = NULL; /* only its copy is needed from here on */
    if (e)
        shm_close(&s->head);
    else
        *out = &s->head;
    return e;
}

static bool shm_probe(struct backend *b, struct group g, char *why_not, size_t why_bytes)
{
    if (g.size < 2)
        snprintf(why_not, why_bytes, "one rank has nobody to talk to");
    else if (b->stream)
        snprintf(why_not, why_bytes, "its tensors are on the %s device", b->ops->name);
    else if (access("/dev/shm", R_OK | W_OK))
        snprintf(why_not, why_bytes, "/dev/shm: %s", strerror(errno));
    else
        return true;
    return false;
}

static void shm_abort(struct collective *c)
{
    abort_raise(shm_of(c));
}

const struct collective_ops coll_shm = {
    .name = "shm",
    .probe = shm_probe,
    .open = shm_open_all,
    .all_reduce_sum = shm_all_reduce,
    .all_gather = shm_all_gather,
    .broadcast = shm_broadcast,
    .close = shm_close,
    .abort = shm_abort,
    .reduce_buffer = shm_reduce_buffer,
    .all_reduce_near = shm_all_reduce_near,
};
