/* One rank: its share of one model, its KV blocks, and the loop plan -> forward -> sample ->
 * result.
 *
 * worker_run is the process of a rank in a cluster. worker_create .. worker_step is the same rank
 * without its link, one plan's bytes in, one result's bytes out: tests and `heddle bench` use it.
 * A worker knows weights, tokens and slots; never text, requests, HTTP or scheduling policy. */
#pragma once
#include "base/buf.h"
#include "base/err.h"
#include "kernels/backend.h"
#include "parallel/collective.h"
#include <stdbool.h>
#include <stdint.h>

struct worker_config {
    const char
        *model_dir; /* config.json and *.safetensors; with load_format dummy config.json only */
    const char *coordinator;                 /* HOST:PORT */
    const char *token;                       /* cluster token, NULL = none */
    const char *tls_ca, *tls_cert, *tls_key; /* PEM files, NULL = no TLS */
    int patience_ms;    /* how long to look for the coordinator, also after a loss; 0 = for ever */
    int replica;        /* data-parallel index */
    int rank, size;     /* -1 = from the launcher's environment, else 0 of 1 */
    const char *device; /* "auto" (NULL), "cpu", "cuda" */
    int device_index;   /* CUDA: -1 = the local rank */
    const char *collective;    /* "auto" (NULL), "none", "shm", "mpi", "nccl" */
    int collective_timeout_ms; /* 0 = 30000 */
    int n_threads;             /* CPU: of this rank, 0 = its share of the cores it may use */
    const char *isa;           /* CPU: NULL = best; see struct backend_options */
    bool deterministic;
    bool eager;               /* CUDA: no graphs, every operation is launched by itself */
    const char *dtype;        /* weights: "auto" (NULL), "f32", "f16", "bf16" */
    const char *quantization; /* "none" (NULL), "auto", "int8", "int4", "fp8" */
    const char *head_quantization; /* of the output projection: "auto" (NULL), "int8", "int4" */
    const char *kv_dtype;     /* "auto" (NULL), "f32", "f16", "bf16", "int8", "fp8" */
    int block_size;           /* tokens of a KV block, 0 = the backend's own */
    uint64_t kv_cache_bytes;  /* of this rank, 0 = memory_share decides */
    uint64_t n_blocks;        /* the same, as a number of blocks; goes before kv_cache_bytes */
    double memory_share;      /* of the free memory for weights, KV and work space; 0 = 0.9, on the
                                 CPU 0.8 but at most 4 GiB of KV */
    uint64_t host_swap_bytes; /* host memory of this rank for blocks that leave the device */
    const char *kv_disk_dir;  /* local directory for blocks that leave the host's memory, NULL = none */
    uint64_t kv_disk_bytes;   /* size of this rank's file there */
    int n_sequences_max;      /* slots; 0 = 256 */
    int step_tokens_max;      /* 0 = 2048 on a GPU; on a CPU a token of each slot and 48, which is
                                 also what prompts get of a step beside others that decode */
    int step_rows_max;    /* rows of logits computed at once; 0 = n_sequences_max * (1 + drafts) */
    int draft_tokens_max; /* drafts verified in one run, 0 = none */
    const char *draft_model_dir;    /* a small model of the same vocabulary that guesses; NULL = none */
    const char *draft_quantization; /* its weights, as `quantization`; NULL = the same */
    bool draft_greedy; /* it takes its best token instead of drawing as the target will */
    int context_max;      /* 0 = the model's, as far as memory allows one sequence */
    const char *load_format; /* "auto" (NULL), "safetensors", "dummy" */
    uint64_t dummy_seed;
    bool progress; /* draw a bar on a terminal while weights load */
};
/* Every field at its default (rank and size -1, the rest zero). */
void worker_config_default(struct worker_config *config);
/* Fills rank and size from OMPI_COMM_WORLD_*, PMIX_RANK, SLURM_PROCID/NTASKS, PMI_*, or
 * LWS_WORKER_INDEX/LWS_GROUP_SIZE where they are -1. ERR_INVALID names a contradiction. */
enum err worker_rank_find(struct worker_config *config);

/* Joins the coordinator and serves until drained (OK), refused or broken beyond repair. Loads the
 * weights once; when a peer or the coordinator is lost it keeps them and joins again.
 * SIGTERM: leaves after the step under way. ERR_DEVICE: the device is lost and what it holds is not
 * given back; the process must end (_exit) and may be started again. ERR_UNSUPPORTED: the device
 * cannot be used at all. */
enum err worker_run(const struct worker_config *config);

/* What was planned before serving; heddle plan prints it without loading (worker_plan_memory). */
struct worker_info {
    char model_name[128], arch_name[64], device[96], weight_format[32], kv_format[16],
        model_digest[33];
    int n_layers, n_heads, n_kv_heads, head_dim, hidden, ffn, vocab_size; /* of the whole model */
    int rank, size, block_size, n_slots_max, step_tokens_max, step_rows_max, context_max,
        draft_tokens_max;
    int step_prompt_max;   /* prompt tokens of a step beside others that decode, 0 = the rest of it */
    int window;            /* 0 = some layer sees all */
    uint64_t n_parameters; /* of the whole model */
    uint64_t weight_bytes; /* resident on this rank; also read once by each decode step */
    uint64_t table_bytes;  /* embeddings whose rows are read one by one */
    uint64_t work_bytes;   /* activations and scratch */
    uint64_t block_bytes, n_blocks, n_host_blocks, n_disk_blocks;
    uint32_t save_ns, load_ns, fetch_ns; /* measured, of a block: to the host, back, disk to host */
    uint64_t memory_total, memory_free; /* of the device before loading */
    /* The draft model, "" = none; block_bytes counts its part of a block. */
    char draft_name[128], draft_format[32], draft_digest[33];
    uint64_t draft_weight_bytes, draft_table_bytes, draft_work_bytes, draft_block_bytes;
};
/* Reads config.json and the tensors' headers only. */
enum err worker_plan_memory(const struct worker_config *config, struct worker_info *out);

/* A rank without its link. The collective may be NULL when size is 1; otherwise it is opened by
 * `boot` (worker_open_group) after creation, and again whenever the group re-forms. */
struct worker;
enum err worker_create(const struct worker_config *config, struct worker **out);
void worker_destroy(struct worker *w);
void worker_info(const struct worker *w, struct worker_info *out);
/* Begins an incarnation of the group: fewer blocks if the group holds fewer, all slots closed. */
enum err worker_open_group(struct worker *w, uint64_t epoch, uint64_t n_blocks,
                           uint64_t n_host_blocks, const struct bootstrap *boot);
/* Makes a step that hangs in a collective fail; callable from another thread. */
void worker_abort(struct worker *w);
/* Runs one plan: bytes of a ToWorker with a StepPlan; appends the bytes of a FromWorker with the
 * result (rank 0) or the ack. ERR_FORMAT: the plan is wrong, names what; nothing was computed and
 * the rank must leave. ERR_PEER, ERR_DEVICE: as said. */
enum err worker_step(struct worker *w, const void *plan, size_t n, struct buf *out_result);
