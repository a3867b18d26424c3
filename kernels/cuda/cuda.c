/* The table of the CUDA backend. */
#include "kernels/backend.h"
#include "kernels/cuda/probe.h"

static enum err cuda_open(const struct backend_options *options, struct backend **out)
{
    int capability;
    (void)out;
    TRY(cuda_probe(options->device, &capability));
    FAIL(ERR_DEVICE, "CUDA declined: its kernels are not built yet");
}

const struct backend_ops heddle_backend_cuda = {
    .abi = BACKEND_ABI,
    .name = "cuda",
    .open = cuda_open,
};
