/* Beam search by direct computation, after the text of HF transformers' algorithm and not after
 * beam.c: all candidates of all beams in one list, sorted, split into running and finished. */
#include "coordinator/engine/sim_load.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

struct line {
    double score;      /* sum of logprobs, or the final score */
    uint32_t n, order; /* order: of the candidate, to keep the sort stable */
    uint64_t prefix;
    bool hit;
    int32_t tokens[SIM_WORDS_MAX];
};

enum { WIDTH_MAX = 8, KEEP_MAX = 32 };

static int by_score(const void *a, const void *b)
{
    const struct line *x = a, *y = b;
    if (x->score != y->score) return x->score > y->score ? -1 : 1;
    return x->order < y->order ? -1 : x->order > y->order;
}

static bool stops(const struct sampling_params *p, uint32_t n_output, int32_t token)
{
    if (n_output < (uint32_t)p->min_tokens) return false;
    for (int32_t i = 0; i < p->n_stop_ids; i++)
        if (p->stop_ids[i] == token) return true;
    return false;
}

/* The (1 + stops) * width best continuations of all running beams. */
static uint32_t expand(const struct request *r, const struct line *running, uint32_t n_running,
                       struct line *out)
{
    static struct line all[WIDTH_MAX * KEEP_MAX];
    uint32_t n = 0, n_stops = r->sampling.n_stop_ids > 1 ? (uint32_t)r->sampling.n_stop_ids : 1;
    uint32_t n_keep = (1 + n_stops) * r->beam_width;
    if (n_keep > KEEP_MAX) n_keep = KEEP_MAX;
    for (uint32_t b = 0; b < n_running; b++) {
        int32_t tokens[SIM_VOCABULARY + 1];
        float logprobs[SIM_VOCABULARY + 1];
        model_top(running[b].prefix, n_keep, tokens, logprobs);
        for (uint32_t k = 0; k < n_keep; k++, n++) {
            all[n] = running[b];
            all[n].score += (double)logprobs[k];
            all[n].order = b * n_keep + k;
            all[n].tokens[all[n].n++] = tokens[k];
            all[n].prefix = model_prefix(running[b].prefix, tokens[k]);
            all[n].hit = stops(&r->sampling, running[b].n, tokens[k]) || all[n].n == r->max_tokens;
        }
    }
    qsort(all, n, sizeof *all, by_score);
    if (n > n_keep) n = n_keep;
    memcpy(out, all, n * sizeof *out);
    return n;
}

void sim_beam_search(const struct request *r, struct sim_beam_result *out)
{
    static struct line running[WIDTH_MAX], candidates[KEEP_MAX], finished[4 * WIDTH_MAX];
    uint32_t n_running = 1, n_finished = 0, width = r->beam_width;
    running[0] = (struct line){.prefix = 1};
    for (uint32_t i = 0; i < r->n_tokens; i++)
        running[0].prefix = model_prefix(running[0].prefix, r->tokens[i]);
    for (uint32_t length = 1;; length++) {
        uint32_t n = expand(r, running, n_running, candidates);
        bool full = n_finished >= width;
        for (uint32_t i = 0; i < n && i < width; i++)
            if (candidates[i].hit && !(full && r->early_stopping)) {
                finished[n_finished] = candidates[i];
                finished[n_finished].order = 1000 + length * 100 + i;
                finished[n_finished++].score /= pow((double)length, (double)r->length_penalty);
            }
        qsort(finished, n_finished, sizeof *finished, by_score);
        if (n_finished > width) n_finished = width;
        n_running = 0;
        for (uint32_t i = 0; i < n && n_running < width; i++)
            if (!candidates[i].hit) running[n_running++] = candidates[i];
        if (!n_running || length >= r->max_tokens) break;
        full = n_finished >= width;
        if (full && r->early_stopping) break;
        double best = running[0].score / pow((double)length, (double)r->length_penalty);
        if (full && best <= finished[width - 1].score) break;
    }
    out->n = n_finished < r->n_choices ? n_finished : r->n_choices;
    for (uint32_t i = 0; i < out->n; i++) {
        out->lengths[i] = finished[i].n;
        out->scores[i] = finished[i].score;
        memcpy(out->tokens[i], finished[i].tokens, finished[i].n * sizeof(int32_t));
    }
    for (uint32_t i = out->n; i < SIM_CHOICES_MAX; i++)
        out->lengths[i] = 0;
}
