/* JSON: reading by jansson behind typed getters that name what is wrong, writing by hand.
 *
 * Reading refuses bad UTF-8, duplicate keys and trailing bytes; depth is jansson's limit (2048).
 * Every getter leaves its output at the caller's default when the key is absent or null, and fails
 * with ERR_INVALID naming the key when the type or the range is wrong. */
#pragma once
#include "base/buf.h"
#include <jansson.h>

/* Parses one document. The caller json_decref()s it. ERR_INVALID says line and column. */
enum err json_parse(const char *text, size_t n, json_t **out);
enum err json_parse_file(const char *path, size_t limit_bytes, json_t **out);

enum err json_read_string(const json_t *object, const char *key, const char **out);
enum err json_read_bool(const json_t *object, const char *key, bool *out);
enum err json_read_int(const json_t *object, const char *key, int64_t min, int64_t max, int64_t *out);
enum err json_read_number(const json_t *object, const char *key, double min, double max, double *out);

/* Appends a JSON string with its quotes. Bytes that are not UTF-8 become U+FFFD. */
enum err json_write_string(struct buf *b, const char *s, size_t n);
