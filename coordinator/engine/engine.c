/* The engine's inputs: requests, cancels, groups, time. */
#include "base/mem.h"
#include "coordinator/engine/state.h"

#include <string.h>

enum { DEPTH_DEFAULT = 2 };
static const int64_t FOREVER_US = INT64_MAX;

enum err engine_create(const struct engine_config *config, const struct engine_hooks *hooks,
                       struct engine **out)
{
    struct engine *e;
    TRY(MEM_NEW(&e));
    e->config = *config;
    e->hooks = *hooks;
    if (!e->config.n_groups) e->config.n_groups = 1;
    if (!e->config.pipeline_depth) e->config.pipeline_depth = DEPTH_DEFAULT;
    if (e->config.pipeline_depth >= FLIGHTS_MAX) e->config.pipeline_depth = FLIGHTS_MAX - 1;
    e->next_deadline_us = FOREVER_US;
    e->order = 1;
    e->limits.prefix_cache = config->prefix_cache;
    e->limits.n_queued_limit = config->n_queued_max;
    e->limits.n_queued_tokens_limit = config->n_queued_tokens_max;
    buf_init(&e->bytes, 0);
    slabs_init(&e->sequences, sizeof(struct sequence));
    slabs_init(&e->job_slabs, sizeof(struct job));
    enum err err = fair_init(&e->fair);
    if (err) {
        engine_destroy(e);
        return err;
    }
    if (config->starve_us > 0) e->fair.starve_us = config->starve_us;
    *out = e;
    return OK;
}

/* Ends every request that is left. */
static void end_all(struct engine *e, const struct ending *end)
{
    for (uint32_t i = 0; e->jobs.slots && i <= e->jobs.mask;) {
        struct job *job = e->jobs.slots[i];
        if (!job)
            i++; /* ending one may move others into its place: look again */
        else
            job_abort(e, job, -1, end);
    }
    job_flush(e);
}

void engine_destroy(struct engine *e)
{
    if (!e) return;
    end_all(e, &(struct ending){FINISH_ERROR, -1, ERR_NOT_READY, "the server stops"});
    for (uint32_t i = 0; i < e->n_groups; i++) {
        if (e->groups[i]) group_fini(e->groups[i]);
        mem_free(e->groups[i]);
    }
    mem_free(e->jobs.slots);
    mem_free(e->deadlines);
    mem_free(e->sinks);
    mem_free(e->emit_tokens);
    fair_fini(&e->fair);
    buf_fini(&e->bytes);
    pool_fini(&e->pool);
    slabs_fini(&e->sequences);
    slabs_fini(&e->job_slabs);
    mem_free(e);
}

/* Requests. */
enum err engine_submit(struct engine *e, struct request *r, int64_t now_us)
{
    struct job *job;
    e->now_us = now_us;
    uint32_t n = request_sequences(r);
    enum err err = limits_check(&e->limits, r, now_us);
    e->stats.n_rejected_full += err == ERR_FULL;
    e->stats.n_rejected_deadline += err == ERR_DEADLINE;
    if (err) return err;
    if (job_find(e, r->id))
        FAIL(ERR_INVALID, "request id %llu is alive", (unsigned long long)r->id);
    if (!r->arrival_us) r->arrival_us = now_us;
    TRY(job_create(e, r, &job));
    for (uint32_t i = 0; i < n; i++)
        job->sequences[i]->counted = true;
    e->limits.n_queued += n;
    e->limits.n_queued_tokens += (uint64_t)n * r->n_tokens;
    job->sequences[0]->state = SEQUENCE_WAITING;
    fair_wait(&e->fair, job->sequences[0], now_us);
    return OK;
}

void engine_cancel(struct engine *e, uint64_t request_id, int32_t choice, int how)
{
    struct job *job = job_find(e, request_id);
    if (!job) return;
    enum finish finish = how == ENGINE_CANCEL_STOP ? FINISH_STOP : FINISH_CANCELLED;
    job_abort(e, job, choice, &(struct ending){finish, -1, OK, NULL});
    job_flush(e);
}

/* Groups. */
static enum err check_group(const struct engine *e, uint32_t group, const struct group_info *info)
{
    (void)e;
    if (group >= ENGINE_GROUPS_MAX)
        FAIL(ERR_INVALID, "group %u of at most %d", group, (int)ENGINE_GROUPS_MAX);
    if (!info->block_size || !info->n_blocks || !info->n_slots_max || !info->step_tokens_max ||
        !info->step_rows_max || !info->context_max || !info->vocab_size)
        FAIL(ERR_INVALID, "group %u offers no blocks, slots, tokens or rows", group);
    return OK;
}

static uint32_t least(uint32_t a, uint32_t b)
{
    return a < b ? a : b;
}

static void note_capacity(struct engine *e, const struct group *g)
{
    struct engine_limits *l = &e->limits;
    uint32_t n = group_tokens_capacity(g, e->config.context_max);
    if (n >= l->tokens_capacity) {
        l->tokens_capacity = n;
        l->n_blocks_max = g->info.n_blocks;
        l->block_size = g->info.block_size;
    }
    if (g->n_slots > l->n_slots_max) l->n_slots_max = g->n_slots;
    l->context_max = e->config.context_max ? least(e->config.context_max, g->info.context_max)
                                           : g->info.context_max;
    l->vocab_size = g->info.vocab_size;
}

static enum err group_start(struct engine *e, uint32_t group, const struct group_info *info)
{
    TRY(check_group(e, group, info));
    if (!e->groups[group]) TRY(MEM_NEW(&e->groups[group]));
    if (group >= e->n_groups) e->n_groups = group + 1;
    uint32_t n_budget = info->step_tokens_max;
    if (e->config.step_tokens_max) n_budget = least(n_budget, e->config.step_tokens_max);
    uint32_t n_slots = least(info->n_slots_max, least(info->step_rows_max, n_budget));
    if (e->config.n_sequences_max) n_slots = least(n_slots, e->config.n_sequences_max);
    TRY(group_init(e->groups[group], group, info, n_slots, n_budget, e->config.pipeline_depth));
    e->groups[group]->costs.ignored = e->config.draft_always;
    return OK;
}

static void count_moves(const struct group *g, struct engine_stats *s)
{
    const struct kv_store *t = &g->store;
    uint64_t bytes = g->info.block_bytes * t->n_ranks;
    s->n_saves += t->n_saves, s->save_bytes += t->n_saves * bytes;
    s->n_loads += t->n_loads, s->load_bytes += t->n_loads * bytes;
    s->n_fetches += t->n_fetches, s->fetch_bytes += t->n_fetches * bytes;
    s->n_spills += t->n_spills, s->spill_bytes += t->n_spills * bytes;
    s->n_fetches_failed += t->n_fetches_failed, s->n_spills_failed += t->n_spills_failed;
}

void engine_group_up(struct engine *e, uint32_t group, const struct group_info *info)
{
    struct group *g = group < e->n_groups ? e->groups[group] : NULL;
    if (g && g->up) engine_group_down(e, group, g->info.epoch);
    if (group_start(e, group, info)) {
        if (e->hooks.group_failed)
            e->hooks.group_failed(e->hooks.ctx, group, info->epoch, err_detail());
        return;
    }
    e->n_up++;
    note_capacity(e, e->groups[group]);
}

void engine_group_down(struct engine *e, uint32_t group, uint64_t epoch)
{
    struct group *g = group < e->n_groups ? e->groups[group] : NULL;
    if (!g || !g->up || g->info.epoch != epoch) return;
    e->stats.n_group_losses++;
    tiers_release(e, g, true);
    for (struct sequence *s = e->fair.by_age.first; s; s = s->links[LINK_AGE].next) {
        if (s->has_host && s->group == group) admission_drop_host(e, s);
        if (s->placed == group + 1) place_forget(e, s);
    }
    for (struct sequence *s; (s = g->draining.first);) {
        admission_drop_host(e, s);
        admission_requeue(e, g, s);
    }
    beam_group_down(e, g);
    for (struct sequence *s; (s = g->running.first);) {
        admission_unseat(e, g, s);
        admission_requeue(e, g, s);
    }
    count_moves(g, &e->stats);
    group_fini(g);
    e->n_up--;
}

/* Time. */
static void end_late(struct engine *e)
{
    if (e->now_us < e->next_deadline_us) return;
    e->next_deadline_us = FOREVER_US;
    for (uint32_t i = 0; i < e->n_deadlines;) {
        struct job *job = e->deadlines[i];
        if (job->request->deadline_us <= e->now_us) {
            e->stats.n_rejected_deadline++;
            job_abort(e, job, -1,
                      &(struct ending){FINISH_ERROR, -1, ERR_DEADLINE,
                                       "no token came before the deadline"});
            continue; /* it left the list: another stands in its place */
        }
        if (job->request->deadline_us < e->next_deadline_us)
            e->next_deadline_us = job->request->deadline_us;
        i++;
    }
}

static int64_t watchdog_us(const struct engine *e, const struct group *g)
{
    if (!g || !g->up || g->broken || !e->config.step_timeout_us || !group_in_flight(g))
        return FOREVER_US;
    return g->flights[(g->acked_step + 1) % FLIGHTS_MAX].sent_us + e->config.step_timeout_us;
}

static void watch(struct engine *e)
{
    for (uint32_t i = 0; i < e->n_groups; i++) {
        struct group *g = e->groups[i];
        if (watchdog_us(e, g) > e->now_us) continue;
        g->broken = true;
        if (e->hooks.group_failed)
            e->hooks.group_failed(e->hooks.ctx, i, g->info.epoch,
                                  "a step was not answered in time");
    }
}

/* How fast the queue is left, while somebody stands in it: what a refused client is told. */
static void note_leaving(struct engine *e)
{
    struct engine_limits *l = &e->limits;
    if (!e->n_left_queue) return;
    if (e->last_left_us && e->now_us > e->last_left_us) {
        uint64_t ns = (uint64_t)(e->now_us - e->last_left_us) * 1000 / e->n_left_queue;
        l->leave_ns = l->leave_ns ? (7 * l->leave_ns + ns) / 8 : ns;
    }
    e->last_left_us = l->n_queued ? e->now_us : 0;
    e->n_left_queue = 0;
}

bool engine_step(struct engine *e, int64_t now_us)
{
    bool sent = false, again;
    e->now_us = now_us;
    end_late(e);
    watch(e);
    for (uint32_t i = 0; i < e->n_groups; i++) {
        struct group *g = e->groups[i];
        if (g && g->up && g->fetch_alarm_us && g->fetch_alarm_us <= now_us)
            tiers_release(e, g, false);
    }
    do { /* one plan a group in turn, so that the first does not take all that waits */
        again = false;
        for (uint32_t i = 0; i < e->n_groups; i++)
            if (e->groups[i] && scheduler_plan(e, e->groups[i])) again = true;
        sent |= again;
    } while (again);
    note_leaving(e);
    job_flush(e);
    return sent;
}

int64_t engine_wake_us(const struct engine *e)
{
    int64_t wake = e->next_deadline_us;
    for (uint32_t i = 0; i < e->n_groups; i++) {
        const struct group *g = e->groups[i];
        int64_t at = watchdog_us(e, g);
        if (at < wake) wake = at;
        if (g && g->up && g->fetch_alarm_us && g->fetch_alarm_us < wake) wake = g->fetch_alarm_us;
    }
    return wake;
}

void engine_stats(const struct engine *e, struct engine_stats *out)
{
    struct engine_stats s = e->stats;
    s.n_groups = e->config.n_groups > e->n_groups ? e->config.n_groups : e->n_groups;
    s.n_groups_up = e->n_up;
    s.n_waiting = e->limits.n_queued > e->fair.by_age.n ? e->limits.n_queued : e->fair.by_age.n;
    s.n_swapped = e->n_swapped;
    for (uint32_t i = 0; i < e->n_groups; i++) {
        const struct group *g = e->groups[i];
        if (!g || !g->up) continue;
        s.n_running += g->running.n + g->draining.n;
        s.blocks_total += g->kv.n_total;
        s.blocks_free += g->kv.n_free;
        s.blocks_cached += g->kv.n_cached;
        s.blocks_held += g->kv.n_held;
        count_moves(g, &s);
        s.host_total += g->store.host.n_total;
        s.host_used += g->store.host.n_total - g->store.host.n_free;
        s.host_private += g->store.host.n_private;
        s.disk_total += g->store.disk.n_total;
        s.disk_used += g->store.disk.n_total - g->store.disk.n_free;
        s.n_fetching += g->fetching.n;
    }
    s.context_max = e->limits.tokens_capacity;
    s.vocab_size = e->limits.vocab_size;
    s.block_size = e->limits.block_size;
    if (s.n_waiting < e->fair.by_age.n + s.n_fetching)
        s.n_waiting = e->fair.by_age.n + s.n_fetching;
    *out = s;
}

/* Checks. */
static void check_running(const struct group *g, uint32_t *refs)
{
    for (const struct sequence *s = g->running.first; s; s = s->links[LINK_PLACE].next) {
        ASSERT(s->state == SEQUENCE_RUNNING && s->group == g->index && g->slots[s->slot] == s);
        ASSERT(s->decoding || s->lists[LINK_WORK]);
        ASSERT_CMP((uint64_t)sequence_planned(s, g->next_step), <=,
                   (uint64_t)s->blocks.n * g->info.block_size);
        for (uint32_t i = s->n_window_freed; i < s->blocks.n; i++)
            refs[sequence_blocks(s)[i]]++;
    }
}

static void check_placed(const struct engine *e, const struct group *g)
{
    uint64_t n = 0;
    for (const struct sequence *s = e->fair.by_age.first; s; s = s->links[LINK_AGE].next)
        n += s->placed == g->index + 1 ? s->n_placed : 0;
    for (const struct sequence *s = g->fetching.first; s; s = s->links[LINK_WORK].next)
        n += s->placed ? s->n_placed : 0;
    ASSERT_CMP(n, ==, g->n_placed_tokens);
}

/* Every private host block belongs to one sequence that waits or drains. */
static void check_swapped(const struct engine *e, const struct group *g)
{
    uint32_t n = 0;
    for (const struct sequence *s = e->fair.by_age.first; s; s = s->links[LINK_AGE].next)
        if (s->has_host && s->group == g->index) n += s->host.n;
    for (const struct sequence *s = g->draining.first; s; s = s->links[LINK_WORK].next)
        if (s->has_host) n += s->host.n;
    ASSERT_CMP(n, ==, g->store.host.n_private);
}

void engine_check(const struct engine *e)
{
    for (uint32_t i = 0; i < e->n_groups; i++) {
        const struct group *g = e->groups[i];
        uint32_t *refs;
        if (!g || !g->up) continue;
        check_placed(e, g);
        kv_blocks_check(&g->kv);
        kv_store_check(&g->store);
        check_swapped(e, g);
        if (MEM_NEW_ARRAY(g->kv.n_total, &refs)) return;
        check_running(g, refs);
        for (uint32_t b = 0; b < g->kv.n_total; b++)
            ASSERT_CMP(g->kv.blocks[b].n_refs, ==, refs[b]);
        mem_free(refs);
        ASSERT_CMP(g->running.n + g->n_free_slots + g->slot_limbo.n + g->n_late_slots, ==,
                   g->n_slots);
    }
}
