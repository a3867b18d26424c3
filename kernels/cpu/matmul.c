/* out = x w^T + bias: the driver that turns a matmul into chunks of microkernel calls.
 *
 * Rows are packed once (activations.c). A chunk is a few weight panels by a block of row panels; it
 * walks K in blocks whose weights fit in L1, with the accumulators parked in scratch between
 * blocks. An element's sum runs over K in one order whatever the batch: that is what keeps law 4.
 * The driver knows formats only as rows of tables. */
#include "base/mem.h"
#include "kernels/cpu/activations.h"

#include <math.h>
#include <string.h>

enum {
    CHUNK_ROWS = 264, /* rows of a chunk at most */
    CHUNK_ROWS_MIN = 48,
    CHUNK_WORDS_BYTES = 640 << 10, /* and of their words, so that they stay in L2 */
    BLOCK_STEPS = 512,             /* of K: 64 KiB of weights; a multiple of GROUP_STEPS */
    CHUNK_PANELS = 8,              /* of a chunk at most: its weights are one stream */
    CHUNK_BYTES = 128 << 10,       /* of weights, as far as panels of short chunks make them up */
    CHUNKS_PER_THREAD = 8,         /* fewer panels a chunk if there would be less */
    CHUNK_WORK = 6144,             /* rows times steps: a chunk of more has one panel */
    PREFETCH_AHEAD = 8192,         /* bytes */
};

struct largest {
    float value;
    int32_t index;
};

/* Where results become the packed inputs of a next product, in row panels of the same rows. */
struct words_out {
    quantize_kernel *pack;
    uint32_t *words; /* NULL: results stay floats */
    int64_t n_steps;
    int inputs_per_step;
};

/* All by value but the operands themselves: a thread that comes back late from an old matmul still
 * reads within them, whatever the backend does next. */
struct matmul_args {
    const struct weight *w;
    struct activations a;
    panel_kernel *kernel;
    float *out;
    int64_t out_stride, n_columns;
    int n_panel_chunks, panels_per_chunk, row_panels_per_chunk;
    bool gated, direct; /* direct: one thread, which leaves whole panels where they belong */
    enum activation activation;
    const struct row_kernels *rows;
    struct largest *best;  /* of matmul_argmax: [n_panel_chunks][n_rows] */
    struct words_out next; /* of the gated form */
    struct own_rows own;
};
_Static_assert(sizeof(struct matmul_args) <= POOL_ARGS_BYTES, "copied by each thread");

/* Which weights are fetched meanwhile. One row panel streams through the weights once: with few
 * rows the hardware keeps up by itself and is only disturbed; with more it falls behind, and a
 * fixed distance ahead helps. Of several row panels the first two fetch one half each of the block
 * that comes next, whose bytes `block` counts. */
static void prefetch_plan(const struct format_info *f, int n_row_panels, int i, int rows,
                          int64_t block, struct panel_call *call)
{
    call->prefetch = call->weights;
    call->prefetch_bytes = call->prefetch_second = 0;
    if (n_row_panels == 1 && rows >= f->prefetch_rows) {
        call->prefetch = call->weights + PREFETCH_AHEAD;
        call->prefetch_bytes = f->header_bytes ? 2 * f->step_bytes : f->step_bytes;
        call->prefetch_second = call->prefetch_bytes / 2;
    } else if (n_row_panels > 1 && i < 2) {
        call->prefetch = call->weights + block + i * block / 2 / 64 * 64;
        call->prefetch_bytes = 64; /* a call of the kernel looks at 128 bytes between fetches */
    }
}

/* Steps of a K block: equal blocks, so that fetching the next one takes as long as computing this.
 */
static int64_t block_steps(const struct activations *a, int n_row_panels)
{
    if (n_row_panels == 1) return a->n_steps;
    int64_t n_blocks = (a->n_steps + BLOCK_STEPS - 1) / BLOCK_STEPS;
    int64_t steps = (a->n_steps + n_blocks - 1) / n_blocks;
    return (steps + GROUP_STEPS - 1) / GROUP_STEPS * GROUP_STEPS;
}

/* Asks for the lines that a row panel's results will be copied to, to be written: a store that
 * misses the cache holds up all stores behind it. */
static void destination_fetch(const struct matmul_args *m, int first, int rows, int64_t column)
{
    int64_t n = m->n_columns - column < PANEL_OUTPUTS ? m->n_columns - column : PANEL_OUTPUTS;
    for (int r = 0; r < rows; r++) {
        const float *to = m->out + (first + r) * m->out_stride + column;
        __asm__ volatile("prefetchw %0" ::"m"(*to));
        if (n == PANEL_OUTPUTS) __asm__ volatile("prefetchw %0" ::"m"(to[n / 2]));
        if ((uintptr_t)to % 64) __asm__ volatile("prefetchw %0" ::"m"(to[n - 1]));
    }
}

/* A thread's own rows lie behind what a chunk uses of its scratch. */
static void *own_memory(const void *scratch)
{
    return (char *)scratch + MATMUL_SCRATCH_BYTES;
}

static void matmul_prepare(const void *args, int chunk, void *scratch)
{
    const struct matmul_args *m = args;
    (void)chunk;
    own_rows_pack(&m->own, &m->a, own_memory(scratch));
}

/* One weight panel by row panels [i0, i1), parked at the thread's scratch: out is
 * [rows][out_stride]. The results will be copied to the column `to` of the matmul's output, unless
 * it is negative. */
static void panel_by_rows(const struct matmul_args *m, int64_t panel, int i0, int i1, float *parked,
                          float *out, int64_t out_stride, int64_t to)
{
    const struct weight *w = m->w;
    const struct activations *a = m->own.pack ? own_rows_packed(own_memory(parked)) : &m->a;
    const struct format_info *f = &format_infos[w->format];
    int row0 = row_panel_first(a, i0), n_row_panels = i1 - i0;
    int64_t block = block_steps(a, n_row_panels);
    struct panel_call call = {
        .weights = w->panels + (size_t)panel * w->panel_bytes,
        .words_stride = a->n_steps,
        .first = true,
        .correction_stride = a->n_groups,
        .group_steps = a->group_steps,
        .column_scale = w->scale ? w->scale + panel * PANEL_OUTPUTS : NULL,
        .bias = w->bias ? w->bias + panel * PANEL_OUTPUTS : NULL,
        .out_stride = out_stride,
    };
    for (int64_t s = 0; s < a->n_steps; s += block, call.first = false) {
        int64_t group = s / a->group_steps, bytes; /* group: 0 where one is all */
        call.n_steps = a->n_steps - s < block ? a->n_steps - s : block;
        call.last = s + call.n_steps == a->n_steps;
        bytes = call.n_steps * f->step_bytes + call.n_steps / a->group_steps * f->header_bytes;
        if (w->zeros) call.zeros = w->zeros + (panel * a->n_groups + group) * PANEL_OUTPUTS;
        for (int i = i0, first = row0; i < i1; i++) {
            int rows = a->panel_rows + (i < a->n_taller);
            call.words = a->words + first * a->n_steps + (a->row_major ? s : s * rows);
            call.scratch = parked + (first - row0) * PANEL_OUTPUTS;
            call.correction = a->correction + first * a->n_groups + group;
            call.row_scale = f->inputs_per_step == 4 ? a->row_scale + first : NULL;
            call.out = out + (first - row0) * out_stride;
            prefetch_plan(f, n_row_panels, i - i0, rows, bytes, &call);
            if (call.last && to >= 0) destination_fetch(m, first, rows, to);
            m->kernel(&call, rows);
            first += rows;
        }
        call.weights += bytes;
    }
}

struct chunk_range {
    int i0, i1, row0, n_rows;
    int64_t panel0, n_panels;
};

static struct chunk_range chunk_range(const struct matmul_args *m, int chunk)
{
    int64_t panels = (m->n_columns + PANEL_OUTPUTS - 1) / PANEL_OUTPUTS;
    struct chunk_range c;
    c.panel0 = (int64_t)(chunk % m->n_panel_chunks) * m->panels_per_chunk;
    c.n_panels = panels - c.panel0 < m->panels_per_chunk ? panels - c.panel0 : m->panels_per_chunk;
    c.i0 = chunk / m->n_panel_chunks * m->row_panels_per_chunk;
    c.i1 = c.i0 + m->row_panels_per_chunk < m->a.n_row_panels ? c.i0 + m->row_panels_per_chunk
                                                              : m->a.n_row_panels;
    c.row0 = row_panel_first(&m->a, c.i0);
    c.n_rows = row_panel_first(&m->a, c.i1) - c.row0;
    return c;
}

/* Where a panel's results belong when nothing can run twice; NULL: into scratch, and committed. A
 * panel that overlaps the matrix's edge is committed too. */
static float *direct_place(const struct matmul_args *m, const struct chunk_range *c, int64_t p)
{
    int64_t column = (c->panel0 + p) * PANEL_OUTPUTS;
    if (!m->direct || column + PANEL_OUTPUTS > m->n_columns) return NULL;
    return m->out + c->row0 * m->out_stride + column;
}

/* Scratch of a chunk: accumulators [CHUNK_ROWS][32], then results [panels][rows][32]; the gated
 * form has those of up behind those of the gate, up to one panel more. */
static float *panel_result(const void *scratch, const struct chunk_range *c, int64_t p)
{
    return (float *)scratch + (CHUNK_ROWS + p * c->n_rows) * PANEL_OUTPUTS;
}
_Static_assert((1 + 4) * CHUNK_ROWS * PANEL_OUTPUTS * 4 <= MATMUL_SCRATCH_BYTES,
               "a chunk's accumulators and results");

static void matmul_compute(const void *args, int chunk, void *scratch)
{
    const struct matmul_args *m = args;
    struct chunk_range c = chunk_range(m, chunk);
    for (int64_t p = 0; p < c.n_panels; p++) {
        float *to = direct_place(m, &c, p);
        panel_by_rows(m, c.panel0 + p, c.i0, c.i1, scratch, to ? to : panel_result(scratch, &c, p),
                      to ? m->out_stride : PANEL_OUTPUTS, (c.panel0 + p) * PANEL_OUTPUTS);
    }
}

/* The gate's panels, then those that hold the same columns of up. When the number of columns is no
 * multiple of 32 a chunk has one panel, whose columns of up lie in two, and a panel of up is
 * computed for two chunks: rare and right. */
static void gated_compute(const void *args, int chunk, void *scratch)
{
    const struct matmul_args *m = args;
    struct chunk_range c = chunk_range(m, chunk);
    int64_t up0 = (m->n_columns + c.panel0 * PANEL_OUTPUTS) / PANEL_OUTPUTS;
    int64_t shift = m->n_columns % PANEL_OUTPUTS;
    float *gate = panel_result(scratch, &c, 0), *up = panel_result(scratch, &c, c.n_panels);
    for (int64_t p = 0; p < c.n_panels; p++)
        panel_by_rows(m, c.panel0 + p, c.i0, c.i1, scratch, panel_result(scratch, &c, p),
                      PANEL_OUTPUTS, m->next.words ? -1 : (c.panel0 + p) * PANEL_OUTPUTS);
    if (!shift) { /* all is one row: a loop of two vectors is as long as its beginning and end */
        for (int64_t p = 0; p < c.n_panels; p++)
            panel_by_rows(m, up0 + p, c.i0, c.i1, scratch,
                          panel_result(scratch, &c, c.n_panels + p), PANEL_OUTPUTS, -1);
        m->rows->activate(gate, gate, up, c.n_panels * c.n_rows * PANEL_OUTPUTS, m->activation);
        return;
    }
    panel_by_rows(m, up0, c.i0, c.i1, scratch, up, 2 * PANEL_OUTPUTS, -1);
    if (up0 + 1 < m->w->n_panels)
        panel_by_rows(m, up0 + 1, c.i0, c.i1, scratch, up + PANEL_OUTPUTS, 2 * PANEL_OUTPUTS, -1);
    for (int r = 0; r < c.n_rows; r++) {
        float *row = gate + r * PANEL_OUTPUTS;
        m->rows->activate(row, row, up + r * 2 * PANEL_OUTPUTS + shift, PANEL_OUTPUTS,
                          m->activation);
    }
}

/* One panel's results into the steps of the next product that are theirs; its last panel writes the
 * zeros behind them too. */
static void words_commit(const struct matmul_args *m, const struct chunk_range *c, int64_t p,
                         const float *result)
{
    const struct words_out *next = &m->next;
    int64_t column = (c->panel0 + p) * PANEL_OUTPUTS, step = column / next->inputs_per_step;
    int64_t left = m->n_columns - column;
    struct activations part = {.n_inputs = left < PANEL_OUTPUTS ? left : PANEL_OUTPUTS};
    part.n_steps =
        left > PANEL_OUTPUTS ? PANEL_OUTPUTS / next->inputs_per_step : next->n_steps - step;
    for (int i = c->i0; i < c->i1; i++) {
        int first = row_panel_first(&m->a, i), rows = row_panel_first(&m->a, i + 1) - first;
        next->pack(&part, result, PANEL_OUTPUTS, 0, rows,
                   next->words + first * next->n_steps + step * rows);
        result += rows * PANEL_OUTPUTS;
    }
}

static void matmul_commit(const void *args, int chunk, void *scratch)
{
    const struct matmul_args *m = args;
    struct chunk_range c = chunk_range(m, chunk);
    for (int64_t p = 0; p < c.n_panels; p++) {
        int64_t column = (c.panel0 + p) * PANEL_OUTPUTS;
        int64_t n = m->n_columns - column;
        const float *from = panel_result(scratch, &c, p);
        float *to = m->out + c.row0 * m->out_stride + column;
        if (!m->gated && direct_place(m, &c, p)) continue;
        if (m->next.words) {
            words_commit(m, &c, p, from);
            continue;
        }
        for (int r = 0; r < c.n_rows; r++, from += PANEL_OUTPUTS, to += m->out_stride)
            if (n < PANEL_OUTPUTS)
                memcpy(to, from, (size_t)n * sizeof(float));
            else
                memcpy(to, from, PANEL_OUTPUTS * sizeof(float)); /* a few moves */
    }
}

/* The columns of a chunk give way to the largest of each row, kept where the row's columns were. */
static void argmax_compute(const void *args, int chunk, void *scratch)
{
    const struct matmul_args *m = args;
    struct chunk_range c = chunk_range(m, chunk);
    float *parked = scratch, *result = panel_result(scratch, &c, 0);
    int64_t stride = c.n_panels * PANEL_OUTPUTS, column = c.panel0 * PANEL_OUTPUTS;
    int64_t n = m->n_columns - column < stride ? m->n_columns - column : stride;
    for (int64_t p = 0; p < c.n_panels; p++)
        panel_by_rows(m, c.panel0 + p, c.i0, c.i1, parked, result + p * PANEL_OUTPUTS, stride, -1);
    for (int r = 0; r < c.n_rows; r++) {
        const float *row = result + r * stride;
        struct largest best = {m->rows->largest(row, n), 0};
        best.index = (int32_t)column; /* stays when all are -inf or NaN */
        for (int64_t i = 0; best.value > -INFINITY && i < n; i++)
            if (row[i] >= best.value) {
                best.index = (int32_t)(column + i);
                break;
            }
        memcpy(parked + 2 * r, &best, sizeof best);
    }
}

static void argmax_commit(const void *args, int chunk, void *scratch)
{
    const struct matmul_args *m = args;
    struct chunk_range c = chunk_range(m, chunk);
    memcpy(m->best + (int64_t)(chunk % m->n_panel_chunks) * m->a.n_rows + c.row0, scratch,
           (size_t)c.n_rows * sizeof *m->best);
}

/* Panels of a chunk. One where rows make it long enough, so that threads end together; else as many
 * as make up CHUNK_BYTES: memory gives long streams faster. */
static int chunk_panels(const struct matmul_args *m, int64_t panels, int n_row_chunks,
                        int n_threads)
{
    int64_t work = (int64_t)(m->a.n_rows / n_row_chunks) * m->a.n_steps, n = 1;
    bool too_many = panels * n_row_chunks > POOL_CHUNKS_MAX;
    if (m->gated && m->n_columns % PANEL_OUTPUTS) return 1;
    if (work < CHUNK_WORK || too_many) {
        n = CHUNK_BYTES / (int64_t)m->w->panel_bytes;
        int64_t rows = (int64_t)m->row_panels_per_chunk * m->a.rows_max;
        int64_t by_threads = panels / (CHUNKS_PER_THREAD * n_threads), by_rows = CHUNK_ROWS / rows;
        n = n < CHUNK_PANELS ? n : CHUNK_PANELS;
        n = n < by_threads ? n : by_threads;
        n = n < by_rows ? n : by_rows;
    }
    int64_t least = too_many ? 2 : 1;
    return (int)(n > least ? n : least);
}

static void matmul_slice(struct cpu_backend *cpu, const struct activations *a,
                         struct matmul_args *m)
{
    int64_t panels = (m->n_columns + PANEL_OUTPUTS - 1) / PANEL_OUTPUTS;
    int64_t rows = CHUNK_WORDS_BYTES / (a->n_steps * 4);
    rows = rows < CHUNK_ROWS_MIN ? CHUNK_ROWS_MIN : rows < CHUNK_ROWS ? rows : CHUNK_ROWS;
    int per_block = (int)rows / a->rows_max;
    int n_row_chunks = (a->n_row_panels + per_block - 1) / per_block;
    m->a = *a;
    m->row_panels_per_chunk = (a->n_row_panels + n_row_chunks - 1) / n_row_chunks;
    m->panels_per_chunk = chunk_panels(m, panels, n_row_chunks, pool_n_threads(cpu->pool));
    m->direct = !m->best && pool_n_threads(cpu->pool) == 1;
    m->n_panel_chunks = (int)((panels + m->panels_per_chunk - 1) / m->panels_per_chunk);
    struct pool_job job = {.compute = m->best    ? argmax_compute
                                      : m->gated ? gated_compute
                                                 : matmul_compute,
                           .commit = m->best ? argmax_commit : matmul_commit,
                           .prepare = m->own.pack ? matmul_prepare : NULL,
                           .args = m,
                           .args_bytes = sizeof *m,
                           .n_chunks = m->n_panel_chunks * n_row_chunks};
    pool_run(cpu->pool, &job);
}

/* Rows of one slice: what the packed activations hold, and what the pool has chunk states for. */
static int64_t slice_rows(int64_t n_columns)
{
    int64_t panel_chunks = (n_columns / PANEL_OUTPUTS + 1) / 2 + 1;
    int64_t row_chunks = POOL_CHUNKS_MAX / panel_chunks;
    ASSERT_CMP(row_chunks, >, 0);
    int64_t rows = (row_chunks - 1) * (CHUNK_ROWS_MIN / 2);
    return rows < PANEL_ROWS_MAX ? PANEL_ROWS_MAX : rows < ACTIVATION_ROWS ? rows : ACTIVATION_ROWS;
}

static void input_check(const struct norm_input *in, const struct weight *w)
{
    ASSERT_CMP(in->x.cols, ==, w->n_in);
    if (!in->norm) return;
    ASSERT_CMP(in->h.cols, ==, w->n_in);
    ASSERT_CMP(in->h.rows, ==, in->x.rows);
    if (in->delta.data) ASSERT_CMP(in->delta.rows, ==, in->x.rows);
}

/* The product of rows [row, row + a->n_rows). */
static struct matmul_args matmul_begin(const struct cpu_backend *cpu, struct tensor out,
                                       int64_t row, const struct weight *w)
{
    return (struct matmul_args){
        .w = w,
        .kernel = cpu->matmul.panel[w->format],
        .out = (float *)out.data + row * out.stride,
        .out_stride = out.stride,
        .n_columns = out.cols,
        .rows = cpu->rows,
    };
}

void cpu_norm_matmul(struct backend *b, struct tensor out, const struct norm_input *in,
                     const struct weight *w)
{
    struct cpu_backend *cpu = cpu_of(b);
    input_check(in, w);
    ASSERT_CMP(out.cols, ==, w->n_out);
    ASSERT_CMP(out.rows, ==, in->x.rows);
    int64_t slice = slice_rows(out.cols);
    for (int64_t row = 0; row < out.rows; row += slice) {
        int n = (int)(out.rows - row < slice ? out.rows - row : slice);
        struct matmul_args m = matmul_begin(cpu, out, row, w);
        m.own = activations_pack(cpu, w, in, row, n);
        matmul_slice(cpu, &cpu->activations, &m);
    }
}

void cpu_matmul(struct backend *b, struct tensor out, struct tensor x, const struct weight *w)
{
    cpu_norm_matmul(b, out, &(struct norm_input){.x = x}, w);
}

void cpu_packed_matmul(struct cpu_backend *cpu, struct tensor out, const struct weight *w)
{
    struct matmul_args m = matmul_begin(cpu, out, 0, w);
    ASSERT_CMP(out.cols, ==, w->n_out);
    ASSERT_CMP(out.rows, ==, cpu->activations.n_rows);
    ASSERT_CMP(out.rows, <=, slice_rows(out.cols));
    matmul_slice(cpu, &cpu->activations, &m);
}

/* Whether up's results can be left as down's words in act: formats whose rows have no scale, which
 * nobody knows before the row is whole, and row panels alike. */
static bool words_fit(const struct cpu_backend *cpu, const struct weight *up,
                      const struct weight *down, struct tensor act)
{
    const struct matmul_kernels *k = &cpu->matmul;
    return format_infos[down->format].inputs_per_step < 4 && !k->row_major[down->format] &&
           k->rows_max[up->format] == k->rows_max[down->format] && act.stride == act.cols &&
           down->n_steps <= act.cols;
}

void cpu_feed_forward(struct backend *b, struct tensor out, const struct norm_input *in,
                      const struct weight *up, const struct weight *down, struct tensor act,
                      enum activation kind)
{
    struct cpu_backend *cpu = cpu_of(b);
    bool fit = words_fit(cpu, up, down, act);
    input_check(in, up);
    ASSERT_CMP(up->n_out, ==, 2 * act.cols);
    ASSERT_CMP(down->n_in, ==, act.cols);
    ASSERT_CMP(down->n_out, ==, out.cols);
    ASSERT(out.rows == in->x.rows && act.rows == in->x.rows);
    int64_t slice = slice_rows(act.cols > out.cols ? act.cols : out.cols);
    for (int64_t row = 0; row < out.rows; row += slice) {
        int n = (int)(out.rows - row < slice ? out.rows - row : slice);
        struct matmul_args m = matmul_begin(cpu, act, row, up);
        m.gated = true, m.activation = kind;
        struct activations between = cpu->activations;
        if (fit) {
            activations_shape(cpu, &between, down, n);
            between.words = act.data;
            m.next = (struct words_out){cpu->matmul.pack_rows[down->format], between.words,
                                        down->n_steps, format_infos[down->format].inputs_per_step};
        }
        m.own = activations_pack(cpu, up, in, row, n);
        matmul_slice(cpu, &cpu->activations, &m);
        m = matmul_begin(cpu, out, row, down);
        if (!fit) m.own = activations_pack(cpu, down, &(struct norm_input){.x = act}, row, n);
        matmul_slice(cpu, fit ? &between : &cpu->activations, &m);
    }
}

/* The chunks of a row in ascending order: an equal value later does not win. */
static void chunks_merge(const struct matmul_args *m, int32_t *out_index, float *out_value)
{
    for (int r = 0; r < m->a.n_rows; r++) {
        struct largest best = m->best[r];
        for (int64_t chunk = 1; chunk < m->n_panel_chunks; chunk++) {
            struct largest one = m->best[chunk * m->a.n_rows + r];
            if (one.value > best.value) best = one;
        }
        out_index[r] = best.index;
        out_value[r] = best.value;
    }
}

void cpu_norm_matmul_argmax(struct backend *b, const struct norm_input *in, const struct weight *w,
                            int32_t *out_index, float *out_value)
{
    struct cpu_backend *cpu = cpu_of(b);
    input_check(in, w);
    int64_t slice = slice_rows(w->n_out), chunks = w->n_panels;
    int64_t most = ATTENTION_PARTIAL_BYTES / (int64_t)sizeof(struct largest) / chunks;
    slice = slice < most ? slice : most;
    ASSERT_CMP(slice, >, 0);
    for (int64_t row = 0; row < in->x.rows; row += slice) {
        int n = (int)(in->x.rows - row < slice ? in->x.rows - row : slice);
        struct matmul_args m = matmul_begin(cpu, (struct tensor){.cols = w->n_out}, 0, w);
        m.best = (struct largest *)(void *)cpu->attention_partial;
        m.own = activations_pack(cpu, w, in, row, n);
        matmul_slice(cpu, &cpu->activations, &m);
        chunks_merge(&m, out_index + row, out_value + row);
    }
}

void cpu_matmul_argmax(struct backend *b, struct tensor x, const struct weight *w,
                       int32_t *out_index, float *out_value)
{
    cpu_norm_matmul_argmax(b, &(struct norm_input){.x = x}, w, out_index, out_value);
}
