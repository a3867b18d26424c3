/* Which group takes a sequence: the one for which it costs least, in tokens.
 *
 * A group asks for work when it has room; it leaves a sequence to another group that holds more of
 * its prefix, unless the load there outweighs that. What each group holds is known exactly, since
 * one engine owns all block managers. */
#include "coordinator/engine/state.h"

enum {
    RUNNING_COST = 16,  /* a running sequence slows a prompt down like so many tokens */
    BUSY_STEPS = 4,     /* a group that cannot admit now is so many steps away */
    MARGIN_TOKENS = 64, /* less is not worth waiting for */
    SKIPS_MAX = 64      /* nobody is left to others forever */
};

static uint64_t cost(struct engine *e, struct group *g, struct sequence *s)
{
    uint32_t block_size = g->info.block_size, n_found = 0;
    uint32_t n_keys = (s->tokens.n - 1) / block_size;
    if (s->has_host && s->group == g->index)
        n_found = s->n_host_computed;
    else if (!s->job->no_match &&
             !sequence_hash(&e->pool, s, block_size, e->config.hash_salt, n_keys)) {
        struct tiers_found f = {0};
        f.n_here = kv_blocks_match(&g->kv, s->keys.items, n_keys, &f.n_cached, NULL);
        if (g->store.host.n_total) tiers_look(e, g, s->keys.items, n_keys, NULL, &f);
        n_found = block_size * (f.n_here + f.n_below);
    }
    uint64_t cost =
        s->tokens.n - n_found + g->n_pending_tokens + (uint64_t)RUNNING_COST * g->running.n;
    uint64_t n_new = s->tokens.n - n_found, n_free = (uint64_t)g->kv.n_free * block_size;
    if (n_new > n_free) cost += n_new - n_free; /* other prefixes are forgotten for it */
    bool busy = !g->n_free_slots ||
                (uint64_t)kv_blocks_available(&g->kv) * block_size < s->tokens.n - n_found;
    return busy ? cost + (uint64_t)BUSY_STEPS * g->n_budget : cost;
}

bool place_can_hold(const struct engine *e, const struct group *g, const struct sequence *s)
{
    const struct job *job = s->job;
    uint32_t capacity = group_tokens_capacity(g, e->config.context_max);
    if (job->beam && (2 * job->n_sequences > g->n_slots ||
                      limits_beam_blocks(job->request, g->info.block_size, e->config.prefix_cache) >
                          g->info.n_blocks))
        return false;
    return job->request->max_tokens ? s->tokens.n < capacity : s->tokens.n <= capacity;
}

/* Beams of one search stay on one group. */
static bool has_kin_elsewhere(const struct engine *e, const struct group *g,
                              const struct sequence *s)
{
    for (uint32_t i = 0; s->job->beam && i < s->job->n_sequences; i++) {
        const struct sequence *t = s->job->sequences[i];
        if (t->state == SEQUENCE_RUNNING && t->group != g->index && e->groups[t->group]->up)
            return true;
    }
    return false;
}

static bool fits(const struct engine *e, const struct group *g, const struct sequence *s)
{
    return place_can_hold(e, g, s) && !has_kin_elsewhere(e, g, s);
}

bool place_accepts(struct engine *e, struct group *g, struct sequence *s)
{
    if (!fits(e, g, s)) return false;
    if (e->n_up == 1 || s->n_skips >= SKIPS_MAX) return true;
    uint64_t here = cost(e, g, s);
    for (uint32_t i = 0; i < e->n_groups; i++) {
        struct group *other = e->groups[i];
        if (!other || other == g || !other->up || other->broken || !fits(e, other, s)) continue;
        if (cost(e, other, s) + MARGIN_TOKENS >= here) continue;
        s->n_skips++;
        return false;
    }
    return true;
}
