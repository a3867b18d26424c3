/* The pages under a KV cache: small ones for the first tokens, huge ones from then on.
 *
 * The first tokens of a cache lie at the beginning of the K and the V of every layer and head, far
 * apart: in huge pages they would be half a gigabyte that the system clears, and may have to find
 * first, while the first request waits. So these beginnings start in small pages, of which a
 * thousand are soon there, and cpu_kv_settle gathers them into huge ones while others compute. The
 * rest of the cache is huge from its first touch, and cpu_kv_settle asks for it before blocks get
 * there: one step would else wait until the system has cleared the next page of every layer and
 * head, half a gigabyte again. A system that cannot gather pages begins with the huge ones; one that
 * cannot fetch pages ahead finds them in the steps. Knows nothing of tokens. */
#include "kernels/cpu/cpu.h"

#include <sys/mman.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* Linux 6.1 */
#endif
#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23 /* Linux 5.14 */
#endif

enum {
    SMALL_BYTES = 4096,
    HUGE_BYTES = 2 << 20,
    BEGINNING_BYTES = 256 << 10,
    TOUCHED_BYTES = 4 * SMALL_BYTES,
    AHEAD_BYTES = 512 << 10 /* of K or V of a layer and head beyond the blocks in use */
};

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
    for (size_t at = 0; at < TOUCHED_BYTES && at < a->stretch_bytes; at += SMALL_BYTES)
        *(volatile uint8_t *)(a->data + (size_t)chunk * a->stretch_bytes + at) = 0;
}

void kv_pages_begin(struct backend *b, struct kv_cache *kv)
{
    struct touch_args args = {kv->data, kv->v_offset};
    int n = n_stretches(kv);
    if (!kv->bytes || n >= POOL_CHUNKS_MAX) return;
    kv->gathers = !madvise(NULL, 0, MADV_COLLAPSE); /* of nothing: whether it is known */
    kv->ahead_bytes = kv->gathers ? BEGINNING_BYTES : TOUCHED_BYTES;
    for (int i = 0; i < n && kv->gathers; i++)
        advise(kv, i, MADV_NOHUGEPAGE);
    pool_run(cpu_of(b)->pool, &(struct pool_job){.compute = stretch_touch,
                                                 .args = &args,
                                                 .args_bytes = sizeof args,
                                                 .n_chunks = n});
}

/* The huge pages under bytes from .. to of a stretch, but for the one that from lies in. False when
 * there are none, or none can be had. */
static bool populate(struct kv_cache *kv, int stretch, size_t from, size_t to)
{
    uintptr_t first = (uintptr_t)kv->data, end = first + kv->bytes;
    uintptr_t at = first + (size_t)stretch * kv->v_offset;
    uintptr_t begin = (at + from + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES;
    to = (at + to + HUGE_BYTES - 1) / HUGE_BYTES * HUGE_BYTES;
    if (to > end) to = (end + SMALL_BYTES - 1) / SMALL_BYTES * SMALL_BYTES;
    return begin < to && !madvise((void *)begin, to - begin, MADV_POPULATE_WRITE);
}

/* All stretches get as far as the blocks asked for when the first of them began. */
static bool fetch_ahead(struct kv_cache *kv, int n_blocks)
{
    size_t want = (size_t)n_blocks * kv->half_bytes + AHEAD_BYTES;
    if (want > kv->v_offset) want = kv->v_offset;
    if (!n_blocks) return false;
    while (kv->ahead_part || want > kv->ahead_bytes) {
        if (!kv->ahead_part) kv->ahead_next = want;
        for (int n = n_stretches(kv); kv->ahead_part < n;)
            if (populate(kv, kv->ahead_part++, kv->ahead_bytes, kv->ahead_next)) return true;
        kv->ahead_bytes = kv->ahead_next;
        kv->ahead_part = 0;
    }
    return false;
}

bool cpu_kv_settle(struct backend *b, struct kv_cache *kv, int n_blocks)
{
    (void)b;
    if (!kv->gathers || kv->n_gathered == n_stretches(kv)) return fetch_ahead(kv, n_blocks);
    advise(kv, kv->n_gathered, MADV_HUGEPAGE);
    advise(kv, kv->n_gathered, MADV_COLLAPSE);
    advise(kv, kv->n_gathered++, MADV_POPULATE_WRITE); /* one of which nothing was touched */
    return true;
}
