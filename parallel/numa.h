/* Which node's cores and memory a rank takes on a host with several.
 *
 * Ranks of one host are dealt out to its nodes in order; a rank that has a node keeps its threads
 * there and takes memory there first, so weights and KV that its threads write lie beside them. One
 * rank alone on several nodes spreads its pages over all of them. Called before the first thread
 * and the first large allocation. Knows cores, nodes and ranks; never a tensor. */
#pragma once
#include "base/err.h"
#include <sched.h>
#include <stdbool.h>

enum { NUMA_NODES_MAX = 64 };
struct numa_map {
    int n;                           /* nodes with cores that this process may use */
    int ids[NUMA_NODES_MAX];         /* their numbers */
    cpu_set_t cores[NUMA_NODES_MAX]; /* what of each it may use */
};

/* Reads nodeN/cpulist below root ("/sys/devices/system/node"), for the cores in allowed. A host
 * without that folder has one node, 0, with all of them. ERR_FORMAT names the file. */
enum err numa_map_read(const char *root, const cpu_set_t *allowed, struct numa_map *out);
/* "0-3,8,10-11" and a newline or not; ERR_FORMAT. */
enum err numa_cores_parse(const char *text, cpu_set_t *out);

enum numa_wish { NUMA_OFF = -1, NUMA_AUTO = -2 }; /* or the number of a node */
/* "off", "auto" or a number. ERR_INVALID. */
enum err numa_wish_read(const char *text, int *out_wish);
/* Index into map of the node for local rank of n_local, -1 = all of them. ERR_INVALID: no such
 * node. */
enum err numa_choose(const struct numa_map *map, int wish, int local_rank, int n_local,
                     int *out_index);
/* Binds this thread, and those it will make, and their memory. Logs what was done and why not more.
 * *out_n_sharing: ranks of this host that share the cores it now has. */
enum err numa_bind(int wish, int local_rank, int n_local, int *out_n_sharing);
