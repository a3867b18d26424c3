/* A whole model on this card, by the worker itself without its link: how long prompts take, how
 * long decode steps take two deep as graphs, and for how long no kernel runs between two of them.
 *
 * usage: bench_steps MODEL_DIR [--quantization WORD] [--kv-cache-dtype WORD] [--quick] [--tiny]
 * Weights are random (--load-format dummy). Output: CSV, a row a case: what, weights, sequences,
 * context, milliseconds, tokens/s, GB/s that must be read, TFLOP/s that must be done, idle
 * microseconds (median, and 99 of 100). Time without a kernel comes from the device's own clock, by
 * the trace of kernels/cuda/trace.c. */
#include "base/clock.h"
#include "base/mem.h"
#include "proto/plan.h"
#include "worker/rank.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SEQUENCES_MAX = 64, STEPS_MAX = 512 };

struct bench {
    struct worker *w;
    struct worker_info info;
    struct arena arena;
    int32_t *tokens; /* [context_max] */
    FILE *trace;
    uint64_t step;
    int steps; /* of decoding that are timed */
};

static void must(enum err e)
{
    if (!e) return;
    fprintf(stderr, "bench_steps: %s: %s\n", err_name(e), err_detail());
    exit(1);
}

static void end_one(struct bench *b)
{
    struct step_result result;
    must(worker_end(b->w, &result));
}

static void begin_one(struct bench *b, struct step_plan *plan)
{
    plan->epoch = 1;
    plan->step = ++b->step;
    if (b->w->n_busy == STEPS_IN_FLIGHT) end_one(b);
    must(worker_begin(b->w, plan));
}

static void end_all(struct bench *b)
{
    while (b->w->n_busy)
        end_one(b);
}

/* Opens a slot and computes its prompt in chunks of the step's budget. */
static void prompt_read(struct bench *b, int slot, int n_prompt)
{
    int size = b->info.block_size, n_blocks = (n_prompt + b->steps + 2 * size) / size;
    struct plan_open open = {.slot = (uint32_t)slot,
                             .n_prompt = (uint32_t)n_prompt,
                             .n_tokens = (uint32_t)n_prompt,
                             .n_tokens_max = (uint32_t)(n_prompt + b->steps + size),
                             .tokens = b->tokens,
                             .n_blocks = (uint32_t)n_blocks};
    must(
        arena_alloc_array(&b->arena, (size_t)n_blocks, sizeof *open.blocks, (void **)&open.blocks));
    for (int i = 0; i < n_blocks; i++)
        ((int32_t *)(uintptr_t)open.blocks)[i] = slot * n_blocks + i;
    sampling_params_default(&open.sampling);
    open.sampling.temperature = 0;
    for (int done = 0; done < n_prompt;) {
        int n =
            n_prompt - done < b->info.step_tokens_max ? n_prompt - done : b->info.step_tokens_max;
        bool last = done + n == n_prompt;
        struct plan_run run = {.slot = (uint32_t)slot,
                               .n_tokens = (uint32_t)n,
                               .flags = last ? PLAN_RUN_SAMPLE | PLAN_RUN_STAY : 0};
        begin_one(b,
                  &(struct step_plan){.n_opens = !done, .opens = &open, .n_runs = 1, .runs = &run});
        end_all(b);
        done += n;
    }
}

static void slots_close(struct bench *b, int n)
{
    uint32_t slots[SEQUENCES_MAX];
    for (int i = 0; i < n; i++)
        slots[i] = (uint32_t)i;
    begin_one(b, &(struct step_plan){.n_closes = (uint32_t)n, .closes = slots});
    end_all(b);
    arena_reset(&b->arena);
}

static int compare(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* What the trace has about decode steps since it was last read: microseconds without a kernel. */
static int idle_read(struct bench *b, int n_seqs, double *out)
{
    char line[200];
    int n = 0, last_seqs = 0;
    while (fgets(line, sizeof line, b->trace)) {
        int tokens, seqs;
        double idle;
        if (sscanf(line, "%*d,%*u,%d,%d,%*f,%lf", &tokens, &seqs, &idle) != 3) continue;
        bool decode = tokens == seqs && seqs >= n_seqs;
        if (decode && last_seqs == seqs && idle >= 0 && n < STEPS_MAX) out[n++] = idle;
        last_seqs = decode ? seqs : 0;
    }
    clearerr(b->trace);
    qsort(out, (size_t)n, sizeof *out, compare);
    return n;
}

static double layers_parameters(const struct worker_info *i)
{
    double attention = (double)i->hidden * (2 * i->n_heads + 2 * i->n_kv_heads) * i->head_dim;
    return i->n_layers * (attention + 3.0 * i->hidden * i->ffn);
}

static void prefill_case(struct bench *b, int n)
{
    double best = 0, flops, attention;
    for (int i = 0; i < 3; i++) {
        int64_t begun = clock_monotonic_ns();
        prompt_read(b, 0, n);
        double ms = (double)(clock_monotonic_ns() - begun) / 1e6;
        slots_close(b, 1);
        if (!i || ms < best) best = ms;
    }
    attention = 4.0 * b->info.n_layers * b->info.n_heads * b->info.head_dim * n * (n + 1.0) / 2;
    flops =
        2 * layers_parameters(&b->info) * n + attention + 2.0 * b->info.hidden * b->info.vocab_size;
    printf("prefill,%s,1,%d,%.3f,%.1f,%.5g,%.5g,,\n", b->info.weight_format, n, best,
           n / best * 1e3, (double)b->info.weight_bytes / best / 1e6, flops / best / 1e9);
    fflush(stdout);
}

static void decode_case(struct bench *b, int n_seqs, int context)
{
    static double idle[STEPS_MAX];
    for (int i = 0; i < n_seqs; i++)
        prompt_read(b, i, context);
    for (int i = 0; i < 4; i++) /* the first is warm, the second recorded */
        begin_one(b, &(struct step_plan){0});
    end_all(b);
    idle_read(b, n_seqs, idle);
    int64_t begun = clock_monotonic_ns();
    for (int i = 0; i < b->steps; i++)
        begin_one(b, &(struct step_plan){0});
    end_all(b);
    double ms = (double)(clock_monotonic_ns() - begun) / 1e6 / b->steps;
    int n = idle_read(b, n_seqs, idle);
    double kv =
        (double)b->info.block_bytes / b->info.block_size * (context + b->steps / 2.0) * n_seqs;
    double flops =
        2.0 * n_seqs * (layers_parameters(&b->info) + (double)b->info.hidden * b->info.vocab_size);
    printf("decode,%s,%d,%d,%.3f,%.1f,%.5g,%.5g,", b->info.weight_format, n_seqs, context, ms,
           n_seqs / ms * 1e3, ((double)b->info.weight_bytes + kv) / ms / 1e6, flops / ms / 1e9);
    if (n)
        printf("%.1f,%.1f\n", idle[n / 2], idle[n - 1 - n / 100]);
    else
        printf(",\n");
    fflush(stdout);
    slots_close(b, n_seqs);
}

static void bench_open(struct bench *b, struct worker_config *c)
{
    static char path[] = "/tmp/heddle-trace-XXXXXX";
    int fd = mkstemp(path);
    if (fd < 0) must(err_set(ERR_IO, "%s cannot be made", path));
    setenv("HEDDLE_CUDA_TRACE", path, 1);
    must(worker_create(c, &b->w));
    worker_info(b->w, &b->info);
    must(
        worker_open_group(b->w, 1, b->info.n_blocks, 0, &(struct bootstrap){.group_key = "alone"}));
    b->trace = fdopen(fd, "r");
    remove(path);
    arena_init(&b->arena, 1 << 16, 0);
    must(mem_alloc_array((size_t)c->context_max, sizeof *b->tokens, (void **)&b->tokens));
    for (int i = 0; i < c->context_max; i++)
        b->tokens[i] = (int32_t)((unsigned)i * 2654435761u % (unsigned)b->info.vocab_size);
}

static void bench_close(struct bench *b)
{
    worker_destroy(b->w);
    fclose(b->trace);
    arena_fini(&b->arena);
    mem_free(b->tokens);
}

int main(int argc, char **argv)
{
    struct worker_config c;
    struct bench b = {.steps = 128};
    bool quick = false, tiny = false;
    worker_config_default(&c);
    if (argc < 2)
        return fprintf(stderr, "usage: bench_steps MODEL_DIR [--quantization WORD] …\n"), 2;
    for (int i = 2; i < argc; i++) {
        if (!strcmp(argv[i], "--quick"))
            quick = true;
        else if (!strcmp(argv[i], "--tiny"))
            tiny = true;
        else if (!strcmp(argv[i], "--quantization") && i + 1 < argc)
            c.quantization = argv[++i];
        else if (!strcmp(argv[i], "--kv-cache-dtype") && i + 1 < argc)
            c.kv_dtype = argv[++i];
        else
            return fprintf(stderr, "bench_steps: '%s' is not known\n", argv[i]), 2;
    }
    if (tiny) b.steps = 12;
    c.model_dir = argv[1];
    c.size = 1;
    c.device = "cuda";
    c.load_format = "dummy";
    c.n_sequences_max = tiny ? 4 : SEQUENCES_MAX;
    c.step_tokens_max = tiny ? 64 : 2048;
    c.context_max = tiny ? 128 : 4096 + 1024;
    if (tiny) c.kv_cache_bytes = 16 << 20;
    bench_open(&b, &c);
    printf("what,weights,sequences,context,ms,tokens/s,GB/s,TFLOP/s,idle us,idle us p99\n");
    prefill_case(&b, tiny ? 64 : 2048);
    decode_case(&b, 1, tiny ? 16 : 128);
    if (!quick) decode_case(&b, tiny ? 2 : 16, tiny ? 16 : 1024);
    decode_case(&b, tiny ? 4 : 64, tiny ? 32 : 1024);
    bench_close(&b);
    return 0;
}
