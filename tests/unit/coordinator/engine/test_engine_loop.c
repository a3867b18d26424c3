/* Goal: the engine's thread accepts, answers, refuses, drains and stops; what it recorded replays
 * to the same plans. Method: many client threads against one false group on a thread of its own,
 * with a loss of the group in the middle; then the record, whole, cut, and with one byte changed.
 */
#include "base/clock.h"
#include "base/mem.h"
#include "coordinator/engine/engine_loop.h"
#include "coordinator/engine/record.h"
#include "coordinator/engine/sim_worker.h"

#include <pthread.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
// clang-format off
#include <cmocka.h>
// clang-format on

enum { THREADS = 4, REQUESTS = 60, PROMPT = 20, OUTPUT = 25 };

struct fake { /* a group: a thread that computes what is sent to it */
    struct engine_loop *loop;
    struct sim_worker worker;
    pthread_mutex_t lock;
    pthread_cond_t news;
    struct buf plans[64];
    uint32_t first, n, n_failed;
    uint64_t epoch;
    bool stop;
    pthread_t thread;
};

struct client {
    struct sink sink;
    struct request request;
    pthread_mutex_t *lock;
    int32_t tokens[OUTPUT];
    uint32_t n;
    enum finish finish;
    bool ended, destroyed, flushed;
};

static pthread_mutex_t client_lock = PTHREAD_MUTEX_INITIALIZER;

static enum err fake_send(void *ctx, uint32_t group, const void *bytes, size_t n)
{
    struct fake *f = ctx;
    (void)group;
    pthread_mutex_lock(&f->lock);
    struct buf *b = &f->plans[(f->first + f->n++) % 64];
    buf_clear(b);
    enum err e = f->n > 64 ? ERR_FULL : buf_add(b, bytes, n);
    pthread_cond_signal(&f->news);
    pthread_mutex_unlock(&f->lock);
    return e;
}

static void fake_failed(void *ctx, uint32_t group, uint64_t epoch, const char *why)
{
    (void)group, (void)epoch, (void)why;
    ((struct fake *)ctx)->n_failed++;
}

static void fake_answer(struct fake *f, const struct buf *plan)
{
    struct arena arena;
    struct step_plan p;
    struct step_result r;
    struct buf bytes;
    arena_init(&arena, 1 << 14, 0);
    buf_init(&bytes, 0);
    if (plan_decode(plan->data, plan->n, &arena, &p)) abort();
    if (p.epoch == f->epoch) {
        if (!sim_worker_apply(&f->worker, &p, &r)) {
            fprintf(stderr, "%s\n", f->worker.fault);
            abort();
        }
        if (step_result_encode(&r, false, &bytes)) abort();
        engine_loop_result(f->loop, 0, f->epoch, bytes.data, bytes.n);
    }
    buf_fini(&bytes);
    arena_fini(&arena);
}

static void *fake_run(void *ctx)
{
    struct fake *f = ctx;
    pthread_mutex_lock(&f->lock);
    for (;;) {
        while (!f->n && !f->stop)
            pthread_cond_wait(&f->news, &f->lock);
        if (f->stop) break;
        fake_answer(f, &f->plans[f->first]); /* the loop's lock is never held while it sends */
        f->first = (f->first + 1) % 64;
        f->n--;
    }
    pthread_mutex_unlock(&f->lock);
    return NULL;
}

static void fake_up(struct fake *f)
{
    struct group_info info = {.n_ranks = 1,
                              .block_size = 4,
                              .n_blocks = 100,
                              .n_slots_max = 8,
                              .step_tokens_max = 64,
                              .step_prompt_max = 12,
                              .step_rows_max = 64,
                              .context_max = 200,
                              .vocab_size = SIM_VOCABULARY,
                              .block_bytes = 64};
    pthread_mutex_lock(&f->lock);
    info.epoch = ++f->epoch;
    f->n = f->first = 0;
    sim_worker_fini(&f->worker);
    assert_int_equal(sim_worker_init(&f->worker, 8, 100, 0, 4, 200), OK);
    f->worker.step_tokens_max = f->worker.step_rows_max = 64;
    engine_loop_group_up(f->loop, 0, &info);
    pthread_mutex_unlock(&f->lock);
}

static void client_emit(struct sink *sink, const struct emission *e)
{
    struct client *c = (struct client *)sink;
    pthread_mutex_lock(&client_lock);
    for (uint32_t i = 0; i < e->n_tokens && c->n < OUTPUT; i++)
        c->tokens[c->n++] = e->tokens[i].token;
    c->finish = e->finish;
    c->ended |= e->last;
    c->flushed = false;
    pthread_mutex_unlock(&client_lock);
}

static void client_flush(struct sink *sink)
{
    pthread_mutex_lock(&client_lock);
    ((struct client *)sink)->flushed = true;
    pthread_mutex_unlock(&client_lock);
}

static void client_destroy(struct request *r)
{
    struct client *c = (struct client *)((char *)r - offsetof(struct client, request));
    pthread_mutex_lock(&client_lock);
    assert_true(c->ended && c->flushed && !c->destroyed);
    c->destroyed = true;
    pthread_mutex_unlock(&client_lock);
    mem_free(r->tokens);
}

static void client_init(struct client *c, uint64_t id)
{
    *c = (struct client){.sink = {client_emit, client_flush}};
    c->request = (struct request){.id = id,
                                  .sink = &c->sink,
                                  .n_tokens = PROMPT,
                                  .max_tokens = OUTPUT,
                                  .n_choices = 1,
                                  .tenant = id % 3,
                                  .destroy = client_destroy};
    sampling_params_default(&c->request.sampling);
    c->request.sampling.seed = id;
    assert_int_equal(MEM_NEW_ARRAY(PROMPT, &c->request.tokens), OK);
    for (uint32_t i = 0; i < PROMPT; i++)
        c->request.tokens[i] = (int32_t)((i * 7 + (i > 10 ? id : 0)) % SIM_VOCABULARY);
}

static struct client clients[THREADS][REQUESTS];
struct caller {
    struct engine_loop *loop;
    int index;
    uint32_t n_refused;
};

static void *call(void *ctx)
{
    struct caller *c = ctx;
    for (int i = 0; i < REQUESTS; i++) {
        struct client *q = &clients[c->index][i];
        enum err e;
        while ((e = engine_loop_submit(c->loop, &q->request)) == ERR_FULL) {
            c->n_refused++;
            clock_sleep_us(500);
        }
        if (e) abort();
        if (i % 9 == 4) engine_loop_cancel(c->loop, q->request.id, -1, ENGINE_CANCEL_CLIENT);
    }
    return NULL;
}

static void check_client(const struct client *c)
{
    uint64_t prefix = 1;
    int32_t last = 0;
    struct sampling_params p;
    sampling_params_default(&p);
    p.seed = c->request.id;
    assert_true(c->destroyed);
    for (uint32_t i = 0; i < PROMPT; i++)
        prefix = model_prefix(
            prefix, last = (int32_t)((i * 7 + (i > 10 ? c->request.id : 0)) % SIM_VOCABULARY));
    for (uint32_t i = 0; i < c->n; i++) {
        last = model_next(prefix, last, i, &p);
        assert_int_equal(c->tokens[i], last);
        prefix = model_prefix(prefix, last);
    }
    assert_true(c->finish == FINISH_CANCELLED || (c->finish == FINISH_LENGTH && c->n == OUTPUT));
}

static void open_all(struct fake *f, const char *record_path)
{
    struct engine_config config = {.n_groups = 1,
                                   .pipeline_depth = 2,
                                   .prefix_cache = true,
                                   .hash_salt = 11,
                                   .n_queued_max = 16,
                                   .record_path = record_path};
    struct engine_hooks hooks = {fake_send, fake_failed, f};
    *f = (struct fake){0};
    pthread_mutex_init(&f->lock, NULL);
    pthread_cond_init(&f->news, NULL);
    assert_int_equal(engine_loop_create(&config, &hooks, &f->loop), OK);
    assert_int_equal(pthread_create(&f->thread, NULL, fake_run, f), 0);
}

static void close_fake(struct fake *f)
{
    pthread_mutex_lock(&f->lock);
    f->stop = true;
    pthread_cond_signal(&f->news);
    pthread_mutex_unlock(&f->lock);
    pthread_join(f->thread, NULL);
    engine_loop_destroy(f->loop);
    sim_worker_fini(&f->worker);
    for (int i = 0; i < 64; i++)
        buf_fini(&f->plans[i]);
    pthread_mutex_destroy(&f->lock);
    pthread_cond_destroy(&f->news);
}

static char record_path[256];

static void many_clients_through_a_loss(void **state)
{
    static struct fake f;
    struct caller callers[THREADS];
    pthread_t threads[THREADS];
    struct client early;
    struct engine_stats stats;
    (void)state;
    open_all(&f, record_path);
    client_init(&early, 1);
    assert_int_equal(engine_loop_submit(f.loop, &early.request), ERR_NOT_READY);
    mem_free(early.request.tokens);
    fake_up(&f);
    for (int t = 0; t < THREADS; t++)
        for (int i = 0; i < REQUESTS; i++)
            client_init(&clients[t][i], (uint64_t)(t * REQUESTS + i + 1));
    do
        engine_loop_stats(f.loop, &stats);
    while (!stats.context_max);
    for (int t = 0; t < THREADS; t++) {
        callers[t] = (struct caller){f.loop, t, 0};
        pthread_create(&threads[t], NULL, call, &callers[t]);
    }
    clock_sleep_us(20000);
    engine_loop_group_down(f.loop, 0, 1);
    clock_sleep_us(5000);
    fake_up(&f);
    for (int t = 0; t < THREADS; t++)
        pthread_join(threads[t], NULL);
    assert_true(engine_loop_drain(f.loop, 60000000));
    client_init(&early, 5000);
    assert_int_equal(engine_loop_submit(f.loop, &early.request), ERR_NOT_READY);
    mem_free(early.request.tokens);
    engine_loop_stats(f.loop, &stats);
    assert_int_equal(stats.n_running + stats.n_waiting, 0);
    assert_int_equal(stats.n_group_losses, 1);
    assert_int_equal(f.n_failed, 0);
    close_fake(&f);
    for (int t = 0; t < THREADS; t++)
        for (int i = 0; i < REQUESTS; i++)
            check_client(&clients[t][i]);
}

static void stopping_ends_what_is_alive(void **state)
{
    static struct fake f;
    static struct client c[3];
    struct engine_stats stats;
    (void)state;
    open_all(&f, NULL);
    pthread_mutex_lock(&f.lock); /* the group never answers */
    struct group_info info = {.epoch = 9,
                              .n_ranks = 1,
                              .block_size = 4,
                              .n_blocks = 100,
                              .n_slots_max = 2,
                              .step_tokens_max = 64,
                              .step_rows_max = 64,
                              .context_max = 200,
                              .vocab_size = SIM_VOCABULARY};
    engine_loop_group_up(f.loop, 0, &info);
    pthread_mutex_unlock(&f.lock);
    do
        engine_loop_stats(f.loop, &stats);
    while (!stats.context_max);
    for (int i = 0; i < 3; i++) {
        client_init(&c[i], (uint64_t)i + 1);
        assert_int_equal(engine_loop_submit(f.loop, &c[i].request), OK);
    }
    assert_false(engine_loop_drain(f.loop, 20000));
    close_fake(&f);
    for (int i = 0; i < 3; i++)
        assert_true(c[i].destroyed && c[i].finish == FINISH_ERROR);
}

static void the_record_replays_to_the_same_plans(void **state)
{
    struct buf file;
    struct replay found, again;
    (void)state;
    buf_init(&file, 0);
    assert_int_equal(buf_read_file(&file, record_path, 1 << 28), OK);
    if (replay_bytes(file.data, file.n, &found)) fail_msg("%s", err_detail());
    assert_int_equal(found.n_requests, THREADS * REQUESTS);
    assert_int_equal(found.n_ended, THREADS * REQUESTS);
    assert_true(found.n_plans > 100);
    assert_int_equal(replay_bytes(file.data, file.n, &again), OK);
    assert_true(found.tokens_digest == again.tokens_digest);
    assert_int_equal(replay_bytes(file.data, file.n / 2, &again),
                     OK); /* cut off: as far as it goes */
    assert_true(again.n_plans < found.n_plans);
    uint32_t n_noticed = 0;
    for (size_t at = 100; at < file.n;
         at += file.n / 40) { /* a changed byte is an error or another run */
        file.data[at] ^= 1;
        enum err e = replay_bytes(file.data, file.n, &again);
        n_noticed +=
            e != OK || again.tokens_digest != found.tokens_digest || again.n_plans != found.n_plans;
        file.data[at] ^= 1;
    }
    assert_true(n_noticed > 20);
    assert_int_equal(replay_bytes("nonsense", 8, &again), ERR_FORMAT);
    assert_non_null(strstr(err_detail(), "not a record"));
    assert_int_equal(replay_bytes("HDLREC1\n", 8, &again), ERR_FORMAT);
    assert_non_null(strstr(err_detail(), "format 1, this one reads 2"));
    buf_fini(&file);
    const char *keep = getenv("HEDDLE_KEEP_RECORD"); /* to make a seed for the fuzzer */
    if (keep)
        rename(record_path, keep);
    else
        unlink(record_path);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(many_clients_through_a_loss),
        cmocka_unit_test(stopping_ends_what_is_alive),
        cmocka_unit_test(the_record_replays_to_the_same_plans),
    };
    snprintf(record_path, sizeof record_path, "%s/engine-loop-%d.rec",
             getenv("HEDDLE_BINARY_DIR") ? getenv("HEDDLE_BINARY_DIR") : "/tmp", (int)getpid());
    return cmocka_run_group_tests(tests, NULL, NULL);
}
