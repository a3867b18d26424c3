/* The kernels' C side: one launcher for each, and what they are told.
 *
 * Every launcher queues on the stream and returns a cudaError_t as int, 0 for success. Pointers are
 * device memory unless said otherwise; activations are BF16, rows of `stride` elements. */
#pragma once
#include "kernels/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Set when a device is opened: kernels may be launched before the one before them has ended. */
extern bool kernels_overlap;

/* The step in device memory. Addresses never change, so that a recorded graph stays valid; the
 * shape lies in memory too, for the kernels whose grid is larger than the step. */
struct batch_shape {
    int32_t n_tokens, n_seqs, n_rows_out, blocks_stride;
};
struct device_batch {
    struct batch_shape *shape;
    int32_t *token_ids;   /* [n_tokens] feedback already put in */
    int32_t *token_seq;   /* [n_tokens] sequence each token belongs to */
    int32_t *positions;   /* [n_tokens] */
    int32_t *cache_slot;  /* [n_tokens]; negative = written nowhere */
    int32_t *seq_start;   /* [n_seqs + 1] */
    int32_t *context_len; /* [n_seqs] */
    int32_t *rows_out;    /* [n_rows_out] */
    int32_t *tiles;       /* [n_prefill_tiles][2] sequence, tile; the longest first */
    int32_t *block_table; /* [n_seqs][blocks_stride] */
};

/* --- prep.cu: the step's integers arrive as one array and are spread to their places ---------- */
enum {
    STEP_IDS,
    STEP_SLOTS,
    STEP_SEQS,
    STEP_POSITIONS,
    STEP_CACHE_SLOTS,
    STEP_STARTS,
    STEP_LENS,
    STEP_ROWS,
    STEP_TILES,
    STEP_BLOCKS,
    STEP_PARTS
};
struct prep_call {
    const int32_t *landing; /* the parts one after another */
    int32_t part_ints[STEP_PARTS];
    struct batch_shape shape;
    struct device_batch batch;
    const int32_t *feedback; /* [n_slots] */
    int32_t n_slots;
};
int launch_prep(const struct prep_call *call, void *stream);
int launch_feed(int32_t *feedback, int32_t slot, int32_t token, void *stream);

/* --- embed.cu -------------------------------------------------------------------------------- */
/* out[i] = table[ids[i]]; an id outside the table gives zeros. */
int launch_embed(struct tensor out, const void *table, int64_t n_rows, const int32_t *ids,
                 void *stream);
/* x[i] += table[positions[i] + offset] */
int launch_add_positions(struct tensor x, const void *table, int64_t n_rows, int offset,
                         const int32_t *positions, void *stream);
int launch_gather(struct tensor out, struct tensor x, const int32_t *rows, void *stream);

/* --- norm.cu, act.cu, quantize.cu: an operation may leave its rows in 8 bits too ---------------
 */
struct quantize_to {
    void *data;       /* [rows][stride] of dtype, NULL = not wanted */
    float *scales;    /* [rows] value = code * scale */
    enum dtype dtype; /* I8 or FP8_E4M3 */
    int64_t stride;   /* codes from cols to stride are zero */
};
int launch_add_norm(struct tensor x, struct tensor delta, const struct norm_args *args,
                    struct tensor out, struct quantize_to quantize, void *stream);
int launch_activate(struct tensor out, struct tensor in, enum activation kind, bool gated,
                    struct quantize_to quantize, void *stream);
int launch_quantize(struct tensor x, struct quantize_to quantize, void *stream);
int launch_add(struct tensor x, struct tensor y, void *stream);
int launch_scale(struct tensor x, float by, float softcap, void *stream);
/* out[r][c] = raw[r][c] * row_scale[r] * col_scale[c] + bias[c]; raw is I32 or F32 [rows][stride].
 * Either scale and bias may be NULL. */
struct raw_product {
    const void *data;
    enum dtype dtype;
    int64_t stride;
    const float *row_scale, *col_scale, *bias;
};
int launch_rescale(struct tensor out, const struct raw_product *raw, void *stream);
/* BF16 -> F16, saturating. to: [rows][to_stride] */
int launch_to_f16(void *to, int64_t to_stride, struct tensor x, void *stream);

/* --- rope.cu, attention.cu, prefill.cu ------------------------------------------------------- */
/* A block of one layer: [K, V][kv_head][block_size][head_dim], then, for 8-bit caches, a scale for
 * every such row: F32 [K, V][kv_head][block_size]. BF16 rows are stored swizzled (common.cuh). */
struct kv_layout {
    void *data; /* this layer's blocks */
    size_t block_bytes;
    int32_t block_size, n_kv_heads, head_dim;
    enum dtype dtype; /* BF16, I8, FP8_E4M3 */
};
int launch_qkv_prepare(struct tensor qkv, struct kv_layout kv, const struct attention_args *args,
                       const struct device_batch *batch, void *stream);

enum { DECODE_ROWS = 16, PREFILL_ROWS = 128, SPLITS_MAX = 32 };
struct attend_call {
    struct tensor out, qkv;
    struct kv_layout kv;
    struct attention_args args;
    struct device_batch batch;
    int n_seqs, n_tiles; /* of the grids */
    int n_splits;
    bool bulk_copy;   /* the device has cp.async.bulk (sm_90 and newer) */
    bool tiles_only;  /* every sequence goes through the tiles, none through the decode kernel */
    float *split_out; /* [n_seqs][n_kv_heads][DECODE_ROWS][n_splits][head_dim] */
    float *split_ml;  /* the same without head_dim, two numbers each: maximum (base 2), sum */
};
bool attention_supports(int head_dim);
/* Sequences of at most DECODE_ROWS rows (tokens times heads of a group), keys split over blocks. */
int launch_decode(const struct attend_call *call, void *stream);
/* All others: tiles of PREFILL_ROWS rows. */
int launch_prefill(const struct attend_call *call, void *stream);
enum { KV_PAIRS_MAX = 256 };
struct kv_pairs {
    int n;
    int32_t from[KV_PAIRS_MAX], to[KV_PAIRS_MAX];
};
/* Copies whole blocks of all layers; data: [n_layers][layer_bytes]. pairs: host memory. */
int launch_kv_copy(void *data, size_t block_bytes, size_t layer_bytes, int n_layers,
                   const struct kv_pairs *pairs, void *stream);

/* --- gemm.cu, gemm_int4.cu, moe.cu ------------------------------------------------------------ */
struct gemm_call {
    struct tensor out; /* [rows][n_out] BF16 or F32 */
    struct tensor x;   /* [rows][n_in] BF16 */
    const void
        *w; /* [n_out][n_in_padded] BF16, or int4 codes two to a byte, low half first, code 8 = 0 */
    const void *scales_16; /* f16 [n_out][n_in_padded >> group_shift] of int4, else NULL */
    const void *zeros;     /* u8, the same shape: codes that mean 0; NULL = 8, groups of 128 */
    int group_shift;       /* where there are zeros; 1 << group_shift inputs are a group */
    const float *bias;     /* [n_out] or NULL */
    int64_t n_in_padded;   /* multiple of GEMM_K_TILE, and of a group for int4 */
    /* Experts: rows_of[offsets[e] .. offsets[e + 1]) are the rows of expert e, whose matrix is
     * matrices[e]. NULL matrices: one matrix, all rows. All device memory. */
    const struct gemm_matrix *matrices;
    const int32_t *offsets, *rows_of;
    int n_experts, rows_max,
        x_rows_per; /* x row of entry i is rows_of[i] / x_rows_per; out row is rows_of[i] */
};
struct gemm_matrix {
    const void *w, *scales_16, *zeros;
    const float *scales; /* [n_out] of 8-bit codes, else NULL */
};
enum { GEMM_K_TILE = 32, INT4_GROUP = 128, GEMV_ROWS_MAX = 4 };
/* Every output element is summed in an order that depends on n_in alone. */
int launch_gemm(const struct gemm_call *call, void *stream);
int launch_gemm_int4(const struct gemm_call *call, void *stream);
int launch_gemv_int4(const struct gemm_call *call, void *stream);
/* The int4 weight of a call as BF16 [n_out][n_in_padded]. */
int launch_int4_expand(void *out_bf16, const struct gemm_call *call, void *stream);
/* out [rows][n] = x[row][order[i]], zero where that is -1. */
int launch_reorder(void *out_bf16, struct tensor x, const int32_t *order, int64_t n, void *stream);
/* The product of every expert with its rows, its weights as they are stored. */
int launch_gemm_experts(const struct gemm_call *call, enum weight_format format, void *stream);
/* scores [rows][n_experts] F32 -> weights [rows][top_k], experts [rows][top_k]. */
int launch_moe_route(float *weights, int32_t *experts, struct tensor scores, int top_k,
                     bool renormalize, void *stream);
/* Sorts the entries of experts [n] by expert: offsets [n_experts + 1], rows_of [n]. Where an entry
 * lies within its expert's is left to chance; no result depends on it. */
int launch_moe_sort(const int32_t *experts, int n, int n_experts, int32_t *offsets,
                    int32_t *rows_of, void *stream);
/* out[r] = sum over k of weights[r][k] * y[r * top_k + k]; y: F32, rows of y_stride. */
int launch_moe_combine(struct tensor out, const float *y, int64_t y_stride, const float *weights,
                       int top_k, void *stream);

/* --- sample.cu -------------------------------------------------------------------------------- */
struct sample_edit { /* one token's logit before anything else */
    int32_t token;
    int32_t n_output; /* times it was generated */
    float bias;
    int32_t kind;
};
enum { EDIT_PENALTY, EDIT_BIAS, EDIT_BAN };
struct sample_task {
    int32_t slot, top_k, n_logprobs, forced_token;
    float temperature, top_p, min_p;
    float repetition_penalty, presence_penalty, frequency_penalty;
    uint64_t seed, position;
    int32_t edits[4];  /* edits[kind] .. edits[kind + 1] of the call's edits */
    int32_t n_pending; /* 1: the slot's token in the feedback table was generated too */
    int32_t mask;      /* -1, or where among the edits a bit a token begins: 1 = banned */
};
int launch_sample(struct tensor logits, const struct sample_task *tasks,
                  const struct sample_edit *edits, int n_rows, struct sample_result *results,
                  int32_t *feedback, int32_t n_slots, void *stream);

#ifdef __cplusplus
}
#endif
