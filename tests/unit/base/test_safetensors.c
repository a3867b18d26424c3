/* Goal: safetensors files that follow the format open and give their bytes; all others are refused
 * with a text that names file, tensor and reason.
 * Method: the conformance manifest, a real model whole and sharded, and files made here. */
#include "base/buf.h"
#include "base/json.h"
#include "base/mem.h"
#include "base/safetensors.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

static char folder[256]; /* emptied by rm at the end of each test that makes one */

static void file_write(const char *name, const void *bytes, size_t n)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, n, f), n);
    assert_int_equal(fclose(f), 0);
}

/* Header text and n bytes of data 0, 1, 2, ... */
static void model_write(const char *name, const char *header, size_t data_bytes)
{
    struct buf b;
    buf_init(&b, 0);
    uint64_t n = strlen(header);
    for (int i = 0; i < 8; i++)
        buf_add_char(&b, (char)(n >> (8 * i)));
    buf_add_string(&b, header);
    for (size_t i = 0; i < data_bytes; i++)
        buf_add_char(&b, (char)i);
    file_write(name, b.data, b.n);
    buf_fini(&b);
}

static int folder_make(void **state)
{
    (void)state;
    snprintf(folder, sizeof folder, "/tmp/heddle-st-XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static int folder_remove(void **state)
{
    (void)state;
    char command[300];
    snprintf(command, sizeof command, "rm -rf %s", folder);
    return system(command);
}

static void expect_refused(const char *words)
{
    struct safetensors *s = NULL;
    assert_int_not_equal(safetensors_open(folder, &s), OK);
    assert_null(s);
    if (!strstr(err_detail(), words)) fail_msg("'%s' does not say '%s'", err_detail(), words);
    if (!strstr(err_detail(), folder)) fail_msg("'%s' does not name the file", err_detail());
}

static void test_conformance(void **state)
{
    (void)state;
    const char *root = getenv("HEDDLE_CONFORMANCE");
    char path[512];
    json_t *manifest;
    snprintf(path, sizeof path, "%s/malformed/manifest.json", root ? root : "");
    if (!root || access(path, R_OK)) {
        print_message("no conformance data: %s\n", path);
        skip();
    }
    assert_int_equal(json_parse_file(path, 1 << 20, &manifest), OK);
    int n_seen = 0;
    for (size_t i = 0; i < json_array_size(manifest); i++) {
        const json_t *row = json_array_get(manifest, i);
        const char *file = json_string_value(json_object_get(row, "file"));
        const json_t *accept = json_object_get(row, "accept");
        struct safetensors *s = NULL;
        if (!strstr(file, ".safetensors")) continue;
        snprintf(path, sizeof path, "%s/malformed/%s", root, file);
        enum err e = safetensors_open(path, &s);
        if (json_is_true(accept) && e) fail_msg("%s refused: %s", file, err_detail());
        if (json_is_false(accept) && !e) fail_msg("%s accepted", file);
        if (e && !strstr(err_detail(), path))
            fail_msg("%s: '%s' does not name it", file, err_detail());
        safetensors_close(s);
        n_seen++;
    }
    json_decref(manifest);
    assert_true(n_seen >= 24);
}

static void test_real_model_whole_and_sharded(void **state)
{
    (void)state;
    const char *root = getenv("HEDDLE_CONFORMANCE");
    char path[512];
    struct safetensors *whole, *shards;
    snprintf(path, sizeof path, "%s/model/stories260K/hf", root ? root : "");
    if (!root || access(path, R_OK)) skip();
    assert_int_equal(safetensors_open(path, &whole), OK);
    snprintf(path, sizeof path, "%s/model/stories260K/hf-sharded", root);
    assert_int_equal(safetensors_open(path, &shards), OK);
    assert_int_equal(safetensors_count(whole), 5 * 9 + 2);
    assert_int_equal(safetensors_count(shards), safetensors_count(whole));
    for (size_t i = 0; i < safetensors_count(whole); i++) {
        const struct st_tensor *a = safetensors_at(whole, i),
                               *b = safetensors_find(shards, a->name);
        assert_non_null(b);
        assert_int_equal(a->bytes, b->bytes);
        assert_memory_equal(a->data, b->data, a->bytes);
        assert_int_equal(a->dtype, ST_F32);
    }
    const struct st_tensor *t = safetensors_find(whole, "model.embed_tokens.weight");
    assert_non_null(t);
    assert_int_equal(t->n_dims, 2);
    assert_int_equal(t->shape[0], 512);
    assert_int_equal(t->shape[1], 64);
    safetensors_drop(whole, t);
    assert_null(safetensors_find(whole, "model.embed_tokens"));
    safetensors_close(whole);
    safetensors_close(shards);
}

static void test_values_and_types(void **state)
{
    (void)state;
    struct safetensors *s;
    model_write("model.safetensors",
                "  {\"__metadata__\":{\"format\":\"pt\"},"
                "\"b\":{\"dtype\":\"F4\",\"shape\":[2,2],\"data_offsets\":[4,6]},"
                "\"empty\":{\"dtype\":\"I64\",\"shape\":[0,7],\"data_offsets\":[4,4]},"
                "\"a\":{\"dtype\":\"F32\",\"shape\":[],\"data_offsets\":[0,4]}}   ",
                6);
    assert_int_equal(safetensors_open(folder, &s), OK);
    assert_int_equal(safetensors_count(s), 3);
    const struct st_tensor *a = safetensors_find(s, "a"), *b = safetensors_find(s, "b");
    assert_int_equal(a->n_dims, 0);
    assert_int_equal(((const uint8_t *)a->data)[3], 3);
    assert_int_equal(((const uint8_t *)b->data)[1], 5);
    assert_string_equal(st_dtype_name(b->dtype), "F4");
    safetensors_close(s);
}

#define ROW(name, dtype, shape, begin, end)                                                        \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":[" #begin "," #end \
    "]}"

static void test_refusals_name_the_reason(void **state)
{
    (void)state;
    static const struct {
        const char *header;
        size_t data_bytes;
        const char *words;
    } cases[] = {
        {"{" ROW("w", "F32", "[2]", 0, 8) "}", 7,
         "tensor 'w' ends at data byte 8, but the file holds only 7"},
        {"{" ROW("w", "F32", "[2]", 0, 8) "}", 9, "1 bytes at its end belong to no tensor"},
        {"{" ROW("w", "F32", "[3]", 0, 8) "}", 8, "tensor 'w': F32 with its shape needs 12 bytes"},
        {"{" ROW("w", "U8", "[2]", 0, 2) "," ROW("v", "U8", "[2]", 1, 3) "}", 3,
         "tensor 'v' overlaps 'w'"},
        {"{" ROW("w", "U8", "[2]", 0, 2) "," ROW("v", "U8", "[2]", 3, 5) "}", 5,
         "hole of 1 bytes before tensor 'v'"},
        {"{" ROW("w", "U8", "[2]", 0, 2) "," ROW("w", "U8", "[2]", 2, 4) "}", 4, "header: "},
        {"{" ROW("w", "F33", "[2]", 0, 8) "}", 8, "tensor 'w': unknown dtype 'F33'"},
        {"{" ROW("w", "F4", "[3]", 0, 2) "}", 2, "tensor 'w': 12 bits are no whole bytes"},
        {"{" ROW("w", "F32", "[9223372036854775807,4]", 0, 8) "}", 8,
         "tensor 'w': its shape overflows"},
        {"{" ROW("w", "F32", "[-1]", 0, 8) "}", 8, "tensor 'w': dimension 0"},
        {"{" ROW("w", "F32", "[2]", 8, 0) "}", 8, "tensor 'w': data_offsets [8, 0] are no range"},
        {"{\"w\":3}", 0, "tensor 'w': its entry is no object"},
        {"{\"w\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", 4, "tensor 'w': 'shape' is missing"},
        {"{\"__metadata__\":{\"a\":1}}", 0, "'__metadata__' value of 'a'"},
        {"[]", 0, "no JSON object"},
        {"{} x", 0, "header: "},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        model_write("model.safetensors", cases[i].header, cases[i].data_bytes);
        expect_refused(cases[i].words);
    }
    file_write("model.safetensors", "", 0);
    expect_refused("0 bytes are too few");
    file_write("model.safetensors", "\xff\xff\xff\xff\xff\xff\xff\x7f{}", 10);
    expect_refused("header of 9223372036854775807 bytes, at most 100000000");
    file_write("model.safetensors", "\x10\0\0\0\0\0\0\0{}", 10);
    expect_refused("header of 16 bytes in a file of 10");
}

static void test_shards(void **state)
{
    (void)state;
    static const char index_name[] = "model.safetensors.index.json";
    struct safetensors *s;
    static const char good[] =
        "{\"weight_map\":{\"w\":\"one.safetensors\",\"v\":\"two.safetensors\"}}";
    model_write("one.safetensors", "{" ROW("w", "U8", "[2]", 0, 2) "}", 2);
    model_write("two.safetensors", "{" ROW("v", "U8", "[2]", 0, 2) "}", 2);
    expect_refused("no model.safetensors.index.json says");
    file_write(index_name, good, sizeof good - 1);
    assert_int_equal(safetensors_open(folder, &s), OK);
    assert_int_equal(safetensors_count(s), 2);
    safetensors_close(s);

    static const struct {
        const char *index, *words;
    } cases[] = {
        {"{\"weight_map\":{\"w\":\"../one.safetensors\"}}", "is no name of a file in this folder"},
        {"{\"weight_map\":{\"w\":\"absent.safetensors\"}}", "absent.safetensors: No such file"},
        {"{\"weight_map\":{\"w\":\"two.safetensors\"}}", "tensor 'w' is not in two.safetensors"},
        {"{\"weight_map\":{\"w\":7}}", "the file of tensor 'w' is no string"},
        {"{\"weight_map\":{}}", "'weight_map' is missing or empty"},
        {"{\"weight_map\":", "not valid JSON"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        file_write(index_name, cases[i].index, strlen(cases[i].index));
        expect_refused(cases[i].words);
    }
    file_write(index_name, good, sizeof good - 1);
    model_write("two.safetensors",
                "{" ROW("v", "U8", "[2]", 0, 2) "," ROW("w", "U8", "[1]", 2, 3) "}", 3);
    expect_refused("tensor 'w' is also in");
}

static void test_absent_and_foreign(void **state)
{
    (void)state;
    struct safetensors *s;
    expect_refused("no model.safetensors");
    file_write("pytorch_model.bin", "x", 1);
    expect_refused("PyTorch pickles");
    assert_int_equal(safetensors_open("/nonexistent/folder", &s), ERR_NOT_FOUND);
    model_write("other-name.safetensors", "{" ROW("w", "U8", "[2]", 0, 2) "}", 2);
    assert_int_equal(safetensors_open(folder, &s), OK);
    safetensors_close(s);
}

static void test_every_allocation_may_fail(void **state)
{
    (void)state;
    model_write("model.safetensors",
                "{" ROW("w", "U8", "[2]", 0, 2) "," ROW("v", "U8", "[2]", 2, 4) "}", 4);
    int64_t live = mem_live();
    for (int64_t n = 1;; n++) {
        struct safetensors *s = NULL;
        mem_fail_at(n);
        enum err e = safetensors_open(folder, &s);
        mem_fail_at(0);
        safetensors_close(s);
        assert_int_equal(mem_live(), live);
        if (!e) break;
        assert_int_equal(e, ERR_NO_MEMORY);
        assert_true(n < 100);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_conformance),
        cmocka_unit_test(test_real_model_whole_and_sharded),
        cmocka_unit_test_setup_teardown(test_values_and_types, folder_make, folder_remove),
        cmocka_unit_test_setup_teardown(test_refusals_name_the_reason, folder_make, folder_remove),
        cmocka_unit_test_setup_teardown(test_shards, folder_make, folder_remove),
        cmocka_unit_test_setup_teardown(test_absent_and_foreign, folder_make, folder_remove),
        cmocka_unit_test_setup_teardown(test_every_allocation_may_fail, folder_make, folder_remove),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
