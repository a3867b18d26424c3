/* Looks into a FromWorker or ToWorker without decoding it: which message it carries, and numbers in
 * front of what is big. Plans and results are decoded once only, by who executes them; the threads
 * that carry them use this. Also packs and unpacks the small messages.
 *
 * Bytes come from outside: everything is checked, nothing is trusted. */
#pragma once
#include "base/err.h"
#include "proto/rpc.h"
#include <protobuf-c/protobuf-c.h>

struct envelope {
    uint32_t kind;    /* field number of the oneof */
    struct span body; /* the message inside */
};
/* ERR_FORMAT unless the bytes are exactly one message field. */
enum err envelope_open(struct span bytes, struct envelope *out);
/* The last value of a varint field of a message; 0 when absent. ERR_FORMAT. */
enum err envelope_number(struct span body, uint32_t field, uint64_t *out);

/* The next length-delimited field with this number at or after *at, which moves behind it; false at
 * the end or at something malformed. Walks repeated fields: start with 0. */
bool envelope_bytes(struct span message, uint32_t field, size_t *at, struct span *out);

/* Packs into counted bytes, ready for rpc_send_shared. */
enum err envelope_pack(const ProtobufCMessage *message, struct rpc_bytes **out);
/* Packs and sends. */
enum err envelope_send(struct rpc_call *call, const ProtobufCMessage *message);
