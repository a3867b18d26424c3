/* Packing of activations: see activations.h. */
#include "kernels/cpu/activations.h"
#include "base/mem.h"
#include "kernels/cpu/quantize.h"

enum {
    WORDS_BYTES_MIN = 2 << 20, /* a huge page */
    PARALLEL_PACK_ROWS = 8,    /* fewer rows are packed by the caller alone */
};

enum err activations_reserve(struct cpu_backend *cpu, const struct weight *w)
{
    struct activations *a = &cpu->activations;
    size_t words = (size_t)w->n_steps * ACTIVATION_ROWS * 4;
    int64_t group_steps = w->group_steps ? w->group_steps : w->n_steps;
    size_t corrections = (size_t)(w->n_steps / group_steps + 1) * ACTIVATION_ROWS * 4;
    void *bigger;
    if (words < WORDS_BYTES_MIN) words = WORDS_BYTES_MIN;
    if (words > cpu->words_bytes) {
        TRY(mem_alloc_huge(words, &bigger));
        pool_quiesce(cpu->pool);
        mem_free_huge(a->words, cpu->words_bytes);
        a->words = bigger, cpu->words_bytes = words;
    }
    if (corrections > cpu->correction_bytes) {
        TRY(mem_alloc_aligned(64, corrections, &bigger));
        pool_quiesce(cpu->pool);
        mem_free(a->correction);
        a->correction = bigger, cpu->correction_bytes = corrections;
    }
    if (!a->row_scale) TRY(mem_alloc_aligned(64, ACTIVATION_ROWS * 4, (void **)&a->row_scale));
    return OK;
}

struct pack_rows_args {
    const struct activations *a;
    quantize_kernel *pack;
    const struct row_kernels *kernels;
    struct norm_input in;
    int64_t row; /* of in, the first that is packed */
};

static float *row_at(struct tensor t, int64_t row)
{
    return (float *)t.data + row * t.stride;
}

/* Rows from `row` on, normed: into scratch, where they stay in cache, or into h when scratch is
 * NULL or too small for them. */
static const float *rows_norm(const struct pack_rows_args *p, int64_t row, int rows, float *scratch,
                              int64_t *out_stride)
{
    const struct norm_input *in = &p->in;
    int64_t n = in->x.cols, stride = n + 16; /* rows of a power of two would share lines of L1 */
    bool fits = scratch && rows * stride * (int64_t)sizeof(float) <= NORM_SCRATCH_BYTES;
    float *to = fits ? scratch : row_at(in->h, row);
    *out_stride = fits ? stride : in->h.stride;
    for (int r = 0; r < rows; r++)
        p->kernels->norm(row_at(in->x, row + r), in->delta.data ? row_at(in->delta, row + r) : NULL,
                         in->norm, to + r * *out_stride, n);
    return to;
}

/* No commit, so that it runs once: delta must not be added twice. */
static void pack_rows_chunk(const void *args, int chunk, void *scratch)
{
    const struct pack_rows_args *p = args;
    int first = row_panel_first(p->a, chunk), rows = row_panel_first(p->a, chunk + 1) - first;
    int64_t stride = p->in.x.stride;
    const float *x = p->in.norm ? rows_norm(p, p->row + first, rows, scratch, &stride)
                                : row_at(p->in.x, p->row + first);
    p->pack(p->a, x, stride, first, rows, p->a->words + first * p->a->n_steps);
}

void activations_shape(const struct cpu_backend *cpu, struct activations *a, const struct weight *w,
                       int n_rows)
{
    a->format = w->format;
    a->n_rows = n_rows;
    a->rows_max = cpu->matmul.rows_max[w->format];
    a->row_major = cpu->matmul.row_major[w->format];
    a->n_row_panels = (n_rows + a->rows_max - 1) / a->rows_max;
    a->panel_rows = n_rows / a->n_row_panels;
    a->n_taller = n_rows % a->n_row_panels;
    a->n_inputs = w->n_in;
    a->n_steps = w->n_steps;
    a->group_steps = w->group_steps ? w->group_steps : w->n_steps;
    a->n_groups = w->n_steps / a->group_steps;
    a->offset = w->format == WEIGHT_INT4 ? 8 : w->format == WEIGHT_INT4_GROUPS ? 1 : 128;
    a->order = w->order;
}

void activations_pack(struct cpu_backend *cpu, const struct weight *w, const struct norm_input *in,
                      int64_t row, int n_rows)
{
    struct activations *a = &cpu->activations;
    activations_shape(cpu, a, w, n_rows);
    struct pack_rows_args args = {
        a, w->order ? quantize_rows_int8 : cpu->matmul.pack_rows[w->format], cpu->rows, *in, row};
    if (n_rows <= PARALLEL_PACK_ROWS)
        for (int i = 0; i < a->n_row_panels; i++)
            pack_rows_chunk(&args, i, NULL);
    else
        pool_run(cpu->pool,
                 &(struct pool_job){pack_rows_chunk, NULL, &args, sizeof args, a->n_row_panels});
}
