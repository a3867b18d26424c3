/* One rank's share of one model, resident on one backend. weights.c fills it, decoder.c runs it. */
#pragma once
#include "base/safetensors.h"
#include "kernels/backend.h"
#include "parallel/collective.h"
#include "parallel/shard.h"
#include "worker/model/config.h"

/* [n_out][n_in] of this rank; every weight carries its bias (SHARD_IN ones on rank 0 only). */
struct layer {
    struct norm_args attention_norm, ffn_norm; /* weights [hidden] */
    struct weight *qkv;                        /* [(n_heads + 2 n_kv_heads) * head_dim][hidden] */
    struct weight *out;                        /* [hidden][n_heads * head_dim], partial sums */
    struct weight *up;   /* gate|up: [2 ffn][hidden], or [ffn][hidden] where not gated */
    struct weight *down; /* [hidden][ffn], partial sums */
    /* With experts instead of the two above: */
    struct weight *router;                      /* [n_experts][hidden], the same on every rank */
    struct weight **experts_up, **experts_down; /* [n_experts] as up and down */
    struct moe *moe;
    struct attention_args attention;
};

struct model {
    struct model_config config;
    struct group group;
    struct backend *backend;
    struct shard_heads heads;      /* of this rank */
    struct shard_range ffn, vocab; /* of this rank */
    int32_t
        vocab_start[COLLECTIVE_RANKS_MAX + 1]; /* [size + 1] first token of each rank's logits */
    int context_max; /* positions prepared: rope tables, learned positions */

    struct layer *layers; /* [n_layers] */
    struct weight *embed, *positions, *project_in, *project_out, *lm_head;
    struct norm_args final_norm;

    struct safetensors *file; /* stays mapped: tables may read it */
    void **vectors;           /* [n_vectors] device memory of norms and rope tables */
    int n_vectors, vectors_max;
    struct kept {
        void *mem;
        size_t bytes;
    } kept[2]; /* host memory of tables that no file holds (dummy weights, unaligned files) */
    int n_kept;
    struct settle *settle; /* what moves beside the steps; NULL = nothing */
    uint64_t weight_bytes, table_bytes;
    char digest[33];
};
