/* The loops over rows in 512-bit vectors. See rows_kernels.h. */
#include "kernels/cpu/rows_kernels.h"

ROW_KERNELS(rows_avx512)
