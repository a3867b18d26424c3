/* Names, sizes and digests of packed weights. */
#include "worker/packed.h"
#include "base/mem.h"
#include "worker/memory.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

static const char *first_file(const struct safetensors *file)
{
    return safetensors_count(file) ? safetensors_file(file, 0) : "model.safetensors";
}

static enum err word_get(const struct safetensors *file, const char *key, const char **out)
{
    const char *word = safetensors_metadata(file, key);
    if (!word) FAIL(ERR_FORMAT, "%s: packed weights, but no '%s'", first_file(file), key);
    *out = word;
    return OK;
}

static enum err format_get(const struct safetensors *file, const char *key, enum weight_format *out)
{
    const char *word;
    TRY(word_get(file, key, &word));
    for (int f = WEIGHT_INT8; f <= WEIGHT_INT4; f++) {
        if (strcmp(word, weight_format_name((enum weight_format)f))) continue;
        *out = (enum weight_format)f;
        return OK;
    }
    FAIL(ERR_FORMAT, "%s: '%s' is '%.32s', but packed weights are int8 or int4", first_file(file),
         key, word);
}

static enum err dtype_get(const struct safetensors *file, enum dtype *out)
{
    const char *word;
    TRY(word_get(file, PACKED_DTYPE_KEY, &word));
    for (int t = DTYPE_F32; t <= DTYPE_BF16; t++) {
        if (strcmp(word, dtype_name((enum dtype)t))) continue;
        *out = (enum dtype)t;
        return OK;
    }
    FAIL(ERR_FORMAT, "%s: '%s' is '%.32s', but checkpoints are f32, f16 or bf16", first_file(file),
         PACKED_DTYPE_KEY, word);
}

enum err packed_read(const struct safetensors *file, bool *out_packed, struct packed_file *out)
{
    struct packed_file p;
    const char *format = safetensors_metadata(file, PACKED_FORMAT_KEY);
    *out_packed = false;
    if (!format) return OK;
    if (strcmp(format, PACKED_FORMAT))
        FAIL(ERR_UNSUPPORTED, "%s: '%s' is '%.32s', this program reads '%s': quantize again",
             first_file(file), PACKED_FORMAT_KEY, format, PACKED_FORMAT);
    TRY(word_get(file, PACKED_LAYOUT_KEY, &p.layout));
    if (strcmp(p.layout, backend_cpu.packed_layout))
        FAIL(ERR_UNSUPPORTED,
             "%s: layout '%.32s' is not '%s', the one this program reads: quantize again",
             first_file(file), p.layout, backend_cpu.packed_layout);
    TRY(format_get(file, PACKED_WEIGHTS_KEY, &p.format));
    TRY(format_get(file, PACKED_HEAD_KEY, &p.head_format));
    TRY(dtype_get(file, &p.dtype));
    *out = p;
    *out_packed = true;
    return OK;
}

void packed_stem(const char *role, int layer, int expert, char out[PACKED_STEM_MAX])
{
    if (layer >= 0 && expert >= 0)
        snprintf(out, PACKED_STEM_MAX, "layers.%d.experts.%d.%s", layer, expert, role);
    else if (layer >= 0)
        snprintf(out, PACKED_STEM_MAX, "layers.%d.%s", layer, role);
    else
        snprintf(out, PACKED_STEM_MAX, "%s", role);
}

static enum err part_find(const struct safetensors *file, const char *stem, const char *end,
                          enum st_dtype dtype, size_t bytes, const struct st_tensor **out)
{
    char name[PACKED_NAME_MAX];
    snprintf(name, sizeof name, "%s.%s", stem, end);
    const struct st_tensor *t = safetensors_find(file, name);
    if (!t) FAIL(ERR_FORMAT, "%s: tensor '%s' is missing", first_file(file), name);
    if (t->dtype != dtype || t->bytes != bytes)
        FAIL(ERR_FORMAT, "%s: tensor '%s' has %zu bytes of %s, but config.json asks for %zu of %s",
             safetensors_file(file, t->file_index), name, t->bytes, st_dtype_name(t->dtype), bytes,
             st_dtype_name(dtype));
    if ((uintptr_t)t->data % sizeof(float) && dtype == ST_F32)
        FAIL(ERR_FORMAT, "%s: tensor '%s' begins off the alignment of its type",
             safetensors_file(file, t->file_index), name);
    *out = t;
    return OK;
}

static enum err digest_read(const struct safetensors *file, const char *stem, struct hash128 *out)
{
    char key[sizeof PACKED_DIGEST_KEY + PACKED_STEM_MAX];
    const char *word;
    int used = 0;
    snprintf(key, sizeof key, "%s%s", PACKED_DIGEST_KEY, stem);
    TRY(word_get(file, key, &word));
    if (strlen(word) != 32 || strspn(word, "0123456789abcdef") != 32 ||
        sscanf(word, "%16" SCNx64 "%16" SCNx64 "%n", &out->high, &out->low, &used) != 2 ||
        used != 32)
        FAIL(ERR_FORMAT, "%s: '%s' is no digest", first_file(file), key);
    return OK;
}

enum err packed_find(const struct safetensors *file, const char *stem, bool biased,
                     struct packed_weight *w, struct packed_parts *out_parts,
                     struct hash128 *out_digest)
{
    struct packed_parts p = {NULL, NULL, NULL};
    TRY(backend_cpu.packed_sizes(w));
    TRY(part_find(file, stem, "packed", ST_U8, w->panels_bytes, &p.panels));
    w->panels = p.panels->data;
    w->scale = w->bias = NULL;
    if (w->format == WEIGHT_INT8) {
        TRY(part_find(file, stem, "packed_scale", ST_F32, w->n_lanes * 4, &p.scale));
        w->scale = p.scale->data;
    }
    if (biased) {
        TRY(part_find(file, stem, "packed_bias", ST_F32, w->n_lanes * 4, &p.bias));
        w->bias = p.bias->data;
    }
    TRY(digest_read(file, stem, out_digest));
    *out_parts = p;
    return OK;
}

enum err packed_verify(const struct safetensors *file, const struct packed_parts *parts,
                       struct hash128 want, struct hash128 have)
{
    if (hash_equal(want, have)) return OK;
    FAIL(ERR_FORMAT, "%s: tensor '%s' is damaged: its bytes are not those that were written",
         safetensors_file(file, parts->panels->file_index), parts->panels->name);
}
