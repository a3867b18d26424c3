/* Tokens of a template's source. Knows nothing of the grammar. */
#include "coordinator/text/template_lexer.h"
#include "base/utf8.h"
#include "coordinator/text/unicode.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

void lexer_init(struct lexer *l, struct arena *arena, struct span source,
                const struct template_syntax *syntax)
{
    *l = (struct lexer){
        .arena = arena, .source = source, .syntax = *syntax, .line = 1, .line_starting = true};
}

#define FAIL_LINE(l, ...)                                                                          \
    do {                                                                                           \
        char words_[256];                                                                          \
        snprintf(words_, sizeof words_, __VA_ARGS__);                                              \
        FAIL(ERR_INVALID, "chat template, line %d: %s", (l)->line, words_);                        \
    } while (0)

static bool is_blank(char c)
{
    return c == ' ' || (c >= '\t' && c <= '\r');
}

static int peek(const struct lexer *l, size_t ahead)
{
    return l->at + ahead < l->source.n ? (unsigned char)l->source.data[l->at + ahead] : -1;
}

static bool looking_at(const struct lexer *l, const char *text)
{
    size_t n = strlen(text);
    return l->source.n - l->at >= n && !memcmp(l->source.data + l->at, text, n);
}

/* Moves over n bytes, counting lines. */
static void advance(struct lexer *l, size_t n)
{
    for (; n && l->at < l->source.n; n--, l->at++)
        if (l->source.data[l->at] == '\n') l->line++;
}

static void skip_blanks(struct lexer *l)
{
    while (l->at < l->source.n && is_blank(l->source.data[l->at]))
        advance(l, 1);
}

/* ---- Text between tags ---- */

/* Removes what the sign of the tag at the end of the text asks for. */
static struct span trim_before(const struct lexer *l, struct span text, int sign, bool is_variable)
{
    if (sign == '-') {
        while (text.n && is_blank(text.data[text.n - 1]))
            text.n--;
        return text;
    }
    if (sign == '+' || !l->syntax.lstrip_blocks || is_variable) return text;
    size_t start = text.n;
    while (start && is_blank(text.data[start - 1]) && text.data[start - 1] != '\n')
        start--;
    bool at_line = start ? text.data[start - 1] == '\n' : l->line_starting;
    if (at_line) text.n = start;
    return text;
}

/* Moves behind a tag's end "%}" (or "#}", "}}"), its sign and the whitespace it takes along. */
static void end_tag(struct lexer *l, bool signed_end, bool trims)
{
    bool minus = signed_end && peek(l, 0) == '-', plus = signed_end && peek(l, 0) == '+';
    size_t before = l->at;
    advance(l, 2 + (minus || plus));
    if (minus)
        skip_blanks(l);
    else if (trims && !plus && l->syntax.trim_blocks && peek(l, 0) == '\n')
        advance(l, 1);
    l->line_starting = l->at > before && l->source.data[l->at - 1] == '\n';
}

static bool at_end_of(const struct lexer *l, const char *end, bool plus_too)
{
    if (looking_at(l, end)) return true;
    return (peek(l, 0) == '-' || (plus_too && peek(l, 0) == '+')) && peek(l, 1) == end[0] &&
           peek(l, 2) == end[1];
}

static enum err skip_comment(struct lexer *l)
{
    int line = l->line;
    advance(l, 2);
    for (; l->at < l->source.n; advance(l, 1)) {
        if (!at_end_of(l, "#}", true)) continue;
        end_tag(l, peek(l, 0) != '#', true);
        return OK;
    }
    l->line = line;
    FAIL_LINE(l, "a comment is not closed");
}

/* Whether a block tag with only this name begins at `at`; *out_end is where its "%}" or sign is. */
static bool at_block_named(const struct lexer *l, const char *name, size_t *out_end)
{
    const char *s = l->source.data;
    size_t at = l->at, n = l->source.n, len = strlen(name);
    if (n - at < 2 || s[at] != '{' || s[at + 1] != '%') return false;
    at += 2;
    if (at < n && (s[at] == '-' || s[at] == '+')) at++;
    while (at < n && is_blank(s[at]))
        at++;
    if (n - at < len || memcmp(s + at, name, len)) return false;
    at += len;
    while (at < n && is_blank(s[at]))
        at++;
    size_t sign = at < n && (s[at] == '-' || s[at] == '+');
    if (n - at < 2 + sign || s[at + sign] != '%' || s[at + sign + 1] != '}') return false;
    *out_end = at;
    return true;
}

/* The text of {% raw %} ... {% endraw %}. */
static enum err read_raw(struct lexer *l, size_t tag_end, struct lexeme *out)
{
    int line = l->line;
    bool plain = l->syntax.trim_blocks;
    advance(l, tag_end - l->at);
    l->syntax.trim_blocks = false; /* the newline after {% raw %} stays */
    end_tag(l, peek(l, 0) != '%', false);
    l->syntax.trim_blocks = plain;
    size_t start = l->at, end;
    for (; l->at < l->source.n; advance(l, 1)) {
        if (!at_block_named(l, "endraw", &end)) continue;
        struct span text = {l->source.data + start, l->at - start};
        int sign = peek(l, 2);
        *out = (struct lexeme){.kind = LEXEME_TEXT, .line = line};
        out->text = trim_before(l, text, sign, false);
        advance(l, end - l->at);
        end_tag(l, peek(l, 0) != '%', true);
        return OK;
    }
    l->line = line;
    FAIL_LINE(l, "a raw block is not closed");
}

/* Text up to the next tag. Comments and raw blocks are dealt with here. */
static enum err read_text(struct lexer *l, struct lexeme *out)
{
    size_t start = l->at, raw_end = 0;
    int line = l->line;
    while (l->at < l->source.n &&
           !(peek(l, 0) == '{' && (peek(l, 1) == '%' || peek(l, 1) == '{' || peek(l, 1) == '#')))
        advance(l, 1);
    struct span text = {l->source.data + start, l->at - start};
    *out = (struct lexeme){.kind = LEXEME_TEXT, .line = line, .text = text};
    if (l->at == l->source.n) {
        if (!text.n) out->kind = LEXEME_END;
        return OK;
    }
    int mark = peek(l, 1);
    out->text = trim_before(l, text, peek(l, 2), mark == '{');
    l->state = LEXER_TAG;
    if (mark == '#') {
        l->state = LEXER_TEXT;
        return skip_comment(l);
    }
    if (mark == '%' && at_block_named(l, "raw", &raw_end)) {
        l->state = LEXER_TEXT;
        return text.n && out->text.n ? OK : read_raw(l, raw_end, out);
    }
    return OK;
}

static enum err read_tag_begin(struct lexer *l, struct lexeme *out)
{
    bool block = peek(l, 1) == '%';
    *out = (struct lexeme){.kind = block ? LEXEME_BLOCK_BEGIN : LEXEME_VARIABLE_BEGIN,
                           .line = l->line};
    advance(l, 2);
    if (peek(l, 0) == '-' || peek(l, 0) == '+') advance(l, 1);
    l->state = block ? LEXER_BLOCK : LEXER_VARIABLE;
    l->balance = 0;
    l->line_starting = false;
    return OK;
}

/* ---- Inside tags ---- */

static bool is_name(int c)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
           c >= 0x80;
}

static bool is_digit(int c)
{
    return c >= '0' && c <= '9';
}

/* Up to `most` digits of a base at s; how many there were. */
static size_t read_digits(struct span s, size_t at, size_t most, int base, uint32_t *out)
{
    size_t n = 0;
    uint32_t value = 0;
    for (; n < most && at + n < s.n; n++) {
        char c = s.data[at + n];
        int digit = is_digit(c) ? c - '0' : (c | 0x20) >= 'a' ? (c | 0x20) - 'a' + 10 : 99;
        if (digit >= base) break;
        value = value * (uint32_t)base + (uint32_t)digit;
    }
    *out = value;
    return n;
}

/* Appends what the escape behind a backslash means; how many bytes it takes, 0 when broken. */
static size_t read_escape(struct span s, size_t at, struct buf *out)
{
    static const char simple[] = "n\nt\tr\rb\bf\fv\va\a\\\\''\"\"";
    char c = s.data[at];
    uint32_t code;
    if (c == '\n') return 1;
    for (size_t i = 0; simple[i]; i += 2)
        if (simple[i] == c) return buf_add_char(out, simple[i + 1]) ? 0 : 1;
    size_t want = c == 'x' ? 2 : c == 'u' ? 4 : c == 'U' ? 8 : 0;
    if (want) {
        if (read_digits(s, at + 1, want, 16, &code) != want || code > 0x10ffff ||
            (code >= 0xd800 && code < 0xe000))
            return 0;
        return unicode_add_code(out, code) ? 0 : 1 + want;
    }
    size_t n = read_digits(s, at, 3, 8, &code);
    if (n) return unicode_add_code(out, code) ? 0 : n;
    buf_add_char(out, '\\'); /* Python leaves what it does not know */
    return buf_add_char(out, c) ? 0 : 1;
}

static enum err read_string(struct lexer *l, struct lexeme *out)
{
    char quote = (char)peek(l, 0);
    size_t start = l->at + 1, end = start;
    while (end < l->source.n && l->source.data[end] != quote)
        end += l->source.data[end] == '\\' ? 2 : 1;
    if (end >= l->source.n) FAIL_LINE(l, "a string is not closed");
    struct span s = {l->source.data + start, end - start};
    out->kind = LEXEME_STRING;
    out->value = value_span(s.data, s.n);
    advance(l, end + 1 - l->at);
    if (!s.n || !memchr(s.data, '\\', s.n)) return OK;
    struct buf text;
    buf_init(&text, 0);
    enum err e = OK;
    for (size_t at = 0; at < s.n && !e;) {
        if (s.data[at] != '\\') {
            e = buf_add_char(&text, s.data[at++]);
            continue;
        }
        size_t n = read_escape(s, at + 1, &text);
        if (!n) e = err_set(ERR_INVALID, "chat template, line %d: a broken escape", out->line);
        at += 1 + n;
    }
    if (!e) e = value_copy_string(l->arena, buf_string(&text), text.n, &out->value);
    buf_fini(&text);
    return e;
}

static enum err read_based_int(struct lexer *l, int base, struct lexeme *out)
{
    int64_t value = 0;
    size_t n = 0;
    advance(l, 2);
    for (int c; (c = peek(l, 0)) != -1; advance(l, 1)) {
        uint32_t digit;
        char one[1] = {(char)c};
        if (c == '_') continue;
        if (!read_digits((struct span){one, 1}, 0, 1, base, &digit)) break;
        if (__builtin_mul_overflow(value, base, &value) ||
            __builtin_add_overflow(value, (int64_t)digit, &value))
            FAIL_LINE(l, "an integer beyond 64 bits");
        n++;
    }
    if (!n) FAIL_LINE(l, "a broken number");
    out->kind = LEXEME_INT;
    out->value = value_int(value);
    return OK;
}

static size_t copy_digits(struct lexer *l, char *text, size_t n, size_t size)
{
    for (; is_digit(peek(l, 0)) || (peek(l, 0) == '_' && is_digit(peek(l, 1))); advance(l, 1))
        if (peek(l, 0) != '_' && n + 1 < size) text[n++] = (char)peek(l, 0);
    text[n] = 0;
    return n;
}

static enum err read_number(struct lexer *l, struct lexeme *out)
{
    char text[128];
    int mark = peek(l, 1) | 0x20;
    if (peek(l, 0) == '0' && mark == 'x') return read_based_int(l, 16, out);
    if (peek(l, 0) == '0' && mark == 'o') return read_based_int(l, 8, out);
    if (peek(l, 0) == '0' && mark == 'b') return read_based_int(l, 2, out);
    size_t n = copy_digits(l, text, 0, sizeof text - 40);
    bool real = false;
    if (peek(l, 0) == '.' && is_digit(peek(l, 1))) {
        real = true;
        text[n++] = '.';
        advance(l, 1);
        n = copy_digits(l, text, n, sizeof text - 16);
    }
    int sign = peek(l, 1) == '-' || peek(l, 1) == '+';
    if ((peek(l, 0) | 0x20) == 'e' && is_digit(peek(l, 1 + (size_t)sign))) {
        real = true;
        text[n++] = 'e';
        if (sign) text[n++] = (char)peek(l, 1);
        advance(l, 1 + (size_t)sign);
        copy_digits(l, text, n, sizeof text - 1);
    }
    out->kind = real ? LEXEME_FLOAT : LEXEME_INT;
    errno = 0;
    if (real)
        out->value = value_float(strtod(text, NULL));
    else
        out->value = value_int(strtoll(text, NULL, 10));
    if (!real && errno) FAIL_LINE(l, "the integer %s is beyond 64 bits", text);
    return OK;
}

static enum err read_operator(struct lexer *l, struct lexeme *out)
{
    static const char *const operators[] = {"//", "**", "==", "!=", ">=", "<=", "+", "-", "/",
                                            "*",  "%",  "~",  "[",  "]",  "(",  ")", "{", "}",
                                            ">",  "<",  "=",  ".",  ":",  "|",  ",", ";"};
    size_t i = 0, count = sizeof operators / sizeof *operators;
    while (i < count && !looking_at(l, operators[i]))
        i++;
    if (i == count) FAIL_LINE(l, "unexpected character '%c'", peek(l, 0));
    out->kind = LEXEME_OPERATOR;
    out->text = (struct span){l->source.data + l->at, strlen(operators[i])};
    char c = out->text.data[0];
    if (c == '(' || c == '[' || c == '{') {
        if (l->balance == TEMPLATE_NESTING_MAX) FAIL_LINE(l, "brackets nested too deep");
        l->brackets[l->balance++] = c == '(' ? ')' : c == '[' ? ']' : '}';
    } else if (c == ')' || c == ']' || c == '}') {
        if (!l->balance || l->brackets[l->balance - 1] != c)
            FAIL_LINE(l, "'%c' closes nothing that is open", c);
        l->balance--;
    }
    advance(l, out->text.n);
    return OK;
}

static enum err read_inside(struct lexer *l, struct lexeme *out)
{
    bool block = l->state == LEXER_BLOCK;
    skip_blanks(l);
    *out = (struct lexeme){.kind = LEXEME_END, .line = l->line};
    if (l->at == l->source.n) FAIL_LINE(l, "a tag is not closed");
    if (!l->balance && at_end_of(l, block ? "%}" : "}}", block)) {
        out->kind = block ? LEXEME_BLOCK_END : LEXEME_VARIABLE_END;
        l->state = LEXER_TEXT;
        end_tag(l, peek(l, 0) == '-' || peek(l, 0) == '+', block);
        return OK;
    }
    int c = peek(l, 0);
    if (c == '"' || c == '\'') return read_string(l, out);
    if (is_digit(c)) return read_number(l, out);
    if (!is_name(c)) return read_operator(l, out);
    size_t n = 0;
    while (is_name(peek(l, n)))
        n++;
    out->kind = LEXEME_NAME;
    out->text = (struct span){l->source.data + l->at, n};
    advance(l, n);
    return OK;
}

enum err lexer_next(struct lexer *l, struct lexeme *out)
{
    if (l->state == LEXER_TAG) return read_tag_begin(l, out);
    if (l->state != LEXER_TEXT) return read_inside(l, out);
    do {
        TRY(read_text(l, out));
        if (l->state == LEXER_TAG && !out->text.n) return read_tag_begin(l, out);
    } while (out->kind == LEXEME_TEXT && !out->text.n);
    return OK;
}
