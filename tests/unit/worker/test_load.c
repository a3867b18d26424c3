/* Goal: checkpoints in every legal dress load and give the same tokens; damaged or foreign ones are
 * refused in one line that names file, tensor and reason; what does not fit memory says what would.
 * Method: a golden checkpoint is rewritten tensor by tensor in a folder of its own. */
#include "base/log.h"
#include "golden.h"
#include "ranks.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <sys/stat.h>

#include <cmocka.h>

static struct golden golden;
static char folder[64];

/* Changes one row of the header while it is written: may rename it, or drop it (false). */
typedef bool editor(char name[256], char dtype[16], char shape[64]);

static void bytes_write(const char *name, const void *bytes, size_t n)
{
    char path[300];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, n, f), n);
    fclose(f);
}

static void config_write(const char *edit_from, const char *edit_to)
{
    char path[600];
    struct buf text, out;
    buf_init(&text, 0);
    buf_init(&out, 0);
    snprintf(path, sizeof path, "%s/config.json", golden.dir);
    assert_int_equal(buf_read_file(&text, path, 0), OK);
    const char *s = buf_string(&text), *at = edit_from ? strstr(s, edit_from) : NULL;
    assert_true(!edit_from || at);
    if (at) {
        buf_add(&out, s, (size_t)(at - s));
        buf_add_string(&out, edit_to);
        buf_add_string(&out, at + strlen(edit_from));
    } else {
        buf_add_string(&out, s);
    }
    bytes_write("config.json", out.data, out.n);
    buf_fini(&text);
    buf_fini(&out);
}

/* Writes the golden's tensors through the editor; pad shifts the data by so many bytes. */
static void weights_write(editor *edit, int pad, size_t cut)
{
    struct safetensors *s;
    struct buf header, data, file;
    assert_int_equal(safetensors_open(golden.dir, &s), OK);
    buf_init(&header, 0);
    buf_init(&data, 0);
    buf_init(&file, 0);
    buf_add_char(&header, '{');
    for (size_t i = 0; i < safetensors_count(s); i++) {
        const struct st_tensor *t = safetensors_at(s, i);
        char name[256], dtype[16], shape[64];
        snprintf(name, sizeof name, "%s", t->name);
        snprintf(dtype, sizeof dtype, "%s", st_dtype_name(t->dtype));
        snprintf(shape, sizeof shape, t->n_dims == 2 ? "%lld,%lld" : "%lld", (long long)t->shape[0],
                 (long long)t->shape[t->n_dims - 1]);
        if (edit && !edit(name, dtype, shape)) continue;
        size_t begin = data.n;
        buf_add(&data, t->data, t->bytes);
        buf_printf(&header, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}",
                   header.n > 1 ? "," : "", name, dtype, shape, begin, data.n);
    }
    buf_add_char(&header, '}');
    while ((header.n & 7) != (size_t)pad)
        buf_add_char(&header, ' ');
    uint64_t n = header.n;
    for (int i = 0; i < 8; i++)
        buf_add_char(&file, (char)(n >> (8 * i)));
    buf_add(&file, header.data, header.n);
    buf_add(&file, data.data, data.n);
    assert_int_equal(buf_err(&file), OK);
    bytes_write("model.safetensors", file.data, file.n - cut);
    safetensors_close(s);
    buf_fini(&header);
    buf_fini(&data);
    buf_fini(&file);
}

static struct worker_config config_here(void)
{
    struct worker_config c;
    worker_config_default(&c);
    c.model_dir = folder;
    c.device = "cpu";
    c.n_threads = 1;
    c.n_sequences_max = 2;
    c.step_tokens_max = 64;
    c.kv_cache_bytes = 4 << 20;
    return c;
}

static int32_t greedy_first(const struct worker_config *config, int size)
{
    struct ranks r;
    struct step_result result;
    const struct golden_prompt *p = &golden.prompts[1];
    int32_t blocks[8] = {0, 1, 2, 3, 4, 5, 6, 7};
    if (ranks_create(&r, config, size)) fail_msg("%s", err_detail());
    struct plan_open open = {.n_prompt = (uint32_t)p->n_ids,
                             .n_tokens_max = 64,
                             .n_tokens = (uint32_t)p->n_ids,
                             .n_blocks = 2,
                             .tokens = p->ids,
                             .blocks = blocks};
    sampling_params_default(&open.sampling);
    open.sampling.temperature = 0;
    open.sampling.n_logprobs = open.sampling.n_prompt_logprobs = -1;
    struct plan_run run = {.n_tokens = (uint32_t)p->n_ids, .flags = PLAN_RUN_SAMPLE};
    struct step_plan plan = {.n_opens = 1, .opens = &open, .n_runs = 1, .runs = &run};
    if (ranks_step(&r, &plan, &result)) fail_msg("%s", err_detail());
    assert_int_equal(result.n_tokens, 1);
    int32_t token = result.tokens[0].token;
    ranks_destroy(&r);
    return token;
}

static void expect_loads(void)
{
    struct worker_config c = config_here();
    assert_int_equal(greedy_first(&c, 1), golden.prompts[1].greedy[0]);
}

static void expect_refused(const struct worker_config *config, enum err e, const char *a,
                           const char *b)
{
    struct worker *w = NULL;
    int64_t live = mem_live();
    struct worker_config c = config ? *config : config_here();
    assert_int_equal(worker_create(&c, &w), e);
    assert_null(w);
    assert_int_equal(mem_live(), live);
    if (!strstr(err_detail(), a) || !strstr(err_detail(), b))
        fail_msg("'%s' does not say '%s' and '%s'", err_detail(), a, b);
    if (strchr(err_detail(), '\n')) fail_msg("'%s' is more than one line", err_detail());
}

static int setup(void **state)
{
    (void)state;
    golden_open("llama", &golden);
    snprintf(folder, sizeof folder, "/tmp/heddle-load-XXXXXX");
    if (!mkdtemp(folder)) return -1;
    config_write(NULL, NULL);
    return 0;
}

static int teardown(void **state)
{
    char command[100];
    (void)state;
    golden_close(&golden);
    snprintf(command, sizeof command, "rm -rf %s", folder);
    return system(command);
}

static bool drop_prefix(char name[256], char dtype[16], char shape[64])
{
    (void)dtype, (void)shape;
    if (!strncmp(name, "model.", 6)) memmove(name, name + 6, strlen(name + 6) + 1);
    return true;
}

static int n_extra;
static char extra_name[64];
/* The first tensor that may go is written under another name as well: a stranger in the file. */
static bool add_stranger(char name[256], char dtype[16], char shape[64])
{
    (void)dtype, (void)shape;
    if (!strcmp(name, "model.norm.weight") && n_extra) snprintf(name, 256, "%s", extra_name);
    return true;
}

static bool shape_swapped(char name[256], char dtype[16], char shape[64])
{
    (void)dtype;
    if (!strcmp(name, "model.layers.1.mlp.up_proj.weight")) snprintf(shape, 64, "64,96");
    return true;
}

static bool vector_flat(char name[256], char dtype[16], char shape[64])
{
    (void)dtype;
    if (!strcmp(name, "model.layers.0.input_layernorm.weight")) snprintf(shape, 64, "8,8");
    return true;
}

static bool without_one(char name[256], char dtype[16], char shape[64])
{
    (void)dtype, (void)shape;
    return strcmp(name, "model.layers.1.self_attn.k_proj.weight") != 0;
}

static bool as_integers(char name[256], char dtype[16], char shape[64])
{
    (void)shape;
    if (!strcmp(name, "model.layers.0.self_attn.v_proj.weight")) snprintf(dtype, 16, "I32");
    return true;
}

static void test_legal_dresses(void **state)
{
    (void)state;
    weights_write(NULL, 0, 0);
    expect_loads();
    weights_write(drop_prefix, 0, 0);
    expect_loads();
    weights_write(NULL, 3, 0); /* data off every alignment */
    expect_loads();
}

/* The final norm goes by another name, which makes one missing tensor and one stranger. */
static void test_strangers_are_named(void **state)
{
    (void)state;
    n_extra = 1;
    snprintf(extra_name, sizeof extra_name, "model.layers.0.self_attn.q_proj.bias");
    weights_write(add_stranger, 0, 0);
    expect_refused(NULL, ERR_FORMAT, "model.safetensors", "tensor 'model.norm.weight' is missing");
    n_extra = 0;
}

static void test_damage_is_named(void **state)
{
    (void)state;
    weights_write(NULL, 0, 100);
    expect_refused(NULL, ERR_FORMAT, "model.safetensors", "cut short");
    weights_write(shape_swapped, 0, 0);
    expect_refused(NULL, ERR_FORMAT,
                   "model.safetensors: tensor 'model.layers.1.mlp.up_proj.weight'",
                   "has shape [64, 96], but config.json asks for [96, 64]");
    weights_write(vector_flat, 0, 0);
    expect_refused(NULL, ERR_FORMAT, "tensor 'model.layers.0.input_layernorm.weight'",
                   "has shape [8, 8]");
    weights_write(without_one, 0, 0);
    expect_refused(NULL, ERR_FORMAT, "model.safetensors",
                   "tensor 'model.layers.1.self_attn.k_proj.weight' is missing");
    weights_write(as_integers, 0, 0);
    expect_refused(NULL, ERR_UNSUPPORTED, "tensor 'model.layers.0.self_attn.v_proj.weight'",
                   "stored as I32");
}

static void test_a_bias_nobody_asked_for(void **state)
{
    (void)state;
    /* Qwen2's q, k, v carry biases; read as Llama without attention_bias they would be dropped. */
    golden_close(&golden);
    golden_open("qwen2", &golden);
    weights_write(NULL, 0, 0);
    config_write("Qwen2ForCausalLM", "LlamaForCausalLM");
    expect_refused(NULL, ERR_FORMAT, "tensor 'model.layers.0.self_attn.",
                   "is unknown to LlamaForCausalLM");
}

static void test_config_faults(void **state)
{
    (void)state;
    weights_write(NULL, 0, 0);
    config_write("LlamaForCausalLM", "RetNetForCausalLM");
    expect_refused(NULL, ERR_UNSUPPORTED, "config.json",
                   "unknown architecture 'RetNetForCausalLM'");
    config_write(NULL, NULL);
    struct worker_config c = config_here();
    c.context_max = 100000;
    expect_refused(&c, ERR_INVALID, "--max-model-len 100000", "256 positions");
    c = config_here();
    c.rank = 0, c.size = 5;
    expect_refused(&c, ERR_UNSUPPORTED, "5 tensor-parallel ranks", "1 to 4");
    c = config_here();
    c.quantization = "int3";
    expect_refused(&c, ERR_INVALID, "--quantization", "int3");
    c = config_here();
    c.device = "tpu";
    expect_refused(&c, ERR_INVALID, "unknown device", "tpu");
    c = config_here();
    c.load_format = "pickle";
    expect_refused(&c, ERR_INVALID, "--load-format", "pickle");
}

static void test_memory_that_does_not_fit(void **state)
{
    (void)state;
    weights_write(NULL, 0, 0);
    struct worker_config c = config_here();
    c.context_max = 256;
    c.block_size = 16;
    c.kv_cache_bytes = 100 << 10; /* a token takes 512 bytes: 200 of them fit */
    expect_refused(&c, ERR_NO_MEMORY, "one sequence of 256 tokens",
                   "what would fit: --max-model-len 191");
    c.context_max = 191;
    struct worker_info info;
    assert_int_equal(worker_plan_memory(&c, &info), OK);
    assert_int_equal(info.n_blocks, 12);
    assert_int_equal(info.context_max, 191);
    assert_int_equal(info.n_parameters, 94528);
    assert_int_equal(info.block_bytes, 16 * 512);
    struct worker *w;
    assert_int_equal(worker_create(&c, &w), OK);
    worker_info(w, &info);
    assert_true(info.weight_bytes >= (94528 - 512 * 64) * 4);
    assert_int_equal(strlen(info.model_digest), 32);
    worker_destroy(w);
}

static void test_digest_tells_models_apart(void **state)
{
    (void)state;
    char first[33];
    struct worker_info info;
    struct worker *w;
    weights_write(NULL, 0, 0);
    struct worker_config c = config_here();
    assert_int_equal(worker_create(&c, &w), OK);
    worker_info(w, &info);
    snprintf(first, sizeof first, "%s", info.model_digest);
    worker_destroy(w);
    c.quantization = "int8";
    assert_int_equal(worker_create(&c, &w), OK);
    worker_info(w, &info);
    assert_string_not_equal(first, info.model_digest);
    assert_string_equal(info.weight_format, "int8");
    worker_destroy(w);
}

static void test_dummy_weights(void **state)
{
    (void)state;
    struct worker_config c = config_here();
    c.load_format = "dummy";
    c.dummy_seed = 5;
    int32_t one = greedy_first(&c, 1);
    assert_int_equal(greedy_first(&c, 1), one);
    assert_int_equal(greedy_first(&c, 2), one);
    c.dummy_seed = 6;
    struct worker *w;
    assert_int_equal(worker_create(&c, &w), OK);
    worker_destroy(w);
}

static void test_every_allocation_may_fail(void **state)
{
    (void)state;
    weights_write(NULL, 0, 0);
    struct worker_config c = config_here();
    int64_t live = mem_live(), n_failed = 0;
    for (int64_t n = 1;; n++) {
        struct worker *w = NULL;
        mem_fail_at(n);
        enum err e = worker_create(&c, &w);
        mem_fail_at(0);
        if (!e) worker_destroy(w);
        assert_int_equal(mem_live(), live);
        if (!e) break;
        n_failed++;
        assert_true(n < 1000);
    }
    assert_true(n_failed > 50);
}

static void test_ranks_from_the_launcher(void **state)
{
    (void)state;
    static const char *const names[] = {"OMPI_COMM_WORLD_RANK",
                                        "OMPI_COMM_WORLD_SIZE",
                                        "PMI_RANK",
                                        "PMI_SIZE",
                                        "LWS_WORKER_INDEX",
                                        "LWS_GROUP_SIZE",
                                        "SLURM_PROCID",
                                        "SLURM_NTASKS",
                                        "PMIX_RANK",
                                        "PMIX_SIZE"};
    struct worker_config c;
    for (int i = 0; i < 10; i++)
        unsetenv(names[i]);
    worker_config_default(&c);
    assert_int_equal(worker_rank_find(&c), OK);
    assert_true(c.rank == 0 && c.size == 1 && c.replica == 0);
    setenv("LWS_WORKER_INDEX", "2", 1);
    setenv("LWS_GROUP_SIZE", "4", 1);
    worker_config_default(&c);
    assert_int_equal(worker_rank_find(&c), OK);
    assert_true(c.rank == 2 && c.size == 4);
    setenv("OMPI_COMM_WORLD_RANK", "5", 1);
    setenv("OMPI_COMM_WORLD_SIZE", "6", 1);
    worker_config_default(&c);
    c.size = 2;
    assert_int_equal(worker_rank_find(&c), OK);
    assert_true(c.rank == 1 && c.size == 2 && c.replica == 2 && c.device_index == 1);
    setenv("OMPI_COMM_WORLD_LOCAL_RANK", "3", 1);
    worker_config_default(&c);
    c.size = 2;
    assert_int_equal(worker_rank_find(&c), OK);
    assert_int_equal(c.device_index, 3); /* its place among the ranks of the host */
    unsetenv("OMPI_COMM_WORLD_LOCAL_RANK");
    worker_config_default(&c);
    c.rank = 3, c.size = 3;
    assert_int_equal(worker_rank_find(&c), ERR_INVALID);
    setenv("OMPI_COMM_WORLD_RANK", "five", 1);
    worker_config_default(&c);
    assert_int_equal(worker_rank_find(&c), ERR_INVALID);
    assert_non_null(strstr(err_detail(), "OMPI_COMM_WORLD_RANK"));
    for (int i = 0; i < 10; i++)
        unsetenv(names[i]);
}

#define CASE(test) cmocka_unit_test_setup_teardown(test, setup, teardown)
int main(void)
{
    const struct CMUnitTest tests[] = {
        CASE(test_legal_dresses),
        CASE(test_strangers_are_named),
        CASE(test_damage_is_named),
        CASE(test_a_bias_nobody_asked_for),
        CASE(test_config_faults),
        CASE(test_memory_that_does_not_fit),
        CASE(test_digest_tells_models_apart),
        CASE(test_dummy_weights),
        CASE(test_every_allocation_may_fail),
        CASE(test_ranks_from_the_launcher),
    };
    log_set_level(LOG_ERROR);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
