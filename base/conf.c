/* Options: one table, four sources. Knows nothing of what an option means. */
#include "base/conf.h"
#include "base/mem.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

/* Whether word is one of the blank-separated words of list. */
static bool list_has(const char *list, const char *word)
{
    size_t n = strlen(word);
    for (const char *p = list; p && *p;) {
        size_t len = strcspn(p, " ");
        if (len == n && !memcmp(p, word, n)) return true;
        p += len + strspn(p + len, " ");
    }
    return false;
}

/* Names are compared with '-' and '_' alike. */
static void canonical(char *out, size_t size, const char *name)
{
    size_t n = 0;
    for (; name[n] && n + 1 < size; n++) out[n] = name[n] == '_' ? '-' : name[n];
    out[n] = 0;
}

const struct conf_row *conf_find(const struct conf *c, const char *name)
{
    char plain[128];
    canonical(plain, sizeof plain, name);
    for (int i = 0; i < c->n_rows; i++)
        if (!strcmp(c->rows[i].name, plain) || list_has(c->rows[i].aliases, plain)) return &c->rows[i];
    return NULL;
}

static enum err parse_number(const char *text, double *out)
{
    char *end;
    errno = 0;
    double d = strtod(text, &end);
    if (end == text || *end || errno || !isfinite(d)) return ERR_INVALID;
    *out = d;
    return OK;
}

static enum err parse_int(const char *text, int64_t *out)
{
    char *end;
    errno = 0;
    long long i = strtoll(text, &end, 10);
    if (end == text || *end || errno) return ERR_INVALID;
    *out = i;
    return OK;
}

/* 1024, 512K, 4G, 1.5GiB: powers of 1024. */
static enum err parse_bytes(const char *text, int64_t *out)
{
    static const char units[] = "KMGT";
    char *end;
    errno = 0;
    double d = strtod(text, &end);
    if (end == text || errno || !isfinite(d)) return ERR_INVALID;
    const char *unit = *end ? strchr(units, toupper((unsigned char)*end)) : NULL;
    if (unit) {
        d *= pow(1024, (double)(unit - units + 1));
        end++;
        if (*end == 'i') end++;
    }
    if (*end == 'B' || *end == 'b') end++;
    if (*end || d < 0 || d > 9e18) return ERR_INVALID;
    *out = (int64_t)d;
    return OK;
}

static enum err parse_bool(const char *text, bool *out)
{
    static const char *const yes[] = {"1", "true", "yes", "on"}, *const no[] = {"0", "false", "no", "off"};
    for (int i = 0; i < 4; i++) {
        if (!strcasecmp(text, yes[i])) return *out = true, OK;
        if (!strcasecmp(text, no[i])) return *out = false, OK;
    }
    return ERR_INVALID;
}

static const char *const source_names[] = {"default", "configuration file", "environment", "flag"};
static const char *const kind_names[] = {"text", "a whole number", "a number", "true or false",
                                         "a size such as 512M or 4G", "one of the choices"};

static enum err refuse(const struct conf_row *row, const char *value, enum conf_source source)
{
    if (row->kind == CONF_CHOICE)
        FAIL(ERR_INVALID, "--%s: '%s' (from %s) is not one of: %s", row->name, value, source_names[source],
             row->choices);
    FAIL(ERR_INVALID, "--%s: '%s' (from %s) is not %s", row->name, value, source_names[source],
         kind_names[row->kind]);
}

static enum err check_range(const struct conf_row *row, double d, enum conf_source source)
{
    if (row->min == row->max || (d >= row->min && d <= row->max)) return OK;
    FAIL(ERR_INVALID, "--%s: %.15g (from %s) must be from %.15g to %.15g", row->name, d, source_names[source],
         row->min, row->max);
}

static enum err store(struct conf *c, const struct conf_row *row, const char *value, enum conf_source source)
{
    void *at = (char *)c->values + row->offset;
    switch (row->kind) {
    case CONF_CHOICE:
        if (!list_has(row->choices, value)) return refuse(row, value, source);
        __attribute__((fallthrough));
    case CONF_STRING: {
        char *copy;
        TRY(arena_copy_string(&c->arena, value, strlen(value), &copy));
        *(const char **)at = copy;
        return OK;
    }
    case CONF_BOOL: return parse_bool(value, at) ? refuse(row, value, source) : OK;
    case CONF_NUMBER: {
        double d;
        if (parse_number(value, &d)) return refuse(row, value, source);
        TRY(check_range(row, d, source));
        *(double *)at = d;
        return OK;
    }
    default: {
        int64_t i;
        if (row->kind == CONF_INT ? parse_int(value, &i) : parse_bytes(value, &i))
            return refuse(row, value, source);
        TRY(check_range(row, (double)i, source));
        *(int64_t *)at = i;
        return OK;
    }
    }
}

enum err conf_init(struct conf *c, const struct conf_row *rows, int n_rows, const struct conf_refusal *refusals,
                   unsigned verb, void *values)
{
    ASSERT_CMP(n_rows, <=, CONF_ROWS_MAX);
    *c = (struct conf){.rows = rows, .n_rows = n_rows, .refusals = refusals, .verb = verb, .values = values};
    arena_init(&c->arena, 4096, 0);
    for (int i = 0; i < n_rows; i++)
        if (rows[i].standard) TRY(store(c, &rows[i], rows[i].standard, CONF_FROM_DEFAULT));
    return OK;
}

void conf_fini(struct conf *c) { arena_fini(&c->arena); }

/* Levenshtein distance, for "did you mean"; names are short. */
static int distance(const char *a, const char *b)
{
    int row[64], n = (int)strlen(b);
    if (n >= 64) return 99;
    for (int j = 0; j <= n; j++) row[j] = j;
    for (int i = 1; a[i - 1]; i++) {
        int diagonal = row[0];
        row[0] = i;
        for (int j = 1; j <= n; j++) {
            int change = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            int step = (row[j] < row[j - 1] ? row[j] : row[j - 1]) + 1;
            row[j] = change < step ? change : step;
        }
    }
    return row[n];
}

static enum err unknown(const struct conf *c, const char *name, enum conf_source source)
{
    const char *nearest = NULL;
    int best = 4;
    for (const struct conf_refusal *r = c->refusals; r && r->name; r++)
        if (!strcmp(r->name, name)) FAIL(ERR_INVALID, "--%s is not supported: %s", name, r->advice);
    for (int i = 0; i < c->n_rows; i++) {
        int d = distance(name, c->rows[i].name);
        if ((c->rows[i].verbs & c->verb) && d < best) best = d, nearest = c->rows[i].name;
    }
    if (nearest)
        FAIL(ERR_INVALID, "unknown option --%s (from %s); did you mean --%s?", name, source_names[source], nearest);
    FAIL(ERR_INVALID, "unknown option --%s (from %s); --help lists them", name, source_names[source]);
}

enum err conf_set(struct conf *c, const char *name, const char *value, enum conf_source source)
{
    const struct conf_row *row = conf_find(c, name);
    if (!row) return unknown(c, name, source);
    if (!(row->verbs & c->verb)) {
        if (source == CONF_FROM_FILE) return OK; /* one file may serve several verbs */
        FAIL(ERR_INVALID, "--%s does not belong to this command; --help lists what does", name);
    }
    size_t i = (size_t)(row - c->rows);
    if (c->source[i] > source) return OK;
    TRY(store(c, row, value, source));
    c->source[i] = (unsigned char)source;
    return OK;
}

static enum err read_environment(struct conf *c)
{
    for (int i = 0; i < c->n_rows; i++) {
        char name[128] = "HEDDLE_";
        size_t n = strlen(name);
        if (!(c->rows[i].verbs & c->verb)) continue;
        for (const char *p = c->rows[i].name; *p && n + 1 < sizeof name; p++)
            name[n++] = *p == '-' ? '_' : (char)toupper((unsigned char)*p);
        name[n] = 0;
        const char *value = getenv(name);
        if (value && *value) TRY(conf_set(c, c->rows[i].name, value, CONF_FROM_ENV));
    }
    return OK;
}

static enum err add_positional(struct conf *c, const char *word)
{
    if (c->n_positionals == CONF_POSITIONALS_MAX)
        FAIL(ERR_INVALID, "more than %d arguments", CONF_POSITIONALS_MAX);
    c->positionals[c->n_positionals++] = word;
    return OK;
}

/* One flag: --name value, --name=value, -name value, --bool, --no-bool. Advances *at past it. */
static enum err read_flag(struct conf *c, int argc, char **argv, int *at)
{
    const char *word = argv[(*at)++] + 1;
    if (*word == '-') word++;
    char name[128];
    size_t n = strcspn(word, "=");
    if (!n || n >= sizeof name) FAIL(ERR_INVALID, "not an option: '%s'", argv[*at - 1]);
    snprintf(name, sizeof name, "%.*s", (int)n, word);
    if (!strcmp(name, "help") || !strcmp(name, "h")) {
        c->help = true;
        return OK;
    }
    const struct conf_row *row = conf_find(c, name);
    if (!row && !strncmp(name, "no-", 3)) {
        row = conf_find(c, name + 3);
        if (row && row->kind == CONF_BOOL && !word[n]) return conf_set(c, row->name, "false", CONF_FROM_FLAG);
        row = NULL;
    }
    if (!row) return unknown(c, name, CONF_FROM_FLAG);
    if (word[n]) return conf_set(c, row->name, word + n + 1, CONF_FROM_FLAG);
    if (row->kind == CONF_BOOL) return conf_set(c, row->name, "true", CONF_FROM_FLAG);
    if (*at >= argc) FAIL(ERR_INVALID, "--%s needs a value", name);
    return conf_set(c, row->name, argv[(*at)++], CONF_FROM_FLAG);
}

enum err conf_read(struct conf *c, int argc, char **argv)
{
    for (int at = 1; at < argc && !c->help;) {
        if (!strcmp(argv[at], "--")) {
            for (at++; at < argc; at++) TRY(add_positional(c, argv[at]));
        } else if (argv[at][0] == '-' && argv[at][1]) TRY(read_flag(c, argc, argv, &at));
        else TRY(add_positional(c, argv[at++]));
    }
    if (c->help) return OK;
    TRY(read_environment(c));
    const struct conf_row *file = conf_find(c, "config");
    const char *path = file ? *(const char **)((char *)c->values + file->offset) : NULL;
    return path ? conf_read_yaml(c, path) : OK;
}

bool conf_value_text(const struct conf *c, const struct conf_row *row, char *out, size_t size)
{
    const void *at = (const char *)c->values + row->offset;
    switch (row->kind) {
    case CONF_STRING:
    case CONF_CHOICE:
        if (!*(const char *const *)at) return false;
        return snprintf(out, size, "%s", *(const char *const *)at) < (int)size;
    case CONF_BOOL: return snprintf(out, size, "%s", *(const bool *)at ? "true" : "false") < (int)size;
    case CONF_NUMBER: return snprintf(out, size, "%.17g", *(const double *)at) < (int)size;
    default: return snprintf(out, size, "%lld", (long long)*(const int64_t *)at) < (int)size;
    }
}

enum err conf_help(const struct conf *c, struct buf *out)
{
    const char *group = "";
    for (int i = 0; i < c->n_rows; i++) {
        const struct conf_row *row = &c->rows[i];
        if (!(row->verbs & c->verb)) continue;
        if (strcmp(group, row->group)) buf_printf(out, "\n%s\n", group = row->group);
        char flag[160];
        snprintf(flag, sizeof flag, "--%s%s", row->name,
                 row->kind == CONF_BOOL ? "" : row->kind == CONF_STRING ? " TEXT" : row->kind == CONF_CHOICE ? " WORD" : " N");
        buf_printf(out, "  %-34s %s", flag, row->help);
        if (row->choices) buf_printf(out, " (%s)", row->choices);
        if (row->standard && *row->standard) buf_printf(out, " [%s]", row->standard);
        if (row->aliases) {
            buf_add_string(out, "; also");
            for (const char *p = row->aliases; *p;) {
                size_t len = strcspn(p, " ");
                buf_printf(out, " %s%.*s", len > 3 ? "--" : "-", (int)len, p);
                p += len + strspn(p + len, " ");
            }
        }
        buf_add_char(out, '\n');
    }
    return buf_err(out);
}
