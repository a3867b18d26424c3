/* Filters of single values: texts, numbers, defaults. */
#include "coordinator/text/template_builtins.h"
#include "coordinator/text/template_render.h"
#include "coordinator/text/unicode.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FILTER(name)                                                                               \
    static enum err filter_##name(struct render *r, struct value self, const struct args *args,    \
                                  struct value *out)

/* What a string method does, after turning self into a string. */
static enum err as_method(struct render *r, struct value self, const char *name,
                          const struct args *args, struct value *out)
{
    struct span s;
    struct value bound;
    bool found;
    TRY(value_to_string(r, self, &s));
    TRY(builtin_method(r, value_span(s.data, s.n), name, &bound, &found));
    ASSERT(found);
    return template_call(r, bound, args, out);
}

FILTER(upper)
{
    return as_method(r, self, "upper", args, out);
}
FILTER(lower)
{
    return as_method(r, self, "lower", args, out);
}
FILTER(trim)
{
    return as_method(r, self, "strip", args, out);
}

FILTER(title)
{
    struct span s;
    (void)args;
    TRY(value_to_string(r, self, &s));
    return text_title(r, s, out);
}

FILTER(capitalize)
{
    struct span s;
    (void)args;
    TRY(value_to_string(r, self, &s));
    return text_capitalize(r, s, out);
}

FILTER(center)
{
    struct value width = value_int(80);
    struct args one = {.items = &width, .n = 1};
    const struct value *given = args_get(args, 0, "width");
    if (given) width = *given;
    return as_method(r, self, "center", &one, out);
}

FILTER(string)
{
    struct span s;
    (void)args;
    TRY(value_to_string(r, self, &s));
    *out = value_span(s.data, s.n);
    return OK;
}

FILTER(replace)
{
    struct span s, parts[2];
    int64_t count = -1;
    const struct value *n = args_get(args, 2, "count");
    const struct value *given[2] = {args_get(args, 0, "old"), args_get(args, 1, "new")};
    if (!given[0] || !given[1]) FAIL(ERR_INVALID, "replace needs two strings");
    if (n && n->kind != VALUE_NONE) TRY(args_int(args, 2, "count", -1, &count));
    TRY(value_to_string(r, self, &s));
    for (int i = 0; i < 2; i++)
        TRY(value_to_string(r, *given[i], &parts[i]));
    return text_replace(r, s, parts[0], parts[1], count, out);
}

FILTER(escape)
{
    static const char *const entities[] = {"&amp;", "&lt;", "&gt;", "&#34;", "&#39;"};
    struct span s;
    struct buf text;
    enum err e = OK;
    (void)args;
    TRY(value_to_string(r, self, &s));
    TRY(render_charge(r, s.n / 16));
    buf_init(&text, r->limits.output_bytes_max);
    for (size_t i = 0; i < s.n && !e; i++) {
        const char *at = s.data[i] ? strchr("&<>\"'", s.data[i]) : NULL;
        e = at ? buf_add_string(&text, entities[at - strchr("&<>\"'", '&')])
               : buf_add_char(&text, s.data[i]);
    }
    if (!e) e = value_copy_string(&r->arena, buf_string(&text), text.n, out);
    buf_fini(&text);
    return e;
}

FILTER(urlencode)
{
    struct span s;
    struct buf text;
    enum err e = OK;
    (void)args;
    if (self.kind == VALUE_DICT || self.kind == VALUE_LIST)
        FAIL(ERR_UNSUPPORTED, "urlencode of a %s is not supported", value_type_name(self));
    TRY(value_to_string(r, self, &s));
    TRY(render_charge(r, s.n / 16));
    buf_init(&text, r->limits.output_bytes_max);
    for (size_t i = 0; i < s.n && !e; i++) {
        unsigned char c = (unsigned char)s.data[i];
        bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                     (c && strchr("/_.-~", c));
        e = plain ? buf_add_char(&text, (char)c) : buf_printf(&text, "%%%02X", c);
    }
    if (!e) e = value_copy_string(&r->arena, buf_string(&text), text.n, out);
    buf_fini(&text);
    return e;
}

static enum err indent_into(struct span s, struct span by, bool first, bool blank, struct buf *text)
{
    if (first) TRY(buf_add(text, by.data, by.n));
    for (size_t at = 0; at <= s.n;) {
        const char *end = at < s.n ? memchr(s.data + at, '\n', s.n - at) : NULL;
        size_t n = end ? (size_t)(end - s.data) - at : s.n - at;
        if (at) {
            TRY(buf_add_char(text, '\n'));
            if (n || blank) TRY(buf_add(text, by.data, by.n));
        }
        TRY(buf_add(text, s.data + at, n));
        at += n + 1;
    }
    return OK;
}

FILTER(indent)
{
    struct span s, by;
    struct buf text;
    const struct value *width = args_get(args, 0, "width");
    struct value blanks = value_string(" ");
    int64_t n = 4;
    if (width && width->kind == VALUE_STRING) {
        by = width->string;
    } else {
        TRY(args_int(args, 0, "width", 4, &n));
        TRY(value_binary(r, BINARY_MULTIPLY, blanks, value_int(n), &blanks));
        by = blanks.string;
    }
    TRY(value_to_string(r, self, &s));
    TRY(render_charge(r, s.n / 16));
    buf_init(&text, r->limits.output_bytes_max);
    enum err e = indent_into(s, by, args_bool(args, 1, "first", false),
                             args_bool(args, 2, "blank", false), &text);
    if (!e) e = value_copy_string(&r->arena, buf_string(&text), text.n, out);
    buf_fini(&text);
    return e;
}

FILTER(truncate)
{
    struct span s, end = span_of("...");
    int64_t length, leeway;
    TRY(value_to_string(r, self, &s));
    TRY(args_int(args, 0, "length", 255, &length));
    TRY(args_text(args, 2, "end", &end));
    TRY(args_int(args, 3, "leeway", 5, &leeway));
    int64_t n = (int64_t)text_length(s), n_end = (int64_t)text_length(end);
    if (length < n_end || leeway < 0)
        FAIL(ERR_INVALID, "truncate: expected length >= %lld", (long long)n_end);
    *out = value_span(s.data, s.n);
    if (n <= length + leeway) return OK;
    s.n = text_offset(s, (size_t)(length - n_end));
    if (!args_bool(args, 1, "killwords", false)) {
        const char *space = s.n ? memrchr(s.data, ' ', s.n) : NULL;
        if (space) s.n = (size_t)(space - s.data);
    }
    return value_binary(r, BINARY_ADD, value_span(s.data, s.n), value_span(end.data, end.n), out);
}

FILTER(wordcount)
{
    struct span s;
    int64_t n = 0;
    bool inside = false;
    (void)args;
    TRY(value_to_string(r, self, &s));
    TRY(render_charge(r, s.n / 16));
    for (size_t at = 0, len; at < s.n; at += len) {
        uint32_t code;
        len = unicode_next(s.data + at, s.n - at, &code);
        bool word = unicode_is_word(code);
        n += word && !inside;
        inside = word;
    }
    *out = value_int(n);
    return OK;
}

FILTER(format)
{
    struct span s;
    struct value named;
    TRY(value_to_string(r, self, &s));
    TRY(value_new_dict(&r->arena, &named));
    for (size_t i = 0; i < args->n_named; i++)
        TRY(dict_set(&r->arena, named.dict, value_string(args->named[i].name),
                     args->named[i].value));
    return text_format(r, s, args->items, args->n, args->n_named ? named.dict : NULL, out);
}

/* ---- Numbers ---- */

/* A text without blanks around it and underscores between digits, as a C string. */
static bool number_text(struct span s, char *text, size_t size)
{
    struct value stripped;
    size_t n = 0;
    if (text_strip(s, NULL, true, true, &stripped)) return false;
    s = stripped.string;
    if (!s.n || s.n >= size || memchr(s.data, 0, s.n)) return false;
    for (size_t i = 0; i < s.n; i++) {
        bool between = i && i + 1 < s.n && s.data[i - 1] != '_' && s.data[i + 1] != '_';
        if (s.data[i] != '_')
            text[n++] = s.data[i];
        else if (!between)
            return false;
    }
    text[n] = 0;
    return true;
}

static bool parse_float(struct span s, double *out)
{
    char text[512], *end;
    if (!number_text(s, text, sizeof text) || strpbrk(text, "xXpP(")) return false;
    *out = strtod(text, &end);
    return !*end;
}

static bool parse_int(struct span s, int base, int64_t *out)
{
    char text[128], *end;
    if (!number_text(s, text, sizeof text)) return false;
    char *digits = text + (*text == '-' || *text == '+');
    int mark = digits[0] == '0' ? digits[1] | 0x20 : 0;
    bool marked =
        (mark == 'x' && base == 16) || (mark == 'o' && base == 8) || (mark == 'b' && base == 2);
    if (marked) memmove(digits, digits + 2, strlen(digits + 2) + 1);
    if (*digits == '-' || *digits == '+' || *digits == ' ' || !*digits) return false;
    errno = 0;
    *out = strtoll(text, &end, base);
    return !*end && !errno && !(mark == 'x' && !marked);
}

static bool float_to_int(double f, int64_t *out)
{
    if (!(f > -9.2e18 && f < 9.2e18)) return false;
    *out = (int64_t)f;
    return true;
}

FILTER(int)
{
    const struct value *fallback = args_get(args, 0, "default");
    int64_t i = 0, base;
    double f;
    bool good = false;
    (void)r;
    TRY(args_int(args, 1, "base", 10, &base));
    if (base < 2 || base > 36) FAIL(ERR_INVALID, "a base from 2 to 36 is needed");
    if (self.kind == VALUE_UNDEFINED) return value_undefined_error(self);
    if (self.kind == VALUE_FLOAT) {
        good = float_to_int(self.number, &i);
    } else if (value_is_number(self)) {
        i = value_as_int(self);
        good = true;
    } else if (self.kind == VALUE_STRING) {
        good = parse_int(self.string, (int)base, &i) ||
               (parse_float(self.string, &f) && float_to_int(f, &i));
    }
    *out = good ? value_int(i) : fallback ? *fallback : value_int(0);
    return OK;
}

FILTER(float)
{
    const struct value *fallback = args_get(args, 0, "default");
    double f = 0;
    (void)r;
    if (self.kind == VALUE_UNDEFINED) return value_undefined_error(self);
    bool good = value_is_number(self);
    if (good)
        f = value_as_number(self);
    else if (self.kind == VALUE_STRING)
        good = parse_float(self.string, &f);
    *out = good ? value_float(f) : fallback ? *fallback : value_float(0);
    return OK;
}

static enum err need_number(struct value v, const char *what)
{
    if (v.kind == VALUE_UNDEFINED) return value_undefined_error(v);
    if (!value_is_number(v))
        FAIL(ERR_INVALID, "bad operand type for %s: '%s'", what, value_type_name(v));
    return OK;
}

FILTER(abs)
{
    (void)r;
    (void)args;
    TRY(need_number(self, "abs()"));
    if (self.kind == VALUE_FLOAT)
        *out = value_float(fabs(self.number));
    else if (value_as_int(self) == INT64_MIN)
        FAIL(ERR_INVALID, "an integer beyond 64 bits");
    else
        *out = value_int(llabs(value_as_int(self)));
    return OK;
}

/* Python's round: the nearest decimal, exactly halfway to the even one, which is what printf does.
 */
static double round_decimal(double f, int64_t precision)
{
    char text[512];
    if (!isfinite(f) || precision > 300) return f;
    if (precision >= 0) {
        snprintf(text, sizeof text, "%.*f", (int)precision, f);
        return strtod(text, NULL);
    }
    double scale = pow(10, (double)-precision);
    return isfinite(scale) ? nearbyint(f / scale) * scale : 0;
}

FILTER(round)
{
    struct span method = span_of("common");
    int64_t precision;
    (void)r;
    TRY(need_number(self, "round()"));
    TRY(args_int(args, 0, "precision", 0, &precision));
    TRY(args_text(args, 1, "method", &method));
    bool up = span_equal(method, "ceil"), down = span_equal(method, "floor");
    if (!up && !down && !span_equal(method, "common"))
        FAIL(ERR_INVALID, "method must be common, ceil or floor");
    if (precision > 300 || precision < -300) FAIL(ERR_INVALID, "a precision beyond 300");
    if (self.kind != VALUE_FLOAT && !up && !down && precision >= 0) {
        *out = value_int(value_as_int(self));
        return OK;
    }
    double f = value_as_number(self), scale = pow(10, (double)precision);
    if (up || down)
        *out = value_float((up ? ceil(f * scale) : floor(f * scale)) / scale);
    else
        *out = value_float(round_decimal(f, precision));
    if (self.kind != VALUE_FLOAT && !up && !down) *out = value_int((int64_t)out->number);
    return OK;
}

/* ---- Any value ---- */

FILTER(default)
{
    const struct value *fallback = args_get(args, 0, "default_value");
    bool falsy = args_bool(args, 1, "boolean", false);
    (void)r;
    bool missing = self.kind == VALUE_UNDEFINED || (falsy && !value_is_true(self));
    *out = !missing ? self : fallback ? *fallback : value_string("");
    return OK;
}

FILTER(safe)
{
    (void)r;
    (void)args;
    *out = self;
    return OK;
}

FILTER(length)
{
    (void)args;
    switch (self.kind) {
    case VALUE_UNDEFINED:
        *out = value_int(0);
        return OK;
    case VALUE_STRING:
        TRY(render_charge(r, self.string.n / 64));
        *out = value_int((int64_t)text_length(self.string));
        return OK;
    case VALUE_DICT:
        *out = value_int((int64_t)self.dict->n);
        return OK;
    case VALUE_LOOP:
        *out = value_int((int64_t)self.loop->n);
        return OK;
    case VALUE_LIST:
        if (self.list->kind == LIST_GENERATOR) break;
        *out = value_int((int64_t)self.list->n);
        return OK;
    default:
        break;
    }
    FAIL(ERR_INVALID, "object of type '%s' has no len()", value_type_name(self));
}

FILTER(attr)
{
    char name[256];
    struct span given = {0};
    TRY(args_text(args, 0, "name", &given));
    snprintf(name, sizeof name, "%.*s", given.n < 255 ? (int)given.n : 255,
             given.data ? given.data : "");
    if (self.kind == VALUE_DICT) { /* getattr sees methods, not entries */
        bool found;
        TRY(builtin_method(r, self, name, out, &found));
        if (!found) *out = value_undefined("a dict has no such attribute");
        return OK;
    }
    return value_attribute(r, self, name, out);
}

static enum err read_separators(const struct args *args, struct json_style *style)
{
    const struct value *given = args_get(args, 2, "separators");
    if (!given || given->kind == VALUE_NONE) return OK;
    if (given->kind != VALUE_LIST || given->list->n != 2 ||
        given->list->items[0].kind != VALUE_STRING || given->list->items[1].kind != VALUE_STRING)
        FAIL(ERR_INVALID, "separators must be two strings");
    style->item_separator = given->list->items[0].string;
    style->key_separator = given->list->items[1].string;
    return OK;
}

/* tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False) */
FILTER(tojson)
{
    struct json_style style = {.indent = -1, .key_separator = span_of(": ")};
    struct buf text;
    const struct value *indent = args_get(args, 1, "indent");
    style.ensure_ascii = args_bool(args, 0, "ensure_ascii", false);
    style.sort_keys = args_bool(args, 3, "sort_keys", false);
    if (indent && indent->kind != VALUE_NONE) TRY(args_int(args, 1, "indent", -1, &style.indent));
    if (style.indent > 64) FAIL(ERR_INVALID, "an indent beyond 64");
    style.item_separator = span_of(style.indent >= 0 ? "," : ", ");
    TRY(read_separators(args, &style));
    buf_init(&text, r->limits.output_bytes_max);
    enum err e = value_write_json(r, self, &style, 0, &text);
    if (!e) e = value_copy_string(&r->arena, buf_string(&text), text.n, out);
    buf_fini(&text);
    return e;
}

#define ROW(filter)                                                                                \
    {                                                                                              \
#filter, filter_##filter                                                                   \
    }
const struct filter_row TEXT_FILTERS[] = {
    ROW(upper),
    ROW(lower),
    ROW(trim),
    ROW(title),
    ROW(capitalize),
    ROW(center),
    ROW(string),
    ROW(replace),
    ROW(escape),
    {"e", filter_escape},
    ROW(urlencode),
    ROW(indent),
    ROW(truncate),
    ROW(wordcount),
    ROW(format),
    ROW(int),
    ROW(float),
    ROW(abs),
    ROW(round),
    ROW(default),
    ROW(safe),
    ROW(length),
    ROW(attr),
    ROW(tojson),
    {"forceescape", filter_escape},
    {"d", filter_default},
    {"count", filter_length},
    {NULL, NULL},
};
