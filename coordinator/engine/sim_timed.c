/* Requests in simulated time against groups that only cost time. */
#include "coordinator/engine/sim_timed.h"
#include "base/mem.h"
#include "base/rand.h"
#include "coordinator/engine/engine.h"

#include <stdlib.h>
#include <string.h>

enum { VOCABULARY = 50000, FLIGHT_MAX = 8, GROUPS_MAX = 64 };

struct end { /* an engine and the first of its groups */
    struct stage *stage;
    struct engine *engine;
    uint32_t first;
};

struct device {     /* a group: plans sent and not answered, in order */
    bool *decoding; /* [n_slots] */
    uint32_t n_decoding;
    int64_t free_us; /* when it has done what it was sent */
    struct flying {
        int64_t at_us;
        struct step_result result;
    } flying[FLIGHT_MAX];
    struct step_token *tokens[FLIGHT_MAX]; /* [n_slots] */
    uint32_t first, n;
};

struct stream {
    struct sink sink;
    struct stage *stage;
    struct request request;
    uint32_t index, end;
};

struct stage {
    struct timed_run *run;
    struct end ends[GROUPS_MAX];
    uint32_t n_ends;
    struct router router;
    struct device devices[GROUPS_MAX];
    struct arena arena;
    int64_t now_us;
    uint32_t n_alive, n_arrived;
};

int64_t percentile_us(int64_t *values, uint32_t n, double p);

static int compare(const void *a, const void *b)
{
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? -1 : x > y;
}

int64_t percentile_us(int64_t *values, uint32_t n, double p)
{
    if (!n) return 0;
    qsort(values, n, sizeof *values, compare);
    uint32_t at = (uint32_t)(p * n);
    return values[at < n ? at : n - 1];
}

/* A group's work: who samples, and how long it takes. */
static enum err compute(struct stage *s, uint32_t group, const struct step_plan *p)
{
    struct device *d = &s->devices[group];
    const struct cost_model *c = &s->run->cost;
    uint32_t at = (d->first + d->n) % FLIGHT_MAX, n = 0;
    uint64_t n_tokens = 0;
    if (d->n == FLIGHT_MAX) FAIL(ERR_INTERNAL, "too many plans in flight");
    for (uint32_t i = 0; i < p->n_closes; i++)
        d->decoding[p->closes[i]] = false;
    for (uint32_t i = 0; i < p->n_pauses; i++)
        d->decoding[p->pauses[i]] = false;
    for (uint32_t slot = 0; slot < s->run->n_slots; slot++)
        if (d->decoding[slot]) d->tokens[at][n++] = (struct step_token){.slot = slot, .token = 7};
    n_tokens = n;
    for (uint32_t i = 0; i < p->n_runs; i++) {
        const struct plan_run *r = &p->runs[i];
        n_tokens += r->n_tokens;
        if (r->flags & PLAN_RUN_SAMPLE)
            d->tokens[at][n++] = (struct step_token){.slot = r->slot, .token = 7};
        d->decoding[r->slot] = r->flags & PLAN_RUN_STAY;
    }
    int64_t start_us = s->now_us + c->wire_us > d->free_us ? s->now_us + c->wire_us : d->free_us;
    double cost_us = c->base_us + c->token_us * (double)n_tokens + c->row_us * n;
    d->free_us = start_us + (int64_t)cost_us;
    d->flying[at] = (struct flying){d->free_us + c->wire_us,
                                    {.epoch = p->epoch,
                                     .step = p->step,
                                     .n_tokens = n,
                                     .tokens = d->tokens[at],
                                     .compute_us = (uint32_t)cost_us}};
    d->n++;
    return OK;
}

static enum err take_plan(void *ctx, uint32_t group, const void *bytes, size_t n)
{
    const struct end *end = ctx;
    struct stage *s = end->stage;
    struct step_plan plan;
    arena_reset(&s->arena);
    TRY(plan_decode(bytes, n, &s->arena, &plan));
    return compute(s, end->first + group, &plan);
}

/* Streams. */
static void note_gap(struct timed_run *t, int64_t gap_us, int64_t at_us)
{
    if (t->n_gaps == t->gaps_capacity) {
        uint32_t capacity = t->gaps_capacity ? 2 * t->gaps_capacity : 4096;
        if (mem_resize((void **)&t->gaps_us, capacity * sizeof *t->gaps_us) ||
            mem_resize((void **)&t->gap_at_us, capacity * sizeof *t->gap_at_us))
            return;
        t->gaps_capacity = capacity;
    }
    t->gap_at_us[t->n_gaps] = at_us;
    t->gaps_us[t->n_gaps++] = gap_us;
}

static void hear(struct sink *sink, const struct emission *e)
{
    struct stream *q = (struct stream *)sink;
    struct stage *s = q->stage;
    struct timed_request *r = &s->run->requests[q->index];
    if (e->n_tokens && r->first_us < 0)
        r->first_us = s->now_us;
    else if (e->n_tokens) {
        int64_t gap_us = s->now_us - r->last_us;
        note_gap(s->run, gap_us, s->now_us);
        if (gap_us > r->gap_max_us) r->gap_max_us = gap_us;
    }
    if (e->n_tokens) r->last_us = s->now_us;
    r->n_tokens += e->n_tokens;
    r->n_cached = e->n_cached;
    if (!e->last) return;
    s->n_alive--;
    s->router.n_alive[q->end]--;
}

static void forget(struct request *r)
{
    struct stream *q = (struct stream *)((char *)r - offsetof(struct stream, request));
    mem_free(r->tokens);
    mem_free(q);
}

static void own_content(uint32_t index, int32_t *tokens, uint32_t n)
{
    struct rand dice = rand_seeded(0x5eed0000u + index);
    for (uint32_t i = 0; i < n; i++)
        tokens[i] = (int32_t)rand_below(&dice, VOCABULARY);
}

static enum err arrive(struct stage *s)
{
    uint32_t index = s->n_arrived++;
    struct timed_request *r = &s->run->requests[index];
    struct stream *q;
    TRY(MEM_NEW(&q));
    *q = (struct stream){.sink = {.emit = hear}, .stage = s, .index = index};
    q->request = (struct request){.id = index + 1,
                                  .sink = &q->sink,
                                  .n_tokens = r->n_prompt,
                                  .max_tokens = r->n_output,
                                  .n_choices = 1,
                                  .tenant = r->tenant,
                                  .arrival_us = r->arrival_us,
                                  .destroy = forget};
    sampling_params_default(&q->request.sampling);
    TRY(MEM_NEW_ARRAY(r->n_prompt, &q->request.tokens));
    if (r->tokens)
        memcpy(q->request.tokens, r->tokens, r->n_prompt * sizeof(int32_t));
    else if (s->run->fill)
        s->run->fill(s->run->ctx, index, q->request.tokens);
    else
        own_content(index, q->request.tokens, r->n_prompt);
    r->first_us = r->last_us = -1;
    TRY(router_send(&s->router, q->request.tokens, r->n_prompt, &q->end));
    s->n_alive++;
    if (!engine_submit(s->ends[q->end].engine, &q->request, s->now_us)) return OK;
    s->n_alive--;
    s->router.n_alive[q->end]--;
    r->refused = true;
    forget(&q->request);
    return OK;
}

/* Time goes to the next arrival or answer. */
static enum err advance(struct stage *s, bool *out_done)
{
    struct timed_run *t = s->run;
    int64_t at_us = INT64_MAX;
    struct device *next = NULL;
    uint32_t group = 0;
    for (uint32_t i = 0; i < t->n_groups; i++) {
        struct device *d = &s->devices[i];
        if (!d->n || d->flying[d->first].at_us >= at_us) continue;
        at_us = d->flying[d->first].at_us;
        next = d;
        group = i;
    }
    *out_done = false;
    if (s->n_arrived < t->n && t->requests[s->n_arrived].arrival_us <= at_us) {
        if (t->requests[s->n_arrived].arrival_us > s->now_us)
            s->now_us = t->requests[s->n_arrived].arrival_us;
        TRY(arrive(s));
    } else if (next) {
        s->now_us = at_us;
        struct step_result result = next->flying[next->first].result;
        next->first = (next->first + 1) % FLIGHT_MAX;
        next->n--;
        const struct end *end = &s->ends[s->n_ends == 1 ? 0 : group];
        TRY(engine_result(end->engine, group - end->first, &result, s->now_us));
    } else
        *out_done = true;
    for (uint32_t i = 0; i < s->n_ends; i++)
        engine_step(s->ends[i].engine, s->now_us);
    return OK;
}

static enum err open_devices(struct stage *s)
{
    struct timed_run *t = s->run;
    struct group_info info = {.n_ranks = 1,
                              .block_size = t->block_size,
                              .n_blocks = t->n_blocks,
                              .n_slots_max = t->n_slots,
                              .step_tokens_max = t->n_step_tokens,
                              .step_rows_max = t->n_slots + 1,
                              .context_max = t->context_max,
                              .vocab_size = VOCABULARY,
                              .block_bytes = 1 << 20};
    for (uint32_t i = 0; i < t->n_groups; i++) {
        TRY(MEM_NEW_ARRAY(t->n_slots, &s->devices[i].decoding));
        for (int k = 0; k < FLIGHT_MAX; k++)
            TRY(MEM_NEW_ARRAY(t->n_slots, &s->devices[i].tokens[k]));
        info.epoch = i + 1;
        const struct end *end = &s->ends[s->n_ends == 1 ? 0 : i];
        engine_group_up(end->engine, i - end->first, &info);
    }
    return OK;
}

static enum err open_engines(struct stage *s)
{
    struct timed_run *t = s->run;
    s->n_ends = t->router == ROUTER_EXACT ? 1 : t->n_groups;
    struct engine_config config = {.n_groups = t->n_groups / s->n_ends,
                                   .prefix_cache = t->prefix_cache,
                                   .pipeline_depth = 2,
                                   .hash_salt = 1};
    for (uint32_t i = 0; i < s->n_ends; i++) {
        struct end *end = &s->ends[i];
        struct engine_hooks hooks = {.send_plan = take_plan, .ctx = end};
        *end = (struct end){.stage = s, .first = i};
        TRY(engine_create(&config, &hooks, &end->engine));
    }
    return OK;
}

static void add_stats(const struct stage *s)
{
    struct timed_run *t = s->run;
    struct engine_stats stats;
    for (uint32_t i = 0; i < s->n_ends; i++) {
        engine_stats(s->ends[i].engine, &stats);
        t->n_steps += stats.n_steps, t->n_preemptions += stats.n_preemptions;
        t->n_hit_tokens += stats.n_cached_tokens, t->n_prompt_tokens += stats.n_prompt_tokens;
        t->step_tokens += stats.step_tokens, t->step_budget += stats.step_budget;
    }
}

static enum err play(struct stage *s)
{
    struct timed_run *t = s->run;
    bool done = false;
    if (!t->n_groups || t->n_groups > GROUPS_MAX) FAIL(ERR_INVALID, "%u groups", t->n_groups);
    TRY(router_init(&s->router, t->router, t->n_groups));
    TRY(open_engines(s));
    TRY(open_devices(s));
    while (!done)
        TRY(advance(s, &done));
    if (s->n_alive) FAIL(ERR_INTERNAL, "%u requests never ended", s->n_alive);
    add_stats(s);
    t->end_us = s->now_us;
    return OK;
}

enum err timed_run(struct timed_run *t)
{
    struct stage *s;
    TRY(MEM_NEW(&s));
    s->run = t;
    arena_init(&s->arena, 1 << 20, 0);
    enum err e = play(s);
    for (uint32_t i = 0; i < s->n_ends; i++)
        engine_destroy(s->ends[i].engine);
    router_fini(&s->router);
    for (uint32_t i = 0; i < GROUPS_MAX; i++) {
        mem_free(s->devices[i].decoding);
        for (int k = 0; k < FLIGHT_MAX; k++)
            mem_free(s->devices[i].tokens[k]);
    }
    arena_fini(&s->arena);
    mem_free(s);
    return e;
}
