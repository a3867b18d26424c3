/* The choice of a collective. */
#include "parallel/collective.h"
