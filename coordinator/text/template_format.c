/* Python's "%" formatting of strings, as far as printf has the same words. */
#include "coordinator/text/template_builtins.h"
#include "coordinator/text/template_render.h"

#include <stdio.h>
#include <string.h>

enum { WIDTH_MAX = 1 << 16 };

struct directive {
    char flags[8];
    int64_t width, precision; /* -1: not given */
    char type;
    struct span name; /* %(name)s */
};

static size_t read_number(struct span s, size_t at, int64_t *out)
{
    int64_t n = 0;
    for (; at < s.n && s.data[at] >= '0' && s.data[at] <= '9'; at++)
        if (n <= WIDTH_MAX) n = n * 10 + (s.data[at] - '0');
    *out = n;
    return at;
}

/* Reads what follows a percent sign; returns where it ends, 0 when it is broken. */
static size_t read_directive(struct span s, size_t at, struct directive *d)
{
    size_t n = 0;
    *d = (struct directive){.width = -1, .precision = -1};
    if (at < s.n && s.data[at] == '(') {
        const char *end = memchr(s.data + at, ')', s.n - at);
        if (!end) return 0;
        d->name = (struct span){s.data + at + 1, (size_t)(end - s.data) - at - 1};
        at += d->name.n + 2;
    }
    while (at < s.n && s.data[at] && strchr("-+ 0#", s.data[at]) && n < 5)
        d->flags[n++] = s.data[at++];
    if (at < s.n && s.data[at] >= '1' && s.data[at] <= '9') at = read_number(s, at, &d->width);
    if (at < s.n && s.data[at] == '.') at = read_number(s, at + 1, &d->precision);
    if (at >= s.n || d->width > WIDTH_MAX || d->precision > WIDTH_MAX) return 0;
    d->type = s.data[at];
    return at + 1;
}

static enum err add_padded(const struct directive *d, struct span s, struct buf *out)
{
    if (d->precision >= 0) s.n = text_offset(s, (size_t)d->precision);
    int64_t gap = d->width - (int64_t)text_length(s);
    bool left = strchr(d->flags, '-');
    for (int64_t i = 0; !left && i < gap; i++)
        TRY(buf_add_char(out, ' '));
    TRY(buf_add(out, s.data, s.n));
    for (int64_t i = 0; left && i < gap; i++)
        TRY(buf_add_char(out, ' '));
    return OK;
}

static enum err add_repr(struct render *r, const struct directive *d, struct value v,
                         struct buf *out)
{
    struct buf text;
    buf_init(&text, r->limits.output_bytes_max);
    enum err e = value_write_repr(v, 0, &text);
    if (!e) e = add_padded(d, (struct span){buf_string(&text), text.n}, out);
    buf_fini(&text);
    return e;
}

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
/* The flags were read from a fixed set and the numbers are bounded, so that the format is ours. */
static enum err add_number(const struct directive *d, struct value v, struct buf *out)
{
    char format[64], width[24] = "", precision[24] = "", text[512];
    bool whole = strchr("dioxX", d->type);
    if (d->width >= 0) snprintf(width, sizeof width, "%lld", (long long)d->width);
    if (d->precision >= 0) snprintf(precision, sizeof precision, ".%lld", (long long)d->precision);
    snprintf(format, sizeof format, "%%%s%s%s%s%c", d->flags, width, precision, whole ? "ll" : "",
             d->type == 'i' ? 'd' : d->type);
    if (d->width > 400 || d->precision > 100) FAIL(ERR_INVALID, "a number wider than 400");
    if (whole) {
        double f = value_as_number(v);
        if (!(f > -9.2e18 && f < 9.2e18)) FAIL(ERR_INVALID, "an integer beyond 64 bits");
        long long i = v.kind == VALUE_FLOAT ? (long long)f : value_as_int(v);
        snprintf(text, sizeof text, format, i);
    } else {
        snprintf(text, sizeof text, format, value_as_number(v));
    }
    return buf_add_string(out, text);
}
#pragma GCC diagnostic pop

static enum err add_directive(struct render *r, const struct directive *d, struct value v,
                              struct buf *out)
{
    struct span s;
    switch (d->type) {
    case 's':
        TRY(value_to_string(r, v, &s));
        return add_padded(d, s, out);
    case 'r':
        return add_repr(r, d, v, out);
    case 'd':
    case 'i':
    case 'x':
    case 'X':
    case 'o':
    case 'e':
    case 'E':
    case 'f':
    case 'F':
    case 'g':
    case 'G':
        if (v.kind == VALUE_UNDEFINED) return value_undefined_error(v);
        if (!value_is_number(v))
            FAIL(ERR_INVALID, "%%%c format: a number is required, not %s", d->type,
                 value_type_name(v));
        return add_number(d, v, out);
    default:
        FAIL(ERR_INVALID, "unsupported format character '%c'", d->type);
    }
}

static enum err format_into(struct render *r, struct span s, const struct value *items, size_t n,
                            const struct dict *named, struct buf *out)
{
    size_t used = 0;
    for (size_t at = 0; at < s.n;) {
        struct directive d;
        const char *percent = memchr(s.data + at, '%', s.n - at);
        size_t plain = percent ? (size_t)(percent - s.data) - at : s.n - at;
        TRY(buf_add(out, s.data + at, plain));
        at += plain;
        if (!percent) break;
        if (at + 1 < s.n && s.data[at + 1] == '%') {
            TRY(buf_add_char(out, '%'));
            at += 2;
            continue;
        }
        at = read_directive(s, at + 1, &d);
        if (!at) FAIL(ERR_INVALID, "incomplete format");
        const struct value *v = !d.name.data ? (used < n ? &items[used++] : NULL)
                                : named      ? dict_find(named, value_span(d.name.data, d.name.n))
                                             : NULL;
        if (!v) FAIL(ERR_INVALID, "not enough arguments for format string");
        TRY(add_directive(r, &d, *v, out));
    }
    if (used < n && !named) FAIL(ERR_INVALID, "not all arguments converted during formatting");
    return OK;
}

enum err text_format(struct render *r, struct span format, const struct value *items, size_t n,
                     const struct dict *named, struct value *out)
{
    struct buf text;
    TRY(render_charge(r, format.n / 64 + n));
    buf_init(&text, r->limits.output_bytes_max);
    enum err e = format_into(r, format, items, n, named, &text);
    if (!e) e = render_charge(r, text.n / 64);
    if (!e) e = value_copy_string(&r->arena, buf_string(&text), text.n, out);
    buf_fini(&text);
    return e;
}
