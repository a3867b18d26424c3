/* Worker ranks as child processes, supervised by one thread. Knows no plan and no request. */
#include "cli/launch.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/mem.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum { WORDS_MAX = 128, ARGS_MAX = LAUNCH_WORKER_ARGS_MAX + WORDS_MAX + 32, RANKS_MAX = 64, PAUSE_MS_MIN = 100, PAUSE_MS_MAX = 10000, POLL_MS = 20 };
static const int64_t STEADY_US = 60 * 1000000ll, HOUR_US = 3600 * 1000000ll, WORKED_US = 10 * 1000000ll;

/* One child: the mpirun of a replica, or one rank of it. */
struct child {
    pid_t pid; /* 0 = not running */
    int replica, rank;
    int64_t started_us, start_at_us;
    int pause_ms;
    bool worked; /* once for a while: what fails now may pass */
};

struct launcher {
    struct launch_config config;
    struct child *children;
    int n_children;
    int n_restarts;
    int64_t first_restart_us;
    pthread_t thread;
    _Atomic bool stopping, resting, failed;
    struct arena arena; /* arguments */
    char self[4096];
};

static void add_words(struct launcher *l, const char **args, int *n, const char *words)
{
    char *copy, *save = NULL;
    if (!words || arena_copy_string(&l->arena, words, strlen(words), &copy)) return;
    for (char *word = strtok_r(copy, " ", &save); word; word = strtok_r(NULL, " ", &save)) args[(*n)++] = word;
}

static const char *number_text(struct launcher *l, int value)
{
    char text[16], *copy;
    snprintf(text, sizeof text, "%d", value);
    return arena_copy_string(&l->arena, text, strlen(text), &copy) ? "0" : copy;
}

/* mpirun -np TP … heddle worker …, or heddle worker … --rank R */
static void build_args(struct launcher *l, const struct child *child, const char **args)
{
    int n = 0;
    if (l->config.use_mpirun) {
        static const char *const fixed[] = {"mpirun", "--oversubscribe", "--bind-to", "none", "--mca",
                                            "mpi_yield_when_idle", "1", "--mca", "pml", "ob1", "-x",
                                            "HEDDLE_CLUSTER_TOKEN", "-x", "HEDDLE_SUPERVISED", "-np"};
        for (size_t i = 0; i < sizeof fixed / sizeof *fixed; i++) args[n++] = fixed[i];
        args[n++] = number_text(l, l->config.tp);
        if (l->config.hostfile) {
            args[n++] = "--hostfile";
            args[n++] = l->config.hostfile;
        }
        add_words(l, args, &n, l->config.mpirun_args);
    }
    args[n++] = l->self;
    args[n++] = "worker";
    for (const char *const *a = l->config.worker_args; *a; a++) args[n++] = *a;
    args[n++] = "--replica";
    args[n++] = number_text(l, child->replica);
    if (!l->config.use_mpirun) {
        args[n++] = "--rank";
        args[n++] = number_text(l, child->rank);
    }
    args[n] = NULL;
    ASSERT_CMP(n, <, ARGS_MAX); /* the words were counted, the worker's arguments have their own limit */
}

/* Between fork and exec only calls that are safe there. */
static _Noreturn void become(const char **args, pid_t parent)
{
    sigset_t none;
    int null = open("/dev/null", O_RDONLY);
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    setpgid(0, 0); /* a Ctrl-C at the terminal is ours to pass on */
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent) _exit(0);
    if (null >= 0) dup2(null, STDIN_FILENO);
    execvp(args[0], (char *const *)(void *)args);
    _exit(127);
}

static void start(struct launcher *l, struct child *child)
{
    const char *args[ARGS_MAX];
    pid_t parent = getpid();
    arena_reset(&l->arena);
    build_args(l, child, args);
    child->started_us = clock_monotonic_us();
    child->pid = fork();
    if (child->pid == 0) become(args, parent);
    if (child->pid < 0) {
        log_error("cannot start replica %d: %s", child->replica, strerror(errno));
        child->pid = 0;
        child->start_at_us = child->started_us + PAUSE_MS_MAX * 1000ll;
    }
}

static void give_up(struct launcher *l, const char *why)
{
    if (atomic_exchange(&l->failed, true)) return;
    log_error("%s", why);
    kill(getpid(), SIGTERM);
}

/* A child is gone: decide between starting it again and giving up. */
static void ended(struct launcher *l, struct child *child, int status)
{
    char how[96];
    int64_t now = clock_monotonic_us();
    int code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    child->pid = 0;
    if (atomic_load(&l->stopping) || atomic_load(&l->resting)) return;
    if (code == 127) {
        give_up(l, l->config.use_mpirun ? "mpirun cannot be run; install Open MPI or use --launcher fork" : "the worker cannot be run");
        return;
    }
    if (now - child->started_us > WORKED_US && code != 1) child->worked = true;
    if (code == 1 && !child->worked) {
        give_up(l, "a worker rank cannot work (its reason is above); stopping");
        return;
    }
    if (code > 128) snprintf(how, sizeof how, "killed by signal %d", code - 128);
    else snprintf(how, sizeof how, "exit code %d", code);
    if (now - child->started_us > STEADY_US) child->pause_ms = 0;
    child->pause_ms = child->pause_ms ? child->pause_ms * 2 : PAUSE_MS_MIN;
    if (child->pause_ms > PAUSE_MS_MAX) child->pause_ms = PAUSE_MS_MAX;
    child->start_at_us = now + child->pause_ms * 1000ll;
    if (now - l->first_restart_us > HOUR_US) l->n_restarts = 0;
    if (!l->n_restarts++) l->first_restart_us = now;
    log_warn("workers of replica %d ended: %s; starting again in %d ms", child->replica, how, child->pause_ms);
    if (l->n_restarts > l->config.restarts_max) give_up(l, "too many restarts within an hour; stopping");
}

static void *supervise(void *ctx)
{
    struct launcher *l = ctx;
    prctl(PR_SET_NAME, "supervisor");
    while (!atomic_load(&l->stopping)) {
        for (int i = 0; i < l->n_children; i++) {
            struct child *child = &l->children[i];
            int status;
            if (child->pid && waitpid(child->pid, &status, WNOHANG) == child->pid) ended(l, child, status);
            bool due = !child->pid && clock_monotonic_us() >= child->start_at_us;
            if (due && !atomic_load(&l->failed) && !atomic_load(&l->resting)) start(l, child);
        }
        clock_sleep_us(POLL_MS * 1000);
    }
    return NULL;
}

static int words_count(const char *words)
{
    int n = 0;
    for (const char *at = words ? words + strspn(words, " ") : ""; *at; n++) {
        at += strcspn(at, " ");
        at += strspn(at, " ");
    }
    return n;
}

enum err launcher_create(const struct launch_config *config, struct launcher **out)
{
    struct launcher *l;
    enum err e = OK;
    if (words_count(config->mpirun_args) > WORDS_MAX)
        FAIL(ERR_INVALID, "--mpirun-args: %d words, at most %d", words_count(config->mpirun_args), WORDS_MAX);
    TRY(MEM_NEW(&l));
    l->config = *config;
    arena_init(&l->arena, 8192, 0);
    int ranks = config->use_mpirun ? 1 : config->tp;
    l->n_children = config->n_replicas * ranks;
    ASSERT_CMP(ranks, <=, RANKS_MAX);
    TRY_OUT(MEM_NEW_ARRAY(l->n_children, &l->children));
    for (int i = 0; i < l->n_children; i++)
        l->children[i] = (struct child){.replica = i / ranks, .rank = i % ranks};
    ssize_t n = readlink("/proc/self/exe", l->self, sizeof l->self - 1);
    if (n <= 0) FAIL_OUT(ERR_IO, "the path of this program is unknown");
    if (config->token) setenv("HEDDLE_CLUSTER_TOKEN", config->token, 1);
    setenv("HEDDLE_SUPERVISED", "1", 1);
    if (!config->hostfile) setenv("HEDDLE_LOCAL_RANKS", number_text(l, config->n_replicas * config->tp), 1);
    setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 1);
    setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 1);
    if (pthread_create(&l->thread, NULL, supervise, l)) FAIL_OUT(ERR_NO_MEMORY, "no thread for the supervisor");
    *out = l;
    return OK;
out:
    mem_free(l->children);
    arena_fini(&l->arena);
    mem_free(l);
    return e;
}

static bool all_gone(struct launcher *l)
{
    bool gone = true;
    for (int i = 0; i < l->n_children; i++) {
        struct child *child = &l->children[i];
        if (child->pid && waitpid(child->pid, NULL, WNOHANG) == child->pid) child->pid = 0;
        gone = gone && !child->pid;
    }
    return gone;
}

void launcher_rest(struct launcher *l) { atomic_store(&l->resting, true); }

void launcher_destroy(struct launcher *l, int grace_ms)
{
    if (!l) return;
    atomic_store(&l->stopping, true);
    pthread_join(l->thread, NULL); /* its end alone sends SIGTERM too: PR_SET_PDEATHSIG watches it */
    for (int i = 0; i < l->n_children; i++)
        if (l->children[i].pid) kill(l->children[i].pid, SIGTERM);
    for (int waited = 0; !all_gone(l) && waited < grace_ms; waited += POLL_MS) clock_sleep_us(POLL_MS * 1000);
    for (int i = 0; i < l->n_children; i++)
        if (l->children[i].pid) {
            kill(-l->children[i].pid, SIGKILL);
            waitpid(l->children[i].pid, NULL, 0);
        }
    mem_free(l->children);
    arena_fini(&l->arena);
    mem_free(l);
}

/* The parent of a process, 0 = unknown. */
static pid_t parent_of(pid_t pid)
{
    char path[64], text[512] = "";
    snprintf(path, sizeof path, "/proc/%d/stat", (int)pid);
    FILE *f = fopen(path, "re");
    if (!f) return 0;
    size_t n = fread(text, 1, sizeof text - 1, f);
    fclose(f);
    text[n] = 0;
    const char *after = strrchr(text, ')'); /* the name may hold anything */
    int parent = 0;
    return after && sscanf(after, ") %*c %d", &parent) == 1 ? parent : 0;
}

void launcher_kill(struct launcher *l, const char *host, uint32_t pid)
{
    enum { DEPTH = 4 }; /* this process, mpirun, a daemon of it, the rank */
    char here[64] = "";
    pid_t at = (pid_t)pid;
    gethostname(here, sizeof here - 1);
    if (pid < 2 || strcmp(here, host)) return;
    for (int i = 0; i < DEPTH && at > 1 && at != getpid(); i++) at = parent_of(at);
    if (at != getpid() || atomic_load(&l->stopping)) return;
    log_warn("killing pid %u, which hangs", pid);
    kill((pid_t)pid, SIGKILL);
}

bool launcher_failed(const struct launcher *l) { return atomic_load(&l->failed); }
