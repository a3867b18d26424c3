/* Options of a rank, as the worker wants them. */
#pragma once
#include "cli/options.h"
#include "worker/worker.h"

/* Strings stay those of the options. */
void worker_config_from_options(const struct options *o, const char *model, struct worker_config *out);
