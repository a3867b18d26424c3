/* Checks and applies plans. Every number from the wire meets a limit here before it is an index. */
#include "worker/slots.h"
#include "base/mem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum err slots_init(struct slots *s, const struct slots_limits *limits)
{
    *s = (struct slots){.limits = *limits};
    s->blocks_per_slot =
        (limits->context_max + limits->draft_max + limits->block_size) / limits->block_size;
    size_t n = limits->n_slots, tokens = (size_t)limits->context_max + limits->draft_max + 1, total;
    enum err e = OK;
    TRY_OUT(MEM_NEW_ARRAY(n, &s->all));
    TRY_OUT(MEM_NEW_ARRAY(n, &s->runs));
    TRY_OUT(MEM_NEW_ARRAY(n, &s->named));
    if (!size_mul(n, tokens, &total)) FAIL_OUT(ERR_NO_MEMORY, "%zu slots of %zu tokens", n, tokens);
    TRY_OUT(mem_alloc_array(total, sizeof(int32_t), &s->pieces[0]));
    TRY_OUT(mem_alloc_array(n * s->blocks_per_slot, sizeof(int32_t), &s->pieces[1]));
    TRY_OUT(mem_alloc_array(n * SLOT_BIAS_MAX, sizeof(int32_t), &s->pieces[2]));
    TRY_OUT(mem_alloc_array(n * SLOT_BIAS_MAX, sizeof(float), &s->pieces[3]));
    TRY_OUT(mem_alloc_array(n * SLOT_STOP_MAX, sizeof(int32_t), &s->pieces[4]));
    for (size_t i = 0; i < n; i++) {
        s->all[i].tokens = (int32_t *)s->pieces[0] + i * tokens;
        s->all[i].blocks = (int32_t *)s->pieces[1] + i * s->blocks_per_slot;
        s->all[i].bias_tokens = (int32_t *)s->pieces[2] + i * SLOT_BIAS_MAX;
        s->all[i].bias_values = (float *)s->pieces[3] + i * SLOT_BIAS_MAX;
        s->all[i].stop_ids = (int32_t *)s->pieces[4] + i * SLOT_STOP_MAX;
    }
out:
    if (e) slots_fini(s);
    return e;
}

void slots_fini(struct slots *s)
{
    for (int i = 0; i < 5; i++)
        mem_free(s->pieces[i]);
    mem_free(s->draft_valid);
    mem_free(s->all);
    mem_free(s->runs);
    mem_free(s->named);
    *s = (struct slots){0};
}

void slots_reset(struct slots *s, uint32_t n_blocks, uint32_t n_host_blocks)
{
    s->limits.n_blocks = n_blocks;
    s->limits.n_host_blocks = n_host_blocks;
    for (uint32_t i = 0; i < s->limits.n_slots; i++) {
        s->all[i].open = s->all[i].decoding = false;
        s->all[i].generation++;
    }
    if (s->draft_valid) memset(s->draft_valid, 0, n_blocks * sizeof *s->draft_valid);
    s->n_runs = s->n_run_tokens = s->n_ahead = 0;
}

/* --- small checks --- */

static enum err slot_get(struct slots *s, uint32_t index, const char *what, struct slot **out)
{
    if (index >= s->limits.n_slots)
        FAIL(ERR_FORMAT, "plan: %s slot %u, but this rank has %u", what, index, s->limits.n_slots);
    if (!s->all[index].open) FAIL(ERR_FORMAT, "plan: %s slot %u, which is not open", what, index);
    *out = &s->all[index];
    return OK;
}

static enum err block_check(const struct slots *s, int64_t block, const char *what)
{
    if (block < 0 || block >= s->limits.n_blocks)
        FAIL(ERR_FORMAT, "plan: %s block %lld, but this group has %u", what, (long long)block,
             s->limits.n_blocks);
    return OK;
}

static enum err host_block_check(const struct slots *s, uint32_t block, const char *what)
{
    if (block >= s->limits.n_host_blocks)
        FAIL(ERR_FORMAT, "plan: %s host block %u, but this group has %u", what, block,
             s->limits.n_host_blocks);
    return OK;
}

static enum err disk_block_check(const struct slots *s, uint32_t block, const char *what)
{
    if (block >= s->limits.n_disk_blocks)
        FAIL(ERR_FORMAT, "plan: %s disk block %u, but this rank has %u", what, block,
             s->limits.n_disk_blocks);
    return OK;
}

static enum err tokens_copy(const struct slots *s, const int32_t *from, uint32_t n, int32_t *to)
{
    for (uint32_t i = 0; i < n; i++) {
        if (from[i] < 0 || (uint32_t)from[i] >= s->limits.vocab_size)
            FAIL(ERR_FORMAT, "plan: token %d, but the vocabulary has %u", from[i],
                 s->limits.vocab_size);
        to[i] = from[i];
    }
    return OK;
}

static void block_used(struct slots *s, int64_t block)
{
    if (block >= s->n_blocks_used) s->n_blocks_used = (uint32_t)block + 1;
}

static enum err blocks_copy(struct slots *s, const int32_t *from, uint32_t n, struct slot *to)
{
    if (n > s->blocks_per_slot)
        FAIL(ERR_FORMAT, "plan: %u blocks for one sequence, at most %u", n, s->blocks_per_slot);
    for (uint32_t i = 0; i < n; i++) {
        TRY(block_check(s, from[i], "names"));
        block_used(s, from[i]);
        to->blocks[i] = from[i];
    }
    to->n_blocks = n;
    return OK;
}

static enum err finite_check(float value, const char *what)
{
    if (!isfinite(value)) FAIL(ERR_FORMAT, "plan: %s is not finite", what);
    return OK;
}

static enum err sampling_copy(const struct slots *s, const struct sampling_params *from,
                              struct slot *to)
{
    if (from->n_bias < 0 || from->n_bias > SLOT_BIAS_MAX)
        FAIL(ERR_FORMAT, "plan: %d logit biases, at most %d", from->n_bias, SLOT_BIAS_MAX);
    if (from->n_stop_ids < 0 || from->n_stop_ids > SLOT_STOP_MAX)
        FAIL(ERR_FORMAT, "plan: %d stop ids, at most %d", from->n_stop_ids, SLOT_STOP_MAX);
    if (from->n_logprobs > (int32_t)s->limits.logprobs_max ||
        from->n_prompt_logprobs > (int32_t)s->limits.logprobs_max)
        FAIL(ERR_FORMAT, "plan: %d and %d logprobs, at most %u", from->n_logprobs,
             from->n_prompt_logprobs, s->limits.logprobs_max);
    TRY(finite_check(from->temperature, "temperature"));
    TRY(finite_check(from->top_p, "top_p"));
    TRY(finite_check(from->min_p, "min_p"));
    TRY(finite_check(from->repetition_penalty, "repetition_penalty"));
    TRY(finite_check(from->presence_penalty, "presence_penalty"));
    TRY(finite_check(from->frequency_penalty, "frequency_penalty"));
    if (from->temperature < 0 || from->repetition_penalty <= 0)
        FAIL(ERR_FORMAT, "plan: temperature %g or repetition_penalty %g out of range",
             (double)from->temperature, (double)from->repetition_penalty);
    TRY(tokens_copy(s, from->bias_tokens, (uint32_t)from->n_bias, to->bias_tokens));
    TRY(tokens_copy(s, from->stop_ids, (uint32_t)from->n_stop_ids, to->stop_ids));
    for (int32_t i = 0; i < from->n_bias; i++) {
        if (isnan(from->bias_values[i])) FAIL(ERR_FORMAT, "plan: a logit bias is no number");
        to->bias_values[i] = from->bias_values[i];
    }
    to->sampling = *from;
    to->sampling.bias_tokens = to->bias_tokens;
    to->sampling.bias_values = to->bias_values;
    to->sampling.stop_ids = to->stop_ids;
    return OK;
}

/* Lengths that a new sequence begins with. */
static enum err lengths_check(const struct slots *s, uint32_t index, const struct slot *t)
{
    if (t->n_tokens_max > s->limits.context_max)
        FAIL(ERR_FORMAT, "plan: slot %u may grow to %u tokens, at most %u", index, t->n_tokens_max,
             s->limits.context_max);
    if (!t->n_known || t->n_known > t->n_tokens_max || t->n_prompt > t->n_known ||
        t->n_computed > t->n_known)
        FAIL(ERR_FORMAT,
             "plan: slot %u with %u tokens (%u of the prompt, %u computed) of at most %u", index,
             t->n_known, t->n_prompt, t->n_computed, t->n_tokens_max);
    if (t->n_computed > (uint64_t)t->n_blocks * s->limits.block_size)
        FAIL(ERR_FORMAT, "plan: slot %u has %u tokens computed in %u blocks of %u", index,
             t->n_computed, t->n_blocks, s->limits.block_size);
    return OK;
}

/* --- one kind of change after the other --- */

static enum err moves_check(const struct slots *s, const struct step_plan *p)
{
    for (uint32_t i = 0; i < p->n_saves; i++) {
        TRY(block_check(s, p->saves[i].from, "saves"));
        TRY(host_block_check(s, p->saves[i].to, "saves to"));
    }
    for (uint32_t i = 0; i < p->n_loads; i++) {
        TRY(host_block_check(s, p->loads[i].from, "loads from"));
        TRY(block_check(s, p->loads[i].to, "loads"));
    }
    for (uint32_t i = 0; i < p->n_fetches; i++) {
        TRY(disk_block_check(s, p->fetches[i].from, "fetches"));
        TRY(host_block_check(s, p->fetches[i].to, "fetches to"));
    }
    for (uint32_t i = 0; i < p->n_spills; i++) {
        TRY(host_block_check(s, p->spills[i].from, "spills"));
        TRY(disk_block_check(s, p->spills[i].to, "spills to"));
    }
    for (uint32_t i = 0; i < p->n_copies; i++) {
        TRY(block_check(s, p->copies[i].from, "copies from"));
        TRY(block_check(s, p->copies[i].to, "copies to"));
    }
    return OK;
}

static enum err close_one(struct slots *s, uint32_t index)
{
    struct slot *t;
    TRY(slot_get(s, index, "closes", &t));
    t->open = t->decoding = false;
    t->generation++;
    return OK;
}

static enum err empty_slot_get(struct slots *s, uint32_t index, struct slot **out)
{
    if (index >= s->limits.n_slots)
        FAIL(ERR_FORMAT, "plan: opens slot %u, but this rank has %u", index, s->limits.n_slots);
    if (s->all[index].open) FAIL(ERR_FORMAT, "plan: opens slot %u, which is open already", index);
    *out = &s->all[index];
    return OK;
}

static void slot_born(struct slot *t)
{
    t->open = true;
    t->generation++;
    t->n_drafts = t->n_ahead = t->n_draft_computed = t->n_draft_marked = 0;
}

static enum err open_one(struct slots *s, const struct plan_open *o)
{
    struct slot *t;
    TRY(empty_slot_get(s, o->slot, &t));
    t->n_prompt = o->n_prompt;
    t->n_known = o->n_tokens;
    t->n_computed = o->n_computed;
    t->n_tokens_max = o->n_tokens_max;
    t->n_blocks = o->n_blocks;
    TRY(lengths_check(s, o->slot, t));
    TRY(tokens_copy(s, o->tokens, o->n_tokens, t->tokens));
    TRY(blocks_copy(s, o->blocks, o->n_blocks, t));
    TRY(sampling_copy(s, &o->sampling, t));
    slot_born(t);
    return OK;
}

static enum err fork_one(struct slots *s, const struct plan_fork *f)
{
    struct slot *from, *t;
    TRY(slot_get(s, f->from, "forks", &from));
    TRY(empty_slot_get(s, f->to, &t));
    if (f->n_tokens > from->n_known || f->n_append > from->n_tokens_max)
        FAIL(ERR_FORMAT, "plan: fork takes %u and %u more tokens of slot %u, which has %u of %u",
             f->n_tokens, f->n_append, f->from, from->n_known, from->n_tokens_max);
    t->n_prompt = from->n_prompt < f->n_tokens ? from->n_prompt : f->n_tokens;
    t->n_known = f->n_tokens + f->n_append;
    t->n_computed = f->n_computed;
    t->n_tokens_max = from->n_tokens_max;
    t->n_blocks = f->n_blocks;
    TRY(lengths_check(s, f->to, t));
    TRY(tokens_copy(s, from->tokens, f->n_tokens, t->tokens)); /* refuses a pending one */
    TRY(tokens_copy(s, f->append, f->n_append, t->tokens + f->n_tokens));
    TRY(blocks_copy(s, f->blocks, f->n_blocks, t));
    TRY(sampling_copy(s, &from->sampling, t));
    slot_born(t);
    return OK;
}

static enum err extend_one(struct slots *s, const struct plan_pair *pair)
{
    struct slot *t;
    TRY(slot_get(s, pair->from, "extends", &t));
    TRY(block_check(s, pair->to, "extends by"));
    if (t->n_blocks >= s->blocks_per_slot)
        FAIL(ERR_FORMAT, "plan: slot %u grows beyond %u blocks", pair->from, s->blocks_per_slot);
    block_used(s, pair->to);
    t->blocks[t->n_blocks++] = (int32_t)pair->to;
    return OK;
}

/* --- runs --- */

static enum err run_check(const struct slots *s, const struct slot_run *r)
{
    const struct slot *t = &s->all[r->slot];
    uint64_t after = (uint64_t)t->n_computed + r->n_tokens,
             known = (uint64_t)t->n_known + r->n_drafts;
    if (!r->n_tokens || after > known)
        FAIL(ERR_FORMAT, "plan: slot %u runs %u tokens, but only %llu are known and not computed",
             r->slot, r->n_tokens, (unsigned long long)(known - t->n_computed));
    if (r->n_drafts > s->limits.draft_max ||
        (r->n_drafts && (after != known || !r->sample || t->n_computed == t->n_known)))
        FAIL(ERR_FORMAT, "plan: slot %u runs %u drafts (at most %u, at the end of a sampling run)",
             r->slot, r->n_drafts, s->limits.draft_max);
    if (r->sample && after != known)
        FAIL(ERR_FORMAT, "plan: slot %u samples after token %llu of %llu known", r->slot,
             (unsigned long long)after, (unsigned long long)known);
    if (r->sample && known >= t->n_tokens_max)
        FAIL(ERR_FORMAT, "plan: slot %u is full at %u tokens", r->slot, t->n_tokens_max);
    if (after > (uint64_t)t->n_blocks * s->limits.block_size)
        FAIL(ERR_FORMAT, "plan: slot %u runs to token %llu, but has %u blocks of %u", r->slot,
             (unsigned long long)after, t->n_blocks, s->limits.block_size);
    for (uint32_t i = 0; i < r->n_drafts; i++)
        if (r->drafts[i] < 0 || (uint32_t)r->drafts[i] >= s->limits.vocab_size)
            FAIL(ERR_FORMAT, "plan: draft token %d, but the vocabulary has %u", r->drafts[i],
                 s->limits.vocab_size);
    return OK;
}

static uint32_t least(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

/* As many of the slot's own drafts as were asked for, are there and have room. */
static enum err own_take(const struct slots *s, const struct plan_run *asked, struct slot_run *r)
{
    const struct slot *t = &s->all[r->slot];
    if (asked->n_own > s->limits.draft_max || asked->n_ahead > s->limits.draft_max ||
        ((asked->n_own || asked->n_ahead) && !r->sample) || (asked->n_own && r->n_drafts))
        FAIL(ERR_FORMAT, "plan: slot %u runs %u own drafts and prepares %u (at most %u, sampling)",
             r->slot, asked->n_own, asked->n_ahead, s->limits.draft_max);
    r->own = asked->n_own;
    if (!asked->n_own) return OK;
    uint32_t n_room =
        least(t->n_tokens_max - t->n_known - 1, t->n_blocks * s->limits.block_size - t->n_known);
    r->n_drafts = least(least(asked->n_own, t->n_drafts), n_room);
    r->n_tokens += r->n_drafts;
    return OK;
}

static int run_compare(const void *a, const void *b)
{
    uint32_t x = ((const struct slot_run *)a)->slot, y = ((const struct slot_run *)b)->slot;
    return x < y ? -1 : x > y;
}

/* Named runs, then everyone else in the decode set; ascending by slot in the end. */
static enum err runs_list(struct slots *s, const struct step_plan *p)
{
    memset(s->named, 0, s->limits.n_slots * sizeof *s->named);
    s->n_runs = s->n_ahead = 0;
    for (uint32_t i = 0; i < p->n_runs; i++) {
        const struct plan_run *r = &p->runs[i];
        struct slot *t;
        TRY(slot_get(s, r->slot, "runs", &t));
        if (s->named[r->slot]) FAIL(ERR_FORMAT, "plan: runs slot %u twice", r->slot);
        s->named[r->slot] = true;
        s->runs[s->n_runs++] = (struct slot_run){.slot = r->slot,
                                                 .n_tokens = r->n_tokens,
                                                 .n_drafts = r->n_drafts,
                                                 .sample = (r->flags & PLAN_RUN_SAMPLE) != 0,
                                                 .drafts = r->drafts};
        TRY(run_check(s, &s->runs[s->n_runs - 1]));
        TRY(own_take(s, r, &s->runs[s->n_runs - 1]));
        t->n_ahead = r->n_ahead;
        s->n_ahead += r->n_ahead > 0;
    }
    for (uint32_t i = 0; !p->idle && i < s->limits.n_slots; i++) {
        if (!s->all[i].open || !s->all[i].decoding || s->named[i]) continue;
        s->runs[s->n_runs++] = (struct slot_run){.slot = i, .n_tokens = 1, .sample = true};
        TRY(run_check(s, &s->runs[s->n_runs - 1]));
    }
    for (uint32_t i = 0; i < p->n_runs; i++)
        s->all[p->runs[i].slot].decoding = (p->runs[i].flags & PLAN_RUN_STAY) != 0;
    uint64_t total = 0;
    for (uint32_t i = 0; i < s->n_runs; i++)
        total += s->runs[i].n_tokens;
    if (total > s->limits.step_tokens_max)
        FAIL(ERR_FORMAT, "plan: %llu tokens in one step, at most %u", (unsigned long long)total,
             s->limits.step_tokens_max);
    s->n_run_tokens = (uint32_t)total;
    if (s->n_runs) qsort(s->runs, s->n_runs, sizeof *s->runs, run_compare);
    return OK;
}

enum err slots_apply(struct slots *s, const struct step_plan *p)
{
    for (uint32_t i = 0; i < p->n_closes; i++)
        TRY(close_one(s, p->closes[i]));
    TRY(moves_check(s, p));
    for (uint32_t i = 0; i < p->n_opens; i++)
        TRY(open_one(s, &p->opens[i]));
    for (uint32_t i = 0; i < p->n_forks; i++)
        TRY(fork_one(s, &p->forks[i]));
    for (uint32_t i = 0; i < p->n_extends; i++)
        TRY(extend_one(s, &p->extends[i]));
    for (uint32_t i = 0; i < p->n_pauses; i++) {
        struct slot *t;
        TRY(slot_get(s, p->pauses[i], "pauses", &t));
        t->decoding = false;
    }
    return runs_list(s, p);
}
