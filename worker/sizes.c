/* What a model's weights amount to before they are loaded: their digest and their bytes. */
#include "base/buf.h"
#include "base/hash.h"
#include "worker/weights.h"

#include <stdio.h>
#include <string.h>

static void digest_words(struct hash128 *h, const char *words)
{
    *h = hash_chain(*h, words, strlen(words));
}

enum err model_digest(const struct weights_options *options, const struct model_config *config,
                      const struct safetensors *file, char out[33])
{
    struct hash128 h = {0, 0};
    struct buf text;
    buf_init(&text, 0);
    enum err e = buf_read_file(&text, config->path, 0);
    if (!e) h = hash_chain(h, buf_string(&text), text.n);
    buf_fini(&text);
    TRY(e);
    for (size_t i = 0; file && i < safetensors_count(file); i++) {
        const struct st_tensor *t = safetensors_at(file, i);
        digest_words(&h, t->name);
        digest_words(&h, st_dtype_name(t->dtype));
        h = hash_chain(h, t->shape, (size_t)t->n_dims * sizeof *t->shape);
    }
    uint64_t rest[3] = {(uint64_t)options->format, (uint64_t)options->head_format,
                        options->dummy ? ~options->seed : 0};
    h = hash_chain(h, rest, sizeof rest);
    snprintf(out, 33, "%016llx%016llx", (unsigned long long)h.high, (unsigned long long)h.low);
    return OK;
}

enum dtype weights_dtype(const struct model_config *config, const struct safetensors *file)
{
    for (size_t i = 0; file && i < safetensors_count(file); i++) {
        enum st_dtype t = safetensors_at(file, i)->dtype;
        if (t == ST_F32 || t == ST_F16 || t == ST_BF16)
            return t == ST_F32 ? DTYPE_F32 : t == ST_F16 ? DTYPE_F16 : DTYPE_BF16;
    }
    return config->dtype;
}

static double bytes_per_weight(enum weight_format format, enum dtype file_dtype)
{
    switch (format) {
    case WEIGHT_F32:
        return 4;
    case WEIGHT_F16:
    case WEIGHT_BF16:
        return 2;
    case WEIGHT_INT8:
    case WEIGHT_FP8:
        return 1.01;
    case WEIGHT_INT4:
        return 0.52;
    default:
        return (double)dtype_bytes(file_dtype);
    }
}

void model_bytes_estimate(const struct model_config *config, struct group group,
                          const struct weights_options *options, enum dtype file_dtype,
                          uint64_t *out_weights, uint64_t *out_tables)
{
    struct shard_heads heads =
        shard_heads(config->n_heads, config->n_kv_heads, group.rank, group.size);
    int64_t q = shard_count(heads.q) * config->head_dim,
            kv = shard_count(heads.kv) * config->head_dim;
    int64_t ffn = shard_count(shard_rounded(config->ffn, 128, group.rank, group.size));
    int64_t vocab = shard_count(shard_rounded(config->vocab_size, 128, group.rank, group.size));
    int64_t n_experts = config->n_experts ? config->n_experts : 1;
    double layer =
        (double)(q + 2 * kv + q + (config->gated ? 3 : 2) * ffn * n_experts + config->n_experts) *
        config->hidden;
    /* codes of the checkpoint, unless dummy weights stand for them */
    bool codes = config->quant.method && options->format <= WEIGHT_BF16;
    double each = codes ? quant_bytes_per_weight(&config->quant)
                        : bytes_per_weight(options->format, file_dtype);
    double weights = layer * config->n_layers * each;
    weights +=
        (double)vocab * config->embed_dim * bytes_per_weight(options->head_format, file_dtype);
    if (config->embed_dim != config->hidden)
        weights += 2.0 * config->hidden * config->embed_dim *
                   bytes_per_weight(options->head_format, file_dtype);
    weights += 4.0 * (config->n_layers * 4.0 + 2) * config->hidden;
    weights += 4.0 * options->context_max * config->rope.rotary_dim;
    *out_weights = (uint64_t)weights;
    *out_tables = ((uint64_t)config->vocab_size * (uint64_t)config->embed_dim +
                   (uint64_t)config->n_positions * (uint64_t)config->hidden) *
                  dtype_bytes(file_dtype);
}
