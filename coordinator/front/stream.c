/* See stream.h. Two threads meet in exactly two places: the queue, and the loop's list of ready
 * streams, whose lock also publishes how far the queue may be read. The engine destroys a request
 * after the last flush that the request can cause; once all are destroyed and that lock is left,
 * the engine's thread touches the stream no more, and the loop may free it. */
#include "coordinator/front/stream.h"
#include "base/clock.h"
#include "base/mem.h"
#include "base/utf8.h"
#include "coordinator/front/stream_queue.h"

#include <math.h>
#include <string.h>

enum {
    QUEUE_BYTES_MIN = 16 << 10,
    QUEUE_BYTES_MAX = 1 << 20, /* besides room for the prompt's logprobs */
    QUEUE_SCORED_BYTES_MAX = 64 << 20,
};

struct stream_choice {
    struct detokenizer detokenizer;
    struct stop_match stop;
    struct buf text;    /* free to give in this pump */
    struct buf decoded; /* of the last tokens */
    uint64_t decoded_bytes, decoded_chars, given_bytes;
    struct stream_token *pending; /* [pending_capacity], n_pending whose text is not given yet */
    size_t n_pending, pending_capacity;
    uint32_t n_generated;
    enum finish finish;
    int stop_index;
    int32_t stop_token;
    bool dirty, ended, told;
    int64_t first_us, last_us;
};

struct stream {
    struct sink sink; /* first: the engine's pointer is ours */
    struct front *front;
    struct front_loop *loop;
    struct stream_writer *writer;
    struct stream_queue queue;
    bool overflow_emitted; /* the engine's thread */
    /* under the loop's lock */
    struct stream *next_ready;
    bool queued, overflow_published;
    size_t published;
    uint32_t n_gone_published;
    /* the loop's thread */
    uint64_t first_id;
    uint32_t n_requests, n_choices, n_submitted, n_gone, n_ended;
    uint32_t *cached; /* [n_requests] */
    bool overflow, want_tokens, pumping;
    int32_t min_tokens;
    struct stream_usage usage;
    int64_t begun_us;
    struct span stops[STOP_STRINGS_MAX];
    unsigned n_stops;
    char *stop_bytes;
    struct stream_choice *choices; /* [n_requests * n_choices] */
};

/* --- the engine's thread --- */

static void sink_emit(struct sink *sink, const struct emission *e)
{
    struct stream *s = (struct stream *)sink;
    if (!stream_queue_put(&s->queue, e, clock_monotonic_us())) s->overflow_emitted = true;
}

static void publish(struct stream *s, uint32_t n_gone)
{
    struct front_loop *l = s->loop;
    struct http_loop *http = l->http;
    pthread_mutex_lock(&l->mutex);
    s->published = s->queue.written;
    s->n_gone_published += n_gone;
    s->overflow_published = s->overflow_emitted;
    if (!s->queued) {
        s->queued = true;
        s->next_ready = l->ready;
        l->ready = s;
    }
    pthread_mutex_unlock(&l->mutex);
    http_loop_wake(http);
}

static void sink_flush(struct sink *sink)
{
    publish((struct stream *)sink, 0);
}

/* The engine forgets the request, after every flush that it may have caused. */
static void request_gone(struct request *r)
{
    struct stream *s = (struct stream *)r->sink;
    mem_free(r);
    publish(s, 1);
}

/* --- the loop's thread --- */

static void stream_free(struct stream *s)
{
    uint32_t n = s->choices ? s->n_requests * s->n_choices : 0;
    for (uint32_t i = 0; i < n; i++) {
        struct stream_choice *c = &s->choices[i];
        detokenizer_fini(&c->detokenizer);
        stop_match_fini(&c->stop);
        buf_fini(&c->text);
        buf_fini(&c->decoded);
        mem_free(c->pending);
    }
    stream_queue_fini(&s->queue);
    mem_free(s->choices);
    mem_free(s->cached);
    mem_free(s->stop_bytes);
    if (s->front) {
        atomic_fetch_sub(&s->front->n_streams, 1);
        metrics_count(&s->front->metrics, METRIC_STREAMS, -1);
    }
    mem_free(s);
}

static size_t queue_capacity(const struct stream_config *c)
{
    size_t n_top = c->n_logprobs > 0 ? (size_t)c->n_logprobs : 0;
    size_t n = (size_t)c->n_requests * c->n_choices;
    size_t each = stream_queue_bytes(1, n_top), most = QUEUE_BYTES_MAX / each;
    uint64_t tokens = c->max_tokens + 2 < most ? c->max_tokens + 2 : most;
    size_t bytes = size_mul((size_t)tokens * each, n, &bytes) ? bytes : QUEUE_BYTES_MAX;
    if (bytes < QUEUE_BYTES_MIN) bytes = QUEUE_BYTES_MIN;
    if (bytes > QUEUE_BYTES_MAX) bytes = QUEUE_BYTES_MAX;
    size_t last_words = n * (stream_queue_bytes(0, 0) + STREAM_ERROR_TEXT_MAX);
    return bytes + last_words + stream_queue_bytes(1, n_top) * c->n_prompt_scored;
}

static enum err stops_copy(struct stream *s, const struct stream_config *c)
{
    size_t bytes = 0;
    ASSERT_CMP(c->n_stops, <=, STOP_STRINGS_MAX);
    for (unsigned i = 0; i < c->n_stops; i++)
        bytes += c->stops[i].n;
    TRY(mem_alloc(bytes, (void **)&s->stop_bytes));
    char *at = s->stop_bytes;
    for (unsigned i = 0; i < c->n_stops; i++) {
        memcpy(at, c->stops[i].data, c->stops[i].n);
        s->stops[i] = (struct span){at, c->stops[i].n};
        at += c->stops[i].n;
    }
    s->n_stops = c->n_stops;
    return OK;
}

static enum err choices_create(struct stream *s, const struct stream_config *c)
{
    uint32_t n = s->n_requests * s->n_choices;
    TRY(MEM_NEW_ARRAY(n, &s->choices));
    TRY(MEM_NEW_ARRAY(s->n_requests, &s->cached));
    for (uint32_t i = 0; i < n; i++) {
        struct stream_choice *choice = &s->choices[i];
        stop_match_init(&choice->stop, s->stops, s->n_stops, c->keep_stop);
        buf_init(&choice->text, 0);
        buf_init(&choice->decoded, 0);
        choice->stop_index = choice->stop_token = -1;
        TRY(detokenizer_init(&choice->detokenizer, s->front->config.tokenizer, c->skip_special));
    }
    return OK;
}

enum err stream_create(const struct stream_config *config, struct stream **out)
{
    struct stream *s = NULL;
    size_t capacity = queue_capacity(config);
    if (capacity > QUEUE_SCORED_BYTES_MAX)
        FAIL(ERR_INVALID, "the logprobs of %llu prompt tokens are more than one call may ask for",
             (unsigned long long)config->n_prompt_scored);
    TRY(MEM_NEW(&s));
    s->sink = (struct sink){sink_emit, sink_flush};
    s->loop = config->loop;
    s->writer = config->writer;
    s->n_requests = config->n_requests;
    s->n_choices = config->n_choices;
    s->want_tokens = config->want_tokens;
    s->min_tokens = config->min_tokens;
    s->begun_us = clock_monotonic_us();
    s->front = config->loop->front;
    s->first_id = atomic_fetch_add(&s->front->next_id, config->n_requests);
    atomic_fetch_add(&s->front->n_streams, 1);
    metrics_count(&s->front->metrics, METRIC_STREAMS, 1);
    enum err e = stream_queue_init(&s->queue, capacity);
    if (!e) e = stops_copy(s, config);
    if (!e) e = choices_create(s, config);
    if (e)
        stream_free(s);
    else
        *out = s;
    return e;
}

enum err stream_submit(struct stream *s, struct request *r)
{
    ASSERT_CMP(s->n_submitted, <, s->n_requests);
    r->sink = &s->sink;
    r->id = s->first_id + s->n_submitted;
    uint32_t n_tokens = r->n_tokens;
    void (*destroy)(struct request *) = r->destroy;
    r->destroy = request_gone;
    enum err e = engine_loop_submit(s->front->config.engine, r);
    if (e) { /* still the caller's */
        r->destroy = destroy;
        return e;
    }
    s->n_submitted++;
    s->usage.prompt_tokens += n_tokens;
    return OK;
}

static void cancel_all(struct stream *s)
{
    for (uint32_t i = 0; i < s->n_submitted; i++)
        engine_loop_cancel(s->front->config.engine, s->first_id + i, -1, ENGINE_CANCEL_CLIENT);
}

/* Frees it when nobody needs it: no writer, and the engine has forgotten every request. */
static void free_when_done(struct stream *s)
{
    if (!s->writer && !s->pumping && s->n_gone == s->n_submitted) stream_free(s);
}

void stream_abandon(struct stream *s)
{
    s->writer = NULL;
    if (s->n_gone < s->n_submitted) cancel_all(s);
    free_when_done(s);
}

void stream_cancel(struct stream *s)
{
    cancel_all(s);
}
void stream_usage_get(const struct stream *s, struct stream_usage *out)
{
    *out = s->usage;
}

static uint64_t count_chars(const char *s, size_t n)
{
    uint64_t chars = 0;
    for (size_t i = 0; i < n; i++)
        chars += ((unsigned char)s[i] & 0xc0) != 0x80;
    return chars;
}

static void token_copy(const struct step_token *from, struct stream_token *to)
{
    to->token = from->token;
    to->has_logprob = from->has_logprob;
    to->logprob = from->logprob;
    to->n_top = from->n_top < STREAM_TOP_MAX ? from->n_top : STREAM_TOP_MAX;
    for (uint32_t i = 0; i < to->n_top; i++) {
        to->top_tokens[i] = from->top_tokens[i];
        to->top_logprobs[i] = from->top_logprobs[i];
    }
}

static enum err pending_add(struct stream_choice *c, const struct step_token *t)
{
    if (c->n_pending == c->pending_capacity) {
        size_t capacity = c->pending_capacity ? 2 * c->pending_capacity : 8;
        TRY(mem_resize((void **)&c->pending, capacity * sizeof *c->pending));
        c->pending_capacity = capacity;
    }
    struct stream_token *p = &c->pending[c->n_pending++];
    token_copy(t, p);
    p->start_bytes = c->decoded_bytes;
    p->start_chars = c->decoded_chars;
    return OK;
}

/* Decoded text goes through the stop matcher; true when a stop string ended the choice. */
static enum err text_feed(struct stream *s, struct stream_choice *c, bool *out_stopped)
{
    int found = -1;
    c->decoded_bytes += c->decoded.n;
    c->decoded_chars += count_chars(buf_string(&c->decoded), c->decoded.n);
    if (c->n_generated < (uint32_t)s->min_tokens)
        TRY(buf_add(&c->text, buf_string(&c->decoded), c->decoded.n));
    else
        TRY(stop_match_feed(&c->stop, buf_string(&c->decoded), c->decoded.n, &c->text, &found));
    buf_clear(&c->decoded);
    if (found >= 0) c->stop_index = found;
    *out_stopped = found >= 0;
    return OK;
}

static void choice_end(struct stream *s, struct stream_choice *c, enum finish finish)
{
    struct metrics *m = &s->front->metrics;
    c->ended = true;
    c->finish = finish;
    s->n_ended++;
    atomic_fetch_add(&m->finished[finish], 1);
    histogram_observe(&m->histograms[METRIC_GENERATION_TOKENS], c->n_generated, 1);
    if (!c->first_us) return;
    double decode = (double)(c->last_us - c->first_us) * 1e-6;
    histogram_observe(&m->histograms[METRIC_DECODE], decode, 1);
    if (c->n_generated > 1)
        histogram_observe(&m->histograms[METRIC_TPOT], decode / (c->n_generated - 1), 1);
}

/* One generated token of a choice that goes on. */
static enum err token_take(struct stream *s, struct stream_choice *c, const struct step_token *t,
                           bool is_stop, bool *out_stopped)
{
    c->n_generated++;
    s->usage.completion_tokens++;
    if (s->want_tokens) TRY(pending_add(c, t));
    *out_stopped = false;
    if (is_stop && !c->stop.keep) return OK;
    TRY(detokenizer_next(&c->detokenizer, t->token, &c->decoded));
    return text_feed(s, c, out_stopped);
}

static void observe(struct stream *s, struct stream_choice *c, const struct stream_record *r)
{
    struct metrics *m = &s->front->metrics;
    if (!c->first_us) {
        c->first_us = r->at_us;
        double waited = (double)r->queued_us * 1e-6, prefill = (double)r->prefill_us * 1e-6;
        histogram_observe(&m->histograms[METRIC_TTFT], (double)(r->at_us - s->begun_us) * 1e-6, 1);
        histogram_observe(&m->histograms[METRIC_QUEUE], waited, 1);
        histogram_observe(&m->histograms[METRIC_PREFILL], prefill, 1);
    } else if (r->n_tokens) {
        double each = (double)(r->at_us - c->last_us) * 1e-6 / r->n_tokens;
        histogram_observe(&m->histograms[METRIC_ITL], each, r->n_tokens);
    }
    c->last_us = r->at_us;
}

/* The engine ended the choice: what was held back goes out. */
static enum err choice_finish(struct stream *s, struct stream_choice *c,
                              const struct stream_record *r)
{
    bool stopped = false;
    TRY(detokenizer_flush(&c->detokenizer, &c->decoded));
    TRY(text_feed(s, c, &stopped));
    if (!stopped) TRY(stop_match_flush(&c->stop, &c->text));
    c->stop_token = stopped ? -1 : r->stop_token;
    choice_end(s, c, stopped ? FINISH_STOP : r->finish);
    return OK;
}

static enum err record_apply(struct stream *s, const struct stream_record *r,
                             const struct step_token *tokens)
{
    uint64_t request = r->request_id - s->first_id;
    if (request >= s->n_requests || (uint32_t)r->choice >= s->n_choices) return OK;
    if (r->finish == FINISH_ERROR) {
        enum err e = r->error ? r->error : ERR_INTERNAL;
        return err_set(e, "%s", *r->error_text ? r->error_text : err_text(e));
    }
    struct stream_choice *c = &s->choices[request * s->n_choices + (uint32_t)r->choice];
    if (r->n_cached > s->cached[request]) {
        s->usage.cached_tokens += r->n_cached - s->cached[request];
        s->cached[request] = r->n_cached;
    }
    uint32_t n_new = 0;
    for (uint32_t i = 0; i < r->n_tokens; i++) {
        if (tokens[i].flags & STEP_TOKEN_SCORED) {
            struct stream_token scored = {0};
            token_copy(&tokens[i], &scored);
            if (s->writer->scored) s->writer->scored(s->writer, (uint32_t)request, &scored, 1);
            continue;
        }
        if (c->ended) continue;
        if (!n_new++) observe(s, c, r);
        bool stopped, is_stop = r->stop_token >= 0 && i + 1 == r->n_tokens;
        TRY(token_take(s, c, &tokens[i], is_stop, &stopped));
        c->dirty = true;
        if (!stopped) continue;
        choice_end(s, c, FINISH_STOP);
        engine_loop_cancel(s->front->config.engine, r->request_id, r->choice, ENGINE_CANCEL_STOP);
    }
    if (!r->finish || c->ended) return OK;
    c->dirty = true;
    return choice_finish(s, c, r);
}

/* Tokens go out with the first of their text; at a natural end all do; after a stop string only
 * those that begin before the cut. */
static size_t tokens_ready(const struct stream_choice *c)
{
    if (c->ended && c->stop_index < 0) return c->n_pending;
    size_t n = 0;
    while (n < c->n_pending && c->pending[n].start_bytes < c->given_bytes)
        n++;
    return n;
}

static void choice_give(struct stream *s, uint32_t index)
{
    struct stream_choice *c = &s->choices[index];
    c->dirty = false;
    if (c->told) return;
    c->told = c->ended;
    c->given_bytes += c->text.n;
    size_t n = tokens_ready(c);
    struct stream_piece piece = {.choice = index,
                                 .text = {buf_string(&c->text), c->text.n},
                                 .tokens = c->pending,
                                 .n_tokens = n,
                                 .n_generated = c->n_generated,
                                 .finish = c->finish,
                                 .stop_index = c->stop_index,
                                 .stop_token = c->stop_token};
    s->writer->piece(s->writer, &piece);
    c->n_pending -= n;
    if (c->n_pending) memmove(c->pending, c->pending + n, c->n_pending * sizeof *c->pending);
    buf_clear(&c->text);
}

/* The call is over for its writer. */
static void stream_finish(struct stream *s, enum err e)
{
    struct stream_writer *w = s->writer;
    struct metrics *m = &s->front->metrics;
    char why[512];
    snprintf(why, sizeof why, "%s", e ? err_detail() : "");
    double took = (double)(clock_monotonic_us() - s->begun_us) * 1e-6;
    histogram_observe(&m->histograms[METRIC_E2E], took, 1);
    histogram_observe(&m->histograms[METRIC_INFERENCE], took, 1);
    uint32_t most = 0;
    for (uint32_t i = 0; i < s->n_requests * s->n_choices; i++)
        if (s->choices[i].n_generated > most) most = s->choices[i].n_generated;
    histogram_observe(&m->histograms[METRIC_MAX_GENERATION_TOKENS], most, 1);
    s->writer = NULL;
    if (e && s->n_gone < s->n_submitted) cancel_all(s);
    w->finished(w, e, why);
}

/* Takes what is visible, then gives each choice's news once. */
static void stream_pump(struct stream *s, size_t visible)
{
    struct stream_record record;
    const struct step_token *tokens;
    enum err e = OK;
    s->pumping = true;
    while (stream_queue_take(&s->queue, visible, &s->loop->scratch, &record, &tokens))
        if (s->writer && !e) e = record_apply(s, &record, tokens);
    if (s->overflow && !e) e = err_set(ERR_INTERNAL, "the answer's queue was full");
    for (uint32_t i = 0; s->writer && i < s->n_requests * s->n_choices; i++)
        if (s->choices[i].dirty) choice_give(s, i);
    if (s->writer && s->writer->flush) s->writer->flush(s->writer);
    if (s->writer && (e || s->n_ended == s->n_requests * s->n_choices)) stream_finish(s, e);
    s->pumping = false;
    free_when_done(s);
}

void stream_pump_ready(struct front_loop *l)
{
    for (;;) {
        pthread_mutex_lock(&l->mutex);
        struct stream *s = l->ready;
        size_t visible = 0;
        if (s) {
            l->ready = s->next_ready;
            s->queued = false;
            visible = s->published;
            s->n_gone = s->n_gone_published;
            s->overflow = s->overflow_published;
        }
        pthread_mutex_unlock(&l->mutex);
        if (!s) return;
        stream_pump(s, visible);
    }
}
