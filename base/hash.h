/* Hashes: XXH3-128 for block keys and digests that no enemy chooses without the salt. */
#pragma once
#include <stddef.h>
#include <stdint.h>

struct hash128 {
    uint64_t low, high;
};

struct hash128 hash_bytes(const void *data, size_t n, uint64_t seed);
/* The key of a block: chained on its parent's key, so equal keys mean equal whole prefixes. */
struct hash128 hash_chain(struct hash128 parent, const void *data, size_t n);
uint64_t hash_u64(uint64_t x);
static inline int hash_equal(struct hash128 a, struct hash128 b) { return a.low == b.low && a.high == b.high; }
