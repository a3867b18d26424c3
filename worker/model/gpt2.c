/* GPT-2: layer norm, learned positions, matrices stored input-first, q, k and v in one of them. */
#include "worker/model/arch.h"
#include "worker/model/config.h"

static const char *const prefixes[] = {"transformer.", "", NULL};

/* Two switches of attention's scale, and one for a block that this family here does not have. */
static enum err finish_config(struct model_config *c, const json_t *json)
{
    bool scale = true, by_layer = false, cross = false;
    TRY(json_read_bool(json, "scale_attn_weights", &scale));
    TRY(json_read_bool(json, "scale_attn_by_inverse_layer_idx", &by_layer));
    TRY(json_read_bool(json, "add_cross_attention", &cross));
    if (cross) FAIL(ERR_UNSUPPORTED, "%s: 'add_cross_attention' is not supported", c->path);
    if (!scale) c->attention_scale = 1;
    c->scale_by_layer = by_layer;
    return OK;
}

const struct arch arch_gpt2 = {
    .hf_name = "GPT2LMHeadModel",
    .model_type = "gpt2",
    .norm = NORM_LAYER,
    .activation = ACTIVATION_GELU_TANH,
    .weights_in_out = true,
    .tied_default = true,
    .qkv_bias = true,
    .out_bias = true,
    .ffn_bias = true,
    .prefixes = prefixes,
    .names = {[ROLE_EMBED] = "wte",
              [ROLE_POSITION] = "wpe",
              [ROLE_ATTN_NORM] = "h.%d.ln_1",
              [ROLE_WQKV] = "h.%d.attn.c_attn",
              [ROLE_WO] = "h.%d.attn.c_proj",
              [ROLE_FFN_NORM] = "h.%d.ln_2",
              [ROLE_W_UP] = "h.%d.mlp.c_fc",
              [ROLE_W_DOWN] = "h.%d.mlp.c_proj",
              [ROLE_FINAL_NORM] = "ln_f",
              [ROLE_LM_HEAD] = "lm_head"},
    .finish_config = finish_config,
};
