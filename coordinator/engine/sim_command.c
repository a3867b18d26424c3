/* `heddle sim`: many seeds, or one again. */
#include "coordinator/engine/sim.h"
#include "coordinator/engine/sim_timed.h"

#include <inttypes.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static volatile uint64_t current_seed;

static void print_seed(void)
{
    char line[64];
    int n = snprintf(line, sizeof line, "seed %" PRIu64 "\n", current_seed);
    if (n > 0 && write(STDOUT_FILENO, line, (size_t)n) < 0) return;
}

static void on_abort(int number)
{
    print_seed();
    signal(number, SIG_DFL);
    raise(number);
}

/* Present when a sanitizer is linked in: it ends the process without a signal. */
void __sanitizer_set_death_callback(void (*callback)(void)) __attribute__((weak));

static void add(struct sim_report *sum, const struct sim_report *one)
{
    uint64_t *to = (uint64_t *)sum;
    const uint64_t *from = (const uint64_t *)one;
    for (size_t i = 0; i < sizeof *sum / sizeof *to; i++)
        to[i] += from[i];
}

static int run_seeds(uint64_t base, uint64_t n_seeds)
{
    struct sim_report sum = {0}, one;
    uint64_t n_failed = 0;
    clock_t start = clock();
    for (uint64_t i = 0; i < n_seeds; i++) {
        current_seed = base + i;
        enum err e = sim_run(base + i, &one);
        if (e) {
            printf("seed %" PRIu64 ": %s\n", base + i, err_detail());
            fflush(stdout);
            if (++n_failed == 10) break;
        }
        add(&sum, &one);
    }
    double seconds = (double)(clock() - start) / CLOCKS_PER_SEC;
    printf("%" PRIu64 " seeds from %" PRIu64 ", %" PRIu64 " failed: %" PRIu64
           " steps (%.0f/s), %" PRIu64 " requests, %" PRIu64 " refused, %" PRIu64
           " tokens, %" PRIu64 " group losses, %" PRIu64 " preemptions, %" PRIu64
           " swapped in, %" PRIu64 " forks, %" PRIu64 "/%" PRIu64 " drafts kept (%" PRIu64
           "/%" PRIu64 " of draft models), %" PRIu64 " cached tokens, %" PRIu64 " of host, %" PRIu64
           " of disk, %" PRIu64 " saves, %" PRIu64 " spills, %" PRIu64
           " transfers failed, %.1f s of CPU\n",
           n_seeds, base, n_failed, sum.n_steps, (double)sum.n_steps / seconds, sum.n_accepted,
           sum.n_refused, sum.n_tokens, sum.n_losses, sum.n_preemptions, sum.n_swaps, sum.n_forks,
           sum.n_drafts_kept, sum.n_drafts, sum.n_own_kept, sum.n_own, sum.n_hits, sum.n_host_hits,
           sum.n_disk_hits, sum.n_saves, sum.n_spills, sum.n_io_failures, seconds);
    return n_failed ? 1 : 0;
}

static bool read_number(const char *text, uint64_t *out)
{
    char *end;
    *out = strtoull(text, &end, 10);
    return *text >= '0' && *text <= '9' && !*end;
}

int sim_main(int argc, char **argv)
{
    uint64_t n_seeds = 1000, base = 1;
    bool good = true;
    if (argc > 1 && !strcmp(argv[1], "--trace")) return trace_main(argc - 2, argv + 2);
    for (int i = 1; i < argc; i++) {
        if (!strcmp(argv[i], "--seeds") && i + 1 < argc)
            good = read_number(argv[++i], &n_seeds);
        else if (!strcmp(argv[i], "--seed-base") && i + 1 < argc)
            good = read_number(argv[++i], &base);
        else
            good = false;
        if (!good) {
            fprintf(stderr,
                    "usage: heddle sim [--seeds N] [--seed-base B]\n"
                    "       heddle sim --trace FILE [--groups N] [--blocks N] "
                    "[--block-size N] [--slots N]\n"
                    "                  [--budget TOKENS] [--requests N] [--speed X]\n"
                    "                  [--step-us X] [--token-us X] [--row-us X]\n"
                    "                  [--routers 1: and the same behind routers that guess]\n");
            return 2;
        }
    }
    signal(SIGABRT, on_abort);
    if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(print_seed);
    return run_seeds(base, n_seeds);
}
