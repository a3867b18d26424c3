/* A set of pieces: an array by id and a hash table by text. Knows nothing of their meaning. */
#include "coordinator/text/vocab.h"
#include "base/hash.h"
#include "base/mem.h"

#include <string.h>

void vocab_init(struct vocab *v)
{
    *v = (struct vocab){0};
    arena_init(&v->arena, 1 << 16, 0);
}

void vocab_fini(struct vocab *v)
{
    arena_fini(&v->arena);
    mem_free(v->pieces);
    mem_free(v->slots);
    *v = (struct vocab){0};
}

static uint32_t hash_of(const char *text, size_t n)
{
    return (uint32_t)hash_bytes(text, n, 0).low;
}

/* Where the piece is, or would go. A slot keeps its piece's hash: pieces lie all over memory and
 * are looked at only where that agrees. */
static size_t slot_of(const struct vocab *v, uint32_t hash, const char *text, size_t n)
{
    size_t mask = v->n_slots - 1;
    for (size_t i = hash & mask;; i = (i + 1) & mask) {
        struct vocab_slot slot = v->slots[i];
        if (slot.id < 0) return i;
        if (slot.hash != hash) continue;
        struct span p = v->pieces[slot.id];
        if (p.n == n && !memcmp(p.data, text, n)) return i;
    }
}

int32_t vocab_find(const struct vocab *v, const char *text, size_t n)
{
    if (n > v->piece_bytes_max || !v->n_slots) return -1;
    return v->slots[slot_of(v, hash_of(text, n), text, n)].id;
}

/* Three rounds, each for what the one before has brought nearer: the slot, the piece, its text. */
void vocab_find_all(const struct vocab *v, struct vocab_question *questions, size_t n)
{
    size_t mask = v->n_slots - 1;
    for (size_t i = 0; i < n && v->n_slots; i++) {
        struct vocab_question *q = &questions[i];
        q->hash = hash_of(q->text, q->n);
        __builtin_prefetch(&v->slots[q->hash & mask]);
    }
    for (size_t i = 0; i < n && v->n_slots; i++) {
        int32_t likely = v->slots[questions[i].hash & mask].id;
        questions[i].id = likely;
        if (likely >= 0) __builtin_prefetch(&v->pieces[likely]);
    }
    for (size_t i = 0; i < n && v->n_slots; i++)
        if (questions[i].id >= 0) __builtin_prefetch(v->pieces[questions[i].id].data);
    for (size_t i = 0; i < n; i++) {
        struct vocab_question *q = &questions[i];
        q->id = -1;
        if (q->n <= v->piece_bytes_max && v->n_slots)
            q->id = v->slots[slot_of(v, q->hash, q->text, q->n)].id;
    }
}

struct span vocab_piece(const struct vocab *v, int32_t id)
{
    if (id < 0 || (size_t)id >= v->n_ids) return (struct span){0};
    return v->pieces[id];
}

static enum err set_slots(struct vocab *v, size_t n_slots)
{
    size_t n_old = v->n_slots;
    struct vocab_slot *slots, *old = v->slots;
    TRY(MEM_NEW_ARRAY(n_slots, &slots));
    memset(slots, 0xff, n_slots * sizeof *slots);
    v->slots = slots, v->n_slots = n_slots;
    for (size_t i = 0; i < n_old; i++) {
        size_t at = old[i].hash & (n_slots - 1);
        if (old[i].id < 0) continue;
        while (slots[at].id >= 0) /* pieces are different: the first free slot is theirs */
            at = (at + 1) & (n_slots - 1);
        slots[at] = old[i];
    }
    mem_free(old);
    return OK;
}

static enum err grow_slots(struct vocab *v)
{
    if (v->n_slots >= 2 * (v->n_pieces + 1)) return OK;
    return set_slots(v, v->n_slots ? v->n_slots * 2 : 1024);
}

static enum err set_capacity(struct vocab *v, size_t capacity)
{
    TRY(mem_resize((void **)&v->pieces, capacity * sizeof *v->pieces));
    memset(v->pieces + v->capacity, 0, (capacity - v->capacity) * sizeof *v->pieces);
    v->capacity = capacity;
    return OK;
}

static enum err grow_pieces(struct vocab *v, size_t id)
{
    if (id >= v->capacity) {
        size_t capacity = v->capacity ? v->capacity : 1024;
        while (capacity <= id)
            capacity *= 2;
        TRY(set_capacity(v, capacity));
    }
    if (id >= v->n_ids) v->n_ids = id + 1;
    return OK;
}

enum err vocab_reserve(struct vocab *v, size_t n_pieces)
{
    size_t n_slots = 1024;
    if (n_pieces > VOCAB_IDS_MAX) n_pieces = VOCAB_IDS_MAX;
    while (n_slots < 2 * (n_pieces + 1))
        n_slots *= 2;
    if (n_pieces > v->capacity) TRY(set_capacity(v, n_pieces));
    return n_slots > v->n_slots ? set_slots(v, n_slots) : OK;
}

enum err vocab_add(struct vocab *v, const char *text, size_t n, int64_t id)
{
    if (id < 0 || id >= VOCAB_IDS_MAX)
        FAIL(ERR_FORMAT, "id %lld of piece '%.*s' is not from 0 to %d", (long long)id,
             n < 40 ? (int)n : 40, text, VOCAB_IDS_MAX - 1);
    if (n > VOCAB_PIECE_BYTES_MAX)
        FAIL(ERR_FORMAT, "piece %lld is longer than %d bytes", (long long)id,
             VOCAB_PIECE_BYTES_MAX);
    if (vocab_piece(v, (int32_t)id).data)
        FAIL(ERR_FORMAT, "id %lld is given to '%s' and to '%.*s'", (long long)id,
             v->pieces[id].data, n < 40 ? (int)n : 40, text);
    TRY(grow_slots(v));
    TRY(grow_pieces(v, (size_t)id));
    char *copy;
    TRY(arena_copy_string(&v->arena, text, n, &copy));
    uint32_t hash = hash_of(text, n);
    size_t slot = slot_of(v, hash, text, n);
    if (v->slots[slot].id < 0) v->n_pieces++;
    v->pieces[id] = (struct span){copy, n};
    v->slots[slot] = (struct vocab_slot){(int32_t)id, hash};
    if (n > v->piece_bytes_max) v->piece_bytes_max = n;
    return OK;
}
