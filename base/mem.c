/* The only caller of malloc: counted, and made to fail on demand. Knows nothing of lifetimes. */
#define MEM_C
#include "base/mem.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

static _Atomic int64_t live, made, fail_at;

/* Counts one allocation; false when a test asked for this one to fail. */
static bool count_one(void)
{
    atomic_fetch_add_explicit(&made, 1, memory_order_relaxed);
    if (atomic_load_explicit(&fail_at, memory_order_relaxed) > 0 &&
        atomic_fetch_sub_explicit(&fail_at, 1, memory_order_relaxed) == 1)
        return false;
    return true;
}

static enum err out_of_memory(size_t bytes)
{
    FAIL(ERR_NO_MEMORY, "out of memory for %zu bytes", bytes);
}

enum err mem_alloc(size_t bytes, void **out)
{
    void *p = count_one() ? calloc(1, bytes ? bytes : 1) : NULL;
    if (!p) return out_of_memory(bytes);
    atomic_fetch_add_explicit(&live, 1, memory_order_relaxed);
    *out = p;
    return OK;
}

enum err mem_alloc_array(size_t n, size_t item_bytes, void **out)
{
    size_t bytes;
    if (!size_mul(n, item_bytes, &bytes)) return out_of_memory(SIZE_MAX);
    return mem_alloc(bytes, out);
}

enum err mem_resize(void **ptr, size_t bytes)
{
    void *p = count_one() ? realloc(*ptr, bytes ? bytes : 1) : NULL;
    if (!p) return out_of_memory(bytes);
    if (!*ptr) atomic_fetch_add_explicit(&live, 1, memory_order_relaxed);
    *ptr = p;
    return OK;
}

enum err mem_alloc_aligned(size_t alignment, size_t bytes, void **out)
{
    void *p = NULL;
    if (!count_one() || posix_memalign(&p, alignment, bytes ? bytes : alignment) || !p)
        return out_of_memory(bytes);
    memset(p, 0, bytes);
    atomic_fetch_add_explicit(&live, 1, memory_order_relaxed);
    *out = p;
    return OK;
}

/* Whole huge pages: the system aligns only mappings of such a length to them. */
static size_t huge_bytes(size_t bytes)
{
    const size_t page = (size_t)2 << 20;
    return bytes < page || bytes > SIZE_MAX - page ? bytes + !bytes
                                                   : (bytes + page - 1) / page * page;
}

enum err mem_alloc_huge(size_t bytes, void **out)
{
    void *p = count_one() ? mmap(NULL, huge_bytes(bytes), PROT_READ | PROT_WRITE,
                                 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
                          : MAP_FAILED;
    if (p == MAP_FAILED) return out_of_memory(bytes);
    madvise(p, huge_bytes(bytes), MADV_HUGEPAGE); /* a hint: without huge pages it is only slower */
    atomic_fetch_add_explicit(&live, 1, memory_order_relaxed);
    *out = p;
    return OK;
}

void mem_free_huge(void *ptr, size_t bytes)
{
    if (!ptr) return;
    munmap(ptr, huge_bytes(bytes));
    atomic_fetch_sub_explicit(&live, 1, memory_order_relaxed);
}

void mem_free(void *ptr)
{
    if (!ptr) return;
    atomic_fetch_sub_explicit(&live, 1, memory_order_relaxed);
    free(ptr);
}

char *mem_strndup(const char *s, size_t n)
{
    void *p;
    size_t bytes = strnlen(s, n);
    if (mem_alloc(bytes + 1, &p)) return NULL;
    memcpy(p, s, bytes);
    return p;
}

char *mem_strdup(const char *s) { return mem_strndup(s, SIZE_MAX - 1); }
int64_t mem_live(void) { return atomic_load(&live); }
int64_t mem_made(void) { return atomic_load(&made); }
void mem_fail_at(int64_t n) { atomic_store(&fail_at, n); }
