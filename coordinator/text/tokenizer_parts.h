/* The inside of struct tokenizer, shared by what loads it and what runs it. */
#pragma once
#include "coordinator/text/added_tokens.h"
#include "coordinator/text/decoder.h"
#include "coordinator/text/model.h"
#include "coordinator/text/normalizer.h"
#include "coordinator/text/post_processor.h"
#include "coordinator/text/pretokenizer.h"
#include "coordinator/text/tokenizer.h"

/* The tokens that have a role in templates and configurations. */
#define TOKENIZER_ROLES(X)                                                                         \
    X(BOS, "bos_token")                                                                            \
    X(EOS, "eos_token")                                                                            \
    X(PAD, "pad_token")                                                                            \
    X(UNK, "unk_token")                                                                            \
    X(SEP, "sep_token")                                                                            \
    X(CLS, "cls_token")                                                                            \
    X(MASK, "mask_token")

enum tokenizer_role {
#define X(name, key) ROLE_##name,
    TOKENIZER_ROLES(X)
#undef X
        ROLE_COUNT
};

struct token_info {
    struct span piece; /* data NULL: no such id */
    struct span bytes; /* what it stands for inside a text */
    bool special;
};

struct named_template {
    char *name, *source; /* owned */
};

enum { TEMPLATES_MAX = 64, TEMPLATE_BYTES_MAX = 1 << 22, EOS_IDS_MAX = 256 };

struct tokenizer {
    struct model model;
    struct vocab added_vocab; /* texts of added tokens */
    struct added_tokens added;
    struct normalizer normalizer;
    struct pretokenizer pretokenizer;
    struct post_processor post;
    struct decoder decoder;
    struct arena arena;       /* the bytes of token_info */
    struct token_info *infos; /* [n_ids] */
    size_t n_ids;
    char *role_texts[ROLE_COUNT]; /* owned, NULL: none */
    int32_t role_ids[ROLE_COUNT]; /* -1: none */
    struct token_list eos_ids;
    struct named_template templates[TEMPLATES_MAX];
    size_t n_templates;
};

/* The documents a tokenizer is made of; any but json may be NULL. Only read. */
struct tokenizer_files {
    json_t *json;          /* tokenizer.json */
    struct big_values big; /* what was cut out of json */
    json_t *config;        /* tokenizer_config.json */
    json_t *special_map;   /* special_tokens_map.json */
    json_t *generation;    /* generation_config.json */
    json_t *model_config;  /* config.json */
    json_t *chat_template; /* chat_template.json */
};

enum err tokenizer_build(const struct tokenizer_files *files, struct tokenizer **out);
/* From the text of tokenizer.json, with the other documents of files: without a tree of what is big
 * in it. ERR_FORMAT, ERR_INVALID and others: the text is wrong or merely unusual; building from the
 * whole document finds out which. */
enum err tokenizer_build_cut(const struct tokenizer_files *files, struct span text,
                             struct tokenizer **out);
/* Adds or replaces the template of that name. */
enum err tokenizer_add_template(struct tokenizer *t, const char *name, const char *source,
                                size_t n);
