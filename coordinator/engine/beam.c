/* Beam search, as HF transformers' generate(num_beams=W) does it.
 *
 * Each step takes, of all continuations of all beams, the (1 + E)W with the best sum of logprobs,
 * where E is the number of stop ids, at least 1: so W remain even when all stops are among them.
 * Those among the first W that end (a stop id, or the length) are finished with sum / length ^
 * penalty and kept while they are among the W best; the first W of the others run on. It ends when
 * no running beam can beat the worst finished one, by the rules `early_stopping=False` or "never"
 * of that library, or with early_stopping as soon as W are finished.
 *
 * A beam is a sequence. The first child of a beam keeps its sequence and blocks; the others share
 * its full blocks and get a copy of the last one. A child whose token is not the one that the slot
 * sampled by itself moves to a fresh slot by a fork. Whoever finds no slot or block goes back to
 * the queue and is computed again: slower, never wrong. */
#include "base/mem.h"
#include "coordinator/engine/state.h"

#include <math.h>
#include <string.h>

struct candidate {
    double score;
    uint32_t parent, parent_rank; /* index of its sequence, place of that among the beams */
    uint32_t rank;                /* place among its alternatives */
    int32_t token;
    float logprob;
};

struct hypothesis {
    double score;
    uint32_t born; /* ties: the earlier one stays */
    int32_t stop_token;
    struct strip tokens, scores; /* int32_t, float: the generated ones */
};

struct beam {
    uint32_t width, n_keep, n_live, n_results, n_finished, n_born;
    struct candidate *tops; /* [width, n_keep] of each sequence's last sample */
    uint32_t *n_tops;       /* [width] */
    bool *has_result;       /* [width] by sequence */
    uint32_t *ranks;  /* [width] place among the beams; ties fall by it, not by where it runs */
    int32_t *sampled; /* [width] what the slot goes on with by itself */
    struct candidate *chosen;     /* [n_keep] */
    struct hypothesis *finished;  /* [width + 1] best first */
    struct sequence_list resting; /* those whose result is in, by LINK_WORK */
};

uint32_t beam_candidates(const struct request *r)
{
    uint32_t n_stops = r->sampling.n_stop_ids > 1 ? (uint32_t)r->sampling.n_stop_ids : 1;
    uint64_t n = (uint64_t)(1 + n_stops) * r->beam_width;
    return n < BEAM_CANDIDATES_MAX ? (uint32_t)n : BEAM_CANDIDATES_MAX;
}

static enum err beam_fill(struct beam *b)
{
    uint32_t w = b->width;
    TRY(MEM_NEW_ARRAY((size_t)w * b->n_keep, &b->tops));
    TRY(MEM_NEW_ARRAY(w, &b->n_tops));
    TRY(MEM_NEW_ARRAY(w, &b->has_result));
    TRY(MEM_NEW_ARRAY(w, &b->ranks));
    TRY(MEM_NEW_ARRAY(w, &b->sampled));
    TRY(MEM_NEW_ARRAY(b->n_keep, &b->chosen));
    return MEM_NEW_ARRAY(w + 1, &b->finished);
}

enum err beam_create(struct engine *e, struct job *job)
{
    struct beam *b;
    TRY(MEM_NEW(&b));
    b->width = job->request->beam_width;
    b->n_keep = beam_candidates(job->request);
    b->n_live = 1;
    enum err err = beam_fill(b);
    if (err)
        beam_destroy(e, b);
    else
        job->beam = b;
    return err;
}

void beam_destroy(struct engine *e, struct beam *b)
{
    if (!b) return;
    for (uint32_t i = 0; b->finished && i <= b->width; i++) {
        strip_free(&e->pool, &b->finished[i].tokens);
        strip_free(&e->pool, &b->finished[i].scores);
    }
    mem_free(b->tops);
    mem_free(b->n_tops);
    mem_free(b->has_result);
    mem_free(b->ranks);
    mem_free(b->sampled);
    mem_free(b->chosen);
    mem_free(b->finished);
    mem_free(b);
}

void beam_sampling(const struct beam *b, struct sampling_params *p)
{
    p->temperature = 0;
    p->n_logprobs = (int32_t)b->n_keep;
}

void beam_unseated(struct sequence *s)
{
    struct beam *b = s->job->beam;
    if (!b->has_result[s->choice]) return;
    b->has_result[s->choice] = false;
    b->n_results--;
}

/* Finished hypotheses. */
static enum err copy_strip(struct pool *p, struct strip *to, const void *items, uint32_t n,
                           uint32_t n_room)
{
    TRY(strip_reserve(p, to, (size_t)n + n_room, 4));
    if (n) memcpy(to->items, items, (size_t)n * 4);
    to->n = n;
    return OK;
}

static enum err finish_one(struct engine *e, struct job *job, const struct candidate *c,
                           bool stopped)
{
    struct beam *b = job->beam;
    struct sequence *s = job->sequences[c->parent];
    uint32_t n = sequence_generated(s) + 1, at = b->n_finished;
    double score = c->score / pow((double)n, (double)job->request->length_penalty);
    while (at && b->finished[at - 1].score < score)
        at--;
    if (at >= b->width) return OK;
    struct hypothesis h = b->finished[b->width]; /* the spare one's memory */
    memmove(b->finished + at + 1, b->finished + at, (b->width - at) * sizeof h);
    b->finished[at] = h;
    struct hypothesis *to = &b->finished[at];
    to->score = score;
    to->born = b->n_born++;
    to->stop_token = stopped ? c->token : -1;
    if (b->n_finished < b->width) b->n_finished++;
    TRY(copy_strip(&e->pool, &to->tokens, sequence_tokens(s) + s->n_prompt, n - 1, 1));
    TRY(copy_strip(&e->pool, &to->scores, s->logprobs.chosen.items, s->logprobs.chosen.n, 1));
    ((int32_t *)to->tokens.items)[to->tokens.n++] = c->token;
    ((float *)to->scores.items)[to->scores.n++] = c->logprob;
    return OK;
}

static void emit_hypothesis(struct engine *e, struct job *job, uint32_t k, const struct ending *end)
{
    struct beam *b = job->beam;
    const struct hypothesis *h = !end && k < b->n_finished ? &b->finished[k] : NULL;
    struct step_token *tokens = NULL;
    uint32_t n = h ? h->tokens.n : 0;
    struct sequence *s = job->sequences[0];
    if (n && job_room(e, n)) n = 0;
    for (uint32_t i = 0; i < n; i++)
        e->emit_tokens[i] = (struct step_token){.token = ((int32_t *)h->tokens.items)[i],
                                                .has_logprob = true,
                                                .logprob = ((float *)h->scores.items)[i]};
    tokens = n ? e->emit_tokens : NULL;
    struct ending own = {h && h->stop_token >= 0 ? FINISH_STOP : FINISH_LENGTH,
                         h ? h->stop_token : -1, OK, NULL};
    job_emit_choice(e, s, (int32_t)k, tokens, n, end ? end : &own, k + 1 == job->n_to_emit);
}

void job_end_beams(struct engine *e, struct job *job, const struct ending *end)
{
    for (uint32_t i = 0; i < job->n_sequences; i++) {
        struct sequence *s = job->sequences[i];
        sequence_withdraw(e, s);
        admission_uncount(e, s);
        s->state = SEQUENCE_DONE;
    }
    job->n_left = 0;
    e->stats.n_finished[end ? end->finish : FINISH_STOP]++;
    for (uint32_t k = 0; k < job->n_to_emit; k++)
        emit_hypothesis(e, job, k, end);
    job_done(e, job);
}

/* One step of the search. */
static bool goes_before(const struct candidate *a, const struct candidate *b)
{
    if (a->score != b->score) return a->score > b->score;
    return a->parent_rank != b->parent_rank ? a->parent_rank < b->parent_rank : a->rank < b->rank;
}

static uint32_t choose(struct job *job)
{
    struct beam *b = job->beam;
    uint32_t n = 0, n_most = b->n_keep;
    for (uint32_t i = 0; i < b->width; i++)
        for (uint32_t k = 0; b->has_result[i] && k < b->n_tops[i]; k++) {
            const struct candidate *c = &b->tops[(size_t)i * n_most + k];
            uint32_t at = n;
            while (at && goes_before(c, &b->chosen[at - 1]))
                at--;
            if (at >= n_most) break; /* its later ones are worse */
            if (n < n_most) n++;
            memmove(b->chosen + at + 1, b->chosen + at, (n - 1 - at) * sizeof *c);
            b->chosen[at] = *c;
        }
    return n;
}

static bool stops(const struct request *r, uint32_t n_output, int32_t token)
{
    if (r->sampling.min_tokens > 0 && n_output < (uint32_t)r->sampling.min_tokens) return false;
    for (int32_t i = 0; i < r->sampling.n_stop_ids; i++)
        if (r->sampling.stop_ids[i] == token) return true;
    return false;
}

/* Splits the chosen ones into finished and running; the latter stay at the front of chosen. */
static enum err split(struct engine *e, struct job *job, uint32_t n, uint32_t *out_running)
{
    struct beam *b = job->beam;
    uint32_t n_running = 0;
    bool closed = b->n_finished >= b->width && job->request->early_stopping;
    for (uint32_t i = 0; i < n; i++) {
        const struct candidate c = b->chosen[i];
        const struct sequence *s = job->sequences[c.parent];
        bool stopped = stops(job->request, sequence_generated(s), c.token);
        bool hit = stopped || s->tokens.n + 1 >= s->n_end;
        if (!hit && n_running < b->width) b->chosen[n_running++] = c;
        if (hit && i < b->width && !closed) TRY(finish_one(e, job, &c, stopped));
    }
    *out_running = n_running;
    return OK;
}

static bool is_over(const struct job *job, uint32_t n_running)
{
    const struct beam *b = job->beam;
    if (!n_running) return true;
    if (b->n_finished < b->width) return false;
    if (job->request->early_stopping) return true;
    const struct sequence *s = job->sequences[b->chosen[0].parent];
    double length = (double)sequence_generated(s) + 1;
    if (job->request->never_early && job->request->length_penalty > 0)
        length = (double)(s->n_end - s->n_prompt);
    return b->chosen[0].score / pow(length, (double)job->request->length_penalty) <=
           b->finished[b->width - 1].score;
}

/* A sequence object that is no beam now. */
static struct sequence *find_parked(struct job *job)
{
    for (uint32_t i = 0; i < job->n_sequences; i++)
        if (job->sequences[i]->state == SEQUENCE_PARKED && !job->sequences[i]->lists[LINK_WORK])
            return job->sequences[i];
    return NULL;
}

static enum err extend_by(struct engine *e, struct sequence *s, const struct candidate *c)
{
    TRY(sequence_append(&e->pool, s, c->token));
    TRY(strip_reserve(&e->pool, &s->logprobs.chosen, (size_t)s->logprobs.chosen.n + 1,
                      sizeof(float)));
    ((float *)s->logprobs.chosen.items)[s->logprobs.chosen.n++] = c->logprob;
    s->logprobs.sum = c->score;
    s->job->beam->ranks[s->choice] = (uint32_t)(c - s->job->beam->chosen);
    return OK;
}

/* Another child of a beam that goes on itself: it waits for its slot in the next plan. */
static enum err bear(struct engine *e, struct group *g, struct sequence *parent,
                     const struct candidate *c)
{
    struct sequence *s = find_parked(parent->job);
    ASSERT(s);
    sequence_drop_keys(s);
    s->n_end = parent->n_end;
    s->n_cached = parent->n_cached;
    s->resumed = true; /* if it has to be computed, it is for the second time */
    s->parent = parent;
    TRY(sequence_set_tokens(&e->pool, s, sequence_tokens(parent), parent->tokens.n, 1));
    TRY(copy_strip(&e->pool, &s->logprobs.chosen, parent->logprobs.chosen.items,
                   parent->logprobs.chosen.n, 1));
    TRY(extend_by(e, s, c));
    sequence_list_append(&g->forking, LINK_WORK, s);
    return OK;
}

/* The children of one beam. Its own tokens grow last: the others copy them. */
static enum err branch(struct engine *e, struct job *job, struct sequence *s, uint32_t n_running)
{
    struct beam *b = job->beam;
    struct group *g = e->groups[s->group];
    const struct candidate *own = NULL;
    for (uint32_t i = 0; i < n_running; i++) /* best: the one that its slot sampled by itself */
        if (b->chosen[i].parent == (uint32_t)s->choice &&
            (!own || b->chosen[i].token == b->sampled[s->choice]))
            own = &b->chosen[i];
    for (uint32_t i = 0; i < n_running; i++)
        if (b->chosen[i].parent == (uint32_t)s->choice && &b->chosen[i] != own)
            TRY(bear(e, g, s, &b->chosen[i]));
    TRY(extend_by(e, s, own));
    sequence_unlink(s, LINK_WORK);
    sequence_list_append(own->token == b->sampled[s->choice] ? &g->ready : &g->forking, LINK_WORK,
                         s);
    return OK;
}

static bool has_child(const struct beam *b, uint32_t parent, uint32_t n_running)
{
    for (uint32_t i = 0; i < n_running; i++)
        if (b->chosen[i].parent == parent) return true;
    return false;
}

static enum err advance(struct engine *e, struct job *job)
{
    struct beam *b = job->beam;
    uint32_t n_running;
    TRY(split(e, job, choose(job), &n_running));
    if (is_over(job, n_running)) {
        job_end_beams(e, job, NULL);
        return OK;
    }
    for (uint32_t i = 0; i < b->width; i++) { /* beams without a child make room first */
        struct sequence *s = job->sequences[i];
        if (!b->has_result[i] || has_child(b, i, n_running)) continue;
        admission_unseat(e, e->groups[s->group], s);
        group_forget(e->groups[s->group], s);
        s->state = SEQUENCE_PARKED;
    }
    for (uint32_t i = 0; i < b->width; i++)
        if (b->has_result[i]) TRY(branch(e, job, job->sequences[i], n_running));
    memset(b->has_result, 0, b->width * sizeof *b->has_result);
    b->n_results = 0;
    b->n_live = n_running;
    return OK;
}

void beam_learn(struct engine *e, struct group *g, struct sequence *s, const struct step_token *t,
                uint32_t n)
{
    struct job *job = s->job;
    struct beam *b = job->beam;
    (void)g;
    if (!n || s->state != SEQUENCE_RUNNING) return; /* preempted: it is computed again */
    struct candidate *tops = &b->tops[(size_t)s->choice * b->n_keep];
    uint32_t n_tops = t->n_top < b->n_keep ? t->n_top : b->n_keep;
    for (uint32_t k = 0; k < n_tops; k++)
        tops[k] = (struct candidate){.score = s->logprobs.sum + (double)t->top_logprobs[k],
                                     .parent = (uint32_t)s->choice,
                                     .parent_rank = b->ranks[s->choice],
                                     .rank = k,
                                     .token = t->top_tokens[k],
                                     .logprob = t->top_logprobs[k]};
    b->n_tops[s->choice] = n_tops;
    b->sampled[s->choice] = t->token;
    b->has_result[s->choice] = true;
    s->may_preempt = true;
    e->stats.n_generated_tokens++;
    fair_charge(s->lane, FAIR_OUTPUT_COST);
    job_first_token(e, job);
    sequence_unlink(s, LINK_WORK);
    sequence_list_append(&b->resting, LINK_WORK, s);
    if (++b->n_results < b->n_live) return;
    if (advance(e, job))
        job_end_beams(e, job,
                      &(struct ending){FINISH_ERROR, -1, ERR_NO_MEMORY, "no memory for the beams"});
}

/* In a plan: forks. */
static void wait_again(struct engine *e, struct sequence *s)
{
    sequence_unlink(s, LINK_WORK);
    s->state = SEQUENCE_WAITING;
    beam_wait(e, s);
}

/* A beam that others of its search wait for, holding blocks, goes before all. */
void beam_wait(struct engine *e, struct sequence *s)
{
    for (uint32_t i = 0; i < s->job->n_sequences; i++)
        if (s->job->sequences[i]->state == SEQUENCE_RUNNING) {
            fair_wait_urgent(&e->fair, s, e->now_us);
            return;
        }
    fair_wait(&e->fair, s, e->now_us);
}

void beam_admitted(struct engine *e, struct sequence *s)
{
    for (uint32_t i = 0; i < s->job->n_sequences; i++) {
        struct sequence *t = s->job->sequences[i];
        if (t->state != SEQUENCE_WAITING) continue;
        fair_unwait(&e->fair, t);
        fair_wait_urgent(&e->fair, t, e->now_us);
    }
}

/* Nothing moves: beams of several searches hold what the others need. The newest gives way. */
void beam_unlock(struct engine *e, struct group *g)
{
    struct sequence *newest = NULL, *oldest = NULL;
    for (struct sequence *s = g->running.first; s; s = s->links[LINK_PLACE].next) {
        if (!s->job->beam || s->lists[LINK_WORK] != &s->job->beam->resting)
            return; /* somebody moves */
        if (!newest || s->order > newest->order) newest = s;
        if (!oldest || s->order < oldest->order) oldest = s;
    }
    if (newest && newest->job != oldest->job) beam_preempt(e, g, newest->job);
}

static void add_fork(struct group *g, struct sequence *s, uint32_t from)
{
    plan_add_fork(g, &(struct plan_fork){.from = from,
                                         .to = s->slot,
                                         .n_tokens = s->tokens.n - 1,
                                         .n_computed = s->n_planned,
                                         .n_append = 1,
                                         .append = sequence_tokens(s) + s->tokens.n - 1,
                                         .n_blocks = s->blocks.n,
                                         .blocks = (const int32_t *)sequence_blocks(s)});
}

/* A child beside the first: the full blocks shared, the last one copied. */
static void fork_child(struct engine *e, struct group *g, struct sequence *s)
{
    struct sequence *parent = s->parent;
    uint32_t n_computed = parent->n_planned, block_size = g->info.block_size;
    uint32_t n_shared = n_computed / block_size, n_copied = n_computed % block_size != 0;
    sequence_unlink(s, LINK_WORK);
    bool room =
        g->n_free_slots && n_copied <= kv_blocks_available(&g->kv) && g->plan.n_copies < g->n_slots;
    if (!room || strip_reserve(&e->pool, &s->blocks, parent->blocks.capacity, sizeof(uint32_t))) {
        wait_again(e, s);
        return;
    }
    group_seat(g, s);
    for (uint32_t i = 0; i < n_shared; i++) {
        sequence_blocks(s)[i] = sequence_blocks(parent)[i];
        kv_blocks_ref(&g->kv, sequence_blocks(s)[i]);
    }
    if (n_copied) {
        sequence_blocks(s)[n_shared] = tiers_take_block(e, g);
        plan_add_copy(g, sequence_blocks(parent)[n_shared], sequence_blocks(s)[n_shared]);
    }
    s->blocks.n = n_shared + n_copied;
    s->n_planned = n_computed;
    s->n_registered = parent->n_registered < n_shared ? parent->n_registered : n_shared;
    s->may_preempt = true;
    s->lane->tenant->n_running++;
    e->stats.n_forks++;
    add_fork(g, s, parent->slot);
    sequence_list_append(&g->ready, LINK_WORK, s);
}

/* A beam whose slot went on with another token: the same blocks in a fresh slot. */
static void fork_self(struct engine *e, struct group *g, struct sequence *s)
{
    uint32_t old = s->slot;
    if (!g->n_free_slots) {
        admission_unseat_late(e, g, s); /* others fork from the slot in this very plan */
        admission_requeue(e, g, s);
        return;
    }
    sequence_unlink(s, LINK_WORK);
    group_reseat(g, s);
    add_fork(g, s, old);
    sequence_list_append(&g->ready, LINK_WORK, s);
}

void beam_fork(struct engine *e, struct group *g)
{
    for (struct sequence *s; (s = g->forking.first);) {
        if (s->state == SEQUENCE_PARKED)
            fork_child(e, g, s);
        else
            fork_self(e, g, s);
    }
}

/* All beams of the job on this group give their place up. */
void beam_preempt(struct engine *e, struct group *g, struct job *job)
{
    for (uint32_t i = 0; i < job->n_sequences; i++) {
        struct sequence *s = job->sequences[i];
        if (s->state == SEQUENCE_RUNNING && s->group == g->index)
            admission_preempt(e, g, s);
        else if (s->state == SEQUENCE_PARKED && s->lists[LINK_WORK] == &g->forking)
            wait_again(e, s);
    }
}

void beam_group_down(struct engine *e, struct group *g)
{
    for (struct sequence *s = g->forking.first, *next; s; s = next) {
        next = s->links[LINK_WORK].next;
        if (s->state == SEQUENCE_PARKED) wait_again(e, s);
    }
}
