/* rpc.h over a network: what a call does next.
 *
 * The idea: polling threads take events from a queue and call the callbacks, nothing else. A thread
 * that polls must never start a send: the queue hands out events that are ready without reading the
 * socket, so a handler that feeds itself would never hear a cancel. Sends are started by whoever
 * calls rpc_send, or by the posting thread when that is a polling thread or when the one send in
 * flight (the library allows no second on a call) has just ended.
 *
 * A call's state is guarded by its mutex; its callbacks are serial because the next read starts
 * after on_message returned, and the end is told when no read is in flight. Lock order: call,
 * reactor. Knows no socket and no protobuf. */
#include "base/clock.h"
#include "base/log.h"
#include "base/mem.h"
#include "proto/rpc_impl.h"
#include "proto/rpc_wire.h"

#include <stdio.h>
#include <string.h>
#include <time.h>

enum { POLLERS_MAX = 16, WAITING_CALLS = 16 };

struct call;

/* A queue of events with its threads and the calls that live on it. */
struct reactor {
    struct wire_queue *queue;
    pthread_t pollers[POLLERS_MAX], poster;
    int n_pollers;
    bool has_poster;
    pthread_mutex_t mutex; /* of what follows */
    pthread_cond_t work, quiet;
    struct call *post_head, *post_tail;
    struct call *alive; /* whose wire_call lives */
    int n_calls;
    bool stop, shut; /* shut: the server's shutdown is complete */
};

struct server {
    struct rpc_server base;
    struct reactor reactor;
    struct wire_server *wire;
    int port;
    bool draining;
    atomic_int n_waiting; /* calls asked of the library that have not come */
};

struct channel {
    struct rpc_channel base;
    struct reactor reactor;
    struct wire_channel *wire;
};

struct call {
    struct rpc_call base;
    struct reactor *reactor;
    struct server *server;   /* NULL on the client */
    struct channel *channel; /* NULL on the server */
    pthread_mutex_t mutex;   /* of what follows */
    struct wire_call *wire;  /* NULL once retired */
    int n_events;            /* due, and handlers now running */
    struct rpc_fifo out;
    bool sending, headers_wanted, headers_sent, end_wanted, end_sent, over;
    int end_code;
    char end_text[RPC_STATUS_TEXT_MAX];
    bool reading, held, read_over, close_seen, close_telling, close_told;
    bool posted; /* in the poster's list, which holds a count */
    struct call *post_next;
    struct call *alive_next, **alive_link; /* guarded by the reactor's mutex, as is the next */
    bool doomed;
};

static _Thread_local bool is_poller;
static const struct rpc_call_ops call_ops;

/* ---- Sending ---- */

static void broken(struct call *c) /* a batch could not be started: our mistake, the call ends */
{
    c->over = true;
    wire_cancel(c->wire);
}

/* Starts the next send when none is in flight: what is due of headers, one message and the end. */
static void pump(struct call *c)
{
    bool ends = c->end_wanted && !c->end_sent && c->out.n <= 1;
    bool headers = !c->headers_sent && (c->headers_wanted || c->out.n || ends);
    if (c->sending || c->over || !c->wire || !(headers || c->out.n || ends)) return;
    struct wire_send send = {.headers = headers,
                             .bearer = c->channel ? c->channel->base.bearer : NULL,
                             .bytes = rpc_fifo_pop(&c->out),
                             .end = ends,
                             .code = c->end_code,
                             .text = c->end_text};
    c->headers_sent |= headers;
    c->end_sent |= ends;
    c->sending = wire_send(c->wire, &send);
    if (c->sending)
        c->n_events++;
    else
        broken(c);
}

static void post(struct call *c)
{
    struct reactor *r = c->reactor;
    if (c->posted) return;
    c->posted = true;
    rpc_acquire(&c->base);
    pthread_mutex_lock(&r->mutex);
    c->post_next = NULL;
    if (r->post_tail)
        r->post_tail->post_next = c;
    else
        r->post_head = c;
    r->post_tail = c;
    pthread_cond_signal(&r->work);
    pthread_mutex_unlock(&r->mutex);
}

static void kick(struct call *c)
{
    if (c->sending) return; /* the end of that send goes on */
    if (is_poller)
        post(c);
    else
        pump(c);
}

static void *poster_run(void *ctx)
{
    struct reactor *r = ctx;
    pthread_mutex_lock(&r->mutex);
    for (;;) {
        while (!r->post_head && !r->stop)
            pthread_cond_wait(&r->work, &r->mutex);
        struct call *c = r->post_head;
        if (!c) break;
        r->post_head = c->post_next;
        if (!r->post_head) r->post_tail = NULL;
        pthread_mutex_unlock(&r->mutex);
        pthread_mutex_lock(&c->mutex);
        c->posted = false;
        pump(c);
        pthread_mutex_unlock(&c->mutex);
        rpc_release(&c->base);
        pthread_mutex_lock(&r->mutex);
    }
    pthread_mutex_unlock(&r->mutex);
    return NULL;
}

static enum err call_send(struct rpc_call *call, struct rpc_bytes *bytes)
{
    struct call *c = (struct call *)call;
    enum err e = ERR_CANCELLED;
    pthread_mutex_lock(&c->mutex);
    if (!c->over && !c->end_wanted) {
        e = rpc_fifo_push(&c->out, bytes);
        if (!e) kick(c);
    }
    pthread_mutex_unlock(&c->mutex);
    return e == ERR_CANCELLED ? err_set(e, "%s: the call is over", call->path) : e;
}

static size_t call_pending(struct rpc_call *call)
{
    struct call *c = (struct call *)call;
    pthread_mutex_lock(&c->mutex);
    size_t n = c->out.bytes;
    pthread_mutex_unlock(&c->mutex);
    return n;
}

static void end_want(struct call *c, int code, const char *text)
{
    pthread_mutex_lock(&c->mutex);
    if (!c->end_wanted && !c->over) {
        c->end_wanted = true;
        c->end_code = code;
        snprintf(c->end_text, sizeof c->end_text, "%s", text);
        kick(c);
    }
    pthread_mutex_unlock(&c->mutex);
}

static void call_half_close(struct rpc_call *call)
{
    if (!((struct call *)call)->server) end_want((struct call *)call, RPC_OK, "");
}

static void call_finish(struct rpc_call *call, int code, const char *text)
{
    if (((struct call *)call)->server) end_want((struct call *)call, code, text);
}

static void call_cancel(struct rpc_call *call)
{
    struct call *c = (struct call *)call;
    pthread_mutex_lock(&c->mutex);
    if (c->wire && !c->close_seen) {
        c->over = true;
        rpc_fifo_fini(&c->out);
        wire_cancel(c->wire);
    }
    pthread_mutex_unlock(&c->mutex);
}

/* ---- Receiving ---- */

static void read_start(struct call *c) /* locked */
{
    if (c->reading || c->held || c->read_over || c->close_seen || !c->wire) return;
    c->reading = wire_recv(c->wire);
    if (c->reading)
        c->n_events++;
    else
        broken(c);
}

static void call_hold(struct rpc_call *call, bool on)
{
    struct call *c = (struct call *)call;
    pthread_mutex_lock(&c->mutex);
    c->held = on;
    if (!on) read_start(c);
    pthread_mutex_unlock(&c->mutex);
}

static void message_tell(struct call *c, struct span bytes)
{
    const struct rpc_method *m = c->base.method;
    const struct rpc_handler *h = &c->base.handler;
    if (c->server && m->on_message) m->on_message(&c->base, m->ctx, bytes);
    if (!c->server && h->on_message) h->on_message(&c->base, h->ctx, bytes);
}

/* No message: the client said no more, or the call is dying, which its end will say. */
static void half_close_tell(struct call *c)
{
    const struct rpc_method *m = c->base.method;
    if (!c->server) return;
    if (m->kind != RPC_BIDI)
        call_finish(&c->base, RPC_INVALID_ARGUMENT, "the request has no message");
    else if (m->on_half_close)
        m->on_half_close(&c->base, m->ctx);
    else
        call_finish(&c->base, RPC_OK, "");
}

/* A compressed message that is broken or too big ends the call; nothing more is read. */
static void message_refuse(struct call *c, enum err e)
{
    if (c->server)
        call_finish(&c->base, e == ERR_TOO_BIG ? RPC_RESOURCE_EXHAUSTED : RPC_INVALID_ARGUMENT,
                    err_detail());
    else
        call_cancel(&c->base);
}

static void on_recv(struct call *c, bool ok)
{
    struct span bytes = {NULL, 0};
    enum err e = ok ? wire_message(c->wire, &bytes) : OK;
    pthread_mutex_lock(&c->mutex);
    bool dead = c->server && c->close_seen && wire_cancelled(c->wire);
    pthread_mutex_unlock(&c->mutex);
    if (e) bytes.data = NULL;
    if (!dead && e)
        message_refuse(c, e);
    else if (!dead && bytes.data)
        message_tell(c, bytes);
    else if (!dead)
        half_close_tell(c);
    wire_message_free(c->wire);
    pthread_mutex_lock(&c->mutex);
    c->reading = false;
    if (e || !bytes.data || (c->server && c->base.method->kind != RPC_BIDI)) c->read_over = true;
    read_start(c);
    pthread_mutex_unlock(&c->mutex);
}

static void on_send(struct call *c, bool ok)
{
    pthread_mutex_lock(&c->mutex);
    c->sending = false;
    if (!ok) {
        c->over = true;
        rpc_fifo_fini(&c->out);
    } else if (c->out.n || (c->end_wanted && !c->end_sent)) {
        post(c);
    }
    pthread_mutex_unlock(&c->mutex);
}

static void on_close(struct call *c)
{
    pthread_mutex_lock(&c->mutex);
    c->close_seen = c->over = true;
    rpc_fifo_fini(&c->out);
    pthread_mutex_unlock(&c->mutex);
}

static void close_tell(struct call *c)
{
    const struct rpc_method *m = c->base.method;
    const struct rpc_handler *h = &c->base.handler;
    if (c->server && m && m->on_close) m->on_close(&c->base, m->ctx, wire_cancelled(c->wire));
    if (!c->server && h->on_end) {
        char text[RPC_STATUS_TEXT_MAX];
        int code;
        wire_status(c->wire, &code, text, sizeof text);
        h->on_end(&c->base, h->ctx, code, text);
    }
}

/* ---- Life of a call ---- */

static enum err call_create(struct reactor *r, struct server *server, struct channel *channel,
                            struct call **out)
{
    struct call *c;
    TRY(MEM_NEW(&c));
    c->base.ops = &call_ops;
    atomic_init(&c->base.refs, 1); /* the reactor's, until it retires */
    c->base.deadline_us = INT64_MAX;
    c->reactor = r;
    c->server = server;
    c->channel = channel;
    c->out.limit = channel ? channel->base.send_bytes_max : RPC_SEND_BYTES_MAX;
    pthread_mutex_init(&c->mutex, NULL);
    *out = c;
    return OK;
}

static void call_free(struct rpc_call *call)
{
    struct call *c = (struct call *)call;
    rpc_fifo_fini(&c->out);
    pthread_mutex_destroy(&c->mutex);
    mem_free(c);
}

static void alive_add(struct reactor *r, struct call *c)
{
    pthread_mutex_lock(&r->mutex);
    c->alive_next = r->alive;
    if (r->alive) r->alive->alive_link = &c->alive_next;
    c->alive_link = &r->alive;
    r->alive = c;
    r->n_calls++;
    pthread_mutex_unlock(&r->mutex);
}

/* The library's part is given back; handles that somebody acquired may remain. */
static void retire(struct call *c)
{
    struct reactor *r = c->reactor;
    pthread_mutex_lock(&r->mutex);
    *c->alive_link = c->alive_next;
    if (c->alive_next) c->alive_next->alive_link = c->alive_link;
    pthread_mutex_unlock(&r->mutex);
    pthread_mutex_lock(&c->mutex);
    wire_call_destroy(c->wire);
    c->wire = NULL;
    pthread_mutex_unlock(&c->mutex);
    if (c->server) rpc_server_leave(&c->server->base);
    rpc_release(&c->base);
    pthread_mutex_lock(&r->mutex);
    if (--r->n_calls == 0) pthread_cond_broadcast(&r->quiet);
    pthread_mutex_unlock(&r->mutex);
}

/* Destroying a channel leaves its calls alive in the library, so they are ended one by one. */
static void alive_cancel(struct reactor *r)
{
    for (;;) {
        pthread_mutex_lock(&r->mutex);
        struct call *c = r->alive;
        while (c && c->doomed)
            c = c->alive_next;
        if (c) c->doomed = true, rpc_acquire(&c->base);
        pthread_mutex_unlock(&r->mutex);
        if (!c) return;
        call_cancel(&c->base);
        rpc_release(&c->base);
    }
}

/* After an event was handled: tells the end when nothing else runs, retires after the last event.
 */
static void event_done(struct call *c)
{
    pthread_mutex_lock(&c->mutex);
    bool tell = c->close_seen && !c->reading && !c->close_telling;
    if (tell) c->close_telling = true;
    pthread_mutex_unlock(&c->mutex);
    if (tell) close_tell(c);
    pthread_mutex_lock(&c->mutex);
    c->close_told |= tell;
    bool last = --c->n_events == 0 && c->close_told;
    pthread_mutex_unlock(&c->mutex);
    if (last) retire(c);
}

static struct span call_metadata(const struct rpc_call *call, const char *key)
{
    const struct call *c = (const struct call *)call;
    return c->wire ? wire_metadata(c->wire, key) : (struct span){NULL, 0};
}

static const struct rpc_call_ops call_ops = {call_send,     call_pending, call_half_close,
                                             call_finish,   call_cancel,  call_hold,
                                             call_metadata, call_free};

/* ---- Events ---- */

/* Keeps enough calls asked of the library, also after a time without memory. */
static void calls_await(struct server *s)
{
    while (atomic_load(&s->n_waiting) < WAITING_CALLS) {
        struct call *c;
        enum err e = call_create(&s->reactor, s, NULL, &c);
        if (e) break;
        c->n_events = 1;
        atomic_fetch_add(&s->n_waiting, 1);
        e = wire_call_request(s->wire, s->reactor.queue, c, &c->wire);
        if (!e) continue;
        atomic_fetch_sub(&s->n_waiting, 1);
        rpc_release(&c->base);
        break;
    }
    if (!atomic_load(&s->n_waiting))
        log_error("rpc: %s: no memory to await calls", s->base.address);
}

static void on_new(struct call *c)
{
    struct server *s = c->server;
    int code;
    const char *text;
    alive_add(&s->reactor, c);
    wire_path(c->wire, c->base.path, sizeof c->base.path);
    wire_peer(c->wire, c->base.peer, sizeof c->base.peer);
    wire_peer_name(c->wire, c->base.peer_name, sizeof c->base.peer_name);
    int64_t left_us = wire_time_left_us(c->wire);
    if (left_us != INT64_MAX) c->base.deadline_us = clock_monotonic_us() + left_us;
    const struct rpc_method *m = rpc_server_admit(
        &s->base, c->base.path, wire_metadata(c->wire, "authorization"), &code, &text);
    c->base.method = m;
    if (m && m->send_bytes_max) c->out.limit = m->send_bytes_max;
    if (m && m->on_open) m->on_open(&c->base, m->ctx);
    pthread_mutex_lock(&c->mutex);
    if (wire_close(c->wire))
        c->n_events++;
    else
        broken(c);
    c->headers_wanted = m && m->kind != RPC_UNARY;
    c->read_over = !m;
    read_start(c);
    if (c->headers_wanted) kick(c);
    pthread_mutex_unlock(&c->mutex);
    if (!m) call_finish(&c->base, code, text);
}

static bool on_event_new(struct call *c, bool ok)
{
    struct server *s = c->server;
    atomic_fetch_sub(&s->n_waiting, 1);
    if (ok) {
        calls_await(s);
        on_new(c);
        return true;
    }
    wire_call_destroy(c->wire); /* the server shuts down */
    c->wire = NULL;
    rpc_release(&c->base);
    return false;
}

static void on_event(const struct wire_event *event)
{
    struct call *c = event->owner;
    switch (event->tag) {
    case WIRE_NEW:
        if (!on_event_new(c, event->ok)) return;
        break;
    case WIRE_RECV:
        on_recv(c, event->ok);
        break;
    case WIRE_SEND:
        on_send(c, event->ok);
        break;
    case WIRE_CLOSE:
        on_close(c);
        break;
    case WIRE_SHUTDOWN:
        return;
    }
    event_done(c);
}

static void *poller_run(void *ctx)
{
    struct reactor *r = ctx;
    struct wire_event event;
    is_poller = true;
    while (wire_queue_next(r->queue, &event)) {
        if (event.tag != WIRE_SHUTDOWN) {
            on_event(&event);
            continue;
        }
        pthread_mutex_lock(&r->mutex);
        r->shut = true;
        pthread_cond_broadcast(&r->quiet);
        pthread_mutex_unlock(&r->mutex);
    }
    return NULL;
}

/* ---- Reactor ---- */

static void reactor_init(struct reactor *r)
{
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_mutex_init(&r->mutex, NULL);
    pthread_cond_init(&r->work, NULL);
    pthread_cond_init(&r->quiet, &attributes);
    pthread_condattr_destroy(&attributes);
    r->queue = wire_queue_create();
}

static enum err reactor_start(struct reactor *r, int n_pollers)
{
    if (pthread_create(&r->poster, NULL, poster_run, r))
        FAIL(ERR_NO_MEMORY, "no thread for a server or channel");
    r->has_poster = true;
    for (; r->n_pollers < n_pollers && r->n_pollers < POLLERS_MAX; r->n_pollers++)
        if (pthread_create(&r->pollers[r->n_pollers], NULL, poller_run, r))
            FAIL(ERR_NO_MEMORY, "no thread for a server or channel");
    return OK;
}

static void reactor_stop(struct reactor *r)
{
    struct wire_event event;
    wire_queue_shutdown(r->queue);
    for (int i = 0; i < r->n_pollers; i++)
        pthread_join(r->pollers[i], NULL);
    while (wire_queue_next(r->queue, &event))
        continue; /* no poller was started */
    pthread_mutex_lock(&r->mutex);
    r->stop = true;
    pthread_cond_signal(&r->work);
    pthread_mutex_unlock(&r->mutex);
    if (r->has_poster) pthread_join(r->poster, NULL);
}

static void reactor_fini(struct reactor *r)
{
    wire_queue_destroy(r->queue);
    pthread_cond_destroy(&r->work);
    pthread_cond_destroy(&r->quiet);
    pthread_mutex_destroy(&r->mutex);
}

/* Waits until no call lives and, for a server, its shutdown is complete. timeout_ms -1 = for ever.
 */
static bool reactor_wait(struct reactor *r, bool server, int timeout_ms)
{
    int64_t until_us = clock_monotonic_us() + (int64_t)timeout_ms * 1000;
    struct timespec until = {until_us / 1000000, until_us % 1000000 * 1000};
    int late = 0;
    pthread_mutex_lock(&r->mutex);
    while (!late && (r->n_calls || (server && !r->shut)))
        late = timeout_ms < 0 ? pthread_cond_wait(&r->quiet, &r->mutex)
                              : pthread_cond_timedwait(&r->quiet, &r->mutex, &until);
    bool done = !r->n_calls && (!server || r->shut);
    pthread_mutex_unlock(&r->mutex);
    return done;
}

/* ---- Server ---- */

static int server_port(const struct rpc_server *s)
{
    return ((const struct server *)s)->port;
}

static bool server_drain(struct rpc_server *base, int timeout_ms)
{
    struct server *s = (struct server *)base;
    if (!s->draining) wire_server_shutdown(s->wire, NULL);
    s->draining = true;
    return reactor_wait(&s->reactor, true, timeout_ms);
}

static void server_destroy(struct rpc_server *base)
{
    struct server *s = (struct server *)base;
    if (s->wire && s->reactor.n_pollers && !server_drain(base, 0)) {
        wire_server_cancel(s->wire);
        reactor_wait(&s->reactor, true, -1);
    } else if (s->wire && !s->draining) {
        wire_server_shutdown(s->wire, NULL); /* its event is drained by reactor_stop */
    }
    reactor_stop(&s->reactor);
    if (s->wire) wire_server_destroy(s->wire);
    reactor_fini(&s->reactor);
    rpc_server_fini(base);
    mem_free(s);
}

static const struct rpc_server_ops server_ops = {server_port, server_drain, server_destroy};

enum err rpc_net_server_create(const struct rpc_server_config *config, struct rpc_server **out)
{
    struct server *s;
    TRY(MEM_NEW(&s));
    s->base.ops = &server_ops;
    reactor_init(&s->reactor);
    enum err e = rpc_server_init(&s->base, config);
    if (!e)
        e = wire_server_create(config, s->base.n_calls_max, s->base.message_bytes_max,
                               s->reactor.queue, &s->wire, &s->port);
    if (!e) e = reactor_start(&s->reactor, config->n_threads > 0 ? config->n_threads : 1);
    if (!e) calls_await(s);
    if (e)
        server_destroy(&s->base);
    else
        *out = &s->base;
    return e;
}

/* ---- Channel ---- */

static enum err channel_open(struct rpc_channel *base, const char *path, int timeout_ms,
                             const struct rpc_handler *handler, struct rpc_call **out)
{
    struct channel *ch = (struct channel *)base;
    struct call *c;
    TRY(call_create(&ch->reactor, NULL, ch, &c));
    enum err e = wire_call_open(ch->wire, ch->reactor.queue, path, timeout_ms, c, &c->wire);
    if (e) {
        rpc_release(&c->base);
        return e;
    }
    if (timeout_ms > 0) c->base.deadline_us = clock_monotonic_us() + (int64_t)timeout_ms * 1000;
    c->base.handler = *handler;
    snprintf(c->base.path, sizeof c->base.path, "%s", path);
    snprintf(c->base.peer, sizeof c->base.peer, "%s", base->address);
    alive_add(&ch->reactor, c);
    rpc_acquire(&c->base); /* the caller's */
    *out = &c->base;       /* before the first callback can come */
    pthread_mutex_lock(&c->mutex);
    bool started = wire_close(c->wire);
    ASSERT(started); /* without it the end of the call would never be told */
    c->n_events++;
    c->headers_wanted = true;
    read_start(c);
    kick(c);
    pthread_mutex_unlock(&c->mutex);
    return OK;
}

static void channel_destroy(struct rpc_channel *base)
{
    struct channel *ch = (struct channel *)base;
    if (ch->reactor.n_pollers) {
        alive_cancel(&ch->reactor);
        reactor_wait(&ch->reactor, false, -1);
    }
    if (ch->wire) wire_channel_destroy(ch->wire);
    reactor_stop(&ch->reactor);
    reactor_fini(&ch->reactor);
    rpc_channel_fini(base);
    mem_free(ch);
}

static const struct rpc_channel_ops channel_ops = {channel_open, channel_destroy};

enum err rpc_net_channel_create(const struct rpc_channel_config *config, struct rpc_channel **out)
{
    struct channel *ch;
    TRY(MEM_NEW(&ch));
    ch->base.ops = &channel_ops;
    reactor_init(&ch->reactor);
    enum err e = rpc_channel_init(&ch->base, config);
    if (!e) e = wire_channel_create(config, ch->base.message_bytes_max, &ch->wire);
    if (!e) e = reactor_start(&ch->reactor, 1);
    if (e)
        channel_destroy(&ch->base);
    else
        *out = &ch->base;
    return e;
}
