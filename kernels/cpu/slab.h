/* Memory of packed weights: large stretches of huge pages from which weights are cut one after
 * another.
 *
 * A weight of its own mapping is seldom aligned to huge pages, and a core's prefetchers stop at the
 * end of every small page. Knows nothing of what is stored. */
#pragma once
#include "base/err.h"
#include <stddef.h>
#include <stdint.h>

struct slab; /* one stretch */
struct slabs {
    struct slab *first;
};

/* Zeroed bytes, aligned to a page; they go back with slab_give. */
enum err slab_take(struct slabs *slabs, size_t bytes, uint8_t **out, struct slab **out_slab);
/* Frees the stretch with the last piece of it. slab may be NULL. */
void slab_give(struct slabs *slabs, struct slab *slab);
