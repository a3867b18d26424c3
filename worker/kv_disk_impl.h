/* The inside of the disk tier, for kv_disk.c and its test, which breaks the file. */
#pragma once
#include "base/hash.h"
#include "worker/kv_disk.h"

#include <pthread.h>
#include <stdatomic.h>

enum { DISK_FETCH, DISK_SPILL };
struct disk_queue { /* transfers of one kind: a ring of n from first */
    struct plan_pair pairs[PLAN_TRANSFERS_MAX];
    uint64_t failed[PLAN_TRANSFERS_MAX]; /* numbers of those that failed and were not told yet */
    uint32_t first, n, n_failed, n_untold;
    uint64_t n_done; /* since the epoch began */
};

struct kv_disk {
    int fd;
    uint64_t n_blocks, block_bytes, stride; /* stride: of a block in the file */
    char *host, *staging;                   /* [n_host][block_bytes], [stride] */
    struct hash128 *sums;                   /* [n_blocks] of what was written last; the thread's */
    pthread_t thread;
    pthread_mutex_t lock; /* of all below but what has its own */
    pthread_cond_t wake;
    bool has_thread, stop;
    struct disk_queue queues[2];
    uint64_t epoch;
    pthread_mutex_t host_lock; /* held while the thread touches host memory */
    uint64_t serial;           /* of the epoch, changed under both locks */
    pthread_mutex_t listen_lock;
    void (*tell)(void *ctx, const struct moved *moved);
    void *ctx;
    uint64_t told[2][PLAN_TRANSFERS_MAX];
    _Atomic uint32_t fetch_ns;
    uint64_t n_failures;
};
