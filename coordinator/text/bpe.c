/* Byte-pair encoding: starts from characters and merges the pair of lowest rank, leftmost first,
 * until no pair is left (Sennrich et al. 2016, algorithm 1).
 *
 * Short words scan for the best pair; long ones keep the pairs in a heap, so that a megabyte
 * without a space costs O(n log n). A word that is itself a piece is looked up at once where
 * merging is known to end there, which is most words of most texts. The file's merges are read in
 * bpe_merges.c. */
#include "coordinator/text/bpe.h"
#include "base/mem.h"
#include "base/utf8.h"
#include "coordinator/text/model.h"
#include "coordinator/text/part.h"
#include "coordinator/text/unicode.h"

#include <string.h>

enum { SCAN_SYMBOLS_MAX = 24 };

/* ---- Reading ---- */

static const struct merge *find_merge(const struct model *m, int32_t left, int32_t right)
{
    uint64_t pair = (uint64_t)(uint32_t)left << 32 | (uint32_t)right;
    const struct merge *found = &m->merges[bpe_merge_slot(m, pair)];
    return found->pair == pair ? found : NULL;
}

static enum err index_characters(struct model *m)
{
    TRY(MEM_NEW_ARRAY(MODEL_CODES_DIRECT, &m->code_ids));
    for (uint32_t code = 0; code < MODEL_CODES_DIRECT; code++) {
        char text[4];
        bool surrogate = code >= 0xd800 && code < 0xe000;
        m->code_ids[code] = surrogate ? -1 : vocab_find(&m->vocab, text, utf8_encode(code, text));
    }
    return OK;
}

/* SentencePiece writes a space as this mark, at the beginning of pieces. */
static const char MARK[] = "\xe2\x96\x81";
enum { MARK_BYTES = 3 };

/* Where the next word begins in text[from..n): at a mark that follows something else. */
static size_t next_cut(const char *text, size_t from, size_t n)
{
    for (size_t at = from; at + MARK_BYTES <= n; at += MARK_BYTES) {
        const char *mark = memmem(text + at, n - at, MARK, MARK_BYTES);
        if (!mark) return n;
        at = (size_t)(mark - text);
        bool follows_mark = at >= MARK_BYTES && !memcmp(mark - MARK_BYTES, MARK, MARK_BYTES);
        if (at > from && !follows_mark) return at;
    }
    return n;
}

/* When no merge makes a piece with a mark inside, nothing is ever merged across the beginning of a
 * word, and a text without a pre-tokenizer may be cut there. */
static void index_cuts(struct model *m)
{
    m->cuts_at_marks =
        !m->subword_prefix[0] && !m->word_suffix[0] && vocab_find(&m->vocab, MARK, MARK_BYTES) >= 0;
    for (size_t i = 0; i < m->n_merge_slots && m->cuts_at_marks; i++) {
        if (m->merges[i].pair == MERGE_NONE) continue;
        struct span p = vocab_piece(&m->vocab, m->merges[i].id);
        m->cuts_at_marks = next_cut(p.data, 0, p.n) == p.n;
    }
}

enum err bpe_read(const json_t *object, const struct big_value *merges, struct model *m)
{
    const json_t *dropout = json_object_get(object, "dropout");
    if (json_is_number(dropout) && json_number_value(dropout) != 0)
        FAIL(ERR_UNSUPPORTED, "BPE dropout is not supported");
    TRY(part_bool(object, "fuse_unk", false, &m->fuse_unk));
    TRY(part_bool(object, "byte_fallback", false, &m->byte_fallback));
    TRY(part_bool(object, "ignore_merges", false, &m->ignore_merges));
    TRY(part_string(object, "continuing_subword_prefix", "", &m->subword_prefix));
    TRY(part_string(object, "end_of_word_suffix", "", &m->word_suffix));
    TRY(merges && merges->text.data ? bpe_merges_read_text(merges, m)
                                    : bpe_merges_read(json_object_get(object, "merges"), m));
    TRY(index_characters(m));
    index_cuts(m);
    return MEM_NEW_ARRAY(m->vocab.n_ids + 1, &m->whole);
}

/* ---- Encoding ---- */

static enum err add_symbol(struct model_scratch *s, int32_t id)
{
    if (s->n_symbols == s->symbols_capacity) {
        size_t capacity = s->symbols_capacity ? 2 * s->symbols_capacity : 64;
        if (capacity > INT32_MAX) FAIL(ERR_TOO_LONG, "a word of more than 2^30 characters");
        TRY(mem_resize((void **)&s->symbols, capacity * sizeof *s->symbols));
        s->symbols_capacity = capacity;
    }
    int32_t i = (int32_t)s->n_symbols++;
    s->symbols[i] = (struct symbol){id, i - 1, i + 1};
    return OK;
}

/* The id of one character, with the marks of its place in the word where the model has such;
 * *inout becomes the text that was looked up. */
static enum err find_character(const struct model *m, struct model_scratch *s, struct span *inout,
                               uint32_t code, bool first, bool last, int32_t *out)
{
    bool prefixed = !first && m->subword_prefix[0], suffixed = last && m->word_suffix[0];
    if (!prefixed && !suffixed) {
        *out = code < MODEL_CODES_DIRECT ? m->code_ids[code]
                                         : vocab_find(&m->vocab, inout->data, inout->n);
        return OK;
    }
    buf_clear(&s->text);
    if (prefixed) buf_add_string(&s->text, m->subword_prefix);
    buf_add(&s->text, inout->data, inout->n);
    if (suffixed) buf_add_string(&s->text, m->word_suffix);
    TRY(buf_err(&s->text));
    *inout = (struct span){s->text.data, s->text.n};
    *out = vocab_find(&m->vocab, inout->data, inout->n);
    return OK;
}

static bool has_all_bytes(const struct model *m, struct span s)
{
    for (size_t i = 0; i < s.n; i++)
        if (m->byte_ids[(unsigned char)s.data[i]] < 0) return false;
    return true;
}

/* Characters to symbols. An unknown one becomes its bytes, or the unknown token (one for a run of
 * them when fused), or nothing in a model that has neither. An unknown token is written only when
 * the next known character, another unknown one or the end is seen: bytes may overtake it. */
static enum err split_characters(const struct model *m, struct model_scratch *s, const char *word,
                                 size_t n)
{
    bool pending = false;
    s->n_symbols = 0;
    for (size_t at = 0, len; at < n; at += len) {
        uint32_t code;
        int32_t id;
        len = unicode_next(word + at, n - at, &code);
        struct span text = {word + at, len};
        TRY(find_character(m, s, &text, code, at == 0, at + len == n, &id));
        if (id >= 0) {
            if (pending) TRY(add_symbol(s, m->unk_id));
            pending = false;
            TRY(add_symbol(s, id));
        } else if (m->byte_fallback && has_all_bytes(m, text)) {
            for (size_t i = 0; i < text.n; i++)
                TRY(add_symbol(s, m->byte_ids[(unsigned char)text.data[i]]));
        } else if (m->unk_id >= 0) {
            if (pending && !m->fuse_unk) TRY(add_symbol(s, m->unk_id));
            pending = true;
        }
    }
    if (pending) TRY(add_symbol(s, m->unk_id));
    if (s->n_symbols) s->symbols[s->n_symbols - 1].next = -1;
    return OK;
}

static void join(struct symbol *symbols, int32_t left, int32_t id)
{
    int32_t right = symbols[left].next, after = symbols[right].next;
    symbols[left].id = id;
    symbols[left].next = after;
    symbols[right].id = -1;
    if (after >= 0) symbols[after].prev = left;
}

/* Finds the best pair anew after each merge: for words of a few characters nothing is faster. */
static void merge_by_scan(const struct model *m, struct symbol *symbols, size_t n)
{
    const struct merge *found[SCAN_SYMBOLS_MAX] = {0};
    for (size_t i = 0; i + 1 < n; i++)
        found[i] = find_merge(m, symbols[i].id, symbols[i + 1].id);
    for (;;) {
        int32_t best = -1;
        for (int32_t i = 0; i >= 0; i = symbols[i].next)
            if (found[i] && (best < 0 || found[i]->rank < found[best]->rank)) best = i;
        if (best < 0) return;
        join(symbols, best, found[best]->id);
        int32_t prev = symbols[best].prev, next = symbols[best].next;
        found[best] = next < 0 ? NULL : find_merge(m, symbols[best].id, symbols[next].id);
        if (prev >= 0) found[prev] = find_merge(m, symbols[prev].id, symbols[best].id);
    }
}

static enum err push(struct model_scratch *s, const struct merge *merge, int32_t at)
{
    if (s->n_heap == s->heap_capacity) {
        size_t capacity = s->heap_capacity ? 2 * s->heap_capacity : 256;
        TRY(mem_resize((void **)&s->heap, capacity * sizeof *s->heap));
        s->heap_capacity = capacity;
    }
    struct candidate new = {(uint64_t)merge->rank << 32 | (uint32_t)at, merge->id};
    size_t i = s->n_heap++;
    for (; i && s->heap[(i - 1) / 2].key > new.key; i = (i - 1) / 2)
        s->heap[i] = s->heap[(i - 1) / 2];
    s->heap[i] = new;
    return OK;
}

static struct candidate pop(struct model_scratch *s)
{
    struct candidate top = s->heap[0], last = s->heap[--s->n_heap];
    size_t i = 0;
    for (;;) {
        size_t child = 2 * i + 1;
        if (child >= s->n_heap) break;
        if (child + 1 < s->n_heap && s->heap[child + 1].key < s->heap[child].key) child++;
        if (s->heap[child].key >= last.key) break;
        s->heap[i] = s->heap[child];
        i = child;
    }
    s->heap[i] = last;
    return top;
}

static enum err push_pair(const struct model *m, struct model_scratch *s, int32_t left)
{
    int32_t right = left < 0 ? -1 : s->symbols[left].next;
    if (right < 0) return OK;
    const struct merge *merge = find_merge(m, s->symbols[left].id, s->symbols[right].id);
    return merge ? push(s, merge, left) : OK;
}

static enum err merge_by_heap(const struct model *m, struct model_scratch *s)
{
    s->n_heap = 0;
    for (size_t i = 0; i < s->n_symbols; i++)
        TRY(push_pair(m, s, (int32_t)i));
    while (s->n_heap) {
        struct candidate top = pop(s);
        int32_t left = (int32_t)(top.key & 0xffffffff), right = s->symbols[left].next;
        if (s->symbols[left].id < 0 || right < 0) continue;
        /* The pair may have changed since it was pushed; only its result is compared. */
        const struct merge *now = find_merge(m, s->symbols[left].id, s->symbols[right].id);
        if (!now || now->id != top.id) continue;
        join(s->symbols, left, top.id);
        TRY(push_pair(m, s, s->symbols[left].prev));
        TRY(push_pair(m, s, left));
    }
    return OK;
}

/* A word that is a piece: whether merging ends there is found out once. Threads that find it out at
 * the same time find the same. */
static bool is_whole(const struct model *m, int32_t id)
{
    return atomic_load_explicit(&m->whole[id], memory_order_relaxed) == WHOLE_YES;
}

static void note_whole(const struct model *m, const struct model_scratch *s, int32_t id)
{
    bool alone = s->n_symbols && s->symbols[0].next < 0 && s->symbols[0].id == id;
    atomic_store_explicit(&m->whole[id], alone ? WHOLE_YES : WHOLE_NO, memory_order_relaxed);
}

static enum err encode_word(const struct model *m, struct model_scratch *s, const char *word,
                            size_t n, struct token_list *out)
{
    int32_t id = vocab_find(&m->vocab, word, n);
    if (id >= 0 && is_whole(m, id)) return token_list_add(out, id);
    TRY(split_characters(m, s, word, n));
    if (s->n_symbols > SCAN_SYMBOLS_MAX)
        TRY(merge_by_heap(m, s));
    else if (s->n_symbols)
        merge_by_scan(m, s->symbols, s->n_symbols);
    if (id >= 0) note_whole(m, s, id);
    for (int32_t i = s->n_symbols ? 0 : -1; i >= 0; i = s->symbols[i].next)
        TRY(token_list_add(out, s->symbols[i].id));
    return OK;
}

enum err bpe_encode(const struct model *m, struct model_scratch *s, const char *word, size_t n,
                    struct token_list *out)
{
    int32_t id = m->ignore_merges ? vocab_find(&m->vocab, word, n) : -1;
    if (id >= 0) return token_list_add(out, id);
    for (size_t at = 0, end; at < n; at = end) {
        end = m->cuts_at_marks ? next_cut(word, at, n) : n;
        TRY(encode_word(m, s, word + at, end - at, out));
    }
    return OK;
}
