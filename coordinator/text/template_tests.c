/* The tests of the template language: "is defined" and its kin, one row each. */
#include "coordinator/text/template_builtins.h"
#include "coordinator/text/template_render.h"
#include "coordinator/text/unicode.h"

#include <stdio.h>
#include <string.h>

#define TEST(name, condition)                                                                      \
    static enum err test_##name(struct render *r, struct value v, const struct args *args,         \
                                bool *out)                                                         \
    {                                                                                              \
        (void)r;                                                                                   \
        (void)v;                                                                                   \
        (void)args;                                                                                \
        *out = (condition);                                                                        \
        return OK;                                                                                 \
    }

TEST(defined, v.kind != VALUE_UNDEFINED)
TEST(undefined, v.kind == VALUE_UNDEFINED)
TEST(none, v.kind == VALUE_NONE)
TEST(boolean, v.kind == VALUE_BOOL)
TEST(true, v.kind == VALUE_BOOL && v.boolean)
TEST(false, v.kind == VALUE_BOOL && !v.boolean)
TEST(integer, v.kind == VALUE_INT)
TEST(float, v.kind == VALUE_FLOAT)
TEST(number, value_is_number(v))
TEST(string, v.kind == VALUE_STRING)
TEST(mapping, v.kind == VALUE_DICT)
TEST(iterable, v.kind == VALUE_STRING || v.kind == VALUE_LIST || v.kind == VALUE_DICT ||
                   v.kind == VALUE_UNDEFINED || v.kind == VALUE_LOOP)
TEST(sequence,
     v.kind == VALUE_STRING || v.kind == VALUE_DICT || v.kind == VALUE_UNDEFINED ||
         (v.kind == VALUE_LIST && v.list->kind != LIST_GENERATOR && v.list->kind != LIST_VIEW))
TEST(callable, v.kind == VALUE_FUNCTION || v.kind == VALUE_MACRO || v.kind == VALUE_JOINER)
TEST(escaped, false)

static enum err test_case(struct render *r, struct value v, bool upper, bool *out)
{
    struct span s;
    bool seen = false;
    TRY(value_to_string(r, v, &s));
    *out = true;
    for (size_t at = 0, len; at < s.n && *out; at += len) {
        uint32_t code;
        len = unicode_next(s.data + at, s.n - at, &code);
        bool is_upper = unicode_is_upper(code), is_lower = unicode_is_lower(code);
        if (upper ? is_lower : is_upper) *out = false;
        seen |= upper ? is_upper : is_lower;
    }
    *out &= seen;
    return OK;
}

static enum err test_lower(struct render *r, struct value v, const struct args *args, bool *out)
{
    (void)args;
    return test_case(r, v, false, out);
}

static enum err test_upper(struct render *r, struct value v, const struct args *args, bool *out)
{
    (void)args;
    return test_case(r, v, true, out);
}

static enum err modulo(struct render *r, struct value v, struct value by, int64_t *out)
{
    struct value rest;
    TRY(value_binary(r, BINARY_MODULO, v, by, &rest));
    *out = rest.kind == VALUE_INT ? rest.integer : rest.kind == VALUE_FLOAT && rest.number != 0;
    return OK;
}

static enum err test_even(struct render *r, struct value v, const struct args *args, bool *out)
{
    int64_t rest;
    (void)args;
    TRY(modulo(r, v, value_int(2), &rest));
    *out = rest == 0;
    return OK;
}

static enum err test_odd(struct render *r, struct value v, const struct args *args, bool *out)
{
    TRY(test_even(r, v, args, out));
    *out = !*out;
    return OK;
}

static enum err needs(const struct args *args, struct value *out)
{
    if (!args->n) FAIL(ERR_INVALID, "a test lacks its argument");
    *out = args->items[0];
    return OK;
}

static enum err test_divisible(struct render *r, struct value v, const struct args *args, bool *out)
{
    struct value by;
    int64_t rest;
    TRY(needs(args, &by));
    TRY(modulo(r, v, by, &rest));
    *out = rest == 0;
    return OK;
}

static enum err test_in(struct render *r, struct value v, const struct args *args, bool *out)
{
    struct value container;
    TRY(needs(args, &container));
    return value_contains(r, container, v, out);
}

static enum err test_sameas(struct render *r, struct value v, const struct args *args, bool *out)
{
    struct value other;
    (void)r;
    TRY(needs(args, &other));
    bool simple = v.kind != VALUE_LIST && v.kind != VALUE_DICT;
    *out = v.kind == other.kind && (simple ? value_equal(v, other) : v.list == other.list);
    return OK;
}

static enum err test_filter(struct render *r, struct value v, const struct args *args, bool *out)
{
    char name[64];
    (void)r;
    (void)args;
    snprintf(name, sizeof name, "%.*s",
             v.kind == VALUE_STRING && v.string.n < 63 ? (int)v.string.n : 0,
             v.kind == VALUE_STRING ? v.string.data : "");
    *out = builtin_filter(name) != NULL;
    return OK;
}

static enum err test_test(struct render *r, struct value v, const struct args *args, bool *out)
{
    char name[64];
    (void)r;
    (void)args;
    snprintf(name, sizeof name, "%.*s",
             v.kind == VALUE_STRING && v.string.n < 63 ? (int)v.string.n : 0,
             v.kind == VALUE_STRING ? v.string.data : "");
    *out = builtin_test(name) != NULL;
    return OK;
}

static enum err test_equal(struct render *r, struct value v, const struct args *args, bool *out)
{
    struct value other;
    (void)r;
    TRY(needs(args, &other));
    *out = value_equal(v, other);
    return OK;
}

static enum err test_not_equal(struct render *r, struct value v, const struct args *args, bool *out)
{
    TRY(test_equal(r, v, args, out));
    *out = !*out;
    return OK;
}

static enum err order_of(struct value v, const struct args *args, int *out)
{
    struct value other;
    TRY(needs(args, &other));
    if (v.kind == VALUE_UNDEFINED) return value_undefined_error(v);
    if (other.kind == VALUE_UNDEFINED) return value_undefined_error(other);
    return value_compare(v, other, out);
}

#define ORDER_TEST(name, condition)                                                                \
    static enum err test_##name(struct render *r, struct value v, const struct args *args,         \
                                bool *out)                                                         \
    {                                                                                              \
        int order;                                                                                 \
        (void)r;                                                                                   \
        TRY(order_of(v, args, &order));                                                            \
        *out = (condition);                                                                        \
        return OK;                                                                                 \
    }

ORDER_TEST(less, order < 0)
ORDER_TEST(less_equal, order <= 0)
ORDER_TEST(greater, order > 0)
ORDER_TEST(greater_equal, order >= 0)

static const struct test_row TESTS[] = {
    {"defined", test_defined},
    {"undefined", test_undefined},
    {"none", test_none},
    {"boolean", test_boolean},
    {"true", test_true},
    {"false", test_false},
    {"integer", test_integer},
    {"float", test_float},
    {"number", test_number},
    {"string", test_string},
    {"mapping", test_mapping},
    {"iterable", test_iterable},
    {"sequence", test_sequence},
    {"callable", test_callable},
    {"escaped", test_escaped},
    {"lower", test_lower},
    {"upper", test_upper},
    {"even", test_even},
    {"odd", test_odd},
    {"divisibleby", test_divisible},
    {"in", test_in},
    {"sameas", test_sameas},
    {"filter", test_filter},
    {"test", test_test},
    {"equalto", test_equal},
    {"eq", test_equal},
    {"==", test_equal},
    {"ne", test_not_equal},
    {"!=", test_not_equal},
    {"lt", test_less},
    {"lessthan", test_less},
    {"<", test_less},
    {"le", test_less_equal},
    {"<=", test_less_equal},
    {"gt", test_greater},
    {"greaterthan", test_greater},
    {">", test_greater},
    {"ge", test_greater_equal},
    {">=", test_greater_equal},
};

const struct test_row *builtin_test(const char *name)
{
    for (size_t i = 0; i < sizeof TESTS / sizeof *TESTS; i++)
        if (!strcmp(TESTS[i].name, name)) return &TESTS[i];
    return NULL;
}
