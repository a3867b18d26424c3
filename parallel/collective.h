/* What ranks of one tensor-parallel group do together: a table of collectives and the choice of
 * one.
 *
 *   none  one rank alone              shm   ranks of one host, CPU tensors, own shared memory
 *   nccl  CUDA tensors                mpi   CPU tensors, ranks of several hosts
 *
 * Every rank calls the same operations in the same order with the same shapes. Sums are taken in
 * rank order, whatever the size, so with none, shm and mpi the result is bitwise the same on all
 * ranks and does not depend on how a batch was cut. Operations run in the order of the backend they
 * were opened on. A lost peer is an error (ERR_PEER) within options.timeout_ms, never a hang; after
 * an error the collective can only be closed.
 *
 * This floor knows ranks and tensors; never layers, requests, plans or files. */
#pragma once
#include "kernels/backend.h"
#include <stdbool.h>
#include <stddef.h>

struct group {
    int rank, size; /* of this tensor-parallel group */
};

/* How ranks find each other: an all-gather of small byte strings that the caller provides (in a
 * cluster it travels through the coordinator). */
struct bootstrap {
    const char
        *group_key; /* random, the same on all ranks, new for each incarnation of the group */
    /* Gives `mine` [n], receives everybody's: out [size][n] by rank. Every rank uses the same n,
     * at most BOOTSTRAP_BYTES_MAX. Blocks until all ranks have called it with this key. */
    enum err (*exchange)(void *ctx, const char *key, const void *mine, size_t n, void *out);
    /* May be NULL. Polled while an operation waits: true when this incarnation has ended, so that a
     * peer will never come. Callable until the collective is closed. */
    bool (*ended)(void *ctx);
    void *ctx;
};
enum { BOOTSTRAP_BYTES_MAX = 4096, COLLECTIVE_RANKS_MAX = 64 };

struct collective_options {
    size_t reduce_bytes_max; /* largest tensor of one all_reduce_sum; also of one broadcast */
    size_t gather_bytes_max; /* largest output of one all_gather, all ranks together */
    int timeout_ms;          /* how long one operation waits for a peer, 0 = 30000 */
};

struct collective;
struct collective_ops {
    const char *name;
    /* Whether this rank could take part, without touching the others; else says why not. */
    bool (*probe)(struct backend *b, struct group g, char *why_not, size_t why_bytes);
    /* Called on all ranks at once. Allocates everything that the operations will need. */
    enum err (*open)(struct backend *b, struct group g, const struct bootstrap *boot,
                     const struct collective_options *options, struct collective **out);
    /* out = sum over ranks of x, same shape, contiguous rows (stride == cols). out may be x, or x
     * may lie in reduce_buffer. F32; NCCL also F16 and BF16. */
    enum err (*all_reduce_sum)(struct collective *c, struct tensor out, struct tensor x);
    /* out [rows][column_start[size]]: columns column_start[r] .. column_start[r + 1] come from rank
     * r's part [rows][their number]. column_start [size + 1] ascends from 0; slices may be uneven
     * or empty. part may be that slice of out itself (same data and stride). */
    enum err (*all_gather)(struct collective *c, struct tensor out, struct tensor part,
                           const int32_t *column_start);
    /* Copies root's bytes to all; mem is memory of the backend's device. */
    enum err (*broadcast)(struct collective *c, void *mem, size_t bytes, int root);
    void (*close)(struct collective *c); /* accepts NULL; also after an error */
    /* Makes the operation under way, here and on the peers if they can be told, fail with ERR_PEER.
     * May be called from another thread. May be NULL. */
    void (*abort)(struct collective *c);
    /* May be NULL, may return NULL. Memory of `bytes` into which this rank may write the x of its
     * next all_reduce_sum, which then need not copy it. Ask again before each all_reduce_sum. */
    void *(*reduce_buffer)(struct collective *c, size_t bytes);
    /* May be NULL. As all_reduce_sum, but the sum may stay where the ranks made it: then out->data is
     * changed to memory of the collective, to be read only and before the next operation. */
    enum err (*all_reduce_near)(struct collective *c, struct tensor *out, struct tensor x);
};

/* Common head of every collective; an implementation embeds it first. */
struct collective {
    const struct collective_ops *ops;
    struct group group;
};

/* coll_nccl is always compiled: it opens libnccl.so.2 at run time and its probe says why it cannot.
 */
extern const struct collective_ops coll_none, coll_shm, coll_mpi, coll_nccl;

/* Opens the named collective, or with "auto" the first of none, nccl, shm, mpi that every rank can,
 * logging why the others were refused. A forced one that some rank cannot: ERR_UNSUPPORTED with
 * that rank's reason; ranks that force different ones: ERR_INVALID. Called on all ranks at once. */
enum err collective_open(const char *name, struct backend *b, struct group g,
                         const struct bootstrap *boot, const struct collective_options *options,
                         struct collective **out);
void collective_close(struct collective *c); /* accepts NULL */
/* Once before the process ends, after every collective is closed: leaves MPI if it was entered. */
void collective_shutdown(bool peers_alive);
