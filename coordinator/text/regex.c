/* Regular expressions of tokenizer files, by PCRE2. Knows nothing of what the pieces are for. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include "coordinator/text/regex.h"
#include "base/mem.h"

#include <pcre2.h>
#include <string.h>

enum {
    MATCH_LIMIT = 10 * 1000 * 1000,
    HEAP_LIMIT_KIB = 64 * 1024,
    JIT_STACK_BYTES_MAX = 1 << 20,
    PATTERN_BYTES_MAX = 1 << 16,
    HEAP_FAILED = 121, /* PCRE2 has no name for this compile error outside its sources */
};

struct regex {
    pcre2_code *code;
};

struct regex_scratch {
    pcre2_match_data *data;
    pcre2_match_context *context;
    pcre2_jit_stack *stack;
};

static void *allocate(PCRE2_SIZE bytes, void *unused)
{
    (void)unused;
    void *p;
    return mem_alloc(bytes, &p) ? NULL : p;
}

static void release(void *p, void *unused)
{
    (void)unused;
    mem_free(p);
}

/* The members of a class as PCRE2 writes them, without the brackets. Oniguruma's \w alone and \w in
 * a class differ in numbers that are no digits. */
#define SPACES      "\\x09-\\x0d\\x{85}\\p{Z}"
#define WORDS       "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\x{b2}\\x{b3}\\x{b9}\\x{bc}-\\x{be}"
#define CLASS_WORDS "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}"
#define HEXES       "0-9A-Fa-f"

/* Appends what the escape \c means; in_class tells whether the brackets are there already. */
static enum err translate_escape(char c, bool in_class, struct buf *out)
{
    static const struct {
        char letter;
        const char *members, *class_members;
    } classes[] = {{'s', SPACES, SPACES}, {'w', WORDS, CLASS_WORDS}, {'h', HEXES, HEXES}};
    for (size_t i = 0; i < sizeof classes / sizeof *classes; i++) {
        if ((c | 0x20) != classes[i].letter) continue;
        bool negated = c != classes[i].letter;
        if (in_class && !negated) return buf_add_string(out, classes[i].class_members);
        if (in_class && c == 'H')
            FAIL(ERR_UNSUPPORTED, "\\H inside a character class of a pattern is not supported");
        if (in_class) break; /* \S and \W differ from PCRE2's in a handful of characters */
        return buf_printf(out, "[%s%s]", negated ? "^" : "", classes[i].members);
    }
    buf_add_char(out, '\\');
    return buf_add_char(out, c);
}

/* Names of properties that the two libraries do not share. */
static const char *property_alias(struct span name)
{
    static const char *const aliases[][2] = {
        {"Letter", "L"},
        {"Mark", "M"},
        {"Number", "N"},
        {"Punctuation", "P"},
        {"Punct", "P"},
        {"Symbol", "S"},
        {"Separator", "Z"},
        {"Other", "C"},
        {"Alpha", "Alphabetic"},
        {"Digit", "Nd"},
        {"Space", "White_Space"},
        {"Upper", "Uppercase"},
        {"Lower", "Lowercase"},
        {"Uppercase_Letter", "Lu"},
        {"Lowercase_Letter", "Ll"},
        {"Decimal_Number", "Nd"},
    };
    /* PCRE2 reads a script's bare name as its extensions too. */
    static const char *const scripts[][2] = {
        {"Han", "sc:Han"},           {"Hiragana", "sc:Hiragana"},
        {"Katakana", "sc:Katakana"}, {"Hangul", "sc:Hangul"},
        {"Latin", "sc:Latin"},       {"Cyrillic", "sc:Cyrillic"},
        {"Greek", "sc:Greek"},       {"Arabic", "sc:Arabic"},
        {"Hebrew", "sc:Hebrew"},     {"Devanagari", "sc:Devanagari"},
        {"Bengali", "sc:Bengali"},   {"Tamil", "sc:Tamil"},
        {"Telugu", "sc:Telugu"},     {"Thai", "sc:Thai"},
        {"Georgian", "sc:Georgian"}, {"Armenian", "sc:Armenian"},
        {"Bopomofo", "sc:Bopomofo"}, {"Common", "sc:Common"},
    };
    for (size_t i = 0; i < sizeof aliases / sizeof *aliases; i++)
        if (span_equal(name, aliases[i][0])) return aliases[i][1];
    for (size_t i = 0; i < sizeof scripts / sizeof *scripts; i++)
        if (span_equal(name, scripts[i][0])) return scripts[i][1];
    return NULL;
}

/* \p{Name}, \P{Name}, \p{^Name}; returns how many bytes behind the backslash were taken, 0 when it
 * is none of these. */
static size_t translate_property(const char *p, size_t n, struct buf *out)
{
    const char *end = n > 2 && p[1] == '{' ? memchr(p, '}', n) : NULL;
    if (!end) return 0;
    bool negated = p[2] == '^';
    struct span name = {p + 2 + negated, (size_t)(end - p) - 2 - negated};
    const char *alias = property_alias(name);
    if (!alias) return 0;
    buf_printf(out, "\\%c{%s%s}", p[0], negated ? "^" : "", alias);
    return (size_t)(end - p) + 1;
}

/* A class by its POSIX name: those that PCRE2 understands in another way. */
static enum err translate_posix(struct span name, struct buf *out)
{
    if (span_equal(name, "[:alpha:]")) return buf_add_string(out, "\\p{Alphabetic}");
    if (span_equal(name, "[:punct:]")) return buf_add_string(out, "\\p{P}\\p{S}");
    if (span_equal(name, "[:space:]")) return buf_add_string(out, SPACES);
    return buf_add(out, name.data, name.n);
}

/* Rewrites Oniguruma's Ruby syntax as PCRE2's. */
static enum err translate(const char *p, size_t n, struct buf *out)
{
    bool in_class = false;
    size_t class_start = 0;
    for (size_t i = 0; i < n; i++) {
        char c = p[i];
        if (c == '\\' && i + 1 < n) {
            i++;
            size_t taken = (p[i] | 0x20) == 'p' ? translate_property(p + i, n - i, out) : 0;
            if (taken)
                i += taken - 1;
            else
                TRY(translate_escape(p[i], in_class, out));
            continue;
        }
        if (in_class && c == '&' && i + 1 < n && p[i + 1] == '&')
            FAIL(ERR_UNSUPPORTED, "class intersections (&&) in a pattern are not supported");
        if (in_class && c == '[') {
            const char *end = i + 1 < n && p[i + 1] == ':' ? strstr(p + i, ":]") : NULL;
            if (!end) FAIL(ERR_UNSUPPORTED, "nested classes in a pattern are not supported");
            TRY(translate_posix((struct span){p + i, (size_t)(end + 2 - (p + i))}, out));
            i = (size_t)(end + 1 - p);
            continue;
        }
        if (!in_class && c == '[') {
            in_class = true;
            class_start = i + 1 < n && p[i + 1] == '^' ? i + 2 : i + 1;
        } else if (in_class && c == ']' && i != class_start) {
            in_class = false;
        }
        TRY(buf_add_char(out, c));
    }
    return OK;
}

enum err regex_compile(const char *pattern, size_t n, struct regex **out)
{
    if (n > PATTERN_BYTES_MAX)
        FAIL(ERR_FORMAT, "pattern longer than %d bytes", (int)PATTERN_BYTES_MAX);
    if (memchr(pattern, 0, n)) FAIL(ERR_UNSUPPORTED, "a pattern with a NUL is not supported");
    struct regex *r = NULL;
    struct buf text;
    pcre2_general_context *general = NULL;
    pcre2_compile_context *context = NULL;
    buf_init(&text, 0);
    enum err e;
    TRY_OUT(translate(pattern, n, &text));
    TRY_OUT(MEM_NEW(&r));
    int error = 0;
    PCRE2_SIZE offset = 0;
    general = pcre2_general_context_create(allocate, release, NULL);
    context = general ? pcre2_compile_context_create(general) : NULL;
    if (!context) FAIL_OUT(ERR_NO_MEMORY, "out of memory for a pattern");
    r->code = pcre2_compile((PCRE2_SPTR)buf_string(&text), text.n,
                            PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C,
                            &error, &offset, context);
    if (!r->code && error == HEAP_FAILED) FAIL_OUT(ERR_NO_MEMORY, "out of memory for a pattern");
    if (!r->code) {
        PCRE2_UCHAR why[160] = "";
        pcre2_get_error_message(error, why, sizeof why);
        FAIL_OUT(ERR_FORMAT, "pattern '%.100s': %s at offset %zu", pattern, (char *)why,
                 (size_t)offset);
    }
    pcre2_jit_compile(r->code, PCRE2_JIT_COMPLETE); /* without JIT it is only slower */
    *out = r;
    r = NULL;
out:
    pcre2_compile_context_free(context);
    pcre2_general_context_free(general);
    buf_fini(&text);
    regex_destroy(r);
    return e;
}

void regex_destroy(struct regex *r)
{
    if (!r) return;
    pcre2_code_free(r->code);
    mem_free(r);
}

enum err regex_scratch_create(struct regex_scratch **out)
{
    struct regex_scratch *s;
    TRY(MEM_NEW(&s));
    pcre2_general_context *general = pcre2_general_context_create(allocate, release, NULL);
    if (general) {
        s->data = pcre2_match_data_create(1, general);
        s->context = pcre2_match_context_create(general);
        s->stack = pcre2_jit_stack_create(32 * 1024, JIT_STACK_BYTES_MAX, general);
    }
    pcre2_general_context_free(general);
    if (!s->data || !s->context) {
        regex_scratch_destroy(s);
        FAIL(ERR_NO_MEMORY, "out of memory for matching");
    }
    pcre2_set_match_limit(s->context, MATCH_LIMIT);
    pcre2_set_heap_limit(s->context, HEAP_LIMIT_KIB);
    if (s->stack) pcre2_jit_stack_assign(s->context, NULL, s->stack);
    *out = s;
    return OK;
}

void regex_scratch_destroy(struct regex_scratch *s)
{
    if (!s) return;
    pcre2_match_data_free(s->data);
    pcre2_match_context_free(s->context);
    pcre2_jit_stack_free(s->stack);
    mem_free(s);
}

enum err regex_find(const struct regex *r, struct regex_scratch *s, const char *text, size_t n,
                    size_t from, size_t *out_start, size_t *out_end, bool *out_found)
{
    PCRE2_SPTR subject = (PCRE2_SPTR)text;
    int k = pcre2_match(r->code, subject, n, from, PCRE2_NO_UTF_CHECK, s->data, s->context);
    if (k == PCRE2_ERROR_JIT_STACKLIMIT)
        k = pcre2_match(r->code, subject, n, from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, s->data,
                        s->context);
    if (k == PCRE2_ERROR_NOMATCH) {
        *out_found = false;
        return OK;
    }
    if (k == PCRE2_ERROR_NOMEMORY) FAIL(ERR_NO_MEMORY, "out of memory for matching");
    if (k < 0)
        FAIL(ERR_INVALID, "the tokenizer's pattern exceeds its match limit at byte %zu (%d)", from,
             k);
    const PCRE2_SIZE *pair = pcre2_get_ovector_pointer(s->data);
    *out_start = pair[0], *out_end = pair[1];
    *out_found = true;
    return OK;
}
