/* Errors of the whole project: one row per kind, and the wording of the last one.
 *
 * A function that can fail returns enum err. Whoever finds the error words it with FAIL; whoever
 * passes it on uses TRY and adds nothing; whoever ends the work logs err_detail() once. The detail
 * is kept per thread and must be copied before it crosses to another thread. */
#pragma once
#include <stdbool.h>
#include <stddef.h>

/* What the error damages: the request alone, the step, this worker, or the process. */
enum err_scope { ERR_SCOPE_REQUEST, ERR_SCOPE_STEP, ERR_SCOPE_WORKER, ERR_SCOPE_PROCESS };

/*        name             scope              HTTP gRPC  OpenAI type               text */
#define ERR_TABLE(X)                                                                             \
    X(ERR_INVALID, ERR_SCOPE_REQUEST, 400, 3, "invalid_request_error", "invalid request")        \
    X(ERR_TOO_LONG, ERR_SCOPE_REQUEST, 400, 3, "invalid_request_error", "longer than the limit") \
    X(ERR_UNAUTHORIZED, ERR_SCOPE_REQUEST, 401, 16, "authentication_error", "not authorized")    \
    X(ERR_NO_ROUTE, ERR_SCOPE_REQUEST, 404, 12, "not_found_error", "no such route or model")     \
    X(ERR_TOO_BIG, ERR_SCOPE_REQUEST, 413, 8, "invalid_request_error", "body too large")         \
    X(ERR_FULL, ERR_SCOPE_REQUEST, 429, 8, "rate_limit_error", "a limit is reached")             \
    X(ERR_CANCELLED, ERR_SCOPE_REQUEST, 499, 1, "cancelled", "cancelled by the client")          \
    X(ERR_DEADLINE, ERR_SCOPE_REQUEST, 504, 4, "timeout_error", "the deadline cannot be met")    \
    X(ERR_NOT_READY, ERR_SCOPE_REQUEST, 503, 14, "unavailable_error", "no group can answer yet") \
    X(ERR_TIMEOUT, ERR_SCOPE_STEP, 504, 4, "timeout_error", "took too long")                     \
    X(ERR_PEER, ERR_SCOPE_WORKER, 503, 14, "unavailable_error", "a peer is lost")                \
    X(ERR_DEVICE, ERR_SCOPE_WORKER, 503, 14, "unavailable_error", "the device failed")           \
    X(ERR_FORMAT, ERR_SCOPE_PROCESS, 500, 3, "internal_error", "malformed file or message")      \
    X(ERR_UNSUPPORTED, ERR_SCOPE_PROCESS, 501, 12, "internal_error", "not supported")            \
    X(ERR_NOT_FOUND, ERR_SCOPE_PROCESS, 500, 5, "internal_error", "not found")                   \
    X(ERR_NO_MEMORY, ERR_SCOPE_PROCESS, 500, 8, "internal_error", "out of memory")               \
    X(ERR_IO, ERR_SCOPE_PROCESS, 500, 13, "internal_error", "input or output failed")            \
    X(ERR_INTERNAL, ERR_SCOPE_PROCESS, 500, 13, "internal_error", "internal error")

enum err {
    OK = 0,
#define X(name, scope, http, grpc, type, text) name,
    ERR_TABLE(X)
#undef X
        ERR_COUNT
};

const char *err_name(enum err e);
const char *err_text(enum err e);
const char *err_type(enum err e); /* the "type" of an OpenAI error body */
int err_http(enum err e);
int err_grpc(enum err e);
enum err_scope err_scope(enum err e);

/* The wording of this thread's last error; "" when there was none. Valid until the next FAIL. */
const char *err_detail(void);

/* Words an error. Returns e, so that FAIL can return it. At most 1023 bytes are kept. */
enum err err_set(enum err e, const char *format, ...) __attribute__((format(printf, 2, 3)));

#define FAIL(e, ...) return err_set((e), __VA_ARGS__)
#define TRY(expression)                                                                          \
    do {                                                                                         \
        enum err try_err_ = (expression);                                                        \
        if (try_err_) return try_err_;                                                           \
    } while (0)
/* For functions with one cleanup label `out` and a variable `enum err e`. */
#define TRY_OUT(expression)                                                                      \
    do {                                                                                         \
        e = (expression);                                                                        \
        if (e) goto out;                                                                         \
    } while (0)
#define FAIL_OUT(code, ...)                                                                      \
    do {                                                                                         \
        e = err_set((code), __VA_ARGS__);                                                        \
        goto out;                                                                                \
    } while (0)

/* For our own mistakes only, never for bytes from outside; always compiled in. */
_Noreturn void assert_fail(const char *file, int line, const char *what, long long a, long long b);
#define ASSERT(condition)                                                                        \
    ((condition) ? (void)0 : assert_fail(__FILE__, __LINE__, #condition, 0, 0))
#define ASSERT_CMP(a, op, b)                                                                     \
    (((a)op(b)) ? (void)0                                                                        \
                : assert_fail(__FILE__, __LINE__, #a " " #op " " #b, (long long)(a), (long long)(b)))
