/* Remote calls in a few verbs, over two implementations chosen by the address: "host:port" and
 * "unix:/path" are gRPC, "local:NAME" is another thread of this process with the same semantics.
 *
 * Threads: every server and channel has its own. They only poll and call the callbacks, so a
 * callback must return at once: copy, wake, return; never wait, compute or sleep in one. The
 * callbacks of one call never run at the same time; those of different calls may. All other
 * functions may be called from any thread, from inside callbacks too, but for create, destroy and
 * drain and the blocking rpc_unary.
 *
 * Knows bytes, paths, tokens and statuses; never what a message means. */
#pragma once
#include "base/buf.h"
#include "base/err.h"
#include <stdint.h>

enum {
    RPC_MESSAGE_BYTES_MAX = 64 << 20, /* of one message, both ways */
    RPC_SEND_BYTES_MAX = 8 << 20,     /* default bound of what waits to be sent on one call */
    RPC_METHODS_MAX = 64,             /* of one server */
    RPC_STATUS_TEXT_MAX = 512
};

/* The numbers of gRPC; err_grpc() gives the one of an enum err. */
enum rpc_code {
    RPC_OK = 0,
    RPC_CANCELLED = 1,
    RPC_UNKNOWN = 2,
    RPC_INVALID_ARGUMENT = 3,
    RPC_DEADLINE_EXCEEDED = 4,
    RPC_NOT_FOUND = 5,
    RPC_RESOURCE_EXHAUSTED = 8,
    RPC_FAILED_PRECONDITION = 9,
    RPC_ABORTED = 10,
    RPC_UNIMPLEMENTED = 12,
    RPC_INTERNAL = 13,
    RPC_UNAVAILABLE = 14,
    RPC_UNAUTHENTICATED = 16
};
/* The enum err that a status stands for; RPC_OK gives OK. */
enum err rpc_err(int code);

/* PEM files. A server needs cert and key; with ca it demands clients' certificates signed by it.
 * A client needs ca; with cert and key it shows its own. All NULL = plain text. Files are read
 * once, at create. The local implementation ignores them. */
struct rpc_tls {
    const char *ca_file, *cert_file, *key_file;
    const char *name_override; /* client: the name expected in the server's certificate */
};

struct rpc_server;
struct rpc_channel;
struct rpc_call;

/* ---- Messages -------------------------------------------------------------------------------- */

/* Bytes shared by count, so that one encoding goes to many calls without a copy. */
struct rpc_bytes;
enum err rpc_bytes_create(const void *data, size_t n, struct rpc_bytes **out); /* copies */
enum err rpc_bytes_take(struct buf *b, struct rpc_bytes **out); /* takes the memory, empties b */
struct rpc_bytes *rpc_bytes_acquire(struct rpc_bytes *b);
void rpc_bytes_release(struct rpc_bytes *b); /* accepts NULL */
struct span rpc_bytes_span(const struct rpc_bytes *b);

/* ---- Calls: both sides ------------------------------------------------------------------------
 */

/* Queues one message. FIFO, never blocks. ERR_FULL: more than the bound waits already (a lone
 * message is always taken); ERR_CANCELLED: the call is over, or was half-closed or finished by this
 * side; ERR_TOO_BIG. */
enum err rpc_send(struct rpc_call *call, const void *data, size_t n);
enum err rpc_send_shared(struct rpc_call *call, struct rpc_bytes *bytes); /* adds its own count */
size_t rpc_send_pending_bytes(struct rpc_call *call);
/* Client: no more messages from this side, after those queued. */
void rpc_half_close(struct rpc_call *call);
/* Server: ends the call after the messages queued. The first finish wins; text may be NULL. */
void rpc_finish(struct rpc_call *call, int code, const char *text);
/* Ends the call at once; what is queued is dropped. The peer sees RPC_CANCELLED. */
void rpc_cancel(struct rpc_call *call);
/* After rpc_hold no further on_message comes (inside on_message: from the next on) until
 * rpc_resume: the peer feels it by flow control. */
void rpc_hold(struct rpc_call *call);
void rpc_resume(struct rpc_call *call);
/* A call lives until its last callback has returned and every acquire is released. Using an
 * acquired call after its end is safe: sends answer ERR_CANCELLED, the rest does nothing. */
struct rpc_call *rpc_acquire(struct rpc_call *call);
void rpc_release(struct rpc_call *call); /* accepts NULL */
void rpc_set_user(struct rpc_call *call, void *user);
void *rpc_user(const struct rpc_call *call);

/* ---- Server ------------------------------------------------------------------------------------
 */

enum rpc_kind { RPC_UNARY, RPC_SERVER_STREAM, RPC_BIDI };
enum { RPC_PUBLIC = 1 }; /* asks for no token: health only */

/* Unary and server stream: exactly one on_message (a call without one is refused before on_open
 * matters), then answer with rpc_send and rpc_finish, from any thread at any time. */
struct rpc_method {
    const char *path; /* "/package.Service/Method" */
    enum rpc_kind kind;
    unsigned flags;
    size_t send_bytes_max;                             /* 0 = RPC_SEND_BYTES_MAX */
    void (*on_open)(struct rpc_call *call, void *ctx); /* may be NULL */
    void (*on_message)(struct rpc_call *call, void *ctx,
                       struct span bytes); /* bytes: this call only */
    /* Bidi: the client says no more. Just before a cancel it may come without having been said. */
    void (*on_half_close)(struct rpc_call *call, void *ctx); /* may be NULL: finishes with RPC_OK */
    /* Exactly once for every on_open. cancelled: the client left, cancelled or ran out of time, or
     * rpc_cancel; otherwise our finish was sent. */
    void (*on_close)(struct rpc_call *call, void *ctx, bool cancelled); /* may be NULL */
    void *ctx;
};

struct rpc_server_config {
    const char *address; /* "127.0.0.1:0" picks a port: rpc_server_port */
    const char *token;   /* NULL = none asked; else "authorization: Bearer TOKEN", constant time */
    /* When set, decides instead of token. bearer has n = 0 when there was none. */
    bool (*authorize)(void *ctx, const char *path, struct span bearer);
    void *authorize_ctx;
    struct rpc_tls tls;
    int n_threads;        /* polling threads; 0 = 1 */
    uint32_t n_calls_max; /* calls alive at once, more are refused RESOURCE_EXHAUSTED; 0 = 4096 */
    size_t message_bytes_max;         /* 0 = RPC_MESSAGE_BYTES_MAX */
    const struct rpc_method *methods; /* [n_methods], copied; paths must live */
    size_t n_methods;
};
/* ERR_IO: the address cannot be bound (another process has it). */
enum err rpc_server_create(const struct rpc_server_config *config, struct rpc_server **out);
int rpc_server_port(const struct rpc_server *s); /* 0 for unix and local */
uint32_t rpc_server_calls(struct rpc_server *s); /* alive now */
/* New calls are refused and connections told to go; returns true when every call has ended, false
 * when timeout_ms passed first. May be repeated. */
bool rpc_server_drain(struct rpc_server *s, int timeout_ms);
/* Cancels what is alive, waits for every on_close, frees. Accepts NULL. */
void rpc_server_destroy(struct rpc_server *s);

const char *rpc_peer(const struct rpc_call *call); /* "ipv4:127.0.0.1:40312"; lives with the call */
const char *rpc_peer_name(const struct rpc_call *call); /* of its certificate; "" without mTLS */
/* A value of the request's metadata by lower-case key; data is NULL when absent. */
struct span rpc_metadata(const struct rpc_call *call, const char *key);
const char *rpc_path(const struct rpc_call *call);
/* Time left until the client's deadline; INT64_MAX without one. */
int64_t rpc_time_left_us(const struct rpc_call *call);
/* Equality of a secret in time that depends on the secret's length only. */
bool rpc_token_equal(struct span given, const char *secret);

/* ---- Client -------------------------------------------------------------------------------------
 */

struct rpc_channel_config {
    const char *address;
    const char *token; /* sent as "authorization: Bearer TOKEN"; NULL = none */
    struct rpc_tls tls;
    size_t send_bytes_max;    /* of one call; 0 = RPC_SEND_BYTES_MAX */
    size_t message_bytes_max; /* 0 = RPC_MESSAGE_BYTES_MAX */
};
/* Does not connect yet: calls do, and connect again after a loss. */
enum err rpc_channel_create(const struct rpc_channel_config *config, struct rpc_channel **out);
/* Cancels what is alive, waits for every on_end, frees. Accepts NULL. */
void rpc_channel_destroy(struct rpc_channel *ch);

struct rpc_handler {
    void (*on_message)(struct rpc_call *call, void *ctx, struct span bytes);
    void (*on_end)(struct rpc_call *call, void *ctx, int code, const char *text); /* exactly once */
    void *ctx;
};
/* Opens a call of any kind; timeout_ms 0 = none. The caller owns one count of it (rpc_release).
 * An unreachable server is on_end with RPC_UNAVAILABLE, not an error here. */
enum err rpc_open(struct rpc_channel *ch, const char *path, int timeout_ms,
                  const struct rpc_handler *handler, struct rpc_call **out);
/* One request, one reply, waiting for it. The reply is appended to out_reply. A status other than
 * OK is FAILed as rpc_err(code) with the server's text; out_code (may be NULL) is always written.
 */
enum err rpc_unary(struct rpc_channel *ch, const char *path, struct span request, int timeout_ms,
                   struct buf *out_reply, int *out_code);
