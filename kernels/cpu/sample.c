/* From a row of logits to a token.
 *
 * The order is HF's: penalties, bias, bans; then temperature, top_k, top_p, min_p; then one draw,
 * rand_at(seed, position, 0), walked over the kept tokens in ascending id. Nothing is sorted: a cut
 * is a threshold found by a radix descent over the bits of the logits (11 + 11 + 10), so a row
 * costs a few passes over the vocabulary. All sums run in ascending id or descending bits, never in
 * an order that the batch could change. Rows are independent; the pool takes them one by one. */
#include "base/rand.h"
#include "kernels/cpu/cpu.h"
#include "kernels/cpu/vector_math.h"
#include "kernels/half.h"

#include <float.h>
#include <math.h>
#include <string.h>

enum { BUCKETS = 2048, PROMPT_FLAG = 1 << 30, LANES = 16 };

/* What is kept: keys above `key`, and the first `ties` tokens (by id) of exactly this key. */
struct cut {
    uint32_t key;
    int64_t ties;
};

struct sample_scratch {
    double mass[BUCKETS];
    float *weight;  /* [vocab] e^((x - max) / temperature) */
    int32_t *count; /* [vocab] occurrences of a token in what the penalties look at */
};

struct sample_job {
    struct tensor logits;
    const struct sample_row *rows;
    struct sample_result *results;
    int32_t *feedback;
    int n_slots;
};

size_t sample_scratch_bytes(int vocab_size)
{
    return sizeof(struct sample_scratch) + (size_t)vocab_size * 8 + 64;
}

static struct sample_scratch *scratch_of(void *memory, int64_t vocab)
{
    struct sample_scratch *s = memory;
    s->weight = (float *)(s + 1);
    s->count = (int32_t *)(s->weight + vocab);
    return s;
}

static bool in_vocab(int32_t token, int64_t vocab)
{
    return token >= 0 && token < vocab;
}

static void penalize_list(const struct sample_row *row, float *x, int64_t vocab, int32_t *count,
                          const int32_t *tokens, int32_t n)
{
    for (int32_t i = 0; i < n; i++) {
        if (!in_vocab(tokens[i], vocab) || !count[tokens[i]]) continue;
        float *v = &x[tokens[i]], repetition = row->repetition_penalty;
        int32_t output = count[tokens[i]] & (PROMPT_FLAG - 1);
        *v = *v > 0.0f ? *v / repetition : *v * repetition;
        if (output) *v -= (float)output * row->frequency_penalty + row->presence_penalty;
        count[tokens[i]] = 0; /* each token once, and the table is clean again */
    }
}

static void penalize(const struct sample_row *row, float *x, int64_t vocab, int32_t *count)
{
    if (row->repetition_penalty == 1.0f && row->presence_penalty == 0.0f &&
        row->frequency_penalty == 0.0f)
        return;
    memset(count, 0, (size_t)vocab * sizeof *count);
    for (int32_t i = 0; i < row->n_prompt_tokens; i++)
        if (in_vocab(row->prompt_tokens[i], vocab)) count[row->prompt_tokens[i]] = PROMPT_FLAG;
    for (int32_t i = 0; i < row->n_output_tokens; i++)
        if (in_vocab(row->output_tokens[i], vocab)) count[row->output_tokens[i]]++;
    penalize_list(row, x, vocab, count, row->prompt_tokens, row->n_prompt_tokens);
    penalize_list(row, x, vocab, count, row->output_tokens, row->n_output_tokens);
}

static void bias_and_ban(const struct sample_row *row, float *x, int64_t vocab)
{
    for (int32_t i = 0; i < row->n_bias; i++)
        if (in_vocab(row->bias_tokens[i], vocab)) x[row->bias_tokens[i]] += row->bias_values[i];
    for (int32_t i = 0; i < row->n_banned; i++)
        if (in_vocab(row->banned_tokens[i], vocab)) x[row->banned_tokens[i]] = -INFINITY;
}

/* The largest logit; NaN counts as -inf from here on, +inf as the largest float. */
static float clean_max(float *x, int64_t vocab)
{
    float lane[LANES], max = -INFINITY;
    int64_t i = 0;
    for (int j = 0; j < LANES; j++)
        lane[j] = -INFINITY;
    for (; i + LANES <= vocab; i += LANES)
        for (int j = 0; j < LANES; j++) {
            float v = x[i + j] == x[i + j] ? x[i + j] : -INFINITY;
            v = v > FLT_MAX ? FLT_MAX : v;
            x[i + j] = v;
            lane[j] = v > lane[j] ? v : lane[j];
        }
    for (; i < vocab; i++) {
        x[i] = x[i] == x[i] ? x[i] > FLT_MAX ? FLT_MAX : x[i] : -INFINITY;
        max = x[i] > max ? x[i] : max;
    }
    for (int j = 0; j < LANES; j++)
        max = lane[j] > max ? lane[j] : max;
    return max;
}

static int32_t first_equal(const float *x, int64_t vocab, float value)
{
    for (int64_t i = 0; i < vocab; i++)
        if (x[i] == value) return (int32_t)i;
    return 0;
}

/* log of the sum of e^(x - max): the sum in 16 lanes of double. */
static double log_sum(const float *x, int64_t vocab, float max)
{
    double lane[LANES] = {0}, sum = 0;
    float e[LANES];
    int64_t i = 0;
    for (; i + LANES <= vocab; i += LANES) {
        for (int j = 0; j < LANES; j++)
            e[j] = exp_approx(x[i + j] - max);
        for (int j = 0; j < LANES; j++)
            lane[j] += e[j];
    }
    for (; i < vocab; i++)
        sum += exp_approx(x[i] - max);
    for (int j = 0; j < LANES; j++)
        sum += lane[j];
    return log(sum);
}

/* The n largest logits, descending, ties by lower id: insertion into a short list. */
static void top_list(const float *x, int64_t vocab, int n, double log_total,
                     struct sample_result *out)
{
    float best[SAMPLE_LOGPROBS_MAX + 1];
    int found = 0;
    for (int64_t i = 0; i < vocab; i++) {
        if (found == n && x[i] <= best[n - 1]) continue;
        int at = found < n ? found++ : n - 1;
        for (; at > 0 && x[i] > best[at - 1]; at--) {
            best[at] = best[at - 1];
            out->top_tokens[at] = out->top_tokens[at - 1];
        }
        best[at] = x[i];
        out->top_tokens[at] = (int32_t)i;
    }
    out->n_top = found;
    for (int i = 0; i < found; i++)
        out->top_logprobs[i] = (float)((double)best[i] - log_total);
}

/* Floats as unsigned integers in the same order. */
static inline uint32_t order_key(float x)
{
    uint32_t u = float_bits(x);
    return u & 0x80000000u ? ~u : u | 0x80000000u;
}

/* The cut below which the mass of the largest keys first reaches target; only keys >= floor count.
 * weight NULL: every token has mass 1. */
static struct cut cut_at_mass(const float *x, const float *weight, int64_t vocab, uint32_t floor,
                              double target, double *mass)
{
    static const int shifts[3] = {21, 10, 0}, bits[3] = {11, 11, 10};
    uint32_t prefix = 0, mask = 0;
    double above = 0;
    for (int level = 0; level < 3; level++) {
        int n_buckets = 1 << bits[level];
        memset(mass, 0, (size_t)n_buckets * sizeof *mass);
        for (int64_t i = 0; i < vocab; i++) {
            uint32_t key = order_key(x[i]);
            if ((key & mask) != prefix || key < floor) continue;
            mass[key >> shifts[level] & (uint32_t)(n_buckets - 1)] +=
                weight ? (double)weight[i] : 1.0;
        }
        int b = n_buckets - 1, lowest = b;
        for (; b >= 0 && above + mass[b] < target; b--)
            above += mass[b];
        /* rounding may leave the target just out of reach: then the lowest bucket that has mass */
        if (b < 0)
            for (b = 0; b < lowest && mass[b] == 0.0; b++)
                continue;
        prefix |= (uint32_t)b << shifts[level];
        mask |= (uint32_t)(n_buckets - 1) << shifts[level];
    }
    struct cut cut = {prefix, INT64_MAX};
    if (!weight) return cut;
    cut.ties = 0;
    for (int64_t i = 0; i < vocab && above < target; i++)
        if (order_key(x[i]) == prefix) above += (double)weight[i], cut.ties++;
    return cut;
}

/* top_k as HF: everything at least as large as the k-th largest, ties included. */
static struct cut cut_top_k(const float *x, int64_t vocab, int32_t top_k, double *mass)
{
    if (top_k <= 0 || top_k >= vocab) return (struct cut){0, INT64_MAX};
    return cut_at_mass(x, NULL, vocab, 0, top_k, mass);
}

/* Walks the kept tokens in ascending id. With target < 0 it returns their mass in *out_mass; else
 * the token where the running mass exceeds target. */
static int32_t walk(const float *x, const float *weight, int64_t vocab, struct cut cut,
                    float weight_min, double target, double *out_mass)
{
    double sum = 0;
    int64_t ties = cut.ties;
    int32_t last = -1;
    for (int64_t i = 0; i < vocab; i++) {
        uint32_t key = order_key(x[i]);
        if (key < cut.key || weight[i] < weight_min || weight[i] <= 0.0f) continue;
        if (key == cut.key && ties-- <= 0) continue;
        sum += (double)weight[i];
        last = (int32_t)i;
        if (target >= 0 && sum > target) break;
    }
    if (out_mass) *out_mass = sum;
    return last;
}

static int32_t draw(const struct sample_row *row, const float *x, int64_t vocab, float max,
                    struct sample_scratch *s)
{
    float inverse = 1.0f / row->temperature;
    double mass;
    if (!(inverse < FLT_MAX)) return first_equal(x, vocab, max);
    for (int64_t i = 0; i < vocab; i++)
        s->weight[i] = exp_approx((x[i] - max) * inverse);
    struct cut cut = cut_top_k(x, vocab, row->top_k, s->mass);
    if (row->top_p < 1.0f) {
        walk(x, s->weight, vocab, cut, 0, -1, &mass);
        double target = row->top_p > 0 ? mass * (double)row->top_p : 0x1p-1000;
        cut = cut_at_mass(x, s->weight, vocab, cut.key, target, s->mass);
    }
    walk(x, s->weight, vocab, cut, row->min_p, -1, &mass);
    double target = mass * (double)rand_at(row->seed, row->position, 0);
    int32_t token = walk(x, s->weight, vocab, cut, row->min_p, target, NULL);
    return token >= 0 ? token : first_equal(x, vocab, max);
}

static void sample_one(const struct sample_row *row, float *x, int64_t vocab,
                       struct sample_result *out, struct sample_scratch *s)
{
    penalize(row, x, vocab, s->count);
    bias_and_ban(row, x, vocab);
    float max = clean_max(x, vocab);
    memset(out, 0, sizeof *out);
    if (in_vocab(row->forced_token, vocab))
        out->token = row->forced_token;
    else if (row->temperature <= 0.0f || max == -INFINITY)
        out->token = first_equal(x, vocab, max);
    else
        out->token = draw(row, x, vocab, max, s);
    if (row->n_logprobs < 0) return;
    double log_total = max == -INFINITY ? 0.0 : (double)max + log_sum(x, vocab, max);
    int n = row->n_logprobs < SAMPLE_LOGPROBS_MAX ? row->n_logprobs : SAMPLE_LOGPROBS_MAX;
    out->logprob = (float)((double)x[out->token] - log_total);
    if (n > 0) top_list(x, vocab, n, log_total, out);
}

static void sample_chunk(const void *args, int r, void *scratch)
{
    const struct sample_job *j = args;
    int64_t vocab = j->logits.cols;
    sample_one(&j->rows[r], (float *)j->logits.data + r * j->logits.stride, vocab, &j->results[r],
               scratch_of(scratch, vocab));
    if (j->rows[r].slot < 0) return;
    ASSERT_CMP(j->rows[r].slot, <, j->n_slots);
    j->feedback[j->rows[r].slot] = j->results[r].token;
}

void cpu_sample(struct backend *b, struct tensor logits, const struct sample_row *rows, int n_rows,
                struct sample_result *results)
{
    struct cpu_backend *cpu = cpu_of(b);
    struct sample_job j = {logits, rows, results, cpu->feedback, cpu->options.n_slots_max};
    ASSERT_CMP(logits.cols, <=, cpu->options.vocab_size);
    ASSERT_CMP(logits.rows, >=, n_rows);
    pool_run(cpu->pool,
             &(struct pool_job){
                 .compute = sample_chunk, .args = &j, .args_bytes = sizeof j, .n_chunks = n_rows});
}
