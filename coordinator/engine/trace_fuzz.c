/* Whatever a trace file holds, reading it ends with rows or an error. */
#include "coordinator/engine/sim_timed.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    (void)trace_check((const char *)data, size);
    return 0;
}
