/* Rectangles of codes, stacked: which slot takes which input, then codes, scales and zero points of
 * every slot, by a few threads.
 *
 * Inputs keep their order where blocks of 128, 64 or 32 of them lie each in one group; else they
 * are sorted by group, and each group is filled up to whole blocks with slots of no input. That
 * holds for a rank's slice as for the whole, wherever it is cut. */
#include "base/mem.h"
#include "kernels/half.h"
#include "worker/int4.h"

#include <pthread.h>
#include <string.h>

/* Where inputs go: which input each slot has, and which group each block of slots. */
struct layout {
    int group; /* slots of a block */
    int64_t n_slots, in_first;
    const int32_t *order;    /* [n_slots] relative to in_first, or NULL */
    const int32_t *group_of; /* [n_slots / group] */
    int64_t n_in;
};

/* An input of a slot, absolute, or -1. */
static int64_t slot_input(const struct layout *l, int64_t slot)
{
    int64_t in = l->order ? l->order[slot] : slot < l->n_in ? slot : -1;
    return in < 0 ? -1 : l->in_first + in;
}

/* Whether blocks of `block` inputs, counted from in_first, each lie in one group. */
static bool blocks_fit(const struct int4_tensors *t, int64_t in_first, int64_t n_in, int block)
{
    for (int64_t i = 0; i < n_in; i++)
        if (int4_group(t, in_first + i) != int4_group(t, in_first + i / block * block))
            return false;
    return true;
}

/* Slots that inputs sorted by group take, each group in whole blocks. */
static int64_t sorted_slots(const int32_t *counts, int64_t n_groups, int block)
{
    int64_t n = 0;
    for (int64_t g = 0; g < n_groups; g++)
        n += (counts[g] + block - 1) / block * block;
    return n;
}

/* The block whose codes, scales and zero points take the fewest bytes. */
static int sorted_block(const int32_t *counts, int64_t n_groups)
{
    int best = 32;
    for (int block = 64; block <= 128; block *= 2) {
        int64_t have = sorted_slots(counts, n_groups, best),
                want = sorted_slots(counts, n_groups, block);
        if (want * (block + 6) * best <= have * (best + 6) * block) best = block;
    }
    return best;
}

/* Inputs group after group, in their order within one. */
static enum err layout_sort(const struct int4_tensors *t, struct layout *l, int32_t **out_order,
                            int32_t **out_groups)
{
    int32_t *counts = NULL, *next = NULL;
    enum err e = OK;
    TRY_OUT(MEM_NEW_ARRAY(t->n_groups, &counts));
    TRY_OUT(MEM_NEW_ARRAY(t->n_groups, &next));
    for (int64_t i = 0; i < l->n_in; i++)
        counts[int4_group(t, l->in_first + i)]++;
    l->group = sorted_block(counts, t->n_groups);
    l->n_slots = sorted_slots(counts, t->n_groups, l->group);
    TRY_OUT(MEM_NEW_ARRAY(l->n_slots, out_order));
    TRY_OUT(MEM_NEW_ARRAY(l->n_slots / l->group, out_groups));
    int64_t slot = 0;
    for (int64_t g = 0; g < t->n_groups; g++) {
        next[g] = (int32_t)slot;
        for (int32_t i = 0; i < counts[g]; i += l->group, slot += l->group)
            (*out_groups)[slot / l->group] = (int32_t)g;
    }
    memset(*out_order, 0xff, (size_t)l->n_slots * sizeof **out_order); /* -1 */
    for (int64_t i = 0; i < l->n_in; i++)
        (*out_order)[next[int4_group(t, l->in_first + i)]++] = (int32_t)i;
    l->order = *out_order;
out:
    mem_free(counts);
    mem_free(next);
    return e;
}

static enum err layout_make(const struct int4_tensors *t, struct layout *l, int32_t **out_order,
                            int32_t **out_groups)
{
    int block = 128;
    while (block >= 32 && !blocks_fit(t, l->in_first, l->n_in, block))
        block /= 2;
    if (block < 32) {
        TRY(layout_sort(t, l, out_order, out_groups));
    } else {
        l->group = block;
        l->n_slots = (l->n_in + block - 1) / block * block;
        TRY(MEM_NEW_ARRAY(l->n_slots / block, out_groups));
        for (int64_t b = 0; b * block < l->n_in; b++)
            (*out_groups)[b] = int4_group(t, l->in_first + b * block);
    }
    l->group_of = *out_groups;
    return OK;
}

static bool same_groups(const struct int4_part *parts, int n_parts, int64_t in_first, int64_t n_in)
{
    for (int p = 1; p < n_parts; p++)
        for (int64_t i = in_first; i < in_first + n_in; i++)
            if (int4_group(&parts[p].of, i) != int4_group(&parts[0].of, i)) return false;
    return true;
}

enum { TILE_OUT = 128, TILE_SLOTS = 32, THREADS_MAX = 16 };

/* Codes of TILE_SLOTS slots from `slot` on, for n outputs of a part, to rows from `row` on. */
static void tile_fill(const struct int4_part *p, const struct layout *l, int64_t slot,
                      int64_t first, int64_t n, int64_t row, struct int4_stack *s)
{
    uint8_t codes[TILE_SLOTS][TILE_OUT];
    for (int i = 0; i < TILE_SLOTS; i++) {
        int64_t in = slot_input(l, slot + i);
        if (in < 0)
            memset(codes[i], 8, sizeof codes[i]);
        else
            int4_codes(&p->of, in, p->first + first, n, codes[i]);
    }
    for (int64_t o = 0; o < n; o++) {
        uint8_t *to = s->codes + ((row + o) * l->n_slots + slot) / 2;
        for (int i = 0; i < TILE_SLOTS; i += 2)
            to[i / 2] = (uint8_t)(codes[i][o] | codes[i + 1][o] << 4);
    }
}

/* The same where the file has the inputs of the tile side by side; false where it has not. */
static bool tile_copy(const struct int4_part *p, const struct layout *l, int64_t slot,
                      int64_t first, int64_t n, int64_t row, struct int4_stack *s)
{
    if (l->order || slot + TILE_SLOTS > l->n_in) return false;
    for (int64_t o = 0; o < n; o++)
        if (!int4_words(&p->of, l->in_first + slot, p->first + first + o, TILE_SLOTS,
                        s->codes + ((row + o) * l->n_slots + slot) / 2))
            return false;
    return true;
}

/* Rows [first, first + n) of a part. */
static void rows_fill(const struct int4_part *p, const struct layout *l, int64_t first, int64_t n,
                      int64_t row, struct int4_stack *s)
{
    int64_t n_blocks = l->n_slots / l->group;
    for (int64_t slot = 0; slot < l->n_slots; slot += TILE_SLOTS)
        if (!tile_copy(p, l, slot, first, n, row, s)) tile_fill(p, l, slot, first, n, row, s);
    for (int64_t o = 0; o < n; o++)
        for (int64_t b = 0; b < n_blocks; b++) {
            int64_t at = (row + o) * n_blocks + b, from = p->first + first + o;
            s->scales[at] = f16_from_float(int4_scale(&p->of, from, l->group_of[b]));
            s->zeros[at] = int4_zero(&p->of, from, l->group_of[b]);
        }
}

/* --- threads --- */

struct share {
    const struct int4_part *parts;
    const struct layout *layout;
    struct int4_stack *stack;
    int64_t begin, end; /* rows of the stack */
    pthread_t thread;
    bool started;
};

static void *share_fill(void *arg)
{
    const struct share *a = arg;
    const struct int4_part *p = a->parts;
    int64_t part_first = 0;
    for (int64_t row = a->begin; row < a->end;) {
        while (row - part_first >= p->n)
            part_first += p++->n;
        int64_t n = part_first + p->n - row;
        n = n < a->end - row ? n : a->end - row;
        n = n < TILE_OUT ? n : TILE_OUT;
        rows_fill(p, a->layout, row - part_first, n, row, a->stack);
        row += n;
    }
    return NULL;
}

static void stack_fill(const struct int4_part *parts, const struct layout *l, int64_t n_out,
                       int n_threads, struct int4_stack *s)
{
    struct share shares[THREADS_MAX];
    int64_t most = n_out / TILE_OUT;
    int n = n_threads < most ? n_threads : (int)most;
    n = n > THREADS_MAX ? THREADS_MAX : n < 1 ? 1 : n;
    for (int i = 0; i < n; i++) {
        shares[i] = (struct share){.parts = parts,
                                   .layout = l,
                                   .stack = s,
                                   .begin = n_out * i / n,
                                   .end = n_out * (i + 1) / n};
        shares[i].started = i && !pthread_create(&shares[i].thread, NULL, share_fill, &shares[i]);
    }
    for (int i = 0; i < n; i++) {
        if (shares[i].started)
            pthread_join(shares[i].thread, NULL);
        else
            share_fill(&shares[i]);
    }
}

/* Whether the files say so and it is so: symmetric weights need no zero points. */
static bool all_eight(const struct int4_part *parts, int n_parts, const uint8_t *zeros, int64_t n)
{
    for (int p = 0; p < n_parts; p++)
        if (!parts[p].of.symmetric) return false;
    for (int64_t i = 0; i < n; i++)
        if (zeros[i] != 8) return false;
    return true;
}

static enum err stack_alloc(int64_t n_out, const struct layout *l, struct int4_stack *s)
{
    size_t codes, groups;
    if (!size_mul((size_t)n_out, (size_t)l->n_slots, &codes) ||
        !size_mul((size_t)n_out, (size_t)(l->n_slots / l->group), &groups))
        FAIL(ERR_NO_MEMORY, "4-bit weights of %lld x %lld", (long long)n_out,
             (long long)l->n_slots);
    TRY(MEM_NEW_ARRAY(codes / 2, &s->codes));
    TRY(MEM_NEW_ARRAY(groups, &s->zeros));
    return MEM_NEW_ARRAY(groups, &s->scales);
}

enum err int4_stack(const struct int4_part *parts, int n_parts, int64_t in_first, int64_t n_in,
                    int n_threads, bool *out_same, struct int4_stack *out)
{
    struct int4_stack s = {.codes = NULL};
    struct layout l = {.in_first = in_first, .n_in = n_in};
    int32_t *groups = NULL;
    int64_t n_out = 0;
    enum err e = OK;
    *out_same = same_groups(parts, n_parts, in_first, n_in);
    if (!*out_same) return OK;
    for (int p = 0; p < n_parts; p++)
        n_out += parts[p].n;
    TRY_OUT(layout_make(&parts[0].of, &l, &s.order, &groups));
    TRY_OUT(stack_alloc(n_out, &l, &s));
    stack_fill(parts, &l, n_out, n_threads, &s);
    s.matrix = (struct int4_matrix){.n_out = n_out,
                                    .n_in = n_in,
                                    .n_slots = l.n_slots,
                                    .group = l.group,
                                    .order = s.order,
                                    .codes = s.codes,
                                    .scales = s.scales,
                                    .zeros = s.zeros};
    if (all_eight(parts, n_parts, s.zeros, n_out * (l.n_slots / l.group))) s.matrix.zeros = NULL;
    *out = s;
    s = (struct int4_stack){.codes = NULL};
out:
    mem_free(groups);
    int4_stack_fini(&s);
    return e;
}

void int4_stack_fini(struct int4_stack *s)
{
    mem_free(s->codes);
    mem_free(s->zeros);
    mem_free(s->scales);
    mem_free(s->order);
}
