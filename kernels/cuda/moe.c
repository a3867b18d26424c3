/* A layer of experts: route, sort, gate and up of all experts as one grouped product, activation,
 * down, and the weighted sum. Rows pass in slices, which bounds the scratch; the number of launches
 * depends on the rows alone, so a step with experts can be recorded as a graph. */
#include "base/mem.h"
#include "kernels/cuda/cuda.h"

enum { SLICE_ROWS = 1024 };

struct moe {
    struct moe_args args;
    int64_t hidden, ffn, up_padded, down_padded; /* inputs of a row as stored */
    enum weight_format format;
    struct gemm_matrix *up, *down; /* device [n_experts] */
};

/* Places in b->moe_scratch for a slice. */
struct moe_scratch {
    float *weights;                       /* [rows][top_k] */
    int32_t *experts, *offsets, *rows_of; /* [rows][top_k], [n_experts + 1], [rows * top_k] */
    void *wide;                           /* BF16 [entries][2 ffn], then F32 [entries][hidden] */
    void *act;                            /* BF16 [entries][act_stride] */
    int64_t wide_stride, act_stride, y_stride;
};

static int64_t up_to_8(int64_t n)
{
    return (n + 7) / 8 * 8;
}

static size_t scratch_place(const struct moe *m, int64_t rows, uint8_t *base,
                            struct moe_scratch *out)
{
    int64_t entries = rows * m->args.top_k;
    struct moe_scratch s = {.wide_stride = up_to_8(2 * m->ffn),
                            .act_stride = up_to_8(m->ffn),
                            .y_stride = up_to_8(m->hidden)};
    int64_t wide = s.wide_stride * 2 > s.y_stride * 4 ? s.wide_stride * 2 : s.y_stride * 4;
    const int64_t bytes[6] = {entries * 4, entries * 4,    (m->args.n_experts + 1) * 4,
                              entries * 4, entries * wide, entries * s.act_stride * 2};
    size_t at[6], total = 0;
    for (int i = 0; i < 6; i++) {
        at[i] = total;
        total += (size_t)(bytes[i] + 255) / 256 * 256;
    }
    if (!base) return total;
    s.weights = (float *)(base + at[0]);
    s.experts = (int32_t *)(base + at[1]);
    s.offsets = (int32_t *)(base + at[2]);
    s.rows_of = (int32_t *)(base + at[3]);
    s.wide = base + at[4];
    s.act = base + at[5];
    *out = s;
    return total;
}

static enum err args_check(const struct moe_args *a)
{
    if (a->n_experts < 1 || a->n_experts > MOE_EXPERTS_MAX || a->top_k < 1 ||
        a->top_k > MOE_TOP_K_MAX || a->top_k > a->n_experts)
        FAIL(ERR_INVALID, "%d of %d experts: up to %d of %d are supported", a->top_k, a->n_experts,
             MOE_TOP_K_MAX, MOE_EXPERTS_MAX);
    if (a->up[0]->n_out < 2) FAIL(ERR_INVALID, "experts without a unit");
    for (int e = 0; e < a->n_experts; e++)
        if (a->up[e]->n_in != a->up[0]->n_in || a->up[e]->n_out != 2 * a->down[e]->n_in ||
            a->down[e]->n_out != a->up[0]->n_in || a->up[e]->n_out != a->up[0]->n_out ||
            a->up[e]->format != a->up[0]->format || a->down[e]->format != a->up[0]->format ||
            a->up[e]->group_shift != a->up[0]->group_shift ||
            a->down[e]->group_shift != a->down[0]->group_shift)
            FAIL(ERR_INVALID, "expert %d differs in shape from the first", e);
    for (int e = 0; e < a->n_experts; e++)
        if (a->up[e]->order || a->down[e]->order)
            FAIL(ERR_UNSUPPORTED,
                 "experts whose 4-bit codes have their inputs in another order (desc_act) "
                 "are not supported on CUDA");
    return OK;
}

static enum err matrices_send(struct cuda_backend *b, struct weight *const *of, int n,
                              struct gemm_matrix **out)
{
    struct gemm_matrix *list;
    size_t bytes = (size_t)n * sizeof *list;
    TRY(MEM_NEW_ARRAY(n, &list));
    for (int e = 0; e < n; e++)
        list[e] = (struct gemm_matrix){of[e]->data, of[e]->scales_16, of[e]->zeros, of[e]->scales};
    enum err err = cuda_alloc(b, bytes, (void **)out);
    if (!err) err = b->base.ops->upload(&b->base, *out, list, bytes);
    mem_free(list);
    return err;
}

enum err cuda_moe_create(struct backend *base, const struct moe_args *args, struct moe **out)
{
    struct cuda_backend *b = cuda_of(base);
    struct moe *m;
    enum err e;
    TRY(args_check(args));
    TRY(MEM_NEW(&m));
    *m = (struct moe){.args = *args,
                      .hidden = args->up[0]->n_in,
                      .ffn = args->up[0]->n_out / 2,
                      .up_padded = args->up[0]->n_in_padded,
                      .down_padded = args->down[0]->n_in_padded,
                      .format = args->up[0]->format};
    TRY_OUT(matrices_send(b, args->up, args->n_experts, &m->up));
    TRY_OUT(matrices_send(b, args->down, args->n_experts, &m->down));
    int64_t rows = b->options.n_tokens_max < SLICE_ROWS ? b->options.n_tokens_max : SLICE_ROWS;
    TRY_OUT(cuda_reserve(b, &b->moe_scratch, &b->moe_scratch_bytes,
                         scratch_place(m, rows, NULL, NULL)));
out:
    if (e)
        cuda_moe_destroy(base, m);
    else
        *out = m;
    return e;
}

void cuda_moe_destroy(struct backend *base, struct moe *m)
{
    if (!m) return;
    cuda_quiesce(cuda_of(base));
    cuda_free(cuda_of(base), m->up);
    cuda_free(cuda_of(base), m->down);
    mem_free(m);
}

static struct gemm_call grouped(const struct moe *m, const struct moe_scratch *s, int rows)
{
    return (struct gemm_call){.offsets = s->offsets,
                              .rows_of = s->rows_of,
                              .n_experts = m->args.n_experts,
                              .rows_max = rows};
}

static void slice_run(struct cuda_backend *b, const struct moe *m, struct tensor out,
                      struct tensor x, struct tensor scores)
{
    struct moe_scratch s;
    int rows = (int)x.rows, k = m->args.top_k, entries = rows * k;
    scratch_place(m, rows, b->moe_scratch, &s);
    struct tensor wide = {s.wide, DTYPE_BF16, entries, 2 * m->ffn, s.wide_stride};
    struct tensor act = {s.act, DTYPE_BF16, entries, m->ffn, s.act_stride};
    struct gemm_call up = grouped(m, &s, rows), down = up;
    up.matrices = m->up, up.n_in_padded = m->up_padded, up.x_rows_per = k;
    up.group_shift = m->args.up[0]->group_shift, down.group_shift = m->args.down[0]->group_shift;
    up.x = x, up.out = wide;
    down.matrices = m->down, down.n_in_padded = m->down_padded, down.x_rows_per = 1;
    down.x = act;
    down.out = (struct tensor){s.wide, DTYPE_F32, entries, m->hidden, s.y_stride};
    int r = launch_moe_route(s.weights, s.experts, scores, k, m->args.renormalize, b->stream);
    if (!r)
        r = launch_moe_sort(s.experts, entries, m->args.n_experts, s.offsets, s.rows_of, b->stream);
    if (!r) r = launch_gemm_experts(&up, m->format, b->stream);
    if (!r) r = launch_activate(act, wide, m->args.kind, true, (struct quantize_to){0}, b->stream);
    if (!r) r = launch_gemm_experts(&down, m->format, b->stream);
    if (!r) r = launch_moe_combine(out, s.wide, s.y_stride, s.weights, k, b->stream);
    cuda_ok(b, (cudaError_t)r, "experts");
}

static struct tensor slice_of(struct tensor t, int64_t first, int64_t n)
{
    t.data = (uint8_t *)t.data + first * t.stride * (int64_t)dtype_bytes(t.dtype);
    t.rows = n;
    return t;
}

void cuda_moe_forward(struct backend *base, struct tensor out, struct tensor x,
                      struct tensor scores, struct moe *m)
{
    struct cuda_backend *b = cuda_of(base);
    ASSERT(x.cols == m->hidden && out.cols == m->hidden && out.rows == x.rows);
    ASSERT(scores.cols == m->args.n_experts && scores.rows == x.rows);
    ASSERT(x.rows <= b->options.n_tokens_max && scores.dtype == DTYPE_F32);
    cuda_written(b, out);
    for (int64_t first = 0; first < x.rows && !b->failed; first += SLICE_ROWS) {
        int64_t n = x.rows - first < SLICE_ROWS ? x.rows - first : SLICE_ROWS;
        slice_run(b, m, slice_of(out, first, n), slice_of(x, first, n), slice_of(scores, first, n));
    }
}
