/* A few threads for the long work of text: parsing, rendering and tokenizing large requests, so
 * that a long prompt does not hold up the streams of its loop.
 *
 * It must never know what the work is. */
#pragma once
#include "coordinator/front/front.h"

/* Embedded in the caller's memory: work runs on a pool thread, then back.run on the loop. */
struct text_job {
    struct front_job back;
    struct front_loop *loop;
    void (*work)(struct text_job *job);
    struct text_job *next;
};

struct text_pool;
enum err text_pool_create(unsigned n_threads, struct text_pool **out);
void text_pool_post(struct text_pool *p, struct text_job *job);
/* Ends the threads; jobs not begun yet go back without having run. Accepts NULL. */
void text_pool_destroy(struct text_pool *p);
