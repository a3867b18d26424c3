/* OPT: layer norm before (350m: after), learned positions from row 2, ReLU; embeddings may be
 * narrower than the model and are then projected in and out. */
#include "worker/model/arch.h"
#include "worker/model/config.h"

static const char *const prefixes[] = {"model.", "", NULL};

static enum err finish_config(struct model_config *c, const json_t *json)
{
    bool before = true, bias = true, affine = true, no_final = false;
    TRY(json_read_bool(json, "do_layer_norm_before", &before));
    TRY(json_read_bool(json, "enable_bias", &bias));
    TRY(json_read_bool(json, "layer_norm_elementwise_affine", &affine));
    TRY(json_read_bool(json, "_remove_final_layer_norm", &no_final));
    if (!affine)
        FAIL(ERR_UNSUPPORTED, "%s: 'layer_norm_elementwise_affine' false is not supported",
             c->path);
    c->norm_place = before ? NORM_PRE : NORM_POST;
    c->final_norm = before && !no_final;
    c->qkv_bias = c->out_bias = c->ffn_bias = bias;
    return OK;
}

const struct arch arch_opt = {
    .hf_name = "OPTForCausalLM",
    .model_type = "opt",
    .norm = NORM_LAYER,
    .activation = ACTIVATION_RELU,
    .tied_default = true,
    .qkv_bias = true,
    .out_bias = true,
    .ffn_bias = true,
    .position_offset = 2,
    .prefixes = prefixes,
    .names = {[ROLE_EMBED] = "decoder.embed_tokens",
              [ROLE_POSITION] = "decoder.embed_positions",
              [ROLE_PROJECT_IN] = "decoder.project_in",
              [ROLE_PROJECT_OUT] = "decoder.project_out",
              [ROLE_ATTN_NORM] = "decoder.layers.%d.self_attn_layer_norm",
              [ROLE_WQ] = "decoder.layers.%d.self_attn.q_proj",
              [ROLE_WK] = "decoder.layers.%d.self_attn.k_proj",
              [ROLE_WV] = "decoder.layers.%d.self_attn.v_proj",
              [ROLE_WO] = "decoder.layers.%d.self_attn.out_proj",
              [ROLE_FFN_NORM] = "decoder.layers.%d.final_layer_norm",
              [ROLE_W_UP] = "decoder.layers.%d.fc1",
              [ROLE_W_DOWN] = "decoder.layers.%d.fc2",
              [ROLE_FINAL_NORM] = "decoder.final_layer_norm",
              [ROLE_LM_HEAD] = "lm_head"},
    .finish_config = finish_config,
};
