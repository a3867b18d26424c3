/* Completions over HTTP: what a client sends is what the engine gets, and what the engine says is
 * what the client reads, whole and streamed. Method: a real server and raw sockets over a fake
 * engine that answers with chosen bytes. */
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

static void whole_answer(void **state)
{
    (void)state;
    fake_reset("Hello, world");
    json_t *a = post("/v1/completions", "{\"model\":\"tiny\",\"prompt\":\"abc\",\"max_tokens\":50}", 200);
    assert_string_equal(text_at(a, "choices.0.text"), "Hello, world");
    assert_string_equal(text_at(a, "choices.0.finish_reason"), "stop");
    assert_string_equal(text_at(a, "object"), "text_completion");
    assert_string_equal(text_at(a, "model"), "tiny");
    assert_memory_equal(text_at(a, "id"), "cmpl-", 5);
    assert_int_equal(int_at(a, "usage.prompt_tokens"), 3);
    assert_int_equal(int_at(a, "usage.completion_tokens"), 13); /* with the end token */
    assert_int_equal(int_at(a, "usage.total_tokens"), 16);
    assert_int_equal(int_at(a, "usage.prompt_tokens_details.cached_tokens"), 1);
    assert_true(json_is_null(at(a, "choices.0.logprobs")));
    assert_int_equal(fake.last_n_tokens, 3);
    assert_int_equal(fake.last_tokens[1], 'b');
    json_decref(a);
}

static void length_and_default_length(void **state)
{
    (void)state;
    fake_reset("abcdefghijklmnopqrstuvwxyz");
    json_t *a = post("/v1/completions", "{\"prompt\":\"p\",\"max_tokens\":5}", 200);
    assert_string_equal(text_at(a, "choices.0.text"), "abcde");
    assert_string_equal(text_at(a, "choices.0.finish_reason"), "length");
    json_decref(a);
    a = post("/v1/completions", "{\"prompt\":\"p\"}", 200);
    assert_string_equal(text_at(a, "choices.0.text"), "abcdefghijklmnop");
    json_decref(a);
}

/* Every stop string, wherever its bytes fall: the text never holds it nor any of its beginning. */
static void stop_strings(void **state)
{
    (void)state;
    static const struct {
        const char *reply, *stop, *text;
        int n_step;
    } cases[] = {{"one two STOP three", "\"STOP\"", "one two ", 1},
                 {"one two STOP three", "\"STOP\"", "one two ", 7},
                 {"aaab", "[\"aab\",\"zz\"]", "a", 1},
                 {"xSTOx", "\"STOP\"", "xSTOx", 1},
                 {"ababac", "\"abac\"", "ab", 3},
                 {"price \xe2\x82\xac 5", "\"\xe2\x82\xac\"", "price ", 1},
                 {"end", "\"end\"", "", 1},
                 {"ends", "[\"nd\",\"end\"]", "", 1}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char body[256];
        fake_reset(cases[i].reply);
        fake.tokens_a_step = cases[i].n_step;
        snprintf(body, sizeof body, "{\"prompt\":\"p\",\"max_tokens\":60,\"stop\":%s}", cases[i].stop);
        json_t *a = post("/v1/completions", body, 200);
        assert_string_equal(text_at(a, "choices.0.text"), cases[i].text);
        assert_string_equal(text_at(a, "choices.0.finish_reason"), "stop");
        json_decref(a);
    }
    assert_true(engine_idle(2000));
    fake_reset("one two STOP three");
    json_t *a = post("/v1/completions",
                     "{\"prompt\":\"p\",\"max_tokens\":60,\"stop\":\"STOP\",\"include_stop_str_in_output\":true}", 200);
    assert_string_equal(text_at(a, "choices.0.text"), "one two STOP");
    assert_string_equal(text_at(a, "choices.0.stop_reason"), "STOP");
    assert_int_equal(int_at(a, "usage.completion_tokens"), 12);
    json_decref(a);
}

struct streamed {
    char text[8][512];
    int n_events, n_usage, n_done, n_finish;
    char finish[16];
    long long usage_completion, last_running;
    bool empty_choices_usage, null_usage;
};

static void take_event(void *ctx, const char *line, size_t n)
{
    struct streamed *s = ctx;
    s->n_events++;
    if (n == 6 && !memcmp(line, "[DONE]", 6)) {
        s->n_done++;
        return;
    }
    assert_int_equal(s->n_done, 0);
    json_t *v = NULL;
    assert_int_equal(json_parse(line, n, &v), OK);
    const json_t *usage = json_object_get(v, "usage");
    if (json_is_null(usage)) s->null_usage = true;
    if (json_is_object(usage)) {
        s->n_usage++;
        s->usage_completion = int_at(usage, "completion_tokens");
        s->empty_choices_usage = json_array_size(at(v, "choices")) == 0;
    }
    if (json_array_size(at(v, "choices"))) {
        const json_t *c = at(v, "choices.0");
        const json_t *text = json_object_get(c, "text");
        if (!text) text = at(c, "delta.content");
        char *to = s->text[int_at(c, "index")];
        if (json_is_string(text)) strncat(to, json_string_value(text), 511 - strlen(to));
        const char *finish = json_string_value(json_object_get(c, "finish_reason"));
        if (finish) {
            s->n_finish++;
            snprintf(s->finish, sizeof s->finish, "%s", finish);
        }
    }
    json_decref(v);
}

static struct streamed stream(const char *path, const char *body)
{
    struct answer a;
    struct streamed s = {0};
    char type[64];
    call_with("POST", path, NULL, body, &a);
    if (a.status != 200) fprintf(stderr, "%s\n", buf_string(&a.body));
    assert_int_equal(a.status, 200);
    assert_memory_equal(answer_header(&a, "content-type", type, sizeof type), "text/event-stream", 17);
    events(&a.body, take_event, &s);
    assert_int_equal(s.n_done, 1);
    answer_fini(&a);
    return s;
}

static void streaming(void **state)
{
    (void)state;
    fake_reset("Gr\xc3\xbc\xc3\x9f dich \xf0\x9f\x8c\x8d!");
    struct streamed s = stream("/v1/completions", "{\"prompt\":\"p\",\"max_tokens\":50,\"stream\":true}");
    assert_string_equal(s.text[0], "Gr\xc3\xbc\xc3\x9f dich \xf0\x9f\x8c\x8d!");
    assert_string_equal(s.finish, "stop");
    assert_int_equal(s.n_usage, 0);
    s = stream("/v1/completions",
               "{\"prompt\":\"p\",\"max_tokens\":4,\"stream\":true,\"stream_options\":{\"include_usage\":true}}");
    assert_int_equal(s.n_usage, 1);
    assert_true(s.empty_choices_usage && s.null_usage);
    assert_int_equal(s.usage_completion, 4);
    assert_string_equal(s.finish, "length");
    s = stream("/v1/completions",
               "{\"prompt\":\"p\",\"max_tokens\":6,\"stream\":true,\"stream_options\":{\"include_usage\":true,"
               "\"continuous_usage_stats\":true}}");
    assert_true(s.n_usage >= 2);
    assert_int_equal(s.usage_completion, 6);
    fake_reset("one two STOP three");
    s = stream("/v1/completions", "{\"prompt\":\"p\",\"max_tokens\":50,\"stream\":true,\"stop\":[\"STOP\"]}");
    assert_string_equal(s.text[0], "one two ");
}

static void many_prompts_and_choices(void **state)
{
    (void)state;
    fake_reset("abcdef");
    json_t *a = post("/v1/completions", "{\"prompt\":[\"x\",\"yy\"],\"n\":2,\"max_tokens\":3}", 200);
    assert_int_equal(json_array_size(at(a, "choices")), 4);
    for (int i = 0; i < 4; i++) {
        char path[32];
        snprintf(path, sizeof path, "choices.%d.index", i);
        assert_int_equal(int_at(a, path), i);
    }
    assert_int_equal(int_at(a, "usage.prompt_tokens"), 3);
    assert_int_equal(int_at(a, "usage.completion_tokens"), 12);
    json_decref(a);
    a = post("/v1/completions", "{\"prompt\":[[1,2,3],[4]],\"max_tokens\":1}", 200);
    assert_int_equal(json_array_size(at(a, "choices")), 2);
    json_decref(a);
    a = post("/v1/completions", "{\"prompt\":[97,98],\"max_tokens\":1,\"echo\":true}", 200);
    assert_string_equal(text_at(a, "choices.0.text"), "aba");
    json_decref(a);
    struct streamed s = stream("/v1/completions", "{\"prompt\":\"p\",\"n\":3,\"max_tokens\":4,\"stream\":true}");
    for (int i = 0; i < 3; i++) assert_string_equal(s.text[i], "abcd");
    assert_int_equal(s.n_finish, 3);
}

static void logprobs(void **state)
{
    (void)state;
    fake_reset("a\xc3\xa9");
    json_t *a = post("/v1/completions", "{\"prompt\":\"hi\",\"max_tokens\":9,\"logprobs\":2}", 200);
    assert_string_equal(text_at(a, "choices.0.logprobs.tokens.0"), "a");
    assert_string_equal(text_at(a, "choices.0.logprobs.tokens.1"), "bytes:\\xc3");
    assert_string_equal(text_at(a, "choices.0.logprobs.tokens.2"), "bytes:\\xa9");
    assert_int_equal(int_at(a, "choices.0.logprobs.text_offset.1"), 1);
    assert_int_equal(json_array_size(at(a, "choices.0.logprobs.token_logprobs")), 4);
    assert_int_equal(json_object_size(at(a, "choices.0.logprobs.top_logprobs.0")), 2);
    assert_true(json_real_value(at(a, "choices.0.logprobs.token_logprobs.0")) == -0.125 * (1 + 'a' % 8));
    json_decref(a);
    /* the harness' way: echo, score, generate one */
    a = post("/v1/completions", "{\"prompt\":\"hi!\",\"max_tokens\":1,\"logprobs\":1,\"echo\":true}", 200);
    assert_string_equal(text_at(a, "choices.0.text"), "hi!a");
    assert_int_equal(json_array_size(at(a, "choices.0.logprobs.tokens")), 4);
    assert_true(json_is_null(at(a, "choices.0.logprobs.token_logprobs.0")));
    assert_true(json_is_null(at(a, "choices.0.logprobs.top_logprobs.0")));
    assert_true(json_real_value(at(a, "choices.0.logprobs.token_logprobs.1")) == -0.125 * (1 + 'i' % 8));
    assert_int_equal(int_at(a, "choices.0.logprobs.text_offset.3"), 3);
    assert_true(fake.last_no_prefix_cache);
    json_decref(a);
    a = post("/v1/completions", "{\"prompt\":\"hi!\",\"max_tokens\":0,\"logprobs\":1,\"echo\":true}", 200);
    assert_string_equal(text_at(a, "choices.0.text"), "hi!");
    assert_int_equal(json_array_size(at(a, "choices.0.logprobs.tokens")), 3);
    json_decref(a);
    int before = fake.n_submitted;
    a = post("/v1/completions", "{\"prompt\":\"hi!\",\"max_tokens\":0,\"echo\":true}", 200);
    assert_string_equal(text_at(a, "choices.0.text"), "hi!");
    assert_int_equal(fake.n_submitted, before);
    json_decref(a);
}

static void parameters_reach_the_engine(void **state)
{
    (void)state;
    fake_reset("abc");
    json_t *a = post("/v1/completions",
                     "{\"prompt\":\"p\",\"max_tokens\":7,\"temperature\":0.5,\"top_p\":0.25,\"top_k\":11,\"min_p\":0.125,"
                     "\"presence_penalty\":-1.5,\"frequency_penalty\":1.25,\"repetition_penalty\":1.5,\"seed\":-3,"
                     "\"logit_bias\":{\"65\":-100,\"66\":5.5},\"stop_token_ids\":[70],\"min_tokens\":2,\"best_of\":4,"
                     "\"n\":2,\"cache_salt\":\"s\",\"priority\":-2,\"timeout\":9,\"user\":\"me\",\"unknown_field\":[1]}",
                     200);
    const struct sampling_params *p = &fake.last_sampling;
    assert_true(p->temperature == 0.5f && p->top_p == 0.25f && p->min_p == 0.125f);
    assert_true(p->presence_penalty == -1.5f && p->frequency_penalty == 1.25f && p->repetition_penalty == 1.5f);
    assert_int_equal(p->top_k, 11);
    assert_true(p->seed == (uint64_t)-3);
    assert_int_equal(p->n_bias, 2);
    assert_int_equal(fake.last_bias_tokens[0], 65);
    assert_true(fake.last_bias_values[1] == 5.5f);
    assert_int_equal(p->n_stop_ids, 2);
    assert_int_equal(fake.last_stop_ids[0], 70);
    assert_int_equal(fake.last_stop_ids[1], FAKE_EOS);
    assert_int_equal(p->min_tokens, 2);
    assert_int_equal(fake.last_max_tokens, 7);
    assert_int_equal(fake.last_n_choices, 2);
    assert_int_equal(fake.last_best_of, 4);
    assert_true(fake.last_salt != 0 && fake.last_deadline_us > 0);
    json_decref(a);
    a = post("/v1/completions", "{\"prompt\":\"p\",\"max_tokens\":5,\"ignore_eos\":true,\"stop\":null,\"seed\":null}", 200);
    assert_int_equal(p->n_stop_ids, 0);
    assert_string_equal(text_at(a, "choices.0.text"), "abcab");
    json_decref(a);
    a = post("/v1/completions", "{\"prompt\":\"p\",\"use_beam_search\":true,\"n\":3,\"beam_width\":5}", 200);
    assert_int_equal(fake.last_beam_width, 5);
    json_decref(a);
}

static const struct {
    const char *body, *param;
} refused_fields[] = {
    {"{\"prompt\":\"p\",\"temperature\":-1}", "temperature"},
    {"{\"prompt\":\"p\",\"temperature\":\"hot\"}", "temperature"},
    {"{\"prompt\":\"p\",\"temperature\":1e300}", "temperature"},
    {"{\"prompt\":\"p\",\"top_p\":1.5}", "top_p"},
    {"{\"prompt\":\"p\",\"top_k\":2.5}", "top_k"},
    {"{\"prompt\":\"p\",\"n\":0}", "n"},
    {"{\"prompt\":\"p\",\"n\":1000000000000000000}", "n"},
    {"{\"prompt\":\"p\",\"n\":true}", "n"},
    {"{\"prompt\":\"p\",\"best_of\":1,\"n\":2}", "best_of"},
    {"{\"prompt\":\"p\",\"best_of\":3,\"stream\":true}", "best_of"},
    {"{\"prompt\":\"p\",\"max_tokens\":-1}", "max_tokens"},
    {"{\"prompt\":\"p\",\"max_tokens\":9007199254740993}", "max_tokens"},
    {"{\"prompt\":\"p\",\"max_tokens\":\"7\"}", "max_tokens"},
    {"{\"prompt\":\"p\",\"min_tokens\":9,\"max_tokens\":3}", "min_tokens"},
    {"{\"prompt\":\"p\",\"logprobs\":21}", "logprobs"},
    {"{\"prompt\":\"p\",\"logprobs\":true}", "logprobs"},
    {"{\"prompt\":\"p\",\"logit_bias\":{\"260\":1}}", "logit_bias"},
    {"{\"prompt\":\"p\",\"logit_bias\":{\"-1\":1}}", "logit_bias"},
    {"{\"prompt\":\"p\",\"logit_bias\":{\"a\":1}}", "logit_bias"},
    {"{\"prompt\":\"p\",\"logit_bias\":{\"5\":101}}", "logit_bias"},
    {"{\"prompt\":\"p\",\"logit_bias\":[1]}", "logit_bias"},
    {"{\"prompt\":\"p\",\"stop_token_ids\":[260]}", "stop_token_ids"},
    {"{\"prompt\":\"p\",\"stop_token_ids\":7}", "stop_token_ids"},
    {"{\"prompt\":\"p\",\"stop\":7}", "stop"},
    {"{\"prompt\":\"p\",\"stop\":[\"\"]}", "stop"},
    {"{\"prompt\":\"p\",\"stop\":[\"a\",\"a\",\"a\",\"a\",\"a\",\"a\",\"a\",\"a\",\"a\",\"a\",\"a\",\"a\",\"a\",\"a\","
     "\"a\",\"a\",\"a\"]}", "stop"},
    {"{\"prompt\":[1,2,260]}", "prompt"},
    {"{\"prompt\":[1,-2]}", "prompt"},
    {"{\"prompt\":[1,2.5]}", "prompt"},
    {"{\"prompt\":[1,\"a\"]}", "prompt"},
    {"{\"prompt\":[\"a\",7]}", "prompt"},
    {"{\"prompt\":[[]]}", "prompt"},
    {"{\"prompt\":[]}", "prompt"},
    {"{\"prompt\":{}}", "prompt"},
    {"{\"prompt\":7}", "prompt"},
    {"{}", "prompt"},
    {"{\"prompt\":\"p\",\"suffix\":\"s\"}", "suffix"},
    {"{\"prompt\":\"p\",\"stream\":\"yes\"}", "stream"},
    {"{\"prompt\":\"p\",\"stream_options\":{\"include_usage\":true}}", "stream_options"},
    {"{\"prompt\":\"p\",\"response_format\":{\"type\":\"json_object\"}}", "response_format"},
    {"{\"prompt\":\"p\",\"response_format\":{\"type\":\"json_schema\",\"json_schema\":{}}}", "response_format"},
    {"{\"prompt\":\"p\",\"guided_regex\":\"a+\"}", "guided_regex"},
    {"{\"prompt\":\"p\",\"presence_penalty\":3}", "presence_penalty"},
    {"{\"prompt\":\"p\",\"repetition_penalty\":0}", "repetition_penalty"},
    {"{\"prompt\":\"p\",\"beam_width\":3,\"n\":5}", "beam_width"},
    {"{\"prompt\":\"p\",\"seed\":1.5}", "seed"},
    {"{\"prompt\":\"p\",\"timeout\":-1}", "timeout"},
    {"{\"prompt\":\"p\",\"echo\":1}", "echo"},
    {"{\"prompt\":\"p\",\"model\":7}", "model"},
};

/* Each is refused with 400, OpenAI's shape, and the name of the field; the engine hears nothing. */
static void bad_fields(void **state)
{
    (void)state;
    fake_reset("abc");
    for (size_t i = 0; i < sizeof refused_fields / sizeof *refused_fields; i++) {
        json_t *a = post("/v1/completions", refused_fields[i].body, 400);
        if (strcmp(text_at(a, "error.param"), refused_fields[i].param)) fprintf(stderr, "%s -> %s\n", refused_fields[i].body, text_at(a, "error.message"));
        assert_string_equal(text_at(a, "error.param"), refused_fields[i].param);
        assert_string_equal(text_at(a, "error.type"), "invalid_request_error");
        assert_true(json_object_get(at(a, "error"), "code") != NULL);
        json_decref(a);
    }
    static const char *const broken[] = {"", "{", "[]", "7", "nul", "{\"prompt\":\"\xff\"}", "{\"prompt\":\"\\ud800\"}",
                                         "{\"prompt\":\"p\"} x", "{\"prompt\":\"p\",\"prompt\":\"q\"}"};
    for (size_t i = 0; i < sizeof broken / sizeof *broken; i++) json_decref(post("/v1/completions", broken[i], 400));
    assert_int_equal(fake.n_submitted, 0);
    json_t *a = post("/v1/completions", "{\"prompt\":\"p\",\"model\":\"gpt-9\"}", 404);
    assert_string_equal(text_at(a, "error.code"), "model_not_found");
    json_decref(a);
}

static void too_long(void **state)
{
    (void)state;
    struct buf body;
    fake_reset("abc");
    buf_init(&body, 0);
    buf_add_string(&body, "{\"prompt\":\"");
    for (int i = 0; i < 3000; i++) buf_add_char(&body, 'a');
    buf_add_string(&body, "\"}");
    json_t *a = post("/v1/completions", buf_string(&body), 400);
    assert_string_equal(text_at(a, "error.code"), "context_length_exceeded");
    assert_non_null(strstr(text_at(a, "error.message"), "2048"));
    assert_non_null(strstr(text_at(a, "error.message"), "3000"));
    json_decref(a);
    a = post("/v1/completions", "{\"prompt\":\"abc\",\"max_tokens\":2046}", 400);
    assert_non_null(strstr(text_at(a, "error.message"), "2049"));
    json_decref(a);
    buf_fini(&body);
}

static void engine_errors(void **state)
{
    (void)state;
    static const struct {
        enum err e;
        int status;
    } cases[] = {{ERR_FULL, 429}, {ERR_NOT_READY, 503}, {ERR_TOO_LONG, 400}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct answer a;
        char value[16];
        fake_reset("abc");
        fake.refuse = cases[i].e;
        call_with("POST", "/v1/completions", NULL, "{\"prompt\":[\"p\",\"q\"],\"stream\":true}", &a);
        assert_int_equal(a.status, cases[i].status);
        if (a.status != 400) assert_non_null(answer_header(&a, "retry-after", value, sizeof value));
        if (a.status == 429) assert_string_equal(value, "17"); /* as the engine says */
        answer_fini(&a);
    }
    fake_reset("abc");
    fake.fail = ERR_DEADLINE;
    json_decref(post("/v1/completions", "{\"prompt\":\"p\"}", 504));
    json_decref(post("/v1/completions", "{\"prompt\":\"p\",\"stream\":true}", 504)); /* nothing was sent yet */
    fake_reset("abc");
    assert_true(engine_idle(1000));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(whole_answer),
        cmocka_unit_test(length_and_default_length),
        cmocka_unit_test(stop_strings),
        cmocka_unit_test(streaming),
        cmocka_unit_test(many_prompts_and_choices),
        cmocka_unit_test(logprobs),
        cmocka_unit_test(parameters_reach_the_engine),
        cmocka_unit_test(bad_fields),
        cmocka_unit_test(too_long),
        cmocka_unit_test(engine_errors),
    };
    return cmocka_run_group_tests(tests, begin, end);
}
