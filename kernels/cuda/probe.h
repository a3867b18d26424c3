/* Whether a GPU can be used, and if not, why. */
#pragma once
#include "base/err.h"

/* ERR_DEVICE with the cause: no driver, a driver too old, no such GPU, a GPU too old.
 * out_capability: 80, 90, ... */
enum err cuda_probe(int device, int *out_capability);
