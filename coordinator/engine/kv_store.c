/* Host and disk tiers of one group. */
#include "coordinator/engine/kv_store.h"
#include "base/mem.h"

static enum err queue_init(struct kv_queue *q, uint32_t capacity, uint32_t n_ranks)
{
    q->capacity = capacity;
    TRY(MEM_NEW_ARRAY(capacity, &q->pairs));
    TRY(MEM_NEW_ARRAY(capacity, &q->failed));
    return MEM_NEW_ARRAY(n_ranks, &q->rank_done);
}

static void queue_fini(struct kv_queue *q)
{
    mem_free(q->pairs);
    mem_free(q->failed);
    mem_free(q->rank_done);
}

static enum err init_all(struct kv_store *s, uint32_t n_host, uint32_t n_disk)
{
    uint32_t n = n_disk && n_host ? PLAN_TRANSFERS_MAX : 0;
    TRY(kv_tier_init(&s->host, n_host));
    TRY(kv_tier_init(&s->disk, n ? n_disk : 0));
    TRY(queue_init(&s->fetches, n, s->n_ranks));
    return queue_init(&s->spills, n, s->n_ranks);
}

enum err kv_store_init(struct kv_store *s, uint32_t n_host, uint32_t n_disk, uint32_t n_ranks)
{
    *s = (struct kv_store){.n_ranks = n_ranks ? n_ranks : 1};
    enum err e = init_all(s, n_host, n_disk);
    if (e) kv_store_fini(s);
    return e;
}

void kv_store_fini(struct kv_store *s)
{
    kv_tier_fini(&s->host);
    kv_tier_fini(&s->disk);
    queue_fini(&s->fetches);
    queue_fini(&s->spills);
    *s = (struct kv_store){0};
}

void kv_store_acked(struct kv_store *s, uint64_t step)
{
    kv_tier_acked(&s->host, step);
}

enum store_place kv_store_find(const struct kv_store *s, struct hash128 key, uint32_t *out_host)
{
    uint32_t id = kv_tier_find(&s->host, key);
    *out_host = id;
    if (id != TIER_NONE)
        return s->host.blocks[id].state == TIER_RECEIVING ? STORE_COMING : STORE_HOST;
    id = kv_tier_find(&s->disk, key);
    return id != TIER_NONE && s->disk.blocks[id].state == TIER_KEPT ? STORE_DISK : STORE_NOWHERE;
}

uint32_t kv_store_save(struct kv_store *s, struct hash128 key, uint64_t step, uint64_t acked_step)
{
    bool evicted;
    struct hash128 lost;
    uint32_t id = kv_tier_find(&s->host, key);
    if (id != TIER_NONE) {
        kv_tier_touch(&s->host, id, s->host.blocks[id].busy_step);
        return TIER_NONE;
    }
    id = kv_tier_take(&s->host, TIER_KEPT, acked_step, &evicted, &lost);
    if (id == TIER_NONE) return TIER_NONE;
    kv_tier_name(&s->host, id, key);
    uint32_t below = kv_tier_find(&s->disk, key);
    kv_tier_keep(&s->host, id, below != TIER_NONE && s->disk.blocks[below].state == TIER_KEPT);
    kv_tier_touch(&s->host, id, step);
    s->n_saves++;
    return id;
}

bool kv_store_take(struct kv_store *s, uint32_t n, uint64_t acked_step, uint32_t *out)
{
    bool evicted;
    struct hash128 lost;
    for (uint32_t i = 0; i < n; i++) {
        out[i] = kv_tier_take(&s->host, TIER_PRIVATE, acked_step, &evicted, &lost);
        if (out[i] != TIER_NONE) continue;
        while (i-- > 0)
            kv_tier_drop(&s->host, out[i]);
        return false;
    }
    return true;
}

static void start(struct kv_queue *q, struct plan_pair pair)
{
    uint64_t at = q->n_started++ % q->capacity;
    q->pairs[at] = pair;
    q->failed[at] = false;
}

bool kv_store_fetch(struct kv_store *s, struct hash128 key, uint64_t acked_step,
                    struct plan_pair *out)
{
    bool evicted;
    struct hash128 lost;
    uint32_t disk = kv_tier_find(&s->disk, key);
    if (disk == TIER_NONE || kv_tier_find(&s->host, key) != TIER_NONE ||
        s->disk.blocks[disk].state != TIER_KEPT ||
        kv_queue_waiting(&s->fetches) >= s->fetches.capacity ||
        4 * (uint64_t)s->host.n_moving >
            3 * (uint64_t)s->host.n_total) /* those fetched must find a place, too */
        return false;
    uint32_t host = kv_tier_take(&s->host, TIER_RECEIVING, acked_step, &evicted, &lost);
    if (host == TIER_NONE) return false;
    kv_tier_name(&s->host, host, key);
    kv_tier_move(&s->disk, disk, TIER_SENDING);
    *out = (struct plan_pair){disk, host};
    start(&s->fetches, *out);
    s->n_fetches++;
    return true;
}

enum { SPILLS_WAITING_MAX = 64, SPILL_LOOKS = 8 };

/* Whether the disk has a place that is better used for a host block not written yet: a free one, or
 * one whose content is no longer on the host. Otherwise two host blocks would take turns there. */
static bool has_place(struct kv_store *s)
{
    if (s->disk.n_free) return true;
    for (int i = 0; i < SPILL_LOOKS && s->disk.lists[0].n; i++) {
        uint32_t oldest = s->disk.lists[0].oldest;
        if (kv_tier_find(&s->host, s->disk.blocks[oldest].key) == TIER_NONE) return true;
        kv_tier_touch(&s->disk, oldest, 0);
    }
    return false;
}

bool kv_store_spill(struct kv_store *s, uint64_t acked_step, struct plan_pair *out)
{
    bool evicted;
    struct hash128 lost;
    uint32_t host = s->host.lists[0].oldest;
    uint64_t n_ready = (uint64_t)s->host.n_free + s->host.lists[1].n + s->host.n_moving;
    if (!s->disk.n_total || host == TIER_NONE || n_ready >= s->host.n_total - s->host.n_total / 8 ||
        s->host.blocks[host].busy_step > acked_step ||
        kv_queue_waiting(&s->spills) >= SPILLS_WAITING_MAX || !has_place(s))
        return false;
    struct hash128 key = s->host.blocks[host].key;
    uint32_t disk = kv_tier_find(&s->disk, key);
    ASSERT_CMP(disk, ==, TIER_NONE);
    disk = kv_tier_take(&s->disk, TIER_RECEIVING, UINT64_MAX, &evicted, &lost);
    ASSERT_CMP(disk, !=, TIER_NONE);
    kv_tier_name(&s->disk, disk, key);
    kv_tier_move(&s->host, host, TIER_SENDING);
    *out = (struct plan_pair){host, disk};
    start(&s->spills, *out);
    s->n_spills++;
    return true;
}

/* Ends of transfers. */
static void end_fetch(struct kv_store *s, struct plan_pair pair, bool failed)
{
    if (failed) { /* neither copy is worth anything */
        s->n_fetches_failed++;
        kv_tier_drop(&s->host, pair.to);
        kv_tier_drop(&s->disk, pair.from);
        return;
    }
    kv_tier_keep(&s->disk, pair.from, false);
    kv_tier_keep(&s->host, pair.to, true);
    s->host.blocks[pair.to].risen = true;
}

static void end_spill(struct kv_store *s, struct plan_pair pair, bool failed)
{
    kv_tier_keep(&s->host, pair.from, !failed);
    if (failed) {
        s->n_spills_failed++;
        kv_tier_drop(&s->disk, pair.to);
        if (s->spill_backoff < STORE_BACKOFF_MAX) s->spill_backoff++;
        s->spill_pause = 1u << s->spill_backoff;
        return;
    }
    s->spill_backoff = 0;
    kv_tier_keep(&s->disk, pair.to, false);
}

static enum err check_news(const struct kv_queue *q, uint32_t rank, uint64_t n_done,
                           const uint64_t *failed, uint32_t n_failed, const char *what)
{
    if (n_done < q->rank_done[rank] || n_done > q->n_started)
        FAIL(ERR_FORMAT, "rank %u has done %llu %s: %llu before, %llu started", rank,
             (unsigned long long)n_done, what, (unsigned long long)q->rank_done[rank],
             (unsigned long long)q->n_started);
    for (uint32_t i = 0; i < n_failed; i++)
        if (failed[i] < q->rank_done[rank] || failed[i] >= n_done)
            FAIL(ERR_FORMAT, "rank %u: number %llu of its %s failed, which is not among these",
                 rank, (unsigned long long)failed[i], what);
    return OK;
}

/* Notes what one rank has done; returns how many all ranks have. */
static uint64_t hear(struct kv_queue *q, uint32_t n_ranks, uint32_t rank, uint64_t n_done,
                     const uint64_t *failed, uint32_t n_failed)
{
    for (uint32_t i = 0; i < n_failed; i++)
        q->failed[failed[i] % q->capacity] = true;
    q->rank_done[rank] = n_done;
    for (uint32_t r = 0; r < n_ranks; r++)
        if (q->rank_done[r] < n_done) n_done = q->rank_done[r];
    return n_done;
}

enum err kv_store_moved(struct kv_store *s, uint32_t rank, const struct moved *news)
{
    if (rank >= s->n_ranks) FAIL(ERR_FORMAT, "rank %u of %u", rank, s->n_ranks);
    TRY(check_news(&s->fetches, rank, news->n_fetched, news->fetches_failed, news->n_fetches_failed,
                   "fetches"));
    TRY(check_news(&s->spills, rank, news->n_spilled, news->spills_failed, news->n_spills_failed,
                   "spills"));
    uint64_t n = hear(&s->fetches, s->n_ranks, rank, news->n_fetched, news->fetches_failed,
                      news->n_fetches_failed);
    for (struct kv_queue *q = &s->fetches; q->n_done < n; q->n_done++)
        end_fetch(s, q->pairs[q->n_done % q->capacity], q->failed[q->n_done % q->capacity]);
    n = hear(&s->spills, s->n_ranks, rank, news->n_spilled, news->spills_failed,
             news->n_spills_failed);
    for (struct kv_queue *q = &s->spills; q->n_done < n; q->n_done++)
        end_spill(s, q->pairs[q->n_done % q->capacity], q->failed[q->n_done % q->capacity]);
    return OK;
}

static void check_pair(const struct kv_tier *from, const struct kv_tier *to, struct plan_pair p)
{
    ASSERT_CMP(from->blocks[p.from].state, ==, TIER_SENDING);
    ASSERT_CMP(to->blocks[p.to].state, ==, TIER_RECEIVING);
    ASSERT(hash_equal(from->blocks[p.from].key, to->blocks[p.to].key));
}

void kv_store_check(const struct kv_store *s)
{
    kv_tier_check(&s->host);
    kv_tier_check(&s->disk);
    uint64_t n_fetching = kv_queue_waiting(&s->fetches), n_spilling = kv_queue_waiting(&s->spills);
    for (uint64_t i = s->fetches.n_done; i < s->fetches.n_started; i++)
        check_pair(&s->disk, &s->host, s->fetches.pairs[i % s->fetches.capacity]);
    for (uint64_t i = s->spills.n_done; i < s->spills.n_started; i++)
        check_pair(&s->host, &s->disk, s->spills.pairs[i % s->spills.capacity]);
    ASSERT_CMP(s->host.n_moving, ==, n_fetching + n_spilling);
    ASSERT_CMP(s->disk.n_moving, ==, n_fetching + n_spilling);
    for (uint32_t i = s->host.lists[1].oldest; i != TIER_NONE; i = s->host.blocks[i].next)
        ASSERT(kv_tier_find(&s->disk, s->host.blocks[i].key) != TIER_NONE);
}
