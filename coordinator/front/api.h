/* What a client asked for, read from JSON: every field typed, range-checked, and named when wrong.
 *
 * A call is parsed once, wholly, before anything is started for it. Fields that would change the
 * answer and are not served are refused by name; fields that change nothing are accepted and
 * ignored, as other servers and benchmark tools expect. gRPC fills the same struct.
 *
 * It must never know HTTP. */
#pragma once
#include "base/json.h"
#include "coordinator/front/front.h"
#include "coordinator/front/stop_match.h"

enum {
    API_PROMPTS_MAX = 1024, /* in one call; times n also at most so many choices */
    API_N_MAX = 128,
    API_BEAMS_MAX = 64,
    API_BIAS_MAX = 1024,
    API_STOP_IDS_MAX = 160, /* the client's and the model's */
};

enum api_kind { API_COMPLETIONS, API_CHAT };

struct api_prompt {
    struct token_list tokens;
    struct span text; /* as given; data NULL when ids were given */
};

struct api_call {
    enum api_kind kind;
    json_t *body; /* owned; strings below point into it; NULL for gRPC */
    const char *model;
    bool stream, include_usage, continuous_usage, echo, keep_stop, skip_special, ignore_eos;
    bool early_stopping, never_early, greedy_seed, no_prefix_cache, return_token_ids;
    int64_t n, best_of, beam_width; /* best_of 0 = n, beam_width 0 = sampling */
    double length_penalty, timeout_s;
    int64_t max_tokens, min_tokens; /* max_tokens -1 = not said */
    int n_logprobs;                 /* alternatives to return, -1 = no logprobs */
    bool has_seed;
    struct sampling_params sampling;
    int32_t bias_tokens[API_BIAS_MAX], stop_ids[API_STOP_IDS_MAX];
    float bias_values[API_BIAS_MAX];
    int n_client_stop_ids; /* the first so many of stop_ids */
    struct span stops[STOP_STRINGS_MAX];
    unsigned n_stops;
    int32_t priority;
    uint64_t cache_salt, tenant;
    struct api_prompt *prompts; /* [n_prompts], owned */
    uint32_t n_prompts;
    struct buf text; /* the rendered chat */
};

/* Defaults of a call: the server's. */
void api_call_init(struct api_call *call, enum api_kind kind, const struct front *f);
void api_call_fini(struct api_call *call); /* accepts zeroed memory */

/* Reads a whole body. ERR_INVALID naming the field; ERR_NO_ROUTE: no such model. */
enum err api_completions_parse(struct front *f, struct span body, struct api_call *call);
/* The same for a body that is in call->body already. max_tokens: what it is when not said, -1 = as
 * many as fit. */
enum err api_completions_read(struct front *f, int64_t max_tokens, struct api_call *call);
enum err api_chat_parse(struct front *f, struct span body, struct api_call *call);

/* The parts, for those who read other bodies. */
enum err api_object_parse(struct span body, json_t **out);
enum err api_model_check(const struct front *f, const char *model, const char **out_name);
/* Renders messages, tools and the rest of a chat body through the model's template. */
enum err api_chat_render(struct front *f, const json_t *body, struct buf *out);
enum err api_prompts_reserve(struct api_call *call, uint32_t n);
enum err api_prompt_text(struct front *f, struct api_prompt *p, struct span text, unsigned flags);
enum err api_prompt_ids(struct front *f, struct api_prompt *p, const json_t *ids, const char *key);
enum err api_add_stop_id(struct front *f, struct api_call *call, int64_t id);
enum err api_add_bias(struct front *f, struct api_call *call, int64_t id, double value);
/* Checks that need the whole call (lengths, sums), after the prompts are known. */
enum err api_call_check(struct front *f, struct api_call *call);
/* Output tokens of a choice when prompt has n_prompt tokens. */
uint32_t api_max_tokens(struct front *f, const struct api_call *call, size_t n_prompt);
/* The engine's request of one prompt; it owns its memory. */
enum err api_request_create(struct front *f, const struct api_call *call, uint32_t prompt,
                            struct request **out);
