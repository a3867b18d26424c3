/* Node lists of the kernel, the dealing out of ranks, and the two calls that bind. */
#include "parallel/numa.h"
#include "base/buf.h"
#include "base/log.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { FILE_BYTES_MAX = 1 << 16, MEMORY_PREFERRED = 1, MEMORY_INTERLEAVE = 3 };

/* A decimal number below CPU_SETSIZE. */
static bool number_take(const char **at, int *out)
{
    const char *p = *at;
    int value = 0;
    if (*p < '0' || *p > '9') return false;
    for (; *p >= '0' && *p <= '9'; p++) {
        value = value * 10 + (*p - '0');
        if (value >= CPU_SETSIZE) return false;
    }
    *at = p;
    *out = value;
    return true;
}

enum err numa_cores_parse(const char *text, cpu_set_t *out)
{
    cpu_set_t cores;
    const char *p = text;
    CPU_ZERO(&cores);
    while (*p && *p != '\n') {
        int first, last;
        if (!number_take(&p, &first)) FAIL(ERR_FORMAT, "'%.64s' is no list of cores", text);
        last = first;
        if (*p == '-' && (p++, !number_take(&p, &last)))
            FAIL(ERR_FORMAT, "'%.64s' is no list of cores", text);
        if (last < first || (*p && *p != '\n' && *p != ',') ||
            (*p == ',' && (!p[1] || p[1] == '\n')))
            FAIL(ERR_FORMAT, "'%.64s' is no list of cores", text);
        for (int i = first; i <= last; i++)
            CPU_SET((size_t)i, &cores);
        if (*p == ',') p++;
    }
    if (*p == '\n' && p[1]) FAIL(ERR_FORMAT, "'%.64s' is no list of cores", text);
    *out = cores;
    return OK;
}

static enum err node_read(const char *root, int id, const cpu_set_t *allowed, struct numa_map *m)
{
    char path[512];
    struct buf text;
    struct stat st;
    cpu_set_t cores;
    snprintf(path, sizeof path, "%s/node%d", root, id);
    if (stat(path, &st)) return OK; /* numbers may have holes */
    snprintf(path, sizeof path, "%s/node%d/cpulist", root, id);
    buf_init(&text, FILE_BYTES_MAX);
    enum err e = buf_read_file(&text, path, FILE_BYTES_MAX);
    if (!e && numa_cores_parse(buf_string(&text), &cores))
        e = err_set(ERR_FORMAT, "%s: not a list of cores", path);
    buf_fini(&text);
    if (e) return e;
    CPU_AND(&m->cores[m->n], &cores, allowed);
    m->ids[m->n] = id;
    m->n += CPU_COUNT(&m->cores[m->n]) > 0; /* memory without cores, or not for us */
    return OK;
}

enum err numa_map_read(const char *root, const cpu_set_t *allowed, struct numa_map *out)
{
    struct numa_map m = {0};
    struct stat st;
    for (int id = 0; id < NUMA_NODES_MAX && !stat(root, &st); id++)
        TRY(node_read(root, id, allowed, &m));
    if (!m.n) {
        m.n = 1;
        m.cores[0] = *allowed;
    }
    *out = m;
    return OK;
}

enum err numa_wish_read(const char *text, int *out_wish)
{
    char *end;
    long n = strtol(text, &end, 10);
    if (!strcmp(text, "off"))
        *out_wish = NUMA_OFF;
    else if (!strcmp(text, "auto"))
        *out_wish = NUMA_AUTO;
    else if (end != text && !*end && n >= -1 && n < NUMA_NODES_MAX)
        *out_wish = (int)n;
    else
        FAIL(ERR_INVALID, "--numa '%.32s': off, auto or the number of a node", text);
    return OK;
}

enum err numa_choose(const struct numa_map *map, int wish, int local_rank, int n_local,
                     int *out_index)
{
    if (wish == NUMA_AUTO) {
        *out_index = n_local < map->n ? -1 : (int)((long)local_rank * map->n / n_local);
        return OK;
    }
    for (int i = 0; i < map->n; i++) {
        if (map->ids[i] != wish) continue;
        *out_index = i;
        return OK;
    }
    FAIL(ERR_INVALID, "--numa %d: this process may use no core of such a node", wish);
}

/* Pages come from these nodes: the one preferred, or several in turn. */
static bool memory_bind(const struct numa_map *map, int index)
{
    unsigned long nodes = 0;
    for (int i = 0; i < map->n; i++)
        if (index < 0 || index == i) nodes |= 1ul << map->ids[i];
    return !syscall(SYS_set_mempolicy, index < 0 ? MEMORY_INTERLEAVE : MEMORY_PREFERRED, &nodes,
                    (unsigned long)NUMA_NODES_MAX + 1);
}

enum err numa_bind(int wish, int local_rank, int n_local, int *out_n_sharing)
{
    struct numa_map map;
    cpu_set_t allowed;
    int index;
    *out_n_sharing = n_local;
    if (wish == NUMA_OFF) return OK;
    if (sched_getaffinity(0, sizeof allowed, &allowed))
        FAIL(ERR_IO, "--numa: the cores of this process are unknown: %s", strerror(errno));
    TRY(numa_map_read("/sys/devices/system/node", &allowed, &map));
    TRY(numa_choose(&map, wish, local_rank, n_local, &index));
    if (map.n == 1) {
        log_info("--numa: this host has one node; nothing to place");
        return OK;
    }
    if (index >= 0 && sched_setaffinity(0, sizeof map.cores[index], &map.cores[index]))
        FAIL(ERR_IO, "--numa: node %d: %s", map.ids[index], strerror(errno));
    if (!memory_bind(&map, index)) log_warn("--numa: memory is not placed: %s", strerror(errno));
    if (index < 0) {
        log_info("--numa: %d ranks on %d nodes: pages lie on all in turn; --tp %d would keep each "
                 "rank's beside its cores",
                 n_local, map.n, map.n);
        return OK;
    }
    if (wish == NUMA_AUTO) *out_n_sharing = 0;
    for (int r = 0, other; wish == NUMA_AUTO && r < n_local; r++)
        *out_n_sharing += !numa_choose(&map, wish, r, n_local, &other) && other == index;
    log_info("--numa: rank %d of this host on node %d, %d cores", local_rank, map.ids[index],
             CPU_COUNT(&map.cores[index]));
    return OK;
}
