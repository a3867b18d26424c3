/* The memory plan of a rank: weights, work space and KV blocks, decided before anything is loaded.
 *
 * Also the sizes that follow from it: context, slots, rows, the weights' format where the choice is
 * automatic. When it does not fit, the error says what would. */
#pragma once
#include "worker/weights.h"
#include "worker/worker.h"

struct memory_plan {
    enum quant_method quant; /* what the checkpoint's own codes were made by; format: all else */
    enum weight_format format, head_format;
    enum dtype file_dtype, kv_dtype;
    struct kv_cache_args kv; /* of this rank; n_blocks included */
    int context_max, n_slots, step_tokens_max, step_prompt_max, logits_rows_max, draft_max;
    int graph_rows_max; /* decode steps of up to as many rows are recorded; 0 = none */
    uint64_t weight_bytes, table_bytes, work_bytes, block_bytes, n_host_blocks, n_disk_blocks;
    uint64_t memory_free, memory_total;
    struct { /* of the draft model; group.size 0 = none. The sums above count its parts, too. */
        enum quant_method quant;
        struct group group; /* size 1 where its heads do not divide: whole on every rank */
        enum weight_format format, head_format;
        enum dtype file_dtype;
        struct kv_cache_args kv;
        int context_max, n_tokens_max, rows_max;
        uint64_t weight_bytes, table_bytes, work_bytes, block_bytes;
    } draft;
};

/* draft: NULL = none. file: the checkpoint's headers, NULL with dummy weights. */
enum err memory_plan(const struct worker_config *config, const struct model_config *model,
                     const struct model_config *draft, const struct safetensors *file,
                     struct group group, struct backend *backend, struct memory_plan *out);
/* "weights 1.20 GiB, ..., of 14.10 GiB free". */
void memory_plan_words(const struct memory_plan *plan, char *out, size_t size);
/* "bf16", "int8 (head int8)"... as the plan decided. */
void memory_format_words(const struct memory_plan *plan, char *out, size_t size);
const char *weight_format_name(enum weight_format f);
