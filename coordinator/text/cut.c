/* See cut.h. Finding goes by brackets and quotes alone, reading by the grammar of RFC 8259. */
#include "coordinator/text/cut.h"
#include "base/mem.h"
#include "base/utf8.h"

#include <string.h>

/* ---- Finding ---- */

static bool is_blank(char c)
{
    return c == ' ' || c == '\n' || c == '\r' || c == '\t';
}

static const char *skip_blanks(const char *at, const char *end)
{
    while (at < end && is_blank(*at))
        at++;
    return at;
}

/* at is after the opening quote; returns what follows the closing one, NULL when there is none. */
static const char *skip_string(const char *at, const char *end)
{
    for (; at < end && *at != '"'; at++)
        if (*at == '\\' && at + 1 < end) at++;
    return at < end ? at + 1 : NULL;
}

/* A string, a number or word, or whatever stands between a bracket and its closing one. */
static const char *skip_value(const char *at, const char *end, size_t *n_strings)
{
    size_t depth = 0;
    *n_strings = 0;
    while (at && at < end) {
        switch (*at++) {
        case '"':
            at = skip_string(at, end);
            ++*n_strings;
            break;
        case '{':
        case '[':
            depth++;
            continue;
        case '}':
        case ']':
            if (!depth) return NULL;
            depth--;
            break;
        case ',':
        case ':':
            if (!depth) return NULL;
            continue;
        default:
            if (depth || at >= end || !strchr(",}] \n\r\t", *at)) continue;
        }
        if (!depth) return at;
    }
    return NULL;
}

/* The next member of an object: at is after its brace or a comma. Returns where the value begins,
 * NULL at the end or where something is odd. */
static const char *next_member(const char *at, const char *end, struct span *out_key)
{
    at = skip_blanks(at, end);
    if (at >= end || *at != '"') return NULL;
    const char *key = at + 1;
    at = skip_string(key, end);
    if (!at) return NULL;
    *out_key = (struct span){key, (size_t)(at - 1 - key)};
    at = skip_blanks(at, end);
    if (at >= end || *at != ':') return NULL;
    at = skip_blanks(at + 1, end);
    return at < end ? at : NULL;
}

static const char *after_comma(const char *at, const char *end)
{
    at = at ? skip_blanks(at, end) : end;
    return at < end && *at == ',' ? at + 1 : NULL;
}

/* What follows the brace of the document's "model", or NULL. */
static const char *find_model(const char *text, const char *end)
{
    struct span key;
    size_t n_strings;
    const char *at = skip_blanks(text, end);
    if (at >= end || *at != '{') return NULL;
    for (at++; at && (at = next_member(at, end, &key));) {
        if (span_equal(key, "model")) return *at == '{' ? at + 1 : NULL;
        at = after_comma(skip_value(at, end, &n_strings), end);
    }
    return NULL;
}

static void find_values(const char *at, const char *end, struct big_values *out)
{
    struct span key;
    while (at && (at = next_member(at, end, &key))) {
        size_t n_strings;
        const char *after = skip_value(at, end, &n_strings);
        if (!after) return;
        struct big_value value = {{at, (size_t)(after - at)}, n_strings};
        if (*at == '{' && !out->vocab.text.data && span_equal(key, "vocab")) out->vocab = value;
        if (*at == '[' && !out->merges.text.data && span_equal(key, "merges")) out->merges = value;
        if (out->vocab.text.data && out->merges.text.data) return;
        at = after_comma(after, end);
    }
}

enum err big_values_cut(const char *text, size_t n, struct big_values *out, struct buf *out_rest)
{
    struct big_values found = {0};
    const char *end = text + n;
    find_values(find_model(text, end), end, &found);
    if (!found.vocab.text.data) FAIL(ERR_FORMAT, "no object \"vocab\" in \"model\"");
    bool vocab_first = found.merges.text.data && found.vocab.text.data < found.merges.text.data;
    const struct span *order[2] = {&found.merges.text, &found.vocab.text};
    if (vocab_first) order[0] = &found.vocab.text, order[1] = &found.merges.text;
    const char *done = text;
    for (int i = 0; i < 2; i++) {
        if (!order[i]->data) continue;
        TRY(buf_add(out_rest, done, (size_t)(order[i]->data - done)));
        TRY(buf_add_string(out_rest, order[i] == &found.vocab.text ? "{}" : "[]"));
        done = order[i]->data + order[i]->n;
    }
    TRY(buf_add(out_rest, done, (size_t)(end - done)));
    *out = found;
    return OK;
}

/* ---- Reading ---- */

enum err cut_reader_init(struct cut_reader *r, struct span text)
{
    *r = (struct cut_reader){.at = text.data, .end = text.data + text.n};
    return mem_alloc(text.n, (void **)&r->work);
}

void cut_reader_fini(struct cut_reader *r)
{
    mem_free(r->work);
    *r = (struct cut_reader){0};
}

bool cut_take(struct cut_reader *r, char c)
{
    r->at = skip_blanks(r->at, r->end);
    if (r->at >= r->end || *r->at != c) return false;
    r->at++;
    return true;
}

enum err cut_expect(struct cut_reader *r, char c)
{
    if (!cut_take(r, c)) FAIL(ERR_FORMAT, "no '%c' where one must be", c);
    return OK;
}

enum err cut_end(const struct cut_reader *r)
{
    if (r->at != r->end) FAIL(ERR_FORMAT, "a value ends %zu bytes early", (size_t)(r->end - r->at));
    return OK;
}

static int hex_of(char c)
{
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    return c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* The four digits at at, -1 when they are none. */
static int32_t code_unit(const char *at, const char *end)
{
    int32_t unit = 0;
    if (end - at < 4) return -1;
    for (int i = 0; i < 4; i++) {
        int digit = hex_of(at[i]);
        if (digit < 0) return -1;
        unit = unit << 4 | digit;
    }
    return unit;
}

/* \uXXXX, a pair of them for what lies beyond U+FFFF; at is after the u. Returns the bytes read, 0
 * for what is no character and for U+0000. */
static size_t read_code(const char *at, const char *end, uint32_t *out)
{
    int32_t unit = code_unit(at, end);
    *out = (uint32_t)unit;
    if (unit <= 0 || (unit >= 0xdc00 && unit < 0xe000)) return 0;
    if (unit < 0xd800 || unit >= 0xe000) return 4;
    if (end - at < 10 || at[4] != '\\' || at[5] != 'u') return 0;
    int32_t low = code_unit(at + 6, end);
    if (low < 0xdc00 || low >= 0xe000) return 0;
    *out = 0x10000 + ((uint32_t)(unit - 0xd800) << 10 | (uint32_t)(low - 0xdc00));
    return 10;
}

/* What stands after a backslash, written to to. Returns the bytes read, 0 for no escape. */
static size_t read_escape(const char *at, const char *end, char *to, size_t *out_n)
{
    static const char names[] = "\"\\/bfnrt", bytes[] = "\"\\/\b\f\n\r\t";
    uint32_t code;
    *out_n = 1;
    if (at >= end || !*at) return 0;
    const char *name = strchr(names, *at);
    if (name) {
        *to = bytes[name - names];
        return 1;
    }
    size_t n = *at == 'u' ? read_code(at + 1, end, &code) : 0;
    if (n) *out_n = utf8_encode(code, to);
    return n ? n + 1 : 0;
}

/* The rest of a string whose escape is at r->at; what comes before it begins at start. */
static enum err unescape(struct cut_reader *r, const char *start, struct span *out)
{
    const char *at = r->at;
    char *begin = r->work + r->n_work, *to = begin;
    memcpy(to, start, (size_t)(at - start));
    to += at - start;
    while (at < r->end && *at != '"') {
        size_t n_read, n = 1;
        if (*at == '\\') {
            n_read = read_escape(at + 1, r->end, to, &n);
            if (!n_read) FAIL(ERR_FORMAT, "an escape that needs a closer look");
            n_read++;
        } else {
            n = n_read = (unsigned char)*at < 0x20 ? 0 : utf8_length(at, (size_t)(r->end - at));
            if (!n) FAIL(ERR_FORMAT, "a byte that no string may have");
            memcpy(to, at, n);
        }
        at += n_read, to += n;
    }
    if (at >= r->end) FAIL(ERR_FORMAT, "a string does not end");
    *out = (struct span){begin, (size_t)(to - begin)};
    r->n_work += (size_t)(to - begin);
    r->at = at + 1;
    return OK;
}

enum err cut_string(struct cut_reader *r, struct span *out)
{
    TRY(cut_expect(r, '"'));
    const char *start = r->at, *at = start, *end = r->end;
    while (at < end) {
        unsigned char c = (unsigned char)*at;
        if (c >= 0x80) {
            size_t n = utf8_length(at, (size_t)(end - at));
            if (!n) FAIL(ERR_FORMAT, "a byte that no string may have");
            at += n;
        } else if (c == '"') {
            *out = (struct span){start, (size_t)(at - start)};
            r->at = at + 1;
            return OK;
        } else if (c == '\\') {
            r->at = at;
            return unescape(r, start, out);
        } else if (c < 0x20)
            FAIL(ERR_FORMAT, "a byte that no string may have");
        else
            at++;
    }
    FAIL(ERR_FORMAT, "a string does not end");
}

enum err cut_number(struct cut_reader *r, int32_t *out)
{
    enum { DIGITS_MAX = 9 };
    int32_t value = 0;
    r->at = skip_blanks(r->at, r->end);
    const char *start = r->at, *at = start;
    for (; at < r->end && *at >= '0' && *at <= '9' && at - start < DIGITS_MAX; at++)
        value = value * 10 + (*at - '0');
    bool zero_first = at - start > 1 && *start == '0';
    if (at == start || zero_first || at >= r->end || (!is_blank(*at) && *at != ',' && *at != '}'))
        FAIL(ERR_FORMAT, "a number that needs a closer look");
    r->at = at;
    *out = value;
    return OK;
}
