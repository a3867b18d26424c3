/* A test program that runs itself under mpirun, and a bootstrap through a folder of files, so that
 * MPI is entered by what is tested and by nothing else. */
#pragma once
#include "base/clock.h"
#include "parallel/collective.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

struct folder {
    const char *path;
    int rank, size;
};

static inline bool mpirun_is_child(void)
{
    return getenv("HEDDLE_TEST_FOLDER") != NULL;
}

static inline struct folder mpirun_folder(void)
{
    return (struct folder){getenv("HEDDLE_TEST_FOLDER"),
                           (int)strtol(getenv("OMPI_COMM_WORLD_RANK"), NULL, 10),
                           (int)strtol(getenv("OMPI_COMM_WORLD_SIZE"), NULL, 10)};
}

/* Each rank leaves a file of this key; whole, because it is renamed into place. */
static inline enum err folder_exchange(void *ctx, const char *key, const void *mine, size_t n,
                                       void *out)
{
    static int round;
    struct folder *f = ctx;
    char path[300], draft[320];
    round++;
    snprintf(path, sizeof path, "%s/%d-%s-%d", f->path, round, key, f->rank);
    snprintf(draft, sizeof draft, "%s.draft", path);
    FILE *file = fopen(draft, "wb");
    if (!file || fwrite(mine, 1, n, file) != n || fclose(file) || rename(draft, path))
        FAIL(ERR_IO, "%s", path);
    for (int r = 0; r < f->size; r++) {
        snprintf(path, sizeof path, "%s/%d-%s-%d", f->path, round, key, r);
        for (int tries = 0; !(file = fopen(path, "rb")); tries++) {
            if (tries > 3000) FAIL(ERR_TIMEOUT, "%s never came", path);
            clock_sleep_us(10000);
        }
        if (fread((char *)out + (size_t)r * n, 1, n, file) != n) FAIL(ERR_IO, "%s", path);
        fclose(file);
    }
    return OK;
}

/* Runs this program as n ranks; its exit status. 77 where there is no mpirun. Leaks are not looked
 * for: MPI unloads modules that still hold memory. */
static inline int mpirun_self(int n)
{
    char self[256], command[900], dir[] = "/tmp/heddle-mpi-XXXXXX";
    ssize_t length = readlink("/proc/self/exe", self, sizeof self - 1);
    if (system("command -v mpirun > /dev/null")) return 77;
    if (length < 0 || !mkdtemp(dir)) return 1;
    self[length] = 0;
    snprintf(command, sizeof command,
             "OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 timeout 120 mpirun "
             "--oversubscribe --bind-to none "
             "--mca mpi_yield_when_idle 1 -x HEDDLE_TEST_FOLDER=%s -x ASAN_OPTIONS=detect_leaks=0 "
             "-np %d %s; status=$?; rm -rf "
             "%s; exit $status",
             dir, n, self, dir);
    int status = system(command);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}
