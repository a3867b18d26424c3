/* What the files of the engine share: the engine itself and the verbs between its parts.
 *
 *   engine.c    inputs: submit, cancel, groups, time     job.c        requests, choices, emissions
 *   scheduler.c who runs in the next plan                admission.c  slots, blocks, prefixes,
 * victims learn.c     results                                  draft.c      n-gram drafts beam.c
 * beam search                              place.c      which group
 *
 * Never included outside coordinator/engine. */
#pragma once
#include "base/buf.h"
#include "coordinator/engine/engine.h"
#include "coordinator/engine/fair.h"
#include "coordinator/engine/group.h"
#include "coordinator/engine/limits.h"

struct job_map { /* by request id, open addressing */
    struct job **slots;
    uint32_t n, mask;
};

struct engine {
    struct engine_config config;
    struct engine_hooks hooks;
    struct group *groups[ENGINE_GROUPS_MAX]; /* NULL: never seen */
    uint32_t n_groups;                       /* indexes in use */
    uint32_t n_up;
    struct pool pool;
    struct slabs sequences, job_slabs;
    struct fair fair;
    struct job_map jobs;
    struct job **deadlines; /* jobs without a first token that have one */
    uint32_t n_deadlines, deadlines_capacity;
    int64_t next_deadline_us;
    struct engine_limits limits;
    uint32_t n_left_queue; /* since last_left_us was looked at */
    int64_t last_left_us;  /* when sequences left the queue last, 0 = it was empty then */
    uint32_t n_swapped;    /* waiting with their KV in host blocks */
    uint64_t order;
    int64_t now_us;
    struct sink **sinks; /* to flush after this input */
    uint32_t n_sinks, sinks_capacity;
    struct job *done; /* to destroy after the flush */
    struct buf bytes; /* of the plan */
    struct engine_stats stats;
    struct step_token *emit_tokens; /* room for the tokens of a buffered choice */
    uint32_t emit_capacity;
};

/* job.c */
struct job *job_find(const struct engine *e, uint64_t id);
enum err job_create(struct engine *e, struct request *r, struct job **out);
void job_destroy(struct engine *e, struct job *job);
/* Its choices beside the first enter their lanes. */
void job_unpark(struct engine *e, struct job *job);
/* News of a choice. With a finish the sequence is forgotten: it must have no slot and no lane. */
void job_emit(struct engine *e, struct sequence *s, const struct step_token *tokens, uint32_t n);
struct ending {
    enum finish finish;
    int32_t stop_token;
    enum err error;
    const char *text;
};
void job_end(struct engine *e, struct sequence *s, const struct step_token *tokens, uint32_t n,
             const struct ending *end);
/* Ends one choice, or all (-1), wherever they are. */
void job_abort(struct engine *e, struct job *job, int32_t choice, const struct ending *end);
/* Beams: gives the choices, ends every sequence that is left. */
void job_end_beams(struct engine *e, struct job *job, const struct ending *end);
void job_emit_choice(struct engine *e, struct sequence *s, int32_t choice,
                     const struct step_token *tokens, uint32_t n, const struct ending *end,
                     bool last);
void job_done(struct engine *e, struct job *job);
/* Room for n tokens in e->emit_tokens. */
enum err job_room(struct engine *e, uint32_t n);
void job_flush(struct engine *e);
void job_first_token(struct engine *e, struct job *job);
/* Takes the sequence out of wherever it is. */
void sequence_withdraw(struct engine *e, struct sequence *s);

/* admission.c */
bool admission_try(struct engine *e, struct group *g, struct sequence *s);
void admission_uncount(struct engine *e, struct sequence *s);
/* Out of its slot and back into its lane, once the plans in flight are answered. */
void admission_preempt(struct engine *e, struct group *g, struct sequence *s);
void admission_requeue(struct engine *e, struct group *g, struct sequence *s);
/* Every sequence waits for a block, and no step is under way that could give one back. */
bool admission_is_stuck(const struct group *g);
void admission_make_room(struct engine *e, struct group *g);
/* Blocks for its first n tokens in its table. False when there are not enough: none was taken. */
bool admission_extend(struct engine *e, struct group *g, struct sequence *s, uint32_t n_tokens);
/* The next block of one in the decode set. */
bool admission_extend_decoding(struct engine *e, struct group *g, struct sequence *s);
/* Asks for the memory that registering its last full block will need. */
void admission_prefetch_register(struct engine *e, struct group *g, struct sequence *s);
void admission_register(struct engine *e, struct group *g, struct sequence *s, uint32_t n_computed);
void admission_slide(struct group *g, struct sequence *s, uint32_t n_computed);

bool admission_hogs(const struct engine *e, const struct group *g, const struct sequence *s);
void admission_drop_host(struct engine *e, struct sequence *s);
/* As group_unseat, with the counts of those who run. */
void admission_unseat(struct engine *e, struct group *g, struct sequence *s);
/* The same, but its slot is closed one plan later. */
void admission_unseat_late(struct engine *e, struct group *g, struct sequence *s);

/* tiers.c */
struct tiers_found {   /* of a prefix, by its leading keys */
    uint32_t n_here;   /* on the device or on the host */
    uint32_t n_loads;  /* of those, on the host alone */
    uint32_t n_cached; /* of those, on the device and nobody's */
    uint32_t n_below;  /* further ones that would be here once the disk's have come */
    uint32_t n_coming; /* of those, on their way already */
};
/* Goes on where kv_blocks_match ended (io->n_here, n_cached). Device blocks go to blocks [n] unless
 * that is NULL, KV_NONE for one on the host. */
void tiers_look(const struct engine *e, const struct group *g, const struct hash128 *keys,
                uint32_t n, uint32_t *blocks, struct tiers_found *io);
/* A device block, as kv_blocks_take; what is forgotten for it goes to the host. */
uint32_t tiers_take_block(struct engine *e, struct group *g);
void tiers_hold(struct group *g, const struct hash128 *keys, const uint32_t *blocks, uint32_t n);
/* Device blocks for those of the table that are KV_NONE, loaded in the plan being built. */
void tiers_load(struct engine *e, struct group *g, const struct hash128 *keys, uint32_t *blocks,
                uint32_t n);
/* Starts what is missing and lets the sequence wait outside its lane; false when it need not. */
bool tiers_fetch(struct engine *e, struct group *g, struct sequence *s,
                 const struct tiers_found *f);
/* Back to their lanes: those who have what they waited for or waited too long, or all. */
void tiers_release(struct engine *e, struct group *g, bool all);
void tiers_spill(struct group *g);
bool tiers_swap_pays(const struct engine *e, const struct group *g, uint32_t n_blocks,
                     uint32_t n_tokens);

/* scheduler.c */
bool scheduler_plan(struct engine *e, struct group *g);

/* place.c */
/* Whether it could ever run there. */
bool place_can_hold(const struct engine *e, const struct group *g, const struct sequence *s);
bool place_accepts(struct engine *e, struct group *g, struct sequence *s);
/* Whether it was given to no other group. */
bool place_is_for(const struct group *g, const struct sequence *s);
/* It waits no more, or its group is gone. */
void place_forget(struct engine *e, struct sequence *s);

/* beam.c */
enum err beam_create(struct engine *e, struct job *job);
void beam_destroy(struct engine *e, struct beam *beam);
void beam_sampling(const struct beam *beam, struct sampling_params *p);
void beam_preempt(struct engine *e, struct group *g, struct job *job);
void beam_fork(struct engine *e, struct group *g);
void beam_group_down(struct engine *e, struct group *g);
void beam_unseated(struct sequence *s);
void beam_wait(struct engine *e, struct sequence *s);
void beam_admitted(struct engine *e, struct sequence *s);
void beam_unlock(struct engine *e, struct group *g);
void beam_learn(struct engine *e, struct group *g, struct sequence *s, const struct step_token *t,
                uint32_t n);

/* draft.c */
struct draft_choice {         /* of one run */
    uint32_t n_listed, n_own; /* one of them is 0 */
    uint32_t n_ahead;         /* own ones to prepare for the run after */
};
/* Whether one in the decode set should leave it for drafts. */
bool draft_wanted(const struct engine *e, struct group *g, struct sequence *s);
/* Own drafts to prepare after the last tokens of a prompt. */
uint32_t draft_after_prompt(const struct engine *e, const struct group *g, struct sequence *s);
/* What one whose results are all in verifies next, at most n_most; list: room for n_most. */
void draft_choose(const struct engine *e, struct group *g, struct sequence *s, uint32_t n_most,
                  int32_t *list, struct draft_choice *out);
/* A run found n of the own drafts that it asked for. */
void draft_came(struct sequence *s, uint32_t n);
void draft_learn(struct engine *e, struct group *g, struct sequence *s, uint32_t n_tried,
                 uint32_t n_kept);

/* draft_cost.c: microseconds */
/* Whether steps of that size were measured, or nothing can be. */
bool draft_cost_is_known(const struct group *g, uint32_t n_tokens);
float draft_cost_step(const struct group *g, uint32_t n_tokens);
float draft_cost_pass(const struct group *g, uint32_t n_sequences);
float draft_cost_known(const struct group *g, uint32_t n_tokens); /* to catch up with so many */
float draft_cost_wait(const struct group *g, enum draft_kind kind);
void draft_cost_learn(struct group *g, const struct flight *f, const struct step_result *r);
