/* Every option of every verb: one struct, one table. The names follow vLLM and SGLang where they
 * have one, with their other spellings as aliases. */
#pragma once
#include "base/conf.h"

enum verb {
    VERB_SERVE = 1,
    VERB_COORDINATOR = 2,
    VERB_WORKER = 4,
    VERB_CHAT = 8,
    VERB_INSPECT = 16,
    VERB_TOKENIZE = 32,
    VERB_PLAN = 64,
    VERB_DOCTOR = 128,
    VERB_QUANTIZE = 256,
};

struct options {
    const char *config, *model, *served_model_name, *log_level, *log_format;
    /* front */
    const char *host, *uds, *api_key, *api_key_file, *ssl_keyfile, *ssl_certfile, *allowed_origins;
    const char *chat_template, *generation_config;
    int64_t port, grpc_port, http_threads, max_body_bytes, max_logprobs, shutdown_timeout;
    bool webui, log_requests;
    /* cluster */
    const char *coordinator, *worker_address, *cluster_token, *cluster_token_file, *launcher, *hostfile, *mpirun_args;
    const char *cluster_certfile, *cluster_keyfile, *cluster_ca_certs;
    int64_t tp, dp, rank, replica, reconnect_timeout, watchdog_timeout, restarts_max;
    const char *collective;
    /* engine */
    int64_t max_num_seqs, max_num_batched_tokens, max_model_len, max_num_queued_reqs, max_num_queued_tokens;
    int64_t pipeline_depth, speculative_tokens;
    bool prefix_caching;
    const char *record, *kv_offload;
    /* device */
    const char *device, *dtype, *quantization, *kv_cache_dtype, *load_format, *isa, *draft_model, *draft_quantization, *draft_policy, *head_quantization;
    const char *numa;
    int64_t device_index, threads, block_size, blocks_override, kv_cache_bytes, swap_bytes;
    int64_t kv_disk_space;
    const char *kv_disk;
    double memory_utilization;
    int64_t seed;
    bool deterministic, enforce_eager;
    /* tools */
    const char *url, *system, *prompt;
    double temperature;
    int64_t max_tokens;
    bool special_tokens, json, stats;
    const char *output;
};

/* Drafts of a run: with a draft model 4 where nobody said a number. */
static inline int64_t options_speculative_tokens(const struct options *o)
{
    return o->draft_model && !o->speculative_tokens ? 4 : o->speculative_tokens;
}

extern const struct conf_row option_rows[];
extern const int n_option_rows;
extern const struct conf_refusal option_refusals[];
