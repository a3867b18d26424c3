/* Goal: real traces replay to their end, and the prefix cache finds what it could find at most.
 * Method: the hit count of an unbounded cache over the Mooncake trace equals the one computed
 * beside it by another program; the first rows of both traces run through the cost model.
 *
 * usage: test_sim_trace [--trace FILE ...] runs `heddle sim` with these arguments instead. */
#include "base/json.h"
#include "coordinator/engine/sim.h"
#include "coordinator/engine/sim_timed.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static int fail(const char *what)
{
    printf("%s: %s\n", what, err_detail());
    return 1;
}

static int check_hits(const char *folder)
{
    char path[4096];
    json_t *stats;
    int64_t want_blocks = 0, want_hits = 0;
    uint64_t blocks, hits;
    snprintf(path, sizeof path, "%s/traces/mooncake_synthetic_trace.stats.json", folder);
    if (json_parse_file(path, 1 << 20, &stats)) return fail("stats");
    enum err e = json_read_int(stats, "blocks_total", 1, INT64_MAX, &want_blocks);
    if (!e) e = json_read_int(stats, "infinite_cache_prefix_hit_blocks", 1, INT64_MAX, &want_hits);
    json_decref(stats);
    if (e) return fail("stats");
    snprintf(path, sizeof path, "%s/traces/mooncake_synthetic_trace.jsonl", folder);
    if (trace_unbounded(path, &blocks, &hits)) return fail("trace");
    printf("blocks %llu of %lld, found %llu of %lld\n", (unsigned long long)blocks,
           (long long)want_blocks, (unsigned long long)hits, (long long)want_hits);
    return (int64_t)blocks != want_blocks || (int64_t)hits != want_hits;
}

int main(int argc, char **argv)
{
    const char *folder = getenv("HEDDLE_CONFORMANCE");
    char path[4096];
    if (argc > 1) return sim_main(argc, argv);
    snprintf(path, sizeof path, "%s/traces/AzureLLMInferenceTrace_code.csv", folder ? folder : "");
    if (!folder || access(path, R_OK)) {
        printf("skipped: %s is absent\n", path);
        return 77;
    }
    char *azure[] = {(char[]){"sim"},        (char[]){"--trace"}, path,
                     (char[]){"--requests"}, (char[]){"400"},     NULL};
    if (sim_main(5, azure)) return 1;
    return check_hits(folder);
}
