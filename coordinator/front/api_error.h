/* Errors as OpenAI's clients expect them: {"error":{"message","type","param","code"}}. */
#pragma once
#include "base/buf.h"

/* Appends the object. why may be "" (then the kind's own text is used). param is the field that the
 * message quotes at its beginning, if it does. */
enum err api_error_write(struct buf *out, enum err e, const char *why);
/* The status of an answer that fails with e. */
int api_error_status(enum err e);
