/* One device and everything a forward pass asks of it: a table of operations.
 *
 * Two implementations with the same file names: kernels/cpu (the reference, then its fast paths,
 * chosen at run time) and kernels/cuda (a plugin opened at run time). Rules for all operations:
 *   - they run in order on the backend's one stream; they return void and never allocate;
 *   - errors of the device surface at sync, and nowhere else;
 *   - an output element is summed in an order that depends on the shape of the weight alone, never
 *     on the other rows of the batch (law 4: same sequence, same tokens); CUDA keeps this only with
 *     options.deterministic;
 *   - activations are backend->activation_dtype (F32 on the CPU, BF16 on CUDA); logits are F32.
 * The backend knows tensors and one device; never ranks, requests, files or architectures. */
#pragma once
#include "base/err.h"
#include "base/hash.h"
#include "kernels/tensor.h"
#include <stdbool.h>

enum { BACKEND_ABI = 6 };

/* How weights are stored on the device. AUTO keeps the checkpoint's own type where it can. */
enum weight_format {
    WEIGHT_AUTO,
    WEIGHT_F32,
    WEIGHT_F16,
    WEIGHT_BF16,
    WEIGHT_INT8, /* one scale per output row; activations quantized per token to int8 */
    WEIGHT_INT4, /* groups of 128 inputs, f16 scale, symmetric; activations as for INT8 */
    WEIGHT_FP8,  /* E4M3, one scale per output row; CUDA sm_90 */
    WEIGHT_INT4_GROUPS, /* a checkpoint's own codes: see struct int4_matrix; activations as for INT8 */
    WEIGHT_FORMAT_COUNT
};

struct weight;   /* a packed matrix [n_out][n_in] with its bias, owned by the backend that made it */
struct kv_cache; /* K and V of all layers, in blocks; layout private to the backend */

struct backend_options {
    int device;            /* CUDA: device index; CPU: unused */
    int n_threads;         /* CPU: threads of this rank, 0 = all cores it may use */
    int numa_node;         /* CPU: -1 = do not care */
    bool deterministic;    /* CUDA: batch-invariant reductions */
    int n_slots_max;       /* sequences that may live at once: size of the token feedback table */
    int n_tokens_max;      /* tokens of one step at most */
    int n_rows_max;        /* rows of logits of one step at most */
    int vocab_size;        /* full vocabulary (sampler's scratch) */
    const char *isa;       /* CPU: NULL = best; "reference", "avx2", "avx512", "vnni", "bf16", "amx" */
};

/* This step, flat. All arrays live in host memory and stay valid and unchanged until the step's
 * ticket was waited for; a backend with its own memory copies them in batch_begin. */
struct batch {
    int n_tokens, n_seqs, n_rows_out, blocks_per_seq_max;
    const int32_t *token_ids;   /* [n_tokens]; -1 = the token last sampled for token_slot[i] */
    const int32_t *token_slot;  /* [n_tokens] slot of the sequence that the token belongs to */
    const int32_t *positions;   /* [n_tokens] */
    const int32_t *seq_start;   /* [n_seqs + 1] first token of each sequence */
    const int32_t *context_len; /* [n_seqs] tokens in the cache after this step */
    const int32_t *block_table; /* [n_seqs][blocks_per_seq_max] */
    const int32_t *cache_slot;  /* [n_tokens] block * block_size + offset, where K and V are written */
    const int32_t *rows_out;    /* [n_rows_out] index of tokens whose logits are wanted, ascending */
};

enum norm_kind { NORM_RMS, NORM_LAYER };
enum activation { ACTIVATION_SILU, ACTIVATION_GELU_TANH, ACTIVATION_GELU_ERF, ACTIVATION_RELU };

struct norm_args {
    enum norm_kind kind;
    float epsilon;
    const float *weight; /* device [cols] */
    const float *bias;   /* device [cols] or NULL */
};

/* Rows that are normed on their way into one product, which alone reads them: x += delta (delta.data
 * may be NULL), then norm(x). h: rows of scratch like x, whose content is undefined afterwards. norm
 * NULL: x as it is, the rest unused. */
struct norm_input {
    struct tensor x, delta, h;
    const struct norm_args *norm;
};

/* One layer's attention. q, k, v of a token lie in one row of qkv: [n_heads + 2 n_kv_heads][head_dim]. */
struct attention_args {
    int layer, n_heads, n_kv_heads, head_dim; /* of this rank */
    float scale;          /* usually 1 / sqrt(head_dim) */
    float softcap;        /* 0 = none: softcap * tanh(score / softcap) */
    int window;           /* 0 = full; else a token sees itself and window - 1 before it */
    /* rope: NULL = none (learned positions) */
    const float *rope_cos, *rope_sin; /* device [position_max][rotary_dim / 2], scaling folded in */
    int rotary_dim;       /* first rotary_dim of head_dim are rotated */
    bool rope_pairs;      /* true: (2i, 2i+1) rotate together; false: (i, i + rotary_dim / 2) */
    const float *q_norm, *k_norm; /* device [head_dim] or NULL: RMS norm of each head before rope */
    float norm_epsilon;
    /* kv head of query head h is (h + head_offset) / group - kv_offset, for uneven shards */
    int group, head_offset, kv_offset;
};

struct kv_cache_args {
    int n_layers, n_kv_heads, head_dim; /* of this rank */
    int block_size;                     /* tokens of a block */
    int n_blocks;
    enum dtype dtype;                   /* activation type, F16, BF16, I8 or FP8 as the backend can */
};

/* What to do to one row of logits. Arrays are of one step, host memory, indexed by row. */
struct sample_row {
    int32_t slot;            /* feedback table entry that receives the token; -1 = none */
    float temperature;       /* 0 = greedy */
    int32_t top_k;           /* 0 = off */
    float top_p, min_p;      /* 1 and 0 = off */
    float repetition_penalty, presence_penalty, frequency_penalty; /* 1, 0, 0 = off */
    uint64_t seed, position; /* the draw is rand_at(seed, position of the token to be, 0) */
    int32_t n_logprobs;      /* top logprobs wanted, -1 = none, 0 = the chosen token's only */
    /* Tokens for penalties: prompt tokens count for repetition only, output tokens for all three.
     * The last output token may be -1 on a backend with a stream: the one last sampled for slot. */
    const int32_t *prompt_tokens, *output_tokens; /* host [n] */
    int32_t n_prompt_tokens, n_output_tokens;
    const int32_t *bias_tokens; /* host [n_bias] */
    const float *bias_values;
    int32_t n_bias;
    const int32_t *banned_tokens; /* host [n_banned]: logits become -inf (min_tokens, masks) */
    int32_t n_banned;
    int32_t forced_token; /* -1, or: take this token whatever the logits say (scoring a prompt) */
};

enum { MOE_EXPERTS_MAX = 1024, MOE_TOP_K_MAX = 32 };
struct moe; /* the experts of one layer, made ready; owned by the backend that made it */
/* A mixture of experts (Shazeer et al., "Outrageously large neural networks", 2017, section 2): each
 * row goes through the top_k experts of the largest scores, ties to the lower expert; its results
 * are added by the softmax of all scores, of the chosen ones alone when renormalize. */
struct moe_args {
    int n_experts, top_k;
    bool renormalize;
    enum activation kind;
    /* [n_experts] gate|up [2 ffn][hidden] and [hidden][ffn] of this rank, all of one format, without
     * bias; they stay the caller's and outlive what is made of them */
    struct weight *const *up, *const *down;
};

enum { SAMPLE_LOGPROBS_MAX = 32 };
struct sample_result {
    int32_t token;
    float logprob; /* of the distribution before temperature and cuts, after penalties and bias */
    int32_t n_top;
    int32_t top_tokens[SAMPLE_LOGPROBS_MAX]; /* descending logprob, ties by lower id */
    float top_logprobs[SAMPLE_LOGPROBS_MAX];
};

/* A matrix of 4-bit codes in host memory, as a checkpoint quantized it. The code of output r at slot s
 * stands for (code - zero) * scale, with the zero and the scale of r and of the group that s lies
 * in; it multiplies input order[s]. Slots of no input add nothing, whatever their code. */
struct int4_matrix {
    int64_t n_out, n_in;    /* n_in: columns of the activations */
    int64_t n_slots;        /* a multiple of group */
    int group;              /* slots that share a scale: 32, 64 or 128 */
    const int32_t *order;   /* [n_slots], -1 = no input; NULL = slot s is input s, none from n_in on */
    const uint8_t *codes;   /* [n_out][n_slots / 2], the even slot in the low half */
    const uint16_t *scales; /* f16 [n_out][n_slots / group], finite */
    const uint8_t *zeros;   /* [n_out][n_slots / group], 0 to 15; NULL = 8 everywhere */
};

/* A packed weight as bytes: what a file of packed weights holds. Views only. */
struct packed_weight {
    enum weight_format format; /* INT8 or INT4 */
    int64_t n_out, n_in;
    const void *panels;
    const float *scale, *bias; /* [n_lanes]; NULL where the format or the weight has none */
    size_t panels_bytes, n_lanes;
};

struct backend;
struct backend_ops {
    int abi; /* BACKEND_ABI */
    const char *name;

    /* --- set-up: may allocate, may fail --- */
    enum err (*open)(const struct backend_options *options, struct backend **out);
    void (*close)(struct backend *b);
    /* Free and total bytes of the device's memory, for the memory plan. */
    enum err (*memory)(struct backend *b, size_t *out_free, size_t *out_total);
    enum err (*alloc)(struct backend *b, size_t bytes, void **out); /* device memory, zeroed */
    void (*release)(struct backend *b, void *mem);
    enum err (*upload)(struct backend *b, void *dst, const void *src, size_t bytes);
    enum err (*download)(struct backend *b, void *dst, const void *src, size_t bytes);
    /* Packs n_parts matrices of equal cols, stacked by rows, into one weight (fused QKV, gate|up).
     * bias: host F32 [sum of rows] or NULL. ERR_UNSUPPORTED names a format the device cannot do. */
    enum err (*weight_create)(struct backend *b, const struct matrix_view *parts, int n_parts,
                              const float *bias, enum weight_format format, struct weight **out);
    /* Takes a matrix of codes as it is, bias as above. Its format is INT4 where that holds it without
     * loss (groups of 128, zeros all 8, no order), else INT4_GROUPS. */
    enum err (*weight_create_int4)(struct backend *b, const struct int4_matrix *matrix, const float *bias, struct weight **out);
    void (*weight_destroy)(struct backend *b, struct weight *w);
    size_t (*weight_bytes)(const struct weight *w); /* resident, and read once per step */
    /* A table that embed reads rows of. The CPU may keep the view (the caller keeps the file mapped). */
    enum err (*table_create)(struct backend *b, struct matrix_view table, struct weight **out);
    int (*block_size_default)(struct backend *b);
    size_t (*kv_bytes)(struct backend *b, const struct kv_cache_args *args); /* for args->n_blocks */
    enum err (*kv_create)(struct backend *b, const struct kv_cache_args *args, struct kv_cache **out);
    void (*kv_destroy)(struct backend *b, struct kv_cache *kv);

    /* --- a step: in stream order, no allocation --- */
    void (*batch_begin)(struct backend *b, const struct batch *batch);
    void (*embed)(struct backend *b, struct tensor out, const struct weight *table, const struct batch *batch);
    /* x += table[position + offset]: learned positions */
    void (*add_positions)(struct backend *b, struct tensor x, const struct weight *table, int offset, const struct batch *batch);
    /* x += delta (delta.data may be NULL), then out = norm(x). out may not alias x. */
    void (*add_norm)(struct backend *b, struct tensor x, struct tensor delta, const struct norm_args *args, struct tensor out);
    void (*add)(struct backend *b, struct tensor x, struct tensor y);               /* x += y */
    void (*scale)(struct backend *b, struct tensor x, float by, float softcap);     /* x *= by, then cap */
    void (*matmul)(struct backend *b, struct tensor out, struct tensor x, const struct weight *w); /* x w^T + bias */
    /* out = act(in[:, :F]) * in[:, F:] when gated (in has 2F columns: gate | up), else act(in). */
    void (*activate)(struct backend *b, struct tensor out, struct tensor in, enum activation kind, bool gated);
    /* Norm of heads, rope on q (in place) and k, k and v into the cache. */
    void (*qkv_prepare)(struct backend *b, struct tensor qkv, struct kv_cache *kv, const struct attention_args *args, const struct batch *batch);
    /* Causal attention of every token over its sequence's cache. out: [n_tokens][n_heads * head_dim]. */
    void (*attend)(struct backend *b, struct tensor out, struct tensor qkv, struct kv_cache *kv, const struct attention_args *args, const struct batch *batch);
    void (*gather)(struct backend *b, struct tensor out, struct tensor x, const struct batch *batch); /* rows_out */
    /* Samples every row of logits [n_rows][vocab] F32 (changed in place). rows and what they point to
     * are read before it returns. results: host memory, filled when the step's ticket was waited for.
     * Writes the feedback table. */
    void (*sample)(struct backend *b, struct tensor logits, const struct sample_row *rows, int n_rows, struct sample_result *results);
    /* Sets a slot's feedback token from the host (a sequence that continues after a fault). */
    void (*feed)(struct backend *b, int32_t slot, int32_t token);
    /* Copies whole blocks of all layers: src[i] -> dst[i]. */
    void (*kv_copy)(struct backend *b, struct kv_cache *kv, const int32_t *src, const int32_t *dst, int n);
    /* Moves a block of all layers to or from host memory of kv_bytes / n_blocks bytes. */
    void (*kv_save)(struct backend *b, struct kv_cache *kv, int32_t block, void *host);
    void (*kv_load)(struct backend *b, struct kv_cache *kv, int32_t block, const void *host);
    /* Ends the step: ticket_wait(ticket) returns when its results are in host memory. */
    uint64_t (*step_end)(struct backend *b);
    enum err (*ticket_wait)(struct backend *b, uint64_t ticket);
    /* Whether ticket_wait would return at once: the step has ended, or has failed, or is overdue.
     * Never waits. NULL: every step has ended when step_end returns. */
    bool (*ticket_ready)(struct backend *b, uint64_t ticket);
    enum err (*sync)(struct backend *b); /* everything queued has run; the device's error, if any */

    /* --- optional: NULL means the caller composes it from the above --- */
    /* For each row of x w^T + bias its largest element and the lowest index that has it, by the rules
     * of greedy sampling, without writing the row. out_index, out_value: host [rows]; they may be read
     * when the operation returns, so this is for backends that run in place. */
    void (*matmul_argmax)(struct backend *b, struct tensor x, const struct weight *w, int32_t *out_index, float *out_value);
    /* add_norm into rows that nothing else reads, then matmul, matmul_argmax of them: the same bits,
     * without the rows being written. */
    void (*norm_matmul)(struct backend *b, struct tensor out, const struct norm_input *in, const struct weight *w);
    void (*norm_matmul_argmax)(struct backend *b, const struct norm_input *in, const struct weight *w, int32_t *out_index, float *out_value);
    /* norm_matmul by up = gate|up, activate gated, matmul by down: the same bits. act [rows][F], whose
     * rows follow each other without gaps, is scratch. */
    void (*feed_forward)(struct backend *b, struct tensor out, const struct norm_input *in, const struct weight *up, const struct weight *down, struct tensor act, enum activation kind);
    /* Records the operations between begin and end as one graph, replayable with the same shapes. */
    enum err (*capture_begin)(struct backend *b);
    enum err (*capture_end)(struct backend *b, void **out_graph);
    enum err (*replay)(struct backend *b, void *graph);
    void (*graph_destroy)(struct backend *b, void *graph);
    /* Mixture of experts: set-up, and out [rows][hidden] from x [rows][hidden] and the router's scores
     * [rows][n_experts] F32. out may not alias x. */
    enum err (*moe_create)(struct backend *b, const struct moe_args *args, struct moe **out);
    void (*moe_destroy)(struct backend *b, struct moe *m); /* accepts NULL */
    void (*moe_forward)(struct backend *b, struct tensor out, struct tensor x, struct tensor scores, struct moe *m);

    /* Packed weights in files. NULL: this device has no layout that files hold. */
    const char *packed_layout; /* names the bytes of a packed weight; changes whenever they do */
    void (*weight_export)(const struct weight *w, struct packed_weight *out); /* views of w */
    /* Fills panels_bytes and n_lanes from format, n_out and n_in. */
    enum err (*packed_sizes)(struct packed_weight *p);
    /* Copies the bytes to where they are used; out_digest: packed_digest of them. */
    enum err (*weight_import)(struct backend *b, const struct packed_weight *p, struct hash128 *out_digest, struct weight **out);
    struct hash128 (*packed_digest)(const struct packed_weight *p);
    /* Output `row` as n_in floats: exactly what the quantized weight stands for. */
    void (*packed_row)(const struct packed_weight *p, int64_t row, float *out);
    /* As weight_import, but at once: the weight reads the panels where they lie, in memory that stays
     * until weight_destroy. weight_settle then copies them to where they are read fastest, and the
     * weight goes on from there; out_digest as of weight_import. It may run on another thread beside
     * operations that read the weight, but beside nothing that makes or destroys weights. */
    enum err (*weight_adopt)(struct backend *b, const struct packed_weight *p, struct weight **out);
    enum err (*weight_settle)(struct backend *b, struct weight *w, struct hash128 *out_digest);
    /* The same for a cache that was made for an early first token, whose first n_blocks blocks are in
     * use by now: one part a call moves to where it is read fastest, or finds memory for the blocks
     * that come next. False when nothing is left to do for so many. Always the same thread, beside
     * operations on the cache but not beside kv_destroy. */
    bool (*kv_settle)(struct backend *b, struct kv_cache *kv, int n_blocks);
};

/* Common head of every backend; an implementation embeds it first. */
struct backend {
    const struct backend_ops *ops;
    enum dtype activation_dtype;
    void *stream; /* CUDA stream, for the collectives; NULL on the CPU */
};

extern const struct backend_ops backend_cpu;

/* Opens by name: "cpu", "cuda" (loads heddle_cuda.so beside the program or from HEDDLE_PLUGIN_DIR),
 * or "auto" (cuda if it can, else cpu, with the reason logged). A forced one that cannot: ERR_DEVICE. */
enum err backend_open(const char *name, const struct backend_options *options, struct backend **out);
