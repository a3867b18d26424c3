/* OpenAI's own documents against the server: every documented example request of our routes is
 * answered, every property of the request schemas is accepted or refused by its name, and every
 * answer, whole or streamed, fits the schema of the answer.
 *
 * Method: a small validator of the JSON Schema that the OpenAPI file uses, over a fake engine. */
#include "front_fixture.h"

#include <stdlib.h>

static json_t *api, *examples;

static int begin(void **state)
{
    (void)state;
    fixture_begin();
    struct front_config c = fixture_config();
    c.names[2] = "VAR_chat_model_id";
    c.names[3] = "VAR_completion_model_id";
    c.n_names = 4;
    fixture_open(&c);
    return 0;
}
static int end(void **state)
{
    (void)state;
    json_decref(api);
    json_decref(examples);
    fixture_end();
    return 0;
}

/* --- the validator --- */

static const json_t *schema_named(const char *name)
{
    const json_t *s = json_object_get(at(api, "components.schemas"), name);
    if (!s) fprintf(stderr, "no schema %s\n", name);
    assert_non_null(s);
    return s;
}

static const json_t *resolve(const json_t *schema)
{
    const char *ref;
    while ((ref = json_string_value(json_object_get(schema, "$ref"))))
        schema = schema_named(strrchr(ref, '/') + 1);
    return schema;
}

static bool fits_type(const json_t *v, const char *type)
{
    if (!strcmp(type, "object")) return json_is_object(v);
    if (!strcmp(type, "array")) return json_is_array(v);
    if (!strcmp(type, "string")) return json_is_string(v);
    if (!strcmp(type, "boolean")) return json_is_boolean(v);
    if (!strcmp(type, "integer")) return json_is_integer(v);
    if (!strcmp(type, "number")) return json_is_number(v);
    return !strcmp(type, "null") && json_is_null(v);
}

static char complaint[512];
static bool complain(const char *where, const char *what)
{
    snprintf(complaint, sizeof complaint, "%.200s: %.200s", where, what);
    return false;
}

static bool fits(const json_t *v, const json_t *schema, const char *where);

static bool fits_object(const json_t *v, const json_t *schema, const char *where)
{
    const json_t *required = json_object_get(schema, "required"), *value;
    const json_t *properties = json_object_get(schema, "properties");
    const json_t *others = json_object_get(schema, "additionalProperties");
    for (size_t i = 0; i < json_array_size(required); i++) {
        const char *name = json_string_value(json_array_get(required, i));
        if (!json_object_get(v, name)) return complain(where, name);
    }
    const char *key;
    json_object_foreach((json_t *)(uintptr_t)v, key, value) {
        char inner[256];
        const json_t *s = json_object_get(properties, key);
        if (!s && json_is_object(others)) s = others;
        snprintf(inner, sizeof inner, "%.180s.%s", where, key);
        if (s && !fits(value, s, inner)) return false;
    }
    return true;
}

static bool fits_any(const json_t *v, const json_t *list, const char *where)
{
    for (size_t i = 0; i < json_array_size(list); i++)
        if (fits(v, json_array_get(list, i), where)) return true;
    return false;
}

static bool fits(const json_t *v, const json_t *schema, const char *where)
{
    bool nullable = json_is_true(json_object_get(schema, "nullable")); /* may stand beside a $ref */
    schema = resolve(schema);
    if (json_is_null(v) && nullable) return true;
    if (json_is_null(v) && json_is_true(json_object_get(schema, "nullable"))) return true;
    const json_t *all = json_object_get(schema, "allOf"), *any = json_object_get(schema, "anyOf");
    const json_t *one = json_object_get(schema, "oneOf"), *values = json_object_get(schema, "enum");
    const char *type = json_string_value(json_object_get(schema, "type"));
    for (size_t i = 0; i < json_array_size(all); i++)
        if (!fits(v, json_array_get(all, i), where)) return false;
    if (any && !fits_any(v, any, where)) return false;
    if (one && !fits_any(v, one, where)) return false;
    if (type && !fits_type(v, type)) return complain(where, type);
    bool listed = !values;
    for (size_t i = 0; i < json_array_size(values); i++) listed |= json_equal(v, json_array_get(values, i));
    if (!listed) return complain(where, "not in the enum");
    const json_t *items = json_object_get(schema, "items");
    for (size_t i = 0; items && i < json_array_size(v); i++)
        if (!fits(json_array_get(v, i), items, where)) return false;
    return !json_is_object(v) || fits_object(v, schema, where);
}

static void assert_fits(const json_t *v, const char *name)
{
    if (fits(v, schema_named(name), name)) return;
    char *text = json_dumps(v, JSON_INDENT(1));
    fprintf(stderr, "%s\n%s\n", complaint, text);
    free(text);
    fail();
}

/* --- the tests --- */

static void chunk_fits(void *ctx, const char *line, size_t n)
{
    json_t *v = NULL;
    if (n == 6 && !memcmp(line, "[DONE]", 6)) return;
    assert_int_equal(json_parse(line, n, &v), OK);
    /* A streamed completion has the shape of a whole one, but for what is null until the end. */
    json_t *choice;
    size_t i;
    if (!strcmp(ctx, "CreateCompletionResponse")) {
        json_array_foreach(json_object_get(v, "choices"), i, choice)
            if (json_is_null(json_object_get(choice, "finish_reason")))
                json_object_set_new(choice, "finish_reason", json_string("stop"));
        if (json_is_null(json_object_get(v, "usage"))) json_object_del(v, "usage");
    }
    assert_fits(v, ctx);
    json_decref(v);
}

static char completion_response[] = "CreateCompletionResponse", chat_chunk[] = "CreateChatCompletionStreamResponse";

/* The first token of an echoed prompt has no logprob; clients know null there, the schema does not. */
static void fill_first_logprob(json_t *v)
{
    json_t *choice;
    size_t i;
    json_array_foreach(json_object_get(v, "choices"), i, choice) {
        json_t *logprobs = json_object_get(choice, "logprobs");
        json_t *values = json_object_get(logprobs, "token_logprobs"), *tops = json_object_get(logprobs, "top_logprobs");
        if (json_is_null(json_array_get(values, 0))) json_array_set_new(values, 0, json_real(0));
        if (json_is_null(json_array_get(tops, 0))) json_array_set_new(tops, 0, json_object());
    }
}

/* POSTs a body and validates the answer; returns the status. */
static int post_and_fit(bool chat, const char *body)
{
    struct answer a;
    call_with("POST", chat ? "/v1/chat/completions" : "/v1/completions", NULL, body, &a);
    if (a.status == 200 && !strncmp(buf_string(&a.body), "data: ", 6)) {
        assert_true(events(&a.body, chunk_fits, chat ? chat_chunk : completion_response) > 1);
    } else {
        json_t *v = NULL;
        assert_int_equal(json_parse(a.body.data, a.body.n, &v), OK);
        fill_first_logprob(v);
        if (a.status == 200) assert_fits(v, chat ? "CreateChatCompletionResponse" : completion_response);
        else {
            assert_fits(at(v, "error"), "Error");
            fprintf(stderr, "    %s\n", text_at(v, "error.message"));
        }
        json_decref(v);
    }
    int status = a.status;
    answer_fini(&a);
    return status;
}

/* The JSON between -d ' and the closing quote of a documented curl command. */
static void documented_examples(void **state)
{
    (void)state;
    int n = 0;
    for (size_t i = 0; i < json_array_size(examples); i++) {
        const json_t *e = json_array_get(examples, i);
        const char *path = json_string_value(json_object_get(e, "path"));
        const char *curl = json_string_value(at(e, "request.curl"));
        const char *begin_at = curl ? strstr(curl, "-d '") : NULL;
        bool chat = !strcmp(path, "/chat/completions");
        if (!begin_at || (!chat && strcmp(path, "/completions"))) continue;
        char body[4096];
        snprintf(body, sizeof body, "%.*s", (int)strcspn(begin_at + 4, "'"), begin_at + 4);
        fake_reset("Hello \xf0\x9f\x98\x80!");
        assert_int_equal(post_and_fit(chat, body), 200);
        n++;
    }
    assert_int_equal(n, 4);
}

static void answers_of_many_shapes(void **state)
{
    (void)state;
    static const char *const completions[] = {
        "{\"prompt\":\"a\",\"logprobs\":3,\"echo\":true,\"n\":2}",
        "{\"prompt\":\"a\",\"logprobs\":0,\"stream\":true,\"stream_options\":{\"include_usage\":true}}",
        "{\"prompt\":[\"a\",\"b\"],\"stop\":\"l\",\"max_tokens\":4}",
        "{\"prompt\":\"a\",\"max_tokens\":0,\"echo\":true}",
        "{\"prompt\":\"a\",\"stream\":true,\"n\":3,\"stream_options\":{\"continuous_usage_stats\":true}}"};
    static const char *const chats[] = {
        "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"n\":2}",
        "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"stream\":true,\"logprobs\":true,\"top_logprobs\":2}",
        "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"stream\":true,\"stream_options\":{\"include_usage\":true}}",
        "{\"messages\":[{\"role\":\"user\",\"content\":\"x\"}],\"stop\":[\"lo\"],\"logprobs\":true,\"top_logprobs\":20}"};
    fake_reset("Hello \xc3\xa9!");
    for (size_t i = 0; i < sizeof completions / sizeof *completions; i++)
        assert_int_equal(post_and_fit(false, completions[i]), 200);
    for (size_t i = 0; i < sizeof chats / sizeof *chats; i++) assert_int_equal(post_and_fit(true, chats[i]), 200);
    struct answer a;
    json_t *v = NULL;
    call_with("GET", "/v1/models", NULL, NULL, &a);
    assert_int_equal(json_parse(a.body.data, a.body.n, &v), OK);
    assert_fits(v, "ListModelsResponse");
    json_decref(v);
    answer_fini(&a);
}

/* A value that the schema admits: its first word, number or part. */
static json_t *sample(const json_t *schema, int depth)
{
    schema = resolve(schema);
    const json_t *values = json_object_get(schema, "enum"), *v;
    static const char *const unions[] = {"anyOf", "oneOf", "allOf"};
    if ((v = json_object_get(schema, "example")) && !json_is_null(v)) return json_deep_copy(v);
    if (json_array_size(values)) return json_deep_copy(json_array_get(values, 0));
    for (int i = 0; i < 3; i++)
        if ((v = json_array_get(json_object_get(schema, unions[i]), 0))) return sample(v, depth + 1);
    const char *type = json_string_value(json_object_get(schema, "type"));
    if (!type || depth > 8) return json_object();
    if (!strcmp(type, "boolean")) return json_true();
    if (!strcmp(type, "string")) return json_string("a");
    if (!strcmp(type, "integer") || !strcmp(type, "number")) {
        json_int_t least = json_integer_value(json_object_get(schema, "minimum"));
        return json_integer(least > -1000 ? (least > 1 ? least : 1) : 1);
    }
    if (!strcmp(type, "array")) {
        json_t *list = json_array();
        json_array_append_new(list, sample(json_object_get(schema, "items"), depth + 1));
        return list;
    }
    json_t *object = json_object();
    const json_t *required = json_object_get(schema, "required");
    for (size_t i = 0; i < json_array_size(required); i++) {
        const char *name = json_string_value(json_array_get(required, i));
        const json_t *s = json_object_get(json_object_get(schema, "properties"), name);
        if (s) json_object_set_new(object, name, sample(s, depth + 1));
    }
    return object;
}

static void try_property(bool chat, const char *name, const json_t *schema)
{
    json_t *body = json_object();
    if (chat) json_object_set_new(body, "messages", json_pack("[{ssss}]", "role", "user", "content", "x"));
    else json_object_set_new(body, "prompt", json_string("x"));
    if (strcmp(name, "model") && strcmp(name, "messages") && strcmp(name, "prompt"))
        json_object_set_new(body, name, sample(schema, 0));
    if (!strcmp(name, "top_logprobs")) json_object_set_new(body, "logprobs", json_true());
    if (!strcmp(name, "stream_options")) json_object_set_new(body, "stream", json_true());
    char *text = json_dumps(body, 0);
    struct answer a;
    json_t *v = NULL;
    fake_reset("abc");
    call_with("POST", chat ? "/v1/chat/completions" : "/v1/completions", NULL, text, &a);
    if (a.status != 200) {
        assert_int_equal(json_parse(a.body.data, a.body.n, &v), OK);
        if (a.status != 400 || !strstr(text_at(v, "error.message"), name))
            fprintf(stderr, "%s -> %d %s\n", text, a.status, text_at(v, "error.message"));
        assert_int_equal(a.status, 400);
        assert_non_null(strstr(text_at(v, "error.message"), name));
        json_decref(v);
    }
    answer_fini(&a);
    free(text);
    json_decref(body);
}

static int try_properties(bool chat, const json_t *schema)
{
    int n = 0;
    schema = resolve(schema);
    const json_t *all = json_object_get(schema, "allOf"), *value;
    for (size_t i = 0; i < json_array_size(all); i++) n += try_properties(chat, json_array_get(all, i));
    const char *key;
    json_object_foreach(json_object_get(schema, "properties"), key, value) {
        try_property(chat, key, value);
        n++;
    }
    return n;
}

static void every_property_is_known(void **state)
{
    (void)state;
    assert_true(try_properties(false, schema_named("CreateCompletionRequest")) >= 18);
    assert_true(try_properties(true, schema_named("CreateChatCompletionRequest")) >= 35);
}

/* The schema's bounds of a seed are doubles beyond 64 bits; jansson refuses them. */
static void read_api(const char *path)
{
    struct buf text;
    buf_init(&text, 0);
    if (!buf_read_file(&text, path, 1 << 24)) {
        for (char *p = text.data; (p = strstr(p, "9223372036854776000"));) memcpy(p, "9223372036854775000", 19);
        if (json_parse(text.data, text.n, &api)) fprintf(stderr, "%s\n", err_detail());
    }
    buf_fini(&text);
}

int main(void)
{
    char path[4096];
    const char *folder = getenv("HEDDLE_CONFORMANCE");
    snprintf(path, sizeof path, "%s/openai_api/openapi_subset.json", folder ? folder : "");
    if (access(path, R_OK)) {
        printf("no %s: skipped\n", path);
        return 77;
    }
    read_api(path);
    snprintf(path, sizeof path, "%s/openai_api/examples.json", folder);
    if (!api || json_parse_file(path, 1 << 24, &examples)) return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(documented_examples),
        cmocka_unit_test(answers_of_many_shapes),
        cmocka_unit_test(every_property_is_known),
    };
    return cmocka_run_group_tests(tests, begin, end);
}
