/* Goal: collectives over MPI give the same bits as rank-order sums on every rank, for uneven slices
 * and any size, and a peer that does not come is an error.
 * Method: this program runs itself under mpirun with two, three and four ranks. */
#include "base/log.h"
#include "base/mem.h"
#include "base/rand.h"
#include "unit/parallel/mpirun.h"

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "rank %d: line %d: %s (%s)\n", f->rank, __LINE__, #condition,          \
                    err_detail());                                                                 \
            _exit(1); /* MPI cannot be left in order any more; mpirun ends the others */           \
        }                                                                                          \
    } while (0)

static float value_of(int rank, int round, int64_t i)
{
    struct rand r = rand_seeded((uint64_t)rank * 1000003 + (uint64_t)round * 7919 + (uint64_t)i);
    return (float)(rand_unit(&r) * 2 - 1) * (i % 5 ? 1.0f : 1e6f);
}

static void sums_check(struct folder *f, struct collective *c)
{
    static const int64_t sizes[] = {1, 3, 2048, 70001, 1500000};
    float *x;
    CHECK(MEM_NEW_ARRAY(1500000, &x) == OK);
    for (int round = 0; round < 5; round++) {
        int64_t n = sizes[round];
        struct tensor t = {x, DTYPE_F32, 1, n, n};
        for (int64_t i = 0; i < n; i++)
            x[i] = value_of(f->rank, round, i);
        CHECK(c->ops->all_reduce_sum(c, t, t) == OK);
        for (int64_t i = 0; i < n; i += 1 + n / 5000) {
            float want = value_of(0, round, i);
            for (int r = 1; r < f->size; r++)
                want += value_of(r, round, i);
            CHECK(!memcmp(&x[i], &want, sizeof want));
        }
    }
    mem_free(x);
}

static void gathers_check(struct folder *f, struct collective *c)
{
    int32_t start[9] = {0};
    for (int r = 0; r < f->size; r++)
        start[r + 1] = start[r] + (r == 1 ? 0 : 50000 + 13 * r);
    int total = start[f->size], rows = 40;
    float *all;
    CHECK(MEM_NEW_ARRAY((size_t)rows * (size_t)total, &all) == OK);
    struct tensor out = {all, DTYPE_F32, rows, total, total}, part = out;
    part.data = all + start[f->rank];
    part.cols = start[f->rank + 1] - start[f->rank];
    for (int row = 0; row < rows; row++)
        for (int64_t i = 0; i < part.cols; i++)
            all[(int64_t)row * total + start[f->rank] + i] =
                (float)(row * 100 + (start[f->rank] + i) % 97);
    CHECK(c->ops->all_gather(c, out, part, start) == OK);
    for (int row = 0; row < rows; row++)
        for (int64_t i = 0; i < total; i++)
            CHECK(all[(int64_t)row * total + i] == (float)(row * 100 + i % 97));
    mem_free(all);
    char words[100] = {0};
    if (f->rank == 1) memset(words, 'x', sizeof words);
    CHECK(c->ops->broadcast(c, words, sizeof words, 1) == OK && words[99] == 'x');
}

/* Rank 0 waits for an all-reduce in which the others take part late. */
static void late_peer_check(struct folder *f, struct collective *c)
{
    float x[4] = {1, 1, 1, 1};
    struct tensor t = {x, DTYPE_F32, 1, 4, 4};
    if (f->rank) clock_sleep_us(300000);
    CHECK(c->ops->all_reduce_sum(c, t, t) == OK && x[0] == (float)f->size);
}

static int child(void)
{
    struct folder folder = mpirun_folder(), *f = &folder;
    struct backend cpu = {.ops = &backend_cpu, .activation_dtype = DTYPE_F32};
    struct collective_options options = {
        .reduce_bytes_max = 8 << 20, .gather_bytes_max = 8 << 20, .timeout_ms = 60000};
    struct bootstrap boot = {.group_key = "mpi-test", .exchange = folder_exchange, .ctx = f};
    struct collective *c;
    for (int incarnation = 0; incarnation < 2; incarnation++) {
        CHECK(collective_open("mpi", &cpu, (struct group){f->rank, f->size}, &boot, &options, &c) ==
              OK);
        sums_check(f, c);
        gathers_check(f, c);
        late_peer_check(f, c);
        collective_close(c);
    }
    collective_shutdown(true);
    return 0;
}

int main(void)
{
    log_set_level(LOG_ERROR);
    if (mpirun_is_child()) return child();
    for (int n = 2; n <= 4; n++) {
        int status = mpirun_self(n);
        if (status == 77) return printf("no mpirun on this machine\n"), 77;
        if (status) return printf("%d ranks failed with status %d\n", n, status), 1;
        printf("%d ranks agree\n", n);
    }
    return 0;
}
