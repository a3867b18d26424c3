/* The values that a template computes with: Python's, as far as templates can see them.
 *
 * Values live in the arena of one rendering; strings may also be borrowed from the template's
 * source or from the context. Only lists (pop) and namespaces ever change. It must never know
 * syntax. */
#pragma once
#include "base/arena.h"
#include "base/buf.h"
#include "base/json.h"

#include <stdint.h>

enum value_kind {
    VALUE_UNDEFINED,
    VALUE_NONE,
    VALUE_BOOL,
    VALUE_INT,
    VALUE_FLOAT,
    VALUE_STRING,
    VALUE_LIST,
    VALUE_DICT,
    VALUE_NAMESPACE, /* a dict whose attributes may be set */
    VALUE_LOOP,
    VALUE_MACRO,
    VALUE_FUNCTION, /* a global, or an object's method */
    VALUE_JOINER,
    VALUE_CYCLER,
};

/* Everything that is a row of values, told apart where Python would. */
enum list_kind {
    LIST_LIST,
    LIST_TUPLE,
    LIST_GROUP, /* what groupby makes: a tuple with the names grouper and list */
    LIST_RANGE,
    LIST_VIEW,      /* of a dict: has a length, cannot be indexed */
    LIST_GENERATOR, /* can be walked once; has neither length nor index */
};

struct value {
    enum value_kind kind;
    union {
        bool boolean;
        int64_t integer;
        double number;
        struct span string;
        struct list *list;
        struct dict *dict;
        struct loop *loop;
        const struct macro *macro;
        struct function *function;
        struct cycler *cycler;
        const char *hint; /* of an undefined value: what is undefined, in words, or NULL */
    };
};

struct list {
    enum list_kind kind;
    const char *view_name; /* LIST_VIEW: dict_keys ... */
    struct value *items;   /* [capacity], the first n are set */
    size_t n, capacity;
    size_t taken; /* LIST_GENERATOR: already walked over */
};

struct dict {
    struct {
        struct value key, value;
    } * entries; /* [capacity], in order of insertion */
    size_t n, capacity;
};

struct cycler { /* also the joiner: whether it was used */
    struct value *items;
    size_t n, at;
};

struct render;
struct args;
typedef enum err function_call(struct render *r, struct value self, const struct args *args,
                               struct value *out);

struct function {
    const char *name;
    function_call *call;
    struct value self; /* the object a method belongs to */
};

static inline struct value value_none(void)
{
    return (struct value){.kind = VALUE_NONE};
}

static inline struct value value_undefined(const char *hint)
{
    return (struct value){.kind = VALUE_UNDEFINED, .hint = hint};
}

static inline struct value value_bool(bool b)
{
    return (struct value){.kind = VALUE_BOOL, .boolean = b};
}

static inline struct value value_int(int64_t i)
{
    return (struct value){.kind = VALUE_INT, .integer = i};
}

static inline struct value value_float(double f)
{
    return (struct value){.kind = VALUE_FLOAT, .number = f};
}

static inline struct value value_span(const char *s, size_t n)
{
    return (struct value){.kind = VALUE_STRING, .string = {s, n}};
}

static inline struct value value_string(const char *s)
{
    return value_span(s, __builtin_strlen(s));
}

/* Copies s into the arena. */
enum err value_copy_string(struct arena *a, const char *s, size_t n, struct value *out);
enum err value_new_list(struct arena *a, enum list_kind kind, struct value *out);
enum err value_new_dict(struct arena *a, struct value *out);
enum err list_add(struct arena *a, struct list *list, struct value item);
/* Replaces the value of an equal key. */
enum err dict_set(struct arena *a, struct dict *dict, struct value key, struct value value);
/* NULL when absent. */
const struct value *dict_find(const struct dict *dict, struct value key);
const struct value *dict_find_text(const struct dict *dict, const char *key);
/* A JSON document; strings stay the document's. */
enum err value_from_json(struct arena *a, const json_t *json, int depth, struct value *out);

bool value_is_true(struct value v);
bool value_is_number(struct value v); /* booleans are numbers too */
bool value_is_text(struct value v, const char *text);
double value_as_number(struct value v); /* of a number */
int64_t value_as_int(struct value v);   /* of a boolean or an integer */
/* Equality of values that share parts may take exponential time, so comparisons are counted, per
 * thread: whoever budgets steps takes the count with value_take_work. A comparison that gives up
 * says "unequal" and counts as more than any budget. */
bool value_equal(struct value a, struct value b);
size_t value_take_work(void);
/* <0, 0, >0 in *out; ERR_INVALID when Python has no order for the two. */
enum err value_compare(struct value a, struct value b, int *out);
/* The type's name in error messages. */
const char *value_type_name(struct value v);

/* Appends str(v) and repr(v). */
enum err value_write(struct value v, struct buf *out);
enum err value_write_repr(struct value v, int depth, struct buf *out);
enum err value_write_float(double f, struct buf *out);

/* Lengths and places in characters. */
size_t text_length(struct span s);
/* The byte where character `at` begins; s.n when there are fewer. */
size_t text_offset(struct span s, size_t at);

enum { VALUE_DEPTH_MAX = 512 };
