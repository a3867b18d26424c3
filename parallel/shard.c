/* Shard arithmetic. Knows counts; never tensors. */
#include "parallel/shard.h"

struct shard_range shard_even(int64_t n, int rank, int size)
{
    return (struct shard_range){n * rank / size, n * (rank + 1) / size};
}

static struct shard_range in_units(int64_t n, int64_t unit, int rank, int size)
{
    int64_t units = (n + unit - 1) / unit;
    struct shard_range r = shard_even(units, rank, size);
    r.begin *= unit;
    r.end *= unit;
    if (r.begin > n) r.begin = n;
    if (r.end > n) r.end = n;
    return r;
}

/* Whether the largest slice is within 6 % of the mean, and none is empty. */
static bool balanced(int64_t n, int64_t unit, int size)
{
    for (int rank = 0; rank < size; rank++) {
        int64_t count = shard_count(in_units(n, unit, rank, size));
        if (count == 0 || count * size * 100 > n * 106) return false;
    }
    return true;
}

struct shard_range shard_rounded(int64_t n, int64_t unit_max, int rank, int size)
{
    int64_t unit = unit_max;
    while (unit > 1 && !balanced(n, unit, size))
        unit /= 2;
    return unit > 1 ? in_units(n, unit, rank, size) : shard_even(n, rank, size);
}

struct shard_heads shard_heads(int n_heads, int n_kv_heads, int rank, int size)
{
    struct shard_heads s = {.q = shard_even(n_heads, rank, size), .group = n_heads / n_kv_heads};
    s.kv.begin = s.q.begin / s.group;
    s.kv.end = s.q.end > s.q.begin ? (s.q.end - 1) / s.group + 1 : s.kv.begin;
    s.head_offset = (int)s.q.begin;
    s.kv_offset = (int)s.kv.begin;
    return s;
}

enum err shard_check(int n_heads, int n_kv_heads, int64_t ffn, int64_t vocab, int size)
{
    int64_t most = n_heads;
    if (ffn < most) most = ffn;
    if (vocab < most) most = vocab;
    if (n_kv_heads < 1 || n_heads % n_kv_heads)
        FAIL(ERR_UNSUPPORTED, "%d query heads are no multiple of %d key/value heads", n_heads,
             n_kv_heads);
    if (size < 1 || size > most)
        FAIL(ERR_UNSUPPORTED, "%d tensor-parallel ranks: this model can be split over 1 to %lld",
             size, (long long)most);
    return OK;
}
