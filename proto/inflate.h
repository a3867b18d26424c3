/* Bounded decompression of messages: the bound holds while inflating, so that a few bytes cannot
 * become all of the memory. */
#pragma once
#include "base/buf.h"

/* Inflates gzip or zlib bytes into out, whose limit is the bound (ERR_TOO_BIG). ERR_FORMAT when the
 * bytes are not one whole stream. */
enum err inflate_bounded(struct span in, struct buf *out);
