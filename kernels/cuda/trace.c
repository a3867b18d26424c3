/* The timeline of steps, by the device's own clock: when it began each, and when its last kernel
 * had ended. HEDDLE_CUDA_TRACE=FILE switches it on; without it nothing is recorded.
 *
 * One line a step, appended as it is delivered: device, ticket, tokens, sequences, microseconds
 * from its first kernel to its last, microseconds that no kernel ran before it (-1: the step before
 * is not known). Copies of the step's integers and of its results count as time without a kernel,
 * for that is what they are to who waits. */
#include "base/log.h"
#include "kernels/cuda/cuda.h"

#include <stdlib.h>

enum err cuda_trace_open(struct cuda_backend *b)
{
    const char *path = getenv("HEDDLE_CUDA_TRACE");
    if (!path || !*path) return OK;
    for (int i = 0; i < STEPS_IN_FLIGHT; i++) {
        struct cuda_step *s = &b->steps[i];
        TRY(cuda_check(cudaEventCreateWithFlags(&s->begun, cudaEventDefault), "making an event"));
        TRY(cuda_check(cudaEventCreateWithFlags(&s->worked, cudaEventDefault), "making an event"));
    }
    b->trace = fopen(path, "a");
    if (!b->trace) FAIL(ERR_IO, "HEDDLE_CUDA_TRACE: %s cannot be written", path);
    setvbuf(b->trace, NULL, _IOLBF, 0);
    return OK;
}

void cuda_trace_close(struct cuda_backend *b)
{
    if (b->trace) fclose(b->trace);
    b->trace = NULL;
    for (int i = 0; i < STEPS_IN_FLIGHT && !b->failed; i++) {
        if (b->steps[i].begun) cudaEventDestroy(b->steps[i].begun);
        if (b->steps[i].worked) cudaEventDestroy(b->steps[i].worked);
    }
}

void cuda_trace_begin(struct cuda_backend *b, struct cuda_step *s, const struct batch *batch)
{
    if (!b->trace || b->failed) return;
    s->n_tokens = batch->n_tokens;
    s->n_seqs = batch->n_seqs;
    s->is_traced = cuda_ok(b, cudaEventRecord(s->begun, b->stream), "the begin of a step");
}

void cuda_trace_worked(struct cuda_backend *b, struct cuda_step *s)
{
    if (b->trace && !b->failed)
        cuda_ok(b, cudaEventRecord(s->worked, b->stream), "the work of a step");
}

/* Steps are delivered in their order, so that the events of the one before are as they were. */
void cuda_trace_deliver(struct cuda_backend *b, struct cuda_step *s)
{
    const struct cuda_step *last = &b->steps[(s->ticket - 1) % STEPS_IN_FLIGHT];
    float busy = 0, idle = 0;
    if (!b->trace || b->failed || !s->is_traced) return;
    s->is_traced = false;
    s->ticket_traced = s->ticket;
    bool known = s->ticket > 1 && last->ticket_traced == s->ticket - 1 &&
                 cudaEventElapsedTime(&idle, last->worked, s->begun) == cudaSuccess;
    if (cudaEventElapsedTime(&busy, s->begun, s->worked) != cudaSuccess) return;
    fprintf(b->trace, "%d,%llu,%d,%d,%.1f,%.1f\n", b->options.device, (unsigned long long)s->ticket,
            s->n_tokens, s->n_seqs, (double)busy * 1e3, known ? (double)idle * 1e3 : -1);
}
