/* AMX: tiles of 16 rows by 16 outputs by 16 steps; a call is up to 32 rows by a panel, so two tiles
 * of activations, two of weights, four of sums.
 *
 * Activations lie row after row here (row_major), for a tile is loaded by rows; weights are the
 * same panels as everywhere, a tile of them is 16 steps of half a panel. INT8 sums are exact and
 * equal those of the other instruction sets bit for bit, and so do INT4's, whose nibbles are
 * unpacked to bytes a group at a time. Only the tile instructions of amx.h are used; the rest is
 * plain C. */
#include "kernels/cpu/amx.h"
#include "kernels/cpu/cpu.h"

#include <math.h>

enum { TILE_ROWS = 16, TILE_STEPS = 16, AMX_ROWS = 32, STEP_BYTES = 128 };
enum { GROUP_BYTES = 64 + GROUP_STEPS * 64 };

/* Tiles 0..3: sums [row half][output half]; 4, 5: activations; 6, 7: weights. */
static void tiles_configure(int rows)
{
    struct amx_config c = {.palette = 1};
    uint8_t low = (uint8_t)(rows < TILE_ROWS ? rows : TILE_ROWS);
    uint8_t high = (uint8_t)(rows - low);
    const uint8_t heights[8] = {low, low, high, high, low, high, TILE_STEPS, TILE_STEPS};
    for (int t = 0; t < 8; t++)
        c.rows[t] = heights[t], c.bytes_per_row[t] = heights[t] ? 64 : 0;
    AMX_CONFIG(&c);
}

static inline void sums_begin(const void *from, int rows)
{
    const uint8_t *sums = from;
    if (!from) {
        AMX_ZERO(0);
        AMX_ZERO(1);
        if (rows > TILE_ROWS) {
            AMX_ZERO(2);
            AMX_ZERO(3);
        }
        return;
    }
    AMX_LOAD(0, sums, STEP_BYTES);
    AMX_LOAD(1, sums + 64, STEP_BYTES);
    if (rows > TILE_ROWS) {
        AMX_LOAD(2, sums + TILE_ROWS * STEP_BYTES, STEP_BYTES);
        AMX_LOAD(3, sums + TILE_ROWS * STEP_BYTES + 64, STEP_BYTES);
    }
}

static inline void sums_end(void *to, int rows)
{
    uint8_t *sums = to;
    AMX_STORE(0, sums, STEP_BYTES);
    AMX_STORE(1, sums + 64, STEP_BYTES);
    if (rows > TILE_ROWS) {
        AMX_STORE(2, sums + TILE_ROWS * STEP_BYTES, STEP_BYTES);
        AMX_STORE(3, sums + TILE_ROWS * STEP_BYTES + 64, STEP_BYTES);
    }
}

/* Sixteen steps. words_bytes: between rows of activations. */
#define BLOCK(NAME, DOT)                                                                           \
    static inline void NAME(const uint8_t *weights, const uint32_t *words, int64_t words_bytes,    \
                            int rows)                                                              \
    {                                                                                              \
        AMX_LOAD(6, weights, STEP_BYTES);                                                          \
        AMX_LOAD(7, weights + 64, STEP_BYTES);                                                     \
        AMX_LOAD(4, words, words_bytes);                                                           \
        DOT(0, 4, 6);                                                                              \
        DOT(1, 4, 7);                                                                              \
        if (rows > TILE_ROWS) {                                                                    \
            AMX_LOAD(5, (const uint8_t *)words + TILE_ROWS * words_bytes, words_bytes);            \
            DOT(2, 5, 6);                                                                          \
            DOT(3, 5, 7);                                                                          \
        }                                                                                          \
    }
BLOCK(block_int8, AMX_DOT_INT8)
BLOCK(block_bf16, AMX_DOT_BF16)

/* The steps that do not fill a tile, with zeros after them. */
struct tail {
    _Alignas(64) uint8_t weights[TILE_STEPS * STEP_BYTES];
    _Alignas(64) uint32_t words[AMX_ROWS * TILE_STEPS];
};

static void tail_fill(struct tail *t, const struct panel_call *c, int64_t s, int rows)
{
    size_t n = (size_t)(c->n_steps - s);
    memset(t, 0, sizeof *t);
    memcpy(t->weights, c->weights + s * STEP_BYTES, n * STEP_BYTES);
    for (int r = 0; r < rows; r++)
        memcpy(t->words + r * TILE_STEPS, c->words + r * c->words_stride + s, n * 4);
}

static inline float finish(const struct panel_call *c, int r, int n, float v)
{
    if (c->row_scale) v *= c->row_scale[r];
    if (c->column_scale) v *= c->column_scale[n];
    return c->bias ? v + c->bias[n] : v;
}

#define PANEL(NAME, BLOCK_OF)                                                                      \
    static void NAME(const struct panel_call *c, int rows)                                         \
    {                                                                                              \
        int64_t s = 0;                                                                             \
        tiles_configure(rows);                                                                     \
        sums_begin(c->first ? NULL : c->scratch, rows);                                            \
        for (; s + TILE_STEPS <= c->n_steps; s += TILE_STEPS)                                      \
            BLOCK_OF(c->weights + s * STEP_BYTES, c->words + s, c->words_stride * 4, rows);        \
        if (s < c->n_steps) {                                                                      \
            struct tail t;                                                                         \
            tail_fill(&t, c, s, rows);                                                             \
            BLOCK_OF(t.weights, t.words, TILE_STEPS * 4, rows);                                    \
        }                                                                                          \
        sums_end(c->scratch, rows);                                                                \
        AMX_RELEASE();                                                                             \
    }
PANEL(sums_int8, block_int8)
PANEL(sums_bf16, block_bf16)

static void panel_int8(const struct panel_call *c, int rows)
{
    const int32_t *sums = c->scratch;
    sums_int8(c, rows);
    for (int r = 0; c->last && r < rows; r++)
        for (int n = 0; n < PANEL_OUTPUTS; n++)
            c->out[r * c->out_stride + n] = finish(
                c, r, n,
                (float)(sums[r * PANEL_OUTPUTS + n] + c->correction[r * c->correction_stride]));
}

static void panel_bf16(const struct panel_call *c, int rows)
{
    const float *sums = c->scratch;
    sums_bf16(c, rows);
    for (int r = 0; c->last && r < rows; r++)
        for (int n = 0; n < PANEL_OUTPUTS; n++)
            c->out[r * c->out_stride + n] = finish(c, r, n, sums[r * PANEL_OUTPUTS + n]);
}

/* The nibbles of one group as bytes: 32 steps of 128. */
static void group_unpack(const uint8_t *group, uint8_t *out)
{
    for (int s = 0; s < GROUP_STEPS; s += 2, out += 2 * STEP_BYTES) {
        const uint8_t *pair = group + 64 + s / 2 * STEP_BYTES;
        for (int i = 0; i < STEP_BYTES; i++) {
            out[i] = pair[i] & 15;
            out[STEP_BYTES + i] = pair[i] >> 4;
        }
    }
}

static void panel_int4(const struct panel_call *c, int rows)
{
    _Alignas(64) uint8_t bytes[GROUP_STEPS * STEP_BYTES];
    _Alignas(64) int32_t sums[AMX_ROWS * PANEL_OUTPUTS];
    float *total = c->scratch, scale[PANEL_OUTPUTS];
    if (c->first) memset(total, 0, (size_t)rows * PANEL_OUTPUTS * sizeof *total);
    tiles_configure(rows);
    for (int64_t g = 0; g * GROUP_STEPS < c->n_steps; g++) {
        const uint8_t *group = c->weights + g * GROUP_BYTES;
        group_unpack(group, bytes);
        sums_begin(NULL, rows);
        for (int s = 0; s < GROUP_STEPS; s += TILE_STEPS)
            block_int8(bytes + s * STEP_BYTES, c->words + g * GROUP_STEPS + s, c->words_stride * 4,
                       rows);
        sums_end(sums, rows);
        for (int n = 0; n < PANEL_OUTPUTS; n++) {
            uint16_t half;
            memcpy(&half, group + 2 * n, 2);
            scale[n] = f16_to_float(half);
        }
        for (int r = 0; r < rows; r++)
            for (int n = 0; n < PANEL_OUTPUTS; n++) {
                int i = r * PANEL_OUTPUTS + n;
                float sum = (float)(sums[i] + c->correction[r * c->correction_stride + g]);
                total[i] = fmaf(sum, scale[n], total[i]);
            }
    }
    AMX_RELEASE();
    for (int r = 0; c->last && r < rows; r++)
        for (int n = 0; n < PANEL_OUTPUTS; n++)
            c->out[r * c->out_stride + n] = finish(c, r, n, total[r * PANEL_OUTPUTS + n]);
}

#ifndef AMX_EMULATED
const struct matmul_kernels matmul_amx
#else
static const struct matmul_kernels matmul_amx_emulated
#endif
    = {
        .panel =
            {[WEIGHT_BF16] = panel_bf16, [WEIGHT_INT8] = panel_int8, [WEIGHT_INT4] = panel_int4},
        .rows_max = {[WEIGHT_BF16] = AMX_ROWS, [WEIGHT_INT8] = AMX_ROWS, [WEIGHT_INT4] = AMX_ROWS},
        .row_major = {[WEIGHT_BF16] = true, [WEIGHT_INT8] = true, [WEIGHT_INT4] = true},
};
