/* Goal: a hostile or broken template costs its budget and no more, and every refusal names the
 * construct and the line, or the limit.
 * Method: templates that try each way out, and every allocation made to fail in turn. */
#include "base/mem.h"
#include "coordinator/text/chat_template.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

static json_t *context;

static enum err render(const char *source, const struct chat_template_limits *limits,
                       struct buf *out)
{
    struct chat_template *t = NULL;
    enum err e = chat_template_compile(source, strlen(source), &t);
    if (!e) e = chat_template_render(t, context, limits, out);
    chat_template_destroy(t);
    return e;
}

/* The template must fail with e and words that hold want; the output stays untouched. */
static void check_refused(const char *source, const struct chat_template_limits *limits, enum err e,
                          const char *want)
{
    struct buf out = {0};
    buf_add_string(&out, "before");
    enum err got = render(source, limits, &out);
    if (got != e || !strstr(err_detail(), want))
        print_error("%s\n  want %s: %s\n  got %s: %s\n", source, err_name(e), want, err_name(got),
                    err_detail());
    assert_int_equal(got, e);
    assert_non_null(strstr(err_detail(), want));
    assert_string_equal(buf_string(&out), "before");
    buf_fini(&out);
}

static void test_budgets(void **state)
{
    (void)state;
    const struct chat_template_limits small = {.steps_max = 10000,
                                               .output_bytes_max = 1000,
                                               .memory_bytes_max = 16 << 20,
                                               .depth_max = 100};
    static const struct {
        const char *source, *want;
    } cases[] = {
        {"{% for i in range(999) %}{% for j in range(999) %}{% endfor %}{% endfor %}", "steps_max"},
        {"{% for i in range(999) %}xxxxxxxx{% endfor %}", "output_bytes_max"},
        {"{% set x %}{% for i in range(999) %}xxxxxxxx{% endfor %}{% endset %}",
         "output_bytes_max"},
        {"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "depth_max"},
        {"{{ 'abcdefghij' * 100000000 }}", "repetition"},
        {"{{ range(10000000) }}", "range too big"},
        {"{{ 'a'.center(99999999) }}", "width"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_refused(cases[i].source, &small, ERR_INVALID, cases[i].want);
    const struct chat_template_limits memory = {.memory_bytes_max = 1 << 20};
    check_refused("{% set ns = namespace(s='abcdefgh') %}{% for i in range(40) %}"
                  "{% set ns.s = ns.s + ns.s %}{% endfor %}",
                  &memory, ERR_INVALID, "memory_bytes_max");
}

/* Two lists of 2^40 leaves, made of forty pairs: comparing them must not take the time. */
static void test_shared_values(void **state)
{
    (void)state;
    check_refused("{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(40) %}"
                  "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}"
                  "{{ ns.a == ns.b }}{{ 1 }}",
                  NULL, ERR_INVALID, "steps_max");
}

static void test_refusals(void **state)
{
    (void)state;
    static const struct {
        const char *source;
        enum err e;
        const char *want;
    } cases[] = {
        {"a\n{% include 'x' %}", ERR_UNSUPPORTED, "line 2: the tag 'include' is not supported"},
        {"\n\n{{ x|xmlattr }}", ERR_UNSUPPORTED, "line 3: the filter 'xmlattr' is not supported"},
        {"{{ x is prime }}", ERR_UNSUPPORTED, "line 1: the test 'prime' is not supported"},
        {"{% if x %}\n", ERR_INVALID, "not closed by"},
        {"a\n{% endif %}", ERR_INVALID, "line 2: the tag 'endif' closes nothing"},
        {"{{ 'abc }}", ERR_INVALID, "line 1: a string is not closed"},
        {"{# abc", ERR_INVALID, "line 1: a comment is not closed"},
        {"{{ (1 }}", ERR_INVALID, "line 1"},
        {"\n{{ messages.nope.x }}", ERR_INVALID, "line 2: 'list object' has no attribute 'nope'"},
        {"{{ nope.x }}", ERR_INVALID, "line 1: 'nope' is undefined"},
        {"{{ 'a' + 1 }}", ERR_INVALID, "can only concatenate str (not \"int\") to str"},
        {"{{ 99999999999 * 99999999999 }}", ERR_INVALID, "64 bits"},
        {"{{ raise_exception('roles must alternate') }}", ERR_INVALID, "roles must alternate"},
        {"{{ [].append(1) }}", ERR_INVALID, "not safe"},
        {"{{ \xff }}", ERR_INVALID, "not UTF-8 at byte 3"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_refused(cases[i].source, NULL, cases[i].e, cases[i].want);
    check_refused("{{ raise_exception('only this') }}", NULL, ERR_INVALID, "only this");
    assert_string_equal(err_detail(), "only this");
}

/* Deep nesting is refused by the parser before it costs the stack. */
static void test_nesting(void **state)
{
    (void)state;
    static char source[200000];
    for (size_t i = 0; i < sizeof source - 1; i++)
        source[i] = '(';
    memcpy(source, "{{", 2);
    check_refused(source, NULL, ERR_INVALID, "nested");
    for (size_t i = 2; i < sizeof source - 1; i++)
        source[i] = '-';
    check_refused(source, NULL, ERR_INVALID, "nested");
    for (size_t i = 0; i + 10 < sizeof source; i += 10)
        memcpy(source + i, "{% if x %}", 10);
    check_refused(source, NULL, ERR_INVALID, "nested");
}

static const char EVERYTHING[] =
    "{% macro f(a, b=2) %}{{ a ~ b }}{{ caller() if caller is defined }}{% endmacro %}"
    "{% set ns = namespace(n=0) %}{% for m in messages if m.role %}{% set ns.n = ns.n + 1 %}"
    "{{ loop.index }}{{ m|tojson(indent=2) }}{{ m.content|replace('h', 'H')|upper }}{% endfor %}"
    "{% call f('x', b=[1, 'y\\n']) %}z{% endcall %}{% filter title %}q{{ ns.n }}{% endfilter %}"
    "{{ messages|map(attribute='role')|sort|join(', ') }}{{ '%s' % 3 }}";

static void test_out_of_memory(void **state)
{
    (void)state;
    struct buf good = {0};
    assert_int_equal(render(EVERYTHING, NULL, &good), OK);
    for (int64_t n = 1;; n++) {
        struct buf out = {0};
        int64_t live = mem_live();
        mem_fail_at(n);
        enum err e = render(EVERYTHING, NULL, &out);
        mem_fail_at(0);
        if (!e) assert_string_equal(buf_string(&out), buf_string(&good));
        buf_fini(&out);
        assert_int_equal(mem_live(), live);
        if (!e) break;
        assert_int_equal(e, ERR_NO_MEMORY);
        assert_true(n < 10000);
    }
    buf_fini(&good);
}

static void test_uses(void **state)
{
    (void)state;
    struct chat_template *t = NULL;
    const char *source = "{% if tools %}{{ enable_thinking|default(true) }}{% endif %}";
    assert_int_equal(chat_template_compile(source, strlen(source), &t), OK);
    assert_true(chat_template_uses(t, "tools"));
    assert_true(chat_template_uses(t, "enable_thinking"));
    assert_false(chat_template_uses(t, "documents"));
    chat_template_destroy(t);
}

int main(void)
{
    static const char text[] = "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"},"
                               "{\"role\": \"assistant\", \"content\": \"hello\"}], \"x\": 1}";
    if (json_parse(text, sizeof text - 1, &context)) return 1;
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_budgets),       cmocka_unit_test(test_shared_values),
        cmocka_unit_test(test_refusals),      cmocka_unit_test(test_nesting),
        cmocka_unit_test(test_out_of_memory), cmocka_unit_test(test_uses),
    };
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    json_decref(context);
    return failed;
}
