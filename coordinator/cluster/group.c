/* One group: how an epoch begins (all ranks joined, Welcome, Exchange, Ready) and ends (any rank
 * lost). Called with the cluster's mutex held. Knows ranks; never sockets or plans. */
#include "base/clock.h"
#include "base/log.h"
#include "base/mem.h"
#include "coordinator/cluster/cluster_impl.h"

#include <stdio.h>
#include <string.h>
#include <sys/random.h>

static void send_to(struct rank *r, const ProtobufCMessage *message)
{
    if (!r->stream) return;
    /* A rank whose queue is full of what it does not read ends by its own silence or here. */
    if (envelope_send(r->stream->call, message) == ERR_FULL) rpc_cancel(r->stream->call);
}

void group_mark_dirty(struct cluster *c, struct group *g)
{
    if (!g->dirty) {
        g->dirty = true;
        g->dirty_next = c->dirty;
        c->dirty = g;
    }
    pthread_cond_signal(&c->work);
}

/* ---- Forming ---- */

static void key_make(char out[33])
{
    unsigned char bytes[16];
    ASSERT(getrandom(bytes, sizeof bytes, 0) == sizeof bytes);
    for (int i = 0; i < 16; i++)
        snprintf(out + 2 * i, 3, "%02x", bytes[i]);
}

static void least32(uint32_t *least, uint32_t value)
{
    if (value < *least) *least = value;
}

/* Ranks whose draft models differ would verify different drafts: such a group uses none. */
static bool draft_fits(const struct group *g, const Heddle__Cluster__Join *j)
{
    const Heddle__Cluster__Join *first = g->ranks[0].stream->join->join;
    bool same = !strcmp(j->draft_digest, first->draft_digest);
    if (!same && (j->has_draft_model || first->has_draft_model))
        log_warn("group %u: rank %u has %s draft model, rank 0 %s: it is not used", g->index,
                 j->rank, !j->has_draft_model ? "no" : first->has_draft_model ? "another" : "a",
                 first->has_draft_model ? "one" : "none");
    return same && j->has_draft_model;
}

/* 0 = no bound */
static void least_bound(uint32_t *least, uint32_t bound)
{
    if (bound && (!*least || bound < *least)) *least = bound;
}

static void most32(uint32_t *most, uint32_t value)
{
    if (value > *most) *most = value;
}

/* What the group can do is what its weakest rank can do. */
static struct group_info info_make(const struct cluster *c, const struct group *g)
{
    uint64_t blocks = UINT32_MAX, host_blocks = UINT32_MAX, disk_blocks = UINT32_MAX;
    struct group_info info = {.epoch = g->epoch,
                              .n_ranks = c->config.n_ranks,
                              .n_slots_max = UINT32_MAX,
                              .step_tokens_max = UINT32_MAX,
                              .step_rows_max = UINT32_MAX,
                              .context_max = UINT32_MAX,
                              .draft_tokens_max = UINT32_MAX,
                              .has_draft_model = true};
    for (uint32_t i = 0; i < c->config.n_ranks; i++) {
        const Heddle__Cluster__Join *j = g->ranks[i].stream->join->join;
        if (j->blocks_max < blocks) blocks = j->blocks_max;
        if (j->host_blocks_max < host_blocks) host_blocks = j->host_blocks_max;
        if (j->disk_blocks_max < disk_blocks) disk_blocks = j->disk_blocks_max;
        most32(&info.save_ns, j->save_ns);
        most32(&info.load_ns, j->load_ns);
        most32(&info.fetch_ns, j->fetch_ns);
        least32(&info.n_slots_max, j->slots_max);
        least32(&info.step_tokens_max, j->step_tokens_max);
        least32(&info.step_rows_max, j->step_rows_max);
        least_bound(&info.step_prompt_max, j->step_prompt_max);
        least32(&info.context_max, j->context_max);
        least32(&info.draft_tokens_max, j->draft_tokens_max);
        if (j->block_bytes > info.block_bytes) info.block_bytes = j->block_bytes;
        info.has_draft_model &= draft_fits(g, j);
        info.window = j->window;
        info.block_size = j->block_size;
        info.vocab_size = j->vocab_size;
    }
    info.n_blocks = (uint32_t)blocks;
    info.n_host_blocks = (uint32_t)host_blocks;
    info.n_disk_blocks = host_blocks ? (uint32_t)disk_blocks : 0;
    return info;
}

void group_try_form(struct cluster *c, struct group *g, int64_t now_us)
{
    if (g->state != CLUSTER_GROUP_JOINING || g->n_joined < c->config.n_ranks) return;
    g->epoch = ++c->epochs;
    g->state = CLUSTER_GROUP_FORMING;
    g->formed_us = now_us;
    g->n_ready = 0;
    g->epoch_plans = g->last_plan_step = g->skew_step = 0;
    g->info = info_make(c, g);
    key_make(g->key);
    Heddle__Cluster__Welcome w = HEDDLE__CLUSTER__WELCOME__INIT;
    Heddle__Cluster__ToWorker m = HEDDLE__CLUSTER__TO_WORKER__INIT;
    w.epoch = g->epoch;
    w.group = g->index;
    w.blocks = g->info.n_blocks;
    w.host_blocks = g->info.n_host_blocks;
    w.group_key = g->key;
    w.heartbeat_ms = c->config.heartbeat_ms;
    m.kind_case = HEDDLE__CLUSTER__TO_WORKER__KIND_WELCOME;
    m.welcome = &w;
    log_info("group %u: all %u ranks have joined, epoch %llu begins", g->index, c->config.n_ranks,
             (unsigned long long)g->epoch);
    for (uint32_t i = 0; i < c->config.n_ranks; i++) {
        g->ranks[i].state = CLUSTER_RANK_WELCOMED;
        g->ranks[i].last_step = 0;
        g->ranks[i].skew_us = 0;
        send_to(&g->ranks[i], &m.base);
    }
}

void group_ready(struct cluster *c, struct group *g, uint32_t rank, uint64_t epoch, int64_t now_us)
{
    if (epoch != g->epoch || g->state != CLUSTER_GROUP_FORMING ||
        g->ranks[rank].state != CLUSTER_RANK_WELCOMED)
        return; /* said before it heard that its epoch has ended */
    g->ranks[rank].state = CLUSTER_RANK_READY;
    if (++g->n_ready < c->config.n_ranks) return;
    g->state = CLUSTER_GROUP_UP;
    g->up_us = now_us;
    c->n_groups_up++;
    log_info("group %u: up in %.1f s, epoch %llu, %u blocks of %u tokens", g->index,
             (double)(now_us - g->formed_us) * 1e-6, (unsigned long long)g->epoch, g->info.n_blocks,
             g->info.block_size);
    group_mark_dirty(c, g);
}

/* ---- Exchange ---- */

static void exchange_clear(struct cluster *c, struct exchange *x)
{
    for (uint32_t i = 0; x->parts && i < c->config.n_ranks; i++)
        rpc_bytes_release(x->parts[i]);
    mem_free(x->parts);
    *x = (struct exchange){0};
}

static struct exchange *exchange_get(struct cluster *c, struct group *g, const char *key)
{
    struct exchange *spare = NULL;
    for (int i = 0; i < EXCHANGES_MAX; i++) {
        struct exchange *x = &g->exchanges[i];
        if (x->parts && !strcmp(x->key, key)) return x;
        if (!x->parts && !spare) spare = x;
    }
    if (!spare || MEM_NEW_ARRAY(c->config.n_ranks, &spare->parts)) return NULL;
    snprintf(spare->key, sizeof spare->key, "%s", key);
    return spare;
}

static void exchange_answer(struct cluster *c, struct group *g, struct exchange *x)
{
    ProtobufCBinaryData all[CLUSTER_RANKS_MAX];
    Heddle__Cluster__Exchanged e = HEDDLE__CLUSTER__EXCHANGED__INIT;
    Heddle__Cluster__ToWorker m = HEDDLE__CLUSTER__TO_WORKER__INIT;
    for (uint32_t i = 0; i < c->config.n_ranks; i++) {
        struct span part = rpc_bytes_span(x->parts[i]);
        all[i] = (ProtobufCBinaryData){part.n, (uint8_t *)(uintptr_t)part.data};
    }
    e.key = x->key;
    e.epoch = g->epoch;
    e.n_all = c->config.n_ranks;
    e.all = all;
    m.kind_case = HEDDLE__CLUSTER__TO_WORKER__KIND_EXCHANGED;
    m.exchanged = &e;
    struct rpc_bytes *bytes;
    if (envelope_pack(&m.base, &bytes)) {
        log_error("group %u: exchange '%s': %s", g->index, x->key, err_detail());
        return;
    }
    for (uint32_t i = 0; i < c->config.n_ranks; i++)
        if (g->ranks[i].stream && rpc_send_shared(g->ranks[i].stream->call, bytes) == ERR_FULL)
            rpc_cancel(g->ranks[i].stream->call);
    rpc_bytes_release(bytes);
}

const char *group_exchange(struct cluster *c, struct group *g, uint32_t rank,
                           const Heddle__Cluster__Exchange *m)
{
    if (m->mine.len > EXCHANGE_BYTES_MAX) return "an exchange of more than 64 KiB";
    if (!*m->key || strlen(m->key) >= EXCHANGE_KEY_MAX) return "an exchange with an impossible key";
    if (m->epoch != g->epoch || g->state == CLUSTER_GROUP_JOINING) return NULL;
    struct exchange *x = exchange_get(c, g, m->key);
    if (!x) return "too many exchanges open at once";
    if (x->parts[rank]) return "the same exchange twice";
    if (rpc_bytes_create(m->mine.data, m->mine.len, &x->parts[rank]))
        return "no memory for an exchange";
    if (++x->n_given < c->config.n_ranks) return NULL;
    exchange_answer(c, g, x);
    exchange_clear(c, x);
    return NULL;
}

/* ---- Steps and the end ---- */

static uint32_t number32(struct span body, uint32_t field)
{
    uint64_t value;
    if (envelope_number(body, field, &value)) return 0;
    return value > UINT32_MAX ? UINT32_MAX : (uint32_t)value;
}

void group_heard_step(struct group *g, uint32_t rank, struct span body, uint64_t step,
                      int64_t now_us)
{
    struct rank *r = &g->ranks[rank];
    if (step <= r->last_step) return;
    r->last_step = step;
    r->compute_us = number32(body, 10);
    r->wait_us = number32(body, 11);
    r->collective_us = number32(body, 12);
    if (step > g->skew_step) {
        g->skew_step = step;
        g->skew_first_us = now_us;
    }
    if (step == g->skew_step) r->skew_us = now_us - g->skew_first_us;
}

void group_end_epoch(struct cluster *c, struct group *g, const char *why)
{
    if (g->state == CLUSTER_GROUP_JOINING) return;
    if (g->state == CLUSTER_GROUP_UP) c->n_groups_up--;
    g->state = CLUSTER_GROUP_JOINING;
    g->n_losses++;
    g->n_ready = 0;
    snprintf(g->last_loss, sizeof g->last_loss, "%s", why);
    log_warn("group %u: epoch %llu has ended: %s", g->index, (unsigned long long)g->epoch, why);
    Heddle__Cluster__Halt h = HEDDLE__CLUSTER__HALT__INIT;
    Heddle__Cluster__ToWorker m = HEDDLE__CLUSTER__TO_WORKER__INIT;
    h.epoch = g->epoch;
    h.reason = g->last_loss;
    m.kind_case = HEDDLE__CLUSTER__TO_WORKER__KIND_HALT;
    m.halt = &h;
    for (uint32_t i = 0; i < c->config.n_ranks; i++) {
        if (!g->ranks[i].stream) continue;
        g->ranks[i].state = CLUSTER_RANK_JOINED;
        send_to(&g->ranks[i], &m.base);
    }
    for (int i = 0; i < EXCHANGES_MAX; i++)
        exchange_clear(c, &g->exchanges[i]);
    group_mark_dirty(c, g);
}

/* A complete group without an epoch begins one. In a group that does not get ready, who is late
 * joins anew and the others wait for it. */
void group_tick(struct cluster *c, struct group *g, int64_t now_us)
{
    group_try_form(c, g, now_us);
    if (g->state != CLUSTER_GROUP_FORMING ||
        now_us - g->formed_us < (int64_t)c->config.form_timeout_ms * 1000)
        return;
    for (uint32_t i = 0; i < c->config.n_ranks; i++)
        if (g->ranks[i].stream && g->ranks[i].state == CLUSTER_RANK_WELCOMED) {
            rank_suspect(c, g, i);
            rank_lose(c, g, i, false, "rank %u was not ready %u ms after its welcome", i,
                      c->config.form_timeout_ms);
            return; /* one at a time: the rest are JOINED again and get their next chance */
        }
}

void cluster_group_fini(struct cluster *c, struct group *g)
{
    for (int i = 0; i < EXCHANGES_MAX; i++)
        exchange_clear(c, &g->exchanges[i]);
}
