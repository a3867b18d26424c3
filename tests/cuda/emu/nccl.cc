/* A stand-in of NCCL on the CPU: ranks are processes of one machine that meet in shared memory.
 *
 * An operation runs when its stream comes to it, and waits there for the peers as a kernel would,
 * until all have come or the communicator is aborted. Joining does not block, as with
 * config.blocking = 0. A peer whose process is gone is an asynchronous error. */
#include "cuda_emu.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

enum { RANKS_MAX = 16, SLOT_BYTES = 1 << 20, SUCCESS = 0, IN_PROGRESS = 7, REMOTE_ERROR = 6 };

struct meeting {
    std::atomic<int> joined, pids[RANKS_MAX];
    std::atomic<uint64_t> arrived[RANKS_MAX], left[RANKS_MAX];
    unsigned char slots[RANKS_MAX][SLOT_BYTES];
};
struct unique_id {
    char bytes[128];
};
struct comm {
    meeting *m;
    int rank, size;
    uint64_t n_ops;
    std::atomic<bool> aborted;
    unique_id id;
};
struct operation {
    comm *c;
    int kind, type, root; /* kind 0 sum, 1 gather, 2 broadcast */
    const void *send;
    void *out;
    size_t n;
};

static size_t type_bytes(int t) { return t == 0 ? 1 : t == 7 ? 4 : 2; }
static float get(const void *p, int t, size_t i)
{
    return t == 7 ? ((const float *)p)[i] : t == 6 ? __half2float(((const __half *)p)[i]) : __bfloat162float(((const __nv_bfloat16 *)p)[i]);
}
static void put(void *p, int t, size_t i, float v)
{
    if (t == 7) ((float *)p)[i] = v;
    else if (t == 6) ((__half *)p)[i] = __float2half_rn(v);
    else ((__nv_bfloat16 *)p)[i] = __float2bfloat16_rn(v);
}

/* True when everybody has come to this point; false after an abort. */
static bool meet(comm *c, std::atomic<uint64_t> *counters)
{
    uint64_t mine = ++counters[c->rank];
    for (int r = 0; r < c->size; r++)
        while (counters[r] < mine) {
            if (c->aborted) return false;
            usleep(50);
        }
    return !c->aborted;
}

static void run(operation *op)
{
    comm *c = op->c;
    size_t bytes = op->n * type_bytes(op->type);
    for (size_t done = 0; done < bytes; done += SLOT_BYTES) {
        size_t part = std::min(bytes - done, (size_t)SLOT_BYTES), n = part / type_bytes(op->type);
        if (op->kind != 2 || c->rank == op->root) memcpy(c->m->slots[c->rank], (const char *)op->send + done, part);
        if (!meet(c, c->m->arrived)) return;
        for (size_t i = 0; i < n && op->kind == 0; i++) {
            float sum = 0;
            for (int r = 0; r < c->size; r++) sum += get(c->m->slots[r], op->type, i);
            put((char *)op->out + done, op->type, i, sum);
        }
        for (int r = 0; r < c->size && op->kind == 1; r++) memcpy((char *)op->out + (size_t)r * bytes + done, c->m->slots[r], part);
        if (op->kind == 2) memcpy((char *)op->out + done, c->m->slots[op->root], part);
        if (!meet(c, c->m->left)) return;
    }
}

static int start(operation op, cudaStream_t stream)
{
    emu_stream_call(stream, [](void *p) { run((operation *)p); }, &op, sizeof op);
    return SUCCESS;
}

extern "C" {
int ncclGetVersion(int *version)
{
    *version = (int)emu_setting("nccl", 22809);
    return SUCCESS;
}
const char *ncclGetErrorString(int result)
{
    return result == SUCCESS ? "no error" : result == REMOTE_ERROR ? "remote process exited or there was a network error" : "error";
}
int ncclGetUniqueId(unique_id *id)
{
    static int n;
    memset(id, 0, sizeof *id);
    snprintf(id->bytes, sizeof id->bytes, "/heddle-fake-nccl-%d-%d", (int)getpid(), n++);
    shm_unlink(id->bytes); /* of a killed process that had this number */
    return SUCCESS;
}
int ncclCommInitRankConfig(comm **out, int size, unique_id id, int rank, const size_t *config)
{
    if (*config != 48 || ((const unsigned *)config)[2] != 0xcafebeefu) return 4;
    int fd = shm_open(id.bytes, O_RDWR | O_CREAT, 0600);
    if (fd < 0 || ftruncate(fd, sizeof(meeting))) return 2;
    meeting *m = (meeting *)mmap(nullptr, sizeof(meeting), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (m == MAP_FAILED) return 2;
    m->pids[rank] = getpid();
    if (++m->joined == size) shm_unlink(id.bytes);
    *out = new comm{m, rank, size, 0, {false}, id};
    return IN_PROGRESS;
}
int ncclCommGetAsyncError(comm *c, int *error)
{
    *error = c->m->joined < c->size ? IN_PROGRESS : SUCCESS;
    for (int r = 0; r < c->size; r++)
        if (c->m->pids[r] && kill(c->m->pids[r], 0)) *error = REMOTE_ERROR;
    return SUCCESS;
}
int ncclCommAbort(comm *c)
{
    if (c->m->joined < c->size) shm_unlink(c->id.bytes);
    c->aborted = true; /* its memory stays: work in the stream may still look at it */
    return SUCCESS;
}
int ncclCommFinalize(comm *) { return SUCCESS; }
int ncclCommDestroy(comm *c)
{
    munmap(c->m, sizeof(meeting));
    delete c;
    return SUCCESS;
}
int ncclGroupStart(void) { return SUCCESS; }
int ncclGroupEnd(void) { return SUCCESS; }
int ncclAllReduce(const void *send, void *out, size_t n, int type, int, comm *c, cudaStream_t stream)
{
    return start({c, 0, type, 0, send, out, n}, stream);
}
int ncclAllGather(const void *send, void *out, size_t n, int type, comm *c, cudaStream_t stream)
{
    return start({c, 1, type, 0, send, out, n}, stream);
}
int ncclBroadcast(const void *send, void *out, size_t n, int type, int root, comm *c, cudaStream_t stream)
{
    return start({c, 2, type, root, send, out, n}, stream);
}

/* The driver's one function that Heddle uses. */
struct copy_2d {
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
int cuMemcpy2DAsync_v2(const copy_2d *c, cudaStream_t stream)
{
    return cudaMemcpy2DAsync((void *)c->dst_device, c->dst_pitch, (const void *)c->src_device, c->src_pitch, c->width,
                             c->height, cudaMemcpyDeviceToDevice, stream);
}
}
