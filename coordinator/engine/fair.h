/* Who waits, and whose turn it is.
 *
 * Lower priorities come first. Within one, tenants share by weighted tokens: each has a counter of
 * what it was served (an input token costs 1, an output token 2, divided by its weight) and the
 * smallest counter goes next (Sheng et al., "Fairness in serving large language models", OSDI 2024,
 * algorithm 2). A tenant that comes back is lifted to the smallest active counter, so that it
 * cannot save up. Within a tenant the oldest goes first. Of those who waited for FAIR_STARVE_US one
 * goes before all others after every FAIR_TURNS of them: no class is starved, and when everybody
 * waits long the classes still mean something.
 *
 * Never knows groups, blocks or plans. */
#pragma once
#include "coordinator/engine/sequence.h"

enum { FAIR_TURNS = 3, FAIR_INPUT_COST = 1, FAIR_OUTPUT_COST = 2, FAIR_TENANTS_IDLE_MAX = 1024 };
static const int64_t FAIR_STARVE_US = 60000000;
static const int64_t FAIR_SINCE_EVER_US = INT64_MIN;

struct tenant {
    uint64_t id, served;      /* served: cost * 1024 / weight */
    uint32_t weight, n_alive; /* n_alive: sequences waiting or running */
    uint32_t n_running;
    struct lane *lanes;
    struct tenant *chain; /* in its bucket */
};

struct lane { /* the waiting sequences of one tenant and priority */
    struct tenant *tenant;
    int32_t priority;
    struct sequence_list waiting;
    struct sequence *cursor; /* who is asked next in this search, NULL = the first */
    bool searched;           /* somebody was passed over in this search */
    uint64_t key;            /* tenant->served when last looked at; it only grows */
    uint32_t heap_index;     /* + 1, 0 = not in the heap */
    struct lane *next;       /* of the tenant */
};

struct fair {
    struct lane **heap; /* lanes with somebody waiting, the next one first */
    uint32_t n_heap, heap_capacity;
    struct tenant **buckets;
    uint32_t n_buckets, n_tenants;
    uint32_t n_active; /* tenants with somebody alive */
    uint64_t floor;    /* smallest counter served last */
    struct sequence_list by_age;
    int64_t starve_us;
    uint32_t n_turns;    /* taken in their order since a starved one was */
    struct lane **aside; /* lanes of which somebody was passed over during one search */
    uint32_t n_aside;
};

enum err fair_init(struct fair *f);
void fair_fini(struct fair *f);
/* The lane of a new sequence. Its tenant stays known until fair_leave(). */
enum err fair_enter(struct fair *f, uint64_t tenant, uint32_t weight, int32_t priority,
                    struct lane **out);
void fair_leave(struct fair *f, struct lane *lane);
/* Puts it at its place by age; needs s->lane. */
void fair_wait(struct fair *f, struct sequence *s, int64_t now_us);
/* Before all others, the older first: somebody holds blocks and waits for it. */
void fair_wait_urgent(struct fair *f, struct sequence *s, int64_t now_us);
void fair_unwait(struct fair *f, struct sequence *s);
/* The same, because its turn has come. Returns whether it came by its age alone. */
bool fair_take(struct fair *f, struct sequence *s, int64_t now_us);
/* Whose turn it is, or NULL. Looks further with fair_skip (this one is passed over) or
 * fair_skip_lane (all its tenant has in this class) until fair_restore. */
struct sequence *fair_next(struct fair *f, int64_t now_us);
void fair_skip(struct fair *f, struct sequence *s);
void fair_skip_lane(struct fair *f, struct sequence *s);
void fair_restore(struct fair *f);
static inline void fair_charge(struct lane *lane, uint64_t cost)
{
    lane->tenant->served += cost * 1024 / lane->tenant->weight;
}
