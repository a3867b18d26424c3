/* One connection: reads requests one after the other, writes their answers in the same order.
 *
 * While a handler owns the exchange the socket is still read, up to a watermark, so that a client
 * that leaves is noticed at once; bytes of a next request wait in the input buffer. Every state has
 * a deadline of its own, so that a client that drips bytes cannot hold a connection for ever. */
#include "coordinator/front/http_conn.h"
#include "base/clock.h"
#include "base/mem.h"

#include <event2/buffer.h>
#include <event2/bufferevent.h>
#include <event2/bufferevent_ssl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/ssl.h>
#include <string.h>
#include <sys/socket.h>

enum { INPUT_BYTES_MAX = 256 << 10, PIPELINE_OUTPUT_BYTES_MAX = 1 << 20, LINGER_S = 2 };

static void conn_process(struct http_exchange *x);

static struct evbuffer *output_of(const struct http_exchange *x)
{
    return bufferevent_get_output(x->bev);
}

static void deadline_set(struct http_exchange *x, int seconds)
{
    struct timeval tv = {seconds, 0};
    if (seconds)
        evtimer_add(&x->timer, &tv);
    else
        evtimer_del(&x->timer);
}

bool http_conn_is_idle(const struct http_exchange *x)
{
    return x->served && x->state == HTTP_CONN_HEAD &&
           !evbuffer_get_length(bufferevent_get_input(x->bev)) &&
           !evbuffer_get_length(output_of(x));
}

static void report_ended(struct http_exchange *x, int status)
{
    const struct http_callbacks *c = &x->loop->server->callbacks;
    if (c->ended) c->ended(c->ctx, x, status, clock_monotonic_us() - x->begun_us);
}

void http_conn_free(struct http_exchange *x)
{
    if (x->state == HTTP_CONN_BUSY) {
        void (*closed)(void *) = x->closed;
        report_ended(x, 499);
        x->closed = NULL;
        x->state = HTTP_CONN_LINGER;
        if (closed) closed(x->owner);
    }
    if (x->processing) {
        x->drop = true;
        return;
    }
    LIST_REMOVE(x, link);
    evtimer_del(&x->timer);
    SSL *ssl = bufferevent_openssl_get_ssl(x->bev);
    if (ssl) { /* no waiting for the peer's closing words */
        SSL_set_shutdown(ssl, SSL_RECEIVED_SHUTDOWN);
        SSL_shutdown(ssl);
    }
    bufferevent_free(x->bev);
    buf_fini(&x->head_bytes);
    buf_fini(&x->body);
    buf_fini(&x->headers);
    atomic_fetch_sub(&x->loop->server->n_connections, 1);
    mem_free(x);
}

/* Everything was answered: lets the kernel deliver it even though the client may still be sending.
 */
static void conn_linger(struct http_exchange *x)
{
    x->state = HTTP_CONN_LINGER;
    if (!bufferevent_openssl_get_ssl(x->bev)) shutdown(bufferevent_getfd(x->bev), SHUT_WR);
    deadline_set(x, LINGER_S);
}

static void next_request(struct http_exchange *x)
{
    buf_clear(&x->headers);
    if (x->body.capacity > 64 << 10) buf_fini(&x->body);
    buf_clear(&x->body);
    x->status = 0;
    x->scanned = 0;
    x->close_after = false;
    x->closed = NULL;
    x->owner = NULL;
    x->tag = NULL;
    x->name[0] = 0;
    memset(&x->chunks, 0, sizeof x->chunks);
    x->state = HTTP_CONN_HEAD;
    deadline_set(x, x->loop->server->config.idle_timeout_s);
}

/* A request that cannot be read: answered, then the connection ends. */
static void refuse(struct http_exchange *x, enum err e)
{
    const struct http_callbacks *c = &x->loop->server->callbacks;
    char why[256];
    snprintf(why, sizeof why, "%s", err_detail());
    x->state = HTTP_CONN_BUSY;
    x->begun_us = clock_monotonic_us();
    x->close_after = true;
    c->refuse(c->ctx, x, e, why);
    ASSERT(x->state != HTTP_CONN_BUSY);
}

static void dispatch(struct http_exchange *x)
{
    const struct http_callbacks *c = &x->loop->server->callbacks;
    x->state = HTTP_CONN_BUSY;
    x->begun_us = clock_monotonic_us();
    x->close_after = !x->head.keep_alive;
    deadline_set(x, 0);
    c->handle(c->ctx, x);
}

/* Takes what is there of the body. Returns true when the request is whole or was refused. */
static bool body_read(struct http_exchange *x)
{
    struct evbuffer *in = bufferevent_get_input(x->bev);
    size_t limit = x->loop->server->config.body_bytes_max;
    for (;;) {
        size_t n = evbuffer_get_contiguous_space(in), taken = n;
        if (!n) return false;
        const char *data = (const char *)evbuffer_pullup(in, (ev_ssize_t)n);
        enum err e = OK;
        if (x->head.chunked) {
            e = http_chunks_read(&x->chunks, data, n, limit, &x->body, &taken);
        } else {
            size_t left = (size_t)x->head.content_length - x->body.n;
            taken = n < left ? n : left;
            e = buf_add(&x->body, data, taken);
        }
        if (e) {
            refuse(x, e);
            return true;
        }
        evbuffer_drain(in, taken);
        bool whole = x->head.chunked ? x->chunks.state == HTTP_CHUNK_DONE
                                     : x->body.n == (size_t)x->head.content_length;
        if (whole) {
            dispatch(x);
            return true;
        }
    }
}

/* The head is parsed: what follows it? */
static void head_done(struct http_exchange *x)
{
    const struct http_config *config = &x->loop->server->config;
    if (x->head.content_length > 0 && (uint64_t)x->head.content_length > config->body_bytes_max) {
        refuse(x, err_set(ERR_TOO_BIG, "the body is %lld bytes, the limit is %zu",
                          (long long)x->head.content_length, config->body_bytes_max));
        return;
    }
    if (!x->head.chunked && x->head.content_length <= 0) {
        dispatch(x);
        return;
    }
    x->state = HTTP_CONN_BODY;
    deadline_set(x, config->body_timeout_s);
    if (x->head.expect_continue) evbuffer_add(output_of(x), "HTTP/1.1 100 Continue\r\n\r\n", 25);
}

/* Takes the head when it is whole. Returns false when more bytes are needed. */
static bool head_read(struct http_exchange *x)
{
    const struct http_config *config = &x->loop->server->config;
    struct evbuffer *in = bufferevent_get_input(x->bev);
    char first[1];
    while (evbuffer_copyout(in, first, 1) == 1 && (*first == '\r' || *first == '\n'))
        evbuffer_drain(in, 1); /* RFC 9112 2.2: an empty line before a request is skipped */
    size_t n = evbuffer_get_length(in);
    if (!n) return false;
    if (!x->scanned) deadline_set(x, config->head_timeout_s);
    size_t look = n < config->head_bytes_max ? n : config->head_bytes_max;
    const char *data = (const char *)evbuffer_pullup(in, (ev_ssize_t)look);
    size_t from = x->scanned > 3 ? x->scanned - 3 : 0;
    size_t length = http_head_length(data + from, look - from);
    if (!length) {
        x->scanned = look;
        if (look < config->head_bytes_max) return false;
        memset(&x->head, 0, sizeof x->head);
        refuse(x, err_set(ERR_TOO_BIG, "the headers are longer than %zu bytes", look));
        return true;
    }
    length += from;
    buf_clear(&x->head_bytes);
    enum err e = buf_add(&x->head_bytes, data, length);
    evbuffer_drain(in, length);
    if (!e) e = http_head_parse(x->head_bytes.data, length, &x->head);
    if (e) {
        memset(&x->head, 0, sizeof x->head);
        refuse(x, e);
    } else {
        head_done(x);
    }
    return true;
}

/* Reads and dispatches as many requests as are whole, unless one waits for its answer. */
static void conn_process(struct http_exchange *x)
{
    if (x->processing) return;
    x->processing = true;
    bool more = true;
    while (more && !x->drop) {
        if (x->state == HTTP_CONN_HEAD)
            more = evbuffer_get_length(output_of(x)) < PIPELINE_OUTPUT_BYTES_MAX && head_read(x);
        else if (x->state == HTTP_CONN_BODY)
            more = body_read(x);
        else
            more = false;
    }
    x->processing = false;
    if (x->drop) http_conn_free(x);
}

static void on_read(struct bufferevent *bev, void *ctx)
{
    struct http_exchange *x = ctx;
    if (x->state == HTTP_CONN_FLUSH || x->state == HTTP_CONN_LINGER) {
        struct evbuffer *in = bufferevent_get_input(bev);
        evbuffer_drain(in, evbuffer_get_length(in));
        return;
    }
    conn_process(x);
}

static void on_write(struct bufferevent *bev, void *ctx)
{
    struct http_exchange *x = ctx;
    if (evbuffer_get_length(bufferevent_get_output(bev))) return;
    if (x->state == HTTP_CONN_FLUSH)
        conn_linger(x);
    else if (x->state == HTTP_CONN_HEAD)
        conn_process(x);
}

static void on_event(struct bufferevent *bev, short what, void *ctx)
{
    struct http_exchange *x = ctx;
    if (what & BEV_EVENT_CONNECTED) return; /* TLS is up */
    bool answered = x->state == HTTP_CONN_FLUSH || x->state == HTTP_CONN_HEAD;
    if ((what & BEV_EVENT_EOF) && answered && evbuffer_get_length(bufferevent_get_output(bev))) {
        bufferevent_disable(bev, EV_READ); /* it closed its half and waits for the answer */
        x->state = HTTP_CONN_FLUSH;
        deadline_set(x, x->loop->server->config.write_timeout_s);
        return;
    }
    http_conn_free(x);
}

static void on_deadline(evutil_socket_t fd, short what, void *ctx)
{
    (void)fd, (void)what;
    struct http_exchange *x = ctx;
    bool mid_request = x->state == HTTP_CONN_BODY || (x->state == HTTP_CONN_HEAD && x->scanned);
    if (!mid_request) {
        http_conn_free(x);
        return;
    }
    if (x->state == HTTP_CONN_HEAD) memset(&x->head, 0, sizeof x->head);
    refuse(x, err_set(ERR_TIMEOUT, "the request did not arrive in time"));
}

void http_conn_open(struct http_loop *l, int fd, bool tls)
{
    struct http_server *s = l->server;
    struct http_exchange *x = NULL;
    if (atomic_fetch_add(&s->n_connections, 1) >= s->config.n_connections_max || MEM_NEW(&x)) {
        atomic_fetch_sub(&s->n_connections, 1);
        evutil_closesocket(fd);
        return;
    }
    SSL *ssl = tls ? SSL_new(s->tls) : NULL;
    if (ssl)
        x->bev = bufferevent_openssl_socket_new(l->base, fd, ssl, BUFFEREVENT_SSL_ACCEPTING,
                                                BEV_OPT_CLOSE_ON_FREE);
    else if (!tls)
        x->bev = bufferevent_socket_new(l->base, fd, BEV_OPT_CLOSE_ON_FREE);
    if (!x->bev) {
        SSL_free(ssl);
        evutil_closesocket(fd);
        atomic_fetch_sub(&s->n_connections, 1);
        mem_free(x);
        return;
    }
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    x->loop = l;
    buf_init(&x->head_bytes, 0);
    buf_init(&x->body, 0);
    buf_init(&x->headers, 64 << 10);
    evtimer_assign(&x->timer, l->base, on_deadline, x);
    LIST_INSERT_HEAD(&l->conns, x, link);
    next_request(x);
    deadline_set(x, s->config.head_timeout_s); /* of a connection that never says a word */
    struct timeval write = {s->config.write_timeout_s, 0};
    bufferevent_setcb(x->bev, on_read, on_write, on_event, x);
    bufferevent_setwatermark(x->bev, EV_READ, 0, INPUT_BYTES_MAX);
    bufferevent_set_timeouts(x->bev, NULL, &write);
    bufferevent_enable(x->bev, EV_READ | EV_WRITE);
}

/* --- the exchange, as handlers see it --- */

const struct http_head *http_exchange_head(const struct http_exchange *x)
{
    return &x->head;
}
struct http_loop *http_exchange_loop(const struct http_exchange *x)
{
    return x->loop;
}
int64_t http_exchange_begun_us(const struct http_exchange *x)
{
    return x->begun_us;
}
void http_exchange_set_tag(struct http_exchange *x, const void *tag)
{
    x->tag = tag;
}
const void *http_exchange_tag(const struct http_exchange *x)
{
    return x->tag;
}
const char *http_exchange_name(const struct http_exchange *x)
{
    return x->name;
}
void http_exchange_close_after(struct http_exchange *x)
{
    x->close_after = true;
}

struct span http_exchange_body(const struct http_exchange *x)
{
    return (struct span){buf_string(&x->body), x->body.n};
}

void http_exchange_take_body(struct http_exchange *x, struct buf *out)
{
    *out = x->body;
    buf_init(&x->body, 0);
}

void http_exchange_set_name(struct http_exchange *x, struct span name)
{
    size_t n = name.n < sizeof x->name ? name.n : sizeof x->name - 1;
    memcpy(x->name, name.data, n);
    x->name[n] = 0;
}

void http_exchange_own(struct http_exchange *x, void (*closed)(void *owner), void *owner)
{
    x->closed = closed;
    x->owner = owner;
}

void http_exchange_header(struct http_exchange *x, const char *name, const char *value)
{
    if (strpbrk(value, "\r\n")) return; /* nobody splits our answers */
    buf_printf(&x->headers, "%s: %s\r\n", name, value);
}

static const char *phrase(int status)
{
    static const struct {
        int status;
        const char *words;
    } rows[] = {{200, "OK"},
                {204, "No Content"},
                {400, "Bad Request"},
                {401, "Unauthorized"},
                {403, "Forbidden"},
                {404, "Not Found"},
                {405, "Method Not Allowed"},
                {408, "Request Timeout"},
                {413, "Content Too Large"},
                {429, "Too Many Requests"},
                {431, "Request Header Fields Too Large"},
                {500, "Internal Server Error"},
                {501, "Not Implemented"},
                {503, "Service Unavailable"},
                {504, "Gateway Timeout"}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        if (rows[i].status == status) return rows[i].words;
    return "Answer";
}

static void begin(struct http_exchange *x, int status, const char *content_type, long long length)
{
    struct http_server *s = x->loop->server;
    ASSERT(x->state == HTTP_CONN_BUSY && !x->status);
    x->status = status;
    if (s->callbacks.headers) s->callbacks.headers(s->callbacks.ctx, x);
    if (atomic_load(&s->draining)) x->close_after = true;
    x->no_body = x->head.method == HTTP_METHOD_HEAD || status == 204;
    x->chunked = length < 0 && x->head.minor == 1;
    if (length < 0 && !x->chunked) x->close_after = true;
    struct evbuffer *out = output_of(x);
    evbuffer_add_printf(out, "HTTP/1.1 %d %s\r\n", status, phrase(status));
    if (content_type) evbuffer_add_printf(out, "Content-Type: %s\r\n", content_type);
    if (length >= 0 && status != 204) evbuffer_add_printf(out, "Content-Length: %lld\r\n", length);
    if (x->chunked) evbuffer_add_printf(out, "Transfer-Encoding: chunked\r\n");
    if (x->close_after)
        evbuffer_add_printf(out, "Connection: close\r\n");
    else if (x->head.minor == 0)
        evbuffer_add_printf(out, "Connection: keep-alive\r\n");
    evbuffer_add(out, buf_string(&x->headers), x->headers.n);
    evbuffer_add(out, "\r\n", 2);
}

static void finish(struct http_exchange *x)
{
    report_ended(x, x->status);
    x->closed = NULL;
    x->served = true;
    if (x->close_after || atomic_load(&x->loop->server->draining)) {
        x->state = HTTP_CONN_FLUSH;
        deadline_set(x, x->loop->server->config.write_timeout_s);
        if (!evbuffer_get_length(output_of(x))) conn_linger(x);
        return;
    }
    next_request(x);
    conn_process(x); /* a pipelined request may be there already */
}

void http_exchange_reply(struct http_exchange *x, int status, const char *content_type,
                         const void *body, size_t n)
{
    begin(x, status, content_type, (long long)n);
    if (n && !x->no_body) evbuffer_add(output_of(x), body, n);
    finish(x);
}

void http_exchange_start(struct http_exchange *x, int status, const char *content_type)
{
    begin(x, status, content_type, -1);
}

void http_exchange_write(struct http_exchange *x, const void *data, size_t n)
{
    if (!n || x->no_body) return;
    struct evbuffer *out = output_of(x);
    if (x->chunked) evbuffer_add_printf(out, "%zx\r\n", n);
    evbuffer_add(out, data, n);
    if (x->chunked) evbuffer_add(out, "\r\n", 2);
}

bool http_exchange_stalled(const struct http_exchange *x)
{
    return evbuffer_get_length(output_of(x)) > x->loop->server->config.output_bytes_max;
}

void http_exchange_end(struct http_exchange *x)
{
    if (x->chunked && !x->no_body) evbuffer_add(output_of(x), "0\r\n\r\n", 5);
    finish(x);
}

void http_exchange_abort(struct http_exchange *x)
{
    x->closed = NULL;
    http_conn_free(x);
}
