/* The table of merges, shared by what fills it and what encodes with it. */
#pragma once
#include "coordinator/text/model.h"

static inline size_t bpe_merge_home(const struct model *m, uint64_t pair)
{
    return (size_t)((pair * 0x9e3779b97f4a7c15u) >> 32 ^ pair) & (m->n_merge_slots - 1);
}

/* Where the pair is, or would go. */
static inline size_t bpe_merge_slot(const struct model *m, uint64_t pair)
{
    size_t mask = m->n_merge_slots - 1, i = bpe_merge_home(m, pair);
    while (m->merges[i].pair != pair && m->merges[i].pair != MERGE_NONE)
        i = (i + 1) & mask;
    return i;
}
