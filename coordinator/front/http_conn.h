/* Private to http.c and http_conn.c: the shapes of server, loop and connection. */
#pragma once
#include "coordinator/front/http.h"

#include <event2/event.h>
#include <event2/event_struct.h>
#include <openssl/types.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/queue.h>

struct bufferevent;
struct evconnlistener;

enum http_conn_state {
    HTTP_CONN_HEAD, /* waits for a head (idle while none of its bytes came) */
    HTTP_CONN_BODY,
    HTTP_CONN_BUSY,   /* a handler owns the exchange */
    HTTP_CONN_FLUSH,  /* the last answer is on its way, then the connection ends */
    HTTP_CONN_LINGER, /* the answer is out; what the client still sends is thrown away for a while
                       */
};

struct http_exchange {
    struct http_loop *loop;
    struct bufferevent *bev;
    LIST_ENTRY(http_exchange) link; /* connections of the loop */
    struct event timer;             /* the state's deadline */
    enum http_conn_state state;
    struct buf head_bytes, body; /* the head's copy (its spans point here), the body */
    struct http_head head;
    struct http_chunks chunks;
    size_t scanned;  /* bytes of the input known to hold no whole head */
    bool processing; /* http_conn_process is on the stack */
    bool drop;       /* free it when processing is over */
    bool served;     /* a request of it was answered */
    /* the answer */
    struct buf headers; /* added so far */
    int status;         /* 0 = not begun */
    bool chunked, no_body, close_after;
    int64_t begun_us;
    const void *tag;
    char name[132];
    void (*closed)(void *owner);
    void *owner;
};

struct http_loop {
    struct http_server *server;
    struct event_base *base;
    struct event *wake_event, *accept_pause;
    struct evconnlistener *listeners[2];
    pthread_t thread;
    bool started;
    int wake_fd;
    atomic_bool wake_pending;
    void *user;
    LIST_HEAD(, http_exchange) conns;
};

struct http_server {
    struct http_config config;
    struct http_callbacks callbacks;
    SSL_CTX *tls;
    int fds[2]; /* TCP, unix; -1 = none */
    int port;
    atomic_bool stopping, draining;
    atomic_uint n_connections;
    unsigned n_loops;
    struct http_loop loops[HTTP_LOOPS_MAX];
};

/* Takes the accepted socket over; closes it when it cannot be served. */
void http_conn_open(struct http_loop *l, int fd, bool tls);
void http_conn_free(struct http_exchange *x);
/* Has had its answers and says nothing: may be closed. A fresh one has a request on its way. */
bool http_conn_is_idle(const struct http_exchange *x);
