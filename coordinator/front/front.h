/* The front: what all its parts share. HTTP and gRPC meet the tokenizer and the engine here.
 *
 * One loop thread does everything for a call: parsing, templates, tokenizing, detokenizing,
 * writing. The engine's thread only copies emissions into a stream's queue and marks it ready.
 *
 * It must never know scheduling, blocks or devices. */
#pragma once
#include "coordinator/engine/engine_loop.h"
#include "coordinator/front/auth.h"
#include "coordinator/front/http.h"
#include "coordinator/front/metrics.h"
#include "coordinator/text/chat_template.h"
#include "coordinator/text/tokenizer.h"

struct front_cluster {
    uint32_t workers_expected, workers_alive, groups, groups_up, tensor_parallel;
    uint64_t epoch;
};

/* Sampling when a request does not say: the API's own, then generation_config.json's. */
struct front_defaults {
    struct sampling_params sampling;
    int64_t max_tokens; /* 0 = as many as fit */
};

enum { FRONT_NAMES_MAX = 16, FRONT_ORIGINS_MAX = 32 };
struct front_config {
    struct http_config http;
    const char *names[FRONT_NAMES_MAX]; /* [n_names] of the model in the API; the first is shown */
    unsigned n_names;
    const char *model_path; /* shown as the model's root */
    struct tokenizer *tokenizer;
    struct chat_template *chat_template; /* NULL = the model has none */
    const char *chat_template_source;
    struct engine_loop *engine;
    uint32_t context_max; /* tokens of one sequence; 0 = as the engine says */
    uint32_t vocab_size;  /* ids below it may be asked for */
    struct front_defaults defaults;
    int max_logprobs;
    struct auth auth;
    const char *origins[FRONT_ORIGINS_MAX]; /* [n_origins]; "*" = any */
    unsigned n_origins;
    bool webui, log_requests;
    void (*cluster)(void *ctx, struct front_cluster *out); /* may be NULL */
    void *cluster_ctx;
    const char *system_fingerprint;
};

struct front_loop; /* one per HTTP loop: ready streams and posted jobs */
struct text_pool;
struct front {
    struct front_config config;
    struct metrics metrics;
    struct http_server *http;
    struct text_pool *texts; /* for bodies too long for a loop */
    atomic_ullong next_id;   /* of engine requests */
    atomic_ullong next_public_id;
    uint64_t random; /* makes public ids of this process unlike those of others */
    atomic_bool draining;
    int64_t started_unix_s;
    atomic_uint next_loop;    /* round robin for calls that do not come by HTTP */
    struct front_loop *loops; /* [n_loops] */
    unsigned n_loops;
    atomic_uint n_streams; /* alive, answered or not: 0 = nobody needs the front any more */
};

enum err front_create(const struct front_config *config, struct front **out);
/* /health says 503, answers close their connections; what runs goes on. */
void front_drain(struct front *f);
/* Cuts every connection and ends the threads: nobody asks the engine anything any more. The engine
 * must then be destroyed, which ends what is left, and the front after it. */
void front_stop(struct front *f);
void front_destroy(struct front *f);  /* accepts NULL */
bool front_is_quiet(struct front *f); /* no connection is left */

bool front_ready(struct front *f); /* a full group can answer, and we are not draining */
uint32_t front_context_max(struct front *f);
uint32_t front_vocab_size(struct front *f);
void front_cluster_get(struct front *f, struct front_cluster *out);
/* "PREFIX" and 32 hexadecimal digits. */
void front_make_id(struct front *f, const char *prefix, char out[48]);

/* --- loops --- */
struct front_job {
    struct front_job *next;
    void (*run)(struct front_job *job, struct front_loop *loop); /* on the loop's thread */
};
struct stream;
struct front_loop {
    struct front *front;
    struct http_loop *http;
    pthread_mutex_t mutex;
    struct stream *ready; /* list by stream.next_ready, newest first */
    struct front_job *jobs;
    struct buf scratch; /* for the loop's thread */
};
struct front_loop *front_loop_of(const struct http_exchange *x);
struct front_loop *front_loop_any(struct front *f);
/* Any thread: has the job run on the loop's thread. */
void front_post(struct front_loop *l, struct front_job *job);
