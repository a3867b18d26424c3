/* Any bytes are a file: refused with words, or every tensor it names is readable to its last byte.
 */
#include "base/safetensors.h"

#include <stdint.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct safetensors *s;
    volatile uint8_t sink = 0;
    if (safetensors_open_bytes("fuzz", data, size, &s)) {
        ASSERT(*err_detail());
        return 0;
    }
    for (size_t i = 0; i < safetensors_count(s); i++) {
        const struct st_tensor *t = safetensors_at(s, i);
        ASSERT(safetensors_find(s, t->name) == t);
        for (size_t b = 0; b < t->bytes; b++)
            sink = (uint8_t)(sink + ((const uint8_t *)t->data)[b]);
    }
    safetensors_close(s);
    return 0;
}
