/* Goal: what comes back from the disk is what went there, or is said to be lost. Method: blocks go
 * out and come back through a real file; then the file is overwritten, cut short, made read-only,
 * and the epoch changes while transfers wait. */
#include "base/clock.h"
#include "base/log.h"
#include "base/mem.h"
#include "worker/kv_disk_impl.h"

#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
// clang-format off
#include <cmocka.h>
// clang-format on

enum { HOST = 16, DISK = 12, BYTES = 5000 };
static char host[HOST][BYTES];

struct ear { /* hears on the disk's thread */
    pthread_mutex_t lock;
    pthread_cond_t news;
    struct moved last;
    uint64_t failed[2][64];
    uint32_t n_failed[2];
};

static void hear(void *ctx, const struct moved *m)
{
    struct ear *e = ctx;
    pthread_mutex_lock(&e->lock);
    e->last = *m;
    for (uint32_t i = 0; i < m->n_fetches_failed; i++)
        e->failed[0][e->n_failed[0]++] = m->fetches_failed[i];
    for (uint32_t i = 0; i < m->n_spills_failed; i++)
        e->failed[1][e->n_failed[1]++] = m->spills_failed[i];
    pthread_cond_signal(&e->news);
    pthread_mutex_unlock(&e->lock);
}

static struct ear *ear_open(struct kv_disk *d)
{
    static struct ear e;
    e = (struct ear){.lock = PTHREAD_MUTEX_INITIALIZER, .news = PTHREAD_COND_INITIALIZER};
    kv_disk_listen(d, hear, &e);
    return &e;
}

static void wait_for(struct ear *e, uint64_t n_fetched, uint64_t n_spilled)
{
    pthread_mutex_lock(&e->lock);
    while (e->last.n_fetched < n_fetched || e->last.n_spilled < n_spilled)
        pthread_cond_wait(&e->news, &e->lock);
    pthread_mutex_unlock(&e->lock);
}

static const char *folder(void)
{
    const char *dir = getenv("TMPDIR");
    return dir ? dir : "/tmp";
}

static struct kv_disk *open_disk(void)
{
    struct kv_disk *d;
    for (int i = 0; i < HOST; i++)
        for (int k = 0; k < BYTES; k++)
            host[i][k] = (char)(i * 31 + k * 7);
    assert_int_equal(kv_disk_open(folder(), DISK, host, HOST, BYTES, &d), OK);
    kv_disk_reset(d, 5);
    return d;
}

static void move(struct kv_disk *d, bool out, uint32_t n)
{
    struct plan_pair pairs[DISK];
    for (uint32_t i = 0; i < n; i++)
        pairs[i] = out ? (struct plan_pair){i, DISK - 1 - i} : (struct plan_pair){DISK - 1 - i, i};
    struct step_plan plan = {0};
    if (out)
        plan.n_spills = n, plan.spills = pairs;
    else
        plan.n_fetches = n, plan.fetches = pairs;
    assert_int_equal(kv_disk_start(d, &plan), OK);
}

static bool is_whole(uint32_t i)
{
    for (int k = 0; k < BYTES; k++)
        if (host[i][k] != (char)((int)i * 31 + k * 7)) return false;
    return true;
}

static void blocks_come_back_as_they_went(void **state)
{
    (void)state;
    struct kv_disk *d = open_disk();
    struct ear *e = ear_open(d);
    move(d, true, DISK);
    wait_for(e, 0, DISK);
    memset(host, 0, sizeof host);
    move(d, false, DISK);
    wait_for(e, DISK, DISK);
    for (uint32_t i = 0; i < DISK; i++)
        assert_true(is_whole(i));
    assert_int_equal(e->last.epoch, 5);
    assert_int_equal(e->n_failed[0] + e->n_failed[1], 0);
    assert_true(e->last.fetch_ns > 0);
    kv_disk_close(d);
}

static void a_changed_byte_is_a_lost_block(void **state)
{
    (void)state;
    struct kv_disk *d = open_disk();
    struct ear *e = ear_open(d);
    move(d, true, 4);
    wait_for(e, 0, 4);
    char byte;
    off_t at = (off_t)((DISK - 1 - 2) * d->stride) + 4321; /* in the third */
    assert_int_equal(pread(d->fd, &byte, 1, at), 1);
    byte ^= 16;
    assert_int_equal(pwrite(d->fd, &byte, 1, at), 1);
    memset(host, 0x33, sizeof host);
    move(d, false, 4);
    wait_for(e, 4, 4);
    assert_int_equal(e->n_failed[0], 1);
    assert_int_equal(e->failed[0][0], 2);
    assert_true(is_whole(0) && is_whole(1) && is_whole(3));
    assert_int_equal(host[2][0], 0x33); /* nothing of it reached the host */
    kv_disk_close(d);
}

static void a_file_cut_short_loses_what_is_gone(void **state)
{
    (void)state;
    struct kv_disk *d = open_disk();
    struct ear *e = ear_open(d);
    move(d, true, 4);
    wait_for(e, 0, 4);
    assert_int_equal(ftruncate(d->fd, (off_t)((DISK - 2) * d->stride) + 100), 0);
    memset(host, 0, sizeof host);
    move(d, false, 4);
    wait_for(e, 4, 4);
    assert_int_equal(e->n_failed[0], 2); /* the last two of the file were the first two */
    assert_true(e->failed[0][0] == 0 && e->failed[0][1] == 1);
    assert_true(is_whole(2) && is_whole(3));
    kv_disk_close(d);
}

static void what_cannot_be_written_is_said_and_never_read(void **state)
{
    (void)state;
    struct kv_disk *d = open_disk();
    struct ear *e = ear_open(d);
    move(d, true, 2);
    wait_for(e, 0, 2);
    int full = open("/dev/full", O_RDWR), whole = dup(d->fd);
    assert_true(full >= 0 && whole >= 0 && dup2(full, d->fd) >= 0);
    move(d, true, 2);
    wait_for(e, 0, 4);
    assert_int_equal(e->n_failed[1], 2);
    assert_true(dup2(whole, d->fd) >= 0);
    move(d, false, 2); /* whatever the file holds, it is not what was asked to be there */
    wait_for(e, 2, 4);
    assert_int_equal(e->n_failed[0], 2);
    close(full), close(whole);
    kv_disk_close(d);
}

static void an_epochs_end_drops_what_waits(void **state)
{
    (void)state;
    struct kv_disk *d = open_disk();
    struct ear *e = ear_open(d);
    for (uint64_t round = 0; round < 200; round++) {
        move(d, true, DISK);
        kv_disk_reset(d, 100 + round);
        move(d, true, 1);
        pthread_mutex_lock(&e->lock);
        while (e->last.epoch != 100 + round || e->last.n_spilled != 1)
            pthread_cond_wait(&e->news, &e->lock);
        pthread_mutex_unlock(&e->lock);
        memset(host[0], 0, BYTES);
        move(d, false, 1);
        wait_for(e, 1, 1);
        assert_true(is_whole(0));
        kv_disk_reset(d, 1000 + round);
        pthread_mutex_lock(&e->lock);
        e->last = (struct moved){0};
        pthread_mutex_unlock(&e->lock);
    }
    assert_int_equal(e->n_failed[0] + e->n_failed[1], 0);
    kv_disk_close(d);
}

static void too_many_are_refused(void **state)
{
    (void)state;
    static struct plan_pair pairs[PLAN_TRANSFERS_MAX];
    struct kv_disk *d = open_disk();
    struct step_plan plan = {.n_spills = PLAN_TRANSFERS_MAX, .spills = pairs};
    pthread_mutex_lock(&d->host_lock); /* the thread stands still */
    assert_int_equal(kv_disk_start(d, &plan), OK);
    assert_int_equal(kv_disk_start(d, &plan), ERR_FORMAT);
    pthread_mutex_unlock(&d->host_lock);
    kv_disk_close(d);
}

static void a_folder_that_is_not_there_is_named(void **state)
{
    (void)state;
    struct kv_disk *d;
    assert_int_equal(kv_disk_open("/not/there", 2, host, HOST, BYTES, &d), ERR_IO);
    assert_non_null(strstr(err_detail(), "/not/there"));
    assert_int_equal(kv_disk_open(folder(), 1ull << 40, host, HOST, BYTES, &d), ERR_IO);
    assert_non_null(strstr(err_detail(), "free"));
    assert_int_equal(kv_disk_blocks(3 * 8192, BYTES), 3);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(blocks_come_back_as_they_went),
        cmocka_unit_test(a_changed_byte_is_a_lost_block),
        cmocka_unit_test(a_file_cut_short_loses_what_is_gone),
        cmocka_unit_test(what_cannot_be_written_is_said_and_never_read),
        cmocka_unit_test(an_epochs_end_drops_what_waits),
        cmocka_unit_test(too_many_are_refused),
        cmocka_unit_test(a_folder_that_is_not_there_is_named),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
