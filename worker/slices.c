/* Which rows or columns of a role are this rank's: said by the table of roles alone. */
#include "worker/loader.h"

static struct shard_range scaled(struct shard_range r, int64_t by)
{
    return (struct shard_range){r.begin * by, r.end * by};
}

/* This rank's rows or columns of a role. segment: 0, 1, 2 = q, k, v of SHARD_OUT_QKV. */
struct shard_range loader_slice(const struct model *m, enum role role, int segment)
{
    const struct model_config *c = &m->config;
    int64_t q = config_dim(c, DIM_Q), kv = config_dim(c, DIM_KV);
    struct shard_range query = scaled(m->heads.q, c->head_dim),
                       key = scaled(m->heads.kv, c->head_dim);
    switch (roles[role].shard) {
    case SHARD_OUT_Q:
    case SHARD_IN_Q:
        return query;
    case SHARD_OUT_KV:
        return key;
    case SHARD_OUT_FFN:
    case SHARD_IN_FFN:
        return m->ffn;
    case SHARD_VOCAB:
        return m->vocab;
    case SHARD_OUT_QKV: {
        if (segment == 0) return query;
        int64_t base = q + (segment - 1) * kv;
        return (struct shard_range){base + key.begin, base + key.end};
    }
    default:
        return (struct shard_range){0, config_dim(c, roles[role].rows)};
    }
}

struct matrix_view view_rows(struct matrix_view v, struct shard_range r)
{
    v.data = (const char *)v.data + (size_t)(r.begin * v.row_stride) * dtype_bytes(v.dtype);
    v.rows = shard_count(r);
    return v;
}

struct matrix_view view_columns(struct matrix_view v, struct shard_range r)
{
    v.data = (const char *)v.data + (size_t)(r.begin * v.col_stride) * dtype_bytes(v.dtype);
    v.cols = shard_count(r);
    return v;
}

bool role_is_shard_in(enum role role)
{
    return roles[role].shard == SHARD_IN_Q || roles[role].shard == SHARD_IN_FFN;
}

int role_segments(enum role role)
{
    return roles[role].shard == SHARD_OUT_QKV ? 3 : 1;
}
