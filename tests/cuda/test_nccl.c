/* Goal: the collective over NCCL sums, gathers and broadcasts tensors of the device, in stream
 * order, and a lost peer is an error in time.
 * Method: ranks are forked processes with an emulated device each and a stand-in of NCCL; small
 * strings meet in shared memory. Then: a peer that dies before a sum, a group declared ended, an
 * abort from another thread, a peer that never joins, a library that is too old or absent. */
#include "base/clock.h"
#include "parallel/collective.h"
#include "tests/cuda/gear.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { SIZE = 3 };

struct meeting {
    atomic_int arrived[8];
    uint8_t bytes[8][SIZE][BOOTSTRAP_BYTES_MAX];
    atomic_bool ended;
    atomic_int given_up;
};
struct seat {
    struct meeting *m;
    int rank, calls;
};

static enum err exchange(void *ctx, const char *key, const void *mine, size_t n, void *out)
{
    struct seat *s = ctx;
    int call = s->calls++;
    (void)key;
    memcpy(s->m->bytes[call][s->rank], mine, n);
    atomic_fetch_add(&s->m->arrived[call], 1);
    while (atomic_load(&s->m->arrived[call]) < SIZE)
        usleep(100);
    for (int r = 0; r < SIZE; r++)
        memcpy((uint8_t *)out + (size_t)r * n, s->m->bytes[call][r], n);
    return OK;
}
static bool ended(void *ctx)
{
    return atomic_load(&((struct seat *)ctx)->m->ended);
}

#define REQUIRE(condition)                                                                         \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "rank %d, line %d: %s (%s)\n", s->rank, __LINE__, #condition,          \
                    err_detail());                                                                 \
            _exit(1);                                                                              \
        }                                                                                          \
    } while (0)

static struct collective *join(struct seat *s, struct backend *b, int timeout_ms)
{
    struct collective *c = NULL;
    struct bootstrap boot = {"key", exchange, ended, s};
    struct collective_options options = {
        .reduce_bytes_max = 1 << 16, .gather_bytes_max = 1 << 16, .timeout_ms = timeout_ms};
    enum err e = collective_open("nccl", b, (struct group){s->rank, SIZE}, &boot, &options, &c);
    REQUIRE(e == OK);
    return c;
}

static void sums(struct seat *s, struct backend *b, struct collective *c)
{
    for (int t = 0; t < 2; t++) {
        struct both x = both_new(b, 5, 24, 24, t ? DTYPE_BF16 : DTYPE_F32);
        for (int i = 0; i < 120; i++)
            x.host[i] = (float)(i % 7 + s->rank);
        both_send(b, &x);
        REQUIRE(c->ops->all_reduce_sum(c, x.t, x.t) == OK);
        b->ops->add(b, x.t, x.t); /* in stream order after the sum */
        float *got = both_get(b, &x);
        for (int i = 0; i < 120; i++)
            REQUIRE(got[i] == 2 * (float)(3 * (i % 7) + 3));
        mem_free(got), both_free(b, &x);
    }
}

static void gathers(struct seat *s, struct backend *b, struct collective *c)
{
    static const int32_t starts[3][SIZE + 1] = {{0, 8, 16, 24}, {0, 5, 5, 24}, {0, 10, 20, 24}};
    for (int k = 0; k < 3; k++)
        for (int rows = 0; rows < 4; rows++)
            for (int inside = 0; inside < 2; inside++) {
                const int32_t *start = starts[k];
                int mine = start[s->rank + 1] - start[s->rank];
                struct both out = both_new(b, rows ? rows : 1, 24, 24, DTYPE_F32),
                            part = both_new(b, rows ? rows : 1, mine ? mine : 1, mine ? mine : 1,
                                            DTYPE_F32);
                for (int i = 0; i < rows * mine; i++)
                    part.host[i] = (float)(100 * (i / mine) + start[s->rank] + i % mine);
                for (int i = 0; i < rows * 24; i++)
                    out.host[i] = -1;
                for (int i = 0; i < rows * mine; i++)
                    out.host[i / mine * 24 + start[s->rank] + i % mine] = part.host[i];
                both_send(b, &part), both_send(b, &out);
                struct tensor to = out.t, from = part.t;
                to.rows = from.rows = rows, from.cols = mine;
                if (inside)
                    from = (struct tensor){(float *)to.data + start[s->rank], DTYPE_F32, rows, mine,
                                           24};
                REQUIRE(c->ops->all_gather(c, to, from, start) == OK);
                float *got = both_get(b, &out);
                for (int i = 0; i < rows * 24; i++)
                    REQUIRE(got[i] == (float)(100 * (i / 24) + i % 24));
                mem_free(got), both_free(b, &out), both_free(b, &part);
            }
}

static void rank_works(struct seat *s)
{
    struct backend *b = gear_open();
    struct collective *c = join(s, b, 20000);
    sums(s, b, c);
    gathers(s, b, c);
    struct both x = both_new(b, 1, 9, 9, DTYPE_F32);
    for (int i = 0; i < 9; i++)
        x.host[i] = (float)(s->rank * 10 + i);
    both_send(b, &x);
    REQUIRE(c->ops->broadcast(c, x.t.data, 36, 2) == OK);
    float *got = both_get(b, &x);
    for (int i = 0; i < 9; i++)
        REQUIRE(got[i] == (float)(20 + i));
    mem_free(got), both_free(b, &x);
    collective_close(c);
    gear_close(b);
}

static void sum_of(struct collective *c, struct both *x, struct seat *s, enum err want)
{
    enum err e = c->ops->all_reduce_sum(c, x->t, x->t);
    REQUIRE(e == want);
}

/* Rank 2 is gone before the second sum: the others' step ends and the next question says ERR_PEER.
 */
static void rank_loses_peer(struct seat *s)
{
    struct backend *b = gear_open();
    struct collective *c = join(s, b, 20000);
    struct both x = both_rand(b, 2, 8, 8, DTYPE_F32, 1);
    struct tensor none = x.t;
    sum_of(c, &x, s, OK);
    REQUIRE(b->ops->sync(b) == OK);
    if (s->rank == 2) {
        usleep(200000);
        kill(getpid(), SIGKILL);
    }
    int64_t start = clock_monotonic_us();
    sum_of(c, &x, s, OK); /* only queued */
    b->ops->ticket_wait(b, b->ops->step_end(b));
    none.rows = 0;
    REQUIRE(c->ops->all_reduce_sum(c, none, none) == ERR_PEER);
    REQUIRE(clock_monotonic_us() - start < 15000000);
    sum_of(c, &x, s, ERR_PEER);
    both_free(b, &x);
    collective_close(c);
    gear_close(b);
}

static void *abort_soon(void *context)
{
    struct collective *c = context;
    usleep(300000);
    c->ops->abort(c);
    return NULL;
}

/* Until both others have given up: leaving earlier would be another error to who has not. */
static void rank_stays(struct seat *s)
{
    for (int ms = 0; ms < 20000 && atomic_load(&s->m->given_up) < 2; ms += 10)
        usleep(10000);
}

/* Rank 2 never comes to the sum; rank 0 is aborted by hand, rank 1 learns that the group has ended.
 */
static void rank_is_told(struct seat *s)
{
    struct backend *b = gear_open();
    struct collective *c = join(s, b, 20000);
    struct both x = both_rand(b, 2, 8, 8, DTYPE_F32, 1);
    pthread_t aborter;
    if (s->rank == 2) {
        rank_stays(s);
        atomic_store(&s->m->ended, true);
        usleep(500000);
    } else {
        if (s->rank == 0) pthread_create(&aborter, NULL, abort_soon, c);
        sum_of(c, &x, s, OK);
        b->ops->ticket_wait(b, b->ops->step_end(b));
        if (s->rank == 0) pthread_join(aborter, NULL);
        sum_of(c, &x, s, ERR_PEER);
    }
    both_free(b, &x);
    collective_close(c);
    gear_close(b);
}

/* Rank 2 gives its vote and then does not join. */
static void rank_waits_to_join(struct seat *s)
{
    struct backend *b = gear_open();
    struct collective *c = NULL;
    struct bootstrap boot = {"key", exchange, ended, s};
    struct collective_options options = {.timeout_ms = 600};
    if (s->rank == 2) {
        uint8_t id[128] = {0}, all[SIZE * 128];
        exchange(s, "nccl-id", id, sizeof id, all);
        rank_stays(s);
    } else {
        REQUIRE(coll_nccl.open(b, (struct group){s->rank, SIZE}, &boot, &options, &c) == ERR_PEER);
        REQUIRE(strstr(err_detail(), "600 ms"));
        REQUIRE(c == NULL);
        atomic_fetch_add(&s->m->given_up, 1);
        rank_stays(s);
    }
    gear_close(b);
}

static void ranks_run(void (*work)(struct seat *), int killed)
{
    struct meeting *m =
        mmap(NULL, sizeof *m, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pid_t pids[SIZE];
    assert_true(m != MAP_FAILED);
    for (int r = 0; r < SIZE; r++) {
        pids[r] = fork();
        if (pids[r]) continue;
        struct seat s = {m, r, 0};
        work(&s);
        _exit(0);
    }
    for (int i = 0; i < SIZE; i++) { /* in any order: one that is gone must be seen as gone */
        int status, r = 0;
        pid_t pid = wait(&status);
        while (r < SIZE && pids[r] != pid)
            r++;
        if (r == killed)
            assert_true(WIFSIGNALED(status));
        else if (!WIFEXITED(status) || WEXITSTATUS(status))
            fail_msg("rank %d ended with status %x", r, (unsigned)status);
    }
    munmap(m, sizeof *m);
}

static void test_works(void **state)
{
    (void)state;
    ranks_run(rank_works, -1);
}
static void test_lost_peer(void **state)
{
    (void)state;
    ranks_run(rank_loses_peer, 2);
}
static void test_told(void **state)
{
    (void)state;
    ranks_run(rank_is_told, -1);
}
static void test_join_deadline(void **state)
{
    (void)state;
    ranks_run(rank_waits_to_join, -1);
}

static void test_declines(void **state)
{
    struct backend *b = gear_open(), *cpu;
    struct backend_options o = gear_options();
    char why[160] = "";
    (void)state;
    assert_false(coll_nccl.probe(b, (struct group){0, 1}, why, sizeof why));
    assert_non_null(strstr(why, "one rank"));
    setenv("HEDDLE_FAKE_GPU", "nccl=21000", 1);
    assert_false(coll_nccl.probe(b, (struct group){0, 2}, why, sizeof why));
    assert_non_null(strstr(why, "too old"));
    unsetenv("HEDDLE_FAKE_GPU");
    assert_true(coll_nccl.probe(b, (struct group){0, 2}, why, sizeof why));
    must(backend_open("cpu", &o, &cpu));
    assert_false(coll_nccl.probe(cpu, (struct group){0, 2}, why, sizeof why));
    assert_non_null(strstr(why, "cpu"));
    cpu->ops->close(cpu);
    gear_close(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_works),    cmocka_unit_test(test_lost_peer),
        cmocka_unit_test(test_told),     cmocka_unit_test(test_join_deadline),
        cmocka_unit_test(test_declines),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
