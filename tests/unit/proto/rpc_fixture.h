/* What the tests of rpc.h share: a server whose methods echo, stream and hold, a client that
 * records what it is told, and how both are started on an address. */
#pragma once
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base/clock.h"
#include "base/mem.h"
#include "proto/rpc.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* ---- The server of the tests ---- */

struct seen { /* what a server's method saw; atomics, because the tests look while it runs */
    atomic_int n_open, n_messages, n_half, n_close, n_cancelled, n_inside;
    atomic_bool stop;
};
static __attribute__((unused)) struct seen seen;

static __attribute__((unused)) void echo_message(struct rpc_call *call, void *ctx,
                                                 struct span bytes)
{
    (void)ctx;
    assert_int_equal(rpc_send(call, bytes.data, bytes.n), OK);
    rpc_finish(call, RPC_OK, NULL);
}

static __attribute__((unused)) void fail_message(struct rpc_call *call, void *ctx,
                                                 struct span bytes)
{
    (void)ctx, (void)bytes;
    rpc_finish(call, RPC_FAILED_PRECONDITION, "not today: 100 % \xc3\xa9");
}

/* The request is a decimal count: a thread sends so many numbers, then finishes. */
static __attribute__((unused)) void *count_run(void *ctx)
{
    struct rpc_call *call = ctx;
    uint32_t n = (uint32_t)(uintptr_t)rpc_user(call);
    for (uint32_t i = 0; i < n; i++) {
        enum err e = rpc_send(call, &i, sizeof i);
        if (e == ERR_CANCELLED) break;
        if (e == ERR_FULL) i--, usleep(200);
    }
    rpc_finish(call, RPC_OK, "done");
    rpc_release(call);
    return NULL;
}

static __attribute__((unused)) void count_message(struct rpc_call *call, void *ctx,
                                                  struct span bytes)
{
    pthread_t thread;
    char text[16] = "";
    (void)ctx;
    memcpy(text, bytes.data, bytes.n < 15 ? bytes.n : 15);
    rpc_set_user(call, (void *)(uintptr_t)strtoul(text, NULL, 10));
    pthread_create(&thread, NULL, count_run, rpc_acquire(call));
    pthread_detach(thread);
}

static __attribute__((unused)) void talk_open(struct rpc_call *call, void *ctx)
{
    (void)ctx;
    atomic_int *inside;
    assert_int_equal(mem_alloc(sizeof *inside, (void **)&inside), OK);
    rpc_set_user(call, inside);
    atomic_fetch_add(&seen.n_open, 1);
}

static __attribute__((unused)) void talk_message(struct rpc_call *call, void *ctx,
                                                 struct span bytes)
{
    (void)ctx;
    atomic_int *inside = rpc_user(call);
    assert_int_equal(atomic_fetch_add(inside, 1), 0); /* callbacks of one call are serial */
    atomic_fetch_add(&seen.n_messages, 1);
    if (bytes.n == 6 && !memcmp(bytes.data, "cancel", 6))
        rpc_cancel(call);
    else
        (void)rpc_send(call, bytes.data, bytes.n);
    atomic_fetch_sub(inside, 1);
}

static __attribute__((unused)) void talk_half_close(struct rpc_call *call, void *ctx)
{
    (void)ctx;
    atomic_fetch_add(&seen.n_half, 1);
    rpc_finish(call, RPC_ABORTED, "you said good-bye");
}

static __attribute__((unused)) void talk_close(struct rpc_call *call, void *ctx, bool cancelled)
{
    (void)ctx;
    atomic_int *inside = rpc_user(call);
    assert_int_equal(atomic_load(inside), 0);
    mem_free(inside);
    atomic_fetch_add(&seen.n_close, 1);
    if (cancelled) atomic_fetch_add(&seen.n_cancelled, 1);
    assert_int_equal(rpc_send(call, "x", 1), ERR_CANCELLED);
}

static const struct rpc_method methods[] = {
    {.path = "/test.T/Echo", .kind = RPC_UNARY, .on_message = echo_message},
    {.path = "/test.T/Public", .kind = RPC_UNARY, .flags = RPC_PUBLIC, .on_message = echo_message},
    {.path = "/test.T/Fail", .kind = RPC_UNARY, .on_message = fail_message},
    {.path = "/test.T/Count",
     .kind = RPC_SERVER_STREAM,
     .on_message = count_message,
     .send_bytes_max = 64 << 10},
    {.path = "/test.T/Talk",
     .kind = RPC_BIDI,
     .on_open = talk_open,
     .on_message = talk_message,
     .on_half_close = talk_half_close,
     .on_close = talk_close},
};

struct fixture {
    const char *listen;
    char address[128];
    struct rpc_server *server;
    struct rpc_channel *channel;
};

static __attribute__((unused)) void address_of(struct fixture *f)
{
    int port = rpc_server_port(f->server);
    if (port)
        snprintf(f->address, sizeof f->address, "127.0.0.1:%d", port);
    else
        snprintf(f->address, sizeof f->address, "%s", f->listen);
}

static __attribute__((unused)) struct fixture *start(const char *listen, const char *server_token,
                                                     const char *client_token)
{
    struct fixture *f;
    assert_int_equal(mem_alloc(sizeof *f, (void **)&f), OK);
    f->listen = listen;
    memset(&seen, 0, sizeof seen);
    struct rpc_server_config sc = {.address = listen,
                                   .token = server_token,
                                   .n_threads = 2,
                                   .methods = methods,
                                   .n_methods = sizeof methods / sizeof *methods};
    if (rpc_server_create(&sc, &f->server)) fail_msg("%s", err_detail());
    address_of(f);
    struct rpc_channel_config cc = {.address = f->address, .token = client_token};
    assert_int_equal(rpc_channel_create(&cc, &f->channel), OK);
    return f;
}

static __attribute__((unused)) void finish(struct fixture *f)
{
    rpc_channel_destroy(f->channel);
    rpc_server_destroy(f->server);
    mem_free(f);
}

static __attribute__((unused)) const char *address_get(void **state)
{
    return *state;
}

static __attribute__((unused)) bool wait_for(atomic_int *value, int at_least, int ms)
{
    for (int64_t until = clock_monotonic_us() + ms * 1000LL; clock_monotonic_us() < until;
         usleep(500))
        if (atomic_load(value) >= at_least) return true;
    return atomic_load(value) >= at_least;
}

/* ---- A client that records ---- */

struct record {
    atomic_int n_messages, ended;
    int hold_after; /* 0 = never */
    int code;
    char text[256];
    uint64_t bytes;
    uint32_t last;
    bool disordered;
};

static __attribute__((unused)) void record_message(struct rpc_call *call, void *ctx,
                                                   struct span bytes)
{
    struct record *r = ctx;
    uint32_t value = 0;
    if (bytes.n == sizeof value) memcpy(&value, bytes.data, sizeof value);
    if (bytes.n == sizeof value && value != (uint32_t)atomic_load(&r->n_messages))
        r->disordered = true;
    r->last = value;
    r->bytes += bytes.n;
    if (atomic_fetch_add(&r->n_messages, 1) + 1 == r->hold_after) rpc_hold(call);
}

static __attribute__((unused)) void record_end(struct rpc_call *call, void *ctx, int code,
                                               const char *text)
{
    struct record *r = ctx;
    (void)call;
    r->code = code;
    snprintf(r->text, sizeof r->text, "%s", text);
    atomic_fetch_add(&r->ended, 1);
}

static __attribute__((unused)) struct rpc_call *open_call(struct fixture *f, const char *path,
                                                          int timeout_ms, struct record *r)
{
    struct rpc_handler h = {record_message, record_end, r};
    struct rpc_call *call;
    assert_int_equal(rpc_open(f->channel, path, timeout_ms, &h, &call), OK);
    return call;
}

static __attribute__((unused)) enum err unary(struct fixture *f, const char *path, struct buf *out,
                                              int *out_code)
{
    buf_init(out, 0);
    return rpc_unary(f->channel, path, span_of("hello"), 5000, out, out_code);
}
