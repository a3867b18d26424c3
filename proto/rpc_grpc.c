/* rpc_wire.h by the gRPC C core; the only file that includes <grpc/...>. It starts batches, hands
 * out events and owns the core's objects; what a call does next is decided in rpc_net.c. */
#include "base/log.h"
#include "base/mem.h"
#include "proto/inflate.h"
#include "proto/rpc_impl.h"
#include "proto/rpc_wire.h"

#include <grpc/byte_buffer_reader.h>
#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpc/support/alloc.h>
#include <grpc/support/log.h>
#include <grpc/support/time.h>
#include <stdio.h>
#include <string.h>

enum { HANDSHAKE_MS = 10000 };

/* The library orders a batch's start before its event, but race detectors cannot see into it: armed
 * says it in their language. */
struct tag {
    enum wire_tag kind;
    void *owner;
    atomic_int armed;
};
struct wire_server {
    grpc_server *server;
    grpc_completion_queue *cq;
    size_t message_bytes_max;
    struct tag shutdown;
};
struct wire_channel {
    grpc_channel *channel;
    size_t message_bytes_max;
};
struct wire_call {
    grpc_call *call;
    bool server;
    struct tag tags[WIRE_CLOSE + 1];
    grpc_byte_buffer *in;
    grpc_slice in_slice; /* the message in one piece, when the buffer is not */
    bool has_in_slice;
    struct buf inflated; /* a compressed message */
    int cancelled;
    grpc_status_code code;
    grpc_slice details;
    grpc_metadata_array initial, trailing; /* initial: the request's on the server */
    grpc_call_details request;
};

/* ---- Library and queue ---- */

static void core_log(gpr_log_func_args *args)
{
    log_line(LOG_DEBUG, "grpc: %s:%d: %s", args->file, args->line, args->message);
}

struct wire_queue *wire_queue_create(void)
{
    gpr_set_log_function(core_log); /* what matters is in the statuses, which we word ourselves */
    grpc_init();
    /* The handle is the queue itself: nothing to allocate, nothing to fail. */
    return (struct wire_queue *)grpc_completion_queue_create_for_next(NULL);
}

static grpc_completion_queue *cq_of(struct wire_queue *q)
{
    return (grpc_completion_queue *)q;
}

void wire_queue_shutdown(struct wire_queue *q)
{
    grpc_completion_queue_shutdown(cq_of(q));
}

bool wire_queue_next(struct wire_queue *q, struct wire_event *out)
{
    grpc_event event =
        grpc_completion_queue_next(cq_of(q), gpr_inf_future(GPR_CLOCK_REALTIME), NULL);
    if (event.type != GRPC_OP_COMPLETE) return false;
    const struct tag *tag = event.tag;
    (void)atomic_load_explicit(&tag->armed, memory_order_acquire);
    *out = (struct wire_event){tag->kind, tag->owner, event.success != 0};
    return true;
}

void wire_queue_destroy(struct wire_queue *q)
{
    grpc_completion_queue_destroy(cq_of(q));
    grpc_shutdown_blocking();
}

static struct tag *arm(struct tag *tag)
{
    atomic_store_explicit(&tag->armed, 1, memory_order_release);
    return tag;
}

static void slice_text(grpc_slice s, char *out, size_t size)
{
    size_t n = GRPC_SLICE_LENGTH(s);
    if (n >= size) n = size - 1;
    memcpy(out, GRPC_SLICE_START_PTR(s), n);
    out[n] = 0;
}

static struct span slice_span(const grpc_slice *s)
{
    return (struct span){(const char *)GRPC_SLICE_START_PTR(*s), GRPC_SLICE_LENGTH(*s)};
}

/* ---- Batches ---- */

static bool batch_start(struct wire_call *c, const grpc_op *ops, size_t n, enum wire_tag kind)
{
    grpc_call_error e = grpc_call_start_batch(c->call, ops, n, arm(&c->tags[kind]), NULL);
    if (e != GRPC_CALL_OK) log_error("rpc: start_batch: %s", grpc_call_error_to_string(e));
    return e == GRPC_CALL_OK;
}

static void bytes_unref(void *bytes)
{
    rpc_bytes_release(bytes);
}

static grpc_byte_buffer *bytes_wrap(struct rpc_bytes *b) /* takes the count over */
{
    grpc_slice slice =
        grpc_slice_new_with_user_data(b->data, b->n, bytes_unref, rpc_bytes_acquire(b));
    grpc_byte_buffer *buffer = grpc_raw_byte_buffer_create(&slice, 1);
    grpc_slice_unref(slice);
    rpc_bytes_release(b);
    return buffer;
}

static void headers_op(grpc_op *op, const char *bearer, grpc_metadata *metadata)
{
    op->op = GRPC_OP_SEND_INITIAL_METADATA;
    if (!bearer) return;
    metadata->key = grpc_slice_from_static_string("authorization");
    metadata->value = grpc_slice_from_copied_string(bearer);
    op->data.send_initial_metadata.count = 1;
    op->data.send_initial_metadata.metadata = metadata;
}

bool wire_send(struct wire_call *c, const struct wire_send *s)
{
    grpc_op ops[3];
    grpc_metadata metadata;
    grpc_byte_buffer *message = s->bytes ? bytes_wrap(s->bytes) : NULL;
    grpc_slice text = grpc_empty_slice();
    size_t n = 0;
    memset(ops, 0, sizeof ops);
    memset(&metadata, 0, sizeof metadata);
    if (s->headers) headers_op(&ops[n++], s->bearer, &metadata);
    if (message) {
        ops[n].op = GRPC_OP_SEND_MESSAGE;
        ops[n++].data.send_message.send_message = message;
    }
    if (s->end && c->server) {
        text = grpc_slice_from_copied_string(s->text);
        ops[n].op = GRPC_OP_SEND_STATUS_FROM_SERVER;
        ops[n].data.send_status_from_server.status = (grpc_status_code)s->code;
        ops[n++].data.send_status_from_server.status_details = &text;
    } else if (s->end) {
        ops[n++].op = GRPC_OP_SEND_CLOSE_FROM_CLIENT;
    }
    bool started = batch_start(c, ops, n, WIRE_SEND);
    if (s->headers && s->bearer) grpc_slice_unref(metadata.value);
    if (message) grpc_byte_buffer_destroy(message); /* the core holds the slices */
    grpc_slice_unref(text);
    return started;
}

bool wire_recv(struct wire_call *c)
{
    grpc_op op;
    memset(&op, 0, sizeof op);
    op.op = GRPC_OP_RECV_MESSAGE;
    op.data.recv_message.recv_message = &c->in;
    return batch_start(c, &op, 1, WIRE_RECV);
}

bool wire_close(struct wire_call *c)
{
    grpc_op ops[2];
    memset(ops, 0, sizeof ops);
    if (c->server) {
        ops[0].op = GRPC_OP_RECV_CLOSE_ON_SERVER;
        ops[0].data.recv_close_on_server.cancelled = &c->cancelled;
        return batch_start(c, ops, 1, WIRE_CLOSE);
    }
    ops[0].op = GRPC_OP_RECV_INITIAL_METADATA;
    ops[0].data.recv_initial_metadata.recv_initial_metadata = &c->initial;
    ops[1].op = GRPC_OP_RECV_STATUS_ON_CLIENT;
    ops[1].data.recv_status_on_client.trailing_metadata = &c->trailing;
    ops[1].data.recv_status_on_client.status = &c->code;
    ops[1].data.recv_status_on_client.status_details = &c->details;
    return batch_start(c, ops, 2, WIRE_CLOSE);
}

void wire_cancel(struct wire_call *c)
{
    grpc_call_cancel_with_status(c->call, GRPC_STATUS_CANCELLED, "cancelled by the peer", NULL);
}

/* ---- What a call has heard ---- */

enum err wire_message(struct wire_call *c, struct span *out)
{
    grpc_byte_buffer_reader reader;
    *out = (struct span){NULL, 0};
    if (!c->in) return OK;
    grpc_slice_buffer *slices = &c->in->data.raw.slice_buffer;
    grpc_compression_algorithm compression = c->in->data.raw.compression;
    if (slices->count <= 1) {
        *out = slices->count ? slice_span(&slices->slices[0]) : (struct span){"", 0};
    } else {
        c->in->data.raw.compression = GRPC_COMPRESS_NONE; /* join the pieces as they are */
        if (!grpc_byte_buffer_reader_init(&reader, c->in))
            FAIL(ERR_FORMAT, "an unreadable message");
        c->in_slice = grpc_byte_buffer_reader_readall(&reader);
        c->has_in_slice = true;
        grpc_byte_buffer_reader_destroy(&reader);
        *out = slice_span(&c->in_slice);
    }
    if (compression == GRPC_COMPRESS_NONE) return OK;
    TRY(inflate_bounded(*out, &c->inflated));
    *out = (struct span){buf_string(&c->inflated), c->inflated.n};
    return OK;
}

void wire_message_free(struct wire_call *c)
{
    if (c->has_in_slice) grpc_slice_unref(c->in_slice);
    if (c->in) grpc_byte_buffer_destroy(c->in);
    buf_fini(&c->inflated);
    c->has_in_slice = false;
    c->in = NULL;
}

bool wire_cancelled(const struct wire_call *c)
{
    return c->cancelled != 0;
}

void wire_status(const struct wire_call *c, int *out_code, char *text, size_t size)
{
    *out_code = (int)c->code;
    slice_text(c->details, text, size);
}

void wire_path(const struct wire_call *c, char *out, size_t size)
{
    slice_text(c->request.method, out, size);
}

void wire_peer(const struct wire_call *c, char *out, size_t size)
{
    char *peer = grpc_call_get_peer(c->call);
    snprintf(out, size, "%s", peer ? peer : "");
    gpr_free(peer);
}

void wire_peer_name(const struct wire_call *c, char *out, size_t size)
{
    grpc_auth_context *auth = grpc_call_auth_context(c->call);
    *out = 0;
    if (!auth) return;
    if (grpc_auth_context_peer_is_authenticated(auth)) {
        grpc_auth_property_iterator it = grpc_auth_context_peer_identity(auth);
        const grpc_auth_property *p = grpc_auth_property_iterator_next(&it);
        if (p) snprintf(out, size, "%.*s", (int)p->value_length, p->value);
    }
    grpc_auth_context_release(auth);
}

struct span wire_metadata(const struct wire_call *c, const char *key)
{
    for (size_t i = 0; c->server && i < c->initial.count; i++)
        if (span_equal(slice_span(&c->initial.metadata[i].key), key))
            return slice_span(&c->initial.metadata[i].value);
    return (struct span){NULL, 0};
}

int64_t wire_time_left_us(const struct wire_call *c)
{
    gpr_timespec deadline = c->request.deadline;
    if (!gpr_time_cmp(deadline, gpr_inf_future(deadline.clock_type))) return INT64_MAX;
    gpr_timespec left = gpr_time_sub(gpr_convert_clock_type(deadline, GPR_CLOCK_MONOTONIC),
                                     gpr_now(GPR_CLOCK_MONOTONIC));
    double us = (double)left.tv_sec * 1e6 + left.tv_nsec / 1e3;
    return us < 1e15 ? (int64_t)us : INT64_MAX;
}

/* ---- Calls ---- */

static enum err call_create(bool server, size_t message_bytes_max, void *owner,
                            struct wire_call **out)
{
    struct wire_call *c;
    TRY(MEM_NEW(&c));
    c->server = server;
    buf_init(&c->inflated, message_bytes_max);
    for (int kind = 0; kind <= WIRE_CLOSE; kind++)
        c->tags[kind].kind = (enum wire_tag)kind, c->tags[kind].owner = owner;
    c->details = grpc_empty_slice();
    grpc_metadata_array_init(&c->initial);
    grpc_metadata_array_init(&c->trailing);
    if (server) grpc_call_details_init(&c->request);
    *out = c;
    return OK;
}

void wire_call_destroy(struct wire_call *c)
{
    if (!c) return;
    wire_message_free(c);
    grpc_metadata_array_destroy(&c->initial);
    grpc_metadata_array_destroy(&c->trailing);
    grpc_slice_unref(c->details);
    if (c->server) grpc_call_details_destroy(&c->request);
    if (c->call) grpc_call_unref(c->call);
    mem_free(c);
}

enum err wire_call_request(struct wire_server *s, struct wire_queue *q, void *owner,
                           struct wire_call **out)
{
    struct wire_call *c;
    TRY(call_create(true, s->message_bytes_max, owner, &c));
    *out = c; /* before the event can come */
    grpc_call_error e = grpc_server_request_call(s->server, &c->call, &c->request, &c->initial,
                                                 cq_of(q), cq_of(q), arm(&c->tags[WIRE_NEW]));
    if (e == GRPC_CALL_OK) return OK;
    *out = NULL;
    wire_call_destroy(c);
    FAIL(ERR_PEER, "the server takes no more calls");
}

enum err wire_call_open(struct wire_channel *ch, struct wire_queue *q, const char *path,
                        int timeout_ms, void *owner, struct wire_call **out)
{
    struct wire_call *c;
    TRY(call_create(false, ch->message_bytes_max, owner, &c));
    gpr_timespec deadline = gpr_inf_future(GPR_CLOCK_MONOTONIC);
    if (timeout_ms > 0)
        deadline = gpr_time_add(gpr_now(GPR_CLOCK_MONOTONIC),
                                gpr_time_from_millis(timeout_ms, GPR_TIMESPAN));
    grpc_slice method = grpc_slice_from_copied_string(path);
    c->call = grpc_channel_create_call(ch->channel, NULL, GRPC_PROPAGATE_DEFAULTS, cq_of(q), method,
                                       NULL, deadline, NULL);
    grpc_slice_unref(method);
    *out = c;
    return OK;
}

/* ---- Credentials and options ---- */

struct pem {
    struct buf ca, cert, key;
};

static enum err pem_read(struct buf *b, const char *path)
{
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
    if (!tls->cert_file != !tls->key_file)
        FAIL(ERR_INVALID, "TLS needs a certificate and its key, not one of them");
    TRY(pem_read(&p->ca, tls->ca_file));
    TRY(pem_read(&p->cert, tls->cert_file));
    return pem_read(&p->key, tls->key_file);
}

static bool is_plain(const struct rpc_tls *tls)
{
    return !tls->cert_file && !tls->ca_file && !tls->key_file;
}

static enum err server_credentials(const struct rpc_tls *tls, grpc_server_credentials **out)
{
    struct pem pem = {0};
    grpc_ssl_client_certificate_request_type demand =
        tls->ca_file ? GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY
                     : GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE;
    if (is_plain(tls)) {
        *out = grpc_insecure_server_credentials_create();
        return OK;
    }
    if (!tls->cert_file) FAIL(ERR_INVALID, "a TLS server needs a certificate and its key");
    enum err e = pem_load(tls, &pem);
    grpc_ssl_pem_key_cert_pair pair = {buf_string(&pem.key), buf_string(&pem.cert)};
    if (!e)
        *out = grpc_ssl_server_credentials_create_ex(tls->ca_file ? buf_string(&pem.ca) : NULL,
                                                     &pair, 1, demand, NULL);
    pem_fini(&pem);
    return e;
}

static enum err channel_credentials(const struct rpc_tls *tls, grpc_channel_credentials **out)
{
    struct pem pem = {0};
    if (is_plain(tls)) {
        *out = grpc_insecure_credentials_create();
        return OK;
    }
    if (!tls->ca_file) FAIL(ERR_INVALID, "a TLS client needs the certificate authority's file");
    enum err e = pem_load(tls, &pem);
    grpc_ssl_pem_key_cert_pair pair = {buf_string(&pem.key), buf_string(&pem.cert)};
    if (!e)
        *out = grpc_ssl_credentials_create(buf_string(&pem.ca), tls->cert_file ? &pair : NULL, NULL,
                                           NULL);
    pem_fini(&pem);
    return e;
}

static grpc_arg option(const char *key, int value)
{
    grpc_arg a = {.type = GRPC_ARG_INTEGER, .key = (char *)(uintptr_t)key};
    a.value.integer = value;
    return a;
}

enum { COMMON_OPTIONS = 8 };
/* Losing a peer quickly is the heartbeats' work, so keepalive is unhurried: a second kills slow
 * ones. */
static size_t common_options(grpc_arg *a, size_t message_bytes_max)
{
    size_t n = 0;
    a[n++] = option(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, (int)message_bytes_max);
    a[n++] = option(GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, -1); /* bounded by rpc.c */
    /* The library would inflate a message of any size before it looks at the limit. */
    a[n++] = option(GRPC_ARG_ENABLE_PER_MESSAGE_DECOMPRESSION, 0);
    a[n++] = option(GRPC_ARG_KEEPALIVE_TIME_MS, 10000);
    a[n++] = option(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 5000);
    a[n++] = option(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
    a[n++] = option(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
    a[n++] = option(GRPC_ARG_ENABLE_RETRIES, 0);
    return n;
}

/* ---- Server ---- */

enum err wire_server_create(const struct rpc_server_config *config, uint32_t n_calls_max,
                            size_t message_bytes_max, struct wire_queue *q,
                            struct wire_server **out, int *out_port)
{
    struct wire_server *s;
    grpc_server_credentials *credentials = NULL;
    TRY(server_credentials(&config->tls, &credentials));
    enum err e = MEM_NEW(&s);
    if (e) goto out;
    grpc_arg a[COMMON_OPTIONS + 4];
    size_t n = common_options(a, message_bytes_max);
    a[n++] =
        option(GRPC_ARG_ALLOW_REUSEPORT, 0); /* else a second process binds the port silently */
    a[n++] = option(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 500);
    a[n++] = option(GRPC_ARG_MAX_CONCURRENT_STREAMS, (int)n_calls_max);
    a[n++] = option("grpc.server_handshake_timeout_ms", HANDSHAKE_MS); /* silent connections end */
    grpc_channel_args options = {n, a};
    s->server = grpc_server_create(&options, NULL);
    s->cq = cq_of(q);
    s->message_bytes_max = message_bytes_max;
    grpc_server_register_completion_queue(s->server, cq_of(q), NULL);
    int port =
        credentials ? grpc_server_add_http2_port(s->server, config->address, credentials) : 0;
    if (!port) {
        e = err_set(ERR_IO,
                    "cannot listen on %s: taken, not an address of this machine, or bad TLS files",
                    config->address);
        wire_server_destroy(s);
        goto out;
    }
    grpc_server_start(s->server);
    *out = s;
    *out_port = strncmp(config->address, "unix", 4) ? port : 0;
out:
    if (credentials) grpc_server_credentials_release(credentials);
    return e;
}

void wire_server_shutdown(struct wire_server *s, void *owner)
{
    s->shutdown.kind = WIRE_SHUTDOWN;
    s->shutdown.owner = owner;
    grpc_server_shutdown_and_notify(s->server, s->cq, arm(&s->shutdown));
}

void wire_server_cancel(struct wire_server *s)
{
    grpc_server_cancel_all_calls(s->server);
}

void wire_server_destroy(struct wire_server *s)
{
    grpc_server_destroy(s->server);
    mem_free(s);
}

/* ---- Channel ---- */

enum err wire_channel_create(const struct rpc_channel_config *config, size_t message_bytes_max,
                             struct wire_channel **out)
{
    struct wire_channel *ch;
    grpc_channel_credentials *credentials = NULL;
    TRY(channel_credentials(&config->tls, &credentials));
    if (!credentials) FAIL(ERR_INVALID, "the TLS files for %s are not usable", config->address);
    enum err e = MEM_NEW(&ch);
    if (e) goto out;
    grpc_arg a[COMMON_OPTIONS + 6];
    size_t n = common_options(a, message_bytes_max);
    a[n++] = option(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
    a[n++] = option(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
    a[n++] = option(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
    a[n++] = option(GRPC_ARG_DNS_MIN_TIME_BETWEEN_RESOLUTIONS_MS, 1000);
    a[n++] = option(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1); /* a connection of its own */
    if (config->tls.name_override) {
        a[n] = (grpc_arg){.type = GRPC_ARG_STRING,
                          .key = (char *)(uintptr_t)GRPC_SSL_TARGET_NAME_OVERRIDE_ARG};
        a[n++].value.string = (char *)(uintptr_t)config->tls.name_override;
    }
    grpc_channel_args options = {n, a};
    ch->message_bytes_max = message_bytes_max;
    ch->channel = grpc_channel_create(config->address, credentials, &options);
    *out = ch;
out:
    grpc_channel_credentials_release(credentials);
    return e;
}

void wire_channel_destroy(struct wire_channel *ch)
{
    grpc_channel_destroy(ch->channel);
    mem_free(ch);
}
