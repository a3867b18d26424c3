/* Round trips of one bidirectional stream, against a bare socket in the same run, and the rate of
 * small messages in one direction: what a step plan costs on its way to a rank.
 *
 * usage: bench_rpc [ROUNDS]; prints rows of CSV: what, bytes, p50 us, p99 us, ratio to the socket. */
#include "base/clock.h"
#include "base/mem.h"
#include "proto/rpc.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { BYTES_MAX = 1 << 16, ROUNDS_MAX = 200000 };
static double samples[ROUNDS_MAX];
static char payload[BYTES_MAX];

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return x < y ? -1 : x > y;
}

static double report(const char *what, size_t bytes, int rounds, double base)
{
    qsort(samples, (size_t)rounds, sizeof *samples, compare);
    double p50 = samples[rounds / 2], p99 = samples[rounds * 99 / 100];
    printf("%s,%zu,%.1f,%.1f,%.2f\n", what, bytes, p50, p99, base > 0 ? p50 / base : 1.0);
    fflush(stdout);
    return p50;
}

/* ---- A bare socket ---- */

static bool all_read(int fd, char *to, size_t n)
{
    for (ssize_t got; n; to += got, n -= (size_t)got)
        if ((got = read(fd, to, n)) <= 0) return false;
    return true;
}

static void *echo_run(void *ctx)
{
    static char bytes[BYTES_MAX];
    int fd = *(int *)ctx;
    uint32_t n;
    while (all_read(fd, (char *)&n, sizeof n) && all_read(fd, bytes, n))
        if (send(fd, bytes, n, MSG_NOSIGNAL) < 0) break;
    return NULL;
}

static void socket_pair(bool tcp, int fds[2])
{
    if (!tcp) {
        if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds)) abort();
        return;
    }
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t n = sizeof a;
    int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(listener, (struct sockaddr *)&a, sizeof a) || listen(listener, 1)) abort();
    getsockname(listener, (struct sockaddr *)&a, &n);
    fds[0] = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fds[0], (struct sockaddr *)&a, sizeof a)) abort();
    fds[1] = accept(listener, NULL, NULL);
    for (int i = 0; i < 2; i++) setsockopt(fds[i], IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    close(listener);
}

static double bench_socket(bool tcp, size_t bytes, int rounds)
{
    static char message[BYTES_MAX + 4], back[BYTES_MAX];
    int fds[2];
    pthread_t thread;
    uint32_t n = (uint32_t)bytes;
    socket_pair(tcp, fds);
    pthread_create(&thread, NULL, echo_run, &fds[1]);
    memcpy(message, &n, sizeof n);
    for (int i = 0; i < rounds; i++) {
        int64_t t0 = clock_monotonic_ns();
        if (send(fds[0], message, bytes + 4, MSG_NOSIGNAL) < 0 || !all_read(fds[0], back, bytes)) abort();
        samples[i] = (double)(clock_monotonic_ns() - t0) / 1e3;
    }
    close(fds[0]);
    pthread_join(thread, NULL);
    close(fds[1]);
    return report(tcp ? "socket tcp" : "socket unix", bytes, rounds, 0);
}

/* ---- The stream ---- */

static sem_t back;
static atomic_int n_back;

/* As a worker does: the polling thread hands over, another thread answers. */
struct hand {
    struct rpc_call *call;
    sem_t full;
    size_t bytes;
    atomic_bool stop;
};
static struct hand hand;

static void *answer_run(void *ctx)
{
    (void)ctx;
    for (;;) {
        while (sem_wait(&hand.full)) continue;
        if (atomic_load(&hand.stop)) return NULL;
        (void)rpc_send(hand.call, payload, hand.bytes);
    }
}

static void server_message(struct rpc_call *call, void *ctx, struct span bytes)
{
    (void)ctx;
    if (!hand.call) hand.call = rpc_acquire(call);
    hand.bytes = bytes.n;
    sem_post(&hand.full);
}

static void client_message(struct rpc_call *call, void *ctx, struct span bytes)
{
    (void)call, (void)ctx, (void)bytes;
    atomic_fetch_add(&n_back, 1);
    sem_post(&back);
}

static double bench_stream(const char *what, const char *listen, size_t bytes, int rounds, double base)
{
    const struct rpc_method method = {.path = "/bench.B/Talk", .kind = RPC_BIDI, .on_message = server_message};
    struct rpc_server_config sc = {.address = listen, .methods = &method, .n_methods = 1};
    struct rpc_handler handler = {client_message, NULL, NULL};
    struct rpc_server *server;
    struct rpc_channel *channel;
    struct rpc_call *call;
    char address[64];
    pthread_t thread;
    hand = (struct hand){0};
    sem_init(&back, 0, 0);
    sem_init(&hand.full, 0, 0);
    if (rpc_server_create(&sc, &server)) abort();
    int port = rpc_server_port(server);
    if (port) snprintf(address, sizeof address, "127.0.0.1:%d", port);
    else snprintf(address, sizeof address, "%s", listen);
    struct rpc_channel_config cc = {.address = address};
    if (rpc_channel_create(&cc, &channel) || rpc_open(channel, "/bench.B/Talk", 0, &handler, &call)) abort();
    pthread_create(&thread, NULL, answer_run, NULL);
    for (int i = -100; i < rounds; i++) { /* a hundred to warm up */
        int64_t t0 = clock_monotonic_ns();
        (void)rpc_send(call, payload, bytes);
        while (sem_wait(&back)) continue;
        if (i >= 0) samples[i] = (double)(clock_monotonic_ns() - t0) / 1e3;
    }
    double p50 = report(what, bytes, rounds, base);
    atomic_store(&hand.stop, true);
    sem_post(&hand.full);
    pthread_join(thread, NULL);
    rpc_cancel(call);
    rpc_release(call);
    rpc_release(hand.call);
    rpc_channel_destroy(channel);
    rpc_server_destroy(server);
    return p50;
}

int main(int argc, char **argv)
{
    static const size_t sizes[] = {256, 4096, 65536};
    int rounds = argc > 1 ? (int)strtol(argv[1], NULL, 10) : 5000;
    char unix_path[64];
    if (rounds < 100 || rounds > ROUNDS_MAX) rounds = 5000;
    snprintf(unix_path, sizeof unix_path, "unix:/tmp/heddle-bench-%d.sock", (int)getpid());
    printf("what,bytes,p50_us,p99_us,ratio\n");
    for (int i = 0; i < 3; i++) {
        double tcp = bench_socket(true, sizes[i], rounds), local = bench_socket(false, sizes[i], rounds);
        bench_stream("stream tcp", "127.0.0.1:0", sizes[i], rounds, tcp);
        bench_stream("stream unix", unix_path, sizes[i], rounds, local);
        bench_stream("stream local", "local:bench", sizes[i], rounds, local);
    }
    return 0;
}
