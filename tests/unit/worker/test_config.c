/* Goal: config.json is read by every name its fields go by, defaults are those of transformers, and
 * what cannot be computed is refused by name.
 * Method: texts made here; rope tables against the formulas' known points and against op goldens.
 */
#include "worker/model/config.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define QUANT(settings) "{" LLAMA_BASE ",\"quantization_config\":{" settings "}}"
#define LLAMA_BASE                                                                                 \
    "\"architectures\":[\"LlamaForCausalLM\"],\"hidden_size\":64,\"intermediate_size\":96,\"num_"  \
    "hidden_layers\":2,"                                                                           \
    "\"num_attention_heads\":4,\"vocab_size\":100,\"max_position_embeddings\":256"

static struct model_config c;

static enum err parse(const char *text)
{
    return config_parse("dir/config.json", text, strlen(text), &c);
}

static void expect_ok(const char *text)
{
    if (parse(text)) fail_msg("%s: %s", text, err_detail());
}

static void expect_refused(const char *text, enum err e, const char *words)
{
    assert_int_equal(parse(text), e);
    if (!strstr(err_detail(), words)) fail_msg("'%s' does not say '%s'", err_detail(), words);
    if (!strstr(err_detail(), "dir/config.json"))
        fail_msg("'%s' does not name the file", err_detail());
}

static void test_llama_defaults(void **state)
{
    (void)state;
    expect_ok("{" LLAMA_BASE "}");
    assert_ptr_equal(c.arch, &arch_llama);
    assert_int_equal(c.n_kv_heads, 4);
    assert_int_equal(c.head_dim, 16);
    assert_false(c.tied);
    assert_false(c.tied_said);
    assert_false(c.qkv_bias || c.out_bias || c.ffn_bias);
    assert_true(c.norm_epsilon == 1e-6f);
    assert_true(c.rope.type == ROPE_DEFAULT && c.rope.theta == 10000 && c.rope.rotary_dim == 16);
    assert_int_equal(c.dtype, DTYPE_BF16);
    assert_int_equal(config_window(&c), 0);
    expect_ok(
        "{" LLAMA_BASE
        ",\"attention_bias\":true,\"mlp_bias\":true,\"head_dim\":32,\"num_key_value_heads\":2,"
        "\"torch_dtype\":\"float16\",\"tie_word_embeddings\":true}");
    assert_true(c.qkv_bias && c.out_bias && c.ffn_bias && c.tied && c.tied_said);
    assert_int_equal(c.head_dim, 32);
    assert_int_equal(config_dim(&c, DIM_QKV), 4 * 32 + 2 * 2 * 32);
    assert_int_equal(c.dtype, DTYPE_F16);
}

static void test_parameters_of_real_shapes(void **state)
{
    (void)state;
    expect_ok(
        "{\"architectures\":[\"Qwen2ForCausalLM\"],\"hidden_size\":896,\"intermediate_size\":4864,"
        "\"num_hidden_layers\":24,\"num_attention_heads\":14,\"num_key_value_heads\":2,\"vocab_"
        "size\":151936,"
        "\"max_position_embeddings\":32768,\"tie_word_embeddings\":true}");
    assert_int_equal(config_parameters(&c), 494032768);
    expect_ok(
        "{\"architectures\":[\"LlamaForCausalLM\"],\"hidden_size\":2048,\"intermediate_size\":8192,"
        "\"num_hidden_layers\":16,\"num_attention_heads\":32,\"num_key_value_heads\":8,\"vocab_"
        "size\":128256,"
        "\"max_position_embeddings\":131072,\"tie_word_embeddings\":true}");
    assert_int_equal(config_parameters(&c), 1235814400);
    expect_ok(
        "{\"architectures\":[\"GPT2LMHeadModel\"],\"n_embd\":768,\"n_layer\":12,\"n_head\":12,"
        "\"vocab_size\":50257,\"n_positions\":1024}");
    assert_int_equal(config_parameters(&c), 124439808);
    assert_true(c.tied);
    assert_int_equal(c.ffn, 3072);
    expect_ok(
        "{\"architectures\":[\"OPTForCausalLM\"],\"hidden_size\":768,\"num_hidden_layers\":12,"
        "\"num_attention_heads\":12,\"ffn_dim\":3072,\"vocab_size\":50272,\"max_position_"
        "embeddings\":2048}");
    assert_int_equal(config_parameters(&c), 125239296);
    assert_int_equal(c.n_positions, 2050);
}

static void test_windows(void **state)
{
    (void)state;
    static const char mistral[] =
        "{\"architectures\":[\"MistralForCausalLM\"],\"hidden_size\":64,"
        "\"intermediate_size\":96,\"num_hidden_layers\":2,\"num_attention_heads\":4,"
        "\"vocab_size\":100,\"max_position_embeddings\":32768%s}";
    static const char qwen[] =
        "{\"architectures\":[\"Qwen2ForCausalLM\"],\"hidden_size\":64,"
        "\"intermediate_size\":96,\"num_hidden_layers\":4,\"num_attention_heads\":4,"
        "\"vocab_size\":100,\"max_position_embeddings\":32768,\"sliding_window\":128%s}";
    char text[600];
#define WITH(format, more) (snprintf(text, sizeof text, format, more), text)
    expect_ok(WITH(mistral, ""));
    assert_int_equal(config_window(&c), 4096);
    expect_ok(WITH(mistral, ",\"sliding_window\":null"));
    assert_int_equal(config_window(&c), 0);
    expect_ok(WITH(mistral, ",\"sliding_window\":24"));
    assert_int_equal(config_window(&c), 24);
    expect_ok(WITH(qwen, ""));
    assert_int_equal(config_window(&c), 0);
    assert_int_equal(c.layer_window[3], 0);
    expect_ok(WITH(qwen, ",\"use_sliding_window\":true,\"max_window_layers\":2"));
    assert_int_equal(c.layer_window[1], 0);
    assert_int_equal(c.layer_window[2], 128);
    assert_int_equal(config_window(&c), 0);
    expect_ok(WITH(
        qwen,
        ",\"use_sliding_window\":true,\"layer_types\":[\"sliding_attention\",\"full_attention\","
        "\"sliding_attention\",\"sliding_attention\"]"));
    assert_int_equal(c.layer_window[0], 128);
    assert_int_equal(c.layer_window[1], 0);
    expect_refused(
        WITH(
            qwen,
            ",\"use_sliding_window\":true,\"layer_types\":[\"linear_attention\",\"full_attention\","
            "\"full_attention\",\"full_attention\"]"),
        ERR_UNSUPPORTED, "layer type 'linear_attention'");
#undef WITH
}

static void test_refusals(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        enum err e;
        const char *words;
    } cases[] = {
        {"{\"architectures\":[\"MambaForCausalLM\"]}", ERR_UNSUPPORTED,
         "unknown architecture 'MambaForCausalLM'"},
        {"{}", ERR_UNSUPPORTED, "(none named)"},
        {"[]", ERR_FORMAT, "no JSON object"},
        {"{", ERR_FORMAT, "not valid JSON"},
        {"{" LLAMA_BASE ",\"hidden_act\":\"mish\"}", ERR_UNSUPPORTED, "activation 'mish'"},
        {"{" LLAMA_BASE ",\"rope_scaling\":{\"rope_type\":\"longrope\"}}", ERR_UNSUPPORTED,
         "rope type 'longrope'"},
        {"{" LLAMA_BASE ",\"rope_scaling\":{\"type\":\"linear\"}}", ERR_FORMAT, "needs a 'factor'"},
        {"{" LLAMA_BASE ",\"rope_scaling\":3}", ERR_FORMAT, "'rope_scaling' must be an object"},
        {"{" LLAMA_BASE ",\"rope_scaling\":{\"rope_type\":\"llama3\",\"factor\":8.0}}", ERR_FORMAT,
         "llama3 needs"},
        {"{" LLAMA_BASE ",\"num_key_value_heads\":3}", ERR_FORMAT,
         "no multiple of 'num_key_value_heads' 3"},
        {"{" LLAMA_BASE ",\"head_dim\":\"x\"}", ERR_FORMAT, "'head_dim' must be an integer"},
        {"{" LLAMA_BASE ",\"head_dim\":-4}", ERR_FORMAT, "'head_dim' is -4"},
        {QUANT("\"quant_method\":\"bitsandbytes\""), ERR_UNSUPPORTED,
         "quantized by 'bitsandbytes'"},
        {QUANT("\"quant_method\":\"gptq\""), ERR_FORMAT, "does not say the bits"},
        {QUANT("\"quant_method\":\"gptq\",\"bits\":8"), ERR_UNSUPPORTED, "to 8 bits"},
        {QUANT("\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":0"), ERR_FORMAT,
         "'group_size' is 0"},
        {QUANT("\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":-2"), ERR_FORMAT,
         "'group_size' is -2"},
        {QUANT("\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":48"), ERR_UNSUPPORTED,
         "'group_size' 48"},
        {QUANT("\"quant_method\":\"gptq\",\"bits\":4,\"checkpoint_format\":\"marlin\""),
         ERR_UNSUPPORTED, "'marlin'"},
        {QUANT("\"quant_method\":\"gptq\",\"bits\":4,\"dynamic\":{\"+:.*q_proj\":{\"bits\":8}}"),
         ERR_UNSUPPORTED, "'dynamic' changes 'bits'"},
        {QUANT("\"quant_method\":\"awq\",\"bits\":4,\"version\":\"gemv\""), ERR_UNSUPPORTED,
         "'version' 'gemv'"},
        {QUANT("\"quant_method\":\"awq\",\"bits\":4,\"zero_point\":false"), ERR_UNSUPPORTED,
         "without 'zero_point'"},
        {QUANT("\"quant_method\":\"compressed-tensors\",\"format\":\"float-quantized\""),
         ERR_UNSUPPORTED, "'float-quantized'"},
        {QUANT("\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\""), ERR_FORMAT,
         "'config_groups' is missing"},
        {QUANT("\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\","
               "\"config_groups\":{\"a\":{\"weights\":{\"num_bits\":4,\"type\":\"float\"}}}"),
         ERR_UNSUPPORTED, "type 'float'"},
        {QUANT("\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\","
               "\"config_groups\":{\"a\":{\"input_activations\":{},\"weights\":{\"num_bits\":4}}}"),
         ERR_UNSUPPORTED, "quantized activations"},
        {"{\"architectures\":[\"LlamaForCausalLM\"],\"hidden_size\":64}", ERR_FORMAT,
         "'num_hidden_layers' is missing"},
        {"{\"model_type\":\"opt\",\"hidden_size\":64,\"num_hidden_layers\":2,\"num_attention_"
         "heads\":4,\"ffn_dim\":9,"
         "\"vocab_size\":9,\"max_position_embeddings\":9,\"layer_norm_elementwise_affine\":false}",
         ERR_UNSUPPORTED, "layer_norm_elementwise_affine"},
        {"{" LLAMA_BASE ",\"num_hidden_layers\":3}", ERR_FORMAT, "duplicate"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        expect_refused(cases[i].text, cases[i].e, cases[i].words);
    struct model_config out;
    assert_int_not_equal(config_read("/nonexistent", &out), OK);
    assert_non_null(strstr(err_detail(), "/nonexistent/config.json"));
}

static void test_quantized(void **state)
{
    (void)state;
    expect_ok(QUANT("\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":128,\"desc_act\":false,"
                    "\"sym\":true,\"dynamic\":{\"-:.*gate$\":{}}"));
    assert_true(c.quant.method == QUANT_GPTQ && c.quant.group_size == 128 && c.quant.symmetric);
    assert_true(c.quant.zero_less_one && !c.quant.act_order);
    assert_true(fabs(quant_bytes_per_weight(&c.quant) - 0.515625) < 1e-9);
    expect_ok(QUANT("\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":-1,\"desc_act\":true,"
                    "\"sym\":false,\"checkpoint_format\":\"gptq_v2\""));
    assert_true(c.quant.group_size == 0 && !c.quant.symmetric && c.quant.act_order);
    assert_false(c.quant.zero_less_one);
    expect_ok(QUANT("\"quant_method\":\"awq\",\"bits\":4,\"group_size\":64,\"zero_point\":true,"
                    "\"version\":\"GEMM\""));
    assert_true(c.quant.method == QUANT_AWQ && c.quant.group_size == 64 && !c.quant.symmetric);
    expect_ok(
        QUANT("\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\","
              "\"config_groups\":{\"group_0\":{\"input_activations\":null,\"weights\":{"
              "\"num_bits\":4,\"type\":\"int\",\"symmetric\":true,\"strategy\":\"channel\"}}}"));
    assert_true(c.quant.method == QUANT_COMPRESSED && c.quant.group_size == 0 && c.quant.symmetric);
    expect_ok("{" LLAMA_BASE "}");
    assert_true(c.quant.method == QUANT_NONE);
}

static void test_rope_linear_and_llama3(void **state)
{
    (void)state;
    float cosines[300 * 8], sines[300 * 8];
    expect_ok("{" LLAMA_BASE ",\"rope_scaling\":{\"type\":\"linear\",\"factor\":4.0}}");
    config_rope_tables(&c, 0, 9, cosines, sines);
    assert_true(fabs(cosines[8 * 8] - cos(2.0)) < 1e-6);
    assert_true(fabs(sines[8 * 8 + 4] - sin(2.0 / 100)) < 1e-6);
    /* llama3: the shortest wave is kept, the longest divided by the factor */
    expect_ok(
        "{" LLAMA_BASE
        ",\"rope_parameters\":{\"rope_type\":\"llama3\",\"factor\":8.0,\"low_freq_factor\":1.0,"
        "\"high_freq_factor\":4.0,\"original_max_position_embeddings\":64,\"rope_theta\":500000.0}"
        "}");
    assert_true(c.rope.theta == 500000);
    config_rope_tables(&c, 0, 300, cosines, sines);
    assert_true(fabs(sines[1 * 8] - sin(1.0)) < 1e-6);
    assert_true(fabs(sines[299 * 8 + 7] - sin(299 * pow(500000, -14.0 / 16) / 8)) < 1e-6);
}

/* A float32 .npy of two dimensions. */
static float *npy_read(const char *path, size_t n)
{
    FILE *f = fopen(path, "rb");
    unsigned char head[10];
    float *values = test_malloc(n * sizeof *values);
    if (!f) fail_msg("%s is missing", path);
    assert_int_equal(fread(head, 1, 10, f), 10);
    assert_int_equal(fseek(f, 10 + head[8] + 256 * head[9], SEEK_SET), 0);
    assert_int_equal(fread(values, sizeof *values, n, f), n);
    fclose(f);
    return values;
}

/* The recorded caches hold cos for the first half of a row and sin for the second. */
static void rope_golden(const char *folder, const char *config, int n_positions, int half)
{
    const char *root = getenv("HEDDLE_CONFORMANCE");
    char path[512];
    snprintf(path, sizeof path, "%s/op_goldens/%s/cos_sin_cache.npy", root ? root : "", folder);
    if (!root || access(path, R_OK)) {
        print_message("no conformance data: %s\n", path);
        skip();
    }
    float *want = npy_read(path, (size_t)n_positions * (size_t)half * 2);
    float *cosines = test_malloc((size_t)n_positions * (size_t)half * sizeof(float));
    float *sines = test_malloc((size_t)n_positions * (size_t)half * sizeof(float));
    expect_ok(config);
    assert_int_equal(c.rope.rotary_dim, 2 * half);
    config_rope_tables(&c, 0, n_positions, cosines, sines);
    for (int p = 0; p < n_positions; p++) {
        for (int i = 0; i < half; i++) {
            double off_cos = fabs(cosines[p * half + i] - want[p * 2 * half + i]);
            double off_sin = fabs(sines[p * half + i] - want[p * 2 * half + half + i]);
            if (off_cos > 1e-5 || off_sin > 1e-5)
                fail_msg("%s: position %d, frequency %d: off by %g, %g", folder, p, i, off_cos,
                         off_sin);
        }
    }
    test_free(want);
    test_free(cosines);
    test_free(sines);
}

static void test_rope_yarn_golden(void **state)
{
    (void)state;
    rope_golden("long_rope_yarn_neox_f32_truncate",
                "{" LLAMA_BASE
                ",\"partial_rotary_factor\":0.5,\"rope_parameters\":{\"rope_type\":\"yarn\","
                "\"rope_theta\":10000.0,\"factor\":4.0,\"original_max_position_embeddings\":32}}",
                128, 4);
}

static void test_rope_llama3_golden(void **state)
{
    (void)state;
    rope_golden("long_rope_llama3_neox_f32_bands",
                "{" LLAMA_BASE
                ",\"rope_parameters\":{\"rope_type\":\"llama3\",\"rope_theta\":10000.0,"
                "\"factor\":4.0,\"low_freq_factor\":1.0,\"high_freq_factor\":4.0,"
                "\"original_max_position_embeddings\":32}}",
                128, 8);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_llama_defaults),   cmocka_unit_test(test_parameters_of_real_shapes),
        cmocka_unit_test(test_windows),          cmocka_unit_test(test_refusals),
        cmocka_unit_test(test_quantized),        cmocka_unit_test(test_rope_linear_and_llama3),
        cmocka_unit_test(test_rope_yarn_golden), cmocka_unit_test(test_rope_llama3_golden),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
