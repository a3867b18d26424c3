/* Goal: ranks are dealt out to nodes as the kernel lists them, and strange lists are errors.
 * Method: folders made here in the shape of /sys/devices/system/node. */
#include "base/mem.h"
#include "parallel/numa.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmocka.h>

static char root[64];

static void node_write(int id, const char *cpulist)
{
    char path[128];
    snprintf(path, sizeof path, "%s/node%d", root, id);
    assert_int_equal(mkdir(path, 0700), 0);
    if (!cpulist) return;
    snprintf(path, sizeof path, "%s/node%d/cpulist", root, id);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(cpulist, f);
    fclose(f);
}

static int root_make(void **state)
{
    (void)state;
    snprintf(root, sizeof root, "/tmp/heddle-numa-XXXXXX");
    return !mkdtemp(root);
}

static int root_remove(void **state)
{
    char path[128];
    (void)state;
    for (int id = 0; id < NUMA_NODES_MAX; id++) {
        snprintf(path, sizeof path, "%s/node%d/cpulist", root, id);
        unlink(path);
        snprintf(path, sizeof path, "%s/node%d", root, id);
        rmdir(path);
    }
    return rmdir(root);
}

static cpu_set_t cores_of(const char *text)
{
    cpu_set_t cores;
    assert_int_equal(numa_cores_parse(text, &cores), OK);
    return cores;
}

static void test_lists(void **state)
{
    static const char *const wrong[] = {
        "x",    "1-",   "-1",   "3-1", "1,,2", "1,", "1 2", "0-3:1", "99999999999999",
        "5000", "1\n2", "1-2-3"};
    cpu_set_t cores = cores_of("0-3,8,10-11\n");
    (void)state;
    assert_int_equal(CPU_COUNT(&cores), 7);
    assert_true(CPU_ISSET(3, &cores) && CPU_ISSET(8, &cores) && CPU_ISSET(11, &cores));
    assert_false(CPU_ISSET(9, &cores));
    cores = cores_of("");
    assert_int_equal(CPU_COUNT(&cores), 0);
    cores = cores_of("\n");
    assert_int_equal(CPU_COUNT(&cores), 0);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        if (numa_cores_parse(wrong[i], &cores) != ERR_FORMAT) fail_msg("'%s' was taken", wrong[i]);
}

static void test_two_sockets(void **state)
{
    cpu_set_t all = cores_of("0-15"), few = cores_of("0-1");
    struct numa_map map;
    int index;
    (void)state;
    node_write(0, "0-3,8-11\n");
    node_write(2, "4-7,12-15\n"); /* numbers have holes */
    node_write(3, "\n");          /* memory alone */
    assert_int_equal(numa_map_read(root, &all, &map), OK);
    assert_int_equal(map.n, 2);
    assert_int_equal(map.ids[1], 2);
    assert_int_equal(CPU_COUNT(&map.cores[1]), 8);
    static const int of_four[] = {0, 0, 1, 1}, of_three[] = {0, 0, 1};
    for (int r = 0; r < 4; r++) {
        assert_int_equal(numa_choose(&map, NUMA_AUTO, r, 4, &index), OK);
        assert_int_equal(index, of_four[r]);
    }
    for (int r = 0; r < 3; r++) {
        assert_int_equal(numa_choose(&map, NUMA_AUTO, r, 3, &index), OK);
        assert_int_equal(index, of_three[r]);
    }
    assert_int_equal(numa_choose(&map, NUMA_AUTO, 0, 1, &index), OK);
    assert_int_equal(index, -1); /* one rank spreads over both */
    assert_int_equal(numa_choose(&map, 2, 0, 1, &index), OK);
    assert_int_equal(index, 1);
    assert_int_equal(numa_choose(&map, 1, 0, 1, &index), ERR_INVALID);
    assert_int_equal(numa_choose(&map, 3, 0, 1, &index), ERR_INVALID);
    /* a container that may use two cores sees one node */
    assert_int_equal(numa_map_read(root, &few, &map), OK);
    assert_int_equal(map.n, 1);
    assert_int_equal(CPU_COUNT(&map.cores[0]), 2);
}

static void test_strange_hosts(void **state)
{
    cpu_set_t all = cores_of("0-3");
    struct numa_map map;
    (void)state;
    assert_int_equal(numa_map_read("/nonexistent/node", &all, &map), OK);
    assert_int_equal(map.n, 1);
    assert_int_equal(CPU_COUNT(&map.cores[0]), 4);
    assert_int_equal(numa_map_read(root, &all, &map), OK); /* a folder without nodes */
    assert_int_equal(map.n, 1);
    node_write(0, "0-1\n");
    node_write(1, "2-\n");
    assert_int_equal(numa_map_read(root, &all, &map), ERR_FORMAT);
    assert_non_null(strstr(err_detail(), "node1/cpulist"));
    node_write(5, NULL); /* no list at all */
    assert_int_not_equal(numa_map_read(root, &all, &map), OK);
}

static void test_wishes(void **state)
{
    static const char *const wrong[] = {"", "on", "1x", "-2", "64", "999999999999"};
    int wish;
    (void)state;
    assert_int_equal(numa_wish_read("off", &wish), OK);
    assert_int_equal(wish, NUMA_OFF);
    assert_int_equal(numa_wish_read("auto", &wish), OK);
    assert_int_equal(wish, NUMA_AUTO);
    assert_int_equal(numa_wish_read("3", &wish), OK);
    assert_int_equal(wish, 3);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        if (numa_wish_read(wrong[i], &wish) != ERR_INVALID) fail_msg("'%s' was taken", wrong[i]);
}

/* On this very host: whatever it has, the process keeps at least one core. */
static void test_bind_here(void **state)
{
    cpu_set_t before, after;
    int n_sharing;
    (void)state;
    assert_int_equal(sched_getaffinity(0, sizeof before, &before), 0);
    assert_int_equal(numa_bind(NUMA_OFF, 0, 2, &n_sharing), OK);
    assert_int_equal(n_sharing, 2);
    assert_int_equal(numa_bind(NUMA_AUTO, 0, 1, &n_sharing), OK);
    assert_int_equal(n_sharing, 1);
    assert_int_equal(sched_getaffinity(0, sizeof after, &after), 0);
    assert_true(CPU_COUNT(&after) >= 1);
    assert_int_equal(numa_bind(NUMA_NODES_MAX - 1, 0, 1, &n_sharing), ERR_INVALID);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_lists),
        cmocka_unit_test_setup_teardown(test_two_sockets, root_make, root_remove),
        cmocka_unit_test_setup_teardown(test_strange_hosts, root_make, root_remove),
        cmocka_unit_test(test_wishes),
        cmocka_unit_test(test_bind_here),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
