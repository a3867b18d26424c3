/* Goal: ids and texts are those of Hugging Face tokenizers for real models of every kind.
 * Method: the conformance texts through each tokenizer, compared with ids recorded from the
 * upstream library; every decoding is done at once and again id by id, and the two must be the same
 * bytes. */
#include "base/json.h"
#include "base/mem.h"
#include "coordinator/text/tokenizer.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

static const char *conformance;

static const char *path_of(const char *name)
{
    static char path[4096];
    snprintf(path, sizeof path, "%s/%s", conformance, name);
    return path;
}

static struct tokenizer *open_tokenizer(const char *name)
{
    struct tokenizer *t = NULL;
    enum err e = tokenizer_open(path_of(name), &t);
    if (e) print_error("%s\n", err_detail());
    assert_int_equal(e, OK);
    return t;
}

static json_t *load(const char *name)
{
    json_t *json = NULL;
    assert_int_equal(json_parse_file(path_of(name), 0, &json), OK);
    return json;
}

static bool same_ids(const struct token_list *got, const json_t *want)
{
    if (got->n != json_array_size(want)) return false;
    for (size_t i = 0; i < got->n; i++)
        if (got->ids[i] != json_integer_value(json_array_get(want, i))) return false;
    return true;
}

static bool check_ids(const struct tokenizer *t, const char *text, size_t n, unsigned flags,
                      const json_t *want, const char *what)
{
    struct token_list ids = {0};
    assert_int_equal(tokenizer_encode(t, text, n, flags | TOKENIZER_PARSE_SPECIAL, &ids), OK);
    bool same = same_ids(&ids, want);
    if (!same) {
        print_error("%s: '%.80s'\n  want", what, text);
        for (size_t i = 0; i < json_array_size(want) && i < 40; i++)
            print_error(" %lld", (long long)json_integer_value(json_array_get(want, i)));
        print_error("\n  got ");
        for (size_t i = 0; i < ids.n && i < 40; i++)
            print_error(" %d", ids.ids[i]);
        print_error("\n");
    }
    token_list_fini(&ids);
    return same;
}

/* Decodes at once and in a stream; both must be want. */
static bool check_text(const struct tokenizer *t, const struct token_list *ids, bool skip,
                       const char *want, size_t n, const char *what)
{
    struct buf whole = {0}, stream = {0};
    struct detokenizer d = {0};
    assert_int_equal(tokenizer_decode(t, ids->ids, ids->n, skip, &whole), OK);
    assert_int_equal(detokenizer_init(&d, t, skip), OK);
    for (size_t i = 0; i < ids->n; i++)
        assert_int_equal(detokenizer_next(&d, ids->ids[i], &stream), OK);
    assert_int_equal(detokenizer_flush(&d, &stream), OK);
    bool same = whole.n == n && !memcmp(buf_string(&whole), want, n) && stream.n == n &&
                !memcmp(buf_string(&stream), want, n);
    if (!same)
        print_error("%s: decode\n  want '%s'\n  got  '%s'\n  then '%s'\n", what, want,
                    buf_string(&whole), buf_string(&stream));
    detokenizer_fini(&d);
    buf_fini(&whole);
    buf_fini(&stream);
    return same;
}

static bool check_line(const struct tokenizer *t, const json_t *texts, const json_t *line,
                       const char *name)
{
    size_t i = (size_t)json_integer_value(json_object_get(line, "i"));
    const json_t *text = json_array_get(texts, i), *ids = json_object_get(line, "ids");
    const json_t *special = json_object_get(line, "ids_special");
    const json_t *decoded = json_object_get(line, "decode");
    const char *s = json_string_value(text);
    size_t n = json_string_length(text);
    bool good = check_ids(t, s, n, 0, ids, name);
    good &= check_ids(t, s, n, TOKENIZER_ADD_SPECIAL, special ? special : ids, name);
    struct token_list list = {0};
    for (size_t k = 0; k < json_array_size(ids); k++)
        token_list_add(&list, (int32_t)json_integer_value(json_array_get(ids, k)));
    const json_t *want = decoded ? decoded : text;
    good &= check_text(t, &list, false, json_string_value(want), json_string_length(want), name);
    token_list_fini(&list);
    return good;
}

static void check_recorded(const char *folder, const char *name)
{
    char file[256];
    struct tokenizer *t = open_tokenizer(folder);
    json_t *texts = load("tokenizers/texts_S.json");
    struct buf lines = {0};
    snprintf(file, sizeof file, "tokenizers/expected/%s.jsonl", name);
    assert_int_equal(buf_read_file(&lines, path_of(file), 0), OK);
    int n = 0, good = 0;
    char *save = NULL;
    for (char *s = strtok_r(lines.data, "\n", &save); s; s = strtok_r(NULL, "\n", &save), n++) {
        json_t *line = NULL;
        assert_int_equal(json_parse(s, strlen(s), &line), OK);
        good += check_line(t, texts, line, name);
        json_decref(line);
    }
    print_message("%s: %d of %d texts\n", name, good, n);
    assert_true(n > 400);
    assert_int_equal(good, n);
    buf_fini(&lines);
    json_decref(texts);
    tokenizer_close(t);
}

static void test_gpt2(void **state)
{
    (void)state;
    check_recorded("tokenizers/hf/gpt2-raw", "gpt2");
}

static void test_llama3(void **state)
{
    (void)state;
    check_recorded("tokenizers/hf/llama3-composed", "llama3");
}

static void test_phi2(void **state)
{
    (void)state;
    check_recorded("tokenizers/hf/phi-2", "phi-2");
}

static void test_phi3(void **state)
{
    (void)state;
    check_recorded("tokenizers/hf/phi-3-mini", "phi-3-mini");
}

static void test_bert(void **state)
{
    (void)state;
    check_recorded("tokenizers/hf/bert-base-uncased", "bert-base-uncased");
}

static void test_t5(void **state)
{
    (void)state;
    check_recorded("tokenizers/hf/t5-small", "t5-small");
}

/* The trained model's tokenizer: prompt ids as run.c gives them, with BOS. */
static void test_stories(void **state)
{
    (void)state;
    struct tokenizer *t = open_tokenizer("model/stories260K/hf");
    struct buf lines = {0};
    assert_int_equal(buf_read_file(&lines, path_of("model/stories260K/goldens.jsonl"), 0), OK);
    int n = 0, good = 0;
    char *save = NULL;
    for (char *s = strtok_r(lines.data, "\n", &save); s; s = strtok_r(NULL, "\n", &save), n++) {
        json_t *line = NULL;
        assert_int_equal(json_parse(s, strlen(s), &line), OK);
        const json_t *prompt = json_object_get(line, "prompt");
        const json_t *ids = json_object_get(line, "prompt_ids");
        good += check_ids(t, json_string_value(prompt), json_string_length(prompt),
                          TOKENIZER_ADD_SPECIAL, ids, "stories260K");
        struct token_list list = {0};
        for (size_t k = 0; k < json_array_size(ids); k++)
            token_list_add(&list, (int32_t)json_integer_value(json_array_get(ids, k)));
        check_text(t, &list, true, json_string_value(prompt), json_string_length(prompt),
                   "stories260K");
        token_list_fini(&list);
        json_decref(line);
    }
    assert_true(n > 2);
    assert_int_equal(good, n);
    assert_int_equal(tokenizer_bos_id(t), 1);
    assert_int_equal(tokenizer_eos_id(t), 2);
    assert_int_equal(tokenizer_vocab_size(t), 512);
    assert_string_equal(tokenizer_special_text(t, "bos_token"), "<s>");
    buf_fini(&lines);
    tokenizer_close(t);
}

/* The texts and ids published with llama.cpp for the same vocabulary: `.out` has a line a text. */
static void check_published(const char *folder, const char *name)
{
    char file[256];
    struct tokenizer *t = open_tokenizer(folder);
    struct buf in = {0}, out = {0};
    snprintf(file, sizeof file, "tokenizers/gguf/ggml-vocab-%s.gguf.inp", name);
    assert_int_equal(buf_read_file(&in, path_of(file), 0), OK);
    snprintf(file, sizeof file, "tokenizers/gguf/ggml-vocab-%s.gguf.out", name);
    assert_int_equal(buf_read_file(&out, path_of(file), 0), OK);
    static const char separator[] = "\n__ggml_vocab_test__\n";
    const char *text = in.data, *line = out.data;
    int n = 0, good = 0;
    for (const char *end; (end = strstr(text, separator)) && *line; n++) {
        json_t *want = json_array();
        while (*line && *line != '\n') {
            char *next;
            long id = strtol(line, &next, 10);
            if (next == line) break;
            json_array_append_new(want, json_integer(id));
            line = next;
            while (*line == ' ')
                line++;
        }
        line += *line == '\n';
        good += check_ids(t, text, (size_t)(end - text), 0, want, name);
        json_decref(want);
        text = end + sizeof separator - 1;
    }
    print_message("%s: %d of %d published texts\n", name, good, n);
    assert_true(n > 40);
    assert_int_equal(good, n);
    buf_fini(&in);
    buf_fini(&out);
    tokenizer_close(t);
}

static void test_published(void **state)
{
    (void)state;
    check_published("tokenizers/hf/gpt2-raw", "gpt-2");
    check_published("tokenizers/hf/llama3-composed", "llama-bpe");
}

int main(void)
{
    conformance = getenv("HEDDLE_CONFORMANCE");
    char probe[4096];
    snprintf(probe, sizeof probe, "%s/tokenizers/texts_S.json", conformance ? conformance : "");
    FILE *f = fopen(probe, "rb");
    if (!f) {
        printf("skipped: no conformance data at %s\n", probe);
        return 77;
    }
    fclose(f);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_stories), cmocka_unit_test(test_gpt2),
        cmocka_unit_test(test_phi3),    cmocka_unit_test(test_phi2),
        cmocka_unit_test(test_llama3),  cmocka_unit_test(test_bert),
        cmocka_unit_test(test_t5),      cmocka_unit_test(test_published),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
