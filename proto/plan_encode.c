/* Plans and results to protobuf bytes, by hand: no message tree, no copy, straight into a buffer.
 *
 * The bytes are the ones protobuf-c's own packer would give (a test compares them). A nested
 * message leaves five bytes for its length and moves its body down once the length is known.
 * Never knows what a plan means. */
#include "proto/plan.h"

#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
               "fixed32 and fixed64 are copied as they lie");

enum { WIRE_VARINT = 0, WIRE_FIXED64 = 1, WIRE_BYTES = 2, WIRE_FIXED32 = 5 };
enum { LENGTH_ROOM = 5 }; /* bytes of the longest 32-bit varint */
enum { VARINT_MAX = 10, ENTRY_MAX = 5 };
enum { SMALL_END = 1 << 28 };

static char *varint(char *p, uint64_t v)
{
    for (; v >= 0x80; v >>= 7)
        *p++ = (char)(v | 0x80);
    *p++ = (char)v;
    return p;
}

/* The same without a branch, for most numbers there are; writes four bytes and keeps one to four.
 */
static inline char *small_varint(char *p, uint32_t v)
{
    uint32_t n = 1 + (v >= 1u << 7) + (v >= 1u << 14) + (v >= 1u << 21);
    uint32_t bytes = (v & 0x7f) | (v & 0x3f80) << 1 | (v & 0x1fc000) << 2 | (v & 0xfe00000) << 3;
    bytes |= 0x00808080u & ((1u << 8 * (n - 1)) - 1);
    memcpy(p, &bytes, sizeof bytes);
    return p + n;
}

static uint64_t zigzag(int32_t v)
{
    return ((uint32_t)v << 1) ^ (uint32_t)(v >> 31);
}

static void put_tag(struct buf *b, int field, int wire)
{
    if (buf_reserve(b, VARINT_MAX)) return;
    b->n = (size_t)(varint(b->data + b->n, (uint64_t)(field << 3 | wire)) - b->data);
}

/* A scalar of value zero is absent in proto3. */
static void put_uint(struct buf *b, int field, uint64_t v)
{
    if (!v || buf_reserve(b, 2 * VARINT_MAX)) return;
    put_tag(b, field, WIRE_VARINT);
    b->n = (size_t)(varint(b->data + b->n, v) - b->data);
}

static void put_fixed(struct buf *b, int field, int wire, const void *v, size_t n)
{
    put_tag(b, field, wire);
    buf_add(b, v, n);
}

static void put_float(struct buf *b, int field, float v)
{
    if (v != 0) put_fixed(b, field, WIRE_FIXED32, &v, sizeof v);
}

/* Opens a nested message or a packed array; close_length() closes it. */
static size_t open_length(struct buf *b, int field)
{
    put_tag(b, field, WIRE_BYTES);
    size_t at = b->n;
    if (!buf_reserve(b, LENGTH_ROOM)) b->n += LENGTH_ROOM;
    return at;
}

static void close_length(struct buf *b, size_t at)
{
    if (b->failed) return;
    size_t n = b->n - at - LENGTH_ROOM;
    char length[VARINT_MAX];
    size_t n_length = (size_t)(varint(length, n) - length);
    memcpy(b->data + at, length, n_length);
    memmove(b->data + at + n_length, b->data + at + LENGTH_ROOM, n);
    b->n = at + n_length + n;
}

/* A packed array of n 32-bit words that lie stride bytes apart. */
static void put_words(struct buf *b, int field, size_t n, const void *first, size_t stride)
{
    if (!n) return;
    size_t at = open_length(b, field);
    if (buf_reserve(b, n * ENTRY_MAX)) return;
    char *p = b->data + b->n;
    const char *from = first;
    for (size_t i = 0; i < n; i++, from += stride) {
        uint32_t v;
        memcpy(&v, from, sizeof v);
        p = v < SMALL_END ? small_varint(p, v) : varint(p, v);
    }
    b->n = (size_t)(p - b->data);
    close_length(b, at);
}

static void put_floats(struct buf *b, int field, size_t n, const float *v)
{
    if (!n) return;
    size_t at = open_length(b, field);
    buf_add(b, v, n * sizeof *v);
    close_length(b, at);
}

static void put_sampling(struct buf *b, const struct sampling_params *s)
{
    size_t at = open_length(b, 7);
    put_float(b, 1, s->temperature);
    put_uint(b, 2, zigzag(s->top_k));
    put_float(b, 3, s->top_p);
    put_float(b, 4, s->min_p);
    put_float(b, 5, s->repetition_penalty);
    put_float(b, 6, s->presence_penalty);
    put_float(b, 7, s->frequency_penalty);
    if (s->seed) put_fixed(b, 8, WIRE_FIXED64, &s->seed, sizeof s->seed);
    put_uint(b, 9, zigzag(s->n_logprobs));
    put_uint(b, 10, zigzag(s->n_prompt_logprobs));
    put_words(b, 11, (size_t)s->n_bias, s->bias_tokens, sizeof *s->bias_tokens);
    put_floats(b, 12, (size_t)s->n_bias, s->bias_values);
    put_uint(b, 13, (uint32_t)s->min_tokens);
    put_words(b, 14, (size_t)s->n_stop_ids, s->stop_ids, sizeof *s->stop_ids);
    close_length(b, at);
}

static void put_open(struct buf *b, const struct plan_open *o)
{
    size_t at = open_length(b, 10);
    put_uint(b, 1, o->slot);
    put_words(b, 2, o->n_tokens, o->tokens, sizeof *o->tokens);
    put_uint(b, 3, o->n_prompt);
    put_uint(b, 4, o->n_computed);
    put_uint(b, 5, o->n_tokens_max);
    put_words(b, 6, o->n_blocks, o->blocks, sizeof *o->blocks);
    put_sampling(b, &o->sampling);
    close_length(b, at);
}

static void put_fork(struct buf *b, const struct plan_fork *f)
{
    size_t at = open_length(b, 11);
    put_uint(b, 1, f->from);
    put_uint(b, 2, f->to);
    put_uint(b, 3, f->n_tokens);
    put_words(b, 4, f->n_append, f->append, sizeof *f->append);
    put_uint(b, 5, f->n_computed);
    put_words(b, 6, f->n_blocks, f->blocks, sizeof *f->blocks);
    close_length(b, at);
}

static void put_pairs(struct buf *b, int field_from, int field_to, size_t n,
                      const struct plan_pair *p)
{
    put_words(b, field_from, n, n ? &p->from : NULL, sizeof *p);
    put_words(b, field_to, n, n ? &p->to : NULL, sizeof *p);
}

/* Wishes to the worker's draft model; left out where there is none. */
static void put_own(struct buf *b, const struct step_plan *plan)
{
    uint32_t own = 0, ahead = 0;
    for (uint32_t i = 0; i < plan->n_runs; i++)
        own |= plan->runs[i].n_own, ahead |= plan->runs[i].n_ahead;
    if (own) put_words(b, 21, plan->n_runs, &plan->runs->n_own, sizeof *plan->runs);
    if (ahead) put_words(b, 22, plan->n_runs, &plan->runs->n_ahead, sizeof *plan->runs);
}

static void put_drafts(struct buf *b, const struct step_plan *plan)
{
    uint64_t n = 0;
    for (uint32_t i = 0; i < plan->n_runs; i++)
        n += plan->runs[i].n_drafts;
    if (!n) return; /* the counts are all zero: the field is left out */
    put_words(b, 18, plan->n_runs, &plan->runs->n_drafts, sizeof *plan->runs);
    size_t at = open_length(b, 19);
    for (uint32_t i = 0; i < plan->n_runs; i++)
        for (uint32_t k = 0; k < plan->runs[i].n_drafts; k++) {
            if (buf_reserve(b, ENTRY_MAX)) return;
            b->n = (size_t)(varint(b->data + b->n, (uint32_t)plan->runs[i].drafts[k]) - b->data);
        }
    close_length(b, at);
}

enum err plan_encode(const struct step_plan *plan, struct buf *out)
{
    size_t at = open_length(out, 3);
    put_uint(out, 1, plan->epoch);
    put_uint(out, 2, plan->step);
    put_words(out, 3, plan->n_closes, plan->closes, sizeof *plan->closes);
    put_pairs(out, 4, 5, plan->n_saves, plan->saves);
    put_pairs(out, 6, 7, plan->n_loads, plan->loads);
    put_pairs(out, 8, 9, plan->n_copies, plan->copies);
    for (uint32_t i = 0; i < plan->n_opens; i++)
        put_open(out, &plan->opens[i]);
    for (uint32_t i = 0; i < plan->n_forks; i++)
        put_fork(out, &plan->forks[i]);
    put_pairs(out, 12, 13, plan->n_extends, plan->extends);
    put_words(out, 14, plan->n_pauses, plan->pauses, sizeof *plan->pauses);
    if (plan->n_runs) {
        put_words(out, 15, plan->n_runs, &plan->runs->slot, sizeof *plan->runs);
        put_words(out, 16, plan->n_runs, &plan->runs->n_tokens, sizeof *plan->runs);
        put_words(out, 17, plan->n_runs, &plan->runs->flags, sizeof *plan->runs);
        put_drafts(out, plan);
    }
    put_uint(out, 20, plan->idle);
    if (plan->n_runs) put_own(out, plan);
    put_pairs(out, 31, 32, plan->n_fetches, plan->fetches);
    put_pairs(out, 33, 34, plan->n_spills, plan->spills);
    close_length(out, at);
    if (!out->failed) out->data[out->n] = 0;
    return buf_err(out);
}

/* Flags on the wire: those of the struct, and whether a logprob belongs to the entry. */
static void put_flags(struct buf *b, const struct step_result *r)
{
    uint32_t any = 0;
    for (uint32_t i = 0; i < r->n_tokens; i++)
        any |= r->tokens[i].flags | r->tokens[i].has_logprob;
    if (!any) return;
    size_t at = open_length(b, 5);
    if (buf_reserve(b, r->n_tokens)) return;
    for (uint32_t i = 0; i < r->n_tokens; i++) {
        const struct step_token *t = &r->tokens[i];
        b->data[b->n++] = (char)((t->flags & STEP_TOKEN_SCORED) | (t->has_logprob ? 2 : 0));
    }
    close_length(b, at);
}

static void put_top_counts(struct buf *b, const struct step_result *r)
{
    size_t at = open_length(b, 7);
    if (buf_reserve(b, (size_t)r->n_tokens * ENTRY_MAX)) return;
    char *p = b->data + b->n;
    for (uint32_t i = 0; i < r->n_tokens; i++)
        if (r->tokens[i].has_logprob) p = varint(p, r->tokens[i].n_top);
    b->n = (size_t)(p - b->data);
    close_length(b, at);
}

static void put_top(struct buf *b, const struct step_result *r)
{
    size_t at = open_length(b, 8);
    for (uint32_t i = 0; i < r->n_tokens; i++) {
        const struct step_token *t = &r->tokens[i];
        if (!t->has_logprob || buf_reserve(b, (size_t)t->n_top * ENTRY_MAX)) continue;
        char *p = b->data + b->n;
        for (uint32_t k = 0; k < t->n_top; k++)
            p = varint(p, (uint32_t)t->top_tokens[k]);
        b->n = (size_t)(p - b->data);
    }
    close_length(b, at);
    at = open_length(b, 9);
    for (uint32_t i = 0; i < r->n_tokens; i++)
        if (r->tokens[i].has_logprob && r->tokens[i].n_top)
            buf_add(b, r->tokens[i].top_logprobs, r->tokens[i].n_top * sizeof(float));
    close_length(b, at);
}

static void put_logprobs(struct buf *b, const struct step_result *r)
{
    uint64_t n = 0, n_top = 0;
    for (uint32_t i = 0; i < r->n_tokens; i++) {
        n += r->tokens[i].has_logprob;
        n_top += r->tokens[i].has_logprob ? r->tokens[i].n_top : 0;
    }
    if (!n) return;
    size_t at = open_length(b, 6);
    for (uint32_t i = 0; i < r->n_tokens; i++)
        if (r->tokens[i].has_logprob) buf_add(b, &r->tokens[i].logprob, sizeof(float));
    close_length(b, at);
    if (!n_top) return; /* the counts are all zero: the fields are left out */
    put_top_counts(b, r);
    put_top(b, r);
}

enum err step_result_encode(const struct step_result *result, bool ack_only, struct buf *out)
{
    size_t at = open_length(out, ack_only ? 4 : 3);
    put_uint(out, 1, result->epoch);
    put_uint(out, 2, result->step);
    if (!ack_only) {
        put_words(out, 3, result->n_tokens, result->n_tokens ? &result->tokens->slot : NULL,
                  sizeof *result->tokens);
        put_words(out, 4, result->n_tokens, result->n_tokens ? &result->tokens->token : NULL,
                  sizeof *result->tokens);
        put_flags(out, result);
        put_logprobs(out, result);
        put_uint(out, 10, result->compute_us);
        put_uint(out, 11, result->wait_us);
        put_uint(out, 12, result->collective_us);
        put_pairs(out, 13, 14, result->n_drafted, result->drafted);
        put_uint(out, 15, result->draft_us);
        put_uint(out, 16, result->draft_passes);
        put_uint(out, 17, result->draft_tokens);
        put_uint(out, 18, result->draft_first_us);
    }
    close_length(out, at);
    if (!out->failed) out->data[out->n] = 0;
    return buf_err(out);
}

static void put_longs(struct buf *b, int field, size_t n, const uint64_t *v)
{
    if (!n) return;
    size_t at = open_length(b, field);
    for (size_t i = 0; i < n; i++) {
        if (buf_reserve(b, VARINT_MAX)) return;
        b->n = (size_t)(varint(b->data + b->n, v[i]) - b->data);
    }
    close_length(b, at);
}

enum err moved_encode(const struct moved *moved, struct buf *out)
{
    size_t at = open_length(out, 9);
    put_uint(out, 1, moved->epoch);
    put_uint(out, 2, moved->n_fetched);
    put_uint(out, 3, moved->n_spilled);
    put_longs(out, 4, moved->n_fetches_failed, moved->fetches_failed);
    put_longs(out, 5, moved->n_spills_failed, moved->spills_failed);
    put_uint(out, 6, moved->fetch_ns);
    close_length(out, at);
    if (!out->failed) out->data[out->n] = 0;
    return buf_err(out);
}
