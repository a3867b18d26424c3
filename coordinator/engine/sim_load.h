/* The simulator's clients: requests made from a seed, and what must come back for each.
 *
 * Knows the model and the engine's interface; never workers or the wire. */
#pragma once
#include "base/rand.h"
#include "coordinator/engine/engine.h"
#include "coordinator/engine/sim_worker.h"

enum { SIM_CHOICES_MAX = 8, SIM_WORDS_MAX = 200 };

struct sim_choice {
    uint64_t prefix; /* of all tokens so far */
    int32_t last;
    uint32_t n_output, n_scored;
    bool ended, stopped; /* stopped: this choice was told to stop */
};

struct sim_load; /* all of them */
struct sim_request {
    struct sink sink;
    struct sim_load *load;
    struct request request;
    int64_t arrival_us, cancel_us;
    int cancel_choice, cancel_how;
    bool submitted, accepted, cancelled, destroyed, ended, flushed;
    uint32_t n_ended;
    int64_t first_us, last_us; /* of its tokens */
    struct sim_choice choices[SIM_CHOICES_MAX];
    int32_t stop_ids[4];
};

struct sim_load {
    struct sim_request *requests; /* [n] */
    uint32_t n, n_accepted, n_ended, n_refused;
    uint64_t n_tokens;
    uint32_t capacity_least; /* of all incarnations of all groups, in tokens */
    bool shrinks;            /* it was not always the same */
    int64_t now_us;
    char words[256]; /* what went wrong, "" = nothing */
};

struct sim_load_shape {
    uint32_t n_requests, prompt_max, output_max, beams_max, choices_max;
    int64_t span_us;
    bool deadlines, cancels, scores, priorities;
    uint32_t repeats; /* many prompts come again after so many others; 0 = none do */
};

enum err sim_load_make(struct sim_load *l, struct rand *r, const struct sim_load_shape *shape);
void sim_load_fini(struct sim_load *l);
/* Whether an accepted request of these could be refused now for its length. */
void sim_wrong(struct sim_load *l, const struct sim_request *q, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* The best beams by a direct computation: tokens [n_choices][n_max], lengths. */
struct sim_beam_result {
    uint32_t n, lengths[SIM_CHOICES_MAX];
    int32_t tokens[SIM_CHOICES_MAX][SIM_WORDS_MAX];
    double scores[SIM_CHOICES_MAX];
};
void sim_beam_search(const struct request *r, struct sim_beam_result *out);
