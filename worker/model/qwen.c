/* Qwen2 (bias on q, k, v; a window only where use_sliding_window asks for it) and Qwen3 (norm of
 * every head before rope, no bias). */
#include "worker/model/arch.h"
#include "worker/model/config.h"

/* The window counts only when switched on, and then from layer max_window_layers upwards. */
static enum err finish_config(struct model_config *c, const json_t *json)
{
    bool use = false;
    int64_t first = 0;
    TRY(json_read_bool(json, "use_sliding_window", &use));
    TRY(json_read_int(json, "max_window_layers", 0, CONFIG_LAYERS_MAX, &first));
    if (!use) c->window = 0;
    if (json_object_get(json, "layer_types")) return OK; /* says it layer by layer */
    for (int i = 0; i < c->n_layers; i++)
        c->layer_window[i] = use && i >= first ? c->window : 0;
    return OK;
}

const struct arch arch_qwen2 = {
    .hf_name = "Qwen2ForCausalLM",
    .model_type = "qwen2",
    .norm = NORM_RMS,
    .activation = ACTIVATION_SILU,
    .qkv_bias = true,
    .prefixes = arch_prefixes_model,
    .names = {ARCH_LLAMA_NAMES},
    .finish_config = finish_config,
};

const struct arch arch_qwen3 = {
    .hf_name = "Qwen3ForCausalLM",
    .model_type = "qwen3",
    .norm = NORM_RMS,
    .activation = ACTIVATION_SILU,
    .prefixes = arch_prefixes_model,
    .names = {ARCH_LLAMA_NAMES, [ROLE_Q_NORM] = "layers.%d.self_attn.q_norm",
              [ROLE_K_NORM] = "layers.%d.self_attn.k_norm"},
    .finish_config = finish_config,
};
