/* The false worker. Block contents are prefix hashes: whatever a plan gets wrong about blocks shows
 * as a hash that does not belong to the slot's tokens. */
#include "coordinator/engine/sim_worker.h"
#include "base/hash.h"
#include "base/mem.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* The model. */
uint64_t model_prefix(uint64_t prefix, int32_t token)
{
    return hash_u64(prefix ^ (uint64_t)(token + 1) * 0x9e3779b97f4a7c15u) | 1;
}

static bool banned(int32_t token, uint32_t n_output, const struct sampling_params *p)
{
    if (n_output >= (uint32_t)p->min_tokens) return false;
    for (int32_t i = 0; i < p->n_stop_ids; i++)
        if (p->stop_ids[i] == token) return true;
    return false;
}

int32_t model_next(uint64_t prefix, int32_t last, uint32_t n_output,
                   const struct sampling_params *p)
{
    uint64_t h = hash_u64(prefix ^ p->seed * 0xd6e8feb86659fd93u);
    bool repeats = (p->seed & 1) && h % 16; /* half of the requests like to repeat themselves */
    int32_t token = repeats ? 1 + (last * 5 + 3) % 7 : (int32_t)(h % SIM_VOCABULARY);
    while (banned(token, n_output, p))
        token = (token + 1) % SIM_VOCABULARY;
    return token;
}

float model_logprob(uint64_t prefix, int32_t token)
{
    return -(float)(hash_u64(prefix + (uint64_t)token * 31) % 100003) / 20000.0f;
}

void model_top(uint64_t prefix, uint32_t n, int32_t *out_tokens, float *out_logprobs)
{
    uint32_t n_out = 0;
    for (int32_t t = 0; t < SIM_VOCABULARY; t++) {
        float l = model_logprob(prefix, t);
        uint32_t at = n_out;
        while (at > 0 && out_logprobs[at - 1] < l)
            at--;
        if (at >= n) continue;
        if (n_out < n) n_out++;
        memmove(out_tokens + at + 1, out_tokens + at, (n_out - 1 - at) * sizeof *out_tokens);
        memmove(out_logprobs + at + 1, out_logprobs + at, (n_out - 1 - at) * sizeof *out_logprobs);
        out_tokens[at] = t;
        out_logprobs[at] = l;
    }
}

/* Life. */
enum err sim_worker_init(struct sim_worker *w, uint32_t n_slots, uint32_t n_blocks, uint32_t n_host,
                         uint32_t block_size, uint32_t context)
{
    *w = (struct sim_worker){.n_slots = n_slots,
                             .n_blocks = n_blocks,
                             .n_host = n_host,
                             .block_size = block_size,
                             .context = context};
    w->blocks_per_slot = context / block_size + 2;
    arena_init(&w->results, 1 << 14, 0);
    TRY(MEM_NEW_ARRAY(n_slots, &w->slots));
    TRY(MEM_NEW_ARRAY(n_slots, &w->runs));
    TRY(MEM_NEW_ARRAY((size_t)n_blocks * block_size, &w->kv));
    TRY(MEM_NEW_ARRAY((size_t)n_host * block_size, &w->host));
    TRY(MEM_NEW_ARRAY(n_blocks, &w->owner));
    TRY(MEM_NEW_ARRAY(n_blocks, &w->serial));
    int32_t *tokens;
    uint64_t *prefixes;
    uint32_t *blocks;
    TRY(MEM_NEW_ARRAY((size_t)n_slots * (context + 1), &tokens));
    w->slots[0].tokens = tokens;
    TRY(MEM_NEW_ARRAY((size_t)n_slots * (context + 1), &prefixes));
    w->slots[0].prefixes = prefixes;
    TRY(MEM_NEW_ARRAY((size_t)n_slots * w->blocks_per_slot, &blocks));
    for (uint32_t i = 0; i < n_slots; i++) {
        w->slots[i].tokens = tokens + (size_t)i * (context + 1);
        w->slots[i].prefixes = prefixes + (size_t)i * (context + 1);
        w->slots[i].blocks = blocks + (size_t)i * w->blocks_per_slot;
    }
    return OK;
}

void sim_worker_fini(struct sim_worker *w)
{
    if (w->slots) {
        mem_free(w->slots[0].tokens);
        mem_free(w->slots[0].prefixes);
        mem_free(w->slots[0].blocks);
    }
    mem_free(w->slots);
    mem_free(w->runs);
    mem_free(w->kv);
    mem_free(w->host);
    mem_free(w->disk);
    mem_free(w->owner);
    mem_free(w->serial);
    arena_fini(&w->results);
    *w = (struct sim_worker){0};
}

enum err sim_worker_disk(struct sim_worker *w, uint32_t n_disk)
{
    w->n_disk = n_disk;
    return MEM_NEW_ARRAY((size_t)n_disk * w->block_size, &w->disk);
}

/* Faults: the first one is kept. */
static bool wrong(struct sim_worker *w, const char *format, ...)
    __attribute__((format(printf, 2, 3)));
static bool wrong(struct sim_worker *w, const char *format, ...)
{
    va_list args;
    if (w->fault) return false;
    va_start(args, format);
    vsnprintf(w->words, sizeof w->words, format, args);
    va_end(args);
    w->fault = w->words;
    return false;
}

static struct sim_slot *open_slot(struct sim_worker *w, uint32_t slot, const char *what)
{
    if (slot < w->n_slots && w->slots[slot].open) return &w->slots[slot];
    wrong(w, "%s: slot %u is not open", what, slot);
    return NULL;
}

static bool good_block(struct sim_worker *w, uint32_t block, const char *what)
{
    return block < w->n_blocks || wrong(w, "%s: block %u of %u", what, block, w->n_blocks);
}

/* First position a query at n_computed still sees. */
static uint32_t first_seen(const struct sim_worker *w, uint32_t n_computed)
{
    return w->window && n_computed + 1 > w->window ? n_computed + 1 - w->window : 0;
}

static bool set_known(struct sim_worker *w, struct sim_slot *s, uint32_t n_known)
{
    if (!n_known || n_known > s->n_max || s->n_max > w->context)
        return wrong(w, "%u tokens known of at most %u (context %u)", n_known, s->n_max,
                     w->context);
    s->n_known = n_known;
    for (uint32_t i = 0; i < n_known; i++)
        s->prefixes[i] = model_prefix(i ? s->prefixes[i - 1] : 1, s->tokens[i]);
    return true;
}

static bool set_blocks(struct sim_worker *w, struct sim_slot *s, const int32_t *blocks, uint32_t n)
{
    if (n > w->blocks_per_slot) return wrong(w, "%u blocks for one slot", n);
    for (uint32_t i = 0; i < n; i++) {
        if (!good_block(w, (uint32_t)blocks[i], "table")) return false;
        s->blocks[i] = (uint32_t)blocks[i];
    }
    s->n_blocks = n;
    return true;
}

/* A fresh slot's KV must be what its tokens say, wherever it may still look. */
static bool check_kv(struct sim_worker *w, const struct sim_slot *s, uint32_t slot)
{
    for (uint32_t p = first_seen(w, s->n_computed); p < s->n_computed; p++) {
        uint64_t found =
            w->kv[(size_t)s->blocks[p / w->block_size] * w->block_size + p % w->block_size];
        if (found != s->prefixes[p])
            return wrong(w, "slot %u position %u: block %u holds another prefix", slot, p,
                         s->blocks[p / w->block_size]);
    }
    return true;
}

static bool born(struct sim_worker *w, struct sim_slot *s, uint32_t n_known, uint32_t n_computed)
{
    s->n_computed = n_computed;
    s->decoding = false;
    s->open = true;
    s->serial = ++w->next_serial;
    s->retired = false;
    s->n_own = s->n_ahead = 0;
    s->from_serial = 0;
    if (n_computed >= n_known || n_computed > s->n_blocks * w->block_size)
        return wrong(w, "%u computed of %u known in %u blocks", n_computed, n_known, s->n_blocks);
    return true;
}

static bool apply_open(struct sim_worker *w, const struct plan_open *o)
{
    if (o->slot >= w->n_slots || w->slots[o->slot].open) return wrong(w, "open: slot %u", o->slot);
    struct sim_slot *s = &w->slots[o->slot];
    if (o->n_tokens > w->context || o->n_prompt > o->n_tokens)
        return wrong(w, "open: %u tokens", o->n_tokens);
    memcpy(s->tokens, o->tokens, o->n_tokens * sizeof *s->tokens);
    s->n_max = o->n_tokens_max;
    s->n_prompt = o->n_prompt;
    s->sampling = o->sampling;
    if (o->sampling.n_stop_ids > 8) return wrong(w, "open: %d stop ids", o->sampling.n_stop_ids);
    for (int32_t i = 0; i < o->sampling.n_stop_ids; i++)
        s->stop_ids[i] = o->sampling.stop_ids[i];
    s->sampling.stop_ids = s->stop_ids;
    return set_known(w, s, o->n_tokens) && set_blocks(w, s, o->blocks, o->n_blocks) &&
           born(w, s, o->n_tokens, o->n_computed);
}

static bool apply_fork(struct sim_worker *w, const struct plan_fork *f)
{
    const struct sim_slot *from = open_slot(w, f->from, "fork");
    if (!from || f->to >= w->n_slots || w->slots[f->to].open)
        return wrong(w, "fork: to slot %u", f->to);
    struct sim_slot *s = &w->slots[f->to];
    if (f->n_tokens > from->n_known || f->n_tokens + f->n_append > w->context)
        return wrong(w, "fork: %u tokens of %u", f->n_tokens, from->n_known);
    memcpy(s->tokens, from->tokens, f->n_tokens * sizeof *s->tokens);
    for (uint32_t i = 0; i < f->n_append; i++)
        s->tokens[f->n_tokens + i] = f->append[i];
    s->n_max = from->n_max;
    s->n_prompt = from->n_prompt;
    s->sampling = from->sampling;
    memcpy(s->stop_ids, from->stop_ids, sizeof s->stop_ids);
    s->sampling.stop_ids = s->stop_ids;
    uint32_t n_known = f->n_tokens + f->n_append;
    if (!set_known(w, s, n_known) || !set_blocks(w, s, f->blocks, f->n_blocks) ||
        !born(w, s, n_known, f->n_computed))
        return false;
    s->from_serial = from->serial;
    return true;
}

/* Transfers. */
static bool is_host_moving(const struct sim_worker *w, uint32_t host, bool only_written)
{
    for (int kind = 0; kind < (only_written ? 1 : 2); kind++)
        for (uint32_t i = 0; i < w->io[kind].n; i++) {
            const struct plan_pair *p =
                &w->io[kind].pairs[(w->io[kind].first + i) % SIM_TRANSFERS_MAX];
            if ((kind ? p->from : p->to) == host) return true;
        }
    return false;
}

static bool is_disk_moving(const struct sim_worker *w, uint32_t disk)
{
    for (int kind = 0; kind < 2; kind++)
        for (uint32_t i = 0; i < w->io[kind].n; i++) {
            const struct plan_pair *p =
                &w->io[kind].pairs[(w->io[kind].first + i) % SIM_TRANSFERS_MAX];
            if ((kind ? p->to : p->from) == disk) return true;
        }
    return false;
}

static bool start_transfers(struct sim_worker *w, int kind, const struct plan_pair *pairs,
                            uint32_t n)
{
    struct sim_transfers *t = &w->io[kind];
    for (uint32_t i = 0; i < n; i++) {
        uint32_t host = kind ? pairs[i].from : pairs[i].to;
        uint32_t disk = kind ? pairs[i].to : pairs[i].from;
        if (host >= w->n_host || disk >= w->n_disk || t->n == SIM_TRANSFERS_MAX)
            return wrong(w, "transfer of host block %u and disk block %u", host, disk);
        if (is_host_moving(w, host, false) || is_disk_moving(w, disk))
            return wrong(w, "two transfers of host block %u or disk block %u", host, disk);
        t->pairs[(t->first + t->n++) % SIM_TRANSFERS_MAX] = pairs[i];
    }
    return true;
}

void sim_worker_transfer(struct sim_worker *w, int kind, bool fails)
{
    struct sim_transfers *t = &w->io[kind];
    struct plan_pair p = t->pairs[t->first];
    uint64_t *to = (kind ? w->disk : w->host) + (size_t)p.to * w->block_size;
    const uint64_t *from = (kind ? w->host : w->disk) + (size_t)p.from * w->block_size;
    ASSERT(t->n);
    t->first = (t->first + 1) % SIM_TRANSFERS_MAX;
    t->n--;
    memcpy(to, from, w->block_size * sizeof *to);
    uint64_t number = kind ? w->moved.n_spilled++ : w->moved.n_fetched++;
    if (!fails) return;
    memset(to, 0xdd, w->block_size * sizeof *to);
    if (kind)
        w->failed[1][w->moved.n_spills_failed++] = number;
    else
        w->failed[0][w->moved.n_fetches_failed++] = number;
}

static bool apply_moves(struct sim_worker *w, const struct step_plan *p)
{
    size_t bytes = w->block_size * sizeof *w->kv;
    for (uint32_t i = 0; i < p->n_saves; i++) {
        if (p->saves[i].to >= w->n_host || !good_block(w, p->saves[i].from, "save"))
            return wrong(w, "save");
        if (is_host_moving(w, p->saves[i].to, false))
            return wrong(w, "save to host block %u, which is moving", p->saves[i].to);
        memcpy(w->host + (size_t)p->saves[i].to * w->block_size,
               w->kv + (size_t)p->saves[i].from * w->block_size, bytes);
    }
    for (uint32_t i = 0; i < p->n_loads; i++) {
        if (p->loads[i].from >= w->n_host || !good_block(w, p->loads[i].to, "load"))
            return wrong(w, "load");
        if (is_host_moving(w, p->loads[i].from, true))
            return wrong(w, "load of host block %u, which has not come yet", p->loads[i].from);
        memcpy(w->kv + (size_t)p->loads[i].to * w->block_size,
               w->host + (size_t)p->loads[i].from * w->block_size, bytes);
    }
    for (uint32_t i = 0; i < p->n_copies; i++) {
        if (!good_block(w, p->copies[i].from, "copy") || !good_block(w, p->copies[i].to, "copy"))
            return false;
        memcpy(w->kv + (size_t)p->copies[i].to * w->block_size,
               w->kv + (size_t)p->copies[i].from * w->block_size, bytes);
    }
    return true;
}

static bool apply_slots(struct sim_worker *w, const struct step_plan *p)
{
    for (uint32_t i = 0; i < p->n_closes; i++) {
        struct sim_slot *s = open_slot(w, p->closes[i], "close");
        if (!s) return false;
        s->open = s->decoding = false;
    }
    if (!apply_moves(w, p)) return false;
    for (uint32_t i = 0; i < p->n_opens; i++)
        if (!apply_open(w, &p->opens[i]) ||
            !check_kv(w, &w->slots[p->opens[i].slot], p->opens[i].slot))
            return false;
    for (uint32_t i = 0; i < p->n_forks; i++)
        if (!apply_fork(w, &p->forks[i]) || !check_kv(w, &w->slots[p->forks[i].to], p->forks[i].to))
            return false;
    for (uint32_t i = 0; i < p->n_extends; i++) {
        struct sim_slot *s = open_slot(w, p->extends[i].from, "extend");
        if (!s || !good_block(w, p->extends[i].to, "extend")) return false;
        if (s->n_blocks == w->blocks_per_slot)
            return wrong(w, "extend: slot %u is full", p->extends[i].from);
        s->blocks[s->n_blocks++] = p->extends[i].to;
    }
    for (uint32_t i = 0; i < p->n_pauses; i++) {
        struct sim_slot *s = open_slot(w, p->pauses[i], "pause");
        if (!s || !s->decoding) return wrong(w, "pause: slot %u does not decode", p->pauses[i]);
        s->decoding = false;
    }
    return true;
}

/* The drafts of its own that a run verifies: those there are, as many as were asked for. */
static bool take_own(struct sim_worker *w, struct sim_slot *s, const struct plan_run *r,
                     struct sim_run *run)
{
    if ((r->n_own || r->n_ahead) && (!w->has_draft_model || !run->sample || s->decoding))
        return wrong(w, "run: slot %u wants drafts of a draft model", r->slot);
    if (r->n_ahead > SIM_DRAFTS_MAX || (r->n_own && r->n_drafts))
        return wrong(w, "run: slot %u wants %u and %u own drafts", r->slot, r->n_own, r->n_ahead);
    s->n_ahead = r->n_ahead;
    run->own = r->n_own > 0;
    if (!r->n_own) return true;
    if (s->n_known + r->n_own + 1 > s->n_max || s->n_known + r->n_own > s->n_blocks * w->block_size)
        return wrong(w, "run: slot %u has no room for %u own drafts", r->slot, r->n_own);
    run->n_drafts = r->n_own < s->n_own ? r->n_own : s->n_own;
    run->n_tokens += run->n_drafts;
    run->drafts = s->own;
    return true;
}

/* Of a plan in which others decode by themselves. */
static bool prompts_are_short(struct sim_worker *w, const struct step_plan *p)
{
    uint64_t n_prompt = 0;
    for (uint32_t i = 0; i < p->n_runs; i++) {
        uint32_t n = p->runs[i].n_tokens - p->runs[i].n_drafts;
        if (n > 1 || !(p->runs[i].flags & PLAN_RUN_SAMPLE)) n_prompt += n;
    }
    if (w->step_prompt_max && n_prompt > w->step_prompt_max)
        return wrong(w, "%llu tokens of prompts beside decodes, of at most %u",
                     (unsigned long long)n_prompt, w->step_prompt_max);
    return true;
}

static bool list_runs(struct sim_worker *w, const struct step_plan *p)
{
    uint64_t n_tokens = 0, n_rows = 0, n_members = 0;
    memset(w->runs, 0, w->n_slots * sizeof *w->runs);
    for (uint32_t i = 0; i < w->n_slots; i++)
        if (w->slots[i].open && w->slots[i].decoding && !p->idle)
            w->runs[i] = (struct sim_run){.sample = true, .n_tokens = 1}, n_members++;
    if (n_members && !prompts_are_short(w, p)) return false;
    for (uint32_t i = 0; i < p->n_runs; i++) {
        const struct plan_run *r = &p->runs[i];
        struct sim_slot *s = open_slot(w, r->slot, "run");
        if (!s || w->runs[r->slot].named || s->decoding || !r->n_tokens)
            return wrong(w, "run: slot %u", r->slot);
        w->runs[r->slot] = (struct sim_run){.named = true,
                                            .sample = (r->flags & PLAN_RUN_SAMPLE) != 0,
                                            .n_tokens = r->n_tokens,
                                            .n_drafts = r->n_drafts,
                                            .n_asked = r->n_own,
                                            .drafts = r->drafts};
        if (!take_own(w, s, r, &w->runs[r->slot])) return false;
        s->decoding = (r->flags & PLAN_RUN_STAY) != 0;
        if (s->decoding && !(r->flags & PLAN_RUN_SAMPLE))
            return wrong(w, "run: stays without a sample");
    }
    for (uint32_t i = 0; i < w->n_slots; i++) {
        const struct sim_run *r = &w->runs[i];
        bool scores = w->slots[i].sampling.n_prompt_logprobs >= 0 &&
                      w->slots[i].n_computed < w->slots[i].n_prompt;
        n_tokens += r->n_tokens + (r->own ? r->n_asked - r->n_drafts : 0);
        if (r->n_tokens)
            n_rows += scores      ? r->n_tokens
                      : r->sample ? 1 + (r->own ? r->n_asked : r->n_drafts)
                                  : 0;
    }
    if (n_tokens > w->step_tokens_max)
        return wrong(w, "%llu tokens of at most %u", (unsigned long long)n_tokens,
                     w->step_tokens_max);
    if (n_rows > w->step_rows_max)
        return wrong(w, "%llu rows of at most %u", (unsigned long long)n_rows, w->step_rows_max);
    return true;
}

/* Writes the prefix of position p into its block; nobody else may own the block. */
static bool write_kv(struct sim_worker *w, struct sim_slot *s, uint32_t slot, uint32_t p,
                     uint64_t prefix)
{
    uint32_t block = s->blocks[p / w->block_size], other = w->owner[block];
    struct sim_slot *o = &w->slots[other];
    if (other != slot && o->open && o->serial == w->serial[block] && o->serial == s->from_serial)
        o->retired = true;
    else if (other != slot && o->open && o->serial == w->serial[block])
        for (uint32_t i = first_seen(w, o->n_computed) / w->block_size; i < o->n_blocks; i++)
            if (o->blocks[i] == block)
                return wrong(w, "block %u has two writers, slots %u and %u", block, slot, other);
    w->owner[block] = slot;
    w->serial[block] = s->serial;
    w->kv[(size_t)block * w->block_size + p % w->block_size] = prefix;
    return true;
}

static enum err add_token(struct sim_worker *w, struct step_result *r, const struct sim_slot *s,
                          uint32_t slot, int32_t token, uint64_t before, bool scored)
{
    struct step_token *t = &r->tokens[r->n_tokens++];
    int32_t n = scored ? s->sampling.n_prompt_logprobs : s->sampling.n_logprobs;
    *t = (struct step_token){.slot = slot,
                             .token = token,
                             .flags = scored ? STEP_TOKEN_SCORED : 0,
                             .has_logprob = n >= 0};
    if (n < 0) return OK;
    t->logprob = model_logprob(before, token);
    t->n_top = (uint32_t)n;
    TRY(arena_alloc_array(&w->results, (size_t)n + 1, sizeof(int32_t), (void **)&t->top_tokens));
    TRY(arena_alloc_array(&w->results, (size_t)n + 1, sizeof(float), (void **)&t->top_logprobs));
    model_top(before, (uint32_t)n, (int32_t *)t->top_tokens, (float *)t->top_logprobs);
    return OK;
}

/* Samples after position p; returns the token. */
static int32_t sample(struct sim_worker *w, struct step_result *r, const struct sim_slot *s,
                      uint32_t slot, uint64_t prefix, int32_t last, uint32_t n_output)
{
    int32_t token = model_next(prefix, last, n_output, &s->sampling);
    (void)add_token(w, r, s, slot, token, prefix, false);
    return token;
}

static bool append(struct sim_worker *w, struct sim_slot *s, uint32_t slot, int32_t token)
{
    if (s->n_known >= s->n_max) return wrong(w, "slot %u grows beyond %u tokens", slot, s->n_max);
    s->tokens[s->n_known] = token;
    s->prefixes[s->n_known] = model_prefix(s->prefixes[s->n_known - 1], token);
    s->n_known++;
    return true;
}

/* Known tokens, then drafts while they are what would be sampled. */
static bool compute(struct sim_worker *w, uint32_t slot, struct step_result *r)
{
    struct sim_slot *s = &w->slots[slot];
    const struct sim_run *run = &w->runs[slot];
    uint32_t n_plain = run->n_tokens - run->n_drafts, n_start = s->n_known;
    if (run->n_drafts > run->n_tokens || s->n_computed + n_plain > s->n_known)
        return wrong(w, "slot %u runs %u tokens from %u of %u", slot, run->n_tokens, s->n_computed,
                     s->n_known);
    if ((run->sample && s->n_computed + n_plain != s->n_known) || (run->n_drafts && !run->sample))
        return wrong(w, "slot %u samples before its last token", slot);
    if (s->n_computed + run->n_tokens > s->n_blocks * w->block_size ||
        s->n_known + run->n_drafts + run->sample > s->n_max)
        return wrong(w, "slot %u: %u tokens have no block or no room", slot, run->n_tokens);
    if (s->retired) return wrong(w, "slot %u runs after its fork took its block", slot);
    if (!check_kv(w, s, slot)) return false;
    for (uint32_t i = 0; i < n_plain; i++, s->n_computed++) {
        uint32_t p = s->n_computed;
        if (!write_kv(w, s, slot, p, s->prefixes[p])) return false;
        if (s->sampling.n_prompt_logprobs >= 0 && p + 1 < s->n_prompt)
            (void)add_token(w, r, s, slot, s->tokens[p + 1], s->prefixes[p], true);
    }
    if (!run->sample) return true;
    uint64_t prefix = s->prefixes[s->n_known - 1];
    for (uint32_t i = 0; i < run->n_drafts; i++) { /* rejected ones leave their traces, too */
        prefix = model_prefix(prefix, run->drafts[i]);
        if (!write_kv(w, s, slot, n_start + i, prefix)) return false;
    }
    for (uint32_t i = 0;; i++) {
        int32_t token = sample(w, r, s, slot, s->prefixes[s->n_known - 1],
                               s->tokens[s->n_known - 1], s->n_known - s->n_prompt);
        if (!append(w, s, slot, token)) return false;
        s->n_computed = s->n_known - 1;
        if (i == run->n_drafts || run->drafts[i] != token) return true;
    }
}

/* A draft model that is right always, mostly, sometimes or never, as the request's seed has it; and
 * now and then has fewer than were asked for. */
static void guess(struct sim_slot *s)
{
    static const uint32_t right_of_16[] = {0, 8, 14, 16};
    uint32_t right = right_of_16[s->sampling.seed / 2 % 4];
    uint64_t prefix = s->prefixes[s->n_known - 1];
    int32_t last = s->tokens[s->n_known - 1];
    s->n_own = hash_u64(prefix) % 8 ? s->n_ahead : s->n_ahead / 2;
    for (uint32_t i = 0; i < s->n_own; i++) {
        last = model_next(prefix, last, s->n_known + i - s->n_prompt, &s->sampling);
        if (hash_u64(prefix + 99) % 16 >= right) last = (last + 1) % SIM_VOCABULARY;
        prefix = model_prefix(prefix, last);
        s->own[i] = last;
    }
    s->n_ahead = 0;
}

static bool report_drafts(struct sim_worker *w, struct step_result *out)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < w->n_slots; i++)
        n += w->runs[i].own;
    if (arena_alloc_array(&w->results, n, sizeof *out->drafted, (void **)&out->drafted))
        return wrong(w, "memory");
    for (uint32_t i = 0; i < w->n_slots; i++)
        if (w->runs[i].own)
            out->drafted[out->n_drafted++] = (struct plan_pair){i, w->runs[i].n_drafts};
    for (uint32_t i = 0; i < w->n_slots; i++) {
        if (w->runs[i].n_tokens) w->slots[i].n_own = 0;
        if (!w->slots[i].open || !w->slots[i].n_ahead) continue;
        out->draft_passes =
            w->slots[i].n_ahead > out->draft_passes ? w->slots[i].n_ahead : out->draft_passes;
        guess(&w->slots[i]);
        out->draft_tokens += w->slots[i].n_own;
    }
    return true;
}

bool sim_worker_apply(struct sim_worker *w, const struct step_plan *plan, struct step_result *out)
{
    *out = (struct step_result){.epoch = plan->epoch, .step = plan->step};
    if (plan->step != w->step + 1)
        return wrong(w, "step %llu after %llu", (unsigned long long)plan->step,
                     (unsigned long long)w->step);
    w->step = plan->step;
    if (!apply_slots(w, plan) || !start_transfers(w, 0, plan->fetches, plan->n_fetches) ||
        !start_transfers(w, 1, plan->spills, plan->n_spills) || !list_runs(w, plan))
        return false;
    arena_reset(&w->results);
    size_t n = 0;
    for (uint32_t i = 0; i < w->n_slots; i++)
        n += w->runs[i].n_tokens + 1u;
    if (arena_alloc_array(&w->results, n, sizeof *out->tokens, (void **)&out->tokens))
        return wrong(w, "memory");
    for (uint32_t i = 0; i < w->n_slots; i++) {
        w->n_computed += w->runs[i].n_tokens;
        if (w->runs[i].n_tokens && !compute(w, i, out)) return false;
    }
    return report_drafts(w, out);
}
