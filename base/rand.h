/* Random numbers of two kinds.
 *
 * rand_at is counter-based: the value depends on (key, counter) alone, so a token's draw is a
 * function of (seed, position) and repeats in any batch, after any preemption, on any rank.
 * It is Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3",
 * SC 2011, section 4.3). struct rand is a seeded stream for tests, load and the simulator. */
#pragma once
#include <stdint.h>

/* Four 32-bit words of Philox4x32-10. */
static inline void rand_philox(uint64_t key, uint64_t counter_low, uint64_t counter_high, uint32_t out[4])
{
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    uint32_t c0 = (uint32_t)counter_low, c1 = (uint32_t)(counter_low >> 32);
    uint32_t c2 = (uint32_t)counter_high, c3 = (uint32_t)(counter_high >> 32);
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
        uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c0 = n0, c1 = (uint32_t)p1, c2 = n2, c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

/* Uniform in (0, 1), 24 bits: the draw of a token at a position. */
static inline float rand_at(uint64_t seed, uint64_t position, uint32_t purpose)
{
    uint32_t w[4];
    rand_philox(seed, position, purpose, w);
    return ((float)(w[0] >> 8) + 0.5f) * (1.0f / 16777216.0f);
}

struct rand {
    uint64_t key, counter;
};

static inline struct rand rand_seeded(uint64_t seed) { return (struct rand){.key = seed}; }
static inline uint64_t rand_next(struct rand *r)
{
    uint32_t w[4];
    rand_philox(r->key, r->counter++, 0, w);
    return (uint64_t)w[1] << 32 | w[0];
}
/* Uniform in [0, n); n > 0. The bias of the multiply-shift is below 2^-32. */
static inline uint64_t rand_below(struct rand *r, uint64_t n)
{
    return (uint64_t)((unsigned __int128)rand_next(r) * n >> 64);
}
static inline double rand_unit(struct rand *r) { return (double)(rand_next(r) >> 11) * 0x1p-53; }
