/* config.json as numbers: every field that the forward pass and the loader need, checked.
 *
 * One table of aliases serves all architectures ("hidden_size", "n_embd", ...). What this program
 * cannot compute is refused by name, because a field ignored is a wrong answer later. */
#pragma once
#include "base/err.h"
#include "kernels/tensor.h"
#include "worker/model/arch.h"
#include <stdint.h>

enum { CONFIG_LAYERS_MAX = 512, CONFIG_PATH_MAX = 1024 };

enum rope_type { ROPE_NONE, ROPE_DEFAULT, ROPE_LINEAR, ROPE_DYNAMIC, ROPE_LLAMA3, ROPE_YARN };
struct rope_config {
    enum rope_type type;
    double theta, factor;
    double low_freq_factor, high_freq_factor;      /* llama3 */
    double beta_fast, beta_slow, attention_factor; /* yarn; 0 = from the factor */
    double mscale, mscale_all_dim;                 /* yarn, 0 = absent */
    bool truncate;                                 /* yarn */
    int64_t original_context;
    int rotary_dim;
};

/* Checkpoints whose matrices are 4-bit codes with scales. */
enum quant_method { QUANT_NONE, QUANT_GPTQ, QUANT_AWQ, QUANT_COMPRESSED };
struct quant_config {
    enum quant_method method;
    int group_size;     /* inputs that share a scale, a multiple of 32; 0 = all of an output */
    bool symmetric;     /* every zero point is 8, as the file says */
    bool act_order;     /* groups are of inputs that do not follow each other */
    bool zero_less_one; /* GPTQ's first format stores zero points less one */
};

struct model_config {
    char path[CONFIG_PATH_MAX]; /* of config.json, for errors */
    const struct arch *arch;
    int n_layers, n_heads, n_kv_heads, head_dim;
    int hidden, embed_dim, ffn, vocab_size; /* ffn: of one expert where there are several */
    int n_experts, top_k;                   /* 0 = one dense feed-forward */
    bool renormalize_experts;
    int context_max; /* positions that the model knows */
    int n_positions; /* rows of learned positions, offset included; 0 with rope */
    float norm_epsilon;
    enum activation activation;
    enum norm_place norm_place;
    bool final_norm, gated;
    bool tied, tied_said; /* output projection is the embedding; config.json says so itself */
    bool qkv_bias, out_bias, ffn_bias;
    float attention_scale;
    bool scale_by_layer;                 /* attention_scale / (layer + 1) */
    int window;                          /* of the layers that have one, 0 = none */
    int layer_window[CONFIG_LAYERS_MAX]; /* [n_layers], 0 = sees all */
    struct rope_config rope;
    struct quant_config quant;
    enum dtype dtype;       /* of the checkpoint as config.json says; BF16 where it does not */
    int32_t bos_id, eos_id; /* -1 = not said */
};

/* Reads MODEL_DIR/config.json. ERR_FORMAT and ERR_UNSUPPORTED name the file and the field. */
enum err config_read(const char *model_dir, struct model_config *out);
/* The same from text; `path` stands for it in errors. */
enum err config_parse(const char *path, const char *text, size_t n, struct model_config *out);

bool config_has_bias(const struct model_config *c, enum role role);
/* Whether the role exists in this model. */
bool config_has_role(const struct model_config *c, enum role role);
int64_t config_dim(const struct model_config *c, enum dim dim);
/* 0 when some layer sees all, else the widest window. */
int config_window(const struct model_config *c);
/* Parameters of the whole model; a tied output counts once. */
uint64_t config_parameters(const struct model_config *c);

/* quant.c: "quantization_config" of a whole config.json; method NONE where there is none. */
enum err quant_read(const json_t *config, struct quant_config *out);
const char *quant_name(enum quant_method method);
/* On a device, scales and zero points included. */
double quant_bytes_per_weight(const struct quant_config *q);

/* cos and sin of positions [first, end) and every frequency, scaling folded in, into tables that
 * begin at position 0: [positions][rotary_dim / 2]. */
void config_rope_tables(const struct model_config *c, int first, int end, float *out_cos,
                        float *out_sin);
