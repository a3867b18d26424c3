/* Bounded decompression by zlib, piece by piece. */
#include "proto/inflate.h"

#include <limits.h>
#include <zlib.h>

enum { PIECE_BYTES = 16384, EITHER_FORMAT = 15 + 32 };

enum err inflate_bounded(struct span in, struct buf *out)
{
    unsigned char piece[PIECE_BYTES];
    z_stream z = {.next_in = (unsigned char *)(uintptr_t)in.data, .avail_in = (unsigned)in.n};
    enum err e = OK;
    int status = Z_OK;
    if (in.n > UINT_MAX) FAIL(ERR_TOO_BIG, "a compressed message of %zu bytes", in.n);
    if (inflateInit2(&z, EITHER_FORMAT) != Z_OK) FAIL(ERR_NO_MEMORY, "no memory to decompress");
    while (!e && status == Z_OK) {
        z.next_out = piece;
        z.avail_out = sizeof piece;
        status = inflate(&z, Z_NO_FLUSH);
        e = buf_add(out, piece, sizeof piece - z.avail_out);
    }
    inflateEnd(&z);
    if (!e && (status != Z_STREAM_END || z.avail_in))
        FAIL(ERR_FORMAT, "a compressed message is cut short or broken");
    return e;
}
