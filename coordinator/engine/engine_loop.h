/* The engine's thread: a bounded inbox, the real clock, and the end of every call.
 *
 * Front threads and the cluster speak to the engine only through these functions; each copies its
 * words into the inbox and wakes the thread. */
#pragma once
#include "coordinator/engine/engine.h"

struct engine_loop;
enum err engine_loop_create(const struct engine_config *config, const struct engine_hooks *hooks, struct engine_loop **out);
/* Stops the thread; every request still alive ends with FINISH_ERROR (ERR_NOT_READY). */
void engine_loop_destroy(struct engine_loop *l);

/* Takes the request over on OK. Otherwise (ERR_FULL, ERR_TOO_LONG, ERR_NOT_READY) the caller still
 * owns it. The answer is synchronous: accepted means that it will end exactly once. */
enum err engine_loop_submit(struct engine_loop *l, struct request *r);
void engine_loop_cancel(struct engine_loop *l, uint64_t request_id, int32_t choice, int how);
void engine_loop_group_up(struct engine_loop *l, uint32_t group, const struct group_info *info);
void engine_loop_group_down(struct engine_loop *l, uint32_t group, uint64_t epoch);
/* Copies the bytes of a FromWorker with a StepResult. */
void engine_loop_result(struct engine_loop *l, uint32_t group, uint64_t epoch, const void *bytes, size_t n);
/* Copies the bytes of a FromWorker with a Moved. */
void engine_loop_moved(struct engine_loop *l, uint32_t group, uint64_t epoch, uint32_t rank, const void *bytes, size_t n);
/* A snapshot not older than a step. */
void engine_loop_stats(struct engine_loop *l, struct engine_stats *out);
/* In how many seconds a request refused with ERR_FULL may find room, by the queue's speed; >= 1. */
uint32_t engine_loop_retry_after_s(struct engine_loop *l);
int64_t engine_loop_now_us(const struct engine_loop *l);
/* No new requests (ERR_NOT_READY); returns true when none is left, false after timeout_us. */
bool engine_loop_drain(struct engine_loop *l, int64_t timeout_us);
