/* Starts the worker ranks of this machine and keeps them running.
 *
 * One mpirun (or one plain process) a replica, each in its own process group, each killed with this
 * process. A group that dies of a signal is started again, with a growing pause; a rank that leaves
 * with exit code 1 before it ever worked has said why it never can, and everything stops. */
#pragma once
#include "base/arena.h"
#include "base/conf.h"
#include "base/err.h"
#include <stdbool.h>
#include <stdint.h>

struct launcher;
enum { LAUNCH_WORKER_ARGS_MAX = 2 * CONF_ROWS_MAX + 16 };
struct launch_config {
    int n_replicas, tp;
    bool use_mpirun;
    const char *hostfile, *mpirun_args; /* NULL = none */
    const char *const *worker_args;     /* NULL-terminated, fewer than LAUNCH_WORKER_ARGS_MAX; what
                                           follows `heddle worker` */
    const char *token;                  /* goes to the ranks through the environment */
    int restarts_max;                   /* within an hour */
};

enum err launcher_create(const struct launch_config *config, struct launcher **out);
/* From now on who leaves is not started again: the ranks are being told to. Any thread. */
void launcher_rest(struct launcher *l);
/* Stops every rank: SIGTERM, and SIGKILL after grace_ms. */
void launcher_destroy(struct launcher *l, int grace_ms);
/* Kills a process with SIGKILL if it is one of this launcher's ranks on this host; it is started
 * again like any that dies. Any thread. */
void launcher_kill(struct launcher *l, const char *host, uint32_t pid);
/* True when a rank refused to work: the supervisor has sent SIGTERM to this process. */
bool launcher_failed(const struct launcher *l);
