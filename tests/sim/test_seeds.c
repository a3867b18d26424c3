/* Goal: the engine under faults keeps every promise. Method: seeds of the simulator, one after the
 * other; each compares every token with a direct computation and checks every block after each
 * event. HEDDLE_SIM_SEEDS and HEDDLE_SIM_BASE choose others. */
#include "coordinator/engine/sim.h"

#include <stdio.h>
#include <stdlib.h>

/* Seeds that once failed, and what was wrong. */
static const char *const old_failures[] = {
    "1908999", /* two sequences held all blocks, each wanted one more, and neither could be preempted */
};

static int run_old_failures(void)
{
    int failed = 0;
    for (size_t i = 0; i < sizeof old_failures / sizeof *old_failures; i++) {
        char base[32];
        snprintf(base, sizeof base, "%s", old_failures[i]);
        char *arguments[] = {(char[]){"sim"}, (char[]){"--seeds"}, (char[]){"1"}, (char[]){"--seed-base"}, base, NULL};
        failed |= sim_main(5, arguments);
    }
    return failed;
}

int main(void)
{
    char seeds[] = "10000", base[] = "1";
    char *arguments[] = {
        (char[]){"sim"},         (char[]){"--seeds"},       getenv("HEDDLE_SIM_SEEDS"),
        (char[]){"--seed-base"}, getenv("HEDDLE_SIM_BASE"), NULL};
    if (!arguments[2]) arguments[2] = seeds;
    if (!arguments[4]) arguments[4] = base;
    int failed = run_old_failures();
    return sim_main(5, arguments) | failed;
}
