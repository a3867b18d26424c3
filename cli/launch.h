/* Starts the worker ranks of this machine and keeps them running.
 *
 * One mpirun (or one plain process) a replica, each in its own process group, each killed with this
 * process. A group that dies of a signal is started again, with a growing pause; a rank that leaves
 * with exit code 1 has said why it never can work, and everything stops. */
#pragma once
#include "base/arena.h"
#include "base/err.h"
#include <stdbool.h>

struct launcher;
struct launch_config {
    int n_replicas, tp;
    bool use_mpirun;
    const char *hostfile, *mpirun_args; /* NULL = none */
    const char *const *worker_args;     /* NULL-terminated; what follows `heddle worker` */
    const char *token;                  /* goes to the ranks through the environment */
    int restarts_max;                   /* within an hour */
};

enum err launcher_create(const struct launch_config *config, struct launcher **out);
/* Stops every rank: SIGTERM, and SIGKILL after grace_ms. */
void launcher_destroy(struct launcher *l, int grace_ms);
/* True when a rank refused to work: the supervisor has sent SIGTERM to this process. */
bool launcher_failed(const struct launcher *l);
