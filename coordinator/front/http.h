/* The HTTP/1.1 server: loops, connections, exchanges.
 *
 * Each loop is a thread with an event base of its own; a connection lives and dies on one loop, and
 * everything about its exchanges happens there. A handler is called once a whole request has been
 * read. It answers at once, or keeps the exchange and answers later from its loop; a client that
 * leaves in between is reported at once, token or no token.
 *
 * libevent gives the loops, buffers and TLS. The HTTP on top is http_parse.h's: docs/decisions/0006
 * says why not evhttp. It must never know routes' meanings, JSON or tokens. */
#pragma once
#include "coordinator/front/http_parse.h"

struct http_server;
struct http_loop;
struct http_exchange;

enum { HTTP_LOOPS_MAX = 64 };
struct http_config {
    const char *host;                         /* address to listen on; NULL = none */
    int port;                                 /* 0 = any free one */
    const char *uds;                          /* path of a unix socket, or NULL */
    const char *tls_key_file, *tls_cert_file; /* both or none */
    const char *tls_ca_file;                  /* clients must show a certificate of it; or NULL */
    unsigned n_loops;                         /* 0 = 2 */
    unsigned n_connections_max;               /* 0 = 16384 */
    size_t head_bytes_max;                    /* 0 = 64 KiB */
    size_t body_bytes_max;                    /* 0 = 32 MiB */
    size_t
        output_bytes_max; /* unsent bytes of one exchange before it counts as stalled; 0 = 1 MiB */
    int head_timeout_s;   /* for a whole head, 0 = 20 */
    int body_timeout_s;   /* for a whole body, 0 = 120 */
    int idle_timeout_s;   /* between requests, 0 = 75 */
    int write_timeout_s;  /* without a byte taken by the client, 0 = 60 */
};

struct http_callbacks {
    /* A whole request. Must answer now or keep x and answer later. */
    void (*handle)(void *ctx, struct http_exchange *x);
    /* A request that could not be read: must answer at once; nothing of x but replying may be used.
     */
    void (*refuse)(void *ctx, struct http_exchange *x, enum err e, const char *why);
    /* Headers that every answer bears; called as an answer begins. */
    void (*headers)(void *ctx, struct http_exchange *x);
    /* An answer was completed, or its client left (status 499). */
    void (*ended)(void *ctx, struct http_exchange *x, int status, int64_t took_us);
    /* On a loop's thread, after http_loop_wake. */
    void (*woken)(void *ctx, struct http_loop *loop);
    /* While the server opens, before any thread of it runs: loop `index` is there. May be NULL. */
    void (*loop)(void *ctx, struct http_loop *loop, unsigned index);
    void *ctx;
};

enum err http_server_open(const struct http_config *config, const struct http_callbacks *callbacks,
                          struct http_server **out);
/* Cuts every connection and joins the loops' threads. Loops may still be woken, to no effect. */
void http_server_stop(struct http_server *s);
/* Stops, and frees. Accepts NULL. */
void http_server_close(struct http_server *s);
int http_server_port(const struct http_server *s);
/* From now on every answer closes its connection, and idle connections are closed. */
void http_server_drain(struct http_server *s);

unsigned http_server_n_loops(const struct http_server *s);
struct http_loop *http_server_loop(struct http_server *s, unsigned i);
/* Any thread: has `woken` called soon on the loop's thread; many wakes may make one call. */
void http_loop_wake(struct http_loop *l);
void **http_loop_user(struct http_loop *l); /* one pointer for the caller, NULL at first */
unsigned http_loop_connections(const struct http_loop *l); /* of the whole server */
struct event_base;
struct event_base *http_loop_base(struct http_loop *l);

/* What was asked; valid until the answer has ended. */
const struct http_head *http_exchange_head(const struct http_exchange *x);
struct span http_exchange_body(const struct http_exchange *x);
/* Takes the body's memory over; the exchange has none afterwards. */
void http_exchange_take_body(struct http_exchange *x, struct buf *out);
struct http_loop *http_exchange_loop(const struct http_exchange *x);
int64_t http_exchange_begun_us(const struct http_exchange *x); /* the request had been read */
/* One pointer and number for the caller's use (route, labels). */
void http_exchange_set_tag(struct http_exchange *x, const void *tag);
const void *http_exchange_tag(const struct http_exchange *x);
/* The name echoed or made for this request: "" before the caller sets it. */
void http_exchange_set_name(struct http_exchange *x, struct span name);
const char *http_exchange_name(const struct http_exchange *x);
/* Who keeps x: closed(owner) is called when the client has left before the answer's end. x is gone
 * when it returns. */
void http_exchange_own(struct http_exchange *x, void (*closed)(void *owner), void *owner);

/* Answers. Headers first, then reply, or start, any number of writes, end. After reply and end the
 * exchange is gone. */
void http_exchange_header(struct http_exchange *x, const char *name, const char *value);
void http_exchange_close_after(struct http_exchange *x); /* the connection ends with this answer */
void http_exchange_reply(struct http_exchange *x, int status, const char *content_type,
                         const void *body, size_t n);
void http_exchange_start(struct http_exchange *x, int status, const char *content_type);
void http_exchange_write(struct http_exchange *x, const void *data, size_t n);
/* True when more than output_bytes_max wait for the client. */
bool http_exchange_stalled(const struct http_exchange *x);
void http_exchange_end(struct http_exchange *x);
/* Cuts the connection at once; closed is not called. */
void http_exchange_abort(struct http_exchange *x);
