/* Ranks as forked processes that meet in shared memory: the bootstrap of real ranks, for tests. */
#pragma once
#include "parallel/collective.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PROCESSES_MAX = 8 };
struct hall {
    pthread_barrier_t barrier;
    char bytes[PROCESSES_MAX][BOOTSTRAP_BYTES_MAX];
    char key[64];
    int size;
};
struct chair {
    struct hall *hall;
    int rank;
    _Atomic bool ended;
};

static inline struct hall *hall_create(int size)
{
    static int n_halls;
    struct hall *h =
        mmap(NULL, sizeof *h, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pthread_barrierattr_t shared;
    if (h == MAP_FAILED) abort();
    pthread_barrierattr_init(&shared);
    pthread_barrierattr_setpshared(&shared, PTHREAD_PROCESS_SHARED);
    pthread_barrier_init(&h->barrier, &shared, (unsigned)size);
    snprintf(h->key, sizeof h->key, "hall-%d-%d", (int)getpid(), n_halls++);
    h->size = size;
    return h;
}

static inline enum err hall_exchange(void *ctx, const char *key, const void *mine, size_t n,
                                     void *out)
{
    struct chair *c = ctx;
    (void)key;
    memcpy(c->hall->bytes[c->rank], mine, n);
    pthread_barrier_wait(&c->hall->barrier);
    for (int r = 0; r < c->hall->size; r++)
        memcpy((char *)out + (size_t)r * n, c->hall->bytes[r], n);
    pthread_barrier_wait(&c->hall->barrier);
    return OK;
}

static inline bool hall_ended(void *ctx)
{
    return ((struct chair *)ctx)->ended;
}

static inline struct bootstrap hall_boot(struct chair *c)
{
    return (struct bootstrap){
        .group_key = c->hall->key, .exchange = hall_exchange, .ended = hall_ended, .ctx = c};
}

/* Runs job as `size` processes; returns the bits of those that did not exit with 0. */
static inline unsigned processes_run(int size, int (*job)(struct chair *c, void *ctx), void *ctx)
{
    struct hall *h = hall_create(size);
    pid_t pids[PROCESSES_MAX];
    unsigned failed = 0;
    fflush(NULL);
    for (int r = 0; r < size; r++) {
        pids[r] = fork();
        if (pids[r] < 0) abort();
        if (pids[r] == 0) {
            struct chair c = {.hall = h, .rank = r};
            _exit(job(&c, ctx));
        }
    }
    for (int r = 0; r < size; r++) {
        int status = 0;
        waitpid(pids[r], &status, 0);
        if (!WIFEXITED(status) || WEXITSTATUS(status)) failed |= 1u << r;
    }
    munmap(h, sizeof *h);
    return failed;
}
