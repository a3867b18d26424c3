/* A heap of lanes keyed by (priority, tenant's counter, age of the first). Counters only grow, so a
 * stale key is too small and is put right when it comes to the top. */
#include "coordinator/engine/fair.h"
#include "base/mem.h"

enum { BUCKETS = 4096, HEAP_START = 64 };

enum err fair_init(struct fair *f)
{
    *f = (struct fair){.n_buckets = BUCKETS, .n_turns = FAIR_TURNS, .starve_us = FAIR_STARVE_US};
    return MEM_NEW_ARRAY(BUCKETS, &f->buckets);
}

static void tenant_free(struct tenant *t)
{
    for (struct lane *l = t->lanes, *next; l; l = next) {
        next = l->next;
        mem_free(l);
    }
    mem_free(t);
}

void fair_fini(struct fair *f)
{
    for (uint32_t i = 0; f->buckets && i < f->n_buckets; i++)
        for (struct tenant *t = f->buckets[i], *next; t; t = next) {
            next = t->chain;
            tenant_free(t);
        }
    mem_free(f->buckets);
    mem_free(f->heap);
    mem_free(f->aside);
    *f = (struct fair){0};
}

/* The heap. */
static struct sequence *candidate(const struct lane *l)
{
    return l->cursor ? l->cursor : l->waiting.first;
}

static bool before(const struct lane *a, const struct lane *b)
{
    if (a->priority != b->priority) return a->priority < b->priority;
    if (a->key != b->key) return a->key < b->key;
    return candidate(a)->order < candidate(b)->order;
}

static void place(struct fair *f, uint32_t i, struct lane *l)
{
    f->heap[i] = l;
    l->heap_index = i + 1;
}

static void sift_up(struct fair *f, uint32_t i)
{
    struct lane *l = f->heap[i];
    for (; i && before(l, f->heap[(i - 1) / 2]); i = (i - 1) / 2)
        place(f, i, f->heap[(i - 1) / 2]);
    place(f, i, l);
}

static void sift_down(struct fair *f, uint32_t i)
{
    struct lane *l = f->heap[i];
    for (uint32_t child; (child = 2 * i + 1) < f->n_heap; i = child) {
        if (child + 1 < f->n_heap && before(f->heap[child + 1], f->heap[child])) child++;
        if (!before(f->heap[child], l)) break;
        place(f, i, f->heap[child]);
    }
    place(f, i, l);
}

static void heap_push(struct fair *f, struct lane *l)
{
    ASSERT(!l->heap_index && l->waiting.n);
    ASSERT_CMP(f->n_heap, <, f->heap_capacity); /* fair_enter made room for every lane */
    l->key = l->tenant->served;
    place(f, f->n_heap++, l);
    sift_up(f, f->n_heap - 1);
}

static void heap_remove(struct fair *f, struct lane *l)
{
    uint32_t i = l->heap_index - 1;
    struct lane *last = f->heap[--f->n_heap];
    l->heap_index = 0;
    if (last == l) return;
    place(f, i, last);
    sift_down(f, i);
    sift_up(f, last->heap_index - 1);
}

/* Tenants. */
static struct tenant **bucket_of(const struct fair *f, uint64_t id)
{
    return &f->buckets[hash_u64(id) & (f->n_buckets - 1)];
}

static void forget_idle(struct fair *f)
{
    for (uint32_t i = 0; i < f->n_buckets; i++)
        for (struct tenant **at = &f->buckets[i]; *at;) {
            struct tenant *t = *at;
            if (t->n_alive) {
                at = &t->chain;
                continue;
            }
            *at = t->chain;
            f->n_tenants--;
            tenant_free(t);
        }
}

static enum err tenant_get(struct fair *f, uint64_t id, struct tenant **out)
{
    struct tenant *t;
    for (t = *bucket_of(f, id); t; t = t->chain)
        if (t->id == id) {
            *out = t;
            return OK;
        }
    if (f->n_tenants >= FAIR_TENANTS_IDLE_MAX && f->n_tenants % FAIR_TENANTS_IDLE_MAX == 0)
        forget_idle(f);
    TRY(MEM_NEW(&t));
    t->id = id;
    t->weight = 1;
    t->chain = *bucket_of(f, id);
    *bucket_of(f, id) = t;
    f->n_tenants++;
    *out = t;
    return OK;
}

/* Room in the heap and aside for one lane more. */
static enum err make_room(struct fair *f, uint32_t n)
{
    if (n <= f->heap_capacity) return OK;
    uint32_t capacity = f->heap_capacity ? 2 * f->heap_capacity : HEAP_START;
    TRY(mem_resize((void **)&f->heap, capacity * sizeof(void *)));
    TRY(mem_resize((void **)&f->aside, capacity * sizeof(void *)));
    f->heap_capacity = capacity;
    return OK;
}

enum err fair_enter(struct fair *f, uint64_t tenant, uint32_t weight, int32_t priority,
                    struct lane **out)
{
    struct tenant *t;
    struct lane *l;
    TRY(tenant_get(f, tenant, &t));
    for (l = t->lanes; l && l->priority != priority; l = l->next)
        continue;
    if (!l) {
        TRY(make_room(f, f->n_heap + f->n_aside + 2));
        TRY(MEM_NEW(&l));
        *l = (struct lane){.tenant = t, .priority = priority, .next = t->lanes};
        t->lanes = l;
    }
    TRY(make_room(f, f->n_heap + f->n_aside + 2));
    t->weight = weight ? weight : 1;
    if (!t->n_alive++) {
        f->n_active++;
        if (t->served < f->floor) t->served = f->floor;
    }
    *out = l;
    return OK;
}

void fair_leave(struct fair *f, struct lane *lane)
{
    struct tenant *t = lane->tenant;
    ASSERT(t->n_alive);
    if (!--t->n_alive) f->n_active--;
}

static void enter_lane(struct fair *f, struct sequence *s)
{
    struct lane *l = s->lane;
    struct sequence *at = l->waiting.last;
    while (at && at->order > s->order)
        at = at->links[LINK_PLACE].previous;
    sequence_list_before(&l->waiting, LINK_PLACE,
                         at ? at->links[LINK_PLACE].next : l->waiting.first, s);
    if (!l->heap_index)
        heap_push(f, l);
    else if (l->waiting.first == s)
        sift_up(f, l->heap_index - 1);
}

void fair_wait(struct fair *f, struct sequence *s, int64_t now_us)
{
    enter_lane(f, s);
    sequence_list_append(&f->by_age, LINK_AGE, s);
    s->waiting_since_us = now_us;
}

void fair_wait_urgent(struct fair *f, struct sequence *s, int64_t now_us)
{
    struct sequence *at = f->by_age.first;
    (void)now_us;
    enter_lane(f, s);
    while (at && at->waiting_since_us == FAIR_SINCE_EVER_US && at->order < s->order)
        at = at->links[LINK_AGE].next;
    sequence_list_before(&f->by_age, LINK_AGE, at, s);
    s->waiting_since_us = FAIR_SINCE_EVER_US;
}

void fair_unwait(struct fair *f, struct sequence *s)
{
    struct lane *l = s->lane;
    bool asked = l->heap_index && candidate(l) == s;
    struct sequence *next = s->links[LINK_PLACE].next;
    if (l->heap_index && (l->waiting.n == 1 || (asked && !next))) heap_remove(f, l);
    sequence_unlink(s, LINK_PLACE);
    sequence_unlink(s, LINK_AGE);
    if (l->cursor == s) l->cursor = next;
    if (asked && l->heap_index) sift_down(f, l->heap_index - 1);
}

/* Whether the oldest goes before the order of the heap: it holds what others wait for, or it
 * starved and it is its kind's turn. */
static bool goes_by_age(const struct fair *f, const struct sequence *oldest, int64_t now_us)
{
    if (!oldest || !oldest->lane->heap_index) return false;
    if (oldest->lane->cursor && oldest->order < oldest->lane->cursor->order)
        return false; /* passed over */
    if (oldest->waiting_since_us == FAIR_SINCE_EVER_US) return true;
    return now_us - f->starve_us > oldest->waiting_since_us && f->n_turns >= FAIR_TURNS;
}

bool fair_take(struct fair *f, struct sequence *s, int64_t now_us)
{
    bool starved = s == f->by_age.first && s->waiting_since_us != FAIR_SINCE_EVER_US &&
                   goes_by_age(f, s, now_us);
    f->n_turns = starved ? 0 : f->n_turns + (f->n_turns < FAIR_TURNS);
    fair_unwait(f, s);
    return starved;
}

struct sequence *fair_next(struct fair *f, int64_t now_us)
{
    struct sequence *oldest = f->by_age.first;
    if (goes_by_age(f, oldest, now_us)) return oldest;
    while (f->n_heap) {
        struct lane *l = f->heap[0];
        if (l->key == l->tenant->served) {
            if (l->key > f->floor) f->floor = l->key;
            return candidate(l);
        }
        l->key = l->tenant->served;
        sift_down(f, 0);
    }
    return NULL;
}

static void search(struct fair *f, struct lane *l)
{
    if (!l->searched) f->aside[f->n_aside++] = l;
    l->searched = true;
}

void fair_skip_lane(struct fair *f, struct sequence *s)
{
    search(f, s->lane);
    heap_remove(f, s->lane);
}

void fair_skip(struct fair *f, struct sequence *s)
{
    struct lane *l = s->lane;
    struct sequence *next = s->links[LINK_PLACE].next;
    if (!next) {
        fair_skip_lane(f, s);
        return;
    }
    search(f, l);
    l->cursor = next;
    sift_down(f, l->heap_index - 1);
}

void fair_restore(struct fair *f)
{
    while (f->n_aside) {
        struct lane *l = f->aside[--f->n_aside];
        l->searched = false;
        l->cursor = NULL;
        if (l->heap_index) heap_remove(f, l);
        if (l->waiting.n) heap_push(f, l);
    }
}
