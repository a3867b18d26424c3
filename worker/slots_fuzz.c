/* Any bytes are a plan: refused with words, or applied within every limit. The samples of the steps
 * come from the bytes as well, so that the slots live through many of them. */
#include "worker/step.h"

#include <string.h>

enum { BLOCKS = 8, SLOTS = 4 };
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const struct slots_limits limits = {.n_slots = SLOTS,
                                           .context_max = 48,
                                           .draft_max = 3,
                                           .block_size = 8,
                                           .n_blocks = BLOCKS,
                                           .n_host_blocks = 2,
                                           .vocab_size = 64,
                                           .step_tokens_max = 32,
                                           .logprobs_max = SAMPLE_LOGPROBS_MAX};

static void arrays_check(const struct step *s)
{
    const struct batch *b = &s->batch;
    ASSERT_CMP(b->n_tokens, <=, 32);
    ASSERT_CMP(b->n_rows_out, <=, b->n_tokens);
    for (int i = 0; i < b->n_tokens; i++) {
        ASSERT(b->token_ids[i] >= -1 && b->token_ids[i] < 64);
        ASSERT(b->positions[i] >= 0 && b->positions[i] < 48);
        ASSERT(b->cache_slot[i] >= 0 && b->cache_slot[i] < BLOCKS * 8);
        ASSERT(b->token_slot[i] >= 0 && b->token_slot[i] < SLOTS);
    }
    for (int i = 0; i < b->n_rows_out; i++)
        ASSERT(b->rows_out[i] >= (i ? b->rows_out[i - 1] + 1 : 0) && b->rows_out[i] < b->n_tokens);
    for (int i = 0; i < b->n_seqs; i++) {
        ASSERT_CMP(b->seq_start[i], <, b->seq_start[i + 1]);
        ASSERT_CMP(b->context_len[i], <=, b->blocks_per_seq_max * 8);
        for (int k = 0; k < b->blocks_per_seq_max; k++) {
            int32_t block = b->block_table[i * b->blocks_per_seq_max + k];
            ASSERT(block >= 0 && block < BLOCKS);
        }
    }
}

static void results_make(struct step *s, const uint8_t *data, size_t size)
{
    for (uint32_t i = 0; i < s->n_rows; i++) {
        const struct sample_row *r = &s->sample_rows[i];
        for (int32_t t = 0; t < r->n_prompt_tokens; t++)
            ASSERT(r->prompt_tokens[t] >= 0 && r->prompt_tokens[t] < 64);
        for (int32_t t = 0; t < r->n_output_tokens; t++)
            ASSERT(r->output_tokens[t] >= 0 && r->output_tokens[t] < 64);
        memset(&s->results[i], 0, sizeof s->results[i]);
        s->results[i].token = r->forced_token >= 0 ? r->forced_token : data[(i * 31) % size] & 63;
    }
}

/* Plans lie one after another, each behind a byte with its length. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static struct slots slots;
    static struct step step;
    static struct arena arena;
    if (!slots.all) {
        if (slots_init(&slots, &limits) || step_init(&step, &slots)) return 0;
        arena_init(&arena, 1 << 16, 1 << 20);
    }
    slots_reset(&slots, BLOCKS, 2);
    for (size_t at = 0; at + 1 < size;) {
        struct step_plan plan;
        size_t n = data[at] < size - at - 1 ? data[at] : size - at - 1;
        arena_reset(&arena);
        enum err e = plan_decode(data + at + 1, n, &arena, &plan);
        if (!e) e = slots_apply(&slots, &plan);
        if (e) {
            ASSERT(*err_detail());
            break;
        }
        step_fill(&step, &slots, true);
        arrays_check(&step);
        results_make(&step, data, size);
        step_settle(&step, &slots);
        at += n + 1;
    }
    return 0;
}
