/* Classes of characters and normal forms, by utf8proc. Knows nothing of tokenizers. */
#include "coordinator/text/unicode.h"
#include "base/mem.h"
#include "base/utf8.h"

#include <string.h>
#include <utf8proc.h>

bool unicode_is_space(uint32_t c)
{
    return (c >= 9 && c <= 13) || c == 0x20 || c == 0x85 || c == 0xa0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f ||
           c == 0x205f || c == 0x3000;
}

static utf8proc_category_t category(uint32_t code)
{
    return utf8proc_category((utf8proc_int32_t)code);
}

/* Symbols that carry the property Other_Alphabetic: circled and squared Latin letters. */
static bool is_alphabetic_symbol(uint32_t c)
{
    return (c >= 0x24b6 && c <= 0x24e9) || (c >= 0x1f130 && c <= 0x1f149) ||
           (c >= 0x1f150 && c <= 0x1f169) || (c >= 0x1f170 && c <= 0x1f189);
}

bool unicode_is_alphabetic(uint32_t code)
{
    utf8proc_category_t k = category(code);
    return k >= UTF8PROC_CATEGORY_LU && k <= UTF8PROC_CATEGORY_LO;
}

bool unicode_is_upper(uint32_t code)
{
    return category(code) == UTF8PROC_CATEGORY_LU;
}

bool unicode_is_lower(uint32_t code)
{
    return category(code) == UTF8PROC_CATEGORY_LL;
}

bool unicode_is_word(uint32_t code)
{
    utf8proc_category_t k = category(code);
    return (k >= UTF8PROC_CATEGORY_LU && k <= UTF8PROC_CATEGORY_NL) || k == UTF8PROC_CATEGORY_PC ||
           code == 0x200c || code == 0x200d || is_alphabetic_symbol(code);
}

bool unicode_is_numeric(uint32_t code)
{
    utf8proc_category_t k = category(code);
    return k >= UTF8PROC_CATEGORY_ND && k <= UTF8PROC_CATEGORY_NO;
}

bool unicode_is_punctuation(uint32_t c)
{
    if (c < 0x80)
        return (c >= 33 && c <= 47) || (c >= 58 && c <= 64) || (c >= 91 && c <= 96) ||
               (c >= 123 && c <= 126);
    utf8proc_category_t k = category(c);
    return k >= UTF8PROC_CATEGORY_PC && k <= UTF8PROC_CATEGORY_PO;
}

bool unicode_is_other(uint32_t code)
{
    utf8proc_category_t k = category(code);
    return k >= UTF8PROC_CATEGORY_CC;
}

bool unicode_is_nonspacing(uint32_t code)
{
    return category(code) == UTF8PROC_CATEGORY_MN;
}

bool unicode_is_mark(uint32_t code)
{
    utf8proc_category_t k = category(code);
    return k >= UTF8PROC_CATEGORY_MN && k <= UTF8PROC_CATEGORY_ME;
}

bool unicode_is_cjk(uint32_t c)
{
    return (c >= 0x4e00 && c <= 0x9fff) || (c >= 0x3400 && c <= 0x4dbf) ||
           (c >= 0x20000 && c <= 0x2a6df) || (c >= 0x2a700 && c <= 0x2b73f) ||
           (c >= 0x2b740 && c <= 0x2b81f) || (c >= 0x2b920 && c <= 0x2ceaf) ||
           (c >= 0xf900 && c <= 0xfaff) || (c >= 0x2f800 && c <= 0x2fa1f);
}

size_t unicode_next(const char *s, size_t n, uint32_t *out_code)
{
    unsigned char c = (unsigned char)s[0];
    if (c < 0x80) {
        *out_code = c;
        return 1;
    }
    size_t len = utf8_decode(s, n, out_code);
    if (len) return len;
    *out_code = 0xfffd;
    return 1;
}

size_t unicode_last(const char *s, size_t n)
{
    size_t at = n - 1;
    while (at > 0 && n - at < 4 && ((unsigned char)s[at] & 0xc0) == 0x80)
        at--;
    return at;
}

enum err unicode_add_code(struct buf *out, uint32_t code)
{
    char bytes[4];
    return buf_add(out, bytes, utf8_encode(code, bytes));
}

size_t unicode_broken_length(const char *s, size_t n)
{
    size_t len = 1;
    while (len < 3 && len < n && utf8_is_partial(s, len + 1))
        len++;
    return utf8_is_partial(s, len) ? len : 1;
}

enum err unicode_add_valid(struct buf *out, const char *s, size_t n)
{
    while (n) {
        size_t whole = utf8_valid_prefix(s, n);
        TRY(buf_add(out, s, whole));
        s += whole, n -= whole;
        if (!n) break;
        TRY(buf_add(out, "\xef\xbf\xbd", 3));
        size_t broken = unicode_broken_length(s, n);
        s += broken, n -= broken;
    }
    return OK;
}

enum err unicode_add_lower(struct buf *out, const char *s, size_t n)
{
    for (size_t at = 0, len; at < n; at += len) {
        uint32_t code;
        len = unicode_next(s + at, n - at, &code);
        if (code == 0x130) /* the one capital whose small letter is two characters */
            TRY(buf_add_string(out, "i\xcc\x87"));
        else
            TRY(unicode_add_code(out, (uint32_t)utf8proc_tolower((utf8proc_int32_t)code)));
    }
    return OK;
}

enum err unicode_add_upper(struct buf *out, const char *s, size_t n)
{
    for (size_t at = 0, len; at < n; at += len) {
        uint32_t code;
        len = unicode_next(s + at, n - at, &code);
        if (code == 0xdf)
            TRY(buf_add_string(out, "SS"));
        else
            TRY(unicode_add_code(out, (uint32_t)utf8proc_toupper((utf8proc_int32_t)code)));
    }
    return OK;
}

static unsigned combining_class(utf8proc_int32_t code)
{
    return (unsigned)utf8proc_get_property(code)->combining_class;
}

/* Sorts a run of marks by combining class, stably: by counting, since a text may hold a million
 * marks in the worst order and sorting by exchanges would take hours. */
static void sort_marks(utf8proc_int32_t *codes, utf8proc_int32_t *scratch, size_t n)
{
    uint32_t start[257] = {0};
    for (size_t i = 0; i < n; i++)
        start[combining_class(codes[i]) + 1]++;
    for (int k = 0; k < 256; k++)
        start[k + 1] += start[k];
    for (size_t i = 0; i < n; i++)
        scratch[start[combining_class(codes[i])]++] = codes[i];
    memcpy(codes, scratch, n * sizeof *codes);
}

static void sort_all_marks(utf8proc_int32_t *codes, utf8proc_int32_t *scratch, size_t n)
{
    for (size_t i = 0, end; i < n; i = end) {
        bool disorder = false;
        end = i + 1;
        unsigned last = combining_class(codes[i]);
        if (!last) continue;
        for (; end < n; end++) {
            unsigned now = combining_class(codes[end]);
            if (!now) break;
            if (now < last) disorder = true;
            last = now;
        }
        if (disorder) sort_marks(codes + i, scratch, end - i);
    }
}

/* Decomposes s into codes; a character becomes at most 18. */
static enum err decompose(const char *s, size_t n, int options, struct buf *codes)
{
    for (size_t at = 0, len; at < n; at += len) {
        uint32_t code;
        utf8proc_int32_t parts[32];
        int boundclass = 0;
        len = unicode_next(s + at, n - at, &code);
        utf8proc_ssize_t k = utf8proc_decompose_char((utf8proc_int32_t)code, parts, 32,
                                                     (utf8proc_option_t)options, &boundclass);
        if (k < 0 || k > 32) FAIL(ERR_INTERNAL, "U+%04X cannot be decomposed", code);
        TRY(buf_add(codes, parts, (size_t)k * sizeof parts[0]));
    }
    return OK;
}

enum err unicode_add_normal(struct buf *out, const char *s, size_t n, enum unicode_form form)
{
    bool compose = form == UNICODE_NFC || form == UNICODE_NFKC;
    bool compatible = form == UNICODE_NFKC || form == UNICODE_NFKD;
    size_t ascii = 0;
    while (ascii < n && (unsigned char)s[ascii] < 0x80)
        ascii++;
    if (ascii == n) return buf_add(out, s, n);
    int options = UTF8PROC_STABLE | UTF8PROC_DECOMPOSE | (compatible ? UTF8PROC_COMPAT : 0);
    struct buf codes, scratch;
    buf_init(&codes, 0);
    buf_init(&scratch, 0);
    enum err e;
    TRY_OUT(decompose(s, n, options, &codes));
    TRY_OUT(buf_reserve(&scratch, codes.n));
    utf8proc_int32_t *all = (utf8proc_int32_t *)(void *)codes.data;
    size_t n_all = codes.n / sizeof *all;
    sort_all_marks(all, (utf8proc_int32_t *)(void *)scratch.data, n_all);
    if (compose) {
        utf8proc_ssize_t k = utf8proc_normalize_utf32(
            all, (utf8proc_ssize_t)n_all, (utf8proc_option_t)(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
        if (k < 0) FAIL_OUT(ERR_INTERNAL, "text cannot be composed");
        n_all = (size_t)k;
    }
    for (size_t i = 0; i < n_all; i++)
        TRY_OUT(unicode_add_code(out, (uint32_t)all[i]));
out:
    buf_fini(&codes);
    buf_fini(&scratch);
    return e;
}

size_t unicode_grapheme_length(const char *s, size_t n)
{
    uint32_t before, code;
    utf8proc_int32_t state = 0;
    size_t at = unicode_next(s, n, &before);
    while (at < n) {
        size_t len = unicode_next(s + at, n - at, &code);
        if (utf8proc_grapheme_break_stateful((utf8proc_int32_t)before, (utf8proc_int32_t)code,
                                             &state))
            break;
        at += len, before = code;
    }
    return at;
}
