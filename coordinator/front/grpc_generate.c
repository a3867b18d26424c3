/* Generate and Cancel: gRPC's way to the engine. The message becomes the JSON body that HTTP would
 * have brought, so that both ports check every field by the same rows. See grpc_call.h. */
#include "base/mem.h"
#include "coordinator/front/grpc_call.h"

#include <string.h>

typedef Heddle__V1__SamplingParams Sampling;

/* --- the message as a body --- */

static int set(json_t *o, const char *key, json_t *value)
{
    return value ? json_object_set_new(o, key, value) : -1;
}

static json_t *ids_array(const uint32_t *ids, size_t n)
{
    json_t *list = json_array();
    for (size_t i = 0; list && i < n; i++)
        if (json_array_append_new(list, json_integer(ids[i]))) {
            json_decref(list);
            return NULL;
        }
    return list;
}

static int numbers_set(json_t *o, const Sampling *p)
{
    int bad = 0;
    if (p->temperature_given_case) bad |= set(o, "temperature", json_real((double)p->temperature));
    if (p->top_k_given_case) bad |= set(o, "top_k", json_integer(p->top_k));
    if (p->top_p_given_case) bad |= set(o, "top_p", json_real((double)p->top_p));
    if (p->min_p_given_case) bad |= set(o, "min_p", json_real((double)p->min_p));
    if (p->repetition_penalty_given_case)
        bad |= set(o, "repetition_penalty", json_real((double)p->repetition_penalty));
    if (p->presence_penalty_given_case)
        bad |= set(o, "presence_penalty", json_real((double)p->presence_penalty));
    if (p->frequency_penalty_given_case)
        bad |= set(o, "frequency_penalty", json_real((double)p->frequency_penalty));
    if (p->seed_given_case) bad |= set(o, "seed", json_integer((json_int_t)p->seed));
    if (p->max_tokens_given_case) bad |= set(o, "max_tokens", json_integer(p->max_tokens));
    if (p->min_tokens_given_case) bad |= set(o, "min_tokens", json_integer(p->min_tokens));
    if (p->logprobs_given_case) bad |= set(o, "logprobs", json_integer(p->logprobs));
    if (p->choices_given_case) bad |= set(o, "n", json_integer(p->choices));
    if (p->ignore_eos) bad |= set(o, "ignore_eos", json_true());
    return bad;
}

static int lists_set(json_t *o, const Sampling *p)
{
    int bad = 0;
    json_t *stops = json_array(), *bias = json_object();
    for (size_t i = 0; i < p->n_stop; i++) {
        json_t *text = json_string(p->stop[i]);
        bad |= !text || json_array_append_new(stops, text);
    }
    for (size_t i = 0; i < p->n_logit_bias; i++) {
        char key[16];
        snprintf(key, sizeof key, "%u", p->logit_bias[i]->key);
        bad |= set(bias, key, json_real((double)p->logit_bias[i]->value));
    }
    bad |= set(o, "stop", stops) | set(o, "logit_bias", bias);
    return bad | set(o, "stop_token_ids", ids_array(p->stop_token_ids, p->n_stop_token_ids));
}

/* NaN and infinity have no JSON: json_real refuses them, and so does this. */
static enum err body_make(const Heddle__V1__GenerateRequest *r, json_t **out)
{
    json_t *o = json_object();
    int bad = !o;
    if (r->prompt_case == HEDDLE__V1__GENERATE_REQUEST__PROMPT_TEXT)
        bad |= set(o, "prompt", json_string(r->text));
    else if (r->prompt_case == HEDDLE__V1__GENERATE_REQUEST__PROMPT_TOKENS)
        bad |= set(o, "prompt", ids_array(r->tokens->ids, r->tokens->n_ids));
    if (*r->model) bad |= set(o, "model", json_string(r->model));
    if (*r->cache_salt) bad |= set(o, "cache_salt", json_string(r->cache_salt));
    if (r->priority) bad |= set(o, "priority", json_integer(r->priority));
    if (r->timeout_ms) bad |= set(o, "timeout", json_real(r->timeout_ms * 1e-3));
    bad |= set(o, "stream", json_true());
    if (r->sampling) bad |= numbers_set(o, r->sampling) | lists_set(o, r->sampling);
    if (bad) {
        json_decref(o);
        FAIL(ERR_INVALID, "a text is not UTF-8, or a number is not finite");
    }
    *out = o;
    return OK;
}

/* --- replies --- */

static const char *finish_word(enum finish finish)
{
    switch (finish) {
    case FINISH_STOP:
        return "stop";
    case FINISH_LENGTH:
        return "length";
    case FINISH_CANCELLED:
        return "cancelled";
    default:
        return "";
    }
}

static void logprob_fill(struct front *f, Heddle__V1__Logprob *to, int32_t token, float logprob)
{
    heddle__v1__logprob__init(to);
    struct span bytes = tokenizer_bytes(f->config.tokenizer, token);
    to->token = (uint32_t)token;
    to->logprob = logprob;
    to->text.data = (uint8_t *)(uintptr_t)bytes.data;
    to->text.len = bytes.n;
}

/* Lays out the logprobs of n tokens in the arena. */
static enum err logprobs_fill(struct grpc_call *c, struct arena *arena,
                              const struct stream_piece *p, Heddle__V1__GenerateReply *reply)
{
    Heddle__V1__TokenLogprobs *items;
    TRY(arena_alloc_array(arena, p->n_tokens, sizeof *items, (void **)&items));
    TRY(arena_alloc_array(arena, p->n_tokens, sizeof items, (void **)&reply->logprobs));
    for (size_t i = 0; i < p->n_tokens; i++) {
        const struct stream_token *t = &p->tokens[i];
        Heddle__V1__Logprob *all;
        heddle__v1__token_logprobs__init(&items[i]);
        TRY(arena_alloc_array(arena, t->n_top + 1, sizeof *all, (void **)&all));
        TRY(arena_alloc_array(arena, t->n_top + 1, sizeof all, (void **)&items[i].top));
        for (uint32_t k = 0; k < t->n_top; k++) {
            logprob_fill(c->g->front, &all[k], t->top_tokens[k], t->top_logprobs[k]);
            items[i].top[k] = &all[k];
        }
        logprob_fill(c->g->front, &all[t->n_top], t->token, t->logprob);
        items[i].n_top = t->n_top;
        items[i].chosen = &all[t->n_top];
        reply->logprobs[i] = &items[i];
    }
    reply->n_logprobs = p->n_tokens;
    return OK;
}

static enum err piece_send(struct grpc_call *c, struct arena *arena, const struct stream_piece *p)
{
    Heddle__V1__GenerateReply reply = HEDDLE__V1__GENERATE_REPLY__INIT;
    char *text;
    TRY(arena_copy_string(arena, p->text.data, p->text.n, &text));
    TRY(arena_alloc_array(arena, p->n_tokens + 1, sizeof(uint32_t), (void **)&reply.tokens));
    for (size_t i = 0; i < p->n_tokens; i++)
        reply.tokens[i] = (uint32_t)p->tokens[i].token;
    reply.request_id = c->id;
    reply.choice = p->choice;
    reply.text = text;
    reply.n_tokens = p->n_tokens;
    reply.finish_reason = (char *)(uintptr_t)finish_word(p->finish);
    if (c->call.n_logprobs >= 0) TRY(logprobs_fill(c, arena, p, &reply));
    if (p->finish) {
        struct stream_usage usage;
        stream_usage_get(c->stream, &usage);
        reply.prompt_tokens = (uint32_t)usage.prompt_tokens;
        reply.completion_tokens = p->n_generated;
        reply.cached_tokens = (uint32_t)usage.cached_tokens;
    }
    return grpc_call_send(c, &reply.base);
}

static struct grpc_call *call_of(struct stream_writer *w)
{
    return (struct grpc_call *)(void *)((char *)w - offsetof(struct grpc_call, writer));
}

static void on_piece(struct stream_writer *w, const struct stream_piece *p)
{
    struct grpc_call *c = call_of(w);
    struct arena arena;
    if (c->ended) return;
    arena_init(&arena, 16 << 10, 64 << 20);
    enum err e = piece_send(c, &arena, p);
    arena_fini(&arena);
    if (!e) return;
    if (e == ERR_FULL) metrics_count(&c->g->front->metrics, METRIC_SLOW_CLIENTS, 1);
    grpc_call_end(c, e, e == ERR_FULL ? "the client does not read its replies" : err_detail());
}

static void on_finished(struct stream_writer *w, enum err e, const char *why)
{
    struct grpc_call *c = call_of(w);
    c->stream = NULL;
    grpc_call_end(c, e, why);
}

/* --- the registry of ids, for Cancel --- */

static enum err registry_add(struct grpc_call *c)
{
    struct grpc_front *g = c->g;
    enum err e = OK;
    pthread_mutex_lock(&g->mutex);
    for (struct grpc_call *o = g->generating; o && !e; o = o->next)
        if (!strcmp(o->id, c->id))
            e = err_set(ERR_INVALID, "'request_id' %s is in use by a call that is alive", c->id);
    if (!e) {
        c->next = g->generating;
        g->generating = c;
    } else {
        c->id[0] = 0;
    }
    pthread_mutex_unlock(&g->mutex);
    return e;
}

static void registry_remove(struct grpc_call *c)
{
    pthread_mutex_lock(&c->g->mutex);
    for (struct grpc_call **p = &c->g->generating; *p; p = &(*p)->next)
        if (*p == c) {
            *p = c->next;
            break;
        }
    pthread_mutex_unlock(&c->g->mutex);
}

bool grpc_generate_cancel(struct grpc_front *g, const char *id)
{
    bool found = false;
    pthread_mutex_lock(&g->mutex);
    for (struct grpc_call *c = g->generating; c && !found; c = c->next) {
        found = *id && !strcmp(c->id, id);
        if (found && !atomic_exchange(&c->cancelling, true)) front_post(c->loop, &c->cancel);
    }
    pthread_mutex_unlock(&g->mutex);
    return found;
}

/* --- the call --- */

static enum err generate_submit(struct grpc_call *c)
{
    struct front *f = c->g->front;
    struct api_call *call = &c->call;
    struct request *r;
    uint64_t most = api_max_tokens(f, call, call->prompts[0].tokens.n);
    struct stream_config config = {.loop = c->loop,
                                   .writer = &c->writer,
                                   .n_requests = 1,
                                   .n_choices = (uint32_t)call->n,
                                   .stops = call->stops,
                                   .n_stops = call->n_stops,
                                   .skip_special = true,
                                   .want_tokens = true,
                                   .min_tokens = (int32_t)call->min_tokens,
                                   .n_logprobs = call->n_logprobs,
                                   .max_tokens = most};
    if (!most) FAIL(ERR_INVALID, "'max_tokens' must be at least 1");
    TRY(stream_create(&config, &c->stream));
    TRY(api_request_create(f, call, 0, &r));
    struct histogram *h = f->metrics.histograms;
    histogram_observe(&h[METRIC_PROMPT_TOKENS], r->n_tokens, 1);
    histogram_observe(&h[METRIC_PARAMS_MAX_TOKENS], r->max_tokens, 1);
    histogram_observe(&h[METRIC_PARAMS_N], (double)call->n, 1);
    enum err e = stream_submit(c->stream, r);
    if (e) r->destroy(r);
    return e;
}

static enum err generate_begin(struct grpc_call *c, const Heddle__V1__GenerateRequest *r)
{
    struct front *f = c->g->front;
    char made[48];
    if (strlen(r->request_id) > 128) FAIL(ERR_INVALID, "'request_id' has more than 128 bytes");
    if (!r->prompt_case) FAIL(ERR_INVALID, "'text' or 'tokens' is required");
    front_make_id(f, "gen-", made);
    snprintf(c->id, sizeof c->id, "%s", *r->request_id ? r->request_id : made);
    TRY(registry_add(c));
    TRY(body_make(r, &c->call.body));
    TRY(api_completions_read(f, -1, &c->call));
    int64_t left = rpc_time_left_us(c->rpc);
    double left_s = (double)left * 1e-6;
    if (left < INT64_MAX && (!(c->call.timeout_s > 0) || left_s < c->call.timeout_s))
        c->call.timeout_s = left_s > 0.001 ? left_s : 0.001;
    int key = auth_find(&f->config.auth, auth_bearer(rpc_metadata(c->rpc, "authorization")));
    c->call.tenant = auth_tenant(&f->config.auth, key);
    if (f->config.auth.n_keys > 1) c->call.cache_salt ^= c->call.tenant ^ f->random;
    return generate_submit(c);
}

void grpc_generate(struct grpc_call *c)
{
    Heddle__V1__GenerateRequest *r = heddle__v1__generate_request__unpack(
        NULL, c->message.n, (const uint8_t *)buf_string(&c->message));
    c->writer = (struct stream_writer){.piece = on_piece, .finished = on_finished};
    api_call_init(&c->call, API_COMPLETIONS, c->g->front);
    enum err e = r ? generate_begin(c, r) : err_set(ERR_FORMAT, "the message is malformed");
    heddle__v1__generate_request__free_unpacked(r, NULL);
    buf_fini(&c->message);
    if (!e) return;
    char why[512];
    snprintf(why, sizeof why, "%s", err_detail());
    grpc_call_end(c, e, why);
}

void grpc_generate_leave(struct grpc_call *c)
{
    if (*c->id) registry_remove(c);
    c->id[0] = 0;
    if (c->stream) {
        if (c->gone) metrics_count(&c->g->front->metrics, METRIC_CANCELLED, 1);
        stream_abandon(c->stream);
    }
    c->stream = NULL;
}
