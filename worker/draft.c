/* Rounds of drafting: one pass that catches up with the known tokens, then one token a pass. */
#include "worker/draft.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/mem.h"

#include <string.h>

static uint32_t least(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

/* --- which KV is there --- */

void draft_written(struct slots *slots, struct slot *t, uint32_t from, uint32_t to)
{
    uint32_t size = slots->limits.block_size;
    if (!slots->draft_valid || from >= to) return;
    for (uint32_t i = from / size; i <= (to - 1) / size; i++) {
        uint16_t *valid = &slots->draft_valid[t->blocks[i]];
        uint32_t first = i == from / size ? from % size : 0;
        if (*valid > first) *valid = (uint16_t)first;
    }
    if (t->n_draft_marked > from) t->n_draft_marked = from;
}

/* Says of the slot's blocks what is computed of its known tokens. */
static void mark(struct slots *slots, struct slot *t)
{
    uint32_t size = slots->limits.block_size, to = least(t->n_draft_computed, t->n_known);
    for (uint32_t i = t->n_draft_marked / size; i * size < to; i++)
        slots->draft_valid[t->blocks[i]] = (uint16_t)least(size, to - i * size);
    if (to > t->n_draft_marked) t->n_draft_marked = to;
}

/* Leading tokens that need not be computed: the slot's own, or those of a prefix that others have
 * computed. The last known token always is, for its logits. */
static uint32_t computed_find(const struct slots *slots, struct slot *t)
{
    uint32_t size = slots->limits.block_size, most = least(t->n_known - 1, t->n_computed);
    uint32_t n = t->n_draft_computed;
    while (n < most) {
        uint32_t valid = slots->draft_valid[t->blocks[n / size]], end = n / size * size + valid;
        if (end <= n) break;
        n = least(end, most);
        if (valid < size) break;
    }
    if (n > t->n_draft_computed) t->n_draft_computed = t->n_draft_marked = n;
    return least(t->n_draft_computed, t->n_known - 1);
}

/* --- one pass --- */

static void pass_clear(struct draft *d)
{
    d->n_tokens = d->n_seqs = d->n_rows = 0;
}

static void row_add(struct draft *d, const struct slot *t, uint32_t item)
{
    struct sample_row *row = &d->rows[d->n_rows];
    step_row_sampled(t, d->list[item], t->n_known + t->n_drafts, false, false, row);
    if (d->greedy) row->temperature = 0;
    d->rows_out[d->n_rows] = (int32_t)d->n_tokens - 1;
    d->row_list[d->n_rows++] = item;
}

static void pass_add(struct draft *d, const struct slot *t, uint32_t item, uint32_t from,
                     uint32_t n)
{
    int32_t *table = d->block_table + (size_t)d->n_seqs * d->stride;
    for (uint32_t i = 0; i < n; i++, d->n_tokens++) {
        uint32_t p = from + i;
        d->token_ids[d->n_tokens] = t->tokens[p];
        d->token_slot[d->n_tokens] = (int32_t)d->list[item];
        d->positions[d->n_tokens] = (int32_t)p;
        d->cache_slot[d->n_tokens] =
            t->blocks[p / d->block_size] * (int32_t)d->block_size + (int32_t)(p % d->block_size);
    }
    memcpy(table, t->blocks, t->n_blocks * sizeof *table);
    memset(table + t->n_blocks, 0, (d->stride - t->n_blocks) * sizeof *table);
    d->context_len[d->n_seqs++] = (int32_t)(from + n);
    d->seq_start[d->n_seqs] = (int32_t)d->n_tokens;
}

static enum err pass_compute(struct draft *d)
{
    const struct backend_ops *ops = d->backend->ops;
    d->seq_start[0] = 0;
    d->batch = (struct batch){.n_tokens = (int)d->n_tokens,
                              .n_seqs = (int)d->n_seqs,
                              .n_rows_out = (int)d->n_rows,
                              .blocks_per_seq_max = (int)d->stride,
                              .token_ids = d->token_ids,
                              .token_slot = d->token_slot,
                              .positions = d->positions,
                              .seq_start = d->seq_start,
                              .context_len = d->context_len,
                              .block_table = d->block_table,
                              .cache_slot = d->cache_slot,
                              .rows_out = d->rows_out};
    ops->batch_begin(d->backend, &d->batch);
    TRY(decoder_forward(&d->decoder, &d->batch));
    for (uint32_t row = 0, n; row < d->n_rows; row += n) {
        struct tensor logits;
        n = least(d->n_rows - row, (uint32_t)d->decoder.logits_rows_max);
        TRY(decoder_logits(&d->decoder, (int)row, (int)n, &logits));
        ops->sample(d->backend, logits, d->rows + row, (int)n, d->results + row);
    }
    d->passes++;
    d->tokens_fed += d->n_tokens;
    return ops->ticket_wait(d->backend, ops->step_end(d->backend));
}

/* Ranks that each computed the whole take rank 0's tokens: their sums may differ in the last bit
 * where their processors do. */
static enum err agree(struct draft *d)
{
    const struct backend_ops *ops = d->backend->ops;
    size_t bytes = d->n_rows * sizeof *d->tokens;
    if (d->sharded || d->size == 1 || !bytes) return OK;
    TRY(ops->upload(d->backend, d->agreed, d->tokens, bytes));
    TRY(d->collective->ops->broadcast(d->collective, d->agreed, bytes, 0));
    TRY(ops->sync(d->backend));
    return ops->download(d->backend, d->tokens, d->agreed, bytes);
}

static bool ends(const struct slot *t, int32_t token)
{
    for (int32_t i = 0; i < t->sampling.n_stop_ids; i++)
        if (t->sampling.stop_ids[i] == token) return true;
    return false;
}

static enum err pass_run(struct draft *d, struct slots *slots)
{
    TRY(pass_compute(d));
    for (uint32_t i = 0; i < d->n_rows; i++)
        d->tokens[i] = d->results[i].token;
    TRY(agree(d));
    for (uint32_t i = 0; i < d->n_rows; i++) {
        uint32_t item = d->row_list[i];
        struct slot *t = &slots->all[d->list[item]];
        t->tokens[t->n_known + t->n_drafts++] = d->tokens[i];
        if (ends(t, d->tokens[i])) d->wanted[item] = t->n_drafts; /* nothing comes after it */
    }
    return OK;
}

/* --- a round --- */

/* How many drafts the slot could use: its length, its blocks, the draft model's positions. */
static uint32_t wanted_of(const struct draft *d, const struct slot *t)
{
    uint32_t n_positions = least(t->n_blocks * d->block_size, d->context_max);
    if (t->n_known + 1 >= t->n_tokens_max || t->n_known > n_positions) return 0;
    if (t->tokens[t->n_known - 1] == TOKEN_PENDING || ends(t, t->tokens[t->n_known - 1])) return 0;
    return least(t->n_ahead, least(t->n_tokens_max - t->n_known - 1, n_positions - t->n_known + 1));
}

static void list_make(struct draft *d, struct slots *slots)
{
    d->n_list = 0;
    d->stride = 1;
    for (uint32_t i = 0; i < slots->limits.n_slots; i++) {
        struct slot *t = &slots->all[i];
        if (!t->open || !t->n_ahead) continue;
        uint32_t n = wanted_of(d, t);
        t->n_drafts = t->n_ahead = 0;
        if (!n) continue;
        d->list[d->n_list] = i;
        d->wanted[d->n_list++] = n;
        if (t->n_blocks > d->stride) d->stride = t->n_blocks;
    }
}

/* Known tokens that it has not seen, as many as fit; who is not done has no drafts this time. */
static void catch_up(struct draft *d, struct slots *slots)
{
    uint32_t n_left = (uint32_t)d->decoder.n_tokens_max;
    pass_clear(d);
    for (uint32_t i = 0; i < d->n_list; i++) {
        struct slot *t = &slots->all[d->list[i]];
        uint32_t from = computed_find(slots, t), n_need = t->n_known - from;
        uint32_t n = least(n_need, n_left);
        if (n < n_need) d->wanted[i] = 0;
        if (!n) continue;
        pass_add(d, t, i, from, n);
        if (n == n_need) row_add(d, t, i);
        n_left -= n;
        t->n_draft_computed = from + n;
        mark(slots, t); /* the pass writes a layer's keys before anybody reads them */
    }
}

static void continue_drafts(struct draft *d, struct slots *slots)
{
    pass_clear(d);
    for (uint32_t i = 0; i < d->n_list; i++) {
        struct slot *t = &slots->all[d->list[i]];
        if (t->n_drafts >= d->wanted[i]) continue;
        pass_add(d, t, i, t->n_known + t->n_drafts - 1, 1);
        row_add(d, t, i);
        t->n_draft_computed = t->n_known + t->n_drafts;
    }
}

enum err draft_ahead(struct draft *d, struct slots *slots)
{
    int64_t begun = clock_monotonic_us();
    d->pending = false;
    d->us = d->first_us = d->passes = d->tokens_fed = 0;
    list_make(d, slots);
    if (!d->n_list) return OK;
    catch_up(d, slots);
    while (d->n_seqs) {
        TRY(pass_run(d, slots));
        if (d->passes == 1) d->first_us = clock_monotonic_us() - begun;
        continue_drafts(d, slots);
    }
    d->us = clock_monotonic_us() - begun;
    return OK;
}

/* --- blocks --- */

void draft_move(struct draft *d, struct slots *slots, const struct step_plan *p, void *host)
{
    const struct backend_ops *ops = d->backend->ops;
    char *at = (char *)host + d->host_offset;
    uint64_t stride = d->host_offset + d->block_bytes;
    for (uint32_t i = 0; i < p->n_saves; i++) {
        ops->kv_save(d->backend, d->decoder.kv, (int32_t)p->saves[i].from,
                     at + p->saves[i].to * stride);
        d->host_valid[p->saves[i].to] = slots->draft_valid[p->saves[i].from];
    }
    for (uint32_t i = 0; i < p->n_loads; i++) {
        ops->kv_load(d->backend, d->decoder.kv, (int32_t)p->loads[i].to,
                     at + p->loads[i].from * stride);
        slots->draft_valid[p->loads[i].to] = d->host_valid[p->loads[i].from];
    }
    for (uint32_t i = 0; i < p->n_fetches; i++) /* what comes from disk is caught up with */
        d->host_valid[p->fetches[i].to] = 0;
    int32_t *from = d->context_len, *to = d->rows_out; /* free between rounds */
    for (uint32_t done = 0, n; done < p->n_copies; done += n) {
        n = least(p->n_copies - done, slots->limits.n_slots);
        for (uint32_t i = 0; i < n; i++) {
            from[i] = (int32_t)p->copies[done + i].from, to[i] = (int32_t)p->copies[done + i].to;
            slots->draft_valid[to[i]] = slots->draft_valid[from[i]];
        }
        ops->kv_copy(d->backend, d->decoder.kv, from, to, (int)n);
    }
}

/* --- life --- */

static enum err arrays_make(struct draft *d, const struct slots *slots, size_t n_tokens,
                            size_t n_host)
{
    size_t n = slots->limits.n_slots;
    const struct {
        size_t count, bytes;
        void **out;
    } arrays[15] = {
        {n_tokens, 4, (void **)&d->token_ids},
        {n_tokens, 4, (void **)&d->token_slot},
        {n_tokens, 4, (void **)&d->positions},
        {n_tokens, 4, (void **)&d->cache_slot},
        {n, 4, (void **)&d->rows_out},
        {n + 1, 4, (void **)&d->seq_start},
        {n, 4, (void **)&d->context_len},
        {n * slots->blocks_per_slot, 4, (void **)&d->block_table},
        {n, sizeof *d->rows, (void **)&d->rows},
        {n, sizeof *d->results, (void **)&d->results},
        {n, 4, (void **)&d->row_list},
        {n, 4, (void **)&d->tokens},
        {n, 4, (void **)&d->list},
        {n, 4, (void **)&d->wanted},
        {n_host, sizeof *d->host_valid, (void **)&d->host_valid},
    };
    for (int i = 0; i < 15; i++) {
        TRY(mem_alloc_array(arrays[i].count, arrays[i].bytes, &d->pieces[i]));
        *arrays[i].out = d->pieces[i];
    }
    return OK;
}

static enum err fill(struct draft *d, const struct worker_config *c, const struct memory_plan *p,
                     const struct model_config *model, struct slots *slots)
{
    struct weights_options o = {.model_dir = c->draft_model_dir,
                                .dummy = c->load_format && !strcmp(c->load_format, "dummy"),
                                .seed = c->dummy_seed,
                                .format = p->draft.format,
                                .head_format = p->draft.head_format,
                                .context_max = p->draft.context_max};
    TRY(model_load(&o, model, p->draft.group, d->backend, &d->model));
    TRY(decoder_init(&d->decoder, d->model, p->draft.n_tokens_max, p->draft.rows_max));
    TRY(d->backend->ops->kv_create(d->backend, &p->draft.kv, &d->decoder.kv));
    TRY(d->backend->ops->alloc(d->backend, slots->limits.n_slots * sizeof(int32_t), &d->agreed));
    TRY(arrays_make(d, slots, (size_t)p->draft.n_tokens_max, p->n_host_blocks));
    return MEM_NEW_ARRAY(p->kv.n_blocks, &slots->draft_valid);
}

enum err draft_create(const struct worker_config *config, const struct memory_plan *plan,
                      const struct model_config *model, struct backend *backend,
                      struct slots *slots, struct draft **out)
{
    struct draft *d;
    TRY(MEM_NEW(&d));
    d->backend = backend;
    d->rank = config->rank, d->size = config->size;
    d->sharded = plan->draft.group.size > 1;
    d->greedy = config->draft_greedy;
    d->context_max = (uint32_t)plan->draft.context_max;
    d->block_size = (uint32_t)plan->kv.block_size;
    d->block_bytes = plan->draft.block_bytes;
    d->host_offset = plan->block_bytes - plan->draft.block_bytes;
    enum err e = fill(d, config, plan, model, slots);
    if (e) {
        draft_destroy(d);
        return e;
    }
    log_info("draft model %s: %.2f GiB of weights, %s", config->draft_model_dir,
             (double)d->model->weight_bytes / (1 << 30),
             config->size == 1 ? "one rank"
             : d->sharded      ? "shared by the ranks"
                               : "whole on every rank");
    *out = d;
    return OK;
}

void draft_destroy(struct draft *d)
{
    if (!d) return;
    const struct backend_ops *ops = d->backend->ops;
    if (d->decoder.kv) ops->kv_destroy(d->backend, d->decoder.kv);
    if (d->decoder.model) decoder_fini(&d->decoder);
    if (d->agreed) ops->release(d->backend, d->agreed);
    for (int i = 0; i < 15; i++)
        mem_free(d->pieces[i]);
    model_unload(d->model);
    mem_free(d);
}

void draft_open_group(struct draft *d, struct collective *collective)
{
    d->collective = d->decoder.collective = collective;
    d->pending = false;
    d->us = d->first_us = d->passes = d->tokens_fed = 0;
}
