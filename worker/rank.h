/* The inside of a rank, for worker.c and tests: a step begun and ended apart. */
#pragma once
#include "worker/draft.h"
#include "worker/graphs.h"
#include "worker/kv_disk.h"
#include "worker/memory.h"
#include "worker/model/decoder.h"
#include "worker/step.h"
#include "worker/worker.h"

#include <stdatomic.h>

enum { STEPS_IN_FLIGHT = 2 };
struct worker {
    struct worker_config config;
    struct worker_info info;
    struct memory_plan plan;
    struct backend *backend;
    struct model *model;
    struct decoder decoder;
    struct graphs graphs;
    struct slots slots;
    struct draft *draft;                /* NULL: there is no draft model */
    struct step steps[STEPS_IN_FLIGHT]; /* a ring: n_busy from first_busy on */
    int first_busy, n_busy;
    struct arena arena;           /* of the plan in hand */
    int32_t *copy_from, *copy_to; /* [n_blocks] */
    void *host_blocks;            /* [n_host_blocks][block_bytes] */
    struct kv_disk *disk;         /* NULL = none */
    size_t host_bytes;
    uint64_t epoch, next_step; /* next_step 0 = any number may come first */
    _Atomic(struct collective *) abortable;
    bool (*ended)(void *ctx); /* of the group's bootstrap */
    void *ended_ctx;
    int percent;
    int64_t ended_us;
};

/* Launches a plan; at most STEPS_IN_FLIGHT are under way. The plan's memory may go afterwards. */
enum err worker_begin(struct worker *w, const struct step_plan *plan);
/* Whether worker_end would return at once. */
bool worker_ready(const struct worker *w);
/* Ends the oldest, waiting for it; out's arrays live until its place in the ring is taken again. */
enum err worker_end(struct worker *w, struct step_result *out);
/* OK while this rank is sound. Weights that were found damaged after the start: their error, for
 * which the rank must leave. waits: until all have been looked at. */
enum err worker_check(struct worker *w, bool waits);
/* Drafts that the last plan wanted after it, when no later plan has begun; nothing to do is fine.
 * The result of that plan may have been sent already: drafting is not waited for. */
enum err worker_draft(struct worker *w);
/* Closes the collective; steps under way are dropped. ERR_DEVICE: the device still works on one of
 * them after CLOSE_MS, and nothing but the end of the process will free it. */
enum { CLOSE_MS = 5000 };
enum err worker_close_group(struct worker *w);
