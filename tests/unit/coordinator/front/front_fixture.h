/* A front over the fake engine, a tokenizer of bytes, and a raw client: sockets and bytes, so that
 * tests can be as rude as they like. */
#pragma once
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base/json.h"
#include "coordinator/front/bytes_tokenizer.h"
#include "coordinator/front/front.h"
#include "fake_engine.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

static struct front *front;
static struct tokenizer *bytes_tokenizer;
static struct chat_template *chatml;
static int port;

static const char chatml_source[] =
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

static void tokenizer_make(void)
{
    struct buf json;
    buf_init(&json, 0);
    tokenizer_json(&json);
    struct span config = span_of("{\"eos_token\":\"<|end|>\"}");
    enum err e = tokenizer_open_memory((struct span){json.data, json.n}, &config, &bytes_tokenizer);
    if (e) fprintf(stderr, "%s\n", err_detail());
    assert_int_equal(e, OK);
    assert_int_equal(tokenizer_eos_id(bytes_tokenizer), FAKE_EOS);
    buf_fini(&json);
}

static struct front_config fixture_config(void)
{
    struct front_config c = {.http = {.host = "127.0.0.1", .n_loops = 2},
                             .names = {"tiny", "org/tiny"},
                             .n_names = 2,
                             .model_path = "/models/tiny",
                             .engine = &fake,
                             .context_max = 2048,
                             .vocab_size = 260,
                             .max_logprobs = 20,
                             .webui = true};
    c.defaults.sampling = (struct sampling_params){.temperature = 1, .top_p = 1,
                                                   .repetition_penalty = 1};
    c.tokenizer = bytes_tokenizer;
    c.chat_template = chatml;
    c.chat_template_source = chatml_source;
    return c;
}

static void fixture_open(const struct front_config *config)
{
    enum err e = front_create(config, &front);
    if (e) fprintf(stderr, "%s\n", err_detail());
    assert_int_equal(e, OK);
    port = http_server_port(front->http);
}

static void fixture_begin(void)
{
    tokenizer_make();
    assert_int_equal(chat_template_compile(chatml_source, sizeof chatml_source - 1, &chatml), OK);
    fake_start();
}

static void fixture_end(void)
{
    if (front) front_stop(front);
    fake_finish();
    unsigned left = front ? atomic_load(&front->n_streams) : 0;
    front_destroy(front);
    front = NULL;
    (void)left;
    chat_template_destroy(chatml);
    tokenizer_close(bytes_tokenizer);
}

/* --- the client --- */

static int client_open(void)
{
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&at, sizeof at), 0);
    return fd;
}

static void client_send(int fd, const void *data, size_t n)
{
    for (size_t at = 0; at < n;) {
        ssize_t sent = send(fd, (const char *)data + at, n - at, MSG_NOSIGNAL);
        if (sent <= 0) return; /* the server may have had enough */
        at += (size_t)sent;
    }
}

/* Reads until `mark` appears, the peer closes, or wait_ms have passed; appends. True on mark. */
static bool client_read_until(int fd, const char *mark, int wait_ms, struct buf *in)
{
    int64_t end = clock_monotonic_us() + wait_ms * 1000LL;
    for (;;) {
        if (mark && in->n && memmem(in->data, in->n, mark, strlen(mark))) return true;
        int64_t left = (end - clock_monotonic_us()) / 1000;
        struct pollfd p = {.fd = fd, .events = POLLIN};
        if (left <= 0 || poll(&p, 1, (int)left) <= 0) return false;
        char bytes[16384];
        ssize_t n = recv(fd, bytes, sizeof bytes, 0);
        if (n <= 0) return false;
        buf_add(in, bytes, (size_t)n);
    }
}

struct answer {
    int status;
    struct buf head, body; /* body with its chunks joined */
};

static void answer_fini(struct answer *a)
{
    buf_fini(&a->head);
    buf_fini(&a->body);
}

static const char *answer_header(const struct answer *a, const char *name, char *out, size_t size)
{
    const char *p = strcasestr(buf_string(&a->head), name);
    if (!p) return NULL;
    p += strlen(name);
    while (*p == ':' || *p == ' ') p++;
    snprintf(out, size, "%.*s", (int)strcspn(p, "\r\n"), p);
    return out;
}

/* Reads one whole answer. */
static void client_answer(int fd, bool head_only, struct answer *out)
{
    struct buf in;
    buf_init(&in, 0);
    memset(out, 0, sizeof *out);
    assert_true(client_read_until(fd, "\r\n\r\n", 20000, &in));
    char *end = strstr(in.data, "\r\n\r\n");
    size_t head = (size_t)(end - in.data) + 4;
    buf_add(&out->head, in.data, head);
    out->status = (int)strtol(in.data + 9, NULL, 10);
    char value[64];
    if (head_only || out->status == 204) {
        assert_int_equal(in.n, head);
    } else if (answer_header(out, "transfer-encoding", value, sizeof value)) {
        assert_true(client_read_until(fd, "\r\n0\r\n\r\n", 20000, &in) || strstr(in.data, "\n0\r\n"));
        for (char *p = in.data + head; p < in.data + in.n;) {
            char *rest;
            size_t n = strtoul(p, &rest, 16);
            if (!n) break;
            buf_add(&out->body, rest + 2, n);
            p = rest + 2 + n + 2;
        }
    } else {
        assert_non_null(answer_header(out, "content-length", value, sizeof value));
        size_t n = strtoul(value, NULL, 10);
        while (in.n < head + n && client_read_until(fd, NULL, 1, &in)) continue;
        int64_t limit = clock_monotonic_us() + 20000000;
        while (in.n < head + n && clock_monotonic_us() < limit) {
            size_t before = in.n;
            client_read_until(fd, NULL, 20, &in);
            if (in.n == before) continue;
        }
        assert_int_equal(in.n, head + n);
        buf_add(&out->body, in.data + head, n);
    }
    buf_fini(&in);
}

static void request_text(struct buf *out, const char *method, const char *path, const char *headers,
                         const char *body)
{
    buf_printf(out, "%s %s HTTP/1.1\r\nHost: test\r\n%s", method, path, headers ? headers : "");
    if (body) buf_printf(out, "Content-Type: application/json\r\nContent-Length: %zu\r\n", strlen(body));
    buf_add_string(out, "\r\n");
    if (body) buf_add_string(out, body);
}

static void call_with(const char *method, const char *path, const char *headers, const char *body,
                      struct answer *out)
{
    struct buf text;
    buf_init(&text, 0);
    request_text(&text, method, path, headers, body);
    int fd = client_open();
    client_send(fd, text.data, text.n);
    client_answer(fd, !strcmp(method, "HEAD"), out);
    close(fd);
    buf_fini(&text);
}

/* POSTs and returns the parsed document; the caller json_decref()s it. */
__attribute__((unused)) static json_t *post(const char *path, const char *body, int status)
{
    struct answer a;
    json_t *root = NULL;
    call_with("POST", path, NULL, body, &a);
    if (a.status != status) fprintf(stderr, "%s %s\n-> %d %s\n", path, body, a.status, buf_string(&a.body));
    assert_int_equal(a.status, status);
    if (json_parse(a.body.data, a.body.n, &root)) fprintf(stderr, "%s\n%s\n", err_detail(), a.body.data);
    assert_non_null(root);
    answer_fini(&a);
    return root;
}

/* The value at "choices.0.text". */
static const json_t *at(const json_t *v, const char *path)
{
    while (v && *path) {
        char key[64];
        size_t n = strcspn(path, ".");
        snprintf(key, sizeof key, "%.*s", (int)n, path);
        v = json_is_array(v) ? json_array_get(v, (size_t)strtoul(key, NULL, 10)) : json_object_get(v, key);
        path += n + (path[n] == '.');
    }
    return v;
}
__attribute__((unused)) static const char *text_at(const json_t *v, const char *path)
{
    const char *s = json_string_value(at(v, path));
    return s ? s : "(none)";
}
__attribute__((unused)) static long long int_at(const json_t *v, const char *path) { return json_integer_value(at(v, path)); }

/* Calls each with every "data: " line of an event stream. Returns their number. */
__attribute__((unused)) static int events(const struct buf *body, void (*each)(void *ctx, const char *line, size_t n), void *ctx)
{
    int n_events = 0;
    for (const char *p = buf_string(body); *p;) {
        const char *end = strstr(p, "\n\n");
        assert_non_null(end);
        assert_memory_equal(p, "data: ", 6);
        each(ctx, p + 6, (size_t)(end - p - 6));
        n_events++;
        p = end + 2;
    }
    return n_events;
}

/* Waits until the engine holds no request. */
__attribute__((unused)) static bool engine_idle(int wait_ms)
{
    for (int i = 0; i < wait_ms; i++) {
        pthread_mutex_lock(&fake.mutex);
        bool idle = fake.n == 0;
        pthread_mutex_unlock(&fake.mutex);
        if (idle) return true;
        clock_sleep_us(1000);
    }
    return false;
}
