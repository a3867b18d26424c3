/* Arithmetic and joining of template values, by Python's rules. */
#include "coordinator/text/template_builtins.h"
#include "coordinator/text/template_render.h"

#include <math.h>
#include <string.h>

enum { REPEAT_BYTES_MAX = 1 << 26 };

static const char *sign_of(enum binary_operator op)
{
    static const char *const signs[] = {"+", "-", "*", "/", "//", "%", "**", "~"};
    return signs[op];
}

enum err value_to_string(struct render *r, struct value v, struct span *out)
{
    struct value copy;
    struct buf text;
    if (v.kind == VALUE_STRING) {
        *out = v.string;
        return OK;
    }
    buf_init(&text, r->limits.output_bytes_max);
    enum err e = value_write(v, &text);
    if (!e) e = render_charge(r, text.n / 64);
    if (!e) e = value_copy_string(&r->arena, buf_string(&text), text.n, &copy);
    buf_fini(&text);
    if (!e) *out = copy.string;
    return e;
}

static enum err join_text(struct render *r, struct span a, struct span b, struct value *out)
{
    char *both;
    TRY(render_charge(r, (a.n + b.n) / 64));
    TRY(arena_alloc(&r->arena, a.n + b.n + 1, (void **)&both));
    if (a.n) memcpy(both, a.data, a.n);
    if (b.n) memcpy(both + a.n, b.data, b.n);
    *out = value_span(both, a.n + b.n);
    return OK;
}

static enum err join_lists(struct render *r, const struct list *a, const struct list *b,
                           struct value *out)
{
    TRY(render_charge(r, a->n + b->n));
    TRY(value_new_list(&r->arena, a->kind == LIST_LIST ? LIST_LIST : LIST_TUPLE, out));
    for (size_t i = 0; i < a->n; i++)
        TRY(list_add(&r->arena, out->list, a->items[i]));
    for (size_t i = 0; i < b->n; i++)
        TRY(list_add(&r->arena, out->list, b->items[i]));
    return OK;
}

static bool is_tuple(const struct list *list)
{
    return list->kind == LIST_TUPLE || list->kind == LIST_GROUP;
}

static enum err wrong_types(enum binary_operator op, struct value a, struct value b)
{
    if (op == BINARY_ADD && a.kind == VALUE_STRING)
        FAIL(ERR_INVALID, "can only concatenate str (not \"%s\") to str", value_type_name(b));
    FAIL(ERR_INVALID, "unsupported operand type(s) for %s: '%s' and '%s'", sign_of(op),
         value_type_name(a), value_type_name(b));
}

static enum err add(struct render *r, struct value a, struct value b, struct value *out)
{
    if (a.kind == VALUE_STRING && b.kind == VALUE_STRING)
        return join_text(r, a.string, b.string, out);
    if (a.kind == VALUE_LIST && b.kind == VALUE_LIST &&
        ((a.list->kind == LIST_LIST && b.list->kind == LIST_LIST) ||
         (is_tuple(a.list) && is_tuple(b.list))))
        return join_lists(r, a.list, b.list, out);
    return wrong_types(BINARY_ADD, a, b);
}

static enum err repeat(struct render *r, struct value v, int64_t times, struct value *out)
{
    size_t n = v.kind == VALUE_STRING ? v.string.n : v.list->n, total;
    if (times < 0) times = 0;
    if (__builtin_mul_overflow(n, (size_t)times, &total) || total > REPEAT_BYTES_MAX)
        FAIL(ERR_INVALID, "a repetition is longer than %d", REPEAT_BYTES_MAX);
    TRY(render_charge(r, total / 16 + 1));
    if (v.kind == VALUE_STRING) {
        char *text;
        TRY(arena_alloc(&r->arena, total + 1, (void **)&text));
        for (size_t i = 0; n && i < total; i += n)
            memcpy(text + i, v.string.data, n);
        *out = value_span(text, total);
        return OK;
    }
    TRY(value_new_list(&r->arena, is_tuple(v.list) ? LIST_TUPLE : LIST_LIST, out));
    for (size_t i = 0; i < total; i++)
        TRY(list_add(&r->arena, out->list, v.list->items[i % n]));
    return OK;
}

static bool is_row(struct value v)
{
    return v.kind == VALUE_STRING ||
           (v.kind == VALUE_LIST && (v.list->kind == LIST_LIST || is_tuple(v.list)));
}

static bool is_whole(struct value v)
{
    return v.kind == VALUE_INT || v.kind == VALUE_BOOL;
}

static enum err power(int64_t base, int64_t exponent, int64_t *out, bool *out_overflow)
{
    int64_t result = 1;
    for (; exponent; exponent >>= 1) {
        if (exponent & 1) *out_overflow |= __builtin_mul_overflow(result, base, &result);
        if (exponent > 1) *out_overflow |= __builtin_mul_overflow(base, base, &base);
        if (*out_overflow) break;
    }
    *out = result;
    return OK;
}

static enum err whole_arithmetic(enum binary_operator op, int64_t a, int64_t b, struct value *out)
{
    int64_t i = 0;
    bool overflow = false;
    switch (op) {
    case BINARY_ADD:
        overflow = __builtin_add_overflow(a, b, &i);
        break;
    case BINARY_SUBTRACT:
        overflow = __builtin_sub_overflow(a, b, &i);
        break;
    case BINARY_MULTIPLY:
        overflow = __builtin_mul_overflow(a, b, &i);
        break;
    case BINARY_POWER:
        TRY(power(a, b, &i, &overflow));
        break;
    default: /* floor division and its remainder */
        if (a == INT64_MIN && b == -1) {
            overflow = op == BINARY_FLOOR_DIVIDE;
            break;
        }
        i = op == BINARY_MODULO ? a % b : a / b;
        if (op == BINARY_MODULO && i && (i < 0) != (b < 0)) i += b;
        if (op == BINARY_FLOOR_DIVIDE && a % b && (a < 0) != (b < 0)) i--;
    }
    if (overflow) FAIL(ERR_INVALID, "an integer beyond 64 bits");
    *out = value_int(i);
    return OK;
}

static double float_arithmetic(enum binary_operator op, double a, double b)
{
    double m;
    switch (op) {
    case BINARY_ADD:
        return a + b;
    case BINARY_SUBTRACT:
        return a - b;
    case BINARY_MULTIPLY:
        return a * b;
    case BINARY_DIVIDE:
        return a / b;
    case BINARY_FLOOR_DIVIDE:
        return floor(a / b);
    case BINARY_POWER:
        return pow(a, b);
    default:
        m = fmod(a, b);
        return m != 0 && (m < 0) != (b < 0) ? m + b : m;
    }
}

static enum err arithmetic(enum binary_operator op, struct value a, struct value b,
                           struct value *out)
{
    bool divides = op == BINARY_DIVIDE || op == BINARY_FLOOR_DIVIDE || op == BINARY_MODULO;
    if (divides && value_as_number(b) == 0) FAIL(ERR_INVALID, "division by zero");
    bool whole = is_whole(a) && is_whole(b) && op != BINARY_DIVIDE &&
                 !(op == BINARY_POWER && value_as_int(b) < 0);
    if (whole) return whole_arithmetic(op, value_as_int(a), value_as_int(b), out);
    *out = value_float(float_arithmetic(op, value_as_number(a), value_as_number(b)));
    return OK;
}

/* "%s of %s" % (a, b) */
static enum err percent(struct render *r, struct span format, struct value v, struct value *out)
{
    bool several = v.kind == VALUE_LIST && is_tuple(v.list);
    return text_format(r, format, several ? v.list->items : &v, several ? v.list->n : 1,
                       v.kind == VALUE_DICT ? v.dict : NULL, out);
}

enum err value_binary(struct render *r, enum binary_operator op, struct value a, struct value b,
                      struct value *out)
{
    if (op == BINARY_CONCAT) {
        struct span x, y;
        TRY(value_to_string(r, a, &x));
        TRY(value_to_string(r, b, &y));
        return join_text(r, x, y, out);
    }
    if (a.kind == VALUE_UNDEFINED) return value_undefined_error(a);
    if (b.kind == VALUE_UNDEFINED) return value_undefined_error(b);
    if (value_is_number(a) && value_is_number(b)) return arithmetic(op, a, b, out);
    if (op == BINARY_ADD) return add(r, a, b, out);
    if (op == BINARY_MULTIPLY && is_row(a) && is_whole(b))
        return repeat(r, a, value_as_int(b), out);
    if (op == BINARY_MULTIPLY && is_row(b) && is_whole(a))
        return repeat(r, b, value_as_int(a), out);
    if (op == BINARY_MODULO && a.kind == VALUE_STRING) return percent(r, a.string, b, out);
    return wrong_types(op, a, b);
}
