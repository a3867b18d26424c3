/* Goal: the hand-written packer gives exactly protobuf-c's bytes, and what is decoded is what was
 * said. Method: random plans and results, packed both ways, compared, decoded and compared again;
 * then every prefix of a message, and wrong shapes one by one. */
#include "base/mem.h"
#include "base/rand.h"
#include "proto/cluster.pb-c.h"
#include "proto/plan.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
// clang-format off
#include <cmocka.h>
// clang-format on

static struct arena arena;
static struct rand dice;

static void *take(size_t n, size_t bytes)
{
    void *p;
    assert_int_equal(arena_alloc_array(&arena, n ? n : 1, bytes, &p), OK);
    return p;
}

/* Numbers of every varint length. */
static uint32_t number(void)
{
    return (uint32_t)(rand_next(&dice) >> (32 + rand_below(&dice, 32)));
}
static uint32_t few(void)
{
    return rand_below(&dice, 3) ? (uint32_t)rand_below(&dice, 6) : 0;
}

static void *words(uint32_t n)
{
    uint32_t *w = take(n, sizeof *w);
    for (uint32_t i = 0; i < n; i++)
        w[i] = number();
    return w;
}

static float *floats(uint32_t n)
{
    float *f = take(n, sizeof *f);
    for (uint32_t i = 0; i < n; i++)
        f[i] = (float)rand_unit(&dice) - 0.5f;
    return f;
}

static void draw_sampling(struct sampling_params *s)
{
    sampling_params_default(s);
    if (rand_below(&dice, 2)) s->temperature = (float)rand_unit(&dice);
    if (rand_below(&dice, 2)) s->top_k = (int32_t)few() - 2;
    if (rand_below(&dice, 2)) s->seed = rand_next(&dice);
    s->n_logprobs = (int32_t)few() - 1;
    s->n_prompt_logprobs = (int32_t)few() - 1;
    s->min_tokens = (int32_t)few();
    s->presence_penalty = rand_below(&dice, 2) ? -0.5f : 0;
    s->n_bias = (int32_t)few();
    s->bias_tokens = words((uint32_t)s->n_bias);
    s->bias_values = floats((uint32_t)s->n_bias);
    s->n_stop_ids = (int32_t)few();
    s->stop_ids = words((uint32_t)s->n_stop_ids);
}

static struct plan_pair *pairs(uint32_t n)
{
    struct plan_pair *p = take(n, sizeof *p);
    for (uint32_t i = 0; i < n; i++)
        p[i] = (struct plan_pair){number(), number()};
    return p;
}

static void draw_plan(struct step_plan *p)
{
    *p = (struct step_plan){
        .epoch = number(), .step = rand_next(&dice), .idle = rand_below(&dice, 2)};
    p->n_closes = few(), p->closes = words(p->n_closes);
    p->n_saves = few(), p->saves = pairs(p->n_saves);
    p->n_loads = few(), p->loads = pairs(p->n_loads);
    p->n_copies = few(), p->copies = pairs(p->n_copies);
    p->n_fetches = few(), p->fetches = pairs(p->n_fetches);
    p->n_spills = few(), p->spills = pairs(p->n_spills);
    p->n_extends = few(), p->extends = pairs(p->n_extends);
    p->n_pauses = few(), p->pauses = words(p->n_pauses);
    p->n_opens = few(), p->opens = take(p->n_opens, sizeof *p->opens);
    for (uint32_t i = 0; i < p->n_opens; i++) {
        struct plan_open *o = &p->opens[i];
        *o = (struct plan_open){
            number(), number(), number(), number(),   rand_below(&dice, 200) ? few() : 20000,
            few(),    NULL,     NULL,     {.seed = 0}};
        o->tokens = words(o->n_tokens);
        o->blocks = words(o->n_blocks);
        draw_sampling(&o->sampling);
    }
    p->n_forks = few(), p->forks = take(p->n_forks, sizeof *p->forks);
    for (uint32_t i = 0; i < p->n_forks; i++) {
        struct plan_fork *f = &p->forks[i];
        *f = (struct plan_fork){number(), number(), number(), number(), few(), few(), NULL, NULL};
        f->append = words(f->n_append);
        f->blocks = words(f->n_blocks);
    }
    p->n_runs = few(), p->runs = take(p->n_runs, sizeof *p->runs);
    bool drafts = rand_below(&dice, 2), own = rand_below(&dice, 2);
    for (uint32_t i = 0; i < p->n_runs; i++) {
        struct plan_run *r = &p->runs[i];
        *r = (struct plan_run){number(),           number(), (uint32_t)rand_below(&dice, 4),
                               drafts ? few() : 0, NULL,     own ? few() : 0,
                               own ? number() : 0};
        r->drafts = words(r->n_drafts);
    }
}

/* The same plan as protobuf-c's messages. */
static void split(const struct plan_pair *p, uint32_t n, size_t *n_a, uint32_t **a, size_t *n_b,
                  uint32_t **b)
{
    *n_a = *n_b = n;
    *a = take(n, 4), *b = take(n, 4);
    for (uint32_t i = 0; i < n; i++)
        (*a)[i] = p[i].from, (*b)[i] = p[i].to;
}

static Heddle__Cluster__Open *open_message(const struct plan_open *o)
{
    Heddle__Cluster__Open *m = take(1, sizeof *m);
    Heddle__Cluster__Sampling *s = take(1, sizeof *s);
    heddle__cluster__open__init(m);
    heddle__cluster__sampling__init(s);
    m->slot = o->slot, m->prompt = o->n_prompt, m->computed = o->n_computed,
    m->tokens_max = o->n_tokens_max;
    m->n_tokens = o->n_tokens, m->tokens = (uint32_t *)o->tokens;
    m->n_blocks = o->n_blocks, m->blocks = (uint32_t *)o->blocks;
    m->sampling = s;
    const struct sampling_params *q = &o->sampling;
    s->temperature = q->temperature, s->top_k = q->top_k, s->top_p = q->top_p, s->min_p = q->min_p;
    s->repetition_penalty = q->repetition_penalty, s->presence_penalty = q->presence_penalty;
    s->frequency_penalty = q->frequency_penalty, s->seed = q->seed;
    s->logprobs = q->n_logprobs, s->prompt_logprobs = q->n_prompt_logprobs,
    s->min_tokens = (uint32_t)q->min_tokens;
    s->n_bias_tokens = s->n_bias_values = (size_t)q->n_bias;
    s->bias_tokens = (uint32_t *)q->bias_tokens, s->bias_values = (float *)q->bias_values;
    s->n_stop_ids = (size_t)q->n_stop_ids, s->stop_ids = (uint32_t *)q->stop_ids;
    return m;
}

static Heddle__Cluster__Fork *fork_message(const struct plan_fork *f)
{
    Heddle__Cluster__Fork *m = take(1, sizeof *m);
    heddle__cluster__fork__init(m);
    m->from = f->from, m->to = f->to, m->tokens = f->n_tokens, m->computed = f->n_computed;
    m->n_append = f->n_append, m->append = (uint32_t *)f->append;
    m->n_blocks = f->n_blocks, m->blocks = (uint32_t *)f->blocks;
    return m;
}

static void run_message(Heddle__Cluster__StepPlan *m, const struct step_plan *p)
{
    size_t n = p->n_runs, n_drafts = 0, at = 0;
    m->n_run_slots = m->n_run_tokens = m->n_run_flags = n;
    m->run_slots = take(n, 4), m->run_tokens = take(n, 4), m->run_flags = take(n, 4),
    m->run_drafts = take(n, 4);
    for (size_t i = 0; i < n; i++) {
        m->run_slots[i] = p->runs[i].slot, m->run_tokens[i] = p->runs[i].n_tokens;
        m->run_flags[i] = p->runs[i].flags, m->run_drafts[i] = p->runs[i].n_drafts;
        n_drafts += p->runs[i].n_drafts;
    }
    m->run_own = take(n, 4), m->run_ahead = take(n, 4);
    for (size_t i = 0; i < n; i++) {
        m->run_own[i] = p->runs[i].n_own, m->run_ahead[i] = p->runs[i].n_ahead;
        if (p->runs[i].n_own) m->n_run_own = n;
        if (p->runs[i].n_ahead) m->n_run_ahead = n;
    }
    m->n_run_drafts = n_drafts ? n : 0;
    m->n_drafts = n_drafts;
    m->drafts = take(n_drafts, 4);
    for (size_t i = 0; i < n; i++)
        for (uint32_t k = 0; k < p->runs[i].n_drafts; k++)
            m->drafts[at++] = (uint32_t)p->runs[i].drafts[k];
}

static size_t pack_by_library(const struct step_plan *p, uint8_t *out)
{
    Heddle__Cluster__ToWorker to = HEDDLE__CLUSTER__TO_WORKER__INIT;
    Heddle__Cluster__StepPlan m = HEDDLE__CLUSTER__STEP_PLAN__INIT;
    to.kind_case = HEDDLE__CLUSTER__TO_WORKER__KIND_PLAN;
    to.plan = &m;
    m.epoch = p->epoch, m.step = p->step, m.idle = p->idle;
    m.n_closes = p->n_closes, m.closes = p->closes;
    m.n_pauses = p->n_pauses, m.pauses = p->pauses;
    split(p->saves, p->n_saves, &m.n_save_blocks, &m.save_blocks, &m.n_save_host, &m.save_host);
    split(p->loads, p->n_loads, &m.n_load_host, &m.load_host, &m.n_load_blocks, &m.load_blocks);
    split(p->copies, p->n_copies, &m.n_copy_from, &m.copy_from, &m.n_copy_to, &m.copy_to);
    split(p->fetches, p->n_fetches, &m.n_fetch_disk, &m.fetch_disk, &m.n_fetch_host,
          &m.fetch_host);
    split(p->spills, p->n_spills, &m.n_spill_host, &m.spill_host, &m.n_spill_disk, &m.spill_disk);
    split(p->extends, p->n_extends, &m.n_extend_slots, &m.extend_slots, &m.n_extend_blocks,
          &m.extend_blocks);
    m.n_opens = p->n_opens, m.opens = take(p->n_opens, sizeof(void *));
    for (uint32_t i = 0; i < p->n_opens; i++)
        m.opens[i] = open_message(&p->opens[i]);
    m.n_forks = p->n_forks, m.forks = take(p->n_forks, sizeof(void *));
    for (uint32_t i = 0; i < p->n_forks; i++)
        m.forks[i] = fork_message(&p->forks[i]);
    run_message(&m, p);
    return heddle__cluster__to_worker__pack(&to, out);
}

static void same_words(const void *a, const void *b, size_t n)
{
    if (n) assert_memory_equal(a, b, n * 4);
}

static void same_plan(const struct step_plan *a, const struct step_plan *b)
{
    assert_true(a->epoch == b->epoch && a->step == b->step && a->idle == b->idle);
    assert_int_equal(a->n_closes, b->n_closes);
    same_words(a->closes, b->closes, a->n_closes);
    assert_int_equal(a->n_saves, b->n_saves);
    same_words(a->saves, b->saves, 2 * a->n_saves);
    assert_int_equal(a->n_loads, b->n_loads);
    same_words(a->loads, b->loads, 2 * a->n_loads);
    assert_int_equal(a->n_copies, b->n_copies);
    same_words(a->copies, b->copies, 2 * a->n_copies);
    assert_int_equal(a->n_fetches, b->n_fetches);
    same_words(a->fetches, b->fetches, 2 * a->n_fetches);
    assert_int_equal(a->n_spills, b->n_spills);
    same_words(a->spills, b->spills, 2 * a->n_spills);
    assert_int_equal(a->n_extends, b->n_extends);
    same_words(a->extends, b->extends, 2 * a->n_extends);
    assert_int_equal(a->n_pauses, b->n_pauses);
    same_words(a->pauses, b->pauses, a->n_pauses);
    assert_int_equal(a->n_opens, b->n_opens);
    for (uint32_t i = 0; i < a->n_opens; i++) {
        const struct plan_open *x = &a->opens[i], *y = &b->opens[i];
        assert_memory_equal(x, y, 24); /* slot to n_blocks */
        same_words(x->tokens, y->tokens, x->n_tokens);
        same_words(x->blocks, y->blocks, x->n_blocks);
        const struct sampling_params *s = &x->sampling, *t = &y->sampling;
        assert_true(s->temperature == t->temperature && s->top_k == t->top_k &&
                    s->seed == t->seed && s->n_logprobs == t->n_logprobs &&
                    s->n_prompt_logprobs == t->n_prompt_logprobs &&
                    s->presence_penalty == t->presence_penalty && s->min_tokens == t->min_tokens);
        assert_int_equal(s->n_bias, t->n_bias);
        same_words(s->bias_tokens, t->bias_tokens, (size_t)s->n_bias);
        same_words(s->bias_values, t->bias_values, (size_t)s->n_bias);
        assert_int_equal(s->n_stop_ids, t->n_stop_ids);
        same_words(s->stop_ids, t->stop_ids, (size_t)s->n_stop_ids);
    }
    assert_int_equal(a->n_forks, b->n_forks);
    for (uint32_t i = 0; i < a->n_forks; i++) {
        assert_memory_equal(&a->forks[i], &b->forks[i], 24);
        same_words(a->forks[i].append, b->forks[i].append, a->forks[i].n_append);
        same_words(a->forks[i].blocks, b->forks[i].blocks, a->forks[i].n_blocks);
    }
    assert_int_equal(a->n_runs, b->n_runs);
    for (uint32_t i = 0; i < a->n_runs; i++) {
        assert_memory_equal(&a->runs[i], &b->runs[i], 16);
        same_words(a->runs[i].drafts, b->runs[i].drafts, a->runs[i].n_drafts);
        assert_int_equal(a->runs[i].n_own, b->runs[i].n_own);
        assert_int_equal(a->runs[i].n_ahead, b->runs[i].n_ahead);
    }
}

static void plans_are_the_librarys_bytes(void **state)
{
    (void)state;
    static uint8_t library[1 << 20];
    struct buf own;
    struct step_plan plan, back;
    buf_init(&own, 0);
    dice = rand_seeded(1);
    for (int round = 0; round < 3000; round++) {
        arena_reset(&arena);
        draw_plan(&plan);
        buf_clear(&own);
        assert_int_equal(plan_encode(&plan, &own), OK);
        assert_int_equal(own.n, pack_by_library(&plan, library));
        assert_memory_equal(own.data, library, own.n);
        assert_int_equal(plan_decode(own.data, own.n, &arena, &back), OK);
        same_plan(&plan, &back);
    }
    buf_fini(&own);
}

static void moved_come_back(void **state)
{
    (void)state;
    struct buf bytes;
    struct moved back;
    uint64_t failed[2] = {1ull << 40, 7};
    struct moved news = {3, 1ull << 41, 9, 1, 2, 12345, failed, failed};
    buf_init(&bytes, 0);
    arena_reset(&arena);
    assert_int_equal(moved_encode(&news, &bytes), OK);
    assert_int_equal(moved_decode(bytes.data, bytes.n, &arena, &back), OK);
    assert_true(back.epoch == 3 && back.n_fetched == 1ull << 41 && back.n_spilled == 9);
    assert_true(back.n_fetches_failed == 1 && back.fetches_failed[0] == failed[0]);
    assert_true(back.n_spills_failed == 2 && back.spills_failed[1] == 7 && back.fetch_ns == 12345);
    for (size_t n = 0; n < bytes.n; n++) /* every cut is refused or is another message */
        (void)moved_decode(bytes.data, n, &arena, &back);
    buf_clear(&bytes);
    assert_int_equal(step_result_encode(&(struct step_result){0}, false, &bytes), OK);
    assert_int_equal(moved_decode(bytes.data, bytes.n, &arena, &back), ERR_FORMAT);
    buf_fini(&bytes);
}

static void draw_result(struct step_result *r)
{
    *r = (struct step_result){
        .epoch = number(), .step = number(), .n_tokens = few() * few(), .compute_us = number()};
    r->tokens = take(r->n_tokens, sizeof *r->tokens);
    if (rand_below(&dice, 2)) {
        r->n_drafted = few(), r->drafted = take(r->n_drafted, sizeof *r->drafted);
        for (uint32_t i = 0; i < r->n_drafted; i++)
            r->drafted[i] = (struct plan_pair){number(), few()};
        r->draft_us = number(), r->draft_passes = few(), r->draft_tokens = number();
        r->draft_first_us = number();
    }
    bool plain = rand_below(&dice, 2);
    for (uint32_t i = 0; i < r->n_tokens; i++) {
        struct step_token *t = &r->tokens[i];
        *t = (struct step_token){.slot = number(), .token = (int32_t)(number() >> 1)};
        if (plain) continue;
        t->flags = rand_below(&dice, 2) ? STEP_TOKEN_SCORED : 0;
        t->has_logprob = rand_below(&dice, 2);
        if (!t->has_logprob) continue;
        t->logprob = *floats(1);
        t->n_top = few();
        t->top_tokens = words(t->n_top);
        t->top_logprobs = floats(t->n_top);
    }
}

static void results_come_back(void **state)
{
    (void)state;
    struct buf bytes;
    struct step_result r, back;
    buf_init(&bytes, 0);
    dice = rand_seeded(2);
    for (int round = 0; round < 3000; round++) {
        arena_reset(&arena);
        draw_result(&r);
        buf_clear(&bytes);
        assert_int_equal(step_result_encode(&r, false, &bytes), OK);
        assert_int_equal(step_result_decode(bytes.data, bytes.n, &arena, &back), OK);
        assert_true(back.epoch == r.epoch && back.step == r.step &&
                    back.compute_us == r.compute_us && back.draft_us == r.draft_us &&
                    back.draft_passes == r.draft_passes && back.draft_tokens == r.draft_tokens &&
                    back.draft_first_us == r.draft_first_us);
        assert_int_equal(back.n_drafted, r.n_drafted);
        for (uint32_t i = 0; i < r.n_drafted; i++)
            assert_memory_equal(&back.drafted[i], &r.drafted[i], sizeof r.drafted[i]);
        assert_int_equal(back.n_tokens, r.n_tokens);
        for (uint32_t i = 0; i < r.n_tokens; i++) {
            const struct step_token *a = &r.tokens[i], *b = &back.tokens[i];
            assert_true(a->slot == b->slot && a->token == b->token && a->flags == b->flags &&
                        a->has_logprob == b->has_logprob && a->logprob == b->logprob);
            assert_int_equal(a->n_top, b->n_top);
            same_words(a->top_tokens, b->top_tokens, a->n_top);
            same_words(a->top_logprobs, b->top_logprobs, a->n_top);
        }
        Heddle__Cluster__FromWorker *m =
            heddle__cluster__from_worker__unpack(NULL, bytes.n, (uint8_t *)bytes.data);
        uint8_t *packed =
            take(1, bytes.n + 16); /* and the library would say it in the same bytes */
        assert_int_equal(heddle__cluster__from_worker__pack(m, packed), bytes.n);
        assert_memory_equal(packed, bytes.data, bytes.n);
        heddle__cluster__from_worker__free_unpacked(m, NULL);
    }
    buf_clear(&bytes);
    assert_int_equal(step_result_encode(&r, true, &bytes), OK);
    assert_int_equal(step_result_decode(bytes.data, bytes.n, &arena, &back), OK);
    assert_int_equal(back.n_tokens, 0);
    assert_true(back.step == r.step);
    buf_fini(&bytes);
}

/* A cut message is an error or a shorter message, never a crash; changed bytes likewise. */
static void broken_bytes_are_errors(void **state)
{
    (void)state;
    struct buf bytes;
    struct step_plan plan, back;
    struct step_result result;
    buf_init(&bytes, 0);
    dice = rand_seeded(3);
    draw_plan(&plan);
    assert_int_equal(plan_encode(&plan, &bytes), OK);
    for (size_t n = 0; n < bytes.n; n++) {
        void *piece; /* of exactly n bytes, so that a read beyond is seen */
        assert_int_equal(mem_alloc(n, &piece), OK);
        memcpy(piece, bytes.data, n);
        assert_int_equal(plan_decode(piece, n, &arena, &back), ERR_FORMAT);
        assert_int_equal(step_result_decode(piece, n, &arena, &result), ERR_FORMAT);
        mem_free(piece);
    }
    for (int round = 0; round < 20000; round++) {
        arena_reset(&arena);
        size_t at = rand_below(&dice, bytes.n);
        char was = bytes.data[at];
        bytes.data[at] = (char)rand_next(&dice);
        (void)plan_decode(bytes.data, bytes.n, &arena, &back);
        bytes.data[at] = was;
    }
    buf_fini(&bytes);
}

static enum err decode_shape(void (*spoil)(Heddle__Cluster__StepPlan *))
{
    static uint32_t numbers[4] = {1, 2, 3, 4};
    static uint8_t packed[1 << 14];
    Heddle__Cluster__ToWorker to = HEDDLE__CLUSTER__TO_WORKER__INIT;
    Heddle__Cluster__StepPlan m = HEDDLE__CLUSTER__STEP_PLAN__INIT;
    struct step_plan back;
    to.kind_case = HEDDLE__CLUSTER__TO_WORKER__KIND_PLAN, to.plan = &m;
    m.n_run_slots = m.n_run_tokens = m.n_run_flags = m.n_run_drafts = 2;
    m.run_slots = m.run_tokens = m.run_flags = numbers;
    m.run_drafts = numbers; /* 1 and 2 drafts */
    m.n_drafts = 3, m.drafts = numbers;
    m.n_extend_slots = m.n_extend_blocks = 2, m.extend_slots = m.extend_blocks = numbers;
    spoil(&m);
    return plan_decode(packed, heddle__cluster__to_worker__pack(&to, packed), &arena, &back);
}

static void keep(Heddle__Cluster__StepPlan *m)
{
    (void)m;
}
static void cut_flags(Heddle__Cluster__StepPlan *m)
{
    m->n_run_flags = 1;
}
static void cut_tokens(Heddle__Cluster__StepPlan *m)
{
    m->n_run_tokens = 1;
}
static void cut_counts(Heddle__Cluster__StepPlan *m)
{
    m->n_run_drafts = 1;
}
static void few_drafts(Heddle__Cluster__StepPlan *m)
{
    m->n_drafts = 2;
}
static void many_drafts(Heddle__Cluster__StepPlan *m)
{
    m->n_drafts = 4;
}
static void cut_extends(Heddle__Cluster__StepPlan *m)
{
    m->n_extend_blocks = 1;
}
static void cut_own(Heddle__Cluster__StepPlan *m)
{
    m->n_run_own = 1, m->run_own = m->run_slots;
}
static void long_ahead(Heddle__Cluster__StepPlan *m)
{
    m->n_run_ahead = 3, m->run_ahead = m->run_slots;
}
static void long_saves(Heddle__Cluster__StepPlan *m)
{
    m->n_save_blocks = 1, m->save_blocks = m->closes = m->run_slots;
}

static void cut_fetches(Heddle__Cluster__StepPlan *m)
{
    m->n_fetch_host = 1, m->fetch_host = m->closes = m->run_slots;
}
static void many_spills(Heddle__Cluster__StepPlan *m)
{
    static uint32_t blocks[PLAN_TRANSFERS_MAX + 1];
    m->n_spill_host = m->n_spill_disk = PLAN_TRANSFERS_MAX + 1;
    m->spill_host = m->spill_disk = blocks;
}

static void wrong_shapes_are_named(void **state)
{
    (void)state;
    void (*spoils[])(Heddle__Cluster__StepPlan *) = {
        cut_flags, cut_tokens, cut_counts, few_drafts,  many_drafts, cut_extends,
        cut_own,   long_ahead, long_saves, cut_fetches, many_spills};
    assert_int_equal(decode_shape(keep), OK);
    for (size_t i = 0; i < sizeof spoils / sizeof *spoils; i++) {
        assert_int_equal(decode_shape(spoils[i]), ERR_FORMAT);
        assert_non_null(strstr(err_detail(), "plan"));
    }
}

static void steps_allocate_nothing(void **state)
{
    (void)state;
    struct buf bytes;
    struct step_plan plan, back;
    buf_init(&bytes, 0);
    dice = rand_seeded(4);
    draw_plan(&plan);
    struct arena own;
    arena_init(&own, 1 << 16, 1 << 20);
    int64_t made = 0;
    for (int round = 0; round < 20; round++) {
        if (round == 2) made = mem_made(); /* warm */
        arena_reset(&own);
        buf_clear(&bytes);
        assert_int_equal(plan_encode(&plan, &bytes), OK);
        assert_int_equal(plan_decode(bytes.data, bytes.n, &own, &back), OK);
    }
    assert_int_equal(mem_made(), made);
    arena_fini(&own);
    buf_fini(&bytes);
}

static void memory_failures_are_errors(void **state)
{
    (void)state;
    struct buf bytes;
    struct step_plan plan, back;
    dice = rand_seeded(5);
    draw_plan(&plan);
    int n_failed = 0;
    for (int64_t n = 1; n < 100; n++) {
        struct arena own;
        arena_init(&own, 64, 0);
        buf_init(&bytes, 0);
        mem_fail_at(n);
        enum err e = plan_encode(&plan, &bytes);
        if (!e) e = plan_decode(bytes.data, bytes.n, &own, &back);
        mem_fail_at(0);
        n_failed += e != OK;
        if (e) assert_true(e == ERR_NO_MEMORY || e == ERR_FORMAT);
        arena_fini(&own);
        buf_fini(&bytes);
    }
    assert_true(n_failed > 3);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(plans_are_the_librarys_bytes),
        cmocka_unit_test(moved_come_back),
        cmocka_unit_test(results_come_back),
        cmocka_unit_test(broken_bytes_are_errors),
        cmocka_unit_test(wrong_shapes_are_named),
        cmocka_unit_test(steps_allocate_nothing),
        cmocka_unit_test(memory_failures_are_errors),
    };
    arena_init(&arena, 1 << 20, 0);
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    arena_fini(&arena);
    return failed;
}
