/* The small routes: health, version, models, metrics, the chat page. */
#include "base/json.h"
#include "coordinator/front/api_error.h"
#include "coordinator/front/routes.h"

#include <string.h>

static void reply_json(struct front *f, struct http_exchange *x, struct buf *body)
{
    if (buf_err(body))
        route_error(f, x, ERR_NO_MEMORY, "");
    else
        http_exchange_reply(x, 200, "application/json", buf_string(body), body->n);
    buf_fini(body);
}

/* 200 only when a request would be answered. */
void route_health(struct front *f, struct http_exchange *x, const struct route_caller *caller)
{
    (void)caller;
    if (front_ready(f)) {
        http_exchange_reply(x, 200, "application/json", "{\"status\":\"ok\"}", 15);
        return;
    }
    struct front_cluster c;
    char why[160];
    front_cluster_get(f, &c);
    if (atomic_load(&f->draining))
        snprintf(why, sizeof why, "draining: no new requests");
    else
        snprintf(why, sizeof why, "no group is ready: %u of %u workers have joined",
                 c.workers_alive, c.workers_expected);
    route_error(f, x, ERR_NOT_READY, why);
}

void route_live(struct front *f, struct http_exchange *x, const struct route_caller *caller)
{
    (void)f, (void)caller;
    http_exchange_reply(x, 200, "application/json", "{\"status\":\"ok\"}", 15);
}

void route_version(struct front *f, struct http_exchange *x, const struct route_caller *caller)
{
    (void)f, (void)caller;
    static const char body[] = "{\"version\":\"" HEDDLE_VERSION "\"}";
    http_exchange_reply(x, 200, "application/json", body, sizeof body - 1);
}

static void model_write(struct front *f, unsigned i, struct buf *out)
{
    const char *name = f->config.names[i], *root = f->config.model_path;
    buf_add_string(out, "{\"id\":");
    json_write_string(out, name, strlen(name));
    buf_printf(out, ",\"object\":\"model\",\"created\":%lld,\"owned_by\":\"heddle\",\"root\":",
               (long long)f->started_unix_s);
    /* The last part of the path only: where models lie is nobody's business. */
    const char *slash = root ? strrchr(root, '/') : NULL;
    const char *base = slash && slash[1] ? slash + 1 : root ? root : name;
    json_write_string(out, base, strlen(base));
    buf_printf(out, ",\"parent\":null,\"max_model_len\":%u}", front_context_max(f));
}

void route_models(struct front *f, struct http_exchange *x, const struct route_caller *caller)
{
    (void)caller;
    struct buf body;
    buf_init(&body, 0);
    buf_add_string(&body, "{\"object\":\"list\",\"data\":[");
    for (unsigned i = 0; i < f->config.n_names; i++) {
        if (i) buf_add_char(&body, ',');
        model_write(f, i, &body);
    }
    buf_add_string(&body, "]}");
    reply_json(f, x, &body);
}

void route_model(struct front *f, struct http_exchange *x, const struct route_caller *caller)
{
    (void)caller;
    struct buf name, body;
    buf_init(&name, 0);
    buf_init(&body, 0);
    enum err e = route_argument(x, http_exchange_tag(x), &name);
    bool found = false;
    for (unsigned i = 0; !e && i < f->config.n_names && !found; i++) {
        found = !strcmp(buf_string(&name), f->config.names[i]);
        if (found) model_write(f, i, &body);
    }
    if (found) {
        reply_json(f, x, &body);
    } else {
        char why[256];
        snprintf(why, sizeof why, "the model '%.180s' does not exist", buf_string(&name));
        route_error(f, x, e ? e : ERR_NO_ROUTE, e ? err_detail() : why);
    }
    buf_fini(&name);
}

void route_metrics(struct front *f, struct http_exchange *x, const struct route_caller *caller)
{
    (void)caller;
    struct engine_stats stats = {0};
    struct front_cluster c;
    struct buf body;
    engine_loop_stats(f->config.engine, &stats);
    front_cluster_get(f, &c);
    struct metrics_snapshot s = {.model_name = f->config.names[0],
                                 .engine = &stats,
                                 .workers_expected = c.workers_expected,
                                 .workers_alive = c.workers_alive,
                                 .epoch = c.epoch,
                                 .draining = atomic_load(&f->draining),
                                 .n_connections = http_loop_connections(http_exchange_loop(x))};
    buf_init(&body, 0);
    if (metrics_write(&f->metrics, &s, &body))
        route_error(f, x, ERR_NO_MEMORY, "");
    else
        http_exchange_reply(x, 200, "text/plain; version=0.0.4; charset=utf-8", body.data, body.n);
    buf_fini(&body);
}

extern const char page_html[];
extern const unsigned page_html_bytes;

void route_page(struct front *f, struct http_exchange *x, const struct route_caller *caller)
{
    (void)caller;
    if (!f->config.webui) {
        route_error(f, x, ERR_NO_ROUTE, "the chat page is switched off");
        return;
    }
    http_exchange_header(x, "Cache-Control", "no-cache");
    http_exchange_header(x, "Content-Security-Policy",
                         "default-src 'none'; script-src 'unsafe-inline'; style-src "
                         "'unsafe-inline'; connect-src 'self'; img-src data:; base-uri 'none'; "
                         "form-action 'none'; frame-ancestors 'none'");
    http_exchange_reply(x, 200, "text/html; charset=utf-8", page_html, page_html_bytes);
}
