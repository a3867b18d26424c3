/* Streams of ranks and of strangers: joining, claims on a place, silence, loss. Messages come on
 * polling threads; everything is decided under the cluster's mutex. Bytes from a stream are errors
 * of that stream: it is refused, its neighbours do not notice. */
#include "base/clock.h"
#include "base/log.h"
#include "base/mem.h"
#include "coordinator/cluster/cluster_impl.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

void words_copy(char *out, size_t size, const char *from)
{
    size_t n = 0;
    for (; n + 1 < size && from[n]; n++)
        out[n] = from[n] >= ' ' && from[n] <= '~' ? from[n] : '?';
    out[n] = 0;
}

bool cluster_authorize(void *ctx, const char *path, struct span bearer)
{
    struct cluster *c = ctx;
    (void)path;
    if (!c->token || rpc_token_equal(bearer, c->token)) return true;
    pthread_mutex_lock(&c->mutex);
    bool first = c->n_refused++ == 0;
    pthread_mutex_unlock(&c->mutex);
    if (first)
        log_warn("workers' port: a caller without the cluster token was refused; further ones are "
                 "only counted");
    return false;
}

/* ---- Leaving ---- */

static void pending_remove(struct cluster *c, struct stream *s)
{
    if (!s->link) return;
    *s->link = s->next;
    if (s->next) s->next->link = s->link;
    s->link = NULL;
    c->n_pending--;
}

static void refuse_send(struct stream *s, const char *reason)
{
    Heddle__Cluster__Refuse r = HEDDLE__CLUSTER__REFUSE__INIT;
    Heddle__Cluster__ToWorker m = HEDDLE__CLUSTER__TO_WORKER__INIT;
    r.reason = (char *)(uintptr_t)reason;
    m.kind_case = HEDDLE__CLUSTER__TO_WORKER__KIND_REFUSE;
    m.refuse = &r;
    s->state = STREAM_DEAD;
    if (envelope_send(s->call, &m.base) == ERR_FULL) rpc_cancel(s->call);
    rpc_finish(s->call, RPC_FAILED_PRECONDITION, reason);
}

static void refuse(struct cluster *c, struct stream *s, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
static void refuse(struct cluster *c, struct stream *s, const char *format, ...)
{
    char reason[256];
    va_list args;
    va_start(args, format);
    vsnprintf(reason, sizeof reason, format, args);
    va_end(args);
    pending_remove(c, s);
    c->n_refused++;
    log_warn("workers' port: %s refused: %s", rpc_peer(s->call), reason);
    refuse_send(s, reason);
}

/* Nobody is here: the next to come may bring another model, unless the configuration names one. */
static void model_forget(struct cluster *c)
{
    if (!c->config.model_digest) *c->model_digest = 0;
    c->vocab_size = c->config.vocab_size;
    c->block_size = 0;
    *c->model_name = 0;
}

void rank_suspect(struct cluster *c, struct group *g, uint32_t rank)
{
    struct rank *r = &g->ranks[rank];
    (void)c;
    if (!r->stream) return;
    r->stuck_pid = r->stream->join->join->pid;
    r->stuck_us = clock_monotonic_us();
    words_copy(r->stuck_host, sizeof r->stuck_host, r->stream->join->join->host);
}

void rank_lose(struct cluster *c, struct group *g, uint32_t rank, bool refused, const char *format,
               ...)
{
    struct rank *r = &g->ranks[rank];
    struct stream *s = r->stream;
    char why[160];
    va_list args;
    if (!s) return;
    va_start(args, format);
    vsnprintf(why, sizeof why, format, args);
    va_end(args);
    r->stream = NULL;
    r->state = CLUSTER_RANK_ABSENT;
    r->n_losses++;
    g->n_joined--;
    if (--c->n_joined == 0) model_forget(c);
    bool alive = g->state != CLUSTER_GROUP_JOINING;
    if (!alive) log_warn("group %u: %s", g->index, why);
    s->state = STREAM_DEAD;
    group_end_epoch(c, g, why);
    if (refused)
        refuse_send(s, why);
    else
        rpc_cancel(s->call);
}

/* ---- Joining ---- */

static bool digest_fits(const struct cluster *c, const Heddle__Cluster__Join *j)
{
    return *j->model_digest && strlen(j->model_digest) < sizeof c->model_digest &&
           (!*c->model_digest || !strcmp(j->model_digest, c->model_digest));
}

/* Returns true when the rank fits the cluster; otherwise it has been refused. */
static bool join_check(struct cluster *c, struct stream *s, const Heddle__Cluster__Join *j)
{
    char words[72];
    words_copy(words, sizeof words, j->model_digest);
    if (j->protocol != CLUSTER_PROTOCOL)
        refuse(c, s, "it speaks protocol %u, this coordinator %d", j->protocol, CLUSTER_PROTOCOL);
    else if (j->size != c->config.n_ranks)
        refuse(c, s, "it is one of %u ranks, this cluster has groups of %u (--tp)", j->size,
               c->config.n_ranks);
    else if (j->rank >= j->size)
        refuse(c, s, "rank %u of %u", j->rank, j->size);
    else if (j->replica >= c->config.n_groups)
        refuse(c, s, "replica %u, this cluster has %u (--dp)", j->replica, c->config.n_groups);
    else if (!digest_fits(c, j))
        refuse(c, s, "its model has digest '%s', this cluster serves '%s'", words, c->model_digest);
    else if (!j->vocab_size || (c->vocab_size && j->vocab_size != c->vocab_size))
        refuse(c, s, "its vocabulary has %u tokens, this cluster's %u", j->vocab_size,
               c->vocab_size);
    else if (!j->block_size || j->block_size > 65536 ||
             (c->block_size && j->block_size != c->block_size))
        refuse(c, s, "its KV blocks have %u tokens, this cluster's %u", j->block_size,
               c->block_size);
    else if (!j->blocks_max || !j->slots_max || !j->step_tokens_max || !j->step_rows_max ||
             !j->context_max)
        refuse(c, s,
               "it has no room: %llu blocks, %u slots, %u tokens and %u rows a step, context %u",
               (unsigned long long)j->blocks_max, j->slots_max, j->step_tokens_max,
               j->step_rows_max, j->context_max);
    else
        return true;
    return false;
}

static void seat(struct cluster *c, struct stream *s, int64_t now_us)
{
    const Heddle__Cluster__Join *j = s->join->join;
    struct group *g = &c->groups[j->replica];
    struct rank *r = &g->ranks[j->rank];
    char host[64], device[96];
    pending_remove(c, s);
    s->state = STREAM_JOINED;
    s->group = j->replica;
    s->rank = j->rank;
    r->stream = s;
    r->state = CLUSTER_RANK_JOINED;
    r->stuck_pid = 0;
    r->heard_us = r->joined_us = now_us;
    g->n_joined++;
    c->n_joined++;
    if (!*c->model_digest) snprintf(c->model_digest, sizeof c->model_digest, "%s", j->model_digest);
    if (!*c->model_name) words_copy(c->model_name, sizeof c->model_name, j->model_name);
    c->vocab_size = j->vocab_size;
    c->block_size = j->block_size;
    words_copy(host, sizeof host, j->host);
    words_copy(device, sizeof device, j->device);
    log_info("group %u rank %u joined: %s pid %u, %s (%u of %u)", g->index, j->rank, host, j->pid,
             device, g->n_joined, c->config.n_ranks);
    group_try_form(c, g, now_us);
}

/* A place that is held: the same process dialling again takes it over at once. Another process
 * waits to see whether the holder still speaks. */
static void claim(struct cluster *c, struct stream *s, int64_t now_us)
{
    const Heddle__Cluster__Join *j = s->join->join;
    struct group *g = &c->groups[j->replica];
    struct rank *r = &g->ranks[j->rank];
    if (r->stream && r->stream->join->join->incarnation == j->incarnation)
        rank_lose(c, g, j->rank, false, "rank %u has dialled again", j->rank);
    if (!r->stream) {
        seat(c, s, now_us);
    } else if (s->state == STREAM_PENDING) {
        s->state = STREAM_CLAIMING;
        s->claimed_us = now_us;
    } else if (r->heard_us > s->claimed_us) {
        char host[64];
        words_copy(host, sizeof host, r->stream->join->join->host);
        refuse(c, s, "rank %u of replica %u is held by a living process, %s pid %u", j->rank,
               j->replica, host, r->stream->join->join->pid);
    }
}

static void on_join(struct cluster *c, struct stream *s, Heddle__Cluster__FromWorker *m,
                    int64_t now_us)
{
    if (!join_check(c, s, m->join)) {
        heddle__cluster__from_worker__free_unpacked(m, NULL);
        return;
    }
    s->join = m;
    claim(c, s, now_us);
}

/* ---- Messages of a rank that has joined ---- */

/* It stays, but the epoch cannot go on; the next tick begins another. */
static void group_fault(struct cluster *c, struct group *g, uint32_t rank, const char *words)
{
    char why[160];
    snprintf(why, sizeof why, "rank %u failed: %s", rank, words);
    group_end_epoch(c, g, why);
}

static void on_small(struct cluster *c, struct stream *s, const Heddle__Cluster__FromWorker *m,
                     int64_t now_us)
{
    struct group *g = &c->groups[s->group];
    char words[120];
    const char *wrong = NULL;
    switch (m->kind_case) {
    case HEDDLE__CLUSTER__FROM_WORKER__KIND_READY:
        group_ready(c, g, s->rank, m->ready->epoch, now_us);
        break;
    case HEDDLE__CLUSTER__FROM_WORKER__KIND_EXCHANGE:
        wrong = group_exchange(c, g, s->rank, m->exchange);
        break;
    case HEDDLE__CLUSTER__FROM_WORKER__KIND_HEARTBEAT:
        break;
    case HEDDLE__CLUSTER__FROM_WORKER__KIND_LEAVE:
        words_copy(words, sizeof words, m->leave->reason);
        rank_lose(c, g, s->rank, false, "rank %u leaves: %s", s->rank, words);
        break;
    case HEDDLE__CLUSTER__FROM_WORKER__KIND_FAULT:
        words_copy(words, sizeof words, m->fault->reason);
        if (m->fault->fatal)
            rank_lose(c, g, s->rank, false, "rank %u failed: %s", s->rank, words);
        else if (m->fault->epoch == g->epoch)
            group_fault(c, g, s->rank, words);
        break;
    default:
        wrong = "a second join";
        break;
    }
    if (wrong) rank_lose(c, g, s->rank, true, "rank %u broke the protocol: %s", s->rank, wrong);
}

/* A result or an ack. Returns true when the engine is to hear it. */
static bool on_step(struct cluster *c, struct stream *s, const struct envelope *envelope,
                    int64_t now_us, uint64_t *out_epoch)
{
    struct group *g = &c->groups[s->group];
    uint64_t epoch = 0, step = 0;
    if (envelope_number(envelope->body, 1, &epoch) || envelope_number(envelope->body, 2, &step)) {
        rank_lose(c, g, s->rank, true, "rank %u broke the protocol: a malformed result", s->rank);
        return false;
    }
    if (g->state != CLUSTER_GROUP_UP || epoch != g->epoch)
        return false; /* of an epoch that has ended */
    if ((envelope->kind == FROM_RESULT) != (s->rank == 0) || !g->epoch_plans ||
        step > g->last_plan_step) {
        rank_lose(c, g, s->rank, true,
                  "rank %u broke the protocol: a result for a plan that it did not get", s->rank);
        return false;
    }
    group_heard_step(g, s->rank, envelope->body, step, now_us);
    if (envelope->kind != FROM_RESULT) return false;
    g->n_results++;
    *out_epoch = epoch;
    return true;
}

/* Ended transfers: whether they are news of the living epoch. */
static bool on_moved(struct cluster *c, struct stream *s, const struct envelope *envelope,
                     uint64_t *out_epoch)
{
    struct group *g = &c->groups[s->group];
    uint64_t epoch = 0;
    if (envelope_number(envelope->body, 1, &epoch)) {
        rank_lose(c, g, s->rank, true, "rank %u broke the protocol: a malformed message", s->rank);
        return false;
    }
    *out_epoch = epoch;
    return g->state == CLUSTER_GROUP_UP && epoch == g->epoch;
}

static void on_message_locked(struct cluster *c, struct stream *s, struct span bytes,
                              bool *out_result, bool *out_moved, uint64_t *out_epoch)
{
    struct envelope envelope;
    int64_t now_us = clock_monotonic_us();
    bool joined = s->state == STREAM_JOINED;
    if (s->state == STREAM_DEAD || s->state == STREAM_CLAIMING) return;
    if (envelope_open(bytes, &envelope) || (!joined && envelope.kind != FROM_JOIN)) {
        if (joined)
            rank_lose(c, &c->groups[s->group], s->rank, true,
                      "rank %u broke the protocol: a malformed message", s->rank);
        else
            refuse(c, s, "its first message is not a join");
        return;
    }
    if (joined) c->groups[s->group].ranks[s->rank].heard_us = now_us;
    if (joined && (envelope.kind == FROM_RESULT || envelope.kind == FROM_ACK)) {
        *out_result = on_step(c, s, &envelope, now_us, out_epoch);
        return;
    }
    if (joined && envelope.kind == FROM_MOVED) {
        *out_moved = on_moved(c, s, &envelope, out_epoch);
        return;
    }
    Heddle__Cluster__FromWorker *m = NULL;
    if (bytes.n <= SMALL_BYTES_MAX)
        m = heddle__cluster__from_worker__unpack(NULL, bytes.n, (const uint8_t *)bytes.data);
    if (!m || m->kind_case == HEDDLE__CLUSTER__FROM_WORKER__KIND__NOT_SET) {
        if (joined)
            rank_lose(c, &c->groups[s->group], s->rank, true,
                      "rank %u broke the protocol: a malformed message", s->rank);
        else
            refuse(c, s, "its join is malformed");
    } else if (!joined) {
        on_join(c, s, m, now_us);
        m = NULL;
    } else {
        on_small(c, s, m, now_us);
    }
    if (m) heddle__cluster__from_worker__free_unpacked(m, NULL);
}

/* ---- Streams ---- */

void cluster_stream_open(struct rpc_call *call, void *ctx)
{
    struct cluster *c = ctx;
    struct stream *s = NULL;
    pthread_mutex_lock(&c->mutex);
    bool full = c->n_pending >= c->config.n_pending_max;
    if (!full && MEM_NEW(&s) == OK) {
        s->call = call;
        s->opened_us = clock_monotonic_us();
        s->next = c->pending;
        if (c->pending) c->pending->link = &s->next;
        s->link = &c->pending;
        c->pending = s;
        c->n_pending++;
        rpc_set_user(call, s);
    } else {
        c->n_refused++;
    }
    pthread_mutex_unlock(&c->mutex);
    if (!s) rpc_finish(call, RPC_RESOURCE_EXHAUSTED, "too many streams have not joined yet");
}

void cluster_stream_message(struct rpc_call *call, void *ctx, struct span bytes)
{
    struct cluster *c = ctx;
    struct stream *s = rpc_user(call);
    bool result = false, moved = false;
    uint64_t epoch = 0;
    if (!s) return;
    pthread_mutex_lock(&c->mutex);
    on_message_locked(c, s, bytes, &result, &moved, &epoch);
    uint32_t group = s->group, rank = s->rank;
    pthread_mutex_unlock(&c->mutex);
    if (moved && c->hooks.moved)
        c->hooks.moved(c->hooks.ctx, group, epoch, rank, bytes.data, bytes.n);
    if (result) c->hooks.result(c->hooks.ctx, group, epoch, bytes.data, bytes.n);
}

void cluster_stream_half_close(struct rpc_call *call, void *ctx)
{
    (void)ctx;
    rpc_finish(call, RPC_OK, "good-bye");
}

void cluster_stream_close(struct rpc_call *call, void *ctx, bool cancelled)
{
    struct cluster *c = ctx;
    struct stream *s = rpc_user(call);
    (void)cancelled;
    if (!s) return;
    pthread_mutex_lock(&c->mutex);
    pending_remove(c, s);
    if (s->state == STREAM_JOINED)
        rank_lose(c, &c->groups[s->group], s->rank, false, "rank %u is gone: its stream broke",
                  s->rank);
    pthread_mutex_unlock(&c->mutex);
    if (s->join) heddle__cluster__from_worker__free_unpacked(s->join, NULL);
    mem_free(s);
}

void membership_tick(struct cluster *c, int64_t now_us)
{
    for (struct stream *s = c->pending, *next; s; s = next) {
        next = s->next;
        if (s->state == STREAM_CLAIMING)
            claim(c, s, now_us);
        else if (now_us - s->opened_us > (int64_t)c->config.join_timeout_ms * 1000)
            refuse(c, s, "it did not join within %u ms", c->config.join_timeout_ms);
    }
    Heddle__Cluster__Heartbeat h = HEDDLE__CLUSTER__HEARTBEAT__INIT;
    Heddle__Cluster__ToWorker m = HEDDLE__CLUSTER__TO_WORKER__INIT;
    h.time_us = (uint64_t)now_us;
    m.kind_case = HEDDLE__CLUSTER__TO_WORKER__KIND_HEARTBEAT;
    m.heartbeat = &h;
    struct rpc_bytes *beat = NULL;
    if (envelope_pack(&m.base, &beat)) return;
    for (uint32_t i = 0; i < c->config.n_groups * c->config.n_ranks; i++) {
        struct rank *r = &c->ranks[i];
        struct group *g = &c->groups[i / c->config.n_ranks];
        uint32_t rank = i % c->config.n_ranks;
        if (!r->stream) continue;
        if (now_us - r->heard_us > (int64_t)c->config.dead_ms * 1000) {
            rank_suspect(c, g, rank);
            rank_lose(c, g, rank, false, "rank %u is silent for %lld ms", rank,
                      (long long)(now_us - r->heard_us) / 1000);
        } else if (rpc_send_shared(r->stream->call, beat) == ERR_FULL)
            rank_lose(c, g, rank, false, "rank %u does not read what it is sent", rank);
    }
    rpc_bytes_release(beat);
}
