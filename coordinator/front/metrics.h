/* What the server counts, and its page in Prometheus' text format.
 *
 * Counters and histograms are atomics that any thread may touch. The vllm: names are those that
 * gateways, dashboards and autoscalers already read; heddle: names say what only Heddle has. One
 * row of a table is one metric. It must never know HTTP or JSON. */
#pragma once
#include "base/buf.h"
#include "coordinator/engine/engine.h"

#include <pthread.h>
#include <stdatomic.h>

enum { METRIC_BOUNDS_MAX = 24, METRIC_HTTP_MAX = 256 };

struct histogram {
    unsigned n_bounds;
    double bounds[METRIC_BOUNDS_MAX];
    atomic_ullong counts[METRIC_BOUNDS_MAX + 1]; /* not cumulative; the last is above all bounds */
    atomic_ullong sum_micro;                     /* sum of the values times a million */
};
/* Counts `times` observations of one value. */
void histogram_observe(struct histogram *h, double value, uint64_t times);

enum metric_histogram {
    METRIC_TTFT,
    METRIC_ITL,
    METRIC_TPOT,
    METRIC_E2E,
    METRIC_QUEUE,
    METRIC_PREFILL,
    METRIC_DECODE,
    METRIC_INFERENCE,
    METRIC_PROMPT_TOKENS,
    METRIC_GENERATION_TOKENS,
    METRIC_MAX_GENERATION_TOKENS,
    METRIC_PARAMS_N,
    METRIC_PARAMS_MAX_TOKENS,
    METRIC_HTTP_DURATION,
    METRIC_HISTOGRAMS
};

enum metric_counter {
    METRIC_REJECTED_FULL,
    METRIC_REJECTED_INVALID,
    METRIC_REJECTED_NOT_READY,
    METRIC_REJECTED_AUTH,
    METRIC_CANCELLED,    /* clients that left before their answer's end */
    METRIC_SLOW_CLIENTS, /* cut because they did not read */
    METRIC_STREAMS,      /* gauge: answers being made */
    METRIC_COUNTERS
};

struct http_count {
    const char *handler, *method;
    int status;
    unsigned long long n;
};

struct metrics {
    struct histogram histograms[METRIC_HISTOGRAMS];
    atomic_llong counters[METRIC_COUNTERS];
    atomic_ullong finished[FINISH_ERROR + 1]; /* by enum finish */
    pthread_mutex_t http_mutex;
    unsigned n_http;
    struct http_count http[METRIC_HTTP_MAX]; /* [n_http], found by pointer and status */
};

/* What the page shows besides: a snapshot taken by the caller. */
struct metrics_snapshot {
    const char *model_name;
    const struct engine_stats *engine;
    uint32_t workers_expected, workers_alive;
    uint64_t epoch;
    bool draining;
    unsigned n_connections;
};

/* context_max bounds the buckets that count tokens. */
void metrics_init(struct metrics *m, uint64_t context_max);
void metrics_count(struct metrics *m, enum metric_counter c, long long delta);
/* handler and method must live for ever. */
void metrics_http(struct metrics *m, const char *handler, const char *method, int status,
                  int64_t took_us);
enum err metrics_write(struct metrics *m, const struct metrics_snapshot *s, struct buf *out);
