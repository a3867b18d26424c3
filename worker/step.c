/* Runs -> flat arrays -> samples -> tokens. */
#include "worker/step.h"
#include "base/mem.h"
#include "worker/draft.h"

#include <string.h>

enum err step_init(struct step *s, const struct slots *slots)
{
    size_t t = slots->limits.step_tokens_max, n = slots->limits.n_slots;
    const struct {
        size_t count, bytes;
        void **out;
    } arrays[STEP_PIECES] = {
        {t, 4, (void **)&s->token_ids},
        {t, 4, (void **)&s->token_slot},
        {t, 4, (void **)&s->positions},
        {t, 4, (void **)&s->cache_slot},
        {t, 4, (void **)&s->rows_out},
        {n + 1, 4, (void **)&s->seq_start},
        {n, 4, (void **)&s->context_len},
        {n * slots->blocks_per_slot, 4, (void **)&s->block_table},
        {n, sizeof *s->runs, (void **)&s->runs},
        {n, 4, (void **)&s->kept_known},
        {t, sizeof *s->rows, (void **)&s->rows},
        {t, sizeof *s->sample_rows, (void **)&s->sample_rows},
        {t, sizeof *s->results, (void **)&s->results},
        {t, 4, (void **)&s->greedy},
        {t, sizeof *s->tokens, (void **)&s->tokens},
        {n, sizeof *s->drafted, (void **)&s->drafted},
    };
    memset(s, 0, sizeof *s);
    for (int i = 0; i < STEP_PIECES; i++) {
        enum err e = mem_alloc_array(arrays[i].count, arrays[i].bytes, &s->pieces[i]);
        if (e) {
            step_fini(s);
            return e;
        }
        *arrays[i].out = s->pieces[i];
    }
    return OK;
}

void step_fini(struct step *s)
{
    for (int i = 0; i < STEP_PIECES; i++)
        mem_free(s->pieces[i]);
    memset(s, 0, sizeof *s);
}

/* --- rows --- */

/* Only what scoring needs: the model's own distribution. */
static void row_scored(const struct slot *t, uint32_t index, struct sample_row *out)
{
    *out = (struct sample_row){.slot = -1,
                               .top_p = 1,
                               .repetition_penalty = 1,
                               .position = index,
                               .n_logprobs = t->sampling.n_prompt_logprobs,
                               .forced_token = t->tokens[index]};
}

void step_row_sampled(const struct slot *t, uint32_t slot, uint32_t n_before, bool feeds,
                      bool speaks, struct sample_row *out)
{
    const struct sampling_params *p = &t->sampling;
    int32_t n_output = (int32_t)(n_before - t->n_prompt);
    bool penalized =
        p->repetition_penalty != 1 || p->presence_penalty != 0 || p->frequency_penalty != 0;
    bool bans = n_output < p->min_tokens && p->n_stop_ids;
    *out = (struct sample_row){
        .slot = feeds ? (int32_t)slot : -1,
        .temperature = p->temperature,
        .top_k = p->top_k,
        .top_p = p->top_p,
        .min_p = p->min_p,
        .repetition_penalty = p->repetition_penalty,
        .presence_penalty = p->presence_penalty,
        .frequency_penalty = p->frequency_penalty,
        .seed = p->seed,
        .position = n_before,
        .n_logprobs = speaks ? p->n_logprobs : -1,
        .forced_token = -1,
    };
    if (penalized) {
        out->prompt_tokens = t->tokens;
        out->n_prompt_tokens = (int32_t)t->n_prompt;
        out->output_tokens = t->tokens + t->n_prompt;
        out->n_output_tokens = n_output;
    }
    if (p->n_bias)
        out->bias_tokens = p->bias_tokens, out->bias_values = p->bias_values,
        out->n_bias = p->n_bias;
    if (bans) out->banned_tokens = p->stop_ids, out->n_banned = p->n_stop_ids;
}

static struct step_row *row_add(struct step *s, uint32_t token, uint32_t run, const struct slot *t,
                                uint32_t index)
{
    struct step_row *row = &s->rows[s->n_rows];
    *row = (struct step_row){
        .slot = s->runs[run].slot, .generation = t->generation, .run = run, .index = index};
    s->rows_out[s->n_rows++] = (int32_t)token;
    return row;
}

/* Greedy sampling of untouched logits needs only the largest. Logprobs are asked for by the slot:
 * the rows of ranks that do not speak have none. */
static bool needs_logits(const struct sampling_params *p, const struct sample_row *row)
{
    bool penalized =
        row->repetition_penalty != 1 || row->presence_penalty != 0 || row->frequency_penalty != 0;
    return row->temperature > 0 || p->n_logprobs >= 0 || penalized || row->n_bias || row->n_banned;
}

/* Rows of one run: scored prompt tokens, then the sample after the last token and its drafts'. */
static void run_rows(struct step *s, uint32_t run, const struct slot *t, uint32_t first_token,
                     bool speaks)
{
    const struct slot_run *r = &s->runs[run];
    uint32_t n_sampled = r->sample ? r->n_drafts + 1 : 0;
    if (t->sampling.n_prompt_logprobs >= 0) {
        for (uint32_t i = 0; i < r->n_tokens - n_sampled && t->n_computed + i + 1 < t->n_prompt;
             i++) {
            struct step_row *row = row_add(s, first_token + i, run, t, t->n_computed + i + 1);
            row->scored = row->needs_logits = true;
            row_scored(t, row->index, &s->sample_rows[s->n_rows - 1]);
        }
    }
    for (uint32_t d = 0; d < n_sampled; d++) {
        struct step_row *row =
            row_add(s, first_token + r->n_tokens - n_sampled + d, run, t, t->n_known + d);
        row->draft = d;
        step_row_sampled(t, r->slot, t->n_known + d, !r->n_drafts, speaks,
                         &s->sample_rows[s->n_rows - 1]);
        row->needs_logits = needs_logits(&t->sampling, &s->sample_rows[s->n_rows - 1]);
        s->needs_host = s->needs_host || r->n_drafts;
    }
}

/* --- filling --- */

static void run_tokens(struct step *s, const struct slots *slots, uint32_t run,
                       const struct slot *t, uint32_t first)
{
    const struct slot_run *r = &s->runs[run];
    uint32_t size = slots->limits.block_size;
    for (uint32_t i = 0; i < r->n_tokens; i++) {
        uint32_t position = t->n_computed + i;
        s->token_ids[first + i] = t->tokens[position];
        s->token_slot[first + i] = (int32_t)r->slot;
        s->positions[first + i] = (int32_t)position;
        s->cache_slot[first + i] =
            t->blocks[position / size] * (int32_t)size + (int32_t)(position % size);
    }
}

static void tables_fill(struct step *s, const struct slots *slots)
{
    uint32_t stride = 1;
    for (uint32_t i = 0; i < s->n_runs; i++)
        if (slots->all[s->runs[i].slot].n_blocks > stride)
            stride = slots->all[s->runs[i].slot].n_blocks;
    for (uint32_t i = 0; i < s->n_runs; i++) {
        const struct slot *t = &slots->all[s->runs[i].slot];
        memcpy(s->block_table + (size_t)i * stride, t->blocks, t->n_blocks * sizeof *t->blocks);
        memset(s->block_table + (size_t)i * stride + t->n_blocks, 0,
               (stride - t->n_blocks) * sizeof *t->blocks);
    }
    s->batch.blocks_per_seq_max = (int)stride;
}

void step_fill(struct step *s, struct slots *slots, bool speaks)
{
    uint32_t n_tokens = 0;
    s->n_runs = slots->n_runs;
    s->n_rows = s->n_tokens_out = s->n_drafted = 0;
    s->needs_host = s->settled = false;
    memcpy(s->runs, slots->runs, s->n_runs * sizeof *s->runs);
    tables_fill(s, slots);
    for (uint32_t i = 0; i < s->n_runs; i++) {
        const struct slot_run *r = &s->runs[i];
        struct slot *t = &slots->all[r->slot];
        if (r->drafts) memcpy(t->tokens + t->n_known, r->drafts, r->n_drafts * sizeof *r->drafts);
        if (r->own) s->drafted[s->n_drafted++] = (struct plan_pair){r->slot, r->n_drafts};
        t->n_drafts = 0;
        draft_written(slots, t, t->n_computed, t->n_computed + r->n_tokens);
        s->runs[i].drafts = NULL; /* the plan's memory; the slot has them now */
        s->kept_known[i] = t->n_known;
        s->seq_start[i] = (int32_t)n_tokens;
        run_tokens(s, slots, i, t, n_tokens);
        run_rows(s, i, t, n_tokens, speaks);
        n_tokens += r->n_tokens;
        t->n_computed += r->n_tokens;
        s->context_len[i] = (int32_t)t->n_computed;
        if (!r->sample || r->n_drafts) continue;
        t->tokens[t->n_known++] = TOKEN_PENDING;
        draft_kept(t);
    }
    s->seq_start[s->n_runs] = (int32_t)n_tokens;
    s->batch = (struct batch){
        .n_tokens = (int)n_tokens,
        .n_seqs = (int)s->n_runs,
        .n_rows_out = (int)s->n_rows,
        .blocks_per_seq_max = s->batch.blocks_per_seq_max,
        .token_ids = s->token_ids,
        .token_slot = s->token_slot,
        .positions = s->positions,
        .seq_start = s->seq_start,
        .context_len = s->context_len,
        .block_table = s->block_table,
        .cache_slot = s->cache_slot,
        .rows_out = s->rows_out,
    };
}

bool step_is_decode(const struct step *s)
{
    bool one_each = s->batch.n_tokens == s->batch.n_seqs && s->n_rows == s->n_runs;
    for (uint32_t i = 0; i < s->n_rows && one_each; i++)
        one_each = !s->rows[i].scored;
    return one_each;
}

bool step_is_greedy(const struct step *s, uint32_t first, uint32_t n)
{
    for (uint32_t i = first; i < first + n; i++)
        if (s->rows[i].needs_logits) return false;
    return true;
}

void step_pad(struct step *s, int n)
{
    size_t stride = (size_t)s->batch.blocks_per_seq_max;
    for (int i = s->batch.n_tokens; i < n; i++) {
        s->token_ids[i] = s->positions[i] = 0;
        s->token_slot[i] = s->cache_slot[i] = -1;
        s->rows_out[i] = s->seq_start[i] = i;
        s->context_len[i] = 1;
        memset(s->block_table + (size_t)i * stride, 0, stride * sizeof *s->block_table);
    }
    s->seq_start[n] = n;
    s->batch.n_tokens = s->batch.n_seqs = s->batch.n_rows_out = n;
}

/* --- settling --- */

static void token_out(struct step *s, uint32_t row)
{
    const struct step_row *r = &s->rows[row];
    const struct sample_result *from = &s->results[row];
    int32_t wanted = s->sample_rows[row].n_logprobs;
    struct step_token *out = &s->tokens[s->n_tokens_out++];
    *out = (struct step_token){
        .slot = r->slot, .token = from->token, .flags = r->scored ? STEP_TOKEN_SCORED : 0};
    if (wanted < 0) return;
    out->has_logprob = true;
    out->logprob = from->logprob;
    out->n_top = (uint32_t)(from->n_top < wanted ? from->n_top : wanted);
    out->top_tokens = from->top_tokens;
    out->top_logprobs = from->top_logprobs;
}

/* A run with drafts keeps each while it equals the sample at its place; the first sample that does
 * not, or the one after all drafts, is the run's last token. */
static bool draft_settle(struct step *s, struct slot *t, uint32_t row)
{
    const struct step_row *r = &s->rows[row];
    uint32_t n_drafts = s->runs[r->run].n_drafts, known = s->kept_known[r->run];
    int32_t token = s->results[row].token;
    bool goes_on = r->draft < n_drafts && t->tokens[known + r->draft] == token;
    t->tokens[known + r->draft] = token;
    t->n_known = known + r->draft + 1;
    t->n_computed = t->n_known - 1;
    draft_kept(t);
    return goes_on;
}

void step_settle(struct step *s, struct slots *slots)
{
    if (s->settled) return;
    s->settled = true;
    uint32_t ended_run = UINT32_MAX; /* whose remaining drafts were wrong */
    for (uint32_t row = 0; row < s->n_rows; row++) {
        const struct step_row *r = &s->rows[row];
        struct slot *t = &slots->all[r->slot];
        bool lives = t->generation == r->generation;
        if (r->run == ended_run) continue;
        token_out(s, row);
        if (!lives || r->scored) continue;
        if (s->runs[r->run].n_drafts) {
            if (!draft_settle(s, t, row)) ended_run = r->run;
        } else {
            t->tokens[r->index] = s->results[row].token;
        }
    }
}

bool step_blocks(const struct step *s, const struct step_plan *next)
{
    if (!s->busy || s->settled) return false;
    if (s->needs_host || next->n_forks) return true;
    for (uint32_t i = 0; i < next->n_runs; i++)
        if (next->runs[i].n_drafts || next->runs[i].n_own) return true;
    return false;
}
