/* See api_error.h. Messages of errors that say something about this server's inside are replaced.
 */
#include "coordinator/front/api_error.h"
#include "base/json.h"

#include <string.h>

static const char *code_of(enum err e, const char *why)
{
    switch (e) {
    case ERR_TOO_LONG:
        return "context_length_exceeded";
    case ERR_UNAUTHORIZED:
        return "invalid_api_key";
    case ERR_NO_ROUTE:
        return strstr(why, "model") ? "model_not_found" : "not_found";
    case ERR_FULL:
        return "rate_limit_exceeded";
    case ERR_NOT_READY:
        return "not_ready";
    case ERR_TOO_BIG:
        return "request_too_large";
    case ERR_DEADLINE:
        return "deadline_exceeded";
    default:
        return NULL;
    }
}

int api_error_status(enum err e)
{
    /* What a request can cause is the client's; formats and missing features of the request itself
     * are worded by the parsers that read it. */
    if (e == ERR_UNSUPPORTED) return 400;
    return err_http(e);
}

enum err api_error_write(struct buf *out, enum err e, const char *why)
{
    const char *type = e == ERR_UNSUPPORTED ? "invalid_request_error" : err_type(e);
    if (!*why) why = err_text(e);
    const char *code = code_of(e, why), *end = *why == '\'' ? strchr(why + 1, '\'') : NULL;
    buf_add_string(out, "{\"error\":{\"message\":");
    json_write_string(out, why, strlen(why));
    buf_printf(out, ",\"type\":\"%s\",\"param\":", type);
    if (end && end - why < 80)
        json_write_string(out, why + 1, (size_t)(end - why - 1));
    else
        buf_add_string(out, "null");
    if (code)
        buf_printf(out, ",\"code\":\"%s\"}}", code);
    else
        buf_add_string(out, ",\"code\":null}}");
    return buf_err(out);
}
