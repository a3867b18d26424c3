/* Hashes. Knows nothing of what is hashed. */
#include "base/hash.h"

#include <string.h>
#define XXH_INLINE_ALL
#include <xxhash.h>

struct hash128 hash_bytes(const void *data, size_t n, uint64_t seed)
{
    XXH128_hash_t h = XXH3_128bits_withSeed(data, n, seed);
    return (struct hash128){h.low64, h.high64};
}

enum { CHAIN_NEAR_BYTES = 64 }; /* of a block of 16 tokens */

struct hash128 hash_chain(struct hash128 parent, const void *data, size_t n)
{
    if (n == CHAIN_NEAR_BYTES) { /* parent and data in one */
        char near[sizeof parent + CHAIN_NEAR_BYTES];
        memcpy(near, &parent, sizeof parent);
        memcpy(near + sizeof parent, data, CHAIN_NEAR_BYTES);
        return hash_bytes(near, sizeof near, 0);
    }
    struct hash128 own = hash_bytes(data, n, parent.low ^ (parent.high << 1 | parent.high >> 63));
    uint64_t both[4] = {parent.low, parent.high, own.low, own.high};
    return hash_bytes(both, sizeof both, 0);
}

/* The finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014). */
uint64_t hash_u64(uint64_t x)
{
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}
