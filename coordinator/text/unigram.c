/* Unigram: the division of a word whose pieces have the greatest sum of log-probabilities, found by
 * dynamic programming over byte offsets (Kudo 2018, section 3.2; Viterbi 1967).
 *
 * Pieces are found by hashing each prefix up to the longest piece's length. */
#include "base/mem.h"
#include "coordinator/text/model.h"
#include "coordinator/text/part.h"
#include "coordinator/text/unicode.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* How far below the worst piece an unknown character scores (SentencePiece's kUnkPenalty). */
#define UNK_PENALTY 10.0

enum { UNIGRAM_PIECE_BYTES_MAX = 512 };

/* A score as the files' usual reader has it: the digits as one integer, rounded, over a power of
 * ten, rounded again. That is now and then the neighbour of the nearest double, and where two
 * divisions of a word differ only in the order of their pieces, this last bit decides between them.
 */
static double score_from_digits(double exact)
{
    char text[40], digits[24], power[16];
    int precision = 14;
    do
        snprintf(text, sizeof text, "%.*e", precision, fabs(exact));
    while (strtod(text, NULL) != fabs(exact) && ++precision < 17);
    const char *mark = strchr(text, 'e');
    if (!mark || strlen(text) < 17) return exact;
    snprintf(digits, sizeof digits, "%c%.*s", text[0], (int)(mark - text - 2), text + 2);
    long exponent = strtol(mark + 1, NULL, 10) - precision;
    if (exponent > 300 || exponent < -300) return exact;
    snprintf(power, sizeof power, "1e%ld", labs(exponent));
    double f = (double)strtoull(digits, NULL, 10), scale = strtod(power, NULL);
    f = exponent < 0 ? f / scale : f * scale;
    return exact < 0 ? -f : f;
}

static enum err read_piece(const json_t *item, size_t id, struct model *m)
{
    const json_t *text = json_array_get(item, 0), *score = json_array_get(item, 1);
    if (!json_is_string(text) || !json_is_number(score))
        FAIL(ERR_FORMAT, "piece %zu of the vocabulary is not [text, score]", id);
    if (json_string_length(text) > UNIGRAM_PIECE_BYTES_MAX)
        FAIL(ERR_UNSUPPORTED, "Unigram pieces longer than %d bytes are not supported",
             UNIGRAM_PIECE_BYTES_MAX);
    TRY(vocab_add(&m->vocab, json_string_value(text), json_string_length(text), (int64_t)id));
    m->scores[id] = score_from_digits(json_number_value(score));
    if (!isfinite(m->scores[id])) FAIL(ERR_FORMAT, "the score of piece %zu is not finite", id);
    return OK;
}

enum err unigram_read(const json_t *object, struct model *m)
{
    const json_t *list = json_object_get(object, "vocab");
    size_t n = json_array_size(list);
    if (!json_is_array(list) || !n) FAIL(ERR_FORMAT, "the Unigram model has no list \"vocab\"");
    if (n > VOCAB_IDS_MAX) FAIL(ERR_FORMAT, "more than %d pieces", VOCAB_IDS_MAX);
    TRY(MEM_NEW_ARRAY(n, &m->scores));
    double min = INFINITY;
    for (size_t id = 0; id < n; id++) {
        TRY(read_piece(json_array_get(list, id), id, m));
        if (m->scores[id] < min) min = m->scores[id];
    }
    m->unk_score = min - UNK_PENALTY;
    int64_t unk = -1;
    const json_t *value = json_object_get(object, "unk_id");
    if (value && !json_is_null(value)) TRY(part_int(object, "unk_id", (int64_t)n - 1, 0, &unk));
    m->unk_id = (int32_t)unk;
    m->fuse_unk = true;
    model_find_bytes(m);
    return part_bool(object, "byte_fallback", false, &m->byte_fallback);
}

static void offer(struct path *to, double score, int32_t id, size_t start)
{
    if (to->start >= 0 && score <= to->score) return;
    *to = (struct path){score, id, (int32_t)start, 0};
}

/* Fills paths[0..n]: the best way to each byte offset that ends a character. */
static void find_paths(const struct model *m, const char *word, size_t n, struct path *paths)
{
    for (size_t i = 0; i <= n; i++)
        paths[i] = (struct path){0, -1, -1, 0};
    size_t longest = m->vocab.piece_bytes_max;
    for (size_t at = 0, len; at < n; at += len) {
        uint32_t code;
        double here = paths[at].score;
        bool single = false;
        len = unicode_next(word + at, n - at, &code);
        for (size_t k = 1; k <= longest && at + k <= n; k++) {
            if (at + k < n && ((unsigned char)word[at + k] & 0xc0) == 0x80) continue;
            int32_t id = vocab_find(&m->vocab, word + at, k);
            if (id < 0) continue;
            offer(&paths[at + k], here + m->scores[id], id, at);
            if (k == len) single = true;
        }
        if (!single) offer(&paths[at + len], here + m->unk_score, m->unk_id, at);
    }
}

static enum err add_unknown(const struct model *m, const char *text, size_t n,
                            struct token_list *out)
{
    int32_t id = vocab_find(&m->vocab, text, n); /* a run of unknown characters may be a piece */
    if (id >= 0) return token_list_add(out, id);
    bool bytes = m->byte_fallback;
    for (size_t i = 0; bytes && i < n; i++)
        bytes = m->byte_ids[(unsigned char)text[i]] >= 0;
    for (size_t i = 0; bytes && i < n; i++)
        TRY(token_list_add(out, m->byte_ids[(unsigned char)text[i]]));
    if (bytes) return OK;
    if (m->unk_id < 0) FAIL(ERR_INVALID, "a character is unknown and the model has no unk_id");
    return token_list_add(out, m->unk_id);
}

enum err unigram_encode(const struct model *m, struct model_scratch *s, const char *word, size_t n,
                        struct token_list *out)
{
    if (n >= INT32_MAX) FAIL(ERR_TOO_LONG, "a word of more than 2^31 bytes");
    if (n + 1 > s->paths_capacity) {
        TRY(mem_resize((void **)&s->paths, (n + 1) * sizeof *s->paths));
        s->paths_capacity = n + 1;
    }
    struct path *paths = s->paths;
    find_paths(m, word, n, paths);
    /* Turn the way back into a way forth: each start learns its end. */
    int32_t end = (int32_t)n, next = (int32_t)n;
    for (int32_t at = end; at > 0;) {
        int32_t start = paths[at].start;
        paths[start].end = at;
        at = start;
    }
    for (int32_t at = 0; at < end; at = next) {
        next = paths[at].end;
        if (paths[next].id != m->unk_id) {
            TRY(token_list_add(out, paths[next].id));
            continue;
        }
        while (next < end && paths[paths[next].end].id == m->unk_id)
            next = paths[next].end;
        TRY(add_unknown(m, word + at, (size_t)(next - at), out));
    }
    return OK;
}
