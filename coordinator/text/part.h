/* What the parts of a tokenizer file share: reading typed JSON objects, patterns.
 *
 * Each pipeline (normalizers, pre-tokenizers, decoders) is a flat array of steps; a step's kind is
 * the "type" in the file, looked up in the table of that pipeline, and "Sequence" nests. */
#pragma once
#include "base/buf.h"
#include "base/json.h"
#include "coordinator/text/regex.h"

enum { PART_STEPS_MAX = 64, PART_DEPTH_MAX = 8, PART_STRING_BYTES_MAX = 1 << 16 };

/* What a step looks for: a literal text or a regular expression. */
struct pattern {
    char *literal; /* NULL when it is a regex */
    size_t n;
    struct regex *regex;
};

/* Reads {"String": s} or {"Regex": s} (or a plain string) at object[key]. */
enum err pattern_read(const json_t *object, const char *key, struct pattern *out);
void pattern_fini(struct pattern *p);
/* The first match at or after `from`. An empty literal matches nothing. */
enum err pattern_find(const struct pattern *p, struct regex_scratch *s, const char *text, size_t n,
                      size_t from, size_t *out_start, size_t *out_end, bool *out_found);

/* Appends text[n] with every match of p replaced by content. */
enum err pattern_replace(const struct pattern *p, struct regex_scratch *s, const char *content,
                         const char *text, size_t n, struct buf *out);

/* The "type" of a part; ERR_FORMAT when the object has none. where names the pipeline. */
enum err part_type(const json_t *object, const char *where, const char **out);
/* A copy of the string at key, or of fallback when absent; owned by the caller. */
enum err part_string(const json_t *object, const char *key, const char *fallback, char **out);
enum err part_bool(const json_t *object, const char *key, bool fallback, bool *out);
enum err part_int(const json_t *object, const char *key, int64_t max, int64_t fallback,
                  int64_t *out);
