/* What an architecture is: one table. Adding one is one small file with one table and a row in
 * archs.c; sharding, loading and the forward pass follow from the roles.
 *
 * Presence is meaning: Q_NORM named = heads are normed; W_GATE named = gated feed-forward; POSITION
 * named = learned positions, else rope; ROUTER named = a mixture of experts, whose matrices carry a
 * second %d. A table knows names and kinds, never ranks or devices. */
#pragma once
#include "base/err.h"
#include "base/json.h"
#include "kernels/backend.h"
#include <stdbool.h>

/* Widths that a role's shape is made of. */
enum dim {
    DIM_1,
    DIM_MODEL,
    DIM_EMBED,
    DIM_VOCAB,
    DIM_CONTEXT,
    DIM_Q,
    DIM_KV,
    DIM_QKV,
    DIM_HEAD,
    DIM_FFN,
    DIM_EXPERTS
};

enum shard {
    SHARD_NONE,    /* every rank holds all of it */
    SHARD_OUT_Q,   /* rows split by query head: each rank makes a slice of the output */
    SHARD_OUT_KV,  /* rows split by key/value head; heads repeat when ranks outnumber them */
    SHARD_OUT_QKV, /* three segments, each split by head */
    SHARD_OUT_FFN, /* rows split by feed-forward unit */
    SHARD_IN_Q,    /* columns split by query head: partial sums, all-reduce follows, bias once */
    SHARD_IN_FFN,  /* columns split by feed-forward unit: the same */
    SHARD_VOCAB    /* rows split by token */
};

/* Which switch of the configuration says whether the role has a bias. */
enum bias { BIAS_NONE, BIAS_NORM, BIAS_QKV, BIAS_OUT, BIAS_FFN };

/*    role            shard          rows         columns    bias */
#define ROLE_TABLE(X)                                                                              \
    X(EMBED, SHARD_NONE, DIM_VOCAB, DIM_EMBED, BIAS_NONE)                                          \
    X(POSITION, SHARD_NONE, DIM_CONTEXT, DIM_MODEL, BIAS_NONE)                                     \
    X(PROJECT_IN, SHARD_NONE, DIM_MODEL, DIM_EMBED, BIAS_NONE)                                     \
    X(ATTN_NORM, SHARD_NONE, DIM_MODEL, DIM_1, BIAS_NORM)                                          \
    X(WQ, SHARD_OUT_Q, DIM_Q, DIM_MODEL, BIAS_QKV)                                                 \
    X(WK, SHARD_OUT_KV, DIM_KV, DIM_MODEL, BIAS_QKV)                                               \
    X(WV, SHARD_OUT_KV, DIM_KV, DIM_MODEL, BIAS_QKV)                                               \
    X(WQKV, SHARD_OUT_QKV, DIM_QKV, DIM_MODEL, BIAS_QKV)                                           \
    X(Q_NORM, SHARD_NONE, DIM_HEAD, DIM_1, BIAS_NONE)                                              \
    X(K_NORM, SHARD_NONE, DIM_HEAD, DIM_1, BIAS_NONE)                                              \
    X(WO, SHARD_IN_Q, DIM_MODEL, DIM_Q, BIAS_OUT)                                                  \
    X(FFN_NORM, SHARD_NONE, DIM_MODEL, DIM_1, BIAS_NORM)                                           \
    X(ROUTER, SHARD_NONE, DIM_EXPERTS, DIM_MODEL, BIAS_NONE)                                       \
    X(W_GATE, SHARD_OUT_FFN, DIM_FFN, DIM_MODEL, BIAS_FFN)                                         \
    X(W_UP, SHARD_OUT_FFN, DIM_FFN, DIM_MODEL, BIAS_FFN)                                           \
    X(W_DOWN, SHARD_IN_FFN, DIM_MODEL, DIM_FFN, BIAS_FFN)                                          \
    X(FINAL_NORM, SHARD_NONE, DIM_MODEL, DIM_1, BIAS_NORM)                                         \
    X(PROJECT_OUT, SHARD_NONE, DIM_EMBED, DIM_MODEL, BIAS_NONE)                                    \
    X(LM_HEAD, SHARD_VOCAB, DIM_VOCAB, DIM_EMBED, BIAS_NONE)
enum role {
#define X(role, shard, rows, columns, bias) ROLE_##role,
    ROLE_TABLE(X)
#undef X
        ROLE_COUNT
};

struct role_row {
    const char *name;
    enum shard shard;
    enum dim rows, columns;
    enum bias bias;
};
extern const struct role_row roles[ROLE_COUNT];

enum norm_place { NORM_PRE, NORM_POST };

struct model_config;
struct arch {
    const char *hf_name;    /* "architectures" of config.json */
    const char *model_type; /* where config.json names no architecture */
    enum norm_kind norm;
    enum activation activation;        /* where config.json does not say */
    bool weights_in_out;               /* matrices are stored [in][out] (GPT-2's Conv1D) */
    bool tied_default;                 /* tie_word_embeddings where config.json does not say */
    bool qkv_bias, out_bias, ffn_bias; /* where config.json does not say */
    int position_offset;               /* learned positions begin at this row */
    const char *const *prefixes;       /* what a checkpoint may put before the stems; NULL-ended */
    const char *names[ROLE_COUNT];     /* stem, %d = layer, then expert; NULL = absent */
    /* NULL, or what the common reading of config.json cannot say. */
    enum err (*finish_config)(struct model_config *c, const json_t *json);
};

extern const struct arch arch_llama, arch_mistral, arch_qwen2, arch_qwen3, arch_gpt2, arch_opt,
    arch_mixtral, arch_qwen3_moe;
extern const struct arch *const archs[]; /* NULL-ended */

/* What the Llama family shares, and its dense feed-forward. */
#define ARCH_LLAMA_NAMES                                                                           \
    ARCH_LLAMA_SHARED, [ROLE_W_GATE] = "layers.%d.mlp.gate_proj",                                  \
                       [ROLE_W_UP] = "layers.%d.mlp.up_proj",                                      \
                       [ROLE_W_DOWN] = "layers.%d.mlp.down_proj"
#define ARCH_LLAMA_SHARED                                                                          \
    [ROLE_EMBED] = "embed_tokens", [ROLE_ATTN_NORM] = "layers.%d.input_layernorm",                 \
    [ROLE_WQ] = "layers.%d.self_attn.q_proj", [ROLE_WK] = "layers.%d.self_attn.k_proj",            \
    [ROLE_WV] = "layers.%d.self_attn.v_proj", [ROLE_WO] = "layers.%d.self_attn.o_proj",            \
    [ROLE_FFN_NORM] = "layers.%d.post_attention_layernorm", [ROLE_FINAL_NORM] = "norm",            \
    [ROLE_LM_HEAD] = "lm_head"
extern const char *const arch_prefixes_model[];
