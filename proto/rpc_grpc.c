/* rpc.h over the gRPC C core; the only file that includes <grpc/...>.
 *
 * The idea: polling threads take events from a completion queue and call the callbacks, nothing
 * else. A thread that polls must never start a send: the queue hands out events that are ready
 * without reading the socket, so a handler that feeds itself would never hear a cancel. Sends are
 * started by whoever calls rpc_send, or by the posting thread when that is a polling thread or when
 * the one send in flight (the core allows no second on a call) has just ended.
 *
 * A call's state is guarded by its mutex; its callbacks are serial because the next read starts
 * after on_message returned, and the end is told when no read is in flight. */
#include "proto/rpc_impl.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/mem.h"

#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/support/alloc.h>
#include <grpc/support/log.h>
#include <grpc/support/time.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

enum { POLLERS_MAX = 16, WAITING_CALLS = 16, DRAIN_MS = 100, HANDSHAKE_MS = 10000 };

enum tag_kind { TAG_NEW, TAG_RECV, TAG_SEND, TAG_CLOSE };
struct gcall;
struct tag {
    enum tag_kind kind;
    struct gcall *call;
};

/* A completion queue with its threads. */
struct reactor {
    grpc_completion_queue *cq;
    pthread_t pollers[POLLERS_MAX], poster;
    int n_pollers;
    bool has_poster;
    pthread_mutex_t mutex; /* of what follows */
    pthread_cond_t work, quiet;
    struct gcall *post_head, *post_tail;
    struct gcall *alive; /* whose grpc_call lives */
    int n_calls;
    bool stop, shut; /* shut: the server's shutdown tag came */
};

struct gserver {
    struct rpc_server base;
    struct reactor reactor;
    grpc_server *server;
    struct tag shutdown_tag;
    int port;
    bool draining;
};

struct gchannel {
    struct rpc_channel base;
    struct reactor reactor;
    grpc_channel *channel;
};

struct gcall {
    struct rpc_call base;
    struct reactor *reactor;
    struct gserver *server; /* NULL on the client */
    struct gchannel *channel;
    struct tag tags[TAG_CLOSE + 1];
    pthread_mutex_t mutex; /* of what follows */
    grpc_call *call;       /* NULL once retired */
    int n_tags;            /* in flight, and handlers now running */
    struct rpc_fifo out;
    bool sending, initial_wanted, initial_sent, end_wanted, end_sent, over;
    int end_code;
    char end_text[RPC_STATUS_TEXT_MAX];
    bool posted; /* in the poster's list, which holds a count */
    struct gcall *post_next;
    struct gcall *alive_next, **alive_link; /* guarded by the reactor's mutex, as is the next */
    bool doomed;
    grpc_byte_buffer *in;
    bool reading, held, read_over, close_seen, close_telling, close_told;
    int cancelled;
    grpc_status_code code;
    grpc_slice details;
    grpc_metadata_array initial, trailing; /* initial: the request's on the server */
    grpc_call_details request;
};

static _Thread_local bool is_poller;
static const struct rpc_call_ops gcall_ops;

/* ---- Library ---- */

static void core_log(gpr_log_func_args *args)
{
    log_line(LOG_DEBUG, "grpc: %s:%d: %s", args->file, args->line, args->message);
}

static void core_start(void)
{
    gpr_set_log_function(core_log); /* what matters is in the statuses, which we word ourselves */
    grpc_init();
}

static bool slice_equal(grpc_slice s, const char *text)
{
    size_t n = strlen(text);
    return GRPC_SLICE_LENGTH(s) == n && !memcmp(GRPC_SLICE_START_PTR(s), text, n);
}

static void slice_text(grpc_slice s, char *out, size_t size)
{
    size_t n = GRPC_SLICE_LENGTH(s);
    if (n >= size) n = size - 1;
    memcpy(out, GRPC_SLICE_START_PTR(s), n);
    out[n] = 0;
}

/* ---- Sending ---- */

static void bytes_unref(void *bytes) { rpc_bytes_release(bytes); }

static grpc_byte_buffer *bytes_wrap(struct rpc_bytes *b) /* takes the count over */
{
    grpc_slice slice = grpc_slice_new_with_user_data(b->data, b->n, bytes_unref, b);
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    return buffer;
}

static bool batch_start(struct gcall *c, const grpc_op *ops, size_t n, enum tag_kind kind)
{
    grpc_call_error e = grpc_call_start_batch(c->call, ops, n, &c->tags[kind], NULL);
    if (e == GRPC_CALL_OK) {
        c->n_tags++;
        return true;
    }
    log_error("rpc: %s: start_batch: %s", c->base.path, grpc_call_error_to_string(e));
    c->over = true;
    grpc_call_cancel(c->call, NULL);
    return false;
}

/* Starts the next send when none is in flight: what is due of headers, one message and the end. */
static void pump(struct gcall *c)
{
    if (c->sending || c->over || !c->call) return;
    grpc_op ops[3];
    memset(ops, 0, sizeof ops);
    size_t n = 0;
    grpc_metadata bearer;
    grpc_byte_buffer *message = NULL;
    grpc_slice text = grpc_empty_slice();
    bool has_message = c->out.n > 0, ends = c->end_wanted && !c->end_sent && c->out.n <= 1;
    if (!has_message && !ends && (c->initial_sent || !c->initial_wanted)) return;
    memset(&bearer, 0, sizeof bearer);
    if (!c->initial_sent) {
        ops[n].op = GRPC_OP_SEND_INITIAL_METADATA;
        if (c->channel && c->channel->base.bearer) {
            bearer.key = grpc_slice_from_static_string("authorization");
            bearer.value = grpc_slice_from_copied_string(c->channel->base.bearer);
            ops[n].data.send_initial_metadata.count = 1;
            ops[n].data.send_initial_metadata.metadata = &bearer;
        }
        n++;
    }
    if (has_message) {
        message = bytes_wrap(rpc_fifo_pop(&c->out));
        ops[n].op = GRPC_OP_SEND_MESSAGE;
        ops[n++].data.send_message.send_message = message;
    }
    if (ends && c->server) {
        text = grpc_slice_from_copied_string(c->end_text);
        ops[n].op = GRPC_OP_SEND_STATUS_FROM_SERVER;
        ops[n].data.send_status_from_server.status = (grpc_status_code)c->end_code;
        ops[n++].data.send_status_from_server.status_details = &text;
    } else if (ends) {
        ops[n++].op = GRPC_OP_SEND_CLOSE_FROM_CLIENT;
    }
    c->sending = batch_start(c, ops, n, TAG_SEND);
    c->initial_sent = true;
    c->end_sent |= ends;
    if (bearer.value.refcount) grpc_slice_unref(bearer.value);
    if (message) grpc_byte_buffer_destroy(message); /* the core holds the slices */
    grpc_slice_unref(text);
}

static void post(struct gcall *c)
{
    struct reactor *r = c->reactor;
    if (c->posted) return;
    c->posted = true;
    rpc_acquire(&c->base);
    pthread_mutex_lock(&r->mutex);
    c->post_next = NULL;
    if (r->post_tail) r->post_tail->post_next = c;
    else r->post_head = c;
    r->post_tail = c;
    pthread_cond_signal(&r->work);
    pthread_mutex_unlock(&r->mutex);
}

static void kick(struct gcall *c)
{
    if (is_poller) post(c);
    else pump(c);
}

static void *poster_run(void *ctx)
{
    struct reactor *r = ctx;
    pthread_mutex_lock(&r->mutex);
    for (;;) {
        while (!r->post_head && !r->stop) pthread_cond_wait(&r->work, &r->mutex);
        struct gcall *c = r->post_head;
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

static enum err gcall_send(struct rpc_call *call, struct rpc_bytes *bytes)
{
    struct gcall *c = (struct gcall *)call;
    enum err e = ERR_CANCELLED;
    pthread_mutex_lock(&c->mutex);
    if (!c->over && !c->end_wanted) {
        e = rpc_fifo_push(&c->out, bytes);
        if (!e && !c->sending) kick(c);
    }
    pthread_mutex_unlock(&c->mutex);
    return e == ERR_CANCELLED ? err_set(e, "%s: the call is over", call->path) : e;
}

static size_t gcall_pending(struct rpc_call *call)
{
    struct gcall *c = (struct gcall *)call;
    pthread_mutex_lock(&c->mutex);
    size_t n = c->out.bytes;
    pthread_mutex_unlock(&c->mutex);
    return n;
}

static void end_want(struct gcall *c, int code, const char *text)
{
    pthread_mutex_lock(&c->mutex);
    if (!c->end_wanted && !c->over) {
        c->end_wanted = true;
        c->end_code = code;
        snprintf(c->end_text, sizeof c->end_text, "%s", text);
        if (!c->sending) kick(c);
    }
    pthread_mutex_unlock(&c->mutex);
}

static void gcall_half_close(struct rpc_call *call)
{
    if (!((struct gcall *)call)->server) end_want((struct gcall *)call, RPC_OK, "");
}

static void gcall_finish(struct rpc_call *call, int code, const char *text)
{
    if (((struct gcall *)call)->server) end_want((struct gcall *)call, code, text);
}

static void gcall_cancel(struct rpc_call *call)
{
    struct gcall *c = (struct gcall *)call;
    pthread_mutex_lock(&c->mutex);
    if (c->call && !c->close_seen) {
        c->over = true;
        rpc_fifo_fini(&c->out);
        grpc_call_cancel_with_status(c->call, GRPC_STATUS_CANCELLED, "cancelled by the peer", NULL);
    }
    pthread_mutex_unlock(&c->mutex);
}

/* ---- Receiving ---- */

static void read_start(struct gcall *c) /* locked */
{
    grpc_op op;
    if (c->reading || c->held || c->read_over || c->close_seen || !c->call) return;
    memset(&op, 0, sizeof op);
    op.op = GRPC_OP_RECV_MESSAGE;
    op.data.recv_message.recv_message = &c->in;
    c->reading = batch_start(c, &op, 1, TAG_RECV);
}

static void gcall_hold(struct rpc_call *call, bool on)
{
    struct gcall *c = (struct gcall *)call;
    pthread_mutex_lock(&c->mutex);
    c->held = on;
    if (!on) read_start(c);
    pthread_mutex_unlock(&c->mutex);
}

static void message_tell(struct gcall *c, struct span bytes)
{
    const struct rpc_method *m = c->base.method;
    if (c->server && m && m->on_message) m->on_message(&c->base, m->ctx, bytes);
    if (!c->server && c->base.handler.on_message)
        c->base.handler.on_message(&c->base, c->base.handler.ctx, bytes);
}

static void message_deliver(struct gcall *c, grpc_byte_buffer *buffer)
{
    grpc_slice_buffer *slices = &buffer->data.raw.slice_buffer;
    if (buffer->data.raw.compression == GRPC_COMPRESS_NONE && slices->count <= 1) {
        struct span empty = {"", 0};
        if (!slices->count) message_tell(c, empty);
        else message_tell(c, (struct span){(const char *)GRPC_SLICE_START_PTR(slices->slices[0]), GRPC_SLICE_LENGTH(slices->slices[0])});
        return;
    }
    grpc_byte_buffer_reader reader;
    if (!grpc_byte_buffer_reader_init(&reader, buffer)) return;
    grpc_slice all = grpc_byte_buffer_reader_readall(&reader);
    message_tell(c, (struct span){(const char *)GRPC_SLICE_START_PTR(all), GRPC_SLICE_LENGTH(all)});
    grpc_slice_unref(all);
    grpc_byte_buffer_reader_destroy(&reader);
}

/* No message: the client said no more, or the call is dying, which the close tag will say. */
static void half_close_tell(struct gcall *c)
{
    const struct rpc_method *m = c->base.method;
    if (!c->server || !m) return;
    if (m->kind != RPC_BIDI) gcall_finish(&c->base, RPC_INVALID_ARGUMENT, "the request has no message");
    else if (m->on_half_close) m->on_half_close(&c->base, m->ctx);
    else gcall_finish(&c->base, RPC_OK, "");
}

static void on_recv(struct gcall *c, bool ok)
{
    grpc_byte_buffer *buffer = c->in;
    c->in = NULL;
    pthread_mutex_lock(&c->mutex);
    bool dead = c->close_seen && c->server && c->cancelled;
    pthread_mutex_unlock(&c->mutex);
    bool got = ok && buffer;
    if (got && !dead) message_deliver(c, buffer);
    else if (!got && !dead) half_close_tell(c);
    if (buffer) grpc_byte_buffer_destroy(buffer);
    pthread_mutex_lock(&c->mutex);
    c->reading = false;
    if (!got || (c->server && c->base.method->kind != RPC_BIDI)) c->read_over = true;
    read_start(c);
    pthread_mutex_unlock(&c->mutex);
}

static void on_send(struct gcall *c, bool ok)
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

static void on_close(struct gcall *c)
{
    pthread_mutex_lock(&c->mutex);
    c->close_seen = c->over = true;
    rpc_fifo_fini(&c->out);
    pthread_mutex_unlock(&c->mutex);
}

static void close_tell(struct gcall *c)
{
    const struct rpc_method *m = c->base.method;
    if (c->server && m && m->on_close) m->on_close(&c->base, m->ctx, c->cancelled != 0);
    if (!c->server && c->base.handler.on_end) {
        char text[RPC_STATUS_TEXT_MAX];
        slice_text(c->details, text, sizeof text);
        c->base.handler.on_end(&c->base, c->base.handler.ctx, (int)c->code, text);
    }
}

/* ---- Life of a call ---- */

static void core_free(struct gcall *c)
{
    grpc_metadata_array_destroy(&c->initial);
    grpc_metadata_array_destroy(&c->trailing);
    grpc_slice_unref(c->details);
    if (c->server) grpc_call_details_destroy(&c->request);
    if (c->call) grpc_call_unref(c->call);
    c->call = NULL;
}

static void gcall_free(struct rpc_call *call)
{
    struct gcall *c = (struct gcall *)call;
    rpc_fifo_fini(&c->out);
    pthread_mutex_destroy(&c->mutex);
    mem_free(c);
}

static void retire(struct gcall *c) /* everything of the core is given back; handles may remain */
{
    struct reactor *r = c->reactor;
    pthread_mutex_lock(&r->mutex);
    *c->alive_link = c->alive_next;
    if (c->alive_next) c->alive_next->alive_link = c->alive_link;
    pthread_mutex_unlock(&r->mutex);
    pthread_mutex_lock(&c->mutex);
    core_free(c);
    pthread_mutex_unlock(&c->mutex);
    if (c->server) rpc_server_leave(&c->server->base);
    rpc_release(&c->base);
    pthread_mutex_lock(&r->mutex);
    if (--r->n_calls == 0) pthread_cond_broadcast(&r->quiet);
    pthread_mutex_unlock(&r->mutex);
}

static void alive_add(struct reactor *r, struct gcall *c)
{
    pthread_mutex_lock(&r->mutex);
    c->alive_next = r->alive;
    if (r->alive) r->alive->alive_link = &c->alive_next;
    c->alive_link = &r->alive;
    r->alive = c;
    r->n_calls++;
    pthread_mutex_unlock(&r->mutex);
}

/* Destroying a channel leaves its calls alive in the core, so they are ended one by one. */
static void alive_cancel(struct reactor *r)
{
    for (;;) {
        pthread_mutex_lock(&r->mutex);
        struct gcall *c = r->alive;
        while (c && c->doomed) c = c->alive_next;
        if (c) c->doomed = true, rpc_acquire(&c->base);
        pthread_mutex_unlock(&r->mutex);
        if (!c) return;
        rpc_cancel(&c->base);
        rpc_release(&c->base);
    }
}

/* After a tag was handled: tells the end when nothing else is running, retires after the last tag. */
static void tag_done(struct gcall *c)
{
    pthread_mutex_lock(&c->mutex);
    bool tell = c->close_seen && !c->reading && !c->close_telling;
    if (tell) c->close_telling = true;
    pthread_mutex_unlock(&c->mutex);
    if (tell) close_tell(c);
    pthread_mutex_lock(&c->mutex);
    c->close_told |= tell;
    bool last = --c->n_tags == 0 && c->close_told;
    pthread_mutex_unlock(&c->mutex);
    if (last) retire(c);
}

static enum err gcall_create(struct reactor *r, struct gserver *server, struct gchannel *channel, struct gcall **out)
{
    struct gcall *c;
    TRY(MEM_NEW(&c));
    c->base.ops = &gcall_ops;
    atomic_init(&c->base.refs, 1); /* of the core, until it retires */
    c->base.deadline_us = INT64_MAX;
    c->reactor = r;
    c->server = server;
    c->channel = channel;
    c->out.limit = channel ? channel->base.send_bytes_max : RPC_SEND_BYTES_MAX;
    for (int kind = 0; kind <= TAG_CLOSE; kind++) c->tags[kind] = (struct tag){(enum tag_kind)kind, c};
    c->details = grpc_empty_slice();
    grpc_metadata_array_init(&c->initial);
    grpc_metadata_array_init(&c->trailing);
    if (server) grpc_call_details_init(&c->request);
    pthread_mutex_init(&c->mutex, NULL);
    *out = c;
    return OK;
}

static struct span gcall_metadata(const struct rpc_call *call, const char *key)
{
    const struct gcall *c = (const struct gcall *)call;
    for (size_t i = 0; c->server && c->call && i < c->initial.count; i++)
        if (slice_equal(c->initial.metadata[i].key, key)) {
            const grpc_slice *value = &c->initial.metadata[i].value;
            return (struct span){(const char *)GRPC_SLICE_START_PTR(*value), GRPC_SLICE_LENGTH(*value)};
        }
    return (struct span){NULL, 0};
}

static const struct rpc_call_ops gcall_ops = {.send = gcall_send,
                                              .pending = gcall_pending,
                                              .half_close = gcall_half_close,
                                              .finish = gcall_finish,
                                              .cancel = gcall_cancel,
                                              .hold = gcall_hold,
                                              .metadata = gcall_metadata,
                                              .free = gcall_free};

/* ---- Server ---- */

static void call_wait(struct gserver *s) /* asks the core for one more call */
{
    struct gcall *c;
    if (gcall_create(&s->reactor, s, NULL, &c)) {
        log_error("rpc: %s: no memory for another call", s->base.address);
        return;
    }
    c->n_tags = 1;
    grpc_call_error e = grpc_server_request_call(s->server, &c->call, &c->request, &c->initial, s->reactor.cq,
                                                 s->reactor.cq, &c->tags[TAG_NEW]);
    if (e == GRPC_CALL_OK) return;
    core_free(c);
    rpc_release(&c->base);
}

static void peer_note(struct gcall *c)
{
    char *peer = grpc_call_get_peer(c->call);
    snprintf(c->base.peer, sizeof c->base.peer, "%s", peer ? peer : "");
    gpr_free(peer);
    grpc_auth_context *auth = grpc_call_auth_context(c->call);
    if (!auth) return;
    if (grpc_auth_context_peer_is_authenticated(auth)) {
        grpc_auth_property_iterator it = grpc_auth_context_peer_identity(auth);
        const grpc_auth_property *p = grpc_auth_property_iterator_next(&it);
        if (p) snprintf(c->base.peer_name, sizeof c->base.peer_name, "%.*s", (int)p->value_length, p->value);
    }
    grpc_auth_context_release(auth);
}

static void deadline_note(struct gcall *c)
{
    if (gpr_time_cmp(c->request.deadline, gpr_inf_future(c->request.deadline.clock_type)) == 0) return;
    gpr_timespec left = gpr_time_sub(gpr_convert_clock_type(c->request.deadline, GPR_CLOCK_MONOTONIC), gpr_now(GPR_CLOCK_MONOTONIC));
    double us = (double)left.tv_sec * 1e6 + left.tv_nsec / 1e3;
    if (us < 1e15) c->base.deadline_us = clock_monotonic_us() + (int64_t)us;
}

static void on_new(struct gcall *c)
{
    struct gserver *s = c->server;
    int code;
    const char *text;
    call_wait(s);
    alive_add(&s->reactor, c);
    slice_text(c->request.method, c->base.path, sizeof c->base.path);
    peer_note(c);
    deadline_note(c);
    struct span authorization = gcall_metadata(&c->base, "authorization");
    c->base.method = rpc_server_admit(&s->base, c->base.path, authorization, &code, &text);
    const struct rpc_method *m = c->base.method;
    if (m && m->send_bytes_max) c->out.limit = m->send_bytes_max;
    if (m && m->on_open) m->on_open(&c->base, m->ctx);
    pthread_mutex_lock(&c->mutex);
    grpc_op op;
    memset(&op, 0, sizeof op);
    op.op = GRPC_OP_RECV_CLOSE_ON_SERVER;
    op.data.recv_close_on_server.cancelled = &c->cancelled;
    batch_start(c, &op, 1, TAG_CLOSE);
    c->initial_wanted = m && m->kind != RPC_UNARY;
    c->read_over = !m;
    read_start(c);
    if (c->initial_wanted) kick(c);
    pthread_mutex_unlock(&c->mutex);
    if (!m) gcall_finish(&c->base, code, text);
}

static void event_handle(struct reactor *r, const grpc_event *event)
{
    struct tag *tag = event->tag;
    struct gcall *c = tag->call;
    if (!c) {
        pthread_mutex_lock(&r->mutex);
        r->shut = true;
        pthread_cond_broadcast(&r->quiet);
        pthread_mutex_unlock(&r->mutex);
        return;
    }
    if (tag->kind == TAG_NEW && !event->success) { /* the server is shutting down */
        core_free(c);
        rpc_release(&c->base);
        return;
    }
    switch (tag->kind) {
    case TAG_NEW: on_new(c); break;
    case TAG_RECV: on_recv(c, event->success); break;
    case TAG_SEND: on_send(c, event->success); break;
    case TAG_CLOSE: on_close(c); break;
    }
    tag_done(c);
}

static void *poller_run(void *ctx)
{
    struct reactor *r = ctx;
    is_poller = true;
    for (;;) {
        grpc_event event = grpc_completion_queue_next(r->cq, gpr_inf_future(GPR_CLOCK_REALTIME), NULL);
        if (event.type == GRPC_QUEUE_SHUTDOWN) return NULL;
        if (event.type == GRPC_OP_COMPLETE) event_handle(r, &event);
    }
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
    r->cq = grpc_completion_queue_create_for_next(NULL);
}

static enum err reactor_start(struct reactor *r, int n_pollers)
{
    if (pthread_create(&r->poster, NULL, poster_run, r)) FAIL(ERR_NO_MEMORY, "no thread for a server or channel");
    r->has_poster = true;
    for (; r->n_pollers < n_pollers && r->n_pollers < POLLERS_MAX; r->n_pollers++)
        if (pthread_create(&r->pollers[r->n_pollers], NULL, poller_run, r))
            FAIL(ERR_NO_MEMORY, "no thread for a server or channel");
    return OK;
}

static void reactor_fini(struct reactor *r)
{
    if (!r->cq) return;
    grpc_completion_queue_shutdown(r->cq);
    if (!r->n_pollers) poller_run(r);
    for (int i = 0; i < r->n_pollers; i++) pthread_join(r->pollers[i], NULL);
    pthread_mutex_lock(&r->mutex);
    r->stop = true;
    pthread_cond_signal(&r->work);
    pthread_mutex_unlock(&r->mutex);
    if (r->has_poster) pthread_join(r->poster, NULL);
    grpc_completion_queue_destroy(r->cq);
    pthread_cond_destroy(&r->work);
    pthread_cond_destroy(&r->quiet);
    pthread_mutex_destroy(&r->mutex);
}

/* Waits until no call lives and, for a server, its shutdown is complete. timeout_ms -1 = for ever. */
static bool reactor_wait(struct reactor *r, bool server, int timeout_ms)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += timeout_ms / 1000;
    until.tv_nsec += timeout_ms % 1000 * 1000000L;
    if (until.tv_nsec >= 1000000000L) until.tv_sec++, until.tv_nsec -= 1000000000L;
    pthread_mutex_lock(&r->mutex);
    int late = 0;
    while (!late && (r->n_calls || (server && !r->shut)))
        late = timeout_ms < 0 ? pthread_cond_wait(&r->quiet, &r->mutex)
                              : pthread_cond_timedwait(&r->quiet, &r->mutex, &until);
    bool done = !r->n_calls && (!server || r->shut);
    pthread_mutex_unlock(&r->mutex);
    return done;
}

/* ---- Credentials and options ---- */

struct pem {
    struct buf ca, cert, key;
};

static enum err pem_read(struct buf *b, const char *path)
{
    buf_init(b, 0);
    return path ? buf_read_file(b, path, 1 << 20) : OK;
}

static void pem_fini(struct pem *p)
{
    buf_fini(&p->ca);
    buf_fini(&p->cert);
    if (p->key.data) explicit_bzero(p->key.data, p->key.n);
    buf_fini(&p->key);
}

static enum err pem_load(const struct rpc_tls *tls, struct pem *p)
{
    if (!tls->cert_file != !tls->key_file) FAIL(ERR_INVALID, "TLS needs a certificate and its key, not one of them");
    TRY(pem_read(&p->ca, tls->ca_file));
    TRY(pem_read(&p->cert, tls->cert_file));
    return pem_read(&p->key, tls->key_file);
}

static enum err server_credentials(const struct rpc_tls *tls, grpc_server_credentials **out)
{
    struct pem pem = {0};
    enum err e = OK;
    if (!tls->cert_file && !tls->ca_file && !tls->key_file) {
        *out = grpc_insecure_server_credentials_create();
        return OK;
    }
    if (!tls->cert_file) FAIL(ERR_INVALID, "a TLS server needs a certificate and its key");
    TRY_OUT(pem_load(tls, &pem));
    grpc_ssl_pem_key_cert_pair pair = {buf_string(&pem.key), buf_string(&pem.cert)};
    *out = grpc_ssl_server_credentials_create_ex(
        tls->ca_file ? buf_string(&pem.ca) : NULL, &pair, 1,
        tls->ca_file ? GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY
                     : GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE, NULL);
out:
    pem_fini(&pem);
    return e;
}

static enum err channel_credentials(const struct rpc_tls *tls, grpc_channel_credentials **out)
{
    struct pem pem = {0};
    enum err e = OK;
    if (!tls->cert_file && !tls->ca_file && !tls->key_file) {
        *out = grpc_insecure_credentials_create();
        return OK;
    }
    if (!tls->ca_file) FAIL(ERR_INVALID, "a TLS client needs the certificate authority's file");
    TRY_OUT(pem_load(tls, &pem));
    grpc_ssl_pem_key_cert_pair pair = {buf_string(&pem.key), buf_string(&pem.cert)};
    *out = grpc_ssl_credentials_create(buf_string(&pem.ca), tls->cert_file ? &pair : NULL, NULL, NULL);
out:
    pem_fini(&pem);
    return e;
}

static grpc_arg option(const char *key, int value)
{
    grpc_arg a = {.type = GRPC_ARG_INTEGER, .key = (char *)(uintptr_t)key};
    a.value.integer = value;
    return a;
}

enum { COMMON_OPTIONS = 7 };
/* Losing a peer quickly is the heartbeats' work, so keepalive is unhurried: a second kills slow ones. */
static size_t common_options(grpc_arg *a, size_t message_bytes_max)
{
    size_t n = 0;
    a[n++] = option(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, (int)message_bytes_max);
    a[n++] = option(GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, -1); /* bounded by us */
    a[n++] = option(GRPC_ARG_KEEPALIVE_TIME_MS, 10000);
    a[n++] = option(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 5000);
    a[n++] = option(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
    a[n++] = option(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
    a[n++] = option(GRPC_ARG_ENABLE_RETRIES, 0);
    return n;
}

/* ---- Server: create, drain, destroy ---- */

static int gserver_port(const struct rpc_server *s) { return ((const struct gserver *)s)->port; }

static bool gserver_drain(struct rpc_server *base, int timeout_ms)
{
    struct gserver *s = (struct gserver *)base;
    if (!s->draining) grpc_server_shutdown_and_notify(s->server, s->reactor.cq, &s->shutdown_tag);
    s->draining = true;
    return reactor_wait(&s->reactor, true, timeout_ms);
}

static void gserver_destroy(struct rpc_server *base)
{
    struct gserver *s = (struct gserver *)base;
    if (s->server && s->reactor.n_pollers && !gserver_drain(base, 0)) {
        grpc_server_cancel_all_calls(s->server);
        reactor_wait(&s->reactor, true, -1);
    }
    reactor_fini(&s->reactor);
    if (s->server) grpc_server_destroy(s->server);
    rpc_server_fini(base);
    mem_free(s);
    grpc_shutdown_blocking();
}

static const struct rpc_server_ops gserver_ops = {gserver_port, gserver_drain, gserver_destroy};

enum err rpc_grpc_server_create(const struct rpc_server_config *config, struct rpc_server **out)
{
    struct gserver *s;
    grpc_server_credentials *credentials = NULL;
    TRY(MEM_NEW(&s));
    core_start();
    s->base.ops = &gserver_ops;
    enum err e = rpc_server_init(&s->base, config);
    if (e) goto out;
    TRY_OUT(server_credentials(&config->tls, &credentials));
    grpc_arg a[COMMON_OPTIONS + 4];
    size_t n = common_options(a, s->base.message_bytes_max);
    a[n++] = option(GRPC_ARG_ALLOW_REUSEPORT, 0); /* else a second process binds the port silently */
    a[n++] = option(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 500);
    a[n++] = option(GRPC_ARG_MAX_CONCURRENT_STREAMS, (int)s->base.n_calls_max);
    a[n++] = option("grpc.server_handshake_timeout_ms", HANDSHAKE_MS); /* silent connections end */
    grpc_channel_args options = {n, a};
    s->server = grpc_server_create(&options, NULL);
    reactor_init(&s->reactor);
    grpc_server_register_completion_queue(s->server, s->reactor.cq, NULL);
    s->port = credentials ? grpc_server_add_http2_port(s->server, s->base.address, credentials) : 0;
    if (!s->port) FAIL_OUT(ERR_IO, "cannot listen on %s: taken, not an address of this machine, or bad TLS files", s->base.address);
    if (!strncmp(s->base.address, "unix", 4)) s->port = 0;
    grpc_server_start(s->server);
    TRY_OUT(reactor_start(&s->reactor, config->n_threads > 0 ? config->n_threads : 1));
    for (int i = 0; i < WAITING_CALLS; i++) call_wait(s);
    *out = &s->base;
out:
    if (credentials) grpc_server_credentials_release(credentials);
    if (e) gserver_destroy(&s->base);
    return e;
}

/* ---- Channel ---- */

static enum err gchannel_open(struct rpc_channel *base, const char *path, int timeout_ms,
                              const struct rpc_handler *handler, struct rpc_call **out)
{
    struct gchannel *ch = (struct gchannel *)base;
    struct reactor *r = &ch->reactor;
    struct gcall *c;
    TRY(gcall_create(r, NULL, ch, &c));
    gpr_timespec deadline = gpr_inf_future(GPR_CLOCK_MONOTONIC);
    if (timeout_ms > 0) {
        deadline = gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC), gpr_time_from_millis(timeout_ms, GPR_TIMESPAN));
        c->base.deadline_us = clock_monotonic_us() + (int64_t)timeout_ms * 1000;
    }
    c->base.handler = *handler;
    snprintf(c->base.path, sizeof c->base.path, "%s", path);
    snprintf(c->base.peer, sizeof c->base.peer, "%s", base->address);
    alive_add(r, c);
    rpc_acquire(&c->base); /* the caller's */
    pthread_mutex_lock(&c->mutex);
    grpc_slice method = grpc_slice_from_copied_string(path);
    c->call = grpc_channel_create_call(ch->channel, NULL, GRPC_PROPAGATE_DEFAULTS, r->cq, method, NULL, deadline, NULL);
    grpc_slice_unref(method);
    grpc_op ops[2];
    memset(ops, 0, sizeof ops);
    ops[0].op = GRPC_OP_RECV_INITIAL_METADATA;
    ops[0].data.recv_initial_metadata.recv_initial_metadata = &c->initial;
    ops[1].op = GRPC_OP_RECV_STATUS_ON_CLIENT;
    ops[1].data.recv_status_on_client.trailing_metadata = &c->trailing;
    ops[1].data.recv_status_on_client.status = &c->code;
    ops[1].data.recv_status_on_client.status_details = &c->details;
    *out = &c->base; /* before the first callback can come */
    batch_start(c, ops, 2, TAG_CLOSE);
    read_start(c);
    c->initial_wanted = true;
    kick(c);
    pthread_mutex_unlock(&c->mutex);
    return OK;
}

static void gchannel_destroy(struct rpc_channel *base)
{
    struct gchannel *ch = (struct gchannel *)base;
    if (ch->reactor.n_pollers) {
        alive_cancel(&ch->reactor);
        reactor_wait(&ch->reactor, false, -1);
    }
    if (ch->channel) grpc_channel_destroy(ch->channel);
    reactor_fini(&ch->reactor);
    rpc_channel_fini(base);
    mem_free(ch);
    grpc_shutdown_blocking();
}

static const struct rpc_channel_ops gchannel_ops = {gchannel_open, gchannel_destroy};

enum err rpc_grpc_channel_create(const struct rpc_channel_config *config, struct rpc_channel **out)
{
    struct gchannel *ch;
    grpc_channel_credentials *credentials = NULL;
    TRY(MEM_NEW(&ch));
    core_start();
    ch->base.ops = &gchannel_ops;
    enum err e = rpc_channel_init(&ch->base, config);
    if (e) goto out;
    TRY_OUT(channel_credentials(&config->tls, &credentials));
    if (!credentials) FAIL_OUT(ERR_INVALID, "the TLS files for %s are not usable", config->address);
    grpc_arg a[COMMON_OPTIONS + 6];
    size_t n = common_options(a, ch->base.message_bytes_max);
    a[n++] = option(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
    a[n++] = option(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
    a[n++] = option(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
    a[n++] = option(GRPC_ARG_DNS_MIN_TIME_BETWEEN_RESOLUTIONS_MS, 1000);
    a[n++] = option(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1); /* a connection of its own */
    if (config->tls.name_override) {
        a[n] = (grpc_arg){.type = GRPC_ARG_STRING, .key = (char *)(uintptr_t)GRPC_SSL_TARGET_NAME_OVERRIDE_ARG};
        a[n++].value.string = (char *)(uintptr_t)config->tls.name_override;
    }
    grpc_channel_args options = {n, a};
    ch->channel = grpc_channel_create(config->address, credentials, &options);
    reactor_init(&ch->reactor);
    TRY_OUT(reactor_start(&ch->reactor, 1));
    *out = &ch->base;
out:
    if (credentials) grpc_channel_credentials_release(credentials);
    if (e) gchannel_destroy(&ch->base);
    return e;
}
