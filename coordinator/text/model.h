/* The model of a tokenizer file: a word to token ids. BPE, WordPiece, Unigram, WordLevel.
 *
 * Immutable once read; each thread brings its scratch. It must never know where words come from. */
#pragma once
#include "base/json.h"
#include "coordinator/text/cut.h"
#include "coordinator/text/tokenizer.h"
#include "coordinator/text/vocab.h"

#include <stdatomic.h>

enum model_kind { MODEL_BPE, MODEL_WORDPIECE, MODEL_UNIGRAM, MODEL_WORDLEVEL };

/* A pair of adjacent tokens that may become one. */
struct merge {
    uint64_t pair; /* left id << 32 | right id; MERGE_NONE marks an empty slot */
    uint32_t rank; /* lower is merged first */
    int32_t id;    /* what the pair becomes */
};
#define MERGE_NONE UINT64_MAX

enum whole { WHOLE_UNKNOWN, WHOLE_YES, WHOLE_NO }; /* the piece alone, or something else */

enum { MODEL_CODES_DIRECT = 0x3000 };

struct model {
    enum model_kind kind;
    struct vocab vocab;
    int32_t unk_id; /* -1: none */
    bool fuse_unk, byte_fallback, ignore_merges;
    bool cuts_at_marks;                 /* BPE: words may be encoded apart from each other */
    char *subword_prefix, *word_suffix; /* BPE, WordPiece; NULL: none */
    int32_t byte_ids[256];              /* of "<0x00>" ..., -1: none */
    /* BPE */
    struct merge *merges; /* [n_merge_slots], open addressing */
    size_t n_merge_slots;
    int32_t *code_ids; /* [MODEL_CODES_DIRECT] id of the one-character piece, -1: none */
    /* [vocab.n_ids] what merging the piece's own text gives, noted when it was first done */
    _Atomic unsigned char *whole;
    /* WordPiece */
    int64_t word_chars_max;
    /* Unigram */
    double *scores; /* [vocab.n_ids] */
    double unk_score;
};

struct symbol {
    int32_t id; /* -1: merged into the one before */
    int32_t prev, next;
};

struct candidate {
    uint64_t key; /* rank << 32 | position of the left symbol */
    int32_t id;
};

struct path { /* Unigram: the best way to a byte offset */
    double score;
    int32_t id;
    int32_t start; /* -1: not reached */
    int32_t end;   /* of the piece that the best way takes from here */
};

struct model_scratch {
    struct symbol *symbols; /* [symbols_capacity] */
    size_t n_symbols, symbols_capacity;
    struct candidate *heap; /* [heap_capacity] */
    size_t n_heap, heap_capacity;
    struct path *paths; /* [paths_capacity] */
    size_t paths_capacity;
    struct buf text;
};

/* object is the file's "model"; what was cut out of it is read from big, which may be NULL.
 * ERR_FORMAT, ERR_UNSUPPORTED. */
enum err model_read(const json_t *object, const struct big_values *big, struct model *out);
void model_fini(struct model *m); /* accepts zeroed memory */
void model_scratch_fini(struct model_scratch *s);
/* Appends the ids of one word, valid UTF-8. */
enum err model_encode(const struct model *m, struct model_scratch *s, const char *word, size_t n,
                      struct token_list *out);

/* ---- Between the models ---- */
enum err bpe_read(const json_t *object, const struct big_value *merges, struct model *m);
/* Of a list, or of the text of one: adds the merges to m, which has its vocabulary. */
enum err bpe_merges_read(const json_t *list, struct model *m);
enum err bpe_merges_read_text(const struct big_value *value, struct model *m);
enum err bpe_encode(const struct model *m, struct model_scratch *s, const char *word, size_t n,
                    struct token_list *out);
enum err unigram_read(const json_t *object, struct model *m);
enum err unigram_encode(const struct model *m, struct model_scratch *s, const char *word, size_t n,
                        struct token_list *out);
enum err wordpiece_read(const json_t *object, struct model *m);
enum err wordpiece_encode(const struct model *m, struct model_scratch *s, const char *word,
                          size_t n, struct token_list *out);
/* Fills byte_ids from the vocabulary. */
void model_find_bytes(struct model *m);
