/* Mixtures of experts: Mixtral, and Qwen3-MoE in the form where every layer is one.
 *
 * The feed-forward becomes a router and many small gated ones; all else is as in Mistral and Qwen3.
 * What a dense layer between, or a shared expert, would need is refused by name. */
#include "kernels/backend.h"
#include "worker/model/arch.h"
#include "worker/model/config.h"

static enum err experts_read(struct model_config *c, const json_t *json, const char *count)
{
    int64_t n = 0, top_k = 0;
    TRY(json_read_int(json, count, 1, MOE_EXPERTS_MAX, &n));
    TRY(json_read_int(json, "num_experts_per_tok", 1, MOE_TOP_K_MAX, &top_k));
    if (!n) FAIL(ERR_INVALID, "'%s' is missing", count);
    if (!top_k) FAIL(ERR_INVALID, "'num_experts_per_tok' is missing");
    if (top_k > n)
        FAIL(ERR_INVALID, "'num_experts_per_tok' %lld of '%s' %lld", (long long)top_k, count,
             (long long)n);
    c->n_experts = (int)n;
    c->top_k = (int)top_k;
    return OK;
}

static enum err mixtral_config(struct model_config *c, const json_t *json)
{
    c->renormalize_experts = true;
    return experts_read(c, json, "num_local_experts");
}

static enum err qwen3_moe_config(struct model_config *c, const json_t *json)
{
    const json_t *dense = json_object_get(json, "mlp_only_layers");
    int64_t every = 1, ffn = 0;
    bool window = false;
    TRY(json_read_int(json, "decoder_sparse_step", 1, CONFIG_LAYERS_MAX, &every));
    if (every != 1 || json_array_size(dense))
        FAIL(ERR_UNSUPPORTED, "dense layers among those of experts ('decoder_sparse_step', "
                              "'mlp_only_layers') are not supported");
    TRY(json_read_bool(json, "use_sliding_window", &window));
    if (window) FAIL(ERR_UNSUPPORTED, "'use_sliding_window' is not supported with experts");
    c->window = 0;
    for (int i = 0; i < c->n_layers; i++)
        c->layer_window[i] = 0;
    TRY(json_read_int(json, "moe_intermediate_size", 1, 1 << 22, &ffn));
    if (!ffn) FAIL(ERR_INVALID, "'moe_intermediate_size' is missing");
    c->ffn = (int)ffn;
    TRY(json_read_bool(json, "norm_topk_prob", &c->renormalize_experts));
    return experts_read(c, json, "num_experts");
}

const struct arch arch_mixtral = {
    .hf_name = "MixtralForCausalLM",
    .model_type = "mixtral",
    .norm = NORM_RMS,
    .activation = ACTIVATION_SILU,
    .prefixes = arch_prefixes_model,
    .names = {ARCH_LLAMA_SHARED, [ROLE_ROUTER] = "layers.%d.block_sparse_moe.gate",
              [ROLE_W_GATE] = "layers.%d.block_sparse_moe.experts.%d.w1",
              [ROLE_W_UP] = "layers.%d.block_sparse_moe.experts.%d.w3",
              [ROLE_W_DOWN] = "layers.%d.block_sparse_moe.experts.%d.w2"},
    .finish_config = mixtral_config,
};

const struct arch arch_qwen3_moe = {
    .hf_name = "Qwen3MoeForCausalLM",
    .model_type = "qwen3_moe",
    .norm = NORM_RMS,
    .activation = ACTIVATION_SILU,
    .prefixes = arch_prefixes_model,
    .names = {ARCH_LLAMA_SHARED, [ROLE_Q_NORM] = "layers.%d.self_attn.q_norm",
              [ROLE_K_NORM] = "layers.%d.self_attn.k_norm", [ROLE_ROUTER] = "layers.%d.mlp.gate",
              [ROLE_W_GATE] = "layers.%d.mlp.experts.%d.gate_proj",
              [ROLE_W_UP] = "layers.%d.mlp.experts.%d.up_proj",
              [ROLE_W_DOWN] = "layers.%d.mlp.experts.%d.down_proj"},
    .finish_config = qwen3_moe_config,
};
