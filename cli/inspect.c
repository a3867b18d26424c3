/* heddle inspect: what a model directory holds, and whether it is whole. heddle plan: the memory of
 * one rank. Both read config.json and the tensors' headers only. */
#include "base/json.h"
#include "base/safetensors.h"
#include "cli/device_options.h"
#include "cli/verbs.h"
#include "worker/worker.h"

#include <stdio.h>
#include <string.h>

static void print_bytes(char out[32], uint64_t bytes)
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    double d = (double)bytes;
    int unit = 0;
    for (; d >= 1024 && unit < 4; unit++) d /= 1024;
    snprintf(out, 32, unit ? "%.1f %s" : "%.0f %s", d, units[unit]);
}

static void print_tensors(const struct safetensors *s)
{
    for (size_t i = 0; i < safetensors_count(s); i++) {
        const struct st_tensor *t = safetensors_at(s, i);
        char shape[128] = "", size[32];
        size_t n = 0;
        for (int d = 0; d < t->n_dims && n < sizeof shape - 24; d++)
            n += (size_t)snprintf(shape + n, sizeof shape - n, d ? ", %lld" : "%lld", (long long)t->shape[d]);
        print_bytes(size, t->bytes);
        printf("  %-60s %-5s [%s] %s\n", t->name, st_dtype_name(t->dtype), shape, size);
    }
}

static void print_model(const struct worker_info *m)
{
    printf("%s: %s, %.1f M parameters\n", m->model_name, m->arch_name, (double)m->n_parameters * 1e-6);
    printf("  %d layers, %d heads (%d kv) of %d, hidden %d, feed-forward %d, vocabulary %d, context %d", m->n_layers,
           m->n_heads, m->n_kv_heads, m->head_dim, m->hidden, m->ffn, m->vocab_size, m->context_max);
    if (m->window) printf(", window %d", m->window);
    putchar('\n');
    if (*m->model_digest) printf("  digest %s\n", m->model_digest);
}

static const char *model_of(const struct conf *c, const struct options *o)
{
    return o->model ? o->model : c->n_positionals ? c->positionals[0] : NULL;
}

static void print_model_json(const struct worker_info *m)
{
    json_t *root = json_pack("{s:s,s:s,s:I,s:i,s:i,s:i,s:i,s:i,s:i,s:i,s:i}", "model", m->model_name, "architecture",
                             m->arch_name, "parameters", (json_int_t)m->n_parameters, "layers", m->n_layers, "heads",
                             m->n_heads, "kv_heads", m->n_kv_heads, "head_dim", m->head_dim, "hidden", m->hidden,
                             "feed_forward", m->ffn, "vocabulary", m->vocab_size, "context", m->context_max);
    json_dumpf(root, stdout, JSON_INDENT(2));
    putchar('\n');
    json_decref(root);
}

int verb_inspect(struct conf *c, struct options *o)
{
    struct worker_config config;
    struct worker_info info;
    struct safetensors *tensors = NULL;
    const char *model = model_of(c, o);
    enum err e = model ? OK : err_set(ERR_INVALID, "which model? heddle inspect MODEL");
    worker_config_default(&config);
    config.model_dir = model;
    config.device = "cpu";
    config.load_format = o->load_format;
    config.rank = 0;
    config.size = 1;
    if (!e) e = worker_plan_memory(&config, &info);
    bool dummy = !strcmp(o->load_format, "dummy");
    if (!e && !dummy) e = safetensors_open(model, &tensors);
    if (!e && o->json) print_model_json(&info);
    else if (!e) {
        print_model(&info);
        if (tensors) print_tensors(tensors);
    }
    safetensors_close(tensors);
    return e ? verb_fail("inspect") : 0;
}

static void print_plan_draft(const struct worker_info *m)
{
    char weights[32], tables[32], work[32], block[32];
    if (!*m->draft_name) return;
    print_bytes(weights, m->draft_weight_bytes);
    print_bytes(tables, m->draft_table_bytes);
    print_bytes(work, m->draft_work_bytes);
    print_bytes(block, m->draft_block_bytes);
    printf("  draft model  %10s  %s, %s; embeddings %s, work space %s, %s of each KV block\n", weights, m->draft_name,
           m->draft_format, tables, work, block);
}

static void print_plan(const struct worker_info *m)
{
    char weights[32], tables[32], work[32], blocks[32], total[32], free_bytes[32];
    print_bytes(weights, m->weight_bytes);
    print_bytes(tables, m->table_bytes);
    print_bytes(work, m->work_bytes);
    print_bytes(blocks, m->block_bytes * m->n_blocks);
    print_bytes(total, m->weight_bytes + m->work_bytes + m->draft_weight_bytes + m->draft_work_bytes +
                           m->block_bytes * m->n_blocks);
    print_bytes(free_bytes, m->memory_free);
    print_model(m);
    printf("rank %d of %d on %s\n", m->rank, m->size, m->device);
    printf("  weights      %10s  %s\n  embeddings   %10s  read row by row\n", weights, m->weight_format, tables);
    printf("  work space   %10s  %d sequences, %d tokens a step\n", work, m->n_slots_max, m->step_tokens_max);
    print_plan_draft(m);
    printf("  KV cache     %10s  %llu blocks of %d tokens, %s: %llu tokens\n", blocks, (unsigned long long)m->n_blocks,
           m->block_size, m->kv_format, (unsigned long long)m->n_blocks * (unsigned)m->block_size);
    printf("  together     %10s  of %s free\n", total, free_bytes);
}

int verb_plan(struct conf *c, struct options *o)
{
    struct worker_config config;
    struct worker_info info;
    const char *model = model_of(c, o);
    enum err e = model ? OK : err_set(ERR_INVALID, "which model? heddle plan MODEL");
    worker_config_from_options(o, model, &config);
    config.rank = 0;
    config.size = (int)o->tp;
    if (!e) e = worker_plan_memory(&config, &info);
    if (!e) print_plan(&info);
    return e ? verb_fail("plan") : 0;
}
