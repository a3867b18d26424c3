/* Goal: UTF-8 is strict, JSON reads and writes without loss, random numbers are those of the paper.
 * Method: every code point there and back, every malformed class, published vectors. */
#include "base/hash.h"
#include "base/json.h"
#include "base/rand.h"
#include "base/utf8.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
// clang-format off
#include <cmocka.h>
// clang-format on

static void every_code_point_there_and_back(void **state)
{
    (void)state;
    for (uint32_t code = 0; code <= 0x10ffff; code++) {
        char bytes[4];
        uint32_t back = 0;
        if (code >= 0xd800 && code <= 0xdfff) continue;
        size_t n = utf8_encode(code, bytes);
        if (utf8_decode(bytes, n, &back) != n || back != code) fail_msg("U+%04X", code);
        for (size_t part = 1; part < n; part++) {
            if (utf8_length(bytes, part)) fail_msg("U+%04X cut to %zu is taken", code, part);
            if (!utf8_is_partial(bytes, part)) fail_msg("U+%04X cut to %zu is no beginning", code, part);
        }
        if (utf8_is_partial(bytes, n)) fail_msg("U+%04X is whole", code);
    }
}

static void malformed_is_refused(void **state)
{
    (void)state;
    static const char *const bad[] = {"\x80", "\xbf", "\xc0\xaf", "\xc1\xbf", "\xe0\x80\xaf", "\xed\xa0\x80", "\xed\xbf\xbf",
                                      "\xf0\x80\x80\xaf", "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xfe", "\xff", "\xe2\x28\xa1"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(utf8_length(bad[i], strlen(bad[i])), 0);
        assert_int_equal(utf8_valid_prefix(bad[i], strlen(bad[i])), 0);
        assert_false(utf8_is_partial("\xed\xa0", 2));
    }
    assert_int_equal(utf8_valid_prefix("ab\xc3\xa9\xff", 5), 4);
}

static void json_strings_survive(void **state)
{
    (void)state;
    char all[128 + 8];
    for (int i = 0; i < 128; i++) all[i] = (char)(i ? i : 1);
    memcpy(all + 128, "\xc3\xa9\xf0\x9f\x98\x80", 7);
    struct buf b;
    buf_init(&b, 0);
    assert_int_equal(json_write_string(&b, all, 128 + 6), OK);
    json_t *back;
    assert_int_equal(json_parse(buf_string(&b), b.n, &back), OK);
    assert_int_equal(json_string_length(back), 134);
    assert_memory_equal(json_string_value(back), all, 134);
    json_decref(back);
    buf_clear(&b);
    json_write_string(&b, "a\xff\x62", 3);
    assert_string_equal(buf_string(&b), "\"a\xef\xbf\xbd\x62\"");
    buf_fini(&b);
}

static void json_refuses_and_says_where(void **state)
{
    (void)state;
    static const char *const bad[] = {"", "{", "{\"a\":1,}", "{\"a\":1,\"a\":2}", "[1] 2", "\"\xff\"", "{'a':1}", "[NaN]", "\"\\ud800\""};
    json_t *root;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(json_parse(bad[i], strlen(bad[i]), &root), ERR_INVALID);
        assert_non_null(strstr(err_detail(), "line"));
    }
}

static void json_getters_name_the_key(void **state)
{
    (void)state;
    static const char text[] = "{\"n\":1.5,\"big\":9007199254740993,\"s\":\"x\\u0000y\",\"b\":1,\"null\":null}";
    json_t *root;
    int64_t i = 7;
    bool b = false;
    const char *s = "kept";
    double d = 0;
    assert_int_equal(json_parse(text, sizeof text - 1, &root), OK);
    assert_int_equal(json_read_int(root, "n", 0, 10, &i), ERR_INVALID);
    assert_non_null(strstr(err_detail(), "'n'"));
    assert_int_equal(json_read_int(root, "big", 0, 10, &i), ERR_INVALID);
    assert_int_equal(json_read_int(root, "big", 0, INT64_MAX, &i), OK);
    assert_true(i == 9007199254740993);
    assert_int_equal(json_read_bool(root, "b", &b), ERR_INVALID);
    assert_int_equal(json_read_string(root, "s", &s), ERR_INVALID);
    assert_int_equal(json_read_string(root, "null", &s), OK);
    assert_int_equal(json_read_string(root, "absent", &s), OK);
    assert_string_equal(s, "kept");
    assert_int_equal(json_read_number(root, "n", 0, 1, &d), ERR_INVALID);
    json_decref(root);
}

/* The known answers of the paper's own library (Random123, kat_vectors, philox4x32-10). */
static void philox_known_answers(void **state)
{
    (void)state;
    uint32_t w[4];
    rand_philox(0, 0, 0, w);
    assert_int_equal(w[0], 0x6627e8d5);
    assert_int_equal(w[1], 0xe169c58d);
    assert_int_equal(w[2], 0xbc57ac4c);
    assert_int_equal(w[3], 0x9b00dbd8);
    rand_philox(UINT64_MAX, UINT64_MAX, UINT64_MAX, w);
    assert_int_equal(w[0], 0x408f276d);
    assert_int_equal(w[1], 0x41c83b0e);
    assert_int_equal(w[2], 0xa20bc7c6);
    assert_int_equal(w[3], 0x6d5451fd);
}

static void chained_keys_know_the_whole_prefix(void **state)
{
    (void)state;
    struct hash128 zero = {0, 0}, a = hash_chain(zero, "one", 3), b = hash_chain(a, "two", 3);
    struct hash128 c = hash_chain(hash_chain(zero, "onx", 3), "two", 3);
    assert_false(hash_equal(b, c));
    assert_true(hash_equal(b, hash_chain(a, "two", 3)));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_code_point_there_and_back), cmocka_unit_test(malformed_is_refused),
        cmocka_unit_test(json_strings_survive),            cmocka_unit_test(json_refuses_and_says_where),
        cmocka_unit_test(json_getters_name_the_key),       cmocka_unit_test(philox_known_answers),
        cmocka_unit_test(chained_keys_know_the_whole_prefix),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
