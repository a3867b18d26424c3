/* Loads one rank's share: for each layer the views of its roles, sliced by this rank, packed by the
 * backend. */
#include "worker/weights.h"
#include "base/log.h"
#include "base/mem.h"
#include "worker/int4.h"
#include "worker/loader.h"
#include "worker/settle.h"

#include <string.h>

/* --- matrices --- */

void loader_advance(struct loader *l, uint64_t bytes)
{
    l->done += bytes;
    if (l->options->progress)
        l->options->progress(l->options->ctx, l->done < l->total ? l->done : l->total, l->total);
}

/* Programs that quantize may save a bias with every matrix, also where the model has none. */
static bool role_has_bias(const struct loader *l, enum role role, int layer)
{
    char name[SOURCE_NAME_MAX];
    if (config_has_bias(&l->m->config, role)) return true;
    if (!int4_has(&l->source, role, layer)) return false;
    source_name(&l->source, role, layer, ".bias", name);
    return safetensors_find(l->m->file, name) != NULL;
}

/* The bias of a role's slice into l->bias from *at on; zeros where the role has none. */
static enum err bias_add(struct loader *l, enum role role, int layer, int segment, int64_t *at)
{
    int64_t rows = config_dim(&l->m->config, roles[role].rows);
    struct shard_range r =
        role_is_shard_in(role) ? (struct shard_range){0, rows} : loader_slice(l->m, role, segment);
    int64_t n = shard_count(r);
    bool has = role_has_bias(l, role, layer), mine = !role_is_shard_in(role) || !l->m->group.rank;
    ASSERT_CMP(*at + rows, <=, l->bias_max);
    if (has) /* the file is checked on every rank */
        TRY(source_vector(&l->source, role, layer, true, rows, l->bias + *at));
    if (has && mine)
        memmove(l->bias + *at, l->bias + *at + r.begin, (size_t)n * sizeof(float));
    else
        memset(l->bias + *at, 0, (size_t)n * sizeof(float));
    *at += n;
    return OK;
}

/* The biases of a fused weight into l->bias; *out_bias: that, or NULL where this rank has none. */
static enum err bias_load(struct loader *l, const enum role *of, int n_of, int layer,
                          const float **out_bias)
{
    int64_t at = 0;
    *out_bias = NULL;
    for (int i = 0; i < n_of; i++) {
        if (role_has_bias(l, of[i], layer) && !(role_is_shard_in(of[i]) && l->m->group.rank))
            *out_bias = l->bias;
        for (int s = 0; s < role_segments(of[i]); s++)
            TRY(bias_add(l, of[i], layer, s, &at));
    }
    return OK;
}

/* --- weights --- */

static enum err plain_weight(struct loader *l, const enum role *of, int n_of, int layer,
                             const float *bias, enum weight_format format, struct weight **out)
{
    struct matrix_view parts[WEIGHT_PARTS_MAX];
    int n_parts = 0;
    for (int i = 0; i < n_of; i++) {
        struct matrix_view whole;
        TRY(source_matrix(&l->source, of[i], layer, &whole));
        for (int s = 0; s < role_segments(of[i]); s++) {
            struct shard_range r = loader_slice(l->m, of[i], s);
            parts[n_parts++] =
                role_is_shard_in(of[i]) ? view_columns(whole, r) : view_rows(whole, r);
        }
    }
    return l->ops->weight_create(l->backend, parts, n_parts, bias, format, out);
}

/* One packed weight of the given roles, stacked by rows. */
static enum err weight_load(struct loader *l, const enum role *of, int n_of, int layer,
                            enum weight_format format, struct weight **out)
{
    const float *bias;
    /* a file of packed weights keeps routers as they were */
    if (l->is_packed && of[0] != ROLE_ROUTER)
        return loader_packed_weight(l, of, n_of, layer, format, out);
    TRY(bias_load(l, of, n_of, layer, &bias));
    if (loader_has_codes(l, of, n_of, layer))
        TRY(loader_codes_weight(l, of, n_of, layer, bias, out));
    else
        TRY(plain_weight(l, of, n_of, layer, bias, format, out));
    source_release(&l->source);
    l->m->weight_bytes += l->ops->weight_bytes(*out);
    loader_advance(l, l->ops->weight_bytes(*out));
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
    loader_advance(l, view_bytes(view));
    source_release(&l->source);
    return OK;
}

/* The output projection: its own matrix, or the embedding's rows. */
static enum err head_load(struct loader *l)
{
    struct model *m = l->m;
    enum role role = ROLE_LM_HEAD;
    if (m->config.tied && !l->is_packed) {
        struct matrix_view view = view_rows(l->embedding, m->vocab);
        TRY(l->ops->weight_create(l->backend, &view, 1, NULL, l->options->head_format,
                                  &m->lm_head));
        m->weight_bytes += l->ops->weight_bytes(m->lm_head);
        loader_advance(l, l->ops->weight_bytes(m->lm_head));
        return OK;
    }
    return weight_load(l, &role, 1, 0, l->options->head_format, &m->lm_head);
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
        TRY(loader_rope(l, &a->rope_cos, &a->rope_sin));
    }
    if (config_has_role(c, ROLE_Q_NORM)) {
        TRY(loader_vector(l, ROLE_Q_NORM, i, false, &a->q_norm));
        TRY(loader_vector(l, ROLE_K_NORM, i, false, &a->k_norm));
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
    TRY(loader_norm(l, ROLE_ATTN_NORM, i, &layer->attention_norm));
    TRY(weight_load(l, is_fused ? fused : separate, is_fused ? 1 : 3, i, format, &layer->qkv));
    TRY(weight_load(l, out, 1, i, format, &layer->out));
    TRY(loader_norm(l, ROLE_FFN_NORM, i, &layer->ffn_norm));
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
    if (config_has_role(c, ROLE_FINAL_NORM))
        TRY(loader_norm(l, ROLE_FINAL_NORM, 0, &m->final_norm));
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
    return l->is_packed ? l->packed.dtype : weights_dtype(&m->config, m->file);
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
    if (options->settles && l.is_packed && l.ops->weight_adopt)
        TRY_OUT(settle_create(m->backend, m->file, &m->settle));
    TRY_OUT(source_init(&l.source, &m->config, m->file, options->seed));
    TRY_OUT(shares_load(&l));
    l.done = l.total;
    loader_advance(&l, 0);
    loader_codes_report(&l);
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
    settle_destroy(m->settle);
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
