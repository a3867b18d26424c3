/* The decoders of a tokenizer file: one row of the table for each type. */
#include "coordinator/text/decoder.h"
#include "base/mem.h"
#include "base/utf8.h"
#include "coordinator/text/byte_level.h"
#include "coordinator/text/unicode.h"

#include <string.h>

static const char REPLACEMENT[] = "\xef\xbf\xbd"; /* U+FFFD */

struct decoder_step {
    const struct decoder_kind *kind;
    struct pattern pattern; /* Replace */
    char *text;             /* what Replace writes, the mark or suffix of others */
    int64_t start, stop;    /* Strip, characters */
    bool drops_first, cleanup;
    bool after_join; /* an earlier step has made one text of all pieces */
};

/* Where a step is: what it works on and to whom it hands on. */
struct place {
    const struct decoder *d;
    struct decoder_state *states;
    struct buf *out;
    size_t i;
};

struct decoder_kind {
    const char *type;
    enum err (*read)(const json_t *object, struct decoder_step *step); /* NULL: no fields */
    /* One whole piece, or after a join a part of the text when streams. */
    enum err (*next)(struct place p, const char *piece, size_t n);
    enum err (*flush)(struct place p); /* NULL: holds nothing */
    /* The piece's bytes in the middle of a text; NULL: unchanged. */
    enum err (*bytes)(struct place p, const char *piece, size_t n, struct buf *out);
    bool joins;   /* hands on one text, in parts */
    bool streams; /* can take a text in parts */
};

static const struct decoder_step *step_of(struct place p)
{
    return &p.d->steps[p.i];
}
static struct decoder_state *state_of(struct place p)
{
    return &p.states[p.i];
}

/* Hands a piece to the step p.i, or to the output behind the last one. */
static enum err hand(struct place p, const char *piece, size_t n)
{
    if (p.i == p.d->n_steps) return buf_add(p.out, piece, n);
    const struct decoder_step *step = step_of(p);
    struct decoder_state *state = state_of(p);
    if (step->after_join && !step->kind->streams) return buf_add(&state->held, piece, n);
    TRY(step->kind->next(p, piece, n));
    state->n_pieces++;
    return OK;
}

static enum err hand_on(struct place p, const char *piece, size_t n)
{
    p.i++;
    return hand(p, piece, n);
}

/* ---- Replace ---- */

static enum err read_replace(const json_t *object, struct decoder_step *step)
{
    TRY(pattern_read(object, "pattern", &step->pattern));
    return part_string(object, "content", "", &step->text);
}

static enum err bytes_replace(struct place p, const char *piece, size_t n, struct buf *out)
{
    const struct decoder_step *step = step_of(p);
    return pattern_replace(&step->pattern, p.states[0].scratch, step->text, piece, n, out);
}

static enum err next_replace(struct place p, const char *piece, size_t n)
{
    struct buf *work = &state_of(p)->work;
    buf_clear(work);
    TRY(bytes_replace(p, piece, n, work));
    return hand_on(p, buf_string(work), work->n);
}

/* ---- ByteFallback: "<0x0A>" is a byte; a run of them is a text or as many U+FFFD ---- */

static int hex_value(char c)
{
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                  : -1;
}

static int byte_of(const char *piece, size_t n)
{
    if (n != 6 || memcmp(piece, "<0x", 3) || piece[5] != '>') return -1;
    int high = hex_value(piece[3]), low = hex_value(piece[4]);
    return high < 0 || low < 0 ? -1 : high * 16 + low;
}

static enum err flush_byte_fallback(struct place p)
{
    struct buf *held = &state_of(p)->held;
    size_t n = held->n;
    if (!n) return OK;
    bool valid = utf8_valid_prefix(held->data, n) == n;
    if (valid) TRY(hand_on(p, held->data, n));
    for (size_t i = 0; !valid && i < n; i++)
        TRY(hand_on(p, REPLACEMENT, 3));
    buf_clear(held);
    return OK;
}

static enum err next_byte_fallback(struct place p, const char *piece, size_t n)
{
    int byte = byte_of(piece, n);
    if (byte >= 0) return buf_add_char(&state_of(p)->held, (char)byte);
    TRY(flush_byte_fallback(p));
    return hand_on(p, piece, n);
}

static enum err bytes_byte_fallback(struct place p, const char *piece, size_t n, struct buf *out)
{
    (void)p;
    int byte = byte_of(piece, n);
    return byte >= 0 ? buf_add_char(out, (char)byte) : buf_add(out, piece, n);
}

/* ---- ByteLevel: pieces are bytes; what is no whole character yet waits ---- */

static enum err hand_on_valid(struct place p, bool at_end)
{
    struct buf *held = &state_of(p)->held;
    size_t done = 0;
    while (done < held->n) {
        const char *s = held->data + done;
        size_t n = held->n - done, whole = utf8_valid_prefix(s, n);
        if (whole) TRY(hand_on(p, s, whole));
        done += whole, s += whole, n -= whole;
        if (!n) break;
        if (!at_end && n < 4 && utf8_is_partial(s, n)) break;
        TRY(hand_on(p, REPLACEMENT, 3));
        done += unicode_broken_length(s, n);
    }
    if (held->n) memmove(held->data, held->data + done, held->n - done);
    held->n -= done;
    return OK;
}

static enum err next_byte_level(struct place p, const char *piece, size_t n)
{
    TRY(byte_level_add_bytes(&state_of(p)->held, piece, n));
    return hand_on_valid(p, false);
}

static enum err flush_byte_level(struct place p)
{
    return hand_on_valid(p, true);
}

static enum err bytes_byte_level(struct place p, const char *piece, size_t n, struct buf *out)
{
    (void)p;
    return byte_level_add_bytes(out, piece, n);
}

/* ---- Fuse ---- */

static enum err next_fuse(struct place p, const char *piece, size_t n)
{
    return hand_on(p, piece, n);
}

/* ---- Strip: up to `start` times the character at the beginning, up to `stop` at the end ---- */

static enum err read_strip(const json_t *object, struct decoder_step *step)
{
    uint32_t code;
    TRY(part_string(object, "content", " ", &step->text));
    size_t n = strlen(step->text);
    if (!n || utf8_decode(step->text, n, &code) != n)
        FAIL(ERR_FORMAT, "the content of a Strip must be one character");
    TRY(part_int(object, "start", 1 << 20, 0, &step->start));
    return part_int(object, "stop", 1 << 20, 0, &step->stop);
}

static bool at_text(const char *s, size_t n, const char *text, size_t len)
{
    return n >= len && !memcmp(s, text, len);
}

/* Of a text in parts: counts down at the beginning, keeps the last `stop` characters back while
 * they are all the character. */
static enum err strip_part(struct place p, const char *s, size_t n)
{
    const struct decoder_step *step = step_of(p);
    struct decoder_state *state = state_of(p);
    size_t len = strlen(step->text);
    for (; state->n_left && n; state->n_left--) {
        if (at_text(s, n, step->text, len))
            s += len, n -= len;
        else
            state->n_left = 1;
    }
    if (!n) return OK;
    TRY(buf_add(&state->held, s, n));
    size_t keep = 0;
    int64_t kept = 0;
    while (kept < step->stop && keep + len <= state->held.n &&
           !memcmp(state->held.data + state->held.n - keep - len, step->text, len))
        keep += len, kept++;
    size_t go = state->held.n - keep;
    if (!go) return OK;
    TRY(hand_on(p, state->held.data, go));
    memmove(state->held.data, state->held.data + go, keep);
    state->held.n = keep;
    return OK;
}

static enum err strip_piece(struct place p, const char *s, size_t n)
{
    const struct decoder_step *step = step_of(p);
    size_t len = strlen(step->text);
    for (int64_t i = 0; i < step->start && at_text(s, n, step->text, len); i++)
        s += len, n -= len;
    for (int64_t i = 0; i < step->stop && n >= len && at_text(s + n - len, len, step->text, len);
         i++)
        n -= len;
    return hand_on(p, s, n);
}

static enum err next_strip(struct place p, const char *piece, size_t n)
{
    if (!step_of(p)->after_join) return strip_piece(p, piece, n);
    if (!state_of(p)->n_pieces) state_of(p)->n_left = step_of(p)->start;
    return strip_part(p, piece, n);
}

/* ---- Metaspace ---- */

static enum err read_metaspace(const json_t *object, struct decoder_step *step)
{
    bool prefix = true;
    char *scheme = NULL;
    TRY(part_string(object, "replacement", "\xe2\x96\x81", &step->text));
    TRY(part_bool(object, "add_prefix_space", true, &prefix));
    TRY(part_string(object, "prepend_scheme", prefix ? "always" : "never", &scheme));
    step->drops_first = strcmp(scheme, "never") != 0;
    mem_free(scheme);
    return *step->text ? OK : err_set(ERR_FORMAT, "a Metaspace has an empty replacement");
}

/* In the first piece the mark says that a space was put there: it is dropped. */
static enum err add_unmarked(const struct decoder_step *step, bool first, const char *s, size_t n,
                             struct buf *out)
{
    size_t len = strlen(step->text);
    for (const char *at; n && (at = memmem(s, n, step->text, len));) {
        TRY(buf_add(out, s, (size_t)(at - s)));
        if (!first || !step->drops_first) TRY(buf_add_char(out, ' '));
        n -= (size_t)(at - s) + len;
        s = at + len;
    }
    return buf_add(out, s, n);
}

static enum err next_metaspace(struct place p, const char *piece, size_t n)
{
    struct buf *work = &state_of(p)->work;
    buf_clear(work);
    TRY(add_unmarked(step_of(p), !state_of(p)->n_pieces, piece, n, work));
    return hand_on(p, buf_string(work), work->n);
}

static enum err bytes_metaspace(struct place p, const char *piece, size_t n, struct buf *out)
{
    return add_unmarked(step_of(p), false, piece, n, out);
}

/* ---- WordPiece ---- */

static enum err read_wordpiece(const json_t *object, struct decoder_step *step)
{
    TRY(part_bool(object, "cleanup", true, &step->cleanup));
    return part_string(object, "prefix", "##", &step->text);
}

/* English spacing as BERT's decoder restores it, in this order. */
static enum err clean(struct buf *text, struct buf *spare)
{
    static const char *const rules[][2] = {
        {" .", "."},   {" ?", "?"},     {" !", "!"},     {" ,", ","},
        {" ' ", "'"},  {" n't", "n't"}, {" 'm", "'m"},   {" do not", " don't"},
        {" 's", "'s"}, {" 've", "'ve"}, {" 're", "'re"},
    };
    for (size_t i = 0; i < sizeof rules / sizeof *rules; i++) {
        char literal[16];
        snprintf(literal, sizeof literal, "%s", rules[i][0]);
        struct pattern pattern = {.literal = literal, .n = strlen(literal)};
        buf_clear(spare);
        TRY(pattern_replace(&pattern, NULL, rules[i][1], buf_string(text), text->n, spare));
        struct buf swap = *text;
        *text = *spare, *spare = swap;
    }
    return OK;
}

static enum err add_wordpiece(struct place p, bool first, const char *s, size_t n, struct buf *out)
{
    const struct decoder_step *step = step_of(p);
    struct buf word, spare;
    size_t prefix = strlen(step->text);
    buf_init(&word, 0);
    buf_init(&spare, 0);
    bool continues = !first && at_text(s, n, step->text, prefix);
    if (!first && !continues) buf_add_char(&word, ' ');
    enum err e = continues ? buf_add(&word, s + prefix, n - prefix) : buf_add(&word, s, n);
    if (!e && step->cleanup) e = clean(&word, &spare);
    if (!e) e = buf_add(out, buf_string(&word), word.n);
    buf_fini(&word);
    buf_fini(&spare);
    return e;
}

static enum err next_wordpiece(struct place p, const char *piece, size_t n)
{
    struct buf *work = &state_of(p)->work;
    buf_clear(work);
    TRY(add_wordpiece(p, !state_of(p)->n_pieces, piece, n, work));
    return hand_on(p, buf_string(work), work->n);
}

static enum err bytes_wordpiece(struct place p, const char *piece, size_t n, struct buf *out)
{
    return add_wordpiece(p, false, piece, n, out);
}

/* ---- BPEDecoder: a suffix ends words; of the last piece it vanishes, else it is a space ---- */

static enum err read_bpe(const json_t *object, struct decoder_step *step)
{
    TRY(part_string(object, "suffix", "</w>", &step->text));
    step->pattern.n = strlen(step->text);
    step->pattern.literal = mem_strdup(step->text);
    return step->pattern.literal ? OK : err_set(ERR_NO_MEMORY, "out of memory for a decoder");
}

static enum err hand_on_held(struct place p, const char *replacement)
{
    struct decoder_state *state = state_of(p);
    buf_clear(&state->work);
    TRY(pattern_replace(&step_of(p)->pattern, NULL, replacement, buf_string(&state->held),
                        state->held.n, &state->work));
    buf_clear(&state->held);
    return hand_on(p, buf_string(&state->work), state->work.n);
}

static enum err next_bpe(struct place p, const char *piece, size_t n)
{
    if (state_of(p)->n_pieces) TRY(hand_on_held(p, " "));
    return buf_add(&state_of(p)->held, piece, n);
}

static enum err flush_bpe(struct place p)
{
    return state_of(p)->n_pieces ? hand_on_held(p, "") : OK;
}

static enum err bytes_bpe(struct place p, const char *piece, size_t n, struct buf *out)
{
    return pattern_replace(&step_of(p)->pattern, NULL, " ", piece, n, out);
}

/* ---- The table ---- */

static const struct decoder_kind KINDS[] = {
    {"Replace", read_replace, next_replace, NULL, bytes_replace, false, false},
    {"ByteFallback", NULL, next_byte_fallback, flush_byte_fallback, bytes_byte_fallback, false,
     false},
    {"ByteLevel", NULL, next_byte_level, flush_byte_level, bytes_byte_level, true, false},
    {"Fuse", NULL, next_fuse, NULL, NULL, true, true},
    {"Strip", read_strip, next_strip, NULL, NULL, false, true},
    {"Metaspace", read_metaspace, next_metaspace, NULL, bytes_metaspace, false, false},
    {"WordPiece", read_wordpiece, next_wordpiece, NULL, bytes_wordpiece, false, false},
    {"BPEDecoder", read_bpe, next_bpe, flush_bpe, bytes_bpe, false, false},
};

static enum err read_step(const json_t *object, const char *type, bool *joined, struct decoder *d)
{
    for (size_t i = 0; i < sizeof KINDS / sizeof *KINDS; i++) {
        if (strcmp(KINDS[i].type, type)) continue;
        if (d->n_steps == PART_STEPS_MAX)
            FAIL(ERR_UNSUPPORTED, "more than %d decoders", PART_STEPS_MAX);
        struct decoder_step *step = &d->steps[d->n_steps++];
        step->kind = &KINDS[i];
        step->after_join = *joined;
        if (KINDS[i].joins) *joined = true;
        if (KINDS[i].read) TRY(KINDS[i].read(object, step));
        if (step->pattern.regex) d->has_regex = true;
        return OK;
    }
    FAIL(ERR_UNSUPPORTED, "the decoder '%s' is not supported", type);
}

static enum err read_any(const json_t *object, int depth, bool *joined, struct decoder *d)
{
    const char *type;
    TRY(part_type(object, "decoder", &type));
    if (strcmp(type, "Sequence")) return read_step(object, type, joined, d);
    const json_t *list = json_object_get(object, "decoders");
    if (!json_is_array(list)) FAIL(ERR_FORMAT, "a Sequence has no \"decoders\"");
    if (depth == PART_DEPTH_MAX) FAIL(ERR_UNSUPPORTED, "decoders nested too deep");
    for (size_t i = 0; i < json_array_size(list); i++)
        TRY(read_any(json_array_get(list, i), depth + 1, joined, d));
    return OK;
}

enum err decoder_read(const json_t *object, struct decoder *out)
{
    struct decoder d = {0};
    bool joined = false;
    TRY(MEM_NEW_ARRAY(PART_STEPS_MAX, &d.steps));
    enum err e = OK;
    if (object && !json_is_null(object))
        e = read_any(object, 0, &joined, &d);
    else
        d.joins_with_spaces = true;
    if (e)
        text_decoder_fini(&d);
    else
        *out = d;
    return e;
}

void text_decoder_fini(struct decoder *d)
{
    if (!d->steps) return;
    for (size_t i = 0; i < d->n_steps; i++) {
        pattern_fini(&d->steps[i].pattern);
        mem_free(d->steps[i].text);
    }
    mem_free(d->steps);
    *d = (struct decoder){0};
}

/* ---- Running ---- */

enum err decoder_states_create(const struct decoder *d, struct decoder_state **out)
{
    struct decoder_state *states;
    TRY(MEM_NEW_ARRAY(d->n_steps + 1, &states));
    enum err e = d->has_regex ? regex_scratch_create(&states[0].scratch) : OK;
    if (e)
        mem_free(states);
    else
        *out = states;
    return e;
}

void decoder_states_destroy(const struct decoder *d, struct decoder_state *states)
{
    if (!states) return;
    for (size_t i = 0; i < d->n_steps; i++) {
        buf_fini(&states[i].held);
        buf_fini(&states[i].work);
    }
    regex_scratch_destroy(states[0].scratch);
    mem_free(states);
}

enum err decoder_next(const struct decoder *d, struct decoder_state *states, const char *piece,
                      size_t n, struct buf *out)
{
    if (d->joins_with_spaces) {
        if (states[0].n_pieces++) TRY(buf_add_char(out, ' '));
        return buf_add(out, piece, n);
    }
    return hand((struct place){d, states, out, 0}, piece, n);
}

enum err decoder_flush(const struct decoder *d, struct decoder_state *states, struct buf *out)
{
    enum err e = OK;
    for (size_t i = 0; i < d->n_steps && !e; i++) {
        const struct decoder_step *step = &d->steps[i];
        struct place p = {d, states, out, i};
        if (step->after_join && !step->kind->streams) { /* the whole text is one piece */
            struct buf whole = states[i].held;
            states[i].held = (struct buf){0};
            e = step->kind->next(p, buf_string(&whole), whole.n);
            states[i].n_pieces++;
            buf_fini(&whole);
        }
        if (!e && step->kind->flush) e = step->kind->flush(p);
    }
    for (size_t i = 0; i <= d->n_steps; i++) {
        buf_clear(&states[i].held);
        states[i].n_pieces = 0;
    }
    return e;
}

enum err decoder_piece_bytes(const struct decoder *d, struct decoder_state *states,
                             const char *piece, size_t n, struct buf *out)
{
    struct buf in, next;
    buf_init(&in, 0);
    buf_init(&next, 0);
    enum err e = buf_add(&in, piece, n);
    for (size_t i = 0; i < d->n_steps && !e; i++) {
        const struct decoder_step *step = &d->steps[i];
        if (!step->kind->bytes || step->after_join) continue;
        buf_clear(&next);
        e = step->kind->bytes((struct place){d, states, NULL, i}, buf_string(&in), in.n, &next);
        struct buf swap = in;
        in = next, next = swap;
    }
    if (!e) e = buf_add(out, buf_string(&in), in.n);
    buf_fini(&in);
    buf_fini(&next);
    return e;
}
