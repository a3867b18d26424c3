/* A stream: one call's way back from the engine to whoever asked.
 *
 * The engine's thread copies emissions into a bounded queue and, once a step, marks the stream
 * ready and wakes its loop. The loop's thread takes them out, turns tokens into text, finds stop
 * strings, and gives pieces to a writer (SSE, one JSON answer, gRPC). A stream outlives its writer
 * until the engine has said its last word about every request of it.
 *
 * It must never know JSON, HTTP or gRPC. */
#pragma once
#include "coordinator/front/front.h"
#include "coordinator/front/stop_match.h"

enum { STREAM_TOP_MAX = 32, STREAM_REQUESTS_MAX = 1024, STREAM_CHOICES_MAX = 1024 };

struct stream_token {
    int32_t token;
    bool has_logprob;
    float logprob;
    uint32_t n_top;
    int32_t top_tokens[STREAM_TOP_MAX];
    float top_logprobs[STREAM_TOP_MAX];
    uint64_t start_bytes; /* of its text within the choice's text */
    uint64_t start_chars;
};

/* News of one choice. Valid during the call. */
struct stream_piece {
    uint32_t choice; /* request index times n, plus the choice within the request */
    struct span text;
    const struct stream_token *tokens; /* [n_tokens] whose text has been given by now */
    size_t n_tokens;
    uint32_t n_generated; /* of the choice so far */
    enum finish finish;   /* FINISH_NONE: goes on */
    int stop_index;       /* the stop string that ended it, or -1 */
    int32_t stop_token;   /* the stop token that ended it, or -1 */
};

struct stream_writer {
    void (*piece)(struct stream_writer *w, const struct stream_piece *p);
    /* Logprobs of prompt tokens, in order; before the first piece of their request. May be NULL. */
    void (*scored)(struct stream_writer *w, uint32_t request, const struct stream_token *tokens,
                   size_t n);
    void (*flush)(struct stream_writer *w); /* after the pieces of one wake; may be NULL */
    /* Every choice has ended, or the call failed. The stream forgets the writer before. */
    void (*finished)(struct stream_writer *w, enum err e, const char *why);
};

struct stream_usage {
    uint64_t prompt_tokens, completion_tokens, cached_tokens;
};

struct stream_config {
    struct front_loop *loop;
    struct stream_writer *writer;
    uint32_t n_requests, n_choices; /* choices of each request */
    const struct span *stops;       /* [n_stops], copied */
    unsigned n_stops;
    bool keep_stop, skip_special, want_tokens;
    int32_t min_tokens;
    int n_logprobs;           /* alternatives of each token, -1 = none */
    uint64_t n_prompt_scored; /* prompt tokens whose logprobs come */
    uint64_t max_tokens;      /* of a choice */
};

enum err stream_create(const struct stream_config *config, struct stream **out);
/* Submits the next request, made of one mem_alloc; takes it over on OK and sets its sink and id.
 * When one fails, stream_abandon must follow. */
enum err stream_submit(struct stream *s, struct request *r);
/* The writer is gone: cancels what runs; the stream frees itself when the engine is through. */
void stream_abandon(struct stream *s);
void stream_usage_get(const struct stream *s, struct stream_usage *out);
/* Ends every choice as cancelled: the writer hears it as FINISH_CANCELLED. */
void stream_cancel(struct stream *s);
/* On the loop's thread: takes what the engine has said since. */
void stream_pump_ready(struct front_loop *l);
