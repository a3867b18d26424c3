/* Regular expressions of tokenizer files, by PCRE2 with JIT and limits.
 *
 * The files are written for Oniguruma's Ruby syntax; where the two disagree on what such files use
 * (\s, \w, \h), the pattern is rewritten, and what cannot be said in PCRE2 (class intersections,
 * nested classes) is refused by name. Subjects are valid UTF-8.
 *
 * It must never see a pattern from a request. */
#pragma once
#include "base/buf.h"

struct regex;
struct regex_scratch; /* what one thread needs while matching */

/* ERR_FORMAT with the offset in the pattern, ERR_UNSUPPORTED. */
enum err regex_compile(const char *pattern, size_t n, struct regex **out);
void regex_destroy(struct regex *r); /* accepts NULL */

enum err regex_scratch_create(struct regex_scratch **out);
void regex_scratch_destroy(struct regex_scratch *s); /* accepts NULL */

/* The first match at or after `from`; *out_found tells whether there is one. ERR_INVALID when the
 * match limit is exceeded. */
enum err regex_find(const struct regex *r, struct regex_scratch *s, const char *text, size_t n,
                    size_t from, size_t *out_start, size_t *out_end, bool *out_found);
