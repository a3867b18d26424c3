/* Goal: what only a network has: strangers' bytes, TLS with right and wrong certificates, peers
 * whose process is killed. Method: raw sockets, certificates made by openssl, this program started
 * again. */
#include "unit/proto/rpc_fixture.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <signal.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>

extern char **environ;

static void test_strangers(void **state)
{
    static const char *const noises[] = {
        "GET / HTTP/1.1\r\nHost: x\r\n\r\n", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff", "",
        "\0\0\0\0\0\0\0\0\0\0\0\0"};
    struct fixture *f = start(address_get(state), NULL, NULL);
    int fds[64];
    for (int i = 0; i < 64; i++) {
        struct sockaddr_in to = {.sin_family = AF_INET,
                                 .sin_port = htons((uint16_t)rpc_server_port(f->server)),
                                 .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
        const char *noise = noises[i % 5];
        fds[i] = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        assert_int_equal(connect(fds[i], (struct sockaddr *)&to, sizeof to), 0);
        size_t n = i % 5 == 2 ? 33 : i % 5 == 4 ? 12 : strlen(noise);
        assert_int_equal(send(fds[i], noise, n, MSG_NOSIGNAL), n);
    }
    struct buf reply;
    int code;
    for (int i = 0; i < 10; i++) {
        assert_int_equal(unary(f, "/test.T/Echo", &reply, &code), OK);
        buf_fini(&reply);
    }
    for (int i = 0; i < 64; i++)
        close(fds[i]);
    assert_int_equal(unary(f, "/test.T/Echo", &reply, &code), OK);
    buf_fini(&reply);
    finish(f);
}

static void test_tls(void **state)
{
    (void)state;
    char dir[] = "/tmp/heddle-rpc-XXXXXX", command[2048], ca[64], crt[64], key[64], ca2[64];
    assert_non_null(mkdtemp(dir));
    snprintf(command, sizeof command,
             "cd %s && exec 2>/dev/null && "
             "for c in ca ca2; do openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 "
             "-nodes -keyout $c.key -out $c.crt "
             "-subj /CN=$c -days 2 || exit 1; done && "
             "openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout s.key -out "
             "s.csr -subj /CN=node7 && "
             "printf 'subjectAltName=DNS:node7.test' > ext && "
             "openssl x509 -req -in s.csr -CA ca.crt -CAkey ca.key -CAcreateserial -out s.crt "
             "-days 2 -extfile ext",
             dir);
    if (system(command)) skip(); /* no openssl program */
    snprintf(ca, sizeof ca, "%s/ca.crt", dir);
    snprintf(ca2, sizeof ca2, "%s/ca2.crt", dir);
    snprintf(crt, sizeof crt, "%s/s.crt", dir);
    snprintf(key, sizeof key, "%s/s.key", dir);
    const struct {
        struct rpc_tls tls;
        bool ok;
    } clients[] = {
        {{ca, crt, key, "node7.test"}, true},    {{ca, crt, key, "other"}, false},
        {{ca, NULL, NULL, "node7.test"}, false}, {{ca2, crt, key, "node7.test"}, false},
        {{NULL, NULL, NULL, NULL}, false},
    };
    struct rpc_server *s;
    struct rpc_server_config sc = {
        .address = "127.0.0.1:0", .tls = {ca, crt, key, NULL}, .methods = methods, .n_methods = 5};
    if (rpc_server_create(&sc, &s)) fail_msg("%s", err_detail());
    char address[64];
    snprintf(address, sizeof address, "127.0.0.1:%d", rpc_server_port(s));
    for (size_t i = 0; i < sizeof clients / sizeof *clients; i++) {
        struct fixture f = {.server = s};
        struct rpc_channel_config cc = {.address = address, .tls = clients[i].tls};
        struct buf reply;
        int code;
        assert_int_equal(rpc_channel_create(&cc, &f.channel), OK);
        buf_init(&reply, 0);
        enum err e = rpc_unary(f.channel, "/test.T/Echo", span_of("x"), 5000, &reply, &code);
        assert_int_equal(e == OK, clients[i].ok);
        if (e) assert_int_equal(code, RPC_UNAVAILABLE);
        buf_fini(&reply);
        rpc_channel_destroy(f.channel);
    }
    rpc_server_destroy(s);
    struct rpc_server_config bad = {.address = "127.0.0.1:0", .tls = {.cert_file = crt}};
    assert_int_equal(rpc_server_create(&bad, &s), ERR_INVALID);
    bad.tls.key_file = "/nowhere/key";
    assert_int_not_equal(rpc_server_create(&bad, &s), OK);
    bad.tls = (struct rpc_tls){.cert_file = key, .key_file = crt}; /* swapped */
    assert_int_not_equal(rpc_server_create(&bad, &s), OK);
    snprintf(command, sizeof command, "rm -r %s", dir);
    assert_int_equal(system(command), 0);
}

static pid_t peer_start(const char *role, const char *address, int *out_port)
{
    int fds[2];
    pid_t pid;
    char line[32] = "";
    assert_int_equal(pipe(fds), 0);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, fds[1], 1);
    char program[] = "test_rpc",
         *argv[] = {program, (char *)(uintptr_t)role, (char *)(uintptr_t)address, NULL};
    assert_int_equal(posix_spawn(&pid, "/proc/self/exe", &actions, NULL, argv, environ), 0);
    posix_spawn_file_actions_destroy(&actions);
    close(fds[1]);
    assert_true(read(fds[0], line, sizeof line - 1) > 0);
    close(fds[0]);
    *out_port = (int)strtol(line, NULL, 10);
    return pid;
}

static int peer_main(const char *role, const char *address)
{
    struct rpc_server *s = NULL;
    struct rpc_channel *ch = NULL;
    struct record r = {0};
    struct rpc_handler h = {record_message, record_end, &r};
    struct rpc_call *call;
    if (!strcmp(role, "serve")) {
        struct rpc_server_config sc = {.address = address, .methods = methods, .n_methods = 5};
        if (rpc_server_create(&sc, &s)) return 1;
        printf("%d\n", rpc_server_port(s));
    } else {
        struct rpc_channel_config cc = {.address = address};
        if (rpc_channel_create(&cc, &ch) || rpc_open(ch, "/test.T/Talk", 0, &h, &call)) return 1;
        (void)rpc_send(call, "x", 1);
        printf("1\n");
    }
    fflush(stdout);
    for (;;)
        pause();
}

static void test_killed_server(void **state)
{
    (void)state;
    int port, status;
    pid_t pid = peer_start("serve", "127.0.0.1:0", &port);
    struct fixture f = {0};
    struct rpc_channel_config cc = {.address = f.address};
    snprintf(f.address, sizeof f.address, "127.0.0.1:%d", port);
    assert_int_equal(rpc_channel_create(&cc, &f.channel), OK);
    struct record r = {0};
    struct rpc_call *call = open_call(&f, "/test.T/Talk", 0, &r);
    assert_int_equal(rpc_send(call, "x", 1), OK);
    assert_true(wait_for(&r.n_messages, 1, 10000));
    int64_t t0 = clock_monotonic_us();
    kill(pid, SIGKILL);
    assert_true(wait_for(&r.ended, 1, 2000));
    assert_int_equal(r.code, RPC_UNAVAILABLE);
    assert_true(clock_monotonic_us() - t0 < 1000000);
    waitpid(pid, &status, 0);
    rpc_release(call);
    rpc_channel_destroy(f.channel);
}

static void test_killed_client(void **state)
{
    struct fixture *f = start(address_get(state), NULL, NULL);
    int port, status;
    pid_t pid = peer_start("talk", f->address, &port);
    assert_true(wait_for(&seen.n_messages, 1, 10000));
    kill(pid, SIGKILL);
    assert_true(wait_for(&seen.n_cancelled, 1, 2000));
    waitpid(pid, &status, 0);
    finish(f);
}

int main(int argc, char **argv)
{
    static char tcp[] = "127.0.0.1:0";
    if (argc == 3) return peer_main(argv[1], argv[2]);
#define TCP(f)                                                                                     \
    {                                                                                              \
        "tcp " #f, f, NULL, NULL, tcp                                                              \
    }
    const struct CMUnitTest tests[] = {TCP(test_strangers), TCP(test_tls), TCP(test_killed_server),
                                       TCP(test_killed_client)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
