/* Goal: a row of logits becomes the token that HF's chain of processors would allow, penalties and
 * logprobs are exact, draws follow the distribution and depend on (seed, position) alone.
 * Method: an independent slow version sorts the whole vocabulary in double precision and walks it;
 * frequencies of many draws are compared with the probabilities. */
#include "unit/kernels/cpu_test.h"

enum { VOCAB = 500, BIG = 151936 };

static struct sample_row plain_row(void)
{
    return (struct sample_row){
        .slot = -1, .top_p = 1, .repetition_penalty = 1, .n_logprobs = -1, .forced_token = -1};
}

static struct sample_result run_one(struct backend *b, const float *logits, int vocab,
                                    struct sample_row row)
{
    struct sample_result result;
    float *x = test_floats(NULL, vocab, 0);
    memcpy(x, logits, (size_t)vocab * 4);
    b->ops->sample(b, test_tensor(x, 1, vocab), &row, 1, &result);
    CHECK(b->ops->ticket_wait(b, b->ops->step_end(b)));
    mem_free(x);
    return result;
}

static struct {
    double logit;
    int id;
} sorted[VOCAB];

static int descending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    int i = ((const int *)a)[2], j = ((const int *)b)[2];
    return x > y ? -1 : x < y ? 1 : i - j;
}

/* Probabilities after all cuts, by sorting; 0 = cut away. */
static void allowed(const double *logits, const struct sample_row *row, double *out)
{
    double p[VOCAB], sum = 0, cumulative = 0;
    int kept = VOCAB;
    for (int i = 0; i < VOCAB; i++)
        sorted[i].logit = logits[i] / row->temperature, sorted[i].id = i, out[i] = 0;
    qsort(sorted, VOCAB, sizeof *sorted, descending);
    if (row->top_k > 0 && row->top_k < VOCAB)
        while (kept > row->top_k && sorted[kept - 1].logit < sorted[row->top_k - 1].logit)
            kept--;
    for (int i = 0; i < kept; i++)
        sum += p[i] = exp(sorted[i].logit - sorted[0].logit);
    for (int i = 0; i < kept; i++) {
        if (i > 0 && cumulative >= row->top_p * sum) kept = i;
        if (i < kept) cumulative += p[i];
    }
    for (int i = 0; i < kept; i++)
        if (p[i] < row->min_p) kept = i;
    sum = 0;
    for (int i = 0; i < kept; i++)
        sum += p[i];
    for (int i = 0; i < kept; i++)
        out[sorted[i].id] = p[i] / sum;
}

static void draws_follow_the_distribution(void **state)
{
    static const struct {
        float temperature, top_p, min_p;
        int top_k;
    } cases[] = {{1, 1, 0, 0},         {0.7f, 1, 0, 0},     {1.5f, 0.9f, 0, 0},    {1, 1, 0, 5},
                 {1, 1, 0.1f, 0},      {0.9f, 0.6f, 0, 40}, {1, 0.95f, 0.05f, 20}, {1, 0.01f, 0, 0},
                 {2, 0.5f, 0.3f, 100}, {1, 1, 1, 0}};
    enum { DRAWS = 3000 };
    struct backend *b = test_open_with(NULL, 1, VOCAB);
    (void)state;
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        struct rand r = rand_seeded(c);
        float *x = test_floats(&r, VOCAB, 3);
        for (int i = 0; i < 40; i++)
            x[i * 7] = x[3]; /* ties across the cuts */
        double logits[VOCAB], p[VOCAB];
        int seen[VOCAB] = {0};
        for (int i = 0; i < VOCAB; i++)
            logits[i] = x[i];
        struct sample_row row = plain_row();
        row.temperature = cases[c].temperature, row.top_p = cases[c].top_p;
        row.min_p = cases[c].min_p, row.top_k = cases[c].top_k, row.seed = 42;
        allowed(logits, &row, p);
        for (row.position = 0; row.position < DRAWS; row.position++)
            seen[run_one(b, x, VOCAB, row).token]++;
        double chi = 0, freedom = 0, rest = 0;
        int rest_seen = 0;
        for (int i = 0; i < VOCAB; i++) {
            if (p[i] == 0 && seen[i]) fail_msg("case %zu: token %d was cut away but drawn", c, i);
            if (p[i] * DRAWS < 5) {
                rest += p[i], rest_seen += seen[i];
                continue;
            }
            chi += (seen[i] - p[i] * DRAWS) * (seen[i] - p[i] * DRAWS) / (p[i] * DRAWS), freedom++;
        }
        if (rest * DRAWS >= 5)
            chi += (rest_seen - rest * DRAWS) * (rest_seen - rest * DRAWS) / (rest * DRAWS),
                freedom++;
        /* the mean of chi squared is its freedom - 1, its variance twice that: 5 sigma */
        if (chi > freedom + 5 * sqrt(2 * freedom) + 5)
            fail_msg("case %zu: chi squared %g of %g", c, chi, freedom);
        mem_free(x);
    }
    b->ops->close(b);
}

/* Penalties as HF and OpenAI define them, bias and bans; seen through logprobs of all tokens. */
static void penalties_and_logprobs(void **state)
{
    static const int32_t prompt[] = {3, 4, 4, 9, VOCAB + 7, -1}, output[] = {4, 5, 5, 5, 11},
                         bias_at[] = {3, 20};
    static const int32_t banned[] = {12, 13, VOCAB, 30};
    static const float bias[] = {2.5f, -1.0f};
    struct backend *b = test_open_with(NULL, 1, VOCAB);
    struct rand r = rand_seeded(1);
    float *x = test_floats(&r, VOCAB, 4);
    double y[VOCAB], sum = 0;
    struct sample_row row = plain_row();
    (void)state;
    row.repetition_penalty = 1.3f, row.presence_penalty = 0.6f, row.frequency_penalty = 0.4f;
    row.prompt_tokens = prompt, row.n_prompt_tokens = 6, row.output_tokens = output,
    row.n_output_tokens = 5;
    row.bias_tokens = bias_at, row.bias_values = bias, row.n_bias = 2;
    row.banned_tokens = banned, row.n_banned = 4, row.n_logprobs = 20;
    for (int i = 0; i < VOCAB; i++)
        y[i] = x[i];
    static const int repeated[] = {3, 4, 9, 5, 11};
    for (int i = 0; i < 5; i++)
        y[repeated[i]] = y[repeated[i]] > 0 ? y[repeated[i]] / 1.3f : y[repeated[i]] * 1.3f;
    y[4] -= 1 * 0.4f + 0.6f, y[5] -= 3 * 0.4f + 0.6f, y[11] -= 0.4f + 0.6f;
    y[3] += 2.5, y[20] -= 1;
    y[12] = y[13] = y[30] = -INFINITY;
    for (int i = 0; i < VOCAB; i++)
        sum += exp(y[i]);
    for (int forced = -1; forced < 40; forced++) {
        row.forced_token = forced;
        struct sample_result got = run_one(b, x, VOCAB, row);
        int best = 0;
        for (int i = 0; i < VOCAB; i++)
            best = y[i] > y[best] ? i : best;
        assert_int_equal(got.token, forced < 0 ? best : forced);
        double want = y[got.token] - log(sum);
        if (!(isinf(want) ? got.logprob == want : fabs(got.logprob - want) < 1e-5))
            fail_msg("token %d: logprob %g, should be %g", got.token, got.logprob, want);
        assert_int_equal(got.n_top, 20);
        for (int i = 0; i < 20; i++) {
            assert_true(fabs(got.top_logprobs[i] - (y[got.top_tokens[i]] - log(sum))) < 1e-5);
            assert_true(!i || got.top_logprobs[i] <= got.top_logprobs[i - 1]);
        }
        assert_int_equal(got.top_tokens[0], best);
    }
    mem_free(x);
    b->ops->close(b);
}

/* A large vocabulary in a mixed batch gives each row what it gets alone, with any threads. */
static void rows_are_independent(void **state)
{
    enum { ROWS = 6 };
    struct rand r = rand_seeded(2);
    float *x = test_floats(&r, (int64_t)ROWS * BIG, 2),
          *copy = test_floats(NULL, (int64_t)ROWS * BIG, 0);
    struct sample_row rows[ROWS];
    struct sample_result alone[ROWS], together[ROWS];
    (void)state;
    for (int i = 0; i < ROWS; i++) {
        rows[i] = plain_row();
        rows[i].temperature = 0.3f * (float)i, rows[i].top_p = i % 2 ? 0.8f : 1,
        rows[i].top_k = i > 3 ? 50 : 0;
        rows[i].seed = (uint64_t)i, rows[i].position = 99, rows[i].n_logprobs = i, rows[i].slot = i;
    }
    struct backend *b = test_open_with("reference", 1, BIG);
    for (int i = 0; i < ROWS; i++)
        alone[i] = run_one(b, x + (int64_t)i * BIG, BIG, rows[i]);
    b->ops->close(b);
    b = test_open_with(NULL, 3, BIG);
    memcpy(copy, x, (size_t)ROWS * BIG * 4);
    b->ops->sample(b, test_tensor(copy, ROWS, BIG), rows, ROWS, together);
    for (int i = 0; i < ROWS; i++) {
        assert_int_equal(alone[i].token, together[i].token);
        assert_int_equal(alone[i].n_top, together[i].n_top);
        assert_true(float_bits(alone[i].logprob) == float_bits(together[i].logprob));
        assert_memory_equal(alone[i].top_tokens, together[i].top_tokens,
                            sizeof alone[i].top_tokens);
    }
    /* the sampled tokens feed the next step: embed of -1 reads them by slot */
    float table[16] = {0}, out[ROWS];
    int32_t ids[ROWS], slots[ROWS];
    struct weight *t;
    struct matrix_view view = {x, DTYPE_F32, BIG, 1, 1, 1};
    CHECK(b->ops->table_create(b, view, &t));
    for (int i = 0; i < ROWS; i++)
        ids[i] = -1, slots[i] = ROWS - 1 - i;
    struct batch batch = {.n_tokens = ROWS, .token_ids = ids, .token_slot = slots};
    b->ops->feed(b, 2, 12345);
    b->ops->embed(b, test_tensor(out, ROWS, 1), t, &batch);
    for (int i = 0; i < ROWS; i++)
        assert_true(out[i] == x[slots[i] == 2 ? 12345 : together[slots[i]].token]);
    b->ops->weight_destroy(b, t);
    b->ops->close(b);
    (void)table;
    mem_free(x), mem_free(copy);
}

/* Rows that models should not give: NaN, infinities, everything banned, extreme parameters. */
static void strange_logits(void **state)
{
    struct backend *b = test_open_with(NULL, 1, VOCAB);
    float x[VOCAB];
    struct sample_row row = plain_row();
    int32_t all[VOCAB];
    (void)state;
    for (int i = 0; i < VOCAB; i++)
        x[i] = (float)(i % 10), all[i] = i;
    x[0] = NAN, x[1] = -INFINITY;
    assert_int_equal(run_one(b, x, VOCAB, row).token, 9);
    row.temperature = 1e-30f;
    assert_int_equal(run_one(b, x, VOCAB, row).token % 10, 9);
    x[77] = INFINITY;
    row.temperature = 1;
    assert_int_equal(run_one(b, x, VOCAB, row).token, 77);
    row.top_p = 0, row.top_k = 1, row.n_logprobs = 3;
    assert_int_equal(run_one(b, x, VOCAB, row).token, 77);
    assert_int_equal(run_one(b, x, VOCAB, row).n_top, 3);
    row.banned_tokens = all, row.n_banned = VOCAB;
    struct sample_result none = run_one(b, x, VOCAB, row);
    assert_true(none.token >= 0 && none.token < VOCAB && !isnan(none.logprob));
    row = plain_row(), row.temperature = 1e6f;
    int32_t token = run_one(b, x, VOCAB, row).token;
    assert_true(token >= 0 && token < VOCAB);
    for (int i = 0; i < VOCAB; i++)
        x[i] = -1e30f;
    x[3] = -1e30f + 1e24f;
    row.temperature = 1;
    assert_int_equal(run_one(b, x, VOCAB, row).token, 3);
    b->ops->close(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(draws_follow_the_distribution),
        cmocka_unit_test(penalties_and_logprobs),
        cmocka_unit_test(rows_are_independent),
        cmocka_unit_test(strange_logits),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
