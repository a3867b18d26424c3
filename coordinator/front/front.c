/* The front as a whole: its loops, ids, readiness and end. See front.h. */
#include "coordinator/front/front.h"
#include "base/clock.h"
#include "base/hash.h"
#include "base/mem.h"
#include "coordinator/front/routes.h"
#include "coordinator/front/stream.h"
#include "coordinator/front/text_pool.h"

#include <signal.h>
#include <string.h>
#include <sys/random.h>

enum { TEXT_THREADS = 2 };

struct front_loop *front_loop_of(const struct http_exchange *x)
{
    return *http_loop_user(http_exchange_loop(x));
}

struct front_loop *front_loop_any(struct front *f)
{
    return &f->loops[atomic_fetch_add(&f->next_loop, 1) % f->n_loops];
}

void front_post(struct front_loop *l, struct front_job *job)
{
    pthread_mutex_lock(&l->mutex);
    job->next = l->jobs;
    l->jobs = job;
    pthread_mutex_unlock(&l->mutex);
    http_loop_wake(l->http);
}

static void jobs_run(struct front_loop *l)
{
    pthread_mutex_lock(&l->mutex);
    struct front_job *newest = l->jobs, *oldest = NULL;
    l->jobs = NULL;
    pthread_mutex_unlock(&l->mutex);
    while (newest) { /* they were pushed in front */
        struct front_job *next = newest->next;
        newest->next = oldest;
        oldest = newest;
        newest = next;
    }
    while (oldest) {
        struct front_job *job = oldest;
        oldest = job->next;
        job->run(job, l);
    }
}

static void on_woken(void *ctx, struct http_loop *http)
{
    struct front *f = ctx;
    for (unsigned i = 0; i < f->n_loops; i++) {
        struct front_loop *l = &f->loops[i];
        if (l->http != http) continue;
        jobs_run(l);
        stream_pump_ready(l);
    }
}

static void on_loop(void *ctx, struct http_loop *http, unsigned index)
{
    struct front *f = ctx;
    struct front_loop *l = &f->loops[index];
    l->front = f;
    l->http = http;
    pthread_mutex_init(&l->mutex, NULL);
    buf_init(&l->scratch, 0);
    *http_loop_user(http) = l;
    f->n_loops = index + 1;
}

enum err front_create(const struct front_config *config, struct front **out)
{
    struct front *f = NULL;
    signal(SIGPIPE, SIG_IGN); /* a client that left is an error of write, not the end of all */
    TRY(MEM_NEW(&f));
    f->config = *config;
    ASSERT_CMP(config->n_names, >, 0);
    if (!f->config.system_fingerprint) f->config.system_fingerprint = "heddle-" HEDDLE_VERSION;
    f->started_unix_s = clock_unix_s();
    if (getrandom(&f->random, sizeof f->random, 0) < 0) f->random = (uint64_t)clock_monotonic_ns();
    atomic_init(&f->next_id, 1);
    metrics_init(&f->metrics, config->context_max ? config->context_max : 131072);
    struct http_callbacks callbacks = {.handle = routes_handle,
                                       .refuse = routes_refuse,
                                       .headers = routes_headers,
                                       .ended = routes_ended,
                                       .woken = on_woken,
                                       .loop = on_loop,
                                       .ctx = f};
    enum err e = MEM_NEW_ARRAY(HTTP_LOOPS_MAX, &f->loops);
    if (!e) e = text_pool_create(TEXT_THREADS, &f->texts);
    if (!e) e = http_server_open(&config->http, &callbacks, &f->http);
    if (e)
        front_destroy(f);
    else
        *out = f;
    return e;
}

void front_drain(struct front *f)
{
    atomic_store(&f->draining, true);
    http_server_drain(f->http);
}

bool front_is_quiet(struct front *f)
{
    return http_loop_connections(f->loops[0].http) == 0;
}

void front_stop(struct front *f)
{
    http_server_stop(f->http);
    text_pool_destroy(f->texts);
    f->texts = NULL;
    for (unsigned i = 0; i < f->n_loops; i++)
        jobs_run(&f->loops[i]);
}

void front_destroy(struct front *f)
{
    if (!f) return;
    text_pool_destroy(f->texts);
    for (unsigned i = 0; i < f->n_loops; i++)
        stream_pump_ready(&f->loops[i]);
    http_server_close(f->http);
    for (unsigned i = 0; i < f->n_loops; i++) {
        pthread_mutex_destroy(&f->loops[i].mutex);
        buf_fini(&f->loops[i].scratch);
    }
    mem_free(f->loops);
    mem_free(f);
}

bool front_ready(struct front *f)
{
    struct engine_stats stats = {0};
    if (atomic_load(&f->draining)) return false;
    engine_loop_stats(f->config.engine, &stats);
    return stats.n_groups_up > 0;
}

uint32_t front_context_max(struct front *f)
{
    struct engine_stats stats = {0};
    engine_loop_stats(f->config.engine, &stats);
    uint32_t own = f->config.context_max, engine = stats.context_max;
    return !own || (engine && engine < own) ? engine : own;
}

uint32_t front_vocab_size(struct front *f)
{
    return f->config.vocab_size;
}

void front_cluster_get(struct front *f, struct front_cluster *out)
{
    *out = (struct front_cluster){0};
    if (f->config.cluster) f->config.cluster(f->config.cluster_ctx, out);
}

void front_make_id(struct front *f, const char *prefix, char out[48])
{
    uint64_t count = atomic_fetch_add(&f->next_public_id, 1);
    uint64_t high = hash_u64(f->random + count), low = hash_u64(high ^ count);
    snprintf(out, 48, "%s%016llx%016llx", prefix, (unsigned long long)high,
             (unsigned long long)low);
}
