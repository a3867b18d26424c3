/* Running a tokenizer: text through the pipeline to ids, ids through the decoders to text. */
#include "coordinator/text/tokenizer.h"
#include "base/mem.h"
#include "base/utf8.h"
#include "coordinator/text/tokenizer_parts.h"
#include "coordinator/text/unicode.h"

#include <string.h>

/* ---- Lists ---- */

void token_list_init(struct token_list *list, size_t limit)
{
    *list = (struct token_list){.limit = limit};
}

void token_list_fini(struct token_list *list)
{
    mem_free(list->ids);
    *list = (struct token_list){.limit = list->limit};
}

enum err token_list_add(struct token_list *list, int32_t id)
{
    if (list->limit && list->n >= list->limit)
        FAIL(ERR_TOO_LONG, "more than %zu tokens", list->limit);
    if (list->n == list->capacity) {
        size_t capacity = list->capacity ? 2 * list->capacity : 64;
        TRY(mem_resize((void **)&list->ids, capacity * sizeof *list->ids));
        list->capacity = capacity;
    }
    list->ids[list->n++] = id;
    return OK;
}

/* ---- Encoding ---- */

struct encoding { /* one call of tokenizer_encode */
    const struct tokenizer *t;
    bool parse_special;
    struct regex_scratch *regex;
    struct model_scratch model;
    struct words words;
    struct sections raw, normalized;
    struct buf text, spare;
    struct token_list *out;
};

/* A stretch without added tokens: cut into words, words into pieces. */
static enum err encode_plain(struct encoding *c, const char *text, size_t n, bool first)
{
    struct words *w = &c->words;
    buf_clear(&w->text);
    TRY(buf_add(&w->text, text, n));
    TRY(pretokenizer_apply(&c->t->pretokenizer, c->regex, w, first));
    for (size_t i = 0; i < w->n; i++)
        TRY(model_encode(&c->t->model, &c->model, w->text.data + w->items[i].start,
                         w->items[i].end - w->items[i].start, c->out));
    return OK;
}

/* A stretch without tokens that are looked for in the raw text: normalized, then divided. */
static enum err encode_raw(struct encoding *c, const char *text, size_t n, bool first)
{
    buf_clear(&c->text);
    TRY(buf_add(&c->text, text, n));
    TRY(normalizer_apply(&c->t->normalizer, c->regex, &c->text, &c->spare));
    TRY(added_tokens_find(&c->t->added, &c->t->added.normalized, buf_string(&c->text), c->text.n,
                          c->parse_special, &c->normalized));
    for (size_t i = 0; i < c->normalized.n; i++) {
        struct section s = c->normalized.items[i];
        if (s.id >= 0)
            TRY(token_list_add(c->out, s.id));
        else
            TRY(encode_plain(c, buf_string(&c->text) + s.start, s.end - s.start,
                             first && s.start == 0));
    }
    return OK;
}

static enum err encode_valid(struct encoding *c, const char *text, size_t n)
{
    TRY(added_tokens_find(&c->t->added, &c->t->added.raw, text, n, c->parse_special, &c->raw));
    for (size_t i = 0; i < c->raw.n; i++) {
        struct section s = c->raw.items[i];
        if (s.id >= 0)
            TRY(token_list_add(c->out, s.id));
        else
            TRY(encode_raw(c, text + s.start, s.end - s.start, s.start == 0));
    }
    return OK;
}

static enum err add_all(const struct token_list *from, struct token_list *out)
{
    for (size_t i = 0; i < from->n; i++)
        TRY(token_list_add(out, from->ids[i]));
    return OK;
}

enum err tokenizer_encode(const struct tokenizer *t, const char *text, size_t n, unsigned flags,
                          struct token_list *out)
{
    struct encoding c = {.t = t, .out = out, .parse_special = flags & TOKENIZER_PARSE_SPECIAL};
    struct buf valid;
    buf_init(&valid, 0);
    enum err e;
    TRY_OUT(regex_scratch_create(&c.regex));
    if (utf8_valid_prefix(text, n) != n) {
        TRY_OUT(unicode_add_valid(&valid, text, n));
        text = valid.data, n = valid.n;
    }
    if (flags & TOKENIZER_ADD_SPECIAL) TRY_OUT(add_all(&t->post.before, out));
    TRY_OUT(encode_valid(&c, text, n));
    if (flags & TOKENIZER_ADD_SPECIAL) TRY_OUT(add_all(&t->post.after, out));
out:
    buf_fini(&valid);
    buf_fini(&c.text);
    buf_fini(&c.spare);
    sections_fini(&c.raw);
    sections_fini(&c.normalized);
    words_fini(&c.words);
    model_scratch_fini(&c.model);
    regex_scratch_destroy(c.regex);
    return e;
}

/* ---- Looking up ---- */

static const struct token_info *info_of(const struct tokenizer *t, int32_t id)
{
    return id >= 0 && (size_t)id < t->n_ids && t->infos[id].piece.data ? &t->infos[id] : NULL;
}

int32_t tokenizer_vocab_size(const struct tokenizer *t)
{
    return (int32_t)t->n_ids;
}

const char *tokenizer_token_text(const struct tokenizer *t, int32_t id)
{
    const struct token_info *info = info_of(t, id);
    return info ? info->piece.data : NULL;
}

int32_t tokenizer_find(const struct tokenizer *t, const char *piece)
{
    size_t n = strlen(piece);
    int32_t id = vocab_find(&t->added_vocab, piece, n);
    return id >= 0 ? id : vocab_find(&t->model.vocab, piece, n);
}

struct span tokenizer_bytes(const struct tokenizer *t, int32_t id)
{
    const struct token_info *info = info_of(t, id);
    return info ? info->bytes : (struct span){0};
}

bool tokenizer_is_special(const struct tokenizer *t, int32_t id)
{
    const struct token_info *info = info_of(t, id);
    return info && info->special;
}

int32_t tokenizer_bos_id(const struct tokenizer *t)
{
    return t->role_ids[ROLE_BOS];
}

int32_t tokenizer_eos_id(const struct tokenizer *t)
{
    return t->role_ids[ROLE_EOS];
}

int32_t tokenizer_pad_id(const struct tokenizer *t)
{
    return t->role_ids[ROLE_PAD];
}

int32_t tokenizer_unk_id(const struct tokenizer *t)
{
    return t->role_ids[ROLE_UNK];
}

size_t tokenizer_eos_ids(const struct tokenizer *t, const int32_t **out_ids)
{
    *out_ids = t->eos_ids.ids;
    return t->eos_ids.n;
}

const char *tokenizer_special_text(const struct tokenizer *t, const char *role)
{
    static const char *const keys[] = {
#define X(name, key) key,
        TOKENIZER_ROLES(X)
#undef X
    };
    for (int i = 0; i < ROLE_COUNT; i++)
        if (!strcmp(keys[i], role) && t->role_texts[i]) return t->role_texts[i];
    return "";
}

const char *tokenizer_chat_template(const struct tokenizer *t, const char *name)
{
    for (size_t i = 0; i < t->n_templates; i++)
        if (!strcmp(t->templates[i].name, name ? name : "default")) return t->templates[i].source;
    return NULL;
}

/* ---- Decoding ---- */

enum err detokenizer_init(struct detokenizer *d, const struct tokenizer *t, bool skip_special)
{
    struct decoder_state *states;
    TRY(decoder_states_create(&t->decoder, &states));
    *d = (struct detokenizer){.t = t, .skip_special = skip_special, .states = states};
    return OK;
}

void detokenizer_fini(struct detokenizer *d)
{
    if (d->t) decoder_states_destroy(&d->t->decoder, d->states);
    *d = (struct detokenizer){0};
}

enum err detokenizer_next(struct detokenizer *d, int32_t id, struct buf *out)
{
    const struct token_info *info = info_of(d->t, id);
    if (!info || (d->skip_special && info->special)) return OK;
    d->n_tokens++;
    return decoder_next(&d->t->decoder, d->states, info->piece.data, info->piece.n, out);
}

enum err detokenizer_flush(struct detokenizer *d, struct buf *out)
{
    d->n_tokens = 0;
    return decoder_flush(&d->t->decoder, d->states, out);
}

enum err tokenizer_decode(const struct tokenizer *t, const int32_t *ids, size_t n,
                          bool skip_special, struct buf *out)
{
    struct detokenizer d = {0};
    TRY(detokenizer_init(&d, t, skip_special));
    enum err e = OK;
    for (size_t i = 0; i < n && !e; i++)
        e = detokenizer_next(&d, ids[i], out);
    if (!e) e = detokenizer_flush(&d, out);
    detokenizer_fini(&d);
    return e;
}
