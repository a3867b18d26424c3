/* POST /tokenize and /detokenize, in vLLM's shape. */
#include "base/json.h"
#include "coordinator/front/api.h"
#include "coordinator/front/routes.h"

#include <string.h>

static enum err tokenize(struct front *f, struct span body, struct buf *out)
{
    struct api_call call;
    api_call_init(&call, API_COMPLETIONS, f);
    enum err e = api_object_parse(body, &call.body);
    const char *model = NULL;
    bool strings = false, add_special;
    struct span text = {NULL, 0};
    if (!e) e = json_read_string(call.body, "model", &model);
    if (!e && model) e = api_model_check(f, model, &call.model);
    bool chat = json_object_get(call.body, "messages") && !json_object_get(call.body, "prompt");
    add_special = !chat;
    if (!e) e = json_read_bool(call.body, "add_special_tokens", &add_special);
    if (!e) e = json_read_bool(call.body, "return_token_strs", &strings);
    if (!e && chat) {
        e = api_chat_render(f, call.body, &call.text);
        text = (struct span){buf_string(&call.text), call.text.n};
    } else if (!e) {
        const json_t *prompt = json_object_get(call.body, "prompt");
        if (!json_is_string(prompt))
            e = err_set(ERR_INVALID, "'prompt' must be a string, or 'messages' be given");
        text = (struct span){json_string_value(prompt), json_string_length(prompt)};
    }
    unsigned flags = TOKENIZER_PARSE_SPECIAL | (add_special ? TOKENIZER_ADD_SPECIAL : 0);
    if (!e) e = api_prompts_reserve(&call, 1);
    struct token_list *tokens = call.prompts ? &call.prompts[0].tokens : NULL;
    if (!e) {
        token_list_init(tokens, 0);
        e = tokenizer_encode(f->config.tokenizer, text.data, text.n, flags, tokens);
    }
    if (!e) {
        buf_printf(out, "{\"count\":%zu,\"max_model_len\":%u,\"tokens\":[", tokens->n,
                   front_context_max(f));
        for (size_t i = 0; i < tokens->n; i++)
            buf_printf(out, i ? ",%d" : "%d", tokens->ids[i]);
        buf_add_string(out, strings ? "],\"token_strs\":[" : "],\"token_strs\":null}");
        for (size_t i = 0; strings && i < tokens->n; i++) {
            const char *piece = tokenizer_token_text(f->config.tokenizer, tokens->ids[i]);
            if (i) buf_add_char(out, ',');
            json_write_string(out, piece ? piece : "", piece ? strlen(piece) : 0);
        }
        if (strings) buf_add_string(out, "]}");
        e = buf_err(out);
    }
    api_call_fini(&call);
    return e;
}

static enum err detokenize(struct front *f, struct span body, struct buf *out)
{
    struct api_call call;
    api_call_init(&call, API_COMPLETIONS, f);
    const char *model = NULL;
    struct buf text;
    buf_init(&text, 0);
    enum err e = api_object_parse(body, &call.body);
    if (!e) e = json_read_string(call.body, "model", &model);
    if (!e && model) e = api_model_check(f, model, &call.model);
    const json_t *ids = json_object_get(call.body, "tokens");
    if (!e && !json_is_array(ids)) e = err_set(ERR_INVALID, "'tokens' must be an array of ids");
    if (!e) e = api_prompts_reserve(&call, 1);
    if (!e) e = api_prompt_ids(f, &call.prompts[0], ids, "tokens");
    if (!e) {
        struct token_list *tokens = &call.prompts[0].tokens;
        e = tokenizer_decode(f->config.tokenizer, tokens->ids, tokens->n, false, &text);
    }
    if (!e) {
        buf_add_string(out, "{\"prompt\":");
        json_write_string(out, buf_string(&text), text.n);
        buf_add_char(out, '}');
        e = buf_err(out);
    }
    buf_fini(&text);
    api_call_fini(&call);
    return e;
}

static void answer(struct front *f, struct http_exchange *x,
                   enum err (*run)(struct front *, struct span, struct buf *))
{
    struct buf out;
    buf_init(&out, 0);
    enum err e = run(f, http_exchange_body(x), &out);
    if (e)
        route_error(f, x, e, err_detail());
    else
        http_exchange_reply(x, 200, "application/json", out.data, out.n);
    buf_fini(&out);
}

void route_tokenize(struct front *f, struct http_exchange *x, const struct route_caller *caller)
{
    (void)caller;
    answer(f, x, tokenize);
}

void route_detokenize(struct front *f, struct http_exchange *x, const struct route_caller *caller)
{
    (void)caller;
    answer(f, x, detokenize);
}
