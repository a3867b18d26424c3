/* What the implementations of rpc.h share: the head of a call, its outgoing queue, and the decision
 * whether a server takes a call. Only the files rpc*.c include it. */
#pragma once
#include "proto/rpc.h"

#include <pthread.h>
#include <stdatomic.h>

struct rpc_bytes {
    atomic_int refs;
    size_t n;
    char *data; /* [n]: inside, or memory taken from a buf */
    char inside[];
};

/* A ring of counted messages; whoever owns it brings the lock. */
struct rpc_fifo {
    struct rpc_bytes **items; /* [capacity] */
    size_t head, n, capacity, bytes, limit;
};
enum { RPC_FIFO_MESSAGES_MAX = 1 << 16 };
/* ERR_FULL, ERR_NO_MEMORY; adds a count of its own. */
enum err rpc_fifo_push(struct rpc_fifo *f, struct rpc_bytes *b);
struct rpc_bytes *rpc_fifo_pop(struct rpc_fifo *f); /* NULL when empty; the count goes along */
void rpc_fifo_fini(struct rpc_fifo *f);

struct rpc_call_ops {
    enum err (*send)(struct rpc_call *c, struct rpc_bytes *bytes);
    size_t (*pending)(struct rpc_call *c);
    void (*half_close)(struct rpc_call *c);
    void (*finish)(struct rpc_call *c, int code, const char *text);
    void (*cancel)(struct rpc_call *c);
    void (*hold)(struct rpc_call *c, bool on);
    struct span (*metadata)(const struct rpc_call *c, const char *key);
    void (*free)(struct rpc_call *c); /* the last count is gone */
};

struct rpc_call {
    const struct rpc_call_ops *ops;
    atomic_int refs;
    _Atomic(void *) user;
    const struct rpc_method *method; /* server; NULL for a refused call and on the client */
    struct rpc_handler handler;      /* client */
    int64_t deadline_us;             /* clock_monotonic_us; INT64_MAX = none */
    char path[128], peer[80], peer_name[128];
};

struct rpc_server_ops {
    int (*port)(const struct rpc_server *s);
    bool (*drain)(struct rpc_server *s, int timeout_ms);
    void (*destroy)(struct rpc_server *s);
};
struct rpc_server {
    const struct rpc_server_ops *ops;
    struct rpc_method methods[RPC_METHODS_MAX];
    size_t n_methods, message_bytes_max;
    char *token, *address;
    bool (*authorize)(void *ctx, const char *path, struct span bearer);
    void *authorize_ctx;
    uint32_t n_calls_max;
    atomic_uint n_calls;
};
enum err rpc_server_init(struct rpc_server *s, const struct rpc_server_config *config);
void rpc_server_fini(struct rpc_server *s);

/* Counts the call in (rpc_server_leave counts it out) and finds its method. NULL: refused with
 * out_code and out_text; it is counted all the same. */
const struct rpc_method *rpc_server_admit(struct rpc_server *s, const char *path,
                                          struct span authorization, int *out_code,
                                          const char **out_text);
static inline void rpc_server_leave(struct rpc_server *s)
{
    atomic_fetch_sub(&s->n_calls, 1);
}

struct rpc_channel_ops {
    enum err (*open)(struct rpc_channel *ch, const char *path, int timeout_ms,
                     const struct rpc_handler *handler, struct rpc_call **out);
    void (*destroy)(struct rpc_channel *ch);
};
struct rpc_channel {
    const struct rpc_channel_ops *ops;
    char *address, *bearer; /* "Bearer TOKEN" or NULL */
    size_t send_bytes_max, message_bytes_max;
};
enum err rpc_channel_init(struct rpc_channel *ch, const struct rpc_channel_config *config);
void rpc_channel_fini(struct rpc_channel *ch);

enum err rpc_net_server_create(const struct rpc_server_config *config, struct rpc_server **out);
enum err rpc_net_channel_create(const struct rpc_channel_config *config, struct rpc_channel **out);
enum err rpc_local_server_create(const struct rpc_server_config *config, struct rpc_server **out);
enum err rpc_local_channel_create(const struct rpc_channel_config *config,
                                  struct rpc_channel **out);
