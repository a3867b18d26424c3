/* See coordinator.h. The parts in the order of their dependence: model files, cluster and engine
 * (each calls the other, so the engine's way to the cluster is a door that closes first), HTTP and
 * gRPC. It must never know what a request says. */
#include "coordinator/coordinator.h"
#include "base/clock.h"
#include "base/hash.h"
#include "base/log.h"
#include "base/mem.h"
#include "coordinator/cluster/cluster.h"
#include "coordinator/engine/engine_loop.h"
#include "coordinator/front/front.h"
#include "coordinator/front/grpc_front.h"
#include "coordinator/front/model_info.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <unistd.h>

enum { NAMES_BYTES_MAX = 4096, FLUSH_MS = 1000, LEAVE_MS = 1000 };

struct coordinator {
    const struct coordinator_config *config;
    struct model_info info;
    struct tokenizer *tokenizer;
    struct chat_template *chat_template;
    struct buf template_text;
    char names[NAMES_BYTES_MAX], origins[NAMES_BYTES_MAX];
    struct front_config front_config;
    struct engine_loop *engine;
    struct cluster *cluster;
    pthread_rwlock_t door; /* between the engine's thread and the cluster */
    bool door_open;
    struct front *front;
    struct grpc_front *grpc;
};

/* --- signals: counted by a handler, waited for by this thread --- */

static int signal_fd = -1;
static void on_signal(int number)
{
    (void)number;
    uint64_t one = 1;
    int saved = errno;
    if (write(signal_fd, &one, sizeof one) < 0) errno = saved;
    errno = saved;
}

/* Waits up to wait_ms (-1 = for ever). True when a signal came. */
static bool signal_wait(int wait_ms)
{
    struct pollfd p = {.fd = signal_fd, .events = POLLIN};
    uint64_t count;
    int n;
    do
        n = poll(&p, 1, wait_ms);
    while (n < 0 && errno == EINTR && wait_ms < 0);
    return n > 0 && read(signal_fd, &count, sizeof count) == sizeof count;
}

static enum err signals_open(struct sigaction old[2])
{
    struct sigaction act = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    signal_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC | EFD_SEMAPHORE);
    if (signal_fd < 0) FAIL(ERR_IO, "eventfd: %s", strerror(errno));
    signal(SIGPIPE, SIG_IGN);
    sigaction(SIGTERM, &act, &old[0]);
    sigaction(SIGINT, &act, &old[1]);
    return OK;
}

/* As many connections as the system lets us have. */
static void files_raise(void)
{
    struct rlimit limit;
    if (getrlimit(RLIMIT_NOFILE, &limit) || limit.rlim_cur == limit.rlim_max) return;
    limit.rlim_cur = limit.rlim_max;
    if (setrlimit(RLIMIT_NOFILE, &limit)) log_warn("file descriptors: %s", strerror(errno));
}

static void signals_close(const struct sigaction old[2])
{
    if (signal_fd < 0) return;
    sigaction(SIGTERM, &old[0], NULL);
    sigaction(SIGINT, &old[1], NULL);
    close(signal_fd);
    signal_fd = -1;
}

/* --- engine and cluster speak through these --- */

static enum err send_plan(void *ctx, uint32_t group, const void *bytes, size_t n)
{
    struct coordinator *c = ctx;
    pthread_rwlock_rdlock(&c->door);
    enum err e = c->door_open ? cluster_send_plan(c->cluster, group, bytes, n)
                              : err_set(ERR_PEER, "the cluster is closed");
    pthread_rwlock_unlock(&c->door);
    return e;
}

static void group_failed(void *ctx, uint32_t group, uint64_t epoch, const char *why)
{
    struct coordinator *c = ctx;
    pthread_rwlock_rdlock(&c->door);
    if (c->door_open) cluster_group_failed(c->cluster, group, epoch, why);
    pthread_rwlock_unlock(&c->door);
}

static void group_up(void *ctx, uint32_t group, const struct group_info *info)
{
    struct coordinator *c = ctx;
    log_info("group %u is up: %u ranks, %u blocks of %u tokens, context %u", group, info->n_ranks,
             info->n_blocks, info->block_size, info->context_max);
    engine_loop_group_up(c->engine, group, info);
}

static void group_down(void *ctx, uint32_t group, uint64_t epoch)
{
    struct coordinator *c = ctx;
    log_warn("group %u is down (epoch %llu)", group, (unsigned long long)epoch);
    engine_loop_group_down(c->engine, group, epoch);
}

static void step_result(void *ctx, uint32_t group, uint64_t epoch, const void *bytes, size_t n)
{
    struct coordinator *c = ctx;
    engine_loop_result(c->engine, group, epoch, bytes, n);
}

static void blocks_moved(void *ctx, uint32_t group, uint64_t epoch, uint32_t rank,
                         const void *bytes, size_t n)
{
    struct coordinator *c = ctx;
    engine_loop_moved(c->engine, group, epoch, rank, bytes, n);
}

static void cluster_show(void *ctx, struct front_cluster *out)
{
    struct coordinator *c = ctx;
    struct cluster_status *s = NULL;
    pthread_rwlock_rdlock(&c->door);
    enum err e = c->door_open ? cluster_status_create(c->cluster, &s) : ERR_NOT_READY;
    pthread_rwlock_unlock(&c->door);
    if (e) return;
    *out = (struct front_cluster){.workers_expected = s->n_groups * s->n_ranks,
                                  .workers_alive = s->n_joined,
                                  .groups = s->n_groups,
                                  .groups_up = s->n_groups_up,
                                  .tensor_parallel = s->n_ranks};
    for (uint32_t i = 0; i < s->n_groups; i++)
        if (s->groups[i].epoch > out->epoch) out->epoch = s->groups[i].epoch;
    cluster_status_destroy(s);
}

/* --- parts --- */

static enum err template_open(struct coordinator *c)
{
    const char *file = c->config->chat_template_file;
    const char *source = tokenizer_chat_template(c->tokenizer, NULL);
    buf_init(&c->template_text, 0);
    if (file) {
        TRY(buf_read_file(&c->template_text, file, 4 << 20));
        source = buf_string(&c->template_text);
    }
    if (!source) return OK;
    enum err e = chat_template_compile(source, strlen(source), &c->chat_template);
    if (e && file) {
        char why[512];
        snprintf(why, sizeof why, "%s", err_detail());
        FAIL(ERR_INVALID, "%s: %s", file, why);
    }
    if (e)
        log_warn("the model's chat template is not usable, so chat is off: %s", err_detail());
    else
        c->front_config.chat_template_source = source;
    return OK;
}

/* Splits at commas into pointers; text is a copy that lives with the coordinator. */
static enum err split(const char *what, const char *list, char *text, const char **out,
                      unsigned max, unsigned *out_n)
{
    if (strlen(list) >= NAMES_BYTES_MAX) FAIL(ERR_INVALID, "%s: too long", what);
    memcpy(text, list, strlen(list) + 1);
    char *save = NULL;
    for (char *p = strtok_r(text, ", ", &save); p; p = strtok_r(NULL, ", ", &save)) {
        if (*out_n == max) FAIL(ERR_INVALID, "%s: more than %u", what, max);
        out[(*out_n)++] = p;
    }
    if (!*out_n) FAIL(ERR_INVALID, "%s: empty", what);
    return OK;
}

static enum err names_set(struct coordinator *c)
{
    struct front_config *f = &c->front_config;
    const char *given = c->config->served_model_names, *dir = c->config->model_dir;
    if (given)
        return split("--served-model-name", given, c->names, f->names, FRONT_NAMES_MAX,
                     &f->n_names);
    snprintf(c->names, sizeof c->names, "%s", dir);
    char *end = c->names + strlen(c->names);
    while (end > c->names + 1 && end[-1] == '/')
        *--end = 0;
    char *slash = strrchr(c->names, '/');
    f->names[f->n_names++] = slash && slash[1] ? slash + 1 : c->names;
    if (f->names[0] != dir && strcmp(f->names[0], dir)) f->names[f->n_names++] = dir;
    return OK;
}

static enum err model_open(struct coordinator *c)
{
    const struct coordinator_config *config = c->config;
    TRY(tokenizer_open(config->model_dir, &c->tokenizer));
    TRY(model_info_read(config->model_dir, config->generation_config, &c->info));
    TRY(template_open(c));
    return names_set(c);
}

static enum err engine_open(struct coordinator *c)
{
    const struct coordinator_config *config = c->config;
    struct engine_config engine = {.n_groups = config->dp > 0 ? (uint32_t)config->dp : 1,
                                   .n_sequences_max = config->n_sequences_max,
                                   .step_tokens_max = config->step_tokens_max,
                                   .context_max = config->context_max,
                                   .n_queued_max = config->n_queued_max,
                                   .n_queued_tokens_max = config->n_queued_tokens_max,
                                   .pipeline_depth = config->pipeline_depth,
                                   .prefix_cache = config->prefix_cache,
                                   .always_offload = config->always_offload,
                                   .n_speculative_tokens = config->n_speculative_tokens,
                                   .draft_always = config->draft_always,
                                   .record_path = config->record_path,
                                   .step_timeout_us =
                                       (int64_t)config->watchdog_timeout_s * 1000000};
    if (getrandom(&engine.hash_salt, sizeof engine.hash_salt, 0) < 0)
        FAIL(ERR_IO, "no random bytes: %s", strerror(errno));
    struct engine_hooks hooks = {.send_plan = send_plan, .group_failed = group_failed, .ctx = c};
    return engine_loop_create(&engine, &hooks, &c->engine);
}

static void rank_stuck(void *ctx, uint32_t group, uint32_t rank, const char *host, uint32_t pid)
{
    const struct coordinator_config *config = ((struct coordinator *)ctx)->config;
    if (config->on_stuck) config->on_stuck(config->ctx, group, rank, host, pid);
}

static enum err cluster_open(struct coordinator *c)
{
    const struct coordinator_config *config = c->config;
    struct cluster_config cluster = {.address = config->worker_address,
                                     .token = config->cluster_token,
                                     .tls = {.ca_file = config->cluster_ca,
                                             .cert_file = config->cluster_certificate,
                                             .key_file = config->cluster_key},
                                     .n_groups = config->dp > 0 ? (uint32_t)config->dp : 1,
                                     .n_ranks = config->tp > 0 ? (uint32_t)config->tp : 1};
    struct cluster_hooks hooks = {.group_up = group_up,
                                  .group_down = group_down,
                                  .result = step_result,
                                  .moved = blocks_moved,
                                  .rank_stuck = rank_stuck,
                                  .ctx = c};
    TRY(cluster_create(&cluster, &hooks, &c->cluster));
    pthread_rwlock_wrlock(&c->door);
    c->door_open = true;
    pthread_rwlock_unlock(&c->door);
    return OK;
}

static enum err front_open(struct coordinator *c)
{
    const struct coordinator_config *config = c->config;
    struct front_config *f = &c->front_config;
    f->http = (struct http_config){.host = config->host,
                                   .port = config->port,
                                   .uds = config->uds,
                                   .tls_cert_file = config->tls_certificate,
                                   .tls_key_file = config->tls_key,
                                   .n_loops = (unsigned)config->n_http_threads,
                                   .body_bytes_max = (size_t)config->body_bytes_max};
    f->model_path = config->model_dir;
    f->tokenizer = c->tokenizer;
    f->chat_template = c->chat_template;
    f->engine = c->engine;
    f->context_max = c->info.context_max;
    if (config->context_max) f->context_max = config->context_max;
    f->vocab_size = c->info.vocab_size;
    if (!f->vocab_size) f->vocab_size = (uint32_t)tokenizer_vocab_size(c->tokenizer);
    f->defaults = c->info.defaults;
    f->max_logprobs = config->n_logprobs_max;
    f->webui = config->webui;
    f->log_requests = config->log_requests;
    f->cluster = cluster_show;
    f->cluster_ctx = c;
    if (config->api_keys) TRY(auth_add_list(&f->auth, config->api_keys));
    if (config->api_key_file) TRY(auth_add_file(&f->auth, config->api_key_file));
    if (config->allowed_origins)
        TRY(split("--allowed-origins", config->allowed_origins, c->origins, f->origins,
                  FRONT_ORIGINS_MAX, &f->n_origins));
    TRY(front_create(f, &c->front));
    if (!config->grpc_port) return OK;
    struct grpc_front_config grpc = {
        .front = c->front,
        .host = config->host ? config->host : "127.0.0.1",
        .port = config->grpc_port,
        .tls = {.cert_file = config->tls_certificate, .key_file = config->tls_key}};
    return grpc_front_create(&grpc, &c->grpc);
}

static void say_where(const struct coordinator *c)
{
    const struct coordinator_config *config = c->config;
    const char *scheme = config->tls_certificate ? "https" : "http";
    if (config->host)
        log_info("serving %s at %s://%s:%d%s", c->front_config.names[0], scheme, config->host,
                 http_server_port(c->front->http), config->webui ? " (chat page at /)" : "");
    if (config->uds) log_info("serving at unix:%s", config->uds);
    if (c->grpc) log_info("gRPC at %s:%d", config->host, grpc_front_port(c->grpc));
    log_info("waiting for %d x %d workers at %s", config->dp, config->tp, config->worker_address);
    if (!c->front_config.auth.n_keys && config->host && strncmp(config->host, "127.", 4) &&
        strcmp(config->host, "localhost") && strcmp(config->host, "::1"))
        log_warn("%s is reachable from elsewhere and no API key is set", config->host);
}

/* --- the end --- */

/* Requests in flight end, unless time or patience does. */
static void drain(struct coordinator *c)
{
    int64_t end = clock_monotonic_us() + (int64_t)c->config->shutdown_timeout_s * 1000000;
    bool rested = false, hurried = false;
    log_info("draining: %d s for what is in flight", c->config->shutdown_timeout_s);
    front_drain(c->front);
    if (c->grpc) grpc_front_drain(c->grpc);
    while (!rested && !hurried && clock_monotonic_us() < end) {
        rested = engine_loop_drain(c->engine, 50000);
        hurried = signal_wait(0);
    }
    if (!rested) log_warn("not everything in flight could end");
    for (int ms = 0; rested && !hurried && ms < FLUSH_MS; ms += 20) {
        if (!atomic_load(&c->front->n_streams) && front_is_quiet(c->front)) break;
        front_drain(c->front);
        hurried = signal_wait(20);
    }
    if (hurried) return;
    if (c->config->on_leaving) c->config->on_leaving(c->config->ctx);
    cluster_drain(c->cluster, CLUSTER_ALL);
    for (int ms = 0; cluster_groups_up(c->cluster) && ms < LEAVE_MS; ms += 20)
        if (signal_wait(20)) return;
}

static void coordinator_close(struct coordinator *c)
{
    grpc_front_stop(c->grpc);
    if (c->front) front_stop(c->front);
    pthread_rwlock_wrlock(&c->door);
    c->door_open = false;
    pthread_rwlock_unlock(&c->door);
    cluster_destroy(c->cluster);
    engine_loop_destroy(c->engine);
    grpc_front_destroy(c->grpc);
    front_destroy(c->front);
    chat_template_destroy(c->chat_template);
    tokenizer_close(c->tokenizer);
    buf_fini(&c->template_text);
    pthread_rwlock_destroy(&c->door);
    mem_free(c);
}

enum err coordinator_run(const struct coordinator_config *config)
{
    struct coordinator *c = NULL;
    struct sigaction old[2];
    enum err e = OK;
    char why[1024] = "";
    TRY(MEM_NEW(&c));
    c->config = config;
    pthread_rwlock_init(&c->door, NULL);
    files_raise();
    TRY_OUT(signals_open(old));
    TRY_OUT(engine_open(c));
    TRY_OUT(cluster_open(c));
    if (config->on_listening) TRY_OUT(config->on_listening(config->ctx));
    TRY_OUT(model_open(c)); /* while the ranks load their weights */
    TRY_OUT(front_open(c));
    say_where(c);
    signal_wait(-1);
    drain(c);
out:
    snprintf(why, sizeof why, "%s", e ? err_detail() : "");
    signals_close(old); /* from here on a signal ends the process in its own way */
    coordinator_close(c);
    return e ? err_set(e, "%s", why) : OK;
}
