/* Whether two tokenizers were built alike, table by table: the yardstick of the test and of the
 * fuzz target that build one tokenizer in two ways. */
#pragma once
#include "coordinator/text/bpe.h"
#include "coordinator/text/tokenizer_parts.h"

#include <string.h>

static inline bool same_span(struct span a, struct span b)
{
    return a.n == b.n && !a.data == !b.data && (!a.n || !memcmp(a.data, b.data, a.n));
}

static inline bool same_vocab(const struct vocab *a, const struct vocab *b)
{
    if (a->n_ids != b->n_ids || a->n_pieces != b->n_pieces ||
        a->piece_bytes_max != b->piece_bytes_max)
        return false;
    for (size_t id = 0; id < a->n_ids; id++) {
        struct span p = a->pieces[id];
        if (!same_span(p, b->pieces[id])) return false;
        if (p.data && vocab_find(a, p.data, p.n) != vocab_find(b, p.data, p.n)) return false;
    }
    return true;
}

static inline size_t merges_found(const struct model *in, const struct model *m)
{
    size_t n = 0;
    for (size_t i = 0; i < m->n_merge_slots; i++) {
        const struct merge *want = &m->merges[i], *have;
        if (want->pair == MERGE_NONE) continue;
        have = &in->merges[bpe_merge_slot(in, want->pair)];
        if (have->pair != want->pair || have->rank != want->rank || have->id != want->id)
            return SIZE_MAX;
        n++;
    }
    return n;
}

static inline bool same_model(const struct model *a, const struct model *b)
{
    if (a->kind != b->kind || a->unk_id != b->unk_id || a->fuse_unk != b->fuse_unk ||
        a->byte_fallback != b->byte_fallback || a->ignore_merges != b->ignore_merges ||
        a->cuts_at_marks != b->cuts_at_marks || !same_vocab(&a->vocab, &b->vocab) ||
        memcmp(a->byte_ids, b->byte_ids, sizeof a->byte_ids))
        return false;
    if (!a->merges != !b->merges) return false;
    if (!a->merges) return true;
    size_t n = merges_found(a, b);
    return n != SIZE_MAX && n == merges_found(b, a) &&
           !memcmp(a->code_ids, b->code_ids, MODEL_CODES_DIRECT * sizeof *a->code_ids);
}

static inline bool same_tokenizer(const struct tokenizer *a, const struct tokenizer *b)
{
    if (a->n_ids != b->n_ids || !same_model(&a->model, &b->model) ||
        !same_vocab(&a->added_vocab, &b->added_vocab))
        return false;
    for (size_t id = 0; id < a->n_ids; id++)
        if (!same_span(a->infos[id].piece, b->infos[id].piece) ||
            !same_span(a->infos[id].bytes, b->infos[id].bytes) ||
            a->infos[id].special != b->infos[id].special)
            return false;
    return !memcmp(a->role_ids, b->role_ids, sizeof a->role_ids);
}
