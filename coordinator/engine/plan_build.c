/* The arrays of the plan being built, sized once for the group: a step can neither overflow them
 * nor run out of memory. A slot closes, opens and runs at most once a plan. */
#include "base/mem.h"
#include "coordinator/engine/group.h"

enum { EXTENDS_PER_SLOT = 2 };

/* A run may ask for room for its drafts and for those after it. */
static uint32_t extends_per_slot(const struct group_info *i)
{
    return EXTENDS_PER_SLOT + (i->has_draft_model ? 2 * i->draft_tokens_max / i->block_size : 0);
}

enum err plan_init(struct group *g)
{
    struct step_plan *p = &g->plan;
    uint32_t n = g->n_slots;
    g->n_extends_max = extends_per_slot(&g->info) * n + g->info.draft_tokens_max;
    g->n_drafts_max = g->info.step_tokens_max;
    TRY(MEM_NEW_ARRAY(n, &p->closes));
    TRY(MEM_NEW_ARRAY(g->info.n_host_blocks, &p->saves));
    TRY(MEM_NEW_ARRAY(g->info.n_host_blocks, &p->loads));
    TRY(MEM_NEW_ARRAY(g->store.fetches.capacity, &p->fetches));
    TRY(MEM_NEW_ARRAY(g->store.spills.capacity, &p->spills));
    TRY(MEM_NEW_ARRAY(n, &p->copies));
    TRY(MEM_NEW_ARRAY(n, &p->opens));
    TRY(MEM_NEW_ARRAY(n, &p->forks));
    TRY(MEM_NEW_ARRAY(g->n_extends_max, &p->extends));
    TRY(MEM_NEW_ARRAY(n, &p->pauses));
    TRY(MEM_NEW_ARRAY(n, &p->runs));
    return MEM_NEW_ARRAY(g->n_drafts_max, &g->drafts);
}

void plan_fini(struct group *g)
{
    struct step_plan *p = &g->plan;
    mem_free(p->closes);
    mem_free(p->saves);
    mem_free(p->loads);
    mem_free(p->fetches);
    mem_free(p->spills);
    mem_free(p->copies);
    mem_free(p->opens);
    mem_free(p->forks);
    mem_free(p->extends);
    mem_free(p->pauses);
    mem_free(p->runs);
    mem_free(g->drafts);
}

void plan_clear(struct group *g)
{
    struct step_plan *p = &g->plan;
    p->n_closes = p->n_saves = p->n_loads = p->n_copies = p->n_opens = 0;
    p->n_forks = p->n_extends = p->n_pauses = p->n_runs = 0;
    p->n_fetches = p->n_spills = 0;
    g->n_drafts = 0;
}

void plan_add_close(struct group *g, uint32_t slot)
{
    ASSERT_CMP(g->plan.n_closes, <, g->n_slots);
    g->plan.closes[g->plan.n_closes++] = slot;
}

void plan_add_pause(struct group *g, uint32_t slot)
{
    ASSERT_CMP(g->plan.n_pauses, <, g->n_slots);
    g->plan.pauses[g->plan.n_pauses++] = slot;
}

void plan_add_extend(struct group *g, uint32_t slot, uint32_t block)
{
    ASSERT_CMP(g->plan.n_extends, <, g->n_extends_max);
    g->plan.extends[g->plan.n_extends++] = (struct plan_pair){slot, block};
    g->extend_at[slot] = g->plan.n_extends;
}

void plan_drop_extend(struct group *g, uint32_t slot)
{
    struct step_plan *p = &g->plan;
    uint32_t at = g->extend_at[slot] - 1;
    if (at >= p->n_extends || p->extends[at].from != slot) return;
    p->extends[at] = p->extends[--p->n_extends];
    g->extend_at[p->extends[at].from] = at + 1;
}

void plan_add_copy(struct group *g, uint32_t from, uint32_t to)
{
    ASSERT_CMP(g->plan.n_copies, <, g->n_slots);
    g->plan.copies[g->plan.n_copies++] = (struct plan_pair){from, to};
}

void plan_add_save(struct group *g, uint32_t block, uint32_t host)
{
    ASSERT_CMP(g->plan.n_saves, <, g->info.n_host_blocks);
    g->plan.saves[g->plan.n_saves++] = (struct plan_pair){block, host};
}

void plan_add_load(struct group *g, uint32_t host, uint32_t block)
{
    ASSERT_CMP(g->plan.n_loads, <, g->info.n_host_blocks);
    g->plan.loads[g->plan.n_loads++] = (struct plan_pair){host, block};
}

void plan_add_fetch(struct group *g, struct plan_pair pair)
{
    ASSERT_CMP(g->plan.n_fetches, <, g->store.fetches.capacity);
    g->plan.fetches[g->plan.n_fetches++] = pair;
}

void plan_add_spill(struct group *g, struct plan_pair pair)
{
    ASSERT_CMP(g->plan.n_spills, <, g->store.spills.capacity);
    g->plan.spills[g->plan.n_spills++] = pair;
}

void plan_add_open(struct group *g, const struct plan_open *open)
{
    ASSERT_CMP(g->plan.n_opens, <, g->n_slots);
    g->plan.opens[g->plan.n_opens++] = *open;
}

void plan_add_fork(struct group *g, const struct plan_fork *fork)
{
    ASSERT_CMP(g->plan.n_forks, <, g->n_slots);
    g->plan.forks[g->plan.n_forks++] = *fork;
}

struct plan_run *plan_add_run(struct group *g, uint32_t slot, uint32_t n_tokens, uint32_t flags)
{
    ASSERT_CMP(g->plan.n_runs, <, g->n_slots);
    struct plan_run *r = &g->plan.runs[g->plan.n_runs++];
    *r = (struct plan_run){.slot = slot, .n_tokens = n_tokens, .flags = flags};
    return r;
}
