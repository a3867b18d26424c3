/* Goal: the same promises of rpc.h over gRPC (TCP and unix socket) and over threads.
 * Method: one set of cases, run once per address; a server whose methods echo, stream and hold; and
 * a peer in another process (this program started again) that is killed. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base/clock.h"
#include "base/mem.h"
#include "proto/rpc.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

/* ---- The server of the tests ---- */

struct seen { /* what a server's method saw; atomics, because the tests look while it runs */
    atomic_int n_open, n_messages, n_half, n_close, n_cancelled, n_inside;
    atomic_bool stop;
};
static struct seen seen;

static void enter(void)
{
    (void)seen;
}

static void echo_message(struct rpc_call *call, void *ctx, struct span bytes)
{
    (void)ctx;
    assert_int_equal(rpc_send(call, bytes.data, bytes.n), OK);
    rpc_finish(call, RPC_OK, NULL);
}

static void fail_message(struct rpc_call *call, void *ctx, struct span bytes)
{
    (void)ctx, (void)bytes;
    rpc_finish(call, RPC_FAILED_PRECONDITION, "not today: 100 % \xc3\xa9");
}

/* The request is a decimal count: a thread sends so many numbers, then finishes. */
static void *count_run(void *ctx)
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

static void count_message(struct rpc_call *call, void *ctx, struct span bytes)
{
    pthread_t thread;
    char text[16] = "";
    (void)ctx;
    memcpy(text, bytes.data, bytes.n < 15 ? bytes.n : 15);
    rpc_set_user(call, (void *)(uintptr_t)strtoul(text, NULL, 10));
    pthread_create(&thread, NULL, count_run, rpc_acquire(call));
    pthread_detach(thread);
}

static void talk_open(struct rpc_call *call, void *ctx)
{
    (void)ctx;
    enter();
    atomic_int *inside;
    assert_int_equal(mem_alloc(sizeof *inside, (void **)&inside), OK);
    rpc_set_user(call, inside);
    atomic_fetch_add(&seen.n_open, 1);
}

static void talk_message(struct rpc_call *call, void *ctx, struct span bytes)
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

static void talk_half_close(struct rpc_call *call, void *ctx)
{
    (void)ctx;
    atomic_fetch_add(&seen.n_half, 1);
    rpc_finish(call, RPC_ABORTED, "you said good-bye");
}

static void talk_close(struct rpc_call *call, void *ctx, bool cancelled)
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

static void address_of(struct fixture *f)
{
    int port = rpc_server_port(f->server);
    if (port)
        snprintf(f->address, sizeof f->address, "127.0.0.1:%d", port);
    else
        snprintf(f->address, sizeof f->address, "%s", f->listen);
}

static struct fixture *start(const char *listen, const char *server_token, const char *client_token)
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

static void finish(struct fixture *f)
{
    rpc_channel_destroy(f->channel);
    rpc_server_destroy(f->server);
    mem_free(f);
}

static const char *address_get(void **state)
{
    return *state;
}

static bool wait_for(atomic_int *value, int at_least, int ms)
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

static void record_message(struct rpc_call *call, void *ctx, struct span bytes)
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

static void record_end(struct rpc_call *call, void *ctx, int code, const char *text)
{
    struct record *r = ctx;
    (void)call;
    r->code = code;
    snprintf(r->text, sizeof r->text, "%s", text);
    atomic_fetch_add(&r->ended, 1);
}

static struct rpc_call *open_call(struct fixture *f, const char *path, int timeout_ms,
                                  struct record *r)
{
    struct rpc_handler h = {record_message, record_end, r};
    struct rpc_call *call;
    assert_int_equal(rpc_open(f->channel, path, timeout_ms, &h, &call), OK);
    return call;
}

static enum err unary(struct fixture *f, const char *path, struct buf *out, int *out_code)
{
    buf_init(out, 0);
    return rpc_unary(f->channel, path, span_of("hello"), 5000, out, out_code);
}

/* ---- Cases ---- */

static void test_unary(void **state)
{
    struct fixture *f = start(address_get(state), NULL, NULL);
    struct buf reply;
    int code;
    for (int i = 0; i < 50; i++) {
        assert_int_equal(unary(f, "/test.T/Echo", &reply, &code), OK);
        assert_string_equal(buf_string(&reply), "hello");
        assert_int_equal(code, RPC_OK);
        buf_fini(&reply);
    }
    assert_int_equal(unary(f, "/test.T/Fail", &reply, &code), ERR_NOT_READY);
    assert_int_equal(code, RPC_FAILED_PRECONDITION);
    assert_non_null(strstr(err_detail(), "not today: 100 % \xc3\xa9"));
    buf_fini(&reply);
    assert_int_equal(unary(f, "/test.T/Nope", &reply, &code), ERR_NO_ROUTE);
    buf_fini(&reply);
    buf_init(&reply, 0);
    assert_int_equal(
        rpc_unary(f->channel, "/test.T/Echo", (struct span){"", 0}, 5000, &reply, NULL), OK);
    assert_int_equal(reply.n, 0);
    buf_fini(&reply);
    buf_init(&reply, 3); /* the caller's limit */
    assert_int_not_equal(
        rpc_unary(f->channel, "/test.T/Echo", span_of("hello"), 5000, &reply, NULL), OK);
    buf_fini(&reply);
    finish(f);
}

static void test_no_request(void **state)
{
    struct fixture *f = start(address_get(state), NULL, NULL);
    struct record r = {0};
    struct rpc_call *call = open_call(f, "/test.T/Count", 5000, &r);
    rpc_half_close(call);
    assert_true(wait_for(&r.ended, 1, 3000));
    assert_int_equal(r.code, RPC_INVALID_ARGUMENT);
    rpc_release(call);
    finish(f);
}

static void test_token(void **state)
{
    static const char *const wrong[] = {NULL, "", "sesam", "sesame2", "Sesame"};
    struct buf reply;
    int code;
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        struct fixture *f = start(address_get(state), "sesame", wrong[i]);
        assert_int_equal(unary(f, "/test.T/Echo", &reply, &code), ERR_UNAUTHORIZED);
        buf_fini(&reply);
        assert_int_equal(unary(f, "/test.T/Nope", &reply, &code),
                         ERR_UNAUTHORIZED); /* learns nothing */
        buf_fini(&reply);
        assert_int_equal(unary(f, "/test.T/Public", &reply, &code), OK);
        buf_fini(&reply);
        struct record r = {0};
        struct rpc_call *call = open_call(f, "/test.T/Talk", 5000, &r);
        (void)rpc_send(call, "x", 1);
        assert_true(wait_for(&r.ended, 1, 3000));
        assert_int_equal(r.code, RPC_UNAUTHENTICATED);
        assert_int_equal(atomic_load(&seen.n_open), 0);
        rpc_release(call);
        finish(f);
    }
    struct fixture *f = start(address_get(state), "sesame", "sesame");
    assert_int_equal(unary(f, "/test.T/Echo", &reply, &code), OK);
    buf_fini(&reply);
    finish(f);
}

static void test_server_stream(void **state)
{
    struct fixture *f = start(address_get(state), NULL, NULL);
    struct record r = {0};
    struct rpc_call *call = open_call(f, "/test.T/Count", 20000, &r);
    assert_int_equal(rpc_send(call, "5000", 4), OK);
    rpc_half_close(call);
    assert_true(wait_for(&r.ended, 1, 20000));
    assert_int_equal(r.code, RPC_OK);
    assert_string_equal(r.text, "done");
    assert_int_equal(atomic_load(&r.n_messages), 5000);
    assert_false(r.disordered);
    rpc_release(call);
    finish(f);
}

static void test_bidi(void **state)
{
    struct fixture *f = start(address_get(state), NULL, NULL);
    struct record r = {0};
    struct rpc_call *call = open_call(f, "/test.T/Talk", 0, &r);
    for (uint32_t i = 0; i < 2000;
         i++) { /* bursts of ten, so that sends queue behind the one in flight */
        assert_int_equal(rpc_send(call, &i, sizeof i), OK);
        if (i % 10 == 9) assert_true(wait_for(&r.n_messages, (int)i + 1, 5000));
    }
    rpc_half_close(call);
    assert_int_equal(rpc_send(call, "x", 1), ERR_CANCELLED);
    assert_true(wait_for(&r.ended, 1, 5000));
    assert_int_equal(r.code, RPC_ABORTED);
    assert_string_equal(r.text, "you said good-bye");
    assert_false(r.disordered);
    assert_true(wait_for(&seen.n_close, 1, 5000));
    assert_int_equal(atomic_load(&seen.n_half), 1);
    assert_int_equal(atomic_load(&seen.n_cancelled), 0);
    rpc_release(call);
    finish(f);
}

static void test_client_cancel(void **state)
{
    struct fixture *f = start(address_get(state), NULL, NULL);
    struct record r = {0};
    struct rpc_call *call = open_call(f, "/test.T/Talk", 0, &r);
    assert_int_equal(rpc_send(call, "x", 1), OK);
    assert_true(wait_for(&r.n_messages, 1, 5000));
    rpc_cancel(call);
    assert_true(wait_for(&r.ended, 1, 2000));
    assert_int_equal(r.code, RPC_CANCELLED);
    assert_true(wait_for(&seen.n_cancelled, 1, 2000));
    assert_int_equal(atomic_load(&seen.n_close), 1);
    rpc_cancel(call); /* again, after the end: nothing */
    rpc_half_close(call);
    assert_int_equal(rpc_send(call, "x", 1), ERR_CANCELLED);
    rpc_release(call);

    struct record r2 = {0}; /* a flood from a thread of the server is cut short */
    call = open_call(f, "/test.T/Count", 0, &r2);
    assert_int_equal(rpc_send(call, "100000000", 9), OK);
    rpc_half_close(call);
    assert_true(wait_for(&r2.n_messages, 20, 5000));
    rpc_cancel(call);
    assert_true(wait_for(&r2.ended, 1, 2000));
    rpc_release(call);
    for (int i = 0; i < 2000 && rpc_server_calls(f->server); i++)
        usleep(1000);
    assert_int_equal(rpc_server_calls(f->server), 0);
    finish(f);
}

static void test_server_cancel(void **state)
{
    struct fixture *f = start(address_get(state), NULL, NULL);
    struct record r = {0};
    struct rpc_call *call = open_call(f, "/test.T/Talk", 0, &r);
    assert_int_equal(rpc_send(call, "cancel", 6), OK);
    assert_true(wait_for(&r.ended, 1, 3000));
    assert_int_equal(r.code, RPC_CANCELLED);
    assert_true(wait_for(&seen.n_close, 1, 3000));
    rpc_release(call);
    finish(f);
}

static void test_deadline(void **state)
{
    struct fixture *f = start(address_get(state), NULL, NULL);
    struct record r = {0};
    int64_t t0 = clock_monotonic_us();
    struct rpc_call *call = open_call(f, "/test.T/Talk", 150, &r);
    assert_int_equal(rpc_send(call, "x", 1), OK);
    assert_true(wait_for(&r.ended, 1, 3000));
    int64_t took = clock_monotonic_us() - t0;
    assert_int_equal(r.code, RPC_DEADLINE_EXCEEDED);
    assert_in_range(took, 140000, 1500000);
    assert_true(wait_for(&seen.n_cancelled, 1, 3000));
    rpc_release(call);
    finish(f);
}

static void test_big(void **state)
{
    struct fixture *f = start(address_get(state), NULL, NULL);
    size_t n = 16 << 20;
    char *data;
    struct buf reply;
    int code;
    assert_int_equal(mem_alloc((size_t)RPC_MESSAGE_BYTES_MAX + 1, (void **)&data), OK);
    for (size_t i = 0; i < n; i++)
        data[i] = (char)(i * 2654435761u >> 13);
    buf_init(&reply, 0);
    assert_int_equal(
        rpc_unary(f->channel, "/test.T/Echo", (struct span){data, n}, 20000, &reply, &code), OK);
    assert_int_equal(reply.n, n);
    assert_memory_equal(reply.data, data, n);
    buf_clear(&reply);
    assert_int_equal(rpc_unary(f->channel, "/test.T/Echo",
                               (struct span){data, (size_t)RPC_MESSAGE_BYTES_MAX + 1}, 20000,
                               &reply, &code),
                     ERR_TOO_BIG);
    buf_fini(&reply);
    mem_free(data);
    struct rpc_channel *small;
    struct rpc_channel_config cc = {.address = f->address, .message_bytes_max = 1000};
    assert_int_equal(rpc_channel_create(&cc, &small), OK);
    char request[2000] = {0};
    buf_init(&reply, 0);
    assert_int_equal(rpc_unary(small, "/test.T/Echo", (struct span){request, sizeof request}, 5000,
                               &reply, &code),
                     ERR_FULL);
    assert_int_equal(code, RPC_RESOURCE_EXHAUSTED);
    buf_fini(&reply);
    rpc_channel_destroy(small);
    finish(f);
}

static void test_slow_reader(void **state)
{
    struct fixture *f = start(address_get(state), NULL, NULL);
    struct record r = {.hold_after = 3};
    struct rpc_call *call = open_call(f, "/test.T/Talk", 0, &r);
    /* We hold our own reading; the echo server's queue fills. Our sends stay small and are taken.
     */
    static char chunk[8192];
    int sent = 0, full = 0;
    for (; sent < 3000 && !full; sent++) {
        enum err e = rpc_send(call, chunk, sizeof chunk);
        if (e == ERR_FULL) full = 1;
        if (sent % 64 == 0) usleep(1000);
    }
    usleep(100000);
    assert_int_equal(atomic_load(&r.n_messages), 3);
    assert_int_equal(atomic_load(&r.ended), 0);
    rpc_resume(call);
    assert_true(wait_for(&r.n_messages, 900, 20000)); /* 8 MiB of queue is 1024 of them */
    rpc_cancel(call);
    assert_true(wait_for(&r.ended, 1, 3000));
    rpc_release(call);

    struct record r2 = {.hold_after = 2}; /* the end waits behind the messages held back */
    call = open_call(f, "/test.T/Count", 20000, &r2);
    assert_int_equal(rpc_send(call, "10", 2), OK);
    rpc_half_close(call);
    assert_true(wait_for(&r2.n_messages, 2, 5000));
    usleep(50000);
    assert_int_equal(atomic_load(&r2.n_messages), 2);
    rpc_resume(call);
    assert_true(wait_for(&r2.ended, 1, 5000));
    assert_int_equal(atomic_load(&r2.n_messages), 10);
    assert_int_equal(r2.code, RPC_OK);
    rpc_release(call);
    finish(f);
}

static void test_full(void **state)
{
    struct fixture *f = start(address_get(state), NULL, NULL);
    struct rpc_channel *ch;
    struct rpc_channel_config cc = {.address = f->address, .send_bytes_max = 1000};
    assert_int_equal(rpc_channel_create(&cc, &ch), OK);
    struct record r = {.hold_after = 1};
    struct rpc_handler h = {record_message, record_end, &r};
    struct rpc_call *call;
    assert_int_equal(rpc_open(ch, "/test.T/Count", 0, &h, &call), OK); /* reads one message only */
    static char big[300000];
    enum err e = OK;
    int n = 0;
    assert_int_equal(rpc_send(call, "1", 1), OK);
    assert_true(wait_for(&r.n_messages, 1, 5000)); /* it was taken; what follows is not */
    for (; n < 1000 && !e; n++)
        e = rpc_send(call, big, sizeof big);
    assert_int_equal(e, ERR_FULL);
    assert_true(rpc_send_pending_bytes(call) > 0);
    assert_true(n < 1000);
    rpc_cancel(call);
    assert_true(wait_for(&r.ended, 1, 3000));
    assert_int_equal(rpc_send_pending_bytes(call), 0);
    rpc_release(call);
    rpc_channel_destroy(ch);
    finish(f);
}

static void test_server_goes(void **state)
{
    struct fixture *f = start(address_get(state), NULL, NULL);
    struct record r[8] = {{0}};
    struct rpc_call *calls[8];
    for (int i = 0; i < 8; i++) {
        calls[i] = open_call(f, "/test.T/Talk", 0, &r[i]);
        assert_int_equal(rpc_send(calls[i], "x", 1), OK);
    }
    for (int i = 0; i < 8; i++)
        assert_true(wait_for(&r[i].n_messages, 1, 5000));
    assert_false(rpc_server_drain(f->server, 30)); /* they live on, but nothing new is taken */
    struct buf reply;
    int code;
    assert_int_equal(unary(f, "/test.T/Echo", &reply, &code), ERR_PEER);
    buf_fini(&reply);
    assert_int_equal(rpc_send(calls[0], "y", 1), OK);
    assert_true(wait_for(&r[0].n_messages, 2, 5000));
    rpc_server_destroy(f->server);
    f->server = NULL;
    assert_int_equal(atomic_load(&seen.n_close), 8);
    for (int i = 0; i < 8; i++) {
        assert_true(wait_for(&r[i].ended, 1, 5000));
        assert_int_not_equal(r[i].code, RPC_OK);
        rpc_release(calls[i]);
    }
    finish(f);
}

static void test_channel_goes(void **state)
{
    struct fixture *f = start(address_get(state), NULL, NULL);
    struct record r = {0};
    struct rpc_call *call = open_call(f, "/test.T/Talk", 0, &r);
    assert_int_equal(rpc_send(call, "x", 1), OK);
    assert_true(wait_for(&r.n_messages, 1, 5000));
    rpc_channel_destroy(f->channel);
    f->channel = NULL;
    assert_int_equal(atomic_load(&r.ended), 1);
    assert_true(wait_for(&seen.n_cancelled, 1, 3000));
    assert_int_equal(rpc_send(call, "x", 1), ERR_CANCELLED); /* a handle outlives everything */
    rpc_cancel(call);
    rpc_resume(call);
    rpc_release(call);
    finish(f);
}

static void test_no_server(void **state)
{
    struct fixture *f = start(address_get(state), NULL, NULL);
    rpc_server_destroy(f->server);
    f->server = NULL;
    struct buf reply;
    int code;
    assert_int_equal(unary(f, "/test.T/Echo", &reply, &code), ERR_PEER);
    assert_int_equal(code, RPC_UNAVAILABLE);
    buf_fini(&reply);
    finish(f);
}

static void test_taken(void **state)
{
    struct fixture *f = start(address_get(state), NULL, NULL);
    struct rpc_server_config sc = {.address = f->address, .methods = methods, .n_methods = 1};
    struct rpc_server *second = NULL;
    if (!strncmp(f->address, "unix:", 5)) { /* gRPC takes a socket file over; that is its way */
        finish(f);
        return;
    }
    assert_int_equal(rpc_server_create(&sc, &second), ERR_IO);
    assert_null(second);
    finish(f);
}

static void *many_run(void *ctx)
{
    struct fixture *f = ctx;
    for (int i = 0; i < 60; i++) {
        struct buf reply;
        int code;
        if (unary(f, "/test.T/Echo", &reply, &code)) atomic_fetch_add(&seen.n_inside, 1);
        buf_fini(&reply);
        struct record r = {0};
        struct rpc_call *call = open_call(f, "/test.T/Talk", 0, &r);
        (void)rpc_send(call, "x", 1);
        if (i % 3) wait_for(&r.n_messages, 1, 5000);
        if (i % 2)
            rpc_cancel(call);
        else
            rpc_half_close(call);
        if (!wait_for(&r.ended, 1, 10000)) atomic_fetch_add(&seen.n_inside, 1);
        rpc_release(call);
    }
    return NULL;
}

static void test_many(void **state)
{
    struct fixture *f = start(address_get(state), NULL, NULL);
    pthread_t threads[6];
    for (int i = 0; i < 6; i++)
        pthread_create(&threads[i], NULL, many_run, f);
    for (int i = 0; i < 6; i++)
        pthread_join(threads[i], NULL);
    assert_int_equal(atomic_load(&seen.n_inside), 0);
    assert_true(rpc_server_drain(f->server, 5000));
    assert_int_equal(atomic_load(&seen.n_open), atomic_load(&seen.n_close));
    finish(f);
}

static void test_calls_max(void **state)
{
    struct rpc_server *s;
    struct fixture f = {.listen = address_get(state)};
    struct rpc_server_config sc = {
        .address = f.listen, .n_calls_max = 2, .methods = methods, .n_methods = 5};
    memset(&seen, 0, sizeof seen);
    assert_int_equal(rpc_server_create(&sc, &s), OK);
    f.server = s;
    address_of(&f);
    struct rpc_channel *channels[3];
    struct record r[3] = {{0}};
    struct rpc_call *calls[3];
    for (int i = 0; i < 3;
         i++) { /* connections of their own: the limit of one would delay, not refuse */
        struct rpc_channel_config cc = {.address = f.address};
        assert_int_equal(rpc_channel_create(&cc, &channels[i]), OK);
        f.channel = channels[i];
        calls[i] = open_call(&f, "/test.T/Talk", 0, &r[i]);
        (void)rpc_send(calls[i], "x", 1);
        if (i < 2) assert_true(wait_for(&r[i].n_messages, 1, 5000));
    }
    assert_true(wait_for(&r[2].ended, 1, 5000));
    assert_int_equal(r[2].code, RPC_RESOURCE_EXHAUSTED);
    for (int i = 0; i < 3; i++) {
        rpc_cancel(calls[i]);
        rpc_release(calls[i]);
        rpc_channel_destroy(channels[i]);
    }
    rpc_server_destroy(s);
}

/* Every allocation of create and of a call failing in turn leaves no leak and no crash. */
static void test_no_memory(void **state)
{
    int succeeded = 0;
    for (int n = 1; n < 40 && !succeeded; n++) {
        struct rpc_server *s = NULL;
        struct rpc_channel *ch = NULL;
        struct rpc_server_config sc = {
            .address = address_get(state), .token = "t", .methods = methods, .n_methods = 5};
        struct rpc_channel_config cc = {.address = "127.0.0.1:1", .token = "t"};
        int64_t live = mem_live();
        mem_fail_at(n);
        enum err e = rpc_channel_create(&cc, &ch);
        if (!e) e = rpc_server_create(&sc, &s);
        mem_fail_at(0);
        succeeded = e == OK;
        rpc_channel_destroy(ch);
        rpc_server_destroy(s);
        if (!succeeded) assert_int_equal(mem_live(), live);
    }
    assert_true(succeeded);
}

/* ---- gRPC alone: strangers, TLS, a killed process ---- */

static void test_strangers(void **state)
{
    static const char *const noises[] = {
        "GET / HTTP/1.1\r\nHost: x\r\n\r\n", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff", "",
        "\0\0\0\0\0\0\0\0\0\0\0\0"};
    struct fixture *f = start(address_get(state), NULL, NULL);
    int fds[64];
    for (int i = 0; i < 64; i++) {
        struct sockaddr_in to = {.sin_family = AF_INET,
                                 .sin_port = htons((uint16_t)rpc_server_port(f->server)),
                                 .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        const char *noise = noises[i % 5];
        fds[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        assert_int_equal(connect(fds[i], (struct sockaddr *)&to, sizeof to), 0);
        size_t n = i % 5 == 2 ? 33 : i % 5 == 4 ? 12 : strlen(noise);
        assert_int_equal(send(fds[i], noise, n, MSG_NOSIGNAL), n);
    }
    struct buf reply;
    int code;
    for (int i = 0; i < 10; i++) {
        assert_int_equal(unary(f, "/test.T/Echo", &reply, &code), OK);
        buf_fini(&reply);
    }
    for (int i = 0; i < 64; i++)
        close(fds[i]);
    assert_int_equal(unary(f, "/test.T/Echo", &reply, &code), OK);
    buf_fini(&reply);
    finish(f);
}

static void test_tls(void **state)
{
    (void)state;
    char dir[] = "/tmp/heddle-rpc-XXXXXX", command[2048], ca[64], crt[64], key[64], ca2[64];
    assert_non_null(mkdtemp(dir));
    snprintf(command, sizeof command,
             "cd %s && exec 2>/dev/null && "
             "for c in ca ca2; do openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 "
             "-nodes -keyout $c.key -out $c.crt "
             "-subj /CN=$c -days 2 || exit 1; done && "
             "openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout s.key -out "
             "s.csr -subj /CN=node7 && "
             "printf 'subjectAltName=DNS:node7.test' > ext && "
             "openssl x509 -req -in s.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out s.crt "
             "-days 2 -extfile ext",
             dir);
    if (system(command)) skip(); /* no openssl program */
    snprintf(ca, sizeof ca, "%s/ca.crt", dir);
    snprintf(ca2, sizeof ca2, "%s/ca2.crt", dir);
    snprintf(crt, sizeof crt, "%s/s.crt", dir);
    snprintf(key, sizeof key, "%s/s.key", dir);
    const struct {
        struct rpc_tls tls;
        bool ok;
    } clients[] = {
        {{ca, crt, key, "node7.test"}, true},    {{ca, crt, key, "other"}, false},
        {{ca, NULL, NULL, "node7.test"}, false}, {{ca2, crt, key, "node7.test"}, false},
        {{NULL, NULL, NULL, NULL}, false},
    };
    struct rpc_server *s;
    struct rpc_server_config sc = {
        .address = "127.0.0.1:0", .tls = {ca, crt, key, NULL}, .methods = methods, .n_methods = 5};
    if (rpc_server_create(&sc, &s)) fail_msg("%s", err_detail());
    char address[64];
    snprintf(address, sizeof address, "127.0.0.1:%d", rpc_server_port(s));
    for (size_t i = 0; i < sizeof clients / sizeof *clients; i++) {
        struct fixture f = {.server = s};
        struct rpc_channel_config cc = {.address = address, .tls = clients[i].tls};
        struct buf reply;
        int code;
        assert_int_equal(rpc_channel_create(&cc, &f.channel), OK);
        buf_init(&reply, 0);
        enum err e = rpc_unary(f.channel, "/test.T/Echo", span_of("x"), 5000, &reply, &code);
        assert_int_equal(e == OK, clients[i].ok);
        if (e) assert_int_equal(code, RPC_UNAVAILABLE);
        buf_fini(&reply);
        rpc_channel_destroy(f.channel);
    }
    rpc_server_destroy(s);
    struct rpc_server_config bad = {.address = "127.0.0.1:0", .tls = {.cert_file = crt}};
    assert_int_equal(rpc_server_create(&bad, &s), ERR_INVALID);
    bad.tls.key_file = "/nowhere/key";
    assert_int_not_equal(rpc_server_create(&bad, &s), OK);
    bad.tls = (struct rpc_tls){.cert_file = key, .key_file = crt}; /* swapped */
    assert_int_not_equal(rpc_server_create(&bad, &s), OK);
    snprintf(command, sizeof command, "rm -r %s", dir);
    assert_int_equal(system(command), 0);
}

static pid_t peer_start(const char *role, const char *address, int *out_port)
{
    int fds[2];
    pid_t pid;
    char line[32] = "";
    assert_int_equal(pipe(fds), 0);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, fds[1], 1);
    char program[] = "test_rpc",
         *argv[] = {program, (char *)(uintptr_t)role, (char *)(uintptr_t)address, NULL};
    assert_int_equal(posix_spawn(&pid, "/proc/self/exe", &actions, NULL, argv, environ), 0);
    posix_spawn_file_actions_destroy(&actions);
    close(fds[1]);
    assert_true(read(fds[0], line, sizeof line - 1) > 0);
    close(fds[0]);
    *out_port = (int)strtol(line, NULL, 10);
    return pid;
}

static int peer_main(const char *role, const char *address)
{
    struct rpc_server *s = NULL;
    struct rpc_channel *ch = NULL;
    struct record r = {0};
    struct rpc_handler h = {record_message, record_end, &r};
    struct rpc_call *call;
    if (!strcmp(role, "serve")) {
        struct rpc_server_config sc = {.address = address, .methods = methods, .n_methods = 5};
        if (rpc_server_create(&sc, &s)) return 1;
        printf("%d\n", rpc_server_port(s));
    } else {
        struct rpc_channel_config cc = {.address = address};
        if (rpc_channel_create(&cc, &ch) || rpc_open(ch, "/test.T/Talk", 0, &h, &call)) return 1;
        (void)rpc_send(call, "x", 1);
        printf("1\n");
    }
    fflush(stdout);
    for (;;)
        pause();
}

static void test_killed_server(void **state)
{
    (void)state;
    int port, status;
    pid_t pid = peer_start("serve", "127.0.0.1:0", &port);
    struct fixture f = {0};
    struct rpc_channel_config cc = {.address = f.address};
    snprintf(f.address, sizeof f.address, "127.0.0.1:%d", port);
    assert_int_equal(rpc_channel_create(&cc, &f.channel), OK);
    struct record r = {0};
    struct rpc_call *call = open_call(&f, "/test.T/Talk", 0, &r);
    assert_int_equal(rpc_send(call, "x", 1), OK);
    assert_true(wait_for(&r.n_messages, 1, 10000));
    int64_t t0 = clock_monotonic_us();
    kill(pid, SIGKILL);
    assert_true(wait_for(&r.ended, 1, 2000));
    assert_int_equal(r.code, RPC_UNAVAILABLE);
    assert_true(clock_monotonic_us() - t0 < 1000000);
    waitpid(pid, &status, 0);
    rpc_release(call);
    rpc_channel_destroy(f.channel);
}

static void test_killed_client(void **state)
{
    struct fixture *f = start(address_get(state), NULL, NULL);
    int port, status;
    pid_t pid = peer_start("talk", f->address, &port);
    assert_true(wait_for(&seen.n_messages, 1, 10000));
    kill(pid, SIGKILL);
    assert_true(wait_for(&seen.n_cancelled, 1, 2000));
    waitpid(pid, &status, 0);
    finish(f);
}

#define CASES(X)                                                                                   \
    X(test_unary)                                                                                  \
    X(test_no_request) X(test_token) X(test_server_stream) X(test_bidi) X(test_client_cancel)      \
        X(test_server_cancel) X(test_deadline) X(test_big) X(test_slow_reader) X(test_full)        \
            X(test_server_goes) X(test_channel_goes) X(test_no_server) X(test_taken) X(test_many)  \
                X(test_calls_max) X(test_no_memory)

int main(int argc, char **argv)
{
    static char local[] = "local:test", tcp[] = "127.0.0.1:0", unix_path[64];
    if (argc == 3) return peer_main(argv[1], argv[2]);
    snprintf(unix_path, sizeof unix_path, "unix:/tmp/heddle-rpc-%d.sock", (int)getpid());
#define LOCAL(f) {"local " #f, f, NULL, NULL, local},
#define TCP(f)   {"tcp " #f, f, NULL, NULL, tcp},
#define UNIX(f)  {"unix " #f, f, NULL, NULL, unix_path},
    const struct CMUnitTest tests[] = {CASES(LOCAL) CASES(TCP) CASES(UNIX) TCP(test_strangers) TCP(
        test_tls) TCP(test_killed_server) TCP(test_killed_client)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
