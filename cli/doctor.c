/* heddle doctor: what this machine has and lacks for serving, one line each. */
#include "cli/verbs.h"
#include "kernels/backend.h"

#include <stdio.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

static int n_bad;

static void line(bool good, const char *what, const char *words)
{
    printf("%-4s %-18s %s\n", good ? "ok" : "--", what, words);
    n_bad += !good;
}

static void check_cpu(void)
{
    char words[256] = "";
    static const char *const names[] = {"avx2", "fma", "avx512f", "avx512vnni", "avx512bf16"};
    bool has[] = {__builtin_cpu_supports("avx2"), __builtin_cpu_supports("fma"), __builtin_cpu_supports("avx512f"),
                  __builtin_cpu_supports("avx512vnni"), __builtin_cpu_supports("avx512bf16")};
    size_t n = (size_t)snprintf(words, sizeof words, "%ld cores:", sysconf(_SC_NPROCESSORS_ONLN));
    for (size_t i = 0; i < sizeof has / sizeof *has; i++)
        if (has[i]) n += (size_t)snprintf(words + n, sizeof words - n, " %s", names[i]);
    line(has[0] && has[1], "CPU", words);
}

static void check_device(void)
{
    struct backend_options options = {.n_threads = 1, .numa_node = -1, .n_slots_max = 1, .n_tokens_max = 1, .n_rows_max = 1, .vocab_size = 1};
    struct backend *b;
    if (backend_open("cuda", &options, &b) == OK) {
        line(true, "CUDA", b->ops->name);
        b->ops->close(b);
    } else printf("no   %-18s %s\n", "CUDA", err_detail());
}

static void check_program(const char *program, const char *why)
{
    char words[512], path[4096];
    snprintf(words, sizeof words, "%s not found: %s", program, why);
    const char *dirs = "/usr/local/bin:/usr/bin:/bin:/opt/openmpi/bin";
    for (const char *p = dirs; *p;) {
        size_t n = strcspn(p, ":");
        snprintf(path, sizeof path, "%.*s/%s", (int)n, p, program);
        if (!access(path, X_OK)) {
            line(true, program, path);
            return;
        }
        p += n + (p[n] == ':');
    }
    line(false, program, words);
}

static void check_shared_memory(void)
{
    struct statvfs fs;
    char words[128];
    if (statvfs("/dev/shm", &fs)) {
        line(false, "/dev/shm", "missing; ranks of one host cannot share memory");
        return;
    }
    double mib = (double)fs.f_bavail * (double)fs.f_frsize / 1048576;
    snprintf(words, sizeof words, "%.0f MiB free%s", mib, mib < 64 ? "; ranks want 64 MiB (docker: --shm-size 1g)" : "");
    line(mib >= 64, "/dev/shm", words);
}

static void check_memory(void)
{
    char words[128];
    double gib = (double)sysconf(_SC_AVPHYS_PAGES) * (double)sysconf(_SC_PAGESIZE) / 1073741824;
    snprintf(words, sizeof words, "%.1f GiB free", gib);
    line(gib > 1, "memory", words);
}

int verb_doctor(struct conf *c, struct options *o)
{
    (void)c, (void)o;
    check_cpu();
    check_memory();
    check_shared_memory();
    check_program("mpirun", "ranks are started one by one instead (--launcher fork)");
    check_device();
    return n_bad ? 1 : 0;
}
