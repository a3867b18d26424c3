/* The operations that are one kernel each: shapes checked, empty ones skipped, errors remembered.
 */
#include "kernels/cuda/cuda.h"

#define LAUNCHED(b, call, what) cuda_ok((b), (cudaError_t)(call), (what))

void cuda_embed(struct backend *base, struct tensor out, const struct weight *table,
                const struct batch *batch)
{
    struct cuda_backend *b = cuda_of(base);
    (void)batch;
    cuda_written(b, out);
    if (b->failed || !out.rows) return;
    LAUNCHED(b, launch_embed(out, table->data, table->n_out, b->batch.token_ids, b->stream),
             "embed");
}

void cuda_add_positions(struct backend *base, struct tensor x, const struct weight *table,
                        int offset, const struct batch *batch)
{
    struct cuda_backend *b = cuda_of(base);
    (void)batch;
    cuda_written(b, x);
    if (b->failed || !x.rows) return;
    LAUNCHED(
        b,
        launch_add_positions(x, table->data, table->n_out, offset, b->batch.positions, b->stream),
        "add_positions");
}

void cuda_add_norm(struct backend *base, struct tensor x, struct tensor delta,
                   const struct norm_args *args, struct tensor out)
{
    struct cuda_backend *b = cuda_of(base);
    ASSERT(!delta.data || (delta.cols == x.cols && delta.rows == x.rows));
    ASSERT(out.cols == x.cols && out.rows == x.rows);
    cuda_written(b, x);
    cuda_written(b, out);
    if (b->failed || !x.rows) return;
    LAUNCHED(b, launch_add_norm(x, delta, args, out, cuda_quantize_target(b, out), b->stream),
             "add_norm");
}

void cuda_add(struct backend *base, struct tensor x, struct tensor y)
{
    struct cuda_backend *b = cuda_of(base);
    ASSERT(x.cols == y.cols && x.rows == y.rows && x.dtype == y.dtype);
    cuda_written(b, x);
    if (b->failed || !x.rows) return;
    LAUNCHED(b, launch_add(x, y, b->stream), "add");
}

void cuda_scale(struct backend *base, struct tensor x, float by, float softcap)
{
    struct cuda_backend *b = cuda_of(base);
    cuda_written(b, x);
    if (b->failed || !x.rows || !x.cols) return;
    LAUNCHED(b, launch_scale(x, by, softcap, b->stream), "scale");
}

void cuda_activate(struct backend *base, struct tensor out, struct tensor in, enum activation kind,
                   bool gated)
{
    struct cuda_backend *b = cuda_of(base);
    ASSERT(in.cols == (gated ? 2 : 1) * out.cols && in.rows == out.rows);
    cuda_written(b, out);
    if (b->failed || !out.rows || !out.cols) return;
    LAUNCHED(b, launch_activate(out, in, kind, gated, cuda_quantize_target(b, out), b->stream),
             "activate");
}

void cuda_gather(struct backend *base, struct tensor out, struct tensor x,
                 const struct batch *batch)
{
    struct cuda_backend *b = cuda_of(base);
    cuda_written(b, out);
    if (b->failed || !batch->n_rows_out) return;
    ASSERT(out.cols == x.cols && out.dtype == x.dtype && out.rows >= batch->n_rows_out);
    out.rows = batch->n_rows_out;
    LAUNCHED(b, launch_gather(out, x, b->batch.rows_out, b->stream), "gather");
}
