/* When blocks move between the tiers.
 *
 * A prefix that the device forgets goes to host memory, and from there, when that fills up, to
 * disk: the oldest first, before its place is needed, so nobody ever waits for a write. It comes
 * back when a prompt asks for it: from the host within the plan that admits the sequence; from the
 * disk by transfers for which the sequence waits outside its lane, so nobody waits behind it.
 * Whatever does not come, or not in time, is computed.
 *
 * Whether a move is worth it is a matter of measured costs: what a block takes to copy, as the
 * ranks said when they joined and say with their transfers, against what its tokens take to
 * compute. */
#include "coordinator/engine/state.h"

enum { FETCH_ROUND_US = 500, FETCH_PATIENCE = 8 };
static const int64_t FETCH_WAIT_US_MIN = 200000;

/* A token's cost before any was measured: everything is worth moving. */
static uint64_t compute_ns(const struct engine *e, const struct group *g, uint64_t n_tokens)
{
    return e->config.always_offload || !g->token_ns ? UINT64_MAX : n_tokens * g->token_ns;
}

bool tiers_swap_pays(const struct engine *e, const struct group *g, uint32_t n_blocks,
                     uint32_t n_tokens)
{
    return (uint64_t)n_blocks * ((uint64_t)g->info.save_ns + g->info.load_ns) <
           compute_ns(e, g, n_tokens);
}

static bool load_pays(const struct engine *e, const struct group *g)
{
    return g->info.load_ns < compute_ns(e, g, g->info.block_size);
}

static bool fetch_pays(const struct engine *e, const struct group *g, uint32_t n_blocks)
{
    uint64_t n_ahead = kv_queue_waiting(&g->store.fetches);
    return (n_ahead + n_blocks) * g->fetch_ns + (uint64_t)FETCH_ROUND_US * 1000 +
               (uint64_t)n_blocks * g->info.load_ns <
           compute_ns(e, g, (uint64_t)n_blocks * g->info.block_size);
}

uint32_t tiers_take_block(struct engine *e, struct group *g)
{
    uint64_t n_evicted = g->kv.n_evicted;
    uint32_t block = kv_blocks_take(&g->kv);
    if (g->kv.n_evicted == n_evicted || !g->store.host.n_total ||
        !tiers_swap_pays(e, g, 1, g->info.block_size))
        return block;
    uint32_t host = kv_store_save(&g->store, g->kv.blocks[block].key, g->next_step, g->acked_step);
    if (host != TIER_NONE) plan_add_save(g, block, host);
    return block;
}

void tiers_look(const struct engine *e, const struct group *g, const struct hash128 *keys,
                uint32_t n, uint32_t *blocks, struct tiers_found *io)
{
    uint32_t i = io->n_here, n_below = 0;
    bool loads = load_pays(e, g), whole = true;
    for (; i < n; i++) {
        uint32_t host, block = kv_blocks_find(&g->kv, keys[i]);
        enum store_place place = STORE_HOST;
        if (block == KV_NONE) place = kv_store_find(&g->store, keys[i], &host);
        if (place == STORE_NOWHERE || (block == KV_NONE && !loads)) break;
        whole &= place == STORE_HOST;
        if (!whole) {
            n_below++;
            io->n_coming += place == STORE_COMING;
            continue;
        }
        if (blocks) blocks[i] = block;
        io->n_here++;
        io->n_loads += block == KV_NONE;
        if (block != KV_NONE) io->n_cached += g->kv.blocks[block].cached;
    }
    io->n_below = n_below && fetch_pays(e, g, n_below) ? n_below : 0;
}

/* Host copies that this plan reads must outlive the saves that this plan makes. */
void tiers_hold(struct group *g, const struct hash128 *keys, const uint32_t *blocks, uint32_t n)
{
    for (uint32_t i = n; i-- > 0;) /* the last one first: a prefix outlives what follows it */
        if (blocks[i] == KV_NONE)
            kv_tier_touch(&g->store.host, kv_tier_find(&g->store.host, keys[i]), g->next_step);
}

void tiers_load(struct engine *e, struct group *g, const struct hash128 *keys, uint32_t *blocks,
                uint32_t n)
{
    for (uint32_t i = 0; i < n; i++) {
        if (blocks[i] != KV_NONE) continue;
        uint32_t host = kv_tier_find(&g->store.host, keys[i]);
        struct tier_block *from = &g->store.host.blocks[host];
        blocks[i] = tiers_take_block(e, g);
        ASSERT(blocks[i] != KV_NONE && from->state != TIER_RECEIVING);
        plan_add_load(g, host, blocks[i]);
        kv_blocks_register(&g->kv, blocks[i], keys[i]);
        g->store.n_loads++;
        if (from->risen)
            e->stats.n_hit_tokens_disk += g->info.block_size;
        else
            e->stats.n_hit_tokens_host += g->info.block_size;
        from->risen = false;
    }
}

bool tiers_fetch(struct engine *e, struct group *g, struct sequence *s, const struct tiers_found *f)
{
    const struct hash128 *keys = s->keys.items;
    uint64_t n_coming = kv_queue_waiting(&g->store.fetches);
    for (uint32_t i = f->n_here + f->n_below; i-- > 0;) { /* it must not push itself out */
        uint32_t host = kv_tier_find(&g->store.host, keys[i]);
        if (host != TIER_NONE) kv_tier_touch(&g->store.host, host, g->next_step);
    }
    for (uint32_t i = f->n_here; i < f->n_here + f->n_below; i++) {
        struct plan_pair pair;
        uint32_t host;
        if (kv_blocks_find(&g->kv, keys[i]) != KV_NONE ||
            kv_store_find(&g->store, keys[i], &host) != STORE_DISK)
            continue;
        if (!kv_store_fetch(&g->store, keys[i], g->acked_step, &pair)) break;
        plan_add_fetch(g, pair);
    }
    uint64_t n = kv_queue_waiting(&g->store.fetches);
    if (n == n_coming && !f->n_coming) return false; /* no room for any */
    int64_t wait_us = FETCH_PATIENCE * (int64_t)(n * g->fetch_ns / 1000);
    s->has_fetched = true;
    s->fetch_number = g->store.fetches.n_started;
    s->fetch_until_us = e->now_us + (wait_us > FETCH_WAIT_US_MIN ? wait_us : FETCH_WAIT_US_MIN);
    s->group = g->index;
    if (!g->fetch_alarm_us || s->fetch_until_us < g->fetch_alarm_us)
        g->fetch_alarm_us = s->fetch_until_us;
    fair_unwait(&e->fair, s);
    s->state = SEQUENCE_FETCHING;
    sequence_list_append(&g->fetching, LINK_WORK, s);
    return true;
}

static void wait_again(struct engine *e, struct sequence *s)
{
    sequence_unlink(s, LINK_WORK);
    s->state = SEQUENCE_WAITING;
    fair_wait(&e->fair, s, e->now_us);
}

void tiers_release(struct engine *e, struct group *g, bool all)
{
    int64_t alarm_us = 0;
    for (struct sequence *s = g->fetching.first, *next; s; s = next) {
        next = s->links[LINK_WORK].next;
        if (all || s->fetch_number <= g->store.fetches.n_done || s->fetch_until_us <= e->now_us)
            wait_again(e, s);
        else if (!alarm_us || s->fetch_until_us < alarm_us)
            alarm_us = s->fetch_until_us;
    }
    g->fetch_alarm_us = alarm_us;
}

void tiers_spill(struct group *g)
{
    struct plan_pair pair;
    if (g->store.spill_pause) {
        g->store.spill_pause--;
        return;
    }
    while (kv_store_spill(&g->store, g->acked_step, &pair))
        plan_add_spill(g, pair);
}

enum err engine_moved(struct engine *e, uint32_t group, uint32_t rank, const struct moved *moved,
                      int64_t now_us)
{
    struct group *g = group < e->n_groups ? e->groups[group] : NULL;
    e->now_us = now_us;
    if (!g || !g->up || g->broken || moved->epoch != g->info.epoch) return OK; /* late */
    enum err err = kv_store_moved(&g->store, rank, moved);
    if (err) {
        g->broken = true; /* it gets no plan any more; the caller drops it */
        return err;
    }
    if (moved->fetch_ns && (rank == 0 || moved->fetch_ns > g->fetch_ns))
        g->fetch_ns = moved->fetch_ns;
    tiers_release(e, g, false);
    return OK;
}
