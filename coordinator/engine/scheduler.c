/* One plan: who runs how many tokens in the next step of a group.
 *
 * Under a budget of tokens, those who decode come first and cost nothing to plan; then those who
 * rested, then drafts and beams whose results are in, then prompts in chunks, then whoever's turn
 * it is. While somebody waits who should not wait for them, the prompts under way leave some of the
 * budget, so a long one does not hold up the short ones behind it. */
#include "coordinator/engine/state.h"

enum { PREFILLS_MAX = 16, CANDIDATES_MAX = 512, OVERTAKE_RATIO = 4 };

/* Those whose last token the plans in flight sample: they rest until it comes. */
static void stop_ended(struct group *g)
{
    uint32_t next, b = (uint32_t)(g->next_step % g->end.n_buckets);
    for (uint32_t slot = g->end.heads[b]; slot != KV_NONE; slot = next) {
        struct sequence *s = g->slots[slot];
        next = g->end.next[slot];
        sequence_unlink(s, LINK_WORK); /* it may have been about to leave for drafts */
        group_part(g, s);
        ASSERT_CMP(s->n_planned + 1, ==, s->n_end);
        plan_add_pause(g, slot);
        sequence_list_append(&g->waiting_result, LINK_WORK, s);
    }
}

static void stop_leaving(struct group *g)
{
    for (struct sequence *s; (s = g->leaving.first);) {
        sequence_unlink(s, LINK_WORK);
        if (!s->decoding) continue;
        group_part(g, s);
        plan_add_pause(g, s->slot);
        sequence_list_append(s->tokens.n == s->n_planned + 1 ? &g->ready : &g->waiting_result,
                             LINK_WORK, s);
    }
}

/* Rests until there is a block for it. */
static void stall(struct group *g, struct sequence *s)
{
    group_part(g, s);
    plan_add_pause(g, s->slot);
    sequence_list_append(&g->stalled, LINK_WORK, s);
}

/* Those who decode and reach the end of their last block, unless they got the next one with their
 * last result (learn.c). */
static void extend_decoding(struct engine *e, struct group *g)
{
    uint64_t step = g->next_step;
    uint32_t n = 0, b = (uint32_t)(step % g->extend.n_buckets);
    for (uint32_t slot = g->extend.heads[b]; slot != KV_NONE; slot = g->extend.next[slot]) {
        __builtin_prefetch(&g->due[slot]);
        g->bucket[n++] = slot;
    }
    for (uint32_t i = 0; i < n; i++) {
        uint32_t slot = g->bucket[i];
        if (g->due[slot].room_step == step && !admission_extend_decoding(e, g, g->slots[slot]))
            stall(g, g->slots[slot]);
        else
            group_watch_end(g, slot, step);
    }
}

/* A run that ends with a sample; afterwards it decodes by itself, or waits for its result. */
static void run_sampling(struct group *g, struct sequence *s, struct plan_run *run)
{
    bool drafts = run->n_drafts || run->n_own;
    s->drafting.n_ahead = (uint8_t)run->n_ahead;
    g->n_step_ahead += run->n_ahead > 0;
    g->n_step_drafted += drafts;
    g->n_step_syncs += drafts || run->n_ahead;
    bool stay = !s->synced && !run->n_drafts && s->n_end > s->n_planned + 1;
    run->flags = PLAN_RUN_SAMPLE | (stay ? PLAN_RUN_STAY : 0);
    if (s->first_step == UINT64_MAX) s->first_step = g->next_step;
    s->last_step = g->next_step;
    g->n_step_samples++;
    sequence_unlink(s, LINK_WORK);
    if (stay)
        group_join(g, s);
    else
        sequence_list_append(&g->waiting_result, LINK_WORK, s);
}

/* Blocks for the drafts that come after n_tokens; how many there may be. */
static uint32_t room_ahead(struct engine *e, struct group *g, struct sequence *s, uint32_t n_tokens,
                           uint32_t n_ahead)
{
    uint64_t n = (uint64_t)n_tokens + n_ahead;
    if (!n_ahead || kv_blocks_available(&g->kv) <= g->running.n) return 0;
    return admission_extend(e, g, s, n < s->n_end ? (uint32_t)n : s->n_end) ? n_ahead : 0;
}

/* One token more, and drafts after it; false when blocks or rows are missing. */
static bool run_next(struct engine *e, struct group *g, struct sequence *s,
                     const struct draft_choice *c, const int32_t *list)
{
    uint32_t n_drafts = c->n_listed + c->n_own;
    if (!g->n_tokens_left || !g->n_rows_left ||
        !admission_extend(e, g, s, s->n_planned + 1 + n_drafts))
        return false;
    struct plan_run *run = plan_add_run(g, s->slot, 1 + c->n_listed, 0);
    run->n_drafts = c->n_listed;
    run->drafts = list;
    run->n_own = c->n_own;
    run->n_ahead = room_ahead(e, g, s, s->n_planned + 2 + n_drafts, c->n_ahead);
    s->n_drafting = n_drafts;
    s->drafting.kind = c->n_own ? DRAFT_MODEL : DRAFT_NGRAM;
    if (c->n_own) g->step_kind = DRAFT_MODEL;
    s->n_planned++;
    g->n_tokens_left -= 1 + n_drafts;
    g->n_rows_left -= 1 + n_drafts;
    g->n_step_tokens += 1 + n_drafts;
    run_sampling(g, s, run);
    return true;
}

static const struct draft_choice no_drafts;

static void resume_stalled(struct engine *e, struct group *g)
{
    for (struct sequence *s = g->stalled.first, *next; s; s = next) {
        next = s->links[LINK_WORK].next;
        if (!run_next(e, g, s, &no_drafts, NULL)) return;
    }
}

/* How many drafts fit: the budget, the sequence's end. */
static uint32_t drafts_allowed(const struct group *g, const struct sequence *s)
{
    uint32_t n = UINT32_MAX;
    uint32_t limits[] = {g->n_tokens_left ? g->n_tokens_left - 1 : 0,
                         g->n_rows_left ? g->n_rows_left - 1 : 0, s->n_end - s->tokens.n - 1,
                         g->n_drafts_max - g->n_drafts};
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++)
        if (n > limits[i]) n = limits[i];
    return n;
}

static void run_ready(struct engine *e, struct group *g)
{
    for (struct sequence *s = g->ready.first, *next; s; s = next) {
        int32_t *drafts = g->drafts + g->n_drafts;
        next = s->links[LINK_WORK].next;
        if (s->job->beam) {
            run_next(e, g, s, &no_drafts, NULL);
            continue;
        }
        struct draft_choice choice;
        draft_choose(e, g, s, drafts_allowed(g, s), drafts, &choice);
        s->synced = choice.n_listed || choice.n_own || choice.n_ahead; /* or it decodes on */
        if (s->synced && run_next(e, g, s, &choice, drafts)) {
            g->n_drafts += choice.n_listed;
            e->stats.drafts_proposed += choice.n_listed;
            continue;
        }
        s->synced = false;
        if (run_next(e, g, s, &no_drafts, NULL)) continue;
        sequence_unlink(s, LINK_WORK);
        sequence_list_append(&g->stalled, LINK_WORK, s);
    }
}

static bool scores_prompt(const struct group *g, const struct sequence *s)
{
    if (s->run_step == g->next_step && s->run_scores) return true; /* the run began in the prompt */
    return s->job->request->sampling.n_prompt_logprobs >= 0 && !s->choice &&
           s->n_planned < s->n_prompt;
}

static struct plan_run *run_of(struct group *g, struct sequence *s)
{
    if (s->run_step == g->next_step) return &g->plan.runs[s->run_index];
    s->run_step = g->next_step;
    s->run_index = g->plan.n_runs;
    return plan_add_run(g, s->slot, 0, 0);
}

/* Up to n_most known tokens more. */
static void run_chunk(struct engine *e, struct group *g, struct sequence *s, uint32_t n_most)
{
    uint32_t n_rest = s->tokens.n - s->n_planned, n = n_rest;
    bool scores = scores_prompt(g, s);
    if (n > n_most) n = n_most;
    if (n > g->n_tokens_left) n = g->n_tokens_left;
    if (scores && n > g->n_rows_left) n = g->n_rows_left;
    if (n == n_rest && !g->n_rows_left) n--;
    if (!n) return;
    struct plan_run *run = run_of(g, s);
    s->run_scores = scores;
    run->n_tokens += n;
    s->n_planned += n;
    g->n_tokens_left -= n;
    g->n_step_tokens += n;
    g->n_step_prompt += n;
    g->n_pending_tokens -= n;
    g->n_rows_left -= scores ? n : n == n_rest;
    if (n < n_rest) return;
    if (s->job->request->max_tokens) {
        run->n_ahead = room_ahead(e, g, s, s->tokens.n + 1, draft_after_prompt(e, g, s));
        s->synced |= run->n_ahead > 0;
        run_sampling(g, s, run);
        return;
    }
    s->last_step = g->next_step; /* only its prompt is scored: no sample */
    sequence_unlink(s, LINK_WORK);
    sequence_list_append(&g->waiting_result, LINK_WORK, s);
}

/* How much of the budget the prompts under way leave to the one that waits: all when it is of a
 * higher class or its tenant was served less, half when it is far shorter. */
static uint32_t tokens_kept(const struct group *g, const struct sequence *waiting)
{
    const struct sequence *s = g->prefilling.first;
    if (!waiting || !s) return 0;
    const struct lane *a = waiting->lane, *b = s->lane;
    if (a->priority != b->priority) return a->priority < b->priority ? g->n_tokens_left : 0;
    if (a->tenant != b->tenant && a->tenant->served < b->tenant->served) return g->n_tokens_left;
    bool shorter = (uint64_t)OVERTAKE_RATIO * waiting->tokens.n < s->tokens.n - s->n_planned;
    return shorter ? g->n_tokens_left / 2 : 0;
}

static void run_prefills(struct engine *e, struct group *g, bool share)
{
    struct sequence *waiting = share ? fair_next(&e->fair, e->now_us) : NULL;
    uint32_t n_kept = waiting && place_is_for(g, waiting) ? tokens_kept(g, waiting) : 0;
    for (struct sequence *s = g->prefilling.first, *next; s && g->n_tokens_left > n_kept;
         s = next) {
        next = s->links[LINK_WORK].next;
        if (s->run_step != g->next_step) admission_slide(g, s, s->n_planned);
        run_chunk(e, g, s, g->n_tokens_left - n_kept);
    }
}

/* Ends a sequence that no group can hold any more. Returns true when it did. */
static bool refuse_hopeless(struct engine *e, struct sequence *s)
{
    if (e->n_up < e->config.n_groups) return false; /* the missing one may be larger */
    for (uint32_t i = 0; i < e->n_groups; i++)
        if (e->groups[i] && e->groups[i]->up && place_can_hold(e, e->groups[i], s)) return false;
    struct ending too_long = {FINISH_ERROR, -1, ERR_TOO_LONG,
                              "the prompt is longer than any group can hold"};
    if (s->job->beam) {
        job_abort(e, s->job, -1, &too_long);
        return true;
    }
    sequence_withdraw(e, s);
    if (sequence_generated(s))
        job_end(e, s, NULL, 0, &(struct ending){FINISH_LENGTH, -1, OK, NULL});
    else
        job_end(e, s, NULL, 0, &too_long);
    return true;
}

/* Returns whether somebody is left who could have run here. */
static bool admit_waiting(struct engine *e, struct group *g)
{
    struct sequence *s;
    uint32_t n_looked_at = 0;
    g->n_moves_tried = 0;
    while (g->n_tokens_left && g->n_rows_left && g->prefilling.n < PREFILLS_MAX && !g->stalled.n &&
           n_looked_at++ < CANDIDATES_MAX && (s = fair_next(&e->fair, e->now_us))) {
        if (!place_accepts(e, g, s)) {
            if (!refuse_hopeless(e, s)) fair_skip(&e->fair, s);
            continue;
        }
        if (admission_hogs(e, g, s)) {
            fair_skip_lane(&e->fair, s);
            continue;
        }
        if (!admission_try(e, g, s)) break;
        if (s->state == SEQUENCE_RUNNING) run_chunk(e, g, s, g->n_tokens_left);
    }
    bool backlog = e->fair.n_heap > 0;
    fair_restore(&e->fair);
    return backlog;
}

static bool is_empty(const struct step_plan *p, uint32_t n_members)
{
    return !n_members && !p->n_closes && !p->n_saves && !p->n_loads && !p->n_copies &&
           !p->n_opens && !p->n_forks && !p->n_extends && !p->n_pauses && !p->n_runs &&
           !p->n_fetches && !p->n_spills;
}

static void send(struct engine *e, struct group *g, uint32_t n_members)
{
    g->plan.epoch = g->info.epoch;
    g->plan.step = g->next_step;
    buf_clear(&e->bytes);
    enum err err = plan_encode(&g->plan, &e->bytes);
    if (!err) err = e->hooks.send_plan(e->hooks.ctx, g->index, e->bytes.data, e->bytes.n);
    g->flights[g->next_step % FLIGHTS_MAX] =
        (struct flight){.step = g->next_step,
                        .n_samples = g->n_step_samples,
                        .n_tokens = g->n_step_tokens + n_members,
                        .n_prompt_tokens = g->n_step_prompt,
                        .n_syncs = g->n_step_syncs,
                        .n_drafted = g->n_step_drafted,
                        .n_ahead = g->n_step_ahead,
                        .kind = g->step_kind,
                        .was_queued = group_in_flight(g) > 0,
                        .sent_us = e->now_us};
    g->n_syncs_last = g->n_step_syncs;
    g->next_step++;
    e->stats.n_steps++;
    if (!err) return;
    g->broken = true;
    if (e->hooks.group_failed)
        e->hooks.group_failed(e->hooks.ctx, g->index, g->info.epoch, err_detail());
}

/* What the plan computes can be found and shared from the next plan on. */
static void publish(struct engine *e, struct group *g)
{
    for (uint32_t i = 0; i < g->plan.n_runs; i++) {
        struct sequence *s = g->slots[g->plan.runs[i].slot];
        if (!s || s->run_step != g->plan.step) continue;
        admission_register(e, g, s, s->n_planned);
        if (s->n_planned >= s->n_prompt) job_unpark(e, s->job);
    }
}

/* Long steps make those wait who decode in them, or come back for their next. */
static void keep_short(struct group *g, uint32_t *n_budget)
{
    uint32_t n_most = g->info.step_prompt_max;
    if (!n_most || n_most >= g->n_tokens_left || !(g->n_step_samples || g->waiting_result.n))
        return;
    *n_budget -= g->n_tokens_left - n_most;
    g->n_tokens_left = n_most;
}

static void fill(struct engine *e, struct group *g)
{
    uint32_t n_budget = g->n_budget;
    g->n_step_samples = g->n_decoding;
    g->n_tokens_left = n_budget - g->n_decoding;
    g->n_rows_left = g->n_rows_max - g->n_decoding;
    g->n_step_tokens = g->n_step_prompt = 0;
    g->n_step_syncs = g->n_step_drafted = g->n_step_ahead = 0;
    g->step_kind = DRAFT_NGRAM;
    resume_stalled(e, g);
    beam_fork(e, g);
    run_ready(e, g);
    keep_short(g, &n_budget);
    run_prefills(e, g, true);
    bool backlog = admit_waiting(e, g);
    run_prefills(e, g, false);
    if (!backlog) return;
    e->stats.step_tokens += n_budget - g->n_tokens_left;
    e->stats.step_budget += n_budget;
}

/* Whoever drafts runs again when its result is in. A plan without it would make the others wait for
 * a step that it does not share, and it for one that it is not in. */
static bool waits_for_drafts(const struct group *g)
{
    for (uint64_t step = g->acked_step + 1; step < g->next_step; step++)
        if (g->flights[step % FLIGHTS_MAX].n_syncs) return true;
    return false;
}

bool scheduler_plan(struct engine *e, struct group *g)
{
    if (!g->up || g->broken || group_in_flight(g) >= g->n_depth || waits_for_drafts(g))
        return false;
    uint32_t n_stalled = g->stalled.n;
    g->building = true;
    kv_blocks_acked(&g->kv, g->acked_step);
    group_close_late(g);
    admission_make_room(e, g); /* first: who is closed must not be named afterwards */
    stop_ended(g);
    stop_leaving(g);
    extend_decoding(e, g);
    uint32_t n_members = g->n_decoding;
    fill(e, g);
    tiers_spill(g);
    bool empty = is_empty(&g->plan, n_members);
    if (!empty) {
        send(e, g, n_members);
        publish(e, g);
    }
    plan_clear(g);
    g->building = false;
    if (!empty) return true;
    /* Nothing was sent and perhaps nothing will come: the late closes make a plan of their own, and
     * for those who came to a standstill just now somebody has to leave. */
    bool again = g->n_late_slots || g->stalled.n > n_stalled || admission_is_stuck(g);
    return again && scheduler_plan(e, g);
}
