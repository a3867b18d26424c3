/* The methods of strings that divide them: split, rsplit, splitlines, partition, rpartition. */
#include "coordinator/text/template_builtins.h"
#include "coordinator/text/template_render.h"
#include "coordinator/text/unicode.h"

#include <string.h>

static enum err add_part(struct render *r, struct list *list, const char *s, size_t n)
{
    TRY(render_charge(r, 1 + n / 64));
    return list_add(&r->arena, list, value_span(s, n));
}

static size_t skip_spaces(struct span s, size_t at, bool spaces)
{
    while (at < s.n) {
        uint32_t code;
        size_t len = unicode_next(s.data + at, s.n - at, &code);
        if (unicode_is_space(code) != spaces) break;
        at += len;
    }
    return at;
}

static enum err split_at_spaces(struct render *r, struct span s, int64_t most, struct list *list)
{
    size_t at = skip_spaces(s, 0, true);
    while (at < s.n) {
        size_t end = skip_spaces(s, at, false);
        if (most-- == 0) return add_part(r, list, s.data + at, s.n - at); /* as it is */
        TRY(add_part(r, list, s.data + at, end - at));
        at = skip_spaces(s, end, true);
    }
    return OK;
}

static enum err split_at(struct render *r, struct span s, struct span separator, int64_t most,
                         struct list *list)
{
    if (!separator.n) FAIL(ERR_INVALID, "empty separator");
    while (most--) {
        const char *at = s.n ? memmem(s.data, s.n, separator.data, separator.n) : NULL;
        if (!at) break;
        size_t n = (size_t)(at - s.data);
        TRY(add_part(r, list, s.data, n));
        s.data += n + separator.n, s.n -= n + separator.n;
    }
    return add_part(r, list, s.data, s.n);
}

static void turn_around(struct list *list)
{
    for (size_t i = 0; i < list->n / 2; i++) {
        struct value swap = list->items[i];
        list->items[i] = list->items[list->n - 1 - i];
        list->items[list->n - 1 - i] = swap;
    }
}

/* From the right: the last `most` separators count. */
static enum err rsplit_at(struct render *r, struct span s, struct span separator, int64_t most,
                          struct list *list)
{
    if (!separator.n) FAIL(ERR_INVALID, "empty separator");
    for (size_t at = s.n; most && at >= separator.n;) {
        size_t start = at - separator.n;
        if (memcmp(s.data + start, separator.data, separator.n)) {
            at--;
            continue;
        }
        TRY(add_part(r, list, s.data + at, s.n - at));
        s.n = at = start;
        most--;
    }
    TRY(add_part(r, list, s.data, s.n));
    turn_around(list);
    return OK;
}

static enum err rsplit_at_spaces(struct render *r, struct span s, int64_t most, struct list *list)
{
    struct value rest;
    TRY(text_strip(s, NULL, false, true, &rest));
    for (s = rest.string; s.n; s = rest.string) {
        size_t start = s.n;
        while (start && most) {
            uint32_t code;
            size_t last = unicode_last(s.data, start);
            unicode_next(s.data + last, start - last, &code);
            if (unicode_is_space(code)) break;
            start = last;
        }
        if (most-- == 0) {
            TRY(add_part(r, list, s.data, s.n));
            break;
        }
        TRY(add_part(r, list, s.data + start, s.n - start));
        TRY(text_strip((struct span){s.data, start}, NULL, false, true, &rest));
    }
    turn_around(list);
    return OK;
}

static enum err split_any(struct render *r, struct value self, const struct args *args, bool right,
                          struct value *out)
{
    const struct value *separator = args_get(args, 0, "sep");
    int64_t most;
    TRY(args_int(args, 1, "maxsplit", -1, &most));
    TRY(value_new_list(&r->arena, LIST_LIST, out));
    TRY(render_charge(r, self.string.n / 64));
    if (!separator || separator->kind == VALUE_NONE)
        return (right ? rsplit_at_spaces : split_at_spaces)(r, self.string, most, out->list);
    if (separator->kind != VALUE_STRING)
        FAIL(ERR_INVALID, "must be str or None, not %s", value_type_name(*separator));
    return (right ? rsplit_at : split_at)(r, self.string, separator->string, most, out->list);
}

enum err string_split(struct render *r, struct value self, const struct args *args,
                      struct value *out)
{
    return split_any(r, self, args, false, out);
}
enum err string_rsplit(struct render *r, struct value self, const struct args *args,
                       struct value *out)
{
    return split_any(r, self, args, true, out);
}

enum err string_splitlines(struct render *r, struct value self, const struct args *args,
                           struct value *out)
{
    struct span s = self.string;
    bool keep = args_bool(args, 0, "keepends", false);
    TRY(value_new_list(&r->arena, LIST_LIST, out));
    for (size_t at = 0; at < s.n;) {
        size_t end = at;
        while (end < s.n && s.data[end] != '\n' && s.data[end] != '\r')
            end++;
        size_t next = end;
        if (next < s.n)
            next += s.data[next] == '\r' && next + 1 < s.n && s.data[next + 1] == '\n' ? 2 : 1;
        TRY(add_part(r, out->list, s.data + at, (keep ? next : end) - at));
        at = next;
    }
    return OK;
}

static enum err partition(struct render *r, struct span s, struct span separator, bool right,
                          struct value *out)
{
    const char *at = NULL;
    if (!separator.n) FAIL(ERR_INVALID, "empty separator");
    for (size_t i = s.n; right && !at && i >= separator.n; i--)
        if (!memcmp(s.data + i - separator.n, separator.data, separator.n))
            at = s.data + i - separator.n;
    if (!right && s.n) at = memmem(s.data, s.n, separator.data, separator.n);
    TRY(value_new_list(&r->arena, LIST_TUPLE, out));
    size_t n = at ? (size_t)(at - s.data) : right ? 0 : s.n;
    TRY(add_part(r, out->list, s.data, n));
    TRY(add_part(r, out->list, at ? at : "", at ? separator.n : 0));
    size_t after = at ? n + separator.n : n;
    return add_part(r, out->list, s.data + after, s.n - after);
}

enum err string_partition(struct render *r, struct value self, const struct args *args,
                          struct value *out)
{
    struct span separator = {0};
    TRY(args_text(args, 0, "sep", &separator));
    return partition(r, self.string, separator, false, out);
}

enum err string_rpartition(struct render *r, struct value self, const struct args *args,
                           struct value *out)
{
    struct span separator = {0};
    TRY(args_text(args, 0, "sep", &separator));
    return partition(r, self.string, separator, true, out);
}
