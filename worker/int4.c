/* Finds and checks the tensors of codes, and reads codes, zero points and scales out of them.
 *
 *   GPTQ               qweight I32 [in / 8][out], input i in bits 4 (i % 8) of its word;
 *                      qzeros I32 [groups][out / 8], likewise by output; scales [groups][out];
 *                      g_idx I32 [in], the group of each input
 *   AWQ                qweight I32 [in][out / 8], qzeros I32 [groups][out / 8]: the eight outputs
 *                      of a word lie in the order 0 2 4 6 1 3 5 7 from its lowest bits on; scales
 *                      [groups][out]
 *   compressed-tensors weight_packed I32 [out][in / 8], weight_scale [out][groups],
 *                      weight_zero_point I32 [out / 8][groups], weight_g_idx I32 [in],
 *                      weight_shape I64 [2]; codes and zero points are stored plus 8 */
#include "worker/int4.h"
#include "base/mem.h"
#include "kernels/half.h"

#include <math.h>
#include <string.h>

enum { NIBBLES = 8 }; /* of a word */

/* Where in a word AWQ keeps the output with this remainder. */
static const uint8_t awq_place[NIBBLES] = {0, 4, 1, 5, 2, 6, 3, 7};

static uint32_t word_at(const struct st_tensor *t, int64_t i)
{
    uint32_t word; /* data of a file may lie at any byte */
    memcpy(&word, (const char *)t->data + (size_t)i * 4, 4);
    return word;
}

static uint8_t nibble_at(uint32_t word, int64_t place)
{
    return (uint8_t)(word >> 4 * place & 15);
}

/* --- finding --- */

static bool is_compressed(const struct source *s)
{
    return s->config->quant.method == QUANT_COMPRESSED;
}

bool int4_has(const struct source *s, enum role role, int layer)
{
    char name[SOURCE_NAME_MAX];
    if (!s->file || s->config->quant.method == QUANT_NONE) return false;
    source_name(s, role, layer, is_compressed(s) ? ".weight_packed" : ".qweight", name);
    return safetensors_find(s->file, name) != NULL;
}

static enum err part_get(struct source *s, enum role role, int layer, const char *suffix,
                         enum st_dtype dtype, int n_dims, int64_t rows, int64_t columns,
                         const struct st_tensor **out)
{
    char name[SOURCE_NAME_MAX];
    const struct st_tensor *t;
    int64_t shape[2] = {rows, columns};
    source_name(s, role, layer, suffix, name);
    TRY(source_tensor(s, name, n_dims, shape, &t));
    if (t->dtype != dtype)
        FAIL(ERR_FORMAT, "%s: tensor '%s' is stored as %s, not %s",
             safetensors_file(s->file, t->file_index), name, st_dtype_name(t->dtype),
             st_dtype_name(dtype));
    *out = t;
    return OK;
}

static bool part_there(const struct source *s, enum role role, int layer, const char *suffix)
{
    char name[SOURCE_NAME_MAX];
    source_name(s, role, layer, suffix, name);
    return safetensors_find(s->file, name) != NULL;
}

/* Scales come in any float type; whether f16 holds them all, and that all are numbers. */
static enum err scales_get(struct source *s, enum role role, int layer, struct int4_tensors *t)
{
    bool by_output = t->method == QUANT_COMPRESSED;
    int64_t n = t->n_out * t->n_groups;
    const int64_t shape[2] = {by_output ? t->n_out : t->n_groups,
                              by_output ? t->n_groups : t->n_out};
    char name[SOURCE_NAME_MAX];
    enum dtype dtype;
    source_name(s, role, layer, by_output ? ".weight_scale" : ".scales", name);
    TRY(source_tensor(s, name, 2, shape, &t->scales));
    TRY(source_dtype(s, t->scales, &dtype));
    t->exact = true;
    for (int64_t i = 0; i < n; i++) {
        float v = source_element(t->scales->data, dtype, i);
        if (!isfinite(v))
            FAIL(ERR_FORMAT, "%s: tensor '%s' holds %g at element %lld",
                 safetensors_file(s->file, t->scales->file_index), name, (double)v, (long long)i);
        if (dtype != DTYPE_F16 && f16_to_float(f16_from_float(v)) != v) t->exact = false;
    }
    return OK;
}

static enum err order_get(struct source *s, enum role role, int layer, struct int4_tensors *t)
{
    const char *suffix = t->method == QUANT_COMPRESSED ? ".weight_g_idx" : ".g_idx";
    t->order = NULL;
    if (t->method == QUANT_AWQ || !part_there(s, role, layer, suffix)) {
        if (t->method != QUANT_AWQ && s->config->quant.act_order)
            FAIL(ERR_FORMAT, "%s: layer %d of '%s' has no '%s', but config.json says desc_act",
                 safetensors_file(s->file, t->codes->file_index), layer, roles[role].name,
                 suffix + 1);
        return OK;
    }
    TRY(part_get(s, role, layer, suffix, ST_I32, 1, t->n_in, 0, &t->order));
    bool in_order = true;
    for (int64_t i = 0; i < t->n_in; i++) {
        int32_t g = (int32_t)word_at(t->order, i);
        if (g < 0 || g >= t->n_groups)
            FAIL(ERR_FORMAT, "%s: tensor '%s' puts input %lld into group %d of %lld",
                 safetensors_file(s->file, t->order->file_index), t->order->name, (long long)i, g,
                 (long long)t->n_groups);
        in_order = in_order && g == i / t->group_size;
    }
    if (in_order) t->order = NULL;
    return OK;
}

static enum err zeros_get(struct source *s, enum role role, int layer, struct int4_tensors *t)
{
    int64_t words = t->n_out / NIBBLES;
    t->zeros = NULL;
    if (t->method != QUANT_COMPRESSED)
        TRY(part_get(s, role, layer, ".qzeros", ST_I32, 2, t->n_groups, words, &t->zeros));
    else if (!s->config->quant.symmetric)
        TRY(part_get(s, role, layer, ".weight_zero_point", ST_I32, 2, words, t->n_groups,
                     &t->zeros));
    return OK;
}

static enum err codes_get(struct source *s, enum role role, int layer, struct int4_tensors *t)
{
    int64_t in = t->n_in / NIBBLES, out = t->n_out / NIBBLES;
    if (t->method == QUANT_GPTQ)
        return part_get(s, role, layer, ".qweight", ST_I32, 2, in, t->n_out, &t->codes);
    if (t->method == QUANT_AWQ)
        return part_get(s, role, layer, ".qweight", ST_I32, 2, t->n_in, out, &t->codes);
    const struct st_tensor *shape;
    int64_t said[2];
    TRY(part_get(s, role, layer, ".weight_packed", ST_I32, 2, t->n_out, in, &t->codes));
    if (!part_there(s, role, layer, ".weight_shape")) return OK;
    TRY(part_get(s, role, layer, ".weight_shape", ST_I64, 1, 2, 0, &shape));
    memcpy(said, shape->data, sizeof said);
    if (said[0] != t->n_out || said[1] != t->n_in)
        FAIL(ERR_FORMAT, "%s: tensor '%s' says %lld x %lld, but config.json asks for %lld x %lld",
             safetensors_file(s->file, shape->file_index), shape->name, (long long)said[0],
             (long long)said[1], (long long)t->n_out, (long long)t->n_in);
    return OK;
}

enum err int4_find(struct source *s, enum role role, int layer, struct int4_tensors *out)
{
    const struct quant_config *q = &s->config->quant;
    char name[SOURCE_NAME_MAX];
    struct int4_tensors t = {.method = q->method,
                             .n_out = config_dim(s->config, roles[role].rows),
                             .n_in = config_dim(s->config, roles[role].columns)};
    source_name(s, role, layer, "", name);
    t.zero_less_one = q->zero_less_one;
    t.symmetric = q->symmetric;
    t.group_size = q->group_size ? q->group_size : t.n_in;
    if (t.n_out % NIBBLES || t.n_in % NIBBLES)
        FAIL(ERR_UNSUPPORTED, "%s: '%s' has %lld x %lld weights; 4-bit codes come by eights",
             s->config->path, name, (long long)t.n_out, (long long)t.n_in);
    if (t.n_in % t.group_size)
        FAIL(ERR_FORMAT, "%s: the %lld inputs of '%s' are no multiple of 'group_size' %lld",
             s->config->path, (long long)t.n_in, name, (long long)t.group_size);
    t.n_groups = t.n_in / t.group_size;
    TRY(codes_get(s, role, layer, &t));
    TRY(scales_get(s, role, layer, &t));
    TRY(zeros_get(s, role, layer, &t));
    TRY(order_get(s, role, layer, &t));
    *out = t;
    return OK;
}

/* --- reading --- */

int32_t int4_group(const struct int4_tensors *t, int64_t in)
{
    return t->order ? (int32_t)word_at(t->order, in) : (int32_t)(in / t->group_size);
}

uint8_t int4_zero(const struct int4_tensors *t, int64_t out, int64_t group)
{
    int64_t words = t->n_out / NIBBLES, at = out / NIBBLES, place = out % NIBBLES;
    if (!t->zeros) return 8;
    if (t->method == QUANT_COMPRESSED)
        return nibble_at(word_at(t->zeros, at * t->n_groups + group), place);
    if (t->method == QUANT_AWQ) place = awq_place[place];
    uint8_t zero = nibble_at(word_at(t->zeros, group * words + at), place);
    return t->method == QUANT_GPTQ && t->zero_less_one ? (uint8_t)((zero + 1) & 15) : zero;
}

float int4_scale(const struct int4_tensors *t, int64_t out, int64_t group)
{
    enum dtype dtype = t->scales->dtype == ST_F32   ? DTYPE_F32
                       : t->scales->dtype == ST_F16 ? DTYPE_F16
                                                    : DTYPE_BF16;
    bool by_output = t->method == QUANT_COMPRESSED;
    return source_element(t->scales->data, dtype,
                          by_output ? out * t->n_groups + group : group * t->n_out + out);
}

/* Outputs [first, first + n) of an input whose codes begin at code `row`: whole words where it can.
 */
static void awq_codes(const struct int4_tensors *t, int64_t row, int64_t first, int64_t n,
                      uint8_t *out)
{
    for (int64_t o = 0; o < n;) {
        int64_t at = (row + first + o) / NIBBLES, place = (first + o) % NIBBLES;
        uint32_t word = word_at(t->codes, at);
        if (place == 0 && o + NIBBLES <= n) {
            for (int k = 0; k < NIBBLES; k++)
                out[o + k] = nibble_at(word, awq_place[k]);
            o += NIBBLES;
        } else {
            out[o++] = nibble_at(word, awq_place[place]);
        }
    }
}

bool int4_words(const struct int4_tensors *t, int64_t in, int64_t out, int n, uint8_t *codes)
{
    int64_t word = in / NIBBLES, columns = t->n_in / NIBBLES;
    if (t->method == QUANT_AWQ || in % NIBBLES) return false;
    for (int k = 0; k < n / NIBBLES; k++) {
        uint32_t v = word_at(t->codes, t->method == QUANT_GPTQ ? (word + k) * t->n_out + out
                                                               : out * columns + word + k);
        for (int i = 0; i < 4; i++)
            codes[4 * k + i] = (uint8_t)(v >> 8 * i);
    }
    return true;
}

void int4_codes(const struct int4_tensors *t, int64_t in, int64_t first, int64_t n, uint8_t *out)
{
    int64_t word = in / NIBBLES, place = in % NIBBLES;
    if (t->method == QUANT_GPTQ) {
        for (int64_t o = 0; o < n; o++)
            out[o] = nibble_at(word_at(t->codes, word * t->n_out + first + o), place);
    } else if (t->method == QUANT_AWQ) {
        awq_codes(t, in * t->n_out, first, n, out);
    } else {
        for (int64_t o = 0; o < n; o++)
            out[o] = nibble_at(word_at(t->codes, (first + o) * (t->n_in / NIBBLES) + word), place);
    }
}

void int4_row(const struct int4_tensors *t, int64_t row, int64_t first, int64_t n, float *out)
{
    for (int64_t i = 0; i < n; i++) {
        int32_t group = int4_group(t, first + i);
        uint8_t code;
        int4_codes(t, first + i, row, 1, &code);
        out[i] = (float)(code - int4_zero(t, row, group)) * int4_scale(t, row, group);
    }
}
