/* rand_at of base/rand.h, word for word, for the device: Philox4x32-10 (Salmon et al., SC 2011). */
#pragma once
#include <cstdint>

static __device__ __forceinline__ float philox_at(uint64_t key, uint64_t counter, uint32_t purpose)
{
    uint32_t k0 = (uint32_t)key, k1 = (uint32_t)(key >> 32);
    uint32_t c0 = (uint32_t)counter, c1 = (uint32_t)(counter >> 32), c2 = purpose, c3 = 0;
#pragma unroll
    for (int round = 0; round < 10; round++) {
        uint32_t n0 = __umulhi(0xCD9E8D57u, c2) ^ c1 ^ k0, n2 = __umulhi(0xD2511F53u, c0) ^ c3 ^ k1;
        c1 = 0xCD9E8D57u * c2, c3 = 0xD2511F53u * c0;
        c0 = n0, c2 = n2;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return ((float)(c0 >> 8) + 0.5f) * (1.0f / 16777216.0f);
}
