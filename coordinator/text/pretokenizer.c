/* The pre-tokenizers of a tokenizer file: one row of the table for each type.
 *
 * Most only divide: they mark where delimiters are, and a behaviour says to which word a delimiter
 * goes. Those that also change the text rebuild it word by word. */
#include "coordinator/text/pretokenizer.h"
#include "base/mem.h"
#include "coordinator/text/byte_level.h"
#include "coordinator/text/unicode.h"

#include <string.h>

enum behavior {
    BEHAVIOR_ISOLATED,
    BEHAVIOR_REMOVED,
    BEHAVIOR_MERGED_WITH_PREVIOUS,
    BEHAVIOR_MERGED_WITH_NEXT,
    BEHAVIOR_CONTIGUOUS,
};

static const char *const BEHAVIORS[] = {"Isolated", "Removed", "MergedWithPrevious",
                                        "MergedWithNext", "Contiguous"};

struct pretokenizer_step {
    const struct pretokenizer_kind *kind;
    struct pattern pattern;
    enum behavior behavior;
    bool invert;
    bool prefix_space, use_regex; /* ByteLevel */
    char *replacement;            /* Metaspace */
    enum { PREPEND_ALWAYS, PREPEND_FIRST, PREPEND_NEVER } prepend;
    bool split, one_by_one;
    int64_t length; /* FixedLength, characters */
};

struct cutter { /* what a step works with */
    const struct pretokenizer_step *step;
    struct regex_scratch *scratch;
    struct words *words;
};

struct pretokenizer_kind {
    const char *type;
    enum err (*read)(const json_t *object, struct pretokenizer_step *step); /* NULL: no fields */
    enum err (*apply)(struct cutter *c);
};

/* ---- Dividing ---- */

static enum err add_word(struct words *w, size_t start, size_t end, bool first)
{
    if (start == end) return OK;
    if (w->n_next == w->next_capacity) {
        size_t capacity = w->next_capacity ? 2 * w->next_capacity : 64;
        TRY(mem_resize((void **)&w->next, capacity * sizeof *w->next));
        w->next_capacity = capacity;
    }
    w->next[w->n_next++] = (struct word){start, end, first};
    return OK;
}

/* The new division takes the place of the old one. */
static void take_division(struct words *w)
{
    struct word *items = w->items;
    size_t capacity = w->capacity;
    w->items = w->next, w->n = w->n_next, w->capacity = w->next_capacity;
    w->next = items, w->next_capacity = capacity, w->n_next = 0;
}

/* The parts of one word as they are found, each a delimiter or not; behaviours join them. */
struct division {
    struct words *words;
    enum behavior behavior;
    struct word whole;
    size_t start, end; /* the word being made */
    bool open, is_delimiter, last_was_delimiter;
};

static enum err close_part(struct division *d)
{
    if (!d->open) return OK;
    d->open = false;
    if (d->behavior == BEHAVIOR_REMOVED && d->is_delimiter) return OK;
    return add_word(d->words, d->start, d->end, d->whole.first && d->start == d->whole.start);
}

/* Whether the part [.., delimiter or not) continues the open word. Joining a delimiter to the next
 * part is the mirror image of joining it to the one before: of two delimiters in a row only the
 * last goes with the part after them. */
static bool continues(const struct division *d, bool is_delimiter)
{
    switch (d->behavior) {
    case BEHAVIOR_CONTIGUOUS:
        return d->is_delimiter == is_delimiter;
    case BEHAVIOR_MERGED_WITH_PREVIOUS:
        return is_delimiter && !d->last_was_delimiter;
    case BEHAVIOR_MERGED_WITH_NEXT:
        return d->last_was_delimiter && !is_delimiter;
    default:
        return false;
    }
}

static enum err add_part(struct division *d, size_t start, size_t end, bool is_delimiter)
{
    if (d->open && continues(d, is_delimiter)) {
        d->end = end;
    } else {
        TRY(close_part(d));
        d->open = true, d->start = start, d->end = end, d->is_delimiter = is_delimiter;
    }
    d->last_was_delimiter = is_delimiter;
    return OK;
}

static struct division division_of(struct words *w, struct word whole, enum behavior behavior)
{
    return (struct division){.words = w, .behavior = behavior, .whole = whole};
}

/* Divides every word at the matches of a pattern. The regex sees only the word, as if it were the
 * whole text: lookaheads must not see the next one. */
static enum err divide_by_pattern(struct cutter *c, const struct pattern *p, enum behavior behavior,
                                  bool invert)
{
    struct words *w = c->words;
    for (size_t i = 0; i < w->n; i++) {
        struct division d = division_of(w, w->items[i], behavior);
        const char *text = buf_string(&w->text) + d.whole.start;
        size_t n = d.whole.end - d.whole.start, done = 0, from = 0, start = 0, end = 0;
        while (from <= n) {
            bool found = false;
            TRY(pattern_find(p, c->scratch, text, n, from, &start, &end, &found));
            if (!found) break;
            if (start > done)
                TRY(add_part(&d, d.whole.start + done, d.whole.start + start, invert));
            TRY(add_part(&d, d.whole.start + start, d.whole.start + end, !invert));
            done = from = end;
            if (start < end) continue;
            uint32_t code; /* an empty match: go on after the next character */
            if (end >= n) break;
            from += unicode_next(text + end, n - end, &code);
        }
        if (n > done) TRY(add_part(&d, d.whole.start + done, d.whole.end, invert));
        TRY(close_part(&d));
    }
    take_division(w);
    return OK;
}

/* Divides every word at the characters of a class. */
static enum err divide_by_class(struct cutter *c, bool (*is_delimiter)(uint32_t),
                                enum behavior behavior)
{
    struct words *w = c->words;
    for (size_t i = 0; i < w->n; i++) {
        struct division d = division_of(w, w->items[i], behavior);
        size_t at = d.whole.start, done = at;
        while (at < d.whole.end) {
            uint32_t code;
            size_t len = unicode_next(w->text.data + at, d.whole.end - at, &code);
            if (is_delimiter(code)) {
                if (at > done) TRY(add_part(&d, done, at, false));
                TRY(add_part(&d, at, at + len, true));
                done = at + len;
            }
            at += len;
        }
        if (at > done) TRY(add_part(&d, done, at, false));
        TRY(close_part(&d));
    }
    take_division(w);
    return OK;
}

/* ---- Changing ---- */

/* Rebuilds the text: each word is appended to spare by add, and keeps its place in the order. */
static enum err rebuild(struct cutter *c, enum err (*add)(struct cutter *c, const struct word *word,
                                                          const char *text, size_t n))
{
    struct words *w = c->words;
    buf_clear(&w->spare);
    for (size_t i = 0; i < w->n; i++) {
        size_t start = w->spare.n;
        struct word *word = &w->items[i];
        TRY(add(c, word, buf_string(&w->text) + word->start, word->end - word->start));
        TRY(add_word(w, start, w->spare.n, word->first));
    }
    struct buf text = w->text;
    w->text = w->spare, w->spare = text;
    take_division(w);
    return OK;
}

/* ---- The types ---- */

static enum err read_split(const json_t *object, struct pretokenizer_step *step)
{
    const char *behavior = json_string_value(json_object_get(object, "behavior"));
    TRY(pattern_read(object, "pattern", &step->pattern));
    TRY(part_bool(object, "invert", false, &step->invert));
    for (size_t i = 0; behavior && i < sizeof BEHAVIORS / sizeof *BEHAVIORS; i++) {
        if (strcmp(BEHAVIORS[i], behavior)) continue;
        step->behavior = (enum behavior)i;
        return OK;
    }
    FAIL(ERR_UNSUPPORTED, "the Split behavior '%s' is not supported", behavior ? behavior : "");
}

static enum err apply_split(struct cutter *c)
{
    return divide_by_pattern(c, &c->step->pattern, c->step->behavior, c->step->invert);
}

/* The words of GPT-2 (Radford et al. 2019), the pattern published with it. */
static const char GPT2_PATTERN[] =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

static enum err read_byte_level(const json_t *object, struct pretokenizer_step *step)
{
    TRY(part_bool(object, "add_prefix_space", true, &step->prefix_space));
    TRY(part_bool(object, "use_regex", true, &step->use_regex));
    if (!step->use_regex) return OK;
    return regex_compile(GPT2_PATTERN, sizeof GPT2_PATTERN - 1, &step->pattern.regex);
}

static enum err add_space(struct cutter *c, const struct word *word, const char *text, size_t n)
{
    (void)word;
    if (n && text[0] != ' ') TRY(buf_add_char(&c->words->spare, ' '));
    return buf_add(&c->words->spare, text, n);
}

static enum err add_mapped(struct cutter *c, const struct word *word, const char *text, size_t n)
{
    (void)word;
    return byte_level_add(&c->words->spare, text, n);
}

static enum err apply_byte_level(struct cutter *c)
{
    if (c->step->prefix_space) TRY(rebuild(c, add_space));
    if (c->step->use_regex) TRY(divide_by_pattern(c, &c->step->pattern, BEHAVIOR_ISOLATED, false));
    return rebuild(c, add_mapped);
}

static enum err read_metaspace(const json_t *object, struct pretokenizer_step *step)
{
    char *scheme = NULL;
    bool prefix = true;
    TRY(part_string(object, "replacement", "\xe2\x96\x81", &step->replacement));
    TRY(part_bool(object, "split", true, &step->split));
    TRY(part_bool(object, "add_prefix_space", true, &prefix));
    TRY(part_string(object, "prepend_scheme", prefix ? "always" : "never", &scheme));
    bool first = !strcmp(scheme, "first"), never = !strcmp(scheme, "never");
    bool known = first || never || !strcmp(scheme, "always");
    step->prepend = first ? PREPEND_FIRST : never ? PREPEND_NEVER : PREPEND_ALWAYS;
    mem_free(scheme);
    if (!known) FAIL(ERR_UNSUPPORTED, "the prepend_scheme of a Metaspace is not supported");
    step->pattern.n = strlen(step->replacement);
    step->pattern.literal = mem_strdup(step->replacement);
    if (!step->pattern.literal) FAIL(ERR_NO_MEMORY, "out of memory for a pre-tokenizer");
    return OK;
}

static enum err add_metaspaced(struct cutter *c, const struct word *word, const char *text,
                               size_t n)
{
    const struct pretokenizer_step *step = c->step;
    struct buf *out = &c->words->spare;
    size_t len = step->pattern.n;
    bool marked =
        (n && text[0] == ' ') || (n >= len && len && !memcmp(text, step->replacement, len));
    bool wanted =
        step->prepend == PREPEND_ALWAYS || (step->prepend == PREPEND_FIRST && word->first);
    if (wanted && !marked) TRY(buf_add_string(out, step->replacement));
    while (n) {
        const char *space = memchr(text, ' ', n);
        size_t k = space ? (size_t)(space - text) : n;
        TRY(buf_add(out, text, k));
        if (space) TRY(buf_add_string(out, step->replacement));
        text += k + (space ? 1 : 0), n -= k + (space ? 1 : 0);
    }
    return OK;
}

static enum err apply_metaspace(struct cutter *c)
{
    TRY(rebuild(c, add_metaspaced));
    if (!c->step->split) return OK;
    return divide_by_pattern(c, &c->step->pattern, BEHAVIOR_MERGED_WITH_NEXT, false);
}

static enum err read_digits(const json_t *object, struct pretokenizer_step *step)
{
    return part_bool(object, "individual_digits", false, &step->one_by_one);
}

static enum err apply_digits(struct cutter *c)
{
    return divide_by_class(c, unicode_is_numeric,
                           c->step->one_by_one ? BEHAVIOR_ISOLATED : BEHAVIOR_CONTIGUOUS);
}

static enum err read_punctuation(const json_t *object, struct pretokenizer_step *step)
{
    const json_t *behavior = json_object_get(object, "behavior");
    if (!behavior || json_is_null(behavior)) return OK;
    for (size_t i = 0; json_is_string(behavior) && i < sizeof BEHAVIORS / sizeof *BEHAVIORS; i++) {
        if (strcmp(BEHAVIORS[i], json_string_value(behavior))) continue;
        step->behavior = (enum behavior)i;
        return OK;
    }
    FAIL(ERR_UNSUPPORTED, "the behavior of a Punctuation is not supported");
}

static enum err apply_punctuation(struct cutter *c)
{
    return divide_by_class(c, unicode_is_punctuation, c->step->behavior);
}

static enum err apply_whitespace_split(struct cutter *c)
{
    return divide_by_class(c, unicode_is_space, BEHAVIOR_REMOVED);
}

/* Neither of a word nor a space: punctuation in the sense of the Whitespace pre-tokenizer. */
static bool is_symbol(uint32_t code)
{
    return !unicode_is_word(code) && !unicode_is_space(code);
}

static enum err apply_whitespace(struct cutter *c)
{
    TRY(apply_whitespace_split(c));
    return divide_by_class(c, is_symbol, BEHAVIOR_CONTIGUOUS);
}

static enum err apply_bert(struct cutter *c)
{
    TRY(apply_whitespace_split(c));
    return divide_by_class(c, unicode_is_punctuation, BEHAVIOR_ISOLATED);
}

static enum err read_delimiter(const json_t *object, struct pretokenizer_step *step)
{
    TRY(pattern_read(object, "delimiter", &step->pattern));
    if (!step->pattern.n) FAIL(ERR_FORMAT, "a CharDelimiterSplit has no delimiter");
    return OK;
}

static enum err apply_delimiter(struct cutter *c)
{
    return divide_by_pattern(c, &c->step->pattern, BEHAVIOR_REMOVED, false);
}

static enum err read_fixed_length(const json_t *object, struct pretokenizer_step *step)
{
    TRY(part_int(object, "length", 1 << 20, 5, &step->length));
    if (!step->length) FAIL(ERR_FORMAT, "a FixedLength has length 0");
    return OK;
}

static enum err apply_fixed_length(struct cutter *c)
{
    struct words *w = c->words;
    for (size_t i = 0; i < w->n; i++) {
        struct word whole = w->items[i];
        size_t at = whole.start, start = at;
        int64_t n_chars = 0;
        while (at < whole.end) {
            uint32_t code;
            at += unicode_next(w->text.data + at, whole.end - at, &code);
            if (++n_chars < c->step->length && at < whole.end) continue;
            TRY(add_word(w, start, at, whole.first && start == whole.start));
            start = at, n_chars = 0;
        }
    }
    take_division(w);
    return OK;
}

static const struct pretokenizer_kind KINDS[] = {
    {"Split", read_split, apply_split},
    {"ByteLevel", read_byte_level, apply_byte_level},
    {"Metaspace", read_metaspace, apply_metaspace},
    {"Digits", read_digits, apply_digits},
    {"Punctuation", read_punctuation, apply_punctuation},
    {"Whitespace", NULL, apply_whitespace},
    {"WhitespaceSplit", NULL, apply_whitespace_split},
    {"BertPreTokenizer", NULL, apply_bert},
    {"CharDelimiterSplit", read_delimiter, apply_delimiter},
    {"FixedLength", read_fixed_length, apply_fixed_length},
};

static enum err read_step(const json_t *object, const char *type, struct pretokenizer *p)
{
    for (size_t i = 0; i < sizeof KINDS / sizeof *KINDS; i++) {
        if (strcmp(KINDS[i].type, type)) continue;
        if (p->n_steps == PART_STEPS_MAX)
            FAIL(ERR_UNSUPPORTED, "more than %d pre-tokenizers", PART_STEPS_MAX);
        struct pretokenizer_step *step = &p->steps[p->n_steps++];
        step->kind = &KINDS[i];
        return KINDS[i].read ? KINDS[i].read(object, step) : OK;
    }
    FAIL(ERR_UNSUPPORTED, "the pre-tokenizer '%s' is not supported", type);
}

static enum err read_any(const json_t *object, int depth, struct pretokenizer *p)
{
    const char *type;
    TRY(part_type(object, "pre-tokenizer", &type));
    if (strcmp(type, "Sequence")) return read_step(object, type, p);
    const json_t *list = json_object_get(object, "pretokenizers");
    if (!json_is_array(list)) FAIL(ERR_FORMAT, "a Sequence has no \"pretokenizers\"");
    if (depth == PART_DEPTH_MAX) FAIL(ERR_UNSUPPORTED, "pre-tokenizers nested too deep");
    for (size_t i = 0; i < json_array_size(list); i++)
        TRY(read_any(json_array_get(list, i), depth + 1, p));
    return OK;
}

enum err pretokenizer_read(const json_t *object, struct pretokenizer *out)
{
    struct pretokenizer p = {0};
    if (!object || json_is_null(object)) {
        *out = p;
        return OK;
    }
    TRY(MEM_NEW_ARRAY(PART_STEPS_MAX, &p.steps));
    enum err e = read_any(object, 0, &p);
    if (e)
        pretokenizer_fini(&p);
    else
        *out = p;
    return e;
}

void pretokenizer_fini(struct pretokenizer *p)
{
    for (size_t i = 0; i < p->n_steps; i++) {
        pattern_fini(&p->steps[i].pattern);
        mem_free(p->steps[i].replacement);
    }
    mem_free(p->steps);
    *p = (struct pretokenizer){0};
}

void words_fini(struct words *w)
{
    buf_fini(&w->text);
    buf_fini(&w->spare);
    mem_free(w->items);
    mem_free(w->next);
    *w = (struct words){0};
}

enum err pretokenizer_apply(const struct pretokenizer *p, struct regex_scratch *s, struct words *w,
                            bool first)
{
    w->n_next = 0;
    TRY(add_word(w, 0, w->text.n, first));
    take_division(w);
    for (size_t i = 0; i < p->n_steps; i++) {
        struct cutter c = {&p->steps[i], s, w};
        TRY(p->steps[i].kind->apply(&c));
    }
    return OK;
}
