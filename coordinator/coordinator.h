/* The coordinator as a whole: tokenizer, engine, the workers' port, HTTP and gRPC fronts, signals. */
#pragma once
#include "base/err.h"
#include <stdbool.h>
#include <stdint.h>

struct coordinator_config { /* strings stay the caller's; NULL and 0 mean the default or none */
    const char *model_dir;          /* tokenizer, chat template, generation_config.json, config.json */
    const char *served_model_names; /* several with commas; NULL = the folder's name */
    /* HTTP */
    const char *host, *uds;
    int port;                       /* 0 picks one, printed */
    int grpc_port;                  /* 0 = no gRPC front */
    int n_http_threads;
    const char *api_keys, *api_key_file;
    const char *tls_certificate, *tls_key, *allowed_origins;
    const char *chat_template_file;
    bool generation_config;         /* defaults of sampling from the model */
    int64_t body_bytes_max;
    int n_logprobs_max;
    int shutdown_timeout_s;
    bool webui, log_requests;
    /* cluster */
    const char *worker_address;     /* "127.0.0.1:8001", "unix:/path" */
    const char *cluster_token;
    const char *cluster_certificate, *cluster_key, *cluster_ca;
    int tp, dp;
    int watchdog_timeout_s;
    /* engine */
    uint32_t n_sequences_max, step_tokens_max, context_max, n_queued_max, pipeline_depth, n_speculative_tokens;
    bool draft_always;
    uint64_t n_queued_tokens_max;
    bool prefix_cache, always_offload;
    const char *record_path;
    /* Called once the workers' port listens, before the model's files are read: `heddle serve`
     * starts its ranks here, so that they load while the tokenizer does. May be NULL. */
    enum err (*on_listening)(void *ctx);
    void *ctx;
    /* May be NULL. A rank's process hangs (see struct cluster_hooks); gets ctx too. Any thread. */
    void (*on_stuck)(void *ctx, uint32_t replica, uint32_t rank, const char *host, uint32_t pid);
    void (*on_leaving)(void *ctx); /* the ranks are about to be told to leave; may be NULL */
};

/* Checks the files, listens, serves until SIGTERM or SIGINT (drains, then OK; a second signal leaves
 * at once), or says why it cannot. Blocks the signals it handles in the threads it makes; must be
 * called on the main thread before others are started. */
enum err coordinator_run(const struct coordinator_config *config);
