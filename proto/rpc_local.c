/* rpc.h between threads of one process: "local:NAME". For tests, the simulator and a coordinator
 * whose workers live beside it. The same promises as gRPC: FIFO, bounded queues, serial callbacks,
 * deadlines, cancels, refusals.
 *
 * A call is a pair of sides under one mutex; each side's callbacks are run by the threads of its
 * server or channel. Lock order: registry, pair, runtime. Knows no socket. */
#include "base/clock.h"
#include "base/mem.h"
#include "proto/rpc_impl.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

enum { CLIENT, SERVER, THREADS_MAX = 16 };
struct pair;
struct runtime;

struct side {
    struct rpc_call base;
    struct pair *pair;
    struct runtime *runtime; /* NULL: a refused call has no server side */
    struct rpc_fifo out;     /* what the other side has not been told yet */
    size_t in_bytes_max;
    bool ended; /* half-closed or finished by this side */
    bool opened, held, half_told, got_request, end_told;
    /* guarded by the runtime's mutex */
    bool queued, running, again, doomed, cancelled;
    int64_t timer_us; /* INT64_MAX: none, or it has fired */
    struct side *queue_next, *alive_next, **alive_link;
};

struct pair {
    pthread_mutex_t mutex;
    atomic_int refs;
    struct side sides[2];
    struct rpc_server *server;
    bool over; /* by a cancel, a deadline or a refusal: nothing more is delivered */
    int code;
    char text[RPC_STATUS_TEXT_MAX];
    char *bearer;
};

struct runtime {
    pthread_mutex_t mutex;
    pthread_cond_t work, quiet;
    struct side *head, *tail, *alive;
    pthread_t threads[THREADS_MAX];
    int n_threads, n_calls;
    bool stop;
};

struct lserver {
    struct rpc_server base;
    struct runtime runtime;
    struct lserver *next;
    bool registered;
};
struct lchannel {
    struct rpc_channel base;
    struct runtime runtime;
};

static pthread_mutex_t registry_mutex = PTHREAD_MUTEX_INITIALIZER;
static struct lserver *registry;

/* ---- Runtime ---- */

static void kick(struct side *s) /* the pair is locked, or nobody else knows it yet */
{
    struct runtime *r = s->runtime;
    if (!r) return;
    pthread_mutex_lock(&r->mutex);
    if (s->running) {
        s->again = true;
    } else if (!s->queued && !s->doomed) {
        s->queued = true;
        s->queue_next = NULL;
        if (r->tail)
            r->tail->queue_next = s;
        else
            r->head = s;
        r->tail = s;
        pthread_cond_signal(&r->work);
    }
    pthread_mutex_unlock(&r->mutex);
}

static void kick_both(struct pair *p)
{
    kick(&p->sides[CLIENT]);
    kick(&p->sides[SERVER]);
}

static void attach(struct runtime *r,
                   struct side *s) /* runtime locked by the caller or not shared */
{
    s->runtime = r;
    s->alive_next = r->alive;
    if (r->alive) r->alive->alive_link = &s->alive_next;
    s->alive_link = &r->alive;
    r->alive = s;
    r->n_calls++;
    rpc_acquire(&s->base);
}

static void detach(struct runtime *r, struct side *s)
{
    pthread_mutex_lock(&r->mutex);
    *s->alive_link = s->alive_next;
    if (s->alive_next) s->alive_next->alive_link = s->alive_link;
    s->alive_link = NULL;
    pthread_mutex_unlock(&r->mutex);
    if (s == &s->pair->sides[SERVER]) rpc_server_leave(s->pair->server);
    pthread_mutex_lock(&s->pair->mutex);
    s->runtime = NULL; /* handles may outlive it */
    pthread_mutex_unlock(&s->pair->mutex);
    rpc_release(&s->base);
    pthread_mutex_lock(&r->mutex);
    if (--r->n_calls == 0) pthread_cond_broadcast(&r->quiet);
    pthread_mutex_unlock(&r->mutex);
}

static void pair_over(struct pair *p, int code, const char *text)
{
    pthread_mutex_lock(&p->mutex);
    if (!p->over) {
        p->over = true;
        p->code = code;
        snprintf(p->text, sizeof p->text, "%s", text);
        rpc_fifo_fini(&p->sides[CLIENT].out);
        rpc_fifo_fini(&p->sides[SERVER].out);
        kick_both(p);
    }
    pthread_mutex_unlock(&p->mutex);
}

/* ---- Delivery: one event of one side at a time ---- */

enum event { EVENT_NONE, EVENT_OPEN, EVENT_MESSAGE, EVENT_HALF, EVENT_END };

static enum event event_next(struct side *s, struct rpc_bytes **out_bytes)
{
    struct pair *p = s->pair;
    bool server = s == &p->sides[SERVER];
    struct side *peer = &p->sides[server ? CLIENT : SERVER];
    if (s->end_told) return EVENT_NONE;
    if (server && !s->opened) return s->opened = true, EVENT_OPEN;
    if (p->over) return s->end_told = true, EVENT_END;
    bool reads = !s->held && !(server && s->got_request && s->base.method->kind != RPC_BIDI);
    if (reads && peer->out.n) {
        *out_bytes = rpc_fifo_pop(&peer->out);
        s->got_request = true;
        return EVENT_MESSAGE;
    }
    if (server && reads && peer->ended && !s->half_told) return s->half_told = true, EVENT_HALF;
    if (server && s->ended && !s->out.n) return s->end_told = true, EVENT_END;
    if (!server && !s->held && peer->ended && !peer->out.n) {
        kick(peer);
        return s->end_told = p->over = true, EVENT_END;
    }
    return EVENT_NONE;
}

static void client_tell(struct side *s, enum event event, struct span bytes)
{
    const struct rpc_handler *h = &s->base.handler;
    if (event == EVENT_MESSAGE && h->on_message) h->on_message(&s->base, h->ctx, bytes);
    if (event == EVENT_END && h->on_end) h->on_end(&s->base, h->ctx, s->pair->code, s->pair->text);
}

static void server_tell(struct side *s, enum event event, struct span bytes, bool cancelled)
{
    const struct rpc_method *m = s->base.method;
    switch (event) {
    case EVENT_OPEN:
        if (m->on_open) m->on_open(&s->base, m->ctx);
        break;
    case EVENT_MESSAGE:
        if (m->on_message) m->on_message(&s->base, m->ctx, bytes);
        break;
    case EVENT_HALF:
        if (m->kind != RPC_BIDI)
            rpc_finish(&s->base, RPC_INVALID_ARGUMENT, "the request has no message");
        else if (m->on_half_close)
            m->on_half_close(&s->base, m->ctx);
        else
            rpc_finish(&s->base, RPC_OK, NULL);
        break;
    case EVENT_END:
        if (m->on_close) m->on_close(&s->base, m->ctx, cancelled);
        break;
    case EVENT_NONE:
        break;
    }
}

/* Returns false when the side has nothing to tell now. */
static bool side_step(struct side *s)
{
    struct pair *p = s->pair;
    struct rpc_bytes *bytes = NULL;
    bool server = s == &p->sides[SERVER];
    pthread_mutex_lock(&p->mutex);
    enum event event = event_next(s, &bytes);
    bool cancelled = p->over && !s->ended;
    struct side *peer = &p->sides[server ? CLIENT : SERVER];
    if (event == EVENT_MESSAGE && peer->ended)
        kick(peer); /* its last message may have been taken */
    pthread_mutex_unlock(&p->mutex);
    if (event == EVENT_NONE) return false;
    struct span span = bytes ? rpc_bytes_span(bytes) : (struct span){"", 0};
    if (server)
        server_tell(s, event, span, cancelled);
    else
        client_tell(s, event, span);
    rpc_bytes_release(bytes);
    return event != EVENT_END;
}

static void side_run(struct runtime *r, struct side *s)
{
    bool more;
    do {
        while (side_step(s))
            continue;
        pthread_mutex_lock(&r->mutex);
        more = s->again;
        s->again = false;
        s->running = more;
        pthread_mutex_unlock(&r->mutex);
    } while (more);
    pthread_mutex_lock(&s->pair->mutex);
    bool told = s->end_told;
    pthread_mutex_unlock(&s->pair->mutex);
    if (!told) return;
    pthread_mutex_lock(&r->mutex);
    bool mine = s->alive_link && !s->queued && !s->doomed;
    if (mine) s->doomed = true; /* so that only one thread detaches it */
    pthread_mutex_unlock(&r->mutex);
    if (mine) detach(r, s);
}

static int64_t deadline_next(const struct runtime *r, struct side **out_expired)
{
    int64_t now = clock_monotonic_us(), next = INT64_MAX;
    *out_expired = NULL;
    for (struct side *s = r->alive; s; s = s->alive_next) {
        if (s->timer_us == INT64_MAX) continue;
        if (s->timer_us <= now)
            *out_expired = s;
        else if (s->timer_us < next)
            next = s->timer_us;
    }
    return next;
}

static void wait_until(pthread_cond_t *cond, pthread_mutex_t *mutex, int64_t us)
{
    struct timespec t = {us / 1000000, us % 1000000 * 1000};
    if (us == INT64_MAX)
        pthread_cond_wait(cond, mutex);
    else
        pthread_cond_timedwait(cond, mutex, &t);
}

static void *runtime_run(void *ctx)
{
    struct runtime *r = ctx;
    pthread_mutex_lock(&r->mutex);
    for (;;) {
        struct side *s, *expired;
        int64_t next = deadline_next(r, &expired);
        if (expired) {
            expired->timer_us = INT64_MAX;
            rpc_acquire(&expired->base);
            pthread_mutex_unlock(&r->mutex);
            pair_over(expired->pair, RPC_DEADLINE_EXCEEDED, "the deadline has passed");
            rpc_release(&expired->base);
        } else if ((s = r->head)) {
            r->head = s->queue_next;
            if (!r->head) r->tail = NULL;
            s->queued = false;
            s->running = true;
            rpc_acquire(&s->base);
            pthread_mutex_unlock(&r->mutex);
            side_run(r, s);
            rpc_release(&s->base);
        } else if (r->stop) {
            break;
        } else {
            wait_until(&r->work, &r->mutex, next);
            continue;
        }
        pthread_mutex_lock(&r->mutex);
    }
    pthread_mutex_unlock(&r->mutex);
    return NULL;
}

static enum err runtime_init(struct runtime *r, int n_threads)
{
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_mutex_init(&r->mutex, NULL);
    pthread_cond_init(&r->work, &attributes);
    pthread_cond_init(&r->quiet, &attributes);
    pthread_condattr_destroy(&attributes);
    for (; r->n_threads < n_threads && r->n_threads < THREADS_MAX; r->n_threads++)
        if (pthread_create(&r->threads[r->n_threads], NULL, runtime_run, r))
            FAIL(ERR_NO_MEMORY, "no thread for a server or channel");
    return OK;
}

static bool runtime_wait(struct runtime *r, int64_t until_us)
{
    pthread_mutex_lock(&r->mutex);
    while (r->n_calls && clock_monotonic_us() < until_us)
        wait_until(&r->quiet, &r->mutex, until_us);
    bool done = !r->n_calls;
    pthread_mutex_unlock(&r->mutex);
    return done;
}

static void runtime_cancel(struct runtime *r, int code, const char *text)
{
    for (;;) {
        pthread_mutex_lock(&r->mutex);
        struct side *s = r->alive;
        while (s && s->cancelled)
            s = s->alive_next;
        if (s) s->cancelled = true, rpc_acquire(&s->base);
        pthread_mutex_unlock(&r->mutex);
        if (!s) return;
        pair_over(s->pair, code, text);
        rpc_release(&s->base);
    }
}

static void runtime_fini(struct runtime *r)
{
    pthread_mutex_lock(&r->mutex);
    r->stop = true;
    pthread_cond_broadcast(&r->work);
    pthread_mutex_unlock(&r->mutex);
    for (int i = 0; i < r->n_threads; i++)
        pthread_join(r->threads[i], NULL);
    pthread_cond_destroy(&r->work);
    pthread_cond_destroy(&r->quiet);
    pthread_mutex_destroy(&r->mutex);
}

/* ---- Verbs of a call ---- */

static enum err side_send(struct rpc_call *call, struct rpc_bytes *bytes)
{
    struct side *s = (struct side *)call;
    struct pair *p = s->pair;
    struct side *peer = &p->sides[s == &p->sides[CLIENT] ? SERVER : CLIENT];
    enum err e = ERR_CANCELLED;
    bool too_big = bytes->n > peer->in_bytes_max;
    pthread_mutex_lock(&p->mutex);
    if (!p->over && !s->ended && !too_big) {
        e = rpc_fifo_push(&s->out, bytes);
        kick(peer);
    }
    bool over = p->over;
    pthread_mutex_unlock(&p->mutex);
    if (too_big && !over) {
        pair_over(p, RPC_RESOURCE_EXHAUSTED, "a message is larger than the receiver takes");
        return OK; /* as over a wire: the end of the call says it */
    }
    return e == ERR_CANCELLED ? err_set(e, "%s: the call is over", call->path) : e;
}

static size_t side_pending(struct rpc_call *call)
{
    struct side *s = (struct side *)call;
    pthread_mutex_lock(&s->pair->mutex);
    size_t n = s->out.bytes;
    pthread_mutex_unlock(&s->pair->mutex);
    return n;
}

static void side_half_close(struct rpc_call *call)
{
    struct side *s = (struct side *)call;
    if (s != &s->pair->sides[CLIENT]) return;
    pthread_mutex_lock(&s->pair->mutex);
    s->ended = true;
    kick(&s->pair->sides[SERVER]);
    pthread_mutex_unlock(&s->pair->mutex);
}

static void side_finish(struct rpc_call *call, int code, const char *text)
{
    struct side *s = (struct side *)call;
    struct pair *p = s->pair;
    if (s != &p->sides[SERVER]) return;
    pthread_mutex_lock(&p->mutex);
    if (!s->ended && !p->over) {
        s->ended = true;
        p->code = code;
        snprintf(p->text, sizeof p->text, "%s", text);
        kick_both(p);
    }
    pthread_mutex_unlock(&p->mutex);
}

static void side_cancel(struct rpc_call *call)
{
    pair_over(((struct side *)call)->pair, RPC_CANCELLED, "cancelled by the peer");
}

static void side_hold(struct rpc_call *call, bool on)
{
    struct side *s = (struct side *)call;
    pthread_mutex_lock(&s->pair->mutex);
    s->held = on;
    if (!on) kick(s);
    pthread_mutex_unlock(&s->pair->mutex);
}

static struct span side_metadata(const struct rpc_call *call, const char *key)
{
    const struct pair *p = ((const struct side *)call)->pair;
    if (strcmp(key, "authorization") || !p->bearer) return (struct span){NULL, 0};
    return span_of(p->bearer);
}

static void side_free(struct rpc_call *call)
{
    struct pair *p = ((struct side *)call)->pair;
    if (atomic_fetch_sub(&p->refs, 1) != 1) return;
    rpc_fifo_fini(&p->sides[CLIENT].out);
    rpc_fifo_fini(&p->sides[SERVER].out);
    pthread_mutex_destroy(&p->mutex);
    mem_free(p->bearer);
    mem_free(p);
}

static const struct rpc_call_ops side_ops = {side_send,     side_pending, side_half_close,
                                             side_finish,   side_cancel,  side_hold,
                                             side_metadata, side_free};

/* ---- Server ---- */

static int lserver_port(const struct rpc_server *s)
{
    (void)s;
    return 0;
}

static void unregister(struct lserver *s)
{
    pthread_mutex_lock(&registry_mutex);
    for (struct lserver **p = &registry; *p && s->registered; p = &(*p)->next)
        if (*p == s) {
            *p = s->next;
            s->registered = false;
            break;
        }
    pthread_mutex_unlock(&registry_mutex);
}

static bool lserver_drain(struct rpc_server *base, int timeout_ms)
{
    struct lserver *s = (struct lserver *)base;
    unregister(s);
    return runtime_wait(&s->runtime, clock_monotonic_us() + (int64_t)timeout_ms * 1000);
}

static void lserver_destroy(struct rpc_server *base)
{
    struct lserver *s = (struct lserver *)base;
    unregister(s);
    runtime_cancel(&s->runtime, RPC_UNAVAILABLE, "the server has gone");
    runtime_wait(&s->runtime, INT64_MAX);
    runtime_fini(&s->runtime);
    rpc_server_fini(base);
    mem_free(s);
}

static const struct rpc_server_ops lserver_ops = {lserver_port, lserver_drain, lserver_destroy};

static struct lserver *registry_find(const char *address)
{
    for (struct lserver *s = registry; s; s = s->next)
        if (!strcmp(s->base.address, address)) return s;
    return NULL;
}

enum err rpc_local_server_create(const struct rpc_server_config *config, struct rpc_server **out)
{
    struct lserver *s;
    TRY(MEM_NEW(&s));
    s->base.ops = &lserver_ops;
    enum err e = rpc_server_init(&s->base, config);
    if (!e) e = runtime_init(&s->runtime, config->n_threads > 0 ? config->n_threads : 1);
    if (!e) {
        pthread_mutex_lock(&registry_mutex);
        if (registry_find(config->address)) {
            e = err_set(ERR_IO, "cannot listen on %s: taken", config->address);
        } else {
            s->next = registry;
            registry = s;
            s->registered = true;
        }
        pthread_mutex_unlock(&registry_mutex);
    }
    if (e)
        lserver_destroy(&s->base);
    else
        *out = &s->base;
    return e;
}

/* ---- Channel ---- */

/* Finds the server and hangs its side of the pair there; otherwise the pair is over already. */
static void server_side_open(struct lchannel *ch, struct pair *p)
{
    struct side *s = &p->sides[SERVER];
    const char *text = "no server has this name";
    int code = RPC_UNAVAILABLE;
    pthread_mutex_lock(&registry_mutex);
    struct lserver *server = registry_find(ch->base.address);
    if (server) {
        struct span authorization = p->bearer ? span_of(p->bearer) : (struct span){"", 0};
        s->base.method = rpc_server_admit(&server->base, s->base.path, authorization, &code, &text);
        if (!s->base.method) rpc_server_leave(&server->base);
    }
    if (s->base.method) {
        p->server = &server->base;
        s->in_bytes_max = server->base.message_bytes_max;
        if (s->base.method->send_bytes_max) s->out.limit = s->base.method->send_bytes_max;
        pthread_mutex_lock(&server->runtime.mutex);
        attach(&server->runtime, s);
        pthread_mutex_unlock(&server->runtime.mutex);
        kick(s);
    }
    pthread_mutex_unlock(&registry_mutex);
    if (!s->base.method) pair_over(p, code, text);
    rpc_release(&s->base);
}

static enum err lchannel_open(struct rpc_channel *base, const char *path, int timeout_ms,
                              const struct rpc_handler *handler, struct rpc_call **out)
{
    struct lchannel *ch = (struct lchannel *)base;
    struct pair *p;
    TRY(MEM_NEW(&p));
    atomic_init(&p->refs, 2);
    pthread_mutex_init(&p->mutex, NULL);
    for (int i = 0; i < 2; i++) {
        struct side *s = &p->sides[i];
        s->base.ops = &side_ops;
        s->pair = p;
        s->out.limit = i == CLIENT ? base->send_bytes_max : RPC_SEND_BYTES_MAX;
        s->in_bytes_max = base->message_bytes_max;
        atomic_init(&s->base.refs, 1);
        s->base.deadline_us =
            timeout_ms > 0 ? clock_monotonic_us() + (int64_t)timeout_ms * 1000 : INT64_MAX;
        s->timer_us = i == CLIENT ? s->base.deadline_us : INT64_MAX;
        snprintf(s->base.path, sizeof s->base.path, "%s", path);
        snprintf(s->base.peer, sizeof s->base.peer, "%s", base->address);
    }
    struct side *s = &p->sides[CLIENT];
    s->base.handler = *handler;
    p->bearer = base->bearer ? mem_strdup(base->bearer) : NULL;
    *out = &s->base; /* before the first callback can come */
    pthread_mutex_lock(&ch->runtime.mutex);
    attach(&ch->runtime, s);
    pthread_cond_signal(&ch->runtime.work); /* its deadline may be the next */
    pthread_mutex_unlock(&ch->runtime.mutex);
    server_side_open(ch, p);
    return OK;
}

static void lchannel_destroy(struct rpc_channel *base)
{
    struct lchannel *ch = (struct lchannel *)base;
    runtime_cancel(&ch->runtime, RPC_CANCELLED, "the channel was closed");
    runtime_wait(&ch->runtime, INT64_MAX);
    runtime_fini(&ch->runtime);
    rpc_channel_fini(base);
    mem_free(ch);
}

static const struct rpc_channel_ops lchannel_ops = {lchannel_open, lchannel_destroy};

enum err rpc_local_channel_create(const struct rpc_channel_config *config, struct rpc_channel **out)
{
    struct lchannel *ch;
    TRY(MEM_NEW(&ch));
    ch->base.ops = &lchannel_ops;
    enum err e = rpc_channel_init(&ch->base, config);
    if (!e) e = runtime_init(&ch->runtime, 1);
    if (e)
        lchannel_destroy(&ch->base);
    else
        *out = &ch->base;
    return e;
}
