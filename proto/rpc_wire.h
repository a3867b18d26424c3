/* What rpc_net.c needs of an HTTP/2 library: queues of events, one batch of a kind at a time on a
 * call, nothing else. rpc_grpc.c gives it by the gRPC C core. Only these two files include it.
 *
 * An owner is the pointer that comes back with every event of its call. After wire_send, wire_recv,
 * wire_close or wire_call_request returned true exactly one event with that tag follows. */
#pragma once
#include "proto/rpc.h"

enum wire_tag { WIRE_NEW, WIRE_RECV, WIRE_SEND, WIRE_CLOSE, WIRE_SHUTDOWN };
struct wire_event {
    enum wire_tag tag;
    void *owner;
    bool ok;
};

struct wire_queue;
struct wire_queue *wire_queue_create(void); /* never NULL; also starts the library */
void wire_queue_shutdown(struct wire_queue *q);
/* Waits for the next event; false when the queue was shut down and is empty. */
bool wire_queue_next(struct wire_queue *q, struct wire_event *out);
void wire_queue_destroy(struct wire_queue *q); /* after everything else; stops the library */

struct wire_server;
enum err wire_server_create(const struct rpc_server_config *config, uint32_t n_calls_max,
                            size_t message_bytes_max, struct wire_queue *q,
                            struct wire_server **out, int *out_port);
/* No new calls; WIRE_SHUTDOWN with this owner when the last has ended. */
void wire_server_shutdown(struct wire_server *s, void *owner);
void wire_server_cancel(struct wire_server *s); /* every call */
void wire_server_destroy(struct wire_server *s);

struct wire_channel;
enum err wire_channel_create(const struct rpc_channel_config *config, size_t message_bytes_max,
                             struct wire_channel **out);
void wire_channel_destroy(struct wire_channel *ch);

struct wire_call;
/* Waits for one more call of a client: WIRE_NEW, not ok when the server shuts down instead. */
enum err wire_call_request(struct wire_server *s, struct wire_queue *q, void *owner,
                           struct wire_call **out);
enum err wire_call_open(struct wire_channel *ch, struct wire_queue *q, const char *path,
                        int timeout_ms, void *owner, struct wire_call **out);
void wire_call_destroy(struct wire_call *c); /* accepts NULL; after its last event */

struct wire_send {
    bool headers;            /* the first send of a side carries them */
    const char *bearer;      /* in the client's headers; may be NULL */
    struct rpc_bytes *bytes; /* a message, whose count is taken; may be NULL */
    bool end;                /* this side says no more: half-close or status */
    int code;                /* server's end */
    const char *text;
};
bool wire_send(struct wire_call *c, const struct wire_send *s);
bool wire_recv(struct wire_call *c);
bool wire_close(struct wire_call *c); /* WIRE_CLOSE when the whole call has ended */
void wire_cancel(struct wire_call *c);

/* After WIRE_RECV: the message, data NULL when there is none. Freed by wire_message_free. ERR_TOO_BIG,
 * ERR_FORMAT: it was compressed, and bigger than the limit or broken. */
enum err wire_message(struct wire_call *c, struct span *out);
void wire_message_free(struct wire_call *c);
/* After WIRE_CLOSE. */
bool wire_cancelled(const struct wire_call *c);                                      /* server */
void wire_status(const struct wire_call *c, int *out_code, char *text, size_t size); /* client */
/* After WIRE_NEW, until destroyed. */
void wire_path(const struct wire_call *c, char *out, size_t size);
void wire_peer(const struct wire_call *c, char *out, size_t size);
void wire_peer_name(const struct wire_call *c, char *out, size_t size);
struct span wire_metadata(const struct wire_call *c, const char *key);
int64_t wire_time_left_us(const struct wire_call *c); /* INT64_MAX = no deadline */
