/* The engine's thread.
 *
 * Callers append to an inbox under a lock held for a few instructions; the thread swaps it for an
 * empty one and works it off. Whether a request is accepted is decided by the caller against a
 * snapshot of the limits to which the inbox adds what it holds, so nobody waits for a step. */
#include "coordinator/engine/engine_loop.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/mem.h"
#include "coordinator/engine/limits.h"
#include "coordinator/engine/record.h"
#include "coordinator/engine/state.h"

#include <pthread.h>
#include <string.h>
#include <time.h>

enum note_kind { NOTE_SUBMIT, NOTE_CANCEL, NOTE_GROUP_UP, NOTE_GROUP_DOWN, NOTE_RESULT, NOTE_MOVED };
struct note {
    enum note_kind kind;
    uint32_t group, rank;
    int32_t choice;
    int how;
    uint64_t id; /* of a request, or an epoch */
    struct request *request;
    struct group_info info;
    size_t at, n; /* of a result or ended transfers: its place in the inbox's bytes */
};

enum { NOTES_START = 256, RESULT_BYTES_MAX = 1 << 28 };
struct inbox {
    struct note *notes;
    uint32_t n, capacity;
    struct buf bytes;
};

struct engine_loop {
    struct engine *engine;
    struct record *record;
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t wake, rested;
    struct inbox inbox; /* under the lock, as all below */
    struct engine_limits limits;
    struct engine_stats stats;
    uint32_t n_pending; /* sequences in the inbox */
    uint64_t n_pending_tokens;
    uint64_t n_refused_full, n_refused_deadline;
    uint32_t n_alive;                   /* requests not ended, as of the snapshot */
    bool stop, draining, started, busy; /* busy: a turn is under way */
    struct inbox working;               /* of the thread alone */
    struct arena arena;
    struct engine_hooks hooks;
};

/* The inbox. */
static enum err inbox_add(struct engine_loop *l, const struct note *note)
{
    struct inbox *in = &l->inbox;
    if (in->n == in->capacity) {
        uint32_t capacity = in->capacity ? 2 * in->capacity : NOTES_START;
        TRY(mem_resize((void **)&in->notes, capacity * sizeof *in->notes));
        in->capacity = capacity;
    }
    in->notes[in->n++] = *note;
    pthread_cond_signal(&l->wake);
    return OK;
}

static void inbox_fini(struct inbox *in)
{
    mem_free(in->notes);
    buf_fini(&in->bytes);
}

static void post(struct engine_loop *l, const struct note *note)
{
    pthread_mutex_lock(&l->lock);
    if (inbox_add(l, note)) log_error("engine: a message is lost: %s", err_detail());
    pthread_mutex_unlock(&l->lock);
}

static enum err submit_locked(struct engine_loop *l, struct request *r)
{
    struct engine_limits limits = l->limits;
    limits.n_queued += l->n_pending;
    limits.n_queued_tokens += l->n_pending_tokens;
    if (l->stop || l->draining) FAIL(ERR_NOT_READY, "the server takes no new requests");
    enum err e = limits_check(&limits, r, r->arrival_us);
    l->n_refused_full += e == ERR_FULL;
    l->n_refused_deadline += e == ERR_DEADLINE;
    if (e) return e;
    TRY(inbox_add(l, &(struct note){.kind = NOTE_SUBMIT, .request = r}));
    l->n_pending += request_sequences(r);
    l->n_pending_tokens += (uint64_t)request_sequences(r) * r->n_tokens;
    return OK;
}

enum err engine_loop_submit(struct engine_loop *l, struct request *r)
{
    r->arrival_us = engine_loop_now_us(l);
    pthread_mutex_lock(&l->lock);
    enum err e = submit_locked(l, r);
    pthread_mutex_unlock(&l->lock);
    return e;
}

void engine_loop_cancel(struct engine_loop *l, uint64_t request_id, int32_t choice, int how)
{
    post(l, &(struct note){.kind = NOTE_CANCEL, .id = request_id, .choice = choice, .how = how});
}

void engine_loop_group_up(struct engine_loop *l, uint32_t group, const struct group_info *info)
{
    post(l, &(struct note){.kind = NOTE_GROUP_UP, .group = group, .info = *info});
}

void engine_loop_group_down(struct engine_loop *l, uint32_t group, uint64_t epoch)
{
    post(l, &(struct note){.kind = NOTE_GROUP_DOWN, .group = group, .id = epoch});
}

static void post_bytes(struct engine_loop *l, struct note note, const void *bytes)
{
    pthread_mutex_lock(&l->lock);
    note.at = l->inbox.bytes.n;
    if (buf_add(&l->inbox.bytes, bytes, note.n) || inbox_add(l, &note))
        log_error("engine: a result of group %u is lost: %s", note.group, err_detail());
    pthread_mutex_unlock(&l->lock);
}

void engine_loop_result(struct engine_loop *l, uint32_t group, uint64_t epoch, const void *bytes,
                        size_t n)
{
    post_bytes(l, (struct note){.kind = NOTE_RESULT, .group = group, .id = epoch, .n = n}, bytes);
}

void engine_loop_moved(struct engine_loop *l, uint32_t group, uint64_t epoch, uint32_t rank,
                       const void *bytes, size_t n)
{
    post_bytes(l,
               (struct note){
                   .kind = NOTE_MOVED, .group = group, .rank = rank, .id = epoch, .n = n},
               bytes);
}

/* The thread. */
static void refuse(struct request *r, enum err err)
{
    char text[256];
    size_t n = strnlen(err_detail(), sizeof text - 1);
    memcpy(text, err_detail(), n);
    text[n] = 0;
    struct emission news = {.request_id = r->id,
                            .finish = FINISH_ERROR,
                            .last = true,
                            .stop_token = -1,
                            .error = err,
                            .error_text = text,
                            .n_prompt = r->n_tokens};
    r->sink->emit(r->sink, &news);
    if (r->sink->flush) r->sink->flush(r->sink);
    if (r->destroy) r->destroy(r);
}

static void drop_group(struct engine_loop *l, uint32_t group, uint64_t epoch)
{
    log_warn("engine: %s", err_detail());
    if (l->hooks.group_failed) l->hooks.group_failed(l->hooks.ctx, group, epoch, err_detail());
}

static void hear_result(struct engine_loop *l, const struct note *note, int64_t now_us)
{
    struct step_result result;
    arena_reset(&l->arena);
    const void *bytes = l->working.bytes.data + note->at;
    enum err e = step_result_decode(bytes, note->n, &l->arena, &result);
    if (!e && result.epoch == note->id) {
        record_result(l->record, note->group, bytes, note->n, now_us);
        e = engine_result(l->engine, note->group, &result, now_us);
    }
    if (e) drop_group(l, note->group, note->id);
}

static void hear_moved(struct engine_loop *l, const struct note *note, int64_t now_us)
{
    struct moved moved;
    arena_reset(&l->arena);
    const void *bytes = l->working.bytes.data + note->at;
    enum err e = moved_decode(bytes, note->n, &l->arena, &moved);
    if (!e) {
        record_moved(l->record, note->group, note->rank, bytes, note->n, now_us);
        e = engine_moved(l->engine, note->group, note->rank, &moved, now_us);
    }
    if (e) drop_group(l, note->group, note->id);
}

static void hear(struct engine_loop *l, const struct note *note, int64_t now_us)
{
    enum err e;
    switch (note->kind) {
    case NOTE_SUBMIT:
        record_submit(l->record, note->request, now_us);
        e = engine_submit(l->engine, note->request, now_us);
        if (e) refuse(note->request, e);
        break;
    case NOTE_CANCEL:
        record_cancel(l->record, note->id, note->choice, note->how, now_us);
        engine_cancel(l->engine, note->id, note->choice, note->how);
        break;
    case NOTE_GROUP_UP:
        record_group_up(l->record, note->group, &note->info, now_us);
        engine_group_up(l->engine, note->group, &note->info);
        break;
    case NOTE_GROUP_DOWN:
        record_group_down(l->record, note->group, note->id, now_us);
        engine_group_down(l->engine, note->group, note->id);
        break;
    case NOTE_RESULT:
        hear_result(l, note, now_us);
        break;
    case NOTE_MOVED:
        hear_moved(l, note, now_us);
        break;
    }
}

static void wait_for_news(struct engine_loop *l)
{
    int64_t wake_us = engine_wake_us(l->engine);
    while (!l->inbox.n && !l->stop) {
        int64_t now_us = clock_monotonic_us();
        if (wake_us <= now_us) return;
        if (wake_us == INT64_MAX) {
            pthread_cond_wait(&l->wake, &l->lock);
            continue;
        }
        struct timespec until = {.tv_sec = wake_us / 1000000, .tv_nsec = wake_us % 1000000 * 1000};
        pthread_cond_timedwait(&l->wake, &l->lock, &until);
    }
}

static void snapshot(struct engine_loop *l)
{
    l->limits = l->engine->limits;
    engine_stats(l->engine, &l->stats);
    l->stats.n_rejected_full += l->n_refused_full;
    l->stats.n_rejected_deadline += l->n_refused_deadline;
    l->n_alive = l->engine->jobs.n;
    l->busy = false;
    if (!l->n_alive && !l->inbox.n) pthread_cond_broadcast(&l->rested);
}

/* One turn, entered and left with the lock held. */
static void turn(struct engine_loop *l)
{
    struct inbox in = l->inbox;
    l->inbox = l->working;
    l->working = in;
    l->inbox.n = 0;
    buf_clear(&l->inbox.bytes);
    l->n_pending = 0;
    l->n_pending_tokens = 0;
    for (uint32_t i = 0; i < in.n; i++)
        if (in.notes[i].kind == NOTE_SUBMIT) { /* still counted until the engine has it */
            l->limits.n_queued += request_sequences(in.notes[i].request);
            l->limits.n_queued_tokens +=
                (uint64_t)request_sequences(in.notes[i].request) * in.notes[i].request->n_tokens;
        }
    l->busy = true;
    pthread_mutex_unlock(&l->lock);
    int64_t now_us = clock_monotonic_us();
    for (uint32_t i = 0; i < in.n; i++)
        hear(l, &l->working.notes[i], now_us);
    now_us = clock_monotonic_us();
    record_step(l->record, now_us);
    engine_step(l->engine, now_us);
    pthread_mutex_lock(&l->lock);
    snapshot(l);
}

static void *run(void *argument)
{
    struct engine_loop *l = argument;
    pthread_mutex_lock(&l->lock);
    while (!l->stop) {
        wait_for_news(l);
        turn(l);
    }
    pthread_mutex_unlock(&l->lock);
    return NULL;
}

/* Life. */
static enum err send_recorded(void *ctx, uint32_t group, const void *bytes, size_t n)
{
    struct engine_loop *l = ctx;
    record_plan(l->record, group, bytes, n);
    return l->hooks.send_plan(l->hooks.ctx, group, bytes, n);
}

static void tell_failed(void *ctx, uint32_t group, uint64_t epoch, const char *why)
{
    struct engine_loop *l = ctx;
    log_warn("engine: group %u: %s", group, why);
    if (l->hooks.group_failed) l->hooks.group_failed(l->hooks.ctx, group, epoch, why);
}

static enum err start(struct engine_loop *l, const struct engine_config *config)
{
    struct engine_hooks hooks = {send_recorded, tell_failed, l};
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_mutex_init(&l->lock, NULL);
    pthread_cond_init(&l->wake, &attributes);
    pthread_cond_init(&l->rested, &attributes);
    pthread_condattr_destroy(&attributes);
    arena_init(&l->arena, 1 << 20, RESULT_BYTES_MAX);
    if (config->record_path) TRY(record_open(config->record_path, config, &l->record));
    TRY(engine_create(config, &hooks, &l->engine));
    l->limits = l->engine->limits;
    if (pthread_create(&l->thread, NULL, run, l))
        FAIL(ERR_NO_MEMORY, "the engine's thread cannot start");
    l->started = true;
    return OK;
}

enum err engine_loop_create(const struct engine_config *config, const struct engine_hooks *hooks,
                            struct engine_loop **out)
{
    struct engine_loop *l;
    TRY(MEM_NEW(&l));
    l->hooks = *hooks;
    enum err e = start(l, config);
    if (e) {
        engine_loop_destroy(l);
        return e;
    }
    *out = l;
    return OK;
}

void engine_loop_destroy(struct engine_loop *l)
{
    if (!l) return;
    if (l->started) {
        pthread_mutex_lock(&l->lock);
        l->stop = true;
        pthread_cond_signal(&l->wake);
        pthread_mutex_unlock(&l->lock);
        pthread_join(l->thread, NULL);
    }
    for (uint32_t i = 0; i < l->inbox.n; i++)
        if (l->inbox.notes[i].kind == NOTE_SUBMIT) {
            err_set(ERR_NOT_READY, "the server stops");
            refuse(l->inbox.notes[i].request, ERR_NOT_READY);
        }
    engine_destroy(l->engine);
    record_close(l->record);
    inbox_fini(&l->inbox);
    inbox_fini(&l->working);
    arena_fini(&l->arena);
    pthread_mutex_destroy(&l->lock);
    pthread_cond_destroy(&l->wake);
    pthread_cond_destroy(&l->rested);
    mem_free(l);
}

void engine_loop_stats(struct engine_loop *l, struct engine_stats *out)
{
    pthread_mutex_lock(&l->lock);
    *out = l->stats;
    pthread_mutex_unlock(&l->lock);
}

uint32_t engine_loop_retry_after_s(struct engine_loop *l)
{
    pthread_mutex_lock(&l->lock);
    struct engine_limits limits = l->limits;
    limits.n_queued += l->n_pending;
    limits.n_queued_tokens += l->n_pending_tokens;
    pthread_mutex_unlock(&l->lock);
    uint32_t n_mean = limits.n_queued ? (uint32_t)(limits.n_queued_tokens / limits.n_queued) : 1;
    uint32_t s = limits_retry_after_s(&limits, 1, n_mean);
    return s ? s : 1;
}

int64_t engine_loop_now_us(const struct engine_loop *l)
{
    (void)l;
    return clock_monotonic_us();
}

bool engine_loop_drain(struct engine_loop *l, int64_t timeout_us)
{
    int64_t until_us = clock_monotonic_us() + timeout_us;
    struct timespec until = {.tv_sec = until_us / 1000000, .tv_nsec = until_us % 1000000 * 1000};
    pthread_mutex_lock(&l->lock);
    l->draining = true;
    pthread_cond_signal(&l->wake);
    while ((l->n_alive || l->inbox.n || l->busy) && clock_monotonic_us() < until_us)
        pthread_cond_timedwait(&l->rested, &l->lock, &until);
    bool empty = !l->n_alive && !l->inbox.n && !l->busy;
    pthread_mutex_unlock(&l->lock);
    return empty;
}
