/* Goal: a tokenizer built without a tree of its vocabulary and merges is the one built with it,
 * and nothing is accepted that the tree's parser refuses.
 * Method: every tokenizer.json of the conformance data in both ways, compared table by table; small
 * files with everything that JSON allows and much that it does not. */
#include "coordinator/text/tokenizer_same.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <cmocka.h>

static struct tokenizer *build_whole(struct span text)
{
    struct tokenizer_files f = {0};
    struct tokenizer *t = NULL;
    if (!json_parse(text.data, text.n, &f.json)) (void)tokenizer_build(&f, &t);
    json_decref(f.json);
    return t;
}

static struct tokenizer *build_cut(struct span text)
{
    struct tokenizer_files f = {0};
    struct tokenizer *t = NULL;
    (void)tokenizer_build_cut(&f, text, &t);
    return t;
}

static void test_real(void **state)
{
    static const char *const names[] = {"tokenizers/hf/llama3-composed", "tokenizers/hf/phi-2",
                                        "tokenizers/hf/phi-3-mini",
                                        "tokenizers/hf/bert-base-uncased", "model/stories260K/hf"};
    const char *conformance = *state;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        char path[4096];
        struct buf text = {0};
        snprintf(path, sizeof path, "%s/%s/tokenizer.json", conformance, names[i]);
        assert_int_equal(buf_read_file(&text, path, 0), OK);
        struct span s = {buf_string(&text), text.n};
        struct tokenizer *cut = build_cut(s), *whole = build_whole(s);
        if (!cut) print_error("%s: %s\n", names[i], err_detail());
        assert_non_null(cut); /* the short way is taken, or this test says nothing */
        assert_non_null(whole);
        assert_true(same_tokenizer(cut, whole));
        tokenizer_close(cut);
        tokenizer_close(whole);
        buf_fini(&text);
    }
}

#define HEAD "{\"decoder\":{\"type\":\"ByteLevel\"},\"model\":{\"type\":\"BPE\","

enum way { BOTH, WHOLE_ONLY, NEITHER };

static const struct {
    const char *json;
    enum way way;
} cases[] = {
    {HEAD "\"vocab\":{\"a\":0,\"b\":1,\"ab\":2},\"merges\":[\"a b\"]}}", BOTH},
    {HEAD "\"merges\":[[\"a\",\"b\"]],\"vocab\":{\"a\":0,\"b\":1,\"ab\":2}}}", BOTH},
    {HEAD " \"vocab\" : { \"a\" : 0 ,\n\"b\":1,\t\"ab\":2\r},\"merges\" : [ \"a b\" ] } }", BOTH},
    {HEAD "\"vocab\":{},\"merges\":[]}}", BOTH},
    {HEAD "\"vocab\":{\"\\u0041\":0,\"\\\\\":1,\"A\\\\\":2},\"merges\":[\"A \\\\\"]}}", BOTH},
    {HEAD "\"vocab\":{\"\\ud83d\\ude00\":0,\"\\\"\\n\\/\":1},\"merges\":[]}}", BOTH},
    {HEAD "\"vocab\":{\"a\":0,\"b\":1,\"ab\":2,\"aba\":3,\"abab\":4},"
          "\"merges\":[\"ab a\",\"a b\",\"ab ab\",\"a b\"]}}",
     BOTH},
    {HEAD "\"continuing_subword_prefix\":\"##\",\"vocab\":{\"a\":0,\"##b\":1,\"ab\":2},"
          "\"merges\":[\"a ##b\"]}}",
     BOTH},
    {"{\"x\":[{\"model\":{\"vocab\":7}},\"}\\\"{\"],"
     "\"model\":{\"type\":\"WordLevel\","
     "\"vocab\":{\"a\":0}}}",
     BOTH},
    /* unusual and right */
    {HEAD "\"vocab\":{\"a\":0,\"b\":1,\"ab\":2},\"merges\":[\"a b\",[\"a\",\"b\"]]}}", BOTH},
    {HEAD "\"vocab\":{\"a\":0,\"b\":1,\"ab\":2},\"merges\":[[\"a\",\"b\"],\"a b\"]}}", WHOLE_ONLY},
    {"{\"mod\\u0065l\":{\"type\":\"WordLevel\",\"vocab\":{\"a\":0}}}", WHOLE_ONLY},
    {"{\"model\":{\"type\":\"Unigram\",\"vocab\":[[\"a\",0],[\"b\",-1.5]]}}", WHOLE_ONLY},
    {"{\"model\":{\"type\":\"WordLevel\",\"vocab\":{\"a\":0},\"merges\":[]}}", WHOLE_ONLY},
    /* wrong */
    {"{\"model\":{\"type\":\"WordLevel\",\"vocab\":{\"a\":0},\"merges\":[\"\\U\"]}}", NEITHER},
    {HEAD "\"vocab\":{\"a\":0,\"a\":1},\"merges\":[]}}", NEITHER},
    {HEAD "\"vocab\":{\"a\":0,\"\\u0061\":1},\"merges\":[]}}", NEITHER},
    {HEAD "\"vocab\":{\"a\":0},\"vocab\":{\"a\":0},\"merges\":[]}}", NEITHER},
    {HEAD "\"vocab\":{\"a\":0},\"merges\":[],\"m\\u0065rges\":[]}}", NEITHER},
    {HEAD "\"vocab\":{\"a\":0},\"merges\":[]},\"model\":{}}", NEITHER},
    {HEAD "\"vocab\":{\"a\":0,},\"merges\":[]}}", NEITHER},
    {HEAD "\"vocab\":{\"a\" 0},\"merges\":[]}}", NEITHER},
    {HEAD "\"vocab\":{\"a\":01},\"merges\":[]}}", NEITHER},
    {HEAD "\"vocab\":{\"a\":1.0},\"merges\":[]}}", NEITHER},
    {HEAD "\"vocab\":{\"a\":-1},\"merges\":[]}}", NEITHER},
    {HEAD "\"vocab\":{\"a\":\"0\"},\"merges\":[]}}", NEITHER},
    {HEAD "\"vocab\":{\"a\":99999999999},\"merges\":[]}}", NEITHER},
    {HEAD "\"vocab\":{\"a\":4194304},\"merges\":[]}}", NEITHER},
    {HEAD "\"vocab\":{\"a\":0,\"b\":0},\"merges\":[]}}", NEITHER},
    {HEAD "\"vocab\":{\"a\":0]},\"merges\":[]}}", NEITHER},
    {HEAD "\"vocab\":{\"a\":0}},\"merges\":[]}}", NEITHER},
    {HEAD "\"vocab\":{\"\\x\":0},\"merges\":[]}}", NEITHER},
    {HEAD "\"vocab\":{\"\\u00g0\":0},\"merges\":[]}}", NEITHER},
    {HEAD "\"vocab\":{\"\\ud83d\":0},\"merges\":[]}}", NEITHER},
    {HEAD "\"vocab\":{\"\\ude00\":0},\"merges\":[]}}", NEITHER},
    {HEAD "\"vocab\":{\"\\ud83d\\u0041\":0},\"merges\":[]}}", NEITHER},
    {HEAD "\"vocab\":{\"\\u0000\":0},\"merges\":[]}}", NEITHER},
    {HEAD "\"vocab\":{\"a\nb\":0},\"merges\":[]}}", NEITHER},
    {HEAD "\"vocab\":{\"\xff\":0},\"merges\":[]}}", NEITHER},
    {HEAD "\"vocab\":{\"\xed\xa0\x80\":0},\"merges\":[]}}", NEITHER},
    {HEAD "\"vocab\":{\"\\n\xc0\xaf\":0},\"merges\":[]}}", NEITHER},
    {HEAD "\"vocab\":{\"a\":0},\"merges\":[\"a\"]}}", NEITHER},
    {HEAD "\"vocab\":{\"a\":0,\"aa\":1},\"merges\":[\"a  a\"]}}", NEITHER},
    {HEAD "\"vocab\":{\"a\":0,\"aa\":1},\"merges\":[\"a a \"]}}", NEITHER},
    {HEAD "\"vocab\":{\"a\":0,\"aa\":1},\"merges\":[[\"a\",\"a\",\"a\"]]}}", NEITHER},
    {HEAD "\"vocab\":{\"a\":0,\"aa\":1},\"merges\":[[\"a\",0]]}}", NEITHER},
    {HEAD "\"vocab\":{\"a\":0,\"aa\":1},\"merges\":[7]}}", NEITHER},
    {HEAD "\"vocab\":{\"a\":0,\"aa\":1},\"merges\":[\"a a\",]}}", NEITHER},
    {HEAD "\"vocab\":{\"a\":0},\"merges\":[\"a b\"]}}", NEITHER},
    {HEAD "\"vocab\":{\"a\":0},\"merges\":{}}}", NEITHER},
    {HEAD "\"vocab\":{\"a\":0},\"merges\":[]}} x", NEITHER},
    {HEAD "\"vocab\":{\"a\":0},\"merges\":[]}", NEITHER},
    {HEAD "\"vocab\":{\"a", NEITHER},
};

static void test_cases(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct span text = span_of(cases[i].json);
        struct tokenizer *cut = build_cut(text), *whole = build_whole(text), *open = NULL;
        enum way way = cut ? BOTH : whole ? WHOLE_ONLY : NEITHER;
        if (way != cases[i].way) print_error("%s: %d\n", cases[i].json, (int)way);
        assert_int_equal(way, cases[i].way);
        assert_true(whole || !cut);
        if (cut) assert_true(same_tokenizer(cut, whole));
        assert_int_equal(!tokenizer_open_memory(text, NULL, &open), whole != NULL);
        tokenizer_close(cut);
        tokenizer_close(whole);
        tokenizer_close(open);
    }
}

/* What is wrong is said in the words, and at the place, of the parser of the whole document. */
static void test_words(void **state)
{
    (void)state;
    static const char *const wrong[][2] = {
        {HEAD "\n\"vocab\":{\"a\":0,\"a\":1},\"merges\":[]}}", "line 2"},
        {HEAD "\n\n\"vocab\":{\"\xff\":1},\"merges\":[]}}", "line 3"},
        {HEAD "\"vocab\":{\"a\":\"x\"},\"merges\":[]}}", "piece 'a' is no integer"},
        {HEAD "\"vocab\":{\"a\":0,\"aa\":1},\"merges\":[\"a a\",\"a  a\"]}}",
         "merge 1 has more than one space"},
        {HEAD "\"vocab\":{\"a\":0,\"aa\":1},\"merges\":[\"a b\",7]}}", "merge 0 ('a' and 'b')"},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        struct tokenizer *t = NULL;
        assert_int_not_equal(tokenizer_open_memory(span_of(wrong[i][0]), NULL, &t), OK);
        if (!strstr(err_detail(), wrong[i][1])) print_error("got %s\n", err_detail());
        assert_non_null(strstr(err_detail(), wrong[i][1]));
    }
}

int main(void)
{
    char *conformance = getenv("HEDDLE_CONFORMANCE");
    char probe[4096];
    snprintf(probe, sizeof probe, "%s/tokenizers/texts_S.json", conformance ? conformance : "");
    FILE *f = fopen(probe, "rb");
    if (!f) {
        printf("skipped: no conformance data at %s\n", probe);
        return 77;
    }
    fclose(f);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_prestate(test_real, conformance),
        cmocka_unit_test(test_cases),
        cmocka_unit_test(test_words),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
