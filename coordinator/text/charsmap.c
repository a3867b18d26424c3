/* SentencePiece's precompiled character map. Knows nothing of normalizers around it. */
#include "coordinator/text/charsmap.h"
#include "base/mem.h"
#include "coordinator/text/unicode.h"

#include <string.h>

static int base64_value(unsigned char c)
{
    if (c >= 'A' && c <= 'Z') return c - 'A';
    if (c >= 'a' && c <= 'z') return c - 'a' + 26;
    if (c >= '0' && c <= '9') return c - '0' + 52;
    return c == '+' ? 62 : c == '/' ? 63 : -1;
}

static enum err decode_base64(const char *s, size_t n, struct buf *out)
{
    while (n && s[n - 1] == '=')
        n--;
    uint32_t bits = 0;
    int n_bits = 0;
    TRY(buf_reserve(out, n));
    for (size_t i = 0; i < n; i++) {
        int v = base64_value((unsigned char)s[i]);
        if (v < 0) FAIL(ERR_FORMAT, "precompiled_charsmap is not base64 at byte %zu", i);
        bits = bits << 6 | (uint32_t)v, n_bits += 6;
        if (n_bits < 8) continue;
        n_bits -= 8;
        TRY(buf_add_char(out, (char)(bits >> n_bits & 0xff)));
    }
    return OK;
}

static uint32_t read_u32(const char *p)
{
    const unsigned char *u = (const unsigned char *)p;
    return (uint32_t)u[0] | (uint32_t)u[1] << 8 | (uint32_t)u[2] << 16 | (uint32_t)u[3] << 24;
}

static enum err build(const struct buf *b, struct charsmap *m)
{
    uint32_t trie_bytes = b->n >= 4 ? read_u32(b->data) : 0;
    if (b->n < 8 || trie_bytes % 4 || trie_bytes < 4 || trie_bytes > b->n - 4)
        FAIL(ERR_FORMAT, "precompiled_charsmap: trie of %u bytes in %zu", trie_bytes, b->n);
    m->n_units = trie_bytes / 4;
    TRY(MEM_NEW_ARRAY(m->n_units, &m->units));
    for (size_t i = 0; i < m->n_units; i++)
        m->units[i] = read_u32(b->data + 4 + 4 * i);
    m->n_texts = b->n - 4 - trie_bytes;
    TRY(mem_alloc(m->n_texts + 1, (void **)&m->texts));
    memcpy(m->texts, b->data + 4 + trie_bytes, m->n_texts);
    return OK;
}

enum err charsmap_read(const char *base64, size_t n, struct charsmap *out)
{
    struct buf bytes;
    buf_init(&bytes, 0);
    struct charsmap m = {0};
    enum err e = decode_base64(base64, n, &bytes);
    if (!e && bytes.n) e = build(&bytes, &m); /* an empty map changes nothing */
    buf_fini(&bytes);
    if (e)
        charsmap_fini(&m);
    else
        *out = m;
    return e;
}

void charsmap_fini(struct charsmap *m)
{
    mem_free(m->units);
    mem_free(m->texts);
    *m = (struct charsmap){0};
}

/* The value of the shortest key that begins s, or -1. A unit holds, from bit 0: the label (8 bits),
 * whether a value follows (bit 8), the offset's scale (bit 9) and the offset (from bit 10); a
 * value's unit has bit 31 set. */
static int64_t find(const struct charsmap *m, const char *s, size_t n)
{
    if (!m->n_units) return -1;
    uint32_t unit = m->units[0];
    size_t at = (size_t)(unit >> 10) << ((unit & (1u << 9)) >> 6);
    for (size_t i = 0; i < n; i++) {
        unsigned char c = (unsigned char)s[i];
        if (!c) return -1;
        at ^= c;
        if (at >= m->n_units) return -1;
        unit = m->units[at];
        if ((unit & (1u << 31 | 0xff)) != c) return -1;
        at ^= (size_t)(unit >> 10) << ((unit & (1u << 9)) >> 6);
        if (unit >> 8 & 1) return at < m->n_units ? (int64_t)(m->units[at] & 0x7fffffff) : -1;
    }
    return -1;
}

static enum err replace(const struct charsmap *m, const char *s, size_t n, struct buf *out,
                        bool *out_found)
{
    int64_t value = find(m, s, n);
    *out_found = value >= 0 && (size_t)value < m->n_texts;
    if (!*out_found) return OK;
    const char *text = m->texts + value;
    return buf_add(out, text, strnlen(text, m->n_texts - (size_t)value));
}

enum err charsmap_apply(const struct charsmap *m, const char *s, size_t n, struct buf *out)
{
    for (size_t at = 0, len; at < n; at += len) {
        bool found = false;
        len = unicode_grapheme_length(s + at, n - at);
        if (len < 6) TRY(replace(m, s + at, len, out, &found)); /* SentencePiece's bound */
        for (size_t i = 0, k; !found && i < len; i += k) {
            uint32_t code;
            bool one = false;
            k = unicode_next(s + at + i, len - i, &code);
            TRY(replace(m, s + at + i, k, out, &one));
            if (!one) TRY(buf_add(out, s + at + i, k));
        }
    }
    return OK;
}
