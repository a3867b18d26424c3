/* Packed weights that are served from their file at once and move to memory of their own meanwhile.
 *
 * A start is over when the file is mapped; one thread of low priority then compares every weight
 * with the digest that was written with it, and copies one after another. The backend lets steps
 * read a weight while it moves, so nothing waits for anything. A damaged weight ends the rank with
 * the tensor's name, as it would have at the start. Knows files and weights; never steps. */
#pragma once
#include "kernels/backend.h"
#include "worker/packed.h"

struct settle;
enum err settle_create(struct backend *b, const struct safetensors *file, struct settle **out);
/* Before settle_start: a weight that was adopted, and what the file says of it. */
enum err settle_add(struct settle *s, struct weight *w, const struct packed_parts *parts,
                    struct hash128 want);
/* From here on no weight of the backend is made or destroyed before settle_stop. */
enum err settle_start(struct settle *s);
/* OK while nothing is known to be wrong; else what is, again at every call. NULL is OK. */
enum err settle_check(struct settle *s);
/* Waits for the end; then as settle_check. NULL is OK. */
enum err settle_wait(struct settle *s);
void settle_stop(struct settle *s);    /* after the weight in hand; accepts NULL */
void settle_destroy(struct settle *s); /* stops it; accepts NULL */
