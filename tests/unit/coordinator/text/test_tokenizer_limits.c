/* Goal: a tokenizer's promises that need no downloaded model: streaming says nothing that may still
 * change, special tokens are text when a user types them, long words cost O(n log n), broken and
 * unknown files are refused by name, and running out of memory leaks nothing.
 * Method: small files written here. */
#include "base/clock.h"
#include "base/mem.h"
#include "coordinator/text/tokenizer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <cmocka.h>

static const char LLAMA[] =
    "{\"added_tokens\":[{\"id\":1,\"content\":\"<s>\",\"special\":true},"
    "{\"id\":2,\"content\":\"</s>\",\"special\":true}],"
    "\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Prepend\",\"prepend\":"
    "\"\xe2\x96\x81\"},{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":"
    "\"\xe2\x96\x81\"}]},\"post_processor\":{\"type\":\"TemplateProcessing\",\"single\":["
    "{\"SpecialToken\":{\"id\":\"<s>\",\"type_id\":0}},{\"Sequence\":{\"id\":\"A\",\"type_id\":0}}]"
    ","
    "\"special_tokens\":{\"<s>\":{\"id\":\"<s>\",\"ids\":[1],\"tokens\":[\"<s>\"]}}},"
    "\"decoder\":{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Replace\",\"pattern\":"
    "{\"String\":\"\xe2\x96\x81\"},\"content\":\" \"},{\"type\":\"ByteFallback\"},"
    "{\"type\":\"Fuse\"},{\"type\":\"Strip\",\"content\":\" \",\"start\":1,\"stop\":0}]},"
    "\"model\":{\"type\":\"BPE\",\"unk_token\":\"<unk>\",\"fuse_unk\":true,\"byte_fallback\":true,"
    "\"vocab\":{\"<unk>\":0,\"<s>\":1,\"</s>\":2,\"a\":3,\"b\":4,\"\xe2\x96\x81\":5,\"ab\":6,"
    "\"\xe2\x96\x81"
    "a\":7,\"<0xE2>\":8,\"<0x82>\":9,\"<0xAC>\":10,\"<\":11,\"s\":12,\">\":13,"
    "\"abab\":14},\"merges\":[\"a b\",\"\xe2\x96\x81 a\",\"ab ab\"]}}";

static const char GPT[] =
    "{\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false},\"decoder\":"
    "{\"type\":\"ByteLevel\"},\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"\xc3\xa2\":1,"
    "\"\xc4\xa4\":2,\"\xc2\xac\":3,\"\xc4\xa0\":4},\"merges\":[]}}";

static struct tokenizer *open_text(const char *json)
{
    struct tokenizer *t = NULL;
    enum err e = tokenizer_open_memory(span_of(json), NULL, &t);
    if (e) print_error("%s\n", err_detail());
    assert_int_equal(e, OK);
    return t;
}

static void check_ids(const struct tokenizer *t, const char *text, unsigned flags, const char *want)
{
    struct token_list ids = {0};
    struct buf got = {0};
    assert_int_equal(tokenizer_encode(t, text, strlen(text), flags, &ids), OK);
    for (size_t i = 0; i < ids.n; i++)
        buf_printf(&got, "%s%d", i ? " " : "", ids.ids[i]);
    assert_string_equal(buf_string(&got), want);
    buf_fini(&got);
    token_list_fini(&ids);
}

static void test_special_tokens(void **state)
{
    (void)state;
    struct tokenizer *t = open_text(LLAMA);
    check_ids(t, "ab", TOKENIZER_ADD_SPECIAL, "1 5 6");
    check_ids(t, "<s>ab", TOKENIZER_PARSE_SPECIAL, "1 5 6");
    check_ids(t, "<s>ab", 0, "5 11 12 13 6"); /* typed by a user: ordinary text */
    check_ids(t, "a\xe2\x82\xac", 0, "7 8 9 10");
    check_ids(t, "a\xff", 0, "7 0"); /* U+FFFD has no bytes here */
    check_ids(t, "", TOKENIZER_ADD_SPECIAL, "1");
    tokenizer_close(t);
}

/* Feeds ids one by one; pieces are joined with '|'. */
static void check_stream(const struct tokenizer *t, const int32_t *ids, size_t n, bool skip,
                         const char *want)
{
    struct buf out = {0};
    struct detokenizer d = {0};
    assert_int_equal(detokenizer_init(&d, t, skip), OK);
    for (size_t i = 0; i < n; i++) {
        assert_int_equal(detokenizer_next(&d, ids[i], &out), OK);
        buf_add_char(&out, '|');
    }
    assert_int_equal(detokenizer_flush(&d, &out), OK);
    assert_string_equal(buf_string(&out), want);
    detokenizer_fini(&d);
    buf_fini(&out);
}

static void test_streaming(void **state)
{
    (void)state;
    struct tokenizer *t = open_text(LLAMA);
    /* The first space goes; a run of bytes waits until what follows proves it whole. */
    check_stream(t, (int32_t[]){5, 7, 8, 9, 10, 3}, 6, false,
                 "| a||||\xe2\x82\xac"
                 "a|");
    check_stream(t, (int32_t[]){3, 8, 9, 3}, 4, false,
                 "a|||\xef\xbf\xbd\xef\xbf\xbd"
                 "a|");
    check_stream(t, (int32_t[]){8, 9}, 2, false, "||\xef\xbf\xbd\xef\xbf\xbd");
    check_stream(t, (int32_t[]){1, 3, 2, 99, -1}, 5, true, "|a||||");
    tokenizer_close(t);
    t = open_text(GPT);
    check_stream(t, (int32_t[]){1, 2, 3, 0}, 4, false, "||\xe2\x82\xac|a|");
    check_stream(t, (int32_t[]){1, 2, 0, 1}, 4, false,
                 "||\xef\xbf\xbd"
                 "a||\xef\xbf\xbd");
    tokenizer_close(t);
}

static void test_lookup(void **state)
{
    (void)state;
    struct tokenizer *t = open_text(LLAMA);
    struct span bytes = tokenizer_bytes(t, 8);
    assert_int_equal(bytes.n, 1);
    assert_int_equal((unsigned char)bytes.data[0], 0xe2);
    assert_true(span_equal(tokenizer_bytes(t, 7), " a"));
    assert_int_equal(tokenizer_bytes(t, 77).n, 0);
    assert_string_equal(tokenizer_token_text(t, 8), "<0xE2>");
    assert_null(tokenizer_token_text(t, -1));
    assert_int_equal(tokenizer_find(t, "ab"), 6);
    assert_int_equal(tokenizer_find(t, "</s>"), 2);
    assert_int_equal(tokenizer_find(t, "nope"), -1);
    assert_true(tokenizer_is_special(t, 1));
    assert_false(tokenizer_is_special(t, 3));
    assert_int_equal(tokenizer_unk_id(t), 0);
    assert_int_equal(tokenizer_vocab_size(t), 15);
    tokenizer_close(t);
    t = open_text("{\"added_tokens\":[{\"id\":4000,\"content\":\"\",\"special\":true}],"
                  "\"model\":{\"type\":\"WordLevel\",\"vocab\":{\"a\":0}}}");
    assert_false(tokenizer_is_special(t, 4000)); /* without a text it is no token */
    tokenizer_close(t);
}

static void test_configuration(void **state)
{
    (void)state;
    static const char config[] =
        "{\"tokenizer_class\":\"LlamaTokenizer\",\"add_bos_token\":false,\"add_eos_token\":true,"
        "\"bos_token\":{\"content\":\"<s>\"},\"eos_token\":\"</s>\",\"chat_template\":["
        "{\"name\":\"default\",\"template\":\"D\"},{\"name\":\"tool_use\",\"template\":\"T\"}],"
        "\"added_tokens_decoder\":{\"15\":{\"content\":\"<tool>\",\"normalized\":false}}}";
    struct tokenizer *t = NULL;
    struct span text = span_of(config);
    assert_int_equal(tokenizer_open_memory(span_of(LLAMA), &text, &t), OK);
    check_ids(t, "ab<tool>", TOKENIZER_ADD_SPECIAL, "5 6 15 2");
    const int32_t *eos;
    assert_int_equal(tokenizer_eos_ids(t, &eos), 1);
    assert_int_equal(eos[0], 2);
    assert_int_equal(tokenizer_bos_id(t), 1);
    assert_string_equal(tokenizer_chat_template(t, NULL), "D");
    assert_string_equal(tokenizer_chat_template(t, "tool_use"), "T");
    assert_null(tokenizer_chat_template(t, "rag"));
    assert_string_equal(tokenizer_special_text(t, "eos_token"), "</s>");
    assert_string_equal(tokenizer_special_text(t, "pad_token"), "");
    tokenizer_close(t);
}

/* A megabyte without a space: by scanning for the best pair it would take an hour. */
static void test_long_word(void **state)
{
    (void)state;
    enum { BYTES = 1 << 20 };
    struct tokenizer *t = open_text(LLAMA);
    struct token_list ids = {0};
    struct buf text = {0};
    for (int i = 0; i < BYTES / 2; i++)
        buf_add(&text, "ab", 2);
    int64_t start = clock_monotonic_us();
    assert_int_equal(tokenizer_encode(t, text.data, text.n, 0, &ids), OK);
    assert_true(clock_monotonic_us() - start < 60 * 1000000);
    assert_int_equal(ids.n, BYTES / 4 + 1); /* "_a", "b", then "abab" again and again, "ab" */
    assert_int_equal(ids.ids[2], 14);
    struct token_list few = {.limit = 1000};
    assert_int_equal(tokenizer_encode(t, text.data, text.n, 0, &few), ERR_TOO_LONG);
    assert_non_null(strstr(err_detail(), "1000"));
    token_list_fini(&few);
    token_list_fini(&ids);
    buf_fini(&text);
    tokenizer_close(t);
}

static void test_refusals(void **state)
{
    (void)state;
    static const struct {
        const char *json;
        enum err e;
        const char *want;
    } cases[] = {
        {"{", ERR_INVALID, "not valid JSON"},
        {"[]", ERR_FORMAT, "no JSON object"},
        {"{}", ERR_FORMAT, "model"},
        {"{\"model\":{\"type\":\"Quantum\"}}", ERR_UNSUPPORTED, "model type 'Quantum'"},
        {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0},\"merges\":[\"a b\"]}}", ERR_FORMAT,
         "merge 0 ('a' and 'b')"},
        {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":0},\"merges\":[]}}", ERR_FORMAT,
         "id 0 is given to"},
        {"{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":-1},\"merges\":[]}}", ERR_FORMAT, "id -1"},
        {"{\"model\":{\"type\":\"WordLevel\",\"vocab\":{}},\"pre_tokenizer\":{\"type\":\"Nope\"}}",
         ERR_UNSUPPORTED, "pre-tokenizer 'Nope'"},
        {"{\"model\":{\"type\":\"WordLevel\",\"vocab\":{}},\"normalizer\":{\"type\":\"Nope\"}}",
         ERR_UNSUPPORTED, "normalizer 'Nope'"},
        {"{\"model\":{\"type\":\"WordLevel\",\"vocab\":{}},\"decoder\":{\"type\":\"CTC\"}}",
         ERR_UNSUPPORTED, "decoder 'CTC'"},
        {"{\"model\":{\"type\":\"WordLevel\",\"vocab\":{}},\"pre_tokenizer\":{\"type\":\"Split\","
         "\"pattern\":{\"Regex\":\"(a\"},\"behavior\":\"Isolated\"}}",
         ERR_FORMAT, "pattern '(a'"},
        {"{\"model\":{\"type\":\"WordLevel\",\"vocab\":{}},\"pre_tokenizer\":{\"type\":\"Split\","
         "\"pattern\":{\"Regex\":\"[a&&b]\"},\"behavior\":\"Isolated\"}}",
         ERR_UNSUPPORTED, "&&"},
        {"{\"model\":{\"type\":\"WordLevel\",\"vocab\":{}},\"post_processor\":{\"type\":"
         "\"BertProcessing\",\"cls\":[\"x\",7],\"sep\":[\"y\",8]}}",
         ERR_FORMAT, "id 7 is not in the vocabulary"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct tokenizer *t = NULL;
        enum err e = tokenizer_open_memory(span_of(cases[i].json), NULL, &t);
        if (e != cases[i].e || !strstr(err_detail(), cases[i].want))
            print_error("%s\n  got %s: %s\n", cases[i].json, err_name(e), err_detail());
        assert_int_equal(e, cases[i].e);
        assert_non_null(strstr(err_detail(), cases[i].want));
    }
    struct tokenizer *t = NULL;
    assert_int_equal(tokenizer_open("/nonexistent", &t), ERR_NOT_FOUND);
    assert_non_null(strstr(err_detail(), "/nonexistent"));
}

static enum err use_once(const char *json)
{
    struct tokenizer *t = NULL;
    struct token_list ids = {0};
    struct buf text = {0};
    enum err e = tokenizer_open_memory(span_of(json), NULL, &t);
    if (!e)
        e = tokenizer_encode(t,
                             "<s>a b\xff"
                             "ab",
                             9, TOKENIZER_PARSE_SPECIAL, &ids);
    if (!e) e = tokenizer_decode(t, ids.ids, ids.n, false, &text);
    token_list_fini(&ids);
    buf_fini(&text);
    tokenizer_close(t);
    return e;
}

static void check_out_of_memory(const char *json)
{
    for (int64_t n = 1;; n++) {
        int64_t live = mem_live();
        mem_fail_at(n);
        enum err e = use_once(json);
        mem_fail_at(0);
        assert_int_equal(mem_live(), live);
        if (!e) break;
        if (e != ERR_NO_MEMORY) print_error("allocation %d: %s\n", (int)n, err_detail());
        assert_int_equal(e, ERR_NO_MEMORY);
        assert_true(n < 20000);
    }
}

static void test_out_of_memory(void **state)
{
    (void)state;
    check_out_of_memory(LLAMA);
    check_out_of_memory(GPT);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_special_tokens), cmocka_unit_test(test_streaming),
        cmocka_unit_test(test_lookup),         cmocka_unit_test(test_configuration),
        cmocka_unit_test(test_long_word),      cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_out_of_memory),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
