/* "quantization_config" of config.json: GPTQ, AWQ and compressed-tensors as the few facts that
 * reading their tensors needs. What these programs can write and this one cannot read is refused by
 * name. */
#include "worker/model/config.h"

#include <ctype.h>
#include <string.h>

enum { GROUP_SIZE_MAX = 1 << 20 };

static bool same_word(const char *a, const char *b)
{
    for (; *a && *b; a++, b++)
        if (tolower((unsigned char)*a) != tolower((unsigned char)*b)) return false;
    return *a == *b;
}

static enum err bits_check(const char *method, int64_t bits)
{
    if (!bits) FAIL(ERR_INVALID, "'quantization_config' of '%s' does not say the bits", method);
    if (bits != 4)
        FAIL(ERR_UNSUPPORTED, "weights quantized by '%s' to %lld bits are not supported, only 4",
             method, (long long)bits);
    return OK;
}

/* -1: an output's inputs are one group, which is 0 here. */
static enum err group_read(const json_t *json, const char *key, struct quant_config *q)
{
    int64_t size = 128;
    TRY(json_read_int(json, key, -1, GROUP_SIZE_MAX, &size));
    if (size == 0) FAIL(ERR_INVALID, "'%s' is 0", key);
    if (size > 0 && size % 32)
        FAIL(ERR_UNSUPPORTED, "'%s' %lld is not supported: multiples of 32 and -1 are", key,
             (long long)size);
    q->group_size = size < 0 ? 0 : (int)size;
    return OK;
}

/* "dynamic": patterns of modules with settings of their own. Those that are left as they were
 * ("-:...") show in the file. */
static enum err dynamic_check(const json_t *json)
{
    const json_t *dynamic = json_object_get(json, "dynamic"), *settings;
    const char *pattern;
    if (!json_is_object(dynamic)) return OK;
    json_object_foreach((json_t *)dynamic, pattern, settings)
    {
        static const char *const keys[] = {"bits", "group_size", "sym", "format"};
        if (!strncmp(pattern, "-:", 2)) continue;
        for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
            if (json_object_get(settings, keys[i]))
                FAIL(ERR_UNSUPPORTED,
                     "'dynamic' changes '%s' of '%.64s': one setting for all "
                     "quantized modules is supported",
                     keys[i], pattern);
    }
    return OK;
}

static enum err gptq_read(const json_t *json, struct quant_config *q)
{
    const char *format = NULL, *packing = NULL;
    int64_t bits = 0;
    bool act_order = false, marlin = false, symmetric = true;
    q->method = QUANT_GPTQ;
    TRY(json_read_int(json, "bits", 1, 64, &bits));
    TRY(bits_check("gptq", bits));
    TRY(group_read(json, "group_size", q));
    TRY(json_read_bool(json, "sym", &symmetric));
    TRY(json_read_bool(json, "desc_act", &act_order));
    TRY(json_read_bool(json, "is_marlin_format", &marlin));
    TRY(json_read_string(json, "checkpoint_format", &format));
    if (!format) TRY(json_read_string(json, "format", &format));
    TRY(json_read_string(json, "pack_dtype", &packing));
    if (marlin || (format && !same_word(format, "gptq") && !same_word(format, "gptq_v2")))
        FAIL(ERR_UNSUPPORTED,
             "'checkpoint_format' '%.32s' is not supported: 'gptq' and 'gptq_v2' are",
             marlin ? "marlin" : format);
    if (packing && !same_word(packing, "int32"))
        FAIL(ERR_UNSUPPORTED, "'pack_dtype' '%.32s' is not supported: 'int32' is", packing);
    q->zero_less_one = !format || same_word(format, "gptq");
    q->symmetric = symmetric;
    q->act_order = act_order;
    return dynamic_check(json);
}

static enum err awq_read(const json_t *json, struct quant_config *q)
{
    const char *version = "gemm";
    int64_t bits = 0;
    bool zero_point = true;
    q->method = QUANT_AWQ;
    TRY(json_read_int(json, "w_bit", 1, 64, &bits));
    TRY(json_read_int(json, "bits", 1, 64, &bits));
    TRY(bits_check("awq", bits));
    bool long_name = !json_object_get(json, "group_size") && json_object_get(json, "q_group_size");
    TRY(group_read(json, long_name ? "q_group_size" : "group_size", q));
    TRY(json_read_string(json, "version", &version));
    TRY(json_read_bool(json, "zero_point", &zero_point));
    if (!same_word(version, "gemm"))
        FAIL(ERR_UNSUPPORTED, "awq of 'version' '%.32s' is not supported: 'gemm' is", version);
    if (!zero_point) FAIL(ERR_UNSUPPORTED, "awq without 'zero_point' is not supported");
    return OK;
}

/* Settings of one group of modules, to be the same in all groups. */
static enum err scheme_read(const json_t *group, struct quant_config *q)
{
    const json_t *weights = json_object_get(group, "weights"), *order;
    const json_t *inputs = json_object_get(group, "input_activations");
    const char *type = "int", *strategy = "group";
    int64_t bits = 0;
    if (json_is_object(inputs))
        FAIL(ERR_UNSUPPORTED, "compressed-tensors with quantized activations are not supported");
    if (!json_is_object(weights)) FAIL(ERR_INVALID, "'config_groups' without 'weights'");
    TRY(json_read_string(weights, "type", &type));
    TRY(json_read_string(weights, "strategy", &strategy));
    TRY(json_read_int(weights, "num_bits", 1, 64, &bits));
    if (strcmp(type, "int"))
        FAIL(ERR_UNSUPPORTED, "compressed-tensors of type '%.16s' are not supported", type);
    TRY(bits_check("compressed-tensors", bits));
    q->symmetric = true;
    TRY(json_read_bool(weights, "symmetric", &q->symmetric));
    q->group_size = 0;
    if (!strcmp(strategy, "group"))
        TRY(group_read(weights, "group_size", q));
    else if (strcmp(strategy, "channel"))
        FAIL(ERR_UNSUPPORTED, "compressed-tensors of 'strategy' '%.16s' are not supported",
             strategy);
    order = json_object_get(weights, "actorder");
    q->act_order = json_is_string(order) && !strcmp(json_string_value(order), "group");
    return OK;
}

static enum err compressed_read(const json_t *json, struct quant_config *q)
{
    const json_t *groups = json_object_get(json, "config_groups"), *group;
    const char *format = "", *name;
    bool first = true;
    q->method = QUANT_COMPRESSED;
    TRY(json_read_string(json, "format", &format));
    if (strcmp(format, "pack-quantized"))
        FAIL(ERR_UNSUPPORTED,
             "compressed-tensors of 'format' '%.32s' are not supported: "
             "'pack-quantized' is",
             format);
    if (json_is_object(json_object_get(json, "kv_cache_scheme")))
        FAIL(ERR_UNSUPPORTED, "compressed-tensors with a 'kv_cache_scheme' are not supported");
    if (!json_is_object(groups) || !json_object_size(groups))
        FAIL(ERR_INVALID, "'config_groups' is missing");
    json_object_foreach((json_t *)groups, name, group)
    {
        struct quant_config one = *q;
        TRY(scheme_read(group, &one));
        if (!first && (one.group_size != q->group_size || one.symmetric != q->symmetric))
            FAIL(ERR_UNSUPPORTED, "compressed-tensors of several settings are not supported");
        *q = one;
        first = false;
    }
    return OK;
}

enum err quant_read(const json_t *config, struct quant_config *out)
{
    static const struct {
        const char *name;
        enum err (*read)(const json_t *json, struct quant_config *q);
    } methods[] = {{"gptq", gptq_read}, {"awq", awq_read}, {"compressed-tensors", compressed_read}};
    const json_t *json = json_object_get(config, "quantization_config");
    struct quant_config q = {.method = QUANT_NONE};
    const char *method = NULL;
    *out = q;
    if (!json_is_object(json)) return OK;
    TRY(json_read_string(json, "quant_method", &method));
    for (size_t i = 0; method && i < sizeof methods / sizeof *methods; i++) {
        if (!same_word(method, methods[i].name)) continue;
        TRY(methods[i].read(json, &q));
        *out = q;
        return OK;
    }
    FAIL(ERR_UNSUPPORTED,
         "weights quantized by '%.64s' are not supported; gptq, awq and compressed-tensors are",
         method ? method : "?");
}

const char *quant_name(enum quant_method method)
{
    static const char *const names[] = {
        [QUANT_GPTQ] = "gptq", [QUANT_AWQ] = "awq", [QUANT_COMPRESSED] = "compressed-tensors"};
    return names[method] ? names[method] : "none";
}

double quant_bytes_per_weight(const struct quant_config *q)
{
    int size = q->group_size ? q->group_size : 128;
    int kept = size % 128 == 0 ? 128 : size % 64 == 0 ? 64 : 32;
    bool plain = q->symmetric && !q->act_order && kept == 128;
    return 0.5 + (plain ? 2.0 : 3.0) / kept;
}
