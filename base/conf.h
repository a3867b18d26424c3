/* Options as rows of one table: a flag, an environment variable and a key of the YAML file each.
 *
 * Values are set in the order default < YAML file < environment < flags; the later wins. A row says
 * name, type, range, default, help and the verbs that take it; one row adds an option everywhere,
 * its documentation included. Values are written into a struct of the caller at row->offset:
 * CONF_STRING const char *, CONF_INT int64_t, CONF_NUMBER double, CONF_BOOL bool, CONF_BYTES
 * int64_t (accepts 512M, 4G, 1.5GiB), CONF_CHOICE const char * (one of row->choices).
 * Strings live as long as the struct conf. */
#pragma once
#include "base/arena.h"
#include "base/buf.h"
#include <stdint.h>

enum conf_kind { CONF_STRING, CONF_INT, CONF_NUMBER, CONF_BOOL, CONF_BYTES, CONF_CHOICE };
enum conf_source { CONF_FROM_DEFAULT, CONF_FROM_FILE, CONF_FROM_ENV, CONF_FROM_FLAG };

struct conf_row {
    const char *name;     /* "max-num-seqs": flag --max-num-seqs, HEDDLE_MAX_NUM_SEQS, YAML the same */
    const char *aliases;  /* "max-running-requests np": more flags, blank-separated; NULL = none */
    enum conf_kind kind;
    size_t offset;
    double min, max;      /* CONF_INT, CONF_NUMBER, CONF_BYTES */
    const char *standard; /* default as text; NULL = NULL or 0 */
    const char *choices;  /* "auto cpu cuda" */
    unsigned verbs;       /* bit set */
    const char *group;    /* heading in --help */
    const char *help;
};

/* A flag people know from elsewhere that we do not have, and what to do instead. */
struct conf_refusal {
    const char *name, *advice;
};

enum { CONF_ROWS_MAX = 160, CONF_POSITIONALS_MAX = 64 };
struct conf {
    const struct conf_row *rows;
    int n_rows;
    const struct conf_refusal *refusals; /* ends with a NULL name */
    unsigned verb;
    void *values;
    struct arena arena;
    unsigned char source[CONF_ROWS_MAX]; /* enum conf_source of each row */
    const char *positionals[CONF_POSITIONALS_MAX];
    int n_positionals;
    bool help; /* --help or -h was given */
};

/* Sets defaults, then reads file (if --config or HEDDLE_CONFIG names one), environment and argv[1..).
 * ERR_INVALID names the option, where it came from, and the nearest known name. */
enum err conf_init(struct conf *c, const struct conf_row *rows, int n_rows, const struct conf_refusal *refusals,
                   unsigned verb, void *values);
void conf_fini(struct conf *c);
enum err conf_read(struct conf *c, int argc, char **argv);
enum err conf_read_yaml(struct conf *c, const char *path);
enum err conf_set(struct conf *c, const char *name, const char *value, enum conf_source source);
const struct conf_row *conf_find(const struct conf *c, const char *name);
/* The value of a row as text that conf_set would take; false when it is unset. */
bool conf_value_text(const struct conf *c, const struct conf_row *row, char *out, size_t size);
/* Help of every row of the verb, by group. */
enum err conf_help(const struct conf *c, struct buf *out);
