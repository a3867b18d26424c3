/* qkv_prepare, and the attention that every other path is compared with.
 *
 * The reference walks a token's context once with a running maximum and sum (Milakov, Gimelshein,
 * "Online normalizer calculation for softmax", 2018, algorithm 3), in double precision, one query
 * head at a time; it reads the cache element by element and so serves any block size. */
#include "kernels/cpu/attention.h"

#include <math.h>
#include <string.h>

/* Sequence of a token: the last s with seq_start[s] <= token. */
static int sequence_of(const struct batch *batch, int token)
{
    int low = 0, high = batch->n_seqs - 1;
    while (low < high) {
        int middle = (low + high + 1) / 2;
        if (batch->seq_start[middle] <= token)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

/* RMS norm of one head, in place. */
static void head_norm(float *x, int n, const float *weight, float epsilon)
{
    double sum = 0;
    for (int d = 0; d < n; d++)
        sum += (double)x[d] * x[d];
    float scale = 1.0f / sqrtf((float)(sum / n) + epsilon);
    for (int d = 0; d < n; d++)
        x[d] = x[d] * scale * weight[d];
}

/* Su et al., "RoFormer", 2021, equation 34; pairs (2i, 2i+1) as there, or halves (i, i + n/2). */
static void rope(const struct row_kernels *rows, float *x, const struct attention_args *a,
                 int32_t position)
{
    int half = a->rotary_dim / 2;
    const float *c = a->rope_cos + (int64_t)position * half,
                *s = a->rope_sin + (int64_t)position * half;
    if (!a->rope_pairs) {
        rows->rotate_halves(x, c, s, half);
        return;
    }
    for (int i = 0; i < half; i++) {
        float *p = x + 2 * i, low = p[0], high = p[1];
        p[0] = low * c[i] - high * s[i];
        p[1] = high * c[i] + low * s[i];
    }
}

static void prepare_token(const void *args, int token, void *scratch)
{
    const struct attention_job *j = args;
    const struct attention_args *a = j->args;
    float *q = (float *)j->qkv.data + token * j->qkv.stride;
    float *k = q + (int64_t)a->n_heads * a->head_dim, *v = k + (int64_t)a->n_kv_heads * a->head_dim;
    int seq = sequence_of(j->batch, token);
    bool last = token == j->batch->seq_start[seq + 1] - 1;
    (void)scratch;
    for (int h = 0; h < a->n_heads + a->n_kv_heads; h++) {
        float *x = q + (int64_t)h * a->head_dim;
        const float *norm = h < a->n_heads ? a->q_norm : a->k_norm;
        if (norm) head_norm(x, a->head_dim, norm, a->norm_epsilon);
        if (a->rope_cos) rope(j->rows, x, a, j->batch->positions[token]);
    }
    for (int h = 0; h < a->n_kv_heads; h++)
        kv_write(j->kv, a->layer, h, j->batch->cache_slot[token], k + (int64_t)h * a->head_dim,
                 v + (int64_t)h * a->head_dim, last);
}

void cpu_qkv_prepare(struct backend *b, struct tensor qkv, struct kv_cache *kv,
                     const struct attention_args *args, const struct batch *batch)
{
    struct attention_job j = {
        .args = args, .batch = batch, .kv = kv, .qkv = qkv, .rows = cpu_of(b)->rows};
    ASSERT_CMP(qkv.cols, ==, (args->n_heads + 2 * args->n_kv_heads) * args->head_dim);
    ASSERT_CMP(args->head_dim, ==, kv->args.head_dim);
    pool_run(cpu_of(b)->pool, &(struct pool_job){.compute = prepare_token,
                                                 .args = &j,
                                                 .args_bytes = sizeof j,
                                                 .n_chunks = batch->n_tokens});
}

static double score(const struct attention_job *j, const float *q, const uint8_t *piece, int offset)
{
    double sum = 0;
    for (int d = 0; d < j->args->head_dim; d++)
        sum += (double)q[d] * kv_read_k(j->kv, piece, offset, d);
    sum *= j->args->scale;
    return j->args->softcap > 0 ? j->args->softcap * tanh(sum / j->args->softcap) : sum;
}

/* One token, one query head. */
static void attend_head(const struct attention_job *j, int token, int head)
{
    const struct attention_args *a = j->args;
    int size = j->kv->args.block_size, seq = sequence_of(j->batch, token), n = a->head_dim;
    int32_t position = j->batch->positions[token];
    int32_t first = a->window > 0 && position >= a->window ? position - a->window + 1 : 0;
    const int32_t *blocks = j->batch->block_table + (int64_t)seq * j->batch->blocks_per_seq_max;
    int kv_head_index = (head + a->head_offset) / a->group - a->kv_offset;
    const float *q = (const float *)j->qkv.data + token * j->qkv.stride + (int64_t)head * n;
    double max = -INFINITY, sum = 0, value[HEAD_DIM_MAX] = {0};
    ASSERT(kv_head_index >= 0 && kv_head_index < a->n_kv_heads);
    for (int32_t t = first; t <= position; t++) {
        const uint8_t *piece = kv_head(j->kv, a->layer, blocks[t / size], kv_head_index);
        double s = score(j, q, piece, t % size), new_max = s > max ? s : max;
        double keep = exp(max - new_max), p = exp(s - new_max);
        for (int d = 0; d < n; d++)
            value[d] = value[d] * keep + p * kv_read_v(j->kv, piece, t % size, d);
        sum = sum * keep + p;
        max = new_max;
    }
    float *out = (float *)j->out.data + token * j->out.stride + (int64_t)head * n;
    for (int d = 0; d < n; d++)
        out[d] = (float)(value[d] / sum);
}

static void attend_token(const void *args, int token, void *scratch)
{
    const struct attention_job *j = args;
    (void)scratch;
    for (int h = 0; h < j->args->n_heads; h++)
        attend_head(j, token, h);
}

void cpu_attend(struct backend *b, struct tensor out, struct tensor qkv, struct kv_cache *kv,
                const struct attention_args *args, const struct batch *batch)
{
    struct attention_job j = {
        .args = args, .batch = batch, .kv = kv, .rows = cpu_of(b)->rows, .qkv = qkv, .out = out};
    ASSERT_CMP(out.cols, ==, args->n_heads * args->head_dim);
    if (batch->n_tokens == 0) return;
    if (attend_tiles_can(cpu_of(b), &j)) {
        attend_tiles(cpu_of(b), &j);
        return;
    }
    pool_run(cpu_of(b)->pool, &(struct pool_job){.compute = attend_token,
                                                 .args = &j,
                                                 .args_bytes = sizeof j,
                                                 .n_chunks = batch->n_tokens});
}
