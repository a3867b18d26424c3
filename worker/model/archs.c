/* The list of architectures and the table of roles. */
#include "worker/model/arch.h"

const struct role_row roles[ROLE_COUNT] = {
#define X(role, shard, rows, columns, bias) [ROLE_##role] = {#role, shard, rows, columns, bias},
    ROLE_TABLE(X)
#undef X
};

const char *const arch_prefixes_model[] = {"model.", "", NULL};

const struct arch *const archs[] = {
    &arch_llama, &arch_mistral, &arch_qwen2,     &arch_qwen3, &arch_gpt2,
    &arch_opt,   &arch_mixtral, &arch_qwen3_moe, NULL,
};
