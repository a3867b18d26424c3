/* Any checkpoint -> a directory of packed weights that a rank loads without packing. */
#pragma once
#include "base/err.h"
#include <stdbool.h>
#include <stdint.h>

struct quantize_config {
    const char *model_dir, *out_dir;
    const char *format, *head_format; /* "int8" or "int4"; head_format NULL or "auto" = int8 */
    int n_threads;                    /* 0 = all cores */
    bool dummy; /* weights from the seed; the model's files give shapes only */
    uint64_t seed;
};
struct quantize_report {
    uint64_t bytes_before, bytes_after; /* of weights and tables */
    double seconds;
};
/* Makes out_dir where it is missing and writes config.json, the tokenizer's files and
 * model.safetensors, the latter last and under its name only when it is whole. ERR_INVALID: an
 * out_dir that holds weights already, or is the model's own. */
enum err model_quantize(const struct quantize_config *config, struct quantize_report *out);
