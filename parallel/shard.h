/* Which slice of a model is mine: pure arithmetic on (rank, size), no memory, no errors but one.
 *
 * Slices are contiguous, ascend with the rank and cover everything; they may be uneven, so any
 * number of ranks up to the number of query heads works. */
#pragma once
#include "base/err.h"
#include <stdint.h>

struct shard_range {
    int64_t begin, end; /* [begin, end) */
};
static inline int64_t shard_count(struct shard_range r)
{
    return r.end - r.begin;
}

/* As even as whole items allow: ranks differ by at most one item. */
struct shard_range shard_even(int64_t n, int rank, int size);
/* As even as multiples of a power-of-two unit allow, the unit as large as balance permits (at most
 * unit_max, ranks within 6 % of the mean, else 1): kernels and quantization groups like round
 * slices. Only the last rank's end may be off the unit. */
struct shard_range shard_rounded(int64_t n, int64_t unit_max, int rank, int size);

/* The attention heads of a rank. Query heads are split evenly; the key/value heads that they need
 * come along, so a key/value head may live on several ranks. Query head h of this rank (from 0)
 * uses this rank's key/value head (h + head_offset) / group - kv_offset. */
struct shard_heads {
    struct shard_range q, kv;
    int group, head_offset, kv_offset;
};
struct shard_heads shard_heads(int n_heads, int n_kv_heads, int rank, int size);

/* ERR_UNSUPPORTED when some rank would be left without work; says how many ranks are possible. */
enum err shard_check(int n_heads, int n_kv_heads, int64_t ffn, int64_t vocab, int size);
