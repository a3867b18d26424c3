/* See http_parse.h. RFC 9112 (HTTP/1.1) sections 3, 5, 6 and 7; it knows bytes only. */
#include "coordinator/front/http_parse.h"

#include <string.h>
#include <strings.h>

static bool is_token_char(unsigned char c)
{
    return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') ||
           (c && strchr("!#$%&'*+-.^_`|~", c));
}

size_t http_head_length(const char *data, size_t n)
{
    for (const char *p = data, *end = data + n; (p = memchr(p, '\n', (size_t)(end - p)));) {
        p++;
        if (p < end && *p == '\n') return (size_t)(p + 1 - data);
        if (p + 1 < end && p[0] == '\r' && p[1] == '\n') return (size_t)(p + 2 - data);
    }
    return 0;
}

struct span http_head_find(const struct http_head *head, const char *name)
{
    size_t n = strlen(name);
    for (unsigned i = 0; i < head->n_headers; i++) {
        struct span s = head->headers[i].name;
        if (s.n == n && !strncasecmp(s.data, name, n)) return head->headers[i].value;
    }
    return (struct span){NULL, 0};
}

static struct span trim(struct span s)
{
    while (s.n && (*s.data == ' ' || *s.data == '\t'))
        s.data++, s.n--;
    while (s.n && (s.data[s.n - 1] == ' ' || s.data[s.n - 1] == '\t'))
        s.n--;
    return s;
}

bool http_list_has(struct span list, const char *token)
{
    size_t n = strlen(token);
    while (list.n) {
        const char *comma = memchr(list.data, ',', list.n);
        size_t len = comma ? (size_t)(comma - list.data) : list.n;
        struct span item = trim((struct span){list.data, len});
        if (item.n == n && !strncasecmp(item.data, token, n)) return true;
        size_t skip = comma ? len + 1 : len;
        list.data += skip, list.n -= skip;
    }
    return false;
}

static int hex_value(unsigned char c)
{
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return -1;
}

enum err http_percent_decode(struct span in, struct buf *out)
{
    for (size_t i = 0; i < in.n; i++) {
        char c = in.data[i];
        if (c == '%') {
            int high = i + 2 < in.n ? hex_value((unsigned char)in.data[i + 1]) : -1;
            int low = i + 2 < in.n ? hex_value((unsigned char)in.data[i + 2]) : -1;
            if (high < 0 || low < 0 || high + low == 0)
                FAIL(ERR_INVALID, "the path holds a bad %% escape");
            c = (char)(high << 4 | low);
            i += 2;
        }
        TRY(buf_add_char(out, c));
    }
    return OK;
}

static enum http_method method_of(struct span s)
{
    static const struct {
        const char *name;
        enum http_method method;
    } rows[] = {{"GET", HTTP_METHOD_GET},
                {"HEAD", HTTP_METHOD_HEAD},
                {"POST", HTTP_METHOD_POST},
                {"OPTIONS", HTTP_METHOD_OPTIONS}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++)
        if (span_equal(s, rows[i].name)) return rows[i].method;
    return HTTP_METHOD_OTHER;
}

/* The target is a path, "*", or a whole URL whose path counts. */
static enum err target_parse(struct span target, struct http_head *head)
{
    for (size_t i = 0; i < target.n; i++)
        if ((unsigned char)target.data[i] <= ' ' || target.data[i] == 0x7f)
            FAIL(ERR_INVALID, "the request target holds a control character");
    if (target.n > 7 && !strncasecmp(target.data, "http", 4)) {
        const char *p = memmem(target.data, target.n, "://", 3);
        size_t skip = p ? (size_t)(p + 3 - target.data) : target.n;
        const char *slash = memchr(target.data + skip, '/', target.n - skip);
        if (!slash) FAIL(ERR_INVALID, "the request target has no path");
        target.n -= (size_t)(slash - target.data);
        target.data = slash;
    }
    if (!target.n || (*target.data != '/' && !span_equal(target, "*")))
        FAIL(ERR_INVALID, "the request target must begin with '/'");
    const char *mark = memchr(target.data, '?', target.n);
    head->path = (struct span){target.data, mark ? (size_t)(mark - target.data) : target.n};
    head->query = (struct span){target.data, 0};
    if (mark) head->query = (struct span){mark + 1, target.n - head->path.n - 1};
    return OK;
}

static enum err request_line_parse(struct span line, struct http_head *head)
{
    const char *space = memchr(line.data, ' ', line.n);
    if (!space) FAIL(ERR_INVALID, "the request line is malformed");
    struct span method = {line.data, (size_t)(space - line.data)};
    const char *last = memrchr(line.data, ' ', line.n);
    if (last == space || !method.n) FAIL(ERR_INVALID, "the request line is malformed");
    for (size_t i = 0; i < method.n; i++)
        if (!is_token_char((unsigned char)method.data[i]))
            FAIL(ERR_INVALID, "the method is malformed");
    struct span version = {last + 1, line.n - (size_t)(last + 1 - line.data)};
    if (version.n != 8 || memcmp(version.data, "HTTP/", 5) || version.data[6] != '.')
        FAIL(ERR_INVALID, "the request line is malformed");
    if (memcmp(version.data, "HTTP/1.", 7) || (version.data[7] != '0' && version.data[7] != '1'))
        FAIL(ERR_UNSUPPORTED, "only HTTP/1.0 and HTTP/1.1 are spoken here");
    head->minor = version.data[7] - '0';
    head->method = method_of(method);
    return target_parse((struct span){space + 1, (size_t)(last - space - 1)}, head);
}

static enum err header_parse(struct span line, struct http_head *head)
{
    const char *colon = memchr(line.data, ':', line.n);
    if (!colon || colon == line.data) FAIL(ERR_INVALID, "a header line is malformed");
    struct span name = {line.data, (size_t)(colon - line.data)};
    for (size_t i = 0; i < name.n; i++)
        if (!is_token_char((unsigned char)name.data[i]))
            FAIL(ERR_INVALID, "a header name is malformed");
    struct span value = trim((struct span){colon + 1, line.n - name.n - 1});
    for (size_t i = 0; i < value.n; i++)
        if (((unsigned char)value.data[i] < ' ' && value.data[i] != '\t') || value.data[i] == 0x7f)
            FAIL(ERR_INVALID, "a header value holds a control character");
    if (head->n_headers == HTTP_HEADERS_MAX)
        FAIL(ERR_INVALID, "more than %d headers", HTTP_HEADERS_MAX);
    head->headers[head->n_headers++] = (struct http_header){name, value};
    return OK;
}

static enum err length_parse(struct span value, int64_t *io_length)
{
    int64_t length = 0;
    if (!value.n || value.n > 18) FAIL(ERR_INVALID, "Content-Length is not a number");
    for (size_t i = 0; i < value.n; i++) {
        if (value.data[i] < '0' || value.data[i] > '9')
            FAIL(ERR_INVALID, "Content-Length is not a number");
        length = length * 10 + (value.data[i] - '0');
    }
    if (*io_length >= 0 && *io_length != length) FAIL(ERR_INVALID, "two different Content-Length");
    *io_length = length;
    return OK;
}

/* What the headers say about the message's frame. */
static enum err framing_parse(struct http_head *head)
{
    head->keep_alive = head->minor == 1;
    for (unsigned i = 0; i < head->n_headers; i++) {
        struct span name = head->headers[i].name, value = head->headers[i].value;
        if (name.n == 14 && !strncasecmp(name.data, "content-length", 14)) {
            TRY(length_parse(value, &head->content_length));
        } else if (name.n == 17 && !strncasecmp(name.data, "transfer-encoding", 17)) {
            if (head->chunked || value.n != 7 || strncasecmp(value.data, "chunked", 7))
                FAIL(ERR_UNSUPPORTED, "the only Transfer-Encoding served is chunked");
            head->chunked = true;
        } else if (name.n == 10 && !strncasecmp(name.data, "connection", 10)) {
            if (http_list_has(value, "close"))
                head->keep_alive = false;
            else if (http_list_has(value, "keep-alive"))
                head->keep_alive = true;
        } else if (name.n == 6 && !strncasecmp(name.data, "expect", 6)) {
            if (value.n != 12 || strncasecmp(value.data, "100-continue", 12))
                FAIL(ERR_INVALID, "the only expectation served is 100-continue");
            head->expect_continue = head->minor == 1;
        }
    }
    if (head->chunked && head->content_length >= 0)
        FAIL(ERR_INVALID, "Content-Length beside Transfer-Encoding");
    if (head->chunked && head->minor == 0) FAIL(ERR_INVALID, "chunks need HTTP/1.1");
    return OK;
}

enum err http_head_parse(const char *data, size_t n, struct http_head *out)
{
    struct http_head head;
    head.n_headers = 0;
    head.content_length = -1;
    head.keep_alive = head.chunked = head.expect_continue = false;
    bool first = true;
    for (const char *p = data, *end = data + n; p < end;) {
        const char *eol = memchr(p, '\n', (size_t)(end - p));
        if (!eol) FAIL(ERR_INVALID, "the head is not complete");
        struct span line = {p, (size_t)(eol - p)};
        if (line.n && line.data[line.n - 1] == '\r') line.n--;
        p = eol + 1;
        if (!line.n && !first) break;
        if (first)
            TRY(request_line_parse(line, &head));
        else
            TRY(header_parse(line, &head));
        first = false;
    }
    if (first) FAIL(ERR_INVALID, "the request line is malformed");
    TRY(framing_parse(&head));
    *out = head;
    return OK;
}

static enum err chunk_size_parse(struct http_chunks *c)
{
    uint64_t size = 0;
    if (!c->size[0]) FAIL(ERR_INVALID, "a chunk has no size");
    for (const char *p = c->size; *p; p++)
        size = size << 4 | (unsigned)hex_value((unsigned char)*p);
    c->left = size;
    c->state = size ? HTTP_CHUNK_DATA : HTTP_CHUNK_TRAILER;
    c->line = 0;
    c->in_extension = false;
    memset(c->size, 0, sizeof c->size);
    return OK;
}

/* One byte of the line "SIZE[;extension]CRLF". */
static enum err chunk_size_byte(struct http_chunks *c, char byte)
{
    if (++c->line > HTTP_CHUNK_LINE_BYTES_MAX) FAIL(ERR_INVALID, "a chunk's size line is too long");
    if (c->after_cr != (byte == '\n')) FAIL(ERR_INVALID, "a chunk's size line is malformed");
    c->after_cr = byte == '\r';
    if (byte == '\r') return OK;
    if (byte == '\n') return chunk_size_parse(c);
    if (c->in_extension) return OK;
    if (byte == ';' || byte == ' ' || byte == '\t') {
        c->in_extension = true;
        return OK;
    }
    size_t n = strlen(c->size);
    if (hex_value((unsigned char)byte) < 0 || n >= 15)
        FAIL(ERR_INVALID, "a chunk's size is not a number");
    c->size[n] = byte;
    return OK;
}

/* One byte of the trailer: lines until an empty one. */
static enum err chunk_trailer_byte(struct http_chunks *c, char byte)
{
    if (++c->trailer > 8 * HTTP_CHUNK_LINE_BYTES_MAX) FAIL(ERR_INVALID, "the trailer is too long");
    if (byte == '\r') return OK;
    if (byte != '\n') {
        c->line++;
        return OK;
    }
    if (!c->line) c->state = HTTP_CHUNK_DONE;
    c->line = 0;
    return OK;
}

/* The CRLF after a chunk's data. */
static enum err chunk_end_byte(struct http_chunks *c, char byte)
{
    if (byte == '\r' && !c->after_cr) {
        c->after_cr = true;
        return OK;
    }
    if (byte != '\n' || !c->after_cr) FAIL(ERR_INVALID, "a chunk does not end where its size says");
    c->after_cr = false;
    c->state = HTTP_CHUNK_SIZE;
    return OK;
}

enum err http_chunks_read(struct http_chunks *c, const char *data, size_t n, size_t body_bytes_max,
                          struct buf *out, size_t *out_taken)
{
    size_t at = 0;
    while (at < n && c->state != HTTP_CHUNK_DONE) {
        if (c->state == HTTP_CHUNK_DATA) {
            size_t take = n - at < c->left ? n - at : (size_t)c->left;
            if (c->left > body_bytes_max || out->n > body_bytes_max - c->left)
                FAIL(ERR_TOO_BIG, "the body is larger than %zu bytes", body_bytes_max);
            TRY(buf_add(out, data + at, take));
            at += take;
            c->left -= take;
            if (!c->left) c->state = HTTP_CHUNK_DATA_END;
            continue;
        }
        char byte = data[at++];
        if (c->state == HTTP_CHUNK_SIZE)
            TRY(chunk_size_byte(c, byte));
        else if (c->state == HTTP_CHUNK_DATA_END)
            TRY(chunk_end_byte(c, byte));
        else
            TRY(chunk_trailer_byte(c, byte));
    }
    *out_taken = at;
    return OK;
}
