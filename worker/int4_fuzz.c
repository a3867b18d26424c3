/* Whatever bytes a file of 4-bit codes holds, finding its matrices and taking them apart ends well
 * or with a reason. */
#include "base/mem.h"
#include "worker/int4.h"

#include <stdint.h>
#include <stdio.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { SIDE_MAX = 32 };

/* A model of one tiny layer, quantized in one of the ways; the first byte says which. */
static bool config_make(uint8_t kind, struct model_config *out)
{
    static const char *const methods[] = {
        "\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":32,\"sym\":false",
        "\"quant_method\":\"gptq\",\"bits\":4,\"group_size\":-1,\"sym\":true,\"desc_act\":true,"
        "\"checkpoint_format\":\"gptq_v2\"",
        "\"quant_method\":\"awq\",\"bits\":4,\"group_size\":32",
        "\"quant_method\":\"compressed-tensors\",\"format\":\"pack-quantized\",\"config_groups\":{"
        "\"a\":{\"weights\":{\"num_bits\":4,\"symmetric\":false,\"group_size\":32}}}"};
    char text[1024];
    int n = snprintf(text, sizeof text,
                     "{\"architectures\":[\"LlamaForCausalLM\"],\"hidden_size\":32,"
                     "\"intermediate_size\":8,\"num_hidden_layers\":1,\"num_attention_heads\":2,"
                     "\"vocab_size\":8,\"max_position_embeddings\":8,\"quantization_config\":{%s}}",
                     methods[kind % 4]);
    return config_parse("fuzz", text, (size_t)n, out) == OK;
}

static void matrix_read(struct source *s, enum role role)
{
    struct int4_part part = {.first = 0};
    struct int4_stack stack;
    float row[SIDE_MAX];
    bool same;
    if (!int4_has(s, role, 0)) return;
    if (int4_find(s, role, 0, &part.of)) {
        ASSERT(*err_detail());
        return;
    }
    part.n = part.of.n_out;
    for (int64_t r = 0; r < part.n; r++)
        int4_row(&part.of, r, 0, part.of.n_in, row);
    for (int64_t first = 0; first < part.of.n_in; first += 7)
        if (!int4_stack(&part, 1, first, part.of.n_in - first, 1, &same, &stack))
            int4_stack_fini(&stack);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct model_config config;
    struct safetensors *file;
    struct source source;
    if (!size || !config_make(data[0], &config)) return 0;
    if (safetensors_open_bytes("fuzz", data + 1, size - 1, &file)) return 0;
    if (!source_init(&source, &config, file, 0))
        for (int role = 0; role < ROLE_COUNT; role++)
            if (config.arch->names[role]) matrix_read(&source, (enum role)role);
    source_fini(&source);
    safetensors_close(file);
    return 0;
}
