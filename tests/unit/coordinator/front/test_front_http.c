/* The HTTP port under rude clients: broken requests, chunked and pipelined ones, clients that leave,
 * do not read, or drip bytes. Goal: every reply is 4xx in OpenAI's shape, a client's leaving frees
 * its request at once, and neighbours go on. Method: raw sockets over a fake engine. */
#include "front_fixture.h"

#include <sys/un.h>

static int begin(void **state)
{
    (void)state;
    fixture_begin();
    struct front_config c = fixture_config();
    c.http.body_bytes_max = 100000;
    c.http.head_bytes_max = 8192;
    c.http.output_bytes_max = 64 << 10;
    c.http.head_timeout_s = 1;
    c.http.body_timeout_s = 1;
    c.origins[0] = "https://good.example";
    c.n_origins = 1;
    fixture_open(&c);
    return 0;
}
static int end(void **state)
{
    (void)state;
    fixture_end();
    return 0;
}

/* Sends bytes as they are and reads one answer. */
static int raw(const char *bytes, size_t n, struct answer *a)
{
    int fd = client_open();
    client_send(fd, bytes, n);
    client_answer(fd, false, a);
    return fd;
}

static void malformed_requests(void **state)
{
    (void)state;
    static const struct {
        const char *bytes;
        int status;
    } cases[] = {
        {"GARBAGE\r\n\r\n", 400},
        {"GET /health\r\n\r\n", 400},
        {"GET /health HTTP/2.0\r\n\r\n", 501},
        {"GET health HTTP/1.1\r\n\r\n", 400},
        {"G@T /health HTTP/1.1\r\n\r\n", 400},
        {"GET /health HTTP/1.1\r\nNo colon\r\n\r\n", 400},
        {"GET /health HTTP/1.1\r\nBad Name: x\r\n\r\n", 400},
        {"GET /health HTTP/1.1\r\nA : x\r\n\r\n", 400},
        {"GET /health HTTP/1.1\r\nA: x\r\n folded\r\n\r\n", 400},
        {"GET /health HTTP/1.1\r\nA: \x01\r\n\r\n", 400},
        {"POST /tokenize HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400},
        {"POST /tokenize HTTP/1.1\r\nContent-Length: 1x\r\n\r\n", 400},
        {"POST /tokenize HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n", 400},
        {"POST /tokenize HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400},
        {"POST /tokenize HTTP/1.1\r\nContent-Length: 100001\r\n\r\n", 413},
        {"POST /tokenize HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400},
        {"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n", 501},
        {"POST /tokenize HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400},
        {"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400},
        {"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabcX\r\n", 400},
        {"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0x3\r\nabc\r\n0\r\n\r\n", 400},
        {"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffffffff\r\n", 413},
        {"POST /tokenize HTTP/1.1\r\nExpect: magic\r\n\r\n", 400},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct answer a;
        json_t *v = NULL;
        const char *text = cases[i].bytes;
        size_t n = strlen(text);
        struct buf body;
        buf_init(&body, 0);
        buf_add(&body, text, n);
        if (strstr(text, "fffffffffffffff")) buf_add_string(&body, "data");
        int fd = raw(body.data, body.n, &a);
        if (a.status != cases[i].status) fprintf(stderr, "%s-> %d\n", text, a.status);
        assert_int_equal(a.status, cases[i].status);
        assert_int_equal(json_parse(a.body.data, a.body.n, &v), OK);
        assert_true(json_is_string(at(v, "error.message")));
        assert_non_null(strstr(a.head.data, "Connection: close"));
        json_decref(v);
        answer_fini(&a);
        buf_fini(&body);
        close(fd);
    }
}

static void limits_of_heads(void **state)
{
    (void)state;
    struct buf text;
    struct answer a;
    buf_init(&text, 0);
    buf_add_string(&text, "GET /health HTTP/1.1\r\nX: ");
    for (int i = 0; i < 20000; i++) buf_add_char(&text, 'a');
    close(raw(text.data, text.n, &a));
    assert_int_equal(a.status, 431);
    answer_fini(&a);
    buf_clear(&text);
    buf_add_string(&text, "GET /health HTTP/1.1\r\n");
    for (int i = 0; i < 200; i++) buf_printf(&text, "a%d: b\r\n", i);
    buf_add_string(&text, "\r\n");
    close(raw(text.data, text.n, &a));
    assert_int_equal(a.status, 400);
    answer_fini(&a);
    buf_fini(&text);
}

static void routes_and_methods(void **state)
{
    (void)state;
    struct answer a;
    char value[256];
    static const struct {
        const char *method, *path;
        int status;
    } cases[] = {{"GET", "/nothing", 404}, {"GET", "/v1/completions", 405}, {"POST", "/health", 405},
                 {"DELETE", "/v1/models", 405}, {"GET", "/v1/models", 200}, {"GET", "/v1/models/", 200},
                 {"GET", "/v1/models/tiny", 200}, {"GET", "/v1/models/org%2Ftiny", 200}, {"GET", "/v1/models/org/tiny", 200},
                 {"GET", "/v1/models/none", 404}, {"GET", "/v1/models/%00", 400}, {"GET", "/../etc/passwd", 404},
                 {"GET", "/live", 200}, {"GET", "/ping", 200}, {"GET", "/healthz", 200}, {"GET", "/readyz", 200},
                 {"GET", "/version", 200}, {"GET", "/", 200}, {"GET", "/metrics?x=y", 200}, {"HEAD", "/health", 200},
                 {"GET", "http://host/health", 200}, {"OPTIONS", "/v1/completions", 204}};
    fake_reset("x");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        call_with(cases[i].method, cases[i].path, NULL, NULL, &a);
        if (a.status != cases[i].status) fprintf(stderr, "%s %s -> %d\n", cases[i].method, cases[i].path, a.status);
        assert_int_equal(a.status, cases[i].status);
        if (a.status == 405) assert_non_null(answer_header(&a, "\r\nallow", value, sizeof value));
        answer_fini(&a);
    }
    call_with("GET", "/health", "X-Request-Id: abc-123\r\n", NULL, &a);
    assert_string_equal(answer_header(&a, "x-request-id", value, sizeof value), "abc-123");
    answer_fini(&a);
    call_with("GET", "/health", "X-Request-Id: a\tb\r\n", NULL, &a);
    assert_memory_equal(answer_header(&a, "x-request-id", value, sizeof value), "req-", 4);
    answer_fini(&a);
    atomic_store(&fake.groups_up, 0);
    call_with("GET", "/health", NULL, NULL, &a);
    assert_int_equal(a.status, 503);
    answer_fini(&a);
    call_with("GET", "/live", NULL, NULL, &a);
    assert_int_equal(a.status, 200);
    answer_fini(&a);
    fake_reset("x");
}

static void cors(void **state)
{
    (void)state;
    struct answer a;
    char value[256];
    call_with("OPTIONS", "/v1/chat/completions",
              "Origin: https://good.example\r\nAccess-Control-Request-Method: POST\r\n", NULL, &a);
    assert_string_equal(answer_header(&a, "access-control-allow-origin", value, sizeof value), "https://good.example");
    assert_non_null(strstr(answer_header(&a, "access-control-allow-headers", value, sizeof value), "Authorization"));
    answer_fini(&a);
    call_with("GET", "/health", "Origin: https://evil.example\r\n", NULL, &a);
    assert_null(answer_header(&a, "access-control-allow-origin", value, sizeof value));
    answer_fini(&a);
}

static void chunked_and_pipelined(void **state)
{
    (void)state;
    static const char text[] =
        "POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
        "5;ext=\"x\"\r\n{\"pro\r\n1\r\nm\r\n0D\r\npt\":\"abc\"    \r\n1\r\n}\r\n0\r\nTrailer: x\r\n\r\n"
        "GET /live HTTP/1.1\r\n\r\n"
        "\r\nPOST /v1/completions HTTP/1.1\r\nContent-Length: 43\r\n\r\n{\"prompt\":\"p\",\"max_tokens\":3,\"stream\":true}"
        "POST /detokenize HTTP/1.1\r\nContent-Length: 18\r\nConnection: close\r\n\r\n{\"tokens\":[97,98]}";
    fake_reset("xyzxyz");
    for (int step = 1; step <= 64; step *= 8) { /* whatever the pieces it comes in */
        int fd = client_open();
        struct buf in;
        buf_init(&in, 0);
        for (size_t i = 0; i < sizeof text - 1; i += (size_t)step) {
            size_t n = sizeof text - 1 - i < (size_t)step ? sizeof text - 1 - i : (size_t)step;
            client_send(fd, text + i, n);
            if (step == 1 && i % 50 == 0) clock_sleep_us(300);
        }
        client_read_until(fd, NULL, 3000, &in);
        assert_non_null(in.data);
        if (!strstr(in.data, "[97,98,99]")) fprintf(stderr, "%s\n", in.data);
        const char *p = strstr(in.data, "\"tokens\":[97,98,99]");
        assert_non_null(p);
        assert_non_null(p = strstr(p, "{\"status\":\"ok\"}"));
        assert_non_null(p = strstr(p, "data: [DONE]"));
        assert_non_null(p = strstr(p, "{\"prompt\":\"ab\"}"));
        buf_fini(&in);
        close(fd);
    }
    int fd = client_open();
    struct answer a;
    static const char expect[] = "POST /tokenize HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 16\r\n\r\n";
    struct buf in;
    buf_init(&in, 0);
    client_send(fd, expect, sizeof expect - 1);
    assert_true(client_read_until(fd, "100 Continue\r\n\r\n", 2000, &in));
    client_send(fd, "{\"prompt\":\"abc\"}", 16);
    client_answer(fd, false, &a);
    assert_int_equal(a.status, 200);
    answer_fini(&a);
    buf_fini(&in);
    close(fd);
    /* half-closed after the request: the answer still comes */
    fd = client_open();
    client_send(fd, "GET /live HTTP/1.0\r\n\r\n", 22);
    shutdown(fd, SHUT_WR);
    client_answer(fd, false, &a);
    assert_int_equal(a.status, 200);
    answer_fini(&a);
    close(fd);
}

static void slow_request_is_ended(void **state)
{
    (void)state;
    struct answer a;
    int head = client_open(), body = client_open(), silent = client_open();
    client_send(head, "GET /health HTTP/1.1\r\nX", 23);
    client_send(body, "POST /tokenize HTTP/1.1\r\nContent-Length: 50\r\n\r\n{", 48);
    for (int i = 0; i < 15; i++) { /* one byte now and then does not help */
        clock_sleep_us(50000);
        client_send(head, "a", 1);
        client_send(body, " ", 1);
    }
    client_answer(head, false, &a);
    assert_int_equal(a.status, 408);
    answer_fini(&a);
    client_answer(body, false, &a);
    assert_int_equal(a.status, 408);
    answer_fini(&a);
    struct buf in;
    buf_init(&in, 0);
    assert_false(client_read_until(silent, "x", 3000, &in));
    assert_int_equal(in.n, 0);
    buf_fini(&in);
    close(head), close(body), close(silent);
}

static int post_open(const char *body)
{
    struct buf text;
    buf_init(&text, 0);
    request_text(&text, "POST", "/v1/completions", NULL, body);
    int fd = client_open();
    client_send(fd, text.data, text.n);
    buf_fini(&text);
    return fd;
}

static bool submitted(int n, int wait_ms)
{
    for (int i = 0; i < wait_ms; i++) {
        pthread_mutex_lock(&fake.mutex);
        bool yes = fake.n_submitted >= n;
        pthread_mutex_unlock(&fake.mutex);
        if (yes) return true;
        clock_sleep_us(1000);
    }
    return false;
}

/* Requests of clients that have left may still wait in their sockets, so this may take a while. */
static void assert_nothing_left(void)
{
    for (int i = 0; i < 15000 && (atomic_load(&front->n_streams) || http_loop_connections(http_server_loop(front->http, 0))); i++)
        clock_sleep_us(1000);
    assert_int_equal(atomic_load(&front->n_streams), 0);
    assert_true(engine_idle(1000));
}

/* With no token flowing, before any byte was answered, streamed or not. */
static void leaving_cancels(void **state)
{
    (void)state;
    for (int streamed = 0; streamed < 2; streamed++)
        for (int flowing = 0; flowing < 2; flowing++) {
            fake_reset("abc ");
            fake.endless = true;
            fake.hold = !flowing;
            int fd = post_open(streamed ? "{\"prompt\":\"p\",\"max_tokens\":2000,\"n\":2,\"stream\":true}"
                                        : "{\"prompt\":[\"p\",\"q\"],\"max_tokens\":2000}");
            assert_true(submitted(1, 2000));
            if (flowing) clock_sleep_us(10000);
            close(fd);
            assert_true(engine_idle(300));
            assert_true(fake.n_cancels >= 1);
        }
    fake_reset("abc");
    json_decref(post("/v1/completions", "{\"prompt\":\"p\"}", 200)); /* the neighbours are well */
    assert_nothing_left();
}

/* Clients that leave at random moments; nothing may be left behind. */
static void leaving_at_random(void **state)
{
    (void)state;
    fake_reset("some words ");
    fake.endless = true;
    for (int round = 0; round < 10; round++) {
        int fds[20];
        for (int i = 0; i < 20; i++)
            fds[i] = post_open(i % 2 ? "{\"prompt\":\"p\",\"max_tokens\":100,\"stream\":true,\"stop\":\"wordz\"}"
                                     : "{\"prompt\":[\"p\",\"r\"],\"max_tokens\":30,\"n\":2,\"logprobs\":3}");
        for (int i = 0; i < 20; i++) {
            clock_sleep_us((i * 7919 + round * 104729) % 3000);
            close(fds[(i * 7) % 20]);
        }
    }
    assert_nothing_left();
}

/* A reader that stops reading is cut when its bounded buffer is full; others do not notice. */
static void slow_reader_is_cut(void **state)
{
    (void)state;
    fake_reset("0123456789");
    fake.endless = true;
    fake.tokens_a_step = 8;
    int small = 4096, fd = client_open();
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &small, sizeof small);
    struct buf text;
    buf_init(&text, 0);
    request_text(&text, "POST", "/v1/completions", NULL,
                 "{\"prompt\":\"p\",\"max_tokens\":2000,\"n\":64,\"logprobs\":20,\"stream\":true}");
    client_send(fd, text.data, text.n);
    assert_true(submitted(1, 2000));
    for (int i = 0; i < 10000 && !atomic_load(&front->metrics.counters[METRIC_SLOW_CLIENTS]); i++)
        clock_sleep_us(1000);
    assert_true(atomic_load(&front->metrics.counters[METRIC_SLOW_CLIENTS]) >= 1);
    assert_true(engine_idle(2000));
    fake_reset("abc");
    json_decref(post("/v1/completions", "{\"prompt\":\"p\"}", 200));
    close(fd);
    buf_fini(&text);
}

static void many_connections(void **state)
{
    (void)state;
    enum { N = 300 };
    static int fds[N];
    fake_reset("abcdefgh");
    for (int i = 0; i < N; i++) fds[i] = post_open("{\"prompt\":\"p\",\"max_tokens\":8,\"stream\":true}");
    for (int i = 0; i < N; i++) {
        struct answer a;
        client_answer(fds[i], false, &a);
        assert_int_equal(a.status, 200);
        assert_non_null(strstr(a.body.data, "data: [DONE]"));
        answer_fini(&a);
        close(fds[i]);
    }
}

/* A body too long for its loop is parsed elsewhere: answered all the same, errors too, and given up
 * when its client leaves. */
static void long_bodies(void **state)
{
    (void)state;
    struct buf body;
    buf_init(&body, 0);
    fake_reset("abc");
    for (int bad = 0; bad < 2; bad++) {
        buf_clear(&body);
        buf_printf(&body, "{\"prompt\":\"p\",\"max_tokens\":2,\"temperature\":%d,\"metadata\":\"", bad ? 9 : 1);
        for (int i = 0; i < 60000; i++) buf_add_char(&body, 'a');
        buf_add_string(&body, "\"}");
        json_t *a = post("/v1/completions", buf_string(&body), bad ? 400 : 200);
        if (bad) assert_string_equal(text_at(a, "error.param"), "temperature");
        else assert_string_equal(text_at(a, "choices.0.text"), "ab");
        json_decref(a);
    }
    for (int i = 0; i < 40; i++) {
        int fd = post_open(buf_string(&body));
        clock_sleep_us(i * 20);
        close(fd);
    }
    assert_true(engine_idle(2000));
    buf_fini(&body);
}

static void unix_socket(void **state)
{
    (void)state;
    struct front *first = front;
    struct front_config c = fixture_config();
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    struct answer a;
    snprintf(address.sun_path, sizeof address.sun_path, "/tmp/heddle-front-%d", (int)getpid());
    c.http.host = NULL;
    c.http.uds = address.sun_path;
    fixture_open(&c);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&address, sizeof address), 0);
    client_send(fd, "GET /live HTTP/1.1\r\n\r\n", 22);
    client_answer(fd, false, &a);
    assert_int_equal(a.status, 200);
    answer_fini(&a);
    close(fd);
    struct front *other = NULL; /* the socket of a live server is not taken away */
    assert_int_equal(front_create(&c, &other), ERR_IO);
    front_stop(front);
    front_destroy(front);
    assert_int_equal(access(address.sun_path, F_OK), -1);
    front = first;
    port = http_server_port(front->http);
}

static void failing_midway(void **state)
{
    (void)state;
    fake_reset("abc");
    fake.endless = true;
    fake_pace(5000);
    int fd = post_open("{\"prompt\":\"p\",\"max_tokens\":2000,\"stream\":true}");
    struct buf in;
    buf_init(&in, 0);
    assert_true(client_read_until(fd, "\"text\":\"a\"", 2000, &in));
    pthread_mutex_lock(&fake.mutex);
    fake.fail = ERR_DEVICE;
    pthread_mutex_unlock(&fake.mutex);
    assert_true(client_read_until(fd, "data: [DONE]", 2000, &in));
    const char *p = strstr(in.data, "data: {\"error\":{\"message\":");
    assert_non_null(p);
    assert_true(strstr(p, "[DONE]") > p);
    close(fd);
    buf_fini(&in);
    fake_pace(300);
    fake_reset("abc");
}

static void unknown_numbers_of_metrics(void **state)
{
    (void)state;
    struct answer a;
    static const char *const names[] = {
        "vllm:num_requests_running{model_name=\"tiny\",engine=\"0\"} ", "vllm:kv_cache_usage_perc{model_name=\"tiny\",engine=\"0\"} 0.25",
        "vllm:cache_config_info{", "vllm:time_to_first_token_seconds_bucket{model_name=\"tiny\",engine=\"0\",le=\"0.001\"}",
        "vllm:request_success_total{model_name=\"tiny\",engine=\"0\",finished_reason=\"stop\"} ",
        "heddle:kv_blocks{model_name=\"tiny\",engine=\"0\",state=\"free\"} 75", "http_requests_total{handler=\"/v1/completions\",method=\"POST\",status=\"200\"} ",
        "heddle:slow_clients_total{model_name=\"tiny\",engine=\"0\"} 1", "heddle:requests_cancelled_total{"};
    call_with("GET", "/metrics", NULL, NULL, &a);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (!strstr(a.body.data, names[i])) fprintf(stderr, "no %s in\n%s\n", names[i], a.body.data);
        assert_non_null(strstr(a.body.data, names[i]));
    }
    answer_fini(&a);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(malformed_requests),      cmocka_unit_test(limits_of_heads),
        cmocka_unit_test(routes_and_methods),      cmocka_unit_test(cors),
        cmocka_unit_test(chunked_and_pipelined),   cmocka_unit_test(slow_request_is_ended),
        cmocka_unit_test(leaving_cancels),         cmocka_unit_test(leaving_at_random),
        cmocka_unit_test(slow_reader_is_cut),      cmocka_unit_test(many_connections),
        cmocka_unit_test(long_bodies),             cmocka_unit_test(unix_socket),
        cmocka_unit_test(failing_midway),          cmocka_unit_test(unknown_numbers_of_metrics),
    };
    return cmocka_run_group_tests(tests, begin, end);
}
