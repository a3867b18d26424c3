/* The tile instructions as matmul_amx.c uses them: the compiler's, or the same in plain C.
 *
 * With AMX_EMULATED the instructions are functions over eight tiles in memory, after the operation
 * sections of Intel's manual (TILELOADD, TILESTORED, TDPBSUD, TDPBF16PS): so tests run the kernels
 * on any CPU. Speed and permission of the real unit are all that this leaves unproved. */
#pragma once
#include "kernels/half.h"

struct amx_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
};

#ifndef AMX_EMULATED
#include <immintrin.h>
#define AMX_CONFIG(c)             _tile_loadconfig(c)
#define AMX_RELEASE()             _tile_release()
#define AMX_ZERO(t)               _tile_zero(t)
#define AMX_LOAD(t, from, stride) _tile_loadd(t, from, stride)
#define AMX_STORE(t, to, stride)  _tile_stored(t, to, stride)
#define AMX_DOT_INT8(c, a, b)     _tile_dpbsud(c, a, b)
#define AMX_DOT_BF16(c, a, b)     _tile_dpbf16ps(c, a, b)
#else
static _Thread_local struct amx_config amx_config;
static _Thread_local uint8_t amx_tiles[8][16][64];
#define AMX_CONFIG(c)             amx_set(c)
#define AMX_RELEASE()             memset(&amx_config, 0, sizeof amx_config)
#define AMX_ZERO(t)               memset(amx_tiles[t], 0, sizeof amx_tiles[t])
#define AMX_LOAD(t, from, stride) amx_load(t, from, stride)
#define AMX_STORE(t, to, stride)  amx_store(t, to, stride)
#define AMX_DOT_INT8(c, a, b)     amx_dot(c, a, b, 0)
#define AMX_DOT_BF16(c, a, b)     amx_dot(c, a, b, 1)

static void amx_set(const struct amx_config *c)
{
    amx_config = *c;
    memset(amx_tiles, 0, sizeof amx_tiles);
}

static void amx_load(int t, const void *from, int64_t stride)
{
    memset(amx_tiles[t], 0, sizeof amx_tiles[t]);
    for (int r = 0; r < amx_config.rows[t]; r++)
        memcpy(amx_tiles[t][r], (const uint8_t *)from + r * stride, amx_config.bytes_per_row[t]);
}

static void amx_store(int t, void *to, int64_t stride)
{
    for (int r = 0; r < amx_config.rows[t]; r++)
        memcpy((uint8_t *)to + r * stride, amx_tiles[t][r], amx_config.bytes_per_row[t]);
}

static float amx_half(const uint8_t *p)
{
    uint16_t h;
    memcpy(&h, p, 2);
    return bf16_to_float(h);
}

/* One element: four products of signed by unsigned bytes, or two of BF16. */
static void amx_element(uint8_t *sum, const uint8_t *a, const uint8_t *b, int bf16)
{
    if (bf16) {
        float s;
        memcpy(&s, sum, 4);
        s += amx_half(a) * amx_half(b);
        s += amx_half(a + 2) * amx_half(b + 2);
        memcpy(sum, &s, 4);
        return;
    }
    int32_t s;
    memcpy(&s, sum, 4);
    for (int i = 0; i < 4; i++)
        s += (int8_t)a[i] * (int32_t)b[i];
    memcpy(sum, &s, 4);
}

static void amx_dot(int c, int a, int b, int bf16)
{
    for (int m = 0; m < amx_config.rows[c]; m++)
        for (int k = 0; k < amx_config.bytes_per_row[a] / 4; k++)
            for (int n = 0; n < amx_config.bytes_per_row[c] / 4; n++)
                amx_element(&amx_tiles[c][m][4 * n], &amx_tiles[a][m][4 * k],
                            &amx_tiles[b][k][4 * n], bf16);
}
#endif
