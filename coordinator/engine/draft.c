/* Drafts: guesses at the tokens to come, which the group verifies several at a time.
 *
 * There are two kinds. Prompt lookup: what followed the last time the sequence ended with these
 * tokens; the plan lists them. And those of the group's own draft model, which the plan only
 * counts. A draft is kept while it equals the sample at its place, so the tokens are those it would
 * give anyhow; only the time differs.
 *
 * Drafting takes a sequence out of the pipelined decode set, since its result must be in before the
 * next guess, and verifying takes rows. So it is done where that pays by what steps, passes and
 * waits were measured to cost (draft_cost.c) and by how many drafts of this sequence and group were
 * kept. Where it does not it is off, but for a try now and then out of one percent of the time.
 *
 * Saxena: "Prompt lookup decoding", 2023. Leviathan et al.: "Fast Inference from Transformers via
 * Speculative Decoding", 2022, section 3.3 on the expected number of kept tokens. */
#include "coordinator/engine/state.h"

#include <string.h>

enum { NGRAM_MAX = 4, NGRAM_MIN = 2, LOOK_BACK_MAX = 8192 };
enum {
    REST_NONE = 4,
    REST_UNPAID = 16,
    REST_MISSED = UINT8_MAX,
    TRY_OWN = 2,
    TRY_FOUND = 4,
    STEPS_TO_COME = 32,
    WAITS_MIN = 2
};
enum { TRIES_FEW = 3, TRIES_OWN = 5, TRIES_GROUP = 61 };
static const float ACCEPT_FIRST = 0.7f, ACCEPT_ONE = 65535;

/* Where the last n tokens occurred before, or 0: the index of the token that followed. */
static uint32_t find_ngram(const int32_t *tokens, uint32_t n_tokens, uint32_t n)
{
    const int32_t *tail = tokens + n_tokens - n;
    uint32_t stop = n_tokens > LOOK_BACK_MAX ? n_tokens - LOOK_BACK_MAX : 0;
    for (uint32_t i = n_tokens - 1; i >= stop + n; i--)
        if (tokens[i - 1] == tail[n - 1] && !memcmp(tokens + i - n, tail, n * sizeof *tokens))
            return i;
    return 0;
}

static uint32_t find(struct sequence *s, uint32_t n_max, int32_t *out)
{
    const int32_t *tokens = sequence_tokens(s);
    if (!n_max) return 0;
    for (uint32_t n = NGRAM_MAX; n >= NGRAM_MIN; n--) {
        uint32_t at = s->tokens.n > n ? find_ngram(tokens, s->tokens.n, n) : 0;
        if (!at) continue;
        uint32_t n_found = s->tokens.n - at < n_max ? s->tokens.n - at : n_max;
        memcpy(out, tokens + at, n_found * sizeof *out);
        return n_found;
    }
    return 0;
}

/* --- how often they are kept --- */

static float acceptance(const struct group *g, const struct sequence *s, enum draft_kind kind)
{
    if (s->drafting.n_tries[kind]) return (float)s->drafting.accept[kind] / ACCEPT_ONE;
    return g->costs.n_tries[kind] ? g->costs.accept[kind] : ACCEPT_FIRST;
}

static void learn_one(struct group *g, struct sequence *s, enum draft_kind kind, bool kept)
{
    struct draft_costs *c = &g->costs;
    float p = acceptance(g, s, kind), q = c->n_tries[kind] ? c->accept[kind] : ACCEPT_FIRST;
    uint32_t n = s->drafting.n_tries[kind], m = c->n_tries[kind];
    p += ((float)kept - p) / (float)(TRIES_FEW + (n < TRIES_OWN ? n : TRIES_OWN));
    q += ((float)kept - q) / (float)(TRIES_FEW + (m < TRIES_GROUP ? m : TRIES_GROUP));
    s->drafting.accept[kind] = (uint16_t)(p * ACCEPT_ONE);
    if (n < UINT8_MAX) s->drafting.n_tries[kind]++;
    c->accept[kind] = q;
    c->n_tries[kind]++;
}

void draft_learn(struct engine *e, struct group *g, struct sequence *s, uint32_t n_tried,
                 uint32_t n_kept)
{
    enum draft_kind kind = s->drafting.kind;
    e->stats.drafts_accepted += n_kept;
    if (kind == DRAFT_MODEL) {
        e->stats.drafts_proposed += n_tried;
        e->stats.model_drafts_proposed += n_tried;
        e->stats.model_drafts_accepted += n_kept;
    }
    for (uint32_t i = 0; i < n_kept; i++)
        learn_one(g, s, kind, true);
    if (n_kept < n_tried) learn_one(g, s, kind, false);
}

void draft_came(struct sequence *s, uint32_t n)
{
    if (n)
        s->drafting.n_waits = WAITS_MIN;
    else if (s->drafting.n_waits)
        s->drafting.n_waits--; /* it reads a long prompt piece by piece */
    else
        s->drafting.rest = REST_MISSED; /* it has not so many positions, or no room */
}

/* --- whether and how many pay --- */

static uint32_t least(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

/* Sequences that sample in a step. */
static uint32_t n_sampling(const struct group *g)
{
    uint32_t n = g->running.n - g->prefilling.n;
    return n ? n : 1;
}

/* Time that k drafts of the kind cost more than none. Those of prompt lookup come to one sequence
 * here and there; a draft model guesses for all of the group alike, so all are taken together. */
static float time_of(const struct group *g, enum draft_kind kind, uint32_t n, uint32_t k, bool sunk)
{
    bool together = kind == DRAFT_MODEL && !sunk;
    float plain_us = draft_cost_step(g, n);
    float rows_us = draft_cost_step(g, least(n + (together ? n * k : k), g->n_budget)) - plain_us;
    float wait_us = draft_cost_wait(g, kind) - draft_cost_wait(g, DRAFT_KINDS);
    if (rows_us < 0) rows_us = 0;
    if (sunk) return rows_us;
    if (!together) return rows_us + wait_us / (float)(1 + g->n_syncs_last);
    return (rows_us + wait_us + (float)k * draft_cost_pass(g, n)) / (float)n;
}

/* The number up to n_most that gains most, 0 when none does; out_gain_us: how much a step. A token
 * is worth its share of a plain step. sunk: they are there already. */
static uint32_t best_length(const struct group *g, const struct sequence *s, enum draft_kind kind,
                            uint32_t n_most, bool sunk, float *out_gain_us)
{
    uint32_t n = n_sampling(g), best = 0;
    float p = acceptance(g, s, kind), chance = 1, kept = 0;
    float worth_us = (draft_cost_step(g, n) + draft_cost_wait(g, DRAFT_KINDS)) / (float)n;
    *out_gain_us = (float)n_most;
    if (g->costs.ignored) return n_most;
    *out_gain_us = 0;
    if (!draft_cost_is_known(g, n)) return 0;
    for (uint32_t k = 1; k <= n_most; k++) {
        chance *= p;
        kept += chance;
        float gain_us = kept * worth_us - time_of(g, kind, n, k, sunk);
        if (gain_us <= *out_gain_us) continue;
        *out_gain_us = gain_us;
        best = k;
    }
    return best;
}

/* The draft model reads at most so many tokens a round. */
static uint8_t rounds_for(const struct group *g, uint32_t n_tokens)
{
    uint32_t n = n_tokens / g->n_budget + WAITS_MIN;
    return (uint8_t)least(n, UINT8_MAX);
}

static uint32_t limit_of(const struct engine *e, const struct group *g)
{
    return least(e->config.n_speculative_tokens, g->info.draft_tokens_max);
}

/* Own drafts worth having after a run, that catching up with the known tokens included. */
static uint32_t own_length(const struct engine *e, const struct group *g, const struct sequence *s)
{
    float gain_us;
    if (!g->info.has_draft_model || s->n_end <= s->tokens.n + 2 || s->drafting.rest > REST_UNPAID)
        return 0;
    uint32_t k = best_length(g, s, DRAFT_MODEL, least(limit_of(e, g), s->n_end - s->tokens.n - 2),
                             false, &gain_us);
    if (!k || g->costs.ignored) return k;
    uint32_t n_steps = sequence_generated(s);
    if (n_steps < STEPS_TO_COME) n_steps = STEPS_TO_COME; /* it may go on as long as it has gone */
    n_steps = least(n_steps, s->n_end - s->tokens.n) / 2;
    return draft_cost_known(g, s->tokens.n - s->drafting.n_seen) < gain_us * (float)n_steps ? k : 0;
}

/* A try where it does not pay, out of the group's credit: kinds that were not kept once may be now.
 */
static bool try_paid(struct group *g, const struct sequence *s, bool found)
{
    float cost_us;
    uint32_t n = n_sampling(g);
    if (found)
        cost_us = time_of(g, DRAFT_NGRAM, n, TRY_FOUND, false);
    else if (g->info.has_draft_model && s->n_end > s->tokens.n + 2 + TRY_OWN)
        cost_us = (float)n * time_of(g, DRAFT_MODEL, n, TRY_OWN, false) +
                  draft_cost_known(g, s->tokens.n - s->drafting.n_seen);
    else
        return false;
    if (cost_us > g->costs.credit_us) return false;
    g->costs.credit_us -= cost_us;
    return true;
}

bool draft_wanted(const struct engine *e, struct group *g, struct sequence *s)
{
    int32_t tokens[TRY_FOUND];
    float gain_us;
    if (!limit_of(e, g) || s->job->beam) return false;
    if (s->drafting.rest) {
        s->drafting.rest--;
        return false;
    }
    uint32_t n_found = find(s, TRY_FOUND, tokens);
    s->drafting.rest = n_found ? REST_UNPAID : REST_NONE;
    if (n_found && best_length(g, s, DRAFT_NGRAM, limit_of(e, g), false, &gain_us)) return true;
    if (own_length(e, g, s)) return true;
    s->drafting.try_again = try_paid(g, s, n_found > 0);
    return s->drafting.try_again;
}

uint32_t draft_after_prompt(const struct engine *e, const struct group *g, struct sequence *s)
{
    uint32_t n = limit_of(e, g) && !s->job->beam ? own_length(e, g, s) : 0;
    if (n) s->drafting.n_waits = rounds_for(g, s->tokens.n - s->drafting.n_seen);
    return n;
}

void draft_choose(const struct engine *e, struct group *g, struct sequence *s, uint32_t n_most,
                  int32_t *list, struct draft_choice *out)
{
    float found_us, own_us = 0;
    uint32_t n_limit = least(n_most, limit_of(e, g)), n_found = find(s, n_limit, list);
    uint32_t n_listed = best_length(g, s, DRAFT_NGRAM, n_found, false, &found_us);
    uint32_t n_there = least(s->drafting.n_ahead, n_limit);
    uint32_t n_own = best_length(g, s, DRAFT_MODEL, n_there, true, &own_us);
    if (!n_own) n_own = n_there; /* a try, or the price has risen: they are paid for */
    *out = (struct draft_choice){.n_ahead = own_length(e, g, s)};
    if (s->drafting.try_again && !n_listed) n_listed = least(n_found, TRY_FOUND);
    if (n_own && own_us >= found_us)
        out->n_own = n_own;
    else
        out->n_listed = n_listed;
    if (s->drafting.try_again && !out->n_own && !out->n_listed && g->info.has_draft_model &&
        !out->n_ahead)
        out->n_ahead = least(TRY_OWN, limit_of(e, g));
    s->drafting.try_again = false;
    if (!n_found && s->drafting.rest == REST_UNPAID) s->drafting.rest = REST_NONE; /* soon again */
    if (out->n_ahead && !s->drafting.n_ahead)
        s->drafting.n_waits = rounds_for(g, s->tokens.n - s->drafting.n_seen);
}
