/* Goal: steps overlap safely, results come late but right, and a device that fails or hangs is an
 * error within its deadline.
 * Method: a tiny loop (embed, product, sample) whose next token is the last one plus one, run with
 * several steps in flight through the feedback table, straight and as a replayed graph, its
 * timeline read back; then devices that do not exist, fault, hang or run out of memory, played by
 * HEDDLE_FAKE_GPU. */
#include "base/clock.h"
#include "tests/cuda/gear.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/lsan_interface.h>
#else
static void __lsan_disable(void) {}
static void __lsan_enable(void) {}
#endif

enum { VOCAB = 32, HIDDEN = 32, SLOTS = 3 };

/* Row t of the table is the unit vector t; the product moves it to t + 1. */
struct loop {
    struct backend *b;
    struct weight *table, *next;
    struct both x, logits;
    void *graph;
};

struct loop_arrays {
    int32_t ids[SLOTS], slots[SLOTS], positions[SLOTS], starts[SLOTS + 1], lens[SLOTS],
        blocks[SLOTS], places[SLOTS], rows[SLOTS];
    struct batch batch;
    struct sample_row sample[SLOTS];
    struct sample_result results[SLOTS];
};

static void loop_open(struct loop *l)
{
    float unit[VOCAB * HIDDEN] = {0}, move[VOCAB * HIDDEN] = {0};
    memset(l, 0, sizeof *l);
    l->b = gear_open();
    for (int t = 0; t < VOCAB; t++)
        unit[t * HIDDEN + t] = 1, move[(t + 1) % VOCAB * HIDDEN + t] = 5;
    must(l->b->ops->table_create(
        l->b, (struct matrix_view){unit, DTYPE_F32, VOCAB, HIDDEN, HIDDEN, 1}, &l->table));
    must(l->b->ops->weight_create(l->b,
                                  &(struct matrix_view){move, DTYPE_F32, VOCAB, HIDDEN, HIDDEN, 1},
                                  1, NULL, WEIGHT_AUTO, &l->next));
    l->x = both_new(l->b, SLOTS, HIDDEN, HIDDEN, DTYPE_BF16);
    l->logits = both_new(l->b, SLOTS, VOCAB, VOCAB, DTYPE_F32);
}

static void loop_close(struct loop *l)
{
    l->b->ops->graph_destroy(l->b, l->graph);
    l->b->ops->weight_destroy(l->b, l->table);
    l->b->ops->weight_destroy(l->b, l->next);
    both_free(l->b, &l->x), both_free(l->b, &l->logits);
    l->b->ops->close(l->b);
}

static void forward(struct loop *l, const struct batch *batch)
{
    l->b->ops->embed(l->b, l->x.t, l->table, batch);
    l->b->ops->matmul(l->b, l->logits.t, l->x.t, l->next);
}

static uint64_t loop_step(struct loop *l, struct loop_arrays *a, int32_t id, bool graph)
{
    for (int i = 0; i < SLOTS; i++) {
        a->ids[i] = id < 0 ? id : id + i, a->slots[i] = i * 2, a->starts[i] = i, a->places[i] = -1,
        a->rows[i] = i, a->lens[i] = 1;
        a->sample[i] = (struct sample_row){.slot = i * 2,
                                           .top_p = 1,
                                           .repetition_penalty = 1,
                                           .forced_token = -1,
                                           .n_logprobs = 0};
    }
    a->starts[SLOTS] = SLOTS;
    a->batch = (struct batch){SLOTS,        SLOTS,     SLOTS,   1,         a->ids,    a->slots,
                              a->positions, a->starts, a->lens, a->blocks, a->places, a->rows};
    l->b->ops->batch_begin(l->b, &a->batch);
    if (graph && !l->graph) {
        must(l->b->ops->capture_begin(l->b));
        forward(l, &a->batch);
        must(l->b->ops->capture_end(l->b, &l->graph));
    }
    if (graph)
        l->b->ops->replay(l->b, l->graph);
    else
        forward(l, &a->batch);
    l->b->ops->sample(l->b, l->logits.t, a->sample, SLOTS, a->results);
    return l->b->ops->step_end(l->b);
}

/* Seven steps are begun before the first result is looked at: more than the ring holds. */
static void run_in_flight(bool graph)
{
    enum { STEPS = 7 };
    struct loop l;
    struct loop_arrays *a = take(STEPS * sizeof *a);
    uint64_t tickets[STEPS];
    loop_open(&l);
    for (int s = 0; s < STEPS; s++)
        tickets[s] = loop_step(&l, &a[s], s ? -1 : 4, graph);
    for (int s = STEPS - 1; s >= 0; s--)
        must(l.b->ops->ticket_wait(l.b, tickets[s]));
    for (int s = 0; s < STEPS; s++)
        for (int i = 0; i < SLOTS; i++)
            assert_int_equal(a[s].results[i].token, (4 + i + 1 + s) % VOCAB);
    for (int round = 0; round < 20; round++) { /* one step late, as the worker does */
        for (int i = 0; i < SLOTS; i++)
            a[round % 2].results[i].token = -5;
        tickets[round % 2] = loop_step(&l, &a[round % 2], -1, graph);
        if (round) must(l.b->ops->ticket_wait(l.b, tickets[(round + 1) % 2]));
        if (round) assert_int_equal(a[(round + 1) % 2].results[0].token, (4 + 7 + round) % VOCAB);
    }
    must(l.b->ops->sync(l.b));
    loop_close(&l);
    mem_free(a);
}

static void test_in_flight(void **state)
{
    (void)state;
    run_in_flight(false);
    run_in_flight(true);
}

/* The trace has a line for each step, in order; what is busy and what is idle make up the time. */
static void test_trace(void **state)
{
    enum { STEPS = 11 };
    char path[] = "/tmp/heddle-trace-XXXXXX", line[200];
    int fd = mkstemp(path), n = 0;
    struct loop l;
    struct loop_arrays *a = take(2 * sizeof *a);
    double all = 0;
    bool late = false;
    (void)state;
    assert_true(fd >= 0);
    setenv("HEDDLE_CUDA_TRACE", path, 1);
    loop_open(&l);
    unsetenv("HEDDLE_CUDA_TRACE");
    int64_t begun = clock_monotonic_us();
    for (uint64_t s = 0, last = 0; s <= STEPS; s++) {
        uint64_t ticket = s < STEPS ? loop_step(&l, &a[s % 2], s ? -1 : 4, s > 3) : 0;
        if (s) must(l.b->ops->ticket_wait(l.b, last));
        last = ticket;
        if (s == 6) clock_sleep_us(30000); /* the step that follows is begun late */
    }
    double took = (double)(clock_monotonic_us() - begun);
    loop_close(&l);
    FILE *f = fdopen(fd, "r");
    while (fgets(line, sizeof line, f)) {
        int device, tokens, seqs;
        unsigned long long ticket;
        double busy, idle;
        assert_int_equal(
            sscanf(line, "%d,%llu,%d,%d,%lf,%lf", &device, &ticket, &tokens, &seqs, &busy, &idle),
            6);
        assert_int_equal(ticket, ++n);
        assert_true(device == 0 && tokens == SLOTS && seqs == SLOTS);
        assert_true(busy > 0 && (n == 1 ? idle < 0 : idle >= 0));
        late |= (n == 7 || n == 8) && idle > 10000; /* the stand-in's streams run late, too */
        all += busy + (idle > 0 ? idle : 0);
    }
    assert_int_equal(n, STEPS);
    assert_true(late);
    assert_true(all < took && all > took / 2);
    fclose(f);
    remove(path);
    mem_free(a);
}

static void play(const char *device)
{
    device ? setenv("HEDDLE_FAKE_GPU", device, 1) : unsetenv("HEDDLE_FAKE_GPU");
}

/* A driver that refuses kernels which overlap costs speed and nothing else; so does not wanting it.
 */
static void test_without_overlap(void **state)
{
    (void)state;
    play("overlap=0");
    run_in_flight(true);
    play("sm=80");
    run_in_flight(true);
    play("overlap=0");
    setenv("HEDDLE_CUDA_OVERLAP", "0", 1);
    run_in_flight(true);
    unsetenv("HEDDLE_CUDA_OVERLAP");
    play(NULL);
}

static void test_declines(void **state)
{
    static const struct {
        const char *device, *words;
    } list[] = {{"driver=0", "no NVIDIA driver"},
                {"driver=12040", "too old: it offers CUDA 12.4, needs 13.0"},
                {"devices=0", "sees no GPU"},
                {"sm=75", "sm_75, needs sm_80"}};
    struct backend_options o = gear_options();
    struct backend *b = NULL;
    (void)state;
    for (size_t i = 0; i < sizeof list / sizeof *list; i++) {
        play(list[i].device);
        assert_int_equal(backend_open("cuda", &o, &b), ERR_DEVICE);
        if (!strstr(err_detail(), list[i].words))
            fail_msg("'%s' does not say '%s'", err_detail(), list[i].words);
    }
    play(NULL);
    o.device = 3;
    assert_int_equal(backend_open("cuda", &o, &b), ERR_DEVICE);
    assert_non_null(strstr(err_detail(), "GPU 3 does not exist"));
    assert_null(b);
}

/* Every piece of work fails once: the error is reported, by the step's wait or before, and stays.
 */
static void test_faults(void **state)
{
    (void)state;
    __lsan_disable(); /* a device in error gives nothing back; the rank restarts */
    for (int at = 0; at < 44; at += 6) {
        char device[40];
        struct loop l;
        struct loop_arrays *a = take(8 * sizeof *a);
        enum err e = OK;
        int s = 0;
        loop_open(&l);
        snprintf(device, sizeof device, "fail_now=%d", at);
        play(device);
        for (; s < 8 && !e; s++)
            e = l.b->ops->ticket_wait(l.b, loop_step(&l, &a[s], s ? -1 : 4, false));
        assert_int_equal(e, ERR_DEVICE);
        assert_non_null(strstr(err_detail(), "illegal memory access"));
        assert_int_equal(l.b->ops->sync(l.b), ERR_DEVICE);
        assert_int_equal(l.b->ops->ticket_wait(l.b, loop_step(&l, &a[0], -1, false)), ERR_DEVICE);
        loop_close(&l);
        play("reset=1");
        struct backend_options o = gear_options();
        struct backend *again;
        must(backend_open("cuda", &o, &again)); /* a new context, as a new process would have */
        again->ops->close(again);
        play(NULL);
        mem_free(a);
    }
    __lsan_enable();
}

static void test_hang(void **state)
{
    struct loop l;
    struct loop_arrays *a = take(sizeof *a);
    (void)state;
    setenv("HEDDLE_CUDA_WAIT_MS", "1000", 1);
    __lsan_disable(); /* what a hung device still holds is given back by the end of the process
                         alone */
    loop_open(&l);
    play("hang=1");
    int64_t start = clock_monotonic_us();
    assert_int_equal(l.b->ops->ticket_wait(l.b, loop_step(&l, a, 4, false)), ERR_DEVICE);
    assert_non_null(strstr(err_detail(), "1000 ms"));
    assert_int_equal(l.b->ops->sync(l.b), ERR_DEVICE);
    assert_true(clock_monotonic_us() - start < 30000000);
    play(NULL);
    loop_close(&l);
    __lsan_enable();
    unsetenv("HEDDLE_CUDA_WAIT_MS");
    mem_free(a);
}

static void test_out_of_memory(void **state)
{
    struct backend_options o = gear_options();
    struct backend *b = NULL;
    (void)state;
    for (int mb = 1; mb < 60; mb += 14) {
        char device[40];
        snprintf(device, sizeof device, "memory_mb=%d", mb);
        play(device);
        enum err e = backend_open("cuda", &o, &b);
        if (e) {
            assert_int_equal(e, ERR_NO_MEMORY);
            continue;
        }
        size_t have, total;
        void *mem = NULL;
        must(b->ops->memory(b, &have, &total));
        assert_true(have < total && total == (size_t)mb << 20);
        assert_int_equal(b->ops->alloc(b, total, &mem), ERR_NO_MEMORY);
        assert_null(mem);
        b->ops->close(b);
    }
    play(NULL);
}

/* Each host allocation of opening and packing fails once; nothing leaks and nothing breaks. */
static void test_host_memory_fails(void **state)
{
    float data[64] = {0};
    (void)state;
    for (int n = 1; n < 16; n++) {
        struct backend_options o = gear_options();
        struct backend *b = NULL;
        struct weight *w = NULL;
        mem_fail_at(n);
        enum err e = backend_open("cuda", &o, &b);
        if (!e)
            e = b->ops->weight_create(b, &(struct matrix_view){data, DTYPE_F32, 8, 8, 8, 1}, 1,
                                      data, WEIGHT_INT8, &w);
        mem_fail_at(0);
        if (w) b->ops->weight_destroy(b, w);
        if (b) b->ops->close(b);
    }
}

int main(void)
{
    const struct CMUnitTest native[] = {cmocka_unit_test(test_in_flight),
                                        cmocka_unit_test(test_trace)};
    if (getenv("HEDDLE_GPU_NATIVE"))
        return cmocka_run_group_tests(native, NULL, NULL); /* a real one cannot be told to fail */
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_in_flight),
        cmocka_unit_test(test_trace),
        cmocka_unit_test(test_without_overlap),
        cmocka_unit_test(test_declines),
        cmocka_unit_test(test_hang),
        cmocka_unit_test(test_faults),
        cmocka_unit_test(test_out_of_memory),
        cmocka_unit_test(test_host_memory_fails),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
