/* config.json -> struct model_config: the alias table, the defaults, and what is refused. */
#include "worker/model/config.h"
#include "base/buf.h"

#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

enum {
    SIZE_MAX_HIDDEN = 1 << 20,
    SIZE_MAX_HEADS = 1 << 14,
    SIZE_MAX_VOCAB = 1 << 24,
    SIZE_MAX_FFN = 1 << 22,
    SIZE_MAX_CONTEXT = 1 << 26,
    CONFIG_BYTES_MAX = 16 << 20
};

/* One row a field: where it goes, how it may be called, its range. */
static const struct {
    size_t offset;
    int64_t max;
    const char *aliases[4];
} int_fields[] = {
    {offsetof(struct model_config, hidden), SIZE_MAX_HIDDEN, {"hidden_size", "n_embd", "d_model"}},
    {offsetof(struct model_config, n_layers),
     CONFIG_LAYERS_MAX,
     {"num_hidden_layers", "n_layer", "num_layers"}},
    {offsetof(struct model_config, n_heads), SIZE_MAX_HEADS, {"num_attention_heads", "n_head"}},
    {offsetof(struct model_config, n_kv_heads), SIZE_MAX_HEADS, {"num_key_value_heads"}},
    {offsetof(struct model_config, head_dim), 4096, {"head_dim"}},
    {offsetof(struct model_config, ffn), SIZE_MAX_FFN, {"intermediate_size", "ffn_dim", "n_inner"}},
    {offsetof(struct model_config, vocab_size), SIZE_MAX_VOCAB, {"vocab_size"}},
    {offsetof(struct model_config, embed_dim), SIZE_MAX_HIDDEN, {"word_embed_proj_dim"}},
    {offsetof(struct model_config, context_max),
     SIZE_MAX_CONTEXT,
     {"max_position_embeddings", "n_positions", "n_ctx"}},
    {offsetof(struct model_config, window), SIZE_MAX_CONTEXT, {"sliding_window"}},
};

static const struct {
    const char *name;
    enum activation kind;
} activations[] = {
    {"silu", ACTIVATION_SILU},           {"swish", ACTIVATION_SILU},
    {"gelu_new", ACTIVATION_GELU_TANH},  {"gelu_pytorch_tanh", ACTIVATION_GELU_TANH},
    {"gelu_fast", ACTIVATION_GELU_TANH}, {"gelu", ACTIVATION_GELU_ERF},
    {"relu", ACTIVATION_RELU},
};

static enum err ints_read(struct model_config *c, const json_t *json)
{
    for (size_t i = 0; i < sizeof int_fields / sizeof *int_fields; i++) {
        for (int a = 0; a < 4 && int_fields[i].aliases[a]; a++) {
            int64_t value = 0;
            TRY(json_read_int(json, int_fields[i].aliases[a], 1, int_fields[i].max, &value));
            if (value) {
                *(int *)((char *)c + int_fields[i].offset) = (int)value;
                break;
            }
        }
    }
    if (!c->hidden) FAIL(ERR_INVALID, "'hidden_size' is missing");
    if (!c->n_layers) FAIL(ERR_INVALID, "'num_hidden_layers' is missing");
    if (!c->n_heads) FAIL(ERR_INVALID, "'num_attention_heads' is missing");
    if (!c->vocab_size) FAIL(ERR_INVALID, "'vocab_size' is missing");
    if (!c->context_max) FAIL(ERR_INVALID, "'max_position_embeddings' is missing");
    return OK;
}

static enum err arch_find(const json_t *json, const struct arch **out)
{
    const json_t *list = json_object_get(json, "architectures");
    const char *name = json_string_value(json_array_get(list, 0)), *type = NULL;
    struct buf known;
    TRY(json_read_string(json, "model_type", &type));
    buf_init(&known, 0);
    for (int i = 0; archs[i]; i++) {
        if (name ? !strcmp(name, archs[i]->hf_name) : type && !strcmp(type, archs[i]->model_type)) {
            *out = archs[i];
            buf_fini(&known);
            return OK;
        }
        buf_printf(&known, "%s%s", i ? ", " : "", archs[i]->hf_name);
    }
    enum err e = err_set(ERR_UNSUPPORTED, "unknown architecture '%.64s'; known are %s",
                         name   ? name
                         : type ? type
                                : "(none named)",
                         buf_string(&known));
    buf_fini(&known);
    return e;
}

static enum err activation_read(struct model_config *c, const json_t *json)
{
    const char *name = NULL;
    TRY(json_read_string(json, "hidden_act", &name));
    if (!name) TRY(json_read_string(json, "activation_function", &name));
    if (!name) TRY(json_read_string(json, "hidden_activation", &name));
    if (!name) return OK;
    for (size_t i = 0; i < sizeof activations / sizeof *activations; i++) {
        if (!strcmp(name, activations[i].name)) {
            c->activation = activations[i].kind;
            return OK;
        }
    }
    FAIL(ERR_UNSUPPORTED, "activation '%.64s' is not supported", name);
}

static enum err dtype_read(struct model_config *c, const json_t *json)
{
    const char *name = NULL;
    TRY(json_read_string(json, "torch_dtype", &name));
    if (!name) TRY(json_read_string(json, "dtype", &name));
    c->dtype = !name                      ? DTYPE_BF16
               : !strcmp(name, "float32") ? DTYPE_F32
               : !strcmp(name, "float16") ? DTYPE_F16
                                          : DTYPE_BF16;
    return OK;
}

/* "layer_types" names each layer's kind; without it every layer has the window. */
static enum err windows_read(struct model_config *c, const json_t *json)
{
    const json_t *types = json_object_get(json, "layer_types");
    for (int i = 0; i < c->n_layers; i++)
        c->layer_window[i] = c->window;
    if (!json_is_array(types)) return OK;
    if (json_array_size(types) != (size_t)c->n_layers)
        FAIL(ERR_INVALID, "'layer_types' names %zu layers of %d", json_array_size(types),
             c->n_layers);
    for (int i = 0; i < c->n_layers; i++) {
        const char *type = json_string_value(json_array_get(types, (size_t)i));
        bool sliding = type && !strcmp(type, "sliding_attention");
        if (!sliding && (!type || strcmp(type, "full_attention")))
            FAIL(ERR_UNSUPPORTED, "layer type '%.64s' is not supported", type ? type : "?");
        if (sliding && !c->window)
            FAIL(ERR_INVALID, "'layer_types' names sliding layers without 'sliding_window'");
        if (!sliding) c->layer_window[i] = 0;
    }
    return OK;
}

static enum err heads_check(struct model_config *c)
{
    if (!c->n_kv_heads) c->n_kv_heads = c->n_heads;
    if (c->n_heads % c->n_kv_heads)
        FAIL(ERR_INVALID, "'num_attention_heads' %d is no multiple of 'num_key_value_heads' %d",
             c->n_heads, c->n_kv_heads);
    if (!c->head_dim && c->hidden % c->n_heads)
        FAIL(ERR_INVALID, "'hidden_size' %d is no multiple of 'num_attention_heads' %d", c->hidden,
             c->n_heads);
    if (!c->head_dim) c->head_dim = c->hidden / c->n_heads;
    if (!c->ffn) {
        if (c->gated) FAIL(ERR_INVALID, "'intermediate_size' is missing");
        c->ffn = 4 * c->hidden; /* what GPT-2 means by leaving n_inner out */
    }
    if (!c->embed_dim) c->embed_dim = c->hidden;
    return OK;
}

static enum err rope_type_find(const json_t *rope, struct rope_config *r)
{
    static const struct {
        const char *name;
        enum rope_type type;
    } types[] = {{"default", ROPE_DEFAULT},
                 {"linear", ROPE_LINEAR},
                 {"dynamic", ROPE_DYNAMIC},
                 {"llama3", ROPE_LLAMA3},
                 {"yarn", ROPE_YARN}};
    const char *name = NULL;
    TRY(json_read_string(rope, "rope_type", &name));
    if (!name) TRY(json_read_string(rope, "type", &name));
    if (!name) return OK;
    for (size_t i = 0; i < sizeof types / sizeof *types; i++) {
        if (!strcmp(name, types[i].name)) {
            r->type = types[i].type;
            return OK;
        }
    }
    FAIL(ERR_UNSUPPORTED,
         "rope type '%.64s' is not supported; known are default, linear, dynamic, llama3, yarn",
         name);
}

static enum err rope_scaling_read(struct model_config *c, const json_t *rope)
{
    struct rope_config *r = &c->rope;
    TRY(rope_type_find(rope, r));
    TRY(json_read_number(rope, "rope_theta", 1, 1e12, &r->theta));
    TRY(json_read_number(rope, "factor", 1, 1e4, &r->factor));
    TRY(json_read_number(rope, "low_freq_factor", 1e-3, 1e4, &r->low_freq_factor));
    TRY(json_read_number(rope, "high_freq_factor", 1e-3, 1e4, &r->high_freq_factor));
    TRY(json_read_number(rope, "beta_fast", 1e-3, 1e6, &r->beta_fast));
    TRY(json_read_number(rope, "beta_slow", 1e-6, 1e6, &r->beta_slow));
    TRY(json_read_number(rope, "attention_factor", 1e-6, 1e6, &r->attention_factor));
    TRY(json_read_number(rope, "mscale", 0, 1e6, &r->mscale));
    TRY(json_read_number(rope, "mscale_all_dim", 0, 1e6, &r->mscale_all_dim));
    TRY(json_read_bool(rope, "truncate", &r->truncate));
    TRY(json_read_int(rope, "original_max_position_embeddings", 1, SIZE_MAX_CONTEXT,
                      &r->original_context));
    if (r->type > ROPE_DEFAULT && !r->factor) FAIL(ERR_INVALID, "rope type needs a 'factor'");
    if (r->type == ROPE_LLAMA3 &&
        (!r->low_freq_factor || !r->original_context || r->high_freq_factor <= r->low_freq_factor))
        FAIL(
            ERR_INVALID,
            "rope type llama3 needs 'original_max_position_embeddings' and 'low_freq_factor' under "
            "'high_freq_factor'");
    return OK;
}

static enum err rope_read(struct model_config *c, const json_t *json)
{
    struct rope_config *r = &c->rope;
    double partial = 1;
    *r = (struct rope_config){.theta = 10000, .beta_fast = 32, .beta_slow = 1, .truncate = true};
    if (c->arch->names[ROLE_POSITION]) return OK;
    r->type = ROPE_DEFAULT;
    TRY(json_read_number(json, "rope_theta", 1, 1e12, &r->theta));
    TRY(json_read_number(json, "partial_rotary_factor", 0, 1, &partial));
    const json_t *rope = json_object_get(json, "rope_parameters");
    if (!json_is_object(rope)) rope = json_object_get(json, "rope_scaling");
    if (json_is_object(rope)) {
        TRY(rope_scaling_read(c, rope));
        TRY(json_read_number(rope, "partial_rotary_factor", 0, 1, &partial));
    } else if (rope && !json_is_null(rope)) {
        FAIL(ERR_INVALID, "'rope_scaling' must be an object");
    }
    r->rotary_dim = (int)(c->head_dim * partial);
    if (r->rotary_dim < 2 || r->rotary_dim % 2)
        FAIL(ERR_UNSUPPORTED, "%d rotary dimensions are not supported", r->rotary_dim);
    if (r->type == ROPE_YARN) { /* the stretched context is what the file promises */
        if (!r->original_context) r->original_context = c->context_max;
        double stretched = (double)r->original_context * r->factor;
        if (stretched > c->context_max && stretched <= SIZE_MAX_CONTEXT)
            c->context_max = (int)stretched;
    }
    return OK;
}

static enum err epsilon_read(struct model_config *c, const json_t *json)
{
    double epsilon = c->arch->norm == NORM_RMS ? 1e-6 : 1e-5;
    TRY(json_read_number(json, "rms_norm_eps", 0, 1, &epsilon));
    TRY(json_read_number(json, "layer_norm_epsilon", 0, 1, &epsilon));
    TRY(json_read_number(json, "layer_norm_eps", 0, 1, &epsilon));
    c->norm_epsilon = (float)epsilon;
    return OK;
}

static enum err switches_read(struct model_config *c, const json_t *json)
{
    const json_t *tie = json_object_get(json, "tie_word_embeddings");
    bool attention_bias = c->qkv_bias;
    c->tied_said = json_is_boolean(tie);
    TRY(json_read_bool(json, "tie_word_embeddings", &c->tied));
    TRY(json_read_bool(json, "attention_bias", &attention_bias));
    if (json_is_boolean(json_object_get(json, "attention_bias")) && !c->arch->qkv_bias)
        c->qkv_bias = c->out_bias = attention_bias;
    return json_read_bool(json, "mlp_bias", &c->ffn_bias);
}

static void defaults_set(struct model_config *c)
{
    const struct arch *a = c->arch;
    c->activation = a->activation;
    c->gated = a->names[ROLE_W_GATE] != NULL;
    c->tied = a->tied_default;
    c->qkv_bias = a->qkv_bias;
    c->out_bias = a->out_bias;
    c->ffn_bias = a->ffn_bias;
    c->final_norm = true;
    c->bos_id = c->eos_id = -1;
}

static void ids_read(struct model_config *c, const json_t *json)
{
    const json_t *bos = json_object_get(json, "bos_token_id"),
                 *eos = json_object_get(json, "eos_token_id");
    if (json_is_array(eos)) eos = json_array_get(eos, 0);
    if (json_is_integer(bos)) c->bos_id = (int32_t)json_integer_value(bos);
    if (json_is_integer(eos)) c->eos_id = (int32_t)json_integer_value(eos);
}

static enum err fields_read(struct model_config *c, const json_t *json)
{
    if (!json_is_object(json)) FAIL(ERR_INVALID, "no JSON object");
    TRY(arch_find(json, &c->arch));
    defaults_set(c);
    TRY(quant_read(json, &c->quant));
    TRY(ints_read(c, json));
    TRY(heads_check(c));
    TRY(activation_read(c, json));
    TRY(dtype_read(c, json));
    TRY(epsilon_read(c, json));
    TRY(switches_read(c, json));
    TRY(windows_read(c, json));
    TRY(rope_read(c, json));
    c->attention_scale = 1.0f / sqrtf((float)c->head_dim);
    if (c->arch->names[ROLE_POSITION]) c->n_positions = c->context_max + c->arch->position_offset;
    ids_read(c, json);
    if (c->arch->finish_config) TRY(c->arch->finish_config(c, json));
    if (c->embed_dim != c->hidden && !c->arch->names[ROLE_PROJECT_IN])
        FAIL(ERR_UNSUPPORTED, "embeddings of width %d in a model of width %d", c->embed_dim,
             c->hidden);
    return OK;
}

enum err config_parse(const char *path, const char *text, size_t n, struct model_config *out)
{
    struct model_config c = {0};
    json_t *json = NULL;
    snprintf(c.path, sizeof c.path, "%s", path);
    enum err e = json_parse(text, n, &json);
    if (!e) e = fields_read(&c, json);
    if (json) json_decref(json);
    if (e) {
        char why[768];
        snprintf(why, sizeof why, "%s", err_detail());
        if (strncmp(why, path, strlen(path)))
            return err_set(e == ERR_INVALID ? ERR_FORMAT : e, "%s: %s", path, why);
        return e;
    }
    *out = c;
    return OK;
}

enum err config_read(const char *model_dir, struct model_config *out)
{
    char path[CONFIG_PATH_MAX];
    struct buf text;
    if (snprintf(path, sizeof path, "%s/config.json", model_dir) >= (int)sizeof path)
        FAIL(ERR_INVALID, "%.64s...: the path is too long", model_dir);
    buf_init(&text, 0);
    enum err e = buf_read_file(&text, path, CONFIG_BYTES_MAX);
    if (!e) e = config_parse(path, buf_string(&text), text.n, out);
    buf_fini(&text);
    return e;
}

bool config_has_bias(const struct model_config *c, enum role role)
{
    switch (roles[role].bias) {
    case BIAS_NORM:
        return c->arch->norm == NORM_LAYER;
    case BIAS_QKV:
        return c->qkv_bias;
    case BIAS_OUT:
        return c->out_bias;
    case BIAS_FFN:
        return c->ffn_bias;
    default:
        return false;
    }
}

bool config_has_role(const struct model_config *c, enum role role)
{
    if (!c->arch->names[role]) return false;
    switch (role) {
    case ROLE_PROJECT_IN:
    case ROLE_PROJECT_OUT:
        return c->embed_dim != c->hidden;
    case ROLE_FINAL_NORM:
        return c->final_norm;
    case ROLE_LM_HEAD:
        return !c->tied;
    default:
        return true;
    }
}

int64_t config_dim(const struct model_config *c, enum dim dim)
{
    int64_t q = (int64_t)c->n_heads * c->head_dim, kv = (int64_t)c->n_kv_heads * c->head_dim;
    switch (dim) {
    case DIM_MODEL:
        return c->hidden;
    case DIM_EMBED:
        return c->embed_dim;
    case DIM_VOCAB:
        return c->vocab_size;
    case DIM_CONTEXT:
        return c->n_positions;
    case DIM_Q:
        return q;
    case DIM_KV:
        return kv;
    case DIM_QKV:
        return q + 2 * kv;
    case DIM_HEAD:
        return c->head_dim;
    case DIM_FFN:
        return c->ffn;
    case DIM_EXPERTS:
        return c->n_experts;
    default:
        return 1;
    }
}

int config_window(const struct model_config *c)
{
    int widest = 0;
    for (int i = 0; i < c->n_layers; i++) {
        if (!c->layer_window[i]) return 0;
        if (c->layer_window[i] > widest) widest = c->layer_window[i];
    }
    return widest;
}

uint64_t config_parameters(const struct model_config *c)
{
    uint64_t total = 0;
    for (int role = 0; role < ROLE_COUNT; role++) {
        if (!config_has_role(c, (enum role)role)) continue;
        uint64_t rows = (uint64_t)config_dim(c, roles[role].rows);
        uint64_t n = rows * (uint64_t)config_dim(c, roles[role].columns);
        if (config_has_bias(c, (enum role)role)) n += rows;
        const char *layer = strstr(c->arch->names[role], "%d");
        bool is_expert = layer && strstr(layer + 2, "%d");
        total += n * (layer ? (uint64_t)c->n_layers : 1) * (is_expert ? (uint64_t)c->n_experts : 1);
    }
    return total;
}
