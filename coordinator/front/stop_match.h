/* Stop strings in a stream of text: found exactly, whatever the borders of its pieces.
 *
 * Text goes in as it is decoded; what comes out can no longer be part of a stop string. Held back
 * is the shortest tail that could still become one, so a client never sees the beginning of a stop
 * string and never waits for more than its length. Of two matches the one that ends first wins; of
 * those that end together, the one that begins first.
 *
 * It must never know tokens. */
#pragma once
#include "base/buf.h"

enum { STOP_STRINGS_MAX = 16, STOP_BYTES_MAX = 1024 };

struct stop_match {
    const struct span *stops; /* [n_stops], each 1 .. STOP_BYTES_MAX bytes; owned by the caller */
    unsigned n_stops;
    bool keep;       /* the stop string itself stays in the text */
    struct buf held; /* bytes taken, not yet given */
};

void stop_match_init(struct stop_match *m, const struct span *stops, unsigned n_stops, bool keep);
void stop_match_fini(struct stop_match *m);
/* Takes text[n]; appends to out what is free to go. Returns through out_found the index of the stop
 * string that ended the text, or -1; after a match nothing more may be fed. */
enum err stop_match_feed(struct stop_match *m, const char *text, size_t n, struct buf *out,
                         int *out_found);
/* The text has ended without a match: appends what was held back. */
enum err stop_match_flush(struct stop_match *m, struct buf *out);
