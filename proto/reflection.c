/* Server reflection over the embedded FileDescriptorSet. A symbol is looked for by walking the
 * descriptors' bytes each time: the set is small and nobody asks often. Field numbers are those of
 * google/protobuf/descriptor.proto. */
#include "proto/reflection.h"
#include "base/mem.h"
#include "proto/envelope.h"
#include "proto/reflection.pb-c.h"

#include <stdio.h>
#include <string.h>

extern const unsigned char proto_descriptors[];
extern const size_t proto_descriptors_bytes;

enum {
    FILES_MAX = 16,
    SERVICES_MAX = 32,
    SYMBOL_MAX = 256,
    REQUEST_BYTES_MAX = 4096,
    NESTING_MAX = 16
};
enum { SET_FILE = 1 };
enum {
    FILE_NAME = 1,
    FILE_PACKAGE = 2,
    FILE_DEPENDENCY = 3,
    FILE_MESSAGE = 4,
    FILE_ENUM = 5,
    FILE_SERVICE = 6
};
enum {
    ANY_NAME = 1,
    MESSAGE_FIELD = 2,
    MESSAGE_NESTED = 3,
    MESSAGE_ENUM = 4,
    MESSAGE_ONEOF = 8,
    ENUM_VALUE = 2,
    SERVICE_METHOD = 2
};

struct file {
    struct span bytes, name, package;
};

struct reflection {
    struct file files[FILES_MAX];
    size_t n_files;
    char services[SERVICES_MAX][SYMBOL_MAX];
    size_t n_services;
};

/* ---- Walking descriptors ---- */

static struct span field_first(struct span message, uint32_t field)
{
    struct span value = {"", 0};
    size_t at = 0;
    (void)envelope_bytes(message, field, &at, &value);
    return value;
}

static bool span_same(struct span a, struct span b)
{
    return a.n == b.n && !memcmp(a.data, b.data, a.n);
}

/* Removes "NAME" or "NAME." from the front of symbol; false when it does not begin so. */
static bool name_cut(struct span *symbol, struct span name)
{
    if (symbol->n < name.n || memcmp(symbol->data, name.data, name.n)) return false;
    if (symbol->n == name.n) {
        symbol->n = 0;
        return true;
    }
    if (name.n && symbol->data[name.n] != '.') return false;
    size_t skip = name.n ? name.n + 1 : 0;
    symbol->data += skip;
    symbol->n -= skip;
    return true;
}

/* True when one of the members `field` of the message has exactly this name. */
static bool member_is(struct span message, uint32_t field, struct span name)
{
    struct span member;
    for (size_t at = 0; envelope_bytes(message, field, &at, &member);)
        if (span_same(field_first(member, ANY_NAME), name)) return true;
    return false;
}

/* The rest of a symbol inside a message: itself, a field, a nested message, an enum or its value.
 */
static bool message_has(struct span message, struct span rest, int depth)
{
    struct span member;
    if (!rest.n) return true;
    if (depth == NESTING_MAX) return false;
    if (member_is(message, MESSAGE_FIELD, rest) || member_is(message, MESSAGE_ONEOF, rest))
        return true;
    for (size_t at = 0; envelope_bytes(message, MESSAGE_ENUM, &at, &member);)
        if (span_same(field_first(member, ANY_NAME), rest) || member_is(member, ENUM_VALUE, rest))
            return true;
    for (size_t at = 0; envelope_bytes(message, MESSAGE_NESTED, &at, &member);) {
        struct span inner = rest;
        if (name_cut(&inner, field_first(member, ANY_NAME)) &&
            message_has(member, inner, depth + 1))
            return true;
    }
    return false;
}

static bool file_has(const struct file *f, struct span symbol)
{
    struct span member, rest;
    if (!name_cut(&symbol, f->package) || !symbol.n) return false;
    for (size_t at = 0; envelope_bytes(f->bytes, FILE_SERVICE, &at, &member);) {
        rest = symbol;
        if (name_cut(&rest, field_first(member, ANY_NAME)) &&
            (!rest.n || member_is(member, SERVICE_METHOD, rest)))
            return true;
    }
    for (size_t at = 0; envelope_bytes(f->bytes, FILE_ENUM, &at, &member);)
        if (span_same(field_first(member, ANY_NAME), symbol) ||
            member_is(member, ENUM_VALUE, symbol))
            return true;
    for (size_t at = 0; envelope_bytes(f->bytes, FILE_MESSAGE, &at, &member);) {
        rest = symbol;
        if (name_cut(&rest, field_first(member, ANY_NAME)) && message_has(member, rest, 0))
            return true;
    }
    return false;
}

static const struct file *file_by_symbol(const struct reflection *r, const char *symbol)
{
    for (size_t i = 0; i < r->n_files; i++)
        if (file_has(&r->files[i], span_of(symbol))) return &r->files[i];
    return NULL;
}

static const struct file *file_by_name(const struct reflection *r, struct span name)
{
    for (size_t i = 0; i < r->n_files; i++)
        if (span_same(r->files[i].name, name)) return &r->files[i];
    return NULL;
}

/* ---- Answers ---- */

struct answer {
    Grpc__Reflection__V1__ServerReflectionResponse response;
    Grpc__Reflection__V1__FileDescriptorResponse files;
    Grpc__Reflection__V1__ExtensionNumberResponse extensions;
    Grpc__Reflection__V1__ListServiceResponse list;
    Grpc__Reflection__V1__ErrorResponse error;
    ProtobufCBinaryData bytes[FILES_MAX];
    Grpc__Reflection__V1__ServiceResponse services[SERVICES_MAX], *pointers[SERVICES_MAX];
};

static void answer_error(struct answer *a, int code, const char *text)
{
    grpc__reflection__v1__error_response__init(&a->error);
    a->error.error_code = code;
    a->error.error_message = (char *)(uintptr_t)text;
    a->response.message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_ERROR_RESPONSE;
    a->response.error_response = &a->error;
}

static void file_add(const struct reflection *r, struct answer *a, const struct file *f)
{
    struct span name;
    for (size_t i = 0; i < a->files.n_file_descriptor_proto; i++)
        if (a->bytes[i].data == (const uint8_t *)f->bytes.data) return;
    a->bytes[a->files.n_file_descriptor_proto++] =
        (ProtobufCBinaryData){f->bytes.n, (uint8_t *)(uintptr_t)f->bytes.data};
    for (size_t at = 0; envelope_bytes(f->bytes, FILE_DEPENDENCY, &at, &name);) {
        const struct file *imported = file_by_name(r, name);
        if (imported) file_add(r, a, imported); /* each file once, so this ends */
    }
}

static void answer_file(const struct reflection *r, struct answer *a, const struct file *f,
                        const char *what)
{
    if (!f) {
        answer_error(a, RPC_NOT_FOUND, what);
        return;
    }
    grpc__reflection__v1__file_descriptor_response__init(&a->files);
    a->files.file_descriptor_proto = a->bytes;
    file_add(r, a, f);
    a->response.message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_FILE_DESCRIPTOR_RESPONSE;
    a->response.file_descriptor_response = &a->files;
}

static void answer_list(const struct reflection *r, struct answer *a)
{
    grpc__reflection__v1__list_service_response__init(&a->list);
    for (size_t i = 0; i < r->n_services; i++) {
        grpc__reflection__v1__service_response__init(&a->services[i]);
        a->services[i].name = (char *)(uintptr_t)r->services[i];
        a->pointers[i] = &a->services[i];
    }
    a->list.n_service = r->n_services;
    a->list.service = a->pointers;
    a->response.message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_LIST_SERVICES_RESPONSE;
    a->response.list_services_response = &a->list;
}

static void answer_extensions(const struct reflection *r, struct answer *a, char *type)
{
    if (!file_by_symbol(r, type)) {
        answer_error(a, RPC_NOT_FOUND, "no such type");
        return;
    }
    grpc__reflection__v1__extension_number_response__init(&a->extensions);
    a->extensions.base_type_name = type; /* proto3 has none */
    a->response.message_response_case =
        GRPC__REFLECTION__V1__SERVER_REFLECTION_RESPONSE__MESSAGE_RESPONSE_ALL_EXTENSION_NUMBERS_RESPONSE;
    a->response.all_extension_numbers_response = &a->extensions;
}

static void answer_make(const struct reflection *r,
                        Grpc__Reflection__V1__ServerReflectionRequest *q, struct answer *a)
{
    grpc__reflection__v1__server_reflection_response__init(&a->response);
    a->response.valid_host = q->host;
    a->response.original_request = q;
    switch (q->message_request_case) {
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_BY_FILENAME:
        answer_file(r, a, file_by_name(r, span_of(q->file_by_filename)), "no such file");
        break;
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_SYMBOL:
        answer_file(r, a, file_by_symbol(r, q->file_containing_symbol), "no such symbol");
        break;
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_FILE_CONTAINING_EXTENSION:
        answer_error(a, RPC_NOT_FOUND, "no such extension");
        break;
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_ALL_EXTENSION_NUMBERS_OF_TYPE:
        answer_extensions(r, a, q->all_extension_numbers_of_type);
        break;
    case GRPC__REFLECTION__V1__SERVER_REFLECTION_REQUEST__MESSAGE_REQUEST_LIST_SERVICES:
        answer_list(r, a);
        break;
    default:
        answer_error(a, RPC_UNIMPLEMENTED, "no such kind of request");
        break;
    }
}

static void info_message(struct rpc_call *call, void *ctx, struct span bytes)
{
    struct answer a;
    Grpc__Reflection__V1__ServerReflectionRequest *q = NULL;
    if (bytes.n <= REQUEST_BYTES_MAX)
        q = grpc__reflection__v1__server_reflection_request__unpack(NULL, bytes.n,
                                                                    (const uint8_t *)bytes.data);
    if (!q) {
        rpc_finish(call, RPC_INVALID_ARGUMENT, "not a ServerReflectionRequest");
        return;
    }
    answer_make(ctx, q, &a);
    if (envelope_send(call, &a.response.base) == ERR_FULL)
        rpc_finish(call, RPC_RESOURCE_EXHAUSTED, "answers are not read");
    grpc__reflection__v1__server_reflection_request__free_unpacked(q, NULL);
}

size_t reflection_methods(struct reflection *r, struct rpc_method out[REFLECTION_METHODS])
{
    static const char *const paths[REFLECTION_METHODS] = {
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"};
    for (int i = 0; i < REFLECTION_METHODS; i++)
        out[i] = (struct rpc_method){
            .path = paths[i], .kind = RPC_BIDI, .on_message = info_message, .ctx = r};
    return REFLECTION_METHODS;
}

/* ---- Life ---- */

void reflection_serve(struct reflection *r, const struct rpc_method *methods, size_t n_methods)
{
    r->n_services = 0;
    for (size_t i = 0; i < n_methods && r->n_services < SERVICES_MAX; i++) {
        char name[SYMBOL_MAX];
        const char *slash = strchr(methods[i].path + 1, '/');
        bool known = !slash;
        if (slash)
            snprintf(name, sizeof name, "%.*s", (int)(slash - methods[i].path - 1),
                     methods[i].path + 1);
        for (size_t k = 0; k < r->n_services && !known; k++)
            known = !strcmp(r->services[k], name);
        if (!known) snprintf(r->services[r->n_services++], SYMBOL_MAX, "%s", name);
    }
}

enum err reflection_create(struct reflection **out)
{
    struct reflection *r;
    struct span set = {(const char *)proto_descriptors, proto_descriptors_bytes}, bytes;
    TRY(MEM_NEW(&r));
    for (size_t at = 0; envelope_bytes(set, SET_FILE, &at, &bytes);) {
        ASSERT_CMP(r->n_files, <, FILES_MAX);
        r->files[r->n_files++] =
            (struct file){bytes, field_first(bytes, FILE_NAME), field_first(bytes, FILE_PACKAGE)};
    }
    *out = r;
    return OK;
}

void reflection_destroy(struct reflection *r)
{
    mem_free(r);
}
