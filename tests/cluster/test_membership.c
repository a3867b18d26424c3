/* Goal: ranks join, groups form, plans reach every rank and results come back; a lost rank ends the
 * epoch at once and a new one begins when it has joined again; a coordinator that goes and returns
 * finds its ranks. Method: real links on threads against a real cluster whose engine is a record.
 */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base/clock.h"
#include "base/mem.h"
#include "coordinator/cluster/cluster.h"
#include "proto/cluster.pb-c.h"
#include "proto/envelope.h"
#include "worker/link.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* ---- The engine's place: a record of what it was told ---- */

enum { GROUPS = 2, RANKS = 3 };
struct told {
    pthread_mutex_t mutex;
    pthread_cond_t news;
    struct group_info info[GROUPS];
    atomic_uint_fast64_t up[GROUPS]; /* epoch, 0 = down */
    atomic_int n_up, n_down, n_results[GROUPS], n_wrong;
    atomic_uint_fast64_t last_step[GROUPS];
};

static void told_up(void *ctx, uint32_t group, const struct group_info *info)
{
    struct told *t = ctx;
    pthread_mutex_lock(&t->mutex);
    if (t->up[group]) t->n_wrong++; /* two ups without a down between */
    t->up[group] = info->epoch;
    t->info[group] = *info;
    t->n_up++;
    pthread_cond_broadcast(&t->news);
    pthread_mutex_unlock(&t->mutex);
}

static void told_down(void *ctx, uint32_t group, uint64_t epoch)
{
    struct told *t = ctx;
    pthread_mutex_lock(&t->mutex);
    if (t->up[group] != epoch) t->n_wrong++;
    t->up[group] = 0;
    t->n_down++;
    pthread_cond_broadcast(&t->news);
    pthread_mutex_unlock(&t->mutex);
}

static void told_result(void *ctx, uint32_t group, uint64_t epoch, const void *bytes, size_t n)
{
    struct told *t = ctx;
    Heddle__Cluster__FromWorker *m = heddle__cluster__from_worker__unpack(NULL, n, bytes);
    pthread_mutex_lock(&t->mutex);
    if (!m || m->kind_case != HEDDLE__CLUSTER__FROM_WORKER__KIND_RESULT ||
        m->result->epoch != epoch)
        t->n_wrong++;
    else
        t->last_step[group] = m->result->step;
    t->n_results[group]++;
    pthread_cond_broadcast(&t->news);
    pthread_mutex_unlock(&t->mutex);
    if (m) heddle__cluster__from_worker__free_unpacked(m, NULL);
}

static bool told_wait(struct told *t, bool (*is)(const struct told *), int ms)
{
    bool yes = false;
    for (int64_t until = clock_monotonic_us() + ms * 1000LL; !yes && clock_monotonic_us() < until;
         usleep(300)) {
        pthread_mutex_lock(&t->mutex);
        yes = is(t);
        pthread_mutex_unlock(&t->mutex);
    }
    return yes;
}

static bool all_up(const struct told *t)
{
    return t->up[0] && t->up[1];
}
static bool first_down(const struct told *t)
{
    return !t->up[0];
}
static bool first_up(const struct told *t)
{
    return t->up[0] != 0;
}

/* ---- A worker that computes nothing ---- */

struct worker {
    struct link_config config;
    struct link *link;
    pthread_t thread;
    atomic_int n_welcomes, n_plans, n_halts, n_lost, n_down, n_drains, n_wrong, refused;
    atomic_bool die, slow;
    atomic_uint_fast64_t last_step, epoch;
    char reason[256];
};

static void worker_answer(struct worker *w, const struct link_event *e)
{
    Heddle__Cluster__ToWorker *plan =
        heddle__cluster__to_worker__unpack(NULL, e->bytes.n, (const uint8_t *)e->bytes.data);
    Heddle__Cluster__StepResult r = HEDDLE__CLUSTER__STEP_RESULT__INIT;
    Heddle__Cluster__FromWorker m = HEDDLE__CLUSTER__FROM_WORKER__INIT;
    struct rpc_bytes *bytes;
    if (!plan || plan->plan->epoch != e->epoch || e->epoch != atomic_load(&w->epoch)) {
        atomic_fetch_add(&w->n_wrong, 1);
        return;
    }
    r.epoch = plan->plan->epoch;
    r.step = plan->plan->step;
    r.compute_us = 77;
    if (r.step != atomic_load(&w->last_step) + 1)
        atomic_fetch_add(&w->n_wrong, 1); /* in order, none missing */
    atomic_store(&w->last_step, r.step);
    m.kind_case = w->config.join.rank ? HEDDLE__CLUSTER__FROM_WORKER__KIND_ACK
                                      : HEDDLE__CLUSTER__FROM_WORKER__KIND_RESULT;
    m.result = &r;
    assert_int_equal(envelope_pack(&m.base, &bytes), OK);
    (void)link_send_result(w->link, rpc_bytes_span(bytes).data, rpc_bytes_span(bytes).n);
    rpc_bytes_release(bytes);
    heddle__cluster__to_worker__free_unpacked(plan, NULL);
    atomic_fetch_add(&w->n_plans, 1);
}

static void worker_welcome(struct worker *w, const struct link_event *e)
{
    struct span all[LINK_RANKS_MAX];
    char mine[64];
    atomic_store(&w->epoch, e->epoch);
    atomic_store(&w->last_step, 0);
    snprintf(mine, sizeof mine, "rank %u of epoch %llu", w->config.join.rank,
             (unsigned long long)e->epoch);
    enum err err = link_exchange(w->link, "names", mine, strlen(mine), 5000000, all);
    for (uint32_t i = 0; !err && i < w->config.join.size; i++) {
        snprintf(mine, sizeof mine, "rank %u of epoch %llu", i, (unsigned long long)e->epoch);
        if (!span_equal(all[i], mine)) atomic_fetch_add(&w->n_wrong, 1);
    }
    if (strlen(e->group_key) != 32 || e->group != w->config.join.replica)
        atomic_fetch_add(&w->n_wrong, 1);
    if (err == ERR_TIMEOUT) atomic_fetch_add(&w->n_wrong, 1);
    if (!err) (void)link_ready(w->link, e->epoch);
    atomic_fetch_add(&w->n_welcomes, 1);
}

static void *worker_run(void *ctx)
{
    struct worker *w = ctx;
    struct link_event e;
    while (!atomic_load(&w->die)) {
        assert_int_equal(link_next(w->link, 20000, &e), OK);
        if (e.kind == LINK_WELCOME) worker_welcome(w, &e);
        if (e.kind == LINK_PLAN) worker_answer(w, &e);
        if (e.kind == LINK_HALT) atomic_fetch_add(&w->n_halts, 1);
        if (e.kind == LINK_LOST) atomic_fetch_add(&w->n_lost, 1);
        if (e.kind == LINK_HALT || e.kind == LINK_LOST) {
            atomic_store(&w->epoch, 0);
            atomic_fetch_add(&w->n_down, 1);
        }
        if (e.kind == LINK_DRAIN) {
            atomic_fetch_add(&w->n_drains, 1);
            link_leave(w->link, "drained", 2000);
            return NULL;
        }
        if (e.kind == LINK_REFUSED) {
            snprintf(w->reason, sizeof w->reason, "%s", e.text);
            atomic_store(&w->refused, 1);
            return NULL;
        }
    }
    return NULL;
}

static void worker_start(struct worker *w, const char *address, const char *token, uint32_t replica,
                         uint32_t rank)
{
    *w = (struct worker){.config = {.address = address, .token = token}};
    w->config.join = (struct link_join){.model_digest = "d1",
                                        .model_name = "model",
                                        .host = "host",
                                        .device = "cpu",
                                        .replica = replica,
                                        .rank = rank,
                                        .size = RANKS,
                                        .block_size = 16,
                                        .slots_max = 8,
                                        .step_tokens_max = 512,
                                        .step_prompt_max = 50 * rank, /* rank 0: any */
                                        .step_rows_max = 64,
                                        .context_max = 4096,
                                        .vocab_size = 1000,
                                        .blocks_max = 100 + rank,
                                        .host_blocks_max = 50 - rank,
                                        .block_bytes = 1 << 14};
    if (link_open(&w->config, &w->link)) fail_msg("%s", err_detail());
    pthread_create(&w->thread, NULL, worker_run, w);
}

/* As a killed process: the stream just ends. */
static void worker_kill(struct worker *w)
{
    atomic_store(&w->die, true);
    pthread_join(w->thread, NULL);
    link_close(w->link);
    w->link = NULL;
}

/* ---- The fixture ---- */

struct fixture {
    const char *listen;
    char address[96];
    struct told told;
    struct cluster *cluster;
    struct worker workers[GROUPS][RANKS];
};

static void cluster_start(struct fixture *f, const char *address)
{
    struct cluster_config config = {.address = address,
                                    .token = "secret",
                                    .n_groups = GROUPS,
                                    .n_ranks = RANKS,
                                    .heartbeat_ms = 100,
                                    .dead_ms = 1500,
                                    .join_timeout_ms = 1000};
    struct cluster_hooks hooks = {
        .group_up = told_up, .group_down = told_down, .result = told_result, .ctx = &f->told};
    enum err e = ERR_IO;
    for (int i = 0; i < 50 && e; i++, e ? (void)usleep(20000) : (void)0)
        e = cluster_create(&config, &hooks, &f->cluster);
    if (e) fail_msg("%s", err_detail());
}

static struct fixture *fixture_start(const char *listen, bool workers)
{
    struct fixture *f;
    assert_int_equal(mem_alloc(sizeof *f, (void **)&f), OK);
    pthread_mutex_init(&f->told.mutex, NULL);
    pthread_cond_init(&f->told.news, NULL);
    f->listen = listen;
    cluster_start(f, listen);
    int port = cluster_port(f->cluster);
    if (port)
        snprintf(f->address, sizeof f->address, "127.0.0.1:%d", port);
    else
        snprintf(f->address, sizeof f->address, "%s", listen);
    for (uint32_t g = 0; workers && g < GROUPS; g++)
        for (uint32_t r = 0; r < RANKS; r++)
            worker_start(&f->workers[g][r], f->address, "secret", g, r);
    if (workers) assert_true(told_wait(&f->told, all_up, 10000));
    return f;
}

static void fixture_finish(struct fixture *f)
{
    for (int g = 0; g < GROUPS; g++)
        for (int r = 0; r < RANKS; r++) {
            assert_int_equal(atomic_load(&f->workers[g][r].n_wrong), 0);
            if (f->workers[g][r].link) worker_kill(&f->workers[g][r]);
        }
    cluster_destroy(f->cluster);
    assert_int_equal(f->told.n_wrong, 0);
    mem_free(f);
}

static enum err plan_send(struct fixture *f, uint32_t group, uint64_t epoch, uint64_t step)
{
    Heddle__Cluster__StepPlan p = HEDDLE__CLUSTER__STEP_PLAN__INIT;
    Heddle__Cluster__ToWorker m = HEDDLE__CLUSTER__TO_WORKER__INIT;
    struct rpc_bytes *bytes;
    p.epoch = epoch;
    p.step = step;
    m.kind_case = HEDDLE__CLUSTER__TO_WORKER__KIND_PLAN;
    m.plan = &p;
    assert_int_equal(envelope_pack(&m.base, &bytes), OK);
    enum err e =
        cluster_send_plan(f->cluster, group, rpc_bytes_span(bytes).data, rpc_bytes_span(bytes).n);
    rpc_bytes_release(bytes);
    return e;
}

/* Sends so many plans, two in flight, and waits for their results. */
static void plans_run(struct fixture *f, uint32_t group, int n)
{
    struct told *t = &f->told;
    uint64_t epoch = t->up[group];
    for (int i = 1; i <= n; i++) {
        assert_int_equal(plan_send(f, group, epoch, (uint64_t)i), OK);
        pthread_mutex_lock(&t->mutex);
        struct timespec until = {time(NULL) + 10, 0};
        while (t->last_step[group] + 2 <= (uint64_t)i && t->last_step[group] < (uint64_t)n)
            assert_int_equal(pthread_cond_timedwait(&t->news, &t->mutex, &until), 0);
        pthread_mutex_unlock(&t->mutex);
    }
}

static bool reaches(atomic_int *value, int want, int ms)
{
    for (int64_t until = clock_monotonic_us() + ms * 1000LL; clock_monotonic_us() < until;
         usleep(300))
        if (atomic_load(value) >= want) return true;
    return false;
}

static const char *listen_get(void **state)
{
    return *state;
}

/* ---- Cases ---- */

static void test_forms_and_runs(void **state)
{
    struct fixture *f = fixture_start(listen_get(state), true);
    for (int g = 0; g < GROUPS; g++) {
        const struct group_info *info = &f->told.info[g];
        assert_int_equal(info->n_blocks, 100); /* the least of 100, 101, 102 */
        assert_int_equal(info->n_host_blocks, 48);
        assert_int_equal(info->n_ranks, RANKS);
        assert_int_equal(info->block_size, 16);
        assert_int_equal(info->vocab_size, 1000);
        assert_int_equal(info->step_tokens_max, 512);
        assert_int_equal(info->step_prompt_max, 50);
    }
    assert_int_not_equal(f->told.up[0], f->told.up[1]);
    for (uint32_t g = 0; g < GROUPS; g++)
        plans_run(f, g, 200);
    for (int g = 0; g < GROUPS; g++)
        for (int r = 0; r < RANKS; r++)
            assert_true(reaches(&f->workers[g][r].n_plans, 200, 5000));
    assert_int_equal(plan_send(f, 0, f->told.up[0] + 100, 1), ERR_PEER); /* not its epoch */
    assert_int_equal(plan_send(f, GROUPS, 1, 1), ERR_INVALID);
    usleep(150000);
    struct cluster_status *s;
    assert_int_equal(cluster_status_create(f->cluster, &s), OK);
    assert_int_equal(s->n_groups_up, GROUPS);
    assert_int_equal(s->n_joined, GROUPS * RANKS);
    assert_string_equal(s->model_name, "model");
    for (int i = 0; i < GROUPS * RANKS; i++) {
        assert_int_equal(s->ranks[i].state, CLUSTER_RANK_READY);
        assert_int_equal(s->ranks[i].last_step, 200);
        assert_int_equal(s->ranks[i].compute_us, 77);
        assert_in_range(s->ranks[i].heard_ago_us, 0, 1500000);
        assert_string_equal(s->ranks[i].host, "host");
    }
    cluster_status_destroy(s);
    fixture_finish(f);
}

static void test_rank_lost(void **state)
{
    struct fixture *f = fixture_start(listen_get(state), true);
    uint64_t before = f->told.up[0], other = f->told.up[1];
    plans_run(f, 0, 20);
    worker_kill(&f->workers[0][1]);
    int64_t t0 = clock_monotonic_us();
    assert_true(told_wait(&f->told, first_down, 3000));
    assert_true(clock_monotonic_us() - t0 < 500000); /* by the broken stream, not by silence */
    assert_int_equal(plan_send(f, 0, before, 21), ERR_PEER);
    assert_true(reaches(&f->workers[0][0].n_halts, 1, 2000));
    assert_true(reaches(&f->workers[0][2].n_halts, 1, 2000));
    plans_run(f, 1, 20); /* the other group does not notice */
    assert_int_equal(f->told.up[1], other);
    f->told.last_step[0] = 0;
    worker_start(&f->workers[0][1], f->address, "secret", 0, 1);
    assert_true(told_wait(&f->told, first_up, 5000));
    assert_true(f->told.up[0] > before);
    plans_run(f, 0, 20);
    assert_int_equal(atomic_load(&f->workers[0][0].n_welcomes), 2);
    assert_int_equal(atomic_load(&f->workers[0][0].n_lost), 0); /* survivors kept their stream */
    assert_int_equal(f->told.n_down, 1);
    fixture_finish(f);
}

static void test_coordinator_lost(void **state)
{
    struct fixture *f = fixture_start(listen_get(state), true);
    cluster_destroy(f->cluster);
    f->told.up[0] = f->told.up[1] = 0; /* the new coordinator knows nothing */
    f->cluster = NULL;
    for (int g = 0; g < GROUPS; g++)
        for (int r = 0; r < RANKS; r++) { /* who heard a halt first knows as much */
            assert_true(reaches(&f->workers[g][r].n_down, 1, 3000));
        }
    usleep(200000);
    cluster_start(f, f->address);
    assert_true(told_wait(&f->told, all_up, 10000));
    f->told.last_step[0] = 0;
    plans_run(f, 0, 10);
    for (int r = 0; r < RANKS; r++)
        assert_int_equal(atomic_load(&f->workers[0][r].n_welcomes), 2);
    fixture_finish(f);
}

static void test_watchdog(void **state)
{
    struct fixture *f = fixture_start(listen_get(state), true);
    uint64_t before = f->told.up[0];
    cluster_group_failed(f->cluster, 0, before + 1000, "not this one");
    cluster_group_failed(f->cluster, 0, before, "no result within the time allowed");
    assert_true(reaches(&f->workers[0][0].n_welcomes, 2, 5000)); /* all join again by themselves */
    assert_true(told_wait(&f->told, first_up, 5000));
    assert_true(f->told.up[0] > before);
    struct cluster_status *s;
    assert_int_equal(cluster_status_create(f->cluster, &s), OK);
    assert_non_null(strstr(s->groups[0].last_loss, "no result"));
    cluster_status_destroy(s);
    fixture_finish(f);
}

static void test_fault(void **state)
{
    struct fixture *f = fixture_start(listen_get(state), true);
    uint64_t before = f->told.up[0];
    link_fault(f->workers[0][2].link, "the device lost a page", false);
    assert_true(reaches(&f->workers[0][0].n_welcomes, 2, 5000));
    assert_true(told_wait(&f->told, first_up, 5000));
    assert_true(f->told.up[0] > before);
    assert_int_equal(atomic_load(&f->workers[0][2].n_lost), 0);
    fixture_finish(f);
}

static void test_refusals(void **state)
{
    struct fixture *f = fixture_start(listen_get(state), true);
    static const char *const words[] = {"digest",          "vocabulary",     "replica",
                                        "blocks have",     "one of 4 ranks", "no room",
                                        "held by a living"};
    for (int i = 0; i < 7; i++) {
        struct worker w = {.config = {.address = f->address, .token = "secret"}};
        w.config.join = f->workers[0][0].config.join;
        if (i == 0) w.config.join.model_digest = "d2";
        if (i == 1) w.config.join.vocab_size = 1001;
        if (i == 2) w.config.join.replica = GROUPS;
        if (i == 3) w.config.join.block_size = 32;
        if (i == 4) w.config.join.size = 4;
        if (i == 5) w.config.join.blocks_max = 0;
        assert_int_equal(link_open(&w.config, &w.link), OK);
        pthread_create(&w.thread, NULL, worker_run, &w);
        assert_true(reaches(&w.refused, 1, 5000));
        if (!strstr(w.reason, words[i])) fail_msg("'%s' does not say '%s'", w.reason, words[i]);
        worker_kill(&w);
    }
    struct worker w;
    worker_start(&w, f->address, "wrong", 0, 0);
    assert_true(reaches(&w.refused, 1, 5000));
    assert_non_null(strstr(w.reason, "token"));
    worker_kill(&w);
    assert_int_equal(f->told.n_down, 0); /* nobody was disturbed */
    plans_run(f, 0, 5);
    fixture_finish(f);
}

static void test_drain(void **state)
{
    struct fixture *f = fixture_start(listen_get(state), true);
    cluster_drain(f->cluster, 1);
    for (int r = 0; r < RANKS; r++)
        assert_true(reaches(&f->workers[1][r].n_drains, 1, 3000));
    usleep(50000);
    assert_int_equal(atomic_load(&f->workers[0][0].n_drains), 0);
    assert_int_equal(cluster_groups_up(f->cluster), 1);
    plans_run(f, 0, 5);
    fixture_finish(f);
}

/* A rank that dials when nobody is there waits, and gives up when told how long. */
static void test_patience(void **state)
{
    (void)state;
    struct link_config config = {.address = "127.0.0.1:1", .patience_ms = 400};
    struct link_event e;
    config.join = (struct link_join){.model_digest = "d", .size = 1};
    struct link *l;
    int64_t t0 = clock_monotonic_us();
    assert_int_equal(link_open(&config, &l), OK);
    assert_int_equal(link_next(l, 100000, &e), OK);
    assert_int_equal(e.kind, LINK_NONE);
    assert_int_equal(link_next(l, 10000000, &e), OK);
    assert_int_equal(e.kind, LINK_LOST);
    assert_non_null(strstr(e.text, "gave up"));
    assert_in_range(clock_monotonic_us() - t0, 350000, 3000000);
    struct span all[1];
    assert_int_equal(link_exchange(l, "x", "", 0, 1000, all), ERR_PEER);
    assert_int_equal(link_send_result(l, "", 0), ERR_PEER);
    link_close(l);
}

#define CASES(X)                                                                                   \
    X(test_forms_and_runs)                                                                         \
    X(test_rank_lost) X(test_coordinator_lost) X(test_watchdog) X(test_fault) X(test_refusals)     \
        X(test_drain)

int main(void)
{
    static char local[] = "local:cluster", tcp[] = "127.0.0.1:0";
#define LOCAL(f) {"local " #f, f, NULL, NULL, local},
#define TCP(f)   {"tcp " #f, f, NULL, NULL, tcp},
    const struct CMUnitTest tests[] = {CASES(LOCAL) CASES(TCP) TCP(test_patience)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
