/* Getting a slot and blocks, and losing them.
 *
 * A sequence is admitted with blocks for all its known tokens, so a prompt never stalls halfway;
 * what it generates takes blocks one by one. When those run out the newest sequence of the lowest
 * class gives its blocks up, unless it has not gained a token since it got them: then the others
 * rest until it has. So somebody always advances and nobody is sent back twice for nothing. */
#include "coordinator/engine/state.h"

#include <string.h>

enum { SPARE_SHARE = 16, RESERVED_TOKENS = 1 << 12 };

static uint32_t blocks_for(const struct group *g, uint32_t n_tokens)
{
    return n_tokens / g->info.block_size + (n_tokens % g->info.block_size != 0);
}

static void uncount(struct engine *e, struct sequence *s)
{
    if (!s->counted) return;
    s->counted = false;
    e->n_left_queue++;
    e->limits.n_queued--;
    e->limits.n_queued_tokens -= s->n_prompt;
}

void admission_uncount(struct engine *e, struct sequence *s)
{
    for (uint32_t i = 0; s->job->beam && i < s->job->n_sequences; i++) {
        struct sequence *t = s->job->sequences[i]; /* all beams run when one does */
        if (t != s) uncount(e, t);
    }
    uncount(e, s);
}

/* Whether its blocks can be found by others. */
static bool registers(const struct engine *e, const struct sequence *s)
{
    return e->config.prefix_cache && !s->job->private_blocks;
}

/* Blocks to leave to those who run: each will need one soon. */
static uint32_t blocks_reserved(const struct group *g)
{
    return g->running.n;
}

struct offer { /* where an admission's blocks come from */
    uint32_t n_table,
        n_shared;             /* blocks of the table; leading ones found or taken from a sibling */
    struct tiers_found found; /* of the n_shared ones, if no sibling gives them */
    uint32_t n_computed;
    struct sequence *sibling;
};

/* A choice of the same request on this group whose prompt is computed by the plans before this. */
static struct sequence *find_sibling(const struct group *g, const struct sequence *s)
{
    if (s->tokens.n != s->n_prompt || s->job->n_sequences == 1 || g->info.window) return NULL;
    if (!s->choice && s->job->request->sampling.n_prompt_logprobs >= 0)
        return NULL; /* it has to be scored, token by token */
    for (uint32_t i = 0; i < s->job->n_sequences; i++) {
        struct sequence *t = s->job->sequences[i];
        if (t && t != s && t->state == SEQUENCE_RUNNING && t->group == g->index &&
            sequence_planned(t, g->next_step) >= s->n_prompt && t->first_step < g->next_step)
            return t;
    }
    return NULL;
}

static struct offer make_offer(struct engine *e, struct group *g, struct sequence *s)
{
    uint32_t block_size = g->info.block_size, n_keys = (s->tokens.n - 1) / block_size;
    struct offer o = {.n_table = blocks_for(g, s->tokens.n)};
    if (s->has_host && s->group == g->index) {
        o.n_computed = s->n_host_computed;
        return o;
    }
    o.sibling = find_sibling(g, s);
    if (o.sibling) {
        o.n_shared = n_keys;
        o.n_computed = s->tokens.n - 1;
    } else if (!s->job->no_match &&
               !sequence_hash(&e->pool, s, block_size, e->config.hash_salt, n_keys)) {
        o.found.n_here =
            kv_blocks_match(&g->kv, s->keys.items, n_keys, &o.found.n_cached, sequence_blocks(s));
        if (g->store.host.n_total)
            tiers_look(e, g, s->keys.items, n_keys, sequence_blocks(s), &o.found);
        o.n_shared = o.found.n_here;
        o.n_computed = o.n_shared * block_size;
    }
    return o;
}

static void take_shared(struct engine *e, struct group *g, struct sequence *s,
                        const struct offer *o)
{
    uint32_t *table = sequence_blocks(s);
    if (!o->sibling) {
        for (uint32_t i = 0; i < o->n_shared; i++) /* found by the offer */
            if (table[i] != KV_NONE) kv_blocks_ref(&g->kv, table[i]);
        if (!o->found.n_loads) return;
        tiers_hold(g, s->keys.items, table, o->n_shared);
        tiers_load(e, g, s->keys.items, table, o->n_shared);
        return;
    }
    for (uint32_t i = 0; i < o->n_shared; i++) {
        table[i] = sequence_blocks(o->sibling)[i];
        kv_blocks_ref(&g->kv, table[i]);
    }
}

static void load_host(struct engine *e, struct group *g, struct sequence *s)
{
    const uint32_t *host = s->host.items;
    for (uint32_t i = 0; i < s->host.n; i++) {
        plan_add_load(g, host[i], sequence_blocks(s)[i]);
        kv_tier_give(&g->store.host, host[i], g->next_step);
    }
    g->store.n_loads += s->host.n;
    s->host.n = 0;
    s->has_host = false;
    e->n_swapped--;
    e->stats.n_swaps_in++;
}

static void take_table(struct engine *e, struct group *g, struct sequence *s, const struct offer *o)
{
    uint32_t *table = sequence_blocks(s);
    take_shared(e, g, s, o);
    for (uint32_t i = o->n_shared; i < o->n_table; i++) {
        table[i] = tiers_take_block(e, g);
        ASSERT(table[i] != KV_NONE);
    }
    s->blocks.n = o->n_table;
    s->n_planned = o->n_computed;
    s->n_registered = o->sibling ? 0 : o->n_shared;
    if (o->sibling && (s->tokens.n - 1) % g->info.block_size) {
        plan_add_copy(g, sequence_blocks(o->sibling)[o->n_shared], table[o->n_shared]);
        e->stats.n_forks++;
    }
    if (s->has_host) load_host(e, g, s);
}

static void open_slot(struct group *g, struct sequence *s)
{
    const struct request *r = s->job->request;
    struct plan_open open = {.slot = s->slot,
                             .n_prompt = s->n_prompt,
                             .n_computed = s->n_planned,
                             .n_tokens_max = s->n_end,
                             .n_tokens = s->tokens.n,
                             .n_blocks = s->blocks.n,
                             .tokens = sequence_tokens(s),
                             .blocks = (const int32_t *)sequence_blocks(s),
                             .sampling = r->sampling};
    open.sampling.seed = r->sampling.seed + (uint64_t)s->choice;
    if (s->choice)
        open.sampling.n_prompt_logprobs = -1; /* the first choice speaks for the prompt */
    if (s->job->buffered && open.sampling.n_logprobs < 0) open.sampling.n_logprobs = 0;
    if (s->job->beam) beam_sampling(s->job->beam, &open.sampling);
    plan_add_open(g, &open);
}

static void count_admission(struct engine *e, struct group *g, struct sequence *s)
{
    if (!s->job->admitted) s->job->queued_us = e->now_us - s->job->request->arrival_us;
    s->job->admitted = true;
    e->stats.prefix_queries += s->job->no_match ? 0 : s->tokens.n;
    e->stats.prefix_hits += s->n_planned;
    if (s->resumed) {
        e->stats.n_resumed++;
        e->stats.n_recomputed_tokens += s->tokens.n - s->n_planned;
    } else {
        s->n_cached = s->n_planned;
        e->stats.n_cached_tokens += s->n_planned;
        e->stats.n_prompt_tokens += s->n_prompt;
        fair_charge(s->lane, (uint64_t)FAIR_INPUT_COST * (s->n_prompt - s->n_planned));
    }
    g->n_pending_tokens += s->tokens.n - s->n_planned;
    s->lane->tenant->n_running++;
}

static bool goes_before(const struct sequence *s, const struct sequence *t)
{
    if (s->lane->priority != t->lane->priority) return s->lane->priority < t->lane->priority;
    return s->lane->tenant != t->lane->tenant && s->lane->tenant->served < t->lane->tenant->served;
}

/* One tenant that holds most of a cluster which others use too leaves a little of each group free:
 * whoever comes next finds a slot and blocks at once. */
bool admission_hogs(const struct engine *e, const struct group *g, const struct sequence *s)
{
    if (e->fair.n_tenants < 2 ||
        2 * (uint64_t)s->lane->tenant->n_running < (uint64_t)g->n_slots * e->n_up)
        return false;
    uint32_t n_need = blocks_for(g, s->tokens.n) + blocks_reserved(g) + g->kv.n_total / SPARE_SHARE;
    return g->n_free_slots <= g->n_slots / SPARE_SHARE || n_need > kv_blocks_available(&g->kv);
}

/* Memory for what it grows to, so that no step of its decoding asks for any. Its table must have
 * it; its tokens grow on if there is less, or if somebody writes novels. */
static bool reserve_memory(struct engine *e, const struct group *g, struct sequence *s,
                           uint32_t n_end)
{
    if (strip_reserve(&e->pool, &s->blocks, blocks_for(g, n_end) + 1, sizeof(uint32_t)))
        return false;
    uint32_t n = n_end < s->tokens.n ? s->tokens.n : n_end;
    if (n > s->tokens.n + RESERVED_TOKENS) n = s->tokens.n + RESERVED_TOKENS;
    (void)strip_reserve(&e->pool, &s->tokens, n, sizeof(int32_t));
    return true;
}

bool admission_try(struct engine *e, struct group *g, struct sequence *s)
{
    uint64_t n_most = (uint64_t)s->n_prompt + s->job->request->max_tokens;
    uint32_t capacity = group_tokens_capacity(g, e->config.context_max);
    uint32_t n_end = n_most < capacity ? (uint32_t)n_most : capacity;
    if (!reserve_memory(e, g, s, n_end)) return false;
    struct offer o = make_offer(e, g, s);
    uint64_t n_need = o.n_table - o.n_shared + o.found.n_loads + o.found.n_cached +
                      (g->running.n ? blocks_reserved(g) : 0);
    if (!g->n_free_slots || n_need > kv_blocks_available(&g->kv)) return false;
    bool may_wait = !s->has_fetched && !s->has_host && !s->job->beam;
    if (o.found.n_below && may_wait && tiers_fetch(e, g, s, &o.found)) return true;
    s->n_end = n_end;
    s->elder |= fair_take(&e->fair, s, e->now_us);
    place_forget(e, s);
    admission_uncount(e, s);
    if (s->has_host && s->group != g->index) admission_drop_host(e, s);
    bool seated = group_seat(g, s);
    ASSERT(seated);
    take_table(e, g, s, &o);
    s->n_score_next = 1;
    s->has_fetched = false;
    count_admission(e, g, s);
    open_slot(g, s);
    struct sequence *before = g->prefilling.last; /* the less served first */
    while (before && goes_before(s, before))
        before = before->links[LINK_WORK].previous;
    sequence_list_before(&g->prefilling, LINK_WORK,
                         before ? before->links[LINK_WORK].next : g->prefilling.first, s);
    if (s->job->beam) beam_admitted(e, s);
    return true;
}

bool admission_extend(struct engine *e, struct group *g, struct sequence *s, uint32_t n_tokens)
{
    uint32_t n_want = blocks_for(g, n_tokens), n_have = s->blocks.n;
    if (n_want <= n_have) return true;
    if (n_want - n_have > kv_blocks_available(&g->kv) ||
        n_want - n_have > g->n_extends_max - g->plan.n_extends)
        return false;
    ASSERT_CMP(n_want, <=, s->blocks.capacity);
    for (uint32_t i = n_have; i < n_want; i++) {
        uint32_t block = tiers_take_block(e, g);
        sequence_blocks(s)[i] = block;
        plan_add_extend(g, s->slot, block);
    }
    s->blocks.n = n_want;
    return true;
}

bool admission_extend_decoding(struct engine *e, struct group *g, struct sequence *s)
{
    if (!admission_extend(e, g, s, s->blocks.n * g->info.block_size + 1)) return false;
    g->due[s->slot].room_step += g->info.block_size;
    return true;
}

void admission_prefetch_register(struct engine *e, struct group *g, struct sequence *s)
{
    struct hash128 key;
    uint32_t n_full = (s->tokens.n - 1) / g->info.block_size;
    if (n_full <= s->n_registered || !registers(e, s) ||
        sequence_key(&e->pool, s, g->info.block_size, e->config.hash_salt, n_full - 1, &key))
        return;
    kv_blocks_prefetch(&g->kv, key);
    __builtin_prefetch(&g->kv.blocks[sequence_blocks(s)[n_full - 1]], 1);
}

void admission_register(struct engine *e, struct group *g, struct sequence *s, uint32_t n_computed)
{
    uint32_t n_full = n_computed / g->info.block_size;
    if (n_full <= s->n_registered || !registers(e, s)) return;
    uint32_t first = s->n_registered > s->n_window_freed ? s->n_registered : s->n_window_freed;
    for (uint32_t i = first; i < n_full; i++) {
        struct hash128 key;
        if (sequence_key(&e->pool, s, g->info.block_size, e->config.hash_salt, i, &key)) return;
        kv_blocks_register(&g->kv, sequence_blocks(s)[i], key);
        s->n_registered = i + 1;
    }
    s->n_registered = n_full;
}

void admission_slide(struct group *g, struct sequence *s, uint32_t n_computed)
{
    uint32_t window = g->info.window, block_size = g->info.block_size;
    if (!window || n_computed < window || s->job->beam) return;
    /* The next query stands at n_computed and sees keys from n_computed - window + 1 on. */
    uint32_t n_gone = (n_computed - window + 1) / block_size;
    for (; s->n_window_freed < n_gone; s->n_window_freed++)
        kv_blocks_unref(&g->kv, sequence_blocks(s)[s->n_window_freed], group_last_step(g));
}

/* Whether moving its KV to the host and back is cheaper than computing it again. */
static bool swap_pays(const struct engine *e, const struct group *g, const struct sequence *s,
                      uint32_t n_computed)
{
    uint32_t n_blocks = blocks_for(g, n_computed);
    if (!n_blocks || !g->store.host.n_total || s->n_window_freed || s->job->beam) return false;
    return tiers_swap_pays(e, g, n_blocks, n_computed);
}

static void save_to_host(struct engine *e, struct group *g, struct sequence *s, uint32_t n_computed)
{
    uint32_t n_blocks = blocks_for(g, n_computed);
    if (strip_reserve(&e->pool, &s->host, n_blocks, sizeof(uint32_t))) return;
    uint32_t *host = s->host.items;
    if (!kv_store_take(&g->store, n_blocks, g->acked_step, host)) return;
    for (uint32_t i = 0; i < n_blocks; i++)
        plan_add_save(g, sequence_blocks(s)[i], host[i]);
    g->store.n_saves += n_blocks;
    s->host.n = n_blocks;
    s->n_host_computed = n_computed;
    s->has_host = true;
    e->n_swapped++;
    e->stats.n_swaps_out++;
}

void admission_drop_host(struct engine *e, struct sequence *s)
{
    if (!s->has_host) return;
    struct group *g = e->groups[s->group];
    const uint32_t *host = s->host.items;
    for (uint32_t i = 0; i < s->host.n; i++)
        kv_tier_give(&g->store.host, host[i], group_last_step(g));
    s->host.n = 0;
    s->has_host = false;
    e->n_swapped--;
}

void admission_requeue(struct engine *e, struct group *g, struct sequence *s)
{
    sequence_unlink(s, LINK_WORK);
    group_forget(g, s);
    s->state = SEQUENCE_WAITING;
    s->resumed = true;
    if (s->job->beam) {
        beam_wait(e, s);
        return;
    }
    s->synced = false;
    if (s->elder)
        fair_wait_urgent(&e->fair, s, e->now_us); /* it waited long enough once */
    else
        fair_wait(&e->fair, s, e->now_us);
}

void admission_preempt(struct engine *e, struct group *g, struct sequence *s)
{
    ASSERT(g->building);
    uint32_t n_computed = sequence_planned(s, g->next_step);
    if (swap_pays(e, g, s, n_computed)) save_to_host(e, g, s, n_computed);
    admission_unseat(e, g, s);
    e->stats.n_preemptions++;
    s->state = SEQUENCE_DRAINING;
    if (s->last_step <= g->acked_step)
        admission_requeue(e, g, s);
    else
        sequence_list_append(&g->draining, LINK_WORK, s);
}

static void count_leaving(struct group *g, struct sequence *s)
{
    if (s->lists[LINK_WORK] == &g->prefilling) g->n_pending_tokens -= s->tokens.n - s->n_planned;
    if (s->job->beam) beam_unseated(s);
    s->lane->tenant->n_running--;
}

void admission_unseat(struct engine *e, struct group *g, struct sequence *s)
{
    (void)e;
    count_leaving(g, s);
    group_unseat(g, s);
}

void admission_unseat_late(struct engine *e, struct group *g, struct sequence *s)
{
    (void)e;
    count_leaving(g, s);
    group_unseat_late(g, s);
}

/* Who starved once keeps its place: else every request of a higher class would take it again. */
static int32_t class_of(const struct sequence *s)
{
    return s->elder ? INT32_MIN : s->lane->priority;
}

static struct sequence *newest_of_lowest_class(const struct group *g)
{
    struct sequence *victim = NULL;
    for (struct sequence *s = g->running.first; s; s = s->links[LINK_PLACE].next)
        if (!victim || class_of(s) > class_of(victim) ||
            (class_of(s) == class_of(victim) && s->order > victim->order))
            victim = s;
    return victim;
}

/* Blocks that come back when it leaves. */
static uint32_t blocks_alone(const struct group *g, const struct sequence *s)
{
    uint32_t n = 0;
    for (uint32_t i = s->n_window_freed; i < s->blocks.n; i++)
        n += g->kv.blocks[sequence_blocks(s)[i]].n_refs == 1;
    return n;
}

static uint64_t blocks_demanded(const struct group *g)
{
    uint64_t n = g->stalled.n, n_early = g->plan.n_extends; /* of this step's bucket */
    for (uint32_t i = 0; i <= g->n_depth && i < g->extend.n_buckets; i++)
        n += g->extend.counts[(g->next_step + i) % g->extend.n_buckets];
    return n > n_early ? n - n_early : 0;
}

/* A request of a higher class waits and lacks a slot or blocks that a lower one has. */
static bool class_inversion(struct engine *e, struct group *g)
{
    struct sequence *next = fair_next(&e->fair, e->now_us);
    struct sequence *victim = next && place_is_for(g, next) ? newest_of_lowest_class(g) : NULL;
    if (!victim || !victim->may_preempt || victim->job->beam) return false;
    if (class_of(victim) <= next->lane->priority) return false;
    if (g->draining.n || g->kv.limbo.n) return false; /* room is on its way */
    return !g->n_free_slots ||
           blocks_for(g, next->tokens.n) + blocks_reserved(g) > kv_blocks_available(&g->kv);
}

/* A tenant with less than its share of the slots waits for one, while another has more than its
 * share: the newest of that one. */
static struct sequence *share_inversion(struct engine *e, struct group *g)
{
    struct sequence *next = fair_next(&e->fair, e->now_us), *victim = NULL;
    uint64_t n_share = (uint64_t)g->n_slots * e->n_up / (e->fair.n_active ? e->fair.n_active : 1);
    if (!next || !place_is_for(g, next) || g->n_free_slots || g->draining.n || g->slot_limbo.n ||
        e->fair.n_active < 2)
        return NULL;
    if (next->lane->tenant->n_running >= n_share) return NULL;
    for (struct sequence *s = g->running.last; s; s = s->links[LINK_PLACE].previous)
        if (s->may_preempt && !s->job->beam && s->lane->tenant->n_running > n_share + 1 &&
            class_of(s) >= next->lane->priority && (!victim || s->order > victim->order))
            victim = s;
    return victim;
}

bool admission_is_stuck(const struct group *g)
{
    return g->running.n > 1 && g->stalled.n == g->running.n && !group_in_flight(g) &&
           !g->kv.limbo.n;
}

/* The newest of the lowest class leaves, but not again before it has made progress; unless nobody
 * could move at all: then its leaving is the progress of those who stay. */
void admission_make_room(struct engine *e, struct group *g)
{
    struct sequence *victim;
    uint64_t n_demand = blocks_demanded(g);
    uint64_t n_supply = (uint64_t)kv_blocks_available(&g->kv) + g->kv.limbo.n;
    while (n_demand > n_supply && g->running.n > 1) {
        victim = newest_of_lowest_class(g);
        if (!victim->may_preempt && !admission_is_stuck(g)) break;
        n_supply += blocks_alone(g, victim);
        if (victim->job->beam)
            beam_preempt(e, g, victim->job);
        else
            admission_preempt(e, g, victim);
        n_demand = blocks_demanded(g);
    }
    if (!group_in_flight(g) && g->running.n && e->fair.by_age.n) beam_unlock(e, g);
    if (class_inversion(e, g))
        admission_preempt(e, g, newest_of_lowest_class(g));
    else if ((victim = share_inversion(e, g)))
        admission_preempt(e, g, victim);
}
