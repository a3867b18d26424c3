/* Packs a model and writes it: weights as the CPU backend holds them, tables and vectors as they
 * came. docs/quantize.md describes the files. */
#include "worker/quantize.h"
#include "base/arena.h"
#include "base/buf.h"
#include "base/clock.h"
#include "base/json.h"
#include "base/log.h"
#include "base/mem.h"
#include "worker/memory.h"
#include "worker/source.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { CONTEXT = 16, DATA_ALIGN = 64, FILE_BYTES_MAX = 256 << 20 };

/* One tensor to be written; its bytes live until the file is whole. */
struct entry {
    char name[SOURCE_NAME_MAX];
    enum st_dtype dtype;
    int64_t shape[2];
    int n_dims;
    const void *data;
    size_t bytes;
    struct entry *next;
};

struct packer {
    const struct quantize_config *config;
    struct weights_options options;
    struct model_config model_config;
    struct backend *backend;
    struct model *model;
    struct source source;
    struct arena arena;
    struct entry *first, **end;
    struct buf digests; /* rows of the metadata */
};

/* --- what is written --- */

static enum err entry_add(struct packer *p, const char *name, enum st_dtype dtype, int64_t rows,
                          int64_t cols, const void *data, size_t bytes)
{
    struct entry *e;
    TRY(arena_alloc(&p->arena, sizeof *e, (void **)&e));
    snprintf(e->name, sizeof e->name, "%s", name);
    e->dtype = dtype;
    e->shape[0] = rows, e->shape[1] = cols;
    e->n_dims = cols ? 2 : 1;
    e->data = data;
    e->bytes = bytes;
    *p->end = e;
    p->end = &e->next;
    return OK;
}

static enum err part_add(struct packer *p, const char *stem, const char *part, enum st_dtype dtype,
                         int64_t rows, int64_t cols, const void *data, size_t bytes)
{
    char name[PACKED_NAME_MAX];
    snprintf(name, sizeof name, "%s.%s", stem, part);
    return data ? entry_add(p, name, dtype, rows, cols, data, bytes) : OK;
}

static enum err weight_add(struct packer *p, enum role first, int layer, int expert,
                           const struct weight *w)
{
    struct packed_weight v;
    char stem[PACKED_STEM_MAX];
    if (!w) return OK;
    p->backend->ops->weight_export(w, &v);
    weights_stem(first, layer, expert, stem);
    struct hash128 h = p->backend->ops->packed_digest(&v);
    int64_t lanes = (int64_t)v.n_lanes;
    TRY(buf_printf(&p->digests, ",\"%s%s\":\"%016llx%016llx\"", PACKED_DIGEST_KEY, stem,
                   (unsigned long long)h.high, (unsigned long long)h.low));
    TRY(part_add(p, stem, "packed", ST_U8, (int64_t)v.panels_bytes, 0, v.panels, v.panels_bytes));
    TRY(part_add(p, stem, "packed_scale", ST_F32, lanes, 0, v.scale, v.n_lanes * 4));
    return part_add(p, stem, "packed_bias", ST_F32, lanes, 0, v.bias, v.n_lanes * 4);
}

static enum err vector_add(struct packer *p, enum role role, int layer)
{
    int64_t n = config_dim(&p->model_config, roles[role].rows);
    if (!config_has_role(&p->model_config, role)) return OK;
    for (int bias = 0; bias <= (int)config_has_bias(&p->model_config, role); bias++) {
        char name[SOURCE_NAME_MAX];
        float *values;
        TRY(arena_alloc_array(&p->arena, (size_t)n, sizeof *values, (void **)&values));
        TRY(source_vector(&p->source, role, layer, bias, n, values));
        source_name(&p->source, role, layer, bias ? ".bias" : ".weight", name);
        TRY(entry_add(p, name, ST_F32, n, 0, values, (size_t)n * sizeof *values));
    }
    return OK;
}

static enum st_dtype st_dtype_of(enum dtype t)
{
    return t == DTYPE_F32 ? ST_F32 : t == DTYPE_F16 ? ST_F16 : ST_BF16;
}

static enum err table_add(struct packer *p, enum role role)
{
    struct matrix_view v;
    char name[SOURCE_NAME_MAX];
    if (!config_has_role(&p->model_config, role)) return OK;
    TRY(source_matrix(&p->source, role, 0, &v));
    source_name(&p->source, role, 0, ".weight", name);
    return entry_add(p, name, st_dtype_of(v.dtype), v.rows, v.cols, v.data,
                     (size_t)(v.rows * v.cols) * dtype_bytes(v.dtype));
}

/* A copy, for there may be one in each layer. */
static enum err router_add(struct packer *p, int layer)
{
    struct matrix_view v;
    char name[SOURCE_NAME_MAX];
    void *copy;
    TRY(source_matrix(&p->source, ROLE_ROUTER, layer, &v));
    size_t bytes = (size_t)(v.rows * v.cols) * dtype_bytes(v.dtype);
    ASSERT(v.col_stride == 1 && v.row_stride == v.cols);
    TRY(arena_alloc(&p->arena, bytes, &copy));
    memcpy(copy, v.data, bytes);
    source_release(&p->source);
    source_name(&p->source, ROLE_ROUTER, layer, ".weight", name);
    return entry_add(p, name, st_dtype_of(v.dtype), v.rows, v.cols, copy, bytes);
}

static enum err ffn_add(struct packer *p, int layer, const struct layer *l)
{
    TRY(weight_add(p, ROLE_W_UP, layer, -1, l->up));
    TRY(weight_add(p, ROLE_W_DOWN, layer, -1, l->down));
    for (int e = 0; e < p->model_config.n_experts; e++) {
        TRY(weight_add(p, ROLE_W_UP, layer, e, l->experts_up[e]));
        TRY(weight_add(p, ROLE_W_DOWN, layer, e, l->experts_down[e]));
    }
    return p->model_config.n_experts ? router_add(p, layer) : OK;
}

static enum err entries_make(struct packer *p)
{
    struct model *m = p->model;
    const struct model_config *c = &p->model_config;
    for (int i = 0; i < c->n_layers; i++) {
        const struct layer *l = &m->layers[i];
        TRY(weight_add(p, ROLE_WQ, i, -1, l->qkv));
        TRY(weight_add(p, ROLE_WO, i, -1, l->out));
        TRY(ffn_add(p, i, l));
    }
    TRY(weight_add(p, ROLE_PROJECT_IN, 0, -1, m->project_in));
    TRY(weight_add(p, ROLE_PROJECT_OUT, 0, -1, m->project_out));
    TRY(weight_add(p, ROLE_LM_HEAD, 0, -1, m->lm_head));
    for (int i = 0; i < c->n_layers; i++) {
        static const enum role of_layer[] = {ROLE_ATTN_NORM, ROLE_FFN_NORM, ROLE_Q_NORM,
                                             ROLE_K_NORM};
        for (int k = 0; k < 4; k++)
            TRY(vector_add(p, of_layer[k], i));
    }
    TRY(vector_add(p, ROLE_FINAL_NORM, 0));
    TRY(table_add(p, ROLE_POSITION));
    return table_add(p, ROLE_EMBED);
}

/* --- the file --- */

static enum err header_make(struct packer *p, struct buf *out)
{
    const struct quantize_config *c = p->config;
    size_t at = 0;
    enum dtype dtype = weights_dtype(&p->model_config, p->model->file);
    TRY(buf_printf(out,
                   "{\"__metadata__\":{\"%s\":\"%s\",\"%s\":\"%s\",\"%s\":\"%s\",\"%s\":\"%s\",\"%"
                   "s\":\"%s\"%s}",
                   PACKED_FORMAT_KEY, PACKED_FORMAT, PACKED_LAYOUT_KEY,
                   p->backend->ops->packed_layout, PACKED_WEIGHTS_KEY, c->format, PACKED_HEAD_KEY,
                   c->head_format, PACKED_DTYPE_KEY, dtype_name(dtype), buf_string(&p->digests)));
    for (const struct entry *e = p->first; e; e = e->next) {
        TRY(buf_add_char(out, ','));
        TRY(json_write_string(out, e->name, strlen(e->name)));
        TRY(buf_printf(out, ":{\"dtype\":\"%s\",\"shape\":[%lld", st_dtype_name(e->dtype),
                       (long long)e->shape[0]));
        if (e->n_dims == 2) TRY(buf_printf(out, ",%lld", (long long)e->shape[1]));
        TRY(buf_printf(out, "],\"data_offsets\":[%zu,%zu]}", at, at + e->bytes));
        at += e->bytes;
    }
    TRY(buf_add_char(out, '}'));
    while ((8 + out->n) % DATA_ALIGN)
        TRY(buf_add_char(out, ' '));
    return OK;
}

static enum err bytes_write(int fd, const char *path, const void *data, size_t n)
{
    for (size_t done = 0; done < n;) {
        ssize_t k = write(fd, (const char *)data + done, n - done < 1 << 30 ? n - done : 1 << 30);
        if (k < 0 && errno == EINTR) continue;
        if (k <= 0)
            FAIL(ERR_IO, "%s: cannot write: %s", path, k ? strerror(errno) : "nothing was taken");
        done += (size_t)k;
    }
    return OK;
}

static enum err weights_write(struct packer *p, int fd, const char *path)
{
    struct buf header;
    uint8_t length[8];
    buf_init(&header, 100000000);
    enum err e = header_make(p, &header);
    for (int i = 0; i < 8; i++)
        length[i] = (uint8_t)((uint64_t)header.n >> 8 * i);
    if (!e) e = bytes_write(fd, path, length, sizeof length);
    if (!e) e = bytes_write(fd, path, header.data, header.n);
    for (const struct entry *t = p->first; t && !e; t = t->next)
        e = bytes_write(fd, path, t->data, t->bytes);
    if (!e && fsync(fd)) e = err_set(ERR_IO, "%s: %s", path, strerror(errno));
    buf_fini(&header);
    return e;
}

static enum err path_make(const char *dir, const char *name, char out[PATH_MAX])
{
    if (snprintf(out, PATH_MAX, "%s/%s", dir, name) >= PATH_MAX)
        FAIL(ERR_INVALID, "%.64s...: the path is too long", dir);
    return OK;
}

/* Under another name until it is whole. */
static enum err file_write(struct packer *p)
{
    char path[PATH_MAX], part[PATH_MAX];
    TRY(path_make(p->config->out_dir, "model.safetensors", path));
    TRY(path_make(p->config->out_dir, "model.safetensors.part", part));
    int fd = open(part, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0) FAIL(ERR_IO, "%s: %s", part, strerror(errno));
    enum err e = weights_write(p, fd, part);
    if (close(fd) && !e) e = err_set(ERR_IO, "%s: %s", part, strerror(errno));
    if (!e && rename(part, path)) e = err_set(ERR_IO, "%s: %s", path, strerror(errno));
    if (e) unlink(part);
    return e;
}

/* --- the files beside it --- */

static enum err file_copy(const char *from_dir, const char *to_dir, const char *name)
{
    char from[PATH_MAX], to[PATH_MAX];
    struct buf bytes;
    TRY(path_make(from_dir, name, from));
    TRY(path_make(to_dir, name, to));
    buf_init(&bytes, FILE_BYTES_MAX);
    enum err e = buf_read_file(&bytes, from, FILE_BYTES_MAX);
    int fd = e ? -1 : open(to, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (!e && fd < 0) e = err_set(ERR_IO, "%s: %s", to, strerror(errno));
    if (!e) e = bytes_write(fd, to, bytes.data, bytes.n);
    if (fd >= 0 && close(fd) && !e) e = err_set(ERR_IO, "%s: %s", to, strerror(errno));
    buf_fini(&bytes);
    return e;
}

/* Configuration, tokenizer, template, licence: nothing that speaks of other weights. */
static bool is_companion(const char *name)
{
    static const char *const ends[] = {".json", ".jinja", ".model", ".tiktoken"};
    size_t n = strlen(name);
    if (*name == '.' || strstr(name, ".index.json")) return false;
    if (!strncmp(name, "LICENSE", 7) || !strcmp(name, "merges.txt") || !strcmp(name, "vocab.txt"))
        return true;
    for (size_t i = 0; i < sizeof ends / sizeof *ends; i++) {
        size_t m = strlen(ends[i]);
        if (n > m && !strcmp(name + n - m, ends[i])) return true;
    }
    return false;
}

static enum err companions_copy(const struct quantize_config *c)
{
    enum err e = OK;
    DIR *d = opendir(c->model_dir);
    if (!d) FAIL(ERR_NOT_FOUND, "%s: %s", c->model_dir, strerror(errno));
    for (struct dirent *entry; !e && (entry = readdir(d));) {
        char path[PATH_MAX];
        struct stat st;
        if (!is_companion(entry->d_name)) continue;
        e = path_make(c->model_dir, entry->d_name, path);
        if (!e && !stat(path, &st) && S_ISREG(st.st_mode))
            e = file_copy(c->model_dir, c->out_dir, entry->d_name);
    }
    closedir(d);
    return e;
}

/* The folder must be there, hold no weights, and not be the model's own. */
static enum err out_check(const struct quantize_config *c)
{
    struct stat in, out;
    char path[PATH_MAX];
    if (mkdir(c->out_dir, 0755) && errno != EEXIST)
        FAIL(ERR_IO, "%s: %s", c->out_dir, strerror(errno));
    if (stat(c->out_dir, &out) || !S_ISDIR(out.st_mode))
        FAIL(ERR_INVALID, "--out %s: not a directory", c->out_dir);
    if (!stat(c->model_dir, &in) && in.st_dev == out.st_dev && in.st_ino == out.st_ino)
        FAIL(ERR_INVALID, "--out %s is the model's own directory", c->out_dir);
    TRY(path_make(c->out_dir, "model.safetensors", path));
    if (!access(path, F_OK)) FAIL(ERR_INVALID, "%s is there already", path);
    return OK;
}

/* --- the whole --- */

static enum err format_read(const char *option, const char *word, enum weight_format *out)
{
    *out = !strcmp(word, "int8") ? WEIGHT_INT8 : !strcmp(word, "int4") ? WEIGHT_INT4 : WEIGHT_AUTO;
    if (!*out) FAIL(ERR_INVALID, "%s %.16s: int8 or int4", option, word);
    return OK;
}

static enum err formats_read(const struct quantize_config *c, struct weights_options *out)
{
    TRY(format_read("--format", c->format, &out->format));
    return format_read("--head-format", c->head_format, &out->head_format);
}

static enum err model_make(struct packer *p)
{
    const struct quantize_config *c = p->config;
    struct weights_options *o = &p->options;
    struct backend_options device = {.n_threads = c->n_threads,
                                     .numa_node = -1,
                                     .n_slots_max = 1,
                                     .n_tokens_max = 1,
                                     .n_rows_max = 1};
    bool packed = false;
    struct packed_file already;
    *o = (struct weights_options){.model_dir = c->model_dir,
                                  .dummy = c->dummy,
                                  .seed = c->seed,
                                  .format = o->format,
                                  .head_format = o->head_format,
                                  .context_max = CONTEXT,
                                  .n_threads = c->n_threads};
    TRY(config_read(c->model_dir, &p->model_config));
    if (p->model_config.quant.method)
        FAIL(ERR_INVALID, "%s: its weights are quantized already, by %s", p->model_config.path,
             quant_name(p->model_config.quant.method));
    device.vocab_size = p->model_config.vocab_size;
    if (o->context_max > p->model_config.context_max) o->context_max = p->model_config.context_max;
    TRY(backend_open("cpu", &device, &p->backend));
    if (!c->dummy) {
        struct safetensors *probe;
        TRY(safetensors_open(c->model_dir, &probe));
        enum err e = packed_read(probe, &packed, &already);
        safetensors_close(probe);
        TRY(e);
    }
    if (packed) FAIL(ERR_INVALID, "%s: its weights are quantized already", c->model_dir);
    TRY(model_load(o, &p->model_config, (struct group){0, 1}, p->backend, &p->model));
    p->model_config.tied = p->model->config.tied;
    return source_init(&p->source, &p->model_config, p->model->file, c->seed);
}

enum err model_quantize(const struct quantize_config *config, struct quantize_report *out)
{
    struct quantize_config c = *config;
    struct packer *p;
    int64_t begin = clock_monotonic_us();
    enum err e = OK;
    if (!c.head_format || !strcmp(c.head_format, "auto")) c.head_format = "int8";
    TRY(MEM_NEW(&p));
    p->config = &c;
    p->end = &p->first;
    arena_init(&p->arena, 1 << 16, 0);
    buf_init(&p->digests, 0);
    TRY_OUT(formats_read(&c, &p->options));
    TRY_OUT(out_check(&c));
    TRY_OUT(model_make(p));
    TRY_OUT(entries_make(p));
    TRY_OUT(companions_copy(&c));
    TRY_OUT(file_write(p));
    *out = (struct quantize_report){.bytes_before = config_parameters(&p->model_config) *
                                                    dtype_bytes(p->model_config.dtype),
                                    .bytes_after = p->model->weight_bytes + p->model->table_bytes,
                                    .seconds = (double)(clock_monotonic_us() - begin) / 1e6};
out:
    source_fini(&p->source);
    model_unload(p->model);
    if (p->backend) p->backend->ops->close(p->backend);
    buf_fini(&p->digests);
    arena_fini(&p->arena);
    mem_free(p);
    return e;
}
