/* The gRPC port: its methods and the way of a call through a loop. See grpc_front.h. */
#include "coordinator/front/grpc_front.h"
#include "base/mem.h"
#include "base/utf8.h"
#include "coordinator/front/grpc_call.h"

#include <string.h>

enum { DRAIN_MS = 1 };

void grpc_call_end(struct grpc_call *c, enum err e, const char *why)
{
    if (c->ended) return;
    c->ended = true;
    grpc_generate_leave(c); /* first: once the client knows, it may use the id again */
    rpc_finish(c->rpc, e ? err_grpc(e) : RPC_OK, e ? (*why ? why : err_text(e)) : NULL);
}

enum err grpc_call_send(struct grpc_call *c, const ProtobufCMessage *message)
{
    size_t n = protobuf_c_message_get_packed_size(message);
    buf_clear(&c->reply);
    TRY(buf_reserve(&c->reply, n));
    protobuf_c_message_pack(message, (uint8_t *)c->reply.data);
    return rpc_send(c->rpc, c->reply.data, n);
}

/* --- unary methods --- */

static enum err model_check(struct grpc_call *c, const char *model)
{
    const char *name;
    return *model ? api_model_check(c->g->front, model, &name) : OK;
}

static enum err tokenize(struct grpc_call *c, const Heddle__V1__TokenizeRequest *r)
{
    struct token_list tokens;
    Heddle__V1__TokenizeReply reply = HEDDLE__V1__TOKENIZE_REPLY__INIT;
    size_t n = strlen(r->text);
    TRY(model_check(c, r->model));
    if (utf8_valid_prefix(r->text, n) != n) FAIL(ERR_INVALID, "'text' is not UTF-8");
    token_list_init(&tokens, 0);
    unsigned flags = TOKENIZER_PARSE_SPECIAL | (r->add_special_tokens ? TOKENIZER_ADD_SPECIAL : 0);
    enum err e = tokenizer_encode(c->g->front->config.tokenizer, r->text, n, flags, &tokens);
    reply.n_ids = tokens.n;
    reply.ids = (uint32_t *)tokens.ids;
    if (!e) e = grpc_call_send(c, &reply.base);
    token_list_fini(&tokens);
    return e;
}

static enum err detokenize(struct grpc_call *c, const Heddle__V1__DetokenizeRequest *r)
{
    struct front *f = c->g->front;
    struct buf text;
    Heddle__V1__DetokenizeReply reply = HEDDLE__V1__DETOKENIZE_REPLY__INIT;
    TRY(model_check(c, r->model));
    for (size_t i = 0; i < r->n_ids; i++)
        if (r->ids[i] >= front_vocab_size(f))
            FAIL(ERR_INVALID, "'ids' holds %u, but token ids are from 0 to %u", r->ids[i],
                 front_vocab_size(f) - 1);
    buf_init(&text, 0);
    enum err e =
        tokenizer_decode(f->config.tokenizer, (const int32_t *)r->ids, r->n_ids, false, &text);
    reply.text = (char *)(uintptr_t)buf_string(&text);
    if (!e) e = grpc_call_send(c, &reply.base);
    buf_fini(&text);
    return e;
}

static enum err model_info(struct grpc_call *c, const Heddle__V1__ModelInfoRequest *r)
{
    struct front *f = c->g->front;
    struct front_cluster cluster;
    struct engine_stats stats = {0};
    Heddle__V1__ModelInfoReply reply = HEDDLE__V1__MODEL_INFO_REPLY__INIT;
    TRY(model_check(c, r->model));
    front_cluster_get(f, &cluster);
    engine_loop_stats(f->config.engine, &stats);
    int32_t eos = tokenizer_eos_id(f->config.tokenizer);
    reply.model = (char *)(uintptr_t)f->config.names[0];
    reply.context_max = front_context_max(f);
    reply.vocab_size = front_vocab_size(f);
    reply.eos_token_id = eos < 0 ? 0 : (uint32_t)eos;
    reply.groups_ready = stats.n_groups_up;
    reply.groups = stats.n_groups;
    reply.tensor_parallel = cluster.tensor_parallel;
    static char version[] = HEDDLE_VERSION;
    reply.version = version;
    return grpc_call_send(c, &reply.base);
}

/* Unpacks the message, runs, ends the call. */
#define UNARY(name, Type, type)                                                                    \
    static void run_##name(struct grpc_call *c)                                                    \
    {                                                                                              \
        Heddle__V1__##Type *r = heddle__v1__##type##__unpack(                                      \
            NULL, c->message.n, (const uint8_t *)buf_string(&c->message));                         \
        enum err e = r ? name(c, r) : err_set(ERR_FORMAT, "the message is malformed");             \
        heddle__v1__##type##__free_unpacked(r, NULL);                                              \
        char why[512];                                                                             \
        snprintf(why, sizeof why, "%s", e ? err_detail() : "");                                    \
        grpc_call_end(c, e, why);                                                                  \
    }

static enum err cancel(struct grpc_call *c, const Heddle__V1__CancelRequest *r)
{
    Heddle__V1__CancelReply reply = HEDDLE__V1__CANCEL_REPLY__INIT;
    reply.found = grpc_generate_cancel(c->g, r->request_id);
    return grpc_call_send(c, &reply.base);
}

UNARY(tokenize, TokenizeRequest, tokenize_request)
UNARY(detokenize, DetokenizeRequest, detokenize_request)
UNARY(model_info, ModelInfoRequest, model_info_request)
UNARY(cancel, CancelRequest, cancel_request)

/* --- grpc.health.v1, asked from any thread --- */

static enum health_status health_status_of(void *ctx, const char *service)
{
    const struct grpc_front *g = ctx;
    if (!strcmp(service, "liveness")) return HEALTH_SERVING;
    if (*service && strcmp(service, "readiness") && strcmp(service, "heddle.v1.Heddle"))
        return HEALTH_SERVICE_UNKNOWN;
    return front_ready(g->front) ? HEALTH_SERVING : HEALTH_NOT_SERVING;
}

static const char *const health_services[] = {"", "liveness", "readiness", "heddle.v1.Heddle"};

static const struct grpc_method methods[] = {
    {"/heddle.v1.Heddle/Generate", RPC_SERVER_STREAM, 0, grpc_generate},
    {"/heddle.v1.Heddle/Cancel", RPC_UNARY, 0, run_cancel},
    {"/heddle.v1.Heddle/Tokenize", RPC_UNARY, 0, run_tokenize},
    {"/heddle.v1.Heddle/Detokenize", RPC_UNARY, 0, run_detokenize},
    {"/heddle.v1.Heddle/ModelInfo", RPC_UNARY, 0, run_model_info},
};
enum {
    N_METHODS = sizeof methods / sizeof *methods,
    ROWS_MAX = N_METHODS + HEALTH_METHODS + REFLECTION_METHODS
};

/* --- the way of a call --- */

static void call_free(struct grpc_call *c)
{
    grpc_generate_leave(c);
    api_call_fini(&c->call);
    buf_fini(&c->message);
    buf_fini(&c->reply);
    rpc_release(c->rpc);
    mem_free(c);
}

static struct grpc_call *call_of(struct front_job *job, size_t offset)
{
    return (struct grpc_call *)(void *)((char *)job - offset);
}

static void on_begin(struct front_job *job, struct front_loop *loop)
{
    (void)loop;
    struct grpc_call *c = call_of(job, offsetof(struct grpc_call, begin));
    c->method->run(c);
}

/* gRPC is through with the call. A cancel on its way holds the call's memory until it has run. */
static void on_closed(struct front_job *job, struct front_loop *loop)
{
    (void)loop;
    struct grpc_call *c = call_of(job, offsetof(struct grpc_call, closed));
    c->gone = true;
    c->ended = true;
    grpc_generate_leave(c); /* out of the registry: no new cancel can begin */
    if (!atomic_load(&c->cancelling)) call_free(c);
}

static void on_cancel(struct front_job *job, struct front_loop *loop)
{
    (void)loop;
    struct grpc_call *c = call_of(job, offsetof(struct grpc_call, cancel));
    if (c->stream) stream_cancel(c->stream);
    atomic_store(&c->cancelling, false);
    if (c->gone) call_free(c);
}

static const struct grpc_method *method_find(const char *path)
{
    for (int i = 0; i < N_METHODS; i++)
        if (!strcmp(methods[i].path, path)) return &methods[i];
    return NULL;
}

static void rpc_message(struct rpc_call *call, void *ctx, struct span bytes)
{
    struct grpc_front *g = ctx;
    struct grpc_call *c = NULL;
    if (MEM_NEW(&c)) {
        rpc_finish(call, RPC_RESOURCE_EXHAUSTED, "out of memory");
        return;
    }
    c->g = g;
    c->loop = front_loop_any(g->front);
    c->method = method_find(rpc_path(call));
    c->begin.run = on_begin;
    c->closed.run = on_closed;
    c->cancel.run = on_cancel;
    c->rpc = rpc_acquire(call);
    buf_init(&c->message, 0);
    buf_init(&c->reply, 0);
    if (!c->method || buf_add(&c->message, bytes.data, bytes.n)) {
        rpc_finish(call, RPC_RESOURCE_EXHAUSTED, "out of memory");
        call_free(c);
        return;
    }
    rpc_set_user(call, c);
    front_post(c->loop, &c->begin);
}

static void rpc_closed(struct rpc_call *call, void *ctx, bool cancelled)
{
    (void)ctx, (void)cancelled;
    struct grpc_call *c = rpc_user(call);
    if (c) front_post(c->loop, &c->closed);
}

static bool authorize(void *ctx, const char *path, struct span bearer)
{
    (void)path;
    struct front *f = ctx;
    if (!f->config.auth.n_keys || auth_find(&f->config.auth, bearer) >= 0) return true;
    metrics_count(&f->metrics, METRIC_REJECTED_AUTH, 1);
    return false;
}

/* The whole table: Heddle's own methods, health and reflection. Returns how many. */
static enum err rows_make(struct grpc_front *g, struct rpc_method rows[ROWS_MAX], size_t *out_n)
{
    const struct health_config health = {.status = health_status_of,
                                         .ctx = g,
                                         .services = health_services,
                                         .n_services =
                                             sizeof health_services / sizeof *health_services};
    size_t n = 0;
    TRY(health_create(&health, &g->health));
    TRY(reflection_create(&g->reflection));
    for (; n < N_METHODS; n++)
        rows[n] = (struct rpc_method){.path = methods[n].path,
                                      .kind = methods[n].kind,
                                      .flags = methods[n].flags,
                                      .on_message = rpc_message,
                                      .on_close = rpc_closed,
                                      .ctx = g};
    n += health_methods(g->health, rows + n);
    n += reflection_methods(g->reflection, rows + n);
    reflection_serve(g->reflection, rows, n);
    *out_n = n;
    return OK;
}

enum err grpc_front_create(const struct grpc_front_config *config, struct grpc_front **out)
{
    struct grpc_front *g = NULL;
    struct rpc_method rows[ROWS_MAX];
    size_t n_rows = 0;
    char address[300];
    TRY(MEM_NEW(&g));
    g->front = config->front;
    pthread_mutex_init(&g->mutex, NULL);
    enum err e = rows_make(g, rows, &n_rows);
    bool six = config->port >= 0 && strchr(config->host, ':');
    if (config->port < 0)
        snprintf(address, sizeof address, "%s", config->host);
    else
        snprintf(address, sizeof address, "%s%s%s:%d", six ? "[" : "", config->host, six ? "]" : "",
                 config->port);
    struct rpc_server_config server = {.address = address,
                                       .authorize = authorize,
                                       .authorize_ctx = config->front,
                                       .tls = config->tls,
                                       .methods = rows,
                                       .n_methods = n_rows,
                                       .message_bytes_max =
                                           config->front->config.http.body_bytes_max};
    if (!e) e = rpc_server_create(&server, &g->server);
    if (e)
        grpc_front_destroy(g);
    else
        *out = g;
    return e;
}

int grpc_front_port(const struct grpc_front *g)
{
    return rpc_server_port(g->server);
}
void grpc_front_drain(struct grpc_front *g)
{
    rpc_server_drain(g->server, DRAIN_MS);
}

void grpc_front_stop(struct grpc_front *g)
{
    if (!g) return;
    rpc_server_destroy(g->server);
    g->server = NULL;
}

void grpc_front_destroy(struct grpc_front *g)
{
    if (!g) return;
    grpc_front_stop(g);
    health_destroy(g->health);
    reflection_destroy(g->reflection);
    pthread_mutex_destroy(&g->mutex);
    mem_free(g);
}
