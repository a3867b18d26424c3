/* What steps and drafts cost a group, from the times in its results.
 *
 * A step's time by the number of its tokens is kept in buckets, exact up to eight and then two to
 * an octave. What changes from minute to minute (other work on the machine, longer contexts) slows
 * all sizes alike: it is one factor, so that a size not run for long is still comparable to one run
 * all the time. A size not seen yet is guessed from its neighbours. Prompts are left out: their
 * tokens are cheaper than those that are sampled. */
#include "coordinator/engine/state.h"

static const float UNKNOWN_STEP_US = 1000, TOKEN_OF_PASS = 0.125f, PASS_OF_STEP = 0.1f;
static const float CREDIT_SHARE = 0.01f, CREDIT_MAX_US = 1e6f;
enum { FINE = 8, SPIKE = 4, WARM = 4, SURE = 8 };

static uint32_t bucket_of(uint32_t n)
{
    uint32_t octave = 3;
    if (n <= FINE) return n ? n - 1 : 0;
    while (octave < 31 && (n - 1) >> (octave + 1))
        octave++;
    uint32_t b = FINE + 2 * (octave - 3) + ((n - 1) >> (octave - 1) & 1);
    return b < COST_BUCKETS ? b : COST_BUCKETS - 1;
}

/* A moving average. The first value is often of cold caches and gives way to a lower second one; a
 * spike does not carry it away. */
static void learn(struct average *a, float value)
{
    if (a->n < UINT8_MAX) a->n++;
    if (a->n == 1 || (a->n == 2 && value < a->value)) a->value = value;
    if (a->n <= 2) return;
    if (value > SPIKE * a->value) value = SPIKE * a->value;
    a->value += (value - a->value) / (float)(a->n < FINE ? a->n : FINE);
}

/* A bucket's time; one seen seldom takes no longer than a larger one. */
static float bucket_us(const struct draft_costs *c, uint32_t b)
{
    float us = c->step_us[b].value;
    for (uint32_t i = b + 1; i < COST_BUCKETS && c->step_us[b].n < SURE; i++)
        if (c->step_us[i].n && c->step_us[i].value < us) us = c->step_us[i].value;
    return us;
}

static float step_unscaled(const struct group *g, uint32_t n)
{
    const struct draft_costs *c = &g->costs;
    uint32_t b = bucket_of(n), below = b, above = b;
    if (c->step_us[b].n) return bucket_us(c, b);
    while (below > 0 && !c->step_us[below].n)
        below--;
    while (above < COST_BUCKETS - 1 && !c->step_us[above].n)
        above++;
    if (!c->step_us[below].n) return bucket_us(c, above);
    float low = bucket_us(c, below), n_low = c->step_tokens[below].value;
    float high = bucket_us(c, above), n_high = c->step_tokens[above].value;
    if (c->step_us[above].n && n_high > n_low)
        return low + (high - low) * ((float)n - n_low) / (n_high - n_low);
    return low + (float)g->token_ns / 1000 / c->factor * ((float)n - n_low);
}

bool draft_cost_is_known(const struct group *g, uint32_t n)
{
    return !(g->costs.factor > 0) || g->costs.step_us[bucket_of(n)].n >= WARM;
}

float draft_cost_step(const struct group *g, uint32_t n)
{
    return g->costs.factor > 0 ? g->costs.factor * step_unscaled(g, n) : UNKNOWN_STEP_US;
}

float draft_cost_pass(const struct group *g, uint32_t n)
{
    const struct draft_costs *c = &g->costs;
    float share = PASS_OF_STEP;
    if (c->pass_share.n >= WARM)
        share = c->pass_share.value;
    else if (c->pass_share.n) /* a few of them may have been slow by accident */
        share = c->pass_share.value * (float)c->pass_share.n / WARM;
    return share * draft_cost_step(g, n);
}

float draft_cost_known(const struct group *g, uint32_t n_tokens)
{
    const struct draft_costs *c = &g->costs;
    float most_us = TOKEN_OF_PASS * draft_cost_pass(g, 1), us = most_us;
    if (c->token_us.n && c->factor * c->token_us.value < us) us = c->factor * c->token_us.value;
    return (float)n_tokens * us;
}

float draft_cost_wait(const struct group *g, enum draft_kind kind)
{
    const struct draft_costs *c = &g->costs;
    /* Nothing measured: a wait as long as a step, so that a draft must be kept to pay. */
    return c->factor > 0 ? c->wait_us[kind].value : kind == DRAFT_KINDS ? 0 : UNKNOWN_STEP_US;
}

/* A round is one pass that catches up and then a pass for each further draft. A pass is measured in
 * steps of as many sequences, so that it is known for other numbers of them. */
static void learn_round(struct group *g, const struct step_result *r, uint32_t n_ahead)
{
    struct draft_costs *c = &g->costs;
    uint32_t n_more = r->draft_passes - 1, n_usual = (n_more + 2) * n_ahead;
    float step_us = step_unscaled(g, n_ahead), first_us = (float)r->draft_first_us / c->factor;
    float more_us = (float)(r->draft_us - r->draft_first_us) / c->factor;
    bool catches_up = r->draft_tokens > n_usual + FINE;
    if (r->draft_us < r->draft_first_us || !(step_us > 0)) return;
    if (n_more)
        learn(&c->pass_share, more_us / (float)n_more / step_us);
    else if (!catches_up)
        learn(&c->pass_share, first_us / step_us);
    float rest = first_us - c->pass_share.value * step_us;
    if (catches_up) learn(&c->token_us, (rest > 0 ? rest : 0) / (float)(r->draft_tokens - n_usual));
}

/* What all sizes have in common goes into the factor at once, the rest slowly into the size. */
static void learn_step(struct draft_costs *c, uint32_t n, float us)
{
    uint32_t b = bucket_of(n);
    if (c->step_us[b].n >= WARM) {
        float now = us / c->step_us[b].value;
        if (now > SPIKE * c->factor) now = SPIKE * c->factor;
        c->factor += (now - c->factor) / 8;
    }
    learn(&c->step_us[b], us / c->factor);
    learn(&c->step_tokens[b], (float)n);
}

void draft_cost_learn(struct group *g, const struct flight *f, const struct step_result *r)
{
    struct draft_costs *c = &g->costs;
    uint32_t n = f->n_tokens - f->n_unused, n_ahead = g->n_ahead_last;
    g->n_ahead_last = f->n_ahead;
    if (!r->compute_us) return;
    if (!(c->factor > 0)) c->factor = 1;
    if (r->draft_passes) learn_round(g, r, n_ahead ? n_ahead : 1);
    c->credit_us += CREDIT_SHARE * (float)r->compute_us;
    if (c->credit_us > CREDIT_MAX_US) c->credit_us = CREDIT_MAX_US;
    if (f->n_drafted)
        learn(&c->wait_us[f->kind], (float)r->wait_us);
    else if (f->was_queued)
        learn(&c->wait_us[DRAFT_KINDS], (float)r->wait_us);
    if (!f->n_prompt_tokens && n) learn_step(c, n, (float)r->compute_us);
}
