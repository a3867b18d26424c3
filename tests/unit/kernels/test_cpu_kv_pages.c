/* Goal: a KV cache is there at once, in a few small pages, and moves to huge ones beside the steps
 * that use it without changing a byte.
 * Method: blocks at the beginning, behind it and at the end of a cache of 128 MiB hold a pattern;
 * one thread moves the parts while another reads and rewrites them. What the process has resident
 * is asked of the system. */
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
    while (m->b->ops->kv_settle(m->b, m->kv, m->n_parts))
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

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(moves_beside_steps)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
