/* Slots and wheels of one group. */
#include "coordinator/engine/group.h"
#include "base/mem.h"

#include <string.h>

static enum err wheel_init(struct wheel *w, uint32_t n_buckets, uint32_t n_slots)
{
    w->n_buckets = n_buckets;
    TRY(MEM_NEW_ARRAY(n_buckets, &w->heads));
    TRY(MEM_NEW_ARRAY(n_buckets, &w->counts));
    TRY(MEM_NEW_ARRAY(n_slots, &w->next));
    TRY(MEM_NEW_ARRAY(n_slots, &w->previous));
    TRY(MEM_NEW_ARRAY(n_slots, &w->bucket));
    for (uint32_t i = 0; i < n_buckets; i++)
        w->heads[i] = KV_NONE;
    for (uint32_t i = 0; i < n_slots; i++)
        w->bucket[i] = KV_NONE;
    return OK;
}

static void wheel_fini(struct wheel *w)
{
    mem_free(w->heads);
    mem_free(w->counts);
    mem_free(w->next);
    mem_free(w->previous);
    mem_free(w->bucket);
}

static void wheel_insert(struct wheel *w, uint32_t slot, uint64_t step)
{
    uint32_t b = (uint32_t)(step % w->n_buckets), head = w->heads[b];
    ASSERT_CMP(w->bucket[slot], ==, KV_NONE);
    w->next[slot] = head;
    w->previous[slot] = KV_NONE;
    if (head != KV_NONE) w->previous[head] = slot;
    w->heads[b] = slot;
    w->bucket[slot] = b;
    w->counts[b]++;
}

static void wheel_remove(struct wheel *w, uint32_t slot)
{
    uint32_t b = w->bucket[slot];
    if (b == KV_NONE) return;
    if (w->previous[slot] == KV_NONE)
        w->heads[b] = w->next[slot];
    else
        w->next[w->previous[slot]] = w->next[slot];
    if (w->next[slot] != KV_NONE) w->previous[w->next[slot]] = w->previous[slot];
    w->bucket[slot] = KV_NONE;
    w->counts[b]--;
}

static enum err init_arrays(struct group *g)
{
    uint32_t n = g->n_slots;
    TRY(kv_blocks_init(&g->kv, g->info.n_blocks, g->info.block_size));
    TRY(kv_store_init(&g->store, g->info.n_host_blocks, g->info.n_disk_blocks, g->info.n_ranks));
    TRY(MEM_NEW_ARRAY(n, &g->slots));
    TRY(MEM_NEW_ARRAY(n, &g->seen_step));
    TRY(MEM_NEW_ARRAY(n, &g->free_slots));
    TRY(MEM_NEW_ARRAY(n, &g->late_slots));
    TRY(MEM_NEW_ARRAY(n, &g->bucket));
    TRY(MEM_NEW_ARRAY(n, &g->due));
    TRY(MEM_NEW_ARRAY(n, &g->extend_at));
    TRY(MEM_NEW_ARRAY(n, &g->slot_limbo.ids));
    TRY(MEM_NEW_ARRAY(n, &g->slot_limbo.steps));
    TRY(wheel_init(&g->extend, g->info.block_size, n));
    TRY(wheel_init(&g->end, g->info.block_size, n));
    return plan_init(g);
}

enum err group_init(struct group *g, uint32_t index, const struct group_info *info,
                    uint32_t n_slots, uint32_t n_budget, uint32_t n_depth)
{
    *g = (struct group){.up = true,
                        .index = index,
                        .info = *info,
                        .n_slots = n_slots,
                        .n_budget = n_budget,
                        .n_rows_max = info->step_rows_max,
                        .n_depth = n_depth,
                        .fetch_ns = info->fetch_ns,
                        .next_step = 1};
    g->slot_limbo.capacity = n_slots;
    enum err e = init_arrays(g);
    if (e) {
        group_fini(g);
        return e;
    }
    for (uint32_t i = 0; i < n_slots; i++)
        g->free_slots[i] = n_slots - 1 - i;
    g->n_free_slots = n_slots;
    return OK;
}

void group_fini(struct group *g)
{
    kv_blocks_fini(&g->kv);
    kv_store_fini(&g->store);
    mem_free(g->slots);
    mem_free(g->seen_step);
    mem_free(g->free_slots);
    mem_free(g->late_slots);
    mem_free(g->bucket);
    mem_free(g->due);
    mem_free(g->extend_at);
    mem_free(g->slot_limbo.ids);
    mem_free(g->slot_limbo.steps);
    wheel_fini(&g->extend);
    wheel_fini(&g->end);
    plan_fini(g);
    *g = (struct group){.index = g->index};
}

bool group_seat(struct group *g, struct sequence *s)
{
    if (!g->n_free_slots) return false;
    s->slot = g->free_slots[--g->n_free_slots];
    s->group = g->index;
    s->state = SEQUENCE_RUNNING;
    s->n_registered = s->n_window_freed = s->n_full_next = 0;
    s->may_preempt = s->decoding = false;
    s->last_step = 0;
    s->first_step = UINT64_MAX;
    s->n_drafting = s->drafting.n_seen = 0;
    s->drafting.n_ahead = 0;
    s->run_step = 0;
    g->slots[s->slot] = s;
    sequence_list_append(&g->running, LINK_PLACE, s);
    return true;
}

void group_join(struct group *g, struct sequence *s)
{
    uint32_t n_room = s->blocks.n * g->info.block_size - s->n_planned;
    uint64_t n_steps = s->n_end - 1 - s->n_planned; /* until its last token is sampled */
    struct due *due = &g->due[s->slot];
    s->decoding = true;
    s->join_step = g->next_step + 1;
    g->n_decoding++;
    *due = (struct due){s->join_step + n_room, s->join_step + n_steps};
    wheel_insert(&g->extend, s->slot, due->room_step);
    if (n_steps < g->end.n_buckets) wheel_insert(&g->end, s->slot, due->end_step);
}

void group_watch_end(struct group *g, uint32_t slot, uint64_t step)
{
    uint64_t end_step = g->due[slot].end_step;
    /* The bucket of `step` itself was looked at already: n_buckets steps ahead is still this one.
     */
    if (end_step - step <= g->end.n_buckets && g->end.bucket[slot] == KV_NONE)
        wheel_insert(&g->end, slot, end_step);
}

void group_part(struct group *g, struct sequence *s)
{
    if (!s->decoding) return;
    s->n_planned = sequence_planned(s, g->next_step);
    s->last_step = g->next_step - 1;
    s->decoding = false;
    g->n_decoding--;
    wheel_remove(&g->extend, s->slot);
    wheel_remove(&g->end, s->slot);
}

static void close_slot(struct group *g, uint32_t slot)
{
    uint32_t at = (g->slot_limbo.first + g->slot_limbo.n) % g->slot_limbo.capacity;
    ASSERT_CMP(g->slot_limbo.n, <, g->slot_limbo.capacity);
    plan_add_close(g, slot);
    g->slot_limbo.ids[at] = slot;
    g->slot_limbo.steps[at] = g->next_step;
    g->slot_limbo.n++;
}

static void leave(struct group *g, struct sequence *s)
{
    uint64_t step = group_last_step(g);
    uint32_t *blocks = sequence_blocks(s);
    group_part(g, s);
    plan_drop_extend(g, s->slot);
    sequence_unlink(s, LINK_WORK);
    sequence_unlink(s, LINK_PLACE);
    for (uint32_t i = s->blocks.n; i-- > s->n_window_freed;)
        kv_blocks_unref(&g->kv, blocks[i], step);
    s->blocks.n = 0;
}

void group_unseat(struct group *g, struct sequence *s)
{
    leave(g, s);
    close_slot(g, s->slot);
}

void group_unseat_late(struct group *g, struct sequence *s)
{
    leave(g, s);
    g->late_slots[g->n_late_slots++] = s->slot;
}

void group_reseat(struct group *g, struct sequence *s)
{
    ASSERT(g->n_free_slots && !s->decoding);
    g->late_slots[g->n_late_slots++] = s->slot;
    g->slots[s->slot] = NULL;
    s->slot = g->free_slots[--g->n_free_slots];
    g->slots[s->slot] = s;
    s->first_step = UINT64_MAX;
    s->run_step = 0;
}

void group_close_late(struct group *g)
{
    while (g->n_late_slots)
        close_slot(g, g->late_slots[--g->n_late_slots]);
}

void group_forget(struct group *g, struct sequence *s)
{
    if (g->slots[s->slot] == s) g->slots[s->slot] = NULL;
}

void group_acked(struct group *g, uint64_t step)
{
    struct kv_limbo *l = &g->slot_limbo;
    g->acked_step = step;
    kv_blocks_acked(&g->kv, step);
    kv_store_acked(&g->store, step);
    while (l->n && l->steps[l->first] <= step) {
        uint32_t slot = l->ids[l->first];
        l->first = (l->first + 1) % l->capacity;
        l->n--;
        g->slots[slot] = NULL;
        g->free_slots[g->n_free_slots++] = slot;
    }
}
