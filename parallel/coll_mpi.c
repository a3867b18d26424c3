/* Collectives of CPU ranks on several hosts, over Open MPI.
 *
 * MPI moves bytes and nothing else: sums are taken here, in rank order, so that every rank holds
 * the same bits (MPI promises no order). Two ranks exchange whole vectors; more exchange slices,
 * sum one each and gather the sums. All transfers are non-blocking and polled, so a peer that never
 * comes is an error after the timeout and idle ranks do not sit in MPI. MPI is entered only when
 * this collective is chosen, because entering it takes time and a launcher. */
#include "base/clock.h"
#include "base/mem.h"
#include "parallel/collective.h"
#include "parallel/sum.h"

#include <mpi.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TIMEOUT_MS_DEFAULT = 30000, POLLS_BETWEEN_CLOCKS = 64, PIECE_BYTES_MAX = 4 << 20 };

struct mpi {
    struct collective head;
    MPI_Comm comm;
    int64_t timeout_us;
    char *all;   /* [size][piece_bytes] what was received */
    float *sums; /* [piece_bytes / 4] */
    size_t piece_bytes;
    bool broken;
    _Atomic bool aborted;
    struct bootstrap boot;
    int counts[COLLECTIVE_RANKS_MAX], starts[COLLECTIVE_RANKS_MAX];
};

static bool entered; /* by this process, not by whoever called us */

static struct mpi *mpi_of(struct collective *c)
{
    return (struct mpi *)c;
}

static enum err mpi_check(int code, const char *what)
{
    char words[MPI_MAX_ERROR_STRING];
    int n = 0;
    if (code == MPI_SUCCESS) return OK;
    MPI_Error_string(code, words, &n);
    FAIL(ERR_PEER, "collective mpi: %s: %.*s", what, n, words);
}

/* Polls until done. After a failure MPI still owns the buffers: the collective is only closed. */
static enum err request_wait(struct mpi *m, MPI_Request *request, const char *what)
{
    int64_t end = 0;
    for (int polls = 1;; polls++) {
        int done = 0;
        TRY(mpi_check(MPI_Test(request, &done, MPI_STATUS_IGNORE), what));
        if (done) return OK;
        if (polls % POLLS_BETWEEN_CLOCKS) continue;
        sched_yield();
        int64_t now = clock_monotonic_us();
        if (!end) end = now + m->timeout_us;
        bool ended = m->boot.ended && m->boot.ended(m->boot.ctx);
        if (now <= end && !ended && !atomic_load(&m->aborted)) continue;
        m->broken = true;
        FAIL(ERR_PEER, "collective mpi: rank %d: %s: %s", m->head.group.rank, what,
             now > end ? "a peer did not come in time" : "the group has ended");
    }
}

static enum err exchange_whole(struct mpi *m, float *out, const float *x, int n)
{
    const float *parts[COLLECTIVE_RANKS_MAX];
    MPI_Request request;
    TRY(mpi_check(MPI_Iallgather(x, n, MPI_FLOAT, m->all, n, MPI_FLOAT, m->comm, &request),
                  "all-gather"));
    TRY(request_wait(m, &request, "all-reduce"));
    for (int r = 0; r < m->head.group.size; r++)
        parts[r] = (const float *)m->all + (size_t)r * (size_t)n;
    sum_in_rank_order(out, parts, m->head.group.size, n);
    return OK;
}

static void slices_set(struct mpi *m, int n)
{
    int size = m->head.group.size;
    for (int r = 0; r < size; r++) {
        m->starts[r] = (int)((int64_t)n * r / size);
        m->counts[r] = (int)((int64_t)n * (r + 1) / size) - m->starts[r];
    }
}

static enum err exchange_slices(struct mpi *m, float *out, const float *x, int n)
{
    const float *parts[COLLECTIVE_RANKS_MAX];
    int size = m->head.group.size, rank = m->head.group.rank;
    int same[COLLECTIVE_RANKS_MAX], places[COLLECTIVE_RANKS_MAX];
    MPI_Request request;
    slices_set(m, n);
    int mine = m->counts[rank];
    for (int r = 0; r < size; r++) {
        same[r] = mine;
        places[r] = r * mine;
        parts[r] = (const float *)m->all + (size_t)r * (size_t)mine;
    }
    TRY(mpi_check(MPI_Ialltoallv(x, m->counts, m->starts, MPI_FLOAT, m->all, same, places,
                                 MPI_FLOAT, m->comm, &request),
                  "all-to-all"));
    TRY(request_wait(m, &request, "all-reduce"));
    sum_in_rank_order(m->sums, parts, size, mine);
    TRY(mpi_check(MPI_Iallgatherv(m->sums, mine, MPI_FLOAT, out, m->counts, m->starts, MPI_FLOAT,
                                  m->comm, &request),
                  "all-gather"));
    return request_wait(m, &request, "all-reduce");
}

static enum err mpi_all_reduce(struct collective *c, struct tensor out, struct tensor x)
{
    struct mpi *m = mpi_of(c);
    int64_t n = x.rows * x.cols, most = (int64_t)(m->piece_bytes / sizeof(float));
    ASSERT(x.dtype == DTYPE_F32 && out.dtype == DTYPE_F32 && x.stride == x.cols &&
           out.stride == out.cols);
    for (int64_t at = 0; at < n; at += most) {
        int piece = (int)(n - at < most ? n - at : most);
        float *to = (float *)out.data + at;
        const float *from = (const float *)x.data + at;
        TRY(c->group.size == 2 ? exchange_whole(m, to, from, piece)
                               : exchange_slices(m, to, from, piece));
    }
    return OK;
}

/* Rows first .. first + rows, packed rank after rank by MPI, then spread over out's columns. */
static enum err gather_rows(struct mpi *m, struct tensor out, struct tensor part,
                            const int32_t *start, int64_t first, int64_t rows)
{
    int size = m->head.group.size, rank = m->head.group.rank;
    size_t element = dtype_bytes(out.dtype), at = 0;
    char *send = (char *)m->sums;
    MPI_Request request;
    for (int64_t r = 0; r < rows; r++)
        memcpy(send + (size_t)(r * part.cols) * element,
               (char *)part.data + (size_t)((first + r) * part.stride) * element,
               (size_t)part.cols * element);
    for (int r = 0; r < size; r++) {
        m->starts[r] = (int)at;
        m->counts[r] = (int)((size_t)rows * (size_t)(start[r + 1] - start[r]) * element);
        at += (size_t)m->counts[r];
    }
    TRY(mpi_check(MPI_Iallgatherv(send, m->counts[rank], MPI_BYTE, m->all, m->counts, m->starts,
                                  MPI_BYTE, m->comm, &request),
                  "all-gather"));
    TRY(request_wait(m, &request, "all-gather"));
    for (int r = 0; r < size; r++) {
        size_t width = (size_t)(start[r + 1] - start[r]) * element;
        for (int64_t i = 0; i < rows; i++)
            memcpy((char *)out.data + (size_t)((first + i) * out.stride + start[r]) * element,
                   m->all + m->starts[r] + (size_t)i * width, width);
    }
    return OK;
}

static enum err mpi_all_gather(struct collective *c, struct tensor out, struct tensor part,
                               const int32_t *start)
{
    struct mpi *m = mpi_of(c);
    int64_t widest = 1;
    for (int r = 0; r < c->group.size; r++)
        if (start[r + 1] - start[r] > widest) widest = start[r + 1] - start[r];
    int64_t most = (int64_t)m->piece_bytes / (widest * (int64_t)dtype_bytes(out.dtype));
    if (most < 1)
        FAIL(ERR_INTERNAL, "collective mpi: a row of %lld columns does not fit", (long long)widest);
    for (int64_t row = 0; row < out.rows; row += most)
        TRY(gather_rows(m, out, part, start, row, out.rows - row < most ? out.rows - row : most));
    return OK;
}

static enum err mpi_broadcast(struct collective *c, void *mem, size_t bytes, int root)
{
    struct mpi *m = mpi_of(c);
    for (size_t at = 0; at < bytes; at += m->piece_bytes) {
        MPI_Request request;
        int n = (int)(bytes - at < m->piece_bytes ? bytes - at : m->piece_bytes);
        TRY(mpi_check(MPI_Ibcast((char *)mem + at, n, MPI_BYTE, root, m->comm, &request),
                      "broadcast"));
        TRY(request_wait(m, &request, "broadcast"));
    }
    return OK;
}

/* --- opening --- */

static enum err mpi_enter(int *out_world_rank)
{
    int is_in = 0, is_out = 0, provided = 0;
    MPI_Initialized(&is_in);
    MPI_Finalized(&is_out);
    if (is_out) FAIL(ERR_PEER, "collective mpi: this process has left MPI already");
    if (!is_in) {
        TRY(mpi_check(MPI_Init_thread(NULL, NULL, MPI_THREAD_SERIALIZED, &provided), "init"));
        entered = true;
    }
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    return mpi_check(MPI_Comm_rank(MPI_COMM_WORLD, out_world_rank), "rank");
}

/* The group's own communicator; other groups of the same launch take no part. */
static enum err comm_make(struct mpi *m, const struct bootstrap *boot)
{
    int32_t mine, ranks[COLLECTIVE_RANKS_MAX];
    int world_rank;
    MPI_Group world, group;
    TRY(mpi_enter(&world_rank));
    mine = world_rank;
    TRY(boot->exchange(boot->ctx, "mpi world rank", &mine, sizeof mine, ranks));
    TRY(mpi_check(MPI_Comm_group(MPI_COMM_WORLD, &world), "group"));
    int code = MPI_Group_incl(world, m->head.group.size, ranks, &group);
    MPI_Group_free(&world);
    TRY(mpi_check(code, "group"));
    code = MPI_Comm_create_group(MPI_COMM_WORLD, group, ranks[0], &m->comm);
    MPI_Group_free(&group);
    TRY(mpi_check(code, "communicator"));
    MPI_Comm_set_errhandler(m->comm, MPI_ERRORS_RETURN);
    return OK;
}

static void mpi_close(struct collective *c)
{
    struct mpi *m = mpi_of(c);
    if (!m) return;
    if (m->broken)
        return; /* a transfer may still write here: the memory is left to the process's end */
    if (m->comm != MPI_COMM_NULL) MPI_Comm_free(&m->comm);
    mem_free(m->all);
    mem_free(m->sums);
    mem_free(m);
}

static enum err mpi_open(struct backend *b, struct group g, const struct bootstrap *boot,
                         const struct collective_options *options, struct collective **out)
{
    struct mpi *m;
    enum err e = OK;
    (void)b;
    TRY(MEM_NEW(&m));
    m->head = (struct collective){&coll_mpi, g};
    m->comm = MPI_COMM_NULL;
    m->piece_bytes = PIECE_BYTES_MAX;
    m->boot = *boot;
    m->timeout_us =
        (int64_t)(options->timeout_ms ? options->timeout_ms : TIMEOUT_MS_DEFAULT) * 1000;
    TRY_OUT(mem_alloc_aligned(64, m->piece_bytes * (size_t)g.size, (void **)&m->all));
    TRY_OUT(mem_alloc_aligned(64, m->piece_bytes, (void **)&m->sums));
    TRY_OUT(comm_make(m, boot));
    *out = &m->head;
    m = NULL;
out:
    mpi_close(m ? &m->head : NULL);
    return e;
}

/* Only a launcher's environment counts: a process started by hand would be alone in its world. */
static bool mpi_probe(struct backend *b, struct group g, char *why_not, size_t why_bytes)
{
    const char *world = getenv("OMPI_COMM_WORLD_SIZE"), *pmix = getenv("PMIX_NAMESPACE");
    long n = world ? strtol(world, NULL, 10) : 0;
    if (g.size < 2)
        snprintf(why_not, why_bytes, "one rank has nobody to talk to");
    else if (b->stream)
        snprintf(why_not, why_bytes, "its tensors are on the %s device", b->ops->name);
    else if (!world && !pmix)
        snprintf(why_not, why_bytes, "the process was not started by mpirun or srun --mpi=pmix");
    else if (world && n < g.size)
        snprintf(why_not, why_bytes, "mpirun started %ld ranks, the group has %d", n, g.size);
    else
        return true;
    return false;
}

static void mpi_abort(struct collective *c)
{
    atomic_store(&mpi_of(c)->aborted, true);
}

const struct collective_ops coll_mpi = {
    .name = "mpi",
    .probe = mpi_probe,
    .open = mpi_open,
    .all_reduce_sum = mpi_all_reduce,
    .all_gather = mpi_all_gather,
    .broadcast = mpi_broadcast,
    .close = mpi_close,
    .abort = mpi_abort,
};

/* Finalizing with a lost peer would wait for it for ever; then the launcher cleans up. */
void collective_shutdown(bool peers_alive)
{
    int is_out = 0;
    if (!entered) return;
    MPI_Finalized(&is_out);
    if (!is_out && peers_alive) MPI_Finalize();
    entered = false;
}
