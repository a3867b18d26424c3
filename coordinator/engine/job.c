/* Requests inside the engine: their choices, their news, their end.
 *
 * A request ends exactly once, with the emission that says `last`; its memory goes after the sinks
 * were flushed, so a sink may live in it. */
#include "base/mem.h"
#include "coordinator/engine/state.h"

#include <string.h>

/* The map. */
static uint32_t home_of(const struct job_map *m, uint64_t id)
{
    return (uint32_t)hash_u64(id) & m->mask;
}

struct job *job_find(const struct engine *e, uint64_t id)
{
    const struct job_map *m = &e->jobs;
    if (!m->slots) return NULL;
    for (uint32_t i = home_of(m, id); m->slots[i]; i = (i + 1) & m->mask)
        if (m->slots[i]->request_id == id) return m->slots[i];
    return NULL;
}

static void map_put(struct job_map *m, struct job *job)
{
    uint32_t i = home_of(m, job->request_id);
    while (m->slots[i])
        i = (i + 1) & m->mask;
    m->slots[i] = job;
    m->n++;
}

static enum err map_reserve(struct job_map *m)
{
    struct job_map wider = {.mask = m->slots ? 2 * m->mask + 1 : 255};
    if (m->slots && 2 * (m->n + 1) <= m->mask) return OK;
    TRY(MEM_NEW_ARRAY((size_t)wider.mask + 1, &wider.slots));
    for (uint32_t i = 0; m->slots && i <= m->mask; i++)
        if (m->slots[i]) map_put(&wider, m->slots[i]);
    mem_free(m->slots);
    *m = wider;
    return OK;
}

static void map_remove(struct job_map *m, const struct job *job)
{
    uint32_t i = home_of(m, job->request_id);
    while (m->slots[i] != job)
        i = (i + 1) & m->mask;
    for (uint32_t k = (i + 1) & m->mask; m->slots[k]; k = (k + 1) & m->mask) {
        uint32_t home = home_of(m, m->slots[k]->request_id);
        if (((k - home) & m->mask) < ((k - i) & m->mask)) continue;
        m->slots[i] = m->slots[k];
        i = k;
    }
    m->slots[i] = NULL;
    m->n--;
}

/* Creation. */
static enum err sequence_create(struct engine *e, struct job *job, uint32_t choice)
{
    const struct request *r = job->request;
    struct sequence *s;
    TRY(slabs_take(&e->sequences, (void **)&s));
    *s = (struct sequence){.job = job,
                           .choice = (int32_t)choice,
                           .state = SEQUENCE_PARKED,
                           .n_prompt = r->n_tokens,
                           .n_end = r->n_tokens + r->max_tokens,
                           .order = e->order + choice,
                           .stop_token = -1,
                           .n_scored = 1,
                           .synced = job->beam != NULL};
    job->sequences[choice] = s;
    TRY(fair_enter(&e->fair, r->tenant, r->tenant_weight, r->priority, &s->lane));
    return OK;
}

static void sequence_destroy(struct engine *e, struct sequence *s)
{
    if (s->lane) fair_leave(&e->fair, s->lane);
    sequence_fini(&e->pool, s);
    slabs_give(&e->sequences, s);
}

enum { ROOM_TOKENS = 4096 }; /* of output; admission reserves the rest */

static enum err fill_tokens(struct engine *e, struct sequence *s)
{
    const struct request *r = s->job->request;
    uint32_t n_room = r->max_tokens < ROOM_TOKENS ? r->max_tokens : ROOM_TOKENS;
    return sequence_set_tokens(&e->pool, s, r->tokens, r->n_tokens, n_room + 1);
}

static enum err job_fill(struct engine *e, struct job *job)
{
    const struct request *r = job->request;
    job->sequences = &job->only;
    if (job->n_sequences > 1) {
        job->sequences = NULL;
        TRY(MEM_NEW_ARRAY(job->n_sequences, &job->sequences));
    }
    if (r->beam_width) TRY(beam_create(e, job));
    for (uint32_t i = 0; i < job->n_sequences; i++)
        TRY(sequence_create(e, job, i));
    TRY(fill_tokens(e, job->sequences[0]));
    if (e->n_deadlines == e->deadlines_capacity) {
        uint32_t capacity = e->deadlines_capacity ? 2 * e->deadlines_capacity : 64;
        TRY(mem_resize((void **)&e->deadlines, capacity * sizeof *e->deadlines));
        e->deadlines_capacity = capacity;
    }
    return map_reserve(&e->jobs);
}

/* The job without its request: for one that never became known. */
static void job_free(struct engine *e, struct job *job)
{
    for (uint32_t i = 0; job->sequences && i < job->n_sequences; i++)
        if (job->sequences[i]) sequence_destroy(e, job->sequences[i]);
    if (job->sequences != &job->only) mem_free(job->sequences);
    beam_destroy(e, job->beam);
    slabs_give(&e->job_slabs, job);
}

enum err job_create(struct engine *e, struct request *r, struct job **out)
{
    struct job *job;
    TRY(slabs_take(&e->job_slabs, (void **)&job));
    *job = (struct job){
        .request = r, .request_id = r->id, .sink = r->sink, .n_stop_ids = r->sampling.n_stop_ids};
    for (int32_t i = 0; i < job->n_stop_ids && i < JOB_STOPS_NEAR; i++)
        job->stop_ids[i] = r->sampling.stop_ids[i];
    job->n_min_tokens = r->sampling.min_tokens > 0 ? (uint32_t)r->sampling.min_tokens : 0;
    uint32_t n_run = r->n_best_of > r->n_choices ? r->n_best_of : r->n_choices;
    job->n_sequences = r->beam_width ? r->beam_width : n_run;
    job->n_left = job->n_sequences;
    job->n_to_emit = r->n_choices;
    job->buffered = r->beam_width || job->n_sequences > r->n_choices;
    job->no_match =
        r->sampling.n_prompt_logprobs >= 0 || r->no_prefix_cache || !e->config.prefix_cache;
    job->private_blocks = r->no_prefix_cache;
    enum err err = job_fill(e, job);
    if (err) {
        job_free(e, job);
        return err;
    }
    e->order += job->n_sequences;
    map_put(&e->jobs, job);
    if (r->deadline_us) {
        e->deadlines[e->n_deadlines++] = job;
        job->deadline_index = e->n_deadlines;
        if (r->deadline_us < e->next_deadline_us) e->next_deadline_us = r->deadline_us;
    }
    *out = job;
    return OK;
}

static void drop_deadline(struct engine *e, struct job *job)
{
    if (!job->deadline_index) return;
    struct job *last = e->deadlines[--e->n_deadlines];
    e->deadlines[job->deadline_index - 1] = last;
    last->deadline_index = job->deadline_index;
    job->deadline_index = 0;
}

void job_destroy(struct engine *e, struct job *job)
{
    struct request *r = job->request;
    job_free(e, job);
    if (r->destroy) r->destroy(r);
}

void job_unpark(struct engine *e, struct job *job)
{
    if (job->beam) return; /* beams are born, not unparked */
    for (uint32_t i = 0; i < job->n_sequences; i++) {
        struct sequence *s = job->sequences[i];
        if (!s || s->state != SEQUENCE_PARKED) continue;
        if (fill_tokens(e, s)) {
            job_end(e, s, NULL, 0, &(struct ending){FINISH_ERROR, -1, ERR_NO_MEMORY, err_detail()});
            if (job->done) return;
            continue;
        }
        s->state = SEQUENCE_WAITING;
        fair_wait(&e->fair, s, e->now_us);
    }
}

enum { SINKS_LOOKED_AT = 8 }; /* a sink flushed twice costs little */

/* News. */
static void touch_sink(struct engine *e, struct sink *sink)
{
    for (uint32_t i = e->n_sinks; i > 0 && i + SINKS_LOOKED_AT > e->n_sinks; i--)
        if (e->sinks[i - 1] == sink) return;
    if (e->n_sinks == e->sinks_capacity) {
        uint32_t capacity = e->sinks_capacity ? 2 * e->sinks_capacity : 64;
        if (mem_resize((void **)&e->sinks, capacity * sizeof *e->sinks)) {
            if (sink->flush) sink->flush(sink); /* at once, since it cannot be remembered */
            return;
        }
        e->sinks_capacity = capacity;
    }
    e->sinks[e->n_sinks++] = sink;
}

void job_first_token(struct engine *e, struct job *job)
{
    if (job->started) return;
    job->started = true;
    job->prefill_us = e->now_us - job->queued_us - job->request->arrival_us;
    drop_deadline(e, job);
}

void job_emit_choice(struct engine *e, struct sequence *s, int32_t choice,
                     const struct step_token *tokens, uint32_t n, const struct ending *end,
                     bool last)
{
    struct job *job = s->job;
    struct emission news = {.request_id = job->request_id,
                            .choice = choice,
                            .n_tokens = n,
                            .tokens = tokens,
                            .finish = end ? end->finish : FINISH_NONE,
                            .last = last,
                            .stop_token = end ? end->stop_token : -1,
                            .error = end ? end->error : OK,
                            .error_text = end ? end->text : NULL,
                            .n_prompt = s->n_prompt,
                            .n_cached = s->n_cached,
                            .n_generated = s->tokens.n > s->n_prompt ? sequence_generated(s) : 0,
                            .queued_us = job->queued_us,
                            .prefill_us = job->prefill_us};
    job->sink->emit(job->sink, &news);
    touch_sink(e, job->sink);
}

void job_emit(struct engine *e, struct sequence *s, const struct step_token *tokens, uint32_t n)
{
    if (n && !s->job->buffered) job_emit_choice(e, s, s->choice, tokens, n, NULL, false);
}

/* The job leaves the map now; the memory goes with the flush. */
void job_done(struct engine *e, struct job *job)
{
    job->done = true;
    drop_deadline(e, job);
    map_remove(&e->jobs, job);
    job->next_done = e->done;
    e->done = job;
}

enum err job_room(struct engine *e, uint32_t n)
{
    if (n <= e->emit_capacity) return OK;
    TRY(mem_resize((void **)&e->emit_tokens, n * sizeof *e->emit_tokens));
    e->emit_capacity = n;
    return OK;
}

/* The stored tokens of a buffered choice as an array of step tokens. */
static enum err gather(struct engine *e, struct sequence *s, uint32_t *out_n)
{
    uint32_t n = s->tokens.n > s->n_prompt ? sequence_generated(s) : 0, top = 0;
    const int32_t *tokens = sequence_tokens(s) + s->n_prompt;
    TRY(job_room(e, n));
    for (uint32_t i = 0; i < n; i++) {
        uint32_t n_top =
            i < s->logprobs.top_counts.n ? ((uint32_t *)s->logprobs.top_counts.items)[i] : 0;
        e->emit_tokens[i] = (struct step_token){
            .token = tokens[i],
            .has_logprob = i < s->logprobs.chosen.n,
            .logprob = i < s->logprobs.chosen.n ? ((float *)s->logprobs.chosen.items)[i] : 0,
            .n_top = n_top,
            .top_tokens = n_top ? (int32_t *)s->logprobs.top_tokens.items + top : NULL,
            .top_logprobs = n_top ? (float *)s->logprobs.top_scores.items + top : NULL};
        top += n_top;
    }
    *out_n = n;
    return OK;
}

static void emit_buffered(struct engine *e, struct sequence *s, int32_t choice, bool last)
{
    uint32_t n = 0;
    struct ending end = {s->finish, s->stop_token, s->finish == FINISH_ERROR ? s->error : OK,
                         s->error_text};
    if (gather(e, s, &n))
        end = (struct ending){FINISH_ERROR, -1, ERR_NO_MEMORY, "no memory for the choice"};
    job_emit_choice(e, s, choice, e->emit_tokens, n, &end, last);
}

/* Whether a is better than b: whole ones before broken ones, then by cumulative logprob. */
static bool better(const struct sequence *a, const struct sequence *b)
{
    bool whole_a = a->finish <= FINISH_LENGTH, whole_b = b->finish <= FINISH_LENGTH;
    if (whole_a != whole_b) return whole_a;
    if (a->logprobs.sum != b->logprobs.sum) return a->logprobs.sum > b->logprobs.sum;
    return a->choice < b->choice;
}

static void emit_best(struct engine *e, struct job *job)
{
    for (uint32_t k = 0; k < job->n_to_emit; k++) {
        struct sequence *best = NULL;
        for (uint32_t i = 0; i < job->n_sequences; i++) {
            struct sequence *s = job->sequences[i];
            if (s && !s->given && (!best || better(s, best))) best = s;
        }
        best->given = true;
        emit_buffered(e, best, (int32_t)k, k + 1 == job->n_to_emit);
    }
}

/* Choices that waited for the prompt of one that ended without computing it. */
static void unpark_orphans(struct engine *e, struct job *job)
{
    for (uint32_t i = 0; i < job->n_sequences; i++) {
        const struct sequence *s = job->sequences[i];
        if (s && s->state != SEQUENCE_PARKED && s->state != SEQUENCE_DONE) return;
    }
    job_unpark(e, job);
}

void job_end(struct engine *e, struct sequence *s, const struct step_token *tokens, uint32_t n,
             const struct ending *end)
{
    struct job *job = s->job;
    ASSERT(s->state != SEQUENCE_DONE && job->n_left);
    s->finish = end->finish;
    s->stop_token = end->stop_token;
    s->error = end->error;
    s->error_text = end->text;
    s->state = SEQUENCE_DONE;
    job->n_left--;
    admission_uncount(e, s);
    if (!job->buffered) {
        e->stats.n_finished[end->finish]++;
        job_emit_choice(e, s, s->choice, tokens, n, end, !job->n_left);
        job->sequences[s->choice] = NULL;
        sequence_destroy(e, s);
    } else if (!job->n_left && !job->beam) {
        e->stats.n_finished[end->finish]++;
        emit_best(e, job);
    }
    if (!job->n_left)
        job_done(e, job);
    else
        unpark_orphans(e, job);
}

void job_flush(struct engine *e)
{
    for (uint32_t i = 0; i < e->n_sinks; i++)
        if (e->sinks[i]->flush) e->sinks[i]->flush(e->sinks[i]);
    e->n_sinks = 0;
    while (e->done) {
        struct job *job = e->done;
        e->done = job->next_done;
        job_destroy(e, job);
    }
}

void sequence_withdraw(struct engine *e, struct sequence *s)
{
    if (s->state == SEQUENCE_WAITING) {
        fair_unwait(&e->fair, s);
        place_forget(e, s);
        admission_drop_host(e, s);
    } else if (s->state == SEQUENCE_RUNNING) {
        admission_unseat(e, e->groups[s->group], s);
        group_forget(e->groups[s->group], s);
    } else if (s->state == SEQUENCE_PARKED || s->state == SEQUENCE_FETCHING) {
        sequence_unlink(s, LINK_WORK); /* a beam on its way to a slot, or its blocks on theirs */
        place_forget(e, s);
    } else if (s->state == SEQUENCE_DRAINING) {
        sequence_unlink(s, LINK_WORK);
        group_forget(e->groups[s->group], s);
        admission_drop_host(e, s);
    }
}

/* Ends one choice, or all (-1), wherever they are. */
void job_abort(struct engine *e, struct job *job, int32_t choice, const struct ending *end)
{
    if (job->buffered && choice >= 0) return; /* which one it will be is not known before the end */
    if (job->beam) {
        job_end_beams(e, job, end);
        return;
    }
    for (uint32_t i = 0; i < job->n_sequences; i++) {
        struct sequence *s = job->sequences[i];
        if (!s || s->state == SEQUENCE_DONE || (choice >= 0 && (uint32_t)choice != i)) continue;
        sequence_withdraw(e, s);
        job_end(e, s, NULL, 0, end);
        if (job->done) return;
    }
}
