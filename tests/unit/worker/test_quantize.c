/* Goal: a directory that was quantized once gives exactly what quantizing at every start gives, on
 * one rank bit for bit; on several ranks nearly so; and a file that is not what it says is refused
 * in one line. Method: goldens are quantized, served and damaged. */
#include "base/log.h"
#include "golden.h"
#include "ranks.h"
#include "worker/quantize.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

enum { STEPS = 12 };
static char folder[64];

static struct worker_config config_for(const char *dir, const char *quantization)
{
    struct worker_config c;
    worker_config_default(&c);
    c.model_dir = dir;
    c.device = "cpu";
    c.quantization = quantization;
    c.n_threads = 2;
    c.n_sequences_max = 2;
    c.step_tokens_max = 128;
    c.block_size = 16;
    c.kv_cache_bytes = 4 << 20;
    c.collective_timeout_ms = 20000;
    return c;
}

struct said {
    int32_t tokens[STEPS];
    float logprobs[STEPS];
};

/* The first tokens after a golden prompt, with their logprobs. */
static void speak(const struct worker_config *config, int size, const struct golden_prompt *p,
                  struct said *out)
{
    struct ranks r;
    struct step_result result;
    int32_t blocks[32];
    for (int i = 0; i < 32; i++)
        blocks[i] = i;
    if (ranks_create(&r, config, size)) fail_msg("%s", err_detail());
    struct plan_open open = {.n_prompt = (uint32_t)p->n_ids,
                             .n_tokens_max = (uint32_t)(p->n_ids + STEPS + 1),
                             .n_tokens = (uint32_t)p->n_ids,
                             .n_blocks = (uint32_t)((p->n_ids + STEPS + 16) / 16),
                             .tokens = p->ids,
                             .blocks = blocks};
    sampling_params_default(&open.sampling);
    open.sampling.temperature = 0;
    open.sampling.n_logprobs = 0;
    open.sampling.n_prompt_logprobs = -1;
    struct plan_run run = {.n_tokens = (uint32_t)p->n_ids,
                           .flags = PLAN_RUN_SAMPLE | PLAN_RUN_STAY};
    struct step_plan plan = {.n_opens = 1, .opens = &open, .n_runs = 1, .runs = &run};
    for (int i = 0; i < STEPS; i++) {
        if (ranks_step(&r, &plan, &result)) fail_msg("%s", err_detail());
        assert_int_equal(result.n_tokens, 1);
        out->tokens[i] = result.tokens[0].token;
        out->logprobs[i] = result.tokens[0].logprob;
        plan = (struct step_plan){0};
    }
    ranks_destroy(&r);
}

static void quantize(const char *from, const char *format, const char *head)
{
    char command[100];
    struct quantize_report report;
    struct quantize_config c = {.model_dir = from,
                                .out_dir = folder,
                                .format = format,
                                .head_format = head,
                                .n_threads = 2};
    snprintf(command, sizeof command, "rm -rf %s", folder);
    assert_int_equal(system(command), 0);
    int64_t live = mem_live();
    if (model_quantize(&c, &report)) fail_msg("%s: %s", from, err_detail());
    assert_int_equal(mem_live(), live);
    assert_true(report.bytes_after > 0);
}

static void check_model(const char *name, const char *format, const char *head)
{
    struct golden g;
    struct said at_load, packed, two;
    golden_open(name, &g);
    struct worker_config load = config_for(g.dir, format), file = config_for(folder, NULL);
    load.head_quantization = head;
    quantize(g.dir, format, head);
    speak(&load, 1, &g.prompts[0], &at_load);
    speak(&file, 1, &g.prompts[0], &packed);
    assert_memory_equal(&at_load, &packed, sizeof packed);
    speak(&file, 2, &g.prompts[0], &two);
    /* a rank's columns may split a group of int4, which is then rounded a second time */
    if (fabsf(two.logprobs[0] - packed.logprobs[0]) > (strcmp(format, "int8") ? 0.5f : 0.1f))
        fail_msg("%s %s: two ranks say %g, one says %g", name, format, two.logprobs[0],
                 packed.logprobs[0]);
    golden_close(&g);
}

/* Fused and separate q, k, v; biases; tied and own output; learned positions; embedding of another
 * width than the model; norms of heads; shards; experts. */
static void test_same_tokens(void **state)
{
    static const char *const names[] = {"llama_bf16", "qwen2",          "gpt2_bf16", "opt_post",
                                        "qwen3",      "llama3_sharded", "mixtral",   "qwen3_moe"};
    (void)state;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        check_model(names[i], "int8", NULL);
        check_model(names[i], "int4", i % 2 ? "int4" : NULL);
    }
}

/* --- refusals --- */

static void edit_file(const char *from, const char *to)
{
    char path[100];
    struct buf bytes;
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    buf_init(&bytes, 0);
    assert_int_equal(buf_read_file(&bytes, path, 0), OK);
    char *at = memmem(bytes.data, bytes.n, from, strlen(from));
    assert_non_null(at);
    assert_int_equal(strlen(from), strlen(to));
    memcpy(at, to, strlen(to));
    FILE *f = fopen(path, "wb");
    assert_int_equal(fwrite(bytes.data, 1, bytes.n, f), bytes.n);
    fclose(f);
    buf_fini(&bytes);
}

/* Changes the byte that lies so far from the begin of the data. */
static void flip_byte(size_t at)
{
    char path[100];
    uint8_t length[8], byte;
    size_t header = 0;
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    FILE *f = fopen(path, "r+b");
    assert_int_equal(fread(length, 1, 8, f), 8);
    for (int i = 7; i >= 0; i--)
        header = header << 8 | length[i];
    assert_int_equal(header % 8, 0);
    fseek(f, (long)(8 + header + at), SEEK_SET);
    assert_int_equal(fread(&byte, 1, 1, f), 1);
    fseek(f, -1, SEEK_CUR);
    byte ^= 0x10;
    assert_int_equal(fwrite(&byte, 1, 1, f), 1);
    fclose(f);
}

static void expect_refused(const char *quantization, enum err e, const char *a, const char *b)
{
    struct worker *w = NULL;
    struct worker_config c = config_for(folder, quantization);
    int64_t live = mem_live();
    assert_int_equal(worker_create(&c, &w), e);
    assert_int_equal(mem_live(), live);
    if (!strstr(err_detail(), a) || !strstr(err_detail(), b))
        fail_msg("'%s' does not say '%s' and '%s'", err_detail(), a, b);
    if (strchr(err_detail(), '\n')) fail_msg("'%s' is more than one line", err_detail());
}

/* One rank serves packed weights from their file and looks at them meanwhile. */
static void expect_found_later(const char *words)
{
    struct worker *w = NULL;
    struct worker_config c = config_for(folder, NULL);
    int64_t live = mem_live();
    if (worker_create(&c, &w)) fail_msg("%s", err_detail());
    for (int i = 0; i < 2; i++) {
        assert_int_equal(worker_check(w, true), ERR_FORMAT);
        if (!strstr(err_detail(), words)) fail_msg("'%s' does not say '%s'", err_detail(), words);
    }
    worker_destroy(w);
    assert_int_equal(mem_live(), live);
}

static void test_damage_is_named(void **state)
{
    struct golden g;
    char command[160];
    (void)state;
    golden_open("llama", &g);
    quantize(g.dir, "int8", NULL);
    expect_refused("int4", ERR_INVALID, "--quantization int4", "holds int8 weights");
    flip_byte(1000);
    expect_found_later("model.safetensors: tensor 'layers.0.qkv.packed' is damaged");
    quantize(g.dir, "int8", NULL);
    edit_file("\"heddle.layout\":\"cpu-", "\"heddle.layout\":\"xpu-");
    expect_refused(NULL, ERR_UNSUPPORTED, "layout 'xpu-", "quantize again");
    quantize(g.dir, "int8", NULL);
    edit_file("\"heddle.weights\":\"int8\"", "\"heddle.weights\":\"int4\"");
    expect_refused(NULL, ERR_FORMAT, "tensor 'layers.0.qkv.packed'", "config.json asks for");
    quantize(g.dir, "int4", NULL);
    edit_file("\"heddle.digest.layers.1.up\"", "\"heddle.digest.layers.1.uq\"");
    expect_refused(NULL, ERR_FORMAT, "no 'heddle.digest.layers.1.up'", "model.safetensors");
    quantize(g.dir, "int4", NULL);
    edit_file("\"layers.1.down.packed\"", "\"layers.1.dawn.packed\"");
    expect_refused(NULL, ERR_FORMAT, "tensor 'layers.1.down.packed' is missing",
                   "model.safetensors");
    quantize(g.dir, "int4", NULL);
    snprintf(command, sizeof command, "truncate -s -100 %s/model.safetensors", folder);
    assert_int_equal(system(command), 0);
    expect_refused(NULL, ERR_FORMAT, "cut short", "model.safetensors");
    golden_close(&g);
}

static void test_what_is_not_quantized(void **state)
{
    struct golden g;
    struct quantize_report report;
    (void)state;
    golden_open("llama", &g);
    quantize(g.dir, "int8", NULL);
    struct quantize_config c = {.model_dir = g.dir, .out_dir = folder, .format = "int8"};
    assert_int_equal(model_quantize(&c, &report), ERR_INVALID); /* there already */
    assert_non_null(strstr(err_detail(), "is there already"));
    c.out_dir = g.dir;
    assert_int_equal(model_quantize(&c, &report), ERR_INVALID);
    assert_non_null(strstr(err_detail(), "own directory"));
    c.model_dir = folder;
    c.out_dir = "/tmp/heddle-twice-packed";
    assert_int_equal(model_quantize(&c, &report), ERR_INVALID);
    assert_non_null(strstr(err_detail(), "quantized already"));
    rmdir(c.out_dir);
    c.model_dir = g.dir;
    c.format = "fp8";
    assert_int_equal(model_quantize(&c, &report), ERR_INVALID);
    rmdir(c.out_dir);
    golden_close(&g);
}

static int setup(void **state)
{
    (void)state;
    snprintf(folder, sizeof folder, "/tmp/heddle-quantize-XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static int teardown(void **state)
{
    char command[100];
    (void)state;
    snprintf(command, sizeof command, "rm -rf %s", folder);
    return system(command);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_same_tokens),
        cmocka_unit_test(test_damage_is_named),
        cmocka_unit_test(test_what_is_not_quantized),
    };
    log_set_level(LOG_ERROR);
    return cmocka_run_group_tests(tests, setup, teardown);
}
