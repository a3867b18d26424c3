/* HTTP/1.1 over a plain socket: content-length, chunked, or until the end. Knows no JSON. */
#include "cli/http_client.h"

#include <errno.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/socket.h>
#include <unistd.h>

enum { LINE_BYTES_MAX = 1 << 20 };

struct reader {
    FILE *from;
    bool chunked;
    size_t chunk_left; /* bytes left in this chunk, or in the body */
    bool until_close;
};

static enum err split_url(const char *url, char *host, size_t host_size, char *port, size_t port_size)
{
    static const char scheme[] = "http://";
    if (strncmp(url, scheme, sizeof scheme - 1)) FAIL(ERR_INVALID, "%s: only http:// addresses", url);
    url += sizeof scheme - 1;
    size_t n = strcspn(url, "/");
    const char *colon = memrchr(url, ':', n);
    size_t host_n = colon ? (size_t)(colon - url) : n;
    snprintf(host, host_size, "%.*s", (int)host_n, url);
    snprintf(port, port_size, "%.*s", colon ? (int)(n - host_n - 1) : 2, colon ? colon + 1 : "80");
    return OK;
}

static enum err dial(const char *host, const char *port, int *out_fd)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *list = NULL;
    int code = getaddrinfo(host, port, &hints, &list), fd = -1;
    if (code) FAIL(ERR_IO, "%s:%s: %s", host, port, gai_strerror(code));
    for (struct addrinfo *a = list; a && fd < 0; a = a->ai_next) {
        fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol);
        if (fd >= 0 && connect(fd, a->ai_addr, a->ai_addrlen)) {
            close(fd);
            fd = -1;
        }
    }
    freeaddrinfo(list);
    if (fd < 0) FAIL(ERR_IO, "%s:%s: %s", host, port, strerror(errno));
    *out_fd = fd;
    return OK;
}

/* One byte of the body, or EOF at its end. */
static int body_char(struct reader *r)
{
    char line[64];
    if (r->until_close) return getc(r->from);
    if (r->chunked && !r->chunk_left) {
        if (!fgets(line, sizeof line, r->from)) return EOF;
        if (!strcmp(line, "\r\n") && !fgets(line, sizeof line, r->from)) return EOF;
        r->chunk_left = strtoul(line, NULL, 16);
    }
    if (!r->chunk_left) return EOF;
    r->chunk_left--;
    return getc(r->from);
}

static enum err read_head(struct reader *r, int *out_status)
{
    char line[8192];
    r->until_close = true;
    if (!fgets(line, sizeof line, r->from) || sscanf(line, "HTTP/1.%*d %d", out_status) != 1)
        FAIL(ERR_IO, "the answer is not HTTP");
    while (fgets(line, sizeof line, r->from) && strcmp(line, "\r\n")) {
        if (!strncasecmp(line, "transfer-encoding:", 18) && strstr(line, "chunked")) {
            r->chunked = true;
            r->until_close = false;
        } else if (!strncasecmp(line, "content-length:", 15)) {
            r->chunk_left = strtoul(line + 15, NULL, 10);
            r->until_close = false;
        }
    }
    return OK;
}

static enum err read_body(struct reader *r, http_line *on_line, void *ctx, struct buf *error)
{
    struct buf line;
    enum err e = OK;
    bool going = true;
    buf_init(&line, LINE_BYTES_MAX);
    for (int c = 0; c != EOF && going && !e;) {
        c = body_char(r);
        if (c != EOF && c != '\n') {
            e = buf_add_char(&line, (char)c);
            continue;
        }
        if (line.n && line.data[line.n - 1] == '\r') line.data[--line.n] = 0;
        if (c == EOF && !line.n) break;
        if (error) e = buf_add(error, line.data, line.n);
        else if (on_line) going = on_line(ctx, buf_string(&line), line.n);
        buf_clear(&line);
    }
    buf_fini(&line);
    return e;
}

enum err http_call(const char *url, const char *method, const char *path, const struct buf *body, http_line *on_line,
                   void *ctx, int *out_status, struct buf *out_error)
{
    char host[256], port[16];
    int fd;
    enum err e = OK;
    TRY(split_url(url, host, sizeof host, port, sizeof port));
    TRY(dial(host, port, &fd));
    struct reader r = {.from = fdopen(fd, "r+")};
    if (!r.from) {
        close(fd);
        FAIL(ERR_IO, "%s: %s", url, strerror(errno));
    }
    const char *key = getenv("HEDDLE_API_KEY");
    fprintf(r.from, "%s %s HTTP/1.1\r\nHost: %s:%s\r\nConnection: close\r\n", method, path, host, port);
    if (key) fprintf(r.from, "Authorization: Bearer %s\r\n", key);
    if (body) fprintf(r.from, "Content-Type: application/json\r\nContent-Length: %zu\r\n", body->n);
    fputs("\r\n", r.from);
    if (body) fwrite(buf_string(body), 1, body->n, r.from);
    if (fflush(r.from)) FAIL_OUT(ERR_IO, "%s: %s", url, strerror(errno));
    TRY_OUT(read_head(&r, out_status));
    TRY_OUT(read_body(&r, on_line, ctx, *out_status == 200 ? NULL : out_error));
out:
    fclose(r.from);
    return e;
}
