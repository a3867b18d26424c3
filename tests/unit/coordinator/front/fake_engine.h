/* A stand-in for the engine's thread: takes requests as the real one does, and answers them with
 * tokens that a test chooses. One token of every choice a step, then one flush of every sink that
 * heard something. */
#pragma once
#include "base/clock.h"
#include "base/mem.h"
#include "coordinator/engine/engine_loop.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>

enum { FAKE_REQUESTS_MAX = 512, FAKE_CHOICES_MAX = 128, FAKE_EOS = 256 };

struct fake_request {
    struct request *r;
    uint32_t n_given[FAKE_CHOICES_MAX];
    bool ended[FAKE_CHOICES_MAX], stop[FAKE_CHOICES_MAX], cancelled;
    uint32_t n_ended;
    bool scored;
};

struct engine_loop {
    pthread_mutex_t mutex;
    pthread_t thread;
    bool stopping;
    struct fake_request requests[FAKE_REQUESTS_MAX];
    uint32_t n;
    /* what the test sets */
    const char *reply;     /* bytes of it are the tokens; then EOS */
    bool endless;          /* the reply begins anew instead of EOS */
    int tokens_a_step;
    atomic_int step_us;
    enum err refuse, fail; /* of submit; of the first token */
    bool hold;             /* no tokens: as a long prefill */
    atomic_int groups_up;
    /* what it saw */
    int n_submitted, n_cancels, n_stops, n_alive;
    struct sampling_params last_sampling;
    int32_t last_tokens[4096];
    uint32_t last_n_tokens, last_max_tokens, last_n_choices, last_best_of, last_beam_width;
    uint64_t last_salt, last_tenant, n_emitted;
    int32_t last_stop_ids[64], last_bias_tokens[64];
    float last_bias_values[64];
    int64_t last_deadline_us;
    bool last_no_prefix_cache;
};
static struct engine_loop fake;

static int32_t fake_token(const struct fake_request *q, uint32_t i, bool *out_eos)
{
    size_t n = strlen(fake.reply);
    *out_eos = !fake.endless && i >= n;
    bool wanted = false;
    for (int k = 0; k < q->r->sampling.n_stop_ids; k++)
        wanted |= q->r->sampling.stop_ids[k] == FAKE_EOS;
    if (*out_eos && wanted) return FAKE_EOS;
    if (*out_eos) *out_eos = false, i %= n ? (uint32_t)n : 1;
    return n ? (unsigned char)fake.reply[i % n] : 'x';
}

static struct step_token fake_step_token(int32_t id, int n_logprobs, int32_t *tops, float *values)
{
    struct step_token t = {.token = id, .has_logprob = n_logprobs >= 0};
    t.logprob = -0.125f * (float)(1 + id % 8);
    t.n_top = n_logprobs > 0 ? (uint32_t)n_logprobs : 0;
    t.top_tokens = tops;
    t.top_logprobs = values;
    for (int i = 0; i < n_logprobs; i++) {
        tops[i] = i ? (id + i) % 256 : id;
        values[i] = t.logprob - 0.5f * (float)i;
    }
    return t;
}

static void fake_score(struct fake_request *q)
{
    int32_t tops[32];
    float values[32];
    q->scored = true;
    for (uint32_t i = 1; i < q->r->n_tokens; i++) {
        struct step_token t = fake_step_token(q->r->tokens[i], q->r->sampling.n_prompt_logprobs,
                                              tops, values);
        t.flags = STEP_TOKEN_SCORED;
        struct emission e = {.request_id = q->r->id, .n_tokens = 1, .tokens = &t, .stop_token = -1,
                             .n_prompt = q->r->n_tokens};
        q->r->sink->emit(q->r->sink, &e);
    }
}

static void fake_end(struct fake_request *q, struct emission *e, enum finish finish)
{
    q->ended[e->choice] = true;
    q->n_ended++;
    e->finish = finish;
    e->last = q->n_ended == q->r->n_choices;
}

/* One step of one choice. */
static void fake_choice(struct fake_request *q, uint32_t choice)
{
    int32_t tops[8][32];
    float values[8][32];
    struct step_token tokens[8];
    struct emission e = {.request_id = q->r->id, .choice = (int32_t)choice, .stop_token = -1,
                         .n_prompt = q->r->n_tokens, .n_cached = q->r->n_tokens / 2,
                         .queued_us = 10, .prefill_us = 20, .tokens = tokens};
    if (q->cancelled) fake_end(q, &e, FINISH_CANCELLED);
    else if (q->stop[choice]) fake_end(q, &e, FINISH_STOP);
    else if (fake.fail) {
        e.error = fake.fail;
        e.error_text = "the fake engine was told to fail";
        fake_end(q, &e, FINISH_ERROR);
    }
    for (int i = 0; !e.finish && i < fake.tokens_a_step; i++) {
        bool eos = false;
        if (q->r->max_tokens == 0) {
            fake_end(q, &e, FINISH_LENGTH);
            break;
        }
        int32_t id = fake_token(q, q->n_given[choice]++, &eos);
        tokens[e.n_tokens] = fake_step_token(id, q->r->sampling.n_logprobs, tops[i], values[i]);
        e.n_tokens++;
        bool stop = eos;
        for (int k = 0; k < q->r->sampling.n_stop_ids; k++) stop |= id == q->r->sampling.stop_ids[k];
        if (stop) {
            e.stop_token = id;
            fake_end(q, &e, FINISH_STOP);
        } else if (q->n_given[choice] >= q->r->max_tokens) fake_end(q, &e, FINISH_LENGTH);
    }
    e.n_generated = q->n_given[choice];
    fake.n_emitted += e.n_tokens;
    q->r->sink->emit(q->r->sink, &e);
}

static void fake_step(void)
{
    struct sink *sinks[FAKE_REQUESTS_MAX];
    uint32_t n_sinks = 0;
    for (uint32_t i = 0; i < fake.n; i++) {
        struct fake_request *q = &fake.requests[i];
        bool stopping = false;
        for (uint32_t c = 0; c < q->r->n_choices; c++) stopping |= q->stop[c];
        if (fake.hold && !q->cancelled && !stopping) continue;
        if (q->r->sampling.n_prompt_logprobs >= 0 && !q->scored) fake_score(q);
        for (uint32_t c = 0; c < q->r->n_choices; c++)
            if (!q->ended[c]) fake_choice(q, c);
        bool there = false;
        for (uint32_t k = 0; k < n_sinks; k++) there |= sinks[k] == q->r->sink;
        if (!there) sinks[n_sinks++] = q->r->sink;
    }
    for (uint32_t k = 0; k < n_sinks; k++) {
        sinks[k]->flush(sinks[k]);
        if (k % 2) sinks[k]->flush(sinks[k]); /* the real one may do so too */
    }
    for (uint32_t i = 0; i < fake.n;) {
        struct fake_request *q = &fake.requests[i];
        if (q->n_ended < q->r->n_choices) {
            i++;
            continue;
        }
        q->r->destroy(q->r);
        *q = fake.requests[--fake.n];
    }
    fake.n_alive = (int)fake.n;
}

static void *fake_run(void *ctx)
{
    (void)ctx;
    for (;;) {
        pthread_mutex_lock(&fake.mutex);
        bool stop = fake.stopping;
        if (stop)
            for (uint32_t i = 0; i < fake.n; i++) fake.requests[i].cancelled = true;
        fake_step();
        pthread_mutex_unlock(&fake.mutex);
        if (stop) return NULL;
        clock_sleep_us(atomic_load(&fake.step_us));
    }
}

__attribute__((unused)) static void fake_pace(int step_us) { atomic_store(&fake.step_us, step_us); }

static void fake_reset(const char *reply)
{
    pthread_mutex_lock(&fake.mutex);
    fake.reply = reply;
    fake.endless = fake.hold = false;
    fake.tokens_a_step = 1;
    fake.refuse = fake.fail = OK;
    fake.n_submitted = fake.n_cancels = fake.n_stops = 0;
    atomic_store(&fake.groups_up, 1);
    pthread_mutex_unlock(&fake.mutex);
}

static void fake_start(void)
{
    pthread_mutex_init(&fake.mutex, NULL);
    fake.reply = "x";
    fake.tokens_a_step = 1;
    atomic_store(&fake.step_us, 300);
    fake.stopping = false;
    atomic_store(&fake.groups_up, 1);
    pthread_create(&fake.thread, NULL, fake_run, NULL);
}

static void fake_finish(void)
{
    pthread_mutex_lock(&fake.mutex);
    fake.stopping = true;
    pthread_mutex_unlock(&fake.mutex);
    pthread_join(fake.thread, NULL);
}

/* --- the functions that the front calls --- */

enum err engine_loop_submit(struct engine_loop *l, struct request *r)
{
    pthread_mutex_lock(&l->mutex);
    enum err e = l->refuse;
    if (!e && l->n == FAKE_REQUESTS_MAX) e = ERR_FULL;
    if (!e) {
        memset(&l->requests[l->n], 0, sizeof l->requests[0]);
        l->requests[l->n++].r = r;
        l->n_submitted++;
        l->n_alive = (int)l->n;
        l->last_sampling = r->sampling;
        l->last_n_tokens = r->n_tokens;
        l->last_max_tokens = r->max_tokens;
        l->last_n_choices = r->n_choices;
        l->last_best_of = r->n_best_of;
        l->last_beam_width = r->beam_width;
        l->last_salt = r->cache_salt;
        l->last_tenant = r->tenant;
        l->last_deadline_us = r->deadline_us;
        l->last_no_prefix_cache = r->no_prefix_cache;
        for (uint32_t i = 0; i < r->n_tokens && i < 4096; i++) l->last_tokens[i] = r->tokens[i];
        for (int i = 0; i < r->sampling.n_stop_ids && i < 64; i++)
            l->last_stop_ids[i] = r->sampling.stop_ids[i];
        for (int i = 0; i < r->sampling.n_bias && i < 64; i++) {
            l->last_bias_tokens[i] = r->sampling.bias_tokens[i];
            l->last_bias_values[i] = r->sampling.bias_values[i];
        }
    }
    pthread_mutex_unlock(&l->mutex);
    return e ? err_set(e, "the fake engine refuses") : OK;
}

void engine_loop_cancel(struct engine_loop *l, uint64_t request_id, int32_t choice, int how)
{
    pthread_mutex_lock(&l->mutex);
    for (uint32_t i = 0; i < l->n; i++) {
        struct fake_request *q = &l->requests[i];
        if (q->r->id != request_id) continue;
        if (how == ENGINE_CANCEL_STOP) {
            q->stop[choice] = true;
            l->n_stops++;
        } else {
            q->cancelled = true;
            l->n_cancels++;
        }
    }
    pthread_mutex_unlock(&l->mutex);
}

void engine_loop_stats(struct engine_loop *l, struct engine_stats *out)
{
    memset(out, 0, sizeof *out);
    out->n_groups = 1;
    out->n_groups_up = (uint32_t)atomic_load(&l->groups_up);
    out->context_max = 2048;
    out->vocab_size = 260;
    out->block_size = 16;
    out->blocks_total = 100;
    out->blocks_held = 25;
    out->blocks_free = 75;
}

uint32_t engine_loop_retry_after_s(struct engine_loop *l)
{
    (void)l;
    return 17;
}

int64_t engine_loop_now_us(const struct engine_loop *l)
{
    (void)l;
    return clock_monotonic_us();
}
