/* The workers' port: ranks dial it, join, form groups, and get plans.
 *
 * A group (one data-parallel replica) forms when all its ranks have joined: every rank gets a
 * Welcome with a new epoch, they open their collective through Exchange, say Ready, and the engine
 * hears group_up. Losing any rank ends the epoch: group_down at once, the survivors are told Halt,
 * keep their weights and get a new Welcome when the lost rank has joined again.
 *
 * Knows ranks, epochs and bytes; never a request, a token or what a plan says. It reaches the
 * engine only through the hooks, so tests put fakes there. */
#pragma once
#include "coordinator/engine/engine.h"
#include "proto/rpc.h"

enum { CLUSTER_RANKS_MAX = 256 }; /* of one group */

/* group_up and group_down come from the cluster's own thread, in order and never at once; result
 * from a polling thread: copy and return. A hook may call cluster_send_plan. */
struct cluster_hooks {
    void (*group_up)(void *ctx, uint32_t group, const struct group_info *info);
    void (*group_down)(void *ctx, uint32_t group, uint64_t epoch);
    /* Bytes of a FromWorker with rank 0's StepResult, of the group's living epoch. */
    void (*result)(void *ctx, uint32_t group, uint64_t epoch, const void *bytes, size_t n);
    void *ctx;
    /* May be NULL. A rank was lost while its process still held the stream, and has not come back
     * within stuck_ms: it hangs, and whoever started it should end it. From the cluster's thread. */
    void (*rank_stuck)(void *ctx, uint32_t group, uint32_t rank, const char *host, uint32_t pid);
    /* Bytes of a FromWorker with a rank's Moved, of the group's living epoch; may be NULL. */
    void (*moved)(void *ctx, uint32_t group, uint64_t epoch, uint32_t rank, const void *bytes,
                  size_t n);
};

struct cluster_config {
    const char *address; /* "0.0.0.0:9100", "unix:/path", "local:NAME"; port 0 picks one */
    const char *token;   /* the cluster token; NULL only where nobody else can reach the port */
    struct rpc_tls tls;
    uint32_t n_groups;        /* data-parallel replicas expected: --dp */
    uint32_t n_ranks;         /* tensor-parallel ranks of each: --tp */
    const char *model_digest; /* NULL = that of the first rank to join */
    uint32_t vocab_size;      /* 0 = that of the first rank to join */
    uint32_t heartbeat_ms;    /* 0 = 500 */
    uint32_t dead_ms;         /* silence that loses a rank; 0 = 2000 */
    uint32_t join_timeout_ms; /* a stream that has not joined by then is ended; 0 = 10000 */
    uint32_t form_timeout_ms; /* from Welcome to the last Ready; 0 = 120000 */
    uint32_t stuck_ms;        /* from its loss until a rank that does not return is called stuck; 0 =
                                 5000 */
    uint32_t n_pending_max;   /* streams that have not joined; more are refused; 0 = 64 */
};

struct cluster;
/* Binds the port and listens. ERR_IO when it is taken, ERR_INVALID for impossible numbers. */
enum err cluster_create(const struct cluster_config *config, const struct cluster_hooks *hooks,
                        struct cluster **out);
/* Ends every stream; no hook is called after it returns. Accepts NULL. */
void cluster_destroy(struct cluster *c);
int cluster_port(const struct cluster *c);

/* Queues the same bytes (a ToWorker with a StepPlan) to every rank of the group; any thread.
 * Copies. ERR_PEER: the group is not up, or the plan's epoch is not its epoch (group_down was or
 * will be called). A rank that does not read what it is sent is lost. */
enum err cluster_send_plan(struct cluster *c, uint32_t group, const void *bytes, size_t n);
/* The engine's watchdog found the group stuck: its epoch ends and every rank must join again.
 * Ignored when the epoch is over already. Never blocks; group_down is called later. */
void cluster_group_failed(struct cluster *c, uint32_t group, uint64_t epoch, const char *why);
/* Tells every rank (of one group, or CLUSTER_ALL) to finish what was sent and leave. */
enum { CLUSTER_ALL = -1 };
void cluster_drain(struct cluster *c, int32_t group);

/* ---- What /health, /metrics and `heddle top` show ----------------------------------------------
 */

enum cluster_rank_state {
    CLUSTER_RANK_ABSENT,
    CLUSTER_RANK_JOINED,
    CLUSTER_RANK_WELCOMED,
    CLUSTER_RANK_READY
};
struct cluster_rank_status {
    enum cluster_rank_state state;
    uint32_t pid;
    uint64_t incarnation;
    char host[64], device[96], peer[64];
    uint64_t weight_bytes, block_bytes, blocks_max, host_blocks_max;
    int64_t heard_ago_us;                        /* since anything was heard of it; -1 = never */
    int64_t joined_ago_us;                       /* -1 while absent */
    uint64_t last_step;                          /* the last step it answered or acknowledged */
    uint32_t compute_us, wait_us, collective_us; /* of that step */
    int64_t skew_us;   /* how much later than the first rank it answered its last step */
    uint32_t n_losses; /* times this rank was lost */
};
enum cluster_group_state { CLUSTER_GROUP_JOINING, CLUSTER_GROUP_FORMING, CLUSTER_GROUP_UP };
struct cluster_group_status {
    enum cluster_group_state state;
    uint64_t epoch; /* the last one begun; 0 = never */
    uint32_t n_joined, n_ready, n_losses;
    uint64_t n_plans, n_results, plan_bytes;
    int64_t up_ago_us;   /* -1 while not up */
    char last_loss[160]; /* why its last epoch ended; "" = never */
};
struct cluster_status {
    uint32_t n_groups, n_ranks, n_groups_up, n_joined, n_pending;
    uint64_t n_refused; /* streams turned away since the start */
    char model_digest[72], model_name[128];
    struct cluster_group_status *groups; /* [n_groups] */
    struct cluster_rank_status *ranks;   /* [n_groups, n_ranks] */
};
/* A consistent copy; the caller frees it. */
enum err cluster_status_create(struct cluster *c, struct cluster_status **out);
void cluster_status_destroy(struct cluster_status *s); /* accepts NULL */
/* How many groups are up, without a copy: for readiness. */
uint32_t cluster_groups_up(struct cluster *c);
