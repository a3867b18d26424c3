/* Chat, tokenize and keys: messages become the template's text and tokens, answers have OpenAI's
 * shapes, and no route answers a caller that its row does not admit. */
#include "coordinator/front/routes.h"
#include "front_fixture.h"

static int begin(void **state)
{
    (void)state;
    fixture_begin();
    struct front_config c = fixture_config();
    fixture_open(&c);
    return 0;
}
static int end(void **state)
{
    (void)state;
    fixture_end();
    return 0;
}

/* The prompt that the engine got, as text; 257 and 258 frame messages. */
static void assert_prompt(const char *expected)
{
    struct buf text;
    buf_init(&text, 0);
    assert_int_equal(tokenizer_decode(bytes_tokenizer, fake.last_tokens, fake.last_n_tokens, false, &text), OK);
    assert_string_equal(buf_string(&text), expected);
    buf_fini(&text);
}

static void whole_chat(void **state)
{
    (void)state;
    fake_reset("Hi! \xf0\x9f\x91\x8b");
    json_t *a = post("/v1/chat/completions",
                     "{\"model\":\"tiny\",\"messages\":[{\"role\":\"system\",\"content\":\"\"},"
                     "{\"role\":\"user\",\"content\":[{\"type\":\"text\",\"text\":\"a\"},{\"type\":\"text\",\"text\":\"b\"}],"
                     "\"name\":\"bob\"}],\"max_completion_tokens\":30,\"store\":true,\"metadata\":{\"k\":\"v\"}}",
                     200);
    assert_string_equal(text_at(a, "choices.0.message.content"), "Hi! \xf0\x9f\x91\x8b");
    assert_string_equal(text_at(a, "choices.0.message.role"), "assistant");
    assert_string_equal(text_at(a, "choices.0.finish_reason"), "stop");
    assert_string_equal(text_at(a, "object"), "chat.completion");
    assert_memory_equal(text_at(a, "id"), "chatcmpl-", 9);
    assert_prompt("<|im_start|>system\n<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n");
    assert_int_equal(fake.last_tokens[0], 257); /* special tokens of the template are tokens */
    assert_int_equal(fake.last_max_tokens, 30);
    json_decref(a);
    a = post("/v1/chat/completions", "{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]}", 200);
    assert_int_equal(fake.last_max_tokens, 2048 - fake.last_n_tokens); /* as many as fit */
    json_decref(a);
    a = post("/v1/chat/completions",
             "{\"messages\":[{\"role\":\"developer\",\"content\":\"d\"},{\"role\":\"assistant\",\"content\":null},"
             "{\"role\":\"user\",\"content\":\"u\"}],\"add_generation_prompt\":false}", 200);
    assert_prompt("<|im_start|>system\nd<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n<|im_start|>user\nu<|im_end|>\n");
    json_decref(a);
    a = post("/v1/chat/completions",
             "{\"messages\":[{\"role\":\"user\",\"content\":\"u\"},{\"role\":\"assistant\",\"content\":\"The answer is \"}],"
             "\"continue_final_message\":true,\"add_generation_prompt\":false}", 200);
    assert_prompt("<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\nThe answer is");
    json_decref(a);
}

static void chat_logprobs(void **state)
{
    (void)state;
    fake_reset("a\xc3\xa9");
    json_t *a = post("/v1/chat/completions",
                     "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"logprobs\":true,\"top_logprobs\":2}", 200);
    assert_int_equal(json_array_size(at(a, "choices.0.logprobs.content")), 4);
    assert_string_equal(text_at(a, "choices.0.logprobs.content.0.token"), "a");
    assert_int_equal(int_at(a, "choices.0.logprobs.content.0.bytes.0"), 'a');
    assert_int_equal(int_at(a, "choices.0.logprobs.content.1.bytes.0"), 0xc3);
    assert_int_equal(json_array_size(at(a, "choices.0.logprobs.content.0.top_logprobs")), 2);
    assert_true(json_is_null(at(a, "choices.0.logprobs.refusal")));
    assert_true(json_is_null(at(a, "choices.0.logprobs.content.3.bytes"))); /* the end token */
    assert_string_equal(text_at(a, "choices.0.logprobs.content.3.token"), "<|end|>");
    json_decref(a);
    a = post("/v1/chat/completions", "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"logprobs\":true}", 200);
    assert_int_equal(json_array_size(at(a, "choices.0.logprobs.content.0.top_logprobs")), 0);
    json_decref(a);
}

struct chunks {
    int n, n_role, n_empty_delta;
    char text[256], finish[16];
    bool done;
};
static void take(void *ctx, const char *line, size_t n)
{
    struct chunks *c = ctx;
    json_t *v = NULL;
    if (n == 6 && !memcmp(line, "[DONE]", 6)) {
        c->done = true;
        return;
    }
    assert_int_equal(json_parse(line, n, &v), OK);
    c->n++;
    assert_string_equal(text_at(v, "object"), "chat.completion.chunk");
    if (at(v, "choices.0.delta.role")) {
        assert_int_equal(c->n, 1);
        c->n_role++;
    }
    const char *text = json_string_value(at(v, "choices.0.delta.content"));
    if (text) strncat(c->text, text, sizeof c->text - 1 - strlen(c->text));
    const char *finish = json_string_value(at(v, "choices.0.finish_reason"));
    if (finish) snprintf(c->finish, sizeof c->finish, "%s", finish);
    json_decref(v);
}

static void streamed_chat(void **state)
{
    (void)state;
    struct answer a;
    struct chunks c = {0};
    fake_reset("Hello \xe2\x82\xac there END and more");
    call_with("POST", "/v1/chat/completions", NULL,
              "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"stream\":true,\"stop\":[\"END\"]}", &a);
    assert_int_equal(a.status, 200);
    events(&a.body, take, &c);
    assert_string_equal(c.text, "Hello \xe2\x82\xac there ");
    assert_string_equal(c.finish, "stop");
    assert_int_equal(c.n_role, 1);
    assert_true(c.done);
    assert_null(strstr(a.body.data, "\nid:"));
    answer_fini(&a);
}

static void bad_chats(void **state)
{
    (void)state;
#define USER "\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]"
    static const struct {
        const char *body, *words;
    } cases[] = {
        {"{}", "messages"},
        {"{\"messages\":[]}", "messages"},
        {"{\"messages\":\"hello\"}", "messages"},
        {"{\"messages\":[7]}", "messages[0]"},
        {"{\"messages\":[{\"content\":\"x\"}]}", "messages[0].role"},
        {"{\"messages\":[{\"role\":\"user\"}]}", "messages[0].content"},
        {"{\"messages\":[{\"role\":\"user\",\"content\":7}]}", "messages[0].content"},
        {"{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"image_url\",\"image_url\":{}}]}]}", "image_url"},
        {"{\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\"}]}]}", "messages[0].content[0].text"},
        {"{\"messages\":[{\"role\":\"user\",\"content\":\"x\",\"name\":7}]}", "messages[0].name"},
        {"{" USER ",\"top_logprobs\":2}", "top_logprobs"},
        {"{" USER ",\"logprobs\":1}", "logprobs"},
        {"{" USER ",\"response_format\":{\"type\":\"json_schema\",\"json_schema\":{\"name\":\"a\"}}}", "json_schema"},
        {"{" USER ",\"response_format\":\"text\"}", "response_format"},
        {"{" USER ",\"tools\":7}", "tools"},
        {"{" USER ",\"tools\":[{\"type\":\"function\"}]}", "tools"},
        {"{" USER ",\"tool_choice\":\"required\"}", "tool_choice"},
        {"{" USER ",\"functions\":[{\"name\":\"f\"}]}", "functions"},
        {"{" USER ",\"modalities\":[\"audio\"]}", "modalities"},
        {"{" USER ",\"chat_template\":\"{{ 1 }}\"}", "chat_template"},
        {"{" USER ",\"chat_template_kwargs\":[]}", "chat_template_kwargs"},
        {"{" USER ",\"max_completion_tokens\":-5}", "max_completion_tokens"},
        {"{" USER ",\"continue_final_message\":true,\"add_generation_prompt\":true}", "continue_final_message"},
    };
    fake_reset("abc");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        json_t *a = post("/v1/chat/completions", cases[i].body, 400);
        if (!strstr(text_at(a, "error.message"), cases[i].words)) fprintf(stderr, "%s\n", text_at(a, "error.message"));
        assert_non_null(strstr(text_at(a, "error.message"), cases[i].words));
        json_decref(a);
    }
    assert_int_equal(fake.n_submitted, 0);
}

static void tokenize_and_back(void **state)
{
    (void)state;
    json_t *a = post("/tokenize", "{\"model\":\"tiny\",\"prompt\":\"h\xc3\xa9<|end|>\",\"return_token_strs\":true}", 200);
    assert_int_equal(int_at(a, "count"), 4);
    assert_int_equal(int_at(a, "tokens.3"), FAKE_EOS);
    assert_int_equal(int_at(a, "max_model_len"), 2048);
    assert_string_equal(text_at(a, "token_strs.3"), "<|end|>");
    json_decref(a);
    a = post("/tokenize", "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"add_generation_prompt\":false}", 200);
    assert_int_equal(int_at(a, "tokens.0"), 257);
    json_decref(a);
    a = post("/detokenize", "{\"tokens\":[104,195,169,256]}", 200);
    assert_string_equal(text_at(a, "prompt"), "h\xc3\xa9<|end|>");
    json_decref(a);
    static const char *const bad[] = {"{}", "{\"prompt\":7}", "{\"prompt\":\"a\",\"add_special_tokens\":7}", "7", ""};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) json_decref(post("/tokenize", bad[i], 400));
    static const char *const worse[] = {"{}", "{\"tokens\":[260]}", "{\"tokens\":[-1]}", "{\"tokens\":[\"a\"]}", "{\"tokens\":7}"};
    for (size_t i = 0; i < sizeof worse / sizeof *worse; i++) json_decref(post("/detokenize", worse[i], 400));
}

/* Walks the table: without a key only the rows that say so answer. */
static void every_route_asks_for_a_key(void **state)
{
    (void)state;
    struct front *without = front;
    struct front_config c = fixture_config();
    assert_int_equal(auth_add_list(&c.auth, "sk-one, sk-two"), OK);
    fake_reset("abc");
    fixture_open(&c);
    static const char *const wrong[] = {NULL, "Authorization: Bearer sk-on\r\n", "Authorization: Bearer \r\n",
                                        "Authorization: sk-one\r\n", "X-Api-Key: sk-onee\r\n"};
    for (unsigned i = 0; i < n_routes; i++) {
        const char *method = routes[i].methods & HTTP_METHOD_POST ? "POST" : "GET";
        for (size_t k = 0; k < sizeof wrong / sizeof *wrong; k++) {
            struct answer a;
            call_with(method, routes[i].prefix ? "/v1/models/tiny" : routes[i].path, wrong[k], "{}", &a);
            if (routes[i].access == ROUTE_KEY) assert_int_equal(a.status, 401);
            else assert_int_equal(a.status, 200);
            answer_fini(&a);
        }
    }
    struct answer a;
    uint64_t salts[2];
    for (int i = 0; i < 2; i++) {
        call_with("POST", "/v1/completions", i ? "Authorization: Bearer sk-two\r\n" : "x-api-key: sk-one\r\n",
                  "{\"prompt\":\"p\"}", &a);
        assert_int_equal(a.status, 200);
        salts[i] = fake.last_salt;
        assert_true(fake.last_tenant != 0);
        answer_fini(&a);
    }
    assert_true(salts[0] != salts[1]); /* no prefix is shared between keys */
    front_stop(front);
    assert_true(engine_idle(1000));
    front_destroy(front);
    front = without;
    port = http_server_port(front->http);
}

static void draining(void **state)
{
    (void)state;
    struct answer a;
    char value[32];
    fake_reset("abc");
    int early = client_open(), idle = client_open(); /* connected before, asks during */
    struct buf in;
    buf_init(&in, 0);
    client_send(idle, "GET /live HTTP/1.1\r\n\r\n", 22);
    client_answer(idle, false, &a);
    answer_fini(&a);
    front_drain(front);
    assert_false(client_read_until(idle, NULL, 1000, &in)); /* closed: it had its answer */
    for (int i = 0; i < 5; i++) front_drain(front), clock_sleep_us(2000);
    client_send(early, "GET /health HTTP/1.1\r\n\r\n", 24);
    client_answer(early, false, &a);
    assert_int_equal(a.status, 503);
    answer_fini(&a);
    close(early), close(idle);
    buf_fini(&in);
    call_with("GET", "/health", NULL, NULL, &a);
    assert_int_equal(a.status, 503);
    assert_string_equal(answer_header(&a, "connection", value, sizeof value), "close");
    answer_fini(&a);
    call_with("GET", "/live", NULL, NULL, &a);
    assert_int_equal(a.status, 200);
    answer_fini(&a);
    for (int i = 0; i < 3000 && !front_is_quiet(front); i++) clock_sleep_us(1000);
    assert_true(front_is_quiet(front));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(whole_chat),        cmocka_unit_test(chat_logprobs), cmocka_unit_test(streamed_chat),
        cmocka_unit_test(bad_chats),         cmocka_unit_test(tokenize_and_back),
        cmocka_unit_test(every_route_asks_for_a_key), cmocka_unit_test(draining),
    };
    return cmocka_run_group_tests(tests, begin, end);
}
