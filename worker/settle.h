/* What was put where it is soonest, and moves to where it is read fastest meanwhile: packed
 * weights, served from their file at once, and the pages of KV caches.
 *
 * A start is over when the file is mapped; one thread of low priority then compares every weight
 * with the digest that was written with it. When the first step has ended, or nobody asks for one,
 * it copies one weight after another: memory that the system has to find for them does not hold up
 * the first token. The backend lets steps use what moves, so nothing waits for anything. A damaged
 * weight ends the rank with the tensor's name, as it would have at the start. After that the thread
 * stays ahead of the blocks that steps use. Knows files, weights and caches; never steps. */
#pragma once
#include "kernels/backend.h"
#include "worker/packed.h"

struct settle;
/* file: of the packed weights that will be added, or NULL. */
enum err settle_create(struct backend *b, const struct safetensors *file, struct settle **out);
/* Before settle_start: a weight that was adopted, and what the file says of it. */
enum err settle_add(struct settle *s, struct weight *w, const struct packed_parts *parts,
                    struct hash128 want);
/* Before settle_start: a cache that lives until settle_stop. At most SETTLE_CACHES_MAX. */
enum { SETTLE_CACHES_MAX = 2 };
void settle_add_cache(struct settle *s, struct kv_cache *kv);
/* From here on no weight of the backend is made or destroyed before settle_stop. */
enum err settle_start(struct settle *s);
/* Moving may begin: a step has ended, and n_blocks of the caches have been used. Never waits. NULL is
 * fine. */
void settle_step(struct settle *s, uint32_t n_blocks);
/* OK while nothing is known to be wrong; else what is, again at every call. NULL is OK. */
enum err settle_check(struct settle *s);
/* Waits until nothing is left to do at present; then as settle_check. NULL is OK. */
enum err settle_wait(struct settle *s);
void settle_stop(struct settle *s);    /* after the weight in hand; accepts NULL */
void settle_destroy(struct settle *s); /* stops it; accepts NULL */
