/* A rank without its link: open the group, run plans. See worker.h; create.c makes it.
 *
 * On a device with its own queue two steps may be under way: the second is filled and launched
 * while the first computes; its pending tokens stay on the device. On the CPU a step is done when
 * its operations return, so steps follow each other. */
#include "worker/rank.h"
#include "base/clock.h"
#include "proto/plan.h"
#include "worker/settle.h"

#include <string.h>

/* --- the group --- */

enum err worker_open_group(struct worker *w, uint64_t epoch, uint64_t n_blocks,
                           uint64_t n_host_blocks, const struct bootstrap *boot)
{
    struct collective_options o = {.timeout_ms = w->config.collective_timeout_ms};
    TRY(worker_close_group(w));
    if (n_blocks > w->info.n_blocks || n_host_blocks > w->info.n_host_blocks)
        FAIL(ERR_FORMAT,
             "welcome: %llu blocks and %llu host blocks, but this rank holds %llu and %llu",
             (unsigned long long)n_blocks, (unsigned long long)n_host_blocks,
             (unsigned long long)w->info.n_blocks, (unsigned long long)w->info.n_host_blocks);
    slots_reset(&w->slots, (uint32_t)n_blocks, (uint32_t)n_host_blocks);
    w->epoch = epoch;
    w->next_step = 0;
    if (w->disk) kv_disk_reset(w->disk, epoch);
    decoder_collective_sizes(&w->decoder, &o.reduce_bytes_max, &o.gather_bytes_max);
    struct collective *c;
    TRY(collective_open(w->config.collective ? w->config.collective : "auto", w->backend,
                        w->model->group, boot, &o, &c));
    atomic_store(&w->abortable, c);
    w->decoder.collective = c;
    if (w->draft) draft_open_group(w->draft, c);
    if (boot) w->ended = boot->ended, w->ended_ctx = boot->ctx;
    return OK;
}

static bool ticket_ready(const struct worker *w, uint64_t ticket)
{
    const struct backend_ops *ops = w->backend->ops;
    return !ops->ticket_ready || ops->ticket_ready(w->backend, ticket);
}

/* The steps that were launched end, worthless or not: their arrays are then read no more. */
static enum err steps_drop(struct worker *w)
{
    int64_t begun = clock_monotonic_us();
    if (w->n_busy) worker_abort(w);
    for (; w->n_busy; w->n_busy--) {
        struct step *s = &w->steps[w->first_busy];
        while (!ticket_ready(w, s->ticket)) {
            if (clock_monotonic_us() - begun > CLOSE_MS * 1000ll)
                FAIL(ERR_DEVICE, "a step had not ended %d ms after its group", CLOSE_MS);
            clock_sleep_us(50);
        }
        TRY(w->backend->ops->ticket_wait(w->backend, s->ticket));
        s->busy = false;
        w->first_busy = (w->first_busy + 1) % STEPS_IN_FLIGHT;
    }
    return OK;
}

enum err worker_close_group(struct worker *w)
{
    TRY(steps_drop(w));
    atomic_store(&w->abortable, NULL);
    if (w->disk) kv_disk_reset(w->disk, 0);
    if (w->model->group.size > 1) graphs_drop(&w->graphs, w->backend);
    collective_close(w->decoder.collective);
    w->decoder.collective = NULL;
    if (w->draft) draft_open_group(w->draft, NULL);
    return OK;
}

void worker_abort(struct worker *w)
{
    struct collective *c = atomic_load(&w->abortable);
    if (c && c->ops->abort) c->ops->abort(c);
}

/* --- a step --- */

static void blocks_move(struct worker *w, const struct step_plan *p)
{
    const struct backend_ops *ops = w->backend->ops;
    char *host = w->host_blocks;
    for (uint32_t i = 0; i < p->n_saves; i++)
        ops->kv_save(w->backend, w->decoder.kv, (int32_t)p->saves[i].from,
                     host + p->saves[i].to * w->plan.block_bytes);
    for (uint32_t i = 0; i < p->n_loads; i++)
        ops->kv_load(w->backend, w->decoder.kv, (int32_t)p->loads[i].to,
                     host + p->loads[i].from * w->plan.block_bytes);
    for (uint32_t done = 0; done < p->n_copies;) {
        uint32_t n = p->n_copies - done;
        if (n > (uint32_t)w->plan.kv.n_blocks) n = (uint32_t)w->plan.kv.n_blocks;
        for (uint32_t i = 0; i < n; i++) {
            w->copy_from[i] = (int32_t)p->copies[done + i].from;
            w->copy_to[i] = (int32_t)p->copies[done + i].to;
        }
        ops->kv_copy(w->backend, w->decoder.kv, w->copy_from, w->copy_to, (int)n);
        done += n;
    }
}

static enum err step_replay(struct worker *w, struct step *s, struct graph *graph)
{
    const struct backend_ops *ops = w->backend->ops;
    struct tensor logits;
    ops->batch_begin(w->backend, &s->batch);
    TRY(graph_forward(&w->graphs, graph, &w->decoder, &s->batch, &logits));
    ops->sample(w->backend, logits, s->sample_rows, (int)s->n_rows, s->results);
    return OK;
}

/* Greedy rows of which nothing else is asked never become logits. */
static enum err rows_greedy(struct worker *w, struct step *s, uint32_t first, uint32_t n)
{
    TRY(decoder_argmax(&w->decoder, (int)first, (int)n, s->greedy));
    for (uint32_t i = 0; i < n; i++) {
        int32_t slot = s->sample_rows[first + i].slot;
        s->results[first + i].token = s->greedy[i];
        s->results[first + i].n_top = 0;
        if (slot >= 0) w->backend->ops->feed(w->backend, slot, s->greedy[i]);
    }
    return OK;
}

static enum err rows_sampled(struct worker *w, struct step *s, uint32_t first, uint32_t n)
{
    struct tensor logits;
    TRY(decoder_logits(&w->decoder, (int)first, (int)n, &logits));
    w->backend->ops->sample(w->backend, logits, s->sample_rows + first, (int)n, s->results + first);
    return OK;
}

static enum err step_compute(struct worker *w, struct step *s)
{
    const struct backend_ops *ops = w->backend->ops;
    if (s->batch.n_tokens == 0) return OK;
    struct graph *graph = graphs_prepare(&w->graphs, s);
    if (graph) return step_replay(w, s, graph);
    ops->batch_begin(w->backend, &s->batch);
    TRY(decoder_forward(&w->decoder, &s->batch));
    for (uint32_t row = 0; row < s->n_rows;) {
        uint32_t n = s->n_rows - row;
        if (n > (uint32_t)w->decoder.logits_rows_max) n = (uint32_t)w->decoder.logits_rows_max;
        bool greedy = decoder_has_argmax(&w->decoder) && step_is_greedy(s, row, n);
        TRY(greedy ? rows_greedy(w, s, row, n) : rows_sampled(w, s, row, n));
        row += n;
    }
    return OK;
}

/* On a device of its own a collective only queues: whether the sums were worth anything is asked
 * after the step. */
static enum err peers_check(const struct worker *w)
{
    struct collective *c = w->decoder.collective;
    struct tensor none = {w->decoder.delta, w->backend->activation_dtype, 0, 1, 1};
    if (!w->backend->stream || w->model->group.size == 1 || !c) return OK;
    return c->ops->all_reduce_sum(c, none, none);
}

static enum err step_wait(struct worker *w, struct step *s)
{
    if (s->settled) return OK;
    while (!ticket_ready(w, s->ticket)) {
        if (w->ended && w->ended(w->ended_ctx)) FAIL(ERR_PEER, "the group has ended during a step");
        clock_sleep_us(20);
    }
    TRY(w->backend->ops->ticket_wait(w->backend, s->ticket));
    TRY(peers_check(w));
    step_settle(s, &w->slots);
    return OK;
}

enum err worker_check(struct worker *w, bool waits)
{
    return waits ? settle_wait(w->model->settle) : settle_check(w->model->settle);
}

bool worker_ready(const struct worker *w)
{
    const struct step *s = &w->steps[w->first_busy];
    return w->n_busy > 0 && (s->settled || ticket_ready(w, s->ticket));
}

static enum err epoch_check(const struct worker *w, const struct step_plan *p)
{
    if (p->epoch != w->epoch)
        FAIL(ERR_FORMAT, "plan: epoch %llu, but this group lives in %llu",
             (unsigned long long)p->epoch, (unsigned long long)w->epoch);
    if (w->next_step && p->step != w->next_step)
        FAIL(ERR_FORMAT, "plan: step %llu, but %llu is next", (unsigned long long)p->step,
             (unsigned long long)w->next_step);
    return OK;
}

enum err worker_draft(struct worker *w)
{
    if (!w->draft || !w->draft->pending) return OK;
    for (int i = 0; i < w->n_busy; i++)
        TRY(step_wait(w, &w->steps[(w->first_busy + i) % STEPS_IN_FLIGHT]));
    TRY(draft_ahead(w->draft, &w->slots));
    if (!w->n_busy) w->ended_us = clock_monotonic_us(); /* what follows is waiting for a plan */
    return OK;
}

enum err worker_begin(struct worker *w, const struct step_plan *plan)
{
    struct step *oldest = &w->steps[w->first_busy], *s;
    ASSERT_CMP(w->n_busy, <, STEPS_IN_FLIGHT);
    TRY(epoch_check(w, plan));
    TRY(worker_draft(w));
    int64_t begun = clock_monotonic_us();
    if (w->n_busy && (!w->backend->stream || step_blocks(oldest, plan))) TRY(step_wait(w, oldest));
    TRY(slots_apply(&w->slots, plan));
    s = &w->steps[(w->first_busy + w->n_busy) % STEPS_IN_FLIGHT];
    s->epoch = plan->epoch;
    s->number = plan->step;
    s->begun_us = begun;
    s->wait_us = w->ended_us && !w->n_busy ? begun - w->ended_us : 0;
    blocks_move(w, plan);
    if (w->draft) draft_move(w->draft, &w->slots, plan, w->host_blocks);
    if (plan->n_fetches || plan->n_spills) TRY(kv_disk_start(w->disk, plan));
    step_fill(s, &w->slots, w->config.rank == 0);
    if (w->draft) w->draft->pending = w->slots.n_ahead > 0;
    w->next_step = plan->step + 1;
    w->decoder.collective_ns = 0;
    enum err e = step_compute(w, s);
    s->collective_us = w->decoder.collective_ns / 1000;
    s->ticket =
        w->backend->ops->step_end(w->backend); /* also of half a step: its arrays are read */
    s->busy = true;
    w->n_busy++;
    return e;
}

static void draft_report(struct draft *d, struct step_result *out)
{
    out->draft_us = (uint32_t)d->us;
    out->draft_passes = d->passes;
    out->draft_tokens = d->tokens_fed;
    out->draft_first_us = (uint32_t)d->first_us;
    d->us = d->first_us = d->passes = d->tokens_fed = 0;
}

enum err worker_end(struct worker *w, struct step_result *out)
{
    struct step *s = &w->steps[w->first_busy];
    ASSERT_CMP(w->n_busy, >, 0);
    TRY(step_wait(w, s));
    int64_t now = clock_monotonic_us();
    *out = (struct step_result){
        .epoch = s->epoch,
        .step = s->number,
        .n_tokens = s->n_tokens_out,
        .tokens = s->tokens,
        .compute_us = (uint32_t)(now - (s->begun_us > w->ended_us ? s->begun_us : w->ended_us)),
        .wait_us = (uint32_t)s->wait_us,
        .collective_us = (uint32_t)s->collective_us,
        .n_drafted = s->n_drafted,
        .drafted = s->drafted,
    };
    if (w->draft) draft_report(w->draft, out);
    if (s->batch.n_tokens) settle_step(w->model->settle, w->slots.n_blocks_used);
    s->busy = false;
    w->first_busy = (w->first_busy + 1) % STEPS_IN_FLIGHT;
    w->n_busy--;
    w->ended_us = now;
    return OK;
}

enum err worker_step(struct worker *w, const void *bytes, size_t n, struct buf *out_result)
{
    struct step_plan plan;
    struct step_result result;
    arena_reset(&w->arena);
    TRY(plan_decode(bytes, n, &w->arena, &plan));
    TRY(worker_begin(w, &plan));
    TRY(worker_end(w, &result));
    return step_result_encode(&result, w->config.rank != 0, out_result);
}
