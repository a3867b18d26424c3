/* The inside of the cluster, shared by its three files: cluster.c (the object, its thread, status),
 * membership.c (streams and joining) and group.c (epochs, welcome, exchange, ready).
 *
 * Everything is guarded by one mutex, which is never held while a hook runs. A function named
 * ..._locked, and all of group.c, is called with it held. */
#pragma once
#include "coordinator/cluster/cluster.h"
#include "proto/cluster.pb-c.h"
#include "proto/envelope.h"

#include <pthread.h>

/* Field numbers of the oneofs of FromWorker and ToWorker. */
enum {
    FROM_JOIN = 1,
    FROM_READY,
    FROM_RESULT,
    FROM_ACK,
    FROM_EXCHANGE,
    FROM_HEARTBEAT,
    FROM_LEAVE,
    FROM_FAULT,
    FROM_MOVED
};
enum {
    CLUSTER_PROTOCOL = 1,
    SMALL_BYTES_MAX = 256 << 10, /* of a message that is neither a result nor an ack */
    EXCHANGES_MAX = 16,          /* keys open at once in a group */
    EXCHANGE_BYTES_MAX = 64 << 10,
    EXCHANGE_KEY_MAX = 64,
    RANKS_TOTAL_MAX = 1 << 16
};

enum stream_state { STREAM_PENDING, STREAM_CLAIMING, STREAM_JOINED, STREAM_DEAD };
/* One Attach call. Claiming: it asks for a place whose holder may be dead; decided by the next
 * heartbeat of the holder or by its silence. */
struct stream {
    struct rpc_call *call;
    struct stream *next, **link; /* in cluster.pending while pending or claiming */
    enum stream_state state;
    uint32_t group, rank;
    int64_t opened_us, claimed_us;
    Heddle__Cluster__FromWorker *join; /* while claiming and joined */
};

struct rank {
    struct stream *stream; /* NULL while absent */
    enum cluster_rank_state state;
    int64_t heard_us, joined_us, skew_us;
    uint64_t last_step;
    uint32_t compute_us, wait_us, collective_us, n_losses;
    uint32_t stuck_pid; /* 0 = none: the process that was lost alive */
    int64_t stuck_us;   /* when */
    char stuck_host[64];
};

struct exchange {
    char key[EXCHANGE_KEY_MAX];
    struct rpc_bytes **parts; /* [n_ranks]; NULL = not given yet. NULL array = free place */
    uint32_t n_given;
};

struct group {
    uint32_t index;
    enum cluster_group_state state;
    uint64_t epoch;      /* the last begun */
    uint64_t told_epoch; /* the engine believes that this one is up; 0 = none */
    struct rank *ranks;  /* [n_ranks] */
    uint32_t n_joined, n_ready, n_losses;
    uint64_t n_plans, n_results, plan_bytes, epoch_plans, last_plan_step;
    uint64_t skew_step;
    int64_t skew_first_us, formed_us, up_us;
    struct group_info info;
    char key[33], last_loss[160];
    struct exchange exchanges[EXCHANGES_MAX];
    bool dirty; /* in cluster.dirty: the engine has to be told something */
    struct group *dirty_next;
};

struct cluster {
    struct cluster_config config;
    struct cluster_hooks hooks;
    char *address, *token;
    struct rpc_server *server;
    pthread_t monitor;
    bool has_monitor;
    pthread_mutex_t mutex; /* of all that follows */
    pthread_cond_t work;
    bool stop;
    uint64_t epochs;      /* begun so far */
    struct group *groups; /* [n_groups] */
    struct rank *ranks;   /* [n_groups, n_ranks] */
    struct stream *pending;
    struct group *dirty;
    uint32_t n_pending, n_joined, n_groups_up, block_size, vocab_size;
    uint64_t n_refused;
    char model_digest[72], model_name[128];
};

/* membership.c */
void cluster_stream_open(struct rpc_call *call, void *ctx);
void cluster_stream_message(struct rpc_call *call, void *ctx, struct span bytes);
void cluster_stream_half_close(struct rpc_call *call, void *ctx);
void cluster_stream_close(struct rpc_call *call, void *ctx, bool cancelled);
bool cluster_authorize(void *ctx, const char *path, struct span bearer);
/* Takes the place away from whoever holds it, if anyone, and ends its stream. */
void rank_lose(struct cluster *c, struct group *g, uint32_t rank, bool refuse, const char *format,
               ...) __attribute__((format(printf, 5, 6)));
/* Before rank_lose, when the process itself may be what hangs. */
void rank_suspect(struct cluster *c, struct group *g, uint32_t rank);
/* Late joiners, silent ranks, claims; returns nothing, may change every list. */
void membership_tick(struct cluster *c, int64_t now_us);
/* Copies words from the wire for logs and status: printable ASCII, cut to size. */
void words_copy(char *out, size_t size, const char *from);

/* group.c */
void group_try_form(struct cluster *c, struct group *g, int64_t now_us);
/* Ends the living epoch, if any: survivors are told, the engine will be. */
void group_end_epoch(struct cluster *c, struct group *g, const char *why);
void group_ready(struct cluster *c, struct group *g, uint32_t rank, uint64_t epoch, int64_t now_us);
/* Returns NULL, or what is wrong with the message. */
const char *group_exchange(struct cluster *c, struct group *g, uint32_t rank,
                           const Heddle__Cluster__Exchange *x);
void group_heard_step(struct group *g, uint32_t rank, struct span body, uint64_t step,
                      int64_t now_us);
void group_tick(struct cluster *c, struct group *g, int64_t now_us);
void cluster_group_fini(struct cluster *c, struct group *g);
void group_mark_dirty(struct cluster *c, struct group *g);
