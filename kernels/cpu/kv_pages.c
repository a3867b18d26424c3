/* The pages under a KV cache: small ones for the first tokens, huge ones from then on.
 *
 * The first tokens of a cache lie at the beginning of the K and the V of every layer and head, far
 * apart: in huge pages they would be half a gigabyte that the system clears, and may have to find
 * first, while the first request waits. So these beginnings start in small pages, of which a
 * thousand are soon there, and cpu_kv_settle gathers them into huge ones while others compute. The
 * rest of the cache is huge from its first touch. A system that cannot gather pages begins with the
 * huge ones. Knows nothing of tokens. */
#include "kernels/cpu/cpu.h"

#include <sys/mman.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* Linux 6.1 */
#endif

enum { SMALL_BYTES = 4096, HUGE_BYTES = 2 << 20, BEGINNING_BYTES = 256 << 10, TOUCHED_PAGES = 4 };

static int n_stretches(const struct kv_cache *kv)
{
    return 2 * kv->args.n_layers * kv->args.n_kv_heads;
}

/* The huge pages that hold the beginning of the K or V of one layer and head. */
static void advise(const struct kv_cache *kv, int stretch, int advice)
{
    uintptr_t first = (uintptr_t)kv->data, end = first + kv->bytes;
    uintptr_t from = first + (size_t)stretch * kv->v_offset, to = from + BEGINNING_BYTES;
    from = from / HUGE_BYTES * HUGE_BYTES;
    to = (to + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES;
    if (from < first) from = first;
    if (to > end) to = (end + SMALL_BYTES - 1) / SMALL_BYTES * SMALL_BYTES;
    /* a hint: without it pages are of another size */
    madvise((void *)from, to - from, advice);
}

struct touch_args {
    uint8_t *data;
    size_t stretch_bytes;
};

static void stretch_touch(const void *args, int chunk, void *scratch)
{
    const struct touch_args *a = args;
    (void)scratch;
    for (size_t at = 0; at < TOUCHED_PAGES * SMALL_BYTES && at < a->stretch_bytes;
         at += SMALL_BYTES)
        *(volatile uint8_t *)(a->data + (size_t)chunk * a->stretch_bytes + at) = 0;
}

void kv_pages_begin(struct backend *b, struct kv_cache *kv)
{
    struct touch_args args = {kv->data, kv->v_offset};
    int n = n_stretches(kv);
    if (!kv->bytes || n >= POOL_CHUNKS_MAX) return;
    kv->gathers = !madvise(NULL, 0, MADV_COLLAPSE); /* of nothing: whether it is known */
    for (int i = 0; i < n && kv->gathers; i++)
        advise(kv, i, MADV_NOHUGEPAGE);
    pool_run(cpu_of(b)->pool, &(struct pool_job){.compute = stretch_touch,
                                                 .args = &args,
                                                 .args_bytes = sizeof args,
                                                 .n_chunks = n});
}

bool cpu_kv_settle(struct backend *b, struct kv_cache *kv, int part)
{
    (void)b;
    if (!kv->gathers || part >= n_stretches(kv)) return false;
    advise(kv, part, MADV_HUGEPAGE);
    advise(kv, part, MADV_COLLAPSE);
    return true;
}
