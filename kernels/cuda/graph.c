/* One step's operations recorded and replayed: a graph for each size of batch.
 *
 * batch_begin, sample, step_end stay outside: they carry the host's numbers of one step. A graph
 * serves every step of the same shape whose sequences have one token each; a step that reads a
 * prompt refuses to be recorded. */
#include "base/mem.h"
#include "kernels/cuda/cuda.h"

struct graph {
    cudaGraphExec_t exec;
    int group; /* its attention reads a list of tiles made for heads in groups of so many; 0 = none
                */
};

enum err cuda_capture_begin(struct backend *base)
{
    struct cuda_backend *b = cuda_of(base);
    if (b->failed) FAIL(b->failed, "%s", b->why);
    TRY(cuda_check(cudaStreamBeginCapture(b->stream, cudaStreamCaptureModeThreadLocal),
                   "recording a graph"));
    b->capturing = true;
    b->quantized.of = NULL; /* what is recorded makes its codes itself, each time */
    b->capture_refused = false;
    return OK;
}

enum err cuda_capture_end(struct backend *base, void **out_graph)
{
    struct cuda_backend *b = cuda_of(base);
    cudaGraph_t graph = NULL;
    cudaGraphExec_t exec = NULL;
    cudaError_t result = cudaStreamEndCapture(b->stream, &graph);
    b->capturing = false;
    b->quantized.of = NULL;
    if (b->failed) { /* what cannot be recorded may still run */
        b->failed = OK;
        if (graph) cudaGraphDestroy(graph);
        FAIL(ERR_UNSUPPORTED, "recording a graph: %s", b->why);
    }
    if (result == cudaSuccess && !b->capture_refused)
        result = cudaGraphInstantiate(&exec, graph, 0);
    if (graph) cudaGraphDestroy(graph);
    if (b->capture_refused)
        FAIL(ERR_UNSUPPORTED, "a step that reads a prompt cannot be recorded as a graph");
    TRY(cuda_check(result, "recording a graph"));
    struct graph *g;
    enum err e = MEM_NEW(&g);
    if (e) {
        cudaGraphExecDestroy(exec);
        return e;
    }
    *g = (struct graph){exec, b->tiles_group};
    *out_graph = g;
    return OK;
}

enum err cuda_replay(struct backend *base, void *graph)
{
    struct cuda_backend *b = cuda_of(base);
    const struct graph *g = graph;
    b->quantized.of = NULL;
    if (!b->failed) cuda_tiles_prepare(b, &b->batch_host, g->group);
    if (!b->failed) cuda_ok(b, cudaGraphLaunch(g->exec, b->stream), "replaying a graph");
    if (b->failed) FAIL(b->failed, "%s", b->why);
    return OK;
}

void cuda_graph_destroy(struct backend *base, void *graph)
{
    struct graph *g = graph;
    if (!g) return;
    cuda_quiesce(cuda_of(base));
    if (!cuda_of(base)->failed) cudaGraphExecDestroy(g->exec);
    mem_free(g);
}
