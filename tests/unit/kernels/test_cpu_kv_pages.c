/* Goal: a KV cache is there at once, in a few small pages, and moves to huge ones beside the steps
 * that use it without changing a byte; blocks have their memory before they are written.
 * Method: blocks at the beginning, behind it and at the end of a cache of 128 MiB hold a pattern;
 * one thread moves the parts while another reads and rewrites them. What is resident is asked of the
 * system. */
#include "kernels/cpu/cpu.h"
#include "unit/kernels/cpu_test.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>

enum { LAYERS = 2, HEADS = 2, STRETCHES = 2 * LAYERS * HEADS, BLOCKS = 4096, BLOCK_BYTES = 32768 };

static const int32_t used[] = {0, 1, 5, 63, 64, 512, 513, 4000, BLOCKS - 1};
enum { N_USED = sizeof used / sizeof *used };

struct moving {
    struct backend *b;
    struct kv_cache *kv;
    _Atomic bool done;
    int n_parts;
};

/* Kilobytes of this process: "Rss:" or "AnonHugePages:"; -1 where the system does not say. */
static long kilobytes(const char *what)
{
    char line[256];
    long kb = -1;
    FILE *f = fopen("/proc/self/smaps_rollup", "r");
    while (f && fgets(line, sizeof line, f))
        if (!strncmp(line, what, strlen(what))) kb = strtol(line + strlen(what), NULL, 10);
    if (f) fclose(f);
    return kb;
}

static void pattern(uint8_t *bytes, int32_t block, int round)
{
    for (int i = 0; i < BLOCK_BYTES; i++)
        bytes[i] = (uint8_t)(block * 31 + i * 7 + (i >> 8) + round);
}

static void *move_main(void *arg)
{
    struct moving *m = arg;
    while (m->b->ops->kv_settle(m->b, m->kv, 0))
        m->n_parts++;
    atomic_store(&m->done, true);
    return NULL;
}

static void check_blocks(struct moving *m, int round, bool rewrite)
{
    static uint8_t want[BLOCK_BYTES], have[BLOCK_BYTES];
    for (int i = 0; i < N_USED; i++) {
        pattern(want, used[i], round);
        m->b->ops->kv_save(m->b, m->kv, used[i], have);
        assert_memory_equal(have, want, BLOCK_BYTES);
        pattern(want, used[i], round + 1);
        if (rewrite) m->b->ops->kv_load(m->b, m->kv, used[i], want);
    }
}

static void moves_beside_steps(void **state)
{
    struct backend *b = test_open("reference");
    struct kv_cache_args args = {LAYERS, HEADS, 64, 32, BLOCKS, DTYPE_BF16};
    struct moving m = {.b = b};
    static uint8_t bytes[BLOCK_BYTES];
    pthread_t thread;
    int round = 0;
    (void)state;
    assert_int_equal(b->ops->kv_bytes(b, &args), (size_t)BLOCKS * BLOCK_BYTES);
    long before = kilobytes("Rss:"), huge_before = kilobytes("AnonHugePages:");
    CHECK(b->ops->kv_create(b, &args, &m.kv));
    bool gathers = !madvise(NULL, 0, 25); /* MADV_COLLAPSE: Linux 6.1 */
    if (gathers && before >= 0) assert_true(kilobytes("Rss:") - before < STRETCHES * 512);
    for (int i = 0; i < N_USED; i++) {
        pattern(bytes, used[i], 0);
        b->ops->kv_load(b, m.kv, used[i], bytes);
    }
    assert_int_equal(pthread_create(&thread, NULL, move_main, &m), 0);
    while (!atomic_load(&m.done))
        check_blocks(&m, round++, true);
    pthread_join(thread, NULL);
    check_blocks(&m, round, false);
    assert_int_equal(m.n_parts, gathers ? STRETCHES : 0);
    print_message("%d parts beside %d rounds, %ld kB more in huge pages\n", m.n_parts, round,
                  kilobytes("AnonHugePages:") - huge_before);
    b->ops->kv_destroy(b, m.kv);
    b->ops->close(b);
}

/* Of the memory of a block, whether all is there. */
static bool is_resident(const struct kv_cache *kv, int32_t block)
{
    unsigned char pages[2];
    for (int stretch = 0; stretch < STRETCHES; stretch++) {
        uint8_t *half = kv_head(kv, stretch / (2 * HEADS), block, stretch / 2 % HEADS) +
                        (size_t)(stretch % 2) * kv->v_offset;
        uintptr_t begin = (uintptr_t)half & ~(uintptr_t)4095;
        size_t n = (uintptr_t)half + kv->half_bytes - begin;
        assert_true(n <= sizeof pages * 4096);
        assert_int_equal(mincore((void *)begin, n, pages), 0);
        for (size_t i = 0; i < (n + 4095) / 4096; i++)
            if (!(pages[i] & 1)) return false;
    }
    return true;
}

static bool fetches_ahead(void)
{
    return !madvise(NULL, 0, 23); /* MADV_POPULATE_WRITE: Linux 5.14 */
}

static int settle_all(struct backend *b, struct kv_cache *kv, int n_blocks)
{
    int n = 0;
    while (b->ops->kv_settle(b, kv, n_blocks))
        n++;
    return n;
}

/* 4095 blocks: stretches begin in the middle of pages. */
static void memory_is_there_before_blocks(void **state)
{
    enum { AHEAD = (512 << 10) / (BLOCK_BYTES / STRETCHES) };
    struct backend *b = test_open("reference");
    struct kv_cache_args args = {LAYERS, HEADS, 64, 32, BLOCKS - 1, DTYPE_BF16};
    struct kv_cache *kv;
    (void)state;
    CHECK(b->ops->kv_create(b, &args, &kv));
    if (!fetches_ahead()) {
        b->ops->kv_destroy(b, kv);
        b->ops->close(b);
        skip();
    }
    settle_all(b, kv, 0);
    assert_false(is_resident(kv, 1000)); /* what nobody uses takes no memory */
    static const int n_used[] = {1, 200, 383, 384, 1500, 1501, 3999, BLOCKS - 1};
    for (size_t i = 0; i < sizeof n_used / sizeof *n_used; i++) {
        int n_parts = settle_all(b, kv, n_used[i]), n_ahead = n_used[i] + AHEAD;
        assert_true(n_parts <= STRETCHES);
        assert_int_equal(settle_all(b, kv, n_used[i]), 0);
        for (int block = 0; block < n_ahead && block < BLOCKS - 1; block++)
            if (!is_resident(kv, block)) fail_msg("%d of %d used", block, n_used[i]);
        if (n_ahead + 1024 < BLOCKS) assert_false(is_resident(kv, n_ahead + 1024));
    }
    b->ops->kv_destroy(b, kv);
    b->ops->close(b);
}

/* What is asked for grows while a round is under way. */
static void rounds_go_on_from_each_other(void **state)
{
    struct backend *b = test_open("reference");
    struct kv_cache_args args = {LAYERS, HEADS, 64, 32, BLOCKS, DTYPE_BF16};
    struct kv_cache *kv;
    (void)state;
    CHECK(b->ops->kv_create(b, &args, &kv));
    settle_all(b, kv, 0);
    for (int n = 900; n < 3000; n += 300)
        assert_int_equal(b->ops->kv_settle(b, kv, n), fetches_ahead());
    settle_all(b, kv, 3000);
    for (int block = 0; fetches_ahead() && block < 3000; block++)
        assert_true(is_resident(kv, block));
    b->ops->kv_destroy(b, kv);
    b->ops->close(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(moves_beside_steps),
        cmocka_unit_test(memory_is_there_before_blocks),
        cmocka_unit_test(rounds_go_on_from_each_other),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
