/* Goal: an option has one meaning wherever it comes from, and a wrong one is named.
 * Method: a small table read from a file, the environment and flags together. */
#include "base/conf.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
// clang-format off
#include <cmocka.h>
// clang-format on

struct values {
    const char *config, *model, *device;
    int64_t n_seqs, cache_bytes;
    double share;
    bool cache;
};
enum { VERB_ONE = 1, VERB_TWO = 2 };
#define AT(field) offsetof(struct values, field)
static const struct conf_row rows[] = {
    {"config", NULL, CONF_STRING, AT(config), 0, 0, NULL, NULL, 3, "General", "file"},
    {"model", "m", CONF_STRING, AT(model), 0, 0, NULL, NULL, 3, "General", "model"},
    {"device", NULL, CONF_CHOICE, AT(device), 0, 0, "auto", "auto cpu cuda", 3, "General", "device"},
    {"max-num-seqs", "np parallel", CONF_INT, AT(n_seqs), 1, 1024, "64", NULL, 3, "Limits", "sequences"},
    {"kv-cache-bytes", NULL, CONF_BYTES, AT(cache_bytes), 0, 0, NULL, NULL, 3, "Limits", "bytes"},
    {"share", NULL, CONF_NUMBER, AT(share), 0, 1, "0.9", NULL, VERB_TWO, "Limits", "share"},
    {"enable-prefix-caching", NULL, CONF_BOOL, AT(cache), 0, 0, "true", NULL, 3, "Limits", "cache"},
};
static const struct conf_refusal refusals[] = {{"pipeline-parallel-size", "use --tp"}, {NULL, NULL}};

static enum err read_args(struct conf *c, struct values *v, int argc, const char **argv)
{
    memset(v, 0, sizeof *v);
    assert_int_equal(conf_init(c, rows, sizeof rows / sizeof *rows, refusals, VERB_ONE, v), OK);
    return conf_read(c, argc, (char **)(void *)argv);
}
#define READ(...) read_args(&c, &v, sizeof(const char *[]){"x", __VA_ARGS__} / sizeof(char *), (const char *[]){"x", __VA_ARGS__})
static struct conf c;
static struct values v;

static void flags_in_every_form(void **state)
{
    (void)state;
    assert_int_equal(READ("dir", "-np", "7", "--device=cpu", "--kv_cache_bytes", "1.5GiB", "--no-enable-prefix-caching"), OK);
    assert_int_equal(v.n_seqs, 7);
    assert_string_equal(v.device, "cpu");
    assert_int_equal(v.cache_bytes, 1610612736);
    assert_false(v.cache);
    assert_string_equal(c.positionals[0], "dir");
    conf_fini(&c);
}

static void later_source_wins(void **state)
{
    (void)state;
    char path[] = "/tmp/heddle-conf-XXXXXX";
    FILE *f = fdopen(mkstemp(path), "w");
    fputs("max-num-seqs: 11\ndevice: cpu\nmodel: from-file\nshare: 0.5\n", f);
    fclose(f);
    setenv("HEDDLE_DEVICE", "cuda", 1);
    assert_int_equal(READ("--config", path, "--max-num-seqs", "12"), OK);
    assert_int_equal(v.n_seqs, 12);
    assert_string_equal(v.device, "cuda");
    assert_string_equal(v.model, "from-file");
    unsetenv("HEDDLE_DEVICE");
    unlink(path);
    conf_fini(&c);
}

static void wrong_values_are_named(void **state)
{
    (void)state;
    static const struct {
        const char *flag, *value, *says;
    } cases[] = {
        {"--max-num-seqs", "0", "must be from 1 to 1024"},
        {"--max-num-seqs", "12x", "is not a whole number"},
        {"--max-num-seqs", "99999999999999999999", "is not a whole number"},
        {"--device", "tpu", "auto cpu cuda"},
        {"--kv-cache-bytes", "-1", "is not a size"},
        {"--max-num-seq", "1", "did you mean --max-num-seqs"},
        {"--pipeline-parallel-size", "2", "use --tp"},
        {"--share", "0.5", "does not belong"},
        {"--enable-prefix-caching=maybe", "", "true or false"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        assert_int_equal(READ(cases[i].flag, cases[i].value), ERR_INVALID);
        if (!strstr(err_detail(), cases[i].says)) fail_msg("%s: %s", cases[i].flag, err_detail());
        conf_fini(&c);
    }
}

static void bad_files_are_named_with_their_line(void **state)
{
    (void)state;
    static const char *const texts[] = {"device: cpu\nmax-num-seqs: [1]\n", "a: &x b\ndevice: tpu\n", "device: 'x\n", "max-num-seqs:\n  deep: 1\n"};
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        char path[] = "/tmp/heddle-conf-XXXXXX";
        FILE *f = fdopen(mkstemp(path), "w");
        fputs(texts[i], f);
        fclose(f);
        assert_int_equal(READ("--config", path), ERR_INVALID);
        assert_non_null(strstr(err_detail(), path));
        unlink(path);
        conf_fini(&c);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(flags_in_every_form),
        cmocka_unit_test(later_source_wins),
        cmocka_unit_test(wrong_values_are_named),
        cmocka_unit_test(bad_files_are_named_with_their_line),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
