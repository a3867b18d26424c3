/* GPT-2's alphabet of bytes. Knows nothing of the vocabularies written in it.
 *
 * Printable bytes stand for themselves; the 68 others are numbered from U+0100 in order. */
#include "coordinator/text/byte_level.h"
#include "base/utf8.h"

static bool is_printable(int byte)
{
    return (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
}

/* The others in order are 0..32, 127..160 and 173. */
static uint32_t code_of(int byte)
{
    if (is_printable(byte)) return (uint32_t)byte;
    if (byte <= 32) return 0x100 + (uint32_t)byte;
    return byte == 173 ? 0x143 : 0x121 + (uint32_t)(byte - 127);
}

int byte_level_byte(uint32_t code)
{
    if (code < 0x100) return is_printable((int)code) ? (int)code : -1;
    if (code <= 0x120) return (int)(code - 0x100);
    if (code <= 0x142) return (int)(code - 0x121) + 127;
    return code == 0x143 ? 173 : -1;
}

enum err byte_level_add(struct buf *out, const char *s, size_t n)
{
    TRY(buf_reserve(out, 2 * n));
    char *to = out->data + out->n;
    for (size_t i = 0; i < n; i++) {
        int byte = (unsigned char)s[i];
        if (byte > ' ' && byte < 0x7f)
            *to++ = (char)byte;
        else
            to += utf8_encode(code_of(byte), to);
    }
    *to = 0;
    out->n = (size_t)(to - out->data);
    return OK;
}

enum err byte_level_add_bytes(struct buf *out, const char *piece, size_t n)
{
    size_t before = out->n;
    for (size_t at = 0, len; at < n; at += len) {
        uint32_t code;
        len = utf8_decode(piece + at, n - at, &code);
        int byte = len ? byte_level_byte(code) : -1;
        if (byte < 0) {
            out->n = before;
            return buf_add(out, piece, n);
        }
        TRY(buf_add_char(out, (char)byte));
    }
    return OK;
}
