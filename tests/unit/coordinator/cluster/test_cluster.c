/* Goal: whatever comes to the workers' port, only its own stream suffers: wrong tokens, first
 * messages that are no join, garbage, silence, floods, results nobody asked for, dead ranks whose
 * place is taken. Method: raw streams, written by hand, beside two well-behaved ones; over threads
 * and over gRPC. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base/clock.h"
#include "base/mem.h"
#include "base/rand.h"
#include "coordinator/cluster/cluster.h"
#include "proto/cluster.pb-c.h"
#include "proto/envelope.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

/* ---- Hooks ---- */

static atomic_int n_up, n_down, n_results;
static atomic_uint_fast64_t epoch_up;

static void on_up(void *ctx, uint32_t group, const struct group_info *info)
{
    (void)ctx, (void)group;
    atomic_store(&epoch_up, info->epoch);
    atomic_fetch_add(&n_up, 1);
}
static void on_down(void *ctx, uint32_t group, uint64_t epoch)
{
    (void)ctx, (void)group, (void)epoch;
    atomic_fetch_add(&n_down, 1);
}
static void on_result(void *ctx, uint32_t group, uint64_t epoch, const void *bytes, size_t n)
{
    (void)ctx, (void)group, (void)epoch, (void)bytes, (void)n;
    atomic_fetch_add(&n_results, 1);
}

/* ---- A raw stream ---- */

struct stream {
    struct rpc_channel *channel;
    struct rpc_call *call;
    atomic_int n_welcome, n_refuse, n_halt, n_plan, n_exchanged, ended;
    atomic_uint_fast64_t epoch;
    int code;
    char reason[256], status[256];
};

static void stream_message(struct rpc_call *call, void *ctx, struct span bytes)
{
    struct stream *s = ctx;
    (void)call;
    Heddle__Cluster__ToWorker *m =
        heddle__cluster__to_worker__unpack(NULL, bytes.n, (const uint8_t *)bytes.data);
    assert_non_null(m);
    switch (m->kind_case) {
    case HEDDLE__CLUSTER__TO_WORKER__KIND_WELCOME:
        atomic_store(&s->epoch, m->welcome->epoch);
        atomic_fetch_add(&s->n_welcome, 1);
        break;
    case HEDDLE__CLUSTER__TO_WORKER__KIND_REFUSE:
        snprintf(s->reason, sizeof s->reason, "%s", m->refuse->reason);
        atomic_fetch_add(&s->n_refuse, 1);
        break;
    case HEDDLE__CLUSTER__TO_WORKER__KIND_HALT:
        atomic_fetch_add(&s->n_halt, 1);
        break;
    case HEDDLE__CLUSTER__TO_WORKER__KIND_PLAN:
        atomic_fetch_add(&s->n_plan, 1);
        break;
    case HEDDLE__CLUSTER__TO_WORKER__KIND_EXCHANGED:
        atomic_fetch_add(&s->n_exchanged, 1);
        break;
    default:
        break;
    }
    heddle__cluster__to_worker__free_unpacked(m, NULL);
}

static void stream_end(struct rpc_call *call, void *ctx, int code, const char *text)
{
    struct stream *s = ctx;
    (void)call;
    s->code = code;
    snprintf(s->status, sizeof s->status, "%s", text);
    atomic_store(&s->ended, 1);
}

static void stream_open(struct stream *s, const char *address, const char *token)
{
    struct rpc_channel_config config = {.address = address, .token = token};
    struct rpc_handler handler = {stream_message, stream_end, s};
    *s = (struct stream){0};
    assert_int_equal(rpc_channel_create(&config, &s->channel), OK);
    assert_int_equal(rpc_open(s->channel, "/heddle.cluster.Cluster/Attach", 0, &handler, &s->call),
                     OK);
}

static void stream_close(struct stream *s)
{
    if (!s->call) return;
    rpc_release(s->call);
    rpc_channel_destroy(s->channel);
    s->call = NULL;
}

static void say(struct stream *s, Heddle__Cluster__FromWorker *m)
{
    (void)envelope_send(s->call, &m->base);
}

static void say_join(struct stream *s, uint32_t rank, uint64_t incarnation)
{
    Heddle__Cluster__Join j = HEDDLE__CLUSTER__JOIN__INIT;
    Heddle__Cluster__FromWorker m = HEDDLE__CLUSTER__FROM_WORKER__INIT;
    static char digest[] = "d", words[] = "a\nb\033[2J\xff";
    j.protocol = 1, j.size = 2, j.rank = rank, j.incarnation = incarnation;
    j.model_digest = digest, j.host = words, j.device = words;
    j.block_size = 16, j.blocks_max = 10, j.slots_max = 4, j.step_tokens_max = 64,
    j.step_rows_max = 8;
    j.context_max = 128, j.vocab_size = 100;
    m.kind_case = HEDDLE__CLUSTER__FROM_WORKER__KIND_JOIN;
    m.join = &j;
    say(s, &m);
}

static void say_ready(struct stream *s, uint64_t epoch)
{
    Heddle__Cluster__Ready r = HEDDLE__CLUSTER__READY__INIT;
    Heddle__Cluster__FromWorker m = HEDDLE__CLUSTER__FROM_WORKER__INIT;
    r.epoch = epoch;
    m.kind_case = HEDDLE__CLUSTER__FROM_WORKER__KIND_READY;
    m.ready = &r;
    say(s, &m);
}

static void say_step(struct stream *s, bool ack, uint64_t epoch, uint64_t step)
{
    Heddle__Cluster__StepResult r = HEDDLE__CLUSTER__STEP_RESULT__INIT;
    Heddle__Cluster__FromWorker m = HEDDLE__CLUSTER__FROM_WORKER__INIT;
    r.epoch = epoch, r.step = step;
    m.kind_case =
        ack ? HEDDLE__CLUSTER__FROM_WORKER__KIND_ACK : HEDDLE__CLUSTER__FROM_WORKER__KIND_RESULT;
    m.result = &r;
    say(s, &m);
}

static void say_exchange(struct stream *s, uint64_t epoch, const char *key, size_t n)
{
    static uint8_t bytes[128 << 10];
    Heddle__Cluster__Exchange x = HEDDLE__CLUSTER__EXCHANGE__INIT;
    Heddle__Cluster__FromWorker m = HEDDLE__CLUSTER__FROM_WORKER__INIT;
    x.epoch = epoch, x.key = (char *)(uintptr_t)key, x.mine = (ProtobufCBinaryData){n, bytes};
    m.kind_case = HEDDLE__CLUSTER__FROM_WORKER__KIND_EXCHANGE;
    m.exchange = &x;
    say(s, &m);
}

static void say_fault(struct stream *s, uint64_t epoch)
{
    Heddle__Cluster__Fault x = HEDDLE__CLUSTER__FAULT__INIT;
    Heddle__Cluster__FromWorker m = HEDDLE__CLUSTER__FROM_WORKER__INIT;
    x.epoch = epoch;
    m.kind_case = HEDDLE__CLUSTER__FROM_WORKER__KIND_FAULT;
    m.fault = &x;
    say(s, &m);
}

static void say_beat(struct stream *s)
{
    Heddle__Cluster__Heartbeat h = HEDDLE__CLUSTER__HEARTBEAT__INIT;
    Heddle__Cluster__FromWorker m = HEDDLE__CLUSTER__FROM_WORKER__INIT;
    m.kind_case = HEDDLE__CLUSTER__FROM_WORKER__KIND_HEARTBEAT;
    m.heartbeat = &h;
    say(s, &m);
}

static bool reaches(atomic_int *value, int want, int ms)
{
    for (int64_t until = clock_monotonic_us() + ms * 1000LL; clock_monotonic_us() < until;
         usleep(300))
        if (atomic_load(value) >= want) return true;
    return false;
}

/* ---- A cluster of one group of two ranks, both up ---- */

struct fixture {
    struct cluster *cluster;
    char address[64];
    struct stream ranks[2];
    pthread_t beater;
    atomic_bool stop, mute[2];
};

static void *beat_run(void *ctx)
{
    struct fixture *f = ctx;
    for (; !atomic_load(&f->stop); usleep(50000))
        for (int i = 0; i < 2; i++)
            if (!atomic_load(&f->mute[i])) say_beat(&f->ranks[i]);
    return NULL;
}

static int setup(void **state, const char *listen)
{
    struct fixture *f;
    struct cluster_hooks hooks = {.group_up = on_up, .group_down = on_down, .result = on_result};
    struct cluster_config config = {.address = listen,
                                    .token = "secret",
                                    .n_groups = 1,
                                    .n_ranks = 2,
                                    .heartbeat_ms = 50,
                                    .dead_ms = 600,
                                    .join_timeout_ms = 400,
                                    .form_timeout_ms = 500,
                                    .n_pending_max = 4};
    atomic_store(&n_up, 0), atomic_store(&n_down, 0), atomic_store(&n_results, 0);
    assert_int_equal(mem_alloc(sizeof *f, (void **)&f), OK);
    if (cluster_create(&config, &hooks, &f->cluster)) fail_msg("%s", err_detail());
    int port = cluster_port(f->cluster);
    snprintf(f->address, sizeof f->address, port ? "127.0.0.1:%d" : "local:port", port);
    for (uint32_t i = 0; i < 2; i++) {
        stream_open(&f->ranks[i], f->address, "secret");
        say_join(&f->ranks[i], i, 100 + i);
    }
    pthread_create(&f->beater, NULL, beat_run, f);
    for (int i = 0; i < 2; i++)
        assert_true(reaches(&f->ranks[i].n_welcome, 1, 3000));
    for (int i = 0; i < 2; i++)
        say_ready(&f->ranks[i], atomic_load(&f->ranks[i].epoch));
    assert_true(reaches(&n_up, 1, 3000));
    *state = f;
    return 0;
}

static int setup_local(void **state)
{
    return setup(state, "local:port");
}
static int setup_tcp(void **state)
{
    return setup(state, "127.0.0.1:0");
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    atomic_store(&f->stop, true);
    pthread_join(f->beater, NULL);
    for (int i = 0; i < 2; i++)
        stream_close(&f->ranks[i]);
    cluster_destroy(f->cluster);
    mem_free(f);
    return 0;
}

static void undisturbed(struct fixture *f)
{
    assert_int_equal(atomic_load(&n_down), 0);
    assert_int_equal(cluster_groups_up(f->cluster), 1);
    for (int i = 0; i < 2; i++)
        assert_int_equal(atomic_load(&f->ranks[i].ended), 0);
}

static void plan_send(struct fixture *f, uint64_t step)
{
    Heddle__Cluster__StepPlan p = HEDDLE__CLUSTER__STEP_PLAN__INIT;
    Heddle__Cluster__ToWorker m = HEDDLE__CLUSTER__TO_WORKER__INIT;
    struct rpc_bytes *bytes;
    p.epoch = atomic_load(&epoch_up), p.step = step;
    m.kind_case = HEDDLE__CLUSTER__TO_WORKER__KIND_PLAN, m.plan = &p;
    assert_int_equal(envelope_pack(&m.base, &bytes), OK);
    assert_int_equal(
        cluster_send_plan(f->cluster, 0, rpc_bytes_span(bytes).data, rpc_bytes_span(bytes).n), OK);
    rpc_bytes_release(bytes);
}

/* ---- Cases ---- */

static void test_strangers(void **state)
{
    struct fixture *f = *state;
    static const struct {
        const char *token, *bytes;
        size_t n;
        int code;
    } cases[] = {
        {"wrong", "", 0, RPC_UNAUTHENTICATED},
        {NULL, "", 0, RPC_UNAUTHENTICATED},
        {"secret", "", 0, RPC_FAILED_PRECONDITION},
        {"secret", "\x12\x00", 2, RPC_FAILED_PRECONDITION},                 /* ready first */
        {"secret", "\x1a\x04\x08\x01\x10\x01", 6, RPC_FAILED_PRECONDITION}, /* a result first */
        {"secret", "\x0a\x05\x0a", 3, RPC_FAILED_PRECONDITION},             /* cut short */
        {"secret", "\x0a\x00", 2, RPC_FAILED_PRECONDITION}, /* a join that says nothing */
        {"secret", "\x0a\x02\x12\xff", 4, RPC_FAILED_PRECONDITION},
        {"secret", "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", 12, RPC_FAILED_PRECONDITION},
        {"secret", "GET / HTTP/1.1", 14, RPC_FAILED_PRECONDITION},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct stream s;
        stream_open(&s, f->address, cases[i].token);
        (void)rpc_send(s.call, cases[i].bytes, cases[i].n);
        assert_true(reaches(&s.ended, 1, 3000));
        assert_int_equal(s.code, cases[i].code);
        stream_close(&s);
    }
    undisturbed(f);
    struct cluster_status *status;
    assert_int_equal(cluster_status_create(f->cluster, &status), OK);
    assert_int_equal(status->n_refused, sizeof cases / sizeof *cases);
    assert_int_equal(status->n_pending, 0);
    assert_string_equal(status->ranks[0].host,
                        "a?b?[2J?"); /* nothing of a rank's words reaches a terminal */
    cluster_status_destroy(status);
}

static void test_silence_and_flood(void **state)
{
    struct fixture *f = *state;
    struct stream s[8];
    int n_full = 0, n_late = 0;
    for (int i = 0; i < 8; i++)
        stream_open(&s[i], f->address, "secret");
    for (int i = 0; i < 8; i++)
        assert_true(reaches(&s[i].ended, 1, 3000));
    for (int i = 0; i < 8; i++) {
        n_full += s[i].code == RPC_RESOURCE_EXHAUSTED; /* beyond n_pending_max */
        n_late += s[i].code == RPC_FAILED_PRECONDITION && strstr(s[i].reason, "did not join");
        stream_close(&s[i]);
    }
    assert_int_equal(n_full, 4);
    assert_int_equal(n_late, 4);
    undisturbed(f);
}

static void test_living_place(void **state)
{
    struct fixture *f = *state;
    struct stream s;
    stream_open(&s, f->address, "secret");
    say_join(&s, 1, 999);
    assert_true(reaches(&s.n_refuse, 1, 3000));
    assert_non_null(strstr(s.reason, "living process"));
    assert_true(reaches(&s.ended, 1, 3000));
    stream_close(&s);
    undisturbed(f);
}

/* The holder has fallen silent without its stream breaking: the claimant waits, then gets the
 * place. */
static void test_dead_place(void **state)
{
    struct fixture *f = *state;
    struct stream s;
    atomic_store(&f->mute[1], true);
    usleep(60000);
    int64_t t0 = clock_monotonic_us();
    stream_open(&s, f->address, "secret");
    say_join(&s, 1, 999);
    assert_true(reaches(&n_down, 1, 3000));
    assert_true(reaches(&s.n_welcome, 1, 3000));
    assert_in_range(clock_monotonic_us() - t0, 300000, 2500000);
    assert_int_equal(atomic_load(&s.n_refuse), 0);
    assert_true(reaches(&f->ranks[1].ended, 1, 1000)); /* the old stream is ended */
    assert_true(reaches(&f->ranks[0].n_halt, 1, 1000));
    assert_true(reaches(&f->ranks[0].n_welcome, 2, 1000));
    uint64_t epoch = atomic_load(&s.epoch);
    assert_int_equal(epoch, atomic_load(&f->ranks[0].epoch));
    say_ready(&s, epoch - 1); /* of an epoch that has ended: nothing */
    say_ready(&f->ranks[0], epoch);
    usleep(30000);
    assert_int_equal(atomic_load(&n_up), 1);
    say_ready(&s, epoch);
    assert_true(reaches(&n_up, 2, 1000));
    stream_close(&s);
}

/* The same process dials again while its old stream still seems to live. */
static void test_same_process(void **state)
{
    struct fixture *f = *state;
    struct stream s;
    stream_open(&s, f->address, "secret");
    say_join(&s, 0, 100);
    assert_true(reaches(&s.n_welcome, 1, 1000));
    assert_true(reaches(&f->ranks[0].ended, 1, 1000));
    assert_true(reaches(&n_down, 1, 1000));
    stream_close(&s);
}

static void lose(struct fixture *f, int rank, const char *words)
{
    assert_true(reaches(&f->ranks[rank].ended, 1, 2000));
    if (words && !strstr(f->ranks[rank].reason, words))
        fail_msg("'%s' does not say '%s'", f->ranks[rank].reason, words);
    assert_true(reaches(&n_down, 1, 2000));
    assert_true(reaches(&f->ranks[!rank].n_halt, 1, 2000));
    assert_int_equal(atomic_load(&f->ranks[!rank].ended), 0);
    assert_int_equal(atomic_load(&n_results), 0);
}

static void test_result_unasked(void **state)
{
    struct fixture *f = *state;
    say_step(&f->ranks[0], false, atomic_load(&epoch_up), 0);
    lose(f, 0, "did not get");
}

static void test_result_of_the_future(void **state)
{
    struct fixture *f = *state;
    plan_send(f, 1);
    assert_true(reaches(&f->ranks[0].n_plan, 1, 1000));
    say_step(&f->ranks[0], false, atomic_load(&epoch_up), 2);
    lose(f, 0, "did not get");
}

static void test_result_of_wrong_rank(void **state)
{
    struct fixture *f = *state;
    plan_send(f, 1);
    say_step(&f->ranks[1], false, atomic_load(&epoch_up), 1);
    lose(f, 1, "did not get");
}

static void test_result_malformed(void **state)
{
    struct fixture *f = *state;
    plan_send(f, 1);
    (void)rpc_send(f->ranks[0].call, "\x1a\x03\x08\x01\xff", 5);
    lose(f, 0, "malformed");
}

static void test_stale_results(void **state)
{
    struct fixture *f = *state;
    plan_send(f, 1);
    say_step(&f->ranks[0], false, atomic_load(&epoch_up) + 7, 1); /* dropped */
    say_step(&f->ranks[1], true, atomic_load(&epoch_up) - 1, 1);
    say_ready(&f->ranks[0], 12345);
    usleep(30000);
    assert_int_equal(atomic_load(&n_results), 0);
    say_step(&f->ranks[0], false, atomic_load(&epoch_up), 1);
    assert_true(reaches(&n_results, 1, 1000));
    undisturbed(f);
}

/* A rank says that it cannot go on in an epoch: that one ends, another begins without joining anew.
 */
static void test_fault(void **state)
{
    struct fixture *f = *state;
    say_fault(&f->ranks[1], atomic_load(&epoch_up) - 1); /* of one that has ended: nothing */
    usleep(60000);
    undisturbed(f);
    say_fault(&f->ranks[1], atomic_load(&epoch_up));
    assert_true(reaches(&n_down, 1, 1000));
    for (int i = 0; i < 2; i++)
        assert_true(reaches(&f->ranks[i].n_welcome, 2, 1000));
    for (int i = 0; i < 2; i++)
        assert_int_equal(atomic_load(&f->ranks[i].ended), 0);
}

static void test_second_join(void **state)
{
    struct fixture *f = *state;
    say_join(&f->ranks[0], 0, 100);
    lose(f, 0, "second join");
}

static void test_exchange_limits(void **state)
{
    struct fixture *f = *state;
    uint64_t epoch = atomic_load(&epoch_up);
    char key[16];
    say_exchange(&f->ranks[0], epoch + 1, "k", 5); /* of another epoch: dropped */
    say_exchange(&f->ranks[0], epoch, "k", 64 << 10);
    say_exchange(&f->ranks[1], epoch, "k", 0);
    assert_true(reaches(&f->ranks[0].n_exchanged, 1, 1000));
    assert_true(reaches(&f->ranks[1].n_exchanged, 1, 1000));
    undisturbed(f);
    for (int i = 0; i < 16; i++) { /* so many may be open */
        snprintf(key, sizeof key, "k%d", i);
        say_exchange(&f->ranks[0], epoch, key, 10);
    }
    usleep(30000);
    undisturbed(f);
    say_exchange(&f->ranks[0], epoch, "one more", 10);
    lose(f, 0, "too many exchanges");
}

static void test_exchange_big(void **state)
{
    struct fixture *f = *state;
    say_exchange(&f->ranks[1], atomic_load(&epoch_up), "k", (64 << 10) + 1);
    lose(f, 1, "64 KiB");
}

static void test_exchange_twice(void **state)
{
    struct fixture *f = *state;
    say_exchange(&f->ranks[1], atomic_load(&epoch_up), "k", 1);
    say_exchange(&f->ranks[1], atomic_load(&epoch_up), "k", 1);
    lose(f, 1, "twice");
}

/* One rank never says Ready: it loses its place, the other waits. */
static void test_never_ready(void **state)
{
    struct fixture *f = *state;
    struct stream s;
    stream_open(&s, f->address, "secret");
    say_join(&s, 1, 101); /* rank 1 dials again */
    assert_true(reaches(&f->ranks[0].n_welcome, 2, 1000));
    say_ready(&f->ranks[0], atomic_load(&f->ranks[0].epoch));
    for (int i = 0; i < 30 && !atomic_load(&s.ended); i++, usleep(50000))
        say_beat(&s);
    assert_int_equal(atomic_load(&s.ended), 1);
    assert_int_equal(atomic_load(&f->ranks[0].ended), 0);
    assert_true(reaches(&f->ranks[0].n_halt, 2, 1000));
    assert_int_equal(atomic_load(&n_up), 1);
    stream_close(&s);
}

static void test_garbage_streams(void **state)
{
    struct fixture *f = *state;
    struct rand r = rand_seeded(7);
    for (int i = 0; i < 60; i++) {
        struct stream s;
        char bytes[64];
        size_t n = (size_t)rand_below(&r, sizeof bytes);
        stream_open(&s, f->address, "secret");
        for (size_t k = 0; k < n; k++)
            bytes[k] = (char)rand_next(&r);
        if (i % 2) bytes[0] = 0x0a;
        (void)rpc_send(s.call, bytes, n);
        if (i % 3 == 0) rpc_cancel(s.call);
        assert_true(reaches(&s.ended, 1, 3000));
        stream_close(&s);
    }
    undisturbed(f);
}

/* Bytes that are not even HTTP/2. */
static void test_garbage_sockets(void **state)
{
    struct fixture *f = *state;
    struct rand r = rand_seeded(8);
    int fds[40], port = cluster_port(f->cluster);
    if (!port) return; /* threads have no socket */
    for (int i = 0; i < 40; i++) {
        struct sockaddr_in to = {.sin_family = AF_INET,
                                 .sin_port = htons((uint16_t)port),
                                 .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        char bytes[512] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        size_t at = i % 2 ? 24 : 0, n = at + (size_t)rand_below(&r, 400);
        for (size_t k = at; k < n; k++)
            bytes[k] = (char)rand_next(&r);
        fds[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        assert_int_equal(connect(fds[i], (struct sockaddr *)&to, sizeof to), 0);
        (void)!send(fds[i], bytes, n, MSG_NOSIGNAL);
    }
    plan_send(f, 1);
    assert_true(reaches(&f->ranks[1].n_plan, 1, 2000));
    for (int i = 0; i < 40; i++)
        close(fds[i]);
    undisturbed(f);
}

static void test_config(void **state)
{
    struct cluster_hooks hooks = {.group_up = on_up, .group_down = on_down, .result = on_result};
    struct cluster *c;
    (void)state;
    const struct cluster_config bad[] = {{.address = "local:x", .n_groups = 0, .n_ranks = 1},
                                         {.address = "local:x", .n_groups = 1, .n_ranks = 0},
                                         {.address = "local:x", .n_groups = 1, .n_ranks = 257},
                                         {.address = "local:x", .n_groups = 4097, .n_ranks = 1},
                                         {.address = "local:x", .n_groups = 4096, .n_ranks = 256},
                                         {.address = NULL, .n_groups = 1, .n_ranks = 1}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(cluster_create(&bad[i], &hooks, &c), ERR_INVALID);
    struct cluster_config good = {.address = "local:x", .n_groups = 1, .n_ranks = 1};
    int made = 0;
    for (int n = 1; n < 40 && !made; n++) {
        int64_t live = mem_live();
        mem_fail_at(n);
        enum err e = cluster_create(&good, &hooks, &c);
        mem_fail_at(0);
        made = e == OK;
        if (made) cluster_destroy(c);
        assert_int_equal(mem_live(), live);
    }
    assert_true(made);
}

int main(void)
{
#define BOTH(f)                                                                                    \
    {"local " #f, f, setup_local, teardown, NULL},                                                 \
    {                                                                                              \
        "tcp " #f, f, setup_tcp, teardown, NULL                                                    \
    }
    const struct CMUnitTest tests[] = {BOTH(test_strangers),
                                       BOTH(test_silence_and_flood),
                                       BOTH(test_living_place),
                                       BOTH(test_dead_place),
                                       BOTH(test_same_process),
                                       BOTH(test_result_unasked),
                                       BOTH(test_result_of_the_future),
                                       BOTH(test_result_of_wrong_rank),
                                       BOTH(test_result_malformed),
                                       BOTH(test_stale_results),
                                       BOTH(test_fault),
                                       BOTH(test_second_join),
                                       BOTH(test_exchange_limits),
                                       BOTH(test_exchange_big),
                                       BOTH(test_exchange_twice),
                                       BOTH(test_never_ready),
                                       BOTH(test_garbage_streams),
                                       BOTH(test_garbage_sockets),
                                       cmocka_unit_test(test_config)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
