/* Sums in rank order, shared by the collectives of CPU tensors: bitwise the same wherever it runs.
 */
#pragma once
#include <stdint.h>

/* out[i] = ((parts[0][i] + parts[1][i]) + parts[2][i]) + ... ; out may be any one of the parts. */
void sum_in_rank_order(float *out, const float *const *parts, int n_parts, int64_t n);
