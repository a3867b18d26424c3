/* The loop of a rank in a cluster: events of its link in, results out.
 *
 * Weights are loaded once. Whatever ends a group (a lost peer, a lost coordinator, a wrong plan)
 * costs the sequences and the collective only: the next welcome begins a new epoch. */
#include "base/clock.h"
#include "base/log.h"
#include "proto/plan.h"
#include "worker/link.h"
#include "worker/rank.h"

#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

enum {
    POLL_US = 200000,
    GLANCE_US = 20, /* between two looks at a step under way */
    LEAVE_MS = 2000,
    EXCHANGE_MS = 120000
};

static volatile sig_atomic_t asked_to_stop;

static void on_signal(int number)
{
    (void)number;
    asked_to_stop = 1;
}

struct loop {
    struct worker *worker;
    struct link *link;
    struct buf result;
    bool has_group, pipelined;
    bool peers_alive;
    atomic_uint_fast64_t epoch; /* of the group; read by threads of the collective */
};

/* --- how ranks find each other --- */

static enum err boot_exchange(void *ctx, const char *key, const void *mine, size_t n, void *out)
{
    struct loop *l = ctx;
    struct span all[LINK_RANKS_MAX];
    int size = l->worker->config.size;
    TRY(link_exchange(l->link, key, mine, n, (int64_t)EXCHANGE_MS * 1000, all));
    for (int r = 0; r < size; r++) {
        if (all[r].n != n)
            FAIL(ERR_PEER,
                 "exchange '%s': rank %d gave %zu bytes, this one %zu: is it the same program?",
                 key, r, all[r].n, n);
        memcpy((char *)out + (size_t)r * n, all[r].data, n);
    }
    return OK;
}

static bool boot_ended(void *ctx)
{
    struct loop *l = ctx;
    return atomic_load(link_epoch(l->link)) != atomic_load(&l->epoch);
}

/* --- events --- */

/* What this rank can live on after: the group must form anew. */
static bool is_survivable(enum err e)
{
    return e == ERR_PEER || e == ERR_FORMAT || e == ERR_TIMEOUT || e == ERR_FULL;
}

static enum err group_leave(struct loop *l)
{
    l->has_group = false;
    return worker_close_group(l->worker);
}

/* Tells the coordinator; passes on what is beyond repair. */
static enum err group_fail(struct loop *l, enum err e)
{
    char why[512];
    if (!e) return OK;
    snprintf(why, sizeof why, "%s", err_detail());
    log_error("%s: %s", err_name(e), why);
    link_fault(l->link, why, !is_survivable(e));
    enum err left = group_leave(l);
    if (is_survivable(e)) return left;
    return err_set(e, "%s", why);
}

static enum err group_join(struct loop *l, const struct link_event *event)
{
    char key[sizeof event->group_key];
    snprintf(key, sizeof key, "%s", event->group_key);
    struct bootstrap boot = {
        .group_key = key, .exchange = boot_exchange, .ended = boot_ended, .ctx = l};
    atomic_store(&l->epoch, event->epoch);
    TRY(worker_open_group(l->worker, event->epoch, event->n_blocks, event->n_host_blocks, &boot));
    l->has_group = true;
    TRY(link_ready(l->link, event->epoch));
    log_info("ready: epoch %llu, %llu blocks", (unsigned long long)event->epoch,
             (unsigned long long)event->n_blocks);
    return OK;
}

static enum err step_answer(struct loop *l)
{
    struct step_result result;
    TRY(worker_end(l->worker, &result));
    buf_clear(&l->result);
    TRY(step_result_encode(&result, l->worker->config.rank != 0, &l->result));
    TRY(link_send_result(l->link, l->result.data, l->result.n));
    /* The coordinator plans meanwhile. With a step under way it waits until that has ended. */
    return l->worker->n_busy ? OK : worker_draft(l->worker);
}

static enum err plan_run(struct loop *l, const struct link_event *event)
{
    struct step_plan plan;
    if (!l->has_group) return OK; /* of an epoch that failed here a moment ago */
    arena_reset(&l->worker->arena);
    TRY(plan_decode(event->bytes.data, event->bytes.n, &l->worker->arena, &plan));
    TRY(worker_begin(l->worker, &plan));
    return l->pipelined ? OK : step_answer(l);
}

/* Answers the oldest steps until no more than n_left are under way. */
static enum err steps_drain(struct loop *l, int n_left)
{
    while (l->worker->n_busy > n_left)
        TRY(step_answer(l));
    return OK;
}

static bool is_given_up(const struct link_event *event)
{
    return !strncmp(event->text ? event->text : "", "gave up", 7);
}

/* out_done: the loop ends. */
static enum err event_handle(struct loop *l, const struct link_event *event, bool *out_done)
{
    switch (event->kind) {
    case LINK_WELCOME:
        return group_fail(l, group_join(l, event));
    case LINK_PLAN:
        return group_fail(l, plan_run(l, event));
    case LINK_NONE:
        return OK;
    case LINK_HALT:
    case LINK_LOST:
        log_warn("%s: %s", event->kind == LINK_HALT ? "the group ended" : "the coordinator is lost",
                 event->text);
        TRY(group_leave(l));
        if (is_given_up(event))
            FAIL(ERR_PEER, "%s: %s", l->worker->config.coordinator, event->text);
        return OK;
    case LINK_DRAIN:
        TRY(group_fail(l, steps_drain(l, 0)));
        *out_done = true;
        return OK;
    case LINK_REFUSED:
        l->peers_alive = false;
        FAIL(ERR_INVALID, "the coordinator refused this rank: %s", event->text);
    }
    return OK;
}

/* Weights that turned out damaged: nothing more is computed with them. */
static enum err damage_check(struct loop *l)
{
    enum err e = worker_check(l->worker, false);
    char why[512];
    if (!e) return OK;
    snprintf(why, sizeof why, "%s", err_detail());
    log_error("%s: %s", err_name(e), why);
    link_fault(l->link, why, true);
    return err_set(e, "%s", why);
}

/* A plan that is there is launched before anything is waited for; a step that has ended is answered
 * as soon as it is seen. With as many steps under way as there may be, only the end of the group is
 * listened to. */
static enum err loop_turn(struct loop *l, bool *out_done)
{
    struct link_event event;
    int n_busy = l->worker->n_busy;
    TRY(damage_check(l));
    if (n_busy == STEPS_IN_FLIGHT)
        TRY(link_next_but_plans(l->link, GLANCE_US, &event));
    else
        TRY(link_next(l->link, n_busy ? GLANCE_US : POLL_US, &event));
    TRY(event_handle(l, &event, out_done));
    if (l->has_group && worker_ready(l->worker)) TRY(group_fail(l, step_answer(l)));
    return OK;
}

static enum err loop_run(struct loop *l)
{
    bool done = false;
    while (!done && !asked_to_stop)
        TRY(loop_turn(l, &done));
    if (asked_to_stop) log_info("asked to stop");
    return group_fail(l, steps_drain(l, 0));
}

/* --- start and end --- */

static void join_words(const struct worker *w, struct link_join *out, char *host, size_t host_bytes)
{
    const struct worker_info *i = &w->info;
    gethostname(host, host_bytes - 1);
    *out = (struct link_join){
        .model_digest = i->model_digest,
        .model_name = i->model_name,
        .host = host,
        .device = i->device,
        .replica = (uint32_t)w->config.replica,
        .rank = (uint32_t)i->rank,
        .size = (uint32_t)i->size,
        .block_size = (uint32_t)i->block_size,
        .slots_max = (uint32_t)i->n_slots_max,
        .step_tokens_max = (uint32_t)i->step_tokens_max,
        .step_prompt_max = (uint32_t)i->step_prompt_max,
        .step_rows_max = (uint32_t)i->step_rows_max,
        .context_max = (uint32_t)i->context_max,
        .vocab_size = (uint32_t)i->vocab_size,
        .window = (uint32_t)i->window,
        .draft_tokens_max = (uint32_t)i->draft_tokens_max,
        .blocks_max = i->n_blocks,
        .host_blocks_max = i->n_host_blocks,
        .disk_blocks_max = i->n_disk_blocks,
        .save_ns = i->save_ns,
        .load_ns = i->load_ns,
        .fetch_ns = i->fetch_ns,
        .weight_bytes = i->weight_bytes,
        .block_bytes = i->block_bytes,
        .has_draft_model = w->draft != NULL,
        .draft_digest = i->draft_digest,
    };
}

static void signals_take(struct sigaction old[2])
{
    struct sigaction action = {.sa_handler = on_signal};
    asked_to_stop = 0;
    sigemptyset(&action.sa_mask);
    sigaction(SIGTERM, &action, &old[0]);
    sigaction(SIGINT, &action, &old[1]);
}

/* On the disk's thread. When the stream is lost the epoch ends, and with it the transfers. */
static void tell_moved(void *ctx, const struct moved *moved)
{
    struct loop *l = ctx;
    struct buf bytes;
    buf_init(&bytes, 0);
    if (!moved_encode(moved, &bytes)) (void)link_send_result(l->link, bytes.data, bytes.n);
    buf_fini(&bytes);
}

static enum err worker_serve(struct loop *l)
{
    char host[128] = "";
    struct link_config config = {.address = l->worker->config.coordinator,
                                 .token = l->worker->config.token,
                                 .patience_ms = (uint32_t)l->worker->config.patience_ms,
                                 .tls = {.ca_file = l->worker->config.tls_ca,
                                         .cert_file = l->worker->config.tls_cert,
                                         .key_file = l->worker->config.tls_key}};
    join_words(l->worker, &config.join, host, sizeof host);
    TRY(link_open(&config, &l->link));
    if (l->worker->disk) kv_disk_listen(l->worker->disk, tell_moved, l);
    enum err e = loop_run(l);
    if (l->worker->disk) kv_disk_listen(l->worker->disk, NULL, NULL);
    char why[512];
    snprintf(why, sizeof why, "%s", e ? err_detail() : asked_to_stop ? "asked to stop" : "drained");
    link_leave(l->link, why, LEAVE_MS);
    if (e != ERR_DEVICE) (void)group_leave(l);
    link_close(l->link);
    return e ? err_set(e, "%s", why) : OK;
}

/* A device that cannot even be opened is no reason to try again. */
static enum err err_declined(void)
{
    char why[512];
    snprintf(why, sizeof why, "%s", err_detail());
    return err_set(ERR_UNSUPPORTED, "%s", why);
}

enum err worker_run(const struct worker_config *config)
{
    struct loop l = {.peers_alive = true};
    struct sigaction old[2];
    if (!config->coordinator) FAIL(ERR_INVALID, "--coordinator HOST:PORT is needed");
    signals_take(old);
    buf_init(&l.result, 0);
    enum err e = worker_create(config, &l.worker);
    if (e == ERR_DEVICE) e = err_declined();
    if (!e) {
        l.pipelined = l.worker->backend->stream != NULL;
        if (l.pipelined) prctl(PR_SET_TIMERSLACK, 1000ul); /* ns: glances are short */
        e = buf_reserve(&l.result, 1 << 20);               /* usual results need no more */
        if (!e) e = worker_serve(&l);
    }
    char why[512];
    snprintf(why, sizeof why, "%s", e ? err_detail() : "");
    if (e != ERR_DEVICE) worker_destroy(l.worker); /* a lost device may keep for ever who waits */
    buf_fini(&l.result);
    collective_shutdown(l.peers_alive && !e);
    sigaction(SIGTERM, &old[0], NULL);
    sigaction(SIGINT, &old[1], NULL);
    return e ? err_set(e, "%s", why) : OK;
}
