/* A small HTTP/1.1 client for the tools: one request, the answer's body line by line. */
#pragma once
#include "base/buf.h"

/* Called with each line of the body without its line end; return false to stop reading. */
typedef bool http_line(void *ctx, const char *line, size_t n);

/* method GET or POST to url ("http://host:port"), path, body may be NULL. Fails with ERR_IO when
 * nobody answers; out_status is the HTTP status. The body of a status other than 200 goes to
 * out_error (may be NULL) instead of on_line. */
enum err http_call(const char *url, const char *method, const char *path, const struct buf *body, http_line *on_line,
                   void *ctx, int *out_status, struct buf *out_error);
