/* Goal: the engine under faults keeps every promise. Method: seeds of the simulator, one after the
 * other; each compares every token with a direct computation and checks every block after each
 * event. HEDDLE_SIM_SEEDS and HEDDLE_SIM_BASE choose others. */
#include "coordinator/engine/sim.h"

#include <stdlib.h>

int main(void)
{
    char seeds[] = "10000", base[] = "1";
    char *arguments[] = {
        (char[]){"sim"},         (char[]){"--seeds"},       getenv("HEDDLE_SIM_SEEDS"),
        (char[]){"--seed-base"}, getenv("HEDDLE_SIM_BASE"), NULL};
    if (!arguments[2]) arguments[2] = seeds;
    if (!arguments[4]) arguments[4] = base;
    return sim_main(5, arguments);
}
