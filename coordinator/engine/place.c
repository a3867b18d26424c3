/* Which group takes a sequence: the one for which it costs least, in tokens: what it must compute
 * there, and what stands before it. What each group holds is known exactly, since one engine owns
 * all block managers.
 *
 * It is decided when its turn comes first, and counts as that group's load from then on; a group
 * that has nothing better to do takes it over when it costs clearly less there by then.*/
#include "coordinator/engine/state.h"

enum {
    RUNNING_COST = 16,  /* a running sequence slows a prompt down like so many tokens */
    BUSY_STEPS = 4,     /* a group that cannot admit now is so many steps away */
    MARGIN_TOKENS = 64, /* less is not worth moving for */
    MOVES_MAX = 4       /* looked at closely in one plan */
};

/* Tokens that stand before it there. */
static uint64_t load(const struct group *g, const struct sequence *s)
{
    uint64_t n_own = s->placed == g->index + 1 ? s->n_placed : 0;
    return g->n_pending_tokens + g->n_placed_tokens - n_own + (uint64_t)RUNNING_COST * g->running.n;
}

static uint32_t tokens_found(struct engine *e, struct group *g, struct sequence *s)
{
    uint32_t block_size = g->info.block_size, n_keys = (s->tokens.n - 1) / block_size;
    struct tiers_found f = {0};
    if (s->has_host && s->group == g->index) return s->n_host_computed;
    if (s->job->no_match || sequence_hash(&e->pool, s, block_size, e->config.hash_salt, n_keys))
        return 0;
    f.n_here = kv_blocks_match(&g->kv, s->keys.items, n_keys, &f.n_cached, NULL);
    if (g->store.host.n_total) tiers_look(e, g, s->keys.items, n_keys, NULL, &f);
    return block_size * (f.n_here + f.n_below);
}

static uint64_t cost(const struct group *g, const struct sequence *s, uint32_t n_found)
{
    uint64_t n_new = s->tokens.n - n_found;
    uint64_t n_free = (uint64_t)g->kv.n_free * g->info.block_size;
    uint64_t cost = n_new + load(g, s);
    if (n_new > n_free) cost += n_new - n_free; /* other prefixes are forgotten for it */
    bool busy =
        !g->n_free_slots || (uint64_t)kv_blocks_available(&g->kv) * g->info.block_size < n_new;
    return busy ? cost + (uint64_t)BUSY_STEPS * g->n_budget : cost;
}

void place_forget(struct engine *e, struct sequence *s)
{
    if (s->placed) e->groups[s->placed - 1]->n_placed_tokens -= s->n_placed;
    s->placed = 0;
}

static void put(struct engine *e, struct group *g, struct sequence *s, uint32_t n_found)
{
    place_forget(e, s);
    s->placed = g->index + 1;
    s->n_placed = s->tokens.n - n_found;
    g->n_placed_tokens += s->n_placed;
}

bool place_is_for(const struct group *g, const struct sequence *s)
{
    return !s->placed || s->placed == g->index + 1;
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

static bool is_open(const struct engine *e, const struct group *g, const struct sequence *s)
{
    return g && g->up && !g->broken && fits(e, g, s);
}

/* The cheapest group of all. */
static void decide(struct engine *e, struct sequence *s)
{
    struct group *best = NULL;
    uint64_t best_cost = 0;
    uint32_t best_found = 0;
    for (uint32_t i = 0; i < e->n_groups; i++) {
        struct group *g = e->groups[i];
        if (!is_open(e, g, s)) continue;
        uint32_t n_found = tokens_found(e, g, s);
        uint64_t here = cost(g, s, n_found);
        if (best && here >= best_cost) continue;
        best = g, best_cost = here, best_found = n_found;
    }
    if (best) put(e, best, s, best_found);
}

/* Whether g, which looks for work, should have what was given to another. */
static bool take_over(struct engine *e, struct group *g, struct sequence *s)
{
    struct group *other = e->groups[s->placed - 1];
    if (load(g, s) + MARGIN_TOKENS >= load(other, s) + BUSY_STEPS * (uint64_t)g->n_budget ||
        g->n_moves_tried >= MOVES_MAX)
        return false; /* far from it, or enough was looked at */
    g->n_moves_tried++;
    uint32_t n_found = tokens_found(e, g, s);
    if (cost(g, s, n_found) + MARGIN_TOKENS >= cost(other, s, tokens_found(e, other, s)))
        return false;
    put(e, g, s, n_found);
    return true;
}

bool place_accepts(struct engine *e, struct group *g, struct sequence *s)
{
    if (!fits(e, g, s)) return false;
    if (e->n_up == 1) return true;
    if (s->placed && !is_open(e, e->groups[s->placed - 1], s)) place_forget(e, s);
    if (!s->placed) decide(e, s);
    return s->placed == g->index + 1 || (s->placed && take_over(e, g, s));
}
