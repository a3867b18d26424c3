/* Replaying a record: the inputs into a fresh engine, its plans against the digests. */
#include "base/buf.h"
#include "base/hash.h"
#include "base/mem.h"
#include "coordinator/engine/record.h"
#include "coordinator/engine/record_format.h"
#include "coordinator/engine/sim.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { QUEUE_MAX = 1 << 16 };
enum { BLOCKS_MAX = 1 << 24, SLOTS_MAX = 1 << 17, TOKENS_MAX = 1 << 22 }; /* of a recorded group */
struct digest {
    uint32_t group;
    uint64_t n;
    struct hash128 hash;
};

struct player {
    const unsigned char *at, *end;
    bool broken; /* a read went past the end of its entry */
    struct engine *engine;
    struct arena arena;
    struct sink sink;
    struct digest *queue; /* plans computed and not compared, a ring */
    uint32_t first, n_queued;
    struct replay found;
};

/* Reading an entry. */
static uint64_t get(struct player *p)
{
    uint64_t v = 0;
    for (int shift = 0; shift < 64 && p->at < p->end; shift += 7) {
        unsigned char byte = *p->at++;
        v |= (uint64_t)(byte & 0x7f) << shift;
        if (!(byte & 0x80)) return v;
    }
    p->broken = true;
    return 0;
}

static int64_t get_signed(struct player *p)
{
    uint64_t v = get(p);
    return (int64_t)(v >> 1 ^ -(v & 1));
}

static float get_float(struct player *p)
{
    float v = 0;
    if (p->end - p->at < (ptrdiff_t)sizeof v)
        p->broken = true;
    else
        memcpy(&v, p->at, sizeof v), p->at += sizeof v;
    return v;
}

/* n words of 4 bytes into memory of their own. */
static enum err get_words(struct player *p, uint32_t *out_n, void **out)
{
    uint64_t n = get(p);
    if (p->broken || n > (uint64_t)(p->end - p->at) / 4)
        FAIL(ERR_FORMAT, "record: an array longer than its entry");
    TRY(mem_alloc(n * 4, out));
    memcpy(*out, p->at, n * 4);
    p->at += n * 4;
    *out_n = (uint32_t)n;
    return OK;
}

static void free_request(struct request *r)
{
    mem_free(r->tokens);
    mem_free((void *)r->sampling.bias_tokens);
    mem_free((void *)r->sampling.bias_values);
    mem_free((void *)r->sampling.stop_ids);
    mem_free(r);
}

static enum err get_sampling(struct player *p, struct sampling_params *s)
{
    uint32_t n = 0, n_values = 0, n_stops = 0;
    s->temperature = get_float(p);
    s->top_p = get_float(p);
    s->min_p = get_float(p);
    s->repetition_penalty = get_float(p);
    s->presence_penalty = get_float(p);
    s->frequency_penalty = get_float(p);
    s->top_k = (int32_t)get_signed(p);
    s->seed = get(p);
    s->n_logprobs = (int32_t)get_signed(p);
    s->n_prompt_logprobs = (int32_t)get_signed(p);
    s->min_tokens = (int32_t)get_signed(p);
    TRY(get_words(p, &n, (void **)&s->bias_tokens));
    TRY(get_words(p, &n_values, (void **)&s->bias_values));
    TRY(get_words(p, &n_stops, (void **)&s->stop_ids));
    if (n != n_values) FAIL(ERR_FORMAT, "record: %u bias tokens and %u values", n, n_values);
    s->n_bias = (int32_t)n;
    s->n_stop_ids = (int32_t)n_stops;
    return OK;
}

#define GET_REQUEST(field) r->field = (__typeof__(r->field))get_signed(p);

static enum err read_request(struct player *p, struct request *r)
{
    RECORD_REQUEST_FIELDS(GET_REQUEST)
    r->length_penalty = get_float(p);
    TRY(get_words(p, &r->n_tokens, (void **)&r->tokens));
    TRY(get_sampling(p, &r->sampling));
    if (p->broken) FAIL(ERR_FORMAT, "record: a request is cut short");
    r->sink = &p->sink;
    r->destroy = free_request;
    return OK;
}

static enum err play_submit(struct player *p)
{
    struct request *r;
    int64_t now_us = get_signed(p);
    TRY(MEM_NEW(&r));
    enum err e = read_request(p, r);
    if (!e && engine_submit(p->engine, r, now_us) == OK) {
        p->found.n_requests++;
        return OK;
    }
    free_request(r); /* refused then, refused now */
    return e;
}

static void note_emission(struct sink *sink, const struct emission *news)
{
    struct player *p = (struct player *)((char *)sink - offsetof(struct player, sink));
    uint64_t words[4] = {p->found.tokens_digest, news->request_id, (uint64_t)news->choice,
                         (uint64_t)news->finish << 32 | news->n_tokens};
    for (uint32_t i = 0; i < news->n_tokens; i++) {
        words[3] = hash_u64(words[3] ^ (uint32_t)news->tokens[i].token);
        p->found.n_tokens += !(news->tokens[i].flags & STEP_TOKEN_SCORED);
    }
    p->found.tokens_digest = hash_bytes(words, sizeof words, 0).low;
    p->found.n_ended += news->last;
}

/* Plans. */
static enum err queue_plan(void *ctx, uint32_t group, const void *bytes, size_t n)
{
    struct player *p = ctx;
    if (p->n_queued == QUEUE_MAX) FAIL(ERR_FULL, "replay: too many plans in one step");
    p->queue[(p->first + p->n_queued++) % QUEUE_MAX] =
        (struct digest){group, n, hash_bytes(bytes, n, 0)};
    return OK;
}

static enum err compare_plan(struct player *p)
{
    uint32_t group = (uint32_t)get(p);
    uint64_t n = get(p);
    struct hash128 hash;
    if (p->broken || p->end - p->at != (ptrdiff_t)sizeof hash)
        FAIL(ERR_FORMAT, "record: a plan is cut short");
    memcpy(&hash, p->at, sizeof hash);
    if (!p->n_queued)
        FAIL(ERR_INTERNAL, "plan %" PRIu64 ": recorded, not computed", p->found.n_plans);
    const struct digest *d = &p->queue[p->first];
    if (d->group != group || d->n != n || !hash_equal(d->hash, hash))
        FAIL(ERR_INTERNAL,
             "plan %" PRIu64 " differs: group %u, %" PRIu64 " bytes recorded; group %u, %" PRIu64
             " computed",
             p->found.n_plans, group, n, d->group, d->n);
    p->first = (p->first + 1) % QUEUE_MAX;
    p->n_queued--;
    p->found.n_plans++;
    return OK;
}

/* Entries. */
#define GET_CONFIG(field) config.field = (__typeof__(config.field))get(p);
#define GET_INFO(field)   info.field = (__typeof__(info.field))get(p);

static enum err play_config(struct player *p)
{
    struct engine_config config = {0};
    struct engine_hooks hooks = {.send_plan = queue_plan, .ctx = p};
    RECORD_CONFIG_FIELDS(GET_CONFIG)
    if (p->broken || p->engine) FAIL(ERR_FORMAT, "record: bad configuration");
    return engine_create(&config, &hooks, &p->engine);
}

static enum err play_group_up(struct player *p)
{
    struct group_info info = {0};
    get_signed(p);
    uint32_t group = (uint32_t)get(p);
    RECORD_INFO_FIELDS(GET_INFO)
    if (p->broken) FAIL(ERR_FORMAT, "record: a group is cut short");
    if (info.n_blocks > BLOCKS_MAX || info.n_host_blocks > BLOCKS_MAX ||
        info.n_disk_blocks > BLOCKS_MAX || info.n_ranks > TOKENS_MAX ||
        info.n_slots_max > SLOTS_MAX || info.step_tokens_max > TOKENS_MAX ||
        info.block_size > TOKENS_MAX || info.draft_tokens_max > TOKENS_MAX)
        FAIL(ERR_FORMAT, "record: a group of %u blocks and %u slots", info.n_blocks,
             info.n_slots_max);
    engine_group_up(p->engine, group, &info);
    return OK;
}

static enum err play_result(struct player *p)
{
    struct step_result result;
    int64_t now_us = get_signed(p);
    uint32_t group = (uint32_t)get(p);
    if (p->broken) FAIL(ERR_FORMAT, "record: a result is cut short");
    arena_reset(&p->arena);
    TRY(step_result_decode(p->at, (size_t)(p->end - p->at), &p->arena, &result));
    (void)engine_result(p->engine, group, &result, now_us); /* refused then, refused now */
    return OK;
}

static enum err play_moved(struct player *p)
{
    struct moved moved;
    int64_t now_us = get_signed(p);
    uint32_t group = (uint32_t)get(p), rank = (uint32_t)get(p);
    if (p->broken) FAIL(ERR_FORMAT, "record: ended transfers are cut short");
    arena_reset(&p->arena);
    TRY(moved_decode(p->at, (size_t)(p->end - p->at), &p->arena, &moved));
    (void)engine_moved(p->engine, group, rank, &moved, now_us); /* refused then, refused now */
    return OK;
}

static enum err play_cancel(struct player *p)
{
    get_signed(p);
    uint64_t id = get(p);
    int32_t choice = (int32_t)get_signed(p);
    int how = (int)get(p);
    if (p->broken) FAIL(ERR_FORMAT, "record: a cancel is cut short");
    engine_cancel(p->engine, id, choice, how);
    return OK;
}

static enum err play_group_down(struct player *p)
{
    get_signed(p);
    uint32_t group = (uint32_t)get(p);
    uint64_t epoch = get(p);
    if (p->broken) FAIL(ERR_FORMAT, "record: a loss is cut short");
    engine_group_down(p->engine, group, epoch);
    return OK;
}

static enum err play_step(struct player *p)
{
    int64_t now_us = get_signed(p);
    if (p->broken) FAIL(ERR_FORMAT, "record: a step is cut short");
    engine_step(p->engine, now_us);
    return OK;
}

static enum err play_entry(struct player *p, unsigned kind)
{
    if (kind != RECORD_CONFIG && !p->engine)
        FAIL(ERR_FORMAT, "record: it does not begin with a configuration");
    if (kind != RECORD_PLAN) p->found.n_inputs++;
    switch (kind) {
    case RECORD_CONFIG:
        return play_config(p);
    case RECORD_SUBMIT:
        return play_submit(p);
    case RECORD_CANCEL:
        return play_cancel(p);
    case RECORD_GROUP_UP:
        return play_group_up(p);
    case RECORD_GROUP_DOWN:
        return play_group_down(p);
    case RECORD_RESULT:
        return play_result(p);
    case RECORD_STEP:
        return play_step(p);
    case RECORD_MOVED:
        return play_moved(p);
    case RECORD_PLAN:
        return compare_plan(p);
    default:
        FAIL(ERR_FORMAT, "record: unknown entry %u", kind);
    }
}

static enum err play_all(struct player *p, const unsigned char *bytes, size_t n)
{
    const unsigned char *end = bytes + n;
    if (n < RECORD_MAGIC_BYTES || memcmp(bytes, RECORD_MAGIC, RECORD_NAME_BYTES))
        FAIL(ERR_FORMAT, "not a record of an engine");
    if (memcmp(bytes, RECORD_MAGIC, RECORD_MAGIC_BYTES))
        FAIL(ERR_FORMAT, "a record of another version of heddle: format %.1s, this one reads %.1s",
             (const char *)bytes + RECORD_NAME_BYTES, RECORD_MAGIC + RECORD_NAME_BYTES);
    TRY(mem_alloc_array(QUEUE_MAX, sizeof *p->queue, (void **)&p->queue));
    p->at = bytes + RECORD_MAGIC_BYTES;
    while (p->at < end) {
        unsigned kind = *p->at++;
        p->end = end;
        uint64_t length = get(p);
        if (p->broken || length > (uint64_t)(end - p->at))
            return OK; /* the writer was cut off here */
        const unsigned char *next = p->at + length;
        p->end = next;
        TRY(play_entry(p, kind));
        p->at = next;
    }
    return OK;
}

enum err replay_bytes(const void *bytes, size_t n, struct replay *out)
{
    struct player p = {.sink = {.emit = note_emission}};
    arena_init(&p.arena, 1 << 20, 1 << 28);
    enum err e = play_all(&p, bytes, n);
    *out = p.found; /* also of a failed one: how far it came */
    engine_destroy(p.engine);
    mem_free(p.queue);
    arena_fini(&p.arena);
    return e;
}

int replay_main(int argc, char **argv)
{
    struct buf file;
    struct replay found = {0};
    if (argc != 2) {
        fprintf(stderr, "usage: heddle replay FILE\n");
        return 2;
    }
    buf_init(&file, 0);
    enum err e = buf_read_file(&file, argv[1], (size_t)1 << 34);
    if (!e) e = replay_bytes(file.data, file.n, &found);
    buf_fini(&file);
    printf("%" PRIu64 " inputs, %" PRIu64 " requests (%" PRIu64 " ended), %" PRIu64
           " tokens, %" PRIu64 " plans equal, tokens digest %016" PRIx64 "\n",
           found.n_inputs, found.n_requests, found.n_ended, found.n_tokens, found.n_plans,
           found.tokens_digest);
    if (e) fprintf(stderr, "replay: %s\n", err_detail());
    return e ? 1 : 0;
}
