/* The simulator's entry. */
#include "coordinator/engine/sim.h"

#include <stdio.h>

int sim_main(int argc, char **argv)
{
    (void)argc, (void)argv;
    fprintf(stderr, "heddle sim: not built yet\n");
    return 2;
}
