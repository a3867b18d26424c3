/* Chat messages through the model's template. Messages are checked and brought into the shape that
 * templates know: content as one string, tool arguments as objects. See api.h. */
#include "base/mem.h"
#include "coordinator/front/api.h"

#include <string.h>

enum { MESSAGES_MAX = 65536, PARTS_MAX = 65536 };

/* "text" parts become one text, joined by line ends; other parts are named and refused. */
static enum err content_join(const json_t *parts, size_t message, struct buf *out)
{
    if (json_array_size(parts) > PARTS_MAX)
        FAIL(ERR_INVALID, "'messages[%zu].content' has too many parts", message);
    for (size_t i = 0; i < json_array_size(parts); i++) {
        const json_t *part = json_array_get(parts, i);
        const json_t *text = json_is_string(part) ? part : json_object_get(part, "text");
        const char *type = json_string_value(json_object_get(part, "type"));
        if (json_is_object(part) && !type && !text)
            FAIL(ERR_INVALID, "'messages[%zu].content[%zu].type' is required", message, i);
        if (type && !strcmp(type, "refusal"))
            text = json_object_get(part, "refusal");
        else if (type && strcmp(type, "text"))
            FAIL(ERR_INVALID,
                 "'messages[%zu].content[%zu]' is of type '%.40s', which is not supported; only "
                 "'text' is",
                 message, i, type);
        if (!json_is_string(text))
            FAIL(ERR_INVALID, "'messages[%zu].content[%zu].text' must be a string", message, i);
        if (i) TRY(buf_add_char(out, '\n'));
        TRY(buf_add(out, json_string_value(text), json_string_length(text)));
    }
    return OK;
}

static enum err content_fix(json_t *message, size_t index)
{
    json_t *content = json_object_get(message, "content");
    bool has_calls = json_array_size(json_object_get(message, "tool_calls")) > 0;
    if (json_is_string(content)) return OK;
    if (!content || json_is_null(content)) {
        const char *role = json_string_value(json_object_get(message, "role"));
        if (!has_calls && strcmp(role, "assistant"))
            FAIL(ERR_INVALID, "'messages[%zu].content' is required", index);
        if (json_object_set_new(message, "content", json_string(""))) FAIL(ERR_NO_MEMORY, "JSON");
        return OK;
    }
    if (!json_is_array(content))
        FAIL(ERR_INVALID, "'messages[%zu].content' must be a string or an array of parts", index);
    struct buf text;
    buf_init(&text, 0);
    enum err e = content_join(content, index, &text);
    if (!e && json_object_set_new(message, "content", json_stringn(buf_string(&text), text.n)))
        e = err_set(ERR_NO_MEMORY, "JSON");
    buf_fini(&text);
    return e;
}

/* Arguments come as JSON text, and templates write them out as JSON again. */
static enum err tool_calls_fix(json_t *message, size_t index)
{
    json_t *calls = json_object_get(message, "tool_calls");
    if (!calls || json_is_null(calls)) return OK;
    if (!json_is_array(calls))
        FAIL(ERR_INVALID, "'messages[%zu].tool_calls' must be an array", index);
    for (size_t i = 0; i < json_array_size(calls); i++) {
        json_t *function = json_object_get(json_array_get(calls, i), "function");
        json_t *arguments = json_object_get(function, "arguments"), *parsed = NULL;
        if (!json_is_object(function))
            FAIL(ERR_INVALID, "'messages[%zu].tool_calls[%zu].function' must be an object", index,
                 i);
        if (!json_is_string(arguments)) continue;
        if (json_parse(json_string_value(arguments), json_string_length(arguments), &parsed))
            continue;
        if (json_object_set_new(function, "arguments", parsed)) FAIL(ERR_NO_MEMORY, "JSON");
    }
    return OK;
}

static enum err message_fix(struct front *f, json_t *message, size_t index)
{
    if (!json_is_object(message)) FAIL(ERR_INVALID, "'messages[%zu]' must be an object", index);
    const char *role = json_string_value(json_object_get(message, "role"));
    const json_t *name = json_object_get(message, "name");
    if (!role || !*role) FAIL(ERR_INVALID, "'messages[%zu].role' must be a string", index);
    if (name && !json_is_null(name) && !json_is_string(name))
        FAIL(ERR_INVALID, "'messages[%zu].name' must be a string", index);
    /* "developer" is the newer word for "system"; few templates know it. */
    const char *source = f->config.chat_template_source;
    if (!strcmp(role, "developer") && source && !strstr(source, "developer") &&
        json_object_set_new(message, "role", json_string("system")))
        FAIL(ERR_NO_MEMORY, "JSON");
    TRY(content_fix(message, index));
    return tool_calls_fix(message, index);
}

/* A copy of the messages, checked and fixed. */
static enum err messages_make(struct front *f, const json_t *body, json_t **out)
{
    const json_t *messages = json_object_get(body, "messages");
    if (!messages || json_is_null(messages)) FAIL(ERR_INVALID, "'messages' is required");
    if (!json_is_array(messages)) FAIL(ERR_INVALID, "'messages' must be an array");
    size_t n = json_array_size(messages);
    if (!n || n > MESSAGES_MAX)
        FAIL(ERR_INVALID, "'messages' holds %zu messages, but must hold 1 to %d", n, MESSAGES_MAX);
    json_t *copy = json_deep_copy(messages);
    if (!copy) FAIL(ERR_NO_MEMORY, "JSON");
    enum err e = OK;
    for (size_t i = 0; !e && i < n; i++)
        e = message_fix(f, json_array_get(copy, i), i);
    if (e)
        json_decref(copy);
    else
        *out = copy;
    return e;
}

/* Template variables of the server, then of the request; the request's kwargs may not replace what
 * this file sets. */
static enum err context_make(struct front *f, const json_t *body, bool generate, json_t *messages,
                             json_t **out)
{
    static const char *const roles[] = {"bos_token", "eos_token", "pad_token", "unk_token"};
    const json_t *kwargs = json_object_get(body, "chat_template_kwargs");
    json_t *tools = json_object_get(body, "tools");
    json_t *documents = json_object_get(body, "documents");
    json_t *effort = json_object_get(body, "reasoning_effort");
    const char *choice = json_string_value(json_object_get(body, "tool_choice"));
    if (kwargs && !json_is_null(kwargs) && !json_is_object(kwargs))
        FAIL(ERR_INVALID, "'chat_template_kwargs' must be an object");
    if (documents && !json_is_null(documents) && !json_is_array(documents))
        FAIL(ERR_INVALID, "'documents' must be an array");
    json_t *context =
        json_is_object(kwargs) ? json_copy((json_t *)(uintptr_t)kwargs) : json_object();
    int bad = !context;
    for (size_t i = 0; !bad && i < sizeof roles / sizeof *roles; i++) {
        const char *text = tokenizer_special_text(f->config.tokenizer, roles[i]);
        if (*text || i < 2) bad |= json_object_set_new(context, roles[i], json_string(text));
    }
    if (!bad && json_is_string(effort)) bad |= json_object_set(context, "reasoning_effort", effort);
    if (!bad && json_is_array(documents)) bad |= json_object_set(context, "documents", documents);
    if (!bad && json_array_size(tools) && !(choice && !strcmp(choice, "none")))
        bad |= json_object_set(context, "tools", tools);
    if (!bad) bad |= json_object_set(context, "messages", messages);
    if (!bad) bad |= json_object_set_new(context, "add_generation_prompt", json_boolean(generate));
    if (bad) {
        json_decref(context);
        FAIL(ERR_NO_MEMORY, "JSON");
    }
    *out = context;
    return OK;
}

/* Cuts the rendering after the last message's text, so that the model goes on with it. */
static enum err cut_after_last(const json_t *messages, struct buf *text)
{
    const json_t *last = json_array_get(messages, json_array_size(messages) - 1);
    const json_t *content = json_object_get(last, "content");
    const char *s = json_string_value(content);
    size_t n = json_string_length(content);
    while (n && strchr(" \t\r\n", s[n - 1]))
        n--;
    while (n && strchr(" \t\r\n", *s))
        s++, n--;
    for (size_t end = text->n; n && end >= n; end--) {
        if (memcmp(text->data + end - n, s, n)) continue;
        text->n = end;
        text->data[end] = 0;
        return OK;
    }
    FAIL(ERR_INVALID, "'continue_final_message': the template does not show the last message");
}

enum err api_chat_render(struct front *f, const json_t *body, struct buf *out)
{
    bool generate = true, go_on = false;
    if (!f->config.chat_template)
        FAIL(ERR_INVALID, "this model has no chat template; start the server with --chat-template, "
                          "or use /v1/completions");
    const json_t *own = json_object_get(body, "chat_template");
    if (own && !json_is_null(own))
        FAIL(ERR_INVALID, "'chat_template' of a request is not accepted");
    TRY(json_read_bool(body, "continue_final_message", &go_on));
    TRY(json_read_bool(body, "add_generation_prompt", &generate));
    const json_t *asked = json_object_get(body, "add_generation_prompt");
    if (go_on && generate && asked && !json_is_null(asked))
        FAIL(ERR_INVALID,
             "'continue_final_message' and 'add_generation_prompt' exclude each other");
    json_t *messages = NULL, *context = NULL;
    TRY(messages_make(f, body, &messages));
    enum err e = context_make(f, body, generate && !go_on, messages, &context);
    struct chat_template_limits limits = {.steps_max = 4 << 20, .output_bytes_max = 64 << 20};
    if (!e) e = chat_template_render(f->config.chat_template, context, &limits, out);
    if (!e && go_on) e = cut_after_last(messages, out);
    json_decref(context);
    json_decref(messages);
    return e;
}
