/* Reading a model of any kind, and the two small ones: WordPiece and WordLevel. */
#include "coordinator/text/model.h"
#include "base/mem.h"
#include "coordinator/text/part.h"
#include "coordinator/text/unicode.h"

#include <string.h>

/* ---- WordPiece: the longest piece that fits, again and again ---- */

enum err wordpiece_read(const json_t *object, struct model *m)
{
    TRY(part_string(object, "continuing_subword_prefix", "##", &m->subword_prefix));
    return part_int(object, "max_input_chars_per_word", 1 << 20, 100, &m->word_chars_max);
}

static size_t count_characters(const char *s, size_t n)
{
    size_t count = 0;
    for (size_t i = 0; i < n; i++)
        count += ((unsigned char)s[i] & 0xc0) != 0x80;
    return count;
}

/* The longest piece at the beginning of s, preceded by the subword prefix unless first. */
static enum err longest_piece(const struct model *m, struct model_scratch *scratch, const char *s,
                              size_t n, bool first, int32_t *out_id, size_t *out_n)
{
    size_t prefix = first ? 0 : strlen(m->subword_prefix);
    buf_clear(&scratch->text);
    buf_add(&scratch->text, m->subword_prefix, prefix);
    TRY(buf_add(&scratch->text, s, n));
    *out_id = -1;
    while (n) {
        *out_id = vocab_find(&m->vocab, scratch->text.data, prefix + n);
        *out_n = n;
        if (*out_id >= 0) break;
        n = unicode_last(s, n);
    }
    return OK;
}

enum err wordpiece_encode(const struct model *m, struct model_scratch *s, const char *word,
                          size_t n, struct token_list *out)
{
    size_t before = out->n;
    bool known = count_characters(word, n) <= (size_t)m->word_chars_max;
    for (size_t at = 0, len = 0; known && at < n; at += len) {
        int32_t id;
        TRY(longest_piece(m, s, word + at, n - at, at == 0, &id, &len));
        known = id >= 0;
        if (known) TRY(token_list_add(out, id));
    }
    if (known) return OK;
    out->n = before;
    if (m->unk_id < 0) FAIL(ERR_INVALID, "a word is unknown and the model has no unk_token");
    return token_list_add(out, m->unk_id);
}

static enum err wordlevel_encode(const struct model *m, const char *word, size_t n,
                                 struct token_list *out)
{
    int32_t id = vocab_find(&m->vocab, word, n);
    if (id < 0) id = m->unk_id;
    if (id < 0) FAIL(ERR_INVALID, "a word is unknown and the model has no unk_token");
    return token_list_add(out, id);
}

/* ---- All ---- */

static enum err read_vocab(const json_t *vocab, struct vocab *v)
{
    const char *text;
    json_t *id;
    if (!json_is_object(vocab)) FAIL(ERR_FORMAT, "the model has no object \"vocab\"");
    json_object_foreach((json_t *)vocab, text, id)
    {
        if (!json_is_integer(id)) FAIL(ERR_FORMAT, "the id of piece '%.40s' is no integer", text);
        TRY(vocab_add(v, text, strlen(text), json_integer_value(id)));
    }
    return OK;
}

/* The same from the file's text. A piece named twice is left to who words such errors. */
static enum err read_vocab_members(struct cut_reader *r, struct vocab *v)
{
    TRY(cut_expect(r, '{'));
    if (cut_take(r, '}')) return cut_end(r);
    do {
        struct span text;
        int32_t id;
        size_t n_before = v->n_pieces;
        TRY(cut_string(r, &text));
        TRY(cut_expect(r, ':'));
        TRY(cut_number(r, &id));
        TRY(vocab_add(v, text.data, text.n, id));
        if (v->n_pieces == n_before) FAIL(ERR_FORMAT, "a piece is named twice");
        cut_reader_forget(r);
    } while (cut_take(r, ','));
    TRY(cut_expect(r, '}'));
    return cut_end(r);
}

static enum err read_vocab_text(const struct big_value *value, struct vocab *v)
{
    struct cut_reader r;
    TRY(vocab_reserve(v, value->n_strings));
    TRY(cut_reader_init(&r, value->text));
    enum err e = read_vocab_members(&r, v);
    cut_reader_fini(&r);
    return e;
}

void model_find_bytes(struct model *m)
{
    static const char hex[] = "0123456789ABCDEF";
    char text[6] = "<0x00>";
    for (int byte = 0; byte < 256; byte++) {
        text[3] = hex[byte >> 4], text[4] = hex[byte & 15];
        m->byte_ids[byte] = vocab_find(&m->vocab, text, sizeof text);
    }
}

static enum err read_unk(const json_t *object, struct model *m)
{
    const json_t *unk = json_object_get(object, "unk_token");
    m->unk_id = -1;
    if (!unk || json_is_null(unk)) return OK;
    if (!json_is_string(unk)) FAIL(ERR_FORMAT, "'unk_token' must be a string");
    m->unk_id = vocab_find(&m->vocab, json_string_value(unk), json_string_length(unk));
    return OK;
}

/* Files of old writers leave the type out: what they have tells which it is. */
static enum err find_kind(const json_t *object, enum model_kind *out)
{
    static const char *const names[] = {"BPE", "WordPiece", "Unigram", "WordLevel"};
    const char *type = json_string_value(json_object_get(object, "type"));
    if (!json_is_object(object)) FAIL(ERR_FORMAT, "there is no object \"model\"");
    if (!type && json_object_get(object, "merges")) type = "BPE";
    if (!type && json_is_array(json_object_get(object, "vocab"))) type = "Unigram";
    if (!type && json_object_get(object, "continuing_subword_prefix")) type = "WordPiece";
    for (size_t i = 0; type && i < sizeof names / sizeof *names; i++) {
        if (strcmp(names[i], type)) continue;
        *out = (enum model_kind)i;
        return OK;
    }
    FAIL(ERR_UNSUPPORTED, "the model type '%s' is not supported", type ? type : "(none)");
}

static enum err read_any(const json_t *object, const struct big_values *big, struct model *m)
{
    bool cut = big && big->vocab.text.data;
    TRY(find_kind(object, &m->kind));
    if (big && big->merges.text.data && m->kind != MODEL_BPE)
        FAIL(ERR_FORMAT, "merges that nobody would read, well written or not");
    if (m->kind == MODEL_UNIGRAM) return unigram_read(object, m);
    TRY(cut ? read_vocab_text(&big->vocab, &m->vocab)
            : read_vocab(json_object_get(object, "vocab"), &m->vocab));
    TRY(read_unk(object, m));
    model_find_bytes(m);
    if (m->kind == MODEL_BPE) return bpe_read(object, big ? &big->merges : NULL, m);
    return m->kind == MODEL_WORDPIECE ? wordpiece_read(object, m) : OK;
}

enum err model_read(const json_t *object, const struct big_values *big, struct model *out)
{
    struct model m = {.unk_id = -1};
    vocab_init(&m.vocab);
    enum err e = read_any(object, big, &m);
    if (e)
        model_fini(&m);
    else
        *out = m;
    return e;
}

void model_fini(struct model *m)
{
    vocab_fini(&m->vocab);
    mem_free(m->subword_prefix);
    mem_free(m->word_suffix);
    mem_free(m->merges);
    mem_free(m->code_ids);
    mem_free((void *)m->whole);
    mem_free(m->scores);
    *m = (struct model){0};
}

void model_scratch_fini(struct model_scratch *s)
{
    mem_free(s->symbols);
    mem_free(s->heap);
    mem_free(s->paths);
    buf_fini(&s->text);
    *s = (struct model_scratch){0};
}

enum err model_encode(const struct model *m, struct model_scratch *s, const char *word, size_t n,
                      struct token_list *out)
{
    switch (m->kind) {
    case MODEL_BPE:
        return bpe_encode(m, s, word, n, out);
    case MODEL_WORDPIECE:
        return wordpiece_encode(m, s, word, n, out);
    case MODEL_UNIGRAM:
        return unigram_encode(m, s, word, n, out);
    default:
        return wordlevel_encode(m, word, n, out);
    }
}
