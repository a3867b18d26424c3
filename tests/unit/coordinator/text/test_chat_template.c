/* Goal: templates render as Jinja2 renders them with transformers' settings.
 * Method: real models' templates and upstream projects' cases, against what Jinja2 itself gave;
 * where Jinja2 raised, so must we. */
#include "base/mem.h"
#include "coordinator/text/chat_template.h"
#include "coordinator/text/template_ast.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

/* The moment at which the conformance data was made: 2025-07-10 12:00:00 UTC. */
#define NOW 1752148800

static const char *conformance;
static const struct template_syntax HUGGING_FACE = {.trim_blocks = true, .lstrip_blocks = true};

static void read_text(const char *name, struct buf *out)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/chat_templates/%s", conformance, name);
    assert_int_equal(buf_read_file(out, path, 0), OK);
}

/* One case has a NUL in an object's key, which the JSON reader refuses: another control character
 * tests the same. */
static json_t *load(const char *name)
{
    struct buf text = {0};
    json_t *json = NULL;
    read_text(name, &text);
    for (char *at = text.data; (at = strstr(at, "u0000")); at += 5)
        at[4] = '1';
    enum err e = json_parse(text.data, text.n, &json);
    if (e) print_error("%s: %s\n", name, err_detail());
    assert_int_equal(e, OK);
    buf_fini(&text);
    return json;
}

static enum err render(const char *source, size_t n, const struct template_syntax *syntax,
                       const json_t *context, struct buf *out)
{
    struct chat_template *t = NULL;
    struct chat_template_limits limits = {.now_unix_s = NOW};
    enum err e = chat_template_compile_syntax(source, n, syntax, &t);
    if (!e) e = chat_template_render(t, context, &limits, out);
    chat_template_destroy(t);
    return e;
}

struct score {
    int n, good, raised;
};

/* Compares with want, or expects an error when want is NULL. */
static void check(const char *what, const char *source, size_t n,
                  const struct template_syntax *syntax, const json_t *context, const json_t *want,
                  struct score *score)
{
    struct buf out = {0};
    enum err e = render(source, n, syntax, context, &out);
    bool good = want ? !e && out.n == json_string_length(want) &&
                           !memcmp(buf_string(&out), json_string_value(want), out.n)
                     : e != OK;
    score->n++;
    score->good += good;
    score->raised += !want;
    if (!good)
        print_error("%s:\n  template %.*s\n  want '%s'\n  got  '%s' %s\n", what,
                    n < 400 ? (int)n : 400, source, want ? json_string_value(want) : "(an error)",
                    buf_string(&out), e ? err_detail() : "");
    buf_fini(&out);
}

static void report(const char *what, const struct score *score, int least)
{
    print_message("%s: %d of %d, of which %d raise\n", what, score->good, score->n, score->raised);
    assert_true(score->n >= least);
    assert_int_equal(score->good, score->n);
}

static void test_goldens(void **state)
{
    (void)state;
    json_t *goldens = load("goldens.json"), *contexts = load("contexts/contexts.json");
    struct score score = {0};
    for (size_t i = 0; i < json_array_size(goldens); i++) {
        const json_t *golden = json_array_get(goldens, i);
        const char *name = json_string_value(json_object_get(golden, "template"));
        const char *context = json_string_value(json_object_get(golden, "context"));
        char what[256];
        struct buf source = {0};
        snprintf(what, sizeof what, "%s with %s", name, context);
        read_text(name, &source);
        check(what, buf_string(&source), source.n, &HUGGING_FACE,
              json_object_get(contexts, context), json_object_get(golden, "expected"), &score);
        buf_fini(&source);
    }
    report("goldens", &score, 150);
    json_decref(goldens);
    json_decref(contexts);
}

static bool flag(const json_t *item, const char *key)
{
    return json_is_true(json_object_get(item, key));
}

/* Cases of the form {template, context, expected, jinja2_agrees, jinja2_output, jinja2_error}. */
static void check_cases(const char *file, bool own_syntax, int least)
{
    json_t *cases = load(file);
    struct score score = {0};
    for (size_t i = 0; i < json_array_size(cases); i++) {
        const json_t *item = json_array_get(cases, i);
        const json_t *source = json_object_get(item, "template");
        const json_t *error = json_object_get(item, "jinja2_error");
        const json_t *want =
            json_object_get(item, flag(item, "jinja2_agrees") ? "expected" : "jinja2_output");
        struct template_syntax syntax = HUGGING_FACE;
        char what[256];
        const char *name = json_string_value(json_object_get(item, "name"));
        if (own_syntax)
            syntax =
                (struct template_syntax){flag(item, "trim_blocks"), flag(item, "lstrip_blocks"),
                                         flag(item, "keep_trailing_newline")};
        snprintf(what, sizeof what, "%s %zu %s", file, i, name ? name : "");
        /* What shows where Python put an object in memory cannot be repeated. */
        if (json_is_string(want) && strstr(json_string_value(want), " object do_items at 0x"))
            continue;
        if (json_is_string(error) || !json_is_string(want)) want = NULL;
        check(what, json_string_value(source), json_string_length(source), &syntax,
              json_object_get(item, "context"), want, &score);
    }
    report(file, &score, least);
    json_decref(cases);
}

static void test_hfjinja_unit(void **state)
{
    (void)state;
    check_cases("cases/hfjinja_unit.json", false, 79);
}

static void test_hfjinja_e2e(void **state)
{
    (void)state;
    check_cases("cases/hfjinja_e2e.json", false, 27);
}

static void test_minja(void **state)
{
    (void)state;
    check_cases("cases/minja_syntax.json", true, 84);
}

static void test_llamacpp(void **state)
{
    (void)state;
    json_t *cases = load("cases/llamacpp_chat_template.json");
    struct score score = {0};
    for (size_t i = 0; i < json_array_size(cases); i++) {
        const json_t *item = json_array_get(cases, i);
        const json_t *source = json_object_get(item, "template");
        const json_t *want = json_object_get(item, "expected_plain_jinja2");
        json_t *context = json_pack(
            "{s:O, s:O, s:O, s:O}", "messages", json_object_get(item, "messages"), "bos_token",
            json_object_get(item, "bos_token"), "eos_token", json_object_get(item, "eos_token"),
            "add_generation_prompt", json_object_get(item, "add_generation_prompt"));
        assert_non_null(context);
        check(json_string_value(json_object_get(item, "name")), json_string_value(source),
              json_string_length(source), &HUGGING_FACE, context,
              json_is_string(want) ? want : NULL, &score);
        json_decref(context);
    }
    report("llamacpp", &score, 17);
    json_decref(cases);
}

int main(void)
{
    conformance = getenv("HEDDLE_CONFORMANCE");
    char probe[4096];
    snprintf(probe, sizeof probe, "%s/chat_templates/goldens.json", conformance ? conformance : "");
    FILE *f = fopen(probe, "rb");
    if (!f) {
        printf("skipped: no conformance data at %s\n", probe);
        return 77;
    }
    fclose(f);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_goldens),      cmocka_unit_test(test_llamacpp),
        cmocka_unit_test(test_hfjinja_unit), cmocka_unit_test(test_hfjinja_e2e),
        cmocka_unit_test(test_minja),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
