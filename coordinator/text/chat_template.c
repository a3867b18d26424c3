/* Compiling and rendering chat templates: the public face of the interpreter. */
#include "coordinator/text/chat_template.h"
#include "base/clock.h"
#include "base/mem.h"
#include "base/utf8.h"
#include "coordinator/text/template_render.h"

#include <stdio.h>
#include <string.h>

enum {
    STEPS_DEFAULT = 4 * 1000 * 1000,
    OUTPUT_BYTES_DEFAULT = 64 << 20,
    MEMORY_BYTES_DEFAULT = 256 << 20,
    DEPTH_DEFAULT = 1000,
    COMPILED_BYTES_MAX = 512 << 20,
};

/* ---- Compiling ---- */

/* A copy with every line end a newline; one at the very end goes, as Jinja2 has it. */
static enum err copy_source(struct chat_template *t, const char *source, size_t n,
                            const struct template_syntax *syntax)
{
    char *to;
    TRY(arena_alloc(&t->arena, n + 1, (void **)&to));
    t->source = to;
    for (size_t i = 0; i < n; i++) {
        if (source[i] == '\r' && i + 1 < n && source[i + 1] == '\n') continue;
        *to++ = source[i] == '\r' ? '\n' : source[i];
    }
    if (!syntax->keep_trailing_newline && to > t->source && to[-1] == '\n') *--to = 0;
    t->n = (size_t)(to - t->source);
    return OK;
}

enum err chat_template_compile_syntax(const char *source, size_t n,
                                      const struct template_syntax *syntax,
                                      struct chat_template **out)
{
    struct chat_template *t;
    size_t valid = utf8_valid_prefix(source, n);
    if (n > TEMPLATE_SOURCE_BYTES_MAX)
        FAIL(ERR_INVALID, "chat template: longer than %d bytes", TEMPLATE_SOURCE_BYTES_MAX);
    if (valid != n) FAIL(ERR_INVALID, "chat template: not UTF-8 at byte %zu", valid);
    TRY(MEM_NEW(&t));
    arena_init(&t->arena, 1 << 14, COMPILED_BYTES_MAX);
    enum err e = copy_source(t, source, n, syntax);
    if (!e) e = template_parse(t, syntax);
    if (e)
        chat_template_destroy(t);
    else
        *out = t;
    return e;
}

enum err chat_template_compile(const char *source, size_t n, struct chat_template **out)
{
    static const struct template_syntax hugging_face = {.trim_blocks = true, .lstrip_blocks = true};
    return chat_template_compile_syntax(source, n, &hugging_face, out);
}

void chat_template_destroy(struct chat_template *t)
{
    if (!t) return;
    arena_fini(&t->arena);
    mem_free(t);
}

bool chat_template_uses(const struct chat_template *t, const char *variable)
{
    for (size_t i = 0; i < t->n_names; i++)
        if (!strcmp(t->names[i], variable)) return true;
    return false;
}

/* ---- Rendering ---- */

static struct chat_template_limits fill_limits(const struct chat_template_limits *given)
{
    struct chat_template_limits l = given ? *given : (struct chat_template_limits){0};
    if (!l.steps_max) l.steps_max = STEPS_DEFAULT;
    if (!l.output_bytes_max) l.output_bytes_max = OUTPUT_BYTES_DEFAULT;
    if (!l.memory_bytes_max) l.memory_bytes_max = MEMORY_BYTES_DEFAULT;
    if (!l.depth_max) l.depth_max = DEPTH_DEFAULT;
    if (!l.now_unix_s) l.now_unix_s = clock_unix_s();
    return l;
}

static enum err run(struct render *r, const json_t *context)
{
    struct value variables;
    value_take_work(); /* what an earlier rendering on this thread left */
    if (!json_is_object(context))
        FAIL(ERR_INVALID, "a chat template's variables must be a JSON object");
    TRY(value_from_json(&r->arena, context, 0, &variables));
    r->context = variables.dict;
    TRY(render_new_scope(r, NULL, &r->scope));
    TRY(template_execute(r, r->t->body));
    return render_charge(r, 0); /* what the last comparison cost */
}

/* Names the limit or the line in an error that does not. */
static enum err word_error(const struct render *r, enum err e)
{
    char why[768];
    if (r->raised || e == ERR_NO_MEMORY || e == ERR_UNSUPPORTED) return e;
    if (e == ERR_TOO_BIG)
        return err_set(ERR_INVALID,
                       "chat template: more than %zu bytes (the limit output_bytes_max)",
                       r->limits.output_bytes_max);
    if (e == ERR_FULL)
        return err_set(ERR_INVALID,
                       "chat template: more than %zu bytes (the limit memory_bytes_max)",
                       r->limits.memory_bytes_max);
    snprintf(why, sizeof why, "%s", err_detail());
    return err_set(e, "chat template, line %d: %s", r->line, why);
}

enum err chat_template_render(const struct chat_template *t, const json_t *context,
                              const struct chat_template_limits *limits, struct buf *out)
{
    struct render r = {.t = t, .limits = fill_limits(limits)};
    struct buf text;
    buf_init(&text, r.limits.output_bytes_max);
    arena_init(&r.arena, 1 << 16, r.limits.memory_bytes_max);
    r.out = &text;
    enum err e = run(&r, context);
    if (e)
        e = word_error(&r, e);
    else
        e = buf_add(out, buf_string(&text), text.n);
    arena_fini(&r.arena);
    buf_fini(&text);
    return e;
}
