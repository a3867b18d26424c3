/* Goal: outside the device no block is lost, given twice or believed before all ranks have it.
 * Method: single rules on small stores, then a random walk of saves, swaps, fetches and spills with
 * ranks that answer out of step and fail, against a copy of what each block holds. */
#include "base/mem.h"
#include "base/rand.h"
#include "coordinator/engine/kv_store.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
// clang-format off
#include <cmocka.h>
// clang-format on

static struct hash128 key_of(uint64_t n)
{
    return hash_bytes(&n, sizeof n, 5);
}

static uint32_t save(struct kv_store *s, uint64_t key, uint64_t step)
{
    return kv_store_save(s, key_of(key), step, step - 1);
}

static enum store_place place(const struct kv_store *s, uint64_t key)
{
    uint32_t host;
    return kv_store_find(s, key_of(key), &host);
}

static void the_oldest_goes_but_not_what_a_plan_still_names(void **state)
{
    struct kv_store s;
    (void)state;
    assert_int_equal(kv_store_init(&s, 2, 0, 1), OK);
    assert_int_not_equal(save(&s, 1, 1), TIER_NONE);
    assert_int_not_equal(save(&s, 2, 2), TIER_NONE);
    assert_int_equal(kv_store_save(&s, key_of(3), 3, 0), TIER_NONE); /* plan 1 is under way */
    kv_tier_touch(&s.host, kv_tier_find(&s.host, key_of(1)), 3);     /* read by plan 3 */
    assert_int_not_equal(save(&s, 3, 4), TIER_NONE);
    assert_int_equal(place(&s, 1), STORE_HOST);
    assert_int_equal(place(&s, 2), STORE_NOWHERE);
    assert_int_equal(save(&s, 3, 5), TIER_NONE); /* it is there already */
    uint32_t mine[2], more;
    assert_true(kv_store_take(&s, 2, 4, mine));
    assert_false(kv_store_take(&s, 1, 9, &more));
    kv_tier_give(&s.host, mine[0], 7);
    kv_store_acked(&s, 6);
    assert_false(kv_store_take(&s, 1, 9, &more));
    kv_store_acked(&s, 7);
    assert_true(kv_store_take(&s, 1, 9, &more));
    kv_store_check(&s);
    kv_store_fini(&s);
}

/* A full host of four; all are on their way to disk. */
static void open_spilled(struct kv_store *s, uint32_t n_ranks)
{
    struct plan_pair pair;
    assert_int_equal(kv_store_init(s, 4, 4, n_ranks), OK);
    for (uint64_t key = 1; key <= 4; key++)
        save(s, key, 1);
    while (kv_store_spill(s, 9, &pair))
        continue;
    assert_int_equal(kv_queue_waiting(&s->spills), 4);
    kv_store_check(s);
}

static void a_transfer_is_done_when_all_ranks_have_done_it(void **state)
{
    struct kv_store s;
    struct plan_pair pair;
    (void)state;
    open_spilled(&s, 2);
    assert_int_equal(kv_store_moved(&s, 1, &(struct moved){.n_spilled = 4}), OK);
    assert_int_equal(s.host.lists[1].n, 0);
    assert_int_equal(kv_store_moved(&s, 0, &(struct moved){.n_spilled = 4}), OK);
    assert_int_equal(s.host.lists[1].n, 4);
    save(&s, 9, 10); /* takes the place of the one that is on disk */
    assert_int_equal(place(&s, 1), STORE_DISK);
    assert_true(kv_store_fetch(&s, key_of(1), 20, &pair));
    assert_int_equal(place(&s, 1), STORE_COMING);
    assert_false(kv_store_fetch(&s, key_of(1), 20, &pair));
    struct moved one = {.n_spilled = 4, .n_fetched = 1};
    assert_int_equal(kv_store_moved(&s, 0, &one), OK);
    assert_int_equal(place(&s, 1), STORE_COMING);
    assert_int_equal(kv_store_moved(&s, 1, &one), OK);
    assert_int_equal(place(&s, 1), STORE_HOST);
    kv_store_check(&s);
    kv_store_fini(&s);
}

static void what_one_rank_could_not_read_is_forgotten(void **state)
{
    struct kv_store s;
    struct plan_pair pair;
    uint64_t number = 0;
    (void)state;
    open_spilled(&s, 2);
    struct moved spilled = {.n_spilled = 4};
    kv_store_moved(&s, 0, &spilled), kv_store_moved(&s, 1, &spilled);
    save(&s, 9, 10);
    assert_true(kv_store_fetch(&s, key_of(1), 20, &pair));
    struct moved good = {.n_spilled = 4, .n_fetched = 1}, bad = good;
    bad.n_fetches_failed = 1, bad.fetches_failed = &number;
    assert_int_equal(kv_store_moved(&s, 1, &bad), OK);
    assert_int_equal(kv_store_moved(&s, 0, &good), OK);
    assert_int_equal(place(&s, 1), STORE_NOWHERE);
    assert_int_equal(s.n_fetches_failed, 1);
    assert_int_equal(s.disk.n_free, 1);
    kv_store_check(&s);
    kv_store_fini(&s);
}

static void a_failed_write_costs_nothing_and_is_not_tried_at_once(void **state)
{
    struct kv_store s;
    uint64_t number = 0;
    (void)state;
    open_spilled(&s, 1);
    struct moved bad = {.n_spilled = 4, .n_spills_failed = 1, .spills_failed = &number};
    assert_int_equal(kv_store_moved(&s, 0, &bad), OK);
    assert_int_equal(place(&s, 1), STORE_HOST);
    assert_int_equal(s.disk.n_free, 1);
    assert_true(s.spill_pause > 0);
    kv_store_check(&s);
    kv_store_fini(&s);
}

static void news_of_what_was_not_asked_is_refused(void **state)
{
    struct kv_store s;
    uint64_t number = 1;
    (void)state;
    open_spilled(&s, 2);
    const struct moved wrong[] = {{.n_spilled = 5},
                                  {.n_fetched = 1},
                                  {.n_spilled = 1, .n_spills_failed = 1, .spills_failed = &number}};
    for (int i = 0; i < 3; i++)
        assert_int_equal(kv_store_moved(&s, 0, &wrong[i]), ERR_FORMAT);
    assert_int_equal(kv_store_moved(&s, 2, &(struct moved){0}), ERR_FORMAT);
    assert_int_equal(kv_store_moved(&s, 0, &(struct moved){.n_spilled = 1}), OK);
    assert_int_equal(kv_store_moved(&s, 0, &(struct moved){0}), ERR_FORMAT); /* it goes back */
    kv_store_fini(&s);
}

enum { HOST = 24, DISK = 40, KEYS = 90, RANKS = 3 };
struct walk {
    struct kv_store s;
    struct rand dice;
    uint64_t host[HOST], disk[DISK]; /* the key each holds, 0 = rubbish */
    uint64_t step;
};

/* One rank more ends some transfers; what all have ended happens to the copies. */
static void ranks_speak(struct walk *w)
{
    uint64_t failed[2][PLAN_TRANSFERS_MAX];
    struct kv_queue *queues[2] = {&w->s.fetches, &w->s.spills};
    uint64_t was[2] = {w->s.fetches.n_done, w->s.spills.n_done}, done[2];
    uint32_t rank = (uint32_t)rand_below(&w->dice, RANKS), n_failed[2] = {0, 0};
    for (int k = 0; k < 2; k++) {
        uint64_t n = queues[k]->n_started - queues[k]->rank_done[rank];
        done[k] = queues[k]->rank_done[rank] + rand_below(&w->dice, n + 1);
        for (uint64_t i = queues[k]->rank_done[rank]; i < done[k]; i++) {
            if (rand_below(&w->dice, 12)) continue;
            struct plan_pair p = queues[k]->pairs[i % queues[k]->capacity];
            *(k ? &w->disk[p.to] : &w->host[p.to]) = 0;
            failed[k][n_failed[k]++] = i;
        }
    }
    struct moved news = {.n_fetched = done[0],
                         .n_spilled = done[1],
                         .n_fetches_failed = n_failed[0],
                         .n_spills_failed = n_failed[1],
                         .fetches_failed = failed[0],
                         .spills_failed = failed[1]};
    assert_int_equal(kv_store_moved(&w->s, rank, &news), OK);
    for (int k = 0; k < 2; k++)
        assert_true(queues[k]->n_done >= was[k] && queues[k]->n_done <= queues[k]->n_started);
}

static void walk_once(struct walk *w, uint32_t *mine, uint32_t *n_mine)
{
    uint64_t key = 1 + rand_below(&w->dice, KEYS), acked = w->step - 1 - rand_below(&w->dice, 3);
    struct plan_pair p;
    uint32_t host;
    switch (rand_below(&w->dice, 6)) {
    case 0:
    case 1:
        host = kv_store_save(&w->s, key_of(key), w->step, acked);
        if (host != TIER_NONE) w->host[host] = key;
        break;
    case 2:
        if (kv_store_fetch(&w->s, key_of(key), acked, &p)) w->host[p.to] = w->disk[p.from];
        break;
    case 3:
        while (kv_store_spill(&w->s, acked, &p))
            w->disk[p.to] = w->host[p.from];
        break;
    case 4:
        if (*n_mine)
            kv_tier_give(&w->s.host, mine[--*n_mine], w->step);
        else if (kv_store_take(&w->s, 3, acked, mine))
            *n_mine = 3;
        for (uint32_t i = 0; i < *n_mine; i++)
            w->host[mine[i]] = 0;
        break;
    default:
        ranks_speak(w);
    }
    kv_store_acked(&w->s, acked);
    if (kv_store_find(&w->s, key_of(key), &host) == STORE_HOST)
        assert_int_equal(w->host[host], key);
}

static void random_walk(void **state)
{
    static struct walk w;
    uint32_t mine[3], n_mine = 0;
    (void)state;
    w.dice = rand_seeded(11);
    assert_int_equal(kv_store_init(&w.s, HOST, DISK, RANKS), OK);
    int64_t made = mem_made();
    for (w.step = 10; w.step < 60000; w.step++) {
        walk_once(&w, mine, &n_mine);
        if (w.step % 20 == 0) kv_store_check(&w.s);
    }
    assert_true(w.s.n_fetches > 500 && w.s.n_spills > 500 && w.s.n_fetches_failed > 20);
    assert_int_equal(mem_made(), made);
    kv_store_fini(&w.s);
}

static void creation_survives_each_failed_allocation(void **state)
{
    (void)state;
    int64_t live = mem_live();
    for (int64_t n = 1;; n++) {
        struct kv_store s;
        mem_fail_at(n);
        enum err e = kv_store_init(&s, 8, 8, 2);
        mem_fail_at(0);
        if (!e) {
            kv_store_fini(&s);
            assert_true(n > 10);
            break;
        }
        assert_int_equal(e, ERR_NO_MEMORY);
        assert_int_equal(mem_live(), live);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(the_oldest_goes_but_not_what_a_plan_still_names),
        cmocka_unit_test(a_transfer_is_done_when_all_ranks_have_done_it),
        cmocka_unit_test(what_one_rank_could_not_read_is_forgotten),
        cmocka_unit_test(a_failed_write_costs_nothing_and_is_not_tried_at_once),
        cmocka_unit_test(news_of_what_was_not_asked_is_refused),
        cmocka_unit_test(random_walk),
        cmocka_unit_test(creation_survives_each_failed_allocation),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
