/* Drafts by prompt lookup: what followed the last time the sequence ended with these tokens.
 *
 * A draft is only a guess: the group keeps it while it equals the sample at its place, so the
 * tokens are those it would give anyhow. Drafting takes a sequence out of the pipelined decode set
 * (its result must be in before the next guess), so it is done only while enough of them are kept.
 *
 * Saxena: "Prompt lookup decoding", 2023. A draft model would be another source of draft_find. */
#include "coordinator/engine/state.h"

#include <string.h>

enum { NGRAM_MAX = 4, NGRAM_MIN = 2, LOOK_BACK_MAX = 8192 };
enum { DRAFT_START = 4, DRAFT_MAX = 32, REST_NONE = 4, REST_FIRST = 16, REST_MAX = 2048 };
enum { GAIN_ONE = 256, GAIN_START = 2 * GAIN_ONE };

/* Where the last n tokens occurred before, or 0: the index of the token that followed. */
static uint32_t find_ngram(const int32_t *tokens, uint32_t n_tokens, uint32_t n)
{
    const int32_t *tail = tokens + n_tokens - n;
    uint32_t stop = n_tokens > LOOK_BACK_MAX ? n_tokens - LOOK_BACK_MAX : 0;
    for (uint32_t i = n_tokens - 1; i >= stop + n; i--)
        if (tokens[i - 1] == tail[n - 1] && !memcmp(tokens + i - n, tail, n * sizeof *tokens))
            return i;
    return 0;
}

uint32_t draft_find(struct sequence *s, uint32_t n_max, int32_t *out)
{
    const int32_t *tokens = sequence_tokens(s);
    if (!n_max) return 0;
    for (uint32_t n = NGRAM_MAX; n >= NGRAM_MIN; n--) {
        uint32_t at = s->tokens.n > n ? find_ngram(tokens, s->tokens.n, n) : 0;
        if (!at) continue;
        uint32_t n_found = s->tokens.n - at < n_max ? s->tokens.n - at : n_max;
        memcpy(out, tokens + at, n_found * sizeof *out);
        return n_found;
    }
    return 0;
}

void draft_learn(struct sequence *s, uint32_t n_tried, uint32_t n_accepted)
{
    if (!n_tried) { /* nothing to guess just now */
        s->draft_rest = REST_NONE;
        return;
    }
    s->draft_gain = (3 * s->draft_gain + GAIN_ONE * n_accepted) / 4;
    if (n_accepted == n_tried)
        s->n_draft = (uint8_t)(2 * n_tried < DRAFT_MAX ? 2 * n_tried : DRAFT_MAX);
    else
        s->n_draft = (uint8_t)(n_accepted + 1);
    if (s->draft_gain >= GAIN_ONE) {
        s->draft_backoff = REST_FIRST;
        return;
    }
    /* It does not pay: rest, longer each time, then try once more with hope. */
    s->draft_rest = s->draft_backoff;
    if (s->draft_backoff < REST_MAX) s->draft_backoff *= 2;
    s->draft_gain = GAIN_START;
    s->n_draft = 0;
}

bool draft_wanted(const struct engine *e, const struct group *g, struct sequence *s)
{
    int32_t found[NGRAM_MIN];
    if (!e->config.n_speculative_tokens || !g->info.draft_tokens_max || s->job->beam) return false;
    if (s->draft_rest) {
        s->draft_rest--;
        return false;
    }
    if (!s->draft_gain) s->draft_gain = GAIN_START, s->draft_backoff = REST_FIRST;
    if (!s->n_draft) s->n_draft = DRAFT_START;
    if (draft_find(s, NGRAM_MIN, found)) return true;
    s->draft_rest = REST_NONE;
    return false;
}
