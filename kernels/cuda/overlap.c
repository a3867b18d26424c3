/* Whether kernels may begin before the one before them has ended: tried once, as they will be used.
 *
 * The way of launching (programmatic dependent launch, sm_90 and newer) must also be one that a
 * graph can hold, behind a kernel and behind a clearing of memory; a driver that refuses costs
 * speed and nothing else. HEDDLE_CUDA_OVERLAP=0 leaves it off, to see what it brings. */
#include "base/log.h"
#include "kernels/cuda/cuda.h"

#include <stdlib.h>
#include <string.h>

bool kernels_overlap;

/* Two kernels behind a clearing, recorded: the second one's token is what stays. */
static cudaError_t recorded(struct cuda_backend *b, cudaGraph_t *out)
{
    cudaError_t r = cudaStreamBeginCapture(b->stream, cudaStreamCaptureModeThreadLocal), end;
    if (r != cudaSuccess) return r;
    r = cudaMemsetAsync(b->feedback, 0xff, sizeof *b->feedback, b->stream);
    for (int32_t token = 1; token <= 2 && r == cudaSuccess; token++)
        r = (cudaError_t)launch_feed(b->feedback, 0, token, b->stream);
    end = cudaStreamEndCapture(b->stream, out);
    return r != cudaSuccess ? r : end;
}

static cudaError_t replayed(struct cuda_backend *b, cudaGraph_t graph, int32_t *out_token)
{
    cudaGraphExec_t exec = NULL;
    cudaError_t r = cudaGraphInstantiate(&exec, graph, 0);
    for (int i = 0; i < 2 && r == cudaSuccess; i++)
        r = cudaGraphLaunch(exec, b->stream);
    if (r == cudaSuccess)
        r = cudaMemcpyAsync(out_token, b->feedback, sizeof *out_token, cudaMemcpyDeviceToHost,
                            b->stream);
    if (r == cudaSuccess) r = cudaStreamSynchronize(b->stream);
    if (exec) cudaGraphExecDestroy(exec);
    return r;
}

enum err cuda_overlap_try(struct cuda_backend *b)
{
    const char *wanted = getenv("HEDDLE_CUDA_OVERLAP");
    cudaGraph_t graph = NULL;
    int32_t token = 0;
    kernels_overlap = b->capability >= 90 && !(wanted && !strcmp(wanted, "0"));
    if (!kernels_overlap) return OK;
    cudaError_t r = recorded(b, &graph);
    if (r == cudaSuccess) r = replayed(b, graph, &token);
    if (graph) cudaGraphDestroy(graph);
    kernels_overlap = r == cudaSuccess && token == 2;
    if (!kernels_overlap)
        log_info("CUDA: kernels follow each other without overlap: %s",
                 r != cudaSuccess ? cudaGetErrorString(r) : "a graph of them went wrong");
    return cuda_check(cudaMemsetAsync(b->feedback, 0, sizeof *b->feedback, b->stream),
                      "clearing memory");
}
