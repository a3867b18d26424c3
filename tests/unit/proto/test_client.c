/* Goal: the C client library says and hears what serve.proto means. Method: a server of
 * heddle.v1.Heddle made of rpc.h, which checks what it is asked and answers from tables. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base/mem.h"
#include "proto/envelope.h"
#include "proto/health.h"
#include "proto/include/heddle/client.h"
#include "proto/serve.pb-c.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static char word_r1[] = "r1", word_length[] = "length", word_hello[] = "h\xc3\xa9llo",
            word_tiny[] = "tiny", word_version[] = "0.1";
static atomic_int n_cancelled, ready;
static struct rpc_call *_Atomic running;

/* ---- The server ---- */

static void reply_send(struct rpc_call *call, uint32_t i, bool last)
{
    Heddle__V1__GenerateReply m = HEDDLE__V1__GENERATE_REPLY__INIT;
    Heddle__V1__TokenLogprobs of_token = HEDDLE__V1__TOKEN_LOGPROBS__INIT, *list = &of_token;
    Heddle__V1__Logprob chosen = HEDDLE__V1__LOGPROB__INIT, other = HEDDLE__V1__LOGPROB__INIT,
                        *tops[] = {&chosen, &other};
    char text[16];
    snprintf(text, sizeof text, "<%u>", i);
    m.request_id = word_r1, m.text = text, m.tokens = &i, m.n_tokens = 1;
    chosen.token = i, chosen.logprob = -0.5f,
    chosen.text = (ProtobufCBinaryData){2, (uint8_t *)(uintptr_t) "\xc3\x00"};
    other.token = i + 1, other.logprob = -1.5f;
    of_token.chosen = &chosen, of_token.n_top = 2, of_token.top = tops;
    m.n_logprobs = 1, m.logprobs = &list;
    if (last)
        m.finish_reason = word_length, m.prompt_tokens = 4, m.completion_tokens = i + 1,
        m.cached_tokens = 3;
    while (envelope_send(call, &m.base) == ERR_FULL)
        usleep(500);
}

static void *stream_run(void *ctx)
{
    struct rpc_call *call = ctx;
    uint32_t n = (uint32_t)(uintptr_t)rpc_user(call);
    for (uint32_t i = 0; i < n; i++)
        reply_send(call, i, i + 1 == n);
    rpc_finish(call, RPC_OK, NULL);
    rpc_release(call);
    return NULL;
}

static void check_sampling(const Heddle__V1__SamplingParams *p)
{
    assert_int_equal(p->temperature_given_case,
                     HEDDLE__V1__SAMPLING_PARAMS__TEMPERATURE_GIVEN_TEMPERATURE);
    assert_true(p->temperature == 0.0f); /* given, and 0 */
    assert_int_equal(p->top_k_given_case, 0);
    assert_int_equal(p->seed_given_case, HEDDLE__V1__SAMPLING_PARAMS__SEED_GIVEN_SEED);
    assert_true(p->seed == 0xffffffffffffffffu);
    assert_int_equal(p->n_stop, 2);
    assert_string_equal(p->stop[1], "\n\n");
    assert_int_equal(p->stop_token_ids[0], 7);
    assert_int_equal(p->n_logit_bias, 2);
    assert_int_equal(p->logit_bias[1]->key, 9);
    assert_true(p->logit_bias[1]->value == -2.5f);
}

static void generate(struct rpc_call *call, void *ctx, struct span bytes)
{
    pthread_t thread;
    (void)ctx;
    Heddle__V1__GenerateRequest *r =
        heddle__v1__generate_request__unpack(NULL, bytes.n, (const uint8_t *)bytes.data);
    assert_non_null(r);
    if (r->prompt_case == HEDDLE__V1__GENERATE_REQUEST__PROMPT_TOKENS) {
        assert_int_equal(r->tokens->n_ids, 3);
        assert_int_equal(r->tokens->ids[2], 300);
        check_sampling(r->sampling);
        assert_int_equal(r->priority, -5);
        assert_string_equal(r->cache_salt, "salt");
        rpc_set_user(call, (void *)(uintptr_t)5);
    } else if (!strcmp(r->text, "bad")) {
        rpc_finish(call, RPC_INVALID_ARGUMENT, "max_tokens must be at least 1");
    } else if (!strcmp(r->text, "garbage")) {
        (void)rpc_send(call, "\xff\xff", 2);
    } else if (!strcmp(r->text, "silent")) {
        atomic_store(&running, rpc_acquire(call));
    } else {
        rpc_set_user(call, (void *)(uintptr_t)3000);
    }
    if (rpc_user(call)) {
        pthread_create(&thread, NULL, stream_run, rpc_acquire(call));
        pthread_detach(thread);
    }
    heddle__v1__generate_request__free_unpacked(r, NULL);
}

static void generate_close(struct rpc_call *call, void *ctx, bool cancelled)
{
    (void)call, (void)ctx;
    if (cancelled) atomic_fetch_add(&n_cancelled, 1);
}

static void answer(struct rpc_call *call, const ProtobufCMessage *m)
{
    assert_int_equal(envelope_send(call, m), OK);
    rpc_finish(call, RPC_OK, NULL);
}

static void cancel(struct rpc_call *call, void *ctx, struct span bytes)
{
    Heddle__V1__CancelReply r = HEDDLE__V1__CANCEL_REPLY__INIT;
    (void)ctx;
    r.found = bytes.n == 4 && !memcmp(bytes.data, "\x0a\x02r1", 4);
    struct rpc_call *victim = r.found ? atomic_exchange(&running, NULL) : NULL;
    if (victim) rpc_finish(victim, RPC_CANCELLED, "cancelled by request");
    rpc_release(victim);
    answer(call, &r.base);
}

static void tokenize(struct rpc_call *call, void *ctx, struct span bytes)
{
    Heddle__V1__TokenizeReply r = HEDDLE__V1__TOKENIZE_REPLY__INIT;
    uint32_t ids[] = {1, 70000, 3};
    (void)ctx, (void)bytes;
    r.n_ids = 3, r.ids = ids;
    answer(call, &r.base);
}

static void detokenize(struct rpc_call *call, void *ctx, struct span bytes)
{
    Heddle__V1__DetokenizeReply r = HEDDLE__V1__DETOKENIZE_REPLY__INIT;
    (void)ctx, (void)bytes;
    r.text = word_hello;
    answer(call, &r.base);
}

static void model_info(struct rpc_call *call, void *ctx, struct span bytes)
{
    Heddle__V1__ModelInfoReply r = HEDDLE__V1__MODEL_INFO_REPLY__INIT;
    (void)ctx;
    if (bytes.n) {
        rpc_finish(call, RPC_NOT_FOUND, "no model of this name");
        return;
    }
    r.model = word_tiny, r.context_max = 2048, r.vocab_size = 32000, r.eos_token_id = 2,
    r.groups = 2, r.groups_ready = 1;
    r.tensor_parallel = 4, r.version = word_version;
    answer(call, &r.base);
}

static enum health_status status_of(void *ctx, const char *service)
{
    (void)ctx;
    return strcmp(service, "readiness") || atomic_load(&ready) ? HEALTH_SERVING
                                                               : HEALTH_NOT_SERVING;
}

struct fixture {
    struct health *health;
    struct rpc_server *server;
    struct heddle_client *client;
};

static int setup(void **state)
{
    struct rpc_method methods[16] = {
        {.path = "/heddle.v1.Heddle/Generate",
         .kind = RPC_SERVER_STREAM,
         .on_message = generate,
         .on_close = generate_close,
         .send_bytes_max = 4096},
        {.path = "/heddle.v1.Heddle/Cancel", .kind = RPC_UNARY, .on_message = cancel},
        {.path = "/heddle.v1.Heddle/Tokenize", .kind = RPC_UNARY, .on_message = tokenize},
        {.path = "/heddle.v1.Heddle/Detokenize", .kind = RPC_UNARY, .on_message = detokenize},
        {.path = "/heddle.v1.Heddle/ModelInfo", .kind = RPC_UNARY, .on_message = model_info},
    };
    struct fixture *f;
    char address[64];
    assert_int_equal(mem_alloc(sizeof *f, (void **)&f), OK);
    struct health_config hc = {.status = status_of};
    assert_int_equal(health_create(&hc, &f->health), OK);
    size_t n = 5 + health_methods(f->health, methods + 5);
    struct rpc_server_config sc = {
        .address = "127.0.0.1:0", .token = "key", .methods = methods, .n_methods = n};
    assert_int_equal(rpc_server_create(&sc, &f->server), OK);
    snprintf(address, sizeof address, "127.0.0.1:%d", rpc_server_port(f->server));
    struct heddle_options options = {.address = address, .token = "key"};
    assert_int_equal(heddle_connect(&options, &f->client), HEDDLE_OK);
    atomic_store(&n_cancelled, 0);
    *state = f;
    return 0;
}

static int teardown(void **state)
{
    struct fixture *f = *state;
    heddle_close(f->client);
    rpc_server_destroy(f->server);
    health_destroy(f->health);
    mem_free(f);
    return 0;
}

/* ---- Cases ---- */

struct seen {
    uint32_t n, stop_after;
    int slow;
};

static int on_reply(void *ctx, const struct heddle_reply *r)
{
    struct seen *s = ctx;
    char text[16];
    snprintf(text, sizeof text, "<%u>", s->n);
    assert_string_equal(r->text, text);
    assert_string_equal(r->request_id, "r1");
    assert_int_equal(r->n_tokens, 1);
    assert_int_equal(r->tokens[0], s->n);
    assert_int_equal(r->n_logprobs, 1);
    assert_int_equal(r->logprobs[0].n_top, 2);
    assert_int_equal(r->logprobs[0].top[1].token, s->n + 1);
    assert_int_equal(r->logprobs[0].chosen.text_bytes, 2);
    assert_memory_equal(r->logprobs[0].chosen.text, "\xc3\x00", 2);
    assert_int_equal(r->logprobs[0].top[1].text_bytes, 0);
    if (*r->finish_reason) {
        assert_string_equal(r->finish_reason, "length");
        assert_int_equal(r->completion_tokens, s->n + 1);
        assert_int_equal(r->cached_tokens, 3);
    }
    s->n++;
    if (s->slow) usleep(100);
    return s->stop_after == s->n;
}

static void test_generate(void **state)
{
    struct fixture *f = *state;
    static const char *const stop[] = {"a", "\n\n"};
    static const uint32_t tokens[] = {1, 200, 300}, stop_tokens[] = {7}, bias_tokens[] = {8, 9};
    static const float bias[] = {1, -2.5f};
    struct seen s = {0};
    struct heddle_request r = {
        .tokens = tokens, .n_tokens = 3, .cache_salt = "salt", .priority = -5};
    r.sampling = (struct heddle_sampling){.given = HEDDLE_TEMPERATURE | HEDDLE_SEED,
                                          .seed = UINT64_MAX,
                                          .stop = stop,
                                          .n_stop = 2,
                                          .stop_tokens = stop_tokens,
                                          .n_stop_tokens = 1,
                                          .bias_tokens = bias_tokens,
                                          .bias_values = bias,
                                          .n_bias = 2};
    assert_int_equal(heddle_generate(f->client, &r, on_reply, &s), HEDDLE_OK);
    assert_int_equal(s.n, 5);
    struct seen slow = {.slow = 1}; /* 3000 replies through a queue of 4 KiB and a slow callback */
    struct heddle_request text = {.text = "x"};
    assert_int_equal(heddle_generate(f->client, &text, on_reply, &slow), HEDDLE_OK);
    assert_int_equal(slow.n, 3000);
}

static void test_generate_ends(void **state)
{
    struct fixture *f = *state;
    struct seen s = {.stop_after = 3};
    struct heddle_request r = {.text = "x"};
    assert_int_equal(heddle_generate(f->client, &r, on_reply, &s), HEDDLE_CANCELLED);
    assert_int_equal(s.n, 3);
    for (int i = 0; i < 2000 && !atomic_load(&n_cancelled); i++)
        usleep(1000);
    assert_int_equal(atomic_load(&n_cancelled), 1);
    r.text = "bad";
    assert_int_equal(heddle_generate(f->client, &r, on_reply, &s), HEDDLE_INVALID);
    assert_string_equal(heddle_last_error(), "max_tokens must be at least 1");
    r.text = "garbage";
    assert_int_not_equal(heddle_generate(f->client, &r, on_reply, &s), HEDDLE_OK);
    assert_non_null(strstr(heddle_last_error(), "malformed"));
    r.text = "silent";
    r.timeout_ms = 100;
    assert_int_equal(heddle_generate(f->client, &r, on_reply, &s), HEDDLE_DEADLINE);
    rpc_release(atomic_exchange(&running, NULL));
    r = (struct heddle_request){0};
    assert_int_equal(heddle_generate(f->client, &r, on_reply, &s), HEDDLE_INVALID);
    assert_int_equal(s.n, 3);
}

static void *cancel_run(void *ctx)
{
    while (!atomic_load(&running))
        usleep(1000);
    assert_int_equal(heddle_cancel(ctx, "r1"), HEDDLE_OK);
    return NULL;
}

static void test_cancel(void **state)
{
    struct fixture *f = *state;
    struct heddle_request r = {.text = "silent"};
    struct seen s = {0};
    pthread_t thread;
    assert_int_equal(heddle_cancel(f->client, "nobody"), HEDDLE_NOT_FOUND);
    pthread_create(&thread, NULL, cancel_run, f->client);
    assert_int_equal(heddle_generate(f->client, &r, on_reply, &s), HEDDLE_CANCELLED);
    pthread_join(thread, NULL);
}

static void test_tokens(void **state)
{
    struct fixture *f = *state;
    uint32_t ids[4] = {0};
    char text[16];
    size_t n;
    assert_int_equal(heddle_tokenize(f->client, NULL, "x", 1, ids, 4, &n), HEDDLE_OK);
    assert_int_equal(n, 3);
    assert_int_equal(ids[1], 70000);
    ids[0] = 99;
    assert_int_equal(heddle_tokenize(f->client, NULL, "x", 1, ids, 2, &n), HEDDLE_BUSY);
    assert_int_equal(n, 3);
    assert_int_equal(ids[0], 99);
    assert_int_equal(heddle_detokenize(f->client, NULL, ids, 3, text, sizeof text, &n), HEDDLE_OK);
    assert_string_equal(text, "h\xc3\xa9llo");
    assert_int_equal(heddle_detokenize(f->client, NULL, ids, 3, text, 6, &n), HEDDLE_BUSY);
    assert_int_equal(n, 6);
}

static void test_server(void **state)
{
    struct fixture *f = *state;
    struct heddle_model model;
    int serving = 0;
    assert_int_equal(heddle_model_info(f->client, NULL, &model), HEDDLE_OK);
    assert_string_equal(model.name, "tiny");
    assert_int_equal(model.groups_ready, 1);
    assert_int_equal(model.tensor_parallel, 4);
    assert_int_equal(heddle_model_info(f->client, "other", &model), HEDDLE_NOT_FOUND);
    assert_int_equal(heddle_health(f->client, NULL, &serving), HEDDLE_OK);
    assert_int_equal(serving, 1);
    assert_int_equal(heddle_health(f->client, "readiness", &serving), HEDDLE_OK);
    assert_int_equal(serving, 0);
}

static void test_nobody(void **state)
{
    struct heddle_client *c;
    struct heddle_options options = {.address = "127.0.0.1:1"};
    struct heddle_model model;
    struct seen s = {0};
    struct heddle_request r = {.text = "x"};
    (void)state;
    assert_int_equal(heddle_connect(&options, &c), HEDDLE_OK);
    assert_int_equal(heddle_model_info(c, NULL, &model), HEDDLE_UNAVAILABLE);
    assert_int_equal(heddle_generate(c, &r, on_reply, &s), HEDDLE_UNAVAILABLE);
    assert_true(strlen(heddle_last_error()) > 0);
    heddle_close(c);
    options.address = NULL;
    assert_int_equal(heddle_connect(&options, &c), HEDDLE_INVALID);
    options = (struct heddle_options){.address = "x:1", .ca_file = "/nowhere"};
    assert_int_not_equal(heddle_connect(&options, &c), HEDDLE_OK);
}

static void test_wrong_key(void **state)
{
    struct fixture *f = *state;
    char address[64];
    struct heddle_client *c;
    struct heddle_model model;
    int serving;
    snprintf(address, sizeof address, "127.0.0.1:%d", rpc_server_port(f->server));
    struct heddle_options options = {.address = address};
    assert_int_equal(heddle_connect(&options, &c), HEDDLE_OK);
    assert_int_equal(heddle_model_info(c, NULL, &model), HEDDLE_UNAUTHENTICATED);
    assert_int_equal(heddle_health(c, "liveness", &serving), HEDDLE_OK);
    heddle_close(c);
}

int main(void)
{
#define CASE(f)                                                                                    \
    {                                                                                              \
#f, f, setup, teardown, NULL                                                               \
    }
    const struct CMUnitTest tests[] = {CASE(test_generate),
                                       CASE(test_generate_ends),
                                       CASE(test_cancel),
                                       CASE(test_tokens),
                                       CASE(test_server),
                                       CASE(test_wrong_key),
                                       cmocka_unit_test(test_nobody)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
