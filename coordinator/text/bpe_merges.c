/* Reading a model's merges: pairs of texts to pairs of ids, from a JSON list or from its text.
 *
 * They come a few hundred thousand at a time, and each asks the vocabulary thrice: pairs are
 * collected, and looked up together. What a pair becomes is mostly the piece that the pair before
 * became, or the next one, and is looked for there first. */
#include "base/mem.h"
#include "coordinator/text/bpe.h"

#include <string.h>

enum { MERGES_MAX = 1 << 24, BATCH_PAIRS = 64, PAIR_QUESTIONS = 3 };

struct merge_batch {
    struct model *m;
    size_t prefix;     /* bytes that the right half loses */
    size_t rank_first; /* of the first pair collected */
    size_t n_pairs, n_questions;
    int32_t guess; /* what the last pair known became */
    struct {
        struct span halves[2];
        int32_t id; /* what it becomes; -1: the question at id_question knows */
        size_t id_question;
    } pairs[BATCH_PAIRS];
    struct vocab_question questions[BATCH_PAIRS * PAIR_QUESTIONS]; /* two a pair, then the others */
    uint64_t keys[BATCH_PAIRS];
    struct buf texts; /* of the third questions */
};

static void batch_init(struct merge_batch *b, struct model *m)
{
    memset(b, 0, sizeof *b);
    b->m = m;
    b->prefix = m->subword_prefix ? strlen(m->subword_prefix) : 0;
    buf_init(&b->texts, 0);
}

/* Whether the piece of that id is left and right together. */
static bool is_joined(const struct vocab *v, int32_t id, struct span left, struct span right)
{
    struct span p = vocab_piece(v, id);
    return p.data && p.n == left.n + right.n && !memcmp(p.data, left.data, left.n) &&
           !memcmp(p.data + left.n, right.data, right.n);
}

static int32_t guess_joined(struct merge_batch *b, struct span left, struct span right)
{
    const struct vocab *v = &b->m->vocab;
    for (int32_t id = b->guess; id <= b->guess + 1; id++)
        if (is_joined(v, id, left, right)) return id;
    return -1;
}

/* The texts lie until the batch is through. */
static enum err batch_add(struct merge_batch *b, struct span left, struct span right)
{
    size_t i = b->n_pairs, cut = right.n < b->prefix ? right.n : b->prefix;
    struct span rest = {right.data + cut, right.n - cut};
    int32_t id = guess_joined(b, left, rest);
    if (id >= 0) b->guess = id;
    if (id < 0) {
        TRY(buf_add(&b->texts, left.data, left.n));
        TRY(buf_add(&b->texts, rest.data, rest.n));
        b->pairs[i].id_question = b->n_questions++;
    }
    b->pairs[i].halves[0] = left, b->pairs[i].halves[1] = right;
    b->pairs[i].id = id;
    b->n_pairs++;
    return OK;
}

static void batch_ask(struct merge_batch *b)
{
    size_t at = 0, n = 2 * b->n_pairs;
    for (size_t i = 0; i < b->n_pairs; i++) {
        struct span *halves = b->pairs[i].halves;
        for (size_t k = 0; k < 2; k++)
            b->questions[2 * i + k] = (struct vocab_question){halves[k].data, halves[k].n, 0, -1};
        if (b->pairs[i].id >= 0) continue;
        size_t bytes = halves[0].n + halves[1].n;
        bytes -= halves[1].n < b->prefix ? halves[1].n : b->prefix;
        b->questions[n + b->pairs[i].id_question] =
            (struct vocab_question){buf_string(&b->texts) + at, bytes, 0, -1};
        at += bytes;
    }
    vocab_find_all(&b->m->vocab, b->questions, n + b->n_questions);
}

/* Looks up and adds what was collected. */
static enum err batch_flush(struct merge_batch *b)
{
    struct model *m = b->m;
    const struct vocab_question *third = b->questions + 2 * b->n_pairs;
    batch_ask(b);
    for (size_t i = 0; i < b->n_pairs; i++) {
        int32_t left = b->questions[2 * i].id, right = b->questions[2 * i + 1].id;
        const struct span *halves = b->pairs[i].halves;
        if (b->pairs[i].id < 0) b->pairs[i].id = b->guess = third[b->pairs[i].id_question].id;
        if (left < 0 || right < 0 || b->pairs[i].id < 0)
            FAIL(ERR_FORMAT, "merge %zu ('%.*s' and '%.*s') is not in the vocabulary",
                 b->rank_first + i, halves[0].n < 60 ? (int)halves[0].n : 60, halves[0].data,
                 halves[1].n < 60 ? (int)halves[1].n : 60, halves[1].data);
        b->keys[i] = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
        __builtin_prefetch(&m->merges[bpe_merge_home(m, b->keys[i])], 1);
    }
    for (size_t i = 0; i < b->n_pairs; i++)
        m->merges[bpe_merge_slot(m, b->keys[i])] =
            (struct merge){b->keys[i], (uint32_t)(b->rank_first + i), b->pairs[i].id};
    b->rank_first += b->n_pairs;
    b->n_pairs = b->n_questions = 0;
    buf_clear(&b->texts);
    return OK;
}

static enum err make_room(struct model *m, size_t n)
{
    if (n > MERGES_MAX) FAIL(ERR_FORMAT, "more than %d merges", (int)MERGES_MAX);
    m->n_merge_slots = 16;
    while (m->n_merge_slots < 2 * n)
        m->n_merge_slots *= 2;
    TRY(MEM_NEW_ARRAY(m->n_merge_slots, &m->merges));
    for (size_t i = 0; i < m->n_merge_slots; i++)
        m->merges[i].pair = MERGE_NONE;
    return OK;
}

/* "a b" */
static enum err split_pair(struct span text, size_t rank, struct span out[2])
{
    const char *space = text.data ? memchr(text.data, ' ', text.n) : NULL;
    if (!space) FAIL(ERR_FORMAT, "merge %zu is not a pair", rank);
    out[0] = (struct span){text.data, (size_t)(space - text.data)};
    out[1] = (struct span){space + 1, text.n - out[0].n - 1};
    if (memchr(out[1].data, ' ', out[1].n))
        FAIL(ERR_FORMAT, "merge %zu has more than one space", rank);
    return OK;
}

/* ---- From a list ---- */

/* The two halves of a merge: ["a", "b"] or "a b". */
static enum err read_pair(const json_t *item, size_t rank, struct span out[2])
{
    if (!json_is_array(item) || json_array_size(item) != 2)
        return split_pair((struct span){json_string_value(item), json_string_length(item)}, rank,
                          out);
    for (size_t i = 0; i < 2; i++) {
        const json_t *half = json_array_get(item, i);
        if (!json_is_string(half)) FAIL(ERR_FORMAT, "merge %zu is not two strings", rank);
        out[i] = (struct span){json_string_value(half), json_string_length(half)};
    }
    return OK;
}

/* What is wrong with a merge is said before what is wrong with later ones. */
static enum err read_list(const json_t *list, size_t n, struct merge_batch *b)
{
    for (size_t i = 0; i < n; i++) {
        struct span pair[2];
        if (read_pair(json_array_get(list, i), i, pair)) {
            TRY(batch_flush(b));
            TRY(read_pair(json_array_get(list, i), i, pair));
        }
        TRY(batch_add(b, pair[0], pair[1]));
        if (b->n_pairs == BATCH_PAIRS) TRY(batch_flush(b));
    }
    return batch_flush(b);
}

enum err bpe_merges_read(const json_t *list, struct model *m)
{
    struct merge_batch *b;
    size_t n = json_array_size(list);
    if (!json_is_array(list)) FAIL(ERR_FORMAT, "the BPE model has no list \"merges\"");
    TRY(make_room(m, n));
    TRY(MEM_NEW(&b));
    batch_init(b, m);
    enum err e = read_list(list, n, b);
    buf_fini(&b->texts);
    mem_free(b);
    return e;
}

/* ---- From its text ---- */

static enum err read_pair_text(struct cut_reader *r, size_t rank, struct span out[2])
{
    struct span text;
    if (!cut_take(r, '[')) {
        TRY(cut_string(r, &text));
        return split_pair(text, rank, out);
    }
    TRY(cut_string(r, &out[0]));
    TRY(cut_expect(r, ','));
    TRY(cut_string(r, &out[1]));
    return cut_expect(r, ']');
}

static enum err read_text(struct cut_reader *r, size_t n_room, struct merge_batch *b)
{
    TRY(cut_expect(r, '['));
    if (cut_take(r, ']')) return cut_end(r);
    do {
        struct span pair[2];
        TRY(read_pair_text(r, b->rank_first + b->n_pairs, pair));
        if (b->rank_first + b->n_pairs == n_room) FAIL(ERR_FORMAT, "lists and texts are mixed");
        TRY(batch_add(b, pair[0], pair[1]));
        if (b->n_pairs < BATCH_PAIRS) continue;
        TRY(batch_flush(b));
        cut_reader_forget(r);
    } while (cut_take(r, ','));
    TRY(cut_expect(r, ']'));
    TRY(cut_end(r));
    return batch_flush(b);
}

/* How many there are at most: a pair is one string or two. */
static size_t count_pairs(const struct big_value *value)
{
    struct cut_reader r = {.at = value->text.data, .end = value->text.data + value->text.n};
    bool are_lists = cut_take(&r, '[') && cut_take(&r, '[');
    return are_lists ? value->n_strings / 2 : value->n_strings;
}

enum err bpe_merges_read_text(const struct big_value *value, struct model *m)
{
    struct merge_batch *b;
    struct cut_reader r = {0};
    size_t n_room = count_pairs(value);
    TRY(make_room(m, n_room));
    TRY(MEM_NEW(&b));
    batch_init(b, m);
    enum err e = cut_reader_init(&r, value->text);
    if (!e) e = read_text(&r, n_room, b);
    cut_reader_fini(&r);
    buf_fini(&b->texts);
    mem_free(b);
    return e;
}
