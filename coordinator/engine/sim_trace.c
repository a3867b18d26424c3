/* `heddle sim --trace FILE`: real arrivals and lengths against the cost model.
 *
 * Two formats, told apart by their first byte: Azure's CSV
 * (TIMESTAMP,ContextTokens,GeneratedTokens) and Mooncake's JSON lines (timestamp in ms,
 * input_length, output_length, hash_ids of blocks of 512 tokens). With hash_ids a block's tokens
 * are made from its id, so equal prefixes are equal tokens; the hit ratio of a cache without bound
 * is computed with the same keys and the same matching that serving uses. */
#include "base/json.h"
#include "base/mem.h"
#include "base/rand.h"
#include "coordinator/engine/kv_blocks.h"
#include "coordinator/engine/sim_timed.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BLOCK_TOKENS = 512, ROWS_MAX = 1 << 20, FILE_BYTES_MAX = 1 << 28 };

struct trace {
    struct timed_request *rows; /* [n] */
    uint32_t n, capacity;
    uint32_t *ids; /* hash ids of all rows, in order */
    size_t *id_at; /* [n + 1] first of each row */
    size_t n_ids, ids_capacity;
};

static void trace_free(struct trace *t)
{
    mem_free(t->rows);
    mem_free(t->ids);
    mem_free(t->id_at);
}

static enum err add_row(struct trace *t, int64_t at_us, uint32_t n_prompt, uint32_t n_output)
{
    if (t->n == ROWS_MAX) FAIL(ERR_TOO_LONG, "trace: more than %d rows", (int)ROWS_MAX);
    if (t->n == t->capacity) {
        uint32_t capacity = t->capacity ? 2 * t->capacity : 1024;
        TRY(mem_resize((void **)&t->rows, capacity * sizeof *t->rows));
        TRY(mem_resize((void **)&t->id_at, (capacity + 1) * sizeof *t->id_at));
        t->capacity = capacity;
    }
    t->id_at[t->n] = t->n_ids;
    t->rows[t->n++] = (struct timed_request){.arrival_us = at_us,
                                             .n_prompt = n_prompt ? n_prompt : 1,
                                             .n_output = n_output ? n_output : 1};
    t->id_at[t->n] = t->n_ids;
    return OK;
}

static enum err add_id(struct trace *t, uint32_t id)
{
    if (t->n_ids == t->ids_capacity) {
        size_t capacity = t->ids_capacity ? 2 * t->ids_capacity : 4096;
        TRY(mem_resize((void **)&t->ids, capacity * sizeof *t->ids));
        t->ids_capacity = capacity;
    }
    t->ids[t->n_ids++] = id;
    t->id_at[t->n] = t->n_ids;
    return OK;
}

/* 2023-11-16 18:17:03.9799600,4808,10 : times within one day, from the first row's. */
static enum err read_csv_line(struct trace *t, const char *line, uint32_t number, int64_t *start_us)
{
    int year, month, day, hour, minute;
    double second;
    uint32_t n_prompt, n_output;
    if (sscanf(line, "%d-%d-%d %d:%d:%lf,%" SCNu32 ",%" SCNu32, &year, &month, &day, &hour, &minute,
               &second, &n_prompt, &n_output) != 8)
        FAIL(ERR_FORMAT, "trace line %u: not a time and two lengths", number);
    int64_t at_us = ((int64_t)day * 1440 + hour * 60 + minute) * 60000000 + (int64_t)(second * 1e6);
    if (!t->n) *start_us = at_us;
    return add_row(t, at_us - *start_us, n_prompt, n_output);
}

static enum err read_json_row(struct trace *t, const json_t *o)
{
    int64_t at_ms = -1, n_prompt = -1, n_output = -1;
    TRY(json_read_int(o, "timestamp", 0, INT32_MAX, &at_ms));
    TRY(json_read_int(o, "input_length", 0, INT32_MAX, &n_prompt));
    TRY(json_read_int(o, "output_length", 0, INT32_MAX, &n_output));
    if (at_ms < 0 || n_prompt < 0 || n_output < 0) FAIL(ERR_FORMAT, "a field is missing");
    TRY(add_row(t, at_ms * 1000, (uint32_t)n_prompt, (uint32_t)n_output));
    const json_t *ids = json_object_get(o, "hash_ids");
    for (size_t i = 0; i < json_array_size(ids); i++) {
        json_int_t id = json_integer_value(json_array_get(ids, i));
        if (id < 0 || id > UINT32_MAX) FAIL(ERR_FORMAT, "hash id %lld", (long long)id);
        TRY(add_id(t, (uint32_t)id));
    }
    return OK;
}

static enum err read_json_line(struct trace *t, const char *line, size_t n, uint32_t number)
{
    json_t *o;
    TRY(json_parse(line, n, &o));
    enum err e = read_json_row(t, o);
    json_decref(o);
    if (e) {
        char why[256];
        snprintf(why, sizeof why, "%s", err_detail());
        FAIL(ERR_FORMAT, "trace line %u: %s", number, why);
    }
    return OK;
}

static enum err read_lines(struct trace *t, char *text, size_t n)
{
    int64_t start_us = 0;
    bool json = n && text[0] == '{';
    uint32_t number = 0;
    for (char *line = text, *end; line < text + n; line = end + 1) {
        end = memchr(line, '\n', (size_t)(text + n - line));
        if (!end) end = text + n;
        *end = 0; /* a buffer has one byte more than it counts */
        number++;
        if (end == line || *line == '\r' || (!json && number == 1)) continue;
        if (json)
            TRY(read_json_line(t, line, (size_t)(end - line), number));
        else
            TRY(read_csv_line(t, line, number, &start_us));
    }
    return OK;
}

static enum err trace_read(struct trace *t, const char *path)
{
    struct buf text;
    buf_init(&text, 0);
    enum err e = buf_read_file(&text, path, FILE_BYTES_MAX);
    if (!e) e = read_lines(t, text.data, text.n);
    buf_fini(&text);
    return e;
}

/* Content. */
static void fill_block(uint32_t id, int32_t *tokens, uint32_t n)
{
    struct rand dice = rand_seeded((uint64_t)id + 1);
    for (uint32_t i = 0; i < n; i += 2) {
        uint64_t word = rand_next(&dice);
        tokens[i] = (int32_t)((uint32_t)word % 50000);
        if (i + 1 < n) tokens[i + 1] = (int32_t)((uint32_t)(word >> 32) % 50000);
    }
}

static void fill_prompt(void *ctx, uint32_t index, int32_t *tokens)
{
    const struct trace *t = ctx;
    uint32_t n = t->rows[index].n_prompt;
    const uint32_t *ids = t->ids + t->id_at[index];
    size_t n_ids = t->id_at[index + 1] - t->id_at[index];
    for (uint32_t at = 0, k = 0; at < n; at += BLOCK_TOKENS, k++) {
        uint32_t id = k < n_ids ? ids[k] : 0x80000000u + index; /* without an id: its own */
        fill_block(id, tokens + at, n - at < BLOCK_TOKENS ? n - at : BLOCK_TOKENS);
    }
}

/* The hit ratio of a cache that forgets nothing, block by block in the order of arrival. */
static enum err unbounded(const struct trace *t, uint64_t *out_hits)
{
    struct kv_blocks kv;
    int32_t tokens[BLOCK_TOKENS];
    uint64_t n_hits = 0;
    TRY(kv_blocks_init(&kv, (uint32_t)t->n_ids + 1, BLOCK_TOKENS));
    for (uint32_t row = 0; row < t->n; row++) {
        struct hash128 key = hash_bytes("trace", 5, 0);
        bool leading = true;
        for (size_t i = t->id_at[row]; i < t->id_at[row + 1]; i++) {
            fill_block(t->ids[i], tokens, BLOCK_TOKENS);
            key = hash_chain(key, tokens, sizeof tokens);
            uint32_t n_cached;
            leading = leading && kv_blocks_match(&kv, &key, 1, &n_cached, NULL);
            n_hits += leading;
            if (leading) continue;
            uint32_t block = kv_blocks_take(&kv);
            kv_blocks_register(&kv, block, key);
            kv_blocks_unref(&kv, block, 0);
            kv_blocks_acked(&kv, 0);
        }
    }
    kv_blocks_fini(&kv);
    *out_hits = n_hits;
    return OK;
}

enum err trace_check(const char *text, size_t n)
{
    struct trace trace = {0};
    struct buf copy;
    buf_init(&copy, 0);
    enum err e = buf_add(&copy, text, n);
    if (!e && n) e = read_lines(&trace, copy.data, copy.n);
    buf_fini(&copy);
    trace_free(&trace);
    return e;
}

enum err trace_unbounded(const char *path, uint64_t *out_blocks, uint64_t *out_hits)
{
    struct trace trace = {0};
    uint64_t n_hits = 0;
    enum err e = trace_read(&trace, path);
    if (!e) e = unbounded(&trace, &n_hits);
    *out_blocks = trace.n_ids;
    *out_hits = n_hits;
    trace_free(&trace);
    return e;
}

/* Reports. */
static void print_times(const char *name, int64_t *v, uint32_t n)
{
    printf("%s ms: p50 %.1f p90 %.1f p99 %.1f max %.1f (n %u)\n", name,
           (double)percentile_us(v, n, 0.5) / 1e3, (double)percentile_us(v, n, 0.9) / 1e3,
           (double)percentile_us(v, n, 0.99) / 1e3, (double)percentile_us(v, n, 1) / 1e3, n);
}

static enum err report(struct timed_run *run)
{
    int64_t *first_us;
    uint32_t n = 0, n_refused = 0;
    uint64_t n_tokens = 0;
    TRY(MEM_NEW_ARRAY(run->n, &first_us));
    for (uint32_t i = 0; i < run->n; i++) {
        const struct timed_request *r = &run->requests[i];
        n_refused += r->refused;
        n_tokens += r->n_tokens;
        if (r->first_us >= 0) first_us[n++] = r->first_us - r->arrival_us;
    }
    print_times("TTFT", first_us, n);
    print_times("ITL", run->gaps_us, run->n_gaps);
    printf("requests %u, refused %u, prompt tokens %" PRIu64 ", found %" PRIu64
           " (ratio %.4f), output tokens %" PRIu64 ", steps %" PRIu64 ", preemptions %" PRIu64
           ", budget filled %.3f while others waited, ended at %.1f s\n",
           run->n, n_refused, run->n_prompt_tokens, run->n_hit_tokens,
           run->n_prompt_tokens ? (double)run->n_hit_tokens / (double)run->n_prompt_tokens : 0,
           n_tokens, run->n_steps, run->n_preemptions,
           run->step_budget ? (double)run->step_tokens / (double)run->step_budget : 0,
           (double)run->end_us / 1e6);
    mem_free(first_us);
    return OK;
}

struct trace_option {
    const char *name;
    double *value;
    double least, most;
};

static enum err read_options(int argc, char **argv, const struct trace_option *options, size_t n)
{
    for (int i = 0; i < argc; i++) {
        size_t k = 0;
        while (k < n && strcmp(options[k].name, argv[i]))
            k++;
        if (k == n || i + 1 == argc)
            FAIL(ERR_INVALID, "sim: unknown option or missing value: %s", argv[i]);
        char *end;
        double v = strtod(argv[++i], &end);
        if (*end || end == argv[i] || !(v >= options[k].least && v <= options[k].most))
            FAIL(ERR_INVALID, "sim: %s: %s is no number from %g to %g", options[k].name, argv[i],
                 options[k].least, options[k].most);
        *options[k].value = v;
    }
    return OK;
}

/* What a trace is played against. */
struct setting {
    double blocks, block_size, slots, budget, groups, limit, speed, step_us, token_us, row_us,
        routers;
};

static enum err play(const struct trace *trace, const struct setting *set, enum router_kind router)
{
    struct timed_run run = {.cost = {set->step_us, set->token_us, set->row_us, 200},
                            .n_groups = (uint32_t)set->groups,
                            .n_blocks = (uint32_t)set->blocks,
                            .block_size = (uint32_t)set->block_size,
                            .n_slots = (uint32_t)set->slots,
                            .n_step_tokens = (uint32_t)set->budget,
                            .context_max = 1 << 20,
                            .prefix_cache = true,
                            .router = router,
                            .requests = trace->rows,
                            .n = trace->n,
                            .fill = trace->n_ids ? fill_prompt : NULL,
                            .ctx = (void *)trace};
    if (set->routers > 0) printf("placement: %s\n", router_names[router]);
    for (uint32_t i = 0; i < trace->n; i++)
        trace->rows[i].n_tokens = trace->rows[i].refused = 0;
    enum err e = timed_run(&run);
    if (!e) e = report(&run);
    mem_free(run.gaps_us);
    mem_free(run.gap_at_us);
    return e;
}

static enum err play_all(struct trace *trace, const struct setting *set)
{
    uint64_t n_hits = 0;
    uint32_t n_routers = set->routers > 0 ? ROUTER_COUNT : 1;
    if (trace->n_ids) {
        TRY(unbounded(trace, &n_hits));
        printf("blocks of %d: %zu, of which a cache without bound finds %" PRIu64 " (ratio %.6f)\n",
               (int)BLOCK_TOKENS, trace->n_ids, n_hits, (double)n_hits / (double)trace->n_ids);
    }
    if (trace->n > set->limit) trace->n = (uint32_t)set->limit;
    for (uint32_t i = 0; i < trace->n; i++)
        trace->rows[i].arrival_us = (int64_t)((double)trace->rows[i].arrival_us / set->speed);
    for (uint32_t k = 0; k < n_routers && trace->n; k++)
        TRY(play(trace, set, (enum router_kind)k));
    return OK;
}

static enum err replay_trace(const char *path, int argc, char **argv)
{
    struct trace trace = {0};
    struct setting set = {100000, 16, 256, 2048, 1, 1e9, 1, 10000, 10, 10, 0};
    const struct trace_option options[] = {
        {"--blocks", &set.blocks, 1, 1 << 24},
        {"--block-size", &set.block_size, 1, 4096},
        {"--slots", &set.slots, 1, 1 << 16},
        {"--budget", &set.budget, 1, 1 << 20},
        {"--groups", &set.groups, 1, ROUTER_GROUPS_MAX},
        {"--requests", &set.limit, 0, 1e9},
        {"--speed", &set.speed, 1e-3, 1e6},
        {"--step-us", &set.step_us, 0, 1e9},
        {"--token-us", &set.token_us, 0, 1e6},
        {"--row-us", &set.row_us, 0, 1e6},
        {"--routers", &set.routers, 0, 1},
    };
    TRY(read_options(argc, argv, options, sizeof options / sizeof *options));
    enum err e = trace_read(&trace, path);
    if (!e) e = play_all(&trace, &set);
    trace_free(&trace);
    return e;
}

int trace_main(int argc, char **argv)
{
    if (argc < 1 || replay_trace(argv[0], argc - 1, argv + 1)) {
        fprintf(stderr, "sim: %s\n", argc < 1 ? "--trace needs a file" : err_detail());
        return 1;
    }
    return 0;
}
