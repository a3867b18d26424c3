/* The instructions that C++ has no name for. tests/cuda/emu/cuda_emu.h has a twin of each. */
#pragma once
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#define LAUNCH(kernel, grid, threads, smem, stream, ...)                                            \
    launch_real(kernel, grid, threads, smem, (cudaStream_t)(stream), __VA_ARGS__)

/* More than 48 KiB of shared memory must be asked for; asking again costs a table lookup. The launch's
 * own status counts: cudaGetLastError would also tell of a question whose answer was "not ready". */
template <class... P, class... A>
static cudaError_t launch_real(void (*kernel)(P...), dim3 grid, dim3 threads, size_t smem, cudaStream_t stream, A... args)
{
    if (smem > 48 << 10) {
        cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem);
        if (e != cudaSuccess) return e;
    }
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid, config.blockDim = threads;
    config.dynamicSmemBytes = smem, config.stream = stream;
    config.attrs = &overlap, config.numAttrs = kernels_overlap ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, args...);
}

/* A kernel may begin before the one before it in the stream has ended (kernels_overlap): its blocks
 * come up, and what no kernel writes may be read. Every thread waits here before it touches anything
 * else, and none ends without having waited: so the end of a kernel is the end of all before it.
 * PTX ISA, "griddepcontrol"; nothing before sm_90. */
static __device__ __forceinline__ void dependency_wait()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

static __device__ __forceinline__ uint32_t shared_address(const void *p)
{
    return (uint32_t)__cvta_generic_to_shared(p);
}
static __device__ __forceinline__ void cp_async16(void *to, const void *from)
{
    asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
/* Zeros instead of the 16 bytes when take is false; from must still be a valid address. */
static __device__ __forceinline__ void cp_async16_or_zero(void *to, const void *from, bool take)
{
    asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(take ? 16 : 0)
                 : "memory");
}
static __device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> static __device__ __forceinline__ void cp_async_wait()
{
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}
static __device__ __forceinline__ void ldmatrix_x4(uint32_t *r, const void *p)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p))
                 : "memory");
}
static __device__ __forceinline__ void ldmatrix_x4_trans(uint32_t *r, const void *p)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p))
                 : "memory");
}
static __device__ __forceinline__ void mma_bf16_16816(float *d, const uint32_t *a, const uint32_t *b)
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/* E4M3, saturating. */
static __device__ __forceinline__ uint8_t fp8_encode(float v)
{
    return __nv_cvt_float_to_fp8(v, __NV_SATFINITE, __NV_E4M3);
}
static __device__ __forceinline__ float fp8_decode(uint8_t v)
{
    return __half2float(__half(__nv_cvt_fp8_to_halfraw(v, __NV_E4M3)));
}

/* mbarrier and the one-dimensional bulk copy: sm_90 and newer. */
struct alignas(8) mbar {
    uint64_t word;
};
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define HAVE_BULK_COPY 1
static __device__ __forceinline__ void mbar_init(mbar *b, int count)
{
    asm volatile("mbarrier.init.shared.b64 [%0],%1;" ::"r"(shared_address(b)), "r"(count) : "memory");
}
static __device__ __forceinline__ void mbar_expect(mbar *b, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _,[%0],%1;" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
static __device__ __forceinline__ void mbar_wait(mbar *b, int parity)
{
    asm volatile("{.reg .pred p;\nWAIT_%=:\nmbarrier.try_wait.parity.shared.b64 p,[%0],%1;\n@!p bra WAIT_%=;\n}" ::"r"(
                     shared_address(b)),
                 "r"(parity)
                 : "memory");
}
static __device__ __forceinline__ void bulk_copy(void *to, const void *from, int bytes, mbar *b)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(b))
                 : "memory");
}
static __device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
#else
#define HAVE_BULK_COPY 0
#endif
