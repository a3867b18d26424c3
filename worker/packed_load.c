/* Weights of a packed file on their way to the device: as they lie, or unpacked, sliced and packed
 * again where a rank or a device needs other bytes. */
#include "base/mem.h"
#include "worker/loader.h"
#include "worker/settle.h"

#include <string.h>

void weights_stem(enum role first, int layer, int expert, char out[PACKED_STEM_MAX])
{
    static const struct {
        const char *name;
        bool of_layer;
    } stems[ROLE_COUNT] = {
        [ROLE_WQ] = {"qkv", true},
        [ROLE_WQKV] = {"qkv", true},
        [ROLE_WO] = {"out", true},
        [ROLE_W_GATE] = {"up", true},
        [ROLE_W_UP] = {"up", true},
        [ROLE_W_DOWN] = {"down", true},
        [ROLE_LM_HEAD] = {"lm_head", false},
        [ROLE_PROJECT_IN] = {"project_in", false},
        [ROLE_PROJECT_OUT] = {"project_out", false},
    };
    ASSERT(stems[first].name);
    packed_stem(stems[first].name, stems[first].of_layer ? layer : -1, expert, out);
}

/* This rank's slices of a whole fused weight that was unpacked to floats. */
static void packed_slices(const struct loader *l, const enum role *of, int n_of, const float *whole,
                          int64_t n_in, const float *bias, struct matrix_view *parts, int *n_parts)
{
    int64_t first = 0, bias_at = 0;
    bool drops_bias = role_is_shard_in(of[0]) && l->m->group.rank != 0;
    for (int i = 0; i < n_of; i++) {
        int64_t rows = config_dim(&l->m->config, roles[of[i]].rows);
        struct matrix_view view = {whole + first * n_in, DTYPE_F32, rows, n_in, n_in, 1};
        for (int s = 0; s < role_segments(of[i]); s++) {
            struct shard_range r = loader_slice(l->m, of[i], s), all = {0, rows};
            struct shard_range b = role_is_shard_in(of[i]) ? all : r;
            parts[(*n_parts)++] =
                role_is_shard_in(of[i]) ? view_columns(view, r) : view_rows(view, r);
            ASSERT_CMP(bias_at + shard_count(b), <=, l->bias_max);
            for (int64_t k = 0; bias && k < shard_count(b); k++)
                l->bias[bias_at + k] = drops_bias ? 0 : bias[first + b.begin + k];
            bias_at += shard_count(b);
        }
        first += rows;
    }
}

/* Unpacks, slices and packs for this rank and device. */
static enum err packed_again(struct loader *l, const enum role *of, int n_of,
                             const struct packed_weight *p, enum weight_format format,
                             struct weight **out)
{
    struct matrix_view parts[4];
    int n_parts = 0;
    size_t bytes;
    float *whole;
    if (!size_mul((size_t)p->n_out, (size_t)p->n_in, &bytes) || !size_mul(bytes, 4, &bytes))
        FAIL(ERR_NO_MEMORY, "a weight of %lld x %lld", (long long)p->n_out, (long long)p->n_in);
    TRY(mem_alloc_huge(bytes, (void **)&whole));
    for (int64_t r = 0; r < p->n_out; r++)
        backend_cpu.packed_row(p, r, whole + r * p->n_in);
    packed_slices(l, of, n_of, whole, p->n_in, p->bias, parts, &n_parts);
    bool biased = p->bias && !(role_is_shard_in(of[0]) && l->m->group.rank != 0);
    enum err e =
        l->ops->weight_create(l->backend, parts, n_parts, biased ? l->bias : NULL, format, out);
    mem_free_huge(whole, bytes);
    return e;
}

/* Whether steps may read the weight where the file is mapped: whole lines, as memory of its own
 * has. */
static bool is_adoptable(const struct loader *l, const struct packed_weight *p)
{
    return l->m->settle && (uintptr_t)p->panels % 64 == 0;
}

/* A weight of a packed file: its bytes as they are where one rank has this device's layout. */
enum err loader_packed_weight(struct loader *l, const enum role *of, int n_of, int layer,
                              enum weight_format format, struct weight **out)
{
    struct packed_weight p = {.format = format,
                              .n_in = config_dim(&l->m->config, roles[of[0]].columns)};
    struct packed_parts parts;
    struct hash128 want, have;
    char stem[PACKED_STEM_MAX];
    bool biased = false;
    const char *layout = l->ops->packed_layout;
    for (int i = 0; i < n_of; i++) {
        p.n_out += config_dim(&l->m->config, roles[of[i]].rows);
        biased = biased || config_has_bias(&l->m->config, of[i]);
    }
    bool of_expert = l->m->config.n_experts &&
                     (of[0] == ROLE_W_GATE || of[0] == ROLE_W_UP || of[0] == ROLE_W_DOWN);
    weights_stem(of[0], layer, of_expert ? l->source.expert : -1, stem);
    TRY(packed_find(l->m->file, stem, biased, &p, &parts, &want));
    source_use(&l->source, parts.panels);
    source_use(&l->source, parts.scale);
    source_use(&l->source, parts.bias);
    bool as_it_is = l->m->group.size == 1 && layout && !strcmp(layout, l->packed.layout);
    bool adopts = as_it_is && is_adoptable(l, &p);
    if (adopts) {
        TRY(l->ops->weight_adopt(l->backend, &p, out));
        have = want; /* compared later */
        TRY(settle_add(l->m->settle, *out, &parts, want));
    } else if (as_it_is) {
        TRY(l->ops->weight_import(l->backend, &p, &have, out));
    } else {
        have = backend_cpu.packed_digest(&p);
        TRY(packed_again(l, of, n_of, &p, format, out));
    }
    source_release(&l->source);
    l->m->weight_bytes += l->ops->weight_bytes(*out);
    loader_advance(l, l->ops->weight_bytes(*out));
    return packed_verify(l->m->file, &parts, want, have);
}
