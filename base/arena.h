/* Memory by lifetime: pieces are taken one by one and dropped all at once.
 *
 * Three lifetimes use it: process, sequence (dropped whole), step (reset each step). A reset keeps
 * the chunks, so a step arena stops allocating once it has seen its largest step. */
#pragma once
#include "base/err.h"
#include <stddef.h>

struct arena_chunk;
struct arena {
    struct arena_chunk *first, *current;
    size_t chunk_bytes; /* size of a usual chunk */
    size_t limit_bytes; /* all chunks together, 0 = no limit */
    size_t total_bytes;
};

void arena_init(struct arena *a, size_t chunk_bytes, size_t limit_bytes);
void arena_fini(struct arena *a);
void arena_reset(struct arena *a);
/* Zeroed memory aligned to 16 bytes, owned by the arena. ERR_NO_MEMORY, ERR_FULL at the limit. */
enum err arena_alloc(struct arena *a, size_t bytes, void **out);
enum err arena_alloc_array(struct arena *a, size_t n, size_t item_bytes, void **out);
/* A NUL-terminated copy of n bytes. */
enum err arena_copy_string(struct arena *a, const char *s, size_t n, char **out);
