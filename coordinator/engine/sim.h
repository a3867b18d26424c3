/* The simulator: the real engine on one thread with a false clock, a false wire and false workers.
 *
 * A seed decides everything: groups, faults, requests, cancels. The workers apply the plans to
 * blocks that hold, instead of keys and values, the hash of the prefix written into them; so a
 * wrong block table, a block freed too early, a missing copy or a stale prefix gives a wrong token,
 * and every token is compared with a direct computation. */
#pragma once
#include "base/err.h"
#include <stdint.h>

struct sim_report { /* of one seed */
    uint64_t n_steps, n_tokens, n_accepted, n_refused, n_losses, n_preemptions, n_swaps, n_forks;
    uint64_t n_drafts, n_drafts_kept, n_own, n_own_kept, n_hits, n_plan_bytes;
    uint64_t n_host_hits, n_disk_hits, n_saves, n_spills, n_io_failures; /* hits in tokens */
};
/* Runs one seed. ERR_INTERNAL words what was wrong; a broken assertion prints the seed and ends the
 * process. */
enum err sim_run(uint64_t seed, struct sim_report *out);

/* `heddle sim [--seeds N] [--seed-base B] [--trace FILE ...]` and `heddle replay FILE`. */
int sim_main(int argc, char **argv);
int replay_main(int argc, char **argv);
