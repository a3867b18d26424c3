/* The engine: the one owner of every sequence, block and plan.
 *
 * It is a state machine on one thread. Its inputs are events (a request, a cancel, a step's result,
 * a group that came or went, the time); its outputs are plans and emissions. It reads no clock, no
 * socket and no file, so the simulator and `heddle replay` run this very code. engine_loop.h gives
 * it a thread, an inbox and the real clock.
 *
 * It knows requests and integers; never text, tensors, devices or weights. */
#pragma once
#include "base/err.h"
#include "proto/plan.h"
#include <stdint.h>

enum finish {
    FINISH_NONE,      /* goes on */
    FINISH_STOP,      /* a stop token, or the client's cancel with ENGINE_CANCEL_STOP (a stop string) */
    FINISH_LENGTH,    /* max_tokens or the context's end */
    FINISH_CANCELLED, /* the client left */
    FINISH_ERROR      /* emission.error says why */
};

/* One choice's news in one step. Valid only during the call of emit. */
struct emission {
    uint64_t request_id;
    int32_t choice;              /* 0 .. n - 1 */
    uint32_t n_tokens;           /* may be 0 with a finish */
    const struct step_token *tokens; /* [n_tokens]; STEP_TOKEN_SCORED ones are of the prompt */
    enum finish finish;
    bool last;                   /* last news of the whole request: the engine forgets it now */
    int32_t stop_token;          /* the stop id that ended it (it is among the tokens), or -1 */
    enum err error;
    const char *error_text;
    uint32_t n_prompt, n_cached, n_generated; /* of this choice so far; cached: prefix hits */
    int64_t queued_us, prefill_us;            /* set with the first token: how long it waited */
};

/* Whoever asked. Called on the engine's thread: copy, wake, return; never wait. */
struct sink {
    void (*emit)(struct sink *s, const struct emission *e);
    void (*flush)(struct sink *s); /* after a step in which emit was called; may be NULL */
};

struct request {
    uint64_t id; /* unique among those alive; chosen by the caller, never 0 */
    struct sink *sink;
    int32_t *tokens; /* [n_tokens] prompt, every id < vocab_size: the front has checked */
    uint32_t n_tokens;
    uint32_t max_tokens;  /* output tokens of a choice, at least 1 (0 with n_prompt_logprobs >= 0) */
    uint32_t n_choices;   /* n */
    uint32_t n_best_of;   /* 0 = n_choices; else run so many, give the best by cumulative logprob */
    uint32_t beam_width;  /* 0 = sampling; else beam search, n_choices best beams at the end */
    float length_penalty; /* beams: score / length ^ length_penalty */
    bool early_stopping, ignore_eos;
    bool never_early;     /* beams: run on while the longest answer could still beat the worst finished one */
    struct sampling_params sampling; /* pointers into this request's memory; seed of choice i is
                                        seed + i */
    int32_t priority;     /* lower runs first, 0 is usual */
    uint64_t tenant;      /* fair share is kept between tenants */
    uint32_t tenant_weight; /* 0 = 1 */
    uint64_t cache_salt;  /* prefixes are shared only among equal salts */
    bool no_prefix_cache;
    int64_t deadline_us;  /* engine time by which its first token must come, 0 = none */
    int64_t arrival_us;   /* engine time; set by engine_loop_submit */
    void (*destroy)(struct request *r); /* frees it; called by the engine when it forgets it */
};

/* What a group of workers is, from their Join messages. */
struct group_info {
    uint64_t epoch;
    uint32_t n_ranks, block_size, n_blocks, n_host_blocks, n_slots_max, step_tokens_max, step_rows_max;
    uint32_t step_prompt_max; /* prompt tokens of a step beside others that decode, 0 = the rest of it */
    uint32_t context_max, vocab_size, window, draft_tokens_max;
    uint64_t block_bytes;
    uint32_t n_disk_blocks;              /* behind the host blocks; 0 without those */
    uint32_t save_ns, load_ns, fetch_ns; /* of a block: device to host, back, disk to host; of the slowest rank */
    bool has_draft_model;
};

enum { ENGINE_GROUPS_MAX = 4096 };
struct engine_config {
    uint32_t n_groups;             /* data-parallel groups expected */
    uint32_t n_sequences_max;      /* running at once in one group: --max-num-seqs */
    uint32_t step_tokens_max;      /* token budget of a step: --max-num-batched-tokens */
    uint32_t context_max;          /* --max-model-len, 0 = the model's */
    uint32_t n_queued_max;         /* --max-num-queued-reqs */
    uint64_t n_queued_tokens_max;  /* --max-num-queued-tokens, 0 = none */
    uint32_t pipeline_depth;       /* plans in flight of a group: 2 */
    bool prefix_cache;
    uint64_t hash_salt;            /* random at start, so that no client can make keys collide */
    uint32_t n_speculative_tokens; /* most drafts of a run, 0 = off */
    bool draft_always;             /* as many as there can be, whether they pay or not */
    int64_t step_timeout_us;       /* --watchdog-timeout */
    int64_t starve_us;             /* who waited so long goes before others in turn, 0 = a minute */
    bool always_offload;           /* move blocks whatever it costs; else where that is cheaper than computing */
    const char *record_path;       /* engine_loop writes every input there, for `heddle replay`; NULL = off */
};

struct engine_hooks { /* outputs; called on the engine's thread */
    enum err (*send_plan)(void *ctx, uint32_t group, const void *bytes, size_t n);
    void (*group_failed)(void *ctx, uint32_t group, uint64_t epoch, const char *why); /* watchdog */
    void *ctx;
};

struct engine;
enum err engine_create(const struct engine_config *config, const struct engine_hooks *hooks, struct engine **out);
void engine_destroy(struct engine *e);

/* Inputs. A request refused here is destroyed by the caller: ERR_FULL (see limits.h for when),
 * ERR_TOO_LONG (can never fit, with the numbers), ERR_DEADLINE. */
enum err engine_submit(struct engine *e, struct request *r, int64_t now_us);
enum { ENGINE_CANCEL_CLIENT, ENGINE_CANCEL_STOP };
/* choice -1 = all. With ENGINE_CANCEL_STOP the choice ends with FINISH_STOP. Unknown ids are ignored. */
void engine_cancel(struct engine *e, uint64_t request_id, int32_t choice, int how);
void engine_group_up(struct engine *e, uint32_t group, const struct group_info *info);
void engine_group_down(struct engine *e, uint32_t group, uint64_t epoch); /* its sequences are replayed */
/* ERR_FORMAT: the group broke the protocol; the caller drops it. */
enum err engine_result(struct engine *e, uint32_t group, const struct step_result *result, int64_t now_us);

/* A rank's transfers between host and disk ended. ERR_FORMAT as above. */
enum err engine_moved(struct engine *e, uint32_t group, uint32_t rank, const struct moved *moved, int64_t now_us);

/* Plans and sends every step that can go now. Returns true when it sent one. */
bool engine_step(struct engine *e, int64_t now_us);
/* Engine time at which it must be stepped again even without an input (watchdog, deadlines). */
int64_t engine_wake_us(const struct engine *e);

struct engine_stats {
    uint32_t n_running, n_waiting, n_swapped, n_groups_up, n_groups;
    uint64_t blocks_total, blocks_free, blocks_cached, blocks_held;
    uint64_t n_prompt_tokens, n_generated_tokens, n_cached_tokens, n_recomputed_tokens;
    uint64_t prefix_queries, prefix_hits; /* tokens */
    uint64_t n_preemptions, n_swaps_out, n_swaps_in, n_forks, n_steps, n_finished[FINISH_ERROR + 1];
    uint64_t n_rejected_full, n_rejected_deadline, n_resumed, n_group_losses;
    uint64_t drafts_proposed, drafts_accepted; /* all; and those of draft models among them */
    uint64_t model_drafts_proposed, model_drafts_accepted;
    uint64_t n_hit_tokens_host, n_hit_tokens_disk; /* prefix hits that were not on the device */
    uint64_t n_saves, n_loads, n_fetches, n_spills, n_fetches_failed, n_spills_failed; /* blocks */
    uint64_t save_bytes, load_bytes, fetch_bytes, spill_bytes;                         /* on all ranks */
    uint64_t host_total, host_used, host_private, disk_total, disk_used; /* blocks now */
    uint32_t n_fetching;                                 /* sequences that wait for the disk */
    uint64_t step_tokens, step_budget;    /* sums over steps with a backlog */
    uint32_t context_max, vocab_size, block_size;
};
void engine_stats(const struct engine *e, struct engine_stats *out);
/* Asserts free + cached + held = all blocks, and that every table agrees with every count. */
void engine_check(const struct engine *e);
