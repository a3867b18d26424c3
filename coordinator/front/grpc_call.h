/* Private to grpc_front.c and grpc_generate.c: one call on its way through a loop.
 *
 * The polling threads of gRPC only copy the message and post a job; everything else happens on the
 * call's loop. A call is freed when gRPC has closed it and the loop is through with it. */
#pragma once
#include "coordinator/front/api.h"
#include "coordinator/front/grpc_front.h"
#include "coordinator/front/stream.h"
#include "proto/health.h"
#include "proto/reflection.h"
#include "proto/serve.pb-c.h"

struct grpc_call;
struct grpc_method {
    const char *path;
    enum rpc_kind kind;
    unsigned flags;
    void (*run)(struct grpc_call *c); /* on the loop; must end by grpc_call_end, now or later */
};

struct grpc_front {
    struct front *front;
    struct rpc_server *server;
    struct health *health;
    struct reflection *reflection;
    pthread_mutex_t mutex;
    struct grpc_call *generating; /* list of Generate calls alive, for Cancel */
};

struct grpc_call {
    struct front_job begin, closed, cancel;
    struct grpc_front *g;
    struct front_loop *loop;
    struct rpc_call *rpc; /* one count of ours */
    const struct grpc_method *method;
    struct buf message, reply;
    bool ended, gone;       /* we finished it; gRPC closed it */
    atomic_bool cancelling; /* the cancel job is on its way */
    /* Generate */
    struct stream_writer writer;
    struct stream *stream;
    struct api_call call;
    char id[132];
    struct grpc_call *next;
};

/* Ends the call towards the client: OK, or the error with err_detail's words. */
void grpc_call_end(struct grpc_call *c, enum err e, const char *why);
/* Packs and sends one message. ERR_FULL: the client does not read. */
enum err grpc_call_send(struct grpc_call *c, const ProtobufCMessage *message);
void grpc_generate(struct grpc_call *c);
/* The client left, or the call has ended: lets go of what Generate holds. */
void grpc_generate_leave(struct grpc_call *c);
/* Any thread. Cancels the Generate call of that id; false when there is none. */
bool grpc_generate_cancel(struct grpc_front *g, const char *id);
