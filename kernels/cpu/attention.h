/* What attention's driver and its kernels share: one chunk of context for a few query rows.
 *
 * A query row is one head of one token. A chunk is ATTENTION_CHUNK tokens at an absolute place in
 * the sequence; spans are a fixed number of chunks. A row's result is merged chunk by chunk within
 * a span and then span by span, always in this order: so it depends on its context alone, however
 * rows and spans are dealt to threads and steps. */
#pragma once
#include "kernels/cpu/cpu.h"

enum {
    TILE = 16,
    ATTENTION_CHUNK = 256,
    CHUNK_TILES = ATTENTION_CHUNK / TILE,
    SPAN_CHUNKS = 4,
    SPAN = SPAN_CHUNKS * ATTENTION_CHUNK,
};

/* One chunk by at most LANES_ROWS_MAX rows. */
struct chunk_call {
    int rows, width, n_tiles;
    bool odd;                           /* the first tile has an odd number in the chunk */
    const uint8_t *const *k, *const *v; /* [n_tiles] tiles */
    const uint8_t *const *k_ahead, *const *v_ahead; /* [n_tiles] tiles worth fetching meanwhile */
    const float *const *k_scale, *const *v_scale;   /* I8: [n_tiles][16], else NULL */
    const void *q;    /* [rows][width] floats, or what the ISA's query_kernel makes of them */
    int64_t q_stride; /* bytes between rows */
    float scale, softcap;
    int low[8], high[8]; /* tokens of the chunk that a row sees: [low, high), not empty */
    float *scores;    /* [rows][ATTENTION_CHUNK], overwritten by weights of the kernel's own form */
    float *max, *sum; /* [rows] */
    float *out;       /* [rows][width] */
};

/* One layer's attention over the batch. */
struct attention_job {
    const struct attention_args *args;
    const struct batch *batch;
    struct kv_cache *kv;
    const struct row_kernels *rows;
    struct tensor qkv, out;
};

/* attention_tiles.c: whether the lane kernels serve this cache, and the whole operation by them. */
bool attend_tiles_can(const struct cpu_backend *cpu, const struct attention_job *job);
void attend_tiles(struct cpu_backend *cpu, const struct attention_job *job);
size_t attention_scratch_bytes(void);
