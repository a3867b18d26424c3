/* Whatever bytes come, decoding ends with a plan or an error; a plan that was decoded can be said
 * again and is then the same. */
#include "proto/plan.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct arena arena;
    struct step_plan plan, again;
    struct step_result result;
    struct buf bytes, twice;
    arena_init(&arena, 1 << 14, 1 << 26);
    buf_init(&bytes, 0);
    buf_init(&twice, 0);
    if (!plan_decode(data, size, &arena, &plan) && !plan_encode(&plan, &bytes)) {
        if (plan_decode(bytes.data, bytes.n, &arena, &again) || plan_encode(&again, &twice))
            abort();
        if (bytes.n != twice.n || memcmp(bytes.data, twice.data, bytes.n)) abort();
    }
    buf_clear(&bytes);
    if (!step_result_decode(data, size, &arena, &result))
        (void)step_result_encode(&result, false, &bytes);
    struct moved moved;
    buf_clear(&bytes);
    if (!moved_decode(data, size, &arena, &moved)) (void)moved_encode(&moved, &bytes);
    buf_fini(&bytes);
    buf_fini(&twice);
    arena_fini(&arena);
    return 0;
}
