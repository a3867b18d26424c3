/* heddle serve: the coordinator in this process, its worker ranks as children.
 * heddle coordinator: the same without children. */
#include "base/log.h"
#include "base/mem.h"
#include "cli/device_options.h"
#include "cli/launch.h"
#include "cli/verbs.h"
#include "coordinator/coordinator.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/wait.h>
#include <unistd.h>

enum { STOP_GRACE_MS = 5000 };

static void coordinator_config_from_options(const struct options *o, const char *model, struct coordinator_config *out)
{
    *out = (struct coordinator_config){
        .model_dir = model,
        .served_model_names = o->served_model_name,
        .host = o->host,
        .uds = o->uds,
        .port = (int)o->port,
        .grpc_port = (int)o->grpc_port,
        .n_http_threads = (int)o->http_threads,
        .api_keys = o->api_key,
        .api_key_file = o->api_key_file,
        .tls_certificate = o->ssl_certfile,
        .tls_key = o->ssl_keyfile,
        .allowed_origins = o->allowed_origins,
        .chat_template_file = o->chat_template,
        .generation_config = !strcmp(o->generation_config, "auto"),
        .body_bytes_max = o->max_body_bytes,
        .n_logprobs_max = (int)o->max_logprobs,
        .shutdown_timeout_s = (int)o->shutdown_timeout,
        .webui = o->webui,
        .log_requests = o->log_requests,
        .worker_address = o->worker_address,
        .cluster_certificate = o->cluster_certfile,
        .cluster_key = o->cluster_keyfile,
        .cluster_ca = o->cluster_ca_certs,
        .tp = (int)o->tp,
        .dp = (int)o->dp,
        .watchdog_timeout_s = (int)o->watchdog_timeout,
        .n_sequences_max = (uint32_t)o->max_num_seqs,
        .step_tokens_max = (uint32_t)o->max_num_batched_tokens,
        .context_max = (uint32_t)o->max_model_len,
        .n_queued_max = (uint32_t)o->max_num_queued_reqs,
        .n_queued_tokens_max = (uint64_t)o->max_num_queued_tokens,
        .pipeline_depth = (uint32_t)o->pipeline_depth,
        .n_speculative_tokens = (uint32_t)options_speculative_tokens(o),
        .draft_always = !strcmp(o->draft_policy, "always"),
        .prefix_cache = o->prefix_caching,
        .always_offload = o->kv_offload && !strcmp(o->kv_offload, "always"),
        .record_path = o->record,
    };
}

static const char *model_of(const struct conf *c, const struct options *o)
{
    return o->model ? o->model : c->n_positionals ? c->positionals[0] : NULL;
}

/* A serve under way: what must be undone at its end. */
struct serving {
    struct conf *conf;
    struct options *options;
    const char *model;
    char dir[64], address[96], token[65];
    const char *device_argument; /* NULL = as the options say */
    const char *worker_args[LAUNCH_WORKER_ARGS_MAX];
    struct launch_config launch;
    struct launcher *_Atomic launcher;
};

/* The worker's socket lies in a folder that only this user can enter; the token is random. */
static enum err make_private_port(struct serving *s)
{
    unsigned char random[32];
    snprintf(s->dir, sizeof s->dir, "/tmp/heddle-XXXXXX");
    if (!mkdtemp(s->dir)) FAIL(ERR_IO, "%s: %s", s->dir, strerror(errno));
    snprintf(s->address, sizeof s->address, "unix:%s/workers", s->dir);
    if (getrandom(random, sizeof random, 0) != sizeof random) FAIL(ERR_IO, "no random bytes");
    for (size_t i = 0; i < sizeof random; i++) snprintf(s->token + 2 * i, 3, "%02x", random[i]);
    return OK;
}

/* Options that serve shares with worker travel as --name=value where they differ from the default. */
static enum err build_worker_args(struct serving *s)
{
    static const char *const own[] = {"config", "model", "coordinator", "data-parallel-size", "cluster-token",
                                      "cluster-token-file", NULL};
    int n = 0;
    s->worker_args[n++] = s->model;
    s->worker_args[n++] = "--coordinator";
    s->worker_args[n++] = s->address;
    s->worker_args[n++] = "--reconnect-timeout=10";
    for (int i = 0; i < n_option_rows; i++) {
        const struct conf_row *row = &option_rows[i];
        char text[4200], *copy;
        bool skip = s->conf->source[i] == CONF_FROM_DEFAULT || !(row->verbs & VERB_WORKER) || !(row->verbs & VERB_SERVE);
        for (int k = 0; own[k] && !skip; k++) skip = !strcmp(row->name, own[k]);
        if (skip) continue;
        int at = snprintf(text, sizeof text, "--%s=", row->name);
        if (!conf_value_text(s->conf, row, text + at, sizeof text - (size_t)at)) continue;
        TRY(arena_copy_string(&s->conf->arena, text, strlen(text), &copy));
        s->worker_args[n++] = copy;
    }
    if (s->device_argument) s->worker_args[n++] = s->device_argument; /* the last one counts */
    s->worker_args[n] = NULL;
    return OK;
}

/* A GPU once opened stays open, with memory of it, to the end of the process: a child asks it. */
static enum err plan_in_child(const struct worker_config *config)
{
    struct answer {
        enum err e;
        char why[1024];
    } answer = {.e = ERR_DEVICE, .why = "the check of the GPU ended without an answer"};
    struct worker_info info;
    int ends[2];
    if (pipe2(ends, O_CLOEXEC)) FAIL(ERR_IO, "no pipe: %s", strerror(errno));
    pid_t pid = fork();
    if (pid == 0) {
        answer.e = worker_plan_memory(config, &info);
        snprintf(answer.why, sizeof answer.why, "%s", answer.e ? err_detail() : "");
        _exit(write(ends[1], &answer, sizeof answer) != sizeof answer);
    }
    close(ends[1]);
    ssize_t n = pid < 0 ? -1 : read(ends[0], &answer, sizeof answer);
    close(ends[0]);
    if (pid > 0) waitpid(pid, NULL, 0);
    if (n >= 0 && n != sizeof answer) answer.e = ERR_DEVICE;
    if (pid < 0) FAIL(ERR_IO, "no process: %s", strerror(errno));
    return answer.e ? err_set(answer.e, "%s", answer.why) : OK;
}

static enum err plan_on_gpus(const struct serving *s, struct worker_config config)
{
    int n_local = config.size * (int)s->options->dp;
    config.device = "cuda";
    TRY(plan_in_child(&config));
    if (s->options->hostfile || n_local == 1 || config.device_index >= 0) return OK;
    config.device_index = n_local - 1; /* there may be fewer GPUs than ranks */
    config.rank = config.size - 1;
    return plan_in_child(&config);
}

/* Everything about the model that would make a rank fail is found here first. Where the device is
 * left to us, all ranks of this host get the same one. */
static enum err check_model(struct serving *s)
{
    struct worker_config config;
    struct worker_info info;
    bool automatic = !strcmp(s->options->device, "auto");
    worker_config_from_options(s->options, s->model, &config);
    config.rank = 0;
    config.size = (int)s->options->tp;
    if (!strcmp(s->options->device, "cpu")) return worker_plan_memory(&config, &info);
    enum err e = plan_on_gpus(s, config);
    if (e != ERR_DEVICE || !automatic) return e;
    log_info("device cpu: %s", err_detail());
    if (!s->options->hostfile) s->device_argument = "--device=cpu";
    config.device = "cpu";
    return worker_plan_memory(&config, &info);
}

static bool choose_mpirun(const struct options *o)
{
    if (!strcmp(o->launcher, "mpirun")) return true;
    return !strcmp(o->launcher, "auto") && (o->tp > 1 || o->hostfile);
}

static enum err start_ranks(void *ctx)
{
    struct serving *s = ctx;
    const struct options *o = s->options;
    if (!strcmp(o->launcher, "none")) {
        log_info("workers may dial %s", s->address);
        return OK;
    }
    s->launch = (struct launch_config){
        .n_replicas = (int)o->dp,
        .tp = (int)o->tp,
        .use_mpirun = choose_mpirun(o),
        .hostfile = o->hostfile,
        .mpirun_args = o->mpirun_args,
        .worker_args = s->worker_args,
        .token = s->token,
        .restarts_max = (int)o->restarts_max,
    };
    struct launcher *l;
    TRY(launcher_create(&s->launch, &l));
    s->launcher = l;
    return OK;
}

static void rank_stuck(void *ctx, uint32_t replica, uint32_t rank, const char *host, uint32_t pid)
{
    struct serving *s = ctx;
    (void)replica, (void)rank;
    if (s->launcher) launcher_kill(s->launcher, host, pid);
}

static void ranks_leave(void *ctx)
{
    struct serving *s = ctx;
    if (s->launcher) launcher_rest(s->launcher);
}

static enum err serve(struct serving *s)
{
    struct coordinator_config config;
    if (!s->model) FAIL(ERR_INVALID, "which model? heddle serve MODEL");
    TRY(check_model(s));
    TRY(make_private_port(s));
    TRY(build_worker_args(s));
    if (isatty(STDERR_FILENO)) setenv("HEDDLE_PROGRESS", "1", 1);
    coordinator_config_from_options(s->options, s->model, &config);
    config.worker_address = s->address;
    config.cluster_token = s->token;
    config.on_listening = start_ranks;
    config.on_stuck = rank_stuck;
    config.on_leaving = ranks_leave;
    config.ctx = s;
    return coordinator_run(&config);
}

int verb_serve(struct conf *c, struct options *o)
{
    struct serving s = {.conf = c, .options = o, .model = model_of(c, o)};
    enum err e = serve(&s);
    bool refused = s.launcher && launcher_failed(s.launcher);
    char why[1024];
    snprintf(why, sizeof why, "%s", err_detail());
    launcher_destroy(s.launcher, STOP_GRACE_MS);
    if (*s.dir) {
        unlink(s.address + strlen("unix:"));
        rmdir(s.dir);
    }
    if (e) fprintf(stderr, "heddle serve: %s\n", why);
    return e || refused ? 1 : 0;
}

int verb_coordinator(struct conf *c, struct options *o)
{
    struct coordinator_config config;
    const char *model = model_of(c, o);
    enum err e = model ? OK : err_set(ERR_INVALID, "which model? heddle coordinator MODEL");
    coordinator_config_from_options(o, model, &config);
    if (!e) e = verb_cluster_token(c, o, &config.cluster_token);
    bool loopback = !strncmp(o->worker_address, "127.", 4) || !strncmp(o->worker_address, "unix:", 5) ||
                    !strncmp(o->worker_address, "localhost:", 10);
    if (!e && !config.cluster_token && !loopback)
        e = err_set(ERR_INVALID, "--worker-address %s is reachable from elsewhere: give a --cluster-token-file or HEDDLE_CLUSTER_TOKEN",
                    o->worker_address);
    if (!e) e = coordinator_run(&config);
    return e ? verb_fail("coordinator") : 0;
}
