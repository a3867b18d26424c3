/* The verbs of rpc.h: chooses the implementation, and what both of them share. Knows neither gRPC
 * nor threads' queues. */
#include "base/clock.h"
#include "base/mem.h"
#include "proto/rpc_impl.h"

#include <stdio.h>
#include <string.h>

/* ---- Statuses and secrets ---- */

enum err rpc_err(int code)
{
    switch (code) {
    case RPC_OK:
        return OK;
    case RPC_CANCELLED:
        return ERR_CANCELLED;
    case RPC_INVALID_ARGUMENT:
        return ERR_INVALID;
    case RPC_DEADLINE_EXCEEDED:
        return ERR_DEADLINE;
    case RPC_NOT_FOUND:
        return ERR_NOT_FOUND;
    case RPC_RESOURCE_EXHAUSTED:
        return ERR_FULL;
    case RPC_FAILED_PRECONDITION:
        return ERR_NOT_READY;
    case RPC_UNIMPLEMENTED:
        return ERR_NO_ROUTE;
    case RPC_UNAVAILABLE:
        return ERR_PEER;
    case RPC_UNAUTHENTICATED:
        return ERR_UNAUTHORIZED;
    default:
        return ERR_INTERNAL;
    }
}

bool rpc_token_equal(struct span given, const char *secret)
{
    size_t n = strlen(secret);
    volatile unsigned char difference = given.n != n;
    for (size_t i = 0; i < n; i++)
        difference |= (unsigned char)(secret[i] ^ (given.n ? given.data[i % given.n] : 1));
    return difference == 0;
}

/* ---- Messages ---- */

enum err rpc_bytes_create(const void *data, size_t n, struct rpc_bytes **out)
{
    struct rpc_bytes *b;
    size_t bytes;
    if (!size_add(sizeof *b, n, &bytes)) FAIL(ERR_TOO_BIG, "a message of %zu bytes", n);
    TRY(mem_alloc(bytes, (void **)&b));
    atomic_init(&b->refs, 1);
    b->n = n;
    b->data = b->inside;
    if (n) memcpy(b->data, data, n);
    *out = b;
    return OK;
}

enum err rpc_bytes_take(struct buf *from, struct rpc_bytes **out)
{
    struct rpc_bytes *b;
    TRY(buf_err(from));
    if (!from->data) return rpc_bytes_create("", 0, out);
    TRY(MEM_NEW(&b));
    atomic_init(&b->refs, 1);
    b->n = from->n;
    b->data = from->data;
    buf_init(from, from->limit);
    *out = b;
    return OK;
}

struct rpc_bytes *rpc_bytes_acquire(struct rpc_bytes *b)
{
    atomic_fetch_add(&b->refs, 1);
    return b;
}

void rpc_bytes_release(struct rpc_bytes *b)
{
    if (!b || atomic_fetch_sub(&b->refs, 1) != 1) return;
    if (b->data != b->inside) mem_free(b->data);
    mem_free(b);
}

struct span rpc_bytes_span(const struct rpc_bytes *b)
{
    return (struct span){b->data, b->n};
}

enum err rpc_fifo_push(struct rpc_fifo *f, struct rpc_bytes *b)
{
    if (f->n && (f->bytes + b->n > f->limit || f->n >= RPC_FIFO_MESSAGES_MAX))
        FAIL(ERR_FULL, "%zu bytes in %zu messages wait for a slow reader already", f->bytes, f->n);
    if (f->n == f->capacity) {
        size_t capacity = f->capacity ? 2 * f->capacity : 8;
        struct rpc_bytes **items;
        TRY(MEM_NEW_ARRAY(capacity, &items));
        for (size_t i = 0; i < f->n; i++)
            items[i] = f->items[(f->head + i) % f->capacity];
        mem_free(f->items);
        f->items = items, f->capacity = capacity, f->head = 0;
    }
    f->items[(f->head + f->n++) % f->capacity] = rpc_bytes_acquire(b);
    f->bytes += b->n;
    return OK;
}

struct rpc_bytes *rpc_fifo_pop(struct rpc_fifo *f)
{
    if (!f->n) return NULL;
    struct rpc_bytes *b = f->items[f->head];
    f->head = (f->head + 1) % f->capacity;
    f->n--;
    f->bytes -= b->n;
    return b;
}

void rpc_fifo_fini(struct rpc_fifo *f)
{
    while (f->n)
        rpc_bytes_release(rpc_fifo_pop(f));
    mem_free(f->items);
    f->items = NULL;
    f->capacity = 0;
}

/* ---- Calls ---- */

enum err rpc_send_shared(struct rpc_call *c, struct rpc_bytes *bytes)
{
    if (bytes->n > RPC_MESSAGE_BYTES_MAX)
        FAIL(ERR_TOO_BIG, "a message of %zu bytes; at most %d", bytes->n, RPC_MESSAGE_BYTES_MAX);
    return c->ops->send(c, bytes);
}

enum err rpc_send(struct rpc_call *c, const void *data, size_t n)
{
    struct rpc_bytes *b;
    TRY(rpc_bytes_create(data, n, &b));
    enum err e = rpc_send_shared(c, b);
    rpc_bytes_release(b);
    return e;
}

size_t rpc_send_pending_bytes(struct rpc_call *c)
{
    return c->ops->pending(c);
}
void rpc_half_close(struct rpc_call *c)
{
    c->ops->half_close(c);
}
void rpc_finish(struct rpc_call *c, int code, const char *text)
{
    c->ops->finish(c, code, text ? text : "");
}
void rpc_cancel(struct rpc_call *c)
{
    c->ops->cancel(c);
}
void rpc_hold(struct rpc_call *c)
{
    c->ops->hold(c, true);
}
void rpc_resume(struct rpc_call *c)
{
    c->ops->hold(c, false);
}

struct rpc_call *rpc_acquire(struct rpc_call *c)
{
    atomic_fetch_add(&c->refs, 1);
    return c;
}

void rpc_release(struct rpc_call *c)
{
    if (c && atomic_fetch_sub(&c->refs, 1) == 1) c->ops->free(c);
}

void rpc_set_user(struct rpc_call *c, void *user)
{
    atomic_store(&c->user, user);
}
void *rpc_user(const struct rpc_call *c)
{
    return atomic_load(&c->user);
}
const char *rpc_peer(const struct rpc_call *c)
{
    return c->peer;
}
const char *rpc_peer_name(const struct rpc_call *c)
{
    return c->peer_name;
}
const char *rpc_path(const struct rpc_call *c)
{
    return c->path;
}
struct span rpc_metadata(const struct rpc_call *c, const char *key)
{
    return c->ops->metadata(c, key);
}

int64_t rpc_time_left_us(const struct rpc_call *c)
{
    return c->deadline_us == INT64_MAX ? INT64_MAX : c->deadline_us - clock_monotonic_us();
}

/* ---- Servers ---- */

enum err rpc_server_init(struct rpc_server *s, const struct rpc_server_config *config)
{
    if (config->n_methods > RPC_METHODS_MAX)
        FAIL(ERR_INVALID, "%zu methods; at most %d", config->n_methods, RPC_METHODS_MAX);
    for (size_t i = 0; i < config->n_methods; i++)
        s->methods[i] = config->methods[i];
    s->n_methods = config->n_methods;
    s->authorize = config->authorize;
    s->authorize_ctx = config->authorize_ctx;
    s->n_calls_max = config->n_calls_max ? config->n_calls_max : 4096;
    s->message_bytes_max =
        config->message_bytes_max ? config->message_bytes_max : RPC_MESSAGE_BYTES_MAX;
    s->address = mem_strdup(config->address);
    s->token = config->token ? mem_strdup(config->token) : NULL;
    if (!s->address || (config->token && !s->token)) FAIL(ERR_NO_MEMORY, "no memory for a server");
    return OK;
}

void rpc_server_fini(struct rpc_server *s)
{
    mem_free(s->address);
    mem_free(s->token);
}

static bool authorized(const struct rpc_server *s, const char *path, struct span value)
{
    static const char scheme[] = "Bearer ";
    size_t n = sizeof scheme - 1;
    struct span bearer = {"", 0};
    if (value.n > n && !strncasecmp(value.data, scheme, n))
        bearer = (struct span){value.data + n, value.n - n};
    if (s->authorize) return s->authorize(s->authorize_ctx, path, bearer);
    return !s->token || rpc_token_equal(bearer, s->token);
}

const struct rpc_method *rpc_server_admit(struct rpc_server *s, const char *path,
                                          struct span authorization, int *out_code,
                                          const char **out_text)
{
    bool full = atomic_fetch_add(&s->n_calls, 1) >= s->n_calls_max;
    const struct rpc_method *m = NULL;
    for (size_t i = 0; i < s->n_methods && !m; i++)
        if (!strcmp(s->methods[i].path, path)) m = &s->methods[i];
    *out_code = RPC_OK, *out_text = "";
    /* Strangers learn nothing of what exists: the token comes first. */
    if (!(m && m->flags & RPC_PUBLIC) && !authorized(s, path, authorization))
        *out_code = RPC_UNAUTHENTICATED, *out_text = "a bearer token is missing or wrong";
    else if (!m)
        *out_code = RPC_UNIMPLEMENTED, *out_text = "no such method";
    else if (full)
        *out_code = RPC_RESOURCE_EXHAUSTED, *out_text = "too many calls at once";
    return *out_code == RPC_OK ? m : NULL;
}

static bool is_local(const char *address)
{
    return !strncmp(address, "local:", 6);
}

enum err rpc_server_create(const struct rpc_server_config *config, struct rpc_server **out)
{
    if (!config->address || !*config->address) FAIL(ERR_INVALID, "a server needs an address");
    return is_local(config->address) ? rpc_local_server_create(config, out)
                                     : rpc_net_server_create(config, out);
}

int rpc_server_port(const struct rpc_server *s)
{
    return s->ops->port(s);
}
uint32_t rpc_server_calls(struct rpc_server *s)
{
    return atomic_load(&s->n_calls);
}
bool rpc_server_drain(struct rpc_server *s, int timeout_ms)
{
    return s->ops->drain(s, timeout_ms);
}

void rpc_server_destroy(struct rpc_server *s)
{
    if (s) s->ops->destroy(s);
}

/* ---- Channels ---- */

enum err rpc_channel_init(struct rpc_channel *ch, const struct rpc_channel_config *config)
{
    struct buf bearer;
    buf_init(&bearer, 0);
    ch->send_bytes_max = config->send_bytes_max ? config->send_bytes_max : RPC_SEND_BYTES_MAX;
    ch->message_bytes_max =
        config->message_bytes_max ? config->message_bytes_max : RPC_MESSAGE_BYTES_MAX;
    ch->address = mem_strdup(config->address);
    if (config->token) buf_printf(&bearer, "Bearer %s", config->token);
    ch->bearer = bearer.data;
    if (!ch->address || buf_err(&bearer)) FAIL(ERR_NO_MEMORY, "no memory for a channel");
    return OK;
}

void rpc_channel_fini(struct rpc_channel *ch)
{
    mem_free(ch->address);
    mem_free(ch->bearer);
}

enum err rpc_channel_create(const struct rpc_channel_config *config, struct rpc_channel **out)
{
    if (!config->address || !*config->address) FAIL(ERR_INVALID, "a channel needs an address");
    return is_local(config->address) ? rpc_local_channel_create(config, out)
                                     : rpc_net_channel_create(config, out);
}

void rpc_channel_destroy(struct rpc_channel *ch)
{
    if (ch) ch->ops->destroy(ch);
}

enum err rpc_open(struct rpc_channel *ch, const char *path, int timeout_ms,
                  const struct rpc_handler *handler, struct rpc_call **out)
{
    if (strlen(path) >= sizeof((struct rpc_call *)0)->path)
        FAIL(ERR_INVALID, "the path of a call is too long");
    return ch->ops->open(ch, path, timeout_ms, handler, out);
}

/* ---- One request, one reply ---- */

struct unary {
    pthread_mutex_t mutex;
    pthread_cond_t ended;
    struct buf *reply;
    enum err e;
    int n_messages;
    bool over;
    int code;
    char text[RPC_STATUS_TEXT_MAX];
};

static void unary_message(struct rpc_call *call, void *ctx, struct span bytes)
{
    struct unary *u = ctx;
    (void)call;
    if (u->n_messages++ == 0) u->e = buf_add(u->reply, bytes.data, bytes.n);
}

static void unary_end(struct rpc_call *call, void *ctx, int code, const char *text)
{
    struct unary *u = ctx;
    (void)call;
    pthread_mutex_lock(&u->mutex);
    u->code = code;
    snprintf(u->text, sizeof u->text, "%s", text);
    u->over = true;
    pthread_cond_signal(&u->ended);
    pthread_mutex_unlock(&u->mutex);
}

static enum err unary_judge(const struct unary *u, const char *path)
{
    if (u->code != RPC_OK)
        FAIL(rpc_err(u->code), "%s: %s", path, *u->text ? u->text : "failed without words");
    if (u->n_messages != 1)
        FAIL(ERR_FORMAT, "%s answered %d messages instead of one", path, u->n_messages);
    if (u->e) FAIL(u->e, "%s: the reply is longer than the limit", path);
    return OK;
}

enum err rpc_unary(struct rpc_channel *ch, const char *path, struct span request, int timeout_ms,
                   struct buf *out_reply, int *out_code)
{
    struct unary u = {.reply = out_reply, .code = RPC_UNKNOWN};
    struct rpc_handler handler = {unary_message, unary_end, &u};
    struct rpc_call *call = NULL;
    pthread_mutex_init(&u.mutex, NULL);
    pthread_cond_init(&u.ended, NULL);
    if (out_code) *out_code = RPC_UNKNOWN;
    enum err e = rpc_open(ch, path, timeout_ms, &handler, &call);
    if (e) goto out;
    e = rpc_send(call, request.data, request.n);
    if (e)
        rpc_cancel(
            call); /* on_end still comes, and has the better words unless the call is too big */
    rpc_half_close(call);
    pthread_mutex_lock(&u.mutex);
    while (!u.over)
        pthread_cond_wait(&u.ended, &u.mutex);
    pthread_mutex_unlock(&u.mutex);
    rpc_release(call);
    if (out_code) *out_code = u.code;
    if (e != ERR_TOO_BIG && e != ERR_NO_MEMORY) e = unary_judge(&u, path);
out:
    pthread_cond_destroy(&u.ended);
    pthread_mutex_destroy(&u.mutex);
    return e;
}
