/* The client library over rpc.h. A generate call is a queue of replies between the polling thread
 * and the caller, bounded by holding the call, so that the callback may be as slow as it likes. */
#include "proto/include/heddle/client.h"
#include "base/mem.h"
#include "proto/envelope.h"
#include "proto/health.pb-c.h"
#include "proto/rpc.h"
#include "proto/serve.pb-c.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>

#define API __attribute__((visibility("default")))

enum {
    UNARY_TIMEOUT_MS = 30000,
    QUEUE_BYTES_MAX = 1 << 20,
    QUEUE_MESSAGES_MAX = 1024,
    TOP_MAX = 64
};

struct heddle_client {
    struct rpc_channel *channel;
};

static char *text_of(const char *s)
{
    return (char *)(uintptr_t)(s ? s : "");
}
static int status_of(enum err e)
{
    return e ? err_grpc(e) : HEDDLE_OK;
}

API const char *heddle_last_error(void)
{
    return err_detail();
}
API const char *heddle_version(void)
{
    return HEDDLE_VERSION;
}

API int heddle_connect(const struct heddle_options *options, struct heddle_client **out)
{
    struct heddle_client *c;
    struct rpc_channel_config config = {
        .address = options->address,
        .token = options->token,
        .tls = {options->ca_file, options->cert_file, options->key_file, options->server_name}};
    if (MEM_NEW(&c)) return status_of(ERR_NO_MEMORY);
    enum err e = rpc_channel_create(&config, &c->channel);
    if (e)
        mem_free(c);
    else
        *out = c;
    return status_of(e);
}

API void heddle_close(struct heddle_client *c)
{
    if (!c) return;
    rpc_channel_destroy(c->channel);
    mem_free(c);
}

/* ---- Generate: the request ---- */

static void sampling_fill(const struct heddle_sampling *s, Heddle__V1__SamplingParams *p)
{
#define GIVE(FLAG, NAME, field)                                                                    \
    if (s->given & FLAG) {                                                                         \
        p->field##_given_case = HEDDLE__V1__SAMPLING_PARAMS__##NAME##_GIVEN_##NAME;                \
        p->field = s->field;                                                                       \
    }
    GIVE(HEDDLE_TEMPERATURE, TEMPERATURE, temperature)
    GIVE(HEDDLE_TOP_K, TOP_K, top_k)
    GIVE(HEDDLE_TOP_P, TOP_P, top_p)
    GIVE(HEDDLE_MIN_P, MIN_P, min_p)
    GIVE(HEDDLE_REPETITION_PENALTY, REPETITION_PENALTY, repetition_penalty)
    GIVE(HEDDLE_PRESENCE_PENALTY, PRESENCE_PENALTY, presence_penalty)
    GIVE(HEDDLE_FREQUENCY_PENALTY, FREQUENCY_PENALTY, frequency_penalty)
    GIVE(HEDDLE_SEED, SEED, seed)
    GIVE(HEDDLE_MAX_TOKENS, MAX_TOKENS, max_tokens)
    GIVE(HEDDLE_MIN_TOKENS, MIN_TOKENS, min_tokens)
    GIVE(HEDDLE_LOGPROBS, LOGPROBS, logprobs)
    GIVE(HEDDLE_CHOICES, CHOICES, choices)
#undef GIVE
    p->ignore_eos = s->ignore_eos != 0;
    p->stop = (char **)(uintptr_t)s->stop;
    p->n_stop = s->n_stop;
    p->stop_token_ids = (uint32_t *)(uintptr_t)s->stop_tokens;
    p->n_stop_token_ids = s->n_stop_tokens;
}

static enum err bias_fill(const struct heddle_sampling *s, Heddle__V1__SamplingParams *p)
{
    Heddle__V1__SamplingParams__LogitBiasEntry *entries;
    if (!s->n_bias) return OK;
    TRY(MEM_NEW_ARRAY(s->n_bias, &p->logit_bias)); /* freed by bias_free */
    TRY(MEM_NEW_ARRAY(s->n_bias, &entries));
    for (size_t i = 0; i < s->n_bias; i++) {
        heddle__v1__sampling_params__logit_bias_entry__init(&entries[i]);
        entries[i].key = s->bias_tokens[i];
        entries[i].value = s->bias_values[i];
        p->logit_bias[i] = &entries[i];
    }
    p->n_logit_bias = s->n_bias;
    return OK;
}

static void bias_free(Heddle__V1__SamplingParams *p)
{
    if (p->n_logit_bias) mem_free(p->logit_bias[0]);
    mem_free(p->logit_bias);
}

static enum err request_pack(const struct heddle_request *r, struct rpc_bytes **out)
{
    Heddle__V1__GenerateRequest m = HEDDLE__V1__GENERATE_REQUEST__INIT;
    Heddle__V1__SamplingParams p = HEDDLE__V1__SAMPLING_PARAMS__INIT;
    Heddle__V1__TokenIds ids = HEDDLE__V1__TOKEN_IDS__INIT;
    if (!r->text && !r->tokens) FAIL(ERR_INVALID, "a request needs a text or tokens");
    sampling_fill(&r->sampling, &p);
    m.sampling = &p;
    m.request_id = text_of(r->request_id);
    m.model = text_of(r->model);
    m.cache_salt = text_of(r->cache_salt);
    m.priority = r->priority;
    m.timeout_ms = r->timeout_ms;
    if (r->text) {
        m.prompt_case = HEDDLE__V1__GENERATE_REQUEST__PROMPT_TEXT;
        m.text = text_of(r->text);
    } else {
        m.prompt_case = HEDDLE__V1__GENERATE_REQUEST__PROMPT_TOKENS;
        m.tokens = &ids;
        ids.ids = (uint32_t *)(uintptr_t)r->tokens;
        ids.n_ids = r->n_tokens;
    }
    enum err e = bias_fill(&r->sampling, &p);
    if (!e) e = envelope_pack(&m.base, out);
    bias_free(&p);
    return e;
}

/* ---- Generate: the replies ---- */

struct generation {
    struct rpc_call *call;
    pthread_mutex_t mutex; /* of what follows */
    pthread_cond_t news;
    struct rpc_bytes *queue[QUEUE_MESSAGES_MAX];
    size_t head, n, bytes;
    bool held, ended, no_memory;
    int code;
    char text[RPC_STATUS_TEXT_MAX];
};

static void on_message(struct rpc_call *call, void *ctx, struct span bytes)
{
    struct generation *g = ctx;
    struct rpc_bytes *copy = NULL;
    pthread_mutex_lock(&g->mutex);
    if (rpc_bytes_create(bytes.data, bytes.n, &copy)) {
        g->no_memory = true;
        rpc_cancel(call);
    } else {
        g->queue[(g->head + g->n++) % QUEUE_MESSAGES_MAX] = copy;
        g->bytes += bytes.n;
        if (g->n == QUEUE_MESSAGES_MAX || g->bytes >= QUEUE_BYTES_MAX) {
            g->held = true;
            rpc_hold(call);
        }
    }
    pthread_cond_signal(&g->news);
    pthread_mutex_unlock(&g->mutex);
}

static void on_end(struct rpc_call *call, void *ctx, int code, const char *text)
{
    struct generation *g = ctx;
    (void)call;
    pthread_mutex_lock(&g->mutex);
    g->ended = true;
    g->code = code;
    snprintf(g->text, sizeof g->text, "%s", text);
    pthread_cond_signal(&g->news);
    pthread_mutex_unlock(&g->mutex);
}

/* The next reply's bytes; NULL when the call has ended and everything was given. */
static struct rpc_bytes *reply_take(struct generation *g)
{
    struct rpc_bytes *bytes = NULL;
    pthread_mutex_lock(&g->mutex);
    while (!g->n && !g->ended)
        pthread_cond_wait(&g->news, &g->mutex);
    if (g->n) {
        bytes = g->queue[g->head];
        g->head = (g->head + 1) % QUEUE_MESSAGES_MAX;
        g->n--;
        g->bytes -= rpc_bytes_span(bytes).n;
        if (g->held && g->n < QUEUE_MESSAGES_MAX / 2 && g->bytes < QUEUE_BYTES_MAX / 2) {
            g->held = false;
            rpc_resume(g->call);
        }
    }
    pthread_mutex_unlock(&g->mutex);
    return bytes;
}

static struct heddle_logprob logprob_of(const Heddle__V1__Logprob *from)
{
    if (!from) return (struct heddle_logprob){.text = ""};
    return (struct heddle_logprob){from->token, from->logprob,
                                   from->text.data ? (const char *)from->text.data : "",
                                   from->text.len};
}

/* Two arrays in one block: of tokens, then of all their alternatives. */
static enum err logprobs_make(const Heddle__V1__GenerateReply *m,
                              struct heddle_token_logprobs **out)
{
    size_t n_top = 0, bytes;
    for (size_t i = 0; i < m->n_logprobs; i++)
        n_top += m->logprobs[i]->n_top;
    bytes = m->n_logprobs * sizeof(struct heddle_token_logprobs) +
            n_top * sizeof(struct heddle_logprob);
    TRY(mem_alloc(bytes, (void **)out));
    struct heddle_logprob *top = (struct heddle_logprob *)(*out + m->n_logprobs);
    for (size_t i = 0; i < m->n_logprobs; i++) {
        const Heddle__V1__TokenLogprobs *from = m->logprobs[i];
        (*out)[i] = (struct heddle_token_logprobs){logprob_of(from->chosen), top, from->n_top};
        for (size_t k = 0; k < from->n_top; k++)
            *top++ = logprob_of(from->top[k]);
    }
    return OK;
}

/* Unpacks one reply and shows it to the caller. out_stop: what the callback said. */
static enum err reply_show(struct rpc_bytes *bytes, heddle_reply_fn on_reply, void *ctx,
                           int *out_stop)
{
    struct span span = rpc_bytes_span(bytes);
    struct heddle_token_logprobs *logprobs = NULL;
    Heddle__V1__GenerateReply *m =
        heddle__v1__generate_reply__unpack(NULL, span.n, (const uint8_t *)span.data);
    if (!m) FAIL(ERR_FORMAT, "the server's reply of %zu bytes is malformed", span.n);
    enum err e = m->n_logprobs ? logprobs_make(m, &logprobs) : OK;
    struct heddle_reply reply = {.request_id = m->request_id,
                                 .choice = m->choice,
                                 .text = m->text,
                                 .tokens = m->tokens,
                                 .n_tokens = m->n_tokens,
                                 .logprobs = logprobs,
                                 .n_logprobs = m->n_logprobs,
                                 .finish_reason = m->finish_reason,
                                 .prompt_tokens = m->prompt_tokens,
                                 .completion_tokens = m->completion_tokens,
                                 .cached_tokens = m->cached_tokens};
    if (!e) *out_stop = on_reply(ctx, &reply);
    mem_free(logprobs);
    heddle__v1__generate_reply__free_unpacked(m, NULL);
    return e;
}

static int generation_run(struct generation *g, heddle_reply_fn on_reply, void *ctx)
{
    struct rpc_bytes *bytes;
    int stop = 0;
    enum err e = OK;
    while ((bytes = reply_take(g))) {
        if (!stop && !e) {
            e = reply_show(bytes, on_reply, ctx, &stop);
            if (e || stop) rpc_cancel(g->call);
        }
        rpc_bytes_release(bytes);
    }
    if (g->no_memory) e = err_set(ERR_NO_MEMORY, "no memory for a reply");
    if (e) return status_of(e);
    if (stop) return err_grpc(err_set(ERR_CANCELLED, "stopped by the callback"));
    if (g->code != RPC_OK)
        err_set(rpc_err(g->code), "%s", *g->text ? g->text : "the call failed without words");
    return g->code;
}

static enum err generation_create(struct generation **out)
{
    TRY(MEM_NEW(out));
    pthread_mutex_init(&(*out)->mutex, NULL);
    pthread_cond_init(&(*out)->news, NULL);
    return OK;
}

static void generation_destroy(struct generation *g)
{
    if (!g) return;
    rpc_release(g->call);
    pthread_cond_destroy(&g->news);
    pthread_mutex_destroy(&g->mutex);
    mem_free(g);
}

API int heddle_generate(struct heddle_client *c, const struct heddle_request *request,
                        heddle_reply_fn on_reply, void *ctx)
{
    struct generation *g = NULL;
    struct rpc_bytes *bytes = NULL;
    int status = HEDDLE_OK,
        timeout_ms = request->timeout_ms > INT32_MAX ? INT32_MAX : (int)request->timeout_ms;
    enum err e = request_pack(request, &bytes);
    if (!e) e = generation_create(&g);
    struct rpc_handler handler = {on_message, on_end, g};
    if (!e) e = rpc_open(c->channel, "/heddle.v1.Heddle/Generate", timeout_ms, &handler, &g->call);
    if (!e) {
        (void)rpc_send_shared(g->call,
                              bytes); /* refused only when the call has ended, which is told */
        rpc_half_close(g->call);
        status = generation_run(g, on_reply, ctx);
    }
    rpc_bytes_release(bytes);
    generation_destroy(g);
    return e ? status_of(e) : status;
}

/* ---- Unary calls ---- */

/* Asks and unpacks; the reply is freed by the caller with protobuf_c_message_free_unpacked. */
static int ask(struct heddle_client *c, const char *path, const ProtobufCMessage *request,
               const ProtobufCMessageDescriptor *type, ProtobufCMessage **out)
{
    struct rpc_bytes *bytes;
    struct buf reply;
    int code = RPC_UNKNOWN;
    enum err e = envelope_pack(request, &bytes);
    if (e) return status_of(e);
    buf_init(&reply, RPC_MESSAGE_BYTES_MAX);
    e = rpc_unary(c->channel, path, rpc_bytes_span(bytes), UNARY_TIMEOUT_MS, &reply, &code);
    rpc_bytes_release(bytes);
    if (!e) {
        *out = protobuf_c_message_unpack(type, NULL, reply.n, (const uint8_t *)buf_string(&reply));
        if (!*out)
            e = err_set(ERR_FORMAT, "%s: the reply of %zu bytes is malformed", path, reply.n);
    }
    buf_fini(&reply);
    if (e && code != RPC_OK && code != RPC_UNKNOWN) return code;
    return status_of(e);
}

API int heddle_cancel(struct heddle_client *c, const char *request_id)
{
    Heddle__V1__CancelRequest q = HEDDLE__V1__CANCEL_REQUEST__INIT;
    ProtobufCMessage *reply;
    q.request_id = text_of(request_id);
    int status =
        ask(c, "/heddle.v1.Heddle/Cancel", &q.base, &heddle__v1__cancel_reply__descriptor, &reply);
    if (status) return status;
    bool found = ((Heddle__V1__CancelReply *)reply)->found;
    protobuf_c_message_free_unpacked(reply, NULL);
    return found ? HEDDLE_OK
                 : err_grpc(
                       err_set(ERR_NOT_FOUND, "no request '%s' is running", text_of(request_id)));
}

API int heddle_tokenize(struct heddle_client *c, const char *model, const char *text,
                        int add_special_tokens, uint32_t *out_ids, size_t capacity, size_t *out_n)
{
    Heddle__V1__TokenizeRequest q = HEDDLE__V1__TOKENIZE_REQUEST__INIT;
    ProtobufCMessage *reply;
    q.model = text_of(model);
    q.text = text_of(text);
    q.add_special_tokens = add_special_tokens != 0;
    int status = ask(c, "/heddle.v1.Heddle/Tokenize", &q.base,
                     &heddle__v1__tokenize_reply__descriptor, &reply);
    if (status) return status;
    const Heddle__V1__TokenizeReply *r = (Heddle__V1__TokenizeReply *)reply;
    *out_n = r->n_ids;
    if (r->n_ids > capacity)
        status = err_grpc(
            err_set(ERR_FULL, "%zu tokens do not fit into room for %zu", r->n_ids, capacity));
    else if (r->n_ids)
        memcpy(out_ids, r->ids, r->n_ids * sizeof *out_ids);
    protobuf_c_message_free_unpacked(reply, NULL);
    return status;
}

API int heddle_detokenize(struct heddle_client *c, const char *model, const uint32_t *ids, size_t n,
                          char *out_text, size_t capacity, size_t *out_n)
{
    Heddle__V1__DetokenizeRequest q = HEDDLE__V1__DETOKENIZE_REQUEST__INIT;
    ProtobufCMessage *reply;
    q.model = text_of(model);
    q.ids = (uint32_t *)(uintptr_t)ids;
    q.n_ids = n;
    int status = ask(c, "/heddle.v1.Heddle/Detokenize", &q.base,
                     &heddle__v1__detokenize_reply__descriptor, &reply);
    if (status) return status;
    const char *text = ((Heddle__V1__DetokenizeReply *)reply)->text;
    *out_n = strlen(text);
    if (*out_n + 1 > capacity)
        status = err_grpc(
            err_set(ERR_FULL, "a text of %zu bytes does not fit into %zu", *out_n, capacity));
    else
        memcpy(out_text, text, *out_n + 1);
    protobuf_c_message_free_unpacked(reply, NULL);
    return status;
}

API int heddle_model_info(struct heddle_client *c, const char *model, struct heddle_model *out)
{
    Heddle__V1__ModelInfoRequest q = HEDDLE__V1__MODEL_INFO_REQUEST__INIT;
    ProtobufCMessage *reply;
    q.model = text_of(model);
    int status = ask(c, "/heddle.v1.Heddle/ModelInfo", &q.base,
                     &heddle__v1__model_info_reply__descriptor, &reply);
    if (status) return status;
    const Heddle__V1__ModelInfoReply *r = (Heddle__V1__ModelInfoReply *)reply;
    *out = (struct heddle_model){.context_max = r->context_max,
                                 .vocab_size = r->vocab_size,
                                 .eos_token = r->eos_token_id,
                                 .tensor_parallel = r->tensor_parallel,
                                 .groups = r->groups,
                                 .groups_ready = r->groups_ready};
    snprintf(out->name, sizeof out->name, "%s", r->model);
    snprintf(out->version, sizeof out->version, "%s", r->version);
    protobuf_c_message_free_unpacked(reply, NULL);
    return HEDDLE_OK;
}

API int heddle_health(struct heddle_client *c, const char *service, int *out_serving)
{
    Grpc__Health__V1__HealthCheckRequest q = GRPC__HEALTH__V1__HEALTH_CHECK_REQUEST__INIT;
    ProtobufCMessage *reply;
    q.service = text_of(service);
    int status = ask(c, "/grpc.health.v1.Health/Check", &q.base,
                     &grpc__health__v1__health_check_response__descriptor, &reply);
    if (status) return status;
    *out_serving = ((Grpc__Health__V1__HealthCheckResponse *)reply)->status ==
                   GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING;
    protobuf_c_message_free_unpacked(reply, NULL);
    return HEDDLE_OK;
}
