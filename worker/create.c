/* Makes a rank and takes it apart: what its files say, a plan of the memory, the device, weights,
 * state. See worker.h. Knows no plans of steps and no peers. */
#include "base/clock.h"
#include "base/log.h"
#include "base/mem.h"
#include "worker/rank.h"
#include "worker/settle.h"

#include <sched.h>
#include <stdio.h>
#include <string.h>

enum { ARENA_CHUNK_BYTES = 1 << 20, ARENA_BYTES_MAX = 256 << 20 };

static enum err sizes_check(const struct worker_config *c)
{
    if (c->size < 1 || c->size > COLLECTIVE_RANKS_MAX || c->rank < 0 || c->rank >= c->size)
        FAIL(ERR_INVALID, "rank %d of %d: at most %d ranks", c->rank, c->size,
             COLLECTIVE_RANKS_MAX);
    if (c->n_sequences_max < 0 || c->n_sequences_max > 1 << 16 || c->step_tokens_max < 0 ||
        c->step_tokens_max > 1 << 20 || c->draft_tokens_max < 0 || c->draft_tokens_max > 64 ||
        c->step_rows_max < 0)
        FAIL(ERR_INVALID,
             "%d sequences (at most 65536), %d tokens a step (at most 1048576), %d drafts (at most "
             "64)",
             c->n_sequences_max, c->step_tokens_max, c->draft_tokens_max);
    if (c->block_size &&
        (c->block_size < 1 || c->block_size > 4096 || (c->block_size & (c->block_size - 1))))
        FAIL(ERR_INVALID, "--block-size %d: a power of two up to 4096", c->block_size);
    if (c->load_format && strcmp(c->load_format, "auto") && strcmp(c->load_format, "safetensors") &&
        strcmp(c->load_format, "dummy"))
        FAIL(ERR_INVALID, "--load-format '%.32s': auto, safetensors or dummy", c->load_format);
    return OK;
}

static bool is_dummy(const struct worker_config *c)
{
    return c->load_format && !strcmp(c->load_format, "dummy");
}

static enum err backend_start(const struct worker_config *c, const struct model_config *model,
                              const struct memory_plan *plan, struct backend **out)
{
    struct backend_options o = {
        .device = c->device_index,
        .n_threads = c->n_threads,
        .numa_node = -1,
        .deterministic = c->deterministic,
        .n_slots_max = plan ? plan->n_slots : 1,
        .n_tokens_max = plan ? plan->step_tokens_max : 1,
        .n_rows_max = plan ? plan->logits_rows_max : 1,
        .vocab_size = model->vocab_size,
        .isa = c->isa,
    };
    return backend_open(c->device ? c->device : "auto", &o, out);
}

struct models { /* as their config.json say; large, so never on the stack */
    struct model_config target, draft;
};

static enum err draft_config_read(const struct worker_config *c, const struct model_config *model,
                                  struct model_config *out)
{
    TRY(config_read(c->draft_model_dir, out));
    if (out->vocab_size != model->vocab_size)
        FAIL(ERR_INVALID,
             "the draft model %s has a vocabulary of %d tokens, the model %s one of %d: they must "
             "be the same",
             c->draft_model_dir, out->vocab_size, c->model_dir, model->vocab_size);
    if (!c->draft_tokens_max)
        FAIL(ERR_INVALID, "--draft-model %s without --speculative-tokens", c->draft_model_dir);
    return OK;
}

/* Reads headers and plans the memory with a backend opened for measuring only. */
static enum err plan_make(const struct worker_config *c, struct models *models,
                          struct memory_plan *out)
{
    struct model_config *model = &models->target;
    struct safetensors *file = NULL;
    struct backend *b = NULL;
    struct worker_config probe = *c;
    enum err e = OK;
    TRY(sizes_check(c));
    TRY(config_read(c->model_dir, model));
    TRY(shard_check(model->n_heads, model->n_kv_heads, model->ffn, model->vocab_size, c->size));
    if (c->draft_model_dir) TRY(draft_config_read(c, model, &models->draft));
    if (!is_dummy(c)) TRY_OUT(safetensors_open(c->model_dir, &file));
    probe.n_threads = 1;
    TRY_OUT(backend_start(&probe, model, NULL, &b));
    TRY_OUT(memory_plan(c, model, c->draft_model_dir ? &models->draft : NULL, file,
                        (struct group){c->rank, c->size}, b, out));
out:
    safetensors_close(file);
    if (b) b->ops->close(b);
    return e;
}

static void folder_name(const char *dir, char *out, size_t size)
{
    const char *slash = strrchr(dir, '/');
    snprintf(out, size, "%s", slash && slash[1] ? slash + 1 : dir);
}

static void info_fill_draft(const struct worker_config *c, const struct memory_plan *p,
                            struct worker_info *out)
{
    struct memory_plan formats = {
        .quant = p->draft.quant, .format = p->draft.format, .head_format = p->draft.head_format};
    folder_name(c->draft_model_dir, out->draft_name, sizeof out->draft_name);
    formats.file_dtype = p->draft.file_dtype;
    memory_format_words(&formats, out->draft_format, sizeof out->draft_format);
    out->draft_weight_bytes = p->draft.weight_bytes, out->draft_table_bytes = p->draft.table_bytes;
    out->draft_work_bytes = p->draft.work_bytes, out->draft_block_bytes = p->draft.block_bytes;
    out->window = 0; /* the draft model may look back further: blocks are kept */
}

static void info_fill(const struct worker_config *c, const struct model_config *m,
                      const struct memory_plan *p, struct worker_info *out)
{
    memset(out, 0, sizeof *out);
    folder_name(c->model_dir, out->model_name, sizeof out->model_name);
    snprintf(out->arch_name, sizeof out->arch_name, "%s", m->arch->hf_name);
    snprintf(out->kv_format, sizeof out->kv_format, "%s", dtype_name(p->kv_dtype));
    memory_format_words(p, out->weight_format, sizeof out->weight_format);
    out->n_layers = m->n_layers, out->n_heads = m->n_heads, out->n_kv_heads = m->n_kv_heads;
    out->head_dim = m->head_dim, out->hidden = m->hidden, out->ffn = m->ffn,
    out->vocab_size = m->vocab_size;
    out->rank = c->rank, out->size = c->size;
    out->block_size = p->kv.block_size, out->n_slots_max = p->n_slots;
    out->step_tokens_max = p->step_tokens_max, out->step_rows_max = p->step_tokens_max;
    out->step_prompt_max = p->step_prompt_max;
    out->context_max = p->context_max, out->draft_tokens_max = p->draft_max;
    out->window = config_window(m);
    out->n_parameters = config_parameters(m);
    out->weight_bytes = p->weight_bytes, out->table_bytes = p->table_bytes,
    out->work_bytes = p->work_bytes;
    out->block_bytes = p->block_bytes, out->n_blocks = (uint64_t)p->kv.n_blocks;
    out->n_host_blocks = p->n_host_blocks;
    out->n_disk_blocks = p->n_disk_blocks;
    out->memory_total = p->memory_total, out->memory_free = p->memory_free;
    if (p->draft.group.size) info_fill_draft(c, p, out);
}

enum err worker_plan_memory(const struct worker_config *config, struct worker_info *out)
{
    struct worker_config c = *config;
    struct models *models;
    struct memory_plan plan;
    TRY(worker_rank_find(&c));
    TRY(MEM_NEW(&models));
    enum err e = plan_make(&c, models, &plan);
    if (!e) info_fill(&c, &models->target, &plan, out);
    mem_free(models);
    if (e) return e;
    snprintf(out->device, sizeof out->device, "%s", config->device ? config->device : "auto");
    return OK;
}

static void progress_line(void *ctx, uint64_t done, uint64_t total)
{
    enum { WIDTH = 40 };
    struct worker *w = ctx;
    int percent = total ? (int)(done * 100 / total) : 100;
    if (!w->config.progress || percent == w->percent || w->config.rank) return;
    w->percent = percent;
    fprintf(stderr, "\rloading %s [%-*.*s] %3d %%%s", w->info.model_name, WIDTH,
            percent * WIDTH / 100, "########################################", percent,
            percent == 100 ? "\n" : "");
    fflush(stderr);
}

static void device_words(const struct worker *w, char *out, size_t size)
{
    cpu_set_t cores;
    int n = w->config.n_threads;
    if (!n && !sched_getaffinity(0, sizeof cores, &cores)) n = CPU_COUNT(&cores);
    snprintf(out, size, "%s, %d thread%s", w->backend->ops->name, n, n == 1 ? "" : "s");
}

static enum err weights_start(struct worker *w, const struct model_config *model)
{
    struct weights_options o = {
        .model_dir = w->config.model_dir,
        .dummy = is_dummy(&w->config),
        .seed = w->config.dummy_seed,
        .format = w->plan.format,
        .head_format = w->plan.head_format,
        .context_max = w->plan.context_max,
        .settles = true,
        .n_threads = w->config.n_threads,
        .progress = progress_line,
        .ctx = w,
    };
    int64_t begin = clock_monotonic_us();
    w->percent = -1;
    TRY(model_load(&o, model, (struct group){w->config.rank, w->config.size}, w->backend,
                   &w->model));
    w->info.weight_bytes = w->model->weight_bytes;
    w->info.table_bytes = w->model->table_bytes;
    snprintf(w->info.model_digest, sizeof w->info.model_digest, "%s", w->model->digest);
    log_info("%s: %.2f GiB of weights (%s) in %.1f s", w->info.model_name,
             (double)w->model->weight_bytes / (1 << 30), w->info.weight_format,
             (double)(clock_monotonic_us() - begin) / 1e6);
    return OK;
}

enum { MEASURED_BLOCKS = 16 };

/* What it takes to move a block to the host and back; the blocks hold nothing yet. */
static enum err copies_measure(struct worker *w)
{
    const struct backend_ops *ops = w->backend->ops;
    uint64_t n = w->plan.n_host_blocks < MEASURED_BLOCKS ? w->plan.n_host_blocks : MEASURED_BLOCKS;
    int64_t us[2] = {0, 0};
    if (n > (uint64_t)w->plan.kv.n_blocks) n = (uint64_t)w->plan.kv.n_blocks;
    for (int round = 0; round < 4; round++) { /* save, load, and again with everything warm */
        int64_t begin = clock_monotonic_us();
        for (uint64_t i = 0; i < n; i++) {
            void *host = (char *)w->host_blocks + i * w->plan.block_bytes;
            if (round % 2)
                ops->kv_load(w->backend, w->decoder.kv, (int32_t)i, host);
            else
                ops->kv_save(w->backend, w->decoder.kv, (int32_t)i, host);
        }
        TRY(ops->ticket_wait(w->backend, ops->step_end(w->backend)));
        us[round % 2] = clock_monotonic_us() - begin;
    }
    w->info.save_ns = (uint32_t)(us[0] * 1000 / (int64_t)n) + 1;
    w->info.load_ns = (uint32_t)(us[1] * 1000 / (int64_t)n) + 1;
    return OK;
}

static enum err state_start(struct worker *w)
{
    const struct memory_plan *p = &w->plan;
    struct slots_limits limits = {
        .n_slots = (uint32_t)p->n_slots,
        .context_max = (uint32_t)p->context_max,
        .draft_max = (uint32_t)p->draft_max,
        .block_size = (uint32_t)p->kv.block_size,
        .n_blocks = (uint32_t)p->kv.n_blocks,
        .n_host_blocks = (uint32_t)p->n_host_blocks,
        .n_disk_blocks = (uint32_t)p->n_disk_blocks,
        .vocab_size = (uint32_t)w->model->config.vocab_size,
        .step_tokens_max = (uint32_t)p->step_tokens_max,
        .logprobs_max = SAMPLE_LOGPROBS_MAX,
    };
    size_t host_bytes;
    TRY(decoder_init(&w->decoder, w->model, p->step_tokens_max, p->logits_rows_max));
    TRY(w->backend->ops->kv_create(w->backend, &p->kv, &w->decoder.kv));
    graphs_init(&w->graphs, p->graph_rows_max);
    TRY(slots_init(&w->slots, &limits));
    for (int i = 0; i < STEPS_IN_FLIGHT; i++)
        TRY(step_init(&w->steps[i], &w->slots));
    size_t pairs = (size_t)p->kv.n_blocks;
    TRY(MEM_NEW_ARRAY(pairs, &w->copy_from));
    TRY(MEM_NEW_ARRAY(pairs, &w->copy_to));
    if (!size_mul(p->n_host_blocks, p->block_bytes, &host_bytes))
        FAIL(ERR_NO_MEMORY, "host swap space too large");
    if (host_bytes) TRY(mem_alloc_huge(host_bytes, &w->host_blocks));
    w->host_bytes = host_bytes;
    if (host_bytes) TRY(copies_measure(w));
    if (p->n_disk_blocks) {
        TRY(kv_disk_open(w->config.kv_disk_dir, p->n_disk_blocks, w->host_blocks, p->n_host_blocks,
                         p->block_bytes, &w->disk));
        w->info.fetch_ns = kv_disk_fetch_ns(w->disk);
    }
    /* one chunk of the step arena now, so that usual plans never allocate */
    void *warm;
    arena_init(&w->arena, ARENA_CHUNK_BYTES, ARENA_BYTES_MAX);
    TRY(arena_alloc(&w->arena, ARENA_CHUNK_BYTES / 2, &warm));
    arena_reset(&w->arena);
    return OK;
}

/* Somebody else took memory since it was planned: says what was. */
static enum err memory_words_add(const struct worker *w, enum err e)
{
    char why[256], plan[256];
    if (e != ERR_NO_MEMORY || !w->plan.block_bytes) return e;
    snprintf(why, sizeof why, "%s", err_detail());
    memory_plan_words(&w->plan, plan, sizeof plan);
    return err_set(e,
                   "rank %d: %s; planned were %s: lower --memory-utilization, --max-model-len or "
                   "--max-num-seqs, or use --kv-cache-dtype int8, --quantization int8 or int4, or "
                   "more ranks (--tp)",
                   w->config.rank, why, plan);
}

static enum err draft_start(struct worker *w, const struct model_config *model)
{
    TRY(draft_create(&w->config, &w->plan, model, w->backend, &w->slots, &w->draft));
    w->info.draft_weight_bytes = w->draft->model->weight_bytes;
    w->info.draft_table_bytes = w->draft->model->table_bytes;
    snprintf(w->info.draft_digest, sizeof w->info.draft_digest, "%s", w->draft->model->digest);
    return OK;
}

/* Weights and caches move to better places beside the steps. */
static enum err moves_start(struct worker *w)
{
    struct settle **s = &w->model->settle;
    if (w->backend->ops->kv_settle) {
        if (!*s) TRY(settle_create(w->backend, NULL, s));
        settle_add_cache(*s, w->decoder.kv);
        if (w->draft) settle_add_cache(*s, w->draft->decoder.kv);
    }
    return *s ? settle_start(*s) : OK;
}

enum err worker_create(const struct worker_config *config, struct worker **out)
{
    struct worker *w;
    struct models *models = NULL;
    enum err e = OK;
    TRY(MEM_NEW(&w));
    w->config = *config;
    TRY_OUT(worker_rank_find(&w->config));
    TRY_OUT(MEM_NEW(&models));
    TRY_OUT(plan_make(&w->config, models, &w->plan));
    info_fill(&w->config, &models->target, &w->plan, &w->info);
    TRY_OUT(backend_start(&w->config, &models->target, &w->plan, &w->backend));
    if (w->backend->stream)
        snprintf(w->info.device, sizeof w->info.device, "%s, GPU %d", w->backend->ops->name,
                 w->config.device_index);
    else
        device_words(w, w->info.device, sizeof w->info.device);
    TRY_OUT(weights_start(w, &models->target));
    TRY_OUT(state_start(w));
    if (w->plan.draft.group.size) TRY_OUT(draft_start(w, &models->draft));
    TRY_OUT(moves_start(w));
    *out = w;
    w = NULL;
out:
    mem_free(models);
    if (e) e = memory_words_add(w, e);
    char why[1024];
    snprintf(why, sizeof why, "%s", e ? err_detail() : "");
    worker_destroy(w);
    return e ? err_set(e, "%s", why) : OK;
}

void worker_destroy(struct worker *w)
{
    if (!w) return;
    if (w->model) settle_stop(w->model->settle); /* before any weight goes, the draft's too */
    if (w->backend) graphs_drop(&w->graphs, w->backend);
    collective_close(w->decoder.collective);
    if (w->decoder.kv) w->backend->ops->kv_destroy(w->backend, w->decoder.kv);
    if (w->decoder.model) decoder_fini(&w->decoder);
    draft_destroy(w->draft);
    slots_fini(&w->slots);
    for (int i = 0; i < STEPS_IN_FLIGHT; i++)
        step_fini(&w->steps[i]);
    mem_free(w->copy_from);
    mem_free(w->copy_to);
    kv_disk_close(w->disk);
    mem_free_huge(w->host_blocks, w->host_bytes);
    arena_fini(&w->arena);
    model_unload(w->model);
    if (w->backend) w->backend->ops->close(w->backend);
    mem_free(w);
}

void worker_info(const struct worker *w, struct worker_info *out)
{
    *out = w->info;
}
