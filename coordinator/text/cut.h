/* The two big values of a tokenizer.json, the model's vocabulary and its merges, gone over in the
 * file's own text: a tree of them would be a million objects, made to be read once and freed.
 *
 * Only what is plainly right is taken: where anything is unusual these functions say ERR_FORMAT,
 * and the caller parses the whole document, which then words the error or finds there is none. It
 * must never accept what base/json.h refuses. */
#pragma once
#include "base/buf.h"

struct big_value {
    struct span text; /* from its bracket to the closing one; data NULL: not cut out */
    size_t n_strings; /* in it, keys included: what to make room for */
};

struct big_values {
    struct big_value vocab;  /* "model"."vocab", an object */
    struct big_value merges; /* "model"."merges", a list */
};

/* Finds them in text[n] and appends the document without them, "{}" and "[]" in their places, to
 * out_rest, which base/json.h has still to judge: that it finds rest valid proves that the values
 * stood where values may stand. ERR_FORMAT: there is no object "vocab" where it is looked for. */
enum err big_values_cut(const char *text, size_t n, struct big_values *out, struct buf *out_rest);

/* Goes over such a value. Strings without escapes lie in the text itself, others in work. */
struct cut_reader {
    const char *at, *end;
    char *work; /* [end - at at the start], owned; strings use as much of it as of the text */
    size_t n_work;
};

enum err cut_reader_init(struct cut_reader *r, struct span text);
void cut_reader_fini(struct cut_reader *r); /* accepts zeroed memory */
/* Strings read before may be forgotten: work is used from its beginning again. */
static inline void cut_reader_forget(struct cut_reader *r)
{
    r->n_work = 0;
}
/* Blanks, then c: taken when it is there. */
bool cut_take(struct cut_reader *r, char c);
enum err cut_expect(struct cut_reader *r, char c);
/* A string without U+0000, valid until cut_reader_forget; not NUL-terminated. */
enum err cut_string(struct cut_reader *r, struct span *out);
/* An integer of up to nine digits without a sign. */
enum err cut_number(struct cut_reader *r, int32_t *out);
/* Nothing may follow. */
enum err cut_end(const struct cut_reader *r);
