/* The simulator: the real engine on one thread with a false clock, a false wire and false workers.
 *
 * A seed decides everything: groups, faults, requests, cancels. The workers apply the plans to
 * blocks that hold, instead of keys and values, the hash of the prefix written into them; so a wrong
 * block table, a block freed too early, a missing copy or a stale prefix gives a wrong token, and
 * every token is compared with a direct computation. */
#pragma once
#include "base/err.h"
#include <stdint.h>

/* `heddle sim [--seeds N] [--seed-base B] [--trace FILE ...]` and `heddle replay FILE`. */
int sim_main(int argc, char **argv);
int replay_main(int argc, char **argv);
