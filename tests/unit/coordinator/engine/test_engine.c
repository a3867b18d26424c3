/* Goal: the rules of the engine one by one. Method: a rig of false workers driven by hand, tokens
 * compared with a direct computation; what the simulator does at random is done here on purpose. */
#include "rig.h"

static const struct engine_config plain = {
    .n_groups = 1, .pipeline_depth = 2, .prefix_cache = true, .hash_salt = 5};

static void submit(struct rig *rig, struct rig_request *q)
{
    enum err e = engine_submit(rig->engine, &q->request, rig->now_us);
    if (e) fail_msg("%s", err_detail());
}

static void one_request_is_computed(void **state)
{
    struct rig rig;
    int32_t prompt[21];
    (void)state;
    rig_open(&rig, &plain);
    rig_up(&rig, 0, rig_info(64, 8));
    struct rig_request *q = rig_request(1, 21, 30, 3);
    memcpy(prompt, q->request.tokens, sizeof prompt);
    submit(&rig, q);
    rig_run(&rig);
    assert_int_equal(q->n_tokens, 30);
    assert_int_equal(q->finish, FINISH_LENGTH);
    rig_check_tokens(q, prompt, 21, 2);
    rig_free(q);
    rig_close(&rig);
}

static void the_pipeline_holds_two_plans_and_decode_is_bytes(void **state)
{
    struct rig rig;
    (void)state;
    rig_open(&rig, &plain);
    rig_up(&rig, 0, rig_info(64, 8));
    struct rig_request *q = rig_request(1, 5, 60, 3);
    submit(&rig, q);
    engine_step(rig.engine, rig.now_us);
    assert_int_equal(rig.n_plans[0], 2); /* the second before the first is answered */
    rig_turn(&rig);
    for (int i = 0; i < 12; i++)
        rig_turn(&rig);
    struct step_result r = rig_compute(&rig, 0);
    assert_int_equal(rig.seen.n_runs + rig.seen.n_opens + rig.seen.n_closes, 0);
    assert_int_equal(r.n_tokens, 1);
    assert_int_equal(engine_result(rig.engine, 0, &r, rig.now_us), OK);
    rig_run(&rig);
    assert_int_equal(q->n_tokens, 60);
    rig_free(q);
    rig_close(&rig);
}

/* The stop is found one step late: the token after it was computed and must not be heard. */
static void a_stop_ends_and_the_token_after_it_is_dropped(void **state)
{
    struct rig rig;
    struct engine_stats s;
    int32_t prompt[9];
    (void)state;
    rig_open(&rig, &plain);
    rig_up(&rig, 0, rig_info(64, 8));
    struct rig_request *a = rig_request(1, 9, 40, 3);
    memcpy(prompt, a->request.tokens, sizeof prompt);
    submit(&rig, a);
    rig_run(&rig);
    struct rig_request *b = rig_request(1, 9, 40, 3);
    b->stop_ids[0] = a->tokens[10];
    b->request.sampling.stop_ids = b->stop_ids;
    b->request.sampling.n_stop_ids = 1;
    uint32_t n_want = 1;
    while (a->tokens[n_want - 1] != b->stop_ids[0])
        n_want++;
    submit(&rig, b);
    rig_run(&rig);
    assert_int_equal(b->finish, FINISH_STOP);
    assert_int_equal(b->stop_token, b->stop_ids[0]);
    assert_int_equal(b->n_tokens, n_want);
    assert_memory_equal(a->tokens, b->tokens, n_want * sizeof(int32_t));
    engine_stats(rig.engine, &s);
    assert_int_equal(s.blocks_held, 0);
    rig_free(a);
    rig_free(b);
    rig_close(&rig);
}

static void a_prefix_is_found_but_never_the_last_token(void **state)
{
    struct rig rig;
    (void)state;
    rig_open(&rig, &plain);
    rig_up(&rig, 0, rig_info(64, 8));
    struct rig_request *a = rig_request(1, 16, 1, 3), *b = rig_request(2, 16, 1, 3),
                       *c = rig_request(3, 18, 1, 3);
    struct rig_request *salted = rig_request(4, 16, 1, 3), *declined = rig_request(5, 16, 1, 3);
    salted->request.cache_salt = 77;
    declined->request.no_prefix_cache = true;
    struct rig_request *all[] = {a, b, c, salted, declined};
    const uint32_t found[] = {0, 12, 16, 0,
                              0}; /* blocks of 4; 16 tokens: the last block is computed again */
    for (int i = 0; i < 5; i++) {
        submit(&rig, all[i]);
        rig_run(&rig);
        assert_int_equal(all[i]->n_cached, found[i]);
        rig_free(all[i]);
    }
    rig_close(&rig);
}

static void choices_share_the_prompt_by_a_fork(void **state)
{
    struct rig rig;
    struct engine_stats s;
    (void)state;
    rig_open(&rig, &plain);
    rig_up(&rig, 0, rig_info(64, 8));
    struct rig_request *q = rig_request(1, 22, 9, 3);
    q->request.n_choices = 4;
    submit(&rig, q);
    rig_run(&rig);
    engine_stats(rig.engine, &s);
    assert_int_equal(s.n_forks, 3);
    assert_int_equal(s.n_cached_tokens, 3 * 21);
    for (int i = 0; i < 4; i++)
        assert_int_equal(q->n_choice_tokens[i], 9);
    assert_int_equal(q->n_ended, 4);
    rig_free(q);
    rig_close(&rig);
}

static void full_queues_and_long_prompts_are_refused_with_numbers(void **state)
{
    struct rig rig;
    struct engine_config c = plain;
    (void)state;
    c.n_queued_max = 3;
    c.n_queued_tokens_max = 100;
    rig_open(&rig, &c);
    struct rig_request *q = rig_request(1, 8, 4, 1);
    assert_int_equal(engine_submit(rig.engine, &q->request, 1), ERR_NOT_READY);
    rig_up(&rig, 0, rig_info(16, 8)); /* 64 tokens */
    struct rig_request *long_one = rig_request(2, 64, 1, 1);
    assert_int_equal(engine_submit(rig.engine, &long_one->request, 1), ERR_TOO_LONG);
    assert_non_null(strstr(err_detail(), "64"));
    assert_non_null(strstr(err_detail(), "63"));
    q->request.n_choices = 4;
    assert_int_equal(engine_submit(rig.engine, &q->request, 1), ERR_FULL);
    q->request.n_choices = 3; /* a choice counts as one */
    submit(&rig, q);
    struct rig_request *more = rig_request(3, 8, 4, 1);
    assert_int_equal(engine_submit(rig.engine, &more->request, 1), ERR_FULL);
    assert_int_equal(engine_submit(rig.engine, &q->request, 1), ERR_FULL);
    rig_run(&rig);
    submit(&rig, more);
    rig_run(&rig);
    struct rig_request *wide = rig_request(4, 60, 1, 1);
    wide->request.n_choices = 2;
    assert_int_equal(engine_submit(rig.engine, &wide->request, 1), ERR_FULL); /* by tokens */
    struct engine_stats s;
    engine_stats(rig.engine, &s);
    assert_int_equal(s.n_rejected_full, 4);
    rig_destroy(&wide->request);
    rig_destroy(&long_one->request);
    rig_free(wide), rig_free(long_one), rig_free(q), rig_free(more);
    rig_close(&rig);
}

static void a_passed_deadline_is_refused_and_one_in_the_queue_ends(void **state)
{
    struct rig rig;
    (void)state;
    rig_open(&rig, &plain);
    rig_up(&rig, 0, rig_info(64, 8));
    struct rig_request *late = rig_request(1, 8, 4, 1), *soon = rig_request(2, 8, 4, 1);
    late->request.deadline_us = rig.now_us;
    assert_int_equal(engine_submit(rig.engine, &late->request, rig.now_us), ERR_DEADLINE);
    soon->request.deadline_us = rig.now_us + 500;
    submit(&rig, soon);
    assert_int_equal(engine_wake_us(rig.engine), rig.now_us + 500);
    engine_step(rig.engine, rig.now_us + 501);
    assert_true(soon->destroyed);
    assert_int_equal(soon->error, ERR_DEADLINE);
    rig_destroy(&late->request);
    rig_free(late), rig_free(soon);
    rig_close(&rig);
}

static void wrong_results_are_refused_and_late_ones_ignored(void **state)
{
    struct rig rig;
    (void)state;
    for (int kind = 0; kind < 6; kind++) {
        rig_open(&rig, &plain);
        rig_up(&rig, 0, rig_info(64, 8));
        struct rig_request *q = rig_request(1, 9, 40, 3);
        submit(&rig, q);
        rig_turn(&rig);
        struct step_result r = rig_compute(&rig, 0), foreign = r;
        foreign.epoch = 99;
        assert_int_equal(engine_result(rig.engine, 0, &foreign, rig.now_us),
                         OK); /* another epoch: nothing */
        uint32_t n_before = q->n_tokens;
        if (kind == 0) r.tokens[0].token = SIM_VOCABULARY;
        if (kind == 1) r.tokens[0].slot = 8;
        if (kind == 2) r.n_tokens = 0;
        if (kind == 3) r.step++;
        if (kind == 4) r.tokens[0].token = -1;
        enum err e = engine_result(rig.engine, 0, &r, rig.now_us);
        assert_int_equal(e, kind == 5 ? OK : ERR_FORMAT);
        assert_int_equal(q->n_tokens,
                         n_before + (kind == 5)); /* nothing of a wrong one is believed */
        if (kind == 5) {
            assert_int_equal(engine_result(rig.engine, 0, &r, rig.now_us), OK); /* twice: nothing */
            assert_int_equal(q->n_tokens, n_before + 1);
        }
        struct group_info again = rig_info(64, 8);
        engine_group_down(rig.engine, 0, 1);
        again.epoch = 2;
        rig_up(&rig, 0, again);
        rig_run(&rig);
        assert_int_equal(q->n_tokens, 40);
        rig_free(q);
        rig_close(&rig);
    }
}

static void a_lost_group_costs_no_token(void **state)
{
    struct rig rig;
    int32_t prompt[15];
    (void)state;
    for (uint32_t n_turns = 0; n_turns < 20; n_turns++) {
        struct engine_config c = plain;
        c.n_groups = 2;
        rig_open(&rig, &c);
        rig_up(&rig, 0, rig_info(64, 8));
        struct rig_request *q = rig_request(1, 15, 20, 3);
        memcpy(prompt, q->request.tokens, sizeof prompt);
        submit(&rig, q);
        for (uint32_t i = 0; i < n_turns; i++)
            rig_turn(&rig);
        rig_up(&rig, 1, rig_info(64, 8));
        engine_group_down(rig.engine, 0, 1);
        rig.n_plans[0] = rig.n_done[0] = 0;
        rig_run(&rig);
        assert_int_equal(q->n_tokens, 20);
        rig_check_tokens(q, prompt, 15, 2);
        rig_free(q);
        rig_close(&rig);
    }
}

static void a_group_that_does_not_answer_is_reported_once(void **state)
{
    struct rig rig;
    struct engine_config c = plain;
    (void)state;
    c.step_timeout_us = 1000;
    rig_open(&rig, &c);
    rig_up(&rig, 0, rig_info(64, 8));
    struct rig_request *q = rig_request(1, 9, 5, 3);
    submit(&rig, q);
    engine_step(rig.engine, rig.now_us);
    assert_int_equal(engine_wake_us(rig.engine), rig.now_us + 1000);
    engine_step(rig.engine, rig.now_us + 999);
    assert_int_equal(rig.n_failed, 0);
    engine_step(rig.engine, rig.now_us + 1000);
    engine_step(rig.engine, rig.now_us + 2000);
    assert_int_equal(rig.n_failed, 1);
    engine_cancel(rig.engine, 1, -1, ENGINE_CANCEL_CLIENT);
    assert_int_equal(q->finish, FINISH_CANCELLED);
    rig_free(q);
    rig_close(&rig);
}

/* The newest gives way, is computed again, and the older one never rests for it twice. */
static void preemption_takes_the_newest_and_keeps_its_tokens(void **state)
{
    struct rig rig;
    struct engine_stats s;
    int32_t prompts[3][24];
    struct rig_request *q[3];
    (void)state;
    for (int swap = 0; swap < 2; swap++) {
        rig_open(&rig, &plain);
        struct group_info info = rig_info(24, 8); /* 96 tokens for three that want 24 + 40 each */
        info.n_host_blocks = swap ? 64 : 0;
        rig_up(&rig, 0, info);
        for (uint32_t i = 0; i < 3; i++) {
            q[i] = rig_request(i + 1, 20, 40, i + 40);
            memcpy(prompts[i], q[i]->request.tokens, 20 * sizeof(int32_t));
            submit(&rig, q[i]);
        }
        rig_run(&rig);
        engine_stats(rig.engine, &s);
        assert_true(s.n_preemptions >= 1 && s.n_preemptions <= 6);
        for (uint32_t i = 0; i < 3; i++) {
            assert_int_equal(q[i]->n_tokens, 40);
            rig_check_tokens(q[i], prompts[i], 20, 2 * (i + 1));
            rig_free(q[i]);
        }
        rig_close(&rig);
    }
}

/* The same load; blocks that are slow to copy are computed again, quick ones are swapped. */
static void what_costs_less_decides_between_swapping_and_computing(void **state)
{
    (void)state;
    for (int slow = 0; slow < 2; slow++) {
        struct rig rig;
        struct engine_stats s;
        struct rig_request *q[3];
        rig_open(&rig, &plain);
        rig.compute_us = 50000;
        struct group_info info = rig_info(24, 8);
        info.n_host_blocks = 64;
        info.save_ns = info.load_ns = slow ? 400000000 : 1000; /* a token is said to take ~1 ms */
        rig_up(&rig, 0, info);
        for (uint32_t i = 0; i < 3; i++)
            submit(&rig, q[i] = rig_request(i + 1, 40, 40, i + 40));
        rig_run(&rig);
        engine_stats(rig.engine, &s);
        assert_true(s.n_preemptions > 0);
        assert_int_equal(s.n_swaps_out > 0, !slow);
        assert_int_equal(s.n_swaps_in, s.n_swaps_out);
        assert_int_equal(s.n_saves > 0, !slow);
        for (uint32_t i = 0; i < 3; i++)
            rig_free(q[i]);
        rig_close(&rig);
    }
}

/* A prompt that the device has forgotten comes back from the host: hits, and no token computed. */
static void what_the_device_forgets_is_found_on_the_host(void **state)
{
    struct rig rig;
    struct engine_stats s;
    struct rig_request *q[3];
    int32_t prompt[40];
    (void)state;
    rig_open(&rig, &plain);
    struct group_info info = rig_info(16, 4); /* 64 tokens: not two prompts of 40 */
    info.n_host_blocks = 32;
    rig_up(&rig, 0, info);
    for (uint32_t i = 0; i < 3; i++) {
        q[i] = rig_request(i + 1, 40, 2, i == 1 ? 8 : 7);
        if (i == 2) memcpy(q[2]->request.tokens, prompt, sizeof prompt);
        memcpy(prompt, q[i]->request.tokens, i ? 0 : sizeof prompt);
        submit(&rig, q[i]);
        rig_run(&rig);
    }
    engine_stats(rig.engine, &s);
    assert_int_equal(q[1]->n_cached, 0);
    assert_int_equal(q[2]->n_cached, 36); /* nine blocks of four: the last token is always computed */
    assert_true(s.n_hit_tokens_host > 0);
    assert_int_equal(s.n_loads * 4, s.n_hit_tokens_host);
    assert_int_equal(s.n_hit_tokens_disk, 0);
    for (uint32_t i = 0; i < 3; i++)
        rig_free(q[i]);
    rig_close(&rig);
}

static void a_higher_class_takes_the_slot_of_a_lower_one(void **state)
{
    struct rig rig;
    (void)state;
    rig_open(&rig, &plain);
    rig_up(&rig, 0, rig_info(64, 1));
    struct rig_request *low = rig_request(1, 8, 100, 1), *high = rig_request(2, 8, 5, 2);
    low->request.priority = 1;
    submit(&rig, low);
    for (int i = 0; i < 10; i++)
        rig_turn(&rig);
    submit(&rig, high);
    for (int i = 0; i < 20 && !high->last; i++)
        rig_turn(&rig);
    assert_true(high->last);
    assert_false(low->last);
    rig_run(&rig);
    assert_int_equal(low->n_tokens, 100);
    rig_free(low), rig_free(high);
    rig_close(&rig);
}

static void a_window_gives_blocks_back_while_it_slides(void **state)
{
    struct rig rig;
    struct engine_stats s;
    int32_t prompt[10];
    (void)state;
    rig_open(&rig, &plain);
    struct group_info info = rig_info(64, 4);
    info.window = 8;
    rig_up(&rig, 0, info);
    struct rig_request *q = rig_request(1, 10, 150, 3);
    memcpy(prompt, q->request.tokens, sizeof prompt);
    submit(&rig, q);
    uint64_t most = 0;
    while (rig_turn(&rig)) {
        engine_stats(rig.engine, &s);
        if (s.blocks_held > most) most = s.blocks_held;
    }
    assert_int_equal(q->n_tokens, 150);
    assert_true(most <= 7); /* 8 tokens of window, those in flight, not 40 blocks */
    rig_check_tokens(q, prompt, 10, 2);
    rig_free(q);
    rig_close(&rig);
}

static void drafts_change_no_token_and_save_steps(void **state)
{
    uint64_t n_sent[2];
    struct rig_request *q[2];
    (void)state;
    for (int on = 0; on < 2; on++) {
        struct rig rig;
        struct engine_config c = plain;
        c.n_speculative_tokens = on ? 8 : 0;
        rig_open(&rig, &c);
        struct group_info info = rig_info(64, 8);
        info.draft_tokens_max = 8;
        rig_up(&rig, 0, info);
        q[on] = rig_request(1, 12, 200, 3);
        q[on]->request.sampling.seed = 1; /* odd: the model repeats itself */
        submit(&rig, q[on]);
        rig_run(&rig);
        n_sent[on] = rig.n_sent;
        struct engine_stats s;
        engine_stats(rig.engine, &s);
        assert_int_equal(s.drafts_accepted > 50, on);
        rig_close(&rig);
    }
    assert_int_equal(q[0]->n_tokens, 200);
    assert_memory_equal(q[0]->tokens, q[1]->tokens, 200 * sizeof(int32_t));
    assert_true(n_sent[1] * 10 < n_sent[0] * 9);
    rig_free(q[0]), rig_free(q[1]);
}

/* The first step has nobody to hold up and takes what fits; beside the one that decodes then, later
 * prompts come in pieces; when it has ended, the rest comes at once. */
static void prompts_come_in_pieces_beside_decodes(void **state)
{
    struct rig rig;
    (void)state;
    rig_open(&rig, &plain);
    struct group_info info = rig_info(128, 8);
    info.step_prompt_max = 6;
    rig_up(&rig, 0, info);
    struct rig_request *decodes = rig_request(1, 50, 20, 3), *late = rig_request(2, 150, 2, 5);
    submit(&rig, decodes);
    rig_turn(&rig);
    assert_int_equal(rig.seen.n_runs, 1);
    assert_int_equal(rig.seen.runs[0].n_tokens, 50);
    rig_turn(&rig);
    submit(&rig, late);
    uint32_t n_pieces = 0, n_longer = 0, n_done = 0;
    while (rig_turn(&rig)) {
        if (!rig.seen.n_runs || n_done == 150) continue;
        uint32_t n = rig.seen.runs[0].n_tokens;
        n_done += n;
        n_pieces += n == 6;
        n_longer += n > 6;
    }
    assert_true(n_pieces > 10);
    assert_int_equal(n_longer, 1);
    assert_int_equal(n_done, 150);
    assert_int_equal(decodes->n_tokens, 20);
    assert_int_equal(late->n_tokens, 2);
    rig_free(decodes), rig_free(late);
    rig_close(&rig);
}

static void a_prompt_is_scored_once_even_when_computed_twice(void **state)
{
    struct rig rig;
    (void)state;
    rig_open(&rig, &plain);
    struct group_info info = rig_info(64, 8);
    info.step_tokens_max = 8; /* the prompt takes several steps */
    rig_up(&rig, 0, info);
    struct rig_request *q = rig_request(1, 30, 0, 3);
    q->request.sampling.n_prompt_logprobs = 0;
    int32_t prompt[30];
    memcpy(prompt, q->request.tokens, sizeof prompt);
    submit(&rig, q);
    rig_turn(&rig);
    rig_turn(&rig);
    assert_true(q->n_scored > 0 && q->n_scored < 29);
    engine_group_down(rig.engine, 0, 1);
    info.epoch = 2;
    rig_up(&rig, 0, info);
    rig_run(&rig);
    assert_int_equal(q->n_scored, 29);
    for (uint32_t i = 0; i < 29; i++)
        assert_int_equal(q->scored[i].token, prompt[i + 1]);
    assert_int_equal(q->finish, FINISH_LENGTH);
    rig_free(q);
    rig_close(&rig);
}

/* Found by the simulator: choice 0 went to another group than its siblings, found their prompt
 * there, and was never scored. */
static void a_scored_choice_takes_no_prompt_from_its_siblings(void **state)
{
    struct rig rig;
    struct engine_config c = plain;
    (void)state;
    c.n_groups = 2;
    rig_open(&rig, &c);
    rig_up(&rig, 0, rig_info(64, 1));
    struct rig_request *q = rig_request(1, 30, 40, 3);
    q->request.n_choices = 2;
    q->request.sampling.n_prompt_logprobs = 0;
    submit(&rig, q);
    engine_step(rig.engine, rig.now_us); /* choice 0 has the only slot */
    rig_up(&rig, 1, rig_info(64, 4));
    engine_step(rig.engine, rig.now_us); /* its sibling goes to the other group */
    for (int i = 0; i < 2; i++) {        /* whose answers come; those of the first never do */
        if (rig.n_done[1] == rig.n_plans[1]) break;
        struct step_result r = rig_compute(&rig, 1);
        assert_int_equal(engine_result(rig.engine, 1, &r, rig.now_us), OK);
        engine_step(rig.engine, rig.now_us);
    }
    engine_group_down(rig.engine, 0, 1);
    rig.n_plans[0] = rig.n_done[0] = 0;
    rig_run(&rig);
    assert_int_equal(q->n_scored, 29);
    assert_int_equal(q->n_ended, 2);
    rig_free(q);
    rig_close(&rig);
}

static void placement_follows_the_prefix(void **state)
{
    struct rig rig;
    struct engine_config c = plain;
    (void)state;
    c.n_groups = 3;
    rig_open(&rig, &c);
    for (uint32_t g = 0; g < 3; g++)
        rig_up(&rig, g, rig_info(128, 8));
    uint32_t n_cached = 0;
    for (uint32_t i = 0; i < 12; i++) { /* three prompts of 200 tokens, four times each */
        struct rig_request *q = rig_request(i + 1, 200, 3, 50 + i % 3);
        submit(&rig, q);
        rig_run(&rig);
        n_cached += q->n_cached;
        rig_free(q);
    }
    assert_int_equal(n_cached, 9 * 196);
    rig_close(&rig);
}

static void waves(struct rig *rig, uint32_t n_waves)
{
    for (uint32_t w = 0; w < n_waves; w++) {
        static struct rig_request *q[12];
        for (uint32_t i = 0; i < 12; i++) {
            q[i] = rig_request(100 * w + i + 1, 10 + i * 5, 30, i);
            submit(rig, q[i]);
        }
        rig_run(rig);
        for (uint32_t i = 0; i < 12; i++)
            rig_free(q[i]);
    }
}

/* Once it has seen its busiest moment, a step allocates nothing. */
static void steps_allocate_nothing(void **state)
{
    struct rig rig;
    struct rig_request *q[12];
    (void)state;
    rig_open(&rig, &plain);
    rig_up(&rig, 0, rig_info(60, 8));
    waves(&rig, 12);
    for (uint32_t i = 0; i < 12; i++) {
        q[i] = rig_request(9000 + i, 10 + i * 5, 30, i);
        submit(&rig, q[i]);
    }
    int64_t made = mem_made();
    for (bool more = true; more;) {
        more = engine_step(rig.engine, rig.now_us);
        while (rig.n_done[0] < rig.n_plans[0]) {
            int64_t before = mem_made();
            struct step_result r =
                rig_compute(&rig, 0); /* the false worker's own are not the engine's */
            made += mem_made() - before;
            assert_int_equal(engine_result(rig.engine, 0, &r, rig.now_us), OK);
            more |= engine_step(rig.engine, rig.now_us);
        }
    }
    assert_int_equal(mem_made(), made);
    for (uint32_t i = 0; i < 12; i++)
        rig_free(q[i]);
    rig_close(&rig);
}

/* Every allocation fails once: a request fails or not, nothing leaks, its neighbours are whole. */
static void failed_allocations_damage_one_request_at_most(void **state)
{
    (void)state;
    int64_t live = mem_live();
    uint32_t n_refused = 0;
    for (int64_t n = 1; n < 60; n++) {
        struct rig rig;
        rig_open(&rig, &plain);
        rig_up(&rig, 0, rig_info(64, 8));
        struct rig_request *a = rig_request(1, 20, 20, 3), *b = rig_request(2, 20, 20, 4);
        b->request.n_choices = 3;
        submit(&rig, a);
        rig_turn(&rig);
        mem_fail_at(n);
        enum err e = engine_submit(rig.engine, &b->request, rig.now_us);
        if (!e) engine_step(rig.engine, rig.now_us);
        mem_fail_at(0);
        assert_true(!e || e == ERR_NO_MEMORY);
        if (e) {
            n_refused++;
            rig_destroy(&b->request);
        }
        rig_run(&rig);
        assert_true(a->last && (e || b->last));
        if (!a->error) assert_int_equal(a->n_tokens, 20);
        rig_free(a);
        rig_free(b);
        rig_close(&rig);
    }
    assert_true(n_refused >= 1);
    assert_int_equal(mem_live(), live);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(one_request_is_computed),
        cmocka_unit_test(the_pipeline_holds_two_plans_and_decode_is_bytes),
        cmocka_unit_test(a_stop_ends_and_the_token_after_it_is_dropped),
        cmocka_unit_test(a_prefix_is_found_but_never_the_last_token),
        cmocka_unit_test(choices_share_the_prompt_by_a_fork),
        cmocka_unit_test(full_queues_and_long_prompts_are_refused_with_numbers),
        cmocka_unit_test(a_passed_deadline_is_refused_and_one_in_the_queue_ends),
        cmocka_unit_test(wrong_results_are_refused_and_late_ones_ignored),
        cmocka_unit_test(a_lost_group_costs_no_token),
        cmocka_unit_test(a_group_that_does_not_answer_is_reported_once),
        cmocka_unit_test(preemption_takes_the_newest_and_keeps_its_tokens),
        cmocka_unit_test(what_costs_less_decides_between_swapping_and_computing),
        cmocka_unit_test(what_the_device_forgets_is_found_on_the_host),
        cmocka_unit_test(a_higher_class_takes_the_slot_of_a_lower_one),
        cmocka_unit_test(a_window_gives_blocks_back_while_it_slides),
        cmocka_unit_test(drafts_change_no_token_and_save_steps),
        cmocka_unit_test(prompts_come_in_pieces_beside_decodes),
        cmocka_unit_test(a_prompt_is_scored_once_even_when_computed_twice),
        cmocka_unit_test(a_scored_choice_takes_no_prompt_from_its_siblings),
        cmocka_unit_test(placement_follows_the_prefix),
        cmocka_unit_test(steps_allocate_nothing),
        cmocka_unit_test(failed_allocations_damage_one_request_at_most),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
