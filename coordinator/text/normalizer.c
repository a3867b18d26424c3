/* The normalizers of a tokenizer file: one row of the table for each type. */
#include "coordinator/text/normalizer.h"
#include "base/mem.h"
#include "coordinator/text/byte_level.h"
#include "coordinator/text/charsmap.h"
#include "coordinator/text/unicode.h"

#include <string.h>

struct normalizer_step {
    const struct normalizer_kind *kind;
    struct pattern pattern; /* Replace */
    char *text;             /* Replace, Prepend */
    struct charsmap map;    /* Precompiled */
    bool left, right;       /* Strip */
    bool clean, cjk, accents, lower;
};

struct normalizer_kind {
    const char *type;
    enum err (*read)(const json_t *object, struct normalizer_step *step); /* NULL: no fields */
    enum err (*apply)(const struct normalizer_step *step, struct regex_scratch *s,
                      const struct buf *in, struct buf *out);
};

static enum err read_replace(const json_t *object, struct normalizer_step *step)
{
    TRY(pattern_read(object, "pattern", &step->pattern));
    return part_string(object, "content", "", &step->text);
}

static enum err apply_replace(const struct normalizer_step *step, struct regex_scratch *s,
                              const struct buf *in, struct buf *out)
{
    return pattern_replace(&step->pattern, s, step->text, buf_string(in), in->n, out);
}

static enum err read_prepend(const json_t *object, struct normalizer_step *step)
{
    return part_string(object, "prepend", "", &step->text);
}

static enum err apply_prepend(const struct normalizer_step *step, struct regex_scratch *s,
                              const struct buf *in, struct buf *out)
{
    (void)s;
    if (in->n) TRY(buf_add_string(out, step->text));
    return buf_add(out, buf_string(in), in->n);
}

static enum err read_strip(const json_t *object, struct normalizer_step *step)
{
    TRY(part_bool(object, "strip_left", true, &step->left));
    return part_bool(object, "strip_right", true, &step->right);
}

static enum err apply_strip(const struct normalizer_step *step, struct regex_scratch *s,
                            const struct buf *in, struct buf *out)
{
    (void)s;
    const char *text = buf_string(in);
    size_t start = 0, end = in->n;
    uint32_t code;
    while (step->left && start < end) {
        size_t len = unicode_next(text + start, end - start, &code);
        if (!unicode_is_space(code)) break;
        start += len;
    }
    while (step->right && end > start) {
        size_t last = unicode_last(text, end);
        unicode_next(text + last, end - last, &code);
        if (!unicode_is_space(code)) break;
        end = last;
    }
    return buf_add(out, text + start, end - start);
}

static enum err add_without_marks(struct buf *out, const char *text, size_t n)
{
    for (size_t at = 0, len; at < n; at += len) {
        uint32_t code;
        len = unicode_next(text + at, n - at, &code);
        if (!unicode_is_nonspacing(code)) TRY(buf_add(out, text + at, len));
    }
    return OK;
}

static enum err apply_strip_accents(const struct normalizer_step *step, struct regex_scratch *s,
                                    const struct buf *in, struct buf *out)
{
    (void)step;
    (void)s;
    for (size_t at = 0, len; at < in->n; at += len) {
        uint32_t code;
        len = unicode_next(in->data + at, in->n - at, &code);
        if (!unicode_is_mark(code)) TRY(buf_add(out, in->data + at, len));
    }
    return OK;
}

static enum err apply_lowercase(const struct normalizer_step *step, struct regex_scratch *s,
                                const struct buf *in, struct buf *out)
{
    (void)step;
    (void)s;
    return unicode_add_lower(out, buf_string(in), in->n);
}

#define FORM(name, form)                                                                           \
    static enum err apply_##name(const struct normalizer_step *step, struct regex_scratch *s,      \
                                 const struct buf *in, struct buf *out)                            \
    {                                                                                              \
        (void)step;                                                                                \
        (void)s;                                                                                   \
        return unicode_add_normal(out, buf_string(in), in->n, form);                               \
    }
FORM(nfc, UNICODE_NFC)
FORM(nfd, UNICODE_NFD)
FORM(nfkc, UNICODE_NFKC)
FORM(nfkd, UNICODE_NFKD)
#undef FORM

/* What SentencePiece's NMT rule drops, and what it turns into a space. */
static bool nmt_drops(uint32_t c)
{
    return (c >= 1 && c <= 8) || c == 0xb || (c >= 0xe && c <= 0x1f) || c == 0x7f || c == 0x8f ||
           c == 0x9f;
}

static bool nmt_spaces(uint32_t c)
{
    return c == 9 || c == 0xa || c == 0xc || c == 0xd || c == 0x1680 ||
           (c >= 0x200b && c <= 0x200f) || c == 0x2028 || c == 0x2029 || c == 0x2581 ||
           c == 0xfeff || c == 0xfffd;
}

static enum err apply_nmt(const struct normalizer_step *step, struct regex_scratch *s,
                          const struct buf *in, struct buf *out)
{
    (void)step;
    (void)s;
    for (size_t at = 0, len; at < in->n; at += len) {
        uint32_t code;
        len = unicode_next(in->data + at, in->n - at, &code);
        if (nmt_drops(code)) continue;
        if (nmt_spaces(code))
            TRY(buf_add_char(out, ' '));
        else
            TRY(buf_add(out, in->data + at, len));
    }
    return OK;
}

static enum err read_precompiled(const json_t *object, struct normalizer_step *step)
{
    const json_t *map = json_object_get(object, "precompiled_charsmap");
    if (json_is_null(map)) return OK;
    if (!json_is_string(map)) FAIL(ERR_FORMAT, "'precompiled_charsmap' must be a string");
    return charsmap_read(json_string_value(map), json_string_length(map), &step->map);
}

static enum err apply_precompiled(const struct normalizer_step *step, struct regex_scratch *s,
                                  const struct buf *in, struct buf *out)
{
    (void)s;
    return charsmap_apply(&step->map, buf_string(in), in->n, out);
}

static enum err read_bert(const json_t *object, struct normalizer_step *step)
{
    TRY(part_bool(object, "clean_text", true, &step->clean));
    TRY(part_bool(object, "handle_chinese_chars", true, &step->cjk));
    TRY(part_bool(object, "lowercase", true, &step->lower));
    return part_bool(object, "strip_accents", step->lower, &step->accents);
}

/* Drops control characters, makes every space a blank, sets ideographs apart. */
static enum err bert_clean(const struct normalizer_step *step, const struct buf *in,
                           struct buf *out)
{
    for (size_t at = 0, len; at < in->n; at += len) {
        uint32_t code;
        len = unicode_next(in->data + at, in->n - at, &code);
        bool blank = code == '\t' || code == '\n' || code == '\r';
        if (step->clean && (!code || code == 0xfffd || (!blank && unicode_is_other(code))))
            continue;
        if (step->clean && (blank || unicode_is_space(code)))
            TRY(buf_add_char(out, ' '));
        else if (step->cjk && unicode_is_cjk(code))
            TRY(buf_printf(out, " %.*s ", (int)len, in->data + at));
        else
            TRY(buf_add(out, in->data + at, len));
    }
    return OK;
}

static enum err apply_bert(const struct normalizer_step *step, struct regex_scratch *s,
                           const struct buf *in, struct buf *out)
{
    (void)s;
    struct buf one, two;
    buf_init(&one, 0);
    buf_init(&two, 0);
    enum err e;
    TRY_OUT(bert_clean(step, in, &one));
    if (step->accents) {
        TRY_OUT(unicode_add_normal(&two, buf_string(&one), one.n, UNICODE_NFD));
        buf_clear(&one);
        TRY_OUT(add_without_marks(&one, buf_string(&two), two.n));
    }
    e = step->lower ? unicode_add_lower(out, buf_string(&one), one.n)
                    : buf_add(out, buf_string(&one), one.n);
out:
    buf_fini(&one);
    buf_fini(&two);
    return e;
}

static enum err apply_byte_level(const struct normalizer_step *step, struct regex_scratch *s,
                                 const struct buf *in, struct buf *out)
{
    (void)step;
    (void)s;
    return byte_level_add(out, buf_string(in), in->n);
}

static const struct normalizer_kind KINDS[] = {
    {"Replace", read_replace, apply_replace},
    {"Prepend", read_prepend, apply_prepend},
    {"Strip", read_strip, apply_strip},
    {"StripAccents", NULL, apply_strip_accents},
    {"Lowercase", NULL, apply_lowercase},
    {"NFC", NULL, apply_nfc},
    {"NFD", NULL, apply_nfd},
    {"NFKC", NULL, apply_nfkc},
    {"NFKD", NULL, apply_nfkd},
    {"Nmt", NULL, apply_nmt},
    {"Precompiled", read_precompiled, apply_precompiled},
    {"BertNormalizer", read_bert, apply_bert},
    {"ByteLevel", NULL, apply_byte_level},
};

static enum err read_step(const json_t *object, const char *type, struct normalizer *n)
{
    for (size_t i = 0; i < sizeof KINDS / sizeof *KINDS; i++) {
        if (strcmp(KINDS[i].type, type)) continue;
        if (n->n_steps == PART_STEPS_MAX)
            FAIL(ERR_UNSUPPORTED, "more than %d normalizers", PART_STEPS_MAX);
        struct normalizer_step *step = &n->steps[n->n_steps++];
        step->kind = &KINDS[i];
        return KINDS[i].read ? KINDS[i].read(object, step) : OK;
    }
    FAIL(ERR_UNSUPPORTED, "the normalizer '%s' is not supported", type);
}

static enum err read_any(const json_t *object, int depth, struct normalizer *n)
{
    const char *type;
    TRY(part_type(object, "normalizer", &type));
    if (strcmp(type, "Sequence")) return read_step(object, type, n);
    const json_t *list = json_object_get(object, "normalizers");
    if (!json_is_array(list)) FAIL(ERR_FORMAT, "a Sequence has no \"normalizers\"");
    if (depth == PART_DEPTH_MAX) FAIL(ERR_UNSUPPORTED, "normalizers nested too deep");
    for (size_t i = 0; i < json_array_size(list); i++)
        TRY(read_any(json_array_get(list, i), depth + 1, n));
    return OK;
}

enum err normalizer_read(const json_t *object, struct normalizer *out)
{
    struct normalizer n = {0};
    if (!object || json_is_null(object)) {
        *out = n;
        return OK;
    }
    TRY(MEM_NEW_ARRAY(PART_STEPS_MAX, &n.steps));
    enum err e = read_any(object, 0, &n);
    if (e)
        normalizer_fini(&n);
    else
        *out = n;
    return e;
}

void normalizer_fini(struct normalizer *n)
{
    for (size_t i = 0; i < n->n_steps; i++) {
        pattern_fini(&n->steps[i].pattern);
        mem_free(n->steps[i].text);
        charsmap_fini(&n->steps[i].map);
    }
    mem_free(n->steps);
    *n = (struct normalizer){0};
}

enum err normalizer_apply(const struct normalizer *n, struct regex_scratch *s, struct buf *text,
                          struct buf *spare)
{
    for (size_t i = 0; i < n->n_steps; i++) {
        buf_clear(spare);
        TRY(n->steps[i].kind->apply(&n->steps[i], s, text, spare));
        struct buf swap = *text;
        *text = *spare;
        *spare = swap;
    }
    return OK;
}
