/* Weights that a checkpoint holds as 4-bit codes, on their way to the device: this rank's rectangle
 * of them as they are, or, where no one matrix of codes says the same, expanded to 16 bits. */
#include "base/log.h"
#include "base/mem.h"
#include "worker/int4.h"
#include "worker/loader.h"
#include "worker/memory.h"

#include <string.h>

/* What one weight is stacked of: codes or a plain matrix, in this rank's slices. */
struct stack {
    struct int4_part codes[WEIGHT_PARTS_MAX];
    struct matrix_view plain[WEIGHT_PARTS_MAX]; /* data NULL where there are codes */
    struct shard_range inputs;
    int64_t n_out;
    int n_parts;
    const char *why; /* why it cannot stay codes; NULL = it can */
};

bool loader_has_codes(const struct loader *l, const enum role *of, int n_of, int layer)
{
    for (int i = 0; i < n_of; i++)
        if (int4_has(&l->source, of[i], layer)) return true;
    return false;
}

static enum err role_add(struct loader *l, enum role role, int layer, struct stack *s)
{
    bool is_codes = int4_has(&l->source, role, layer), by_input = role_is_shard_in(role);
    int64_t rows = config_dim(&l->m->config, roles[role].rows);
    struct matrix_view whole = {.data = NULL};
    struct int4_tensors codes = {.exact = true};
    if (is_codes) {
        TRY(int4_find(&l->source, role, layer, &codes));
        source_use(&l->source, codes.codes);
    } else {
        TRY(source_matrix(&l->source, role, layer, &whole));
        s->why = "some of its matrices are no codes";
    }
    if (!codes.exact && !s->why) s->why = "its scales are no half-precision numbers";
    s->inputs = by_input ? loader_slice(l->m, role, 0)
                         : (struct shard_range){0, config_dim(&l->m->config, roles[role].columns)};
    for (int k = 0; k < role_segments(role); k++, s->n_parts++) {
        struct shard_range r = loader_slice(l->m, role, k);
        if (by_input) r = (struct shard_range){0, rows};
        ASSERT_CMP(s->n_parts, <, WEIGHT_PARTS_MAX);
        s->codes[s->n_parts] = (struct int4_part){codes, r.begin, shard_count(r)};
        s->plain[s->n_parts] = is_codes   ? (struct matrix_view){.data = NULL}
                               : by_input ? view_columns(whole, s->inputs)
                                          : view_rows(whole, r);
        s->n_out += shard_count(r);
    }
    return OK;
}

static enum err codes_create(struct loader *l, struct stack *s, const float *bias,
                             struct weight **out)
{
    struct int4_stack codes;
    bool same;
    TRY(int4_stack(s->codes, s->n_parts, s->inputs.begin, shard_count(s->inputs),
                   l->options->n_threads, &same, &codes));
    if (!same) {
        s->why = "its matrices have their inputs in different groups";
        return OK;
    }
    enum err e = l->ops->weight_create_int4(l->backend, &codes.matrix, bias, out);
    int4_stack_fini(&codes);
    return e;
}

/* The type that expanded weights are kept in: 16 bits, as the device computes. */
static enum weight_format expanded_format(const struct loader *l)
{
    bool half = l->backend->activation_dtype == DTYPE_F32 && l->m->config.dtype == DTYPE_F16;
    return half ? WEIGHT_F16 : WEIGHT_BF16;
}

static enum err expanded_create(struct loader *l, struct stack *s, const float *bias,
                                struct weight **out)
{
    int64_t n_in = shard_count(s->inputs), row = 0;
    size_t bytes;
    float *floats;
    if (!size_mul((size_t)s->n_out, (size_t)n_in, &bytes) || !size_mul(bytes, 4, &bytes))
        FAIL(ERR_NO_MEMORY, "a weight of %lld x %lld", (long long)s->n_out, (long long)n_in);
    TRY(mem_alloc_huge(bytes ? bytes : 4, (void **)&floats));
    for (int p = 0; p < s->n_parts; p++) {
        const struct int4_part *part = &s->codes[p];
        if (!part->of.codes) continue;
        s->plain[p] = (struct matrix_view){floats + row * n_in, DTYPE_F32, part->n, n_in, n_in, 1};
        for (int64_t r = 0; r < part->n; r++, row++)
            int4_row(&part->of, part->first + r, s->inputs.begin, n_in, floats + row * n_in);
    }
    enum err e =
        l->ops->weight_create(l->backend, s->plain, s->n_parts, bias, expanded_format(l), out);
    mem_free_huge(floats, bytes ? bytes : 4);
    if (!e && l->n_expanded++ == 0) l->expanded_why = s->why;
    if (!e) l->expanded_bytes += l->ops->weight_bytes(*out);
    return e;
}

enum err loader_codes_weight(struct loader *l, const enum role *of, int n_of, int layer,
                             const float *bias, struct weight **out)
{
    struct stack s = {.n_parts = 0};
    struct weight *w = NULL;
    for (int i = 0; i < n_of; i++)
        TRY(role_add(l, of[i], layer, &s));
    if (!s.why && !l->ops->weight_create_int4) s.why = "the device has no such kernels";
    if (!s.why && (!s.n_out || !shard_count(s.inputs))) s.why = "this rank has none of it";
    if (!s.why) TRY(codes_create(l, &s, bias, &w));
    if (!w) TRY(expanded_create(l, &s, bias, &w));
    *out = w;
    return OK;
}

void loader_codes_report(const struct loader *l)
{
    if (!l->n_expanded) return;
    log_warn("%s: %d of its 4-bit weights are kept as %s, %.1f MiB, about four times their size: "
             "of the first, %s",
             l->options->model_dir, l->n_expanded, weight_format_name(expanded_format(l)),
             (double)l->expanded_bytes / (1 << 20), l->expanded_why);
}
