/* The loops over rows for any CPU. See rows_kernels.h. */
#include "kernels/cpu/rows_kernels.h"

ROW_KERNELS(rows_plain)
