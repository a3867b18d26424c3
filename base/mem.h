/* The only caller of malloc. Counts what is live, can fail the n-th call for tests.
 *
 * Sizes that come from outside go through mem_alloc_array or the checked helpers below. */
#pragma once
#include "base/err.h"
#include <stddef.h>
#include <stdint.h>

/* Zeroed memory; the out pointer is written only on success. bytes == 0 gives a valid pointer. */
enum err mem_alloc(size_t bytes, void **out);
enum err mem_alloc_array(size_t n, size_t item_bytes, void **out);
/* As realloc: *ptr is unchanged on failure; new bytes are not zeroed. */
enum err mem_resize(void **ptr, size_t bytes);
/* Zeroed and aligned to a power of two (a page or a cache line); freed with mem_free. */
enum err mem_alloc_aligned(size_t alignment, size_t bytes, void **out);
/* The same, in huge pages where the system grants them; freed with mem_free_huge. */
enum err mem_alloc_huge(size_t bytes, void **out);
void mem_free_huge(void *ptr, size_t bytes);
void mem_free(void *ptr); /* accepts NULL */
char *mem_strdup(const char *s);              /* NULL when out of memory */
char *mem_strndup(const char *s, size_t n);   /* NULL when out of memory */

/* Number of allocations now live, and number ever made. */
int64_t mem_live(void);
int64_t mem_made(void);
/* Tests: the n-th allocation from now fails (n = 1 is the next), n = 0 switches it off. */
void mem_fail_at(int64_t n);

/* Typed shorthands; both fail the calling function with ERR_NO_MEMORY. */
#define MEM_NEW(out) mem_alloc(sizeof **(out), (void **)(out))
#define MEM_NEW_ARRAY(n, out) mem_alloc_array((size_t)(n), sizeof **(out), (void **)(out))

/* Checked arithmetic for sizes from outside: true when the result fits. */
static inline bool size_mul(size_t a, size_t b, size_t *out) { return !__builtin_mul_overflow(a, b, out); }
static inline bool size_add(size_t a, size_t b, size_t *out) { return !__builtin_add_overflow(a, b, out); }
