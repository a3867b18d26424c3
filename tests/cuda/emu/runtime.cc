/* A stand-in of the CUDA runtime on the CPU: memory of the host, streams that run late.
 *
 * A stream is a list of work that runs only when somebody waits for it, one piece for every question
 * cudaEventQuery asks. So the host code that reads results too early, refills pinned memory too soon
 * or passes a pointer of the wrong side fails here as it would on a GPU. Recording a graph keeps the
 * list instead. HEDDLE_FAKE_GPU sets what device is played: "sm=75", "driver=0", "devices=0",
 * "memory_mb=64", "overlap=0" (kernels launched to overlap are refused), "fail_now=N" (the N-th piece of work from now faults), "hang=1" (nothing ends any
 * more), "reset=1" (as after a new start of the process).
 *
 * HEDDLE_FAKE_GPU_LOG names a file to which it appends what the host asked for: "record N" (the N-th
 * event), "passed N" (the host has seen it passed), "capture", "graph", "waits" (a call that
 * blocks). HEDDLE_FAKE_GPU_ONCE names a file that a test makes: the first device to see it removes it
 * and, by its first word, has a "fault" or a "hang" from then on. */
#include "cuda_emu.h"
#include "race.h"

#include <unistd.h>

#include <chrono>
#include <deque>
#include <map>
#include <memory>
#include <mutex>

struct CUstream_st {
    std::deque<std::function<void()>> work;
    bool capturing = false, capture_broken = false;
    std::vector<std::function<void()>> captured;
};
struct CUevent_st {
    CUstream_st *stream = nullptr;
    bool recorded = false, reached = true, told = true, timed = false;
    std::chrono::steady_clock::time_point when;
    uint64_t generation = 0, number = 0;
};
struct CUgraph_st {
    std::vector<std::function<void()>> work;
};
struct CUgraphExec_st {
    std::vector<std::function<void()>> work;
};

/* One lock for the whole stand-in; work itself runs under it, as one device would. */
static std::recursive_mutex lock;
/* Never destroyed: memory left on a failed device stays reachable to the end. */
static std::map<uintptr_t, size_t> &device_memory = *new std::map<uintptr_t, size_t>;
static std::map<uintptr_t, size_t> &pinned_memory = *new std::map<uintptr_t, size_t>;
static size_t device_bytes;
static const size_t POISON_BYTES = 1 << 18; /* of each allocation: enough to see, not to wait for */
static cudaError_t sticky = cudaSuccess;
static long fail_countdown = -1;
static bool hung;
typedef std::lock_guard<std::recursive_mutex> guard;

long emu_setting(const char *name, long otherwise)
{
    const char *all = getenv("HEDDLE_FAKE_GPU");
    size_t n = strlen(name);
    for (const char *p = all; p && *p; p = strchr(p, ',') ? strchr(p, ',') + 1 : nullptr)
        if (!strncmp(p, name, n) && p[n] == '=') return atol(p + n + 1);
    return otherwise;
}

static bool within(const std::map<uintptr_t, size_t> &set, const void *p, size_t bytes)
{
    auto it = set.upper_bound((uintptr_t)p);
    if (it == set.begin()) return false;
    --it;
    return (uintptr_t)p + bytes <= it->first + it->second;
}

static void note(const char *what, uint64_t n)
{
    static const char *path = getenv("HEDDLE_FAKE_GPU_LOG");
    if (!path) return;
    FILE *f = fopen(path, "a");
    if (!f) return;
    fprintf(f, "%d %s %llu\n", (int)getpid(), what, (unsigned long long)n);
    fclose(f);
}

/* What a test asked of one device, whichever comes first. */
static void once(void)
{
    static const char *path = getenv("HEDDLE_FAKE_GPU_ONCE");
    char word[8] = "";
    if (!path || access(path, R_OK)) return;
    FILE *f = fopen(path, "r");
    if (!f) return;
    size_t n = fread(word, 1, sizeof word - 1, f);
    fclose(f);
    if (!n || unlink(path)) return; /* another device was first */
    if (word[0] == 'h') hung = true;
    else sticky = cudaErrorIllegalAddress;
}

/* Runs the oldest piece of work of a stream. False: nothing can run. */
static bool step(CUstream_st *s)
{
    once();
    if (s->work.empty() || hung || emu_setting("hang", 0)) return false;
    auto work = std::move(s->work.front());
    s->work.pop_front();
    if (emu_setting("fail_now", -1) < 0) fail_countdown = -1;
    else if (fail_countdown < 0) fail_countdown = emu_setting("fail_now", -1);
    else fail_countdown--;
    if (fail_countdown == 0) sticky = cudaErrorIllegalAddress;
    if (sticky == cudaSuccess) work();
    return true;
}
static void drain(CUstream_st *s)
{
    while (step(s)) {}
}
static cudaError_t queue(CUstream_st *s, std::function<void()> work)
{
    if (sticky != cudaSuccess) return sticky;
    if (s->capturing)
        s->captured.push_back(std::move(work));
    else
        s->work.push_back(std::move(work));
    return cudaSuccess;
}
static cudaError_t unsupported_in_capture(CUstream_st *s)
{
    s->capture_broken = true;
    return cudaErrorStreamCaptureUnsupported;
}

namespace emu
{
void enqueue(cudaStream_t stream, std::function<void()> work)
{
    guard hold(lock);
    queue(stream, std::move(work));
}
cudaError_t check_launch(dim3 grid, dim3 threads, size_t smem_bytes, bool overlap)
{
    guard hold(lock);
    if (overlap && (emu_setting("sm", 90) < 90 || !emu_setting("overlap", 1))) return cudaErrorNotSupported;
    unsigned n = threads.x * threads.y * threads.z;
    size_t limit = emu_setting("sm", 90) >= 90 ? 227 << 10 : emu_setting("sm", 90) == 80 ? 163 << 10 : 99 << 10;
    if (!n || n > THREADS_MAX || !grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535)
        return cudaErrorInvalidConfiguration;
    if (smem_bytes > limit) return cudaErrorInvalidValue;
    return sticky;
}
} // namespace emu

extern "C" {
const char *cudaGetErrorString(cudaError_t e)
{
    switch (e) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorIllegalAddress: return "an illegal memory access was encountered";
    case cudaErrorNotReady: return "device not ready";
    case cudaErrorNotSupported: return "operation not supported";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    default: return "invalid argument";
    }
}
cudaError_t cudaGetLastError(void) { return sticky; }
cudaError_t cudaDriverGetVersion(int *version)
{
    *version = (int)emu_setting("driver", CUDART_VERSION);
    if (emu_setting("reset", 0)) sticky = cudaSuccess;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int *count)
{
    if (emu_setting("driver", CUDART_VERSION) < CUDART_VERSION) return cudaErrorInsufficientDriver;
    *count = (int)emu_setting("devices", 1);
    return *count ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaSetDevice(int device)
{
    return device < emu_setting("devices", 1) ? cudaSuccess : cudaErrorInvalidDevice;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int)
{
    int sm = (int)emu_setting("sm", 90);
    switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = (int)emu_setting("n_sms", 4); break;
    case cudaDevAttrComputeCapabilityMajor: *value = sm / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = sm % 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (sm >= 90 ? 227 : sm == 80 ? 163 : 99) << 10; break;
    }
    return cudaSuccess;
}
cudaError_t cudaMemGetInfo(size_t *free, size_t *total)
{
    guard hold(lock);
    *total = (size_t)emu_setting("memory_mb", 1024) << 20;
    *free = *total - std::min(*total, device_bytes);
    return sticky;
}
cudaError_t cudaMalloc(void **out, size_t bytes)
{
    guard hold(lock);
    if (sticky != cudaSuccess) return sticky;
    if (device_bytes + bytes > (size_t)emu_setting("memory_mb", 1024) << 20) return cudaErrorMemoryAllocation;
    void *mem = aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (!mem) return cudaErrorMemoryAllocation;
    memset(mem, 0xff, std::min(bytes, POISON_BYTES)); /* what was not written reads as NaN */
    device_memory[(uintptr_t)mem] = bytes;
    device_bytes += bytes;
    *out = mem;
    return cudaSuccess;
}
cudaError_t cudaFree(void *mem)
{
    guard hold(lock);
    if (!mem) return cudaSuccess;
    auto it = device_memory.find((uintptr_t)mem);
    if (it == device_memory.end()) return cudaErrorInvalidValue;
    emu::race_forget(mem, it->second);
    device_bytes -= it->second;
    device_memory.erase(it);
    free(mem);
    return cudaSuccess;
}
cudaError_t cudaMallocHost(void **out, size_t bytes)
{
    guard hold(lock);
    void *mem = aligned_alloc(256, (bytes + 255) / 256 * 256);
    if (!mem) return cudaErrorMemoryAllocation;
    memset(mem, 0xff, std::min(bytes, POISON_BYTES));
    pinned_memory[(uintptr_t)mem] = bytes;
    *out = mem;
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void *mem)
{
    guard hold(lock);
    pinned_memory.erase((uintptr_t)mem);
    free(mem);
    return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned)
{
    *out = new CUstream_st;
    return sticky;
}
cudaError_t cudaStreamDestroy(cudaStream_t s)
{
    guard hold(lock);
    drain(s);
    delete s;
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t s)
{
    guard hold(lock);
    if (s->capturing) return unsupported_in_capture(s);
    note("waits", 0);
    drain(s);
    return sticky;
}
cudaError_t cudaStreamQuery(cudaStream_t s)
{
    guard hold(lock);
    if (s->capturing) return unsupported_in_capture(s);
    bool ran = step(s);
    return sticky != cudaSuccess ? sticky : ran || !s->work.empty() ? cudaErrorNotReady : cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned flags)
{
    *out = new CUevent_st;
    (*out)->timed = !(flags & cudaEventDisableTiming);
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t e)
{
    guard hold(lock);
    if (e && e->stream && !e->reached) drain(e->stream);
    delete e;
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s)
{
    guard hold(lock);
    e->stream = s;
    e->recorded = true;
    e->reached = false;
    static uint64_t n_records;
    uint64_t generation = ++e->generation;
    e->number = ++n_records;
    e->told = false;
    note("record", e->number);
    return queue(s, [=] {
        e->reached = e->generation == generation;
        e->when = std::chrono::steady_clock::now();
    });
}
cudaError_t cudaEventQuery(cudaEvent_t e)
{
    guard hold(lock);
    if (sticky == cudaSuccess && !e->reached) step(e->stream);
    if (sticky != cudaSuccess) return sticky;
    if (e->reached && !e->told) note("passed", e->number);
    e->told = e->reached;
    return e->reached ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t e)
{
    guard hold(lock);
    note("waits", e->number);
    while (!e->reached && step(e->stream)) {}
    return sticky;
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t from, cudaEvent_t to)
{
    guard hold(lock);
    if (!from->timed || !to->timed || !from->recorded || !to->recorded) return cudaErrorInvalidValue;
    if (!from->reached || !to->reached) return cudaErrorNotReady;
    *ms = std::chrono::duration<float, std::milli>(to->when - from->when).count();
    return sticky;
}

static bool sides_ok(const void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind)
{
    bool to_device = kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice;
    bool from_device = kind == cudaMemcpyDeviceToHost || kind == cudaMemcpyDeviceToDevice;
    return within(device_memory, to, bytes) == to_device && within(device_memory, from, bytes) == from_device;
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t s)
{
    return cudaMemcpy2DAsync(to, bytes, from, bytes, bytes, 1, kind, s);
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t s)
{
    guard hold(lock);
    if (!width || !height) return sticky;
    if (!sides_ok(to, from, 1, kind) || !sides_ok((char *)to + (height - 1) * to_pitch,
                                                  (const char *)from + (height - 1) * from_pitch, width, kind))
        return cudaErrorInvalidValue;
    auto copy = [=](const char *source, size_t pitch) {
        for (size_t i = 0; i < height; i++) memcpy((char *)to + i * to_pitch, source + i * pitch, width);
    };
    const void *host = kind == cudaMemcpyHostToDevice ? from : kind == cudaMemcpyDeviceToHost ? to : nullptr;
    bool pageable = host && !within(pinned_memory, host, 1);
    if (pageable && s->capturing) return unsupported_in_capture(s);
    if (pageable && kind == cudaMemcpyHostToDevice) { /* read before the call returns */
        auto staged = std::make_shared<std::vector<char>>(width * height);
        for (size_t i = 0; i < height; i++)
            memcpy(staged->data() + i * width, (const char *)from + i * from_pitch, width);
        return queue(s, [=] { copy(staged->data(), width); });
    }
    cudaError_t e = queue(s, [=] { copy((const char *)from, from_pitch); });
    if (pageable && e == cudaSuccess) drain(s);
    return sticky != cudaSuccess ? sticky : e;
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t bytes, cudaStream_t s)
{
    guard hold(lock);
    if (bytes && !within(device_memory, to, bytes)) return cudaErrorInvalidValue;
    return queue(s, [=] { memset(to, value, bytes); });
}
cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode)
{
    guard hold(lock);
    if (s->capturing) return cudaErrorInvalidValue;
    note("capture", 0);
    s->capturing = true;
    s->capture_broken = false;
    s->captured.clear();
    return sticky;
}
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *out)
{
    guard hold(lock);
    if (!s->capturing) return cudaErrorInvalidValue;
    s->capturing = false;
    if (s->capture_broken) {
        *out = nullptr;
        return cudaErrorStreamCaptureInvalidated;
    }
    *out = new CUgraph_st{std::move(s->captured)};
    return sticky;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *out, cudaGraph_t graph, unsigned long long)
{
    *out = new CUgraphExec_st{graph->work};
    return sticky;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t s)
{
    guard hold(lock);
    note("graph", graph->work.size());
    for (auto &w : graph->work) queue(s, w);
    return sticky;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph)
{
    delete graph;
    return cudaSuccess;
}
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph)
{
    delete graph;
    return cudaSuccess;
}
void emu_stream_call(cudaStream_t s, void (*work)(void *), void *context, size_t context_bytes)
{
    auto kept = std::make_shared<std::vector<char>>((char *)context, (char *)context + context_bytes);
    guard hold(lock);
    queue(s, [=] { work(kept->data()); });
}
} // extern "C"
