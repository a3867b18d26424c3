/* The engine's inputs as a file, and back.
 *
 * The engine is a state machine without a clock: the same inputs give the same plans, bit for bit.
 * So a record holds the inputs in order and, of each plan, only the digest of its bytes; replaying
 * it computes the plans again and compares. Prompts are in the file: treat it like the requests.
 *
 * Layout: 8 bytes of magic, then entries of kind (1 byte), length (varint), payload. */
#pragma once
#include "base/buf.h"
#include "coordinator/engine/engine.h"

enum record_kind {
    RECORD_CONFIG = 1,
    RECORD_SUBMIT,
    RECORD_CANCEL,
    RECORD_GROUP_UP,
    RECORD_GROUP_DOWN,
    RECORD_RESULT,
    RECORD_STEP,
    RECORD_PLAN,
    RECORD_MOVED
};

struct record;
enum err record_open(const char *path, const struct engine_config *config, struct record **out);
void record_close(struct record *r); /* accepts NULL, as all below */
void record_submit(struct record *r, const struct request *request, int64_t now_us);
void record_cancel(struct record *r, uint64_t id, int32_t choice, int how, int64_t now_us);
void record_group_up(struct record *r, uint32_t group, const struct group_info *info,
                     int64_t now_us);
void record_group_down(struct record *r, uint32_t group, uint64_t epoch, int64_t now_us);
void record_result(struct record *r, uint32_t group, const void *bytes, size_t n, int64_t now_us);
void record_moved(struct record *r, uint32_t group, uint32_t rank, const void *bytes, size_t n,
                  int64_t now_us);
void record_step(struct record *r, int64_t now_us);
void record_plan(struct record *r, uint32_t group, const void *bytes, size_t n);

/* What a replay found. */
struct replay {
    uint64_t n_inputs, n_plans, n_tokens, n_requests, n_ended;
    uint64_t tokens_digest; /* of every emission in order */
};
/* ERR_FORMAT for a broken file, ERR_INTERNAL naming the first plan that differs. */
enum err replay_bytes(const void *bytes, size_t n, struct replay *out);
