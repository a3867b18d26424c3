/* OpenAI's answers: one JSON document, or server-sent events.
 *
 * An answer is the writer of a stream. It owns the parsed call and the exchange until either is
 * over, and dies with `finished` or when the client leaves. It must never know the engine. */
#pragma once
#include "coordinator/front/api.h"
#include "coordinator/front/stream.h"
#include "coordinator/front/text_pool.h"

struct openai_scored { /* logprobs of a prompt's tokens, the last n of them */
    struct stream_token *tokens;
    size_t n, capacity;
};

struct openai_choice {
    struct buf text; /* not streamed: the whole text */
    struct buf tokens, values, tops,
        offsets;         /* completions: JSON items of logprobs since last out */
    struct buf content;  /* chat: the same */
    struct buf ids;      /* token ids, when asked for */
    uint64_t base_chars; /* characters before the generated text: the echo's */
    bool begun;          /* role or echo are out */
    enum finish finish;
    int stop_index;
    int32_t stop_token;
};

struct openai_answer {
    struct stream_writer writer; /* first */
    struct front *front;
    struct http_exchange *x;
    struct stream *stream;
    struct api_call call;
    char id[48];
    struct buf head;               /* the beginning of each chunk, up to its choices */
    struct buf out;                /* events of this wake, or the document */
    struct openai_choice *choices; /* [n_choices] */
    uint32_t n_choices;
    struct openai_scored *scored; /* [call.n_prompts] when prompts are scored */
    bool started;
    struct text_job parse; /* of a long body, on another thread */
    struct buf body;
    uint64_t tenant, salt;
    enum err parse_err;
    char parse_why[512];
};

/* Parses the body, submits, and answers x, now or later. */
void openai_completions(struct front *f, struct http_exchange *x, uint64_t tenant, uint64_t salt);
void openai_chat(struct front *f, struct http_exchange *x, uint64_t tenant, uint64_t salt);

/* --- between the files of this part --- */
struct openai_choice *openai_choice_of(struct openai_answer *a, uint32_t index);
const char *openai_finish_word(enum finish finish);
/* Appends `"logprobs":…` of what has gathered since the last call, null when not asked for. */
void openai_logprobs_write(struct openai_answer *a, struct openai_choice *c, struct buf *out);
/* Gathers one generated token. */
void openai_logprobs_add(struct openai_answer *a, struct openai_choice *c,
                         const struct stream_token *t);
/* Gathers the prompt of choice `index` for an echo; appends its text to out_text. */
void openai_echo_add(struct openai_answer *a, uint32_t index, struct buf *out_text);
