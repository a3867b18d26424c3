/* Strict UTF-8. Knows nothing of scripts or normalization. */
#include "base/utf8.h"

#include <stdbool.h>

/* Bytes a leading byte promises; 0 for one that cannot lead. */
static size_t promised(unsigned char c)
{
    return c < 0x80 ? 1 : c >= 0xc2 && c <= 0xdf ? 2 : c >= 0xe0 && c <= 0xef ? 3 : c >= 0xf0 && c <= 0xf4 ? 4 : 0;
}

/* Whether the second byte may follow the first (Unicode 15, table 3-7). */
static bool second_ok(unsigned char first, unsigned char second)
{
    unsigned low = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
    unsigned high = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
    return second >= low && second <= high;
}

size_t utf8_length(const char *s, size_t n)
{
    const unsigned char *u = (const unsigned char *)s;
    size_t len = n ? promised(u[0]) : 0;
    if (!len || len > n) return 0;
    if (len > 1 && !second_ok(u[0], u[1])) return 0;
    for (size_t i = 2; i < len; i++)
        if ((u[i] & 0xc0) != 0x80) return 0;
    return len;
}

size_t utf8_decode(const char *s, size_t n, uint32_t *out_code)
{
    static const unsigned char lead_mask[5] = {0, 0x7f, 0x1f, 0x0f, 0x07};
    size_t len = utf8_length(s, n);
    if (!len) return 0;
    uint32_t code = (unsigned char)s[0] & lead_mask[len];
    for (size_t i = 1; i < len; i++) code = code << 6 | ((unsigned char)s[i] & 0x3f);
    *out_code = code;
    return len;
}

size_t utf8_encode(uint32_t code, char out[4])
{
    if (code < 0x80) {
        out[0] = (char)code;
        return 1;
    }
    size_t len = code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    for (size_t i = len - 1; i > 0; i--, code >>= 6) out[i] = (char)(0x80 | (code & 0x3f));
    static const unsigned char lead[5] = {0, 0, 0xc0, 0xe0, 0xf0};
    out[0] = (char)(lead[len] | code);
    return len;
}

size_t utf8_valid_prefix(const char *s, size_t n)
{
    size_t at = 0;
    for (size_t len; at < n && (len = utf8_length(s + at, n - at)); at += len) {}
    return at;
}

int utf8_is_partial(const char *s, size_t n)
{
    const unsigned char *u = (const unsigned char *)s;
    if (!n || n >= promised(u[0])) return 0;
    if (n > 1 && !second_ok(u[0], u[1])) return 0;
    return n < 3 || (u[2] & 0xc0) == 0x80;
}
