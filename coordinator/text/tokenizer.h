/* Text to token ids and back, as Hugging Face tokenizers do it.
 *
 * A tokenizer is read once from a model's folder and never changes afterwards: any number of
 * threads may use one. Encoding is a pipeline of five parts, each a table row chosen by the file:
 * added tokens, normalizers, pre-tokenizers, the model (BPE, WordPiece, Unigram), post-processors.
 * Decoding is one pipeline of decoders that works piece by piece; decoding at once and streaming
 * run the same code, so their texts cannot differ.
 *
 * It must never know requests, sequences or templates. */
#pragma once
#include "base/buf.h"
#include "base/err.h"

#include <stdint.h>

struct tokenizer;

/* A growing array of token ids. Zeroed memory is an empty list without a limit. */
struct token_list {
    int32_t *ids; /* [capacity], the first n are set */
    size_t n, capacity;
    size_t limit; /* most ids it may hold, 0 = no limit */
};

void token_list_init(struct token_list *list, size_t limit);
void token_list_fini(struct token_list *list); /* accepts zeroed memory */
/* ERR_TOO_LONG naming the limit; the list is unchanged on failure. */
enum err token_list_add(struct token_list *list, int32_t id);

enum tokenizer_flag {
    /* The post-processor's tokens (BOS, EOS, [CLS] ...) are put around the text. Off when the text
     * comes from a chat template, which writes them itself. */
    TOKENIZER_ADD_SPECIAL = 1,
    /* Special tokens written out in the text become their ids. Without it "<|eot|>" typed by a
     * user is ordinary text. Added tokens that are not special are always recognized. */
    TOKENIZER_PARSE_SPECIAL = 2,
};

/* Reads tokenizer.json, or else vocab.json + merges.txt, from model_dir, and what there is of
 * tokenizer_config.json, special_tokens_map.json, generation_config.json, chat_template.jinja,
 * additional_chat_templates/NAME.jinja.
 * ERR_NOT_FOUND: none of the files. ERR_FORMAT: a file is malformed. ERR_UNSUPPORTED: a part that
 * this program does not know, by its name. Every message names the file. */
enum err tokenizer_open(const char *model_dir, struct tokenizer **out);
/* The same from memory: the texts of tokenizer.json and of tokenizer_config.json (or NULL). */
enum err tokenizer_open_memory(struct span json, const struct span *config, struct tokenizer **out);
void tokenizer_close(struct tokenizer *t); /* accepts NULL */

/* Appends the ids of text[n], flags of enum tokenizer_flag. Bytes that are not UTF-8 are read as
 * U+FFFD. ERR_TOO_LONG at the list's limit (what was appended before stays), ERR_INVALID when a
 * pattern exceeds its match limit. Time is O(n log n) for any text. */
enum err tokenizer_encode(const struct tokenizer *t, const char *text, size_t n, unsigned flags,
                          struct token_list *out);

/* Appends the text of ids[n]. Ids outside the vocabulary are left out, as is every special token
 * when skip_special. The text is always valid UTF-8: broken sequences become U+FFFD. */
enum err tokenizer_decode(const struct tokenizer *t, const int32_t *ids, size_t n,
                          bool skip_special, struct buf *out);

/* One past the largest id that has a text, added tokens included. */
int32_t tokenizer_vocab_size(const struct tokenizer *t);
/* The piece as the file writes it ("Ġthe", "▁the", "<0x0A>"), owned by t; NULL for an id without
 * one. */
const char *tokenizer_token_text(const struct tokenizer *t, int32_t id);
/* The id of a piece written as the file writes it, or -1. */
int32_t tokenizer_find(const struct tokenizer *t, const char *piece);
/* The bytes that the token stands for inside a text (for logprobs and grammars), owned by t; n = 0
 * for an id without a piece. They need not be whole characters. */
struct span tokenizer_bytes(const struct tokenizer *t, int32_t id);
bool tokenizer_is_special(const struct tokenizer *t, int32_t id);

/* -1 where the model has none. */
int32_t tokenizer_bos_id(const struct tokenizer *t);
int32_t tokenizer_eos_id(const struct tokenizer *t);
int32_t tokenizer_pad_id(const struct tokenizer *t);
int32_t tokenizer_unk_id(const struct tokenizer *t);
/* Every id that ends a generation: eos_token and generation_config.json's eos_token_id. Returns
 * their number; *out_ids is owned by t. */
size_t tokenizer_eos_ids(const struct tokenizer *t, const int32_t **out_ids);
/* The texts a chat template knows as bos_token, eos_token ...; role is "bos_token" and the like.
 * "" where the model has none. */
const char *tokenizer_special_text(const struct tokenizer *t, const char *role);
/* The source of a chat template, owned by t, or NULL. name NULL means the default one; models may
 * have others such as "tool_use" and "rag". */
const char *tokenizer_chat_template(const struct tokenizer *t, const char *name);

/* Decoding id by id. What next appends can no longer change: the texts appended by all calls and by
 * flush together are exactly what tokenizer_decode gives for the same ids. */
struct detokenizer {
    const struct tokenizer *t;
    bool skip_special;
    size_t n_tokens;              /* tokens that reached the decoders */
    struct decoder_state *states; /* [number of decoders], owned */
};

enum err detokenizer_init(struct detokenizer *d, const struct tokenizer *t, bool skip_special);
void detokenizer_fini(struct detokenizer *d); /* accepts zeroed memory */
/* Appends whole characters only, perhaps none. */
enum err detokenizer_next(struct detokenizer *d, int32_t id, struct buf *out);
/* The sequence has ended: appends what was held back. The detokenizer starts anew afterwards. */
enum err detokenizer_flush(struct detokenizer *d, struct buf *out);
