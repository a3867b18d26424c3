/* The decoders of a tokenizer file: pieces back to text, one piece at a time.
 *
 * Each step takes pieces (or, after a step that joins them all, parts of the one text) and hands
 * pieces on; it holds back only what later pieces may still change. Immutable once read; what
 * changes is one struct decoder_state a step. It must never know ids. */
#pragma once
#include "coordinator/text/part.h"

struct decoder_step;
struct decoder {
    struct decoder_step *steps; /* [n_steps], owned */
    size_t n_steps;
    bool joins_with_spaces; /* the file has no decoder at all */
    bool has_regex;
};

struct decoder_state {
    size_t n_pieces; /* received by this step */
    int64_t n_left;  /* Strip: characters still to be dropped at the beginning */
    struct buf held, work;
    struct regex_scratch *scratch; /* first state only, where a step has a regex */
};

/* object is the file's "decoder", null for none. */
enum err decoder_read(const json_t *object, struct decoder *out);
void text_decoder_fini(struct decoder *d); /* accepts zeroed memory */

/* The states of one decoding: [decoder_n_states]. */
enum err decoder_states_create(const struct decoder *d, struct decoder_state **out);
void decoder_states_destroy(const struct decoder *d, struct decoder_state *states);

enum err decoder_next(const struct decoder *d, struct decoder_state *states, const char *piece,
                      size_t n, struct buf *out);
enum err decoder_flush(const struct decoder *d, struct decoder_state *states, struct buf *out);

/* Appends the bytes that a piece stands for in the middle of a text. */
enum err decoder_piece_bytes(const struct decoder *d, struct decoder_state *states,
                             const char *piece, size_t n, struct buf *out);
