/* Loads one rank's share: for each layer the views of its roles, sliced by this rank, packed by the
 * backend. Which slice is said by the table of roles alone. */
#include "worker/weights.h"
#include "base/buf.h"
#include "base/hash.h"
#include "base/log.h"
#include "base/mem.h"
#include "worker/packed.h"
#include "worker/source.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>

struct loader {
    const struct weights_options *options;
    struct model *m;
    struct source source;
    struct backend *backend;
    const struct backend_ops *ops;
    struct matrix_view embedding; /* stays readable: it is mapped or kept */
    float *bias;                  /* [bias_max] stacked biases of one fused weight */
    int64_t bias_max;
    uint64_t done, total;
    bool is_packed; /* the file holds packed weights */
    struct packed_file packed;
};

/* --- slices --- */

static struct shard_range scaled(struct shard_range r, int64_t by)
{
    return (struct shard_range){r.begin * by, r.end * by};
}

/* This rank's rows or columns of a role. segment: 0, 1, 2 = q, k, v of SHARD_OUT_QKV. */
static struct shard_range slice_of(const struct model *m, enum role role, int segment)
{
    const struct model_config *c = &m->config;
    int64_t q = config_dim(c, DIM_Q), kv = config_dim(c, DIM_KV);
    struct shard_range query = scaled(m->heads.q, c->head_dim),
                       key = scaled(m->heads.kv, c->head_dim);
    switch (roles[role].shard) {
    case SHARD_OUT_Q:
    case SHARD_IN_Q:
        return query;
    case SHARD_OUT_KV:
        return key;
    case SHARD_OUT_FFN:
    case SHARD_IN_FFN:
        return m->ffn;
    case SHARD_VOCAB:
        return m->vocab;
    case SHARD_OUT_QKV: {
        if (segment == 0) return query;
        int64_t base = q + (segment - 1) * kv;
        return (struct shard_range){base + key.begin, base + key.end};
    }
    default:
        return (struct shard_range){0, config_dim(c, roles[role].rows)};
    }
}

static struct matrix_view rows_of(struct matrix_view v, struct shard_range r)
{
    v.data = (const char *)v.data + (size_t)(r.begin * v.row_stride) * dtype_bytes(v.dtype);
    v.rows = shard_count(r);
    return v;
}

static struct matrix_view columns_of(struct matrix_view v, struct shard_range r)
{
    v.data = (const char *)v.data + (size_t)(r.begin * v.col_stride) * dtype_bytes(v.dtype);
    v.cols = shard_count(r);
    return v;
}

static bool is_shard_in(enum role role)
{
    return roles[role].shard == SHARD_IN_Q || roles[role].shard == SHARD_IN_FFN;
}

static int segments_of(enum role role)
{
    return roles[role].shard == SHARD_OUT_QKV ? 3 : 1;
}

/* --- matrices --- */

static void advance(struct loader *l, uint64_t bytes)
{
    l->done += bytes;
    if (l->options->progress)
        l->options->progress(l->options->ctx, l->done < l->total ? l->done : l->total, l->total);
}

/* The bias of a role's slice into l->bias from *at on; zeros where the role has none. */
static enum err bias_add(struct loader *l, enum role role, int layer, int segment, int64_t *at)
{
    int64_t rows = config_dim(&l->m->config, roles[role].rows);
    struct shard_range r =
        is_shard_in(role) ? (struct shard_range){0, rows} : slice_of(l->m, role, segment);
    int64_t n = shard_count(r);
    ASSERT_CMP(*at + rows, <=, l->bias_max);
    if (config_has_bias(&l->m->config, role) && !(is_shard_in(role) && l->m->group.rank != 0)) {
        TRY(source_vector(&l->source, role, layer, true, rows, l->bias + *at));
        memmove(l->bias + *at, l->bias + *at + r.begin, (size_t)n * sizeof(float));
    } else {
        if (config_has_bias(&l->m->config,
                            role)) /* the file is checked on every rank all the same */
            TRY(source_vector(&l->source, role, layer, true, rows, l->bias + *at));
        memset(l->bias + *at, 0, (size_t)n * sizeof(float));
    }
    *at += n;
    return OK;
}

/* --- packed weights --- */

void weights_stem(enum role first, int layer, char out[PACKED_STEM_MAX])
{
    static const struct {
        const char *name;
        bool of_layer;
    } stems[ROLE_COUNT] = {
        [ROLE_WQ] = {"qkv", true},
        [ROLE_WQKV] = {"qkv", true},
        [ROLE_WO] = {"out", true},
        [ROLE_W_GATE] = {"up", true},
        [ROLE_W_UP] = {"up", true},
        [ROLE_W_DOWN] = {"down", true},
        [ROLE_LM_HEAD] = {"lm_head", false},
        [ROLE_PROJECT_IN] = {"project_in", false},
        [ROLE_PROJECT_OUT] = {"project_out", false},
    };
    ASSERT(stems[first].name);
    packed_stem(stems[first].name, stems[first].of_layer ? layer : -1, out);
}

/* This rank's slices of a whole fused weight that was unpacked to floats. */
static void packed_slices(const struct loader *l, const enum role *of, int n_of, const float *whole,
                          int64_t n_in, const float *bias, struct matrix_view *parts, int *n_parts)
{
    int64_t first = 0, bias_at = 0;
    bool drops_bias = is_shard_in(of[0]) && l->m->group.rank != 0;
    for (int i = 0; i < n_of; i++) {
        int64_t rows = config_dim(&l->m->config, roles[of[i]].rows);
        struct matrix_view view = {whole + first * n_in, DTYPE_F32, rows, n_in, n_in, 1};
        for (int s = 0; s < segments_of(of[i]); s++) {
            struct shard_range r = slice_of(l->m, of[i], s), all = {0, rows};
            struct shard_range b = is_shard_in(of[i]) ? all : r;
            parts[(*n_parts)++] = is_shard_in(of[i]) ? columns_of(view, r) : rows_of(view, r);
            ASSERT_CMP(bias_at + shard_count(b), <=, l->bias_max);
            for (int64_t k = 0; bias && k < shard_count(b); k++)
                l->bias[bias_at + k] = drops_bias ? 0 : bias[first + b.begin + k];
            bias_at += shard_count(b);
        }
        first += rows;
    }
}

/* Unpacks, slices and packs for this rank and device. */
static enum err packed_again(struct loader *l, const enum role *of, int n_of,
                             const struct packed_weight *p, enum weight_format format,
                             struct weight **out)
{
    struct matrix_view parts[4];
    int n_parts = 0;
    size_t bytes;
    float *whole;
    if (!size_mul((size_t)p->n_out, (size_t)p->n_in, &bytes) || !size_mul(bytes, 4, &bytes))
        FAIL(ERR_NO_MEMORY, "a weight of %lld x %lld", (long long)p->n_out, (long long)p->n_in);
    TRY(mem_alloc_huge(bytes, (void **)&whole));
    for (int64_t r = 0; r < p->n_out; r++)
        backend_cpu.packed_row(p, r, whole + r * p->n_in);
    packed_slices(l, of, n_of, whole, p->n_in, p->bias, parts, &n_parts);
    bool biased = p->bias && !(is_shard_in(of[0]) && l->m->group.rank != 0);
    enum err e =
        l->ops->weight_create(l->backend, parts, n_parts, biased ? l->bias : NULL, format, out);
    mem_free_huge(whole, bytes);
    return e;
}

/* A weight of a packed file: its bytes as they are where one rank has this device's layout. */
static enum err packed_load(struct loader *l, const enum role *of, int n_of, int layer,
                            enum weight_format format, struct weight **out)
{
    struct packed_weight p = {.format = format,
                              .n_in = config_dim(&l->m->config, roles[of[0]].columns)};
    struct packed_parts parts;
    struct hash128 want, have;
    char stem[PACKED_STEM_MAX];
    bool biased = false;
    const char *layout = l->ops->packed_layout;
    for (int i = 0; i < n_of; i++) {
        p.n_out += config_dim(&l->m->config, roles[of[i]].rows);
        biased = biased || config_has_bias(&l->m->config, of[i]);
    }
    weights_stem(of[0], layer, stem);
    TRY(packed_find(l->m->file, stem, biased, &p, &parts, &want));
    source_use(&l->source, parts.panels);
    source_use(&l->source, parts.scale);
    source_use(&l->source, parts.bias);
    if (l->m->group.size == 1 && layout && !strcmp(layout, l->packed.layout)) {
        TRY(l->ops->weight_import(l->backend, &p, &have, out));
    } else {
        have = backend_cpu.packed_digest(&p);
        TRY(packed_again(l, of, n_of, &p, format, out));
    }
    source_release(&l->source);
    l->m->weight_bytes += l->ops->weight_bytes(*out);
    advance(l, l->ops->weight_bytes(*out));
    return packed_verify(l->m->file, &parts, want, have);
}

/* --- weights --- */

/* One packed weight of the given roles, stacked by rows. */
static enum err weight_load(struct loader *l, const enum role *of, int n_of, int layer,
                            enum weight_format format, struct weight **out)
{
    struct matrix_view parts[4];
    int n_parts = 0;
    int64_t bias_at = 0;
    bool biased = false;
    if (l->is_packed) return packed_load(l, of, n_of, layer, format, out);
    for (int i = 0; i < n_of; i++) {
        struct matrix_view whole;
        TRY(source_matrix(&l->source, of[i], layer, &whole));
        biased = biased || config_has_bias(&l->m->config, of[i]);
        for (int s = 0; s < segments_of(of[i]); s++) {
            struct shard_range r = slice_of(l->m, of[i], s);
            parts[n_parts++] = is_shard_in(of[i]) ? columns_of(whole, r) : rows_of(whole, r);
            TRY(bias_add(l, of[i], layer, s, &bias_at));
        }
        if (is_shard_in(of[i]) && l->m->group.rank != 0) biased = false;
    }
    TRY(l->ops->weight_create(l->backend, parts, n_parts, biased ? l->bias : NULL, format, out));
    source_release(&l->source);
    l->m->weight_bytes += l->ops->weight_bytes(*out);
    advance(l, l->ops->weight_bytes(*out));
    return OK;
}

static uint64_t view_bytes(struct matrix_view v)
{
    return (uint64_t)v.rows * (uint64_t)v.cols * dtype_bytes(v.dtype);
}

static enum err table_load(struct loader *l, enum role role, struct weight **out)
{
    struct matrix_view view;
    struct kept *kept = &l->m->kept[l->m->n_kept];
    TRY(source_matrix(&l->source, role, 0, &view));
    if (source_keep(&l->source, view.data, &kept->mem, &kept->bytes)) l->m->n_kept++;
    if (role == ROLE_EMBED) l->embedding = view;
    TRY(l->ops->table_create(l->backend, view, out));
    l->m->table_bytes += view_bytes(view);
    advance(l, view_bytes(view));
    source_release(&l->source);
    return OK;
}

/* The output projection: its own matrix, or the embedding's rows. */
static enum err head_load(struct loader *l)
{
    struct model *m = l->m;
    enum role role = ROLE_LM_HEAD;
    if (m->config.tied && !l->is_packed) {
        struct matrix_view view = rows_of(l->embedding, m->vocab);
        TRY(l->ops->weight_create(l->backend, &view, 1, NULL, l->options->head_format,
                                  &m->lm_head));
        m->weight_bytes += l->ops->weight_bytes(m->lm_head);
        advance(l, l->ops->weight_bytes(m->lm_head));
        return OK;
    }
    return weight_load(l, &role, 1, 0, l->options->head_format, &m->lm_head);
}

/* --- vectors --- */

static enum err vector_upload(struct loader *l, const float *host, size_t n, const float **out)
{
    struct model *m = l->m;
    void *mem;
    ASSERT_CMP(m->n_vectors, <, m->vectors_max);
    TRY(l->ops->alloc(l->backend, n * sizeof(float), &mem));
    m->vectors[m->n_vectors++] = mem;
    m->weight_bytes += n * sizeof(float);
    TRY(l->ops->upload(l->backend, mem, host, n * sizeof(float)));
    *out = mem;
    return OK;
}

static enum err vector_load(struct loader *l, enum role role, int layer, bool bias,
                            const float **out)
{
    int64_t n = config_dim(&l->m->config, roles[role].rows);
    ASSERT_CMP(n, <=, l->bias_max);
    TRY(source_vector(&l->source, role, layer, bias, n, l->bias));
    return vector_upload(l, l->bias, (size_t)n, out);
}

static enum err norm_load(struct loader *l, enum role role, int layer, struct norm_args *out)
{
    out->kind = l->m->config.arch->norm;
    out->epsilon = l->m->config.norm_epsilon;
    TRY(vector_load(l, role, layer, false, &out->weight));
    if (config_has_bias(&l->m->config, role)) TRY(vector_load(l, role, layer, true, &out->bias));
    return OK;
}

/* --- rotary tables --- */

enum { ROPE_THREADS_MAX = 16, ROPE_PART_MIN = 4096 }; /* positions that are worth a thread */

struct rope_part {
    const struct model_config *config;
    float *cos, *sin;
    int first, end;
    pthread_t thread;
    bool started;
};

static void *rope_fill(void *arg)
{
    struct rope_part *p = arg;
    config_rope_tables(p->config, p->first, p->end, p->cos, p->sin);
    return NULL;
}

/* Long contexts have millions of cosines: every thread of the rank makes some. */
static void rope_tables(const struct loader *l, float *cos, float *sin)
{
    struct rope_part parts[ROPE_THREADS_MAX];
    int n_positions = l->m->context_max, n = l->options->n_threads;
    n = n > ROPE_THREADS_MAX ? ROPE_THREADS_MAX : n;
    n = n > n_positions / ROPE_PART_MIN ? n_positions / ROPE_PART_MIN : n;
    n = n < 1 ? 1 : n;
    for (int i = 0; i < n; i++) {
        parts[i] = (struct rope_part){.config = &l->m->config,
                                      .cos = cos,
                                      .sin = sin,
                                      .first = (int)((int64_t)n_positions * i / n),
                                      .end = (int)((int64_t)n_positions * (i + 1) / n)};
        parts[i].started = i && !pthread_create(&parts[i].thread, NULL, rope_fill, &parts[i]);
    }
    for (int i = 0; i < n; i++) {
        if (parts[i].started)
            pthread_join(parts[i].thread, NULL);
        else
            rope_fill(&parts[i]);
    }
}

static enum err rope_load(struct loader *l, const float **out_cos, const float **out_sin)
{
    size_t n = (size_t)l->m->context_max * (size_t)(l->m->config.rope.rotary_dim / 2);
    float *cos_sin;
    TRY(MEM_NEW_ARRAY(2 * n, &cos_sin));
    rope_tables(l, cos_sin, cos_sin + n);
    enum err e = vector_upload(l, cos_sin, n, out_cos);
    if (!e) e = vector_upload(l, cos_sin + n, n, out_sin);
    mem_free(cos_sin);
    return e;
}

/* --- layers --- */

static enum err attention_load(struct loader *l, int i, struct attention_args *a)
{
    const struct model *m = l->m;
    const struct model_config *c = &m->config;
    *a = (struct attention_args){
        .layer = i,
        .n_heads = (int)shard_count(m->heads.q),
        .n_kv_heads = (int)shard_count(m->heads.kv),
        .head_dim = c->head_dim,
        .scale = c->scale_by_layer ? c->attention_scale / (float)(i + 1) : c->attention_scale,
        .window = c->layer_window[i],
        .rotary_dim = c->rope.rotary_dim,
        .norm_epsilon = c->norm_epsilon,
        .group = m->heads.group,
        .head_offset = m->heads.head_offset,
        .kv_offset = m->heads.kv_offset,
    };
    if (i > 0) {
        a->rope_cos = m->layers[0].attention.rope_cos;
        a->rope_sin = m->layers[0].attention.rope_sin;
    } else if (c->rope.type != ROPE_NONE) {
        TRY(rope_load(l, &a->rope_cos, &a->rope_sin));
    }
    if (config_has_role(c, ROLE_Q_NORM)) {
        TRY(vector_load(l, ROLE_Q_NORM, i, false, &a->q_norm));
        TRY(vector_load(l, ROLE_K_NORM, i, false, &a->k_norm));
    }
    return OK;
}

/* The router is never made coarse: a choice among experts is no place to save bytes. */
static enum weight_format router_format(enum weight_format head)
{
    bool coarse = head == WEIGHT_INT8 || head == WEIGHT_INT4 || head == WEIGHT_FP8;
    return coarse ? WEIGHT_AUTO : head;
}

static enum err experts_load(struct loader *l, int i)
{
    static const enum role router[] = {ROLE_ROUTER}, up[] = {ROLE_W_GATE, ROLE_W_UP},
                           down[] = {ROLE_W_DOWN};
    const struct model_config *c = &l->m->config;
    struct layer *layer = &l->m->layers[i];
    if (l->is_packed) FAIL(ERR_FORMAT, "%s: experts in a file of packed weights", c->path);
    if (!l->ops->moe_create)
        FAIL(ERR_UNSUPPORTED, "%s: the device %s has no mixture of experts", c->path, l->ops->name);
    TRY(weight_load(l, router, 1, i, router_format(l->options->head_format), &layer->router));
    TRY(MEM_NEW_ARRAY(c->n_experts, &layer->experts_up));
    TRY(MEM_NEW_ARRAY(c->n_experts, &layer->experts_down));
    for (int e = 0; e < c->n_experts; e++) {
        l->source.expert = e;
        TRY(weight_load(l, up, 2, i, l->options->format, &layer->experts_up[e]));
        TRY(weight_load(l, down, 1, i, l->options->format, &layer->experts_down[e]));
    }
    l->source.expert = 0;
    struct moe_args args = {c->n_experts,  c->top_k,          c->renormalize_experts,
                            c->activation, layer->experts_up, layer->experts_down};
    return l->ops->moe_create(l->backend, &args, &layer->moe);
}

static enum err layer_load(struct loader *l, int i)
{
    static const enum role separate[] = {ROLE_WQ, ROLE_WK, ROLE_WV}, fused[] = {ROLE_WQKV};
    static const enum role gated[] = {ROLE_W_GATE, ROLE_W_UP}, plain[] = {ROLE_W_UP};
    static const enum role out[] = {ROLE_WO}, down[] = {ROLE_W_DOWN};
    struct layer *layer = &l->m->layers[i];
    enum weight_format format = l->options->format;
    bool is_fused = config_has_role(&l->m->config, ROLE_WQKV), is_gated = l->m->config.gated;
    TRY(attention_load(l, i, &layer->attention));
    TRY(norm_load(l, ROLE_ATTN_NORM, i, &layer->attention_norm));
    TRY(weight_load(l, is_fused ? fused : separate, is_fused ? 1 : 3, i, format, &layer->qkv));
    TRY(weight_load(l, out, 1, i, format, &layer->out));
    TRY(norm_load(l, ROLE_FFN_NORM, i, &layer->ffn_norm));
    if (l->m->config.n_experts) return experts_load(l, i);
    TRY(weight_load(l, is_gated ? gated : plain, is_gated ? 2 : 1, i, format, &layer->up));
    return weight_load(l, down, 1, i, format, &layer->down);
}

static enum err shares_load(struct loader *l)
{
    struct model *m = l->m;
    const struct model_config *c = &m->config;
    static const enum role in = ROLE_PROJECT_IN, project = ROLE_PROJECT_OUT;
    TRY(table_load(l, ROLE_EMBED, &m->embed));
    if (config_has_role(c, ROLE_POSITION)) TRY(table_load(l, ROLE_POSITION, &m->positions));
    if (config_has_role(c, ROLE_PROJECT_IN))
        TRY(weight_load(l, &in, 1, 0, l->options->head_format, &m->project_in));
    for (int i = 0; i < c->n_layers; i++)
        TRY(layer_load(l, i));
    if (config_has_role(c, ROLE_FINAL_NORM)) TRY(norm_load(l, ROLE_FINAL_NORM, 0, &m->final_norm));
    if (config_has_role(c, ROLE_PROJECT_OUT))
        TRY(weight_load(l, &project, 1, 0, l->options->head_format, &m->project_out));
    TRY(head_load(l));
    return source_check_unused(&l->source);
}

/* --- the whole --- */

static void slices_set(struct model *m)
{
    const struct model_config *c = &m->config;
    int rank = m->group.rank, size = m->group.size;
    m->heads = shard_heads(c->n_heads, c->n_kv_heads, rank, size);
    m->ffn = shard_rounded(c->ffn, 128, rank, size);
    m->vocab = shard_rounded(c->vocab_size, 128, rank, size);
    for (int r = 0; r < size; r++)
        m->vocab_start[r] = (int32_t)shard_rounded(c->vocab_size, 128, r, size).begin;
    m->vocab_start[size] = c->vocab_size;
}

static int64_t widest(const struct model_config *c)
{
    int64_t most = 0;
    for (int role = 0; role < ROLE_COUNT; role++) {
        int64_t rows = config_has_role(c, (enum role)role) ? config_dim(c, roles[role].rows) : 0;
        if (rows > most) most = rows;
    }
    return most;
}

/* Opens the files; a checkpoint that says nothing of tying is tied when it holds no output matrix.
 */
static enum err file_open(struct model *m, const struct weights_options *options)
{
    TRY(safetensors_open(options->model_dir, &m->file));
    if (m->config.tied_said || !m->config.arch->names[ROLE_LM_HEAD]) return OK;
    struct source probe;
    TRY(source_init(&probe, &m->config, m->file, 0));
    m->config.tied = !source_has(&probe, ROLE_LM_HEAD);
    source_fini(&probe);
    return OK;
}

static enum dtype file_dtype(const struct model *m, const struct loader *l)
{
    if (l->is_packed) return l->packed.dtype;
    if (!m->file || !safetensors_count(m->file)) return m->config.dtype;
    enum st_dtype t = safetensors_at(m->file, 0)->dtype;
    return t == ST_F32 ? DTYPE_F32 : t == ST_F16 ? DTYPE_F16 : DTYPE_BF16;
}

static enum err model_fill(struct model *m, const struct weights_options *options)
{
    struct loader l = {.options = options, .m = m, .backend = m->backend, .ops = m->backend->ops};
    uint64_t tables;
    enum err e = OK;
    TRY(shard_check(m->config.n_heads, m->config.n_kv_heads, m->config.ffn, m->config.vocab_size,
                    m->group.size));
    if (!options->dummy) TRY(file_open(m, options));
    if (m->file) TRY(packed_read(m->file, &l.is_packed, &l.packed));
    if (l.is_packed &&
        (options->format != l.packed.format || options->head_format != l.packed.head_format))
        FAIL(ERR_INVALID, "%s: holds weights of another format than asked for", options->model_dir);
    if (l.is_packed && (m->group.size > 1 || !l.ops->packed_layout ||
                        strcmp(l.ops->packed_layout, l.packed.layout)))
        log_info(
            "%s: packed for one rank on a CPU (%s), so it is packed again for rank %d of %d on %s",
            options->model_dir, l.packed.layout, m->group.rank, m->group.size, l.ops->name);
    slices_set(m);
    m->context_max = options->context_max;
    m->vectors_max = m->config.n_layers * 6 + 4;
    TRY(MEM_NEW_ARRAY(m->vectors_max, &m->vectors));
    TRY(MEM_NEW_ARRAY(m->config.n_layers, &m->layers));
    TRY(model_digest(options, &m->config, m->file, m->digest));
    l.bias_max = 3 * widest(&m->config);
    TRY(MEM_NEW_ARRAY(l.bias_max, &l.bias));
    model_bytes_estimate(&m->config, m->group, options, file_dtype(m, &l), &l.total, &tables);
    l.total += tables;
    TRY_OUT(source_init(&l.source, &m->config, m->file, options->seed));
    TRY_OUT(shares_load(&l));
    l.done = l.total;
    advance(&l, 0);
out:
    source_fini(&l.source);
    mem_free(l.bias);
    return e;
}

enum err model_load(const struct weights_options *options, const struct model_config *config,
                    struct group group, struct backend *backend, struct model **out)
{
    struct model *m;
    TRY(MEM_NEW(&m));
    m->config = *config;
    m->group = group;
    m->backend = backend;
    enum err e = model_fill(m, options);
    if (e)
        model_unload(m);
    else
        *out = m;
    return e;
}

/* The experts' matrices of a layer; NULL, or some of them missing, when loading stopped early. */
static void weights_destroy(struct model *m, struct weight **list)
{
    for (int e = 0; list && e < m->config.n_experts; e++)
        if (list[e]) m->backend->ops->weight_destroy(m->backend, list[e]);
    mem_free(list);
}

void model_unload(struct model *m)
{
    if (!m) return;
    const struct backend_ops *ops = m->backend->ops;
    struct weight *single[] = {m->embed, m->positions, m->project_in, m->project_out, m->lm_head};
    for (size_t i = 0; i < sizeof single / sizeof *single; i++)
        if (single[i]) ops->weight_destroy(m->backend, single[i]);
    for (int i = 0; m->layers && i < m->config.n_layers; i++) {
        struct layer *layer = &m->layers[i];
        struct weight *of[] = {layer->qkv, layer->out, layer->up, layer->down, layer->router};
        if (layer->moe) ops->moe_destroy(m->backend, layer->moe);
        for (size_t w = 0; w < sizeof of / sizeof *of; w++)
            if (of[w]) ops->weight_destroy(m->backend, of[w]);
        weights_destroy(m, layer->experts_up);
        weights_destroy(m, layer->experts_down);
    }
    for (int i = 0; i < m->n_vectors; i++)
        ops->release(m->backend, m->vectors[i]);
    for (int i = 0; i < m->n_kept; i++)
        mem_free_huge(m->kept[i].mem, m->kept[i].bytes);
    safetensors_close(m->file);
    mem_free(m->vectors);
    mem_free(m->layers);
    mem_free(m);
}

static void digest_words(struct hash128 *h, const char *words)
{
    *h = hash_chain(*h, words, strlen(words));
}

enum err model_digest(const struct weights_options *options, const struct model_config *config,
                      const struct safetensors *file, char out[33])
{
    struct hash128 h = {0, 0};
    struct buf text;
    buf_init(&text, 0);
    enum err e = buf_read_file(&text, config->path, 0);
    if (!e) h = hash_chain(h, buf_string(&text), text.n);
    buf_fini(&text);
    TRY(e);
    for (size_t i = 0; file && i < safetensors_count(file); i++) {
        const struct st_tensor *t = safetensors_at(file, i);
        digest_words(&h, t->name);
        digest_words(&h, st_dtype_name(t->dtype));
        h = hash_chain(h, t->shape, (size_t)t->n_dims * sizeof *t->shape);
    }
    uint64_t rest[3] = {(uint64_t)options->format, (uint64_t)options->head_format,
                        options->dummy ? ~options->seed : 0};
    h = hash_chain(h, rest, sizeof rest);
    snprintf(out, 33, "%016llx%016llx", (unsigned long long)h.high, (unsigned long long)h.low);
    return OK;
}

static double bytes_per_weight(enum weight_format format, enum dtype file_dtype)
{
    switch (format) {
    case WEIGHT_F32:
        return 4;
    case WEIGHT_F16:
    case WEIGHT_BF16:
        return 2;
    case WEIGHT_INT8:
    case WEIGHT_FP8:
        return 1.01;
    case WEIGHT_INT4:
        return 0.52;
    default:
        return (double)dtype_bytes(file_dtype);
    }
}

void model_bytes_estimate(const struct model_config *config, struct group group,
                          const struct weights_options *options, enum dtype file_dtype,
                          uint64_t *out_weights, uint64_t *out_tables)
{
    struct shard_heads heads =
        shard_heads(config->n_heads, config->n_kv_heads, group.rank, group.size);
    int64_t q = shard_count(heads.q) * config->head_dim,
            kv = shard_count(heads.kv) * config->head_dim;
    int64_t ffn = shard_count(shard_rounded(config->ffn, 128, group.rank, group.size));
    int64_t vocab = shard_count(shard_rounded(config->vocab_size, 128, group.rank, group.size));
    int64_t n_experts = config->n_experts ? config->n_experts : 1;
    double layer =
        (double)(q + 2 * kv + q + (config->gated ? 3 : 2) * ffn * n_experts + config->n_experts) *
        config->hidden;
    double weights = layer * config->n_layers * bytes_per_weight(options->format, file_dtype);
    weights +=
        (double)vocab * config->embed_dim * bytes_per_weight(options->head_format, file_dtype);
    if (config->embed_dim != config->hidden)
        weights += 2.0 * config->hidden * config->embed_dim *
                   bytes_per_weight(options->head_format, file_dtype);
    weights += 4.0 * (config->n_layers * 4.0 + 2) * config->hidden;
    weights += 4.0 * options->context_max * config->rope.rotary_dim;
    *out_weights = (uint64_t)weights;
    *out_tables = ((uint64_t)config->vocab_size * (uint64_t)config->embed_dim +
                   (uint64_t)config->n_positions * (uint64_t)config->hidden) *
                  dtype_bytes(file_dtype);
}
