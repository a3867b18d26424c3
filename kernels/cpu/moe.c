/* Mixture of experts: each row through the few experts that its scores choose.
 *
 * The products are those of matmul.c, one expert after another over the rows that chose it, so
 * every format and instruction set works, and a row's sums run in one order whatever the batch: its
 * experts are added in ascending order. Rows are gathered and scattered in slices, which bounds the
 * scratch. Knows nothing of how scores came about. */
#include "base/mem.h"
#include "kernels/cpu/cpu.h"

#include <math.h>
#include <string.h>

enum { SLICE_ROWS = 256 }; /* of one expert, at a time */

struct moe {
    struct moe_args args; /* up, down: [n_experts] */
    int64_t hidden, ffn;
};

/* Places in cpu->moe_scratch. */
struct moe_scratch {
    float *x, *y;      /* [SLICE_ROWS][hidden] */
    float *act;        /* [SLICE_ROWS][ffn] */
    float *weight;     /* [n_tokens_max][top_k] */
    int32_t *expert;   /* [n_tokens_max][top_k] */
    int32_t *entry_of; /* [SLICE_ROWS] entries of weight and expert */
};

static size_t scratch_place(const struct moe *m, size_t n_tokens, char *base,
                            struct moe_scratch *out)
{
    size_t n = n_tokens * (size_t)m->args.top_k;
    const size_t floats[] = {SLICE_ROWS * (size_t)m->hidden,
                             SLICE_ROWS * (size_t)m->hidden,
                             SLICE_ROWS * (size_t)m->ffn,
                             n,
                             n,
                             SLICE_ROWS};
    size_t at[6], bytes = 0;
    for (int i = 0; i < 6; i++) {
        at[i] = bytes;
        bytes += (floats[i] * 4 + 63) / 64 * 64;
    }
    if (base)
        *out = (struct moe_scratch){(float *)(base + at[0]),   (float *)(base + at[1]),
                                    (float *)(base + at[2]),   (float *)(base + at[3]),
                                    (int32_t *)(base + at[4]), (int32_t *)(base + at[5])};
    return bytes;
}

static enum err args_check(const struct moe_args *a)
{
    if (a->n_experts < 1 || a->n_experts > MOE_EXPERTS_MAX || a->top_k < 1 ||
        a->top_k > MOE_TOP_K_MAX || a->top_k > a->n_experts)
        FAIL(ERR_INVALID, "%d of %d experts: up to %d of %d are supported", a->top_k, a->n_experts,
             MOE_TOP_K_MAX, MOE_EXPERTS_MAX);
    for (int e = 0; e < a->n_experts; e++)
        if (a->up[e]->n_in != a->up[0]->n_in || a->up[e]->n_out != 2 * a->down[e]->n_in ||
            a->down[e]->n_out != a->up[0]->n_in || a->up[e]->n_out != a->up[0]->n_out)
            FAIL(ERR_INVALID, "expert %d differs in shape from the first", e);
    return OK;
}

enum err cpu_moe_create(struct backend *b, const struct moe_args *args, struct moe **out)
{
    struct cpu_backend *cpu = cpu_of(b);
    struct moe *m;
    TRY(args_check(args));
    TRY(MEM_NEW(&m));
    *m = (struct moe){*args, args->up[0]->n_in, args->up[0]->n_out / 2};
    size_t bytes = scratch_place(m, (size_t)cpu->options.n_tokens_max, NULL, NULL);
    enum err e = OK;
    if (bytes > cpu->moe_scratch_bytes) {
        void *bigger;
        e = mem_alloc_aligned(64, bytes, &bigger);
        if (!e) {
            pool_quiesce(cpu->pool);
            mem_free(cpu->moe_scratch);
            cpu->moe_scratch = bigger, cpu->moe_scratch_bytes = bytes;
        }
    }
    if (e)
        mem_free(m);
    else
        *out = m;
    return e;
}

void cpu_moe_destroy(struct backend *b, struct moe *m)
{
    (void)b;
    mem_free(m);
}

/* The top_k largest scores of a row, and their share of the softmax. */
static void route_row(const float *score, const struct moe_args *a, int32_t *expert, float *weight)
{
    bool taken[MOE_EXPERTS_MAX] = {false};
    float chosen = 0, all = 0;
    for (int k = 0; k < a->top_k; k++) {
        int best = -1;
        for (int e = 0; e < a->n_experts; e++)
            if (!taken[e] && (best < 0 || score[e] > score[best])) best = e;
        taken[best] = true;
        expert[k] = best;
        weight[k] = expf(score[best] - score[expert[0]]);
        chosen += weight[k];
    }
    for (int e = 0; e < a->n_experts && !a->renormalize; e++)
        all += expf(score[e] - score[expert[0]]);
    for (int k = 0; k < a->top_k; k++)
        weight[k] /= a->renormalize ? chosen : all;
}

/* Up to SLICE_ROWS entries of one expert: gathered, multiplied, added to their rows. */
static void slice_run(struct backend *b, const struct moe *m, const struct moe_scratch *s,
                      int expert, int n, struct tensor out, struct tensor x)
{
    struct tensor in = {s->x, DTYPE_F32, n, m->hidden, m->hidden};
    struct tensor act = {s->act, DTYPE_F32, n, m->ffn, m->ffn};
    struct tensor y = {s->y, DTYPE_F32, n, m->hidden, m->hidden};
    for (int i = 0; i < n; i++)
        memcpy(s->x + i * m->hidden,
               (const float *)x.data + s->entry_of[i] / m->args.top_k * x.stride,
               (size_t)m->hidden * sizeof(float));
    cpu_feed_forward(b, y, &(struct norm_input){.x = in}, m->args.up[expert], m->args.down[expert],
                     act, m->args.kind);
    for (int i = 0; i < n; i++) {
        float *to = (float *)out.data + s->entry_of[i] / m->args.top_k * out.stride;
        float weight = s->weight[s->entry_of[i]];
        for (int64_t c = 0; c < m->hidden; c++)
            to[c] += weight * s->y[i * m->hidden + c];
    }
}

void cpu_moe_forward(struct backend *b, struct tensor out, struct tensor x, struct tensor scores,
                     struct moe *m)
{
    struct moe_scratch s;
    int n_entries = (int)x.rows * m->args.top_k;
    ASSERT_CMP(x.rows, <=, cpu_of(b)->options.n_tokens_max);
    ASSERT(x.cols == m->hidden && out.cols == m->hidden && out.rows == x.rows);
    ASSERT(scores.cols == m->args.n_experts && scores.rows == x.rows);
    scratch_place(m, (size_t)cpu_of(b)->options.n_tokens_max, cpu_of(b)->moe_scratch, &s);
    for (int64_t r = 0; r < x.rows; r++) {
        memset((float *)out.data + r * out.stride, 0, (size_t)m->hidden * sizeof(float));
        route_row((const float *)scores.data + r * scores.stride, &m->args,
                  s.expert + r * m->args.top_k, s.weight + r * m->args.top_k);
    }
    for (int e = 0; e < m->args.n_experts && m->ffn; e++) {
        int n = 0;
        for (int i = 0; i < n_entries; i++) {
            if (s.expert[i] == e) s.entry_of[n++] = i;
            if (n == SLICE_ROWS || (n && i == n_entries - 1)) {
                slice_run(b, m, &s, e, n, out, x);
                n = 0;
            }
        }
    }
}
