/* A growing byte string, always NUL-terminated, and a view of bytes.
 *
 * Appending cannot be half done: on ERR_NO_MEMORY or at the limit the content is unchanged and the
 * buffer remembers the failure, so a writer of many pieces may check once at the end (buf_err). */
#pragma once
#include "base/err.h"
#include <stddef.h>
#include <stdint.h>

struct span { /* bytes owned by somebody else */
    const char *data;
    size_t n;
};

struct buf {
    char *data; /* [size + 1]; NULL while empty */
    size_t n, capacity;
    size_t limit; /* 0 = none */
    enum err failed;
};

void buf_init(struct buf *b, size_t limit);
void buf_fini(struct buf *b); /* accepts zeroed memory */
void buf_clear(struct buf *b); /* keeps the memory, forgets the failure */
enum err buf_reserve(struct buf *b, size_t more);
enum err buf_add(struct buf *b, const void *data, size_t n);
enum err buf_add_string(struct buf *b, const char *s);
enum err buf_add_char(struct buf *b, char c);
enum err buf_printf(struct buf *b, const char *format, ...) __attribute__((format(printf, 2, 3)));
enum err buf_err(const struct buf *b);
const char *buf_string(const struct buf *b); /* never NULL */
/* Reads a whole file of at most limit bytes (0 = 1 GiB). Names the file in its errors. */
enum err buf_read_file(struct buf *b, const char *path, size_t limit);

static inline struct span span_of(const char *s) { return (struct span){s, __builtin_strlen(s)}; }
bool span_equal(struct span a, const char *s);
