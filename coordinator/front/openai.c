/* Completions and chat: from a whole request to its whole or streamed answer. See openai.h. */
#include "coordinator/front/openai.h"
#include "base/clock.h"
#include "base/mem.h"
#include "coordinator/front/api_error.h"
#include "coordinator/front/routes.h"

#include <stddef.h>
#include <string.h>

enum { LONG_BODY_BYTES = 32 << 10 }; /* parsing that much takes a few milliseconds */

struct openai_choice *openai_choice_of(struct openai_answer *a, uint32_t index)
{
    ASSERT_CMP(index, <, a->n_choices);
    return &a->choices[index];
}

const char *openai_finish_word(enum finish finish)
{
    switch (finish) {
    case FINISH_STOP:
        return "\"stop\"";
    case FINISH_LENGTH:
        return "\"length\"";
    case FINISH_CANCELLED:
        return "\"stop\"";
    default:
        return "null";
    }
}

static void answer_destroy(struct openai_answer *a)
{
    for (uint32_t i = 0; i < a->n_choices; i++) {
        struct openai_choice *c = &a->choices[i];
        struct buf *all[] = {&c->text,    &c->tokens,  &c->values, &c->tops,
                             &c->offsets, &c->content, &c->ids};
        for (size_t k = 0; k < sizeof all / sizeof *all; k++)
            buf_fini(all[k]);
    }
    for (uint32_t i = 0; a->scored && i < a->call.n_prompts; i++)
        mem_free(a->scored[i].tokens);
    mem_free(a->scored);
    mem_free(a->choices);
    api_call_fini(&a->call);
    buf_fini(&a->head);
    buf_fini(&a->out);
    buf_fini(&a->body);
    mem_free(a);
}

/* --- pieces of JSON --- */

static void usage_write(struct openai_answer *a, struct buf *out)
{
    struct stream_usage u = {0};
    if (a->stream)
        stream_usage_get(a->stream, &u);
    else
        for (uint32_t i = 0; i < a->call.n_prompts; i++)
            u.prompt_tokens += a->call.prompts[i].tokens.n;
    buf_printf(out,
               "\"usage\":{\"prompt_tokens\":%llu,\"completion_tokens\":%llu,\"total_tokens\":%llu,"
               "\"prompt_tokens_details\":{\"cached_tokens\":%llu}}",
               (unsigned long long)u.prompt_tokens, (unsigned long long)u.completion_tokens,
               (unsigned long long)(u.prompt_tokens + u.completion_tokens),
               (unsigned long long)u.cached_tokens);
}

/* What every chunk and document begins with. */
static void head_write(struct openai_answer *a, const char *object)
{
    buf_printf(&a->head, "{\"id\":\"%s\",\"object\":\"%s\",\"created\":%lld,\"model\":", a->id,
               object, (long long)clock_unix_s());
    json_write_string(&a->head, a->call.model, strlen(a->call.model));
    buf_printf(&a->head, ",\"system_fingerprint\":\"%s\",\"choices\":[",
               a->front->config.system_fingerprint);
}

/* Why a choice stopped: the stop string, the client's stop token, or null. */
static void stop_reason_write(const struct openai_answer *a, const struct openai_choice *c,
                              struct buf *out)
{
    buf_add_string(out, ",\"stop_reason\":");
    if (c->stop_index >= 0) {
        struct span s = a->call.stops[c->stop_index];
        json_write_string(out, s.data, s.n);
        return;
    }
    for (int i = 0; c->stop_token >= 0 && i < a->call.n_client_stop_ids; i++)
        if (a->call.stop_ids[i] == c->stop_token) {
            buf_printf(out, "%d", c->stop_token);
            return;
        }
    buf_add_string(out, "null");
}

/* --- streaming --- */

static void event_begin(struct openai_answer *a)
{
    buf_add_string(&a->out, "data: ");
    buf_add(&a->out, a->head.data, a->head.n);
}

static void event_end(struct openai_answer *a)
{
    if (a->call.continuous_usage) {
        buf_add_string(&a->out, "],");
        usage_write(a, &a->out);
        buf_add_string(&a->out, "}\n\n");
    } else {
        buf_add_string(&a->out, a->call.include_usage ? "],\"usage\":null}\n\n" : "]}\n\n");
    }
}

static void chat_role_event(struct openai_answer *a, uint32_t index)
{
    event_begin(a);
    buf_printf(&a->out,
               "{\"index\":%u,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},"
               "\"logprobs\":null,\"finish_reason\":null}",
               index);
    event_end(a);
}

/* One event of one choice: text, logprobs, and perhaps its end. */
static void choice_event(struct openai_answer *a, uint32_t index, struct span text)
{
    struct openai_choice *c = openai_choice_of(a, index);
    event_begin(a);
    buf_printf(&a->out, "{\"index\":%u,", index);
    if (a->call.kind == API_CHAT) {
        buf_add_string(&a->out, "\"delta\":{");
        if (text.n || !c->finish) {
            buf_add_string(&a->out, "\"content\":");
            json_write_string(&a->out, text.data, text.n);
        }
        buf_add_string(&a->out, "},");
    } else {
        buf_add_string(&a->out, "\"text\":");
        json_write_string(&a->out, text.data, text.n);
        buf_add_char(&a->out, ',');
    }
    openai_logprobs_write(a, c, &a->out);
    buf_printf(&a->out, ",\"finish_reason\":%s", openai_finish_word(c->finish));
    if (c->finish) stop_reason_write(a, c, &a->out);
    buf_add_char(&a->out, '}');
    event_end(a);
}

static void events_send(struct openai_answer *a)
{
    if (!a->out.n) return;
    if (!a->started) {
        a->started = true;
        http_exchange_header(a->x, "Cache-Control", "no-cache");
        http_exchange_header(a->x, "X-Accel-Buffering", "no");
        http_exchange_start(a->x, 200, "text/event-stream; charset=utf-8");
    }
    http_exchange_write(a->x, a->out.data, a->out.n);
    buf_clear(&a->out);
}

/* --- the writer --- */

static void on_scored(struct stream_writer *w, uint32_t request, const struct stream_token *tokens,
                      size_t n)
{
    struct openai_answer *a = (struct openai_answer *)w;
    struct openai_scored *s = a->scored ? &a->scored[request] : NULL;
    for (size_t i = 0; s && i < n && s->n < a->call.prompts[request].tokens.n; i++) {
        if (s->n == s->capacity) {
            size_t more = s->capacity ? 2 * s->capacity : 64;
            if (mem_resize((void **)&s->tokens, more * sizeof *s->tokens)) return;
            s->capacity = more;
        }
        s->tokens[s->n++] = tokens[i];
    }
}

static void on_piece(struct stream_writer *w, const struct stream_piece *p)
{
    struct openai_answer *a = (struct openai_answer *)w;
    struct openai_choice *c = openai_choice_of(a, p->choice);
    struct buf first;
    struct span text = p->text;
    buf_init(&first, 0);
    if (!c->begun) {
        c->begun = true;
        if (a->call.echo) {
            openai_echo_add(a, p->choice, &first);
            buf_add(&first, text.data, text.n);
            text = (struct span){buf_string(&first), first.n};
        }
        if (a->call.kind == API_CHAT && a->call.stream) chat_role_event(a, p->choice);
    }
    for (size_t i = 0; i < p->n_tokens; i++)
        openai_logprobs_add(a, c, &p->tokens[i]);
    c->finish = p->finish;
    c->stop_index = p->stop_index;
    c->stop_token = p->stop_token;
    if (a->call.stream)
        choice_event(a, p->choice, text);
    else
        buf_add(&c->text, text.data, text.n);
    buf_fini(&first);
}

static void on_flush(struct stream_writer *w)
{
    struct openai_answer *a = (struct openai_answer *)w;
    if (!a->call.stream) return;
    events_send(a);
    if (!http_exchange_stalled(a->x)) return;
    metrics_count(&a->front->metrics, METRIC_SLOW_CLIENTS, 1);
    http_exchange_abort(a->x);
    stream_abandon(a->stream);
    answer_destroy(a);
}

static void document_write(struct openai_answer *a)
{
    struct buf *out = &a->out;
    buf_add(out, a->head.data, a->head.n);
    for (uint32_t i = 0; i < a->n_choices; i++) {
        struct openai_choice *c = &a->choices[i];
        buf_printf(out, "%s{\"index\":%u,", i ? "," : "", i);
        if (a->call.kind == API_CHAT) {
            buf_add_string(out, "\"message\":{\"role\":\"assistant\",\"content\":");
            json_write_string(out, buf_string(&c->text), c->text.n);
            buf_add_string(out, ",\"refusal\":null},");
        } else {
            buf_add_string(out, "\"text\":");
            json_write_string(out, buf_string(&c->text), c->text.n);
            buf_add_char(out, ',');
        }
        openai_logprobs_write(a, c, out);
        buf_printf(out, ",\"finish_reason\":%s", openai_finish_word(c->finish));
        stop_reason_write(a, c, out);
        buf_add_char(out, '}');
    }
    buf_add_string(out, "],");
    usage_write(a, out);
    buf_add_char(out, '}');
}

static void answer_end(struct openai_answer *a)
{
    if (!a->call.stream) {
        document_write(a);
        if (buf_err(&a->out))
            route_error(a->front, a->x, ERR_NO_MEMORY, "");
        else
            http_exchange_reply(a->x, 200, "application/json", a->out.data, a->out.n);
        return;
    }
    if (a->call.include_usage) {
        event_begin(a);
        buf_add_string(&a->out, "],");
        usage_write(a, &a->out);
        buf_add_string(&a->out, "}\n\n");
    }
    buf_add_string(&a->out, "data: [DONE]\n\n");
    events_send(a);
    http_exchange_end(a->x);
}

static void answer_fail(struct openai_answer *a, enum err e, const char *why)
{
    if (!a->started) {
        route_error(a->front, a->x, e, why);
        return;
    }
    buf_clear(&a->out);
    buf_add_string(&a->out, "data: ");
    api_error_write(&a->out, e, why);
    buf_add_string(&a->out, "\n\ndata: [DONE]\n\n");
    events_send(a);
    http_exchange_end(a->x);
}

static void on_finished(struct stream_writer *w, enum err e, const char *why)
{
    struct openai_answer *a = (struct openai_answer *)w;
    if (e)
        answer_fail(a, e, why);
    else
        answer_end(a);
    answer_destroy(a);
}

static void on_closed(void *owner)
{
    struct openai_answer *a = owner;
    metrics_count(&a->front->metrics, METRIC_CANCELLED, 1);
    stream_abandon(a->stream);
    answer_destroy(a);
}

/* --- from the request --- */

static enum err answer_begin(struct openai_answer *a)
{
    struct front *f = a->front;
    struct api_call *call = &a->call;
    const char *objects[] = {"text_completion",
                             call->stream ? "chat.completion.chunk" : "chat.completion"};
    uint32_t n = call->n_prompts * (uint32_t)call->n;
    TRY(MEM_NEW_ARRAY(n, &a->choices));
    a->n_choices = n;
    for (uint32_t i = 0; i < a->n_choices; i++)
        a->choices[i].stop_index = a->choices[i].stop_token = -1;
    if (call->sampling.n_prompt_logprobs >= 0) TRY(MEM_NEW_ARRAY(call->n_prompts, &a->scored));
    front_make_id(f, call->kind == API_CHAT ? "chatcmpl-" : "cmpl-", a->id);
    head_write(a, objects[call->kind == API_CHAT]);
    return buf_err(&a->head);
}

/* Nothing to generate and nothing to score: the answer is known. */
static void answer_echo_only(struct openai_answer *a)
{
    for (uint32_t i = 0; i < a->n_choices; i++) {
        struct stream_piece p = {.choice = i,
                                 .text = {"", 0},
                                 .finish = FINISH_LENGTH,
                                 .stop_index = -1,
                                 .stop_token = -1};
        on_piece(&a->writer, &p);
    }
    answer_end(a);
    answer_destroy(a);
}

static enum err answer_submit(struct openai_answer *a)
{
    struct front *f = a->front;
    struct api_call *call = &a->call;
    struct stream_config config = {.loop = front_loop_of(a->x),
                                   .writer = &a->writer,
                                   .n_requests = call->n_prompts,
                                   .n_choices = (uint32_t)call->n,
                                   .stops = call->stops,
                                   .n_stops = call->n_stops,
                                   .keep_stop = call->keep_stop,
                                   .skip_special = call->skip_special,
                                   .want_tokens = call->n_logprobs >= 0 || call->return_token_ids,
                                   .min_tokens = (int32_t)call->min_tokens,
                                   .n_logprobs = call->n_logprobs};
    for (uint32_t i = 0; i < call->n_prompts; i++) {
        uint64_t most = api_max_tokens(f, call, call->prompts[i].tokens.n);
        if (most > config.max_tokens) config.max_tokens = most;
        if (a->scored) config.n_prompt_scored += call->prompts[i].tokens.n;
    }
    TRY(stream_create(&config, &a->stream));
    for (uint32_t i = 0; i < call->n_prompts; i++) {
        struct request *r;
        TRY(api_request_create(f, call, i, &r));
        uint32_t n_prompt = r->n_tokens, n_max = r->max_tokens;
        enum err e = stream_submit(a->stream, r);
        if (e) {
            r->destroy(r);
            return e;
        }
        struct histogram *h = f->metrics.histograms;
        histogram_observe(&h[METRIC_PROMPT_TOKENS], n_prompt, 1);
        histogram_observe(&h[METRIC_PARAMS_MAX_TOKENS], n_max, 1);
        histogram_observe(&h[METRIC_PARAMS_N], (double)call->n, 1);
    }
    return OK;
}

static void call_parse(struct openai_answer *a, struct span body)
{
    a->parse_err = a->call.kind == API_CHAT ? api_chat_parse(a->front, body, &a->call)
                                            : api_completions_parse(a->front, body, &a->call);
    snprintf(a->parse_why, sizeof a->parse_why, "%s", a->parse_err ? err_detail() : "");
}

/* The body has been read: submits, or answers that it cannot be. */
static void call_begin(struct openai_answer *a)
{
    struct http_exchange *x = a->x;
    struct front *f = a->front;
    char why[512];
    enum err e = a->parse_err;
    if (e) err_set(e, "%s", a->parse_why);
    a->call.tenant = a->tenant;
    a->call.cache_salt ^= a->salt;
    if (!e) e = answer_begin(a);
    if (!e && !a->call.max_tokens && !a->scored) {
        answer_echo_only(a);
        return;
    }
    if (!e) e = answer_submit(a);
    if (!e) {
        http_exchange_own(x, on_closed, a);
        return;
    }
    snprintf(why, sizeof why, "%s", err_detail());
    if (a->stream) stream_abandon(a->stream);
    answer_destroy(a);
    route_error(f, x, e, why);
}

static struct openai_answer *answer_of(void *job, size_t offset)
{
    return (struct openai_answer *)(void *)((char *)job - offset);
}

static void parse_work(struct text_job *job)
{
    struct openai_answer *a = answer_of(job, offsetof(struct openai_answer, parse));
    call_parse(a, (struct span){buf_string(&a->body), a->body.n});
}

static void parse_back(struct front_job *job, struct front_loop *loop)
{
    (void)loop;
    struct openai_answer *a = answer_of(job, offsetof(struct openai_answer, parse.back));
    if (a->x)
        call_begin(a);
    else
        answer_destroy(a);
}

/* The client left while its body was being parsed: parse_back will see. */
static void parse_closed(void *owner)
{
    struct openai_answer *a = owner;
    metrics_count(&a->front->metrics, METRIC_CANCELLED, 1);
    a->x = NULL;
}

static void openai_answer(struct front *f, struct http_exchange *x, enum api_kind kind,
                          uint64_t tenant, uint64_t salt)
{
    struct openai_answer *a = NULL;
    enum err e = MEM_NEW(&a);
    if (e) {
        route_error(f, x, e, "");
        return;
    }
    a->writer = (struct stream_writer){on_piece, on_scored, on_flush, on_finished};
    a->front = f;
    a->x = x;
    a->tenant = tenant;
    a->salt = salt;
    api_call_init(&a->call, kind, f);
    struct span body = http_exchange_body(x);
    if (body.n < LONG_BODY_BYTES) {
        call_parse(a, body);
        call_begin(a);
        return;
    }
    http_exchange_own(x, parse_closed, a);
    http_exchange_take_body(x, &a->body);
    a->parse.loop = front_loop_of(x);
    a->parse.work = parse_work;
    a->parse.back.run = parse_back;
    text_pool_post(f->texts, &a->parse);
}

void openai_completions(struct front *f, struct http_exchange *x, uint64_t tenant, uint64_t salt)
{
    openai_answer(f, x, API_COMPLETIONS, tenant, salt);
}

void openai_chat(struct front *f, struct http_exchange *x, uint64_t tenant, uint64_t salt)
{
    openai_answer(f, x, API_CHAT, tenant, salt);
}
