/* The simulated world: time, wire, groups, faults; one seed from its first request to the last. */
#include "coordinator/engine/sim.h"
#include "base/mem.h"
#include "coordinator/engine/engine.h"
#include "coordinator/engine/sim_load.h"
#include "coordinator/engine/sim_worker.h"

#include <stdio.h>
#include <string.h>

enum { GROUPS_MAX = 3, EVENTS_MAX = 4096, TURNS_MAX = 60000 };
enum event_kind {
    EVENT_PLAN,
    EVENT_TRANSFER, /* ends; `how` says which kind */
    EVENT_MOVED,
    EVENT_RESULT,
    EVENT_SUBMIT,
    EVENT_CANCEL,
    EVENT_UP,
    EVENT_DOWN,
    EVENT_KILL,
    EVENT_CALM
};

struct event {
    int64_t at_us;
    uint64_t order; /* events of one time happen in the order they were made */
    enum event_kind kind;
    uint32_t group;
    uint64_t epoch;
    int how;
    struct buf bytes;
};

struct sim_group {
    struct sim_worker worker;
    struct group_info info;
    uint64_t epoch;
    bool up, alive;                   /* up: the engine was told; alive: the worker answers */
    int64_t last_down_us, last_up_us; /* the wire keeps order */
    int64_t last_io_us[2];            /* and so does the disk, for each kind */
};

struct world {
    struct rand rand, io_rand; /* io_rand: of what has to do with the disk */
    struct engine *engine;
    struct sim_load load;
    struct sim_group groups[GROUPS_MAX];
    uint32_t n_groups;
    struct event *heap; /* [n_events] */
    uint32_t n_events;
    uint64_t order, epoch;
    int64_t now_us;
    struct arena arena;
    struct sim_report report;
    /* the character of this seed */
    uint32_t loss, duplicate, slow; /* chances, per 1024 messages */
    uint32_t block_size, window, drafts, n_host, context, vocabulary_blocks;
    uint32_t token_share, pass_share; /* of a step's cost: a token's, of 40; a draft pass's */
    bool has_draft_model, drafts_always;
    int64_t step_us, wire_us, io_us;
    uint32_t n_disk, io_loss, io_hang; /* chances, per 1024 transfers */
    bool calm, changes_size, small;
    char words[300];
};

/* Events. */
static bool sooner(const struct event *a, const struct event *b)
{
    return a->at_us != b->at_us ? a->at_us < b->at_us : a->order < b->order;
}

static void swap_events(struct event *a, struct event *b)
{
    struct event c = *a;
    *a = *b;
    *b = c;
}

static struct event *add_event(struct world *w, enum event_kind kind, int64_t at_us, uint32_t group)
{
    ASSERT_CMP(w->n_events, <, EVENTS_MAX);
    uint32_t i = w->n_events++;
    w->heap[i] = (struct event){.at_us = at_us, .order = w->order++, .kind = kind, .group = group};
    for (; i && sooner(&w->heap[i], &w->heap[(i - 1) / 2]); i = (i - 1) / 2)
        swap_events(&w->heap[i], &w->heap[(i - 1) / 2]);
    return &w->heap[i];
}

static struct event take_event(struct world *w)
{
    struct event first = w->heap[0];
    w->heap[0] = w->heap[--w->n_events];
    for (uint32_t i = 0, child; (child = 2 * i + 1) < w->n_events; i = child) {
        if (child + 1 < w->n_events && sooner(&w->heap[child + 1], &w->heap[child])) child++;
        if (!sooner(&w->heap[child], &w->heap[i])) break;
        swap_events(&w->heap[child], &w->heap[i]);
    }
    return first;
}

static bool chance(struct world *w, uint32_t of_1024)
{
    return !w->calm && rand_below(&w->rand, 1024) < of_1024;
}

/* The wire. */
static enum err carry_plan(void *ctx, uint32_t group, const void *bytes, size_t n)
{
    struct world *w = ctx;
    struct sim_group *g = &w->groups[group];
    w->report.n_steps++;
    w->report.n_plan_bytes += n;
    int64_t at_us = w->now_us + (int64_t)rand_below(&w->rand, (uint64_t)w->wire_us + 1);
    if (at_us < g->last_down_us) at_us = g->last_down_us;
    g->last_down_us = at_us;
    struct event *e = add_event(w, EVENT_PLAN, at_us, group);
    e->epoch = g->epoch;
    return buf_add(&e->bytes, bytes, n);
}

static void lose_group(struct world *w, uint32_t group, int64_t after_us)
{
    struct sim_group *g = &w->groups[group];
    g->alive = false;
    add_event(w, EVENT_DOWN, w->now_us + after_us, group)->epoch = g->epoch;
}

static void group_failed(void *ctx, uint32_t group, uint64_t epoch, const char *why)
{
    struct world *w = ctx;
    (void)why;
    if (w->groups[group].epoch == epoch) lose_group(w, group, (int64_t)rand_below(&w->rand, 500));
}

static enum err answer(struct world *w, struct sim_group *g, uint32_t group, struct step_result *r)
{
    int64_t at_us =
        w->now_us + w->step_us / 2 + (int64_t)rand_below(&w->rand, (uint64_t)w->step_us + 1);
    if (chance(w, w->slow)) at_us += 20 * w->step_us;
    r->compute_us = (uint32_t)(w->step_us * (40 + w->token_share * r->n_tokens));
    r->draft_first_us = (uint32_t)(w->step_us * w->pass_share);
    r->draft_us = r->draft_first_us * r->draft_passes;
    if (at_us < g->last_up_us) at_us = g->last_up_us;
    g->last_up_us = at_us;
    if (chance(w, w->loss)) return OK;
    uint32_t n_copies = chance(w, w->duplicate) ? 2 : 1;
    for (uint32_t i = 0; i < n_copies; i++) {
        struct event *e = add_event(w, EVENT_RESULT, at_us, group);
        e->epoch = g->epoch;
        TRY(step_result_encode(r, false, &e->bytes));
    }
    return OK;
}

/* The disk. */
static bool io_chance(struct world *w, uint32_t of_1024)
{
    return !w->calm && rand_below(&w->io_rand, 1024) < of_1024;
}

static void start_io(struct world *w, uint32_t group, int kind, uint32_t n)
{
    struct sim_group *g = &w->groups[group];
    for (uint32_t i = 0; i < n; i++) {
        int64_t at_us = w->now_us + (int64_t)rand_below(&w->io_rand, (uint64_t)w->io_us + 1);
        if (io_chance(w, w->io_hang)) at_us += 3000000;
        if (at_us < g->last_io_us[kind]) at_us = g->last_io_us[kind];
        g->last_io_us[kind] = at_us;
        struct event *e = add_event(w, EVENT_TRANSFER, at_us, group);
        e->epoch = g->epoch;
        e->how = kind;
    }
}

/* A transfer ends; its news may wait for that of the next one. */
static enum err end_io(struct world *w, const struct event *from)
{
    struct sim_group *g = &w->groups[from->group];
    struct moved *news = &g->worker.moved;
    if (!g->alive || g->epoch != from->epoch) return OK;
    sim_worker_transfer(&g->worker, from->how, io_chance(w, w->io_loss));
    if (g->worker.io[from->how].n && rand_below(&w->io_rand, 2)) return OK;
    news->epoch = g->epoch;
    news->fetch_ns = (uint32_t)rand_below(&w->io_rand, 100000);
    news->fetches_failed = g->worker.failed[0], news->spills_failed = g->worker.failed[1];
    int64_t at_us = w->now_us + (int64_t)rand_below(&w->io_rand, (uint64_t)w->wire_us + 1);
    if (at_us < g->last_up_us) at_us = g->last_up_us;
    g->last_up_us = at_us;
    struct event *e = add_event(w, EVENT_MOVED, at_us, from->group);
    e->epoch = g->epoch;
    TRY(moved_encode(news, &e->bytes));
    news->n_fetches_failed = news->n_spills_failed = 0;
    return OK;
}

static enum err deliver_moved(struct world *w, const struct event *e)
{
    struct moved news;
    arena_reset(&w->arena);
    TRY(moved_decode(e->bytes.data, e->bytes.n, &w->arena, &news));
    return engine_moved(w->engine, e->group, 0, &news, w->now_us);
}

static enum err deliver_plan(struct world *w, const struct event *e)
{
    struct sim_group *g = &w->groups[e->group];
    struct step_plan plan;
    struct step_result result;
    if (!g->alive || g->epoch != e->epoch) return OK;
    arena_reset(&w->arena);
    TRY(plan_decode(e->bytes.data, e->bytes.n, &w->arena, &plan));
    if (plan.epoch != g->epoch)
        FAIL(ERR_INTERNAL, "group %u got a plan of another epoch", e->group);
    if (!sim_worker_apply(&g->worker, &plan, &result))
        FAIL(ERR_INTERNAL, "group %u step %llu: %s", e->group, (unsigned long long)plan.step,
             g->worker.fault);
    start_io(w, e->group, 0, plan.n_fetches);
    start_io(w, e->group, 1, plan.n_spills);
    return answer(w, g, e->group, &result);
}

static enum err deliver_result(struct world *w, const struct event *e)
{
    struct step_result result;
    arena_reset(&w->arena);
    TRY(step_result_decode(e->bytes.data, e->bytes.n, &w->arena, &result));
    enum err err = engine_result(w->engine, e->group, &result, w->now_us);
    if (!err) return OK;
    if (!w->loss) return err; /* only a lost message makes a gap */
    lose_group(w, e->group, (int64_t)rand_below(&w->rand, 500));
    return OK;
}

/* Groups. */
static uint32_t draw_blocks(struct world *w)
{
    uint32_t least = (w->context + w->block_size - 1) / w->block_size;
    if (w->small) least = least / 3 + 1; /* then the blocks and not the context are the limit */
    return least + (uint32_t)rand_below(&w->rand, 2 * (uint64_t)least + 4);
}

static enum err raise_group(struct world *w, uint32_t group)
{
    struct sim_group *g = &w->groups[group];
    struct group_info *i = &g->info;
    if (g->up) return OK;
    if (!i->n_blocks || w->changes_size) i->n_blocks = draw_blocks(w);
    g->epoch = i->epoch = ++w->epoch;
    sim_worker_fini(&g->worker);
    TRY(sim_worker_init(&g->worker, i->n_slots_max, i->n_blocks, i->n_host_blocks, i->block_size,
                        w->context));
    TRY(sim_worker_disk(&g->worker, i->n_disk_blocks));
    g->last_io_us[0] = g->last_io_us[1] = 0;
    g->worker.window = i->window;
    g->worker.step_tokens_max = i->step_tokens_max;
    g->worker.step_prompt_max = i->step_prompt_max;
    g->worker.step_rows_max = i->step_rows_max;
    g->worker.has_draft_model = i->has_draft_model;
    g->up = g->alive = true;
    uint32_t capacity =
        i->n_blocks * i->block_size < w->context ? i->n_blocks * i->block_size : w->context;
    if (capacity < w->load.capacity_least) w->load.capacity_least = capacity;
    engine_group_up(w->engine, group, i);
    return OK;
}

static void drop_group(struct world *w, const struct event *e)
{
    struct sim_group *g = &w->groups[e->group];
    if (!g->up || g->epoch != e->epoch) return;
    g->up = g->alive = false;
    w->report.n_losses++;
    engine_group_down(w->engine, e->group, e->epoch);
    add_event(w, EVENT_UP, w->now_us + 200 + (int64_t)rand_below(&w->rand, 5000), e->group);
}

/* Clients. */
static void submit(struct world *w, struct sim_request *q)
{
    q->submitted = true;
    q->accepted = true; /* its news may come before engine_submit returns */
    enum err err = engine_submit(w->engine, &q->request, w->now_us);
    if (!err) {
        w->load.n_accepted++;
        return;
    }
    q->accepted = false;
    w->load.n_refused++;
    if (err != ERR_FULL && err != ERR_DEADLINE && err != ERR_TOO_LONG && err != ERR_NOT_READY)
        sim_wrong(&w->load, q, "refused: %s", err_detail());
}

static void cancel(struct world *w, struct sim_request *q)
{
    if (!q->accepted || q->ended) return;
    bool whole = q->request.beam_width || q->request.n_best_of > q->request.n_choices;
    if (whole && q->cancel_choice >= 0) q->cancel_choice = -1; /* its choices are not known yet */
    q->cancelled = true;
    for (uint32_t i = 0; i < q->request.n_choices; i++)
        if (q->cancel_choice < 0 || q->cancel_choice == (int)i)
            q->choices[i].stopped = q->cancel_how == ENGINE_CANCEL_STOP;
    engine_cancel(w->engine, q->request.id, q->cancel_choice, q->cancel_how);
}

/* One seed's character. */
static void draw_group(struct world *w, uint32_t group)
{
    struct group_info *i = &w->groups[group].info;
    *i = (struct group_info){.n_ranks = 1,
                             .block_size = w->block_size,
                             .n_host_blocks = w->n_host,
                             .n_slots_max = 2 + (uint32_t)rand_below(&w->rand, 10),
                             .step_tokens_max = 4 + (uint32_t)rand_below(&w->rand, 40),
                             .context_max = w->context,
                             .vocab_size = SIM_VOCABULARY,
                             .window = w->window,
                             .draft_tokens_max = w->drafts,
                             .block_bytes = 1024,
                             .has_draft_model = w->has_draft_model,
                             .n_disk_blocks = w->n_disk,
                             .save_ns = (uint32_t)rand_below(&w->io_rand, 1000000),
                             .load_ns = (uint32_t)rand_below(&w->io_rand, 1000000),
                             .fetch_ns = (uint32_t)rand_below(&w->io_rand, 1000000)};
    i->step_rows_max = 2 + (uint32_t)rand_below(&w->rand, 20);
    i->step_prompt_max =
        rand_below(&w->io_rand, 2) ? 0 : 1 + (uint32_t)rand_below(&w->io_rand, 20);
}

static void draw_disk(struct world *w)
{
    struct rand *r = &w->io_rand;
    w->n_disk = w->n_host && rand_below(r, 3) ? 1 + (uint32_t)rand_below(r, 60) : 0;
    w->io_us = 10 + (int64_t)rand_below(r, 4000);
    w->io_loss = rand_below(r, 2) ? 0 : 1u << rand_below(r, 11);
    w->io_hang = rand_below(r, 4) ? 0 : 1u << rand_below(r, 7);
}

static enum err draw_engine(struct world *w)
{
    struct rand *r = &w->rand;
    struct engine_config config = {.n_groups = w->n_groups,
                                   .n_sequences_max = 1 + (uint32_t)rand_below(r, 12),
                                   .n_queued_max =
                                       rand_below(r, 3) ? 0 : 1 + (uint32_t)rand_below(r, 12),
                                   .pipeline_depth = 1 + (uint32_t)rand_below(r, 3),
                                   .prefix_cache = rand_below(r, 5) != 0,
                                   .hash_salt = rand_next(r),
                                   .n_speculative_tokens = w->drafts,
                                   .draft_always = w->drafts_always,
                                   .step_timeout_us = 100 * w->step_us + 4 * w->wire_us,
                                   .starve_us = w->step_us % 4 ? 0 : 12 * w->step_us,
                                   .always_offload = rand_below(&w->io_rand, 4) != 0};
    struct engine_hooks hooks = {carry_plan, group_failed, w};
    return engine_create(&config, &hooks, &w->engine);
}

/* From a stream of their own, so that a seed without drafts is the world it was before. */
static void draw_drafts(struct world *w)
{
    struct rand r = rand_seeded(w->rand.key ^ 0xd4a7f5);
    w->has_draft_model = w->drafts && rand_below(&r, 3);
    w->token_share = w->drafts && rand_below(&r, 2) ? (uint32_t)rand_below(&r, 40) : 0;
    w->pass_share = (uint32_t)rand_below(&r, 30);
    w->drafts_always = rand_below(&r, 2);
}

static enum err draw_world(struct world *w)
{
    struct rand *r = &w->rand;
    bool faults = rand_below(r, 2);
    w->n_groups = rand_below(r, 3) ? 1 : 2 + (uint32_t)rand_below(r, GROUPS_MAX - 1);
    w->block_size = 1 + (uint32_t)rand_below(r, 6);
    w->context = 24 + (uint32_t)rand_below(r, 60);
    w->window = rand_below(r, 5) ? 0 : 1 + (uint32_t)rand_below(r, 20);
    w->drafts = rand_below(r, 3) ? 0 : 1 + (uint32_t)rand_below(r, 6);
    draw_drafts(w);
    w->n_host = rand_below(r, 3) ? 0 : (uint32_t)rand_below(r, 40);
    w->step_us = 100 + (int64_t)rand_below(r, 900);
    w->wire_us = (int64_t)rand_below(r, 300);
    w->loss = faults && !rand_below(r, 3) ? 8 : 0;
    w->duplicate = faults && !rand_below(r, 2) ? 60 : 0;
    w->slow = faults && !rand_below(r, 2) ? 20 : 0;
    draw_disk(w);
    bool rereads = w->n_disk && rand_below(&w->io_rand, 2);
    if (rereads) w->n_host = 2 + (uint32_t)rand_below(&w->io_rand, 16);
    w->changes_size = !rand_below(r, 4);
    w->small = !rand_below(r, 4);
    struct sim_load_shape shape = {.n_requests = 2 + (uint32_t)rand_below(r, 14),
                                   .prompt_max = w->context / 2,
                                   .output_max = w->context / 2,
                                   .beams_max = rand_below(r, 3) ? 0 : 4,
                                   .choices_max = rand_below(r, 3) ? 1 : 4,
                                   .span_us = (int64_t)rand_below(r, 30000),
                                   .deadlines = !rand_below(r, 4),
                                   .cancels = rand_below(r, 2),
                                   .scores = !rand_below(r, 3),
                                   .priorities = !rand_below(r, 3)};
    if (rereads) { /* more prompts than the device holds, one after the other, and again */
        shape.repeats = 2 + (uint32_t)rand_below(&w->io_rand, 8);
        shape.n_requests += 16;
        shape.span_us *= 2;
        w->small = true;
    }
    if (!rand_below(r, 8)) shape.prompt_max = w->context + 4;
    TRY(sim_load_make(&w->load, r, &shape));
    w->load.shrinks = w->changes_size || w->n_groups > 1;
    for (uint32_t i = 0; i < w->n_groups; i++)
        draw_group(w, i);
    TRY(draw_engine(w));
    for (uint32_t i = 0; i < w->load.n; i++) {
        add_event(w, EVENT_SUBMIT, w->load.requests[i].arrival_us, i);
        if (w->load.requests[i].cancel_us != INT64_MAX)
            add_event(w, EVENT_CANCEL, w->load.requests[i].cancel_us, i);
    }
    for (uint32_t i = 0; i < w->n_groups; i++) {
        TRY(raise_group(w, i));
        for (uint32_t k = faults ? (uint32_t)rand_below(r, 4) : 0; k > 0; k--)
            add_event(w, EVENT_KILL, (int64_t)rand_below(r, 60000), i);
    }
    add_event(w, EVENT_CALM, 100000, 0);
    return OK;
}

static enum err happen(struct world *w, const struct event *e)
{
    switch (e->kind) {
    case EVENT_PLAN:
        return deliver_plan(w, e);
    case EVENT_RESULT:
        return deliver_result(w, e);
    case EVENT_TRANSFER:
        return end_io(w, e);
    case EVENT_MOVED:
        return deliver_moved(w, e);
    case EVENT_SUBMIT:
        submit(w, &w->load.requests[e->group]);
        break;
    case EVENT_CANCEL:
        cancel(w, &w->load.requests[e->group]);
        break;
    case EVENT_UP:
        return raise_group(w, e->group);
    case EVENT_DOWN:
        drop_group(w, e);
        break;
    case EVENT_KILL:
        if (w->groups[e->group].alive) lose_group(w, e->group, (int64_t)rand_below(&w->rand, 2000));
        break;
    case EVENT_CALM:
        w->calm = true;
        break;
    }
    return OK;
}

/* The invariants that hold after every event. */
static enum err check_counts(struct world *w)
{
    struct engine_stats s;
    if (w->load.words[0]) FAIL(ERR_INTERNAL, "%s", w->load.words);
    engine_stats(w->engine, &s);
    if (s.host_used > s.host_total || s.disk_used > s.disk_total)
        FAIL(ERR_INTERNAL, "more blocks outside the device than there are");
    if (s.blocks_free + s.blocks_cached + s.blocks_held != s.blocks_total)
        FAIL(ERR_INTERNAL, "blocks: %llu free, %llu cached, %llu held of %llu",
             (unsigned long long)s.blocks_free, (unsigned long long)s.blocks_cached,
             (unsigned long long)s.blocks_held, (unsigned long long)s.blocks_total);
    return OK;
}

static enum err check_rest(struct world *w)
{
    struct engine_stats s;
    engine_stats(w->engine, &s);
    for (uint32_t i = 0; i < w->load.n; i++) {
        const struct sim_request *q = &w->load.requests[i];
        if (q->accepted && (!q->ended || !q->destroyed))
            FAIL(ERR_INTERNAL, "request %u never ended", i + 1);
    }
    if (s.n_fetching || s.host_private)
        FAIL(ERR_INTERNAL, "at rest: somebody's blocks are outside");
    if (s.n_running || s.n_waiting || s.blocks_held)
        FAIL(ERR_INTERNAL, "at rest: %u running, %u waiting, %llu blocks held", s.n_running,
             s.n_waiting, (unsigned long long)s.blocks_held);
    w->report.n_preemptions = s.n_preemptions, w->report.n_swaps = s.n_swaps_in,
    w->report.n_forks = s.n_forks;
    w->report.n_own = s.model_drafts_proposed, w->report.n_own_kept = s.model_drafts_accepted;
    w->report.n_drafts = s.drafts_proposed, w->report.n_drafts_kept = s.drafts_accepted;
    w->report.n_host_hits = s.n_hit_tokens_host, w->report.n_disk_hits = s.n_hit_tokens_disk;
    w->report.n_saves = s.n_saves, w->report.n_spills = s.n_spills;
    w->report.n_io_failures = s.n_fetches_failed + s.n_spills_failed;
    w->report.n_hits = s.n_cached_tokens, w->report.n_tokens = w->load.n_tokens;
    w->report.n_accepted = w->load.n_accepted, w->report.n_refused = w->load.n_refused;
    return OK;
}

/* The next event, or the engine's own alarm when that is sooner. False when nothing is left. */
static bool advance(struct world *w, struct event *out)
{
    int64_t wake_us = engine_wake_us(w->engine);
    *out = (struct event){.kind = EVENT_CALM, .at_us = wake_us};
    bool alarm = wake_us != INT64_MAX && (!w->n_events || wake_us < w->heap[0].at_us);
    if (!alarm && !w->n_events) return false;
    if (!alarm) *out = take_event(w);
    if (out->at_us > w->now_us) w->now_us = out->at_us;
    w->load.now_us = w->now_us;
    return true;
}

static enum err live(struct world *w)
{
    struct event e;
    for (uint32_t turn = 0; advance(w, &e); turn++) {
        if (turn == TURNS_MAX)
            FAIL(ERR_INTERNAL, "no end after %u events: %u of %u requests ended", turn,
                 w->load.n_ended, w->load.n_accepted);
        enum err err = happen(w, &e);
        buf_fini(&e.bytes);
        TRY(err);
        engine_step(w->engine, w->now_us);
        TRY(check_counts(w));
        if (turn % 8 == 0) engine_check(w->engine);
    }
    engine_check(w->engine);
    return check_rest(w);
}

static enum err sim_world(struct world *w)
{
    TRY(MEM_NEW_ARRAY(EVENTS_MAX, &w->heap));
    TRY(draw_world(w));
    return live(w);
}

enum err sim_run(uint64_t seed, struct sim_report *out)
{
    struct world *w;
    TRY(MEM_NEW(&w));
    w->rand = rand_seeded(seed);
    w->io_rand = rand_seeded(~seed);
    arena_init(&w->arena, 1 << 14, 1 << 26);
    enum err e = sim_world(w);
    *out = w->report;
    for (uint32_t i = 0; i < w->n_events; i++)
        buf_fini(&w->heap[i].bytes);
    for (uint32_t i = 0; i < w->load.n; i++)
        w->load.requests[i].ended |= e != OK; /* the rest is not judged */
    engine_destroy(w->engine);
    for (uint32_t i = 0; i < GROUPS_MAX; i++)
        sim_worker_fini(&w->groups[i].worker);
    sim_load_fini(&w->load);
    arena_fini(&w->arena);
    mem_free(w->heap);
    mem_free(w);
    return e;
}
