/* Added tokens: a byte trie, and the rules of where a match counts and how far it reaches. */
#include "coordinator/text/added_tokens.h"
#include "base/mem.h"
#include "coordinator/text/unicode.h"
#include "coordinator/text/vocab.h"

#include <string.h>

/* ---- The trie ---- */

static enum err add_node(struct trie *t, unsigned char byte, int32_t sibling, int32_t *out)
{
    if (t->n == t->capacity) {
        size_t capacity = t->capacity ? 2 * t->capacity : 64;
        if (capacity > INT32_MAX) FAIL(ERR_FORMAT, "too many added tokens");
        TRY(mem_resize((void **)&t->nodes, capacity * sizeof *t->nodes));
        t->capacity = capacity;
    }
    t->nodes[t->n] = (struct trie_node){-1, sibling, -1, byte};
    *out = (int32_t)t->n++;
    return OK;
}

static int32_t find_child(const struct trie *t, int32_t node, unsigned char byte)
{
    int32_t i = t->nodes[node].child;
    while (i >= 0 && t->nodes[i].byte != byte)
        i = t->nodes[i].sibling;
    return i;
}

static enum err trie_add(struct trie *t, const char *text, size_t n, int32_t token)
{
    int32_t at, next;
    if (!n) return OK;
    if (!t->n) {
        TRY(add_node(t, 0, -1, &at));
        memset(t->roots, 0xff, sizeof t->roots);
    }
    at = 0;
    for (size_t i = 0; i < n; i++, at = next) {
        unsigned char byte = (unsigned char)text[i];
        next = find_child(t, at, byte);
        if (next >= 0) continue;
        TRY(add_node(t, byte, t->nodes[at].child, &next));
        t->nodes[at].child = next;
        if (at == 0) t->roots[byte] = next;
    }
    if (t->nodes[at].token < 0) t->nodes[at].token = token; /* the first of equals */
    return OK;
}

/* The longest token at the beginning of text, -1 for none. */
static int32_t trie_longest(const struct trie *t, const char *text, size_t n, size_t *out_n)
{
    int32_t found = -1, at = t->roots[(unsigned char)text[0]];
    for (size_t i = 1; at >= 0; i++) {
        if (t->nodes[at].token >= 0) {
            found = t->nodes[at].token;
            *out_n = i;
        }
        if (i >= n) break;
        at = find_child(t, at, (unsigned char)text[i]);
    }
    return found;
}

/* ---- Reading ---- */

static enum err read_token(const json_t *object, struct added_token *t)
{
    int64_t id;
    TRY(part_string(object, "content", "", &t->text));
    t->n = strlen(t->text);
    TRY(part_int(object, "id", VOCAB_IDS_MAX - 1, 0, &id));
    if (!json_object_get(object, "id")) FAIL(ERR_FORMAT, "added token '%s' has no id", t->text);
    t->id = (int32_t)id;
    TRY(part_bool(object, "special", false, &t->special));
    TRY(part_bool(object, "single_word", false, &t->single_word));
    TRY(part_bool(object, "lstrip", false, &t->left_strip));
    TRY(part_bool(object, "rstrip", false, &t->right_strip));
    return part_bool(object, "normalized", !t->special, &t->normalized);
}

/* Puts one token into the set it belongs to; a normalized one is searched for as the normalizer
 * would write it. */
static enum err index_token(struct added_tokens *a, size_t i, const struct normalizer *normalizer,
                            struct regex_scratch *scratch)
{
    struct added_token *t = &a->items[i];
    if (!t->normalized) return trie_add(&a->raw, t->text, t->n, (int32_t)i);
    struct buf text, spare;
    buf_init(&text, 0);
    buf_init(&spare, 0);
    enum err e = unicode_add_valid(&text, t->text, t->n);
    if (!e) e = normalizer_apply(normalizer, scratch, &text, &spare);
    if (!e) e = trie_add(&a->normalized, buf_string(&text), text.n, (int32_t)i);
    buf_fini(&text);
    buf_fini(&spare);
    return e;
}

static enum err index_all(struct added_tokens *a, const struct normalizer *normalizer)
{
    struct regex_scratch *scratch;
    TRY(regex_scratch_create(&scratch));
    enum err e = OK;
    for (int pass = 0; pass < 2; pass++) /* special tokens first */
        for (size_t i = 0; i < a->n && !e; i++)
            if (a->items[i].special == !pass) e = index_token(a, i, normalizer, scratch);
    regex_scratch_destroy(scratch);
    return e;
}

enum err added_tokens_read(const json_t *list, const struct normalizer *normalizer,
                           struct added_tokens *out)
{
    struct added_tokens a = {0};
    size_t n = json_array_size(list);
    if (list && !json_is_null(list) && !json_is_array(list))
        FAIL(ERR_FORMAT, "\"added_tokens\" must be a list");
    if (n > ADDED_TOKENS_MAX) FAIL(ERR_FORMAT, "more than %d added tokens", ADDED_TOKENS_MAX);
    TRY(MEM_NEW_ARRAY(n, &a.items));
    enum err e = OK;
    for (; a.n < n && !e; a.n++)
        e = read_token(json_array_get(list, a.n), &a.items[a.n]);
    if (!e) e = index_all(&a, normalizer);
    if (e)
        added_tokens_fini(&a);
    else
        *out = a;
    return e;
}

void added_tokens_fini(struct added_tokens *a)
{
    for (size_t i = 0; i < a->n; i++)
        mem_free(a->items[i].text);
    mem_free(a->items);
    mem_free(a->raw.nodes);
    mem_free(a->normalized.nodes);
    *a = (struct added_tokens){0};
}

/* ---- Finding ---- */

static enum err add_section(struct sections *s, int32_t id, size_t start, size_t end)
{
    if (s->n == s->capacity) {
        size_t capacity = s->capacity ? 2 * s->capacity : 16;
        TRY(mem_resize((void **)&s->items, capacity * sizeof *s->items));
        s->capacity = capacity;
    }
    s->items[s->n++] = (struct section){id, start, end};
    return OK;
}

void sections_fini(struct sections *s)
{
    mem_free(s->items);
    *s = (struct sections){0};
}

static bool ends_with_word(const char *text, size_t n)
{
    uint32_t code = 0;
    size_t last = n ? unicode_last(text, n) : 0;
    if (n) unicode_next(text + last, n - last, &code);
    return n && unicode_is_word(code);
}

static bool begins_with_word(const char *text, size_t n)
{
    uint32_t code = 0;
    if (n) unicode_next(text, n, &code);
    return n && unicode_is_word(code);
}

/* Where the run of spaces that ends text[from..n) begins. */
static size_t spaces_before(const char *text, size_t from, size_t n)
{
    while (n > from) {
        uint32_t code;
        size_t last = unicode_last(text, n);
        unicode_next(text + last, n - last, &code);
        if (!unicode_is_space(code)) break;
        n = last;
    }
    return n;
}

static size_t spaces_after(const char *text, size_t at, size_t n)
{
    while (at < n) {
        uint32_t code;
        size_t len = unicode_next(text + at, n - at, &code);
        if (!unicode_is_space(code)) break;
        at += len;
    }
    return at;
}

enum err added_tokens_find(const struct added_tokens *a, const struct trie *set, const char *text,
                           size_t n, bool parse_special, struct sections *out)
{
    size_t done = 0, len = 0;
    out->n = 0;
    for (size_t at = 0; set->n && at < n;) {
        int32_t found = trie_longest(set, text + at, n - at, &len);
        if (found < 0) {
            at++;
            continue;
        }
        const struct added_token *t = &a->items[found];
        size_t start = at, end = at + len;
        at = end; /* the search goes on here even when the match does not count */
        if (t->special && !parse_special) continue;
        if (t->single_word &&
            (ends_with_word(text, start) || begins_with_word(text + end, n - end)))
            continue;
        if (t->left_strip && start > done) start = spaces_before(text, done, start);
        if (t->right_strip) end = spaces_after(text, end, n);
        if (start > done) TRY(add_section(out, -1, done, start));
        TRY(add_section(out, t->id, start, end));
        done = end;
    }
    return done < n || !n ? add_section(out, -1, done, n) : OK;
}
