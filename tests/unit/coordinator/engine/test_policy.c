/* Goal: what the scheduler promises to those who share it: weights, classes, progress, deadlines, a
 * queue whose end is told truly, groups that are forgotten at once. Method: the rig of false
 * workers; promises are measured in tokens and steps, never in time. */
#include "coordinator/engine/state.h"
#include "rig.h"

static const struct engine_config plain = {
    .n_groups = 1, .pipeline_depth = 2, .prefix_cache = true, .hash_salt = 5};

static void submit(struct rig *rig, struct rig_request *q)
{
    enum err e = engine_submit(rig->engine, &q->request, rig->now_us);
    if (e) fail_msg("%s", err_detail());
}

/* Two tenants with endless work and weights 1 and 3: tokens come out as 1 to 3. */
static void tenants_get_tokens_by_their_weights(void **state)
{
    struct rig rig;
    enum { EACH = 60 };
    struct rig_request *q[2 * EACH];
    uint64_t served[2] = {0};
    (void)state;
    rig_open(&rig, &plain);
    rig_up(&rig, 0, rig_info(200, 4));
    for (uint32_t i = 0; i < 2 * EACH; i++) {
        q[i] = rig_request(i + 1, 20, 20, i);
        q[i]->request.tenant = i % 2;
        q[i]->request.tenant_weight = i % 2 ? 3 : 1;
        submit(&rig, q[i]);
    }
    for (bool dry = false; !dry;) { /* until one of them has nothing waiting any more */
        rig_turn(&rig);
        uint32_t n_left[2] = {0};
        for (uint32_t i = 0; i < 2 * EACH; i++)
            n_left[i % 2] += !q[i]->last;
        dry = n_left[0] < 4 || n_left[1] < 4;
    }
    for (uint32_t i = 0; i < 2 * EACH; i++)
        served[i % 2] += q[i]->n_tokens;
    assert_true(served[1] * 10 > served[0] * 25 && served[1] * 10 < served[0] * 35);
    rig_run(&rig);
    for (uint32_t i = 0; i < 2 * EACH; i++)
        rig_free(q[i]);
    rig_close(&rig);
}

/* The high class never ends; who waits in the low one gets its turn all the same. */
static void no_class_is_starved(void **state)
{
    struct rig rig;
    uint64_t id = 2;
    struct rig_request *high[4] = {0};
    (void)state;
    rig_open(&rig, &plain);
    rig_up(&rig, 0, rig_info(64, 2));
    struct rig_request *low = rig_request(1, 8, 5, 1);
    low->request.priority = 5;
    for (int turn = 0; turn < 400 && !low->last; turn++) {
        for (int i = 0; i < 4; i++) {
            if (high[i] && !high[i]->last) continue;
            if (high[i]) rig_free(high[i]);
            id++;
            high[i] = rig_request(id, 8, 10, id);
            submit(&rig, high[i]);
        }
        if (turn == 10) submit(&rig, low);
        if (turn == 200) {
            assert_int_equal(low->n_tokens, 0); /* classes are strict before that */
            rig.now_us += FAIR_STARVE_US;
        }
        rig_turn(&rig);
    }
    assert_true(low->last);
    rig_run(&rig);
    for (int i = 0; i < 4; i++)
        rig_free(high[i]);
    rig_free(low);
    rig_close(&rig);
}

/* Twelve that want four times the memory there is: everyone ends, and little is done twice. */
static void a_starved_cache_does_not_thrash(void **state)
{
    struct rig rig;
    struct rig_request *q[12];
    struct engine_stats s;
    (void)state;
    rig_open(&rig, &plain);
    rig_up(&rig, 0, rig_info(60, 12)); /* 240 tokens; 12 x 80 are wanted */
    for (uint32_t i = 0; i < 12; i++) {
        q[i] = rig_request(i + 1, 20, 60, 70 + i);
        submit(&rig, q[i]);
    }
    rig_run(&rig);
    engine_stats(rig.engine, &s);
    for (uint32_t i = 0; i < 12; i++) {
        assert_int_equal(q[i]->n_tokens, 60);
        rig_free(q[i]);
    }
    assert_true(s.n_preemptions > 0);
    assert_true(s.n_preemptions <= 24);
    assert_true(s.n_recomputed_tokens * 2 < s.n_prompt_tokens + s.n_generated_tokens);
    rig_close(&rig);
}

/* Victims: the lowest class first, in it the newest. */
static void the_newest_of_the_lowest_class_gives_way(void **state)
{
    struct rig rig;
    struct rig_request *q[4];
    static const int32_t classes[4] = {1, 0, 1, 0};
    uint32_t first = UINT32_MAX;
    (void)state;
    rig_open(&rig, &plain);
    rig_up(&rig, 0, rig_info(40, 4)); /* 160 tokens; 4 x 70 are wanted */
    for (uint32_t i = 0; i < 4; i++) {
        q[i] = rig_request(i + 1, 20, 50, 30 + i);
        q[i]->request.priority = classes[i];
        submit(&rig, q[i]);
    }
    struct engine_stats s = {0};
    while (!s.n_preemptions && rig_turn(&rig))
        engine_stats(rig.engine, &s);
    for (uint32_t i = 0; i < 4; i++) {
        const struct job *job = job_find(rig.engine, i + 1);
        if (job && job->sequences[0]->state != SEQUENCE_RUNNING) first = i;
    }
    assert_int_equal(first, 2);
    rig_run(&rig);
    for (uint32_t i = 0; i < 4; i++) {
        assert_int_equal(q[i]->n_tokens, 50);
        rig_free(q[i]);
    }
    rig_close(&rig);
}

/* A step as a slow machine answers it. */
static void slow_turn(struct rig *rig, int64_t step_us)
{
    engine_step(rig->engine, rig->now_us);
    if (rig->n_done[0] == rig->n_plans[0]) return;
    struct step_result r = rig_compute(rig, 0);
    r.compute_us = (uint32_t)step_us;
    rig->now_us += step_us;
    assert_int_equal(engine_result(rig->engine, 0, &r, rig->now_us), OK);
    engine_step(rig->engine, rig->now_us);
}

/* The queue's speed is known after a while: deadlines that it cannot meet are refused at once, and
 * who is refused for room is told when there will be some. */
static void waiting_times_are_told_from_the_queue(void **state)
{
    struct rig rig;
    enum { N = 40 };
    struct rig_request *q[N];
    struct engine_config c = plain;
    (void)state;
    c.n_queued_max = N;
    rig_open(&rig, &c);
    struct group_info info = rig_info(200, 1);
    rig_up(&rig, 0, info);
    for (uint32_t i = 0; i < N; i++) {
        q[i] = rig_request(i + 1, 40, 4, i);
        submit(&rig, q[i]);
    }
    struct rig_request *late = rig_request(1000, 40, 4, 99), *more = rig_request(1001, 40, 4, 98);
    late->request.deadline_us = rig.now_us + 2000000;
    for (int i = 0; i < 40; i++)
        slow_turn(&rig, 640000); /* 40 tokens in 0.64 s: 16 ms each, 5 steps a request: 3 s */
    const struct engine_limits *l = &rig.engine->limits;
    assert_true(l->n_queued > 20 && l->n_queued < N);
    late->request.deadline_us = rig.now_us + 2000000;
    assert_int_equal(engine_submit(rig.engine, &late->request, rig.now_us), ERR_DEADLINE);
    late->request.deadline_us = rig.now_us + 3600000000;
    submit(&rig, late);
    uint32_t n_free = N - l->n_queued;
    assert_int_equal(limits_retry_after_s(l, n_free, 0), 0);
    uint32_t one = limits_retry_after_s(l, n_free + 1, 0),
             ten = limits_retry_after_s(l, n_free + 10, 0);
    assert_in_range(one, 2, 5);
    assert_in_range(ten, 20, 45);
    more->request.n_choices = n_free + 10;
    assert_int_equal(engine_submit(rig.engine, &more->request, rig.now_us), ERR_FULL);
    char words[32];
    snprintf(words, sizeof words, "about %u s", ten);
    assert_non_null(strstr(err_detail(), words));
    rig_destroy(&more->request);
    rig_free(more);
    rig_run(&rig);
    rig_free(late);
    for (uint32_t i = 0; i < N; i++)
        rig_free(q[i]);
    rig_close(&rig);
}

/* Its prefix lies on group 0; that one goes, and in the same step it runs on group 1 from its
 * beginning: nothing of the lost cache is believed. */
static void a_group_that_leaves_is_forgotten_in_the_same_step(void **state)
{
    struct rig rig;
    struct engine_config c = plain;
    struct engine_stats s;
    (void)state;
    c.n_groups = 2;
    rig_open(&rig, &c);
    rig_up(&rig, 0, rig_info(128, 8));
    struct rig_request *a = rig_request(1, 200, 3, 7), *b = rig_request(2, 200, 50, 7),
                       *d = rig_request(3, 200, 3, 7);
    submit(&rig, a);
    rig_run(&rig);
    rig_up(&rig, 1, rig_info(128, 8));
    submit(&rig, b);
    for (int i = 0; i < 6; i++)
        rig_turn(&rig);
    assert_int_equal(b->n_cached, 196); /* found on group 0, although group 1 is idle */
    assert_int_equal(rig.n_plans[1], 0);
    engine_group_down(rig.engine, 0, 1);
    rig.n_plans[0] = rig.n_done[0] = 0;
    engine_stats(rig.engine, &s);
    assert_int_equal(s.blocks_total, 128);
    assert_int_equal(s.blocks_cached + s.blocks_held, 0);
    submit(&rig, d);
    assert_true(engine_step(rig.engine, rig.now_us));
    assert_int_equal(rig.n_plans[0], 0);
    assert_true(rig.n_plans[1] >= 1);
    rig_compute(&rig, 1);
    assert_int_equal(rig.seen.n_opens, 1);
    assert_int_equal(rig.seen.opens[0].n_computed, 0);
    engine_group_down(rig.engine, 1, 1); /* its answer was thrown away above */
    rig.n_plans[1] = rig.n_done[1] = 0;
    struct group_info info = rig_info(128, 8);
    info.epoch = 2;
    rig_up(&rig, 0, info);
    rig_run(&rig);
    assert_int_equal(b->n_tokens, 50);
    rig_free(a), rig_free(b), rig_free(d);
    rig_close(&rig);
}

/* A prefix's group is left when it is far busier than the others. */
static void load_outweighs_a_prefix(void **state)
{
    struct rig rig;
    struct engine_config c = plain;
    enum { N = 24 };
    struct rig_request *q[N];
    (void)state;
    c.n_groups = 2;
    rig_open(&rig, &c);
    rig_up(&rig, 0, rig_info(400, 24));
    rig_up(&rig, 1, rig_info(400, 24));
    for (uint32_t i = 0; i < N; i++) { /* the same prefix for all, all at once */
        q[i] = rig_request(i + 1, 40, 40, 7);
        submit(&rig, q[i]);
        rig_turn(&rig);
    }
    const struct group *one = rig.engine->groups[0], *two = rig.engine->groups[1];
    assert_true(one->running.n >= N / 4 && two->running.n >= N / 4);
    rig_run(&rig);
    for (uint32_t i = 0; i < N; i++)
        rig_free(q[i]);
    rig_close(&rig);
}

/* The first in the line wants the group that holds its prefix and is full; the one behind it, of
 * the same tenant, runs on the other group at once. */
static void nobody_waits_behind_one_who_waits_for_another_group(void **state)
{
    struct rig rig;
    struct engine_config c = plain;
    (void)state;
    c.n_groups = 2;
    rig_open(&rig, &c);
    rig_up(&rig, 0, rig_info(128, 1));
    struct rig_request *a = rig_request(1, 400, 60, 7), *b = rig_request(2, 400, 5, 7),
                       *d = rig_request(3, 20, 5, 8);
    submit(&rig, a);
    for (int i = 0; i < 12; i++)
        rig_turn(&rig); /* it has the only slot of group 0 and its whole prompt is computed */
    struct group_info info = rig_info(128, 1);
    info.step_tokens_max = 64;
    rig_up(&rig, 1, info);
    submit(&rig, b);
    submit(&rig, d);
    rig_turn(&rig);
    rig_turn(&rig);
    const struct job *job = job_find(rig.engine, 3);
    assert_true(d->n_tokens > 0 || (job && job->sequences[0]->state == SEQUENCE_RUNNING &&
                                    job->sequences[0]->group == 1));
    rig_run(&rig);
    assert_int_equal(a->n_tokens + b->n_tokens + d->n_tokens, 70);
    rig_free(a), rig_free(b), rig_free(d);
    rig_close(&rig);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(tenants_get_tokens_by_their_weights),
        cmocka_unit_test(no_class_is_starved),
        cmocka_unit_test(a_starved_cache_does_not_thrash),
        cmocka_unit_test(the_newest_of_the_lowest_class_gives_way),
        cmocka_unit_test(waiting_times_are_told_from_the_queue),
        cmocka_unit_test(a_group_that_leaves_is_forgotten_in_the_same_step),
        cmocka_unit_test(load_outweighs_a_prefix),
        cmocka_unit_test(nobody_waits_behind_one_who_waits_for_another_group),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
