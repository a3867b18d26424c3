/* The front's pure parts against naive versions of themselves: stop strings cut anywhere, the queue
 * under two threads, keys, buckets, model files. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "base/rand.h"
#include "coordinator/front/auth.h"
#include "coordinator/front/metrics.h"
#include "coordinator/front/model_info.h"
#include "coordinator/front/stop_match.h"
#include "coordinator/front/stream_queue.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The text up to the match that ends first (the longest of those), by trying every end. */
static size_t naive_cut(const char *text, size_t n, const struct span *stops, unsigned n_stops, int *out_found)
{
    for (size_t end = 1; end <= n; end++) {
        int best = -1;
        for (unsigned i = 0; i < n_stops; i++)
            if (stops[i].n <= end && !memcmp(text + end - stops[i].n, stops[i].data, stops[i].n) &&
                (best < 0 || stops[i].n > stops[best].n))
                best = (int)i;
        if (best < 0) continue;
        *out_found = best;
        return end - stops[best].n;
    }
    *out_found = -1;
    return n;
}

static void stop_strings_as_naive(void **state)
{
    (void)state;
    struct rand r = rand_seeded(5);
    int n_matches = 0;
    for (int round = 0; round < 20000; round++) {
        char text[40], strings[4][6];
        struct span stops[4];
        unsigned n_stops = 1 + (unsigned)rand_below(&r, 4);
        for (unsigned i = 0; i < n_stops; i++) {
            size_t n = 1 + (size_t)rand_below(&r, 5);
            for (size_t k = 0; k < n; k++) strings[i][k] = (char)('a' + rand_below(&r, 3));
            stops[i] = (struct span){strings[i], n};
        }
        size_t n = (size_t)rand_below(&r, sizeof text);
        for (size_t k = 0; k < n; k++) text[k] = (char)('a' + rand_below(&r, 3));
        int expected, found = -1;
        size_t cut = naive_cut(text, n, stops, n_stops, &expected);
        struct stop_match m;
        struct buf out;
        buf_init(&out, 0);
        stop_match_init(&m, stops, n_stops, false);
        for (size_t at = 0; at < n && found < 0;) {
            size_t piece = 1 + (size_t)rand_below(&r, 6);
            if (piece > n - at) piece = n - at;
            assert_int_equal(stop_match_feed(&m, text + at, piece, &out, &found), OK);
            at += piece;
            assert_true(out.n <= cut); /* what was given is never taken back */
        }
        if (found < 0) assert_int_equal(stop_match_flush(&m, &out), OK);
        assert_int_equal(found >= 0, expected >= 0);
        assert_int_equal(out.n, cut);
        assert_memory_equal(buf_string(&out), text, cut);
        n_matches += found >= 0;
        stop_match_fini(&m);
        buf_fini(&out);
    }
    assert_true(n_matches > 5000 && n_matches < 19000);
}

static struct stream_queue queue;
static _Atomic size_t visible;
enum { EMISSIONS = 20000 };

static void *fill_queue(void *ctx)
{
    (void)ctx;
    struct rand r = rand_seeded(9);
    for (uint32_t i = 0; i < EMISSIONS;) {
        int32_t tops[5];
        float values[5];
        struct step_token tokens[4];
        uint32_t n = i % 5;
        for (uint32_t k = 0; k < 5; k++) tops[k] = (int32_t)(i + k), values[k] = (float)i;
        for (uint32_t k = 0; k < n; k++)
            tokens[k] = (struct step_token){.token = (int32_t)(i * 7 + k), .has_logprob = true, .logprob = -1.5f,
                                            .n_top = (i + k) % 6, .top_tokens = tops, .top_logprobs = values};
        struct emission e = {.request_id = i, .choice = (int32_t)(i % 3), .n_tokens = n, .tokens = tokens, .stop_token = -1,
                             .error = i % 11 ? OK : ERR_PEER, .error_text = i % 11 ? NULL : "why it failed"};
        if (!stream_queue_put(&queue, &e, i)) continue; /* full: the reader will make room */
        i++;
        if (rand_below(&r, 3) == 0 || i == EMISSIONS) atomic_store(&visible, queue.written);
        if (queue.written - atomic_load(&queue.taken) > 3000) atomic_store(&visible, queue.written);
    }
    return NULL;
}

static void queue_keeps_order(void **state)
{
    (void)state;
    pthread_t thread;
    struct buf scratch;
    buf_init(&scratch, 0);
    assert_int_equal(stream_queue_init(&queue, 4001), OK);
    pthread_create(&thread, NULL, fill_queue, NULL);
    for (uint32_t i = 0; i < EMISSIONS;) {
        struct stream_record record;
        const struct step_token *tokens;
        if (!stream_queue_take(&queue, atomic_load(&visible), &scratch, &record, &tokens)) continue;
        assert_int_equal(record.request_id, i);
        assert_int_equal(record.n_tokens, i % 5);
        assert_int_equal(record.choice, i % 3);
        assert_string_equal(record.error_text, i % 11 ? "" : "why it failed");
        for (uint32_t k = 0; k < record.n_tokens; k++) {
            assert_int_equal(tokens[k].token, i * 7 + k);
            assert_int_equal(tokens[k].n_top, (i + k) % 6);
            if (tokens[k].n_top) {
                assert_int_equal(tokens[k].top_tokens[tokens[k].n_top - 1], i + tokens[k].n_top - 1);
                assert_true(tokens[k].top_logprobs[0] == (float)i);
            }
        }
        i++;
    }
    pthread_join(thread, NULL);
    struct emission big = {.n_tokens = 200, .tokens = (struct step_token[200]){{0}}};
    assert_false(stream_queue_put(&queue, &big, 0)); /* larger than the ring: refused, nothing broken */
    stream_queue_fini(&queue);
    buf_fini(&scratch);
}

static void keys(void **state)
{
    (void)state;
    static struct auth a;
    char path[] = "/tmp/heddle-keys-XXXXXX";
    int fd = mkstemp(path);
    static const char text[] = "# comment\nfile-key-1\n\n  file-key-2 \r\n";
    assert_int_equal(write(fd, text, sizeof text - 1), sizeof text - 1);
    close(fd);
    assert_int_equal(auth_add_list(&a, "one,two, three"), OK);
    assert_int_equal(auth_add_file(&a, path), OK);
    unlink(path);
    assert_int_equal(a.n_keys, 5);
    assert_int_equal(auth_find(&a, span_of("three")), 2);
    assert_int_equal(auth_find(&a, span_of("file-key-2")), 4);
    assert_int_equal(auth_find(&a, span_of("file-key-2 ")), -1);
    assert_int_equal(auth_find(&a, span_of("")), -1);
    assert_int_equal(auth_find(&a, (struct span){NULL, 0}), -1);
    assert_int_equal(auth_find(&a, auth_bearer(span_of("bearer   two"))), 1);
    assert_int_equal(auth_bearer(span_of("Basic two")).n, 0);
    assert_int_equal(auth_add_file(&a, "/nonexistent"), ERR_NOT_FOUND);
    assert_true(auth_tenant(&a, 0) != auth_tenant(&a, 1));
}

static void buckets(void **state)
{
    (void)state;
    static struct metrics m;
    struct engine_stats stats = {0};
    struct metrics_snapshot s = {.model_name = "a\"b\\c\nd", .engine = &stats};
    struct buf out;
    buf_init(&out, 0);
    metrics_init(&m, 1000);
    histogram_observe(&m.histograms[METRIC_TTFT], 0.005, 1); /* at a bound: belongs to it */
    histogram_observe(&m.histograms[METRIC_TTFT], 1e9, 2);
    histogram_observe(&m.histograms[METRIC_PROMPT_TOKENS], 700, 3);
    assert_int_equal(metrics_write(&m, &s, &out), OK);
#define L "{model_name=\"a\\\"b\\\\c\\nd\",engine=\"0\""
    assert_non_null(strstr(out.data, "vllm:time_to_first_token_seconds_bucket" L ",le=\"0.001\"} 0\n"));
    assert_non_null(strstr(out.data, "vllm:time_to_first_token_seconds_bucket" L ",le=\"0.005\"} 1\n"));
    assert_non_null(strstr(out.data, "vllm:time_to_first_token_seconds_bucket" L ",le=\"+Inf\"} 3\n"));
    assert_non_null(strstr(out.data, "vllm:request_prompt_tokens_bucket" L ",le=\"500\"} 0\n"));
    assert_non_null(strstr(out.data, "vllm:request_prompt_tokens_bucket" L ",le=\"1000\"} 3\n"));
    assert_non_null(strstr(out.data, "vllm:request_prompt_tokens_sum" L "} 2100.000000\n"));
    buf_fini(&out);
}

static void write_file(const char *dir, const char *name, const char *text)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
}

static void model_files(void **state)
{
    (void)state;
    char dir[] = "/tmp/heddle-model-XXXXXX", path[256];
    struct model_info info;
    assert_non_null(mkdtemp(dir));
    assert_int_equal(model_info_read(dir, true, &info), OK);
    assert_true(info.vocab_size == 0 && info.defaults.sampling.temperature == 1);
    write_file(dir, "config.json", "{\"vocab_size\":512,\"max_position_embeddings\":2048}");
    write_file(dir, "generation_config.json", "{\"temperature\":0.6,\"top_p\":0.9,\"top_k\":50,\"max_new_tokens\":77,\"eos_token_id\":[1,2]}");
    assert_int_equal(model_info_read(dir, true, &info), OK);
    assert_int_equal(info.vocab_size, 512);
    assert_int_equal(info.context_max, 2048);
    assert_int_equal(info.defaults.max_tokens, 77);
    assert_true(info.defaults.sampling.temperature == 0.6f && info.defaults.sampling.top_k == 50);
    assert_int_equal(model_info_read(dir, false, &info), OK);
    assert_true(info.defaults.sampling.temperature == 1 && info.defaults.sampling.top_k == 0);
    write_file(dir, "generation_config.json", "{\"temperature\":\"hot\"}");
    assert_int_equal(model_info_read(dir, true, &info), ERR_FORMAT);
    assert_non_null(strstr(err_detail(), "temperature"));
    write_file(dir, "config.json", "[");
    assert_int_equal(model_info_read(dir, false, &info), ERR_FORMAT);
    snprintf(path, sizeof path, "%s/config.json", dir);
    unlink(path);
    snprintf(path, sizeof path, "%s/generation_config.json", dir);
    unlink(path);
    rmdir(dir);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(stop_strings_as_naive), cmocka_unit_test(queue_keeps_order), cmocka_unit_test(keys),
        cmocka_unit_test(buckets),               cmocka_unit_test(model_files),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
