/* Ways to spread requests over groups that have an engine each, beside the one engine that owns
 * all groups: what other systems put in front of their replicas. Only for comparisons in simulated
 * time.
 *
 * Knows a request's tokens, what it sent where, and how many requests each group works on; never
 * what a cache has forgotten. That is the point. */
#pragma once
#include "base/err.h"
#include <stdint.h>

enum router_kind {
    ROUTER_EXACT, /* none: one engine places, knowing every block */
    ROUTER_GUESS, /* the group that was sent the longest part of this prompt, unless it is far
                     busier */
    ROUTER_HASH,  /* by a hash of the prompt's beginning */
    ROUTER_TURNS, /* one after the other */
    ROUTER_COUNT
};
extern const char *const router_names[ROUTER_COUNT];

enum { ROUTER_GROUPS_MAX = 64 };
struct router_entry;
struct router {
    enum router_kind kind;
    uint32_t n_groups, n_turns;
    uint32_t n_alive[ROUTER_GROUPS_MAX]; /* requests sent and not ended */
    struct router_entry *entries;        /* of what was sent: open addressing */
    uint32_t n, mask;
};
enum err router_init(struct router *r, enum router_kind kind, uint32_t n_groups);
void router_fini(struct router *r);
/* The group for a prompt; it counts as sent there. The caller counts its end in n_alive. */
enum err router_send(struct router *r, const int32_t *tokens, uint32_t n, uint32_t *out_group);
