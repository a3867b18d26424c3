/* Finding a tokenizer's documents in a model's folder. Knows only names of files.
 *
 * GPT-2's two files, vocab.json and merges.txt, are rewritten as the tokenizer.json they mean. */
#include "base/mem.h"
#include "coordinator/text/tokenizer_parts.h"

#include <dirent.h>
#include <stdio.h>
#include <string.h>

enum { TOKENIZER_BYTES_MAX = 256 << 20, CONFIG_BYTES_MAX = 32 << 20, PATH_BYTES = 4096 };

static enum err path_of(const char *dir, const char *name, char out[PATH_BYTES])
{
    int n = snprintf(out, PATH_BYTES, "%s/%s", dir, name);
    if (n < 0 || n >= PATH_BYTES) FAIL(ERR_NOT_FOUND, "the path of %s is too long", name);
    return OK;
}

/* *out stays as it is when there is no such file. */
static enum err read_json(const char *dir, const char *name, size_t limit, json_t **out)
{
    char path[PATH_BYTES];
    TRY(path_of(dir, name, path));
    enum err e = json_parse_file(path, limit, out);
    return e == ERR_NOT_FOUND ? OK : e;
}

static enum err add_merges(char *text, json_t *merges)
{
    for (char *line = text, *next; line && *line; line = next) {
        next = strchr(line, '\n');
        if (next) *next++ = 0;
        line[strcspn(line, "\r")] = 0;
        if (!*line || !strncmp(line, "#version", 8)) continue;
        if (json_array_append_new(merges, json_string(line)))
            FAIL(ERR_FORMAT, "merges.txt: a line is not UTF-8");
    }
    return OK;
}

/* The document that vocab.json and merges.txt stand for: GPT-2's byte-level BPE. */
static enum err from_gpt2_files(const char *dir, json_t **out)
{
    char path[PATH_BYTES];
    struct buf text;
    json_t *vocab = NULL, *merges = NULL;
    buf_init(&text, 0);
    enum err e;
    TRY_OUT(path_of(dir, "vocab.json", path));
    TRY_OUT(json_parse_file(path, TOKENIZER_BYTES_MAX, &vocab));
    TRY_OUT(path_of(dir, "merges.txt", path));
    TRY_OUT(buf_read_file(&text, path, TOKENIZER_BYTES_MAX));
    merges = json_array();
    if (!merges) FAIL_OUT(ERR_NO_MEMORY, "out of memory for merges.txt");
    if (text.n) TRY_OUT(add_merges(text.data, merges));
    const char *end = "<|endoftext|>"; /* GPT-2's only special token */
    const json_t *id = json_object_get(vocab, end);
    json_t *added = id ? json_pack("[{s:s, s:I, s:b}]", "content", end, "id",
                                   json_integer_value(id), "special", 1)
                       : json_array();
    json_t *json =
        json_pack("{s:o, s:{s:s, s:b}, s:{s:s}, s:{s:s, s:O, s:O}}", "added_tokens", added,
                  "pre_tokenizer", "type", "ByteLevel", "add_prefix_space", 0, "decoder", "type",
                  "ByteLevel", "model", "type", "BPE", "vocab", vocab, "merges", merges);
    if (!json) FAIL_OUT(ERR_NO_MEMORY, "out of memory for %s/vocab.json", dir);
    *out = json;
out:
    json_decref(vocab);
    json_decref(merges);
    buf_fini(&text);
    return e;
}

static enum err read_template_file(const char *dir, const char *file, const char *name,
                                   struct tokenizer *t)
{
    char path[PATH_BYTES];
    struct buf text;
    buf_init(&text, 0);
    TRY(path_of(dir, file, path));
    enum err e = buf_read_file(&text, path, TEMPLATE_BYTES_MAX);
    if (!e) e = tokenizer_add_template(t, name, buf_string(&text), text.n);
    buf_fini(&text);
    return e == ERR_NOT_FOUND ? OK : e;
}

/* additional_chat_templates/NAME.jinja */
static enum err read_more_templates(const char *dir, struct tokenizer *t)
{
    char path[PATH_BYTES];
    enum err e = OK;
    TRY(path_of(dir, "additional_chat_templates", path));
    DIR *folder = opendir(path);
    for (struct dirent *entry; folder && !e && (entry = readdir(folder));) {
        char name[256];
        size_t n = strlen(entry->d_name);
        if (n <= 6 || n >= sizeof name || strcmp(entry->d_name + n - 6, ".jinja")) continue;
        snprintf(name, sizeof name, "%.*s", (int)(n - 6), entry->d_name);
        e = read_template_file(path, entry->d_name, name, t);
    }
    if (folder) closedir(folder);
    return e;
}

static enum err read_files(const char *dir, struct tokenizer_files *f)
{
    TRY(read_json(dir, "tokenizer_config.json", CONFIG_BYTES_MAX, &f->config));
    TRY(read_json(dir, "special_tokens_map.json", CONFIG_BYTES_MAX, &f->special_map));
    TRY(read_json(dir, "generation_config.json", CONFIG_BYTES_MAX, &f->generation));
    TRY(read_json(dir, "config.json", CONFIG_BYTES_MAX, &f->model_config));
    return read_json(dir, "chat_template.json", CONFIG_BYTES_MAX, &f->chat_template);
}

static void release_files(struct tokenizer_files *f)
{
    json_decref(f->json);
    json_decref(f->config);
    json_decref(f->special_map);
    json_decref(f->generation);
    json_decref(f->model_config);
    json_decref(f->chat_template);
}

/* Names the folder in an error that does not. */
static enum err name_folder(enum err e, const char *dir)
{
    char why[768];
    if (!e || e == ERR_NO_MEMORY || strstr(err_detail(), dir)) return e;
    snprintf(why, sizeof why, "%s", err_detail());
    return err_set(e, "the tokenizer in %s: %s", dir, why);
}

/* The short way, and where it cannot go the long one: that has the words for what is wrong. */
static enum err build_from_text(struct tokenizer_files *f, struct span text, struct tokenizer **out)
{
    enum err e = tokenizer_build_cut(f, text, out);
    if (!e || e == ERR_NO_MEMORY) return e;
    TRY(json_parse(text.data, text.n, &f->json));
    return tokenizer_build(f, out);
}

static enum err build_from_gpt2_files(const char *dir, struct tokenizer_files *f,
                                      struct tokenizer **out)
{
    enum err e = from_gpt2_files(dir, &f->json);
    if (e == ERR_NOT_FOUND) {
        char why[256];
        snprintf(why, sizeof why, "%s", err_detail());
        FAIL(e, "%s has neither tokenizer.json nor vocab.json with merges.txt (%s)", dir, why);
    }
    TRY(e);
    return tokenizer_build(f, out);
}

static enum err build_from_folder(const char *dir, struct tokenizer_files *f,
                                  struct tokenizer **out)
{
    char path[PATH_BYTES], why[512];
    struct buf text;
    buf_init(&text, 0);
    TRY(path_of(dir, "tokenizer.json", path));
    enum err e = buf_read_file(&text, path, TOKENIZER_BYTES_MAX);
    if (e == ERR_NOT_FOUND) {
        e = build_from_gpt2_files(dir, f, out);
    } else if (!e && (e = build_from_text(f, (struct span){buf_string(&text), text.n}, out))) {
        snprintf(why, sizeof why, "%s", err_detail());
        if (!f->json && e != ERR_NO_MEMORY) e = err_set(ERR_FORMAT, "%s: %s", path, why);
    }
    buf_fini(&text);
    return e;
}

enum err tokenizer_open(const char *model_dir, struct tokenizer **out)
{
    struct tokenizer_files f = {0};
    struct tokenizer *t = NULL;
    enum err e;
    TRY_OUT(read_files(model_dir, &f));
    TRY_OUT(build_from_folder(model_dir, &f, &t));
    TRY_OUT(read_template_file(model_dir, "chat_template.jinja", "default", t));
    TRY_OUT(read_more_templates(model_dir, t));
    *out = t;
    t = NULL;
out:
    tokenizer_close(t);
    release_files(&f);
    return name_folder(e, model_dir);
}

enum err tokenizer_open_memory(struct span json, const struct span *config, struct tokenizer **out)
{
    struct tokenizer_files f = {0};
    enum err e = config ? json_parse(config->data, config->n, &f.config) : OK;
    if (!e) e = build_from_text(&f, json, out);
    release_files(&f);
    return e;
}
