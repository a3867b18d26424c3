/* Goal: shared-memory collectives give every rank the same bits in rank order, for any size, and a
 * dead, absent or aborting peer is an error on all ranks instead of a hang.
 * Method: forked processes as ranks, also more of them than cores; one of them is killed. */
#include "base/clock.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/rand.h"
#include "processes.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

static struct backend cpu = {.ops = &backend_cpu, .activation_dtype = DTYPE_F32};
static const struct collective_options options = {
    .reduce_bytes_max = 8 << 20, .gather_bytes_max = 8 << 20, .timeout_ms = 20000};

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "rank %d: line %d: %s (%s)\n", chair->rank, __LINE__, #condition,      \
                    err_detail());                                                                 \
            return 1;                                                                              \
        }                                                                                          \
    } while (0)

static float value_of(int rank, int round, int64_t i)
{
    struct rand r = rand_seeded((uint64_t)rank * 1000003 + (uint64_t)round * 7919 + (uint64_t)i);
    return (float)(rand_unit(&r) * 2 - 1) * (i % 5 ? 1.0f : 1e6f); /* order matters */
}

static float expected(int size, int round, int64_t i)
{
    float sum = value_of(0, round, i);
    for (int r = 1; r < size; r++)
        sum += value_of(r, round, i);
    return sum;
}

static enum err open_on(struct chair *chair, const char *name, struct collective **out)
{
    struct bootstrap boot = hall_boot(chair);
    return collective_open(name, &cpu, (struct group){chair->rank, chair->hall->size}, &boot,
                           &options, out);
}

/* Whether /dev/shm still shows a segment that this process has mapped: its name must be gone. */
static bool name_is_gone(void)
{
    char line[512];
    FILE *maps = fopen("/proc/self/maps", "r");
    bool mapped = false, gone = true;
    while (maps && fgets(line, sizeof line, maps)) {
        if (!strstr(line, "/dev/shm/heddle-")) continue;
        mapped = true;
        if (!strstr(line, "(deleted)")) gone = false;
    }
    if (maps) fclose(maps);
    return mapped && gone;
}

static int reduce_job(struct chair *chair, void *ctx)
{
    static const int64_t sizes[] = {1, 3, 17, 64, 2048, 4096, 70001, 700000};
    struct collective *c;
    float *x, *y;
    (void)ctx;
    CHECK(open_on(chair, "auto", &c) == OK);
    CHECK(!strcmp(c->ops->name, "shm"));
    CHECK(MEM_NEW_ARRAY(700000, &x) == OK && MEM_NEW_ARRAY(700000, &y) == OK);
    for (int round = 0; round < 24; round++) {
        int64_t n = sizes[round % 8];
        struct tensor out = {round % 3 ? x : y, DTYPE_F32, 1, n, n}, in = out;
        /* in place, to another place, or from the collective's own memory */
        in.data = x;
        if (round % 3 == 2) in.data = c->ops->reduce_buffer(c, (size_t)n * 4);
        if (!in.data) in.data = x;
        for (int64_t i = 0; i < n; i++)
            ((float *)in.data)[i] = value_of(chair->rank, round, i);
        CHECK(c->ops->all_reduce_sum(c, out, in) == OK);
        for (int64_t i = 0; i < n; i++) {
            float want = expected(chair->hall->size, round, i);
            CHECK(!memcmp(&((float *)out.data)[i], &want, sizeof want));
        }
    }
    mem_free(x);
    mem_free(y);
    CHECK(name_is_gone());
    collective_close(c);
    return 0;
}

/* The sum stays with the collective where it is long, and is the same to the bit. */
static int near_job(struct chair *chair, void *ctx)
{
    static const int64_t sizes[] = {5, 16384, 16389, 70001, 400000, 700000};
    struct collective *c;
    float *y;
    (void)ctx;
    CHECK(open_on(chair, "shm", &c) == OK);
    CHECK(MEM_NEW_ARRAY(700000, &y) == OK);
    for (int round = 0; round < 24; round++) {
        int64_t n = sizes[round % 6];
        struct tensor out = {y, DTYPE_F32, 1, n, n}, in = out;
        in.data = c->ops->reduce_buffer(c, (size_t)n * 4);
        bool direct = in.data != NULL;
        if (!direct) in.data = y;
        for (int64_t i = 0; i < n; i++)
            ((float *)in.data)[i] = value_of(chair->rank, round, i);
        CHECK(c->ops->all_reduce_near(c, &out, in) == OK);
        CHECK((out.data != y) == (direct && n >= 16384));
        for (int64_t i = 0; i < n; i++) {
            float want = expected(chair->hall->size, round, i);
            CHECK(!memcmp(&((float *)out.data)[i], &want, sizeof want));
        }
    }
    mem_free(y);
    collective_close(c);
    return 0;
}

static void test_sums_that_stay(void **state)
{
    (void)state;
    for (int size = 2; size <= 5; size++)
        assert_int_equal(processes_run(size, near_job, NULL), 0);
}

static void test_sums_in_rank_order(void **state)
{
    (void)state;
    for (int size = 2; size <= 5; size++)
        assert_int_equal(processes_run(size, reduce_job, NULL), 0);
}

static int gather_job(struct chair *chair, void *ctx)
{
    struct collective *c;
    int size = chair->hall->size, total = 0;
    int32_t start[PROCESSES_MAX + 1];
    (void)ctx;
    CHECK(open_on(chair, "shm", &c) == OK);
    for (int r = 0; r <= size; r++) {
        start[r] = total;
        total += r == 1 ? 0 : 40000 + 17 * r; /* uneven, one empty */
    }
    total = start[size];
    for (int rows = 1; rows <= 33; rows += 16) {
        float *all;
        CHECK(MEM_NEW_ARRAY((size_t)rows * (size_t)total, &all) == OK);
        struct tensor out = {all, DTYPE_F32, rows, total, total}, part = out;
        part.data = all + start[chair->rank];
        part.cols = start[chair->rank + 1] - start[chair->rank];
        for (int row = 0; row < rows; row++)
            for (int64_t i = 0; i < part.cols; i++)
                all[(int64_t)row * total + start[chair->rank] + i] =
                    (float)(row * 1000000 + start[chair->rank] + i);
        CHECK(c->ops->all_gather(c, out, part, start) == OK);
        for (int row = 0; row < rows; row++)
            for (int64_t i = 0; i < total; i++)
                CHECK(all[(int64_t)row * total + i] == (float)(row * 1000000 + i));
        mem_free(all);
    }
    for (int root = 0; root < size; root++) {
        char words[70000] = {0};
        if (chair->rank == root) memset(words, 'a' + root, sizeof words);
        CHECK(c->ops->broadcast(c, words, sizeof words, root) == OK);
        CHECK(words[0] == 'a' + root && words[sizeof words - 1] == 'a' + root);
    }
    collective_close(c);
    return 0;
}

static void test_gathers_uneven_slices(void **state)
{
    (void)state;
    assert_int_equal(processes_run(2, gather_job, NULL), 0);
    assert_int_equal(processes_run(4, gather_job, NULL), 0);
}

/* The last rank dies after some rounds; the others must fail within a second. */
static int dying_job(struct chair *chair, void *ctx)
{
    struct collective *c;
    float x[64] = {0};
    struct tensor t = {x, DTYPE_F32, 1, 64, 64};
    int last = chair->hall->size - 1;
    (void)ctx;
    CHECK(open_on(chair, "shm", &c) == OK);
    for (int round = 0; round < 50; round++)
        CHECK(c->ops->all_reduce_sum(c, t, t) == OK);
    if (chair->rank == last) kill(getpid(), SIGKILL);
    int64_t begin = clock_monotonic_us();
    enum err e = c->ops->all_reduce_sum(c, t, t);
    CHECK(e == ERR_PEER);
    CHECK(clock_monotonic_us() - begin < 1500000);
    collective_close(c);
    return 0;
}

static void test_a_dead_peer_is_seen(void **state)
{
    (void)state;
    assert_int_equal(processes_run(2, dying_job, NULL), 1u << 1);
    assert_int_equal(processes_run(4, dying_job, NULL), 1u << 3);
}

/* One rank never comes but lives: its abort, the group's end, or the deadline frees the others. */
static int absent_job(struct chair *chair, void *ctx)
{
    const char *how = ctx;
    struct collective *c;
    float x[64] = {0};
    struct tensor t = {x, DTYPE_F32, 1, 64, 64};
    struct bootstrap boot = hall_boot(chair);
    struct collective_options quick = options;
    quick.timeout_ms = 400;
    CHECK(collective_open("shm", &cpu, (struct group){chair->rank, 2}, &boot, &quick, &c) == OK);
    if (chair->rank == 1) {
        if (!strcmp(how, "abort")) c->ops->abort(c);
        clock_sleep_us(900000);
        collective_close(c);
        return 0;
    }
    if (!strcmp(how, "ended")) chair->ended = true;
    int64_t begin = clock_monotonic_us();
    CHECK(c->ops->all_reduce_sum(c, t, t) == ERR_PEER);
    int64_t took = clock_monotonic_us() - begin;
    CHECK(strcmp(how, "deadline") ? took < 390000 : took >= 390000);
    const char *words = !strcmp(how, "abort")   ? "aborted"
                        : !strcmp(how, "ended") ? "has ended"
                                                : "in time";
    CHECK(strstr(err_detail(), words));
    collective_close(c);
    return 0;
}

static void test_an_absent_peer_does_not_hang(void **state)
{
    (void)state;
    assert_int_equal(processes_run(2, absent_job, (void *)(uintptr_t) "abort"), 0);
    assert_int_equal(processes_run(2, absent_job, (void *)(uintptr_t) "ended"), 0);
    assert_int_equal(processes_run(2, absent_job, (void *)(uintptr_t) "deadline"), 0);
}

static int forced_job(struct chair *chair, void *ctx)
{
    struct collective *c;
    (void)ctx;
    CHECK(open_on(chair, "none", &c) == ERR_UNSUPPORTED && strstr(err_detail(), "group has 2"));
    CHECK(open_on(chair, "nccl", &c) == ERR_UNSUPPORTED &&
          strstr(err_detail(), "nccl was asked for"));
    CHECK(open_on(chair, "carrier-pigeon", &c) == ERR_INVALID);
    unsetenv("OMPI_COMM_WORLD_SIZE");
    unsetenv("PMIX_NAMESPACE");
    CHECK(open_on(chair, "mpi", &c) == ERR_UNSUPPORTED && strstr(err_detail(), "mpirun"));
    CHECK(open_on(chair, chair->rank ? "shm" : "auto", &c) == ERR_INVALID &&
          strstr(err_detail(), "rank 1 'shm'"));
    return 0;
}

static void test_a_forced_one_that_cannot_fails_loudly(void **state)
{
    (void)state;
    assert_int_equal(processes_run(2, forced_job, NULL), 0);
}

static void test_one_rank_alone(void **state)
{
    (void)state;
    struct collective *c;
    float x = 3;
    struct tensor t = {&x, DTYPE_F32, 1, 1, 1};
    assert_int_equal(collective_open("auto", &cpu, (struct group){0, 1}, NULL, &options, &c), OK);
    assert_string_equal(c->ops->name, "none");
    assert_int_equal(c->ops->all_reduce_sum(c, t, t), OK);
    assert_true(x == 3);
    collective_close(c);
    collective_close(NULL);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sums_in_rank_order),
        cmocka_unit_test(test_sums_that_stay),
        cmocka_unit_test(test_gathers_uneven_slices),
        cmocka_unit_test(test_a_dead_peer_is_seen),
        cmocka_unit_test(test_an_absent_peer_does_not_hang),
        cmocka_unit_test(test_a_forced_one_that_cannot_fails_loudly),
        cmocka_unit_test(test_one_rank_alone),
    };
    log_set_level(LOG_ERROR);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
