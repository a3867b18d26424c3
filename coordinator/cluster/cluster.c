/* The cluster as an object: its port, its thread, plans out, status. The thread beats the heart,
 * looks for the dead and the late, and is the only one that tells the engine of groups, so that its
 * hooks come in order and never under the mutex. */
#include "coordinator/cluster/cluster.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/mem.h"
#include "coordinator/cluster/cluster_impl.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

/* ---- The thread ---- */

/* Takes one group off the list and tells the engine what has changed since it was told last. */
static void tell_engine(struct cluster *c) /* locked; unlocks while hooks run */
{
    struct group *g = c->dirty;
    c->dirty = g->dirty_next;
    g->dirty = false;
    uint64_t up = g->state == CLUSTER_GROUP_UP ? g->epoch : 0, told = g->told_epoch;
    struct group_info info = g->info;
    uint32_t index = g->index;
    g->told_epoch = up;
    pthread_mutex_unlock(&c->mutex);
    if (told && told != up) c->hooks.group_down(c->hooks.ctx, index, told);
    if (up && told != up) c->hooks.group_up(c->hooks.ctx, index, &info);
    pthread_mutex_lock(&c->mutex);
}

/* One that was lost alive and has not returned. */
static void tell_stuck(struct cluster *c, struct rank *r, uint32_t index) /* as tell_engine */
{
    struct rank was = *r;
    uint32_t group = index / c->config.n_ranks, rank = index % c->config.n_ranks;
    r->stuck_pid = 0;
    log_warn("group %u: rank %u (%s pid %u) has not returned: it hangs", group, rank,
             was.stuck_host, was.stuck_pid);
    if (!c->hooks.rank_stuck) return;
    pthread_mutex_unlock(&c->mutex);
    c->hooks.rank_stuck(c->hooks.ctx, group, rank, was.stuck_host, was.stuck_pid);
    pthread_mutex_lock(&c->mutex);
}

static void tick(struct cluster *c, int64_t now_us)
{
    for (uint32_t i = 0; i < c->config.n_groups * c->config.n_ranks; i++)
        if (c->ranks[i].stuck_pid &&
            now_us - c->ranks[i].stuck_us > (int64_t)c->config.stuck_ms * 1000)
            tell_stuck(c, &c->ranks[i], i);
    membership_tick(c, now_us);
    for (uint32_t i = 0; i < c->config.n_groups; i++)
        group_tick(c, &c->groups[i], now_us);
}

static void *monitor_run(void *ctx)
{
    struct cluster *c = ctx;
    int64_t period_us = (int64_t)c->config.heartbeat_ms * 500,
            next_us = clock_monotonic_us() + period_us;
    pthread_mutex_lock(&c->mutex);
    while (!c->stop) {
        int64_t now_us = clock_monotonic_us();
        if (c->dirty) {
            tell_engine(c);
        } else if (now_us >= next_us) {
            tick(c, now_us);
            next_us = now_us + period_us;
        } else {
            struct timespec until = {next_us / 1000000, next_us % 1000000 * 1000};
            pthread_cond_timedwait(&c->work, &c->mutex, &until);
        }
    }
    pthread_mutex_unlock(&c->mutex);
    return NULL;
}

/* ---- Create and destroy ---- */

static uint32_t or_default(uint32_t value, uint32_t otherwise)
{
    return value ? value : otherwise;
}

static enum err config_take(struct cluster *c, const struct cluster_config *config)
{
    uint64_t total = (uint64_t)config->n_groups * config->n_ranks;
    if (!config->address) FAIL(ERR_INVALID, "the workers' port needs an address");
    if (!config->n_ranks || config->n_ranks > CLUSTER_RANKS_MAX)
        FAIL(ERR_INVALID, "a group of %u ranks; 1 to %d are possible", config->n_ranks,
             CLUSTER_RANKS_MAX);
    if (!config->n_groups || config->n_groups > ENGINE_GROUPS_MAX || total > RANKS_TOTAL_MAX)
        FAIL(ERR_INVALID, "%u groups of %u ranks; at most %d groups and %d ranks", config->n_groups,
             config->n_ranks, ENGINE_GROUPS_MAX, RANKS_TOTAL_MAX);
    if (config->model_digest && strlen(config->model_digest) >= sizeof c->model_digest)
        FAIL(ERR_INVALID, "a model digest of more than %zu characters", sizeof c->model_digest - 1);
    c->config = *config;
    c->config.heartbeat_ms = or_default(config->heartbeat_ms, 500);
    c->config.dead_ms = or_default(config->dead_ms, 2000);
    c->config.join_timeout_ms = or_default(config->join_timeout_ms, 10000);
    c->config.form_timeout_ms = or_default(config->form_timeout_ms, 120000);
    c->config.stuck_ms = or_default(config->stuck_ms, 5000);
    c->config.n_pending_max = or_default(config->n_pending_max, 64);
    c->vocab_size = config->vocab_size;
    if (config->model_digest)
        snprintf(c->model_digest, sizeof c->model_digest, "%s", config->model_digest);
    c->address = mem_strdup(config->address);
    c->token = config->token ? mem_strdup(config->token) : NULL;
    if (!c->address || (config->token && !c->token))
        FAIL(ERR_NO_MEMORY, "no memory for the cluster");
    TRY(MEM_NEW_ARRAY(config->n_groups, &c->groups));
    TRY(MEM_NEW_ARRAY(total, &c->ranks));
    for (uint32_t i = 0; i < config->n_groups; i++) {
        c->groups[i].index = i;
        c->groups[i].ranks = c->ranks + (size_t)i * config->n_ranks;
    }
    return OK;
}

static enum err listen_start(struct cluster *c)
{
    const struct rpc_method attach = {.path = "/heddle.cluster.Cluster/Attach",
                                      .kind = RPC_BIDI,
                                      .send_bytes_max = 64 << 20,
                                      .on_open = cluster_stream_open,
                                      .on_message = cluster_stream_message,
                                      .on_half_close = cluster_stream_half_close,
                                      .on_close = cluster_stream_close,
                                      .ctx = c};
    const struct rpc_server_config config = {
        .address = c->address,
        .authorize = cluster_authorize,
        .authorize_ctx = c,
        .tls = c->config.tls,
        .n_threads = 1,
        .n_calls_max = c->config.n_groups * c->config.n_ranks * 2 + c->config.n_pending_max,
        .methods = &attach,
        .n_methods = 1};
    return rpc_server_create(&config, &c->server);
}

enum err cluster_create(const struct cluster_config *config, const struct cluster_hooks *hooks,
                        struct cluster **out)
{
    struct cluster *c;
    pthread_condattr_t attributes;
    TRY(MEM_NEW(&c));
    c->hooks = *hooks;
    pthread_mutex_init(&c->mutex, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&c->work, &attributes);
    pthread_condattr_destroy(&attributes);
    enum err e = config_take(c, config);
    if (e) goto out;
    TRY_OUT(listen_start(c));
    if (pthread_create(&c->monitor, NULL, monitor_run, c))
        FAIL_OUT(ERR_NO_MEMORY, "no thread for the cluster");
    c->has_monitor = true;
    *out = c;
out:
    if (e) cluster_destroy(c);
    return e;
}

void cluster_destroy(struct cluster *c)
{
    if (!c) return;
    pthread_mutex_lock(&c->mutex);
    c->stop = true;
    pthread_cond_signal(&c->work);
    pthread_mutex_unlock(&c->mutex);
    if (c->has_monitor) pthread_join(c->monitor, NULL);
    rpc_server_destroy(c->server);
    for (uint32_t i = 0; c->groups && i < c->config.n_groups; i++)
        cluster_group_fini(c, &c->groups[i]);
    pthread_cond_destroy(&c->work);
    pthread_mutex_destroy(&c->mutex);
    mem_free(c->groups);
    mem_free(c->ranks);
    mem_free(c->address);
    mem_free(c->token);
    mem_free(c);
}

int cluster_port(const struct cluster *c)
{
    return rpc_server_port(c->server);
}

/* ---- Plans ---- */

/* Counts the plan and takes the streams of its ranks. */
static enum err plan_admit(struct cluster *c, uint32_t group, struct span bytes,
                           struct rpc_call *out_calls[])
{
    struct envelope envelope;
    uint64_t epoch, step;
    if (group >= c->config.n_groups) FAIL(ERR_INVALID, "group %u of %u", group, c->config.n_groups);
    TRY(envelope_open(bytes, &envelope));
    TRY(envelope_number(envelope.body, 1, &epoch));
    TRY(envelope_number(envelope.body, 2, &step));
    struct group *g = &c->groups[group];
    if (g->state != CLUSTER_GROUP_UP || epoch != g->epoch)
        FAIL(ERR_PEER, "group %u is not up in epoch %llu", group, (unsigned long long)epoch);
    g->n_plans++;
    g->epoch_plans++;
    g->plan_bytes += bytes.n;
    g->last_plan_step = step;
    for (uint32_t i = 0; i < c->config.n_ranks; i++)
        out_calls[i] = rpc_acquire(g->ranks[i].stream->call);
    return OK;
}

enum err cluster_send_plan(struct cluster *c, uint32_t group, const void *bytes, size_t n)
{
    struct rpc_call *calls[CLUSTER_RANKS_MAX];
    struct rpc_bytes *plan;
    TRY(rpc_bytes_create(bytes, n, &plan));
    pthread_mutex_lock(&c->mutex);
    enum err e = plan_admit(c, group, rpc_bytes_span(plan), calls);
    pthread_mutex_unlock(&c->mutex);
    for (uint32_t i = 0; !e && i < c->config.n_ranks; i++) {
        if (rpc_send_shared(calls[i], plan) == ERR_FULL) {
            log_warn("group %u: rank %u does not read what it is sent", group, i);
            rpc_cancel(calls[i]);
        }
        rpc_release(calls[i]);
    }
    rpc_bytes_release(plan);
    return e;
}

void cluster_group_failed(struct cluster *c, uint32_t group, uint64_t epoch, const char *why)
{
    if (group >= c->config.n_groups) return;
    pthread_mutex_lock(&c->mutex);
    struct group *g = &c->groups[group];
    if (g->epoch == epoch && g->state != CLUSTER_GROUP_JOINING) {
        for (uint32_t i = 0; i < c->config.n_ranks; i++)
            log_warn("group %u: rank %u had answered step %llu of %llu", group, i,
                     (unsigned long long)g->ranks[i].last_step,
                     (unsigned long long)g->last_plan_step);
        for (uint32_t i = 0; i < c->config.n_ranks; i++) {
            rank_suspect(c, g, i);
            rank_lose(c, g, i, false, "%s", why);
        }
    }
    pthread_mutex_unlock(&c->mutex);
}

void cluster_drain(struct cluster *c, int32_t group)
{
    Heddle__Cluster__Drain d = HEDDLE__CLUSTER__DRAIN__INIT;
    Heddle__Cluster__ToWorker m = HEDDLE__CLUSTER__TO_WORKER__INIT;
    m.kind_case = HEDDLE__CLUSTER__TO_WORKER__KIND_DRAIN;
    m.drain = &d;
    pthread_mutex_lock(&c->mutex);
    for (uint32_t i = 0; i < c->config.n_groups * c->config.n_ranks; i++)
        if (c->ranks[i].stream &&
            (group == CLUSTER_ALL || i / c->config.n_ranks == (uint32_t)group))
            (void)envelope_send(c->ranks[i].stream->call, &m.base);
    pthread_mutex_unlock(&c->mutex);
}

/* ---- Status ---- */

static void rank_status(const struct rank *r, int64_t now_us, struct cluster_rank_status *out)
{
    *out = (struct cluster_rank_status){.state = r->state,
                                        .heard_ago_us = r->heard_us ? now_us - r->heard_us : -1,
                                        .joined_ago_us = -1,
                                        .last_step = r->last_step,
                                        .compute_us = r->compute_us,
                                        .wait_us = r->wait_us,
                                        .collective_us = r->collective_us,
                                        .skew_us = r->skew_us,
                                        .n_losses = r->n_losses};
    if (!r->stream) return;
    const Heddle__Cluster__Join *j = r->stream->join->join;
    out->joined_ago_us = now_us - r->joined_us;
    out->pid = j->pid;
    out->incarnation = j->incarnation;
    out->weight_bytes = j->weight_bytes;
    out->block_bytes = j->block_bytes;
    out->blocks_max = j->blocks_max;
    out->host_blocks_max = j->host_blocks_max;
    words_copy(out->host, sizeof out->host, j->host);
    words_copy(out->device, sizeof out->device, j->device);
    words_copy(out->peer, sizeof out->peer, rpc_peer(r->stream->call));
}

static void group_status(const struct group *g, int64_t now_us, struct cluster_group_status *out)
{
    *out = (struct cluster_group_status){.state = g->state,
                                         .epoch = g->epoch,
                                         .n_joined = g->n_joined,
                                         .n_ready = g->n_ready,
                                         .n_losses = g->n_losses,
                                         .n_plans = g->n_plans,
                                         .n_results = g->n_results,
                                         .plan_bytes = g->plan_bytes,
                                         .up_ago_us =
                                             g->state == CLUSTER_GROUP_UP ? now_us - g->up_us : -1};
    snprintf(out->last_loss, sizeof out->last_loss, "%s", g->last_loss);
}

enum err cluster_status_create(struct cluster *c, struct cluster_status **out)
{
    struct cluster_status *s;
    uint32_t total = c->config.n_groups * c->config.n_ranks;
    TRY(MEM_NEW(&s));
    if (MEM_NEW_ARRAY(c->config.n_groups, &s->groups) || MEM_NEW_ARRAY(total, &s->ranks)) {
        cluster_status_destroy(s);
        return ERR_NO_MEMORY;
    }
    s->n_groups = c->config.n_groups;
    s->n_ranks = c->config.n_ranks;
    pthread_mutex_lock(&c->mutex);
    int64_t now_us = clock_monotonic_us();
    for (uint32_t i = 0; i < c->config.n_groups; i++) {
        group_status(&c->groups[i], now_us, &s->groups[i]);
        s->n_joined += c->groups[i].n_joined;
    }
    for (uint32_t i = 0; i < total; i++)
        rank_status(&c->ranks[i], now_us, &s->ranks[i]);
    s->n_groups_up = c->n_groups_up;
    s->n_pending = c->n_pending;
    s->n_refused = c->n_refused;
    snprintf(s->model_digest, sizeof s->model_digest, "%s", c->model_digest);
    snprintf(s->model_name, sizeof s->model_name, "%s", c->model_name);
    pthread_mutex_unlock(&c->mutex);
    *out = s;
    return OK;
}

void cluster_status_destroy(struct cluster_status *s)
{
    if (!s) return;
    mem_free(s->groups);
    mem_free(s->ranks);
    mem_free(s);
}

uint32_t cluster_groups_up(struct cluster *c)
{
    pthread_mutex_lock(&c->mutex);
    uint32_t n = c->n_groups_up;
    pthread_mutex_unlock(&c->mutex);
    return n;
}
