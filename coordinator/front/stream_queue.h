/* The queue between the engine's thread and a stream: emissions as bytes in a ring.
 *
 * One writer, one reader, no allocation after its creation. What was written becomes visible when
 * the reader is told how far it may read (the writer publishes once a step, under the loop's lock).
 *
 * It must never know text or HTTP. */
#pragma once
#include "base/buf.h"
#include "coordinator/engine/engine.h"

#include <stdatomic.h>

struct stream_queue {
    char *data; /* [capacity] */
    size_t capacity;
    size_t written;      /* bytes ever, the writer's own */
    atomic_size_t taken; /* bytes ever, by the reader */
};

/* An emission as it travels. Tokens follow it as struct step_token values whose pointers lead into
 * the copy. */
enum { STREAM_ERROR_TEXT_MAX = 256 };
struct stream_record {
    uint64_t request_id;
    int32_t choice, stop_token;
    uint32_t n_tokens, n_prompt, n_cached, n_generated;
    enum finish finish;
    enum err error;
    int64_t queued_us, prefill_us, at_us;
    bool last;
    char error_text[STREAM_ERROR_TEXT_MAX]; /* "" without an error */
};

/* Bytes that one emission of n_tokens tokens with n_top alternatives each takes at most. */
size_t stream_queue_bytes(size_t n_tokens, size_t n_top);
enum err stream_queue_init(struct stream_queue *q, size_t capacity);
void stream_queue_fini(struct stream_queue *q);
/* The writer's. False when there is no room: nothing was written. */
bool stream_queue_put(struct stream_queue *q, const struct emission *e, int64_t at_us);
/* The reader's: the next emission before `visible`, its tokens in `scratch` until the next call.
 * False when there is none. ERR_NO_MEMORY is told by out_record->error. */
bool stream_queue_take(struct stream_queue *q, size_t visible, struct buf *scratch,
                       struct stream_record *out_record, const struct step_token **out_tokens);
