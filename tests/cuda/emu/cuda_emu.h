/* CUDA C++ kernels on the CPU: the device side of the language for a plain C++ compiler.
 *
 * One fiber a CUDA thread, blocks one after another (or over OS threads), warp operations performed
 * by the last lane that arrives. Made to find mistakes, not to be fast:
 *   - shared memory is filled with NaNs before every block, and a guard behind it is checked;
 *   - cp.async and bulk copies land only when they are waited for;
 *   - a thread that ends without having waited for the kernels before its own stops the program, and
 *     where races are watched, so does one that touches what kernels write before it has waited;
 *   - a barrier that not all threads reach, or that they reach at two lines, a wrong mask, a lane
 *     that reads from outside the mask: the program stops and says which threads wait where;
 *   - AddressSanitizer sees every access to global memory, ThreadSanitizer the races of a block.
 * Rules for kernels: launch by LAUNCH, PTX only through the wrappers below, shared memory only
 * through cuda_smem. Not emulated: weak memory order, bank conflicts, occupancy, time. */
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <tuple>
#include <vector>

#include "cuda_runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline /* left to the compiler: unrolled and checked, all in one would compile for minutes */
#define __align__(n)    __attribute__((aligned(n)))
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct uint3 {
    unsigned x, y, z;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

/* The one buffer of dynamic shared memory; SMEM_BYTES_MAX is what sm_90 lends a block. */
enum { SMEM_BYTES_MAX = 227 << 10, SMEM_GUARD_BYTES = 1024 };
extern thread_local unsigned char cuda_smem[SMEM_BYTES_MAX + SMEM_GUARD_BYTES];

namespace emu
{
enum { WARP = 32, STACK_BYTES = 64 << 10, THREADS_MAX = 1024 };
enum operation { OP_NONE, OP_SHUFFLE, OP_BALLOT, OP_SYNCWARP, OP_LDMATRIX, OP_LDMATRIX_TRANS, OP_MMA_BF16, OP_BARRIER_WAIT };

struct pending { /* what a lane waits for together with its warp */
    uint32_t mask;
    operation kind;
    int source;
    uint64_t in, out;
    const void *p;
    void *q;
};
struct copy {
    void *to;
    const void *from;
    int bytes, from_bytes;
};
struct fiber {
    void *stack_pointer;
    uint3 index;
    int linear;
    bool done;
    const char *where;
    bool waited; /* for the kernels before this one */
    pending op;
    std::vector<copy> open;
    std::vector<std::vector<copy>> groups;
    void *tsan;
};
struct mbarrier {
    int count, pending, phase, bytes;
};
struct block {
    fiber fibers[THREADS_MAX];
    char *stacks;
    int n_threads, n_warps, n_live, n_at_barrier;
    const char *barrier_where;
    void *main_stack_pointer, *main_tsan;
    uint32_t runnable[THREADS_MAX / WARP], arrived[THREADS_MAX / WARP][WARP];
    std::vector<std::pair<mbarrier *, copy>> bulk;
    const std::function<void()> *entry;
};
extern __thread block *now;
extern __thread fiber *current;
extern __thread uint3 block_index, block_dim, grid_dim;

void sync_threads(const char *where);
void dependency_wait();
uint64_t collective(uint32_t mask, operation kind, uint64_t in, int source, const void *p, void *q,
                    const char *where);
void copy_start(void *to, const void *from, int bytes, int from_bytes);
void copy_commit();
void copy_wait(int groups_left);
void barrier_init(mbarrier *b, int count);
void barrier_arrive(mbarrier *b, int bytes);
void barrier_wait(mbarrier *b, int parity, const char *where);
void bulk_start(void *to, const void *from, int bytes, mbarrier *b);
/* Runs a whole grid at once; used by the stand-in of the runtime when a stream comes to it. */
void run_grid(dim3 grid, dim3 threads, size_t smem_bytes, const std::function<void()> &entry);
/* Queues a grid on a stream of the stand-in runtime. */
void enqueue(cudaStream_t stream, std::function<void()> work);
cudaError_t check_launch(dim3 grid, dim3 threads, size_t smem_bytes, bool overlap);

template <class T> T shuffle(uint32_t mask, T v, int source, const char *where)
{
    static_assert(sizeof(T) <= 8, "a shuffle moves 8 bytes at most");
    uint64_t in = 0;
    memcpy(&in, &v, sizeof v);
    uint64_t out = collective(mask, OP_SHUFFLE, in, source, nullptr, nullptr, where);
    T r;
    memcpy(&r, &out, sizeof r);
    return r;
}

template <class... P, class... A>
cudaError_t launch(bool overlap, void (*kernel)(P...), dim3 grid, dim3 threads, size_t smem, cudaStream_t stream, A... args)
{
    cudaError_t e = check_launch(grid, threads, smem, overlap);
    if (e != cudaSuccess) return e;
    std::tuple<P...> bound(static_cast<P>(args)...); /* arguments are read at the launch, as on a GPU */
    enqueue(stream, [=] { run_grid(grid, threads, smem, [&] { std::apply(kernel, bound); }); });
    return cudaSuccess;
}
} // namespace emu

#define threadIdx (emu::current->index)
#define blockIdx  emu::block_index
#define blockDim  emu::block_dim
#define gridDim   emu::grid_dim

/* An address that is different at every place of the source, and says which. */
#define EMU_TEXT2(x) #x
#define EMU_TEXT(x)  EMU_TEXT2(x)
#define EMU_HERE                                                                                    \
    ([]() -> const char * {                                                                         \
        static const char here[] = __FILE__ ":" EMU_TEXT(__LINE__);                                 \
        return here;                                                                                \
    }())
#define EMU_LANE (emu::current->linear & 31)

#define __syncthreads() emu::sync_threads(EMU_HERE)
#define __syncwarp(...) ((void)emu::collective(0xffffffffu, emu::OP_SYNCWARP, 0, 0, nullptr, nullptr, EMU_HERE))
#define __shfl_sync(m, v, s)     emu::shuffle(m, v, (s)&31, EMU_HERE)
#define __shfl_xor_sync(m, v, x) emu::shuffle(m, v, EMU_LANE ^ (x), EMU_HERE)
#define __shfl_up_sync(m, v, d)                                                                     \
    emu::shuffle(m, v, EMU_LANE < (int)(d) ? EMU_LANE : EMU_LANE - (int)(d), EMU_HERE)
#define __shfl_down_sync(m, v, d)                                                                   \
    emu::shuffle(m, v, EMU_LANE + (int)(d) > 31 ? EMU_LANE : EMU_LANE + (int)(d), EMU_HERE)
#define __ballot_sync(m, p)                                                                         \
    ((unsigned)emu::collective(m, emu::OP_BALLOT, (p) ? 1 : 0, 0, nullptr, nullptr, EMU_HERE))
#define __any_sync(m, p) (__ballot_sync(m, p) != 0)

#define LAUNCH(kernel, grid, threads, smem, stream, ...)                                            \
    emu::launch(kernels_overlap, kernel, grid, threads, smem, (cudaStream_t)(stream), __VA_ARGS__)

/* --- scalar types and functions ------------------------------------------------------------ */
struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};
static inline uint32_t __float_as_uint(float f)
{
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}
static inline float __uint_as_float(uint32_t u)
{
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static inline float __bfloat162float(__nv_bfloat16 h) { return __uint_as_float((uint32_t)h.bits << 16); }
static inline __nv_bfloat16 __float2bfloat16_rn(float f)
{
    uint32_t u = __float_as_uint(f);
    if (f != f) return {0x7fff};
    return {(uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}
static inline float __half2float(__half h)
{
    _Float16 v;
    memcpy(&v, &h.bits, 2);
    return (float)v;
}
static inline __half __float2half_rn(float f)
{
    _Float16 v = (_Float16)f;
    __half h;
    memcpy(&h.bits, &v, 2);
    return h;
}
float emu_fp8_decode(uint8_t v);
uint8_t emu_fp8_encode(float v);

template <class T> static inline T __ldg(const T *p) { return *p; }
#define __expf(x) expf(x)
#define __logf(x) logf(x)
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline float __fdividef(float a, float b) { return a / b; }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
using std::max;
using std::min;

template <class T> static inline T atomicAdd(T *p, T v)
{
    std::atomic_ref<T> a(*p);
    return a.fetch_add(v);
}
static inline int atomicExch(int *p, int v) { return std::atomic_ref<int>(*p).exchange(v); }
static inline float atomicExch(float *p, float v) { return std::atomic_ref<float>(*p).exchange(v); }

/* --- the PTX wrappers that kernels may use (kernels/cuda/ptx.cuh has the real ones) ---------- */
static inline void cp_async16(void *to, const void *from) { emu::copy_start(to, from, 16, 16); }
static inline void cp_async16_or_zero(void *to, const void *from, bool take)
{
    emu::copy_start(to, from, 16, take ? 16 : 0);
}
static inline void cp_async_commit() { emu::copy_commit(); }
template <int N> static inline void cp_async_wait() { emu::copy_wait(N); }
#define ldmatrix_x4(r, p)                                                                           \
    ((void)emu::collective(0xffffffffu, emu::OP_LDMATRIX, 0, 0, p, r, EMU_HERE))
#define ldmatrix_x4_trans(r, p)                                                                     \
    ((void)emu::collective(0xffffffffu, emu::OP_LDMATRIX_TRANS, 0, 0, p, r, EMU_HERE))
struct emu_mma {
    const uint32_t *a, *b;
};
#define mma_bf16_16816(d, a_, b_)                                                                   \
    do {                                                                                            \
        emu_mma operands_{a_, b_};                                                                  \
        emu::collective(0xffffffffu, emu::OP_MMA_BF16, 0, 0, &operands_, d, EMU_HERE);              \
    } while (0)

typedef emu::mbarrier mbar;
static inline void mbar_init(mbar *b, int count) { emu::barrier_init(b, count); }
static inline void mbar_expect(mbar *b, int bytes) { emu::barrier_arrive(b, bytes); }
#define mbar_wait(b, parity) emu::barrier_wait(b, parity, EMU_HERE)
static inline void bulk_copy(void *to, const void *from, int bytes, mbar *b) { emu::bulk_start(to, from, bytes, b); }
static inline void fence_async() {}
static inline void dependency_wait() { emu::dependency_wait(); }
#define HAVE_BULK_COPY 1
