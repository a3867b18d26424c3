/* Goal: whose turn it is follows class, service and age, and nobody waits forever. Method:
 * sequences without an engine, served by hand; the shares that come out are compared with the
 * weights. */
#include "base/mem.h"
#include "base/rand.h"
#include "coordinator/engine/fair.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
// clang-format off
#include <cmocka.h>
// clang-format on

enum { MANY = 2000 };
static struct sequence *pool;
static uint32_t n_made;

static struct sequence *wait_new(struct fair *f, uint64_t tenant, uint32_t weight, int32_t priority,
                                 int64_t now_us)
{
    struct sequence *s = &pool[n_made++];
    memset(s, 0, sizeof *s);
    s->order = n_made;
    assert_int_equal(fair_enter(f, tenant, weight, priority, &s->lane), OK);
    fair_wait(f, s, now_us);
    return s;
}

static struct sequence *serve(struct fair *f, int64_t now_us, uint64_t cost)
{
    struct sequence *s = fair_next(f, now_us);
    if (!s) return NULL;
    fair_unwait(f, s);
    fair_charge(s->lane, cost);
    fair_leave(f, s->lane);
    return s;
}

static void begin(struct fair *f)
{
    n_made = 0;
    assert_int_equal(fair_init(f), OK);
}

static void shares_follow_weights_not_requests(void **state)
{
    struct fair f;
    uint32_t served[3] = {0};
    (void)state;
    begin(&f);
    for (int i = 0; i < 900; i++)
        wait_new(&f, 0, 1, 0, 0); /* a flood */
    for (int i = 0; i < 300; i++)
        wait_new(&f, 1, 1, 0, 0), wait_new(&f, 2, 2, 0, 0);
    for (int i = 0; i < 400; i++)
        served[serve(&f, 1, 100)->lane->tenant->id]++;
    assert_in_range(served[0], 99, 101);
    assert_in_range(served[1], 99, 101);
    assert_in_range(served[2], 199, 201);
    fair_fini(&f);
}

static void dear_requests_count_by_their_tokens(void **state)
{
    struct fair f;
    uint64_t cost[2] = {0};
    (void)state;
    begin(&f);
    for (int i = 0; i < 400; i++)
        wait_new(&f, 0, 1, 0, 0), wait_new(&f, 1, 1, 0, 0);
    for (int i = 0; i < 300; i++) {
        uint64_t tenant = fair_next(&f, 1)->lane->tenant->id, one = tenant ? 900 : 100;
        serve(&f, 1, one);
        cost[tenant] += one;
    }
    assert_true(cost[0] < cost[1] + 1000 && cost[1] < cost[0] + 1000);
    fair_fini(&f);
}

static void who_was_away_saved_nothing(void **state)
{
    struct fair f;
    uint32_t served[2] = {0};
    (void)state;
    begin(&f);
    for (int i = 0; i < 500; i++)
        wait_new(&f, 0, 1, 0, 0);
    for (int i = 0; i < 200; i++)
        serve(&f, 1, 100);
    for (int i = 0; i < 200; i++)
        wait_new(&f, 1, 1, 0, 2);
    for (int i = 0; i < 100; i++)
        served[serve(&f, 3, 100)->lane->tenant->id]++;
    assert_in_range(served[1], 49, 52); /* half, not all until it has caught up */
    fair_fini(&f);
}

static void classes_are_strict_until_somebody_starves(void **state)
{
    struct fair f;
    (void)state;
    begin(&f);
    struct sequence *low = wait_new(&f, 0, 1, 5, 0);
    for (int i = 0; i < 50; i++)
        wait_new(&f, 1, 1, -1, 1000);
    for (int i = 0; i < 20; i++)
        assert_int_equal(serve(&f, 2000, 1)->lane->priority, -1);
    assert_ptr_equal(serve(&f, FAIR_STARVE_US + 1, 1), low);
    assert_int_equal(serve(&f, FAIR_STARVE_US + 2, 1)->lane->priority, -1);
    fair_fini(&f);
}

static void one_tenants_requests_come_in_order_also_after_a_return(void **state)
{
    struct fair f;
    (void)state;
    begin(&f);
    struct sequence *a = wait_new(&f, 0, 1, 0, 0), *b = wait_new(&f, 0, 1, 0, 0),
                    *c = wait_new(&f, 0, 1, 0, 0);
    assert_ptr_equal(fair_next(&f, 1), a);
    fair_unwait(&f, a);
    assert_ptr_equal(fair_next(&f, 1), b);
    fair_unwait(&f, b);
    fair_wait(&f, a, 5); /* preempted: before those that came later */
    fair_wait(&f, b, 6);
    assert_ptr_equal(fair_next(&f, 7), a);
    fair_unwait(&f, a);
    fair_wait_urgent(&f, a, 8);
    fair_unwait(&f, b);
    fair_wait_urgent(&f, b, 9);
    assert_ptr_equal(f.by_age.first, a);
    assert_ptr_equal(f.by_age.last, c);
    fair_fini(&f);
}

static void passing_over_restores_the_heap(void **state)
{
    struct fair f;
    struct rand dice = rand_seeded(4);
    (void)state;
    begin(&f);
    for (uint32_t i = 0; i < 300; i++)
        wait_new(&f, rand_below(&dice, 20), 1, (int32_t)rand_below(&dice, 3), 0);
    for (uint32_t n_left = 300; n_left; n_left--) {
        struct sequence *first = fair_next(&f, 1), *s = first;
        for (uint32_t k = 0; s && k < 3; k++) {
            fair_skip(&f, s);
            s = fair_next(&f, 1);
            if (s) assert_true(s->lane->priority >= first->lane->priority);
        }
        fair_restore(&f);
        assert_ptr_equal(fair_next(&f, 1), first);
        serve(&f, 1, 1 + rand_below(&dice, 50));
        assert_int_equal(f.by_age.n, n_left - 1);
    }
    assert_null(fair_next(&f, 1));
    fair_fini(&f);
}

static void idle_tenants_are_forgotten(void **state)
{
    struct fair f;
    (void)state;
    begin(&f);
    for (uint64_t i = 0; i < 20000; i++) {
        n_made = 0;
        wait_new(&f, i, 1, 0, 0);
        serve(&f, 1, 1);
    }
    assert_true(f.n_tenants <= FAIR_TENANTS_IDLE_MAX + 1);
    fair_fini(&f);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(shares_follow_weights_not_requests),
        cmocka_unit_test(dear_requests_count_by_their_tokens),
        cmocka_unit_test(who_was_away_saved_nothing),
        cmocka_unit_test(classes_are_strict_until_somebody_starves),
        cmocka_unit_test(one_tenants_requests_come_in_order_also_after_a_return),
        cmocka_unit_test(passing_over_restores_the_heap),
        cmocka_unit_test(idle_tenants_are_forgotten),
    };
    if (mem_alloc_aligned(64, MANY * sizeof *pool, (void **)&pool)) return 1;
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    mem_free(pool);
    return failed;
}
