/* Fuzz target: what hostile or broken workers say. The input is a list of records, a byte that says
 * what happens on which of four streams, and for a message its length and bytes. The streams are
 * fakes, so that an input runs without a network; the cluster behind them is the real one. */
#include "base/clock.h"
#include "base/log.h"
#include "coordinator/cluster/cluster_impl.h"
#include "proto/rpc_impl.h"

#include <stdio.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum {
    STREAMS = 4,
    OP_MESSAGE = 0,
    OP_OPEN,
    OP_CLOSE,
    OP_PLAN,
    OP_TICK,
    OP_FULL,
    OP_HALF_CLOSE,
    OP_STATUS
};

struct fake {
    struct rpc_call base;
    bool open, ended, full;
};

static struct fake fakes[STREAMS];
static uint64_t up_epoch;

static enum err fake_send(struct rpc_call *c, struct rpc_bytes *bytes)
{
    (void)bytes;
    return ((struct fake *)c)->full ? ERR_FULL : OK;
}
static void fake_finish(struct rpc_call *c, int code, const char *text)
{
    (void)code, (void)text;
    ((struct fake *)c)->ended = true;
}
static void fake_cancel(struct rpc_call *c)
{
    ((struct fake *)c)->ended = true;
}
static void fake_free(struct rpc_call *c)
{
    (void)c;
}

static const struct rpc_call_ops fake_ops = {
    .send = fake_send, .finish = fake_finish, .cancel = fake_cancel, .free = fake_free};

static void on_up(void *ctx, uint32_t group, const struct group_info *info)
{
    (void)ctx;
    ASSERT(group < 1 && info->n_blocks > 0 && info->block_size > 0 && info->n_ranks == 2);
}
static void on_down(void *ctx, uint32_t group, uint64_t epoch)
{
    (void)ctx;
    ASSERT(group < 1 && epoch > 0);
}
static void on_result(void *ctx, uint32_t group, uint64_t epoch, const void *bytes, size_t n)
{
    (void)ctx;
    ASSERT(group < 1 && epoch == up_epoch && bytes && n);
}

static void fake_open(struct cluster *c, struct fake *f)
{
    if (f->open) return;
    *f = (struct fake){.base = {.ops = &fake_ops}, .open = true};
    atomic_init(&f->base.refs, 1);
    cluster_stream_open(&f->base, c);
}

static void fake_close(struct cluster *c, struct fake *f)
{
    if (f->open) cluster_stream_close(&f->base, c, true);
    f->open = false;
}

static void plan_say(struct cluster *c)
{
    unsigned char plan[] = {0x1a, 4, 0x08, (unsigned char)(c->groups[0].epoch & 0x7f), 0x10, 1};
    if (cluster_send_plan(c, 0, plan, sizeof plan) == OK)
        ASSERT(c->groups[0].state == CLUSTER_GROUP_UP);
}

static void status_look(struct cluster *c)
{
    struct cluster_status *s;
    if (cluster_status_create(c, &s)) return;
    ASSERT(s->n_joined <= 2 && s->n_pending <= STREAMS && s->n_groups_up <= 1);
    for (const char *p = s->ranks[0].host; *p; p++)
        ASSERT(*p >= ' ' && *p <= '~');
    cluster_status_destroy(s);
}

static void tick(struct cluster *c)
{
    pthread_mutex_lock(&c->mutex);
    membership_tick(c, clock_monotonic_us());
    group_tick(c, &c->groups[0], clock_monotonic_us());
    pthread_mutex_unlock(&c->mutex);
}

/* One record; returns how many bytes of the rest it took. */
static size_t record_run(struct cluster *c, const uint8_t *data, size_t size)
{
    struct fake *f = &fakes[data[0] % STREAMS];
    size_t n = 0;
    up_epoch = c->groups[0].epoch;
    switch (data[0] >> 4 & 7) {
    case OP_MESSAGE:
        if (size < 2) break;
        n = 1 + (data[1] < size - 2 ? data[1] : size - 2);
        if (f->open && !f->ended)
            cluster_stream_message(&f->base, c, (struct span){(const char *)data + 2, n - 1});
        break;
    case OP_OPEN:
        fake_open(c, f);
        break;
    case OP_CLOSE:
        fake_close(c, f);
        break;
    case OP_PLAN:
        plan_say(c);
        break;
    case OP_TICK:
        tick(c);
        break;
    case OP_FULL:
        f->full = !f->full;
        break;
    case OP_HALF_CLOSE:
        if (f->open) cluster_stream_half_close(&f->base, c);
        break;
    default:
        status_look(c);
        break;
    }
    return 1 + n;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct cluster *c;
    struct cluster_hooks hooks = {.group_up = on_up, .group_down = on_down, .result = on_result};
    /* The clock's part is played by OP_TICK alone. */
    struct cluster_config config = {.address = "local:fuzz",
                                    .n_groups = 1,
                                    .n_ranks = 2,
                                    .heartbeat_ms = 100000,
                                    .dead_ms = 1000000};
    log_set_level(LOG_ERROR);
    if (cluster_create(&config, &hooks, &c)) return 0;
    for (int i = 0; i < STREAMS; i++)
        fakes[i].open = false;
    for (int i = 0; i < 2; i++)
        fake_open(c, &fakes[i]);
    for (size_t at = 0; at < size;)
        at += record_run(c, data + at, size - at);
    for (int i = 0; i < STREAMS; i++)
        fake_close(c, &fakes[i]);
    cluster_destroy(c);
    return 0;
}
