/* Llama and Mistral: RMS norm before, rotary positions, grouped heads, gated SiLU. */
#include "worker/model/arch.h"
#include "worker/model/config.h"

const struct arch arch_llama = {
    .hf_name = "LlamaForCausalLM",
    .model_type = "llama",
    .norm = NORM_RMS,
    .activation = ACTIVATION_SILU,
    .prefixes = arch_prefixes_model,
    .names = {ARCH_LLAMA_NAMES},
};

/* Where config.json is silent, Mistral's window is 4096; null means none. */
static enum err mistral_finish(struct model_config *c, const json_t *json)
{
    if (json_object_get(json, "sliding_window") || json_object_get(json, "layer_types")) return OK;
    c->window = 4096;
    for (int i = 0; i < c->n_layers; i++)
        c->layer_window[i] = c->window;
    return OK;
}

const struct arch arch_mistral = {
    .hf_name = "MistralForCausalLM",
    .model_type = "mistral",
    .norm = NORM_RMS,
    .activation = ACTIVATION_SILU,
    .prefixes = arch_prefixes_model,
    .names = {ARCH_LLAMA_NAMES},
    .finish_config = mistral_finish,
};
