/* Goal: the engine under faults keeps every promise. Method: seeds of the simulator, one after the
 * other; each compares every token with a direct computation and checks every block after each
 * event. First the seeds that once found something. HEDDLE_SIM_SEEDS and HEDDLE_SIM_BASE choose
 * others. */
#include "coordinator/engine/sim.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>

static const uint64_t once_failed[] = {
    4,       /* a passed deadline ended a request again and again */
    7,       /* a paused slot was closed in the same plan */
    34,      /* rows of a scored prompt's second chunk */
    865,     /* one choice of a best_of was cancelled */
    2542,    /* slots waited for a close that no plan carried */
    1024686, /* beams of two searches waited for each other */
    1035749, /* a beam waited behind those that waited for it */
    2196883, /* a scored choice took its prompt from a sibling on another group */
    5364281, /* equal scores fell by slot and not by rank */
    1908999, /* all blocks held by two that each wanted one more, and neither could be preempted */
    309532,  /* a beam lost its candidates to stop ids */
};

int main(void)
{
    char seeds[] = "10000", base[] = "1";
    char *arguments[] = {
        (char[]){"sim"},         (char[]){"--seeds"},       getenv("HEDDLE_SIM_SEEDS"),
        (char[]){"--seed-base"}, getenv("HEDDLE_SIM_BASE"), NULL};
    for (size_t i = 0; i < sizeof once_failed / sizeof *once_failed; i++) {
        struct sim_report report;
        if (!sim_run(once_failed[i], &report)) continue;
        printf("seed %" PRIu64 ": %s\n", once_failed[i], err_detail());
        return 1;
    }
    if (!arguments[2]) arguments[2] = seeds;
    if (!arguments[4]) arguments[4] = base;
    return sim_main(5, arguments);
}
