/* Maps safetensors files and refuses whatever breaks a rule of the format.
 *
 * Each file is checked alone (header, offsets, coverage); then all tensors are sorted by name,
 * which shows doubles between shards and makes finding a binary search. */
#include "base/safetensors.h"
#include "base/arena.h"
#include "base/buf.h"
#include "base/json.h"
#include "base/mem.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { FILES_MAX = 4096, DIMS_MAX = 32 };
static const size_t header_bytes_max = 100000000, index_bytes_max = 100000000;

struct file {
    char *path;
    const uint8_t *map; /* [bytes] */
    size_t bytes;
    bool mapped;
};

struct word {
    char *key, *value;
    struct word *next;
};

struct safetensors {
    struct file *files; /* [n_files] */
    int n_files;
    struct word *words, **words_end; /* of every '__metadata__', in the order read */
    struct st_tensor *tensors;       /* [n_tensors] ascending names */
    size_t n_tensors, tensors_capacity;
    struct arena arena; /* names and shapes */
};

static const struct {
    const char *name;
    int bits;
} dtypes[ST_DTYPE_COUNT] = {
#define X(value, name, bits) [value] = {name, bits},
    ST_DTYPE_TABLE(X)
#undef X
};

const char *st_dtype_name(enum st_dtype t)
{
    return (unsigned)t < ST_DTYPE_COUNT ? dtypes[t].name : "?";
}

size_t safetensors_count(const struct safetensors *s)
{
    return s->n_tensors;
}

const struct st_tensor *safetensors_at(const struct safetensors *s, size_t i)
{
    ASSERT_CMP(i, <, s->n_tensors);
    return &s->tensors[i];
}

const char *safetensors_file(const struct safetensors *s, int file_index)
{
    ASSERT(file_index >= 0 && file_index < s->n_files);
    return s->files[file_index].path;
}

static int name_compare(const void *a, const void *b)
{
    return strcmp(((const struct st_tensor *)a)->name, ((const struct st_tensor *)b)->name);
}

static int place_compare(const void *a, const void *b)
{
    const struct st_tensor *x = a, *y = b;
    if (x->data != y->data) return (const char *)x->data < (const char *)y->data ? -1 : 1;
    return x->bytes < y->bytes ? -1 : x->bytes > y->bytes;
}

const struct st_tensor *safetensors_find(const struct safetensors *s, const char *name)
{
    struct st_tensor key = {.name = name};
    return bsearch(&key, s->tensors, s->n_tensors, sizeof key, name_compare);
}

const char *safetensors_metadata(const struct safetensors *s, const char *key)
{
    for (const struct word *w = s->words; w; w = w->next)
        if (!strcmp(w->key, key)) return w->value;
    return NULL;
}

void safetensors_drop(const struct safetensors *s, const struct st_tensor *t)
{
    const struct file *f = &s->files[t->file_index];
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    uintptr_t begin = ((uintptr_t)t->data + page - 1) & ~(page - 1);
    uintptr_t end = ((uintptr_t)t->data + t->bytes) & ~(page - 1);
    if (f->mapped && begin < end) madvise((void *)begin, end - begin, MADV_DONTNEED);
}

/* --- one tensor's row of the header --- */

static enum err dtype_find(const struct file *f, const char *name, const json_t *row,
                           enum st_dtype *out)
{
    const char *text = json_string_value(json_object_get(row, "dtype"));
    if (!text) FAIL(ERR_FORMAT, "%s: tensor '%s': 'dtype' is missing or no string", f->path, name);
    for (int t = 0; t < ST_DTYPE_COUNT; t++) {
        if (!strcmp(text, dtypes[t].name)) {
            *out = (enum st_dtype)t;
            return OK;
        }
    }
    FAIL(ERR_FORMAT, "%s: tensor '%s': unknown dtype '%.32s'", f->path, name, text);
}

/* Reads the shape and counts its elements. */
static enum err shape_read(struct safetensors *s, const struct file *f, const json_t *row,
                           struct st_tensor *t, size_t *out_elements)
{
    const json_t *shape = json_object_get(row, "shape");
    if (!json_is_array(shape))
        FAIL(ERR_FORMAT, "%s: tensor '%s': 'shape' is missing or no array", f->path, t->name);
    size_t n = json_array_size(shape), elements = 1;
    if (n > DIMS_MAX)
        FAIL(ERR_FORMAT, "%s: tensor '%s': %zu dimensions, at most %d", f->path, t->name, n,
             DIMS_MAX);
    void *mem;
    TRY(arena_alloc_array(&s->arena, n, sizeof(int64_t), &mem));
    int64_t *dims = mem;
    for (size_t i = 0; i < n; i++) {
        const json_t *d = json_array_get(shape, i);
        if (!json_is_integer(d) || json_integer_value(d) < 0)
            FAIL(ERR_FORMAT, "%s: tensor '%s': dimension %zu of the shape is no count", f->path,
                 t->name, i);
        dims[i] = json_integer_value(d);
        if (!size_mul(elements, (size_t)dims[i], &elements))
            FAIL(ERR_FORMAT, "%s: tensor '%s': its shape overflows", f->path, t->name);
    }
    t->n_dims = (int)n;
    t->shape = dims;
    *out_elements = elements;
    return OK;
}

static enum err offsets_read(const struct file *f, const char *name, const json_t *row,
                             size_t data_bytes, size_t *out_begin, size_t *out_end)
{
    const json_t *pair = json_object_get(row, "data_offsets");
    const json_t *b = json_array_get(pair, 0), *e = json_array_get(pair, 1);
    if (json_array_size(pair) != 2 || !json_is_integer(b) || !json_is_integer(e))
        FAIL(ERR_FORMAT, "%s: tensor '%s': 'data_offsets' must be two integers", f->path, name);
    int64_t begin = json_integer_value(b), end = json_integer_value(e);
    if (begin < 0 || end < begin)
        FAIL(ERR_FORMAT, "%s: tensor '%s': data_offsets [%lld, %lld] are no range", f->path, name,
             (long long)begin, (long long)end);
    if ((uint64_t)end > data_bytes)
        FAIL(ERR_FORMAT,
             "%s: tensor '%s' ends at data byte %lld, but the file holds only %zu: it is cut short "
             "or damaged",
             f->path, name, (long long)end, data_bytes);
    *out_begin = (size_t)begin;
    *out_end = (size_t)end;
    return OK;
}

static enum err tensor_read(struct safetensors *s, int file_index, const char *name,
                            const json_t *row, const uint8_t *data, size_t data_bytes,
                            struct st_tensor *out)
{
    const struct file *f = &s->files[file_index];
    struct st_tensor t = {.file_index = file_index};
    char *copy;
    TRY(arena_copy_string(&s->arena, name, strlen(name), &copy));
    t.name = copy;
    if (!json_is_object(row))
        FAIL(ERR_FORMAT, "%s: tensor '%s': its entry is no object", f->path, name);
    TRY(dtype_find(f, name, row, &t.dtype));
    size_t elements, bits, begin, end;
    TRY(shape_read(s, f, row, &t, &elements));
    TRY(offsets_read(f, name, row, data_bytes, &begin, &end));
    if (!size_mul(elements, (size_t)dtypes[t.dtype].bits, &bits))
        FAIL(ERR_FORMAT, "%s: tensor '%s': its shape overflows", f->path, name);
    if (bits % 8)
        FAIL(ERR_FORMAT, "%s: tensor '%s': %zu bits are no whole bytes", f->path, name, bits);
    if (bits / 8 != end - begin)
        FAIL(ERR_FORMAT,
             "%s: tensor '%s': %s with its shape needs %zu bytes, data_offsets give %zu", f->path,
             name, dtypes[t.dtype].name, bits / 8, end - begin);
    t.data = data + begin;
    t.bytes = end - begin;
    *out = t;
    return OK;
}

/* --- one file --- */

static enum err metadata_read(struct safetensors *s, const struct file *f, const json_t *metadata)
{
    const char *key;
    json_t *value;
    if (!json_is_object(metadata)) FAIL(ERR_FORMAT, "%s: '__metadata__' is no object", f->path);
    json_object_foreach((json_t *)metadata, key, value)
    {
        if (!json_is_string(value))
            FAIL(ERR_FORMAT, "%s: '__metadata__' value of '%.64s' is no string", f->path, key);
        struct word *w;
        TRY(arena_alloc(&s->arena, sizeof *w, (void **)&w));
        TRY(arena_copy_string(&s->arena, key, strlen(key), &w->key));
        TRY(arena_copy_string(&s->arena, json_string_value(value), json_string_length(value),
                              &w->value));
        *s->words_end = w;
        s->words_end = &w->next;
    }
    return OK;
}

/* The data must be covered exactly once; tensors [first, n_tensors) are this file's. */
static enum err coverage_check(struct safetensors *s, const struct file *f, size_t first,
                               const uint8_t *data, size_t data_bytes)
{
    if (s->n_tensors > first)
        qsort(s->tensors + first, s->n_tensors - first, sizeof *s->tensors, place_compare);
    size_t covered = 0;
    for (size_t i = first; i < s->n_tensors; i++) {
        const struct st_tensor *t = &s->tensors[i];
        size_t begin = (size_t)((const uint8_t *)t->data - data);
        if (begin < covered)
            FAIL(ERR_FORMAT, "%s: tensor '%s' overlaps '%s'", f->path, t->name,
                 s->tensors[i - 1].name);
        if (begin > covered)
            FAIL(ERR_FORMAT, "%s: hole of %zu bytes before tensor '%s'", f->path, begin - covered,
                 t->name);
        covered = begin + t->bytes;
    }
    if (covered != data_bytes)
        FAIL(ERR_FORMAT, "%s: %zu bytes at its end belong to no tensor", f->path,
             data_bytes - covered);
    return OK;
}

static enum err tensors_reserve(struct safetensors *s, size_t more)
{
    if (s->n_tensors + more <= s->tensors_capacity) return OK;
    size_t capacity = s->n_tensors + more, bytes;
    void *p = s->tensors;
    if (!size_mul(capacity, sizeof *s->tensors, &bytes)) FAIL(ERR_NO_MEMORY, "too many tensors");
    TRY(mem_resize(&p, bytes));
    s->tensors = p;
    s->tensors_capacity = capacity;
    return OK;
}

static enum err header_walk(struct safetensors *s, int file_index, const json_t *root,
                            const uint8_t *data, size_t data_bytes)
{
    const struct file *f = &s->files[file_index];
    const char *key;
    json_t *value;
    size_t first = s->n_tensors;
    if (!json_is_object(root)) FAIL(ERR_FORMAT, "%s: the header is no JSON object", f->path);
    TRY(tensors_reserve(s, json_object_size(root)));
    json_object_foreach((json_t *)root, key, value)
    {
        if (!strcmp(key, "__metadata__")) {
            TRY(metadata_read(s, f, value));
            continue;
        }
        TRY(tensor_read(s, file_index, key, value, data, data_bytes, &s->tensors[s->n_tensors]));
        s->n_tensors++;
    }
    return coverage_check(s, f, first, data, data_bytes);
}

static enum err file_parse(struct safetensors *s, int file_index)
{
    const struct file *f = &s->files[file_index];
    uint64_t header_bytes = 0;
    if (f->bytes < 8)
        FAIL(ERR_FORMAT, "%s: %zu bytes are too few for a header length", f->path, f->bytes);
    for (int i = 0; i < 8; i++)
        header_bytes |= (uint64_t)f->map[i] << (8 * i);
    if (header_bytes > header_bytes_max)
        FAIL(ERR_FORMAT, "%s: header of %llu bytes, at most %zu", f->path,
             (unsigned long long)header_bytes, header_bytes_max);
    if (header_bytes > f->bytes - 8)
        FAIL(ERR_FORMAT, "%s: header of %llu bytes in a file of %zu: it is cut short or damaged",
             f->path, (unsigned long long)header_bytes, f->bytes);
    json_t *root;
    if (json_parse((const char *)f->map + 8, (size_t)header_bytes, &root)) {
        char why[256];
        snprintf(why, sizeof why, "%s", err_detail());
        FAIL(ERR_FORMAT, "%s: header: %s", f->path, why);
    }
    enum err e = header_walk(s, file_index, root, f->map + 8 + header_bytes,
                             f->bytes - 8 - (size_t)header_bytes);
    json_decref(root);
    return e;
}

static enum err file_map(const char *path, struct file *f)
{
    struct stat st;
    f->path = mem_strdup(path);
    if (!f->path) FAIL(ERR_NO_MEMORY, "out of memory for a path");
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) FAIL(errno == ENOENT ? ERR_NOT_FOUND : ERR_IO, "%s: %s", path, strerror(errno));
    if (fstat(fd, &st) || !S_ISREG(st.st_mode)) {
        close(fd);
        FAIL(ERR_IO, "%s: not a regular file", path);
    }
    f->bytes = (size_t)st.st_size;
    void *map = f->bytes ? mmap(NULL, f->bytes, PROT_READ, MAP_PRIVATE, fd, 0) : NULL;
    int why = errno;
    close(fd);
    if (map == MAP_FAILED) FAIL(ERR_IO, "%s: cannot map: %s", path, strerror(why));
    f->map = map;
    f->mapped = map != NULL;
    return OK;
}

static enum err file_add(struct safetensors *s, const char *path)
{
    void *p = s->files;
    if (s->n_files >= FILES_MAX) FAIL(ERR_FORMAT, "%s: more than %d files", path, FILES_MAX);
    TRY(mem_resize(&p, (size_t)(s->n_files + 1) * sizeof *s->files));
    s->files = p;
    s->files[s->n_files] = (struct file){0};
    s->n_files++;
    TRY(file_map(path, &s->files[s->n_files - 1]));
    return file_parse(s, s->n_files - 1);
}

/* --- all files --- */

/* Sorts by name; a name twice is refused. */
static enum err names_finish(struct safetensors *s)
{
    if (s->n_tensors) qsort(s->tensors, s->n_tensors, sizeof *s->tensors, name_compare);
    for (size_t i = 1; i < s->n_tensors; i++) {
        const struct st_tensor *a = &s->tensors[i - 1], *b = &s->tensors[i];
        if (!strcmp(a->name, b->name))
            FAIL(ERR_FORMAT, "%s: tensor '%s' is also in %s", safetensors_file(s, b->file_index),
                 b->name, safetensors_file(s, a->file_index));
    }
    return OK;
}

static int file_find(const struct safetensors *s, const char *path)
{
    for (int i = 0; i < s->n_files; i++)
        if (!strcmp(s->files[i].path, path)) return i;
    return -1;
}

/* A shard's name stays in the folder. */
static enum err shard_path(const char *dir, const char *index_path, const char *name,
                           char out[PATH_MAX])
{
    if (!*name || strchr(name, '/') || !strcmp(name, "..") || !strcmp(name, "."))
        FAIL(ERR_FORMAT, "%s: '%.128s' is no name of a file in this folder", index_path, name);
    if (snprintf(out, PATH_MAX, "%s/%s", dir, name) >= PATH_MAX)
        FAIL(ERR_FORMAT, "%s: the name '%.64s...' is too long", index_path, name);
    return OK;
}

static enum err shards_add(struct safetensors *s, const char *dir, const char *index_path,
                           const json_t *map)
{
    const char *tensor;
    json_t *value;
    char path[PATH_MAX];
    json_object_foreach((json_t *)map, tensor, value)
    {
        if (!json_is_string(value))
            FAIL(ERR_FORMAT, "%s: the file of tensor '%.128s' is no string", index_path, tensor);
        TRY(shard_path(dir, index_path, json_string_value(value), path));
        if (file_find(s, path) < 0) TRY(file_add(s, path));
    }
    TRY(names_finish(s));
    json_object_foreach((json_t *)map, tensor, value)
    {
        const struct st_tensor *t = safetensors_find(s, tensor);
        TRY(shard_path(dir, index_path, json_string_value(value), path));
        if (!t || strcmp(safetensors_file(s, t->file_index), path))
            FAIL(ERR_FORMAT, "%s: tensor '%.128s' is not in %s, where the index places it",
                 index_path, tensor, json_string_value(value));
    }
    return OK;
}

static enum err index_open(struct safetensors *s, const char *dir, const char *index_path)
{
    json_t *root;
    TRY(json_parse_file(index_path, index_bytes_max, &root));
    const json_t *map = json_object_get(root, "weight_map");
    enum err e;
    if (!json_is_object(map) || !json_object_size(map))
        e = err_set(ERR_FORMAT, "%s: 'weight_map' is missing or empty", index_path);
    else
        e = shards_add(s, dir, index_path, map);
    json_decref(root);
    return e;
}

/* Without an index and without model.safetensors: the only *.safetensors of the folder. */
static enum err lone_file_find(const char *dir, char out[PATH_MAX])
{
    DIR *d = opendir(dir);
    int n = 0;
    bool other = false;
    if (!d) FAIL(ERR_NOT_FOUND, "%s: %s", dir, strerror(errno));
    for (struct dirent *entry; (entry = readdir(d));) {
        size_t len = strlen(entry->d_name);
        if (len > 12 && !strcmp(entry->d_name + len - 12, ".safetensors") && n++ == 0)
            snprintf(out, PATH_MAX, "%s/%s", dir, entry->d_name);
        if (len > 4 &&
            (!strcmp(entry->d_name + len - 4, ".bin") || !strcmp(entry->d_name + len - 4, ".pth")))
            other = true;
    }
    closedir(d);
    if (n == 1) return OK;
    if (n > 1)
        FAIL(ERR_NOT_FOUND,
             "%s: %d safetensors files, but no model.safetensors.index.json says which tensor is "
             "where",
             dir, n);
    FAIL(ERR_NOT_FOUND, "%s: no model.safetensors%s", dir,
         other ? " (there are PyTorch pickles, which are not read: convert them)" : "");
}

static enum err path_open(struct safetensors *s, const char *path)
{
    struct stat st;
    char file[PATH_MAX];
    if (stat(path, &st)) FAIL(ERR_NOT_FOUND, "%s: %s", path, strerror(errno));
    if (!S_ISDIR(st.st_mode)) {
        TRY(file_add(s, path));
        return names_finish(s);
    }
    if (snprintf(file, sizeof file, "%s/model.safetensors.index.json", path) >= (int)sizeof file)
        FAIL(ERR_INVALID, "%.64s...: the path is too long", path);
    if (!access(file, F_OK)) return index_open(s, path, file);
    snprintf(file, sizeof file, "%s/model.safetensors", path);
    if (access(file, F_OK)) TRY(lone_file_find(path, file));
    TRY(file_add(s, file));
    return names_finish(s);
}

static enum err bytes_open(struct safetensors *s, const char *name, const void *bytes, size_t n)
{
    TRY(MEM_NEW(&s->files));
    s->n_files = 1;
    s->files[0].path = mem_strdup(name);
    if (!s->files[0].path) FAIL(ERR_NO_MEMORY, "out of memory for a name");
    s->files[0].map = bytes;
    s->files[0].bytes = n;
    TRY(file_parse(s, 0));
    return names_finish(s);
}

static enum err safetensors_new(struct safetensors **out)
{
    TRY(MEM_NEW(out));
    (*out)->words_end = &(*out)->words;
    arena_init(&(*out)->arena, 1 << 16, 0);
    return OK;
}

enum err safetensors_open(const char *path, struct safetensors **out)
{
    struct safetensors *s;
    TRY(safetensors_new(&s));
    enum err e = path_open(s, path);
    if (e)
        safetensors_close(s);
    else
        *out = s;
    return e;
}

enum err safetensors_open_bytes(const char *name, const void *bytes, size_t n,
                                struct safetensors **out)
{
    struct safetensors *s;
    TRY(safetensors_new(&s));
    enum err e = bytes_open(s, name, bytes, n);
    if (e)
        safetensors_close(s);
    else
        *out = s;
    return e;
}

void safetensors_close(struct safetensors *s)
{
    if (!s) return;
    for (int i = 0; i < s->n_files; i++) {
        if (s->files[i].mapped) munmap((void *)s->files[i].map, s->files[i].bytes);
        mem_free(s->files[i].path);
    }
    mem_free(s->files);
    mem_free(s->tensors);
    arena_fini(&s->arena);
    mem_free(s);
}
