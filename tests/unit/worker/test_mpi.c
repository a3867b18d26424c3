/* Goal: ranks that are processes of one mpirun generate transformers' tokens, over MPI and over
 * shared memory, and every rank samples the same ones.
 * Method: this program runs itself under mpirun; ranks meet through a folder, plans are made alike
 * on each, as the coordinator's bytes would be. */
#include "base/log.h"
#include "golden.h"
#include "unit/parallel/mpirun.h"
#include "worker/rank.h"

#define CHECK(condition)                                                                           \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            fprintf(stderr, "rank %d: line %d: %s (%s)\n", f->rank, __LINE__, #condition,          \
                    err_detail());                                                                 \
            _exit(1);                                                                              \
        }                                                                                          \
    } while (0)

static void prompt_run(struct folder *f, struct worker *w, const struct golden_prompt *p,
                       uint64_t *step)
{
    int32_t blocks[10] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9};
    struct plan_open open = {.slot = 1,
                             .n_prompt = (uint32_t)p->n_ids,
                             .n_tokens_max = (uint32_t)(p->n_ids + 40),
                             .n_tokens = (uint32_t)p->n_ids,
                             .n_blocks = 10,
                             .tokens = p->ids,
                             .blocks = blocks};
    struct plan_run run = {
        .slot = 1, .n_tokens = (uint32_t)p->n_ids, .flags = PLAN_RUN_SAMPLE | PLAN_RUN_STAY};
    uint32_t close = 1;
    sampling_params_default(&open.sampling);
    open.sampling.temperature = 0;
    open.sampling.n_logprobs = open.sampling.n_prompt_logprobs = -1;
    for (int i = 0; i < 32; i++) {
        struct step_result result;
        struct step_plan plan = {.epoch = 1,
                                 .step = ++*step,
                                 .n_opens = i == 0,
                                 .opens = &open,
                                 .n_runs = i == 0,
                                 .runs = &run};
        CHECK(worker_begin(w, &plan) == OK && worker_end(w, &result) == OK);
        CHECK(result.n_tokens == 1);
        CHECK(result.tokens[0].token == p->greedy[i] || p->gaps[i] < 0.3);
        if (result.tokens[0].token != p->greedy[i]) break; /* on every rank alike */
    }
    struct step_result result;
    struct step_plan plan = {.epoch = 1, .step = ++*step, .n_closes = 1, .closes = &close};
    CHECK(worker_begin(w, &plan) == OK && worker_end(w, &result) == OK);
}

static int child(void)
{
    static const char *const models[] = {"llama", "qwen2_heads14"}, *const collectives[] = {"mpi",
                                                                                            "auto"};
    struct folder folder = mpirun_folder(), *f = &folder;
    for (int m = 0; m < 2; m++) {
        struct golden g;
        struct worker *w;
        struct worker_config c;
        uint64_t step = 0;
        golden_open(models[m], &g);
        worker_config_default(&c);
        c.model_dir = g.dir;
        c.device = "cpu";
        c.n_threads = 1;
        c.n_sequences_max = 4;
        c.step_tokens_max = 128;
        c.block_size = 16;
        c.kv_cache_bytes = 1 << 20;
        c.collective = collectives[m];
        c.collective_timeout_ms = 60000;
        CHECK(worker_create(&c, &w) == OK);
        CHECK(w->config.rank == f->rank && w->config.size == f->size);
        struct bootstrap boot = {.group_key = f->path, .exchange = folder_exchange, .ctx = f};
        CHECK(worker_open_group(w, 1, 20, 0, &boot) == OK);
        CHECK(!strcmp(w->decoder.collective->ops->name, m ? "shm" : "mpi"));
        prompt_run(f, w, &g.prompts[1], &step);
        prompt_run(f, w, &g.prompts[2], &step);
        worker_destroy(w);
        golden_close(&g);
    }
    collective_shutdown(true);
    return 0;
}

int main(void)
{
    log_set_level(LOG_ERROR);
    if (mpirun_is_child()) return child();
    for (int n = 2; n <= 3; n++) {
        int status = mpirun_self(n);
        if (status == 77) return printf("no mpirun on this machine\n"), 77;
        if (status) return printf("%d ranks failed with status %d\n", n, status), 1;
        printf("%d ranks agree\n", n);
    }
    return 0;
}
