/* heddle worker: one rank. Under a supervisor it ends with it. */
#include "base/log.h"
#include "cli/device_options.h"
#include "cli/verbs.h"
#include "parallel/numa.h"

#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <signal.h>
#include <unistd.h>

/* "auto" and "none" are the absence of a wish. */
static const char *wish(const char *word)
{
    return !word || !strcmp(word, "auto") || !strcmp(word, "none") ? NULL : word;
}

static const char *short_dtype(const char *word)
{
    static const char *const names[][2] = {{"float32", "f32"}, {"float16", "f16"}, {"bfloat16", "bf16"}};
    for (int i = 0; word && i < 3; i++)
        if (!strcmp(word, names[i][0])) return names[i][1];
    return wish(word);
}

void worker_config_from_options(const struct options *o, const char *model, struct worker_config *out)
{
    worker_config_default(out);
    out->model_dir = model;
    out->device = o->device;
    out->device_index = (int)o->device_index;
    out->collective = o->collective;
    out->n_threads = (int)o->threads;
    out->isa = wish(o->isa);
    out->deterministic = o->deterministic;
    out->eager = o->enforce_eager;
    out->dtype = short_dtype(o->dtype);
    out->quantization = o->quantization; /* "auto" is a wish here: the least that fits the memory */
    out->head_quantization = wish(o->head_quantization);
    out->kv_dtype = short_dtype(o->kv_cache_dtype);
    out->block_size = (int)o->block_size;
    out->kv_cache_bytes = (uint64_t)o->kv_cache_bytes;
    out->memory_share = o->memory_utilization;
    out->host_swap_bytes = (uint64_t)o->swap_bytes;
    out->n_blocks = (uint64_t)o->blocks_override;
    out->kv_disk_dir = wish(o->kv_disk);
    out->kv_disk_bytes = (uint64_t)o->kv_disk_space;
    out->n_sequences_max = (int)o->max_num_seqs;
    out->step_tokens_max = (int)o->max_num_batched_tokens;
    out->draft_tokens_max = (int)options_speculative_tokens(o);
    out->draft_model_dir = o->draft_model;
    /* "none" is a wish here: the draft model as it is stored, though the model is not */
    out->draft_quantization = !strcmp(o->draft_quantization, "same") ? NULL : o->draft_quantization;
    out->context_max = (int)o->max_model_len;
    out->load_format = o->load_format;
    out->dummy_seed = (uint64_t)o->seed;
}

/* A number from the first of the variables that has one, else otherwise. */
static int number_from(const char *const *names, int least, int otherwise)
{
    for (; *names; names++) {
        const char *text = getenv(*names);
        char *end;
        long n = text ? strtol(text, &end, 10) : -1;
        if (text && end != text && n >= least && n <= 4096) return (int)n;
    }
    return otherwise;
}

/* Takes this rank's cores of the host; threads of a rank that was given none: those cores, shared
 * with the ranks beside it. */
static enum err place_rank(const struct options *o, struct worker_config *config)
{
    static const char *const counts[] = {"HEDDLE_LOCAL_RANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE", NULL};
    static const char *const places[] = {"OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID", NULL};
    bool one_host = getenv("HEDDLE_LOCAL_RANKS") != NULL; /* all replicas are on it */
    int n_local = number_from(counts, 1, 1), wish, n_sharing;
    int local = one_host ? config->replica * config->size + config->rank : number_from(places, 0, config->rank);
    cpu_set_t cores;
    TRY(numa_wish_read(o->numa, &wish));
    TRY(numa_bind(wish, local, n_local > local ? n_local : local + 1, &n_sharing));
    if (o->device_index < 0 && one_host) config->device_index = local;
    int n = sched_getaffinity(0, sizeof cores, &cores) ? 1 : CPU_COUNT(&cores);
    if (!config->n_threads) config->n_threads = n_sharing >= n ? 1 : n / (n_sharing < 1 ? 1 : n_sharing);
    return OK;
}

int verb_worker(struct conf *c, struct options *o)
{
    struct worker_config config;
    char who[64];
    const char *model = o->model ? o->model : c->n_positionals ? c->positionals[0] : NULL;
    enum err e = OK;
    if (getenv("HEDDLE_SUPERVISED") && !prctl(PR_SET_PDEATHSIG, SIGTERM) && getppid() == 1) return 0;
    if (!model) e = err_set(ERR_INVALID, "which model? heddle worker MODEL --coordinator HOST:PORT");
    else if (!o->coordinator) e = err_set(ERR_INVALID, "--coordinator HOST:PORT is needed");
    worker_config_from_options(o, model, &config);
    config.coordinator = o->coordinator;
    config.patience_ms = (int)o->reconnect_timeout * 1000;
    config.tls_ca = o->cluster_ca_certs;
    config.tls_cert = o->cluster_certfile;
    config.tls_key = o->cluster_keyfile;
    config.rank = (int)o->rank;
    config.size = o->rank >= 0 ? (int)o->tp : -1;
    config.progress = isatty(STDERR_FILENO) || getenv("HEDDLE_PROGRESS");
    if (!e) e = verb_cluster_token(c, o, &config.token);
    if (!e) e = worker_rank_find(&config);
    if (!e && o->replica < 0) { /* one launch for all replicas: world rank = replica * tp + rank */
        if (config.size % (int)o->tp)
            e = err_set(ERR_INVALID, "%d ranks are not a multiple of --tensor-parallel-size %d", config.size, (int)o->tp);
        config.replica = config.rank / (int)o->tp;
        config.rank %= (int)o->tp;
        config.size = (int)o->tp;
    } else if (!e) {
        config.replica = (int)o->replica;
        if (config.size != o->tp)
            e = err_set(ERR_INVALID, "%d ranks were started, but --tensor-parallel-size is %d", config.size, (int)o->tp);
    }
    snprintf(who, sizeof who, "worker %d.%d", config.replica, config.rank);
    log_set_who(who);
    if (!e) e = place_rank(o, &config);
    if (!e) e = worker_run(&config);
    if (!e) return 0;
    verb_fail(who);
    if (e == ERR_DEVICE) { /* its driver may never return from tidying up */
        fflush(NULL);
        _exit(3);
    }
    return e == ERR_PEER || e == ERR_DEVICE || e == ERR_TIMEOUT ? 3 : 1; /* 3: worth starting again */
}
