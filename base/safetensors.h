/* Weights on disk: one model.safetensors or the shards of model.safetensors.index.json, mapped.
 *
 * A file is 8 bytes of little-endian header length, a JSON header (at most 100 MB), then data.
 * Every rule of the format is checked before a tensor is handed out: offsets inside the data,
 * without overlap or hole, shape times type equal to the bytes, no name twice. A refused file is
 * ERR_FORMAT with a text that names the file, the tensor and the reason. Knows bytes; never models
 * or devices. */
#pragma once
#include "base/err.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*    value               name in the file, bits of an element */
#define ST_DTYPE_TABLE(X)                                                                          \
    X(ST_F32, "F32", 32)                                                                           \
    X(ST_F16, "F16", 16)                                                                           \
    X(ST_BF16, "BF16", 16) X(ST_F64, "F64", 64) X(ST_I8, "I8", 8) X(ST_U8, "U8", 8)                \
        X(ST_I16, "I16", 16) X(ST_U16, "U16", 16) X(ST_I32, "I32", 32) X(ST_U32, "U32", 32)        \
            X(ST_I64, "I64", 64) X(ST_U64, "U64", 64) X(ST_BOOL, "BOOL", 8)                        \
                X(ST_F8_E4M3, "F8_E4M3", 8) X(ST_F8_E5M2, "F8_E5M2", 8)                            \
                    X(ST_F8_E8M0, "F8_E8M0", 8) X(ST_F4, "F4", 4) X(ST_F6_E2M3, "F6_E2M3", 6)      \
                        X(ST_F6_E3M2, "F6_E3M2", 6) X(ST_C64, "C64", 64)
enum st_dtype {
#define X(value, name, bits) value,
    ST_DTYPE_TABLE(X)
#undef X
        ST_DTYPE_COUNT
};
const char *st_dtype_name(enum st_dtype t);

struct st_tensor {
    const char *name;
    enum st_dtype dtype;
    int n_dims;
    const int64_t *shape; /* [n_dims], row-major */
    const void *data;     /* [bytes] inside the mapping */
    size_t bytes;
    int file_index;
};

struct safetensors;
/* path: a folder or one file. ERR_NOT_FOUND when the folder holds no safetensors. */
enum err safetensors_open(const char *path, struct safetensors **out);
/* The same over bytes that stay the caller's; `name` stands for the file in errors. */
enum err safetensors_open_bytes(const char *name, const void *bytes, size_t n,
                                struct safetensors **out);
void safetensors_close(struct safetensors *s); /* accepts NULL */

size_t safetensors_count(const struct safetensors *s);
const struct st_tensor *safetensors_at(const struct safetensors *s, size_t i); /* ascending names */
const struct st_tensor *safetensors_find(const struct safetensors *s,
                                         const char *name); /* or NULL */
const char *safetensors_file(const struct safetensors *s, int file_index);
/* A word of the first file's '__metadata__' that has the key; NULL where none does. */
const char *safetensors_metadata(const struct safetensors *s, const char *key);
/* Tells the system that a tensor's pages will not be read again soon. */
void safetensors_drop(const struct safetensors *s, const struct st_tensor *t);
