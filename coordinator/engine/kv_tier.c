/* One tier of KV blocks: an array, an index of keys, two lists by age. */
#include "coordinator/engine/kv_tier.h"
#include "base/mem.h"

static enum err init_arrays(struct kv_tier *t)
{
    uint64_t size = 16;
    while (size < 2 * (uint64_t)t->n_total)
        size *= 2;
    t->index_mask = (uint32_t)(size - 1);
    TRY(MEM_NEW_ARRAY(t->n_total, &t->blocks));
    TRY(MEM_NEW_ARRAY(t->n_total, &t->free));
    TRY(MEM_NEW_ARRAY(size, &t->index));
    TRY(MEM_NEW_ARRAY(t->n_total, &t->limbo.ids));
    return MEM_NEW_ARRAY(t->n_total, &t->limbo.steps);
}

enum err kv_tier_init(struct kv_tier *t, uint32_t n_blocks)
{
    *t = (struct kv_tier){.n_total = n_blocks};
    if (n_blocks >= UINT32_MAX / 4) FAIL(ERR_UNSUPPORTED, "%u KV blocks in one tier", n_blocks);
    enum err e = init_arrays(t);
    if (e) {
        kv_tier_fini(t);
        return e;
    }
    for (int i = 0; i < 2; i++)
        t->lists[i].oldest = t->lists[i].newest = TIER_NONE;
    for (uint32_t i = 0; i < n_blocks; i++)
        t->free[i] = n_blocks - 1 - i;
    t->n_free = n_blocks;
    return OK;
}

void kv_tier_fini(struct kv_tier *t)
{
    mem_free(t->blocks);
    mem_free(t->free);
    mem_free(t->index);
    mem_free(t->limbo.ids);
    mem_free(t->limbo.steps);
    *t = (struct kv_tier){0};
}

/* Lists. */
static void list_add(struct kv_tier *t, uint32_t id)
{
    struct tier_block *b = &t->blocks[id];
    struct tier_list *l = &t->lists[b->below];
    b->previous = l->newest;
    b->next = TIER_NONE;
    if (b->previous == TIER_NONE)
        l->oldest = id;
    else
        t->blocks[b->previous].next = id;
    l->newest = id;
    l->n++;
}

static void list_remove(struct kv_tier *t, uint32_t id)
{
    struct tier_block *b = &t->blocks[id];
    struct tier_list *l = &t->lists[b->below];
    if (b->previous == TIER_NONE)
        l->oldest = b->next;
    else
        t->blocks[b->previous].next = b->next;
    if (b->next == TIER_NONE)
        l->newest = b->previous;
    else
        t->blocks[b->next].previous = b->previous;
    l->n--;
}

/* The index: linear probing. */
static uint32_t home_of(const struct kv_tier *t, struct hash128 key)
{
    return (uint32_t)(key.low ^ key.low >> 32) & t->index_mask;
}

uint32_t kv_tier_find(const struct kv_tier *t, struct hash128 key)
{
    if (!t->n_total) return TIER_NONE;
    for (uint32_t i = home_of(t, key); t->index[i]; i = (i + 1) & t->index_mask)
        if (hash_equal(t->blocks[t->index[i] - 1].key, key)) return t->index[i] - 1;
    return TIER_NONE;
}

static void index_remove(struct kv_tier *t, uint32_t block)
{
    uint32_t mask = t->index_mask, i = home_of(t, t->blocks[block].key);
    while (t->index[i] != block + 1) {
        ASSERT(t->index[i]);
        i = (i + 1) & mask;
    }
    for (uint32_t k = (i + 1) & mask; t->index[k]; k = (k + 1) & mask) {
        uint32_t home = home_of(t, t->blocks[t->index[k] - 1].key);
        if (((k - home) & mask) < ((k - i) & mask)) continue; /* its home lies after the hole */
        t->index[i] = t->index[k];
        i = k;
    }
    t->index[i] = 0;
}

/* Counts. */
static bool is_moving(uint8_t state)
{
    return state == TIER_SENDING || state == TIER_RECEIVING;
}

static void set_state(struct kv_tier *t, uint32_t block, enum tier_state state)
{
    struct tier_block *b = &t->blocks[block];
    t->n_private -= b->state == TIER_PRIVATE;
    t->n_moving -= is_moving(b->state);
    b->state = (uint8_t)state;
    t->n_private += b->state == TIER_PRIVATE;
    t->n_moving += is_moving(b->state);
}

uint32_t kv_tier_take(struct kv_tier *t, enum tier_state state, uint64_t acked_step,
                      bool *out_evicted, struct hash128 *out_key)
{
    uint32_t id = TIER_NONE;
    *out_evicted = false;
    if (t->n_free) id = t->free[--t->n_free];
    for (int i = 1; i >= 0 && id == TIER_NONE; i--) {
        uint32_t oldest = t->lists[i].oldest;
        if (oldest == TIER_NONE || t->blocks[oldest].busy_step > acked_step) continue;
        id = oldest;
        list_remove(t, id);
        index_remove(t, id);
        *out_evicted = true;
        *out_key = t->blocks[id].key;
        t->n_evicted++;
    }
    if (id == TIER_NONE) return TIER_NONE;
    t->blocks[id] = (struct tier_block){0};
    set_state(t, id, state);
    return id;
}

void kv_tier_name(struct kv_tier *t, uint32_t block, struct hash128 key)
{
    uint32_t i = home_of(t, key);
    ASSERT(t->blocks[block].state >= TIER_KEPT);
    while (t->index[i])
        i = (i + 1) & t->index_mask;
    t->index[i] = block + 1;
    t->blocks[block].key = key;
}

void kv_tier_keep(struct kv_tier *t, uint32_t block, bool below)
{
    ASSERT(t->blocks[block].state >= TIER_KEPT);
    set_state(t, block, TIER_KEPT);
    t->blocks[block].below = below;
    list_add(t, block);
}

void kv_tier_move(struct kv_tier *t, uint32_t block, enum tier_state state)
{
    ASSERT_CMP(t->blocks[block].state, ==, TIER_KEPT);
    list_remove(t, block);
    set_state(t, block, state);
}

void kv_tier_touch(struct kv_tier *t, uint32_t block, uint64_t step)
{
    struct tier_block *b = &t->blocks[block];
    if (b->busy_step < step) b->busy_step = step;
    if (b->state != TIER_KEPT) return;
    list_remove(t, block);
    list_add(t, block);
}

void kv_tier_drop(struct kv_tier *t, uint32_t block)
{
    uint8_t state = t->blocks[block].state;
    ASSERT(state != TIER_FREE && state != TIER_LIMBO);
    if (state == TIER_KEPT) list_remove(t, block);
    if (state != TIER_PRIVATE) index_remove(t, block);
    set_state(t, block, TIER_FREE);
    t->free[t->n_free++] = block;
}

void kv_tier_give(struct kv_tier *t, uint32_t block, uint64_t step)
{
    ASSERT_CMP(t->blocks[block].state, ==, TIER_PRIVATE);
    set_state(t, block, TIER_LIMBO);
    uint32_t at = (uint32_t)(((uint64_t)t->limbo.first + t->n_limbo++) % t->n_total);
    t->limbo.ids[at] = block;
    t->limbo.steps[at] = step;
}

void kv_tier_acked(struct kv_tier *t, uint64_t step)
{
    while (t->n_limbo && t->limbo.steps[t->limbo.first] <= step) {
        uint32_t id = t->limbo.ids[t->limbo.first];
        t->limbo.first = (t->limbo.first + 1) % t->n_total;
        t->n_limbo--;
        set_state(t, id, TIER_FREE);
        t->free[t->n_free++] = id;
    }
}

static void check_list(const struct kv_tier *t, bool below)
{
    const struct tier_list *l = &t->lists[below];
    uint32_t n = 0, before = TIER_NONE;
    for (uint32_t i = l->oldest; i != TIER_NONE; before = i, i = t->blocks[i].next, n++) {
        ASSERT_CMP(n, <, t->n_total);
        ASSERT_CMP(t->blocks[i].previous, ==, before);
        ASSERT_CMP(t->blocks[i].state, ==, TIER_KEPT);
        ASSERT_CMP(t->blocks[i].below, ==, below);
    }
    ASSERT_CMP(before, ==, l->newest);
    ASSERT_CMP(n, ==, l->n);
}

void kv_tier_check(const struct kv_tier *t)
{
    uint32_t n[TIER_RECEIVING + 1] = {0}, n_indexed = 0;
    if (!t->n_total) return;
    for (uint32_t i = 0; i < t->n_total; i++) {
        const struct tier_block *b = &t->blocks[i];
        n[b->state]++;
        if (b->state >= TIER_KEPT) ASSERT_CMP(kv_tier_find(t, b->key), ==, i);
    }
    for (uint32_t i = 0; i <= t->index_mask; i++)
        n_indexed += t->index[i] != 0;
    check_list(t, false);
    check_list(t, true);
    ASSERT_CMP(n[TIER_FREE], ==, t->n_free);
    ASSERT_CMP(n[TIER_PRIVATE], ==, t->n_private);
    ASSERT_CMP(n[TIER_LIMBO], ==, t->n_limbo);
    ASSERT_CMP(n[TIER_KEPT], ==, kv_tier_kept(t));
    ASSERT_CMP(n[TIER_SENDING] + n[TIER_RECEIVING], ==, t->n_moving);
    ASSERT_CMP(n_indexed, ==, kv_tier_kept(t) + t->n_moving);
    ASSERT_CMP(t->n_free + t->n_private + t->n_limbo + kv_tier_kept(t) + t->n_moving, ==,
               t->n_total);
    for (uint32_t i = 0; i < t->n_free; i++)
        ASSERT_CMP(t->blocks[t->free[i]].state, ==, TIER_FREE);
}
