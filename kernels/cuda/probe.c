/* Whether a GPU can be used, and if not, why: one clear line. Knows versions, never kernels. */
#include "kernels/cuda/probe.h"

#include <cuda_runtime.h>
#include <stdlib.h>

enum { CAPABILITY_MIN = 80 };

static enum err no_devices(cudaError_t result, int driver)
{
    int runtime = CUDART_VERSION;
    if (driver == 0) FAIL(ERR_DEVICE, "CUDA declined: no NVIDIA driver");
    if (result == cudaErrorInsufficientDriver)
        FAIL(ERR_DEVICE,
             "CUDA declined: the NVIDIA driver is too old: it offers CUDA %d.%d, needs %d.%d",
             driver / 1000, driver % 1000 / 10, runtime / 1000, runtime % 1000 / 10);
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    if (result == cudaErrorNoDevice || result == cudaSuccess)
        FAIL(ERR_DEVICE, "CUDA declined: the driver sees no GPU%s%s",
             visible ? " with CUDA_VISIBLE_DEVICES=" : "", visible ? visible : "");
    FAIL(ERR_DEVICE, "CUDA declined: %s", cudaGetErrorString(result));
}

enum err cuda_probe(int device, int *out_capability)
{
    int driver = 0, count = 0, major = 0, minor = 0;
    cudaDriverGetVersion(&driver);
    cudaError_t result = cudaGetDeviceCount(&count);
    if (result != cudaSuccess || count == 0) return no_devices(result, driver);
    if (device < 0 || device >= count)
        FAIL(ERR_DEVICE, "CUDA declined: GPU %d does not exist, the driver sees %d", device, count);
    result = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (result == cudaSuccess)
        result = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    if (result != cudaSuccess)
        FAIL(ERR_DEVICE, "CUDA declined: GPU %d: %s", device, cudaGetErrorString(result));
    int capability = major * 10 + minor;
    if (capability < CAPABILITY_MIN)
        FAIL(ERR_DEVICE, "CUDA declined: GPU %d is sm_%d, needs sm_%d", device, capability,
             CAPABILITY_MIN);
    *out_capability = capability;
    return OK;
}
