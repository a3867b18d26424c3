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
/* Rows [row, row + n_rows) of in, normed and packed into cpu->activations. */
void activations_pack(struct cpu_backend *cpu, const struct weight *w, const struct norm_input *in,
                      int64_t row, int n_rows);
