/* JSON in and out. Knows nothing of any document's meaning. */
#include "base/json.h"
#include "base/utf8.h"

#include <math.h>
#include <string.h>

enum err json_parse(const char *text, size_t n, json_t **out)
{
    json_error_t error;
    json_t *root = json_loadb(text, n, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY | JSON_ALLOW_NUL, &error);
    if (!root)
        FAIL(ERR_INVALID, "not valid JSON: %s at line %d column %d", error.text, error.line, error.column);
    *out = root;
    return OK;
}

enum err json_parse_file(const char *path, size_t limit_bytes, json_t **out)
{
    struct buf text;
    buf_init(&text, 0);
    enum err e = buf_read_file(&text, path, limit_bytes);
    if (!e && (e = json_parse(buf_string(&text), text.n, out))) {
        char why[512];
        snprintf(why, sizeof why, "%s", err_detail());
        e = err_set(ERR_FORMAT, "%s: %s", path, why);
    }
    buf_fini(&text);
    return e;
}

static const json_t *present(const json_t *object, const char *key)
{
    const json_t *value = json_object_get(object, key);
    return value && !json_is_null(value) ? value : NULL;
}

enum err json_read_string(const json_t *object, const char *key, const char **out)
{
    const json_t *value = present(object, key);
    if (!value) return OK;
    if (!json_is_string(value)) FAIL(ERR_INVALID, "'%s' must be a string", key);
    if (strlen(json_string_value(value)) != json_string_length(value))
        FAIL(ERR_INVALID, "'%s' must not hold a NUL character", key);
    *out = json_string_value(value);
    return OK;
}

enum err json_read_bool(const json_t *object, const char *key, bool *out)
{
    const json_t *value = present(object, key);
    if (!value) return OK;
    if (!json_is_boolean(value)) FAIL(ERR_INVALID, "'%s' must be true or false", key);
    *out = json_is_true(value);
    return OK;
}

enum err json_read_int(const json_t *object, const char *key, int64_t min, int64_t max, int64_t *out)
{
    const json_t *value = present(object, key);
    if (!value) return OK;
    if (!json_is_integer(value)) FAIL(ERR_INVALID, "'%s' must be an integer", key);
    int64_t i = json_integer_value(value);
    if (i < min || i > max)
        FAIL(ERR_INVALID, "'%s' is %lld, but must be from %lld to %lld", key, (long long)i, (long long)min,
             (long long)max);
    *out = i;
    return OK;
}

enum err json_read_number(const json_t *object, const char *key, double min, double max, double *out)
{
    const json_t *value = present(object, key);
    if (!value) return OK;
    if (!json_is_number(value)) FAIL(ERR_INVALID, "'%s' must be a number", key);
    double d = json_number_value(value);
    if (!isfinite(d) || d < min || d > max)
        FAIL(ERR_INVALID, "'%s' is %g, but must be from %g to %g", key, d, min, max);
    *out = d;
    return OK;
}

enum err json_write_string(struct buf *b, const char *s, size_t n)
{
    static const char hex[] = "0123456789abcdef";
    buf_add_char(b, '"');
    for (size_t i = 0; i < n;) {
        unsigned char c = (unsigned char)s[i];
        if (c >= 0x80) {
            size_t len = utf8_length(s + i, n - i);
            if (len) buf_add(b, s + i, len);
            else buf_add_string(b, "\xef\xbf\xbd");
            i += len ? len : 1;
            continue;
        }
        if (c == '"' || c == '\\') {
            char pair[2] = {'\\', (char)c};
            buf_add(b, pair, 2);
        } else if (c == '\n') buf_add_string(b, "\\n");
        else if (c == '\r') buf_add_string(b, "\\r");
        else if (c == '\t') buf_add_string(b, "\\t");
        else if (c < 0x20 || c == 0x7f) {
            char code[6] = {'\\', 'u', '0', '0', hex[c >> 4], hex[c & 15]};
            buf_add(b, code, 6);
        } else buf_add_char(b, (char)c);
        i++;
    }
    buf_add_char(b, '"');
    return buf_err(b);
}
