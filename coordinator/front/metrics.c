/* See metrics.h. Buckets are vLLM's, so that its dashboards show ours. */
#include "coordinator/front/metrics.h"
#include "base/json.h"

#include <float.h>
#include <string.h>

/* --- tables --- */

#define SECONDS_TTFT                                                                               \
    {                                                                                              \
        0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20,  \
            40, 80, 160, 640, 2560                                                                 \
    }
#define SECONDS_ITL                                                                                \
    {                                                                                              \
        0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, \
            80                                                                                     \
    }
#define SECONDS_REQUEST                                                                            \
    {                                                                                              \
        0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920,    \
            7680                                                                                   \
    }
#define SECONDS_HTTP                                                                               \
    {                                                                                              \
        0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60                            \
    }
#define CHOICES                                                                                    \
    {                                                                                              \
        1, 2, 5, 10, 20                                                                            \
    }
#define TOKENS                                                                                     \
    {                                                                                              \
        0                                                                                          \
    } /* 1-2-5 up to the context */

static const struct {
    const char *name, *help;
    double bounds[METRIC_BOUNDS_MAX]; /* ends with 0 */
} histogram_rows[METRIC_HISTOGRAMS] = {
    [METRIC_TTFT] = {"vllm:time_to_first_token_seconds", "Time to the first token", SECONDS_TTFT},
    [METRIC_ITL] = {"vllm:inter_token_latency_seconds", "Time between tokens", SECONDS_ITL},
    [METRIC_TPOT] = {"vllm:request_time_per_output_token_seconds",
                     "Mean time per output token of a request", SECONDS_ITL},
    [METRIC_E2E] = {"vllm:e2e_request_latency_seconds", "Request latency", SECONDS_REQUEST},
    [METRIC_QUEUE] = {"vllm:request_queue_time_seconds", "Time in the queue", SECONDS_REQUEST},
    [METRIC_PREFILL] = {"vllm:request_prefill_time_seconds", "Time of the prefill",
                        SECONDS_REQUEST},
    [METRIC_DECODE] = {"vllm:request_decode_time_seconds", "Time from first to last token",
                       SECONDS_REQUEST},
    [METRIC_INFERENCE] = {"vllm:request_inference_time_seconds", "Time of prefill and decode",
                          SECONDS_REQUEST},
    [METRIC_PROMPT_TOKENS] = {"vllm:request_prompt_tokens", "Prompt tokens of a request", TOKENS},
    [METRIC_GENERATION_TOKENS] = {"vllm:request_generation_tokens", "Tokens generated for a choice",
                                  TOKENS},
    [METRIC_MAX_GENERATION_TOKENS] = {"vllm:request_max_num_generation_tokens",
                                      "Most tokens generated for a choice of a request", TOKENS},
    [METRIC_PARAMS_N] = {"vllm:request_params_n", "The parameter n", CHOICES},
    [METRIC_PARAMS_MAX_TOKENS] = {"vllm:request_params_max_tokens", "The parameter max_tokens",
                                  TOKENS},
    [METRIC_HTTP_DURATION] = {"http_request_duration_seconds", "Time from request to answer's end",
                              SECONDS_HTTP},
};

static const struct {
    const char *name, *labels, *type, *help;
} counter_rows[METRIC_COUNTERS] = {
    [METRIC_REJECTED_FULL] = {"heddle:requests_rejected_total", "reason=\"full\"", "counter",
                              "Requests refused at once"},
    [METRIC_REJECTED_INVALID] = {"heddle:requests_rejected_total", "reason=\"invalid\"", "counter",
                                 NULL},
    [METRIC_REJECTED_NOT_READY] = {"heddle:requests_rejected_total", "reason=\"not_ready\"",
                                   "counter", NULL},
    [METRIC_REJECTED_AUTH] = {"heddle:requests_rejected_total", "reason=\"auth\"", "counter", NULL},
    [METRIC_CANCELLED] = {"heddle:requests_cancelled_total", "", "counter",
                          "Clients that left before their answer's end"},
    [METRIC_SLOW_CLIENTS] = {"heddle:slow_clients_total", "", "counter",
                             "Clients cut because they did not read"},
    [METRIC_STREAMS] = {"heddle:streams", "", "gauge", "Answers being made"},
};

static const char *const finish_words[FINISH_ERROR + 1] = {NULL, "stop", "length", "abort",
                                                           "error"};

/* Values of the engine's snapshot and of the caller's. */
struct gauge {
    const char *name, *labels, *type, *help; /* help NULL: one more sample of the row above */
    double value;
};

/* --- counting --- */

void histogram_observe(struct histogram *h, double value, uint64_t times)
{
    unsigned i = 0;
    if (!(value >= 0)) value = 0;
    while (i < h->n_bounds && value > h->bounds[i])
        i++;
    atomic_fetch_add_explicit(&h->counts[i], times, memory_order_relaxed);
    double micro = value * 1e6 * (double)times;
    atomic_fetch_add_explicit(&h->sum_micro, micro < 1e18 ? (unsigned long long)micro : 0,
                              memory_order_relaxed);
}

static void bounds_of_tokens(struct histogram *h, uint64_t most)
{
    static const uint64_t steps[] = {1, 2, 5};
    h->n_bounds = 0;
    for (uint64_t power = 1; h->n_bounds < METRIC_BOUNDS_MAX; power *= 10)
        for (int i = 0; i < 3 && h->n_bounds < METRIC_BOUNDS_MAX; i++) {
            if (power * steps[i] > most) return;
            h->bounds[h->n_bounds++] = (double)(power * steps[i]);
        }
}

void metrics_init(struct metrics *m, uint64_t context_max)
{
    memset(m, 0, sizeof *m);
    for (int i = 0; i < METRIC_HISTOGRAMS; i++) {
        struct histogram *h = &m->histograms[i];
        while (h->n_bounds < METRIC_BOUNDS_MAX && histogram_rows[i].bounds[h->n_bounds] > 0) {
            h->bounds[h->n_bounds] = histogram_rows[i].bounds[h->n_bounds];
            h->n_bounds++;
        }
        if (!h->n_bounds) bounds_of_tokens(h, context_max);
    }
    pthread_mutex_init(&m->http_mutex, NULL);
}

void metrics_count(struct metrics *m, enum metric_counter c, long long delta)
{
    atomic_fetch_add_explicit(&m->counters[c], delta, memory_order_relaxed);
}

void metrics_http(struct metrics *m, const char *handler, const char *method, int status,
                  int64_t took_us)
{
    histogram_observe(&m->histograms[METRIC_HTTP_DURATION], (double)took_us * 1e-6, 1);
    pthread_mutex_lock(&m->http_mutex);
    unsigned i = 0;
    for (; i < m->n_http; i++)
        if (m->http[i].handler == handler && m->http[i].method == method &&
            m->http[i].status == status)
            break;
    if (i == m->n_http && i < METRIC_HTTP_MAX)
        m->http[m->n_http++] = (struct http_count){handler, method, status, 0};
    if (i < METRIC_HTTP_MAX) m->http[i].n++;
    pthread_mutex_unlock(&m->http_mutex);
}

/* --- the page --- */

static void write_head(struct buf *out, const char *name, const char *type, const char *help)
{
    buf_printf(out, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, type);
}

static void write_histogram(struct metrics *m, int row, const char *labels, struct buf *out)
{
    struct histogram *h = &m->histograms[row];
    const char *name = histogram_rows[row].name;
    unsigned long long total = 0;
    write_head(out, name, "histogram", histogram_rows[row].help);
    for (unsigned i = 0; i <= h->n_bounds; i++) {
        total += atomic_load_explicit(&h->counts[i], memory_order_relaxed);
        if (i < h->n_bounds)
            buf_printf(out, "%s_bucket{%s,le=\"%.6g\"} %llu\n", name, labels, h->bounds[i], total);
        else
            buf_printf(out, "%s_bucket{%s,le=\"+Inf\"} %llu\n", name, labels, total);
    }
    buf_printf(out, "%s_sum{%s} %.6f\n", name, labels, (double)atomic_load(&h->sum_micro) * 1e-6);
    buf_printf(out, "%s_count{%s} %llu\n", name, labels, total);
}

static void write_gauges(const struct gauge *rows, size_t n, const char *labels, struct buf *out)
{
    for (size_t i = 0; i < n; i++) {
        if (rows[i].help) write_head(out, rows[i].name, rows[i].type, rows[i].help);
        buf_printf(out, "%s{%s%s%s} %.15g\n", rows[i].name, labels, *rows[i].labels ? "," : "",
                   rows[i].labels, rows[i].value);
    }
}

static void write_tiers(const struct engine_stats *e, const char *labels, struct buf *out)
{
    const struct gauge rows[] = {
        {"heddle:kv_tier_blocks", "tier=\"host\",state=\"total\"", "gauge",
         "KV blocks outside the device", (double)e->host_total},
        {"heddle:kv_tier_blocks", "tier=\"host\",state=\"used\"", "gauge", NULL,
         (double)e->host_used},
        {"heddle:kv_tier_blocks", "tier=\"disk\",state=\"total\"", "gauge", NULL,
         (double)e->disk_total},
        {"heddle:kv_tier_blocks", "tier=\"disk\",state=\"used\"", "gauge", NULL,
         (double)e->disk_used},
        {"heddle:kv_tier_hit_tokens_total", "tier=\"host\"", "counter",
         "Prompt tokens found outside the device, by where they came from",
         (double)e->n_hit_tokens_host},
        {"heddle:kv_tier_hit_tokens_total", "tier=\"disk\"", "counter", NULL,
         (double)e->n_hit_tokens_disk},
        {"heddle:kv_moves_total", "kind=\"save\"", "counter",
         "KV blocks moved: device to host, back, host to disk, back", (double)e->n_saves},
        {"heddle:kv_moves_total", "kind=\"load\"", "counter", NULL, (double)e->n_loads},
        {"heddle:kv_moves_total", "kind=\"spill\"", "counter", NULL, (double)e->n_spills},
        {"heddle:kv_moves_total", "kind=\"fetch\"", "counter", NULL, (double)e->n_fetches},
        {"heddle:kv_move_bytes_total", "kind=\"save\"", "counter", "Their bytes, on all ranks",
         (double)e->save_bytes},
        {"heddle:kv_move_bytes_total", "kind=\"load\"", "counter", NULL, (double)e->load_bytes},
        {"heddle:kv_move_bytes_total", "kind=\"spill\"", "counter", NULL, (double)e->spill_bytes},
        {"heddle:kv_move_bytes_total", "kind=\"fetch\"", "counter", NULL, (double)e->fetch_bytes},
        {"heddle:kv_move_failures_total", "kind=\"spill\"", "counter",
         "Blocks that could not be written or read back; they are computed again",
         (double)e->n_spills_failed},
        {"heddle:kv_move_failures_total", "kind=\"fetch\"", "counter", NULL,
         (double)e->n_fetches_failed},
    };
    write_gauges(rows, sizeof rows / sizeof *rows, labels, out);
}

static void write_engine(const struct metrics_snapshot *s, const char *labels, struct buf *out)
{
    const struct engine_stats *e = s->engine;
    double blocks = e->blocks_total ? (double)e->blocks_total : 1;
    double usage = e->blocks_total ? (double)e->blocks_held / blocks : 0;
    const struct gauge rows[] = {
        {"vllm:num_requests_running", "", "gauge", "Sequences running", e->n_running},
        {"vllm:num_requests_waiting", "", "gauge", "Requests waiting", e->n_waiting},
        {"vllm:num_requests_swapped", "", "gauge", "Sequences swapped out", e->n_swapped},
        {"vllm:kv_cache_usage_perc", "", "gauge", "Share of KV blocks in use, 0 to 1", usage},
        {"vllm:gpu_cache_usage_perc", "", "gauge", "Older name of kv_cache_usage_perc", usage},
        {"vllm:prefix_cache_queries_total", "", "counter", "Prompt tokens looked up",
         (double)e->prefix_queries},
        {"vllm:prefix_cache_hits_total", "", "counter", "Prompt tokens found in the cache",
         (double)e->prefix_hits},
        {"vllm:gpu_prefix_cache_queries_total", "", "counter", "Older name",
         (double)e->prefix_queries},
        {"vllm:gpu_prefix_cache_hits_total", "", "counter", "Older name", (double)e->prefix_hits},
        {"vllm:num_preemptions_total", "", "counter", "Preemptions", (double)e->n_preemptions},
        {"vllm:prompt_tokens_total", "", "counter", "Prompt tokens computed or found",
         (double)e->n_prompt_tokens},
        {"vllm:generation_tokens_total", "", "counter", "Tokens generated",
         (double)e->n_generated_tokens},
        {"vllm:spec_decode_num_draft_tokens_total", "", "counter", "Draft tokens proposed",
         (double)e->drafts_proposed},
        {"vllm:spec_decode_num_accepted_tokens_total", "", "counter", "Draft tokens kept",
         (double)e->drafts_accepted},
        {"heddle:draft_tokens_total", "kind=\"ngram\"", "counter", "Draft tokens verified, by kind",
         (double)(e->drafts_proposed - e->model_drafts_proposed)},
        {"heddle:draft_tokens_total", "kind=\"model\"", "counter", NULL,
         (double)e->model_drafts_proposed},
        {"heddle:draft_tokens_kept_total", "kind=\"ngram\"", "counter",
         "Draft tokens kept, by kind", (double)(e->drafts_accepted - e->model_drafts_accepted)},
        {"heddle:draft_tokens_kept_total", "kind=\"model\"", "counter", NULL,
         (double)e->model_drafts_accepted},
        {"heddle:kv_blocks", "state=\"free\"", "gauge", "KV blocks by state",
         (double)e->blocks_free},
        {"heddle:kv_blocks", "state=\"cached\"", "gauge", NULL, (double)e->blocks_cached},
        {"heddle:kv_blocks", "state=\"held\"", "gauge", NULL, (double)e->blocks_held},
        {"heddle:groups", "state=\"expected\"", "gauge", "Groups of workers", e->n_groups},
        {"heddle:groups", "state=\"up\"", "gauge", NULL, e->n_groups_up},
        {"heddle:steps_total", "", "counter", "Steps planned", (double)e->n_steps},
        {"heddle:requests_resumed_total", "", "counter", "Sequences replayed after a loss",
         (double)e->n_resumed},
        {"heddle:tokens_recomputed_total", "", "counter", "Tokens computed again",
         (double)e->n_recomputed_tokens},
        {"heddle:group_losses_total", "", "counter", "Groups lost", (double)e->n_group_losses},
        {"heddle:swaps_total", "direction=\"out\"", "counter", "Sequences swapped",
         (double)e->n_swaps_out},
        {"heddle:swaps_total", "direction=\"in\"", "counter", NULL, (double)e->n_swaps_in},
        {"heddle:forks_total", "", "counter", "Sequences forked", (double)e->n_forks},
        {"heddle:step_fill_ratio", "", "gauge", "Share of the token budget used under backlog",
         e->step_budget ? (double)e->step_tokens / (double)e->step_budget : 0},
        {"heddle:workers_alive", "", "gauge", "Worker ranks that have joined", s->workers_alive},
        {"heddle:workers_expected", "", "gauge", "Worker ranks of all groups", s->workers_expected},
        {"heddle:epoch", "", "gauge", "Latest epoch of any group", (double)s->epoch},
        {"heddle:draining", "", "gauge", "1 while draining", s->draining},
        {"heddle:http_connections", "", "gauge", "Open connections", s->n_connections},
    };
    write_gauges(rows, sizeof rows / sizeof *rows, labels, out);
    write_tiers(e, labels, out);
    write_head(out, "vllm:cache_config_info", "gauge", "Configuration of the KV cache");
    buf_printf(out, "vllm:cache_config_info{%s,block_size=\"%u\",num_gpu_blocks=\"%llu\"} 1\n",
               labels, e->block_size, (unsigned long long)e->blocks_total);
    write_head(out, "heddle:build_info", "gauge", "This program");
    buf_printf(out, "heddle:build_info{version=\"" HEDDLE_VERSION "\"} 1\n");
}

static void write_http(struct metrics *m, struct buf *out)
{
    write_head(out, "http_requests_total", "counter", "Answers by route, method and status");
    pthread_mutex_lock(&m->http_mutex);
    for (unsigned i = 0; i < m->n_http; i++)
        buf_printf(out, "http_requests_total{handler=\"%s\",method=\"%s\",status=\"%d\"} %llu\n",
                   m->http[i].handler, m->http[i].method, m->http[i].status, m->http[i].n);
    pthread_mutex_unlock(&m->http_mutex);
}

enum err metrics_write(struct metrics *m, const struct metrics_snapshot *s, struct buf *out)
{
    struct buf labels;
    buf_init(&labels, 0);
    buf_add_string(&labels, "model_name=");
    json_write_string(&labels, s->model_name, strlen(s->model_name)); /* same escapes */
    buf_add_string(&labels, ",engine=\"0\"");
    const char *l = buf_string(&labels);
    write_engine(s, l, out);
    write_head(out, "vllm:request_success_total", "counter", "Finished choices by reason");
    for (int i = FINISH_STOP; i <= FINISH_ERROR; i++)
        buf_printf(out, "vllm:request_success_total{%s,finished_reason=\"%s\"} %llu\n", l,
                   finish_words[i], atomic_load(&m->finished[i]));
    for (int i = 0; i < METRIC_COUNTERS; i++) {
        if (counter_rows[i].help)
            write_head(out, counter_rows[i].name, counter_rows[i].type, counter_rows[i].help);
        buf_printf(out, "%s{%s%s%s} %lld\n", counter_rows[i].name, l,
                   *counter_rows[i].labels ? "," : "", counter_rows[i].labels,
                   atomic_load(&m->counters[i]));
    }
    for (int i = 0; i < METRIC_HISTOGRAMS; i++)
        write_histogram(m, i, i == METRIC_HTTP_DURATION ? "handler=\"all\"" : l, out);
    write_http(m, out);
    buf_fini(&labels);
    return buf_err(out);
}
