/* The choice of a collective: every rank says what it can, all read the same table, all choose
 * alike. */
#include "parallel/collective.h"
#include "base/buf.h"
#include "base/hash.h"
#include "base/log.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

static const struct collective_ops *const all[] = {&coll_none, &coll_nccl, &coll_shm, &coll_mpi};
enum { N_ALL = sizeof all / sizeof *all, WHY_BYTES = 160 };

/* What a rank tells the others before the choice. */
struct ballot {
    char forced[16];
    uint32_t can; /* bit i: all[i] */
    uint32_t pad;
    uint64_t host; /* equal on ranks that share /dev/shm */
    char why_not[N_ALL][WHY_BYTES];
};
_Static_assert(sizeof(struct ballot) <= BOOTSTRAP_BYTES_MAX, "a ballot travels in one exchange");

/* Boot of the kernel and mount of /dev/shm: containers with their own differ. */
static uint64_t host_identity(void)
{
    struct stat st;
    struct buf id;
    uint64_t words[2] = {0, 0};
    buf_init(&id, 0);
    if (!buf_read_file(&id, "/proc/sys/kernel/random/boot_id", 4096))
        words[0] = hash_bytes(buf_string(&id), id.n, 0).low;
    if (!stat("/dev/shm", &st)) words[1] = (uint64_t)st.st_dev;
    buf_fini(&id);
    return hash_bytes(words, sizeof words, 1).low;
}

static void ballot_fill(const char *name, struct backend *b, struct group g, struct ballot *out)
{
    memset(out, 0, sizeof *out);
    snprintf(out->forced, sizeof out->forced, "%s", name);
    out->host = host_identity();
    for (int i = 0; i < N_ALL; i++)
        if (all[i]->probe(b, g, out->why_not[i], WHY_BYTES)) out->can |= 1u << i;
}

/* Whether every rank can; else the words of the first that cannot. */
static bool everyone_can(int i, const struct ballot *ballots, struct group g, char *why,
                         size_t size)
{
    for (int r = 0; r < g.size; r++) {
        if (!(ballots[r].can >> i & 1)) {
            snprintf(why, size, "rank %d: %.*s", r, WHY_BYTES - 1, ballots[r].why_not[i]);
            return false;
        }
        if (all[i] == &coll_shm && ballots[r].host != ballots[0].host) {
            snprintf(why, size, "rank %d is on another host than rank 0", r);
            return false;
        }
    }
    return true;
}

static enum err choose(const char *name, const struct ballot *ballots, struct group g, int *out)
{
    char why[WHY_BYTES + 32] = "";
    bool automatic = !strcmp(name, "auto"), known = automatic;
    for (int r = 0; r < g.size; r++)
        if (strcmp(ballots[r].forced, ballots[0].forced))
            FAIL(ERR_INVALID, "collective: rank 0 wants '%.15s', rank %d '%.15s'",
                 ballots[0].forced, r, ballots[r].forced);
    for (int i = 0; i < N_ALL; i++) {
        if (!automatic && strcmp(name, all[i]->name)) continue;
        known = true;
        if (everyone_can(i, ballots, g, why, sizeof why)) {
            *out = i;
            return OK;
        }
        if (!automatic) FAIL(ERR_UNSUPPORTED, "collective %s was asked for, but %s", name, why);
        if (g.rank == 0 && g.size > 1 && all[i] != &coll_none)
            log_info("collective %s declined: %s", all[i]->name, why);
    }
    if (!known) FAIL(ERR_INVALID, "unknown collective '%.15s': auto, none, shm, mpi or nccl", name);
    FAIL(ERR_UNSUPPORTED, "no collective joins these %d ranks; the last one declined: %s", g.size,
         why);
}

enum err collective_open(const char *name, struct backend *b, struct group g,
                         const struct bootstrap *boot, const struct collective_options *options,
                         struct collective **out)
{
    static _Thread_local struct ballot mine, ballots[COLLECTIVE_RANKS_MAX];
    int chosen;
    ASSERT(g.size >= 1 && g.size <= COLLECTIVE_RANKS_MAX && g.rank >= 0 && g.rank < g.size);
    ballot_fill(name, b, g, &mine);
    ballots[0] = mine;
    if (g.size > 1) TRY(boot->exchange(boot->ctx, "collective", &mine, sizeof mine, ballots));
    TRY(choose(name, ballots, g, &chosen));
    if (g.rank == 0 && g.size > 1)
        log_info("collective %s joins %d ranks", all[chosen]->name, g.size);
    return all[chosen]->open(b, g, boot, options, out);
}

void collective_close(struct collective *c)
{
    if (c) c->ops->close(c);
}
