/* See model_info.h. */
#include "coordinator/front/model_info.h"
#include "base/json.h"

#include <stdio.h>
#include <unistd.h>

enum { FILE_BYTES_MAX = 4 << 20 };

/* NULL without an error when there is no such file. */
static enum err file_read(const char *dir, const char *name, json_t **out)
{
    char path[4200];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    *out = NULL;
    if (access(path, F_OK)) return OK;
    TRY(json_parse_file(path, FILE_BYTES_MAX, out));
    if (json_is_object(*out)) return OK;
    json_decref(*out);
    *out = NULL;
    FAIL(ERR_FORMAT, "%s: not a JSON object", path);
}

static uint32_t positive(const json_t *object, const char *key)
{
    json_int_t i = json_integer_value(json_object_get(object, key));
    return i > 0 && i <= INT32_MAX ? (uint32_t)i : 0;
}

static void config_take(const json_t *config, struct model_info *info)
{
    static const char *const lengths[] = {"max_position_embeddings", "n_positions", "n_ctx",
                                          "max_sequence_length", "seq_length"};
    const json_t *text = json_object_get(config, "text_config");
    if (json_is_object(text)) config = text;
    info->vocab_size = positive(config, "vocab_size");
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths && !info->context_max; i++)
        info->context_max = positive(config, lengths[i]);
}

static enum err number(const json_t *o, const char *key, double min, double max, float *out)
{
    double d = *out;
    TRY(json_read_number(o, key, min, max, &d));
    *out = (float)d;
    return OK;
}

static enum err generation_take(const json_t *o, struct model_info *info)
{
    struct sampling_params *p = &info->defaults.sampling;
    int64_t top_k = 0;
    TRY(number(o, "temperature", 0, 100, &p->temperature));
    TRY(number(o, "top_p", 0, 1, &p->top_p));
    TRY(number(o, "min_p", 0, 1, &p->min_p));
    TRY(number(o, "repetition_penalty", 0.01, 100, &p->repetition_penalty));
    TRY(json_read_int(o, "top_k", -1, INT32_MAX, &top_k));
    p->top_k = top_k > 0 ? (int32_t)top_k : 0;
    if (p->top_p <= 0) p->top_p = 1;
    return json_read_int(o, "max_new_tokens", 1, INT32_MAX, &info->defaults.max_tokens);
}

enum err model_info_read(const char *model_dir, bool generation_config, struct model_info *out)
{
    struct model_info info = {0};
    json_t *file = NULL;
    info.defaults.sampling = (struct sampling_params){.temperature = 1,
                                                      .top_p = 1,
                                                      .repetition_penalty = 1,
                                                      .n_logprobs = -1,
                                                      .n_prompt_logprobs = -1};
    TRY(file_read(model_dir, "config.json", &file));
    if (file) config_take(file, &info);
    json_decref(file);
    enum err e = OK;
    if (generation_config) {
        TRY(file_read(model_dir, "generation_config.json", &file));
        if (file) e = generation_take(file, &info);
        json_decref(file);
    }
    if (e) {
        char why[512];
        snprintf(why, sizeof why, "%s", err_detail());
        FAIL(ERR_FORMAT, "%s/generation_config.json: %s (--generation-config none ignores it)",
             model_dir, why);
    }
    *out = info;
    return OK;
}
