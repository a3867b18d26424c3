/* Packing of activations: see activations.h. */
#include "kernels/cpu/activations.h"
#include "base/mem.h"
#include "kernels/cpu/quantize.h"

enum {
    WORDS_BYTES_MIN = 2 << 20, /* a huge page */
    PARALLEL_PACK_ROWS = 8,    /* fewer rows are packed by the caller alone */
    OWN_INPUTS = 1 << 15,      /* times threads: more are packed once for all */
    OWN_ROWS = 16,
    OWN_CORRECTIONS = 2048,
};

struct own_memory {
    struct activations a;
    float row_scale[OWN_ROWS];
    int32_t correction[OWN_CORRECTIONS];
    _Alignas(64) uint32_t words[];
};
enum { OWN_WORDS = (OWN_ROWS_BYTES - sizeof(struct own_memory)) / 4 };

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

static bool own_fits(const struct cpu_backend *cpu, const struct activations *a)
{
    return a->n_rows <= OWN_ROWS && a->n_rows * a->n_groups <= OWN_CORRECTIONS &&
           a->n_rows * a->n_steps <= OWN_WORDS &&
           a->n_rows * a->n_inputs * pool_n_threads(cpu->pool) <= OWN_INPUTS;
}

static quantize_kernel *pack_kernel(const struct cpu_backend *cpu, const struct weight *w)
{
    return w->order ? quantize_rows_int8 : cpu->matmul.pack_rows[w->format];
}

struct own_rows activations_pack(struct cpu_backend *cpu, const struct weight *w,
                                 const struct norm_input *in, int64_t row, int n_rows)
{
    activations_shape(cpu, &cpu->activations, w, n_rows);
    if (!in->norm && own_fits(cpu, &cpu->activations))
        return (struct own_rows){pack_kernel(cpu, w), row_at(in->x, row), in->x.stride};
    activations_pack_once(cpu, w, in, row, n_rows);
    return (struct own_rows){0};
}

void activations_pack_once(struct cpu_backend *cpu, const struct weight *w,
                           const struct norm_input *in, int64_t row, int n_rows)
{
    struct activations *a = &cpu->activations;
    struct pack_rows_args args = {a, pack_kernel(cpu, w), cpu->rows, *in, row};
    activations_shape(cpu, a, w, n_rows);
    if (n_rows <= PARALLEL_PACK_ROWS)
        for (int i = 0; i < a->n_row_panels; i++)
            pack_rows_chunk(&args, i, NULL);
    else
        pool_run(cpu->pool, &(struct pool_job){.compute = pack_rows_chunk,
                                               .args = &args,
                                               .args_bytes = sizeof args,
                                               .n_chunks = a->n_row_panels});
}

void own_rows_pack(const struct own_rows *own, const struct activations *a, void *memory)
{
    struct own_memory *m = memory;
    m->a = *a;
    m->a.words = m->words, m->a.row_scale = m->row_scale, m->a.correction = m->correction;
    for (int i = 0; i < a->n_row_panels; i++) {
        int first = row_panel_first(a, i), rows = row_panel_first(a, i + 1) - first;
        own->pack(&m->a, own->x + first * own->stride, own->stride, first, rows,
                  m->words + first * a->n_steps);
    }
}

const struct activations *own_rows_packed(const void *memory)
{
    return &((const struct own_memory *)memory)->a;
}
