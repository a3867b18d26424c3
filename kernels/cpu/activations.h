/* Activations of one matmul as the microkernels read them: packed row by row into words, normed
 * just before where that is asked for, or packed from the results of the product before.
 *
 * Rows are split evenly into row panels of at most rows_max rows, each [n_steps][rows] words of 4
 * bytes. Knows nothing of weights but their shape. */
#pragma once
#include "kernels/cpu/cpu.h"

/* Row panels are equal but for one row that the first n_taller have more. */
static inline int row_panel_first(const struct activations *a, int i)
{
    return i * a->panel_rows + (i < a->n_taller ? i : a->n_taller);
}

/* The shape of n_rows rows for a weight; the memory stays. */
void activations_shape(const struct cpu_backend *cpu, struct activations *a, const struct weight *w,
                       int n_rows);
/* Rows that each thread packs for itself; pack is NULL when they are packed already. */
struct own_rows {
    quantize_kernel *pack;
    const float *x;
    int64_t stride;
};

/* Rows [row, row + n_rows) of in, normed and packed into cpu->activations. Few rows without a norm
 * are left to the threads: what one core packs is another's only line by line, and with the cores
 * far apart that takes longer than packing. */
struct own_rows activations_pack(struct cpu_backend *cpu, const struct weight *w,
                                 const struct norm_input *in, int64_t row, int n_rows);
/* The same, and never left to the threads. */
void activations_pack_once(struct cpu_backend *cpu, const struct weight *w,
                           const struct norm_input *in, int64_t row, int n_rows);
/* Packs rows of shape a into memory of the thread's own, OWN_ROWS_BYTES, 64-byte aligned. */
void own_rows_pack(const struct own_rows *own, const struct activations *a, void *memory);
/* What was packed there. */
const struct activations *own_rows_packed(const void *memory);
