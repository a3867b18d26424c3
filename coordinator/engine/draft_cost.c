/* What steps and drafts cost a group, from the times in its results.
 *
 * A step's time by the number of its tokens is kept in buckets, exact up to eight and then two to
 * an octave, each a moving average; a size not seen yet is guessed from its neighbours. Prompts are
 * left out: their tokens are cheaper than those that are sampled. */
#include "coordinator/engine/state.h"

static const float UNKNOWN_STEP_US = 1000, TOKEN_OF_PASS = 0.125f, PASS_OF_STEP = 0.1f;
static const float CREDIT_SHARE = 0.01f, CREDIT_MAX_US = 1e6f;
enum { FINE = 8, SPIKE = 4 };

static uint32_t bucket_of(uint32_t n)
{
    uint32_t octave = 3;
    if (n <= FINE) return n ? n - 1 : 0;
    while (octave < 31 && (n - 1) >> (octave + 1))
        octave++;
    uint32_t b = FINE + 2 * (octave - 3) + ((n - 1) >> (octave - 1) & 1);
    return b < COST_BUCKETS ? b : COST_BUCKETS - 1;
}

/* A moving average that one late step does not carry away. */
static void learn(float *average, float value)
{
    if (!*average) {
        *average = value;
        return;
    }
    if (value > SPIKE * *average) value = SPIKE * *average;
    *average += (value - *average) / 8;
}

float draft_cost_step(const struct group *g, uint32_t n)
{
    const struct draft_costs *c = &g->costs;
    uint32_t b = bucket_of(n), below = b, above = b;
    if (c->step_us[b]) return c->step_us[b];
    while (below > 0 && !c->step_us[below])
        below--;
    while (above < COST_BUCKETS - 1 && !c->step_us[above])
        above++;
    float low = c->step_us[below], high = c->step_us[above];
    float n_low = c->step_tokens[below], n_high = c->step_tokens[above];
    if (!low && !high) return UNKNOWN_STEP_US;
    if (!low) return high;
    if (high && n_high > n_low) return low + (high - low) * ((float)n - n_low) / (n_high - n_low);
    return low + (float)g->token_ns / 1000 * ((float)n - n_low);
}

float draft_cost_pass(const struct group *g)
{
    return g->costs.pass_us ? g->costs.pass_us : PASS_OF_STEP * draft_cost_step(g, 1);
}

float draft_cost_known(const struct group *g, uint32_t n_tokens)
{
    float token_us = g->costs.token_us ? g->costs.token_us : TOKEN_OF_PASS * draft_cost_pass(g);
    return token_us * (float)n_tokens;
}

float draft_cost_wait(const struct group *g, enum draft_kind kind)
{
    bool any_step = false;
    for (uint32_t i = 0; i < COST_BUCKETS && !any_step; i++)
        any_step = g->costs.step_us[i] > 0;
    /* Nothing measured: a wait as long as a step, so that a draft must be kept to pay. */
    return any_step ? g->costs.wait_us[kind] : UNKNOWN_STEP_US;
}

/* Drafting: a round is one pass that catches up and then a pass for each further draft. */
static void learn_round(struct draft_costs *c, const struct step_result *r, uint32_t n_ahead)
{
    uint32_t n_usual = 2 * n_ahead + (r->draft_passes - 1) * n_ahead;
    if (r->draft_tokens <= n_usual + 8) {
        learn(&c->pass_us, (float)r->draft_us / (float)r->draft_passes);
        return;
    }
    float rest = (float)r->draft_us - (float)(r->draft_passes - 1) * c->pass_us;
    if (rest > 0) learn(&c->token_us, rest / (float)(r->draft_tokens - n_usual));
}

void draft_cost_learn(struct group *g, const struct flight *f, const struct step_result *r)
{
    struct draft_costs *c = &g->costs;
    uint32_t n = f->n_tokens - f->n_unused;
    if (r->draft_passes) learn_round(c, r, g->n_ahead_last ? g->n_ahead_last : 1);
    g->n_ahead_last = f->n_ahead;
    if (!r->compute_us) return;
    c->credit_us += CREDIT_SHARE * (float)r->compute_us;
    if (c->credit_us > CREDIT_MAX_US) c->credit_us = CREDIT_MAX_US;
    if (f->n_drafted) learn(&c->wait_us[f->kind], (float)r->wait_us + 1);
    if (f->n_prompt_tokens || !n) return;
    uint32_t b = bucket_of(n);
    learn(&c->step_us[b], (float)r->compute_us);
    learn(&c->step_tokens[b], (float)n);
}
