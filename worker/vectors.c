/* Norms, biases and rotary tables: what goes to the device as plain floats. */
#include "base/mem.h"
#include "worker/loader.h"

#include <pthread.h>

enum err loader_upload(struct loader *l, const float *host, size_t n, const float **out)
{
    struct model *m = l->m;
    void *mem;
    ASSERT_CMP(m->n_vectors, <, m->vectors_max);
    TRY(l->ops->alloc(l->backend, n * sizeof(float), &mem));
    m->vectors[m->n_vectors++] = mem;
    m->weight_bytes += n * sizeof(float);
    TRY(l->ops->upload(l->backend, mem, host, n * sizeof(float)));
    *out = mem;
    return OK;
}

enum err loader_vector(struct loader *l, enum role role, int layer, bool bias, const float **out)
{
    int64_t n = config_dim(&l->m->config, roles[role].rows);
    ASSERT_CMP(n, <=, l->bias_max);
    TRY(source_vector(&l->source, role, layer, bias, n, l->bias));
    return loader_upload(l, l->bias, (size_t)n, out);
}

enum err loader_norm(struct loader *l, enum role role, int layer, struct norm_args *out)
{
    out->kind = l->m->config.arch->norm;
    out->epsilon = l->m->config.norm_epsilon;
    TRY(loader_vector(l, role, layer, false, &out->weight));
    if (config_has_bias(&l->m->config, role)) TRY(loader_vector(l, role, layer, true, &out->bias));
    return OK;
}

/* --- rotary tables --- */

enum { ROPE_THREADS_MAX = 16, ROPE_PART_MIN = 4096 }; /* positions that are worth a thread */

struct rope_part {
    const struct model_config *config;
    float *cos, *sin;
    int first, end;
    pthread_t thread;
    bool started;
};

static void *rope_fill(void *arg)
{
    struct rope_part *p = arg;
    config_rope_tables(p->config, p->first, p->end, p->cos, p->sin);
    return NULL;
}

/* Long contexts have millions of cosines: every thread of the rank makes some. */
static void rope_tables(const struct loader *l, float *cos, float *sin)
{
    struct rope_part parts[ROPE_THREADS_MAX];
    int n_positions = l->m->context_max, n = l->options->n_threads;
    n = n > ROPE_THREADS_MAX ? ROPE_THREADS_MAX : n;
    n = n > n_positions / ROPE_PART_MIN ? n_positions / ROPE_PART_MIN : n;
    n = n < 1 ? 1 : n;
    for (int i = 0; i < n; i++) {
        parts[i] = (struct rope_part){.config = &l->m->config,
                                      .cos = cos,
                                      .sin = sin,
                                      .first = (int)((int64_t)n_positions * i / n),
                                      .end = (int)((int64_t)n_positions * (i + 1) / n)};
        parts[i].started = i && !pthread_create(&parts[i].thread, NULL, rope_fill, &parts[i]);
    }
    for (int i = 0; i < n; i++) {
        if (parts[i].started)
            pthread_join(parts[i].thread, NULL);
        else
            rope_fill(&parts[i]);
    }
}

enum err loader_rope(struct loader *l, const float **out_cos, const float **out_sin)
{
    size_t n = (size_t)l->m->context_max * (size_t)(l->m->config.rope.rotary_dim / 2);
    float *cos_sin;
    TRY(MEM_NEW_ARRAY(2 * n, &cos_sin));
    rope_tables(l, cos_sin, cos_sin + n);
    enum err e = loader_upload(l, cos_sin, n, out_cos);
    if (!e) e = loader_upload(l, cos_sin + n, n, out_sin);
    mem_free(cos_sin);
    return e;
}
