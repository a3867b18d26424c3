/* gRPC over the same front: what HTTP checks is checked here, replies carry text and tokens, Cancel
 * and a client's leaving end the request. Method: the in-process RPC over a fake engine. */
#include "coordinator/front/grpc_front.h"
#include "front_fixture.h"
#include "proto/serve.pb-c.h"

static struct grpc_front *grpc;
static struct rpc_channel *channel;
static const char address[] = "local:front-test";

static int begin(void **state)
{
    (void)state;
    fixture_begin();
    struct front_config c = fixture_config();
    fixture_open(&c);
    struct grpc_front_config config = {.front = front, .host = address, .port = -1};
    assert_int_equal(grpc_front_create(&config, &grpc), OK);
    struct rpc_channel_config ch = {.address = address};
    assert_int_equal(rpc_channel_create(&ch, &channel), OK);
    return 0;
}
static int end(void **state)
{
    (void)state;
    rpc_channel_destroy(channel);
    grpc_front_stop(grpc);
    front_stop(front);
    grpc_front_destroy(grpc);
    fixture_end();
    return 0;
}

struct heard {
    pthread_mutex_t mutex;
    pthread_cond_t change;
    char text[512], finish[16], why[512], id[136];
    uint32_t tokens[512];
    size_t n_tokens, n_replies, n_top;
    uint32_t n_prompt, n_completion;
    int code;
    bool ended;
};

static void on_reply(struct rpc_call *call, void *ctx, struct span bytes)
{
    (void)call;
    struct heard *h = ctx;
    Heddle__V1__GenerateReply *r = heddle__v1__generate_reply__unpack(NULL, bytes.n, (const uint8_t *)bytes.data);
    pthread_mutex_lock(&h->mutex);
    strncat(h->text, r->text, sizeof h->text - 1 - strlen(h->text));
    for (size_t i = 0; i < r->n_tokens && h->n_tokens < 512; i++) h->tokens[h->n_tokens++] = r->tokens[i];
    if (r->n_logprobs) h->n_top = r->logprobs[0]->n_top;
    if (*r->finish_reason) {
        snprintf(h->finish, sizeof h->finish, "%s", r->finish_reason);
        h->n_prompt = r->prompt_tokens;
        h->n_completion = r->completion_tokens;
    }
    snprintf(h->id, sizeof h->id, "%s", r->request_id);
    h->n_replies++;
    pthread_cond_signal(&h->change);
    pthread_mutex_unlock(&h->mutex);
    heddle__v1__generate_reply__free_unpacked(r, NULL);
}

static void on_end(struct rpc_call *call, void *ctx, int code, const char *text)
{
    (void)call;
    struct heard *h = ctx;
    pthread_mutex_lock(&h->mutex);
    h->code = code;
    snprintf(h->why, sizeof h->why, "%s", text ? text : "");
    h->ended = true;
    pthread_cond_signal(&h->change);
    pthread_mutex_unlock(&h->mutex);
}

static void pack(const ProtobufCMessage *m, struct buf *out)
{
    buf_init(out, 0);
    buf_reserve(out, protobuf_c_message_get_packed_size(m));
    out->n = protobuf_c_message_pack(m, (uint8_t *)out->data);
}

static struct rpc_call *generate(const Heddle__V1__GenerateRequest *r, struct heard *h)
{
    struct rpc_handler handler = {on_reply, on_end, h};
    struct rpc_call *call;
    struct buf bytes;
    memset(h, 0, sizeof *h);
    pthread_mutex_init(&h->mutex, NULL);
    pthread_cond_init(&h->change, NULL);
    pack(&r->base, &bytes);
    assert_int_equal(rpc_open(channel, "/heddle.v1.Heddle/Generate", 0, &handler, &call), OK);
    assert_int_equal(rpc_send(call, bytes.data, bytes.n), OK);
    rpc_half_close(call);
    buf_fini(&bytes);
    return call;
}

static void wait_for(struct heard *h, size_t n_replies)
{
    pthread_mutex_lock(&h->mutex);
    while (!h->ended && (!n_replies || h->n_replies < n_replies)) pthread_cond_wait(&h->change, &h->mutex);
    pthread_mutex_unlock(&h->mutex);
}

static char hello[] = "hello", stop_word[] = "STOP", given_id[] = "my-id";

static void generates(void **state)
{
    (void)state;
    struct heard h;
    Heddle__V1__GenerateRequest r = HEDDLE__V1__GENERATE_REQUEST__INIT;
    Heddle__V1__SamplingParams p = HEDDLE__V1__SAMPLING_PARAMS__INIT;
    char *stops[] = {stop_word};
    fake_reset("one t\xc3\xa9 STOP three");
    r.prompt_case = HEDDLE__V1__GENERATE_REQUEST__PROMPT_TEXT;
    r.text = hello;
    r.request_id = given_id;
    r.sampling = &p;
    p.max_tokens_given_case = HEDDLE__V1__SAMPLING_PARAMS__MAX_TOKENS_GIVEN_MAX_TOKENS;
    p.max_tokens = 60;
    p.temperature_given_case = HEDDLE__V1__SAMPLING_PARAMS__TEMPERATURE_GIVEN_TEMPERATURE;
    p.temperature = 0;
    p.logprobs_given_case = HEDDLE__V1__SAMPLING_PARAMS__LOGPROBS_GIVEN_LOGPROBS;
    p.logprobs = 2;
    p.n_stop = 1;
    p.stop = stops;
    struct rpc_call *call = generate(&r, &h);
    wait_for(&h, 0);
    rpc_release(call);
    if (h.code) fprintf(stderr, "%s\n", h.why);
    assert_int_equal(h.code, RPC_OK);
    assert_string_equal(h.text, "one t\xc3\xa9 ");
    assert_string_equal(h.finish, "stop");
    assert_string_equal(h.id, "my-id");
    assert_int_equal(h.n_prompt, 5);
    assert_int_equal(h.n_tokens, 8);
    assert_int_equal(h.tokens[0], 'o');
    assert_int_equal(h.n_top, 2);
    assert_true(fake.last_sampling.temperature == 0);
    uint32_t ids[] = {97, 98};
    Heddle__V1__TokenIds tokens = HEDDLE__V1__TOKEN_IDS__INIT;
    tokens.n_ids = 2;
    tokens.ids = ids;
    r.prompt_case = HEDDLE__V1__GENERATE_REQUEST__PROMPT_TOKENS;
    r.tokens = &tokens;
    p.max_tokens = 3;
    p.n_stop = 0;
    call = generate(&r, &h);
    wait_for(&h, 0);
    rpc_release(call);
    assert_string_equal(h.text, "one");
    assert_string_equal(h.finish, "length");
    assert_int_equal(h.n_completion, 3);
    p.max_tokens_given_case = 0;
    call = generate(&r, &h);
    wait_for(&h, 0);
    rpc_release(call);
    assert_int_equal(fake.last_max_tokens, 2046); /* as many as fit */
}

static void refusals(void **state)
{
    (void)state;
    struct heard h;
    fake_reset("abc");
    for (int i = 0; i < 6; i++) {
        Heddle__V1__GenerateRequest r = HEDDLE__V1__GENERATE_REQUEST__INIT;
        Heddle__V1__SamplingParams p = HEDDLE__V1__SAMPLING_PARAMS__INIT;
        uint32_t ids[] = {97, 4000000000u};
        Heddle__V1__TokenIds tokens = HEDDLE__V1__TOKEN_IDS__INIT;
        static char bad_text[] = "\xff", other[] = "other";
        tokens.n_ids = 2;
        tokens.ids = ids;
        r.sampling = &p;
        r.prompt_case = HEDDLE__V1__GENERATE_REQUEST__PROMPT_TEXT;
        r.text = hello;
        int code = RPC_INVALID_ARGUMENT;
        if (i == 0) r.prompt_case = 0;
        if (i == 1) {
            r.prompt_case = HEDDLE__V1__GENERATE_REQUEST__PROMPT_TOKENS;
            r.tokens = &tokens;
        }
        if (i == 2) {
            p.temperature_given_case = HEDDLE__V1__SAMPLING_PARAMS__TEMPERATURE_GIVEN_TEMPERATURE;
            p.temperature = -1;
        }
        if (i == 3) {
            p.temperature_given_case = HEDDLE__V1__SAMPLING_PARAMS__TEMPERATURE_GIVEN_TEMPERATURE;
            p.temperature = __builtin_nanf("");
        }
        if (i == 4) r.text = bad_text;
        if (i == 5) {
            r.model = other;
            code = err_grpc(ERR_NO_ROUTE);
        }
        struct rpc_call *call = generate(&r, &h);
        wait_for(&h, 0);
        rpc_release(call);
        if (h.code != code) fprintf(stderr, "%d: %d %s\n", i, h.code, h.why);
        assert_int_equal(h.code, code);
        assert_true(*h.why != 0);
    }
    fake.refuse = ERR_FULL;
    Heddle__V1__GenerateRequest r = HEDDLE__V1__GENERATE_REQUEST__INIT;
    r.prompt_case = HEDDLE__V1__GENERATE_REQUEST__PROMPT_TEXT;
    r.text = hello;
    struct rpc_call *call = generate(&r, &h);
    wait_for(&h, 0);
    rpc_release(call);
    assert_int_equal(h.code, RPC_RESOURCE_EXHAUSTED);
    assert_int_equal(fake.n_submitted, 0);
}

static void cancels(void **state)
{
    (void)state;
    struct heard h;
    Heddle__V1__GenerateRequest r = HEDDLE__V1__GENERATE_REQUEST__INIT;
    struct buf bytes, reply;
    fake_reset("abc");
    fake.endless = true;
    r.prompt_case = HEDDLE__V1__GENERATE_REQUEST__PROMPT_TEXT;
    r.text = hello;
    r.request_id = given_id;
    struct rpc_call *call = generate(&r, &h);
    wait_for(&h, 3);
    struct heard second; /* the id is in use */
    struct rpc_call *again = generate(&r, &second);
    wait_for(&second, 0);
    rpc_release(again);
    assert_int_equal(second.code, RPC_INVALID_ARGUMENT);
    Heddle__V1__CancelRequest c = HEDDLE__V1__CANCEL_REQUEST__INIT;
    c.request_id = given_id;
    pack(&c.base, &bytes);
    buf_init(&reply, 0);
    assert_int_equal(rpc_unary(channel, "/heddle.v1.Heddle/Cancel", (struct span){bytes.data, bytes.n}, 5000, &reply, NULL), OK);
    assert_int_equal(reply.n, 2); /* found = true */
    wait_for(&h, 0);
    rpc_release(call);
    assert_string_equal(h.finish, "cancelled");
    buf_clear(&reply);
    assert_int_equal(rpc_unary(channel, "/heddle.v1.Heddle/Cancel", (struct span){bytes.data, bytes.n}, 5000, &reply, NULL), OK);
    assert_int_equal(reply.n, 0);
    assert_true(engine_idle(1000));
    call = generate(&r, &h); /* the client leaves */
    wait_for(&h, 2);
    rpc_cancel(call);
    wait_for(&h, 0);
    rpc_release(call);
    assert_true(engine_idle(1000));
    buf_fini(&bytes);
    buf_fini(&reply);
}

static void small_calls(void **state)
{
    (void)state;
    struct buf bytes, reply;
    char text[] = "h\xc3\xa9";
    Heddle__V1__TokenizeRequest t = HEDDLE__V1__TOKENIZE_REQUEST__INIT;
    t.text = text;
    pack(&t.base, &bytes);
    buf_init(&reply, 0);
    assert_int_equal(rpc_unary(channel, "/heddle.v1.Heddle/Tokenize", (struct span){bytes.data, bytes.n}, 5000, &reply, NULL), OK);
    Heddle__V1__TokenizeReply *ids = heddle__v1__tokenize_reply__unpack(NULL, reply.n, (const uint8_t *)reply.data);
    assert_int_equal(ids->n_ids, 3);
    assert_int_equal(ids->ids[1], 0xc3);
    buf_fini(&bytes);
    Heddle__V1__DetokenizeRequest d = HEDDLE__V1__DETOKENIZE_REQUEST__INIT;
    d.n_ids = ids->n_ids;
    d.ids = ids->ids;
    pack(&d.base, &bytes);
    buf_clear(&reply);
    assert_int_equal(rpc_unary(channel, "/heddle.v1.Heddle/Detokenize", (struct span){bytes.data, bytes.n}, 5000, &reply, NULL), OK);
    Heddle__V1__DetokenizeReply *back = heddle__v1__detokenize_reply__unpack(NULL, reply.n, (const uint8_t *)reply.data);
    assert_string_equal(back->text, text);
    heddle__v1__tokenize_reply__free_unpacked(ids, NULL);
    heddle__v1__detokenize_reply__free_unpacked(back, NULL);
    buf_clear(&reply);
    assert_int_equal(rpc_unary(channel, "/heddle.v1.Heddle/ModelInfo", (struct span){"", 0}, 5000, &reply, NULL), OK);
    Heddle__V1__ModelInfoReply *info = heddle__v1__model_info_reply__unpack(NULL, reply.n, (const uint8_t *)reply.data);
    assert_string_equal(info->model, "tiny");
    assert_int_equal(info->context_max, 2048);
    assert_int_equal(info->groups_ready, 1);
    heddle__v1__model_info_reply__free_unpacked(info, NULL);
    int code;
    buf_clear(&reply);
    assert_int_not_equal(rpc_unary(channel, "/heddle.v1.Heddle/Tokenize", (struct span){"\xff\xff\xff", 3}, 5000, &reply, &code), OK);
    assert_int_equal(code, RPC_INVALID_ARGUMENT);
    static const struct {
        struct span request;
        int code, status;
    } health[] = {{{"", 0}, 0, 1}, {{"\n\x09readiness", 11}, 0, 1}, {{"\n\x08liveness", 10}, 0, 1}, {{"\n\x01x", 3}, 5, 0}};
    for (int up = 1; up >= 0; up--)
        for (size_t i = 0; i < 4; i++) {
            atomic_store(&fake.groups_up, up);
            buf_clear(&reply);
            rpc_unary(channel, "/grpc.health.v1.Health/Check", health[i].request, 5000, &reply, &code);
            assert_int_equal(code, health[i].code);
            if (!code) assert_int_equal(reply.data[1], i < 2 && !up ? 2 : health[i].status);
        }
    atomic_store(&fake.groups_up, 1);
    buf_fini(&bytes);
    buf_fini(&reply);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(generates),
        cmocka_unit_test(refusals),
        cmocka_unit_test(cancels),
        cmocka_unit_test(small_calls),
    };
    return cmocka_run_group_tests(tests, begin, end);
}
