/* What templates find ready: filters, tests, global functions, methods of values. */
#pragma once
#include "coordinator/text/template_value.h"

struct filter_row {
    const char *name;
    function_call *call; /* self is what is filtered */
};

typedef enum err test_call(struct render *r, struct value v, const struct args *args, bool *out);
struct test_row {
    const char *name;
    test_call *call;
};

/* NULL when there is none of that name. */
const struct filter_row *builtin_filter(const char *name);
const struct test_row *builtin_test(const char *name);
const struct function *builtin_global(const char *name);
/* The method of v with that name, bound to it; *out_found false when there is none. */
enum err builtin_method(struct render *r, struct value v, const char *name, struct value *out,
                        bool *out_found);

/* ---- Tables in several files ---- */
extern const struct filter_row TEXT_FILTERS[], SEQUENCE_FILTERS[];
extern const struct function STRING_METHODS[]; /* each ends with a row without a name */

/* ---- Arguments ---- */
/* The argument at a place or of a name; NULL when not given. */
const struct value *args_get(const struct args *args, size_t place, const char *name);
enum err args_int(const struct args *args, size_t place, const char *name, int64_t fallback,
                  int64_t *out);
bool args_bool(const struct args *args, size_t place, const char *name, bool fallback);
/* ERR_INVALID unless it is a string; *out is untouched when not given. */
enum err args_text(const struct args *args, size_t place, const char *name, struct span *out);

/* ---- Shared by filters and methods ---- */
enum err text_replace(struct render *r, struct span s, struct span old, struct span new,
                      int64_t count, struct value *out);
enum err text_strip(struct span s, const struct value *characters, bool left, bool right,
                    struct value *out);
enum err text_title(struct render *r, struct span s, struct value *out);
enum err text_capitalize(struct render *r, struct span s, struct value *out);
/* value % arguments */
enum err text_format(struct render *r, struct span format, const struct value *items, size_t n,
                     const struct dict *named, struct value *out);
/* Appends json.dumps of v. indent < 0: on one line. */
struct json_style {
    int64_t indent;
    struct span item_separator, key_separator;
    bool ensure_ascii, sort_keys;
};
enum err value_write_json(struct render *r, struct value v, const struct json_style *style,
                          int depth, struct buf *out);
/* Stable, by merging. */
enum err list_sort(struct render *r, struct value *keys, struct value *items, size_t n,
                   bool reverse);

/* ---- Methods of strings that divide them ---- */
function_call string_split, string_rsplit, string_splitlines, string_partition, string_rpartition;
