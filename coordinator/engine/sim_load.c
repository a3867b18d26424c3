/* Requests of the simulator and the judgement of every emission. */
#include "coordinator/engine/sim_load.h"
#include "base/hash.h"
#include "base/mem.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

void sim_wrong(struct sim_load *l, const struct sim_request *q, const char *format, ...)
{
    va_list args;
    if (l->words[0]) return;
    int n =
        snprintf(l->words, sizeof l->words, "request %llu: ", (unsigned long long)q->request.id);
    va_start(args, format);
    vsnprintf(l->words + n, sizeof l->words - (size_t)n, format, args);
    va_end(args);
}

/* Judging. */
static uint64_t seed_of(const struct sim_request *q, uint32_t choice)
{
    return q->request.sampling.seed + choice;
}

static struct sampling_params params_of(const struct sim_request *q, uint32_t choice)
{
    struct sampling_params p = q->request.sampling;
    p.seed = seed_of(q, choice);
    return p;
}

static bool is_stop(const struct sim_request *q, uint32_t n_output, int32_t token)
{
    const struct sampling_params *p = &q->request.sampling;
    if (n_output <= (uint32_t)p->min_tokens && p->min_tokens > 0) return false;
    for (int32_t i = 0; i < p->n_stop_ids; i++)
        if (p->stop_ids[i] == token) return true;
    return false;
}

static void check_top(struct sim_request *q, uint64_t prefix, const struct step_token *t,
                      int32_t n_asked)
{
    int32_t tokens[SIM_VOCABULARY + 1];
    float logprobs[SIM_VOCABULARY + 1];
    if (n_asked < 0) return;
    if (!t->has_logprob || t->logprob != model_logprob(prefix, t->token))
        sim_wrong(q->load, q, "a logprob is not its token's");
    if (t->n_top != (uint32_t)n_asked) {
        sim_wrong(q->load, q, "%u alternatives instead of %d", t->n_top, n_asked);
        return;
    }
    model_top(prefix, t->n_top, tokens, logprobs);
    for (uint32_t i = 0; i < t->n_top; i++)
        if (t->top_tokens[i] != tokens[i] || t->top_logprobs[i] != logprobs[i])
            sim_wrong(q->load, q, "alternative %u is not the model's", i);
}

static void hear_scored(struct sim_request *q, struct sim_choice *c, const struct step_token *t)
{
    uint64_t prefix = 1;
    uint32_t p = ++c->n_scored;
    if (p >= q->request.n_tokens || t->token != q->request.tokens[p]) {
        sim_wrong(q->load, q, "score %u is not of the prompt's token", p);
        return;
    }
    for (uint32_t i = 0; i < p; i++)
        prefix = model_prefix(prefix, q->request.tokens[i]);
    check_top(q, prefix, t, q->request.sampling.n_prompt_logprobs);
}

static void hear_token(struct sim_request *q, uint32_t choice, const struct step_token *t)
{
    struct sim_choice *c = &q->choices[choice];
    struct sampling_params p = params_of(q, choice);
    if (t->flags & STEP_TOKEN_SCORED) {
        hear_scored(q, c, t);
        return;
    }
    if (is_stop(q, c->n_output, c->last) && c->n_output)
        sim_wrong(q->load, q, "choice %u goes on after a stop", choice);
    int32_t token = model_next(c->prefix, c->last, c->n_output, &p);
    if (t->token != token)
        sim_wrong(q->load, q, "choice %u token %u is %d, should be %d", choice, c->n_output,
                  t->token, token);
    check_top(q, c->prefix, t, q->request.sampling.n_logprobs);
    c->prefix = model_prefix(c->prefix, t->token);
    c->last = t->token;
    c->n_output++;
    q->load->n_tokens++;
}

static void check_end(struct sim_request *q, uint32_t choice, const struct emission *e)
{
    struct sim_choice *c = &q->choices[choice];
    uint32_t n_all = q->request.n_tokens + c->n_output;
    if (e->n_generated != c->n_output)
        sim_wrong(q->load, q, "choice %u says %u tokens, gave %u", choice, e->n_generated,
                  c->n_output);
    switch (e->finish) {
    case FINISH_STOP:
        if (c->stopped) break;
        if (!c->n_output || !is_stop(q, c->n_output, c->last) || e->stop_token != c->last)
            sim_wrong(q->load, q, "choice %u stops at token %d", choice, c->last);
        break;
    case FINISH_LENGTH:
        if (c->n_output != q->request.max_tokens && n_all < q->load->capacity_least)
            sim_wrong(q->load, q, "choice %u ends after %u of %u tokens", choice, c->n_output,
                      q->request.max_tokens);
        if (!q->request.max_tokens && c->n_scored + 1 != q->request.n_tokens)
            sim_wrong(q->load, q, "%u scores for %u tokens", c->n_scored, q->request.n_tokens);
        break;
    case FINISH_CANCELLED:
        if (!q->cancelled) sim_wrong(q->load, q, "choice %u ends as cancelled", choice);
        break;
    case FINISH_ERROR:
        if (e->error == ERR_DEADLINE && q->request.deadline_us &&
            q->load->now_us >= q->request.deadline_us)
            break;
        if (e->error == ERR_TOO_LONG && n_all >= q->load->capacity_least) break;
        sim_wrong(q->load, q, "choice %u fails: %s", choice, e->error_text ? e->error_text : "?");
        break;
    default:
        sim_wrong(q->load, q, "choice %u ends with %d", choice, e->finish);
    }
    if (q->request.sampling.n_prompt_logprobs >= 0 && !choice && e->finish <= FINISH_LENGTH &&
        !c->stopped && c->n_scored + 1 != q->request.n_tokens)
        sim_wrong(q->load, q, "%u scores for %u tokens", c->n_scored, q->request.n_tokens);
}

/* best_of: all run by hand, the best by cumulative logprob. */
static void check_best_of(struct sim_request *q, const struct emission *e)
{
    const struct request *r = &q->request;
    double sums[64];
    uint32_t best = 0, n_most = q->load->capacity_least - r->n_tokens;
    if (r->n_tokens + r->max_tokens > q->load->capacity_least && q->load->shrinks)
        return; /* cut, who knows where */
    if (n_most > r->max_tokens) n_most = r->max_tokens;
    for (uint32_t i = 0; i < r->n_best_of; i++) {
        struct sampling_params p = params_of(q, i);
        uint64_t prefix = 1;
        int32_t last = 0;
        for (uint32_t k = 0; k < r->n_tokens; k++)
            prefix = model_prefix(prefix, last = r->tokens[k]);
        sums[i] = 0;
        for (uint32_t n = 0; n < n_most; n++) {
            last = model_next(prefix, last, n, &p);
            sums[i] += model_logprob(prefix, last);
            prefix = model_prefix(prefix, last);
            if (is_stop(q, n + 1, last)) break;
        }
    }
    for (int32_t rank = 0; rank <= e->choice; rank++) {
        best = 0;
        for (uint32_t i = 1; i < r->n_best_of; i++)
            if (sums[i] > sums[best]) best = i;
        if (rank < e->choice) sums[best] = -INFINITY;
    }
    struct sampling_params p = params_of(q, best);
    uint64_t prefix = 1;
    int32_t last = 0;
    for (uint32_t k = 0; k < r->n_tokens; k++)
        prefix = model_prefix(prefix, last = r->tokens[k]);
    for (uint32_t n = 0; n < e->n_tokens; n++) {
        last = model_next(prefix, last, n, &p);
        if (e->tokens[n].token != last)
            sim_wrong(q->load, q, "best of %u: choice %d token %u", r->n_best_of, e->choice, n);
        prefix = model_prefix(prefix, last);
    }
    if (e->n_tokens != n_most && !is_stop(q, e->n_tokens, last))
        sim_wrong(q->load, q, "best of: %u tokens", e->n_tokens);
}

static void check_beam(struct sim_request *q, const struct emission *e)
{
    struct sim_beam_result want;
    if (q->request.n_tokens + q->request.max_tokens > q->load->capacity_least && q->load->shrinks)
        return;
    struct request cut = q->request;
    uint32_t n_most = q->load->capacity_least - cut.n_tokens;
    if (cut.max_tokens > n_most) cut.max_tokens = n_most;
    sim_beam_search(&cut, &want);
    uint32_t i = (uint32_t)e->choice;
    if (e->n_tokens != want.lengths[i])
        sim_wrong(q->load, q, "beam %u has %u tokens, should have %u", i, e->n_tokens,
                  want.lengths[i]);
    for (uint32_t n = 0; n < e->n_tokens && n < want.lengths[i]; n++)
        if (e->tokens[n].token != want.tokens[i][n])
            sim_wrong(q->load, q, "beam %u token %u is %d, should be %d", i, n, e->tokens[n].token,
                      want.tokens[i][n]);
}

static void emitted(struct sink *sink, const struct emission *e)
{
    struct sim_request *q = (struct sim_request *)sink;
    struct sim_load *l = q->load;
    if (e->choice < 0 || (uint32_t)e->choice >= q->request.n_choices || !q->accepted || q->ended) {
        sim_wrong(l, q, "news of choice %d after the end", e->choice);
        return;
    }
    struct sim_choice *c = &q->choices[e->choice];
    bool whole = q->request.beam_width || q->request.n_best_of > q->request.n_choices;
    if (c->ended) sim_wrong(l, q, "choice %d ends twice", e->choice);
    if (whole && e->finish && e->finish <= FINISH_LENGTH && !c->stopped) {
        if (q->request.beam_width)
            check_beam(q, e);
        else if (!q->cancelled)
            check_best_of(q, e);
        l->n_tokens += e->n_tokens;
    }
    for (uint32_t i = 0; i < e->n_tokens; i++)
        if (!whole || e->tokens[i].flags & STEP_TOKEN_SCORED)
            hear_token(q, (uint32_t)e->choice, &e->tokens[i]);
    if (e->n_tokens && q->first_us < 0) q->first_us = l->now_us;
    if (e->n_tokens) q->last_us = l->now_us;
    if (e->finish && whole && !e->choice && e->finish <= FINISH_LENGTH && !c->stopped &&
        q->request.sampling.n_prompt_logprobs >= 0 && c->n_scored + 1 != q->request.n_tokens)
        sim_wrong(l, q, "%u scores for %u tokens", c->n_scored, q->request.n_tokens);
    if (e->finish) {
        if (!whole) check_end(q, (uint32_t)e->choice, e);
        c->ended = true;
        q->n_ended++;
    }
    q->flushed = false;
    if (!e->last) return;
    if (q->n_ended != q->request.n_choices)
        sim_wrong(l, q, "the last news with %u choices of %u", q->n_ended, q->request.n_choices);
    q->ended = true;
    l->n_ended++;
}

static void flushed(struct sink *sink)
{
    ((struct sim_request *)sink)->flushed = true;
}

static void destroyed(struct request *r)
{
    struct sim_request *q =
        (struct sim_request *)((char *)r - offsetof(struct sim_request, request));
    if (q->destroyed || !q->ended || !q->flushed) sim_wrong(q->load, q, "destroyed before its end");
    q->destroyed = true;
}

/* Making. */
static void make_sampling(struct sim_request *q, struct rand *r, const struct sim_load_shape *shape)
{
    struct sampling_params *p = &q->request.sampling;
    sampling_params_default(p);
    p->seed = rand_next(r) >> 8;
    q->stop_ids[0] = SIM_EOS;
    for (int i = 1; i < 4; i++)
        q->stop_ids[i] = (int32_t)rand_below(r, SIM_VOCABULARY);
    p->stop_ids = q->stop_ids;
    p->n_stop_ids = rand_below(r, 4) ? (int32_t)rand_below(r, 3) + 1 : 0;
    if (!rand_below(r, 6)) p->min_tokens = (int32_t)rand_below(r, 8);
    if (!rand_below(r, 5)) p->n_logprobs = (int32_t)rand_below(r, 4);
    if (shape->scores && !rand_below(r, 8)) p->n_prompt_logprobs = (int32_t)rand_below(r, 3);
}

static void make_kind(struct request *q, struct rand *r, const struct sim_load_shape *shape)
{
    q->n_choices = 1;
    if (shape->choices_max > 1 && !rand_below(r, 4)) {
        q->n_choices = 1 + (uint32_t)rand_below(r, shape->choices_max);
        if (!rand_below(r, 3)) q->n_best_of = q->n_choices + (uint32_t)rand_below(r, 3);
    } else if (shape->beams_max && !rand_below(r, 6)) {
        q->beam_width = 1 + (uint32_t)rand_below(r, shape->beams_max);
        q->n_choices = 1 + (uint32_t)rand_below(r, q->beam_width);
        q->length_penalty = (float)rand_below(r, 5) * 0.5f;
        q->early_stopping = rand_below(r, 2);
        q->sampling.n_prompt_logprobs = -1;
    }
    if (q->n_choices == 1 && !q->beam_width && !q->n_best_of &&
        q->sampling.n_prompt_logprobs >= 0 && !rand_below(r, 3))
        q->max_tokens = 0;
}

/* The prompt of an earlier request, perhaps cut. */
static void repeat_prompt(struct sim_load *l, struct request *to, struct rand *r, uint32_t i,
                          const struct sim_load_shape *shape)
{
    if (!shape->repeats || i < shape->repeats || !rand_below(r, 3)) return;
    const struct request *from = &l->requests[i - shape->repeats].request;
    uint32_t n = from->n_tokens < to->n_tokens ? from->n_tokens : to->n_tokens;
    memcpy(to->tokens, from->tokens, n * sizeof *to->tokens);
}

static enum err make_request(struct sim_load *l, struct sim_request *q, struct rand *r,
                             const struct sim_load_shape *shape, uint32_t i)
{
    struct request *to = &q->request;
    uint64_t stream = rand_below(r, 3);
    q->load = l;
    q->sink = (struct sink){emitted, flushed};
    to->id = i + 1;
    to->sink = &q->sink;
    to->destroy = destroyed;
    to->n_tokens = 1 + (uint32_t)rand_below(r, shape->prompt_max);
    to->max_tokens = 1 + (uint32_t)rand_below(r, shape->output_max);
    uint32_t n_shared = (uint32_t)rand_below(r, to->n_tokens + 1);
    TRY(MEM_NEW_ARRAY(to->n_tokens, &to->tokens));
    for (uint32_t k = 0; k < to->n_tokens; k++)
        to->tokens[k] =
            (int32_t)((k < n_shared ? hash_u64(stream << 32 | k) : rand_next(r)) % SIM_VOCABULARY);
    repeat_prompt(l, to, r, i, shape);
    make_sampling(q, r, shape);
    make_kind(to, r, shape);
    to->tenant = rand_below(r, 3);
    to->tenant_weight = (uint32_t)rand_below(r, 3);
    to->cache_salt = !rand_below(r, 5);
    to->no_prefix_cache = !rand_below(r, 10);
    if (shape->priorities) to->priority = (int32_t)rand_below(r, 3) - 1;
    q->arrival_us = (int64_t)rand_below(r, (uint64_t)shape->span_us + 1);
    if (shape->deadlines && !rand_below(r, 6))
        to->deadline_us = q->arrival_us + 1 + (int64_t)rand_below(r, 20000);
    q->cancel_us = shape->cancels && !rand_below(r, 4)
                       ? q->arrival_us + (int64_t)rand_below(r, 30000)
                       : INT64_MAX;
    q->cancel_choice = rand_below(r, 2) ? -1 : (int)rand_below(r, to->n_choices);
    q->cancel_how = rand_below(r, 2) ? ENGINE_CANCEL_CLIENT : ENGINE_CANCEL_STOP;
    q->first_us = -1;
    for (uint32_t c = 0; c < SIM_CHOICES_MAX; c++) {
        q->choices[c].prefix = 1;
        for (uint32_t k = 0; k < to->n_tokens; k++)
            q->choices[c].prefix =
                model_prefix(q->choices[c].prefix, q->choices[c].last = to->tokens[k]);
    }
    return OK;
}

enum err sim_load_make(struct sim_load *l, struct rand *r, const struct sim_load_shape *shape)
{
    *l = (struct sim_load){.capacity_least = UINT32_MAX};
    TRY(MEM_NEW_ARRAY(shape->n_requests, &l->requests));
    l->n = shape->n_requests;
    for (uint32_t i = 0; i < l->n; i++)
        TRY(make_request(l, &l->requests[i], r, shape, i));
    return OK;
}

void sim_load_fini(struct sim_load *l)
{
    for (uint32_t i = 0; l->requests && i < l->n; i++)
        mem_free(l->requests[i].request.tokens);
    mem_free(l->requests);
    l->requests = NULL;
}
