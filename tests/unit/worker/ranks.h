/* Ranks of one group as threads of this process, driven by hand-written plans: what a coordinator
 * and its wire do, without either. */
#pragma once
#include "base/mem.h"
#include "worker/rank.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { RANKS_MAX = 8, RANKS_EXCHANGE_BYTES = BOOTSTRAP_BYTES_MAX };

/* The all-gather that a bootstrap needs, between threads. */
struct meeting {
    pthread_mutex_t lock;
    pthread_cond_t moved;
    int size, n_in, round;
    char in[RANKS_MAX][RANKS_EXCHANGE_BYTES], out[RANKS_MAX][RANKS_EXCHANGE_BYTES];
};
struct seat {
    struct meeting *meeting;
    int rank;
};

static inline enum err meeting_exchange(void *ctx, const char *key, const void *mine, size_t n,
                                        void *out)
{
    struct seat *seat = ctx;
    struct meeting *m = seat->meeting;
    (void)key;
    pthread_mutex_lock(&m->lock);
    int round = m->round;
    memcpy(m->in[seat->rank], mine, n);
    if (++m->n_in == m->size) {
        memcpy(m->out, m->in, sizeof m->out);
        m->n_in = 0;
        m->round++;
        pthread_cond_broadcast(&m->moved);
    }
    while (m->round == round)
        pthread_cond_wait(&m->moved, &m->lock);
    for (int r = 0; r < m->size; r++)
        memcpy((char *)out + (size_t)r * n, m->out[r], n);
    pthread_mutex_unlock(&m->lock);
    return OK;
}

static inline void meeting_init(struct meeting *m, int size)
{
    memset(m, 0, sizeof *m);
    pthread_mutex_init(&m->lock, NULL);
    pthread_cond_init(&m->moved, NULL);
    m->size = size;
}

struct ranks;
struct rank_thread {
    struct ranks *all;
    int rank;
    pthread_t thread;
    enum err error;
    char why[512];
    struct seat seat;
    struct step_result result;
};
struct ranks {
    int size;
    struct worker_config config;
    struct worker *workers[RANKS_MAX];
    struct rank_thread threads[RANKS_MAX];
    struct meeting meeting;
    char key[64];
    uint64_t epoch, step, n_blocks, n_host_blocks;
    const struct step_plan *plan;
    void *(*job)(void *);
};

static inline void ranks_together(struct ranks *r, void *(*job)(void *))
{
    for (int i = 0; i < r->size; i++) {
        r->threads[i].all = r;
        r->threads[i].rank = i;
        r->threads[i].error = OK;
        if (r->size == 1)
            job(&r->threads[i]);
        else if (pthread_create(&r->threads[i].thread, NULL, job, &r->threads[i]))
            abort();
    }
    for (int i = 0; r->size > 1 && i < r->size; i++)
        pthread_join(r->threads[i].thread, NULL);
}

static inline void *rank_note(struct rank_thread *t, enum err e)
{
    t->error = e;
    if (e) snprintf(t->why, sizeof t->why, "%s", err_detail());
    return NULL;
}

static inline void *rank_create_job(void *arg)
{
    struct rank_thread *t = arg;
    struct worker_config c = t->all->config;
    c.rank = t->rank;
    c.size = t->all->size;
    return rank_note(t, worker_create(&c, &t->all->workers[t->rank]));
}

static inline void *rank_open_job(void *arg)
{
    struct rank_thread *t = arg;
    t->seat = (struct seat){&t->all->meeting, t->rank};
    struct bootstrap boot = {
        .group_key = t->all->key, .exchange = meeting_exchange, .ctx = &t->seat};
    return rank_note(t, worker_open_group(t->all->workers[t->rank], t->all->epoch, t->all->n_blocks,
                                          t->all->n_host_blocks, &boot));
}

static inline void *rank_step_job(void *arg)
{
    struct rank_thread *t = arg;
    struct worker *w = t->all->workers[t->rank];
    enum err e = worker_begin(w, t->all->plan);
    if (!e) e = worker_end(w, &t->result);
    return rank_note(t, e);
}

/* First error of any rank, with its words in err_detail. */
static inline enum err ranks_error(const struct ranks *r)
{
    for (int i = 0; i < r->size; i++)
        if (r->threads[i].error) return err_set(r->threads[i].error, "%s", r->threads[i].why);
    return OK;
}

static inline enum err ranks_reopen(struct ranks *r)
{
    static int n_keys;
    snprintf(r->key, sizeof r->key, "test-%d-%d", (int)getpid(), n_keys++);
    r->epoch++;
    r->step = 0;
    ranks_together(r, rank_open_job);
    return ranks_error(r);
}

static inline void ranks_destroy(struct ranks *r)
{
    for (int i = 0; i < r->size; i++) {
        worker_destroy(r->workers[i]);
        r->workers[i] = NULL;
    }
}

static inline enum err ranks_create(struct ranks *r, const struct worker_config *config, int size)
{
    memset(r, 0, sizeof *r);
    r->config = *config;
    r->size = size;
    meeting_init(&r->meeting, size);
    ranks_together(r, rank_create_job);
    TRY(ranks_error(r));
    r->n_blocks = r->n_host_blocks = UINT64_MAX;
    for (int i = 0; i < size; i++) {
        struct worker_info info;
        worker_info(r->workers[i], &info);
        if (info.n_blocks < r->n_blocks) r->n_blocks = info.n_blocks;
        if (info.n_host_blocks < r->n_host_blocks) r->n_host_blocks = info.n_host_blocks;
    }
    return ranks_reopen(r);
}

/* Runs one plan on all ranks; out is rank 0's result, valid until the next but one step. */
static inline enum err ranks_step(struct ranks *r, struct step_plan *plan, struct step_result *out)
{
    plan->epoch = r->epoch;
    plan->step = ++r->step;
    r->plan = plan;
    ranks_together(r, rank_step_job);
    TRY(ranks_error(r));
    *out = r->threads[0].result;
    return OK;
}
