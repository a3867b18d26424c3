/* Results: tokens to their sequences, news to whoever asked, blocks to whom they belong now.
 *
 * A result is checked whole before anything of it is believed. */
#include "coordinator/engine/state.h"

#include <string.h>

/* The entries of one slot: scored ones first, then sampled ones. */
struct slot_news {
    const struct step_token *tokens;
    uint32_t n, n_scored;
};

static struct slot_news news_at(const struct step_result *r, uint32_t first)
{
    struct slot_news news = {.tokens = r->tokens + first};
    for (; first + news.n < r->n_tokens && r->tokens[first + news.n].slot == news.tokens->slot;
         news.n++)
        news.n_scored += r->tokens[first + news.n].flags & STEP_TOKEN_SCORED;
    return news;
}

/* How many own drafts each run verified; from here on n_drafting says it. */
static enum err take_drafted(struct group *g, const struct step_result *r, struct flight *f)
{
    for (uint32_t i = 0; i < r->n_drafted; i++) {
        uint32_t slot = r->drafted[i].from, n = r->drafted[i].to;
        struct sequence *s = slot < g->n_slots ? g->slots[slot] : NULL;
        if (slot < g->n_slots && !s) continue; /* closed meanwhile */
        if (!s || s->drafting.kind != DRAFT_MODEL || n > s->n_drafting)
            FAIL(ERR_FORMAT, "group %u: slot %u verified %u drafts that no plan asked for",
                 g->index, slot, n);
        f->n_unused += s->n_drafting - n;
        s->n_drafting = n;
        draft_came(s, n);
    }
    return OK;
}

static enum err check_slot(struct group *g, const struct step_result *r,
                           const struct slot_news *news)
{
    uint32_t slot = news->tokens->slot, n_sampled = news->n - news->n_scored;
    if (slot >= g->n_slots)
        FAIL(ERR_FORMAT, "group %u step %llu: slot %u of %u", g->index, (unsigned long long)r->step,
             slot, g->n_slots);
    if (g->seen_step[slot] == r->step)
        FAIL(ERR_FORMAT, "group %u step %llu: slot %u comes twice", g->index,
             (unsigned long long)r->step, slot);
    g->seen_step[slot] = r->step;
    for (uint32_t i = 0; i < news->n; i++) {
        const struct step_token *t = &news->tokens[i];
        if (t->token < 0 || (uint32_t)t->token >= g->info.vocab_size)
            FAIL(ERR_FORMAT, "group %u: token %d of a vocabulary of %u", g->index, t->token,
                 g->info.vocab_size);
        if ((i < news->n_scored) != (t->flags == STEP_TOKEN_SCORED))
            FAIL(ERR_FORMAT, "group %u: slot %u scores a token after a sample", g->index, slot);
    }
    const struct sequence *s = g->slots[slot];
    if (!s) return OK; /* closed meanwhile */
    if (n_sampled > 1 + s->n_drafting ||
        (n_sampled && s->tokens.n > sequence_planned(s, g->next_step)))
        FAIL(ERR_FORMAT, "group %u: slot %u gives tokens that no plan asked for", g->index, slot);
    if (news->n_scored && s->n_score_next + news->n_scored > s->n_prompt)
        FAIL(ERR_FORMAT, "group %u: slot %u scores more than its prompt", g->index, slot);
    return OK;
}

enum { AHEAD_SEQUENCES = 32, AHEAD_JOBS = 16 };

/* Ten thousand sequences are more than the cache holds: ask for the next ones early. */
static inline const struct sequence *look_ahead(const struct group *g, const struct step_result *r,
                                                uint32_t i)
{
    uint32_t slot = i < r->n_tokens ? r->tokens[i].slot : UINT32_MAX;
    return slot < g->n_slots ? g->slots[slot] : NULL;
}

static inline void ask_for(const struct sequence *s)
{
    if (!s) return;
    __builtin_prefetch(s, 1);
    __builtin_prefetch((const char *)s + 64);
}

/* Nearly all news is of this kind: one sampled token. */
static inline bool is_single(const struct step_result *r, uint32_t i)
{
    return !r->tokens[i].flags &&
           (i + 1 == r->n_tokens || r->tokens[i + 1].slot != r->tokens[i].slot);
}

/* Whether such a one is beyond doubt; check_slot finds out what is wrong with the others. */
static inline bool check_single(struct group *g, const struct step_result *r, uint32_t i)
{
    const struct step_token *t = &r->tokens[i];
    if (t->slot >= g->n_slots || (uint32_t)t->token >= g->info.vocab_size ||
        g->seen_step[t->slot] == r->step)
        return false;
    const struct sequence *s = g->slots[t->slot];
    if (s && s->tokens.n > sequence_planned(s, g->next_step)) return false;
    g->seen_step[t->slot] = r->step;
    return true;
}

static enum err check_result(struct group *g, const struct step_result *r)
{
    uint32_t n_samples = 0;
    struct slot_news news;
    TRY(take_drafted(g, r, &g->flights[r->step % FLIGHTS_MAX]));
    for (uint32_t i = 0; i < r->n_tokens; i += news.n) {
        ask_for(look_ahead(g, r, i + AHEAD_SEQUENCES));
        news.n = 1;
        if (is_single(r, i) && check_single(g, r, i)) {
            n_samples++;
            continue;
        }
        news = news_at(r, i);
        TRY(check_slot(g, r, &news));
        n_samples += news.n > news.n_scored;
    }
    const struct flight *f = &g->flights[r->step % FLIGHTS_MAX];
    if (n_samples != f->n_samples)
        FAIL(ERR_FORMAT, "group %u step %llu: %u slots sampled, the plan asked %u", g->index,
             (unsigned long long)r->step, n_samples, f->n_samples);
    return OK;
}

static enum err keep_score(struct engine *e, struct sequence *s, const struct step_token *t)
{
    TRY(strip_reserve(&e->pool, &s->logprobs.chosen, s->logprobs.chosen.n + 1, sizeof(float)));
    ((float *)s->logprobs.chosen.items)[s->logprobs.chosen.n++] = t->logprob;
    s->logprobs.sum += t->logprob;
    if (s->job->request->sampling.n_logprobs <= 0) return OK;
    TRY(strip_reserve(&e->pool, &s->logprobs.top_counts, s->logprobs.top_counts.n + 1,
                      sizeof(uint32_t)));
    TRY(strip_reserve(&e->pool, &s->logprobs.top_tokens, s->logprobs.top_tokens.n + t->n_top,
                      sizeof(int32_t)));
    TRY(strip_reserve(&e->pool, &s->logprobs.top_scores, s->logprobs.top_scores.n + t->n_top,
                      sizeof(float)));
    ((uint32_t *)s->logprobs.top_counts.items)[s->logprobs.top_counts.n++] = t->n_top;
    if (!t->n_top) return OK;
    memcpy((int32_t *)s->logprobs.top_tokens.items + s->logprobs.top_tokens.n, t->top_tokens,
           t->n_top * sizeof(int32_t));
    memcpy((float *)s->logprobs.top_scores.items + s->logprobs.top_scores.n, t->top_logprobs,
           t->n_top * sizeof(float));
    s->logprobs.top_tokens.n += t->n_top, s->logprobs.top_scores.n += t->n_top;
    return OK;
}

/* Appends one token; says in out_end whether the choice ends with it. */
static inline bool take_token(struct engine *e, struct sequence *s, const struct step_token *t,
                              struct ending *out_end)
{
    if (sequence_append(&e->pool, s, t->token) || (s->job->buffered && keep_score(e, s, t))) {
        *out_end = (struct ending){FINISH_ERROR, -1, ERR_NO_MEMORY, "no memory for the next token"};
        return true;
    }
    e->stats.n_generated_tokens++;
    if (sequence_stops_at(s, t->token)) {
        *out_end = (struct ending){FINISH_STOP, t->token, OK, NULL};
        return true;
    }
    if (s->tokens.n < s->n_end) return false;
    *out_end = (struct ending){FINISH_LENGTH, -1, OK, NULL};
    return true;
}

static void end_with(struct engine *e, struct group *g, struct sequence *s,
                     const struct slot_news *news, const struct ending *end)
{
    uint32_t n_computed = s->tokens.n - 1;
    if (s->state == SEQUENCE_RUNNING) {
        admission_register(e, g, s, n_computed < s->n_end ? n_computed : s->n_end);
        admission_unseat(e, g, s);
        group_forget(g, s);
    } else
        sequence_withdraw(e, s);
    job_end(e, s, news->tokens, news->n, end);
}

/* Where a sequence goes whose tokens came: on decoding, to its drafts, or nowhere yet. */
static inline void carry_on(struct engine *e, struct group *g, struct sequence *s)
{
    if (s->state != SEQUENCE_RUNNING) return;
    uint32_t n_computed = s->tokens.n - 1;
    if (n_computed >= s->n_full_next) {
        s->n_full_next = n_computed - n_computed % g->info.block_size + g->info.block_size;
        g->bucket[g->n_full++] = s->slot;
    }
    if (s->decoding) {
        /* Its memory is at hand now; when the plan is built it would not be. */
        if (g->due[s->slot].room_step == g->next_step) admission_extend_decoding(e, g, s);
        if (e->config.n_speculative_tokens && draft_wanted(e, g, s) && !s->lists[LINK_WORK]) {
            s->synced = true;
            sequence_list_append(&g->leaving, LINK_WORK, s);
        }
    } else if (s->lists[LINK_WORK] == &g->waiting_result && s->tokens.n == s->n_planned + 1) {
        sequence_unlink(s, LINK_WORK);
        sequence_list_append(&g->ready, LINK_WORK, s);
    }
}

static void learn_samples(struct engine *e, struct group *g, struct sequence *s,
                          struct slot_news *news)
{
    struct ending end;
    bool ended = false;
    uint32_t i = news->n_scored, n_drafted = s->n_drafting;
    if (!s->job->started) job_first_token(e, s->job);
    s->may_preempt = true;
    while (i < news->n && !ended)
        ended = take_token(e, s, &news->tokens[i++], &end);
    fair_charge(s->lane, (uint64_t)FAIR_OUTPUT_COST * (i - news->n_scored));
    if (n_drafted) {
        draft_learn(e, g, s, n_drafted, news->n - news->n_scored - 1);
        s->n_drafting = 0;
        s->n_planned = s->tokens.n - 1;
    }
    if (s->drafting.n_ahead) s->drafting.n_seen = s->tokens.n; /* it is about to be shown them */
    news->n = i; /* what came after a stop is not for the client */
    if (ended) {
        end_with(e, g, s, news, &end);
        return;
    }
    job_emit(e, s, news->tokens, news->n);
    carry_on(e, g, s);
}

static void learn_slot(struct engine *e, struct group *g, struct slot_news *news)
{
    struct sequence *s = g->slots[news->tokens->slot];
    if (!s) return;
    /* Scores that were given before the prompt had to be computed again are not given twice. */
    uint32_t n_old = 0;
    for (uint32_t i = 0; i < news->n_scored; i++)
        n_old += s->n_score_next + i < s->n_scored;
    s->n_score_next += news->n_scored;
    if (s->n_score_next > s->n_scored) s->n_scored = s->n_score_next;
    news->tokens += n_old;
    news->n -= n_old;
    news->n_scored -= n_old;
    if (s->job->buffered && news->n_scored) /* the prompt's scores do not wait for the best one */
        job_emit_choice(e, s, 0, news->tokens, news->n_scored, NULL, false);
    if (s->job->buffered && s->job->beam)
        beam_learn(e, g, s, &news->tokens[news->n_scored], news->n - news->n_scored);
    else if (news->n > news->n_scored)
        learn_samples(e, g, s, news);
    else
        job_emit(e, s, news->tokens, news->n);
}

/* Those whose last step was answered: prompts that were only scored, and those preempted. */
static void settle(struct engine *e, struct group *g)
{
    for (struct sequence *s = g->waiting_result.first, *next; s; s = next) {
        next = s->links[LINK_WORK].next;
        if (s->job->request->max_tokens || s->last_step > g->acked_step) continue;
        sequence_withdraw(e, s);
        job_end(e, s, NULL, 0, &(struct ending){FINISH_LENGTH, -1, OK, NULL});
    }
    for (struct sequence *s = g->draining.first, *next; s; s = next) {
        next = s->links[LINK_WORK].next;
        if (s->last_step <= g->acked_step) admission_requeue(e, g, s);
    }
}

enum { COST_TOKENS_MIN = 32 };

static void learn_cost(struct engine *e, struct group *g, const struct step_result *r)
{
    const struct flight *f = &g->flights[r->step % FLIGHTS_MAX];
    draft_cost_learn(g, f, r);
    if (f->n_prompt_tokens < COST_TOKENS_MIN || !r->compute_us) return;
    uint64_t ns = (uint64_t)r->compute_us * 1000 / f->n_tokens;
    if (ns > UINT32_MAX / 8) ns = UINT32_MAX / 8;
    g->token_ns = g->token_ns ? (uint32_t)((7 * (uint64_t)g->token_ns + ns) / 8) : (uint32_t)ns;
    e->limits.token_ns = g->token_ns / (e->n_up ? e->n_up : 1);
}

static enum err check_turn(struct group *g, const struct step_result *r)
{
    if (r->step != g->acked_step + 1 || r->step >= g->next_step)
        FAIL(ERR_FORMAT, "group %u: result of step %llu where %llu of %llu was due", g->index,
             (unsigned long long)r->step, (unsigned long long)g->acked_step + 1,
             (unsigned long long)g->next_step - 1);
    return check_result(g, r);
}

enum { AHEAD_FULL = 16 };

static inline void ask_for_keys(const struct sequence *s)
{
    __builtin_prefetch(s);
    __builtin_prefetch(&s->blocks);
    __builtin_prefetch(&s->keys, 1);
}

/* Those whose last block became full: it can be found from now on, and a window slides. Looked at
 * together, so that one's memory comes while another is worked on. */
static void learn_full(struct engine *e, struct group *g)
{
    for (uint32_t i = 0; i < g->n_full + AHEAD_FULL; i++) {
        const struct sequence *next = i < g->n_full ? g->slots[g->bucket[i]] : NULL;
        if (next) ask_for_keys(next);
        struct sequence *s = i >= AHEAD_FULL ? g->slots[g->bucket[i - AHEAD_FULL]] : NULL;
        if (s && s->state == SEQUENCE_RUNNING) admission_prefetch_register(e, g, s);
    }
    for (uint32_t i = 0; i < g->n_full; i++) {
        struct sequence *s = g->slots[g->bucket[i]];
        if (!s || s->state != SEQUENCE_RUNNING) continue; /* it ended with a sibling */
        admission_register(e, g, s, s->tokens.n - 1);
        admission_slide(g, s, s->tokens.n - 1);
    }
    g->n_full = 0;
}

/* What its next token needs beside its own lines: little, except near the end of a block. */
static inline void ask_for_rest(const struct group *g, const struct sequence *s)
{
    if (!s) return;
    __builtin_prefetch(s->job);
    __builtin_prefetch(&s->tail[s->tokens.n % TAIL_TOKENS], 1);
    if (s->tokens.n % TAIL_TOKENS == 0)
        __builtin_prefetch((int32_t *)s->tokens.items + s->tokens.n - TAIL_TOKENS, 1);
    if (s->tokens.n >= s->n_full_next) {
        __builtin_prefetch(sequence_blocks(s) + s->n_registered);
    }
    if (g->due[s->slot].room_step == g->next_step)
        __builtin_prefetch(sequence_blocks(s) + s->blocks.n, 1);
}

/* One token of one that has had some before and is not watched by drafts, beams or best_of. */
static inline void learn_single(struct engine *e, struct group *g, struct sequence *s,
                                const struct step_token *t)
{
    struct ending end;
    bool ended = take_token(e, s, t, &end);
    fair_charge(s->lane, FAIR_OUTPUT_COST);
    if (ended) {
        end_with(e, g, s, &(struct slot_news){t, 1, 0}, &end);
        return;
    }
    job_emit_choice(e, s, s->choice, t, 1, NULL, false);
    carry_on(e, g, s);
}

static void learn_tokens(struct engine *e, struct group *g, const struct step_result *r)
{
    struct slot_news news;
    for (uint32_t i = 0, n; i < r->n_tokens; i += n) {
        ask_for(look_ahead(g, r, i + AHEAD_SEQUENCES));
        ask_for_rest(g, look_ahead(g, r, i + AHEAD_JOBS));
        struct sequence *s = g->slots[r->tokens[i].slot];
        n = 1;
        if (is_single(r, i) && s && s->may_preempt && s->state == SEQUENCE_RUNNING &&
            !s->job->buffered && !s->n_drafting) {
            learn_single(e, g, s, &r->tokens[i]);
            continue;
        }
        news = news_at(r, i);
        n = news.n;
        learn_slot(e, g, &news);
    }
    learn_full(e, g);
}

enum err engine_result(struct engine *e, uint32_t group, const struct step_result *r,
                       int64_t now_us)
{
    struct group *g = group < e->n_groups ? e->groups[group] : NULL;
    e->now_us = now_us;
    if (!g || !g->up || g->broken || r->epoch != g->info.epoch || r->step <= g->acked_step)
        return OK; /* late */
    enum err err = check_turn(g, r);
    if (err) {
        g->broken = true; /* it gets no plan any more; the caller drops it */
        return err;
    }
    learn_cost(e, g, r);
    learn_tokens(e, g, r);
    group_acked(g, r->step);
    settle(e, g);
    job_flush(e);
    return OK;
}
