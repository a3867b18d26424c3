/* Ranks with GPUs: NCCL, opened at run time, so that the program starts where there is none.
 *
 * The communicator does not block: a call that is not done at once is asked about until it is, or
 * until the deadline. A watchman asks NCCL ten times a second whether a peer has failed, and the
 * caller whether this incarnation of the group has ended; then it aborts the communicator, which
 * ends the kernels that wait for the lost peer. What a step computed after that is worthless: a
 * sum of zero rows costs nothing and says ERR_PEER, so ask one before a step's result is believed.
 * NCCL's and the driver's types are declared anew, as far as they are used, from the interfaces of
 * NCCL 2.18 and CUDA 12 and newer. */
#include "base/clock.h"
#include "base/log.h"
#include "base/mem.h"
#include "parallel/collective.h"

#include <dlfcn.h>
#include <limits.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    NCCL_SUCCESS = 0,
    NCCL_IN_PROGRESS = 7,
    NCCL_SUM = 0,
    WATCH_MS = 100,
    TIMEOUT_MS_DEFAULT = 30000
};
enum { NCCL_INT8 = 0, NCCL_FLOAT16 = 6, NCCL_FLOAT32 = 7, NCCL_BFLOAT16 = 9, CU_MEMORY_DEVICE = 2 };

struct nccl_id {
    char bytes[128];
};
struct nccl_config { /* of NCCL 2.18; newer ones take it by its size and version */
    size_t size;
    unsigned magic, version;
    int blocking, cga_cluster_size, ctas_min, ctas_max;
    const char *net_name;
    int split_share;
};
struct cu_copy_2d {
    size_t src_x, src_y;
    int src_type;
    const void *src_host;
    uintptr_t src_device;
    void *src_array;
    size_t src_pitch, dst_x, dst_y;
    int dst_type;
    void *dst_host;
    uintptr_t dst_device;
    void *dst_array;
    size_t dst_pitch, width, height;
};

struct library {
    void *nccl, *cuda;
    int (*ncclGetVersion)(int *version);
    const char *(*ncclGetErrorString)(int result);
    int (*ncclGetUniqueId)(struct nccl_id *id);
    int (*ncclCommInitRankConfig)(void **comm, int size, struct nccl_id id, int rank,
                                  struct nccl_config *config);
    int (*ncclCommGetAsyncError)(void *comm, int *error);
    int (*ncclCommAbort)(void *comm);
    int (*ncclCommFinalize)(void *comm);
    int (*ncclCommDestroy)(void *comm);
    int (*ncclAllReduce)(const void *send, void *out, size_t n, int type, int op, void *comm,
                         void *stream);
    int (*ncclAllGather)(const void *send, void *out, size_t n, int type, void *comm, void *stream);
    int (*ncclBroadcast)(const void *send, void *out, size_t n, int type, int root, void *comm,
                         void *stream);
    int (*ncclGroupStart)(void);
    int (*ncclGroupEnd)(void);
    int (*cuMemcpy2DAsync_v2)(const struct cu_copy_2d *copy, void *stream);
};

struct coll_nccl_state {
    struct collective base;
    struct backend *backend;
    const struct bootstrap boot;
    struct library lib;
    void *comm; /* NULL after an abort */
    int timeout_ms;
    uint8_t *scratch; /* device: rows on their way to or from their slices */
    size_t scratch_bytes;
    pthread_mutex_t lock; /* one thread at a time inside NCCL */
    pthread_t watchman;
    bool watched;
    atomic_bool stop, aborted;
};

static struct coll_nccl_state *nccl_of(struct collective *c)
{
    return (struct coll_nccl_state *)c;
}

/* In the plugin's directory first, as a bundle has it, then wherever the loader looks. */
static void *library_open(const char *name)
{
    char path[PATH_MAX];
    const char *dir = getenv("HEDDLE_PLUGIN_DIR");
    if (dir && snprintf(path, sizeof path, "%s/%s", dir, name) < (int)sizeof path) {
        void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (library) return library;
    }
    return dlopen(name, RTLD_NOW | RTLD_LOCAL);
}

static bool library_load(struct library *l, char *why_not, size_t why_bytes)
{
    l->nccl = library_open("libnccl.so.2");
    if (l->nccl) l->cuda = library_open("libcuda.so.1");
    if (!l->nccl || !l->cuda) {
        snprintf(why_not, why_bytes, "%s", dlerror());
        return false;
    }
#define FIND(from, name)                                                                           \
    *(void **)&l->name = dlsym(l->from, #name);                                                    \
    if (!l->name) {                                                                                \
        snprintf(why_not, why_bytes, "the library has no " #name);                                 \
        return false;                                                                              \
    }
    FIND(nccl, ncclGetVersion)
    FIND(nccl, ncclGetErrorString)
    FIND(nccl, ncclGetUniqueId)
    FIND(nccl, ncclCommInitRankConfig)
    FIND(nccl, ncclCommGetAsyncError)
    FIND(nccl, ncclCommAbort)
    FIND(nccl, ncclCommFinalize)
    FIND(nccl, ncclCommDestroy)
    FIND(nccl, ncclAllReduce)
    FIND(nccl, ncclAllGather)
    FIND(nccl, ncclBroadcast)
    FIND(nccl, ncclGroupStart)
    FIND(nccl, ncclGroupEnd)
    FIND(cuda, cuMemcpy2DAsync_v2)
#undef FIND
    int version = 0;
    l->ncclGetVersion(&version);
    if (version >= 21800) return true;
    snprintf(why_not, why_bytes, "NCCL %d is too old, 2.18 is needed", version);
    return false;
}

static bool nccl_probe(struct backend *b, struct group g, char *why_not, size_t why_bytes)
{
    struct library l = {0};
    if (strcmp(b->ops->name, "cuda"))
        snprintf(why_not, why_bytes, "tensors are on the %s, NCCL is for CUDA", b->ops->name);
    else if (g.size == 1)
        snprintf(why_not, why_bytes, "one rank needs no NCCL");
    else
        return library_load(&l, why_not, why_bytes);
    return false;
}

/* Ends the communicator and what runs in it; the lock is held. */
static void abort_locked(struct coll_nccl_state *n)
{
    atomic_store(&n->aborted, true);
    if (n->comm) n->lib.ncclCommAbort(n->comm);
    n->comm = NULL;
}

static void nccl_abort(struct collective *c)
{
    struct coll_nccl_state *n = nccl_of(c);
    atomic_store(&n->aborted, true);
    pthread_mutex_lock(&n->lock);
    abort_locked(n);
    pthread_mutex_unlock(&n->lock);
}

static void *watch(void *context)
{
    struct coll_nccl_state *n = context;
    while (!atomic_load(&n->stop)) {
        int error = NCCL_SUCCESS;
        pthread_mutex_lock(&n->lock);
        if (n->comm) n->lib.ncclCommGetAsyncError(n->comm, &error);
        bool failed = error != NCCL_SUCCESS && error != NCCL_IN_PROGRESS;
        if (n->comm && failed) {
            log_warn("NCCL: a peer of rank %d is lost: %s", n->base.group.rank,
                     n->lib.ncclGetErrorString(error));
            abort_locked(n);
        }
        bool done = !n->comm;
        pthread_mutex_unlock(&n->lock);
        if (done) return NULL;
        if (n->boot.ended && n->boot.ended(n->boot.ctx)) {
            nccl_abort(&n->base);
            return NULL;
        }
        clock_sleep_us(WATCH_MS * 1000);
    }
    return NULL;
}

/* Waits until what was asked of NCCL is under way. result: of the call itself. */
static enum err settle(struct coll_nccl_state *n, int result, const char *what)
{
    int64_t start = clock_monotonic_us();
    while (result == NCCL_IN_PROGRESS) {
        pthread_mutex_lock(&n->lock);
        if (n->comm && !atomic_load(&n->aborted)) n->lib.ncclCommGetAsyncError(n->comm, &result);
        bool late = clock_monotonic_us() - start > (int64_t)n->timeout_ms * 1000;
        bool ended = n->boot.ended && n->boot.ended(n->boot.ctx);
        if (result == NCCL_IN_PROGRESS && (late || ended)) abort_locked(n);
        bool gone = !n->comm;
        pthread_mutex_unlock(&n->lock);
        if (gone && late)
            FAIL(ERR_PEER, "NCCL %s: no answer from a peer within %d ms", what, n->timeout_ms);
        if (gone) break;
        if (result == NCCL_IN_PROGRESS) clock_sleep_us(20);
    }
    if (result == NCCL_SUCCESS && !atomic_load(&n->aborted)) return OK;
    bool aborted = atomic_load(&n->aborted);
    nccl_abort(&n->base);
    FAIL(ERR_PEER, "NCCL %s: %s", what,
         aborted ? "the group has ended" : n->lib.ncclGetErrorString(result));
}

/* The communicator, locked; NULL and unlocked after an abort. */
static void *comm_acquire(struct coll_nccl_state *n)
{
    pthread_mutex_lock(&n->lock);
    if (n->comm) return n->comm;
    pthread_mutex_unlock(&n->lock);
    return NULL;
}

#define WITH_COMM(n, comm)                                                                         \
    void *comm = comm_acquire(n);                                                                  \
    if (!comm) FAIL(ERR_PEER, "NCCL: the group has ended")

static enum err comm_open(struct coll_nccl_state *n)
{
    struct nccl_id mine = {{0}}, ids[COLLECTIVE_RANKS_MAX];
    struct group g = n->base.group;
    int result;
    if (g.rank == 0 && (result = n->lib.ncclGetUniqueId(&mine)) != NCCL_SUCCESS)
        FAIL(ERR_DEVICE, "NCCL: %s", n->lib.ncclGetErrorString(result));
    TRY(n->boot.exchange(n->boot.ctx, "nccl-id", &mine, sizeof mine, ids));
    struct nccl_config config = {.size = sizeof config,
                                 .magic = 0xcafebeef,
                                 .version = 21800,
                                 .blocking = 0,
                                 .cga_cluster_size = INT_MIN,
                                 .ctas_min = INT_MIN,
                                 .ctas_max = INT_MIN,
                                 .split_share = INT_MIN};
    pthread_mutex_lock(&n->lock);
    result = n->lib.ncclCommInitRankConfig(&n->comm, g.size, ids[0], g.rank, &config);
    pthread_mutex_unlock(&n->lock);
    return settle(n, result, "joining");
}

static void nccl_close(struct collective *c)
{
    struct coll_nccl_state *n = c ? nccl_of(c) : NULL;
    if (!n) return;
    atomic_store(&n->stop, true);
    if (n->watched) pthread_join(n->watchman, NULL);
    if (n->comm && n->backend->ops->sync(n->backend) == OK) {
        int result = n->lib.ncclCommFinalize(n->comm);
        if (settle(n, result, "leaving") == OK) n->lib.ncclCommDestroy(n->comm);
    } else if (n->comm) {
        n->lib.ncclCommAbort(n->comm);
    }
    if (n->scratch) n->backend->ops->release(n->backend, n->scratch);
    pthread_mutex_destroy(&n->lock);
    mem_free(n);
}

static enum err nccl_open(struct backend *b, struct group g, const struct bootstrap *boot,
                          const struct collective_options *options, struct collective **out)
{
    struct coll_nccl_state *n;
    char why[160];
    enum err e;
    TRY(MEM_NEW(&n));
    n->base = (struct collective){&coll_nccl, g};
    n->backend = b;
    memcpy((void *)&n->boot, boot, sizeof *boot);
    n->timeout_ms = options->timeout_ms ? options->timeout_ms : TIMEOUT_MS_DEFAULT;
    pthread_mutex_init(&n->lock, NULL);
    if (!library_load(&n->lib, why, sizeof why)) FAIL_OUT(ERR_UNSUPPORTED, "NCCL: %s", why);
    n->scratch_bytes = options->gather_bytes_max;
    if (n->scratch_bytes) TRY_OUT(b->ops->alloc(b, n->scratch_bytes, (void **)&n->scratch));
    TRY_OUT(comm_open(n));
    n->watched = pthread_create(&n->watchman, NULL, watch, n) == 0;
    if (!n->watched) FAIL_OUT(ERR_INTERNAL, "NCCL: no thread to watch the peers");
out:
    if (e)
        nccl_close(&n->base);
    else
        *out = &n->base;
    return e;
}

static int type_of(enum dtype t)
{
    return t == DTYPE_F32 ? NCCL_FLOAT32 : t == DTYPE_F16 ? NCCL_FLOAT16 : NCCL_BFLOAT16;
}

static enum err nccl_all_reduce(struct collective *c, struct tensor out, struct tensor x)
{
    struct coll_nccl_state *n = nccl_of(c);
    ASSERT(x.stride == x.cols && out.stride == out.cols && out.cols == x.cols &&
           out.rows == x.rows);
    ASSERT(x.dtype == DTYPE_F32 || x.dtype == DTYPE_F16 || x.dtype == DTYPE_BF16);
    WITH_COMM(n, comm);
    int result = NCCL_SUCCESS;
    if (x.rows > 0 && x.cols > 0)
        result = n->lib.ncclAllReduce(x.data, out.data, (size_t)(x.rows * x.cols), type_of(x.dtype),
                                      NCCL_SUM, comm, n->backend->stream);
    pthread_mutex_unlock(&n->lock);
    return settle(n, result, "sum");
}

static enum err copy_rows(struct coll_nccl_state *n, void *to, size_t to_pitch, const void *from,
                          size_t from_pitch, size_t width, size_t rows)
{
    struct cu_copy_2d copy = {.src_type = CU_MEMORY_DEVICE,
                              .src_device = (uintptr_t)from,
                              .src_pitch = from_pitch,
                              .dst_type = CU_MEMORY_DEVICE,
                              .dst_device = (uintptr_t)to,
                              .dst_pitch = to_pitch,
                              .width = width,
                              .height = rows};
    if (!width || !rows || (to == from && to_pitch == from_pitch)) return OK;
    int result = n->lib.cuMemcpy2DAsync_v2(&copy, n->backend->stream);
    if (result) FAIL(ERR_DEVICE, "CUDA: copying rows: error %d", result);
    return OK;
}

/* Slices one after another in `staging`, each [rows][its columns]: mine is there, the others come.
 */
static int exchange_slices(struct coll_nccl_state *n, void *comm, uint8_t *staging, size_t rows,
                           size_t item, int type, const int32_t *start)
{
    int size = n->base.group.size, rank = n->base.group.rank, result = NCCL_SUCCESS;
    void *stream = n->backend->stream;
    bool even = true;
    for (int r = 0; r < size; r++)
        even &= start[r + 1] - start[r] == start[1];
    if (even)
        return n->lib.ncclAllGather(staging + rows * (size_t)start[rank] * item, staging,
                                    rows * (size_t)start[1], type, comm, stream);
    n->lib.ncclGroupStart();
    for (int r = 0; r < size; r++) {
        uint8_t *slice = staging + rows * (size_t)start[r] * item;
        size_t count = rows * (size_t)(start[r + 1] - start[r]);
        int one =
            count ? n->lib.ncclBroadcast(slice, slice, count, type, r, comm, stream) : NCCL_SUCCESS;
        if (one != NCCL_SUCCESS && one != NCCL_IN_PROGRESS) result = one;
    }
    int end = n->lib.ncclGroupEnd();
    return result != NCCL_SUCCESS ? result : end;
}

static enum err nccl_all_gather(struct collective *c, struct tensor out, struct tensor part,
                                const int32_t *start)
{
    struct coll_nccl_state *n = nccl_of(c);
    int size = c->group.size, rank = c->group.rank;
    size_t item = dtype_bytes(out.dtype), rows = (size_t)out.rows,
           pitch = (size_t)out.stride * item;
    size_t mine = (size_t)(start[rank + 1] - start[rank]) * item;
    ASSERT(part.rows == out.rows && part.dtype == out.dtype && start[size] == out.cols &&
           item != 1);
    ASSERT_CMP(part.cols, ==, start[rank + 1] - start[rank]);
    uint8_t *staging = rows <= 1 ? out.data : n->scratch;
    if (rows > 1 && rows * (size_t)out.cols * item > n->scratch_bytes)
        FAIL(ERR_TOO_LONG, "NCCL: a gather of %zu bytes, at most %zu",
             rows * (size_t)out.cols * item, n->scratch_bytes);
    TRY(copy_rows(n, staging + rows * (size_t)start[rank] * item, mine, part.data,
                  (size_t)part.stride * item, mine, rows));
    WITH_COMM(n, comm);
    int result = rows ? exchange_slices(n, comm, staging, rows, item, type_of(out.dtype), start)
                      : NCCL_SUCCESS;
    pthread_mutex_unlock(&n->lock);
    TRY(settle(n, result, "gather"));
    for (int r = 0; r < size && rows > 1; r++) {
        size_t width = (size_t)(start[r + 1] - start[r]) * item;
        TRY(copy_rows(n, (uint8_t *)out.data + (size_t)start[r] * item, pitch,
                      staging + rows * (size_t)start[r] * item, width, width, rows));
    }
    return OK;
}

static enum err nccl_broadcast(struct collective *c, void *mem, size_t bytes, int root)
{
    struct coll_nccl_state *n = nccl_of(c);
    WITH_COMM(n, comm);
    int result =
        bytes ? n->lib.ncclBroadcast(mem, mem, bytes, NCCL_INT8, root, comm, n->backend->stream)
              : NCCL_SUCCESS;
    pthread_mutex_unlock(&n->lock);
    return settle(n, result, "broadcast");
}

const struct collective_ops coll_nccl = {
    .name = "nccl",
    .probe = nccl_probe,
    .open = nccl_open,
    .all_reduce_sum = nccl_all_reduce,
    .all_gather = nccl_all_gather,
    .broadcast = nccl_broadcast,
    .close = nccl_close,
    .abort = nccl_abort,
};
