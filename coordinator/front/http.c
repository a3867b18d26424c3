/* The server around the connections: sockets, TLS, loops and their threads. See http.h. */
#include "coordinator/front/http.h"
#include "base/log.h"
#include "base/mem.h"
#include "coordinator/front/http_conn.h"

#include <errno.h>
#include <event2/bufferevent.h>
#include <event2/event.h>
#include <event2/listener.h>
#include <fcntl.h>
#include <netdb.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

enum { BACKLOG = 4096, ACCEPT_PAUSE_MS = 100 };

static void config_defaults(struct http_config *c)
{
    if (!c->n_loops) c->n_loops = 2;
    if (c->n_loops > HTTP_LOOPS_MAX) c->n_loops = HTTP_LOOPS_MAX;
    if (!c->n_connections_max) c->n_connections_max = 16384;
    if (!c->head_bytes_max) c->head_bytes_max = 64 << 10;
    if (!c->body_bytes_max) c->body_bytes_max = 32 << 20;
    if (!c->output_bytes_max) c->output_bytes_max = 1 << 20;
    if (!c->head_timeout_s) c->head_timeout_s = 20;
    if (!c->body_timeout_s) c->body_timeout_s = 120;
    if (!c->idle_timeout_s) c->idle_timeout_s = 75;
    if (!c->write_timeout_s) c->write_timeout_s = 60;
}

/* --- sockets --- */

static enum err listen_tcp(struct http_server *s)
{
    const struct http_config *c = &s->config;
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE}, *list = NULL;
    char port[16];
    snprintf(port, sizeof port, "%d", c->port);
    int gai = getaddrinfo(*c->host ? c->host : NULL, port, &hints, &list);
    if (gai) FAIL(ERR_IO, "cannot resolve %s: %s", c->host, gai_strerror(gai));
    int fd = -1, error = 0;
    for (struct addrinfo *a = list; a && fd < 0; a = a->ai_next) {
        int type = a->ai_socktype | SOCK_NONBLOCK | SOCK_CLOEXEC;
        if ((fd = socket(a->ai_family, type, a->ai_protocol)) < 0) {
            error = errno;
            continue;
        }
        int one = 1;
        setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        if (bind(fd, a->ai_addr, a->ai_addrlen) || listen(fd, BACKLOG)) {
            error = errno;
            close(fd);
            fd = -1;
        }
    }
    freeaddrinfo(list);
    if (fd < 0) FAIL(ERR_IO, "cannot listen on %s port %d: %s", c->host, c->port, strerror(error));
    struct sockaddr_storage at;
    socklen_t n = sizeof at;
    getsockname(fd, (struct sockaddr *)&at, &n);
    s->port = ntohs(at.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&at)->sin6_port
                                             : ((struct sockaddr_in *)&at)->sin_port);
    s->fds[0] = fd;
    return OK;
}

/* A socket left behind by a process that died is replaced; a live one is not. */
static enum err listen_unix(struct http_server *s)
{
    struct sockaddr_un at = {.sun_family = AF_UNIX};
    const char *path = s->config.uds;
    if (strlen(path) >= sizeof at.sun_path)
        FAIL(ERR_INVALID, "%s: the path of a unix socket has at most %zu bytes", path,
             sizeof at.sun_path - 1);
    memcpy(at.sun_path, path, strlen(path) + 1);
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) FAIL(ERR_IO, "%s: %s", path, strerror(errno));
    struct stat st;
    if (!stat(path, &st) && S_ISSOCK(st.st_mode) &&
        connect(fd, (struct sockaddr *)&at, sizeof at) && errno == ECONNREFUSED)
        unlink(path);
    close(fd);
    fd = socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, (struct sockaddr *)&at, sizeof at) || listen(fd, BACKLOG)) {
        int error = errno;
        if (fd >= 0) close(fd);
        FAIL(ERR_IO, "cannot listen on %s: %s", path, strerror(error));
    }
    s->fds[1] = fd;
    return OK;
}

/* --- TLS --- */

static enum err tls_fail(const char *file)
{
    char why[256];
    ERR_error_string_n(ERR_get_error(), why, sizeof why);
    FAIL(ERR_INVALID, "%s: %s", file, why);
}

static int choose_protocol(SSL *ssl, const unsigned char **out, unsigned char *out_n,
                           const unsigned char *in, unsigned n, void *ctx)
{
    (void)ssl, (void)ctx;
    static const unsigned char ours[] = "\x08http/1.1\x08http/1.0";
    unsigned char *chosen;
    if (SSL_select_next_proto(&chosen, out_n, ours, sizeof ours - 1, in, n) !=
        OPENSSL_NPN_NEGOTIATED)
        return SSL_TLSEXT_ERR_NOACK;
    *out = chosen;
    return SSL_TLSEXT_ERR_OK;
}

static enum err tls_open(struct http_server *s)
{
    const struct http_config *c = &s->config;
    if (!c->tls_key_file || !c->tls_cert_file)
        FAIL(ERR_INVALID, "--ssl-keyfile and --ssl-certfile go together");
    if (!(s->tls = SSL_CTX_new(TLS_server_method()))) FAIL(ERR_NO_MEMORY, "TLS");
    SSL_CTX_set_min_proto_version(s->tls, TLS1_2_VERSION);
    SSL_CTX_set_options(s->tls, SSL_OP_NO_RENEGOTIATION | SSL_OP_IGNORE_UNEXPECTED_EOF);
    SSL_CTX_set_alpn_select_cb(s->tls, choose_protocol, NULL);
    if (SSL_CTX_use_certificate_chain_file(s->tls, c->tls_cert_file) != 1)
        return tls_fail(c->tls_cert_file);
    if (SSL_CTX_use_PrivateKey_file(s->tls, c->tls_key_file, SSL_FILETYPE_PEM) != 1 ||
        SSL_CTX_check_private_key(s->tls) != 1)
        return tls_fail(c->tls_key_file);
    if (c->tls_ca_file) {
        if (SSL_CTX_load_verify_locations(s->tls, c->tls_ca_file, NULL) != 1)
            return tls_fail(c->tls_ca_file);
        SSL_CTX_set_verify(s->tls, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
    }
    return OK;
}

/* --- loops --- */

static void on_accept_tcp(struct evconnlistener *listener, evutil_socket_t fd,
                          struct sockaddr *from, int n, void *ctx)
{
    (void)listener, (void)from, (void)n;
    struct http_loop *l = ctx;
    http_conn_open(l, fd, l->server->tls != NULL);
}

static void on_accept_unix(struct evconnlistener *listener, evutil_socket_t fd,
                           struct sockaddr *from, int n, void *ctx)
{
    (void)listener, (void)from, (void)n;
    http_conn_open(ctx, fd, false);
}

/* Out of descriptors: waits a little instead of spinning on the same connection. */
static void on_accept_error(struct evconnlistener *listener, void *ctx)
{
    (void)listener;
    struct http_loop *l = ctx;
    log_warn("http: cannot accept: %s", strerror(errno));
    for (int i = 0; i < 2; i++)
        if (l->listeners[i]) evconnlistener_disable(l->listeners[i]);
    struct timeval pause = {0, ACCEPT_PAUSE_MS * 1000};
    evtimer_add(l->accept_pause, &pause);
}

static void on_accept_again(evutil_socket_t fd, short what, void *ctx)
{
    (void)fd, (void)what;
    struct http_loop *l = ctx;
    for (int i = 0; i < 2; i++)
        if (l->listeners[i]) evconnlistener_enable(l->listeners[i]);
}

static void close_idle(struct http_loop *l)
{
    struct http_exchange *x = LIST_FIRST(&l->conns), *next;
    for (; x; x = next) {
        next = LIST_NEXT(x, link);
        if (http_conn_is_idle(x)) http_conn_free(x);
    }
}

static void on_wake(evutil_socket_t fd, short what, void *ctx)
{
    (void)what;
    struct http_loop *l = ctx;
    struct http_server *s = l->server;
    uint64_t count;
    if (read(fd, &count, sizeof count) < 0 && errno != EAGAIN) return;
    atomic_store(&l->wake_pending, false);
    if (atomic_load(&s->stopping)) {
        event_base_loopbreak(l->base);
        return;
    }
    if (atomic_load(&s->draining)) close_idle(l);
    if (s->callbacks.woken) s->callbacks.woken(s->callbacks.ctx, l);
}

void http_loop_wake(struct http_loop *l)
{
    if (atomic_exchange(&l->wake_pending, true)) return;
    uint64_t one = 1;
    if (write(l->wake_fd, &one, sizeof one) < 0) return; /* a full counter wakes as well */
}

static void *loop_run(void *ctx)
{
    struct http_loop *l = ctx;
    event_base_dispatch(l->base);
    while (!LIST_EMPTY(&l->conns))
        http_conn_free(LIST_FIRST(&l->conns));
    return NULL;
}

static enum err listener_add(struct http_loop *l, int i)
{
    if (l->server->fds[i] < 0) return OK;
    int fd = fcntl(l->server->fds[i], F_DUPFD_CLOEXEC, 0);
    if (fd < 0) FAIL(ERR_IO, "dup: %s", strerror(errno));
    l->listeners[i] = evconnlistener_new(l->base, i ? on_accept_unix : on_accept_tcp, l,
                                         LEV_OPT_CLOSE_ON_FREE | LEV_OPT_CLOSE_ON_EXEC, 0, fd);
    if (!l->listeners[i]) {
        close(fd);
        FAIL(ERR_NO_MEMORY, "http: no listener");
    }
    evconnlistener_set_error_cb(l->listeners[i], on_accept_error);
    return OK;
}

static enum err loop_open(struct http_loop *l)
{
    LIST_INIT(&l->conns);
    l->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (l->wake_fd < 0) FAIL(ERR_IO, "eventfd: %s", strerror(errno));
    if (!(l->base = event_base_new())) FAIL(ERR_NO_MEMORY, "http: no event base");
    l->wake_event = event_new(l->base, l->wake_fd, EV_READ | EV_PERSIST, on_wake, l);
    l->accept_pause = evtimer_new(l->base, on_accept_again, l);
    if (!l->wake_event || !l->accept_pause || event_add(l->wake_event, NULL))
        FAIL(ERR_NO_MEMORY, "http: no event");
    TRY(listener_add(l, 0));
    TRY(listener_add(l, 1));
    return OK;
}

static void loop_close(struct http_loop *l)
{
    for (int i = 0; i < 2; i++)
        if (l->listeners[i]) evconnlistener_free(l->listeners[i]);
    if (l->wake_event) event_free(l->wake_event);
    if (l->accept_pause) event_free(l->accept_pause);
    if (l->base) event_base_free(l->base);
    if (l->wake_fd >= 0) close(l->wake_fd);
}

enum err http_server_open(const struct http_config *config, const struct http_callbacks *callbacks,
                          struct http_server **out)
{
    struct http_server *s = NULL;
    TRY(MEM_NEW(&s));
    enum err e = OK;
    s->config = *config;
    s->callbacks = *callbacks;
    s->fds[0] = s->fds[1] = -1;
    config_defaults(&s->config);
    if (config->tls_key_file || config->tls_cert_file) TRY_OUT(tls_open(s));
    if (config->host) TRY_OUT(listen_tcp(s));
    if (config->uds) TRY_OUT(listen_unix(s));
    for (unsigned i = 0; i < s->config.n_loops; i++) {
        s->n_loops = i + 1;
        s->loops[i].wake_fd = -1;
        s->loops[i].server = s;
        TRY_OUT(loop_open(&s->loops[i]));
        if (callbacks->loop) callbacks->loop(callbacks->ctx, &s->loops[i], i);
    }
    for (unsigned i = 0; i < s->n_loops; i++) {
        if (pthread_create(&s->loops[i].thread, NULL, loop_run, &s->loops[i]))
            FAIL_OUT(ERR_IO, "cannot start a thread for HTTP");
        s->loops[i].started = true;
    }
    *out = s;
out:
    if (e) http_server_close(s);
    return e;
}

void http_server_stop(struct http_server *s)
{
    atomic_store(&s->stopping, true);
    for (unsigned i = 0; i < s->n_loops; i++)
        if (s->loops[i].started) http_loop_wake(&s->loops[i]);
    for (unsigned i = 0; i < s->n_loops; i++) {
        if (s->loops[i].started) pthread_join(s->loops[i].thread, NULL);
        s->loops[i].started = false;
    }
}

void http_server_close(struct http_server *s)
{
    if (!s) return;
    http_server_stop(s);
    for (unsigned i = 0; i < s->n_loops; i++)
        loop_close(&s->loops[i]);
    for (int i = 0; i < 2; i++)
        if (s->fds[i] >= 0) close(s->fds[i]);
    if (s->fds[1] >= 0) unlink(s->config.uds);
    SSL_CTX_free(s->tls);
    mem_free(s);
}

int http_server_port(const struct http_server *s)
{
    return s->port;
}
unsigned http_server_n_loops(const struct http_server *s)
{
    return s->n_loops;
}
struct http_loop *http_server_loop(struct http_server *s, unsigned i)
{
    return &s->loops[i];
}
void **http_loop_user(struct http_loop *l)
{
    return &l->user;
}
struct event_base *http_loop_base(struct http_loop *l)
{
    return l->base;
}

unsigned http_loop_connections(const struct http_loop *l)
{
    return atomic_load(&l->server->n_connections);
}

void http_server_drain(struct http_server *s)
{
    atomic_store(&s->draining, true);
    for (unsigned i = 0; i < s->n_loops; i++)
        http_loop_wake(&s->loops[i]);
}
