/* Threads that share the chunks of one operation.
 *
 * A job is done when all its chunks are done, so a thread that never got a core is not waited for;
 * a chunk whose thread was taken off its core in the middle is computed again by an idle thread
 * when the job allows it (it has a commit: results go to private scratch and the first to finish
 * publishes them). Sound because a chunk's result depends on its inputs alone.
 * The pool knows nothing of tensors. */
#pragma once
#include "base/err.h"
#include <stddef.h>

enum { POOL_ARGS_BYTES = 256, POOL_THREADS_MAX = 1024, POOL_CHUNKS_MAX = 32768 };

struct pool;
/* compute writes scratch alone when the job has a commit; else it writes the result. With a commit
 * it may also run late, after the job is done: then it must find in args, and in memory that lives
 * until pool_quiesce, all it needs to stay within bounds. What it computes is dropped. */
typedef void pool_fn(const void *args, int chunk, void *scratch);
struct pool_job {
    pool_fn *compute, *commit; /* commit: NULL, or publishes what compute left in scratch */
    /* NULL, or makes in scratch what a thread needs for all its chunks: runs once before the first
     * of them, which it is told, and never after pool_run has returned. */
    pool_fn *prepare;
    const void *args; /* copied: at most POOL_ARGS_BYTES */
    size_t args_bytes;
    int n_chunks; /* with a commit, at most POOL_CHUNKS_MAX */
};

/* n_threads counts the caller; 1 makes no thread. Every thread has scratch_bytes, 64-byte aligned.
 */
enum err pool_create(int n_threads, size_t scratch_bytes, struct pool **out);
void pool_destroy(struct pool *p);
int pool_n_threads(const struct pool *p);
/* Returns when every chunk has run. One caller at a time. */
void pool_run(struct pool *p, const struct pool_job *job);
/* Returns when no thread still touches the memory of an earlier job: before that is freed. */
void pool_quiesce(struct pool *p);
/* Cores this process may use: its affinity, and its cgroup's quota. At least 1. */
int pool_cores(void);
