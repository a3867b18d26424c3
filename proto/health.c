/* The health service. Watchers are few and bounded; a thread, started by the first of them, looks
 * whether what they watch has changed. */
#include "proto/health.h"
#include "base/mem.h"
#include "proto/envelope.h"
#include "proto/health.pb-c.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

enum { SERVICE_NAME_MAX = 256 };

struct watcher {
    struct rpc_call *call;
    char service[SERVICE_NAME_MAX];
    enum health_status told;
};

struct health {
    struct health_config config;
    pthread_t thread;
    pthread_mutex_t mutex; /* of what follows */
    pthread_cond_t work;
    bool has_thread, stop, changed;
    struct watcher *watchers[HEALTH_WATCHERS_MAX];
    size_t n_watchers;
};

static void status_send(struct rpc_call *call, enum health_status status)
{
    Grpc__Health__V1__HealthCheckResponse r = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    r.status = (Grpc__Health__V1__HealthCheckResponse__ServingStatus)status;
    if (envelope_send(call, &r.base) == ERR_FULL) rpc_cancel(call);
}

/* Copies the service's name; false when the request is malformed and has been answered. */
static bool service_read(struct rpc_call *call, struct span bytes, char out[SERVICE_NAME_MAX])
{
    Grpc__Health__V1__HealthCheckRequest *r = NULL;
    if (bytes.n <= SERVICE_NAME_MAX + 16)
        r = grpc__health__v1__health_check_request__unpack(NULL, bytes.n,
                                                           (const uint8_t *)bytes.data);
    bool ok = r && strlen(r->service) < SERVICE_NAME_MAX;
    if (ok)
        snprintf(out, SERVICE_NAME_MAX, "%s", r->service);
    else
        rpc_finish(call, RPC_INVALID_ARGUMENT, "not a HealthCheckRequest");
    if (r) grpc__health__v1__health_check_request__free_unpacked(r, NULL);
    return ok;
}

static void check_message(struct rpc_call *call, void *ctx, struct span bytes)
{
    struct health *h = ctx;
    char service[SERVICE_NAME_MAX];
    if (!service_read(call, bytes, service)) return;
    enum health_status status = h->config.status(h->config.ctx, service);
    if (status == HEALTH_SERVICE_UNKNOWN) {
        rpc_finish(call, RPC_NOT_FOUND, "unknown service");
        return;
    }
    status_send(call, status);
    rpc_finish(call, RPC_OK, NULL);
}

static void list_message(struct rpc_call *call, void *ctx, struct span bytes)
{
    enum { SERVICES_MAX = 16 };
    struct health *h = ctx;
    Grpc__Health__V1__HealthListResponse r = GRPC__HEALTH__V1__HEALTH_LIST_RESPONSE__INIT;
    Grpc__Health__V1__HealthListResponse__StatusesEntry entries[SERVICES_MAX],
        *pointers[SERVICES_MAX];
    Grpc__Health__V1__HealthCheckResponse values[SERVICES_MAX];
    (void)bytes;
    for (size_t i = 0; i < h->config.n_services && i < SERVICES_MAX; i++) {
        grpc__health__v1__health_list_response__statuses_entry__init(&entries[i]);
        grpc__health__v1__health_check_response__init(&values[i]);
        values[i].status = (Grpc__Health__V1__HealthCheckResponse__ServingStatus)h->config.status(
            h->config.ctx, h->config.services[i]);
        entries[i].key = (char *)(uintptr_t)h->config.services[i];
        entries[i].value = &values[i];
        pointers[r.n_statuses++] = &entries[i];
    }
    r.statuses = pointers;
    (void)envelope_send(call, &r.base);
    rpc_finish(call, RPC_OK, NULL);
}

/* ---- Watch ---- */

static void watchers_look(struct health *h) /* locked */
{
    for (size_t i = 0; i < h->n_watchers; i++) {
        struct watcher *w = h->watchers[i];
        enum health_status status = h->config.status(h->config.ctx, w->service);
        if (status == w->told) continue;
        w->told = status;
        status_send(w->call, status);
    }
}

static void *health_run(void *ctx)
{
    struct health *h = ctx;
    uint32_t poll_ms = h->config.poll_ms ? h->config.poll_ms : 500;
    pthread_mutex_lock(&h->mutex);
    while (!h->stop) {
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        until.tv_nsec += (long)(poll_ms % 1000) * 1000000;
        until.tv_sec += poll_ms / 1000 + until.tv_nsec / 1000000000;
        until.tv_nsec %= 1000000000;
        if (!h->changed) pthread_cond_timedwait(&h->work, &h->mutex, &until);
        h->changed = false;
        watchers_look(h);
    }
    pthread_mutex_unlock(&h->mutex);
    return NULL;
}

static const char *watcher_add(struct health *h, struct watcher *w)
{
    if (h->n_watchers == HEALTH_WATCHERS_MAX) return "too many watchers";
    if (!h->has_thread && pthread_create(&h->thread, NULL, health_run, h))
        return "no thread for watching";
    h->has_thread = true;
    h->watchers[h->n_watchers++] = w;
    w->told = h->config.status(h->config.ctx, w->service);
    status_send(w->call, w->told);
    return NULL;
}

static void watch_message(struct rpc_call *call, void *ctx, struct span bytes)
{
    struct health *h = ctx;
    struct watcher *w;
    char service[SERVICE_NAME_MAX];
    if (!service_read(call, bytes, service)) return;
    if (MEM_NEW(&w)) {
        rpc_finish(call, RPC_RESOURCE_EXHAUSTED, "no memory for a watcher");
        return;
    }
    w->call = call;
    snprintf(w->service, sizeof w->service, "%s", service);
    rpc_set_user(call, w); /* freed by watch_close */
    pthread_mutex_lock(&h->mutex);
    const char *refusal = watcher_add(h, w);
    pthread_mutex_unlock(&h->mutex);
    if (refusal) rpc_finish(call, RPC_RESOURCE_EXHAUSTED, refusal);
}

static void watch_close(struct rpc_call *call, void *ctx, bool cancelled)
{
    struct health *h = ctx;
    struct watcher *w = rpc_user(call);
    (void)cancelled;
    pthread_mutex_lock(&h->mutex);
    for (size_t i = 0; i < h->n_watchers; i++)
        if (h->watchers[i] == w) {
            h->watchers[i] = h->watchers[--h->n_watchers];
            break;
        }
    pthread_mutex_unlock(&h->mutex);
    mem_free(w);
}

size_t health_methods(struct health *h, struct rpc_method out[HEALTH_METHODS])
{
    out[0] = (struct rpc_method){.path = "/grpc.health.v1.Health/Check",
                                 .kind = RPC_UNARY,
                                 .flags = RPC_PUBLIC,
                                 .on_message = check_message,
                                 .ctx = h};
    out[1] = (struct rpc_method){.path = "/grpc.health.v1.Health/Watch",
                                 .kind = RPC_SERVER_STREAM,
                                 .flags = RPC_PUBLIC,
                                 .on_message = watch_message,
                                 .on_close = watch_close,
                                 .ctx = h};
    out[2] = (struct rpc_method){.path = "/grpc.health.v1.Health/List",
                                 .kind = RPC_UNARY,
                                 .flags = RPC_PUBLIC,
                                 .on_message = list_message,
                                 .ctx = h};
    return HEALTH_METHODS;
}

/* ---- Life ---- */

enum err health_create(const struct health_config *config, struct health **out)
{
    struct health *h;
    pthread_condattr_t attributes;
    TRY(MEM_NEW(&h));
    h->config = *config;
    pthread_mutex_init(&h->mutex, NULL);
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&h->work, &attributes);
    pthread_condattr_destroy(&attributes);
    *out = h;
    return OK;
}

void health_changed(struct health *h)
{
    pthread_mutex_lock(&h->mutex);
    h->changed = true;
    pthread_cond_signal(&h->work);
    pthread_mutex_unlock(&h->mutex);
}

void health_destroy(struct health *h)
{
    if (!h) return;
    pthread_mutex_lock(&h->mutex);
    h->stop = true;
    pthread_cond_signal(&h->work);
    pthread_mutex_unlock(&h->mutex);
    if (h->has_thread) pthread_join(h->thread, NULL);
    pthread_cond_destroy(&h->work);
    pthread_mutex_destroy(&h->mutex);
    mem_free(h);
}
