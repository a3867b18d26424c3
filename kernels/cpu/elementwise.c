/* Operations that look at one row at a time: embedding, norms, activations, sums.
 *
 * Rows are independent, so chunks of rows go to the pool when there is enough to do. Sums of a row
 * run in one fixed order, whatever the batch and the ISA: the loops are in rows_kernels.h. */
#include "kernels/cpu/cpu.h"
#include "kernels/half.h"

#include <string.h>

enum { CHUNK_ELEMENTS = 16384 };

struct row_args {
    struct tensor x, y, out;
    const struct weight *table;
    const struct batch *batch;
    const int32_t *feedback;
    const struct norm_args *norm;
    const struct row_kernels *kernels;
    float by, softcap;
    enum activation kind;
    bool gated;
    int offset;
    int64_t rows_per_chunk;
    void (*row)(const struct row_args *a, int64_t row);
};

static float *row_at(struct tensor t, int64_t row)
{
    return (float *)t.data + row * t.stride;
}

static void rows_chunk(const void *args, int chunk, void *scratch)
{
    const struct row_args *a = args;
    int64_t first = chunk * a->rows_per_chunk, end = first + a->rows_per_chunk;
    (void)scratch;
    for (int64_t r = first; r < end && r < a->out.rows; r++)
        a->row(a, r);
}

/* Runs a->row for every row of a->out. */
static void rows_run(struct backend *b, struct row_args *a)
{
    int64_t cols = a->out.cols > 0 ? a->out.cols : 1;
    a->rows_per_chunk = CHUNK_ELEMENTS / cols > 0 ? CHUNK_ELEMENTS / cols : 1;
    int64_t n = (a->out.rows + a->rows_per_chunk - 1) / a->rows_per_chunk;
    ASSERT_CMP(a->out.dtype, ==, DTYPE_F32);
    a->kernels = cpu_of(b)->rows;
    pool_run(cpu_of(b)->pool,
             &(struct pool_job){
                 .compute = rows_chunk, .args = a, .args_bytes = sizeof *a, .n_chunks = (int)n});
}

/* out[i] (+)= table[index][i] */
static void table_row(const struct weight *table, int64_t index, float *out, bool add)
{
    const struct matrix_view *v = &table->table;
    ASSERT_CMP(index, >=, 0);
    ASSERT_CMP(index, <, v->rows);
    size_t bytes = dtype_bytes(v->dtype);
    const uint8_t *row = (const uint8_t *)v->data + (size_t)(index * v->row_stride) * bytes;
    for (int64_t c = 0; c < v->cols; c++) {
        float x = v->data ? load_float(row + (size_t)(c * v->col_stride) * bytes, v->dtype) : 0.0f;
        out[c] = add ? out[c] + x : x;
    }
}

static void embed_row(const struct row_args *a, int64_t r)
{
    int32_t id = a->batch->token_ids[r];
    table_row(a->table, id < 0 ? a->feedback[a->batch->token_slot[r]] : id, row_at(a->out, r),
              false);
}

void cpu_embed(struct backend *b, struct tensor out, const struct weight *table,
               const struct batch *batch)
{
    ASSERT_CMP(out.cols, ==, table->table.cols);
    struct row_args a = {.out = out,
                         .table = table,
                         .batch = batch,
                         .feedback = cpu_of(b)->feedback,
                         .row = embed_row};
    rows_run(b, &a);
}

static void positions_row(const struct row_args *a, int64_t r)
{
    table_row(a->table, a->batch->positions[r] + a->offset, row_at(a->out, r), true);
}

void cpu_add_positions(struct backend *b, struct tensor x, const struct weight *table, int offset,
                       const struct batch *batch)
{
    ASSERT_CMP(x.cols, ==, table->table.cols);
    struct row_args a = {
        .out = x, .table = table, .batch = batch, .offset = offset, .row = positions_row};
    rows_run(b, &a);
}

static void norm_row(const struct row_args *a, int64_t r)
{
    a->kernels->norm(row_at(a->x, r), a->y.data ? row_at(a->y, r) : NULL, a->norm,
                     row_at(a->out, r), a->out.cols);
}

void cpu_add_norm(struct backend *b, struct tensor x, struct tensor delta,
                  const struct norm_args *args, struct tensor out)
{
    ASSERT_CMP(x.cols, ==, out.cols);
    struct row_args a = {.x = x, .y = delta, .out = out, .norm = args, .row = norm_row};
    rows_run(b, &a);
}

static void add_row(const struct row_args *a, int64_t r)
{
    a->kernels->add(row_at(a->out, r), row_at(a->y, r), a->out.cols);
}

void cpu_add(struct backend *b, struct tensor x, struct tensor y)
{
    struct row_args a = {.out = x, .y = y, .row = add_row};
    rows_run(b, &a);
}

static void scale_row(const struct row_args *a, int64_t r)
{
    a->kernels->scale(row_at(a->out, r), a->out.cols, a->by, a->softcap);
}

void cpu_scale(struct backend *b, struct tensor x, float by, float softcap)
{
    struct row_args a = {.out = x, .by = by, .softcap = softcap, .row = scale_row};
    rows_run(b, &a);
}

static void activate_one(const struct row_args *a, int64_t r)
{
    const float *gate = row_at(a->x, r);
    a->kernels->activate(row_at(a->out, r), gate, a->gated ? gate + a->out.cols : NULL, a->out.cols,
                         a->kind);
}

void cpu_activate(struct backend *b, struct tensor out, struct tensor in, enum activation kind,
                  bool gated)
{
    ASSERT_CMP(in.cols, ==, gated ? 2 * out.cols : out.cols);
    struct row_args a = {.x = in, .out = out, .kind = kind, .gated = gated, .row = activate_one};
    rows_run(b, &a);
}

static void gather_row(const struct row_args *a, int64_t r)
{
    memcpy(row_at(a->out, r), row_at(a->x, a->batch->rows_out[r]),
           (size_t)a->out.cols * sizeof(float));
}

void cpu_gather(struct backend *b, struct tensor out, struct tensor x, const struct batch *batch)
{
    ASSERT_CMP(out.rows, ==, batch->n_rows_out);
    struct row_args a = {.x = x, .out = out, .batch = batch, .row = gather_row};
    rows_run(b, &a);
}
