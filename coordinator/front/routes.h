/* Every route of the HTTP port, one row each: path, methods, who may call it, what runs.
 *
 * A path without a row answers 404 to everybody: nothing is served by accident. */
#pragma once
#include "coordinator/front/front.h"

enum route_access {
    ROUTE_OPEN, /* probes, metrics, the page itself: no key */
    ROUTE_KEY,  /* an API key, where keys are configured */
};

struct route_caller {
    uint64_t tenant; /* whose key; 0 without keys */
    uint64_t salt;   /* prefixes of different keys are not shared */
};

struct route {
    const char *path;
    bool prefix;      /* the path's tail is an argument */
    unsigned methods; /* of enum http_method; HEAD goes with GET, OPTIONS with all */
    enum route_access access;
    void (*handle)(struct front *f, struct http_exchange *x, const struct route_caller *caller);
};
extern const struct route routes[];
extern const unsigned n_routes;

/* The callbacks of the HTTP server; ctx is the struct front. */
void routes_handle(void *ctx, struct http_exchange *x);
void routes_refuse(void *ctx, struct http_exchange *x, enum err e, const char *why);
void routes_headers(void *ctx, struct http_exchange *x);
void routes_ended(void *ctx, struct http_exchange *x, int status, int64_t took_us);

/* Answers x with the error's status and OpenAI's body. why "" = the kind's own text. */
void route_error(struct front *f, struct http_exchange *x, enum err e, const char *why);
/* The path after the route's own, with escapes undone. */
enum err route_argument(struct http_exchange *x, const struct route *r, struct buf *out);

/* --- handlers, one file a noun --- */
typedef void route_handler(struct front *f, struct http_exchange *x,
                           const struct route_caller *caller);
route_handler route_completions, route_chat, route_tokenize, route_detokenize;
route_handler route_models, route_model, route_health, route_live, route_version, route_metrics;
route_handler route_page;
