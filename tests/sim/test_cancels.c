/* Goal: a client may leave at any moment and nothing stays behind. Method: requests of every kind
 * cancelled at random moments, whole or by choice; at rest no block is held and no memory is left.
 * HEDDLE_CANCELS sets their number. */
#include "base/rand.h"
#include "unit/coordinator/engine/rig.h"

enum { ALIVE_MAX = 24 };

static struct rand dice;
static struct rig_request *alive[ALIVE_MAX];

static struct rig_request *draw(uint64_t id)
{
    struct rig_request *q = rig_request(id, 1 + (uint32_t)rand_below(&dice, 40),
                                        1 + (uint32_t)rand_below(&dice, 40), rand_below(&dice, 5));
    q->request.n_choices = rand_below(&dice, 4) ? 1 : 1 + (uint32_t)rand_below(&dice, 4);
    if (!rand_below(&dice, 12)) q->request.n_best_of = q->request.n_choices + 1;
    if (!rand_below(&dice, 12)) {
        q->request.beam_width = 3;
        q->request.n_best_of = 0;
        q->request.n_choices = 2;
    }
    q->request.tenant = rand_below(&dice, 4);
    q->request.sampling.seed = rand_next(&dice);
    return q;
}

/* Those that ended make room for new ones. */
static void renew(struct rig *rig, uint64_t *id)
{
    for (int i = 0; i < ALIVE_MAX; i++) {
        if (alive[i] && alive[i]->last) {
            rig_free(alive[i]);
            alive[i] = NULL;
        }
        if (alive[i] || rand_below(&dice, 3)) continue;
        alive[i] = draw((*id)++);
        if (engine_submit(rig->engine, &alive[i]->request, rig->now_us))
            fail_msg("%s", err_detail());
    }
}

static void step(struct rig *rig)
{
    engine_step(rig->engine, rig->now_us++);
    if (rig->n_done[0] == rig->n_plans[0] || !rand_below(&dice, 3)) return;
    struct step_result r = rig_compute(rig, 0);
    if (engine_result(rig->engine, 0, &r, rig->now_us)) fail_msg("%s", err_detail());
}

static void cancels_leave_nothing(void **state)
{
    struct rig rig;
    struct engine_config config = {.n_groups = 1,
                                   .pipeline_depth = 2,
                                   .prefix_cache = true,
                                   .hash_salt = 3,
                                   .n_speculative_tokens = 4};
    const char *count = getenv("HEDDLE_CANCELS");
    uint64_t n_want = count ? strtoull(count, NULL, 10) : 60000, n = 0, id = 1;
    (void)state;
    int64_t live = mem_live();
    dice = rand_seeded(17);
    rig_open(&rig, &config);
    struct group_info info = rig_info(110, 12);
    info.draft_tokens_max = 4;
    info.n_host_blocks = 20;
    rig_up(&rig, 0, info);
    while (n < n_want) {
        renew(&rig, &id);
        step(&rig);
        for (int i = 0; i < ALIVE_MAX; i++) {
            if (!alive[i] || alive[i]->last || rand_below(&dice, 6)) continue;
            int32_t choice = rand_below(&dice, 3) ? -1 : (int32_t)rand_below(&dice, 5);
            engine_cancel(rig.engine, alive[i]->request.id, choice,
                          rand_below(&dice, 2) ? ENGINE_CANCEL_CLIENT : ENGINE_CANCEL_STOP);
            n++;
        }
        if (n % 64 == 0) engine_check(rig.engine);
    }
    rig_run(&rig);
    struct engine_stats s;
    engine_stats(rig.engine, &s);
    printf("%llu cancels, %llu requests\n", (unsigned long long)n, (unsigned long long)id);
    assert_int_equal(s.blocks_held, 0);
    assert_int_equal(s.n_running + s.n_waiting + s.n_swapped, 0);
    for (int i = 0; i < ALIVE_MAX; i++)
        if (alive[i]) rig_free(alive[i]);
    rig_close(&rig);
    assert_int_equal(mem_live(), live);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(cancels_leave_nothing)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
