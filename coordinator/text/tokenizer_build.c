/* Making a tokenizer from the documents of a model's folder, already parsed.
 *
 * tokenizer.json says how; tokenizer_config.json and its neighbours say which tokens have roles,
 * and may add tokens, as transformers does when it opens a fast tokenizer. */
#include "base/mem.h"
#include "coordinator/text/part.h"
#include "coordinator/text/tokenizer_parts.h"

#include <string.h>

/* ---- Roles ---- */

/* A token is written as a string or as an object with its "content". */
static const char *token_text(const json_t *value)
{
    return json_string_value(json_is_object(value) ? json_object_get(value, "content") : value);
}

static const char *role_key(int role)
{
    static const char *const keys[] = {
#define X(name, key) key,
        TOKENIZER_ROLES(X)
#undef X
    };
    return keys[role];
}

static enum err read_roles(const struct tokenizer_files *f, struct tokenizer *t)
{
    for (int role = 0; role < ROLE_COUNT; role++) {
        const char *text = token_text(json_object_get(f->config, role_key(role)));
        if (!text) text = token_text(json_object_get(f->special_map, role_key(role)));
        if (!text) continue;
        t->role_texts[role] = mem_strdup(text);
        if (!t->role_texts[role]) FAIL(ERR_NO_MEMORY, "out of memory for '%s'", role_key(role));
    }
    return OK;
}

static enum err find_roles(struct tokenizer *t)
{
    for (int role = 0; role < ROLE_COUNT; role++)
        t->role_ids[role] = t->role_texts[role] ? tokenizer_find(t, t->role_texts[role]) : -1;
    if (t->role_ids[ROLE_UNK] < 0) t->role_ids[ROLE_UNK] = t->model.unk_id;
    return OK;
}

/* A role that no tokenizer file names, from an id in the model's configuration. */
static enum err role_from_id(struct tokenizer *t, enum tokenizer_role role, const json_t *value)
{
    if (json_is_array(value)) value = json_array_get(value, 0);
    if (t->role_ids[role] >= 0 || !json_is_integer(value)) return OK;
    json_int_t id = json_integer_value(value);
    if (id < 0 || (size_t)id >= t->n_ids || !t->infos[id].piece.data) return OK;
    t->role_ids[role] = (int32_t)id;
    if (t->role_texts[role]) return OK;
    t->role_texts[role] = mem_strdup(t->infos[id].piece.data);
    return t->role_texts[role] ? OK : err_set(ERR_NO_MEMORY, "out of memory for a token");
}

static enum err add_eos(struct tokenizer *t, const json_t *value)
{
    json_int_t id = json_is_integer(value) ? json_integer_value(value) : -1;
    if (id < 0 || id >= VOCAB_IDS_MAX) return OK;
    for (size_t i = 0; i < t->eos_ids.n; i++)
        if (t->eos_ids.ids[i] == id) return OK;
    return token_list_add(&t->eos_ids, (int32_t)id);
}

static enum err read_eos(const json_t *config, struct tokenizer *t)
{
    const json_t *value = json_object_get(config, "eos_token_id");
    if (!json_is_array(value)) return add_eos(t, value);
    for (size_t i = 0; i < json_array_size(value); i++)
        TRY(add_eos(t, json_array_get(value, i)));
    return OK;
}

static enum err read_eos_ids(const struct tokenizer_files *f, struct tokenizer *t)
{
    const json_t *configs[] = {f->generation, f->model_config};
    token_list_init(&t->eos_ids, EOS_IDS_MAX);
    for (size_t i = 0; i < 2; i++) {
        TRY(role_from_id(t, ROLE_BOS, json_object_get(configs[i], "bos_token_id")));
        TRY(role_from_id(t, ROLE_EOS, json_object_get(configs[i], "eos_token_id")));
    }
    if (t->role_ids[ROLE_EOS] >= 0) TRY(token_list_add(&t->eos_ids, t->role_ids[ROLE_EOS]));
    for (size_t i = 0; i < 2; i++)
        TRY(read_eos(configs[i], t));
    return OK;
}

/* ---- Added tokens ---- */

static bool is_listed(const json_t *list, const char *text)
{
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *have = token_text(json_array_get(list, i));
        if (have && !strcmp(have, text)) return true;
    }
    return false;
}

static enum err list_token(json_t *list, json_t *token)
{
    if (!token || json_array_append_new(list, token))
        FAIL(ERR_NO_MEMORY, "out of memory for added tokens");
    return OK;
}

/* The configuration's added_tokens_decoder: {"32000": {"content": ...}}. */
static enum err list_from_config(const json_t *config, json_t *list)
{
    const char *key;
    json_t *value;
    json_t *tokens = json_object_get(config, "added_tokens_decoder");
    if (json_object_size(tokens) > ADDED_TOKENS_MAX)
        FAIL(ERR_FORMAT, "more than %d added tokens", ADDED_TOKENS_MAX);
    json_object_foreach(tokens, key, value)
    {
        const char *text = token_text(value);
        int64_t id = 0;
        for (const char *c = key; *c && id >= 0; c++)
            id = *c >= '0' && *c <= '9' && id < VOCAB_IDS_MAX ? id * 10 + (*c - '0') : -1;
        if (!text || id < 0 || !json_is_object(value))
            FAIL(ERR_FORMAT, "added_tokens_decoder: '%s' is no token", key);
        if (is_listed(list, text)) continue;
        json_t *copy = json_copy(value);
        if (copy && json_object_set_new(copy, "id", json_integer(id))) {
            json_decref(copy);
            copy = NULL;
        }
        TRY(list_token(list, copy));
    }
    return OK;
}

/* Tokens with a role that are in the vocabulary but were not added: they are special all the same.
 */
static enum err list_roles(const struct tokenizer *t, json_t *list)
{
    for (int role = 0; role < ROLE_COUNT; role++) {
        const char *text = t->role_texts[role];
        int32_t id = text ? vocab_find(&t->model.vocab, text, strlen(text)) : -1;
        if (id < 0 || is_listed(list, text)) continue;
        TRY(list_token(list, json_pack("{s:s, s:i, s:b, s:b}", "content", text, "id", (int)id,
                                       "special", 1, "normalized", 0)));
    }
    return OK;
}

static enum err read_added(const struct tokenizer_files *f, struct tokenizer *t)
{
    const json_t *listed = json_object_get(f->json, "added_tokens");
    if (listed && !json_is_null(listed) && !json_is_array(listed))
        FAIL(ERR_FORMAT, "\"added_tokens\" must be a list");
    json_t *list = listed && json_is_array(listed) ? json_copy((json_t *)listed) : json_array();
    if (!list) FAIL(ERR_NO_MEMORY, "out of memory for added tokens");
    enum err e = list_from_config(f->config, list);
    if (!e) e = list_roles(t, list);
    if (!e) e = added_tokens_read(list, &t->normalizer, &t->added);
    json_decref(list);
    if (e) return e;
    vocab_init(&t->added_vocab);
    for (size_t i = 0; i < t->added.n; i++) {
        struct added_token *token = &t->added.items[i];
        int32_t id = vocab_find(&t->model.vocab, token->text, token->n);
        if (id >= 0) token->id = id; /* the model's id counts */
        if (vocab_piece(&t->added_vocab, token->id).data || !token->n) continue;
        TRY(vocab_add(&t->added_vocab, token->text, token->n, token->id));
    }
    return OK;
}

/* ---- What each id is ---- */

static enum err describe(struct tokenizer *t, int32_t id, struct decoder_state *states,
                         struct buf *work)
{
    struct span piece = vocab_piece(&t->added_vocab, id);
    if (!piece.data) piece = vocab_piece(&t->model.vocab, id);
    if (!piece.data) return OK;
    struct token_info *info = &t->infos[id];
    buf_clear(work);
    TRY(decoder_piece_bytes(&t->decoder, states, piece.data, piece.n, work));
    info->piece = piece;
    info->bytes = piece;
    if (work->n == piece.n && !memcmp(buf_string(work), piece.data, piece.n)) return OK;
    char *copy;
    TRY(arena_copy_string(&t->arena, buf_string(work), work->n, &copy));
    info->bytes = (struct span){copy, work->n};
    return OK;
}

static enum err describe_all(struct tokenizer *t)
{
    struct decoder_state *states = NULL;
    struct buf work;
    buf_init(&work, 0);
    t->n_ids = t->model.vocab.n_ids;
    if (t->added_vocab.n_ids > t->n_ids) t->n_ids = t->added_vocab.n_ids;
    TRY(MEM_NEW_ARRAY(t->n_ids + 1, &t->infos));
    enum err e = decoder_states_create(&t->decoder, &states);
    for (size_t id = 0; id < t->n_ids && !e; id++)
        e = describe(t, (int32_t)id, states, &work);
    decoder_states_destroy(&t->decoder, states);
    buf_fini(&work);
    for (size_t i = 0; i < t->added.n && !e; i++)
        if (t->added.items[i].special && (size_t)t->added.items[i].id < t->n_ids)
            t->infos[t->added.items[i].id].special = true;
    return e;
}

/* ---- The tokens around a text ---- */

static enum err put_around(struct token_list *list, int32_t id, bool wanted)
{
    list->n = 0;
    return wanted && id >= 0 ? token_list_add(list, id) : OK;
}

/* Llama's family of tokenizer classes rebuilds the post-processor from add_bos_token and
 * add_eos_token; other classes leave it as the file has it. */
static enum err apply_class(const json_t *config, struct tokenizer *t)
{
    static const char *const rebuilt[] = {"LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer",
                                          "CohereTokenizer"};
    const char *class = json_string_value(json_object_get(config, "tokenizer_class"));
    const json_t *bos = json_object_get(config, "add_bos_token");
    const json_t *eos = json_object_get(config, "add_eos_token");
    bool ours = false;
    for (size_t i = 0; class && i < sizeof rebuilt / sizeof *rebuilt; i++)
        ours |= !strncmp(class, rebuilt[i], strlen(rebuilt[i]));
    if (!ours) return OK;
    if (json_is_boolean(bos))
        TRY(put_around(&t->post.before, t->role_ids[ROLE_BOS], json_is_true(bos)));
    if (json_is_boolean(eos))
        TRY(put_around(&t->post.after, t->role_ids[ROLE_EOS], json_is_true(eos)));
    return OK;
}

/* Ids of the post-processor that no piece has would reach the model as garbage. */
static enum err check_around(const struct tokenizer *t, const struct token_list *list)
{
    for (size_t i = 0; i < list->n; i++)
        if (!tokenizer_token_text(t, list->ids[i]))
            FAIL(ERR_FORMAT, "the post-processor's id %d is not in the vocabulary", list->ids[i]);
    return OK;
}

/* ---- Chat templates ---- */

enum err tokenizer_add_template(struct tokenizer *t, const char *name, const char *source, size_t n)
{
    size_t i = 0;
    if (n > TEMPLATE_BYTES_MAX)
        FAIL(ERR_FORMAT, "chat template '%s' is longer than %d bytes", name, TEMPLATE_BYTES_MAX);
    while (i < t->n_templates && strcmp(t->templates[i].name, name))
        i++;
    if (i == TEMPLATES_MAX) FAIL(ERR_FORMAT, "more than %d chat templates", TEMPLATES_MAX);
    char *copy = mem_strndup(source, n);
    char *name_copy = i < t->n_templates ? t->templates[i].name : mem_strdup(name);
    if (!copy || !name_copy) {
        mem_free(copy);
        if (i == t->n_templates) mem_free(name_copy);
        FAIL(ERR_NO_MEMORY, "out of memory for a chat template");
    }
    if (i == t->n_templates)
        t->n_templates++;
    else
        mem_free(t->templates[i].source);
    t->templates[i] = (struct named_template){name_copy, copy};
    return OK;
}

static enum err read_template(const json_t *value, const char *name, struct tokenizer *t)
{
    if (!json_is_string(value)) FAIL(ERR_FORMAT, "the chat template '%s' is no string", name);
    return tokenizer_add_template(t, name, json_string_value(value), json_string_length(value));
}

/* One template, or a list of {"name", "template"}. */
static enum err read_templates(const json_t *document, struct tokenizer *t)
{
    const json_t *value = json_object_get(document, "chat_template");
    if (!value || json_is_null(value)) return OK;
    if (!json_is_array(value)) return read_template(value, "default", t);
    for (size_t i = 0; i < json_array_size(value); i++) {
        const json_t *item = json_array_get(value, i);
        const char *name = json_string_value(json_object_get(item, "name"));
        if (!name) FAIL(ERR_FORMAT, "chat template %zu has no name", i);
        TRY(read_template(json_object_get(item, "template"), name, t));
    }
    return OK;
}

/* ---- All ---- */

static enum err build(const struct tokenizer_files *f, struct tokenizer *t)
{
    if (!json_is_object(f->json)) FAIL(ERR_FORMAT, "the tokenizer is no JSON object");
    TRY(model_read(json_object_get(f->json, "model"), &f->big, &t->model));
    TRY(normalizer_read(json_object_get(f->json, "normalizer"), &t->normalizer));
    TRY(pretokenizer_read(json_object_get(f->json, "pre_tokenizer"), &t->pretokenizer));
    TRY(post_processor_read(json_object_get(f->json, "post_processor"), &t->post));
    TRY(decoder_read(json_object_get(f->json, "decoder"), &t->decoder));
    TRY(read_roles(f, t));
    TRY(read_added(f, t));
    TRY(describe_all(t));
    TRY(find_roles(t));
    TRY(read_eos_ids(f, t));
    TRY(apply_class(f->config, t));
    TRY(check_around(t, &t->post.before));
    TRY(check_around(t, &t->post.after));
    TRY(read_templates(f->chat_template, t));
    return read_templates(f->config, t);
}

enum err tokenizer_build(const struct tokenizer_files *files, struct tokenizer **out)
{
    struct tokenizer *t;
    TRY(MEM_NEW(&t));
    arena_init(&t->arena, 1 << 16, 0);
    for (int role = 0; role < ROLE_COUNT; role++)
        t->role_ids[role] = -1;
    enum err e = build(files, t);
    if (e)
        tokenizer_close(t);
    else
        *out = t;
    return e;
}

enum err tokenizer_build_cut(const struct tokenizer_files *files, struct span text,
                             struct tokenizer **out)
{
    struct tokenizer_files f = *files;
    struct buf rest;
    buf_init(&rest, 0);
    f.json = NULL;
    enum err e = big_values_cut(text.data, text.n, &f.big, &rest);
    if (!e) e = json_parse(buf_string(&rest), rest.n, &f.json);
    if (!e) e = tokenizer_build(&f, out);
    json_decref(f.json);
    buf_fini(&rest);
    return e;
}

void tokenizer_close(struct tokenizer *t)
{
    if (!t) return;
    model_fini(&t->model);
    vocab_fini(&t->added_vocab);
    added_tokens_fini(&t->added);
    normalizer_fini(&t->normalizer);
    pretokenizer_fini(&t->pretokenizer);
    post_processor_fini(&t->post);
    text_decoder_fini(&t->decoder);
    arena_fini(&t->arena);
    mem_free(t->infos);
    token_list_fini(&t->eos_ids);
    for (int role = 0; role < ROLE_COUNT; role++)
        mem_free(t->role_texts[role]);
    for (size_t i = 0; i < t->n_templates; i++) {
        mem_free(t->templates[i].name);
        mem_free(t->templates[i].source);
    }
    mem_free(t);
}
