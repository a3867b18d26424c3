/* The stream to the coordinator from a rank's side: one call at a time, a thread that dials and
 * beats the heart, and a small mailbox in the order in which the worker must hear things. Polling
 * threads fill the mailbox, the worker's loop empties it. */
#include "worker/link.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/mem.h"
#include "proto/cluster.pb-c.h"
#include "proto/envelope.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

enum { TO_WELCOME = 1, TO_REFUSE, TO_PLAN, TO_EXCHANGED, TO_HEARTBEAT, TO_DRAIN, TO_HALT };
enum {
    PROTOCOL = 1,
    HEARTBEAT_MS = 500, /* until a welcome says otherwise */
    SILENCE_MS_MIN = 3000,
    DIAL_MS_MIN = 50,
    DIAL_MS_MAX = 1000,
    PLANS_DEFAULT = 256,
    PLANS_MAX = 4096
};

struct plan {
    struct rpc_bytes *bytes;
    uint64_t epoch;
    int64_t received_us;
};

struct link {
    struct link_config config;
    char *strings[7];
    Heddle__Cluster__Join join;
    struct rpc_channel *channel;
    pthread_t thread;
    bool has_thread;
    atomic_uint_fast64_t epoch; /* that lives; written with the mutex held */
    pthread_mutex_t mutex;      /* of all that follows */
    pthread_cond_t news;        /* for the worker's loop */
    pthread_cond_t work;        /* for the thread */
    struct rpc_call *call;      /* NULL between dials */
    bool stop, leaving, warned;
    bool final; /* refused or given up: no more dialling */
    int64_t heard_us, lost_us, dial_us, dial_ms;
    uint32_t heartbeat_ms;
    /* the mailbox, in the order of delivery */
    bool has_end, has_down, has_welcome, has_drain;
    struct link_event end, down, welcome;
    char end_text[256], down_text[256];
    struct plan *plans; /* ring [n_plans_max] */
    size_t plan_head, n_plans;
    /* what the worker has been given */
    uint64_t delivered_epoch; /* of the last welcome it took; 0 after a halt or loss was taken */
    struct rpc_bytes *delivered_plan;
    char text[256];
    Heddle__Cluster__ToWorker *exchanged; /* the answer awaited, or the last one */
    char exchange_key[64];
};

/* ---- The mailbox (mutex held) ---- */

static void plans_drop(struct link *l)
{
    for (; l->n_plans; l->n_plans--) {
        rpc_bytes_release(l->plans[l->plan_head].bytes);
        l->plan_head = (l->plan_head + 1) % l->config.n_plans_max;
    }
}

/* The epoch is over. A welcome that the worker has not taken yet simply never was. */
static void epoch_over(struct link *l, enum link_event_kind kind, const char *why)
{
    uint64_t epoch = atomic_load(&l->epoch);
    atomic_store(&l->epoch, 0);
    plans_drop(l);
    l->has_welcome = false;
    if (l->delivered_epoch && !l->has_down) {
        snprintf(l->down_text, sizeof l->down_text, "%s", why);
        l->down = (struct link_event){.kind = kind, .epoch = epoch ? epoch : l->delivered_epoch};
        l->has_down = true;
    } else if (l->has_down && kind == LINK_LOST) {
        l->down.kind = kind; /* a halt, then the coordinator itself */
    }
    pthread_cond_broadcast(&l->news);
}

static void end_set(struct link *l, enum link_event_kind kind, const char *text)
{
    if (l->final) return;
    l->final = l->has_end = true;
    atomic_store(&l->epoch, 0);
    plans_drop(l);
    snprintf(l->end_text, sizeof l->end_text, "%s", text);
    l->end = (struct link_event){.kind = kind};
    pthread_cond_broadcast(&l->news);
    pthread_cond_signal(&l->work);
}

/* ---- Messages of the coordinator ---- */

static void on_welcome(struct link *l, const Heddle__Cluster__Welcome *w)
{
    epoch_over(l, LINK_HALT, "a new epoch began");
    l->welcome = (struct link_event){.kind = LINK_WELCOME,
                                     .epoch = w->epoch,
                                     .group = w->group,
                                     .n_blocks = w->blocks,
                                     .n_host_blocks = w->host_blocks};
    snprintf(l->welcome.group_key, sizeof l->welcome.group_key, "%s", w->group_key);
    l->has_welcome = true;
    if (w->heartbeat_ms >= 10 && w->heartbeat_ms <= 60000) l->heartbeat_ms = w->heartbeat_ms;
    atomic_store(&l->epoch, w->epoch);
    pthread_cond_signal(&l->work);
}

static void on_exchanged(struct link *l, Heddle__Cluster__ToWorker **m)
{
    const Heddle__Cluster__Exchanged *x = (*m)->exchanged;
    if (x->epoch != atomic_load(&l->epoch) || x->n_all != l->join.size ||
        strcmp(x->key, l->exchange_key))
        return;
    if (l->exchanged) heddle__cluster__to_worker__free_unpacked(l->exchanged, NULL);
    l->exchanged = *m;
    *m = NULL;
}

static void on_small(struct link *l, struct span bytes)
{
    Heddle__Cluster__ToWorker *m =
        heddle__cluster__to_worker__unpack(NULL, bytes.n, (const uint8_t *)bytes.data);
    if (!m) {
        log_warn("link: the coordinator sent a malformed message of %zu bytes", bytes.n);
        rpc_cancel(l->call);
        return;
    }
    switch (m->kind_case) {
    case HEDDLE__CLUSTER__TO_WORKER__KIND_WELCOME:
        on_welcome(l, m->welcome);
        break;
    case HEDDLE__CLUSTER__TO_WORKER__KIND_REFUSE:
        end_set(l, LINK_REFUSED, m->refuse->reason);
        break;
    case HEDDLE__CLUSTER__TO_WORKER__KIND_EXCHANGED:
        on_exchanged(l, &m);
        break;
    case HEDDLE__CLUSTER__TO_WORKER__KIND_DRAIN:
        l->has_drain = true;
        break;
    case HEDDLE__CLUSTER__TO_WORKER__KIND_HALT:
        if (m->halt->epoch == atomic_load(&l->epoch)) epoch_over(l, LINK_HALT, m->halt->reason);
        break;
    default:
        break; /* a heartbeat, or words of a newer coordinator */
    }
    if (m) heddle__cluster__to_worker__free_unpacked(m, NULL);
}

static void on_plan(struct link *l, struct span bytes, struct span body)
{
    struct rpc_bytes *copy;
    uint64_t epoch;
    if (envelope_number(body, 1, &epoch) || epoch != atomic_load(&l->epoch)) {
        log_warn("link: a plan of an epoch that does not live was dropped");
    } else if (l->n_plans == l->config.n_plans_max ||
               rpc_bytes_create(bytes.data, bytes.n, &copy)) {
        log_error("link: more than %zu plans wait; leaving the stream", l->n_plans);
        rpc_cancel(l->call);
    } else {
        struct plan *p = &l->plans[(l->plan_head + l->n_plans++) % l->config.n_plans_max];
        *p = (struct plan){copy, epoch, clock_monotonic_us()};
    }
}

static void on_message(struct rpc_call *call, void *ctx, struct span bytes)
{
    struct link *l = ctx;
    struct envelope envelope;
    pthread_mutex_lock(&l->mutex);
    if (call == l->call && !l->final) {
        l->heard_us = clock_monotonic_us();
        if (envelope_open(bytes, &envelope) == OK && envelope.kind == TO_PLAN)
            on_plan(l, bytes, envelope.body);
        else
            on_small(l, bytes);
        pthread_cond_broadcast(&l->news);
    }
    pthread_mutex_unlock(&l->mutex);
}

static bool is_final(int code)
{
    return code == RPC_UNAUTHENTICATED || code == RPC_UNIMPLEMENTED ||
           code == RPC_FAILED_PRECONDITION;
}

static void on_end(struct rpc_call *call, void *ctx, int code, const char *text)
{
    struct link *l = ctx;
    char why[256];
    pthread_mutex_lock(&l->mutex);
    if (call == l->call) {
        int64_t now_us = clock_monotonic_us();
        l->call = NULL;
        snprintf(why, sizeof why, "the stream to %s broke: %s", l->config.address,
                 *text ? text : "closed");
        if (!l->lost_us) l->lost_us = now_us;
        if (is_final(code) && !l->leaving)
            end_set(l, LINK_REFUSED,
                    code == RPC_UNIMPLEMENTED ? "this is not a coordinator's port for workers"
                                              : text);
        else
            epoch_over(l, LINK_LOST, why);
        l->dial_us = now_us + l->dial_ms * 1000;
        l->dial_ms = 2 * l->dial_ms > DIAL_MS_MAX ? DIAL_MS_MAX : 2 * l->dial_ms;
        if (!l->warned && !l->leaving && !l->final && !l->stop) {
            l->warned = true; /* once for each loss, not for each try */
            log_info("link: no coordinator at %s (%s); dialling until it is there",
                     l->config.address, *text ? text : "closed");
        }
        pthread_cond_broadcast(&l->news);
        pthread_cond_signal(&l->work);
        rpc_release(call);
    }
    pthread_mutex_unlock(&l->mutex);
}

/* ---- The thread: dial, beat, notice silence ---- */

static enum err send_words(struct link *l, Heddle__Cluster__FromWorker *m)
{
    if (!l->call) FAIL(ERR_PEER, "the coordinator is lost");
    enum err e = envelope_send(l->call, &m->base);
    return e ? err_set(ERR_PEER, "the stream to the coordinator does not take more: %s",
                       err_name(e))
             : OK;
}

static void dial(struct link *l)
{
    struct rpc_handler handler = {on_message, on_end, l};
    Heddle__Cluster__FromWorker m = HEDDLE__CLUSTER__FROM_WORKER__INIT;
    m.kind_case = HEDDLE__CLUSTER__FROM_WORKER__KIND_JOIN;
    m.join = &l->join;
    l->heard_us = clock_monotonic_us();
    if (rpc_open(l->channel, "/heddle.cluster.Cluster/Attach", 0, &handler, &l->call)) {
        log_error("link: %s", err_detail());
        l->call = NULL;
        l->dial_us = l->heard_us + (int64_t)DIAL_MS_MAX * 1000;
        return;
    }
    (void)send_words(l, &m);
}

static void beat(struct link *l, int64_t now_us)
{
    Heddle__Cluster__Heartbeat h = HEDDLE__CLUSTER__HEARTBEAT__INIT;
    Heddle__Cluster__FromWorker m = HEDDLE__CLUSTER__FROM_WORKER__INIT;
    int64_t silence_us = (int64_t)l->heartbeat_ms * 6000;
    if (silence_us < SILENCE_MS_MIN * 1000) silence_us = SILENCE_MS_MIN * 1000;
    /* Before the first word of a coordinator the channel may still be connecting. */
    if (now_us - l->heard_us > (atomic_load(&l->epoch) ? silence_us : 10 * silence_us)) {
        log_warn("link: the coordinator is silent for %lld ms",
                 (long long)(now_us - l->heard_us) / 1000);
        rpc_cancel(l->call);
        return;
    }
    h.time_us = (uint64_t)now_us;
    m.kind_case = HEDDLE__CLUSTER__FROM_WORKER__KIND_HEARTBEAT;
    m.heartbeat = &h;
    (void)send_words(l, &m);
}

static void mark_found(struct link *l) /* something was heard: the next loss counts anew */
{
    if (!l->call || !atomic_load(&l->epoch)) return;
    l->lost_us = 0;
    l->warned = false;
    l->dial_ms = DIAL_MS_MIN;
}

static void *link_run(void *ctx)
{
    struct link *l = ctx;
    int64_t beat_us = 0;
    pthread_mutex_lock(&l->mutex);
    while (!l->stop) {
        int64_t now_us = clock_monotonic_us(), next_us = now_us + (int64_t)l->heartbeat_ms * 1000;
        mark_found(l);
        if (!l->call && !l->final && !l->leaving && l->has_down) {
            pthread_cond_wait(&l->work, &l->mutex); /* a worker that hangs must not look alive */
            continue;
        } else if (!l->call && !l->final && !l->leaving) {
            if (l->config.patience_ms && l->lost_us &&
                now_us - l->lost_us > (int64_t)l->config.patience_ms * 1000)
                end_set(l, LINK_LOST, "gave up: no coordinator within the time allowed");
            else if (now_us >= l->dial_us)
                dial(l), beat_us = now_us;
            else
                next_us = l->dial_us;
        } else if (l->call && now_us - beat_us >= (int64_t)l->heartbeat_ms * 1000) {
            beat(l, now_us);
            beat_us = now_us;
        } else if (l->call) {
            next_us = beat_us + (int64_t)l->heartbeat_ms * 1000;
        }
        struct timespec until = {next_us / 1000000, next_us % 1000000 * 1000};
        if (!l->stop && next_us > clock_monotonic_us())
            pthread_cond_timedwait(&l->work, &l->mutex, &until);
    }
    pthread_mutex_unlock(&l->mutex);
    return NULL;
}

/* ---- Open and close ---- */

static enum err string_take(struct link *l, int i, const char *from, char **out)
{
    l->strings[i] = mem_strdup(from ? from : "");
    if (!l->strings[i]) FAIL(ERR_NO_MEMORY, "no memory for a link");
    *out = l->strings[i];
    return OK;
}

static enum err join_take(struct link *l, const struct link_join *from)
{
    Heddle__Cluster__Join *j = &l->join;
    heddle__cluster__join__init(j);
    TRY(string_take(l, 0, from->model_digest, &j->model_digest));
    TRY(string_take(l, 1, from->model_name, &j->model_name));
    TRY(string_take(l, 2, from->host, &j->host));
    TRY(string_take(l, 3, from->device, &j->device));
    TRY(string_take(l, 4, from->draft_digest, &j->draft_digest));
    if (from->rank >= from->size || from->size > LINK_RANKS_MAX)
        FAIL(ERR_INVALID, "rank %u of %u; at most %d ranks", from->rank, from->size,
             LINK_RANKS_MAX);
    j->protocol = PROTOCOL;
    j->pid = (uint32_t)getpid();
    j->replica = from->replica, j->rank = from->rank, j->size = from->size;
    j->block_size = from->block_size, j->slots_max = from->slots_max,
    j->step_tokens_max = from->step_tokens_max;
    j->step_prompt_max = from->step_prompt_max;
    j->step_rows_max = from->step_rows_max, j->context_max = from->context_max,
    j->vocab_size = from->vocab_size;
    j->window = from->window, j->draft_tokens_max = from->draft_tokens_max,
    j->has_draft_model = from->has_draft_model;
    j->blocks_max = from->blocks_max, j->host_blocks_max = from->host_blocks_max;
    j->disk_blocks_max = from->disk_blocks_max;
    j->save_ns = from->save_ns, j->load_ns = from->load_ns, j->fetch_ns = from->fetch_ns;
    j->weight_bytes = from->weight_bytes, j->block_bytes = from->block_bytes;
    if (getrandom(&j->incarnation, sizeof j->incarnation, 0) != sizeof j->incarnation)
        FAIL(ERR_IO, "the system gives no random numbers");
    return OK;
}

static enum err link_init(struct link *l, const struct link_config *config)
{
    char *address = NULL, *token = NULL;
    l->config = *config;
    l->config.n_plans_max = config->n_plans_max ? config->n_plans_max : PLANS_DEFAULT;
    if (l->config.n_plans_max > PLANS_MAX)
        FAIL(ERR_INVALID, "%u plans; at most %d", config->n_plans_max, PLANS_MAX);
    l->heartbeat_ms = HEARTBEAT_MS;
    l->dial_ms = DIAL_MS_MIN;
    l->lost_us = clock_monotonic_us();
    TRY(join_take(l, &config->join));
    TRY(string_take(l, 5, config->address, &address));
    TRY(string_take(l, 6, config->token, &token));
    l->config.address = address;
    TRY(MEM_NEW_ARRAY(l->config.n_plans_max, &l->plans));
    struct rpc_channel_config channel = {
        .address = address, .token = config->token, .tls = config->tls};
    TRY(rpc_channel_create(&channel, &l->channel));
    if (pthread_create(&l->thread, NULL, link_run, l)) FAIL(ERR_NO_MEMORY, "no thread for a link");
    l->has_thread = true;
    return OK;
}

enum err link_open(const struct link_config *config, struct link **out)
{
    struct link *l;
    pthread_condattr_t attributes;
    TRY(MEM_NEW(&l));
    pthread_mutex_init(&l->mutex, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&l->news, &attributes);
    pthread_cond_init(&l->work, &attributes);
    pthread_condattr_destroy(&attributes);
    enum err e = link_init(l, config);
    if (e)
        link_close(l);
    else
        *out = l;
    return e;
}

void link_close(struct link *l)
{
    if (!l) return;
    pthread_mutex_lock(&l->mutex);
    l->stop = true;
    pthread_cond_signal(&l->work);
    pthread_mutex_unlock(&l->mutex);
    if (l->has_thread) pthread_join(l->thread, NULL);
    rpc_channel_destroy(l->channel); /* on_end of a living call comes now */
    plans_drop(l);
    rpc_bytes_release(l->delivered_plan);
    if (l->exchanged) heddle__cluster__to_worker__free_unpacked(l->exchanged, NULL);
    for (size_t i = 0; i < sizeof l->strings / sizeof *l->strings; i++)
        mem_free(l->strings[i]);
    mem_free(l->plans);
    pthread_cond_destroy(&l->news);
    pthread_cond_destroy(&l->work);
    pthread_mutex_destroy(&l->mutex);
    mem_free(l);
}

/* ---- The worker's side ---- */

/* Waits for news; false when until_us has passed. */
static bool news_wait(struct link *l, int64_t until_us)
{
    struct timespec until = {until_us / 1000000, until_us % 1000000 * 1000};
    if (until_us == INT64_MAX) return pthread_cond_wait(&l->news, &l->mutex) == 0;
    return pthread_cond_timedwait(&l->news, &l->mutex, &until) != ETIMEDOUT;
}

static int64_t until_of(int64_t timeout_us)
{
    return timeout_us < 0 ? INT64_MAX : clock_monotonic_us() + timeout_us;
}

static void text_give(struct link *l, const char *text, struct link_event *out)
{
    snprintf(l->text, sizeof l->text, "%s", text);
    out->text = l->text;
}

static bool event_take(struct link *l, bool plans, struct link_event *out)
{
    if (l->has_end) {
        *out = l->end;
        text_give(l, l->end_text, out);
        l->delivered_epoch = 0;
    } else if (l->has_down) {
        *out = l->down;
        text_give(l, l->down_text, out);
        l->has_down = false;
        l->delivered_epoch = 0;
        pthread_cond_signal(&l->work);
    } else if (l->has_welcome) {
        *out = l->welcome;
        l->has_welcome = false;
        l->delivered_epoch = out->epoch;
    } else if (!plans) {
        return false;
    } else if (l->n_plans) {
        struct plan *p = &l->plans[l->plan_head];
        l->plan_head = (l->plan_head + 1) % l->config.n_plans_max;
        l->n_plans--;
        l->delivered_plan = p->bytes;
        *out = (struct link_event){.kind = LINK_PLAN,
                                   .epoch = p->epoch,
                                   .bytes = rpc_bytes_span(p->bytes),
                                   .received_us = p->received_us};
    } else if (l->has_drain) {
        *out = (struct link_event){.kind = LINK_DRAIN};
        l->has_drain = false;
    } else {
        return false;
    }
    return true;
}

static void event_next(struct link *l, bool plans, int64_t timeout_us, struct link_event *out)
{
    int64_t until_us = until_of(timeout_us);
    pthread_mutex_lock(&l->mutex);
    rpc_bytes_release(l->delivered_plan);
    l->delivered_plan = NULL;
    bool taken;
    while (!(taken = event_take(l, plans, out)) && news_wait(l, until_us))
        continue;
    if (!taken && !event_take(l, plans, out)) *out = (struct link_event){.kind = LINK_NONE};
    pthread_mutex_unlock(&l->mutex);
}

enum err link_next(struct link *l, int64_t timeout_us, struct link_event *out)
{
    event_next(l, true, timeout_us, out);
    return OK;
}

enum err link_next_but_plans(struct link *l, int64_t timeout_us, struct link_event *out)
{
    event_next(l, false, timeout_us, out);
    return OK;
}

static bool exchange_wait(struct link *l, int64_t until_us)
{
    while (!l->exchanged && atomic_load(&l->epoch) == l->delivered_epoch && l->delivered_epoch)
        if (!news_wait(l, until_us)) break;
    return l->exchanged != NULL;
}

enum err link_exchange(struct link *l, const char *key, const void *mine, size_t n,
                       int64_t timeout_us, struct span out_all[])
{
    Heddle__Cluster__Exchange x = HEDDLE__CLUSTER__EXCHANGE__INIT;
    Heddle__Cluster__FromWorker m = HEDDLE__CLUSTER__FROM_WORKER__INIT;
    if (n > LINK_EXCHANGE_BYTES_MAX || !*key || strlen(key) >= sizeof l->exchange_key)
        FAIL(ERR_INVALID, "exchange '%s' of %zu bytes", key, n);
    pthread_mutex_lock(&l->mutex);
    x.key = (char *)(uintptr_t)key;
    x.mine = (ProtobufCBinaryData){n, (uint8_t *)(uintptr_t)mine};
    x.epoch = l->delivered_epoch;
    m.kind_case = HEDDLE__CLUSTER__FROM_WORKER__KIND_EXCHANGE;
    m.exchange = &x;
    if (l->exchanged) heddle__cluster__to_worker__free_unpacked(l->exchanged, NULL);
    l->exchanged = NULL;
    snprintf(l->exchange_key, sizeof l->exchange_key, "%s", key);
    enum err e = OK;
    if (!l->delivered_epoch || atomic_load(&l->epoch) != l->delivered_epoch)
        e = err_set(ERR_PEER, "exchange '%s': the epoch has ended", key);
    else
        e = send_words(l, &m);
    if (!e && !exchange_wait(l, until_of(timeout_us))) {
        bool ended = atomic_load(&l->epoch) != l->delivered_epoch;
        e = ended ? err_set(ERR_PEER, "exchange '%s': the epoch has ended", key)
                  : err_set(ERR_TIMEOUT, "exchange '%s': not all ranks spoke within %lld ms", key,
                            (long long)timeout_us / 1000);
    }
    for (size_t i = 0; !e && i < l->join.size; i++) {
        ProtobufCBinaryData *part = &l->exchanged->exchanged->all[i];
        out_all[i] = (struct span){(const char *)part->data, part->len};
    }
    *l->exchange_key = 0;
    pthread_mutex_unlock(&l->mutex);
    return e;
}

enum err link_ready(struct link *l, uint64_t epoch)
{
    Heddle__Cluster__Ready r = HEDDLE__CLUSTER__READY__INIT;
    Heddle__Cluster__FromWorker m = HEDDLE__CLUSTER__FROM_WORKER__INIT;
    r.epoch = epoch;
    m.kind_case = HEDDLE__CLUSTER__FROM_WORKER__KIND_READY;
    m.ready = &r;
    pthread_mutex_lock(&l->mutex);
    enum err e = send_words(l, &m);
    pthread_mutex_unlock(&l->mutex);
    return e;
}

enum err link_send_result(struct link *l, const void *bytes, size_t n)
{
    pthread_mutex_lock(&l->mutex);
    struct rpc_call *call = l->call ? rpc_acquire(l->call) : NULL;
    pthread_mutex_unlock(&l->mutex);
    if (!call) FAIL(ERR_PEER, "the coordinator is lost");
    enum err e = rpc_send(call, bytes, n);
    rpc_release(call);
    return e ? err_set(ERR_PEER, "a result could not be sent: %s", err_name(e)) : OK;
}

void link_fault(struct link *l, const char *reason, bool fatal)
{
    Heddle__Cluster__Fault f = HEDDLE__CLUSTER__FAULT__INIT;
    Heddle__Cluster__FromWorker m = HEDDLE__CLUSTER__FROM_WORKER__INIT;
    f.reason = (char *)(uintptr_t)reason;
    f.fatal = fatal;
    m.kind_case = HEDDLE__CLUSTER__FROM_WORKER__KIND_FAULT;
    m.fault = &f;
    pthread_mutex_lock(&l->mutex);
    f.epoch = l->delivered_epoch; /* one that has ended meanwhile is not ended again */
    (void)send_words(l, &m);
    pthread_mutex_unlock(&l->mutex);
}

void link_leave(struct link *l, const char *reason, int timeout_ms)
{
    Heddle__Cluster__Leave leave = HEDDLE__CLUSTER__LEAVE__INIT;
    Heddle__Cluster__FromWorker m = HEDDLE__CLUSTER__FROM_WORKER__INIT;
    leave.reason = (char *)(uintptr_t)reason;
    m.kind_case = HEDDLE__CLUSTER__FROM_WORKER__KIND_LEAVE;
    m.leave = &leave;
    int64_t until_us = until_of((int64_t)timeout_ms * 1000);
    pthread_mutex_lock(&l->mutex);
    l->leaving = true;
    (void)send_words(l, &m);
    if (l->call) rpc_half_close(l->call);
    while (l->call && news_wait(l, until_us))
        continue;
    pthread_mutex_unlock(&l->mutex);
}

const atomic_uint_fast64_t *link_epoch(const struct link *l)
{
    return &l->epoch;
}
