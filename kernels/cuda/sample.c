/* The host's half of sampling: what the caller wants of each row, written for the device.
 *
 * Penalties look at whole histories; here each token of a history is counted once, so the device
 * receives one edit a token. Long lists of bans travel as one bit a token. When a step's edits do
 * not fit its pinned memory, the rows so far are sampled, waited for, and the memory is used again.
 */
#include "kernels/cuda/cuda.h"

#include <string.h>

enum { UNIT = sizeof(struct sample_edit), SEEN_IN_PROMPT = 1 << 30 };

/* Where the next edit goes: index in units of one edit from the step's first. */
struct edit_writer {
    struct sample_edit *edits;
    int32_t used, room;
    int64_t vocab;
};

static bool in_vocab(const struct edit_writer *w, int32_t token)
{
    return token >= 0 && token < w->vocab;
}

static void edit_add(struct edit_writer *w, struct sample_edit edit)
{
    ASSERT_CMP(w->used, <, w->room);
    w->edits[w->used++] = edit;
}

static bool has_penalties(const struct sample_row *row)
{
    return row->repetition_penalty != 1.0f || row->presence_penalty != 0.0f ||
           row->frequency_penalty != 0.0f;
}

/* One edit for each token counted, and its count back to zero. */
static void counted_add(struct edit_writer *w, const int32_t *tokens, int32_t n, int32_t *count)
{
    for (int32_t i = 0; i < n; i++) {
        if (!in_vocab(w, tokens[i]) || !count[tokens[i]]) continue;
        int32_t n_output = count[tokens[i]] & (SEEN_IN_PROMPT - 1);
        edit_add(w, (struct sample_edit){
                        .token = tokens[i], .n_output = n_output, .kind = EDIT_PENALTY});
        count[tokens[i]] = 0;
    }
}

static void penalties_add(struct edit_writer *w, const struct sample_row *row, int32_t *count)
{
    if (!has_penalties(row)) return;
    for (int32_t i = 0; i < row->n_prompt_tokens; i++)
        if (in_vocab(w, row->prompt_tokens[i])) count[row->prompt_tokens[i]] = SEEN_IN_PROMPT;
    for (int32_t i = 0; i < row->n_output_tokens; i++)
        if (in_vocab(w, row->output_tokens[i])) count[row->output_tokens[i]]++;
    counted_add(w, row->prompt_tokens, row->n_prompt_tokens, count);
    counted_add(w, row->output_tokens, row->n_output_tokens, count);
}

static int32_t mask_units(int64_t vocab)
{
    return (int32_t)((vocab + UNIT * 8 - 1) / (UNIT * 8));
}

/* Returns where the mask begins. */
static int32_t mask_add(struct edit_writer *w, const struct sample_row *row)
{
    int32_t units = mask_units(w->vocab), at = w->used;
    uint32_t *mask = (uint32_t *)(w->edits + at);
    ASSERT_CMP(at + units, <=, w->room);
    memset(mask, 0, (size_t)units * UNIT);
    for (int32_t i = 0; i < row->n_banned; i++)
        if (in_vocab(w, row->banned_tokens[i]))
            mask[row->banned_tokens[i] / 32] |= 1u << (row->banned_tokens[i] % 32);
    w->used += units;
    return at;
}

static void task_write(struct sample_task *t, const struct sample_row *row, struct edit_writer *w,
                       int32_t *count)
{
    *t = (struct sample_task){.slot = row->slot,
                              .top_k = row->top_k,
                              .n_logprobs = row->n_logprobs,
                              .forced_token = row->forced_token,
                              .temperature = row->temperature,
                              .top_p = row->top_p,
                              .min_p = row->min_p,
                              .repetition_penalty = row->repetition_penalty,
                              .presence_penalty = row->presence_penalty,
                              .frequency_penalty = row->frequency_penalty,
                              .seed = row->seed,
                              .position = row->position,
                              .mask = -1};
    t->edits[EDIT_PENALTY] = w->used;
    penalties_add(w, row, count);
    bool pending = has_penalties(row) && row->n_output_tokens > 0 &&
                   row->output_tokens[row->n_output_tokens - 1] < 0;
    t->n_pending = pending;
    t->edits[EDIT_BIAS] = w->used;
    for (int32_t i = 0; i < row->n_bias && i < w->vocab; i++)
        if (in_vocab(w, row->bias_tokens[i]))
            edit_add(w,
                     (struct sample_edit){row->bias_tokens[i], 0, row->bias_values[i], EDIT_BIAS});
    t->edits[EDIT_BAN] = w->used;
    bool few = row->n_banned <= mask_units(w->vocab);
    for (int32_t i = 0; few && i < row->n_banned; i++)
        if (in_vocab(w, row->banned_tokens[i]))
            edit_add(w, (struct sample_edit){.token = row->banned_tokens[i], .kind = EDIT_BAN});
    t->edits[EDIT_BAN + 1] = w->used;
    if (!few) t->mask = mask_add(w, row);
}

/* Units that a row needs at most. */
static int64_t row_units(const struct sample_row *row, int64_t vocab)
{
    int64_t history = (int64_t)row->n_prompt_tokens + row->n_output_tokens, n = mask_units(vocab);
    if (has_penalties(row)) n += history < vocab ? history : vocab;
    return n + (row->n_bias < vocab ? row->n_bias : vocab);
}

/* Writes tasks and edits for as many rows as fit; returns how many. */
static int rows_write(struct cuda_backend *b, struct cuda_step *s, int64_t vocab,
                      const struct sample_row *rows, int n_rows, size_t *out_edits_at)
{
    size_t tasks_at = s->edits_used,
           edits_at = (tasks_at + (size_t)n_rows * sizeof(struct sample_task) + 15) / 16 * 16;
    struct sample_task *tasks = (struct sample_task *)(s->edits + tasks_at);
    if (edits_at >= b->edit_bytes) return 0;
    struct edit_writer w = {(struct sample_edit *)(s->edits + edits_at), 0,
                            (int32_t)((b->edit_bytes - edits_at) / UNIT), vocab};
    int n = 0;
    for (; n < n_rows && w.used + row_units(&rows[n], vocab) <= w.room; n++)
        task_write(&tasks[n], &rows[n], &w, b->token_count);
    if (n == 0) return 0;
    *out_edits_at = edits_at;
    s->edits_used = (edits_at + (size_t)w.used * UNIT + 15) / 16 * 16;
    return n;
}

static void rows_sample(struct cuda_backend *b, struct cuda_step *s, struct tensor logits, int n,
                        size_t tasks_at, size_t edits_at)
{
    size_t bytes = s->edits_used - tasks_at;
    cudaError_t r = cudaMemcpyAsync(b->edits + tasks_at, s->edits + tasks_at, bytes,
                                    cudaMemcpyHostToDevice, b->stream);
    if (!cuda_ok(b, r, "the rows to sample")) return;
    r = (cudaError_t)launch_sample(logits, (const struct sample_task *)(b->edits + tasks_at),
                                   (const struct sample_edit *)(b->edits + edits_at), n, b->results,
                                   b->feedback, b->options.n_slots_max, b->stream);
    if (!cuda_ok(b, r, "sample")) return;
    cuda_trace_worked(b, s);
    r = cudaMemcpyAsync(s->results + s->n_results, b->results, (size_t)n * sizeof *b->results,
                        cudaMemcpyDeviceToHost, b->stream);
    cuda_ok(b, r, "the tokens");
}

void cuda_sample(struct backend *base, struct tensor logits, const struct sample_row *rows,
                 int n_rows, struct sample_result *results)
{
    struct cuda_backend *b = cuda_of(base);
    struct cuda_step *s = cuda_step_now(b);
    ASSERT_CMP(logits.cols, <=, b->options.vocab_size);
    ASSERT_CMP(logits.rows, >=, n_rows);
    ASSERT_CMP(s->n_results + n_rows, <=, b->options.n_tokens_max);
    for (int n; n_rows && !b->failed; rows += n, n_rows -= n, results += n) {
        size_t tasks_at = s->edits_used, edits_at = 0;
        n = rows_write(b, s, logits.cols, rows, n_rows, &edits_at);
        if (n == 0) { /* full: what was written must be read before it is written again */
            ASSERT_CMP(s->edits_used, >, 0);
            if (cuda_sync(base)) return;
            s->edits_used = 0;
            continue;
        }
        ASSERT_CMP(s->n_deliver, <, SAMPLES_MAX);
        rows_sample(b, s, logits, n, tasks_at, edits_at);
        s->deliver[s->n_deliver].to = results;
        s->deliver[s->n_deliver++].n = n;
        s->n_results += n;
        logits.data = (float *)logits.data + n * logits.stride;
    }
}
