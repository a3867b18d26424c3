/* Methods of strings, and what text filters share with them. By Python's rules, with characters
 * being code points. */
#include "coordinator/text/template_builtins.h"
#include "coordinator/text/template_render.h"
#include "coordinator/text/unicode.h"

#include <string.h>

/* ---- Shared ---- */

static enum err finish(struct render *r, struct buf *text, enum err e, struct value *out)
{
    if (!e) e = render_charge(r, text->n / 64);
    if (!e) e = value_copy_string(&r->arena, buf_string(text), text->n, out);
    buf_fini(text);
    return e;
}

static bool in_set(struct span set, const char *s, size_t n)
{
    for (size_t at = 0, len; at < set.n; at += len) {
        uint32_t code;
        len = unicode_next(set.data + at, set.n - at, &code);
        if (len == n && !memcmp(set.data + at, s, n)) return true;
    }
    return false;
}

static bool strips(const struct value *characters, const char *s, size_t n)
{
    uint32_t code;
    if (characters && characters->kind == VALUE_STRING) return in_set(characters->string, s, n);
    unicode_next(s, n, &code);
    return unicode_is_space(code) || (code >= 0x1c && code <= 0x1f);
}

enum err text_strip(struct span s, const struct value *characters, bool left, bool right,
                    struct value *out)
{
    uint32_t code;
    if (characters && characters->kind != VALUE_STRING && characters->kind != VALUE_NONE)
        FAIL(ERR_INVALID, "strip arg must be None or str");
    while (left && s.n) {
        size_t len = unicode_next(s.data, s.n, &code);
        if (!strips(characters, s.data, len)) break;
        s.data += len, s.n -= len;
    }
    while (right && s.n) {
        size_t last = unicode_last(s.data, s.n);
        if (!strips(characters, s.data + last, s.n - last)) break;
        s.n = last;
    }
    *out = value_span(s.data, s.n);
    return OK;
}

/* Between characters when old is empty. */
static enum err replace_empty(struct span s, struct span new, int64_t count, struct buf *text)
{
    size_t at = 0;
    while (count-- && at <= s.n) {
        uint32_t code;
        TRY(buf_add(text, new.data, new.n));
        if (at == s.n) return OK;
        size_t len = unicode_next(s.data + at, s.n - at, &code);
        TRY(buf_add(text, s.data + at, len));
        at += len;
    }
    return buf_add(text, s.data + at, s.n - at);
}

static enum err replace_into(struct span s, struct span old, struct span new, int64_t count,
                             struct buf *text)
{
    if (!old.n) return replace_empty(s, new, count, text);
    while (s.n && count--) {
        const char *at = memmem(s.data, s.n, old.data, old.n);
        if (!at) break;
        size_t n = (size_t)(at - s.data);
        TRY(buf_add(text, s.data, n));
        TRY(buf_add(text, new.data, new.n));
        s.data += n + old.n, s.n -= n + old.n;
    }
    return buf_add(text, s.data, s.n);
}

enum err text_replace(struct render *r, struct span s, struct span old, struct span new,
                      int64_t count, struct value *out)
{
    struct buf text;
    TRY(render_charge(r, s.n / 64));
    buf_init(&text, r->limits.output_bytes_max);
    return finish(r, &text, replace_into(s, old, new, count < 0 ? -1 : count, &text), out);
}

/* Every run of letters begins with a capital. word tells what continues a run. */
static enum err title_into(struct span s, bool (*word)(uint32_t), struct buf *text)
{
    bool inside = false;
    for (size_t at = 0, len; at < s.n; at += len) {
        uint32_t code;
        len = unicode_next(s.data + at, s.n - at, &code);
        TRY((inside ? unicode_add_lower : unicode_add_upper)(text, s.data + at, len));
        inside = word(code);
    }
    return OK;
}

/* Jinja2's title filter: words end at blanks and at - ( { [ < */
static bool continues_title(uint32_t code)
{
    return !unicode_is_space(code) && !(code < 0x80 && strchr("-({[<", (int)code));
}

enum err text_title(struct render *r, struct span s, struct value *out)
{
    struct buf text;
    buf_init(&text, r->limits.output_bytes_max);
    return finish(r, &text, title_into(s, continues_title, &text), out);
}

enum err text_capitalize(struct render *r, struct span s, struct value *out)
{
    struct buf text;
    uint32_t code;
    buf_init(&text, r->limits.output_bytes_max);
    size_t first = s.n ? unicode_next(s.data, s.n, &code) : 0;
    enum err e = unicode_add_upper(&text, s.data, first);
    if (!e) e = unicode_add_lower(&text, s.data + first, s.n - first);
    return finish(r, &text, e, out);
}

/* ---- Methods ---- */

#define METHOD(name)                                                                               \
    static enum err method_##name(struct render *r, struct value self, const struct args *args,    \
                                  struct value *out)

METHOD(strip)
{
    return (void)r, text_strip(self.string, args_get(args, 0, "chars"), true, true, out);
}
METHOD(lstrip)
{
    return (void)r, text_strip(self.string, args_get(args, 0, "chars"), true, false, out);
}
METHOD(rstrip)
{
    return (void)r, text_strip(self.string, args_get(args, 0, "chars"), false, true, out);
}

METHOD(upper)
{
    struct buf text;
    (void)args;
    buf_init(&text, r->limits.output_bytes_max);
    return finish(r, &text, unicode_add_upper(&text, self.string.data, self.string.n), out);
}

METHOD(lower)
{
    struct buf text;
    (void)args;
    buf_init(&text, r->limits.output_bytes_max);
    return finish(r, &text, unicode_add_lower(&text, self.string.data, self.string.n), out);
}

METHOD(title)
{
    struct buf text;
    (void)args;
    buf_init(&text, r->limits.output_bytes_max);
    return finish(r, &text, title_into(self.string, unicode_is_alphabetic, &text), out);
}

METHOD(capitalize)
{
    (void)args;
    return text_capitalize(r, self.string, out);
}

METHOD(swapcase)
{
    struct buf text;
    struct span s = self.string;
    enum err e = OK;
    (void)args;
    buf_init(&text, r->limits.output_bytes_max);
    for (size_t at = 0, len; at < s.n && !e; at += len) {
        uint32_t code;
        len = unicode_next(s.data + at, s.n - at, &code);
        e = (unicode_is_upper(code) ? unicode_add_lower : unicode_add_upper)(&text, s.data + at,
                                                                             len);
    }
    return finish(r, &text, e, out);
}

METHOD(replace)
{
    struct span old = {0}, new = {0};
    int64_t count;
    TRY(args_text(args, 0, "old", &old));
    TRY(args_text(args, 1, "new", &new));
    TRY(args_int(args, 2, "count", -1, &count));
    if (!old.data || !new.data) FAIL(ERR_INVALID, "replace needs two strings");
    return text_replace(r, self.string, old, new, count, out);
}

/* ---- Asking ---- */

static bool has_end(struct span s, struct span part, bool at_start)
{
    return s.n >= part.n &&
           (!part.n || !memcmp(s.data + (at_start ? 0 : s.n - part.n), part.data, part.n));
}

/* One text or a tuple of them. */
static enum err test_end(struct value self, const struct args *args, bool at_start,
                         struct value *out)
{
    struct value given = args->n ? args->items[0] : value_none();
    bool several = given.kind == VALUE_LIST && given.list->kind == LIST_TUPLE;
    const struct value *items = several ? given.list->items : &given;
    bool found = false;
    for (size_t i = 0; i < (several ? given.list->n : 1) && !found; i++) {
        if (items[i].kind == VALUE_UNDEFINED) return value_undefined_error(items[i]);
        if (items[i].kind != VALUE_STRING)
            FAIL(ERR_INVALID, "%s first arg must be str or a tuple of str, not %s",
                 at_start ? "startswith" : "endswith", value_type_name(items[i]));
        found = has_end(self.string, items[i].string, at_start);
    }
    *out = value_bool(found);
    return OK;
}

METHOD(startswith)
{
    return (void)r, test_end(self, args, true, out);
}
METHOD(endswith)
{
    return (void)r, test_end(self, args, false, out);
}

METHOD(removeprefix)
{
    struct span s = self.string, part = {0};
    (void)r;
    TRY(args_text(args, 0, "prefix", &part));
    size_t n = has_end(s, part, true) ? part.n : 0;
    *out = value_span(s.data + n, s.n - n);
    return OK;
}

METHOD(removesuffix)
{
    struct span s = self.string, part = {0};
    (void)r;
    TRY(args_text(args, 0, "suffix", &part));
    *out = value_span(s.data, s.n - (has_end(s, part, false) ? part.n : 0));
    return OK;
}

/* The character where the first (last) occurrence begins, -1 for none. */
static enum err find_text(struct render *r, struct value self, const struct args *args, bool last,
                          struct value *out)
{
    struct span s = self.string, part = {0};
    int64_t from;
    const char *found = NULL;
    TRY(args_text(args, 0, "sub", &part));
    TRY(args_int(args, 1, "start", 0, &from));
    if (!part.data) FAIL(ERR_INVALID, "find needs a string");
    TRY(render_charge(r, s.n / 64));
    if (from < 0) from += (int64_t)text_length(s);
    size_t skip = from > 0 ? text_offset(s, (size_t)from) : 0;
    if (last) {
        for (size_t i = s.n; !found && i >= part.n + skip; i--) {
            if (!part.n || !memcmp(s.data + i - part.n, part.data, part.n))
                found = s.data + i - part.n;
            if (!i) break;
        }
    } else {
        found = part.n ? memmem(s.data + skip, s.n - skip, part.data, part.n) : s.data + skip;
    }
    *out = value_int(found ? (int64_t)text_length((struct span){s.data, (size_t)(found - s.data)})
                           : -1);
    return OK;
}

METHOD(find)
{
    return find_text(r, self, args, false, out);
}
METHOD(rfind)
{
    return find_text(r, self, args, true, out);
}

METHOD(index)
{
    TRY(find_text(r, self, args, false, out));
    if (out->integer < 0) FAIL(ERR_INVALID, "substring not found");
    return OK;
}

METHOD(rindex)
{
    TRY(find_text(r, self, args, true, out));
    if (out->integer < 0) FAIL(ERR_INVALID, "substring not found");
    return OK;
}

METHOD(count)
{
    struct span s = self.string, part = {0};
    int64_t n = 0;
    TRY(args_text(args, 0, "sub", &part));
    TRY(render_charge(r, s.n / 64));
    if (!part.n) n = (int64_t)text_length(s) + 1;
    for (const char *at; part.n && s.n && (at = memmem(s.data, s.n, part.data, part.n)); n++) {
        size_t gone = (size_t)(at - s.data) + part.n;
        s.data += gone, s.n -= gone;
    }
    *out = value_int(n);
    return OK;
}

static struct value test_all(struct span s, bool (*is)(uint32_t))
{
    bool all = s.n > 0;
    for (size_t at = 0, len; at < s.n && all; at += len) {
        uint32_t code;
        len = unicode_next(s.data + at, s.n - at, &code);
        all = is(code);
    }
    return value_bool(all);
}

static bool is_alphanumeric(uint32_t code)
{
    return unicode_is_alphabetic(code) || unicode_is_numeric(code);
}

static bool is_ascii(uint32_t code)
{
    return code < 0x80;
}

METHOD(isdigit)
{
    return (void)r, (void)args, *out = test_all(self.string, unicode_is_numeric), OK;
}
METHOD(isalpha)
{
    return (void)r, (void)args, *out = test_all(self.string, unicode_is_alphabetic), OK;
}
METHOD(isalnum)
{
    return (void)r, (void)args, *out = test_all(self.string, is_alphanumeric), OK;
}
METHOD(isspace)
{
    return (void)r, (void)args, *out = test_all(self.string, unicode_is_space), OK;
}

METHOD(isascii)
{
    (void)r;
    (void)args;
    *out = self.string.n ? test_all(self.string, is_ascii) : value_bool(true);
    return OK;
}

METHOD(isupper)
{
    bool yes;
    (void)args;
    TRY(builtin_test("upper")->call(r, self, NULL, &yes));
    *out = value_bool(yes);
    return OK;
}

METHOD(islower)
{
    bool yes;
    (void)args;
    TRY(builtin_test("lower")->call(r, self, NULL, &yes));
    *out = value_bool(yes);
    return OK;
}

/* ---- Joining and padding ---- */

METHOD(join)
{
    struct list *list;
    struct buf text;
    enum err e = OK;
    if (!args->n) FAIL(ERR_INVALID, "join needs what to join");
    TRY(value_iterate(r, args->items[0], &list));
    TRY(render_charge(r, list->n));
    buf_init(&text, r->limits.output_bytes_max);
    for (size_t i = 0; i < list->n && !e; i++) {
        struct value item = list->items[i];
        if (item.kind != VALUE_STRING)
            e = err_set(ERR_INVALID, "sequence item %zu: expected str instance, %s found", i,
                        value_type_name(item));
        if (!e && i) e = buf_add(&text, self.string.data, self.string.n);
        if (!e) e = buf_add(&text, item.string.data, item.string.n);
    }
    return finish(r, &text, e, out);
}

/* where: -1 the text stands left, 0 in the middle, 1 right */
static enum err pad(struct render *r, struct value self, const struct args *args, int where,
                    const char *fill, struct value *out)
{
    struct buf text;
    struct span filler = span_of(fill);
    int64_t width, n = (int64_t)text_length(self.string);
    TRY(args_int(args, 0, "width", 0, &width));
    TRY(args_text(args, 1, "fillchar", &filler));
    if (text_length(filler) != 1) FAIL(ERR_INVALID, "the fill must be one character");
    if (width > 1 << 20) FAIL(ERR_INVALID, "a width beyond 2^20");
    int64_t gap = width > n ? width - n : 0;
    int64_t left = where < 0 ? 0 : where > 0 ? gap : gap / 2 + (gap & width & 1);
    enum err e = OK;
    buf_init(&text, r->limits.output_bytes_max);
    for (int64_t i = 0; i < left && !e; i++)
        e = buf_add(&text, filler.data, filler.n);
    if (!e) e = buf_add(&text, self.string.data, self.string.n);
    for (int64_t i = left; i < gap && !e; i++)
        e = buf_add(&text, filler.data, filler.n);
    return finish(r, &text, e, out);
}

METHOD(ljust)
{
    return pad(r, self, args, -1, " ", out);
}
METHOD(center)
{
    return pad(r, self, args, 0, " ", out);
}
METHOD(rjust)
{
    return pad(r, self, args, 1, " ", out);
}

METHOD(zfill)
{
    struct value rest;
    struct span s = self.string;
    bool sign = s.n && (s.data[0] == '-' || s.data[0] == '+');
    int64_t width;
    TRY(args_int(args, 0, "width", 0, &width));
    struct value less = value_int(width - sign);
    struct args one = {.items = &less, .n = 1};
    TRY(pad(r, value_span(s.data + sign, s.n - sign), &one, 1, "0", &rest));
    if (!sign) {
        *out = rest;
        return OK;
    }
    return value_binary(r, BINARY_ADD, value_span(s.data, 1), rest, out);
}

/* "{} {0} {name}".format(...), without format specifications. */
static enum err format_field(struct render *r, struct span field, const struct args *args,
                             size_t *next, struct buf *text)
{
    char name[64];
    snprintf(name, sizeof name, "%.*s", field.n < 63 ? (int)field.n : 63, field.data);
    size_t place = 0;
    bool digits = field.n > 0;
    for (size_t i = 0; i < field.n; i++) {
        digits &= name[i < 63 ? i : 62] >= '0' && name[i < 63 ? i : 62] <= '9';
        if (digits && place < 100000) place = place * 10 + (size_t)(name[i < 63 ? i : 62] - '0');
    }
    if (memchr(name, ':', strlen(name)) || memchr(name, '!', strlen(name)) ||
        memchr(name, '.', strlen(name)) || memchr(name, '[', strlen(name)))
        FAIL(ERR_UNSUPPORTED, "the format field '{%s}' is not supported", name);
    const struct value *v = !field.n ? args_get(args, (*next)++, NULL)
                            : digits ? args_get(args, place, NULL)
                                     : args_get(args, SIZE_MAX, name);
    (void)r;
    if (!v) FAIL(ERR_INVALID, "format has no value for '{%s}'", name);
    return value_write(*v, text);
}

METHOD(format)
{
    struct span s = self.string;
    struct buf text;
    size_t next = 0;
    enum err e = OK;
    buf_init(&text, r->limits.output_bytes_max);
    for (size_t i = 0; i < s.n && !e; i++) {
        char c = s.data[i];
        if ((c == '{' || c == '}') && i + 1 < s.n && s.data[i + 1] == c) {
            e = buf_add_char(&text, c);
            i++;
        } else if (c == '{') {
            const char *end = memchr(s.data + i, '}', s.n - i);
            struct span field = {s.data + i + 1, end ? (size_t)(end - s.data) - i - 1 : 0};
            e = end ? format_field(r, field, args, &next, &text)
                    : err_set(ERR_INVALID, "expected '}' before end of string");
            i += field.n + 1;
        } else {
            e = buf_add_char(&text, c);
        }
    }
    return finish(r, &text, e, out);
}

#define ROW(method)                                                                                \
    {                                                                                              \
        .name = #method, .call = method_##method                                                   \
    }
const struct function STRING_METHODS[] = {
    ROW(strip),
    ROW(lstrip),
    ROW(rstrip),
    ROW(upper),
    ROW(lower),
    ROW(title),
    ROW(capitalize),
    ROW(swapcase),
    ROW(replace),
    {.name = "split", .call = string_split},
    {.name = "rsplit", .call = string_rsplit},
    {.name = "splitlines", .call = string_splitlines},
    {.name = "partition", .call = string_partition},
    {.name = "rpartition", .call = string_rpartition},
    ROW(startswith),
    ROW(endswith),
    ROW(removeprefix),
    ROW(removesuffix),
    ROW(find),
    ROW(rfind),
    ROW(index),
    ROW(rindex),
    ROW(count),
    ROW(isdigit),
    ROW(isalpha),
    ROW(isalnum),
    ROW(isspace),
    ROW(isascii),
    ROW(isupper),
    ROW(islower),
    ROW(join),
    ROW(ljust),
    ROW(center),
    ROW(rjust),
    ROW(zfill),
    ROW(format),
    {.name = "isnumeric", .call = method_isdigit},
    {.name = "isdecimal", .call = method_isdigit},
    {.name = "casefold", .call = method_lower},
    {.name = NULL},
};
