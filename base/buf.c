/* Growing byte string. Knows nothing of encodings. */
#include "base/buf.h"
#include "base/mem.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

void buf_init(struct buf *b, size_t limit) { *b = (struct buf){.limit = limit}; }

void buf_fini(struct buf *b)
{
    mem_free(b->data);
    *b = (struct buf){.limit = b->limit};
}

void buf_clear(struct buf *b)
{
    b->n = 0;
    b->failed = OK;
    if (b->data) b->data[0] = 0;
}

enum err buf_reserve(struct buf *b, size_t more)
{
    size_t want, bytes;
    if (b->failed) return b->failed;
    if (!size_add(b->n, more, &want) || !size_add(want, 1, &bytes) || (b->limit && want > b->limit))
        return b->failed = err_set(ERR_TOO_BIG, "text longer than the limit of %zu bytes", b->limit);
    if (bytes <= b->capacity) return OK;
    size_t capacity = b->capacity ? b->capacity : 64;
    while (capacity < bytes) capacity = capacity > SIZE_MAX / 2 ? bytes : capacity * 2;
    enum err e = mem_resize((void **)&b->data, capacity);
    if (e) return b->failed = e;
    b->capacity = capacity;
    b->data[b->n] = 0;
    return OK;
}

enum err buf_add(struct buf *b, const void *data, size_t n)
{
    TRY(buf_reserve(b, n));
    if (n) memcpy(b->data + b->n, data, n);
    b->n += n;
    b->data[b->n] = 0;
    return OK;
}

enum err buf_add_string(struct buf *b, const char *s) { return buf_add(b, s, strlen(s)); }
enum err buf_add_char(struct buf *b, char c) { return buf_add(b, &c, 1); }

enum err buf_printf(struct buf *b, const char *format, ...)
{
    va_list args, again;
    va_start(args, format);
    va_copy(again, args);
    int n = vsnprintf(NULL, 0, format, args);
    va_end(args);
    enum err e = n < 0 ? ERR_INTERNAL : buf_reserve(b, (size_t)n);
    if (!e) {
        vsnprintf(b->data + b->n, (size_t)n + 1, format, again);
        b->n += (size_t)n;
    }
    va_end(again);
    return e;
}

enum err buf_err(const struct buf *b) { return b->failed; }
const char *buf_string(const struct buf *b) { return b->data ? b->data : ""; }

enum err buf_read_file(struct buf *b, const char *path, size_t limit)
{
    enum err e = OK;
    struct stat st;
    FILE *f = fopen(path, "rb");
    if (!f) FAIL(errno == ENOENT ? ERR_NOT_FOUND : ERR_IO, "%s: %s", path, strerror(errno));
    if (!limit) limit = (size_t)1 << 30;
    if (fstat(fileno(f), &st) || S_ISDIR(st.st_mode)) FAIL_OUT(ERR_IO, "%s: not a file", path);
    for (;;) {
        char piece[65536];
        size_t n = fread(piece, 1, sizeof piece, f);
        if (n > limit - (b->n < limit ? b->n : limit))
            FAIL_OUT(ERR_TOO_LONG, "%s: larger than %zu bytes", path, limit);
        TRY_OUT(buf_add(b, piece, n));
        if (n < sizeof piece) break;
    }
    if (ferror(f)) FAIL_OUT(ERR_IO, "%s: cannot be read", path);
out:
    fclose(f);
    return e;
}

bool span_equal(struct span a, const char *s) { return a.n == strlen(s) && !memcmp(a.data, s, a.n); }
