/* Goal: the same promises of rpc.h over gRPC (TCP and unix socket) and over threads.
 * Method: one set of cases, run once per address. */
#include "unit/proto/rpc_fixture.h"

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
    assert_int_equal(rpc_send(call, "100000000", 9), OK);
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

#define CASES(X)                                                                                   \
    X(test_unary)                                                                                  \
    X(test_no_request)                                                                             \
    X(test_token)                                                                                  \
    X(test_server_stream) X(test_bidi) X(test_client_cancel) X(test_server_cancel)                 \
        X(test_deadline) X(test_big) X(test_slow_reader) X(test_full) X(test_server_goes)          \
            X(test_channel_goes) X(test_no_server) X(test_taken) X(test_many) X(test_calls_max)    \
                X(test_no_memory)

int main(void)
{
    static char local[] = "local:test", tcp[] = "127.0.0.1:0", unix_path[64];
    snprintf(unix_path, sizeof unix_path, "unix:/tmp/heddle-rpc-%d.sock", (int)getpid());
#define LOCAL(f) {"local " #f, f, NULL, NULL, local},
#define TCP(f)   {"tcp " #f, f, NULL, NULL, tcp},
#define UNIX(f)  {"unix " #f, f, NULL, NULL, unix_path},
    const struct CMUnitTest tests[] = {CASES(LOCAL) CASES(TCP) CASES(UNIX)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
