/* Goal: drafts change no token; a group's draft model is used while it pays and left alone while it
 * does not; what a result says of drafts is checked. Method: a rig whose false draft model guesses
 * right or wrong on purpose, with results that say steps and passes cost what the test wants. */
#include "rig.h"

enum { N_PROMPT = 12, N_OUT = 400, K = 4 };

static const struct engine_config config = {.n_groups = 1,
                                            .pipeline_depth = 2,
                                            .prefix_cache = true,
                                            .hash_salt = 5,
                                            .n_speculative_tokens = K};

struct costs { /* microseconds */
    uint32_t step, token, pass;
};
/* Seeds of requests by how often the false draft model is right: even ones, so that the model does
 * not repeat itself and prompt lookup finds little. */
enum { NEVER_RIGHT = 8, HALF_RIGHT = 2, ALWAYS_RIGHT = 6 };

static void open_rig(struct rig *rig, bool has_draft_model)
{
    struct group_info info = rig_info(512, 16);
    rig_open(rig, &config);
    info.draft_tokens_max = K;
    info.has_draft_model = has_draft_model;
    rig_up(rig, 0, info);
    rig->workers[0].has_draft_model = has_draft_model;
}

static struct rig_request *request(uint64_t id, uint64_t seed)
{
    struct rig_request *q = rig_request(id, N_PROMPT, N_OUT, id);
    q->request.sampling.seed = seed;
    return q;
}

static void submit(struct rig *rig, struct rig_request *q)
{
    if (engine_submit(rig->engine, &q->request, rig->now_us)) fail_msg("%s", err_detail());
}

/* Runs everything; returns the time that it took by the costs. */
static uint64_t run(struct rig *rig, struct costs c)
{
    uint64_t us = 0;
    engine_step(rig->engine, rig->now_us);
    while (rig->n_done[0] != rig->n_plans[0]) {
        struct step_result r = rig_compute(rig, 0);
        r.compute_us = r.n_tokens ? c.step + c.token * r.n_tokens : 1;
        r.draft_us = c.pass * r.draft_passes;
        r.draft_first_us = r.draft_passes ? c.pass : 0;
        us += r.compute_us + r.draft_us;
        rig->now_us += r.compute_us + r.draft_us;
        if (engine_result(rig->engine, 0, &r, rig->now_us)) fail_msg("%s", err_detail());
        engine_step(rig->engine, rig->now_us);
        engine_check(rig->engine);
    }
    return us;
}

struct outcome {
    uint64_t us, n_proposed, n_kept;
    int32_t tokens[8][N_OUT];
};

static void play(bool has_draft_model, uint64_t seed, uint32_t n, struct costs c,
                 struct outcome *out)
{
    struct rig rig;
    struct rig_request *q[8];
    struct engine_stats s;
    open_rig(&rig, has_draft_model);
    for (uint32_t i = 0; i < n; i++)
        submit(&rig, q[i] = request(i + 1, seed + 16 * i));
    out->us = run(&rig, c);
    engine_stats(rig.engine, &s);
    out->n_proposed = s.model_drafts_proposed;
    out->n_kept = s.model_drafts_accepted;
    assert_true(s.drafts_proposed >= s.model_drafts_proposed);
    assert_int_equal(s.blocks_held, 0);
    for (uint32_t i = 0; i < n; i++) {
        assert_int_equal(q[i]->n_tokens, N_OUT);
        memcpy(out->tokens[i], q[i]->tokens, sizeof out->tokens[i]);
        rig_free(q[i]);
    }
    rig_close(&rig);
}

static void same(const struct outcome *a, const struct outcome *b, uint32_t n)
{
    assert_memory_equal(a->tokens, b->tokens, n * sizeof a->tokens[0]);
}

static void good_and_cheap_drafts_save_time(void **state)
{
    static struct outcome plain, drafted;
    struct costs c = {.step = 10000, .token = 100, .pass = 1000};
    (void)state;
    for (uint32_t n = 1; n <= 8; n += 7) {
        play(false, ALWAYS_RIGHT, n, c, &plain);
        play(true, ALWAYS_RIGHT, n, c, &drafted);
        same(&plain, &drafted, n);
        assert_int_equal(plain.n_proposed, 0);
        assert_true(drafted.n_kept > (uint64_t)n * N_OUT / 2);
        /* four of five tokens are drafts; ideally 14.5 of 50.5 ms */
        assert_true(drafted.us * 2 < plain.us);
    }
}

static void half_good_drafts_are_short(void **state)
{
    static struct outcome plain, drafted;
    struct costs c = {.step = 10000, .token = 100, .pass = 1500};
    (void)state;
    play(false, HALF_RIGHT, 1, c, &plain);
    play(true, HALF_RIGHT, 1, c, &drafted);
    same(&plain, &drafted, 1);
    assert_true(drafted.us * 8 < plain.us * 7);
    assert_true(drafted.n_proposed < 3 * drafted.n_kept); /* and not four for every one */
}

/* Wrong drafts, drafts that cost more than the tokens, rows that cost as much as steps. */
static void drafts_that_do_not_pay_are_off(void **state)
{
    static const struct {
        uint64_t seed;
        struct costs costs;
        uint32_t n;
    } cases[] = {{NEVER_RIGHT, {10000, 100, 1000}, 1},
                 {NEVER_RIGHT, {10000, 100, 1000}, 8},
                 {ALWAYS_RIGHT, {10000, 100, 12000}, 1},
                 {ALWAYS_RIGHT, {0, 10000, 100}, 4}};
    static struct outcome plain, drafted;
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        play(false, cases[i].seed, cases[i].n, cases[i].costs, &plain);
        play(true, cases[i].seed, cases[i].n, cases[i].costs, &drafted);
        same(&plain, &drafted, cases[i].n);
        assert_true(drafted.n_proposed > 0);   /* it was tried */
        if (drafted.us * 100 > plain.us * 105) /* beginnings included */
            fail_msg("case %zu: %llu us and %llu without", i, (unsigned long long)drafted.us,
                     (unsigned long long)plain.us);
    }
}

/* Once off, what it costs is what the tries may cost. */
static void off_costs_at_most_two_percent(void **state)
{
    struct costs c = {.step = 10000, .token = 100, .pass = 1000};
    struct rig rig;
    uint64_t us[2] = {0};
    (void)state;
    for (int own = 0; own < 2; own++) {
        open_rig(&rig, own);
        for (uint64_t i = 1; i <= 6; i++) {
            struct rig_request *q = request(i, NEVER_RIGHT + 16 * i);
            submit(&rig, q);
            uint64_t took = run(&rig, c);
            if (i > 1) us[own] += took; /* the first one is how it learns */
            rig_free(q);
        }
        rig_close(&rig);
    }
    if (us[1] * 100 > us[0] * 102)
        fail_msg("%llu us and %llu without", (unsigned long long)us[1], (unsigned long long)us[0]);
}

/* When the draft model begins to be right (other texts, say), the tries find out. */
static void it_comes_back_when_it_pays(void **state)
{
    struct costs c = {.step = 10000, .token = 100, .pass = 1000};
    struct rig rig;
    struct engine_stats before, after;
    (void)state;
    open_rig(&rig, true);
    for (uint64_t i = 1; i <= 12; i++) {
        if (i == 4) engine_stats(rig.engine, &before);
        struct rig_request *q = request(i, (i <= 3 ? NEVER_RIGHT : ALWAYS_RIGHT) + 16 * i);
        submit(&rig, q);
        run(&rig, c);
        rig_free(q);
    }
    engine_stats(rig.engine, &after);
    assert_true(after.model_drafts_accepted - before.model_drafts_accepted > 3 * N_OUT);
    rig_close(&rig);
}

/* n > 1, stop ids and max_tokens in the middle of kept drafts, logprobs, scored prompts. */
static void every_kind_of_request_is_the_same(void **state)
{
    struct costs c = {.step = 10000, .token = 100, .pass = 500};
    struct rig_request *q[2][4];
    uint32_t n_tokens[2][4];
    (void)state;
    for (int own = 0; own < 2; own++) {
        struct rig rig;
        struct engine_stats s;
        open_rig(&rig, own);
        for (uint32_t i = 0; i < 4; i++) {
            q[own][i] = request(i + 1, ALWAYS_RIGHT + 16 * i);
            q[own][i]->request.max_tokens = 61 + i;
            submit(&rig, q[own][i]);
            run(&rig, c);
            if (i) continue;
            q[own][1] = NULL;
        }
        rig_free(q[own][0]);
        struct rig_request *stops = request(9, ALWAYS_RIGHT), *many = request(10, ALWAYS_RIGHT),
                           *scored = request(11, ALWAYS_RIGHT);
        stops->stop_ids[0] = q[own][3]->tokens[0];
        stops->request.sampling.stop_ids = stops->stop_ids;
        stops->request.sampling.n_stop_ids = 1;
        many->request.n_choices = 4;
        many->request.max_tokens = 33;
        scored->request.sampling.n_logprobs = 2;
        scored->request.sampling.n_prompt_logprobs = 1;
        struct rig_request *all[] = {stops, many, scored};
        for (int i = 0; i < 3; i++)
            submit(&rig, all[i]);
        run(&rig, c);
        for (int i = 0; i < 3; i++)
            n_tokens[own][i] = all[i]->n_tokens;
        assert_int_equal(scored->n_scored, N_PROMPT - 1);
        assert_int_equal(many->n_choice_tokens[3], 33);
        engine_stats(rig.engine, &s);
        assert_int_equal(s.model_drafts_proposed > 0, own);
        for (int i = 0; i < 3; i++)
            rig_free(all[i]);
        for (int i = 1; i < 4; i++)
            rig_free(q[own][i]);
        rig_close(&rig);
    }
    assert_memory_equal(n_tokens[0], n_tokens[1], 3 * sizeof(uint32_t));
}

/* The group is lost with drafts under way; another one without a draft model goes on. */
static void a_lost_group_costs_no_token(void **state)
{
    struct costs c = {.step = 10000, .token = 100, .pass = 500};
    static struct outcome plain;
    struct rig rig;
    (void)state;
    play(false, ALWAYS_RIGHT, 1, c, &plain);
    open_rig(&rig, true);
    struct rig_request *q = request(1, ALWAYS_RIGHT);
    submit(&rig, q);
    engine_step(rig.engine, rig.now_us);
    for (int i = 0; i < 60; i++) {
        struct step_result r = rig_compute(&rig, 0);
        r.compute_us = 1000;
        assert_int_equal(engine_result(rig.engine, 0, &r, rig.now_us), OK);
        engine_step(rig.engine, rig.now_us);
        if (i % 20 != 19) continue;
        engine_group_down(rig.engine, 0, rig.info[0].epoch);
        struct group_info info = rig.info[0];
        info.epoch++;
        info.has_draft_model = i == 39;
        rig_up(&rig, 0, info);
        rig.workers[0].has_draft_model = info.has_draft_model;
        engine_step(rig.engine, rig.now_us);
    }
    run(&rig, c);
    assert_int_equal(q->n_tokens, N_OUT);
    assert_memory_equal(q->tokens, plain.tokens[0], sizeof plain.tokens[0]);
    rig_free(q);
    rig_close(&rig);
}

/* Drafts of slots that were not asked for any, or more than were asked for. */
static void results_about_drafts_are_checked(void **state)
{
    (void)state;
    for (int wrong = 0; wrong < 3; wrong++) {
        struct rig rig;
        bool seen = false;
        open_rig(&rig, true);
        struct rig_request *q = request(1, ALWAYS_RIGHT);
        submit(&rig, q);
        engine_step(rig.engine, rig.now_us);
        for (int i = 0; i < 100 && !seen; i++) {
            struct step_result r = rig_compute(&rig, 0);
            r.compute_us = 1000;
            seen = r.n_drafted && r.drafted[0].to;
            if (seen && wrong == 0) r.drafted[0].to = K + 1;
            if (seen && wrong == 1) r.drafted[0].from = 99;
            if (seen && wrong == 2) r.drafted[0].to = 0; /* but its tokens are there */
            assert_int_equal(engine_result(rig.engine, 0, &r, rig.now_us), seen ? ERR_FORMAT : OK);
            engine_step(rig.engine, rig.now_us);
        }
        assert_true(seen);
        engine_group_down(rig.engine, 0, rig.info[0].epoch);
        engine_cancel(rig.engine, 1, -1, ENGINE_CANCEL_CLIENT);
        rig_free(q);
        rig_close(&rig);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(good_and_cheap_drafts_save_time),
        cmocka_unit_test(half_good_drafts_are_short),
        cmocka_unit_test(drafts_that_do_not_pay_are_off),
        cmocka_unit_test(off_costs_at_most_two_percent),
        cmocka_unit_test(it_comes_back_when_it_pays),
        cmocka_unit_test(every_kind_of_request_is_the_same),
        cmocka_unit_test(a_lost_group_costs_no_token),
        cmocka_unit_test(results_about_drafts_are_checked),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
