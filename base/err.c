/* The table of errors and the thread's last wording. Knows nothing of who fails. */
#include "base/err.h"

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

struct err_row {
    const char *name;
    enum err_scope scope;
    int http, grpc;
    const char *type, *text;
};

static const struct err_row rows[ERR_COUNT] = {
    [OK] = {"OK", ERR_SCOPE_REQUEST, 200, 0, "", "no error"},
#define X(name, scope, http, grpc, type, text) [name] = {#name, scope, http, grpc, type, text},
    ERR_TABLE(X)
#undef X
};

static _Thread_local char detail[1024];

static const struct err_row *row_get(enum err e)
{
    return (unsigned)e < ERR_COUNT ? &rows[e] : &rows[ERR_INTERNAL];
}

const char *err_name(enum err e) { return row_get(e)->name; }
const char *err_text(enum err e) { return row_get(e)->text; }
const char *err_type(enum err e) { return row_get(e)->type; }
int err_http(enum err e) { return row_get(e)->http; }
int err_grpc(enum err e) { return row_get(e)->grpc; }
enum err_scope err_scope(enum err e) { return row_get(e)->scope; }
const char *err_detail(void) { return detail; }

enum err err_set(enum err e, const char *format, ...)
{
    char words[sizeof detail]; /* the arguments may point into the old detail */
    va_list args;
    va_start(args, format);
    vsnprintf(words, sizeof words, format, args);
    va_end(args);
    snprintf(detail, sizeof detail, "%s", words);
    return e;
}

void assert_fail(const char *file, int line, const char *what, long long a, long long b)
{
    fprintf(stderr, "%s:%d: assertion failed: %s (%lld, %lld)\n", file, line, what, a, b);
    fflush(stderr);
    abort();
}
