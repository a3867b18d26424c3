/* Heddle's client library for C: generate, cancel, tokenize, and ask how a server is.
 *
 *     struct heddle_options options = {.address = "127.0.0.1:8001", .token =
 * getenv("HEDDLE_API_KEY")}; struct heddle_client *client; if (heddle_connect(&options, &client))
 * die(heddle_last_error()); struct heddle_request request = {.text = "Once upon a time"}; if
 * (heddle_generate(client, &request, print_reply, NULL)) die(heddle_last_error());
 *     heddle_close(client);
 *
 * Link with -lheddle_client. A client may be used by many threads at once. Every function that can
 * fail returns a status, HEDDLE_OK being 0; heddle_last_error() words this thread's last failure.
 * Strings are UTF-8; structs are to be zeroed first, so that new fields keep their defaults. */
#ifndef HEDDLE_CLIENT_H
#define HEDDLE_CLIENT_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* The numbers of gRPC statuses. */
enum heddle_status {
    HEDDLE_OK = 0,
    HEDDLE_CANCELLED = 1, /* by the callback, heddle_cancel or the server */
    HEDDLE_INVALID = 3,   /* the request is refused: heddle_last_error() says why */
    HEDDLE_DEADLINE = 4,
    HEDDLE_NOT_FOUND = 5, /* no such model */
    HEDDLE_BUSY = 8,      /* a queue or limit is full: try again later */
    HEDDLE_UNSUPPORTED = 12,
    HEDDLE_INTERNAL = 13,
    HEDDLE_UNAVAILABLE = 14, /* nobody answers at the address, or no worker is ready */
    HEDDLE_UNAUTHENTICATED = 16
};
const char *heddle_last_error(void); /* "" before any failure; valid until the thread's next one */
const char *heddle_version(void);

/* ---- Connecting ---- */

struct heddle_options {
    const char *address;   /* "host:port" or "unix:/path" */
    const char *token;     /* API key; NULL = none */
    const char *ca_file;   /* PEM; NULL = no TLS */
    const char *cert_file; /* PEM, with key_file: shown to a server that asks for one */
    const char *key_file;
    const char *server_name; /* expected in the server's certificate; NULL = the host of address */
};
struct heddle_client;
/* Does not dial yet: the first call does, and calls after a loss dial again. */
int heddle_connect(const struct heddle_options *options, struct heddle_client **out_client);
/* Ends calls that other threads still wait for. Accepts NULL. */
void heddle_close(struct heddle_client *client);

/* ---- Generating ---- */

/* Which fields of heddle_sampling are given; the others take the model's defaults. */
enum heddle_sampling_field {
    HEDDLE_TEMPERATURE = 1 << 0,
    HEDDLE_TOP_K = 1 << 1,
    HEDDLE_TOP_P = 1 << 2,
    HEDDLE_MIN_P = 1 << 3,
    HEDDLE_REPETITION_PENALTY = 1 << 4,
    HEDDLE_PRESENCE_PENALTY = 1 << 5,
    HEDDLE_FREQUENCY_PENALTY = 1 << 6,
    HEDDLE_SEED = 1 << 7,
    HEDDLE_MAX_TOKENS = 1 << 8,
    HEDDLE_MIN_TOKENS = 1 << 9,
    HEDDLE_LOGPROBS = 1 << 10,
    HEDDLE_CHOICES = 1 << 11
};
struct heddle_sampling {
    unsigned given; /* HEDDLE_TEMPERATURE | ... */
    float temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
    int32_t top_k, logprobs; /* logprobs: alternatives to tell, 0 = of the chosen token only */
    uint64_t seed;
    uint32_t max_tokens, min_tokens, choices;
    int ignore_eos;
    const char *const *stop; /* [n_stop] strings that end a choice */
    size_t n_stop;
    const uint32_t *stop_tokens; /* [n_stop_tokens] */
    size_t n_stop_tokens;
    const uint32_t *bias_tokens; /* [n_bias] */
    const float *bias_values;    /* [n_bias] */
    size_t n_bias;
};

struct heddle_request {
    const char *text;       /* the prompt, or NULL and */
    const uint32_t *tokens; /* [n_tokens] its token ids */
    size_t n_tokens;
    const char *request_id; /* NULL = the server makes one; needed for heddle_cancel */
    const char *model;      /* NULL = the one that is served */
    const char *cache_salt; /* prefixes are shared only among equal salts; NULL = none */
    int32_t priority;       /* lower runs first */
    uint32_t timeout_ms;    /* of the whole call; 0 = none */
    struct heddle_sampling sampling;
};

struct heddle_logprob {
    uint32_t token;
    float logprob;
    const char *text; /* [text_bytes] the token's bytes, perhaps half a character */
    size_t text_bytes;
};
struct heddle_token_logprobs {
    struct heddle_logprob chosen;
    const struct heddle_logprob *top; /* [n_top] */
    size_t n_top;
};
/* News of one choice. Everything is valid only during the callback. */
struct heddle_reply {
    const char *request_id;
    uint32_t choice;
    const char *text;       /* complete characters that are new */
    const uint32_t *tokens; /* [n_tokens] */
    size_t n_tokens;
    const struct heddle_token_logprobs *logprobs; /* [n_logprobs], when asked for */
    size_t n_logprobs;
    const char *finish_reason; /* "" until the choice's last reply: "stop", "length", "cancelled" */
    uint32_t prompt_tokens, completion_tokens, cached_tokens; /* in the last reply */
};
/* Called on the thread that called heddle_generate. Not 0 = stop: heddle_generate cancels the
 * request and returns HEDDLE_CANCELLED. While it runs the server is held back by flow control. */
typedef int (*heddle_reply_fn)(void *ctx, const struct heddle_reply *reply);

/* Generates, calling on_reply for every piece, until the last one. */
int heddle_generate(struct heddle_client *client, const struct heddle_request *request,
                    heddle_reply_fn on_reply, void *ctx);
/* Ends a request by its id, from any thread or process. HEDDLE_NOT_FOUND when it is not running. */
int heddle_cancel(struct heddle_client *client, const char *request_id);

/* ---- Tokens ---- */

/* Writes at most capacity ids and how many there are; HEDDLE_BUSY when that is more than capacity
 * (nothing is written then but the number). model may be NULL. */
int heddle_tokenize(struct heddle_client *client, const char *model, const char *text,
                    int add_special_tokens, uint32_t *out_ids, size_t capacity, size_t *out_n);
/* Writes the text, NUL-terminated, and its length; HEDDLE_BUSY when capacity does not hold both. */
int heddle_detokenize(struct heddle_client *client, const char *model, const uint32_t *ids,
                      size_t n, char *out_text, size_t capacity, size_t *out_n);

/* ---- The server ---- */

struct heddle_model {
    char name[256], version[64];
    uint32_t context_max, vocab_size, eos_token, tensor_parallel;
    uint32_t groups, groups_ready; /* replicas configured, and those that can answer now */
};
int heddle_model_info(struct heddle_client *client, const char *model,
                      struct heddle_model *out_model);
/* service: "" or NULL the whole, "liveness", "readiness". Needs no token. */
int heddle_health(struct heddle_client *client, const char *service, int *out_serving);

#ifdef __cplusplus
}
#endif
#endif
