/* The CUDA backend's own state, shared by its host files and by nothing else.
 *
 * One stream; memory taken at set-up; a ring of steps in flight, each with its pinned staging
 * memory. The first failing call of the device is remembered with its wording, later operations
 * do nothing, and sync or ticket_wait reports it: nothing here waits without a deadline. */
#pragma once
#include "kernels/backend.h"
#include "kernels/cuda/kernels.h"
#include <cuda_runtime.h>
#include <stdio.h>

enum {
    STEPS_IN_FLIGHT = 4,
    WAIT_MS_MAX = 300000, /* a step that takes longer is a lost device; HEDDLE_CUDA_WAIT_MS */
    WHY_BYTES = 256,
    SAMPLES_MAX = 64, /* calls of sample in one step */
    GROUP_MAX = 128,  /* query heads that share a kv head */
};

/* One step in flight: what the host wrote for the device, and where its results go. */
struct cuda_step {
    cudaEvent_t done;
    uint64_t ticket;  /* 0 = nothing to deliver */
    int64_t begun_us; /* when the host had queued all of it */
    int32_t *staging; /* pinned [landing_ints] */
    size_t staging_ints;
    uint8_t *edits; /* pinned [edit_bytes] tasks and edits of sample */
    size_t edits_used;
    struct sample_result *results; /* pinned [n_tokens_max] */
    struct {
        struct sample_result *to;
        int n;
    } deliver[SAMPLES_MAX];
    int n_deliver, n_results;
    cudaEvent_t begun, worked; /* of the trace: before its first kernel, behind its last */
    bool is_traced;
    int32_t n_tokens, n_seqs;
    uint64_t ticket_traced; /* whose events these are, once delivered */
};

struct lt; /* cuBLASLt: its handle, its workspace and the algorithms chosen */

struct weight {
    struct cuda_backend *backend;
    enum weight_format format;
    int64_t n_out, n_in, n_in_padded;
    int64_t n_out_padded; /* rows that are there, the last ones zero, for products into scratch */
    void *data;      /* device: [n_out_padded][n_in_padded] of the format, INT4 two to a byte */
    float *scales;   /* device [n_out_padded] for INT8 and FP8 */
    void *scales_16; /* device f16 [n_out][n_in_padded >> group_shift] for INT4, INT4_GROUPS */
    void *zeros;     /* device u8 [n_out][n_in_padded >> group_shift] for INT4_GROUPS */
    int group_shift; /* 5, 6 or 7: inputs that share a scale */
    int32_t
        *order; /* device [n_in_padded] for INT4_GROUPS: input of each slot or -1; NULL = as is */
    int64_t n_product; /* inputs of a product: n_in, or all slots where they have an order */
    float *bias;       /* device [n_out] or NULL */
    void *bias_16;     /* the same in BF16 */
    bool library;      /* cuBLASLt multiplies straight into the output */
    size_t bytes;
};

struct kv_cache {
    struct kv_cache_args args;
    size_t block_bytes; /* of one layer */
    uint8_t *data;      /* device [n_layers][n_blocks][block_bytes] */
};

struct cuda_backend {
    struct backend base;
    struct backend_options options;
    cudaStream_t stream, side; /* side: copies while stream records a graph */
    int n_sms, capability;     /* 80, 90, ... */
    int wait_ms_max;
    enum err failed; /* the first failure, and its words */
    char why[WHY_BYTES];
    uint64_t ticket_last;
    struct cuda_step steps[STEPS_IN_FLIGHT];
    struct device_batch batch; /* device memory at fixed addresses */
    int32_t *batch_ints;       /* the memory of batch, but for its block table */
    int32_t *landing;          /* device [landing_ints]: the step's integers as they arrive */
    size_t landing_ints, tile_ints, table_ints;
    int tiles_group,
        n_tiles;       /* the group that this step's list of tiles was made for, 0 = none yet */
    struct batch batch_host; /* this step's, as batch_begin was given it */
    int32_t *feedback; /* device [n_slots_max] token last sampled for a slot */
    uint8_t *edits;    /* device [edit_bytes] */
    size_t edit_bytes;
    int32_t *token_count;          /* host [vocab_size] zeros between uses */
    struct sample_result *results; /* device [n_tokens_max] */
    float *split_out, *split_ml;   /* device: partial attention of each split */
    size_t split_out_bytes, split_ml_bytes;
    bool capturing, capture_refused;
    FILE *trace; /* NULL: steps are not timed */
    /* Rows that an operation left in 8 bits too; of = NULL when there are none. */
    struct {
        const void *of;
        int64_t rows, cols;
        enum dtype dtype;
    } quantized;
    enum dtype quantize_type; /* what weights want their activations in, F32 = as they are */
    void *x_8;                /* device [n_tokens_max][widest weight] quantized activations */
    float *x_scales;          /* device [n_tokens_max] */
    size_t x_8_bytes;
    void *ordered; /* device BF16 [n_tokens_max][slots]: activations in the order of a weight */
    size_t ordered_bytes;
    void *scratch; /* device: raw products before scaling, expanded weights, f16 activations */
    size_t scratch_bytes;
    void *moe_scratch; /* device: of the widest layer of experts */
    size_t moe_scratch_bytes;
    struct lt *lt; /* NULL: own kernels multiply */
};

extern const struct backend_ops heddle_backend_cuda; /* the plugin's one symbol */

static inline struct cuda_backend *cuda_of(struct backend *b)
{
    return (struct cuda_backend *)b;
}

/* Remembers the first failure. Returns whether result is success. */
bool cuda_ok(struct cuda_backend *b, cudaError_t result, const char *what);
/* ERR_DEVICE or ERR_NO_MEMORY, worded, for set-up calls that report at once. */
enum err cuda_check(cudaError_t result, const char *what);
enum err cuda_alloc(struct cuda_backend *b, size_t bytes, void **out);
/* Accepts NULL. On a failed device memory is left to the end of the process: freeing would wait for
 * a device that may never answer. */
void cuda_free(struct cuda_backend *b, void *mem);
/* Waits until the stream is empty, unless the device has failed. */
void cuda_quiesce(struct cuda_backend *b);
/* Grows a device buffer of set-up; its old contents are dropped. */
enum err cuda_reserve(struct cuda_backend *b, void **mem, size_t *have, size_t bytes);

/* step.c */
enum err cuda_steps_open(struct cuda_backend *b);
void cuda_steps_close(struct cuda_backend *b);
enum err cuda_step_table_reserve(struct cuda_backend *b, size_t ints);
/* The step now being built, its slot free. */
struct cuda_step *cuda_step_now(struct cuda_backend *b);
/* Lists this step's tiles of prefill attention for heads in groups of `group`. */
void cuda_tiles_prepare(struct cuda_backend *b, const struct batch *batch, int group);
void cuda_batch_begin(struct backend *base, const struct batch *batch);
void cuda_feed(struct backend *base, int32_t slot, int32_t token);
uint64_t cuda_step_end(struct backend *base);
enum err cuda_ticket_wait(struct backend *base, uint64_t ticket);
bool cuda_ticket_ready(struct backend *base, uint64_t ticket);
enum err cuda_sync(struct backend *base);
/* graph.c */
enum err cuda_capture_begin(struct backend *base);
enum err cuda_capture_end(struct backend *base, void **out_graph);
enum err cuda_replay(struct backend *base, void *graph);
void cuda_graph_destroy(struct backend *base, void *graph);

/* overlap.c */
enum err cuda_overlap_try(struct cuda_backend *b);

/* trace.c */
enum err cuda_trace_open(struct cuda_backend *b);
void cuda_trace_close(struct cuda_backend *b);
void cuda_trace_begin(struct cuda_backend *b, struct cuda_step *s, const struct batch *batch);
/* Called behind every operation that may be the step's last. */
void cuda_trace_worked(struct cuda_backend *b, struct cuda_step *s);
void cuda_trace_deliver(struct cuda_backend *b, struct cuda_step *s);

/* weight.c */
enum err cuda_weight_create_int4(struct backend *base, const struct int4_matrix *matrix,
                                 const float *bias, struct weight **out);
enum err cuda_weight_create(struct backend *base, const struct matrix_view *parts, int n_parts,
                            const float *bias, enum weight_format format, struct weight **out);
enum err cuda_table_create(struct backend *base, struct matrix_view table, struct weight **out);
void cuda_weight_destroy(struct backend *base, struct weight *w);
size_t cuda_weight_bytes(const struct weight *w);

/* matmul.c */
void cuda_matmul(struct backend *base, struct tensor out, struct tensor x, const struct weight *w);
/* Where an operation that writes out may leave it in 8 bits for the product that follows. */
struct quantize_to cuda_quantize_target(struct cuda_backend *b, struct tensor out);
/* out has new contents: codes made from the old ones are void. */
void cuda_written(struct cuda_backend *b, struct tensor out);
/* Memory that products with this weight need besides its own; times the library's kernels. */
enum err cuda_matmul_prepare(struct cuda_backend *b, struct weight *w);

/* ops.c */
void cuda_embed(struct backend *base, struct tensor out, const struct weight *table,
                const struct batch *batch);
void cuda_add_positions(struct backend *base, struct tensor x, const struct weight *table,
                        int offset, const struct batch *batch);
void cuda_add_norm(struct backend *base, struct tensor x, struct tensor delta,
                   const struct norm_args *args, struct tensor out);
void cuda_add(struct backend *base, struct tensor x, struct tensor y);
void cuda_scale(struct backend *base, struct tensor x, float by, float softcap);
void cuda_activate(struct backend *base, struct tensor out, struct tensor in, enum activation kind,
                   bool gated);
void cuda_gather(struct backend *base, struct tensor out, struct tensor x,
                 const struct batch *batch);
/* moe.c */
enum err cuda_moe_create(struct backend *base, const struct moe_args *args, struct moe **out);
void cuda_moe_destroy(struct backend *base, struct moe *m);
void cuda_moe_forward(struct backend *base, struct tensor out, struct tensor x,
                      struct tensor scores, struct moe *m);
/* sample.c */
void cuda_sample(struct backend *base, struct tensor logits, const struct sample_row *rows,
                 int n_rows, struct sample_result *results);

/* kv.c */
int cuda_block_size_default(struct backend *base);
size_t cuda_kv_bytes(struct backend *base, const struct kv_cache_args *args);
enum err cuda_kv_create(struct backend *base, const struct kv_cache_args *args,
                        struct kv_cache **out);
void cuda_kv_destroy(struct backend *base, struct kv_cache *kv);
void cuda_kv_copy(struct backend *base, struct kv_cache *kv, const int32_t *src, const int32_t *dst,
                  int n);
void cuda_kv_save(struct backend *base, struct kv_cache *kv, int32_t block, void *host);
void cuda_kv_load(struct backend *base, struct kv_cache *kv, int32_t block, const void *host);
void cuda_qkv_prepare(struct backend *base, struct tensor qkv, struct kv_cache *kv,
                      const struct attention_args *args, const struct batch *batch);
void cuda_attend(struct backend *base, struct tensor out, struct tensor qkv, struct kv_cache *kv,
                 const struct attention_args *args, const struct batch *batch);

/* gemm_lt.c: cuBLASLt, opened at run time */
struct gemm {
    int64_t n_out, n_in, rows; /* D[rows][n_out] = X[rows][n_in] W[n_out][n_in]^T */
    enum dtype type, out_type; /* of X and W; of D. I8 gives I32 */
    const void *w, *x;
    void *out;
    int64_t w_stride, x_stride, out_stride; /* elements between rows */
    const void *bias;                       /* device [n_out] of out_type, or NULL */
    const float *x_scales, *w_scales;       /* FP8 with scales applied by the library, or NULL */
};
/* ERR_DEVICE says why the library cannot be used. */
enum err lt_open(struct cuda_backend *b, struct lt **out);
void lt_close(struct lt *lt); /* accepts NULL */
/* Whether it has kernels for this shape (pointers of NULL are only looked at for being NULL); times
 * its proposals for each bucket of rows up to gemm->rows. Allocates, waits for the device. */
bool lt_prepare(struct lt *lt, const struct gemm *gemm);
/* A shape that was prepared. */
cudaError_t lt_matmul(struct lt *lt, const struct gemm *gemm);
