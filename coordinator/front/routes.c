/* The table of routes, and the way of an HTTP request to its row: CORS, key, method. See routes.h.
 */
#include "coordinator/front/routes.h"
#include "base/json.h"
#include "base/log.h"
#include "coordinator/front/api_error.h"
#include "coordinator/front/openai.h"

#include <stdio.h>
#include <string.h>
#include <strings.h>

#define GET  HTTP_METHOD_GET
#define POST HTTP_METHOD_POST

// clang-format off
const struct route routes[] = {
    /* path                   prefix  methods  access      handler */
    {"/v1/completions",       false,  POST,    ROUTE_KEY,  route_completions},
    {"/v1/chat/completions",  false,  POST,    ROUTE_KEY,  route_chat},
    {"/v1/models",            false,  GET,     ROUTE_KEY,  route_models},
    {"/v1/models/",           true,   GET,     ROUTE_KEY,  route_model},
    {"/tokenize",             false,  POST,    ROUTE_KEY,  route_tokenize},
    {"/detokenize",           false,  POST,    ROUTE_KEY,  route_detokenize},
    {"/health",               false,  GET,     ROUTE_OPEN, route_health},
    {"/healthz",              false,  GET,     ROUTE_OPEN, route_health},
    {"/readyz",               false,  GET,     ROUTE_OPEN, route_health},
    {"/ping",                 false,  GET|POST, ROUTE_OPEN, route_health},
    {"/v1/health",            false,  GET,     ROUTE_OPEN, route_health},
    {"/live",                 false,  GET,     ROUTE_OPEN, route_live},
    {"/livez",                false,  GET,     ROUTE_OPEN, route_live},
    {"/version",              false,  GET,     ROUTE_OPEN, route_version},
    {"/metrics",              false,  GET,     ROUTE_OPEN, route_metrics},
    {"/",                     false,  GET,     ROUTE_OPEN, route_page},
};
// clang-format on
const unsigned n_routes = sizeof routes / sizeof *routes;

void route_completions(struct front *f, struct http_exchange *x, const struct route_caller *caller)
{
    openai_completions(f, x, caller->tenant, caller->salt);
}

void route_chat(struct front *f, struct http_exchange *x, const struct route_caller *caller)
{
    openai_chat(f, x, caller->tenant, caller->salt);
}

static const struct route *find(struct span path)
{
    while (path.n > 1 && path.data[path.n - 1] == '/')
        path.n--;
    for (unsigned i = 0; i < n_routes; i++) {
        size_t n = strlen(routes[i].path);
        if (path.n < n || memcmp(path.data, routes[i].path, n)) continue;
        if (path.n == n ? !routes[i].prefix : routes[i].prefix) return &routes[i];
    }
    return NULL;
}

enum err route_argument(struct http_exchange *x, const struct route *r, struct buf *out)
{
    struct span path = http_exchange_head(x)->path;
    size_t n = strlen(r->path);
    return http_percent_decode((struct span){path.data + n, path.n - n}, out);
}

/* Probes that find the server not ready are no rejected requests. */
static void count_rejection(struct front *f, struct http_exchange *x, enum err e, int status)
{
    struct metrics *m = &f->metrics;
    const struct route *r = http_exchange_tag(x);
    if (r && r->access == ROUTE_OPEN) return;
    if (e == ERR_FULL)
        metrics_count(m, METRIC_REJECTED_FULL, 1);
    else if (e == ERR_UNAUTHORIZED)
        metrics_count(m, METRIC_REJECTED_AUTH, 1);
    else if (e == ERR_NOT_READY)
        metrics_count(m, METRIC_REJECTED_NOT_READY, 1);
    else if (status < 500)
        metrics_count(m, METRIC_REJECTED_INVALID, 1);
}

static void error_reply(struct front *f, struct http_exchange *x, int status, enum err e,
                        const char *why)
{
    struct buf body;
    buf_init(&body, 0);
    api_error_write(&body, e, why);
    count_rejection(f, x, e, status);
    if (status >= 500 && status != 501 && e != ERR_NOT_READY && e != ERR_DEADLINE)
        log_error("http: %s answered with %d: %s", http_exchange_name(x), status, why);
    if (status == 429) {
        char seconds[16];
        snprintf(seconds, sizeof seconds, "%u",
                 f->config.engine ? engine_loop_retry_after_s(f->config.engine) : 1);
        http_exchange_header(x, "Retry-After", seconds);
    }
    if (status == 503) http_exchange_header(x, "Retry-After", "2");
    if (status == 401) http_exchange_header(x, "WWW-Authenticate", "Bearer");
    http_exchange_reply(x, status, "application/json", buf_string(&body), body.n);
    buf_fini(&body);
}

void route_error(struct front *f, struct http_exchange *x, enum err e, const char *why)
{
    error_reply(f, x, api_error_status(e), e, why);
}

/* --- CORS --- */

static bool origin_allowed(const struct front *f, struct span origin)
{
    for (unsigned i = 0; i < f->config.n_origins; i++) {
        const char *o = f->config.origins[i];
        if (!strcmp(o, "*") || span_equal(origin, o)) return true;
    }
    return false;
}

void routes_headers(void *ctx, struct http_exchange *x)
{
    struct front *f = ctx;
    struct span origin = http_head_find(http_exchange_head(x), "origin");
    if (*http_exchange_name(x)) http_exchange_header(x, "X-Request-Id", http_exchange_name(x));
    http_exchange_header(x, "X-Content-Type-Options", "nosniff");
    if (!f->config.n_origins || !origin.n || origin.n > 512 || !origin_allowed(f, origin)) return;
    char text[520];
    memcpy(text, origin.data, origin.n);
    text[origin.n] = 0;
    http_exchange_header(x, "Access-Control-Allow-Origin", text);
    http_exchange_header(x, "Vary", "Origin");
    http_exchange_header(x, "Access-Control-Expose-Headers", "X-Request-Id, Retry-After");
}

static void methods_text(const struct route *r, char out[64])
{
    snprintf(out, 64, "%s%sOPTIONS", r->methods & GET ? "GET, HEAD, " : "",
             r->methods & POST ? "POST, " : "");
}

static void preflight(struct http_exchange *x, const struct route *r)
{
    char methods[64];
    methods_text(r, methods);
    http_exchange_header(x, "Allow", methods);
    if (http_head_find(http_exchange_head(x), "access-control-request-method").n) {
        http_exchange_header(x, "Access-Control-Allow-Methods", methods);
        http_exchange_header(x, "Access-Control-Allow-Headers",
                             "Authorization, Content-Type, X-Request-Id, X-Api-Key, "
                             "X-Stainless-Arch, X-Stainless-Lang, X-Stainless-OS, "
                             "X-Stainless-Package-Version, X-Stainless-Retry-Count, "
                             "X-Stainless-Runtime, X-Stainless-Runtime-Version, "
                             "X-Stainless-Timeout, OpenAI-Organization, OpenAI-Project");
        http_exchange_header(x, "Access-Control-Max-Age", "600");
    }
    http_exchange_reply(x, 204, NULL, NULL, 0);
}

/* --- a request's way --- */

static bool is_name(struct span s)
{
    for (size_t i = 0; i < s.n; i++)
        if (s.data[i] <= ' ' || s.data[i] > '~') return false;
    return s.n > 0 && s.n <= 128;
}

static void name_exchange(struct front *f, struct http_exchange *x)
{
    struct span given = http_head_find(http_exchange_head(x), "x-request-id");
    char made[48];
    if (!is_name(given)) {
        front_make_id(f, "req-", made);
        given = span_of(made);
    }
    http_exchange_set_name(x, given);
}

/* Whose key came with the request. False when there was none that is known. */
static bool caller_find(const struct front *f, const struct http_head *head,
                        struct route_caller *out)
{
    const struct auth *auth = &f->config.auth;
    *out = (struct route_caller){0};
    if (!auth->n_keys) return true;
    struct span key = auth_bearer(http_head_find(head, "authorization"));
    if (!key.n) key = http_head_find(head, "x-api-key");
    int index = auth_find(auth, key);
    if (index < 0) return false;
    out->tenant = auth_tenant(auth, index);
    if (auth->n_keys > 1) out->salt = out->tenant ^ f->random;
    return true;
}

void routes_handle(void *ctx, struct http_exchange *x)
{
    struct front *f = ctx;
    const struct http_head *head = http_exchange_head(x);
    const struct route *r = find(head->path);
    struct route_caller caller;
    name_exchange(f, x);
    if (!r) {
        char why[160];
        snprintf(why, sizeof why, "there is nothing at %.*s",
                 head->path.n < 100 ? (int)head->path.n : 100, head->path.data);
        route_error(f, x, ERR_NO_ROUTE, why);
        return;
    }
    http_exchange_set_tag(x, r);
    if (head->method == HTTP_METHOD_OPTIONS) {
        preflight(x, r);
        return;
    }
    unsigned method = head->method == HTTP_METHOD_HEAD ? GET : head->method;
    if (!(r->methods & method)) {
        char methods[64], why[128];
        methods_text(r, methods);
        http_exchange_header(x, "Allow", methods);
        snprintf(why, sizeof why, "%s takes %s only", r->path, methods);
        error_reply(f, x, 405, ERR_INVALID, why);
        return;
    }
    bool known = caller_find(f, head, &caller);
    if (!known && r->access != ROUTE_OPEN) {
        route_error(f, x, ERR_UNAUTHORIZED,
                    "a valid API key is required: Authorization: Bearer KEY");
        return;
    }
    r->handle(f, x, &caller);
}

void routes_refuse(void *ctx, struct http_exchange *x, enum err e, const char *why)
{
    int status = api_error_status(e);
    if (e == ERR_TIMEOUT)
        status = 408;
    else if (e == ERR_TOO_BIG && strstr(why, "header"))
        status = 431;
    else if (e == ERR_UNSUPPORTED)
        status = 501;
    error_reply(ctx, x, status, e, why);
}

void routes_ended(void *ctx, struct http_exchange *x, int status, int64_t took_us)
{
    struct front *f = ctx;
    const struct route *r = http_exchange_tag(x);
    const struct http_head *head = http_exchange_head(x);
    const char *method = head->method == HTTP_METHOD_GET       ? "GET"
                         : head->method == HTTP_METHOD_POST    ? "POST"
                         : head->method == HTTP_METHOD_HEAD    ? "HEAD"
                         : head->method == HTTP_METHOD_OPTIONS ? "OPTIONS"
                                                               : "other";
    metrics_http(&f->metrics, r ? r->path : "none", method, status, took_us);
    if (f->config.log_requests)
        log_info("http: %s %s %s %d %.3f s", http_exchange_name(x), method, r ? r->path : "-",
                 status, (double)took_us * 1e-6);
}
