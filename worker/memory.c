/* Budget arithmetic. Knows sizes; loads nothing. */
#include "worker/memory.h"
#include "base/log.h"
#include "worker/graphs.h"
#include "worker/kv_disk.h"
#include "worker/model/decoder.h"
#include "worker/step.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    SLOTS_DEFAULT = 256,
    PROMPT_TOKENS_CPU =
        48, /* of a step beside its decodes: larger ones only make the others wait */
    TOKENS_DEFAULT_CUDA = 2048,
    LOGITS_BYTES_MAX = 256 << 20
};
static const uint64_t cpu_kv_bytes_default = 4ull << 30;

const char *weight_format_name(enum weight_format f)
{
    static const char *const names[WEIGHT_FORMAT_COUNT] = {"auto", "f32",  "f16", "bf16",
                                                           "int8", "int4", "fp8", "int4"};
    return (unsigned)f < WEIGHT_FORMAT_COUNT ? names[f] : "?";
}

static enum weight_format stored_format(enum dtype t)
{
    return t == DTYPE_F32 ? WEIGHT_F32 : t == DTYPE_F16 ? WEIGHT_F16 : WEIGHT_BF16;
}

void memory_format_words(const struct memory_plan *p, char *out, size_t size)
{
    enum weight_format f = p->format ? p->format : stored_format(p->file_dtype);
    enum weight_format h = p->head_format ? p->head_format : stored_format(p->file_dtype);
    if (p->quant)
        snprintf(out, size, "int4 by %s (head %s)", quant_name(p->quant), weight_format_name(h));
    else if (f == h)
        snprintf(out, size, "%s", weight_format_name(f));
    else
        snprintf(out, size, "%s (head %s)", weight_format_name(f), weight_format_name(h));
}

static enum err name_find(const char *option, const char *value, const char *const *names, int n,
                          int *out)
{
    for (int i = 0; i < n; i++) {
        if (names[i] && !strcmp(value, names[i])) {
            *out = i;
            return OK;
        }
    }
    FAIL(ERR_INVALID, "%s: unknown value '%.32s'", option, value);
}

/* The output projection may have a format of its own, where the weights are quantized at all. */
static enum err head_read(const struct worker_config *config, struct memory_plan *p)
{
    static const char *const names[] = {"auto", "int8", "int4"};
    static const enum weight_format formats[] = {WEIGHT_AUTO, WEIGHT_INT8, WEIGHT_INT4};
    int head;
    TRY(name_find("--head-quantization",
                  config->head_quantization ? config->head_quantization : "auto", names, 3, &head));
    if (head) p->head_format = formats[head];
    return OK;
}

static enum err formats_read(const struct worker_config *config, bool *out_auto,
                             struct memory_plan *p)
{
    static const char *const dtypes[] = {
        [WEIGHT_AUTO] = "auto", [WEIGHT_F32] = "f32", [WEIGHT_F16] = "f16", [WEIGHT_BF16] = "bf16"};
    static const char *const quants[WEIGHT_FORMAT_COUNT + 1] = {[WEIGHT_AUTO] = "none",
                                                                [WEIGHT_INT8] = "int8",
                                                                [WEIGHT_INT4] = "int4",
                                                                [WEIGHT_FP8] = "fp8",
                                                                [WEIGHT_FORMAT_COUNT] = "auto"};
    int dtype, quant;
    TRY(name_find("--dtype", config->dtype ? config->dtype : "auto", dtypes, WEIGHT_BF16 + 1,
                  &dtype));
    TRY(name_find("--quantization", config->quantization ? config->quantization : "none", quants,
                  WEIGHT_FORMAT_COUNT + 1, &quant));
    *out_auto = quant == WEIGHT_FORMAT_COUNT;
    p->format = p->head_format = (enum weight_format)dtype;
    if (quant == WEIGHT_INT8 || quant == WEIGHT_FP8)
        p->format = p->head_format = (enum weight_format)quant;
    if (quant == WEIGHT_INT4) p->format = WEIGHT_INT4, p->head_format = WEIGHT_INT8;
    return head_read(config, p);
}

/* A file of packed weights says its formats itself; a flag may only agree. */
static enum err packed_formats(const struct worker_config *config, const struct packed_file *f,
                               bool *out_auto, struct memory_plan *p)
{
    const char *asked = config->quantization ? config->quantization : "none";
    bool agrees = !strcmp(asked, "none") || !strcmp(asked, "auto") ||
                  !strcmp(asked, weight_format_name(f->format));
    if (!agrees)
        FAIL(ERR_INVALID, "--quantization %.16s, but %s holds %s weights", asked, config->model_dir,
             weight_format_name(f->format));
    *out_auto = false;
    p->format = f->format;
    p->head_format = f->head_format;
    p->file_dtype = f->dtype;
    return OK;
}

/* A checkpoint of codes says how its matrices are kept; a flag may only agree. Dummy weights are of
 * our own format of the same size. file: NULL = dummy. */
static enum err codes_formats(const struct worker_config *config, const struct model_config *model,
                              const struct safetensors *file, bool *out_auto, struct memory_plan *p)
{
    const char *asked = config->quantization ? config->quantization : "none";
    struct worker_config own = *config;
    if (strcmp(asked, "none") && strcmp(asked, "auto") && strcmp(asked, "int4"))
        FAIL(ERR_INVALID, "--quantization %.16s, but %s holds int4 weights made by %s", asked,
             config->model_dir, quant_name(model->quant.method));
    own.quantization = "none";
    TRY(formats_read(&own, out_auto, p));
    if (!file) {
        p->format = WEIGHT_INT4;
        return OK;
    }
    p->quant = model->quant.method;
    if (safetensors_find(file, "lm_head.qweight") ||
        safetensors_find(file, "lm_head.weight_packed"))
        p->head_format = WEIGHT_INT4;
    return OK;
}

static enum err kv_dtype_read(const struct worker_config *config, const struct backend *b,
                              struct memory_plan *p)
{
    static const char *const names[DTYPE_COUNT + 1] = {
        [DTYPE_F32] = "f32", [DTYPE_F16] = "f16",      [DTYPE_BF16] = "bf16",
        [DTYPE_I8] = "int8", [DTYPE_FP8_E4M3] = "fp8", [DTYPE_COUNT] = "auto"};
    int dtype;
    TRY(name_find("--kv-dtype", config->kv_dtype ? config->kv_dtype : "auto", names,
                  DTYPE_COUNT + 1, &dtype));
    if (dtype == DTYPE_COUNT) dtype = b->stream ? (int)b->activation_dtype : (int)p->file_dtype;
    p->kv_dtype = (enum dtype)dtype;
    return OK;
}

static enum err context_choose(const struct worker_config *config, const struct model_config *model,
                               struct memory_plan *p)
{
    if (config->context_max > model->context_max)
        FAIL(ERR_INVALID, "--max-model-len %d, but the model knows %d positions (%s)",
             config->context_max, model->context_max, model->path);
    p->context_max = config->context_max ? config->context_max : model->context_max;
    return OK;
}

/* Ranks that share this host's memory. */
static int local_ranks(struct group g)
{
    const char *said = getenv("OMPI_COMM_WORLD_LOCAL_SIZE");
    long n = said ? strtol(said, NULL, 10) : 0;
    return n >= 1 && n <= 4096 ? (int)n : g.size;
}

static void sizes_choose(const struct worker_config *config, const struct model_config *model,
                         const struct backend *b, struct memory_plan *p)
{
    int64_t rows_fit = LOGITS_BYTES_MAX / ((int64_t)model->vocab_size * 4);
    p->draft_max = config->draft_tokens_max;
    p->n_slots = config->n_sequences_max ? config->n_sequences_max : SLOTS_DEFAULT;
    p->step_tokens_max = config->step_tokens_max ? config->step_tokens_max
                         : b->stream             ? TOKENS_DEFAULT_CUDA
                                     : p->n_slots * (1 + p->draft_max) + PROMPT_TOKENS_CPU;
    p->step_prompt_max = config->step_tokens_max || b->stream ? 0 : PROMPT_TOKENS_CPU;
    if (p->step_tokens_max < p->n_slots * (1 + p->draft_max))
        p->step_tokens_max = p->n_slots * (1 + p->draft_max);
    int64_t rows =
        config->step_rows_max ? config->step_rows_max : (int64_t)p->n_slots * (1 + p->draft_max);
    if (rows > rows_fit) rows = rows_fit < 16 ? 16 : rows_fit;
    p->logits_rows_max = (int)(rows < p->step_tokens_max ? rows : p->step_tokens_max);
}

/* Sizes of decode steps that are recorded, and what the recordings take. */
static uint64_t graphs_choose(const struct worker_config *config, const struct backend *b,
                              struct memory_plan *p)
{
    int sizes[GRAPHS_MAX], rows = p->n_slots < p->logits_rows_max ? p->n_slots : p->logits_rows_max;
    p->graph_rows_max = config->eager || !b->ops->capture_begin || !b->ops->replay ? 0 : rows;
    return (uint64_t)graph_sizes(p->graph_rows_max, sizes) * GRAPH_BYTES;
}

static uint64_t sequence_blocks(const struct memory_plan *p)
{
    return ((uint64_t)p->context_max + (uint64_t)p->draft_max + (uint64_t)p->kv.block_size) /
           (uint64_t)p->kv.block_size;
}

/* Bytes that KV may take once weights and work space have theirs; 0 when nothing is left. */
static uint64_t kv_budget(const struct worker_config *config, struct group g,
                          const struct backend *b, const struct memory_plan *p)
{
    uint64_t used = p->weight_bytes + p->table_bytes + p->work_bytes + p->draft.weight_bytes +
                    p->draft.table_bytes + p->draft.work_bytes,
             mine;
    if (config->n_blocks) return config->n_blocks * p->block_bytes;
    if (config->kv_cache_bytes) return config->kv_cache_bytes;
    double share = config->memory_share > 0 ? config->memory_share : b->stream ? 0.9 : 0.8;
    mine = (uint64_t)(share * (double)p->memory_free) / (uint64_t)(b->stream ? 1 : local_ranks(g));
    mine = mine > used ? mine - used : 0;
    if (!b->stream && config->memory_share <= 0 && mine > cpu_kv_bytes_default)
        mine = cpu_kv_bytes_default;
    return mine;
}

static double gib(uint64_t bytes)
{
    return (double)bytes / (double)(1ull << 30);
}

/* How long a context the budget holds, in whole blocks. */
static uint64_t context_that_fits(const struct memory_plan *p, uint64_t budget)
{
    uint64_t tokens = budget / p->block_bytes * (uint64_t)p->kv.block_size;
    return tokens > (uint64_t)p->draft_max + 1 ? tokens - (uint64_t)p->draft_max - 1 : 0;
}

static void weights_measure(const struct model_config *model, struct group g, struct memory_plan *p)
{
    struct weights_options o = {
        .format = p->format, .head_format = p->head_format, .context_max = p->context_max};
    model_bytes_estimate(model, g, &o, p->file_dtype, &p->weight_bytes, &p->table_bytes);
}

/* Everything but the number of blocks, for the formats and the context that p has. False: the
 * device cannot keep such a cache, err_detail says why. */
static bool sizes_measure(const struct worker_config *config, const struct model_config *model,
                          struct group g, struct backend *b, struct memory_plan *p)
{
    struct shard_heads heads = shard_heads(model->n_heads, model->n_kv_heads, g.rank, g.size);
    weights_measure(model, g, p);
    p->work_bytes = decoder_bytes(model, g, b, p->step_tokens_max, p->logits_rows_max);
    p->work_bytes += graphs_choose(config, b, p);
    p->kv = (struct kv_cache_args){.n_layers = model->n_layers,
                                   .n_kv_heads = (int)shard_count(heads.kv),
                                   .head_dim = model->head_dim,
                                   .block_size = config->block_size ? config->block_size
                                                                    : b->ops->block_size_default(b),
                                   .n_blocks = 1,
                                   .dtype = p->kv_dtype};
    p->block_bytes = b->ops->kv_bytes(b, &p->kv);
    return p->block_bytes != 0;
}

static uint64_t blocks_that_fit(const struct worker_config *config, struct group g,
                                const struct backend *b, const struct memory_plan *p)
{
    return kv_budget(config, g, b, p) / p->block_bytes;
}

/* --- what would fit, where this does not --- */

struct advice {
    const struct worker_config *config;
    const struct model_config *model;
    struct backend *backend;
    const struct memory_plan *plan;
    struct group group;
    char words[384];
};

/* Adds the option if with it one sequence of full length fits. */
static void advice_try(struct advice *a, struct memory_plan p, int size, const char *option)
{
    struct group g = {size == a->group.size ? a->group.rank : 0, size};
    const struct model_config *m = a->model;
    size_t n = strlen(a->words);
    if (shard_check(m->n_heads, m->n_kv_heads, m->ffn, m->vocab_size, size)) return;
    if (!sizes_measure(a->config, m, g, a->backend, &p)) return;
    if (blocks_that_fit(a->config, g, a->backend, &p) < sequence_blocks(&p)) return;
    snprintf(a->words + n, sizeof a->words - n, "%s%s", n ? ", or " : "", option);
}

static void advice_find(struct advice *a)
{
    char option[64];
    struct memory_plan p = *a->plan;
    uint64_t context = context_that_fits(&p, kv_budget(a->config, a->group, a->backend, &p));
    if (context >= 64) {
        snprintf(option, sizeof option, "--max-model-len %llu", (unsigned long long)context);
        p.context_max = (int)context;
        advice_try(a, p, a->group.size, option);
    }
    p = *a->plan;
    p.kv_dtype = DTYPE_I8;
    advice_try(a, p, a->group.size, "--kv-cache-dtype int8");
    p = *a->plan;
    bool whole = p.format <= WEIGHT_BF16 && !p.quant; /* not in fewer bits already */
    p.format = p.head_format = WEIGHT_INT8;
    if (whole) advice_try(a, p, a->group.size, "--quantization int8");
    p.format = WEIGHT_INT4;
    if (whole) advice_try(a, p, a->group.size, "--quantization int4");
    for (int size = a->group.size * 2; size <= 8; size *= 2) {
        bool found = strstr(a->words, "--tp") != NULL;
        snprintf(option, sizeof option, "--tp %d", size);
        if (!found) advice_try(a, *a->plan, size, option);
    }
    if (!*a->words)
        snprintf(
            a->words, sizeof a->words,
            "no one option alone (a smaller model, several of "
            "--quantization int4, --kv-cache-dtype int8, a short --max-model-len, or more --tp)");
}

/* Bytes of KV cache that 1024 tokens of one sequence take on this rank. */
static uint64_t kv_bytes_1k(const struct memory_plan *p)
{
    return p->block_bytes * 1024 / (uint64_t)p->kv.block_size;
}

void memory_plan_words(const struct memory_plan *p, char *out, size_t size)
{
    snprintf(out, size,
             "weights %.2f GiB, tables %.2f, work space %.2f, KV cache %.2f (%.1f MiB for 1k "
             "tokens), of %.2f GiB free",
             gib(p->weight_bytes), gib(p->table_bytes), gib(p->work_bytes),
             gib(p->block_bytes * (uint64_t)p->kv.n_blocks), (double)kv_bytes_1k(p) / (1 << 20),
             gib(p->memory_free));
}

static enum err no_room(const struct worker_config *config, const struct model_config *model,
                        struct group g, struct backend *b, const struct memory_plan *p)
{
    struct advice a = {.config = config, .model = model, .backend = b, .plan = p, .group = g};
    uint64_t budget = kv_budget(config, g, b, p);
    advice_find(&a);
    FAIL(ERR_NO_MEMORY,
         "rank %d: the model does not fit: weights %.2f GiB, tables %.2f, work space %.2f and %.3f "
         "of KV cache for one sequence of %d tokens (%.1f MiB for 1k tokens), but of %.2f GiB free "
         "%.3f are left for KV; what would fit: %s",
         g.rank, gib(p->weight_bytes), gib(p->table_bytes), gib(p->work_bytes),
         gib(sequence_blocks(p) * p->block_bytes), p->context_max,
         (double)kv_bytes_1k(p) / (1 << 20), gib(p->memory_free), gib(budget), a.words);
}

static enum err blocks_choose(const struct worker_config *config, const struct model_config *model,
                              struct group g, struct backend *b, struct memory_plan *p)
{
    uint64_t budget = kv_budget(config, g, b, p), need = sequence_blocks(p),
             blocks = budget / p->block_bytes;
    if (blocks < need && !config->context_max && context_that_fits(p, budget) >= 512) {
        log_warn("context cut from %d to %llu tokens: that is what %.2f GiB of KV cache hold",
                 p->context_max, (unsigned long long)context_that_fits(p, budget), gib(budget));
        p->context_max = (int)context_that_fits(p, budget);
        need = sequence_blocks(p);
    }
    if (blocks < need) return no_room(config, model, g, b, p);
    uint64_t most = (uint64_t)INT32_MAX / (uint64_t)p->kv.block_size;
    /* beyond every slot at full length, blocks would only hold old prefixes: twice that is plenty
     */
    uint64_t plenty = 2 * (uint64_t)p->n_slots * need;
    if (blocks > plenty && !config->kv_cache_bytes && !config->n_blocks) blocks = plenty;
    p->kv.n_blocks = (int)(blocks < most ? blocks : most);
    p->n_host_blocks = config->host_swap_bytes / p->block_bytes;
    if (p->n_host_blocks > INT32_MAX) p->n_host_blocks = INT32_MAX;
    if (!config->kv_disk_dir || !config->kv_disk_bytes) return OK;
    if (!p->n_host_blocks)
        FAIL(ERR_INVALID,
             "--kv-disk needs --swap-bytes of at least a block (%llu bytes): blocks "
             "reach the disk through host memory",
             (unsigned long long)p->block_bytes);
    p->n_disk_blocks = kv_disk_blocks(config->kv_disk_bytes, p->block_bytes);
    if (!p->n_disk_blocks)
        FAIL(ERR_INVALID, "--kv-disk-space %llu holds no block of %llu bytes",
             (unsigned long long)config->kv_disk_bytes, (unsigned long long)p->block_bytes);
    return OK;
}

/* The first of none, int8, int4 that leaves a quarter of the memory for KV. */
static void format_choose(struct group g, const struct backend *b, const struct model_config *model,
                          struct memory_plan *p)
{
    static const enum weight_format ladder[] = {WEIGHT_INT8, WEIGHT_INT4};
    uint64_t mine = p->memory_free / (uint64_t)(b->stream ? 1 : local_ranks(g));
    for (int i = 0; i < 2 && p->weight_bytes > mine / 4 * 3; i++) {
        p->format = ladder[i];
        if (p->head_format != WEIGHT_INT4) p->head_format = WEIGHT_INT8;
        weights_measure(model, g, p);
    }
    log_info("quantization: %s chosen by itself (weights %.2f GiB of %.2f free)",
             weight_format_name(p->format ? p->format : stored_format(p->file_dtype)),
             gib(p->weight_bytes), gib(mine));
}

/* How the draft model is stored and kept: its own flag, its own file, else as the target's flag. */
static enum err draft_formats(const struct worker_config *config, const struct model_config *draft,
                              const struct backend *b, bool *out_auto, struct memory_plan *out)
{
    struct worker_config own = *config;
    struct safetensors *file = NULL;
    struct packed_file packed;
    bool dummy = config->load_format && !strcmp(config->load_format, "dummy"), is_packed = false;
    enum err e = OK;
    *out = (struct memory_plan){.file_dtype = draft->dtype};
    own.model_dir = config->draft_model_dir;
    if (config->draft_quantization)
        own.quantization = config->draft_quantization, own.head_quantization = NULL;
    if (!dummy) TRY(safetensors_open(config->draft_model_dir, &file));
    out->file_dtype = weights_dtype(draft, file);
    if (draft->quant.method)
        TRY_OUT(codes_formats(&own, draft, file, out_auto, out));
    else
        TRY_OUT(formats_read(&own, out_auto, out));
    if (file) TRY_OUT(packed_read(file, &is_packed, &packed));
    if (is_packed) TRY_OUT(packed_formats(&own, &packed, out_auto, out));
    TRY_OUT(kv_dtype_read(&own, b, out));
out:
    safetensors_close(file);
    return e;
}

/* What the draft model takes beside the target: weights, work space, its part of each block. Its
 * passes need no larger collective than the target's, so that ranks with and without one agree. */
static enum err draft_measure(const struct worker_config *config, const struct model_config *model,
                              const struct model_config *draft, struct group g, struct backend *b,
                              struct memory_plan *p)
{
    struct memory_plan formats;
    bool automatic, divides = !shard_check(draft->n_heads, draft->n_kv_heads, draft->ffn,
                                           draft->vocab_size, g.size);
    TRY(draft_formats(config, draft, b, &automatic, &formats));
    p->draft.file_dtype = formats.file_dtype;
    p->draft.group = divides ? g : (struct group){0, 1};
    p->draft.quant = formats.quant;
    p->draft.format = automatic ? p->format : formats.format;
    p->draft.head_format = automatic ? p->head_format : formats.head_format;
    p->draft.context_max =
        draft->context_max < p->context_max ? draft->context_max : p->context_max;
    p->draft.rows_max = p->n_slots < p->logits_rows_max ? p->n_slots : p->logits_rows_max;
    p->draft.n_tokens_max = draft->hidden > model->hidden
                                ? (int)((int64_t)p->step_tokens_max * model->hidden / draft->hidden)
                                : p->step_tokens_max;
    if (p->draft.n_tokens_max < p->n_slots)
        FAIL(ERR_UNSUPPORTED, "the draft model %s is too wide for %s: hidden size %d and %d",
             draft->path, model->path, draft->hidden, model->hidden);
    struct weights_options o = {.format = p->draft.format,
                                .head_format = p->draft.head_format,
                                .context_max = p->draft.context_max};
    model_bytes_estimate(draft, p->draft.group, &o, formats.file_dtype, &p->draft.weight_bytes,
                         &p->draft.table_bytes);
    p->draft.work_bytes =
        decoder_bytes(draft, p->draft.group, b, p->draft.n_tokens_max, p->draft.rows_max);
    struct shard_heads heads =
        shard_heads(draft->n_heads, draft->n_kv_heads, p->draft.group.rank, p->draft.group.size);
    p->draft.kv = (struct kv_cache_args){.n_layers = draft->n_layers,
                                         .n_kv_heads = (int)shard_count(heads.kv),
                                         .head_dim = draft->head_dim,
                                         .block_size = p->kv.block_size,
                                         .n_blocks = 1,
                                         .dtype = formats.kv_dtype};
    p->draft.block_bytes = b->ops->kv_bytes(b, &p->draft.kv);
    if (!p->draft.block_bytes)
        FAIL(ERR_UNSUPPORTED,
             "the draft model %s: a KV cache of %s in blocks of %d is not possible", draft->path,
             dtype_name(formats.kv_dtype), p->kv.block_size);
    p->block_bytes += p->draft.block_bytes;
    return OK;
}

enum err memory_plan(const struct worker_config *config, const struct model_config *model,
                     const struct model_config *draft, const struct safetensors *file,
                     struct group g, struct backend *b, struct memory_plan *out)
{
    struct memory_plan p = {.file_dtype = model->dtype};
    struct packed_file packed;
    bool automatic, is_packed = false;
    size_t free_bytes, total_bytes;
    p.file_dtype = weights_dtype(model, file);
    if (model->quant.method)
        TRY(codes_formats(config, model, file, &automatic, &p));
    else
        TRY(formats_read(config, &automatic, &p));
    if (file) TRY(packed_read(file, &is_packed, &packed));
    if (is_packed) TRY(packed_formats(config, &packed, &automatic, &p));
    TRY(kv_dtype_read(config, b, &p));
    TRY(context_choose(config, model, &p));
    TRY(b->ops->memory(b, &free_bytes, &total_bytes));
    p.memory_free = free_bytes;
    p.memory_total = total_bytes;
    sizes_choose(config, model, b, &p);
    weights_measure(model, g, &p);
    if (automatic) format_choose(g, b, model, &p);
    if (!sizes_measure(config, model, g, b, &p)) {
        char why[256];
        snprintf(why, sizeof why, "%s", err_detail());
        FAIL(ERR_UNSUPPORTED, "this device cannot keep the KV cache: %s", why);
    }
    if (draft) TRY(draft_measure(config, model, draft, g, b, &p));
    TRY(blocks_choose(config, model, g, b, &p));
    p.draft.kv.n_blocks = p.kv.n_blocks;
    *out = p;
    return OK;
}
