/* Peeking into envelopes by the wire format of protobuf. Knows fields and lengths, not meanings. */
#include "proto/envelope.h"
#include "base/mem.h"

#include <string.h>

enum { WIRE_VARINT = 0, WIRE_64 = 1, WIRE_BYTES = 2, WIRE_32 = 5 };

struct reader {
    const unsigned char *at, *end;
};

static bool read_varint(struct reader *r, uint64_t *out)
{
    uint64_t value = 0;
    for (int shift = 0; shift < 64 && r->at < r->end; shift += 7) {
        unsigned char byte = *r->at++;
        value |= (uint64_t)(byte & 0x7f) << shift;
        if (!(byte & 0x80)) return *out = value, true;
    }
    return false;
}

static bool skip_bytes(struct reader *r, uint64_t n)
{
    if (n > (uint64_t)(r->end - r->at)) return false;
    r->at += n;
    return true;
}

/* Reads one field; for WIRE_BYTES the value is the length and the bytes are still ahead. */
static bool read_field(struct reader *r, uint32_t *out_field, int *out_wire, uint64_t *out_value)
{
    uint64_t key;
    if (!read_varint(r, &key) || key >> 3 == 0 || key >> 3 > 0x1fffffff) return false;
    *out_field = (uint32_t)(key >> 3);
    *out_wire = (int)(key & 7);
    *out_value = 0;
    switch (*out_wire) {
    case WIRE_VARINT:
    case WIRE_BYTES:
        return read_varint(r, out_value);
    case WIRE_64:
        return skip_bytes(r, 8);
    case WIRE_32:
        return skip_bytes(r, 4);
    default:
        return false;
    }
}

enum err envelope_open(struct span bytes, struct envelope *out)
{
    struct reader r = {(const unsigned char *)bytes.data,
                       (const unsigned char *)bytes.data + bytes.n};
    uint32_t field;
    int wire;
    uint64_t n;
    if (!read_field(&r, &field, &wire, &n) || wire != WIRE_BYTES || n != (uint64_t)(r.end - r.at))
        FAIL(ERR_FORMAT, "a message of %zu bytes is not one envelope", bytes.n);
    *out = (struct envelope){field, {(const char *)r.at, (size_t)n}};
    return OK;
}

enum err envelope_number(struct span body, uint32_t field, uint64_t *out)
{
    struct reader r = {(const unsigned char *)body.data, (const unsigned char *)body.data + body.n};
    uint64_t found = 0;
    while (r.at < r.end) {
        uint32_t number;
        int wire;
        uint64_t value;
        bool ok = read_field(&r, &number, &wire, &value);
        if (ok && wire == WIRE_BYTES) ok = skip_bytes(&r, value);
        if (!ok)
            FAIL(ERR_FORMAT, "a malformed field at byte %zu of %zu",
                 (size_t)(r.at - (const unsigned char *)body.data), body.n);
        if (wire == WIRE_VARINT && number == field) found = value;
    }
    *out = found;
    return OK;
}

bool envelope_bytes(struct span message, uint32_t field, size_t *at, struct span *out)
{
    const unsigned char *start = (const unsigned char *)message.data;
    struct reader r = {start + *at, start + message.n};
    while (r.at < r.end) {
        uint32_t number;
        int wire;
        uint64_t value;
        if (!read_field(&r, &number, &wire, &value)) return false;
        if (wire != WIRE_BYTES) continue;
        const unsigned char *bytes = r.at;
        if (!skip_bytes(&r, value)) return false;
        if (number != field) continue;
        *out = (struct span){(const char *)bytes, (size_t)value};
        *at = (size_t)(r.at - start);
        return true;
    }
    return false;
}

enum err envelope_pack(const ProtobufCMessage *message, struct rpc_bytes **out)
{
    struct buf b;
    buf_init(&b, 0);
    size_t n = protobuf_c_message_get_packed_size(message);
    TRY(buf_reserve(&b, n));
    b.n = protobuf_c_message_pack(message, (uint8_t *)b.data);
    enum err e = rpc_bytes_take(&b, out);
    buf_fini(&b);
    return e;
}

enum err envelope_send(struct rpc_call *call, const ProtobufCMessage *message)
{
    struct rpc_bytes *bytes;
    TRY(envelope_pack(message, &bytes));
    enum err e = rpc_send_shared(call, bytes);
    rpc_bytes_release(bytes);
    return e;
}
