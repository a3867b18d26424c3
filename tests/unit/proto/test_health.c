/* Goal: grpc.health.v1 and server reflection answer as their public protocols say, byte for byte
 * where the conformance data has the bytes. Method: a server over gRPC and over threads, asked with
 * raw messages; descriptors compared with protoc's own. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base/clock.h"
#include "base/mem.h"
#include "proto/envelope.h"
#include "proto/health.h"
#include "proto/reflection.h"
#include "proto/reflection.pb-c.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct fixture {
    struct health *health;
    struct reflection *reflection;
    struct rpc_server *server;
    struct rpc_channel *channel;
    atomic_int ready;
};

static enum health_status status_of(void *ctx, const char *service)
{
    struct fixture *f = ctx;
    if (!strcmp(service, "liveness") || !*service) return HEALTH_SERVING;
    if (!strcmp(service, "readiness"))
        return atomic_load(&f->ready) ? HEALTH_SERVING : HEALTH_NOT_SERVING;
    return HEALTH_SERVICE_UNKNOWN;
}

static void generate(struct rpc_call *call, void *ctx, struct span bytes)
{
    (void)ctx, (void)bytes;
    rpc_finish(call, RPC_OK, NULL);
}

static int setup(void **state, const char *listen)
{
    static const char *const services[] = {"", "liveness", "readiness"};
    struct fixture *f;
    struct rpc_method methods[RPC_METHODS_MAX];
    size_t n = 0;
    char address[64];
    assert_int_equal(mem_alloc(sizeof *f, (void **)&f), OK);
    struct health_config hc = {
        .status = status_of, .ctx = f, .services = services, .n_services = 3, .poll_ms = 10000};
    assert_int_equal(health_create(&hc, &f->health), OK);
    assert_int_equal(reflection_create(&f->reflection), OK);
    methods[n++] = (struct rpc_method){
        .path = "/heddle.v1.Heddle/Generate", .kind = RPC_UNARY, .on_message = generate};
    methods[n++] = (struct rpc_method){
        .path = "/heddle.v1.Heddle/Cancel", .kind = RPC_UNARY, .on_message = generate};
    n += health_methods(f->health, methods + n);
    n += reflection_methods(f->reflection, methods + n);
    reflection_serve(f->reflection, methods, n);
    struct rpc_server_config sc = {
        .address = listen, .token = "t", .methods = methods, .n_methods = n};
    assert_int_equal(rpc_server_create(&sc, &f->server), OK);
    int port = rpc_server_port(f->server);
    snprintf(address, sizeof address, port ? "127.0.0.1:%d" : "local:health", port);
    struct rpc_channel_config cc = {.address = address, .token = "t"};
    assert_int_equal(rpc_channel_create(&cc, &f->channel), OK);
    *state = f;
    return 0;
}

static int setup_tcp(void **state)
{
    return setup(state, "127.0.0.1:0");
}
static int setup_local(void **state)
{
    return setup(state, "local:health");
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    rpc_channel_destroy(f->channel);
    rpc_server_destroy(f->server);
    health_destroy(f->health);
    reflection_destroy(f->reflection);
    mem_free(f);
    return 0;
}

static enum err check(struct fixture *f, const char *service, struct buf *reply, int *code)
{
    char request[300];
    int n = (int)strlen(service);
    request[0] = 0x0a;
    request[1] = (char)n;
    memcpy(request + 2, service, (size_t)n);
    buf_init(reply, 0);
    return rpc_unary(f->channel, "/grpc.health.v1.Health/Check",
                     (struct span){request, n ? (size_t)n + 2 : 0}, 3000, reply, code);
}

static void test_check(void **state)
{
    struct fixture *f = *state;
    const struct {
        const char *service, *reply;
        int code;
    } cases[] = {{"", "\x08\x01", RPC_OK},
                 {"liveness", "\x08\x01", RPC_OK},
                 {"readiness", "\x08\x02", RPC_OK},
                 {"nothing", "", RPC_NOT_FOUND}};
    struct buf reply;
    int code;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        enum err e = check(f, cases[i].service, &reply, &code);
        assert_int_equal(code, cases[i].code);
        assert_int_equal(e, rpc_err(code));
        assert_string_equal(buf_string(&reply), cases[i].reply);
        buf_fini(&reply);
    }
    buf_init(&reply, 0);
    assert_int_equal(rpc_unary(f->channel, "/grpc.health.v1.Health/Check",
                               (struct span){"\x0a\xff", 2}, 3000, &reply, &code),
                     ERR_INVALID);
    buf_fini(&reply);
}

static void test_list(void **state)
{
    struct fixture *f = *state;
    struct buf reply;
    buf_init(&reply, 0);
    assert_int_equal(rpc_unary(f->channel, "/grpc.health.v1.Health/List", (struct span){"", 0},
                               3000, &reply, NULL),
                     OK);
    static const char want[] = "\x0a\x06\x0a\x00\x12\x02\x08\x01"
                               "\x0a\x0e\x0a\x08liveness\x12\x02\x08\x01"
                               "\x0a\x0f\x0a\x09readiness\x12\x02\x08\x02";
    /* The key of the first may be left out, being empty. */
    static const char bare[] = "\x0a\x04\x12\x02\x08\x01";
    size_t tail = sizeof want - 1 - 8;
    bool full = reply.n == sizeof want - 1 && !memcmp(reply.data, want, reply.n);
    bool short_ = reply.n == 6 + tail && !memcmp(reply.data, bare, 6) &&
                  !memcmp(reply.data + 6, want + 8, tail);
    assert_true(full || short_);
    buf_fini(&reply);
}

struct record {
    atomic_int n, ended, code;
    char last[8192];
    size_t last_bytes;
};

static void record_message(struct rpc_call *call, void *ctx, struct span bytes)
{
    struct record *r = ctx;
    (void)call;
    assert_true(bytes.n <= sizeof r->last);
    memcpy(r->last, bytes.data, bytes.n);
    r->last_bytes = bytes.n;
    atomic_fetch_add(&r->n, 1);
}

static void record_end(struct rpc_call *call, void *ctx, int code, const char *text)
{
    struct record *r = ctx;
    (void)call, (void)text;
    atomic_store(&r->code, code);
    atomic_store(&r->ended, 1);
}

static bool reaches(atomic_int *value, int want, int ms)
{
    for (int64_t until = clock_monotonic_us() + ms * 1000LL; clock_monotonic_us() < until;
         usleep(300))
        if (atomic_load(value) >= want) return true;
    return false;
}

static struct rpc_call *open_call(struct fixture *f, const char *path, struct record *r)
{
    struct rpc_handler h = {record_message, record_end, r};
    struct rpc_call *call;
    assert_int_equal(rpc_open(f->channel, path, 0, &h, &call), OK);
    return call;
}

static void test_watch(void **state)
{
    struct fixture *f = *state;
    struct record r = {0}, unknown = {0};
    struct rpc_call *call = open_call(f, "/grpc.health.v1.Health/Watch", &r);
    assert_int_equal(rpc_send(call, "\x0a\x09readiness", 11), OK);
    rpc_half_close(call);
    assert_true(reaches(&r.n, 1, 3000));
    assert_memory_equal(r.last, "\x08\x02", 2);
    struct rpc_call *call2 = open_call(f, "/grpc.health.v1.Health/Watch", &unknown);
    assert_int_equal(rpc_send(call2, "\x0a\x01x", 3), OK);
    assert_true(reaches(&unknown.n, 1, 3000));
    assert_memory_equal(unknown.last, "\x08\x03", 2); /* told, and the call goes on */
    assert_int_equal(atomic_load(&unknown.ended), 0);
    atomic_store(&f->ready, 1);
    health_changed(f->health);
    assert_true(reaches(&r.n, 2, 3000));
    assert_memory_equal(r.last, "\x08\x01", 2);
    health_changed(f->health); /* nothing changed: nothing is said */
    usleep(20000);
    assert_int_equal(atomic_load(&r.n), 2);
    rpc_cancel(call);
    assert_true(reaches(&r.ended, 1, 3000));
    atomic_store(&f->ready, 0);
    health_changed(f->health);
    rpc_release(call);
    rpc_release(call2);
}

/* ---- Reflection ---- */

static Grpc__Reflection__V1__ServerReflectionResponse *ask(struct rpc_call *call, struct record *r,
                                                           int field, const char *text)
{
    char request[300];
    int before = atomic_load(&r->n),
        n = snprintf(request, sizeof request, "%c%c%s", field << 3 | 2, (int)strlen(text), text);
    assert_int_equal(rpc_send(call, request, (size_t)n), OK);
    assert_true(reaches(&r->n, before + 1, 3000));
    Grpc__Reflection__V1__ServerReflectionResponse *response =
        grpc__reflection__v1__server_reflection_response__unpack(NULL, r->last_bytes,
                                                                 (const uint8_t *)r->last);
    assert_non_null(response);
    return response;
}

static void test_reflection(void **state)
{
    static const char *const paths[] = {
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"};
    static const char *const services[] = {"heddle.v1.Heddle", "grpc.health.v1.Health",
                                           "grpc.reflection.v1.ServerReflection",
                                           "grpc.reflection.v1alpha.ServerReflection"};
    const struct {
        const char *symbol, *file;
    } symbols[] = {{"heddle.v1.Heddle", "serve.proto"},
                   {"heddle.v1.Heddle.Generate", "serve.proto"},
                   {"heddle.v1.GenerateRequest", "serve.proto"},
                   {"heddle.v1.SamplingParams.top_k", "serve.proto"},
                   {"heddle.v1.SamplingParams.LogitBiasEntry", "serve.proto"},
                   {"grpc.health.v1.HealthCheckResponse.ServingStatus", "health.proto"},
                   {"grpc.health.v1.HealthCheckResponse.SERVING", "health.proto"},
                   {"grpc.reflection.v1.ServerReflectionRequest", "reflection.proto"},
                   {"grpc.reflection.v1alpha.ServerReflection", "reflection_v1alpha.proto"},
                   {"heddle.v1", NULL},
                   {"heddle.v1.Nothing", NULL},
                   {"heddle.v1.Heddle.Nothing", NULL},
                   {"heddle.cluster.Cluster", NULL}, /* internal words are not told */
                   {"", NULL}};
    for (int p = 0; p < 2; p++) {
        struct record r = {0};
        struct rpc_call *call = open_call(*state, paths[p], &r);
        Grpc__Reflection__V1__ServerReflectionResponse *a = ask(call, &r, 7, "*");
        assert_int_equal(a->list_services_response->n_service, 4);
        for (int i = 0; i < 4; i++)
            assert_string_equal(a->list_services_response->service[i]->name, services[i]);
        assert_string_equal(a->original_request->list_services, "*");
        grpc__reflection__v1__server_reflection_response__free_unpacked(a, NULL);
        for (size_t i = 0; i < sizeof symbols / sizeof *symbols; i++) {
            a = ask(call, &r, 4, symbols[i].symbol);
            if (symbols[i].file) {
                assert_int_equal(
                    a->message_response_case,
                    GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_FILE_DESCRIPTOR_RESPONSE);
                ProtobufCBinaryData *file = &a->file_descriptor_response->file_descriptor_proto[0];
                struct span name;
                size_t at = 0;
                assert_true(
                    envelope_bytes((struct span){(char *)file->data, file->len}, 1, &at, &name));
                assert_true(span_equal(name, symbols[i].file));
            } else {
                assert_int_equal(a->error_response->error_code, RPC_NOT_FOUND);
            }
            grpc__reflection__v1__server_reflection_response__free_unpacked(a, NULL);
        }
        a = ask(call, &r, 3, "nothing.proto");
        assert_int_equal(a->error_response->error_code, RPC_NOT_FOUND);
        grpc__reflection__v1__server_reflection_response__free_unpacked(a, NULL);
        a = ask(call, &r, 6, "heddle.v1.GenerateRequest");
        assert_int_equal(a->all_extension_numbers_response->n_extension_number, 0);
        grpc__reflection__v1__server_reflection_response__free_unpacked(a, NULL);
        rpc_half_close(call);
        assert_true(reaches(&r.ended, 1, 3000));
        assert_int_equal(atomic_load(&r.code), RPC_OK);
        rpc_release(call);
    }
}

/* The files of the public protocols are told exactly as protoc describes the originals. */
static void test_descriptors(void **state)
{
    const char *data = getenv("HEDDLE_CONFORMANCE");
    char path[512];
    struct buf set;
    struct span file, name;
    struct record r = {0};
    int n_compared = 0;
    snprintf(path, sizeof path, "%s/grpc/descriptor_set_health_reflection_kserve.bin",
             data ? data : "");
    buf_init(&set, 0);
    if (buf_read_file(&set, path, 0)) skip();
    struct rpc_call *call =
        open_call(*state, "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", &r);
    for (size_t at = 0; envelope_bytes((struct span){set.data, set.n}, 1, &at, &file);) {
        size_t name_at = 0;
        char text[64];
        assert_true(envelope_bytes(file, 1, &name_at, &name));
        snprintf(text, sizeof text, "%.*s", (int)name.n, name.data);
        if (strcmp(text, "health.proto") && strcmp(text, "reflection.proto")) continue;
        Grpc__Reflection__V1__ServerReflectionResponse *a = ask(call, &r, 3, text);
        ProtobufCBinaryData *told = &a->file_descriptor_response->file_descriptor_proto[0];
        assert_int_equal(told->len, file.n);
        assert_memory_equal(told->data, file.data, file.n);
        grpc__reflection__v1__server_reflection_response__free_unpacked(a, NULL);
        n_compared++;
    }
    assert_int_equal(n_compared, 2);
    rpc_release(call);
    buf_fini(&set);
}

int main(void)
{
#define BOTH(f)                                                                                    \
    {"tcp " #f, f, setup_tcp, teardown, NULL},                                                     \
    {                                                                                              \
        "local " #f, f, setup_local, teardown, NULL                                                \
    }
    const struct CMUnitTest tests[] = {BOTH(test_check), BOTH(test_list), BOTH(test_watch),
                                       BOTH(test_reflection), BOTH(test_descriptors)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
