/* See stream_queue.h. A record is: length, fixed part, error text, then for each token its fixed
 * part and its alternatives. Everything is copied byte by byte around the ring's end. */
#include "coordinator/front/stream_queue.h"
#include "base/mem.h"

#include <string.h>

struct fixed { /* what is always there */
    uint32_t bytes, error_n;
    uint64_t request_id;
    int32_t choice, stop_token;
    uint32_t n_tokens, n_prompt, n_cached, n_generated;
    uint32_t finish, error, last, unused;
    int64_t queued_us, prefill_us, at_us;
};
struct token_fixed {
    int32_t token;
    uint32_t flags, n_top, has_logprob;
    float logprob;
};

size_t stream_queue_bytes(size_t n_tokens, size_t n_top)
{
    return sizeof(struct fixed) + n_tokens * (sizeof(struct token_fixed) + n_top * 8);
}

enum err stream_queue_init(struct stream_queue *q, size_t capacity)
{
    q->written = 0;
    atomic_init(&q->taken, 0);
    q->capacity = capacity;
    return mem_alloc(capacity, (void **)&q->data);
}

void stream_queue_fini(struct stream_queue *q)
{
    mem_free(q->data);
    q->data = NULL;
}

static void ring_write(struct stream_queue *q, const void *data, size_t n)
{
    size_t at = q->written % q->capacity, first = q->capacity - at < n ? q->capacity - at : n;
    if (first) memcpy(q->data + at, data, first);
    if (n > first) memcpy(q->data, (const char *)data + first, n - first);
    q->written += n;
}

static void ring_read(const struct stream_queue *q, size_t from, void *out, size_t n)
{
    size_t at = from % q->capacity, first = q->capacity - at < n ? q->capacity - at : n;
    memcpy(out, q->data + at, first);
    if (n > first) memcpy((char *)out + first, q->data, n - first);
}

bool stream_queue_put(struct stream_queue *q, const struct emission *e, int64_t at_us)
{
    size_t error_n = e->error && e->error_text ? strlen(e->error_text) : 0;
    if (error_n >= STREAM_ERROR_TEXT_MAX) error_n = STREAM_ERROR_TEXT_MAX - 1;
    size_t bytes = sizeof(struct fixed) + error_n;
    for (uint32_t i = 0; i < e->n_tokens; i++)
        bytes += sizeof(struct token_fixed) + (size_t)e->tokens[i].n_top * 8;
    size_t taken = atomic_load_explicit(&q->taken, memory_order_acquire);
    if (bytes > q->capacity - (q->written - taken)) return false;
    struct fixed f = {(uint32_t)bytes,
                      (uint32_t)error_n,
                      e->request_id,
                      e->choice,
                      e->stop_token,
                      e->n_tokens,
                      e->n_prompt,
                      e->n_cached,
                      e->n_generated,
                      (uint32_t)e->finish,
                      (uint32_t)e->error,
                      e->last,
                      0,
                      e->queued_us,
                      e->prefill_us,
                      at_us};
    ring_write(q, &f, sizeof f);
    ring_write(q, e->error_text, error_n);
    for (uint32_t i = 0; i < e->n_tokens; i++) {
        const struct step_token *t = &e->tokens[i];
        struct token_fixed tf = {t->token, t->flags, t->n_top, t->has_logprob, t->logprob};
        ring_write(q, &tf, sizeof tf);
        ring_write(q, t->top_tokens, (size_t)t->n_top * 4);
        ring_write(q, t->top_logprobs, (size_t)t->n_top * 4);
    }
    return true;
}

/* Lays the tokens out in scratch: an array of step_token, then the alternatives. */
static enum err tokens_read(const struct stream_queue *q, size_t from, const struct fixed *f,
                            struct buf *scratch, const struct step_token **out)
{
    size_t arrays = f->bytes - sizeof *f - f->error_n - f->n_tokens * sizeof(struct token_fixed);
    buf_clear(scratch);
    TRY(buf_reserve(scratch, f->n_tokens * sizeof(struct step_token) + arrays));
    struct step_token *tokens = (struct step_token *)(void *)scratch->data;
    char *at = scratch->data + f->n_tokens * sizeof *tokens;
    for (uint32_t i = 0; i < f->n_tokens; i++) {
        struct token_fixed tf;
        ring_read(q, from, &tf, sizeof tf);
        size_t n = (size_t)tf.n_top * 4;
        if (n) ring_read(q, from + sizeof tf, at, 2 * n);
        tokens[i] = (struct step_token){.token = tf.token,
                                        .flags = tf.flags,
                                        .has_logprob = tf.has_logprob,
                                        .logprob = tf.logprob,
                                        .n_top = tf.n_top,
                                        .top_tokens = (const int32_t *)(void *)at,
                                        .top_logprobs = (const float *)(void *)(at + n)};
        at += 2 * n;
        from += sizeof tf + 2 * n;
    }
    *out = tokens;
    return OK;
}

bool stream_queue_take(struct stream_queue *q, size_t visible, struct buf *scratch,
                       struct stream_record *out_record, const struct step_token **out_tokens)
{
    size_t taken = atomic_load_explicit(&q->taken, memory_order_relaxed);
    if (taken == visible) return false;
    struct fixed f;
    ring_read(q, taken, &f, sizeof f);
    *out_record = (struct stream_record){.request_id = f.request_id,
                                         .choice = f.choice,
                                         .stop_token = f.stop_token,
                                         .n_tokens = f.n_tokens,
                                         .n_prompt = f.n_prompt,
                                         .n_cached = f.n_cached,
                                         .n_generated = f.n_generated,
                                         .finish = (enum finish)f.finish,
                                         .error = (enum err)f.error,
                                         .queued_us = f.queued_us,
                                         .prefill_us = f.prefill_us,
                                         .at_us = f.at_us,
                                         .last = f.last};
    ring_read(q, taken + sizeof f, out_record->error_text, f.error_n);
    *out_tokens = NULL;
    if (tokens_read(q, taken + sizeof f + f.error_n, &f, scratch, out_tokens)) {
        out_record->error = ERR_NO_MEMORY;
        out_record->finish = FINISH_ERROR;
        out_record->n_tokens = 0;
    }
    atomic_store_explicit(&q->taken, taken + f.bytes, memory_order_release);
    return true;
}
