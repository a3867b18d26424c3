/* Whatever a record says, replaying it ends with a result or an error. */
#include "coordinator/engine/record.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct replay found;
    (void)replay_bytes(data, size, &found);
    return 0;
}
