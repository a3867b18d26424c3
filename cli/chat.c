/* heddle chat: a conversation with a running server, streamed, on a terminal or in a pipe. */
#include "base/clock.h"
#include "base/json.h"
#include "cli/http_client.h"
#include "cli/verbs.h"

#include <histedit.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* What one answer brings as it streams. */
struct answer {
    struct buf text;
    int64_t asked_us, first_us, last_us;
    int64_t n_tokens;
    bool done;
};

struct chat {
    const struct options *o;
    json_t *messages;
};

static void print_delta(struct answer *a, const json_t *event)
{
    const json_t *choice = json_array_get(json_object_get(event, "choices"), 0);
    const char *text = json_string_value(json_object_get(json_object_get(choice, "delta"), "content"));
    const json_t *n = json_object_get(json_object_get(event, "usage"), "completion_tokens");
    if (json_is_integer(n)) a->n_tokens = json_integer_value(n);
    if (!text || !*text) return;
    a->last_us = clock_monotonic_us();
    if (!a->first_us) a->first_us = a->last_us;
    buf_add_string(&a->text, text);
    fputs(text, stdout);
    fflush(stdout);
}

static bool on_line(void *ctx, const char *line, size_t n)
{
    struct answer *a = ctx;
    json_t *event;
    if (n < 6 || strncmp(line, "data: ", 6)) return true;
    if (!strcmp(line + 6, "[DONE]")) {
        a->done = true;
        return false;
    }
    if (json_parse(line + 6, n - 6, &event)) return true;
    const char *wrong = json_string_value(json_object_get(json_object_get(event, "error"), "message"));
    if (wrong) fprintf(stderr, "\nthe server says: %s\n", wrong);
    else print_delta(a, event);
    json_decref(event);
    return true;
}

static enum err add_message(struct chat *chat, const char *role, const char *text)
{
    if (json_array_append_new(chat->messages, json_pack("{s:s,s:s}", "role", role, "content", text)))
        FAIL(ERR_INVALID, "the message is not UTF-8");
    return OK;
}

static enum err request_body(const struct chat *chat, struct buf *out)
{
    json_t *root = json_pack("{s:O,s:b,s:I,s:{s:b}}", "messages", chat->messages, "stream", 1, "max_tokens",
                             (json_int_t)chat->o->max_tokens, "stream_options", "include_usage", 1);
    if (root && chat->o->temperature >= 0) json_object_set_new(root, "temperature", json_real(chat->o->temperature));
    char *text = root ? json_dumps(root, JSON_COMPACT) : NULL;
    json_decref(root);
    if (!text) FAIL(ERR_NO_MEMORY, "out of memory");
    enum err e = buf_add_string(out, text);
    void (*release)(void *);
    json_get_alloc_funcs(NULL, &release);
    release(text);
    return e;
}

/* Asks with the messages so far, prints the answer as it comes, keeps it as a message. */
static enum err ask(struct chat *chat)
{
    struct buf body, error;
    struct answer a = {.asked_us = clock_monotonic_us()};
    int status = 0;
    buf_init(&body, 0);
    buf_init(&error, 1 << 16);
    buf_init(&a.text, 0);
    enum err e = request_body(chat, &body);
    if (!e) e = http_call(chat->o->url, "POST", "/v1/chat/completions", &body, on_line, &a, &status, &error);
    if (!e && status != 200) e = err_set(ERR_IO, "%s answered %d: %s", chat->o->url, status, buf_string(&error));
    if (!e && !a.done) e = err_set(ERR_IO, "%s: the answer was cut off", chat->o->url);
    if (!e) {
        double seconds = (double)(a.last_us - a.first_us) * 1e-6;
        putchar('\n');
        fflush(stdout);
        bool terminal = isatty(STDERR_FILENO);
        if ((terminal || chat->o->stats) && a.n_tokens > 1 && seconds > 0)
            fprintf(stderr, terminal ? "\033[2mTTFT %.0f ms, %.1f tokens/s\033[0m\n" : "TTFT %.0f ms, %.1f tokens/s\n",
                    (double)(a.first_us - a.asked_us) * 1e-3, (double)(a.n_tokens - 1) / seconds);
        e = add_message(chat, "assistant", buf_string(&a.text));
    }
    buf_fini(&a.text);
    buf_fini(&error);
    buf_fini(&body);
    return e;
}

static char *prompt_text(EditLine *line)
{
    (void)line;
    static char prompt[] = "> ";
    return prompt;
}

/* Lines from the terminal with editing and history, until Ctrl-D or /quit. */
static enum err converse(struct chat *chat)
{
    EditLine *line = el_init("heddle", stdin, stdout, stderr);
    History *past = history_init();
    HistEvent event;
    enum err e = OK;
    history(past, &event, H_SETSIZE, 200);
    el_set(line, EL_PROMPT, prompt_text);
    el_set(line, EL_EDITOR, "emacs");
    el_set(line, EL_HIST, history, past);
    for (int n; !e;) {
        const char *typed = el_gets(line, &n);
        if (!typed || n <= 0 || !strcmp(typed, "/quit\n")) break;
        char text[8192];
        snprintf(text, sizeof text, "%.*s", (int)strcspn(typed, "\n"), typed);
        if (!*text) continue;
        history(past, &event, H_ENTER, typed);
        e = add_message(chat, "user", text);
        if (!e) e = ask(chat);
    }
    history_end(past);
    el_end(line);
    return e;
}

/* Without a terminal the whole input is one message. */
static enum err ask_input(struct chat *chat)
{
    struct buf text;
    char piece[4096];
    enum err e = OK;
    buf_init(&text, 16 << 20);
    for (size_t n; !e && (n = fread(piece, 1, sizeof piece, stdin));) e = buf_add(&text, piece, n);
    if (!e && !text.n) e = err_set(ERR_INVALID, "nothing to ask: standard input is empty");
    if (!e) e = add_message(chat, "user", buf_string(&text));
    if (!e) e = ask(chat);
    buf_fini(&text);
    return e;
}

int verb_chat(struct conf *c, struct options *o)
{
    struct chat chat = {.o = o, .messages = json_array()};
    enum err e = OK;
    if (c->n_positionals) e = err_set(ERR_INVALID, "'%s': chat takes --url, not a model", c->positionals[0]);
    if (!e && o->system) e = add_message(&chat, "system", o->system);
    if (!e && o->prompt) {
        e = add_message(&chat, "user", o->prompt);
        if (!e) e = ask(&chat);
    } else if (!e) e = isatty(STDIN_FILENO) ? converse(&chat) : ask_input(&chat);
    json_decref(chat.messages);
    return e ? verb_fail("chat") : 0;
}
