/* Chat templates: the Jinja that models carry, rendered under budgets.
 *
 * The language is Jinja2 as Hugging Face sets it up (trim_blocks, lstrip_blocks, loop controls, the
 * generation tag, tojson without HTML escapes, raise_exception, strftime_now) and without any way
 * out of it: no imports, no attributes of the host. A template is compiled once and may then be
 * rendered by any number of threads; a rendering keeps everything in an arena of its own.
 *
 * It must never know tokens or requests. */
#pragma once
#include "base/buf.h"
#include "base/err.h"
#include "base/json.h"

struct chat_template;

/* Zero in any field means its default. */
struct chat_template_limits {
    size_t steps_max;        /* expressions and statements evaluated; default 4 million */
    size_t output_bytes_max; /* default 64 MiB */
    size_t memory_bytes_max; /* values made while rendering; default 256 MiB */
    int depth_max;           /* nested evaluations; default 1000 */
    int64_t now_unix_s;      /* what strftime_now tells, in UTC; default is the clock */
};

/* ERR_INVALID names the construct and its line; so does ERR_UNSUPPORTED, for what Jinja2 has and
 * this interpreter lacks. */
enum err chat_template_compile(const char *source, size_t n, struct chat_template **out);
void chat_template_destroy(struct chat_template *t); /* accepts NULL */

/* Appends the rendering to out. context is a JSON object of the template's variables: messages,
 * tools, documents, add_generation_prompt, bos_token, eos_token and any others; it is only read.
 * limits may be NULL. ERR_INVALID: the template raised an exception (its words are the detail), a
 * limit was reached (named), or an operation does not suit its values (with the line). On failure
 * out is as it was. */
enum err chat_template_render(const struct chat_template *t, const json_t *context,
                              const struct chat_template_limits *limits, struct buf *out);

/* Whether the source names a variable of this name at all ("tools", "enable_thinking"): how the API
 * tells what a model's template can take. */
bool chat_template_uses(const struct chat_template *t, const char *variable);
