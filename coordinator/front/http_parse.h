/* HTTP/1.1 requests as bytes: the head, and the framing of a chunked body.
 *
 * Pure functions over memory, without sockets, so that they can be fuzzed. They are strict where
 * leniency lets two programs read one stream differently (folded lines, two lengths, a length
 * beside chunks, spaces before a colon), and refuse instead of guessing.
 *
 * It must never know routes, JSON or sockets. */
#pragma once
#include "base/buf.h"
#include "base/err.h"

#include <stdbool.h>
#include <stdint.h>

enum { HTTP_HEADERS_MAX = 128, HTTP_CHUNK_LINE_BYTES_MAX = 1024 };

enum http_method {
    HTTP_METHOD_GET = 1,
    HTTP_METHOD_HEAD = 2,
    HTTP_METHOD_POST = 4,
    HTTP_METHOD_OPTIONS = 8,
    HTTP_METHOD_OTHER = 16, /* a token that no route takes */
};

struct http_header {
    struct span name, value; /* value without spaces around */
};

struct http_head {
    enum http_method method;
    struct span path;  /* as sent, without the query; begins with '/' ("*" for OPTIONS *) */
    struct span query; /* after '?', may be empty */
    int minor;         /* HTTP/1.minor: 0 or 1 */
    bool keep_alive, chunked, expect_continue;
    int64_t content_length; /* -1 = not said */
    unsigned n_headers;
    struct http_header headers[HTTP_HEADERS_MAX]; /* [n_headers] */
};

/* Bytes of the head at the start of data[n], its empty line included; 0 = not complete yet. */
size_t http_head_length(const char *data, size_t n);
/* Parses a complete head. Its spans point into data. ERR_INVALID says what is wrong;
 * ERR_UNSUPPORTED: a version or transfer coding that is not served. */
enum err http_head_parse(const char *data, size_t n, struct http_head *out);
/* The value of the first header of that name (any case), or an empty span with data NULL. */
struct span http_head_find(const struct http_head *head, const char *name);
/* Whether a comma-separated list holds the token (any case). */
bool http_list_has(struct span list, const char *token);
/* Undoes %XX in place of a path. ERR_INVALID: a bad escape or a NUL. */
enum err http_percent_decode(struct span in, struct buf *out);

enum http_chunk_state {
    HTTP_CHUNK_SIZE,
    HTTP_CHUNK_DATA,
    HTTP_CHUNK_DATA_END,
    HTTP_CHUNK_TRAILER,
    HTTP_CHUNK_DONE,
};

/* Zeroed memory is the beginning of a chunked body. */
struct http_chunks {
    enum http_chunk_state state;
    uint64_t left;        /* bytes of this chunk still to come */
    size_t line, trailer; /* bytes of the unfinished line, of all trailer lines */
    char size[24];        /* the hexadecimal digits so far */
    bool in_extension, after_cr;
};

/* Reads from data[n], appends body bytes to out, and tells how many bytes it took: all of them, or
 * up to the body's end (state HTTP_CHUNK_DONE). ERR_INVALID: bad framing; ERR_TOO_BIG: more than
 * body_bytes_max. */
enum err http_chunks_read(struct http_chunks *c, const char *data, size_t n, size_t body_bytes_max,
                          struct buf *out, size_t *out_taken);
