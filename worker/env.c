/* Who am I: rank and size from flags, or from whatever launched the process. */
#include "worker/worker.h"

#include <stdlib.h>
#include <string.h>

static const struct {
    const char *rank, *size, *who;
} launchers[] = {
    {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "Open MPI"},
    {"PMI_RANK", "PMI_SIZE", "PMI"},
    {"LWS_WORKER_INDEX", "LWS_GROUP_SIZE", "LeaderWorkerSet"},
    {"SLURM_PROCID", "SLURM_NTASKS", "Slurm"},
    {"PMIX_RANK", "PMIX_SIZE", "PMIx"},
};

void worker_config_default(struct worker_config *config)
{
    memset(config, 0, sizeof *config);
    config->rank = config->size = config->device_index = -1;
}

/* -1 when absent. */
static enum err number_read(const char *name, int *out)
{
    const char *text = getenv(name);
    char *end;
    *out = -1;
    if (!text || !*text) return OK;
    long n = strtol(text, &end, 10);
    if (*end || n < 0 || n > 1 << 20)
        FAIL(ERR_INVALID, "environment: %s='%.32s' is no number", name, text);
    *out = (int)n;
    return OK;
}

/* The device of a rank that was given none: its place among the ranks of its host. */
static enum err device_index_find(struct worker_config *c)
{
    static const char *const names[] = {"OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID",
                                        "SLURM_LOCALID", "PMIX_LOCAL_RANK"};
    for (size_t i = 0; i < sizeof names / sizeof *names && c->device_index < 0; i++)
        TRY(number_read(names[i], &c->device_index));
    if (c->device_index < 0) c->device_index = c->rank;
    return OK;
}

enum err worker_rank_find(struct worker_config *c)
{
    int rank = -1, size = -1;
    const char *who = "flags";
    for (size_t i = 0; i < sizeof launchers / sizeof *launchers && rank < 0; i++) {
        TRY(number_read(launchers[i].rank, &rank));
        TRY(number_read(launchers[i].size, &size));
        if (size < 0)
            rank = -1; /* a rank without a size says nothing */
        else
            who = launchers[i].who;
    }
    if (c->size < 0) c->size = c->rank >= 0 ? c->rank + 1 : rank >= 0 ? size : 1;
    /* several replicas may share one launch: ranks count on through them */
    if (c->rank < 0 && rank >= 0) c->replica += rank / c->size;
    if (c->rank < 0) c->rank = rank >= 0 ? rank % c->size : 0;
    if (c->rank >= c->size) FAIL(ERR_INVALID, "rank %d of %d (from %s)", c->rank, c->size, who);
    return device_index_find(c);
}
