/* Tensors by role: names, shapes, types, and the dummy checkpoint. */
#include "worker/source.h"
#include "base/hash.h"
#include "base/log.h"
#include "base/mem.h"
#include "kernels/half.h"

#include <stdio.h>
#include <string.h>

float source_element(const void *data, enum dtype dtype, int64_t i)
{
    return load_float((const char *)data + (size_t)i * dtype_bytes(dtype), dtype);
}

void source_name(const struct source *s, enum role role, int layer, const char *suffix,
                 char out[SOURCE_NAME_MAX])
{
    char stem[SOURCE_NAME_MAX - 32];
    const char *pattern = s->config->arch->names[role], *mark = strstr(pattern, "%d");
    const char *rest = mark ? mark + 2 : NULL, *second = rest ? strstr(rest, "%d") : NULL;
    if (second)
        snprintf(stem, sizeof stem, "%.*s%d%.*s%d%s", (int)(mark - pattern), pattern, layer,
                 (int)(second - rest), rest, s->expert, second + 2);
    else if (mark)
        snprintf(stem, sizeof stem, "%.*s%d%s", (int)(mark - pattern), pattern, layer, rest);
    else
        snprintf(stem, sizeof stem, "%s", pattern);
    /* the output projection belongs to no inner model */
    snprintf(out, SOURCE_NAME_MAX, "%s%s%s", role == ROLE_LM_HEAD ? "" : s->prefix, stem, suffix);
}

static const char *place(const struct source *s)
{
    return s->file && safetensors_count(s->file) ? safetensors_file(s->file, 0) : s->config->path;
}

void source_use(struct source *s, const struct st_tensor *t)
{
    if (!t) return;
    s->used[t - safetensors_at(s->file, 0)] = true;
    if (s->n_taken < SOURCE_TEMPS_MAX) s->taken[s->n_taken++] = t;
}

bool source_has(const struct source *s, enum role role)
{
    char name[SOURCE_NAME_MAX];
    if (!s->file) return role != ROLE_LM_HEAD || !s->config->tied;
    static const char *const suffixes[] = {".weight", ".qweight", ".weight_packed"};
    for (int i = 0; i < (s->config->quant.method ? 3 : 1); i++) {
        source_name(s, role, 0, suffixes[i], name);
        if (safetensors_find(s->file, name)) return true;
    }
    return false;
}

enum err source_init(struct source *s, const struct model_config *config, struct safetensors *file,
                     uint64_t seed)
{
    *s = (struct source){
        .config = config, .file = file, .seed = seed, .prefix = config->arch->prefixes[0]};
    if (!file) return OK;
    for (int i = 0; config->arch->prefixes[i]; i++) {
        s->prefix = config->arch->prefixes[i];
        if (source_has(s, ROLE_EMBED)) break;
        s->prefix = config->arch->prefixes[0];
    }
    return MEM_NEW_ARRAY(safetensors_count(file), &s->used);
}

void source_fini(struct source *s)
{
    source_release(s);
    for (int i = 0; i < s->n_temps; i++)
        mem_free_huge(s->temps[i].mem, s->temps[i].bytes);
    s->n_temps = 0;
    mem_free(s->used);
    s->used = NULL;
}

void source_release(struct source *s)
{
    for (int i = 0; i < s->n_temps; i++)
        s->temps[i].lent = false;
    for (int i = 0; i < s->n_taken; i++)
        safetensors_drop(s->file, s->taken[i]);
    s->n_taken = 0;
}

bool source_keep(struct source *s, const void *data, void **out_mem, size_t *out_bytes)
{
    for (int i = 0; i < s->n_temps; i++) {
        if (s->temps[i].mem != data) continue;
        *out_mem = s->temps[i].mem;
        *out_bytes = s->temps[i].bytes;
        s->temps[i] = s->temps[--s->n_temps];
        return true;
    }
    return false;
}

/* The smallest free piece that is large enough, else a new one in the place of a free one. */
static enum err temp_take(struct source *s, size_t bytes, void **out)
{
    struct source_temp *best = NULL, *unused = NULL;
    for (int i = 0; i < s->n_temps; i++) {
        struct source_temp *t = &s->temps[i];
        if (t->lent) continue;
        if (t->bytes >= bytes && (!best || t->bytes < best->bytes))
            best = t;
        else
            unused = t;
    }
    if (!best && unused) {
        mem_free_huge(unused->mem, unused->bytes);
        *unused = s->temps[--s->n_temps];
    }
    if (!best) {
        ASSERT_CMP(s->n_temps, <, SOURCE_TEMPS_MAX);
        void *mem;
        TRY(mem_alloc_huge(bytes, &mem));
        best = &s->temps[s->n_temps++];
        *best = (struct source_temp){.mem = mem, .bytes = bytes};
    }
    best->lent = true;
    *out = best->mem;
    return OK;
}

/* --- dummy weights --- */

/* Words of random sign and mantissa under one exponent: values from 1/64 to 1/32 in size. */
static void dummy_fill(void *mem, size_t bytes, enum dtype dtype, uint64_t key)
{
    static const struct {
        uint64_t keep, set;
    } masks[] = {
        [DTYPE_F32] = {0x807fffff807fffffull, 0x3c8000003c800000ull},
        [DTYPE_F16] = {0x83ff83ff83ff83ffull, 0x2400240024002400ull},
        [DTYPE_BF16] = {0x807f807f807f807full, 0x3c803c803c803c80ull},
    };
    uint64_t *words = mem;
    size_t n = (bytes + 7) / 8; /* temporaries are whole pages */
    for (size_t i = 0; i < n; i++) {
        uint64_t z = key + (i + 1) * 0x9e3779b97f4a7c15ull;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ z >> 27) * 0x94d049bb133111ebull;
        words[i] = (z & masks[dtype].keep) | masks[dtype].set;
    }
}

static uint64_t dummy_key(const struct source *s, const char *name)
{
    return hash_bytes(name, strlen(name), s->seed).low;
}

static enum err dummy_matrix(struct source *s, const char *name, int64_t rows, int64_t columns,
                             struct matrix_view *out)
{
    enum dtype dtype = s->config->dtype;
    size_t bytes;
    void *mem;
    if (!size_mul((size_t)rows, (size_t)columns, &bytes) ||
        !size_mul(bytes, dtype_bytes(dtype), &bytes))
        FAIL(ERR_NO_MEMORY, "%s: '%s' is too large", s->config->path, name);
    TRY(temp_take(s, (bytes + 7) & ~(size_t)7, &mem));
    dummy_fill(mem, bytes, dtype, dummy_key(s, name));
    *out = (struct matrix_view){mem, dtype, rows, columns, columns, 1};
    return OK;
}

static void dummy_vector(const struct source *s, const char *name, bool norm, int64_t n, float *out)
{
    uint64_t key = dummy_key(s, name);
    for (int64_t i = 0; i < n; i++) {
        float noise = (float)(int32_t)(hash_u64(key + (uint64_t)i) >> 32) * 0x1p-36f;
        out[i] = norm ? 1 + noise : noise;
    }
}

/* --- tensors of a file --- */

enum err source_dtype(const struct source *s, const struct st_tensor *t, enum dtype *out)
{
    switch (t->dtype) {
    case ST_F32:
        *out = DTYPE_F32;
        return OK;
    case ST_F16:
        *out = DTYPE_F16;
        return OK;
    case ST_BF16:
        *out = DTYPE_BF16;
        return OK;
    default:
        FAIL(ERR_UNSUPPORTED, "%s: tensor '%s' is stored as %s; F32, F16 and BF16 are supported",
             safetensors_file(s->file, t->file_index), t->name, st_dtype_name(t->dtype));
    }
}

static void shape_words(const int64_t *shape, int n, char *out, size_t size)
{
    size_t at = 0;
    out[0] = 0;
    for (int i = 0; i < n && at < size; i++)
        at += (size_t)snprintf(out + at, size - at, "%s%lld", i ? ", " : "", (long long)shape[i]);
}

enum err source_tensor(struct source *s, const char *name, int n_dims, const int64_t *shape,
                       const struct st_tensor **out)
{
    const struct st_tensor *t = safetensors_find(s->file, name);
    if (!t) FAIL(ERR_FORMAT, "%s: tensor '%s' is missing", place(s), name);
    bool same = t->n_dims == n_dims;
    for (int i = 0; same && i < n_dims; i++)
        same = t->shape[i] == shape[i];
    if (!same) {
        char have[96], want[96];
        shape_words(t->shape, t->n_dims, have, sizeof have);
        shape_words(shape, n_dims, want, sizeof want);
        FAIL(ERR_FORMAT, "%s: tensor '%s' has shape [%s], but config.json asks for [%s]",
             safetensors_file(s->file, t->file_index), name, have, want);
    }
    s->used[t - safetensors_at(s->file, 0)] = true;
    *out = t;
    return OK;
}

/* Mapped data begins where the header ended; kernels want elements at their own alignment. */
static enum err aligned_data(struct source *s, const struct st_tensor *t, enum dtype dtype,
                             const void **out)
{
    void *copy;
    if ((uintptr_t)t->data % dtype_bytes(dtype) == 0) {
        *out = t->data;
        if (s->n_taken < SOURCE_TEMPS_MAX) s->taken[s->n_taken++] = t;
        return OK;
    }
    TRY(temp_take(s, t->bytes, &copy));
    memcpy(copy, t->data, t->bytes);
    *out = copy;
    return OK;
}

static bool stored_in_out(const struct source *s, enum role role)
{
    return s->config->arch->weights_in_out && role != ROLE_EMBED && role != ROLE_POSITION &&
           role != ROLE_LM_HEAD;
}

enum err source_matrix(struct source *s, enum role role, int layer, struct matrix_view *out)
{
    char name[SOURCE_NAME_MAX];
    const struct st_tensor *t;
    const void *data;
    enum dtype dtype;
    int64_t rows = config_dim(s->config, roles[role].rows),
            columns = config_dim(s->config, roles[role].columns);
    source_name(s, role, layer, ".weight", name);
    if (!s->file) return dummy_matrix(s, name, rows, columns, out);
    bool flip = stored_in_out(s, role);
    int64_t shape[2] = {flip ? columns : rows, flip ? rows : columns};
    TRY(source_tensor(s, name, 2, shape, &t));
    TRY(source_dtype(s, t, &dtype));
    TRY(aligned_data(s, t, dtype, &data));
    *out = (struct matrix_view){data, dtype, rows, columns, flip ? 1 : columns, flip ? rows : 1};
    return OK;
}

enum err source_vector(struct source *s, enum role role, int layer, bool bias, int64_t n,
                       float *out)
{
    char name[SOURCE_NAME_MAX];
    const struct st_tensor *t;
    enum dtype dtype;
    source_name(s, role, layer, bias ? ".bias" : ".weight", name);
    if (!s->file) {
        dummy_vector(s, name, !bias, n, out);
        return OK;
    }
    TRY(source_tensor(s, name, 1, &n, &t));
    TRY(source_dtype(s, t, &dtype));
    for (int64_t i = 0; i < n; i++)
        out[i] = source_element(t->data, dtype, i);
    return OK;
}

/* --- what is left over --- */

static bool ends_with(const char *s, const char *end)
{
    size_t n = strlen(s), m = strlen(end);
    return n >= m && !strcmp(s + n - m, end);
}

/* Saved by some versions of the exporting program, computed anew by everybody. */
static bool is_leftover(const char *name)
{
    static const char *const ends[] = {"rotary_emb.inv_freq",   ".attn.bias",
                                       ".attn.masked_bias",     "position_ids",
                                       "rotary_emb.cos_cached", "rotary_emb.sin_cached"};
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++)
        if (ends_with(name, ends[i])) return true;
    return false;
}

/* Whether the name lies in one of the layers that are computed. */
static bool in_a_layer(const struct source *s, const char *name)
{
    const char *pattern = s->config->arch->names[ROLE_ATTN_NORM], *mark = strstr(pattern, "%d");
    size_t n = strlen(s->prefix), m = (size_t)(mark - pattern);
    int layer, used = 0;
    if (strncmp(name, s->prefix, n) || strncmp(name + n, pattern, m)) return false;
    return sscanf(name + n + m, "%9d.%n", &layer, &used) == 1 && used &&
           layer < s->config->n_layers;
}

enum err source_check_unused(const struct source *s)
{
    enum { WARNINGS_MAX = 8 };
    int n_unknown = 0;
    for (size_t i = 0; s->file && i < safetensors_count(s->file); i++) {
        const struct st_tensor *t = safetensors_at(s->file, i);
        if (s->used[i] || is_leftover(t->name)) continue;
        if (s->config->tied && !strcmp(t->name, "lm_head.weight"))
            continue; /* the embedding stands for it */
        if (in_a_layer(s, t->name))
            FAIL(ERR_FORMAT, "%s: tensor '%s' is unknown to %s with this config.json",
                 safetensors_file(s->file, t->file_index), t->name, s->config->arch->hf_name);
        if (n_unknown++ < WARNINGS_MAX)
            log_warn("%s: tensor '%s' is unknown to %s and ignored",
                     safetensors_file(s->file, t->file_index), t->name, s->config->arch->hf_name);
    }
    if (n_unknown > WARNINGS_MAX)
        log_warn("%d more unknown tensors are ignored", n_unknown - WARNINGS_MAX);
    return OK;
}
