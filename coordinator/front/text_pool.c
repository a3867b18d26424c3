/* See text_pool.h. */
#include "coordinator/front/text_pool.h"
#include "base/mem.h"

enum { THREADS_MAX = 16 };

struct text_pool {
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    struct text_job *first, **last;
    bool stopping;
    unsigned n_threads;
    pthread_t threads[THREADS_MAX];
};

static void *pool_run(void *ctx)
{
    struct text_pool *p = ctx;
    pthread_mutex_lock(&p->mutex);
    for (;;) {
        while (!p->first && !p->stopping)
            pthread_cond_wait(&p->wake, &p->mutex);
        if (p->stopping) break;
        struct text_job *job = p->first;
        p->first = job->next;
        if (!p->first) p->last = &p->first;
        pthread_mutex_unlock(&p->mutex);
        job->work(job);
        front_post(job->loop, &job->back);
        pthread_mutex_lock(&p->mutex);
    }
    pthread_mutex_unlock(&p->mutex);
    return NULL;
}

enum err text_pool_create(unsigned n_threads, struct text_pool **out)
{
    struct text_pool *p = NULL;
    TRY(MEM_NEW(&p));
    pthread_mutex_init(&p->mutex, NULL);
    pthread_cond_init(&p->wake, NULL);
    p->last = &p->first;
    for (unsigned i = 0; i < n_threads && i < THREADS_MAX; i++) {
        if (pthread_create(&p->threads[i], NULL, pool_run, p)) break;
        p->n_threads++;
    }
    if (!p->n_threads) {
        text_pool_destroy(p);
        FAIL(ERR_IO, "cannot start a thread for texts");
    }
    *out = p;
    return OK;
}

void text_pool_post(struct text_pool *p, struct text_job *job)
{
    pthread_mutex_lock(&p->mutex);
    job->next = NULL;
    *p->last = job;
    p->last = &job->next;
    pthread_cond_signal(&p->wake);
    pthread_mutex_unlock(&p->mutex);
}

void text_pool_destroy(struct text_pool *p)
{
    if (!p) return;
    pthread_mutex_lock(&p->mutex);
    p->stopping = true;
    pthread_cond_broadcast(&p->wake);
    pthread_mutex_unlock(&p->mutex);
    for (unsigned i = 0; i < p->n_threads; i++)
        pthread_join(p->threads[i], NULL);
    for (struct text_job *job = p->first, *next; job; job = next) {
        next = job->next;
        front_post(job->loop, &job->back);
    }
    pthread_mutex_destroy(&p->mutex);
    pthread_cond_destroy(&p->wake);
    mem_free(p);
}
