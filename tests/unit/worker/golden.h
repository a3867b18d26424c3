/* The goldens of tests/golden as structs: prompts, the logits that transformers computes, the
 * greedy tokens after them, and how wide the gap to the second best was. */
#pragma once
#include "base/json.h"
#include "base/mem.h"
#include "base/safetensors.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GOLDEN_PROMPTS_MAX = 8, GOLDEN_TOKENS_MAX = 256 };
struct golden_prompt {
    int n_ids, n_positions, n_greedy;
    int32_t ids[GOLDEN_TOKENS_MAX], greedy[GOLDEN_TOKENS_MAX];
    int positions[GOLDEN_TOKENS_MAX];
    double gaps[GOLDEN_TOKENS_MAX];
    const float *logits; /* [n_positions][vocab_size] */
};
struct golden {
    char dir[512];
    int vocab_size, n_prompts;
    bool bf16;      /* how the checkpoint is stored */
    bool quantized; /* its matrices are 4-bit codes */
    struct golden_prompt prompts[GOLDEN_PROMPTS_MAX];
    json_t *json;
    struct safetensors *tensors;
};

static inline int golden_ints(const json_t *array, int32_t *out)
{
    int n = (int)json_array_size(array);
    if (n > GOLDEN_TOKENS_MAX) abort();
    for (int i = 0; i < n; i++)
        out[i] = (int32_t)json_integer_value(json_array_get(array, (size_t)i));
    return n;
}

static inline void golden_open(const char *name, struct golden *g)
{
    char path[600];
    const char *source = getenv("HEDDLE_SOURCE_DIR");
    memset(g, 0, sizeof *g);
    if (*name == '/') snprintf(g->dir, sizeof g->dir, "%s", name);
    else snprintf(g->dir, sizeof g->dir, "%s/tests/golden/%s", source ? source : ".", name);
    snprintf(path, sizeof path, "%s/golden.json", g->dir);
    if (json_parse_file(path, 1 << 24, &g->json)) {
        fprintf(stderr, "%s\n", err_detail());
        abort();
    }
    snprintf(path, sizeof path, "%s/golden.safetensors", g->dir);
    if (safetensors_open(path, &g->tensors)) {
        fprintf(stderr, "%s\n", err_detail());
        abort();
    }
    g->vocab_size = (int)json_integer_value(json_object_get(g->json, "vocab_size"));
    g->bf16 = !strcmp(json_string_value(json_object_get(g->json, "stored_dtype")), "bfloat16");
    g->quantized = json_object_get(g->json, "weights") != NULL;
    const json_t *prompts = json_object_get(g->json, "prompts");
    g->n_prompts = (int)json_array_size(prompts);
    if (g->n_prompts < 1 || g->n_prompts > GOLDEN_PROMPTS_MAX) abort();
    for (int i = 0; i < g->n_prompts; i++) {
        const json_t *p = json_array_get(prompts, (size_t)i), *gaps = json_object_get(p, "gaps");
        struct golden_prompt *out = &g->prompts[i];
        int32_t positions[GOLDEN_TOKENS_MAX];
        out->n_ids = golden_ints(json_object_get(p, "ids"), out->ids);
        out->n_greedy = golden_ints(json_object_get(p, "greedy"), out->greedy);
        out->n_positions = golden_ints(json_object_get(p, "positions"), positions);
        for (int k = 0; k < out->n_positions; k++)
            out->positions[k] = positions[k];
        for (int k = 0; k < out->n_greedy; k++)
            out->gaps[k] = json_number_value(json_array_get(gaps, (size_t)k));
        const struct st_tensor *t =
            safetensors_find(g->tensors, json_string_value(json_object_get(p, "logits")));
        if (!t || t->shape[0] != out->n_positions || t->shape[1] != g->vocab_size) abort();
        out->logits = t->data;
    }
}

static inline void golden_close(struct golden *g)
{
    safetensors_close(g->tensors);
    json_decref(g->json);
}
