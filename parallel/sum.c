/* See sum.h. Four lanes at a time; the order per element is the ranks' order. */
#include "parallel/sum.h"

typedef float lanes __attribute__((vector_size(16), aligned(4), may_alias));

static void sum_two(float *out, const float *a, const float *b, int64_t n)
{
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
        lanes x0 = *(const lanes *)(a + i) + *(const lanes *)(b + i);
        lanes x1 = *(const lanes *)(a + i + 4) + *(const lanes *)(b + i + 4);
        lanes x2 = *(const lanes *)(a + i + 8) + *(const lanes *)(b + i + 8);
        lanes x3 = *(const lanes *)(a + i + 12) + *(const lanes *)(b + i + 12);
        *(lanes *)(out + i) = x0;
        *(lanes *)(out + i + 4) = x1;
        *(lanes *)(out + i + 8) = x2;
        *(lanes *)(out + i + 12) = x3;
    }
    for (; i < n; i++)
        out[i] = a[i] + b[i];
}

void sum_in_rank_order(float *out, const float *const *parts, int n_parts, int64_t n)
{
    int64_t i = 0;
    if (n_parts == 2) {
        sum_two(out, parts[0], parts[1], n);
        return;
    }
    for (; i + 4 <= n; i += 4) {
        lanes x = *(const lanes *)(parts[0] + i);
        for (int r = 1; r < n_parts; r++)
            x += *(const lanes *)(parts[r] + i);
        *(lanes *)(out + i) = x;
    }
    for (; i < n; i++) {
        float x = parts[0][i];
        for (int r = 1; r < n_parts; r++)
            x += parts[r][i];
        out[i] = x;
    }
}
