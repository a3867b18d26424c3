/* Any bytes are a packed checkpoint: refused with words, or every weight it holds can be read to
 * its last output. */
#include "base/safetensors.h"
#include "worker/packed.h"

#include <stdint.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void weight_read(const struct safetensors *s, enum weight_format format, const char *stem)
{
    enum { OUT = 33, IN = 130 };
    for (int biased = 0; biased < 2; biased++) {
        struct packed_weight w = {.format = format, .n_out = OUT, .n_in = IN};
        struct packed_parts parts;
        struct hash128 want;
        float row[IN];
        if (packed_find(s, stem, biased, &w, &parts, &want)) {
            ASSERT(*err_detail());
            continue;
        }
        for (int64_t r = 0; r < OUT; r++)
            backend_cpu.packed_row(&w, r, row);
        if (packed_verify(s, &parts, want, backend_cpu.packed_digest(&w))) ASSERT(*err_detail());
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct safetensors *s;
    struct packed_file p;
    bool packed;
    if (safetensors_open_bytes("fuzz", data, size, &s)) return 0;
    if (packed_read(s, &packed, &p))
        ASSERT(*err_detail());
    else if (packed) {
        weight_read(s, p.format, "layers.0.qkv");
        weight_read(s, p.head_format, "lm_head");
    }
    safetensors_close(s);
    return 0;
}
