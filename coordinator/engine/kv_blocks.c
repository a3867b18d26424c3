/* KV blocks of one group: arrays by block id, an open-addressed index of keys, an intrusive list of
 * cached blocks from the oldest to the newest. */
#include "coordinator/engine/kv_blocks.h"
#include "base/mem.h"

#include <string.h>

static enum err limbo_init(struct kv_limbo *l, uint32_t capacity)
{
    l->capacity = capacity;
    TRY(MEM_NEW_ARRAY(capacity, &l->ids));
    return MEM_NEW_ARRAY(capacity, &l->steps);
}

static void limbo_fini(struct kv_limbo *l)
{
    mem_free(l->ids);
    mem_free(l->steps);
}

static void limbo_push(struct kv_limbo *l, uint32_t id, uint64_t step)
{
    ASSERT_CMP(l->n, <, l->capacity);
    uint64_t at = (uint64_t)l->first + l->n++;
    if (at >= l->capacity) at -= l->capacity;
    l->ids[at] = id;
    l->steps[at] = step;
}

static uint32_t limbo_pop(struct kv_limbo *l)
{
    uint32_t id = l->ids[l->first];
    l->first = l->first + 1 == l->capacity ? 0 : l->first + 1;
    l->n--;
    return id;
}

_Static_assert(sizeof(struct kv_block) == 64, "one line of cache");
enum { HUGE_BYTES_MIN = 4 << 20, PAGE_BYTES = 4096 };

/* Large tables are read at random: in huge pages each read misses once, not twice. */
static enum err alloc_table(size_t n, size_t item_bytes, void **out, size_t *out_bytes)
{
    size_t bytes;
    if (!size_mul(n, item_bytes, &bytes)) FAIL(ERR_NO_MEMORY, "a table of %zu entries", n);
    *out_bytes = bytes;
    if (bytes < HUGE_BYTES_MIN) return mem_alloc_aligned(64, bytes, out);
    TRY(mem_alloc_huge(bytes, out));
    for (size_t at = 0; at < bytes; at += PAGE_BYTES) /* now, so that no step waits for a page */
        ((volatile char *)*out)[at] = 0;
    return OK;
}

static void free_table(void *table, size_t bytes)
{
    if (bytes < HUGE_BYTES_MIN)
        mem_free(table);
    else
        mem_free_huge(table, bytes);
}

static enum err init_arrays(struct kv_blocks *kv)
{
    uint64_t size = 16;
    while (size < 2 * (uint64_t)kv->n_total)
        size *= 2;
    kv->index_mask = (uint32_t)(size - 1);
    TRY(alloc_table(kv->n_total, sizeof *kv->blocks, (void **)&kv->blocks, &kv->blocks_bytes));
    TRY(MEM_NEW_ARRAY(kv->n_total, &kv->free));
    TRY(alloc_table(size, sizeof *kv->index, (void **)&kv->index, &kv->index_bytes));
    return limbo_init(&kv->limbo, kv->n_total);
}

enum err kv_blocks_init(struct kv_blocks *kv, uint32_t n_blocks, uint32_t block_size)
{
    *kv = (struct kv_blocks){
        .n_total = n_blocks, .block_size = block_size, .oldest = KV_NONE, .newest = KV_NONE};
    if (n_blocks >= UINT32_MAX / 4) FAIL(ERR_UNSUPPORTED, "%u KV blocks in one group", n_blocks);
    enum err e = init_arrays(kv);
    if (e) {
        kv_blocks_fini(kv);
        return e;
    }
    for (uint32_t i = 0; i < n_blocks; i++)
        kv->free[i] = n_blocks - 1 - i;
    kv->n_free = n_blocks;
    return OK;
}

void kv_blocks_fini(struct kv_blocks *kv)
{
    free_table(kv->blocks, kv->blocks_bytes);
    mem_free(kv->free);
    free_table(kv->index, kv->index_bytes);
    limbo_fini(&kv->limbo);
    *kv = (struct kv_blocks){0};
}

/* The list of cached blocks. */
static void cached_append(struct kv_blocks *kv, uint32_t id)
{
    struct kv_block *b = &kv->blocks[id];
    b->previous = kv->newest;
    b->next = KV_NONE;
    if (kv->newest == KV_NONE)
        kv->oldest = id;
    else
        kv->blocks[kv->newest].next = id;
    kv->newest = id;
    b->cached = 1;
    kv->n_cached++;
}

static void cached_remove(struct kv_blocks *kv, uint32_t id)
{
    struct kv_block *b = &kv->blocks[id];
    if (b->previous == KV_NONE)
        kv->oldest = b->next;
    else
        kv->blocks[b->previous].next = b->next;
    if (b->next == KV_NONE)
        kv->newest = b->previous;
    else
        kv->blocks[b->next].previous = b->previous;
    b->cached = 0;
    kv->n_cached--;
}

/* The index: linear probing; the tag gives the home, so a removal touches no block. */
static uint32_t tag_of(struct hash128 key)
{
    return (uint32_t)(key.low ^ key.low >> 32);
}

uint32_t kv_blocks_find(const struct kv_blocks *kv, struct hash128 key)
{
    uint32_t tag = tag_of(key);
    for (uint32_t i = tag & kv->index_mask; kv->index[i].block; i = (i + 1) & kv->index_mask)
        if (kv->index[i].tag == tag && hash_equal(kv->blocks[kv->index[i].block - 1].key, key))
            return kv->index[i].block - 1;
    return KV_NONE;
}

void kv_blocks_prefetch(const struct kv_blocks *kv, struct hash128 key)
{
    __builtin_prefetch(&kv->index[tag_of(key) & kv->index_mask]);
}

static void index_insert(struct kv_blocks *kv, uint32_t block, struct hash128 key)
{
    uint32_t tag = tag_of(key), i = tag & kv->index_mask;
    while (kv->index[i].block)
        i = (i + 1) & kv->index_mask;
    kv->index[i] = (struct kv_index_entry){block + 1, tag};
    kv->n_registered++;
}

static void index_remove(struct kv_blocks *kv, uint32_t block)
{
    uint32_t mask = kv->index_mask, i = tag_of(kv->blocks[block].key) & mask;
    while (kv->index[i].block != block + 1)
        i = (i + 1) & mask;
    for (uint32_t k = (i + 1) & mask; kv->index[k].block; k = (k + 1) & mask) {
        uint32_t home = kv->index[k].tag & mask;
        if (((k - home) & mask) < ((k - i) & mask)) continue; /* its home lies after the hole */
        kv->index[i] = kv->index[k];
        i = k;
    }
    kv->index[i] = (struct kv_index_entry){0};
    kv->n_registered--;
}

static uint32_t evict_oldest(struct kv_blocks *kv)
{
    uint32_t id = kv->oldest;
    if (id == KV_NONE) return KV_NONE;
    index_remove(kv, id);
    kv->blocks[id].registered = 0;
    cached_remove(kv, id);
    kv->n_evicted++;
    return id;
}

enum { TAKE_AHEAD = 8 };

uint32_t kv_blocks_take(struct kv_blocks *kv)
{
    uint32_t id;
    if (kv->n_free) {
        id = kv->free[--kv->n_free];
        kv_blocks_prefetch_free(kv, TAKE_AHEAD);
    } else if ((id = evict_oldest(kv)) == KV_NONE)
        return KV_NONE;
    kv->blocks[id].n_refs = 1;
    kv->n_held++;
    return id;
}

void kv_blocks_ref(struct kv_blocks *kv, uint32_t block)
{
    struct kv_block *b = &kv->blocks[block];
    if (b->cached) {
        cached_remove(kv, block);
        kv->n_held++;
    } else
        ASSERT(b->n_refs || b->in_limbo);
    b->n_refs++;
}

/* Out of limbo, or never in it: free or cached from now on. */
static void settle(struct kv_blocks *kv, uint32_t id)
{
    kv->n_held--;
    if (kv->blocks[id].registered)
        cached_append(kv, id);
    else
        kv->free[kv->n_free++] = id;
}

void kv_blocks_unref(struct kv_blocks *kv, uint32_t block, uint64_t step)
{
    struct kv_block *b = &kv->blocks[block];
    ASSERT(b->n_refs);
    if (--b->n_refs) return;
    b->free_step = step;
    if (b->in_limbo) return;
    b->in_limbo = 1;
    limbo_push(&kv->limbo, block, step);
}

void kv_blocks_acked(struct kv_blocks *kv, uint64_t step)
{
    struct kv_limbo *l = &kv->limbo;
    while (l->n && l->steps[l->first] <= step) {
        uint32_t id = limbo_pop(l);
        struct kv_block *b = &kv->blocks[id];
        b->in_limbo = 0;
        if (b->n_refs) continue;   /* found again meanwhile */
        if (b->free_step > step) { /* found and given back again */
            b->in_limbo = 1;
            limbo_push(l, id, b->free_step);
        } else
            settle(kv, id);
    }
}

enum { PREFETCH_AHEAD = 32 };

uint32_t kv_blocks_match(const struct kv_blocks *kv, const struct hash128 *keys, uint32_t n,
                         uint32_t *out_cached, uint32_t *out_blocks)
{
    uint32_t i, n_cached = 0;
    for (i = 0; i < n && i < PREFETCH_AHEAD; i++)
        kv_blocks_prefetch(kv, keys[i]);
    for (i = 0; i < n; i++) {
        if (i + PREFETCH_AHEAD < n) kv_blocks_prefetch(kv, keys[i + PREFETCH_AHEAD]);
        if (i + PREFETCH_AHEAD / 2 < n) { /* its index line has come: ask for the block's */
            uint32_t home = tag_of(keys[i + PREFETCH_AHEAD / 2]) & kv->index_mask;
            uint32_t id = kv->index[home].block;
            if (id) __builtin_prefetch(&kv->blocks[id - 1]);
        }
        uint32_t id = kv_blocks_find(kv, keys[i]);
        if (id == KV_NONE) break;
        n_cached += kv->blocks[id].cached;
        if (out_blocks) out_blocks[i] = id;
    }
    *out_cached = n_cached;
    return i;
}

void kv_blocks_register(struct kv_blocks *kv, uint32_t block, struct hash128 key)
{
    struct kv_block *b = &kv->blocks[block];
    ASSERT(b->n_refs);
    if (b->registered || kv_blocks_find(kv, key) != KV_NONE) return;
    b->key = key;
    b->registered = 1;
    index_insert(kv, block, key);
}

void kv_blocks_check(const struct kv_blocks *kv)
{
    uint32_t n_held = 0, n_cached = 0, n_registered = 0;
    for (uint32_t i = 0; i < kv->n_total; i++) {
        const struct kv_block *b = &kv->blocks[i];
        ASSERT(!b->cached || (!b->n_refs && !b->in_limbo && b->registered));
        n_held += b->n_refs || b->in_limbo;
        n_cached += b->cached;
        n_registered += b->registered;
        if (b->registered) ASSERT_CMP(kv_blocks_find(kv, b->key), ==, i);
    }
    ASSERT_CMP(n_held, ==, kv->n_held);
    ASSERT_CMP(n_cached, ==, kv->n_cached);
    ASSERT_CMP(n_registered, ==, kv->n_registered);
    uint32_t n_listed = 0, before = KV_NONE;
    for (uint32_t i = kv->oldest; i != KV_NONE; before = i, i = kv->blocks[i].next, n_listed++) {
        ASSERT_CMP(n_listed, <, kv->n_total);
        ASSERT_CMP(kv->blocks[i].previous, ==, before);
    }
    ASSERT_CMP(n_listed, ==, n_cached);
    for (uint32_t i = 0; i < kv->n_free; i++) {
        const struct kv_block *b = &kv->blocks[kv->free[i]];
        ASSERT(!b->n_refs && !b->in_limbo && !b->registered && !b->cached);
    }
    ASSERT_CMP(kv->n_free + kv->n_cached + kv->n_held, ==, kv->n_total);
}
