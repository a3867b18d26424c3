/* Goal: sampling on the device chooses the token that the rule of backend.h says, for every option.
 * Method: rows of logits of several kinds (smooth, with ties, with infinities and NaN, flat) under
 * random options, against a reference that sorts and sums in double. Where the draw falls within
 * 1e-5 of the border between two tokens either is right. Also: draws follow the distribution, the
 * same row gives the same token in any batch, lists longer than the staging memory, forced tokens.
 */
#include "tests/cuda/gear.h"

enum { VOCAB_MAX = 6000 };

struct entry {
    int token;
    double x, weight;
};

static int by_value(const void *a, const void *b)
{
    const struct entry *x = a, *y = b;
    if (x->x != y->x) return x->x > y->x ? -1 : 1;
    return x->token - y->token;
}

static void reference_edit(const struct sample_row *row, double *x, int vocab)
{
    int *count = take((size_t)vocab * sizeof *count);
    bool *seen = take((size_t)vocab);
    for (int i = 0; i < row->n_prompt_tokens; i++)
        if (row->prompt_tokens[i] >= 0 && row->prompt_tokens[i] < vocab)
            seen[row->prompt_tokens[i]] = true;
    for (int i = 0; i < row->n_output_tokens; i++)
        if (row->output_tokens[i] >= 0 && row->output_tokens[i] < vocab)
            count[row->output_tokens[i]]++;
    for (int t = 0; t < vocab; t++) {
        if (!seen[t] && !count[t]) continue;
        x[t] = x[t] > 0 ? x[t] / (double)row->repetition_penalty
                        : x[t] * (double)row->repetition_penalty;
        if (count[t])
            x[t] -= count[t] * (double)row->frequency_penalty + (double)row->presence_penalty;
    }
    for (int i = 0; i < row->n_bias; i++)
        if (row->bias_tokens[i] >= 0 && row->bias_tokens[i] < vocab)
            x[row->bias_tokens[i]] += (double)row->bias_values[i];
    for (int i = 0; i < row->n_banned; i++)
        if (row->banned_tokens[i] >= 0 && row->banned_tokens[i] < vocab)
            x[row->banned_tokens[i]] = -INFINITY;
    mem_free(count), mem_free(seen);
}

/* The kept tokens in `list`, best first, with their weights; returns how many. *out_unsure: a cut
 * falls so close to its border that rounding decides. */
static int reference_cut(const struct sample_row *row, const double *x, int vocab,
                         struct entry *list, bool *out_unsure)
{
    double total = 0, sum = 0, best;
    int n = vocab, kept = 0;
    for (int t = 0; t < vocab; t++)
        list[t] = (struct entry){t, x[t], 0};
    qsort(list, (size_t)vocab, sizeof *list, by_value);
    best = list[0].x;
    for (int i = 0; i < vocab; i++)
        list[i].weight = exp((list[i].x - best) / (double)row->temperature);
    if (row->top_k > 0 && row->top_k < vocab)
        for (n = row->top_k; n < vocab && list[n].x == list[row->top_k - 1].x;)
            n++;
    for (int i = 0; i < n; i++)
        total += list[i].weight;
    if (row->top_p < 1)
        for (int i = 0; i < n; i++) {
            if (fabs(sum - total * (double)row->top_p) < 2e-5 * total) *out_unsure = true;
            if (sum >= total * (double)row->top_p)
                n = i;
            else
                sum += list[i].weight;
        }
    for (int i = 0; i < n; i++) {
        if (row->min_p > 0 && fabs(list[i].weight / (double)row->min_p - 1) < 1e-4)
            *out_unsure = true;
        if (list[i].weight >= (double)row->min_p && list[i].weight > 1e-12) list[kept++] = list[i];
    }
    return kept;
}

static int by_token(const void *a, const void *b)
{
    return ((const struct entry *)a)->token - ((const struct entry *)b)->token;
}

/* Whether the token is one that the rule allows. */
static bool token_right(const struct sample_row *row, const double *x, int vocab, int token)
{
    struct entry *list = take((size_t)vocab * sizeof *list);
    bool unsure = false, right = false;
    int n = reference_cut(row, x, vocab, list, &unsure);
    double total = 0, sum = 0, u = (double)rand_at(row->seed, row->position, 0);
    qsort(list, (size_t)n, sizeof *list, by_token);
    for (int i = 0; i < n; i++)
        total += list[i].weight;
    for (int i = 0; i < n; sum += list[i++].weight) {
        double low = sum / total, high = (sum + list[i].weight) / total;
        if (list[i].token == token) right = unsure || (u >= low - 1e-5 && u <= high + 1e-5);
    }
    mem_free(list);
    return right || (unsure && token >= 0);
}

static void logprobs_check(const struct sample_row *row, const double *x, int vocab,
                           const struct sample_result *got)
{
    double most = -INFINITY, sum = 0;
    struct entry *list = take((size_t)vocab * sizeof *list);
    for (int t = 0; t < vocab; t++)
        most = fmax(most, x[t]), list[t] = (struct entry){t, x[t], 0};
    for (int t = 0; t < vocab; t++)
        sum += exp(x[t] - most);
    double log_total = most + log(sum);
    qsort(list, (size_t)vocab, sizeof *list, by_value);
    if (isfinite(x[got->token]))
        assert_true(fabs((double)got->logprob - (x[got->token] - log_total)) < 1e-4);
    int n = row->n_logprobs < vocab ? row->n_logprobs : vocab;
    assert_int_equal(got->n_top, n);
    for (int i = 0; i < n; i++) {
        assert_int_equal(got->top_tokens[i], list[i].token);
        if (isfinite(list[i].x))
            assert_true(fabs((double)got->top_logprobs[i] - (list[i].x - log_total)) < 1e-4);
    }
    mem_free(list);
}

static void logits_fill(float *x, int vocab, int kind)
{
    for (int t = 0; t < vocab; t++) {
        x[t] = rand_float(8);
        if (kind == 1) x[t] = (float)rand_int(-3, 3); /* nothing but ties */
        if (kind == 2) x[t] = 1.5f;                   /* flat */
        if (kind == 3 && t % 3) x[t] = t % 3 == 1 ? -INFINITY : x[t] * 5;
        if (kind == 5) x[t] = 1 + rand_float(0.01f); /* all in one bucket, so its mass carries */
        if (kind == 4)
            x[t] = rand_float(1) * rand_float(1) * rand_float(1) * 40; /* a few far above */
    }
}

struct lists {
    int32_t prompt[300], output[300], bias[20], banned[6000];
    float bias_values[20];
};

static void row_fill(struct sample_row *row, struct lists *l, int vocab, int which)
{
    *row = (struct sample_row){.slot = which < 8 ? which : -1,
                               .top_p = 1,
                               .repetition_penalty = 1,
                               .forced_token = -1,
                               .n_logprobs = -1};
    row->seed = rand_next(&gear_rand), row->position = (uint64_t)rand_int(0, 100000);
    row->temperature = which % 5 == 0 ? 0 : 0.3f + (float)rand_unit(&gear_rand) * 1.5f;
    if (which % 3 == 1) row->top_k = rand_int(1, 60);
    if (which % 4 == 1) row->top_p = 0.05f + (float)rand_unit(&gear_rand) * 0.94f;
    if (which % 6 == 2) row->min_p = (float)rand_unit(&gear_rand) * 0.3f;
    if (which % 2) row->n_logprobs = rand_int(0, SAMPLE_LOGPROBS_MAX);
    for (int i = 0; i < 300; i++)
        l->prompt[i] = rand_int(-2, vocab / 2), l->output[i] = rand_int(0, vocab / 3 + 2);
    for (int i = 0; i < 20; i++)
        l->bias[i] = (i * 7) % (vocab + 3), l->bias_values[i] = rand_float(3);
    for (int i = 0; i < 6000; i++)
        l->banned[i] = rand_int(0, vocab + 1);
    row->prompt_tokens = l->prompt, row->output_tokens = l->output, row->bias_tokens = l->bias;
    row->bias_values = l->bias_values, row->banned_tokens = l->banned;
    if (which % 7 == 3) {
        row->n_prompt_tokens = 300, row->n_output_tokens = 300;
        row->repetition_penalty = 1.3f, row->presence_penalty = 0.4f, row->frequency_penalty = 0.2f;
    }
    if (which % 5 == 2) row->n_bias = vocab < 150 ? 3 : 20;
    if (which % 9 == 4) row->n_banned = rand_int(1, 4);
    if (which % 9 == 5) row->n_banned = vocab > 2 ? vocab / 2 : 0; /* travels as bits */
}

static void sample_rows(struct backend *b, const float *logits, int vocab,
                        const struct sample_row *rows, int n, struct sample_result *results)
{
    struct both x = both_new(b, n, vocab, vocab + 4, DTYPE_F32);
    memcpy(x.host, logits, (size_t)(n * vocab) * 4);
    both_send(b, &x);
    b->ops->sample(b, x.t, rows, n, results);
    must(b->ops->ticket_wait(b, b->ops->step_end(b)));
    both_free(b, &x);
}

static void vocab_case(struct backend *b, int vocab, int first)
{
    enum { N = 10 };
    static struct lists lists[N];
    struct sample_row rows[N];
    struct sample_result results[N];
    float *logits = take((size_t)(N * vocab) * 4);
    double *x = take((size_t)vocab * 8);
    for (int i = 0; i < N; i++) {
        logits_fill(logits + i * vocab, vocab, (first + i) % 6);
        row_fill(&rows[i], &lists[i], vocab, first + i);
        if ((first + i) % 3 == 2) /* cut within one bucket, or among ties */
            rows[i].top_p = 0.4f, rows[i].top_k = 0, rows[i].min_p = 0, rows[i].temperature = 1;
        if ((first + i) % 6 == 1) /* the cut falls among ties that lie between kept tokens */
            rows[i].top_p = 0.8f, rows[i].top_k = 0, rows[i].min_p = 0, rows[i].temperature = 1;
    }
    memset(results, 0xee, sizeof results);
    sample_rows(b, logits, vocab, rows, N, results);
    for (int i = 0; i < N; i++) {
        int best = 0;
        for (int t = 0; t < vocab; t++)
            x[t] = (double)logits[i * vocab + t];
        reference_edit(&rows[i], x, vocab);
        for (int t = 0; t < vocab; t++)
            best = x[t] > x[best] ? t : best;
        assert_in_range(results[i].token, 0, vocab - 1);
        if (rows[i].temperature <= 0 ||
            x[best] == -INFINITY) /* rounding may swap two that are equal but for it */
            assert_true(x[results[i].token] == x[best] || x[best] - x[results[i].token] < 1e-5);
        else if (!token_right(&rows[i], x, vocab, results[i].token))
            fail_msg("vocabulary %d row %d: token %d is not the one drawn", vocab, first + i,
                     results[i].token);
        if (rows[i].n_logprobs >= 0) {
            bool edits = rows[i].n_output_tokens || rows[i].n_bias;
            if (!edits) logprobs_check(&rows[i], x, vocab, &results[i]);
        } else {
            assert_int_equal(results[i].n_top, 0);
        }
    }
    mem_free(logits), mem_free(x);
}

static void test_rule(void **state)
{
    static const int vocabs[] = {1, 2, 31, 130, 1000, 5003};
    struct backend *b = gear_open();
    (void)state;
    for (size_t v = 0; v < sizeof vocabs / sizeof *vocabs - (gear_quick() ? 1 : 0); v++)
        for (int first = 0; first < (vocabs[v] > 2000 ? 20 : 70); first += 10)
            vocab_case(b, vocabs[v], first);
    gear_close(b);
}

static void test_distribution(void **state)
{
    enum { VOCAB = 6, DRAWS = 1600, N = 16 };
    static const float logits[VOCAB] = {1, 2, 0, -1, 1.5f, -INFINITY};
    struct backend *b = gear_open();
    float *many = take(N * VOCAB * 4);
    int seen[VOCAB] = {0};
    double total = 0;
    (void)state;
    for (int i = 0; i < N * VOCAB; i++)
        many[i] = logits[i % VOCAB];
    for (int draw = 0; draw < DRAWS; draw += N) {
        struct sample_row rows[N];
        struct sample_result results[N];
        for (int i = 0; i < N; i++)
            rows[i] = (struct sample_row){.slot = -1,
                                          .temperature = 1,
                                          .top_p = 1,
                                          .repetition_penalty = 1,
                                          .forced_token = -1,
                                          .n_logprobs = -1,
                                          .seed = 9,
                                          .position = (uint64_t)(draw + i)};
        sample_rows(b, many, VOCAB, rows, N, results);
        for (int i = 0; i < N; i++)
            seen[results[i].token]++;
    }
    for (int t = 0; t < VOCAB; t++)
        total += exp((double)logits[t]);
    for (int t = 0; t < VOCAB; t++) {
        double expected = DRAWS * exp((double)logits[t]) / total;
        assert_true(fabs(seen[t] - expected) < 5 * sqrt(expected) + 1e-9);
    }
    mem_free(many);
    gear_close(b);
}

/* NaN never wins, +inf always does, and nothing but -inf still gives a token. */
static void test_strange_logits(void **state)
{
    enum { V = 40 };
    struct backend *b = gear_open();
    float logits[3 * V];
    struct sample_row rows[3];
    struct sample_result results[3];
    (void)state;
    for (int i = 0; i < V; i++)
        logits[i] = NAN, logits[V + i] = (float)i, logits[2 * V + i] = -INFINITY;
    logits[7] = -3, logits[V + 11] = INFINITY;
    for (int i = 0; i < 3; i++)
        rows[i] = (struct sample_row){.slot = i,
                                      .temperature = 0.8f,
                                      .top_p = 0.9f,
                                      .top_k = 5,
                                      .repetition_penalty = 1,
                                      .forced_token = -1,
                                      .n_logprobs = 2};
    sample_rows(b, logits, V, rows, 3, results);
    assert_int_equal(results[0].token, 7);
    assert_int_equal(results[0].top_tokens[0], 7);
    assert_int_equal(results[1].token, 11);
    assert_int_equal(results[2].token, 0);
    gear_close(b);
}

/* Repetition makes a seen token less likely whatever the sign of its logit. */
static void test_penalty_signs(void **state)
{
    struct backend *b = gear_open();
    static const float logits[2][3] = {{-1, -2, -9}, {3, 2, -9}};
    static const int32_t seen[1] = {0};
    struct sample_result result;
    (void)state;
    for (int i = 0; i < 2; i++) {
        struct sample_row row = {.slot = -1,
                                 .top_p = 1,
                                 .repetition_penalty = 3,
                                 .forced_token = -1,
                                 .n_logprobs = -1,
                                 .prompt_tokens = seen,
                                 .n_prompt_tokens = 1};
        sample_rows(b, logits[i], 3, &row, 1, &result);
        assert_int_equal(result.token, 1);
    }
    gear_close(b);
}

/* An output token that only the device knows counts like one that was named: one that was generated
 * before, one of the prompt, a new one, and one beyond the vocabulary, which nobody counts. Its bias
 * is added to what the penalties left. */
static void test_pending_output(void **state)
{
    enum { V = 300, SLOT = 3 };
    static const int32_t prompt[] = {5, 6, 7}, pending[] = {9, 6, 11, V + 7};
    struct backend *b = gear_open();
    float logits[2 * V];
    (void)state;
    for (int i = 0; i < 4; i++) {
        int32_t known[] = {8, 9, 9, pending[i]}, unknown[] = {8, 9, 9, -1};
        int32_t biased[] = {10, pending[i] < V ? pending[i] : 8};
        static const float bias[] = {0.75f, 1.5f};
        struct sample_result results[2];
        struct sample_row rows[2];
        for (int t = 0; t < V; t++)
            logits[t] = logits[V + t] = rand_float(1) + (t >= 5 && t <= 11 ? 8 : 0);
        rows[0] = rows[1] = (struct sample_row){.slot = SLOT,
                                                .top_p = 1,
                                                .repetition_penalty = 1.3f,
                                                .presence_penalty = 0.5f,
                                                .frequency_penalty = 0.25f,
                                                .forced_token = -1,
                                                .n_logprobs = 8,
                                                .prompt_tokens = prompt,
                                                .n_prompt_tokens = 3,
                                                .n_output_tokens = 4,
                                                .bias_tokens = biased,
                                                .bias_values = bias,
                                                .n_bias = 2};
        rows[0].output_tokens = known, rows[1].output_tokens = unknown;
        rows[0].slot = -1; /* the rows of a call have slots of their own */
        b->ops->feed(b, SLOT, pending[i]);
        sample_rows(b, logits, V, rows, 2, results);
        assert_int_equal(results[0].token, results[1].token);
        for (int k = 0; k < 8; k++) {
            assert_int_equal(results[0].top_tokens[k], results[1].top_tokens[k]);
            assert_true(results[0].top_logprobs[k] == results[1].top_logprobs[k]);
        }
    }
    gear_close(b);
}

/* The token of a row depends on the row alone; forced tokens; slots receive what was sampled. */
static void test_any_batch(void **state)
{
    enum { V = 500, N = 6 };
    struct backend *b = gear_open();
    static struct lists lists[N];
    struct sample_row rows[N];
    struct sample_result together[N], alone;
    float *logits = take(N * V * 4);
    (void)state;
    for (int i = 0; i < N; i++)
        logits_fill(logits + i * V, V, i % 2), row_fill(&rows[i], &lists[i], V, i + 1);
    rows[5].forced_token = 123;
    rows[5].n_logprobs = 1;
    sample_rows(b, logits, V, rows, N, together);
    assert_int_equal(together[5].token, 123);
    for (int i = 0; i < N; i++) {
        sample_rows(b, logits + i * V, V, &rows[i], 1, &alone);
        assert_int_equal(alone.token, together[i].token);
        assert_memory_equal(&alone.logprob, &together[i].logprob, 4);
    }
    mem_free(logits);
    gear_close(b);
}

/* More edits than the staging memory holds: rows go in rounds. */
static void test_long_lists(void **state)
{
    enum { V = 3000, N = 120, HISTORY = 3000 };
    if (gear_quick()) skip();
    struct backend *b = gear_open();
    struct sample_row *rows = take(N * sizeof *rows);
    struct sample_result *results = take(N * sizeof *results);
    float *logits = take((size_t)N * V * 4);
    int32_t *history = take(HISTORY * 4);
    (void)state;
    for (int i = 0; i < HISTORY; i++)
        history[i] = i;
    for (int i = 0; i < N; i++) {
        for (int t = 0; t < V; t++)
            logits[i * V + t] = t == 2 * i ? 3 : t == 2 * i + 1 ? 2.5f : 0;
        rows[i] = (struct sample_row){.slot = -1,
                                      .top_p = 1,
                                      .repetition_penalty = 1,
                                      .frequency_penalty = 1,
                                      .forced_token = -1,
                                      .n_logprobs = -1,
                                      .prompt_tokens = history,
                                      .n_prompt_tokens = HISTORY,
                                      .output_tokens = history + 2 * i,
                                      .n_output_tokens = 1};
    }
    sample_rows(b, logits, V, rows, N, results);
    for (int i = 0; i < N; i++)
        assert_int_equal(results[i].token, 2 * i + 1); /* 3 - 1 < 2.5 */
    mem_free(rows), mem_free(results), mem_free(logits), mem_free(history);
    gear_close(b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_rule),           cmocka_unit_test(test_distribution),
        cmocka_unit_test(test_strange_logits), cmocka_unit_test(test_penalty_signs),
        cmocka_unit_test(test_pending_output), cmocka_unit_test(test_any_batch),
        cmocka_unit_test(test_long_lists),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
