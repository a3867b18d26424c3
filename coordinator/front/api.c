/* The fields that completions and chat share, and the engine's request made of them. See api.h. */
#include "coordinator/front/api.h"
#include "base/clock.h"
#include "base/hash.h"
#include "base/mem.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

/* Fields that would change the answer and are not served. null, false and empty values are fine. */
static const struct {
    const char *name, *advice;
} refused[] = {
    {"guided_json", NULL},
    {"guided_regex", NULL},
    {"guided_choice", NULL},
    {"guided_grammar", NULL},
    {"structured_outputs", NULL},
    {"logits_processors", NULL},
    {"allowed_token_ids", NULL},
    {"bad_words", NULL},
    {"prompt_embeds", NULL},
    {"truncate_prompt_tokens", NULL},
    {"kv_transfer_params", NULL},
    {"audio", NULL},
    {"web_search_options", NULL},
    {"moderation", NULL},
    {"prompt_logprobs", "use echo with logprobs on /v1/completions"},
};

static bool is_empty(const json_t *v)
{
    return !v || json_is_null(v) || json_is_false(v) || (json_is_array(v) && !json_array_size(v)) ||
           (json_is_object(v) && !json_object_size(v)) ||
           (json_is_string(v) && !json_string_length(v));
}

static enum err refuse_unserved(const json_t *body)
{
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        const char *name = refused[i].name, *advice = refused[i].advice;
        if (!is_empty(json_object_get(body, name)))
            FAIL(ERR_INVALID, "'%s' is not supported yet%s%s", name, advice ? "; " : "",
                 advice ? advice : "");
    }
    const json_t *format = json_object_get(body, "response_format");
    if (!format || json_is_null(format)) return OK;
    const char *type = json_string_value(json_object_get(format, "type"));
    if (!type) FAIL(ERR_INVALID, "'response_format' must be an object with a string 'type'");
    if (strcmp(type, "text"))
        FAIL(ERR_INVALID, "'response_format' of type '%.40s' is not supported yet; only 'text' is",
             type);
    return OK;
}

enum err api_object_parse(struct span body, json_t **out)
{
    json_t *root = NULL;
    if (!body.n) FAIL(ERR_INVALID, "the request has no body; a JSON object is expected");
    TRY(json_parse(body.data, body.n, &root));
    if (!json_is_object(root)) {
        json_decref(root);
        FAIL(ERR_INVALID, "the body must be a JSON object");
    }
    *out = root;
    return OK;
}

enum err api_model_check(const struct front *f, const char *model, const char **out_name)
{
    for (unsigned i = 0; i < f->config.n_names; i++) {
        if (model && strcmp(model, f->config.names[i])) continue;
        *out_name = f->config.names[i];
        return OK;
    }
    FAIL(ERR_NO_ROUTE, "the model '%.200s' does not exist; '%s' is served here", model,
         f->config.names[0]);
}

void api_call_init(struct api_call *call, enum api_kind kind, const struct front *f)
{
    memset(call, 0, sizeof *call);
    call->kind = kind;
    call->model = f->config.names[0];
    call->n = 1;
    call->length_penalty = 1;
    call->max_tokens = -1;
    call->n_logprobs = -1;
    call->skip_special = true;
    call->sampling = f->config.defaults.sampling;
    call->sampling.n_logprobs = call->sampling.n_prompt_logprobs = -1;
    buf_init(&call->text, 0);
}

void api_call_fini(struct api_call *call)
{
    for (uint32_t i = 0; i < call->n_prompts; i++)
        token_list_fini(&call->prompts[i].tokens);
    mem_free(call->prompts);
    buf_fini(&call->text);
    if (call->body) json_decref(call->body);
    call->body = NULL;
    call->prompts = NULL;
    call->n_prompts = 0;
}

enum err api_add_stop_id(struct front *f, struct api_call *call, int64_t id)
{
    if (id < 0 || id >= front_vocab_size(f))
        FAIL(ERR_INVALID, "'stop_token_ids' holds %lld, but token ids are from 0 to %u",
             (long long)id, front_vocab_size(f) - 1);
    if (call->sampling.n_stop_ids == API_STOP_IDS_MAX)
        FAIL(ERR_INVALID, "'stop_token_ids' holds more than %d ids", API_STOP_IDS_MAX);
    call->stop_ids[call->sampling.n_stop_ids++] = (int32_t)id;
    return OK;
}

enum err api_add_bias(struct front *f, struct api_call *call, int64_t id, double value)
{
    if (id < 0 || id >= front_vocab_size(f))
        FAIL(ERR_INVALID, "'logit_bias' names token %lld, but token ids are from 0 to %u",
             (long long)id, front_vocab_size(f) - 1);
    if (!(value >= -100 && value <= 100))
        FAIL(ERR_INVALID, "'logit_bias' of token %lld is %g, but must be from -100 to 100",
             (long long)id, value);
    if (call->sampling.n_bias == API_BIAS_MAX)
        FAIL(ERR_INVALID, "'logit_bias' names more than %d tokens", API_BIAS_MAX);
    call->bias_tokens[call->sampling.n_bias] = (int32_t)id;
    call->bias_values[call->sampling.n_bias++] = (float)value;
    return OK;
}

static enum err bias_read(struct front *f, const json_t *body, struct api_call *call)
{
    json_t *map = json_object_get(body, "logit_bias"), *value;
    if (!map || json_is_null(map)) return OK;
    if (!json_is_object(map)) FAIL(ERR_INVALID, "'logit_bias' must be an object");
    const char *key;
    json_object_foreach(map, key, value)
    {
        char *end;
        long long id = strtoll(key, &end, 10);
        if (!*key || *end || strlen(key) > 10 || *key == ' ' || *key == '+')
            FAIL(ERR_INVALID, "'logit_bias' has the key '%.40s', which is no token id", key);
        if (!json_is_number(value))
            FAIL(ERR_INVALID, "'logit_bias' of token %s must be a number", key);
        TRY(api_add_bias(f, call, id, json_number_value(value)));
    }
    return OK;
}

static enum err stop_ids_read(struct front *f, const json_t *body, struct api_call *call)
{
    const json_t *ids = json_object_get(body, "stop_token_ids");
    if (!ids || json_is_null(ids)) return OK;
    if (!json_is_array(ids)) FAIL(ERR_INVALID, "'stop_token_ids' must be an array of token ids");
    if (json_array_size(ids) > API_STOP_IDS_MAX / 2)
        FAIL(ERR_INVALID, "'stop_token_ids' holds more than %d ids", API_STOP_IDS_MAX / 2);
    for (size_t i = 0; i < json_array_size(ids); i++) {
        const json_t *id = json_array_get(ids, i);
        if (!json_is_integer(id)) FAIL(ERR_INVALID, "'stop_token_ids' must hold integers");
        TRY(api_add_stop_id(f, call, json_integer_value(id)));
    }
    return OK;
}

static enum err stop_add(struct api_call *call, const json_t *value)
{
    if (!json_is_string(value)) FAIL(ERR_INVALID, "'stop' must be a string or an array of strings");
    size_t n = json_string_length(value);
    if (!n) FAIL(ERR_INVALID, "'stop' must not hold an empty string");
    if (n > STOP_BYTES_MAX)
        FAIL(ERR_INVALID, "'stop' holds a string of %zu bytes, the limit is %d", n, STOP_BYTES_MAX);
    if (call->n_stops == STOP_STRINGS_MAX)
        FAIL(ERR_INVALID, "'stop' holds more than %d strings", STOP_STRINGS_MAX);
    call->stops[call->n_stops++] = (struct span){json_string_value(value), n};
    return OK;
}

static enum err stops_read(const json_t *body, struct api_call *call)
{
    const json_t *stop = json_object_get(body, "stop");
    if (!stop || json_is_null(stop)) return OK;
    if (!json_is_array(stop)) {
        if (json_is_string(stop) && !json_string_length(stop)) return OK;
        return stop_add(call, stop);
    }
    for (size_t i = 0; i < json_array_size(stop); i++)
        TRY(stop_add(call, json_array_get(stop, i)));
    return OK;
}

static enum err stream_options_read(const json_t *body, struct api_call *call)
{
    TRY(json_read_bool(body, "stream", &call->stream));
    const json_t *options = json_object_get(body, "stream_options");
    if (!options || json_is_null(options)) return OK;
    if (!json_is_object(options)) FAIL(ERR_INVALID, "'stream_options' must be an object");
    if (!call->stream) FAIL(ERR_INVALID, "'stream_options' is only allowed when 'stream' is true");
    TRY(json_read_bool(options, "include_usage", &call->include_usage));
    TRY(json_read_bool(options, "continuous_usage_stats", &call->continuous_usage));
    return OK;
}

static enum err float_read(const json_t *body, const char *key, double min, double max, float *out)
{
    double d = *out;
    TRY(json_read_number(body, key, min, max, &d));
    *out = (float)d;
    return OK;
}

static enum err sampling_read(struct front *f, const json_t *body, struct api_call *call)
{
    struct sampling_params *p = &call->sampling;
    int64_t top_k = p->top_k, seed = 0, priority = 0;
    TRY(float_read(body, "temperature", 0, 2, &p->temperature));
    TRY(float_read(body, "top_p", 0, 1, &p->top_p));
    TRY(float_read(body, "min_p", 0, 1, &p->min_p));
    TRY(float_read(body, "presence_penalty", -2, 2, &p->presence_penalty));
    TRY(float_read(body, "frequency_penalty", -2, 2, &p->frequency_penalty));
    TRY(float_read(body, "repetition_penalty", 0.01, 10, &p->repetition_penalty));
    TRY(json_read_int(body, "top_k", -1, INT32_MAX, &top_k));
    p->top_k = top_k < 0 || top_k >= front_vocab_size(f) ? 0 : (int32_t)top_k;
    if (p->top_p <= 0) { /* nothing but the best token */
        p->top_p = 1;
        p->top_k = 1;
    }
    const json_t *given = json_object_get(body, "seed");
    call->has_seed = given && !json_is_null(given);
    TRY(json_read_int(body, "seed", INT64_MIN, INT64_MAX, &seed));
    p->seed = (uint64_t)seed;
    TRY(json_read_int(body, "priority", INT32_MIN, INT32_MAX, &priority));
    call->priority = (int32_t)priority;
    TRY(bias_read(f, body, call));
    TRY(stop_ids_read(f, body, call));
    return stops_read(body, call);
}

static enum err salt_read(const json_t *body, struct api_call *call)
{
    const char *salt = NULL, *user = NULL;
    TRY(json_read_string(body, "cache_salt", &salt));
    TRY(json_read_string(body, "user", &user));
    if (!salt) return OK;
    size_t n = strlen(salt);
    if (!n || n > 1024) FAIL(ERR_INVALID, "'cache_salt' must have 1 to 1024 bytes");
    call->cache_salt = hash_bytes(salt, n, 1).low;
    return OK;
}

static enum err early_stopping_read(const json_t *body, struct api_call *call)
{
    const json_t *value = json_object_get(body, "early_stopping");
    call->never_early = json_is_string(value) && !strcmp(json_string_value(value), "never");
    return call->never_early ? OK : json_read_bool(body, "early_stopping", &call->early_stopping);
}

static enum err search_read(const json_t *body, struct api_call *call)
{
    bool beams = false;
    TRY(json_read_int(body, "n", 1, API_N_MAX, &call->n));
    TRY(json_read_int(body, "best_of", 1, API_N_MAX, &call->best_of));
    if (call->best_of && call->best_of < call->n)
        FAIL(ERR_INVALID, "'best_of' is %lld, but must be at least 'n', which is %lld",
             (long long)call->best_of, (long long)call->n);
    TRY(json_read_bool(body, "use_beam_search", &beams));
    int64_t width = 0;
    TRY(json_read_int(body, "beam_width", 1, API_BEAMS_MAX, &width));
    if (width || beams) {
        call->beam_width = width ? width : call->best_of > call->n ? call->best_of : call->n;
        if (call->beam_width < 2 && beams) call->beam_width = 2;
        if (call->beam_width < call->n)
            FAIL(ERR_INVALID, "'beam_width' is %lld, but must be at least 'n', which is %lld",
                 (long long)call->beam_width, (long long)call->n);
        if (call->beam_width > API_BEAMS_MAX)
            FAIL(ERR_INVALID, "'beam_width' is %lld, the limit is %d", (long long)call->beam_width,
                 API_BEAMS_MAX);
    }
    TRY(json_read_number(body, "length_penalty", -10, 10, &call->length_penalty));
    TRY(early_stopping_read(body, call));
    if (call->stream && call->best_of > call->n)
        FAIL(ERR_INVALID, "'best_of' above 'n' cannot be streamed");
    return OK;
}

static enum err common_read(struct front *f, const json_t *body, struct api_call *call)
{
    const char *model = NULL;
    TRY(json_read_string(body, "model", &model));
    if (model) TRY(api_model_check(f, model, &call->model));
    TRY(refuse_unserved(body));
    TRY(stream_options_read(body, call));
    TRY(sampling_read(f, body, call));
    TRY(search_read(body, call));
    TRY(salt_read(body, call));
    TRY(json_read_int(body, "max_tokens", 0, INT32_MAX, &call->max_tokens));
    TRY(json_read_int(body, "min_tokens", 0, INT32_MAX, &call->min_tokens));
    TRY(json_read_bool(body, "ignore_eos", &call->ignore_eos));
    TRY(json_read_bool(body, "skip_special_tokens", &call->skip_special));
    TRY(json_read_bool(body, "include_stop_str_in_output", &call->keep_stop));
    TRY(json_read_bool(body, "return_token_ids", &call->return_token_ids));
    return json_read_number(body, "timeout", 0.001, 86400, &call->timeout_s);
}

/* --- prompts --- */

enum err api_prompts_reserve(struct api_call *call, uint32_t n)
{
    TRY(MEM_NEW_ARRAY(n, &call->prompts));
    call->n_prompts = n;
    return OK;
}

enum err api_prompt_text(struct front *f, struct api_prompt *p, struct span text, unsigned flags)
{
    uint32_t context = front_context_max(f);
    size_t limit = 4 * (size_t)context + 65536;
    token_list_init(&p->tokens, limit);
    p->text = text;
    enum err e = tokenizer_encode(f->config.tokenizer, text.data, text.n, flags, &p->tokens);
    if (e == ERR_TOO_LONG)
        FAIL(ERR_TOO_LONG,
             "this model's context is %u tokens, but the prompt has more than %zu tokens", context,
             limit);
    return e;
}

enum err api_prompt_ids(struct front *f, struct api_prompt *p, const json_t *ids, const char *key)
{
    uint32_t vocab = front_vocab_size(f);
    size_t n = json_array_size(ids);
    token_list_init(&p->tokens, 0);
    for (size_t i = 0; i < n; i++) {
        const json_t *id = json_array_get(ids, i);
        if (!json_is_integer(id))
            FAIL(ERR_INVALID, "'%s' must hold integers only, item %zu is none", key, i);
        json_int_t value = json_integer_value(id);
        if (value < 0 || value >= vocab)
            FAIL(ERR_INVALID, "'%s' holds token id %lld, but token ids are from 0 to %u", key,
                 (long long)value, vocab - 1);
        TRY(token_list_add(&p->tokens, (int32_t)value));
    }
    return OK;
}

static enum err prompts_read(struct front *f, const json_t *body, struct api_call *call)
{
    const json_t *prompt = json_object_get(body, "prompt");
    unsigned flags = TOKENIZER_PARSE_SPECIAL;
    bool add_special = true;
    TRY(json_read_bool(body, "add_special_tokens", &add_special));
    if (add_special) flags |= TOKENIZER_ADD_SPECIAL;
    if (!prompt || json_is_null(prompt)) FAIL(ERR_INVALID, "'prompt' is required");
    const json_t *first = json_array_get(prompt, 0);
    bool many = json_is_array(prompt) && first && !json_is_integer(first);
    if (!json_is_string(prompt) && !first)
        FAIL(ERR_INVALID, "'prompt' must be a string, an array of strings, an array of token ids "
                          "or an array of such arrays, and not empty");
    size_t n = many ? json_array_size(prompt) : 1;
    if (n > API_PROMPTS_MAX)
        FAIL(ERR_INVALID, "'prompt' holds %zu prompts, the limit is %d", n, API_PROMPTS_MAX);
    TRY(api_prompts_reserve(call, (uint32_t)n));
    for (size_t i = 0; i < n; i++) {
        const json_t *item = many ? json_array_get(prompt, i) : prompt;
        struct api_prompt *p = &call->prompts[i];
        if (json_is_string(item)) {
            struct span text = {json_string_value(item), json_string_length(item)};
            TRY(api_prompt_text(f, p, text, flags));
        } else if (json_is_array(item)) {
            if (!json_array_size(item)) FAIL(ERR_INVALID, "'prompt' holds an empty prompt");
            TRY(api_prompt_ids(f, p, item, "prompt"));
        } else {
            FAIL(ERR_INVALID, "'prompt' item %zu must be a string or an array of token ids", i);
        }
    }
    return OK;
}

/* --- whole bodies --- */

enum err api_completions_parse(struct front *f, struct span body, struct api_call *call)
{
    TRY(api_object_parse(body, &call->body));
    return api_completions_read(f, 16, call);
}

enum err api_completions_read(struct front *f, int64_t max_tokens, struct api_call *call)
{
    TRY(common_read(f, call->body, call));
    const char *suffix = NULL;
    TRY(json_read_string(call->body, "suffix", &suffix));
    if (suffix && *suffix) FAIL(ERR_INVALID, "'suffix' is not supported");
    TRY(json_read_bool(call->body, "echo", &call->echo));
    int64_t logprobs = -1;
    TRY(json_read_int(call->body, "logprobs", 0, f->config.max_logprobs, &logprobs));
    call->n_logprobs = (int)logprobs;
    if (call->max_tokens < 0) call->max_tokens = max_tokens;
    TRY(prompts_read(f, call->body, call));
    return api_call_check(f, call);
}

/* Tools may be described to the model; forcing their use needs structured output. */
static enum err tools_check(const json_t *body)
{
    const json_t *tools = json_object_get(body, "tools");
    const json_t *choice = json_object_get(body, "tool_choice");
    if (!is_empty(json_object_get(body, "functions")))
        FAIL(ERR_INVALID, "'functions' is not supported; use 'tools'");
    if (tools && !json_is_null(tools) && !json_is_array(tools))
        FAIL(ERR_INVALID, "'tools' must be an array");
    for (size_t i = 0; i < json_array_size(tools); i++) {
        const json_t *tool = json_array_get(tools, i);
        const json_t *function = json_object_get(tool, "function");
        if (!json_is_object(tool) || !json_is_string(json_object_get(tool, "type")))
            FAIL(ERR_INVALID, "'tools' item %zu must be an object with a 'type'", i);
        if (strcmp(json_string_value(json_object_get(tool, "type")), "function"))
            FAIL(ERR_INVALID,
                 "'tools' item %zu is of a type that is not supported; only "
                 "'function' is",
                 i);
        if (!json_is_string(json_object_get(function, "name")))
            FAIL(ERR_INVALID, "'tools' item %zu must hold a 'function' with a 'name'", i);
    }
    if (!choice || json_is_null(choice)) return OK;
    const char *word = json_string_value(choice);
    if (word && (!strcmp(word, "auto") || !strcmp(word, "none"))) return OK;
    if (word && strcmp(word, "required"))
        FAIL(ERR_INVALID, "'tool_choice' must be 'none', 'auto', 'required' or an object");
    FAIL(ERR_INVALID, "'tool_choice' other than 'auto' and 'none' is not supported yet");
}

static enum err modalities_check(const json_t *body)
{
    const json_t *list = json_object_get(body, "modalities");
    if (!list || json_is_null(list)) return OK;
    if (!json_is_array(list)) FAIL(ERR_INVALID, "'modalities' must be an array");
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *word = json_string_value(json_array_get(list, i));
        if (!word || strcmp(word, "text"))
            FAIL(ERR_INVALID, "'modalities' other than 'text' are not supported");
    }
    return OK;
}

enum err api_chat_parse(struct front *f, struct span body, struct api_call *call)
{
    TRY(api_object_parse(body, &call->body));
    TRY(common_read(f, call->body, call));
    TRY(json_read_int(call->body, "max_completion_tokens", 0, INT32_MAX, &call->max_tokens));
    TRY(tools_check(call->body));
    TRY(modalities_check(call->body));
    bool logprobs = false, add_special = false;
    int64_t top = -1;
    TRY(json_read_bool(call->body, "logprobs", &logprobs));
    TRY(json_read_int(call->body, "top_logprobs", 0, f->config.max_logprobs, &top));
    if (top > 0 && !logprobs) FAIL(ERR_INVALID, "'top_logprobs' needs 'logprobs' to be true");
    if (logprobs) call->n_logprobs = top > 0 ? (int)top : 0;
    TRY(json_read_bool(call->body, "add_special_tokens", &add_special));
    TRY(api_chat_render(f, call->body, &call->text));
    TRY(api_prompts_reserve(call, 1));
    unsigned flags = TOKENIZER_PARSE_SPECIAL | (add_special ? TOKENIZER_ADD_SPECIAL : 0);
    struct span text = {buf_string(&call->text), call->text.n};
    TRY(api_prompt_text(f, &call->prompts[0], text, flags));
    return api_call_check(f, call);
}

/* --- the engine's request --- */

/* An empty prompt stands for the beginning of a text. */
static enum err prompt_fill(struct front *f, struct api_prompt *p)
{
    if (p->tokens.n) return OK;
    int32_t id = tokenizer_bos_id(f->config.tokenizer);
    if (id < 0) id = tokenizer_eos_id(f->config.tokenizer);
    if (id < 0) FAIL(ERR_INVALID, "'prompt' is empty");
    return token_list_add(&p->tokens, id);
}

static enum err length_check(struct front *f, const struct api_call *call, size_t n)
{
    uint32_t context = front_context_max(f);
    uint64_t wanted = call->max_tokens > 0 ? (uint64_t)call->max_tokens : 0;
    if (!context) return OK;
    if (n > context || (n == context && call->max_tokens != 0))
        FAIL(ERR_TOO_LONG,
             "this model's context is %u tokens, but the prompt has %zu tokens; please shorten it",
             context, n);
    if (n + wanted > context)
        FAIL(ERR_TOO_LONG,
             "this model's context is %u tokens, but %llu were asked for: %zu in the prompt and "
             "%llu to generate",
             context, (unsigned long long)(n + wanted), n, (unsigned long long)wanted);
    return OK;
}

static enum err eos_add(struct front *f, struct api_call *call)
{
    const int32_t *ids;
    size_t n = tokenizer_eos_ids(f->config.tokenizer, &ids);
    for (size_t i = 0; i < n && !call->ignore_eos; i++) {
        bool there = (uint32_t)ids[i] >= front_vocab_size(f);
        for (int k = 0; k < call->sampling.n_stop_ids; k++)
            there |= call->stop_ids[k] == ids[i];
        if (!there) TRY(api_add_stop_id(f, call, ids[i]));
    }
    return OK;
}

enum err api_call_check(struct front *f, struct api_call *call)
{
    uint64_t choices = (uint64_t)call->n_prompts * (uint64_t)call->n;
    if (choices > API_PROMPTS_MAX)
        FAIL(ERR_INVALID, "'n' times the number of prompts is %llu, the limit is %d",
             (unsigned long long)choices, API_PROMPTS_MAX);
    for (uint32_t i = 0; i < call->n_prompts; i++) {
        TRY(prompt_fill(f, &call->prompts[i]));
        TRY(length_check(f, call, call->prompts[i].tokens.n));
    }
    if (call->max_tokens >= 0 && call->min_tokens > call->max_tokens)
        FAIL(ERR_INVALID, "'min_tokens' is %lld, but must be at most 'max_tokens', which is %lld",
             (long long)call->min_tokens, (long long)call->max_tokens);
    call->n_client_stop_ids = call->sampling.n_stop_ids;
    TRY(eos_add(f, call));
    call->sampling.min_tokens = (int32_t)call->min_tokens;
    call->sampling.n_logprobs = call->n_logprobs;
    if (call->echo && call->n_logprobs >= 0) call->sampling.n_prompt_logprobs = call->n_logprobs;
    if (call->sampling.n_prompt_logprobs >= 0) call->no_prefix_cache = true;
    if (!call->has_seed && getrandom(&call->sampling.seed, sizeof call->sampling.seed, 0) < 0)
        call->sampling.seed = (uint64_t)clock_monotonic_ns();
    return OK;
}

uint32_t api_max_tokens(struct front *f, const struct api_call *call, size_t n_prompt)
{
    uint32_t context = front_context_max(f);
    uint64_t room = context > n_prompt ? context - n_prompt : 1;
    uint64_t wanted = room, limit = (uint64_t)f->config.defaults.max_tokens;
    if (call->max_tokens >= 0)
        wanted = (uint64_t)call->max_tokens;
    else if (limit && limit < room)
        wanted = limit;
    return (uint32_t)(wanted < room || !context ? wanted : room);
}

static void request_free(struct request *r)
{
    mem_free(r);
}

enum err api_request_create(struct front *f, const struct api_call *call, uint32_t prompt,
                            struct request **out)
{
    const struct token_list *tokens = &call->prompts[prompt].tokens;
    const struct sampling_params *p = &call->sampling;
    size_t n_ints = tokens->n + (size_t)p->n_stop_ids + 2 * (size_t)p->n_bias;
    struct request *r;
    TRY(mem_alloc(sizeof *r + n_ints * 4, (void **)&r));
    int32_t *at = (int32_t *)(void *)(r + 1);
    memcpy(at, tokens->ids, tokens->n * 4);
    r->tokens = at;
    r->n_tokens = (uint32_t)tokens->n;
    r->sampling = *p;
    r->sampling.stop_ids = memcpy(at += tokens->n, call->stop_ids, (size_t)p->n_stop_ids * 4);
    r->sampling.bias_tokens = memcpy(at += p->n_stop_ids, call->bias_tokens, (size_t)p->n_bias * 4);
    r->sampling.bias_values =
        memcpy((void *)(at + p->n_bias), call->bias_values, (size_t)p->n_bias * 4);
    /* Draws of different prompts of one call must not repeat each other; choices take seed + i. */
    r->sampling.seed += (uint64_t)prompt * (uint64_t)(call->has_seed ? 0 : 0x9e3779b97f4a7c15u);
    r->max_tokens = api_max_tokens(f, call, tokens->n);
    r->n_choices = (uint32_t)call->n;
    r->n_best_of = (uint32_t)call->best_of;
    r->beam_width = (uint32_t)call->beam_width;
    r->length_penalty = (float)call->length_penalty;
    r->early_stopping = call->early_stopping;
    r->never_early = call->never_early;
    r->ignore_eos = call->ignore_eos;
    r->priority = call->priority;
    r->tenant = call->tenant;
    r->cache_salt = call->cache_salt;
    r->no_prefix_cache = call->no_prefix_cache;
    if (call->timeout_s > 0)
        r->deadline_us = engine_loop_now_us(f->config.engine) + (int64_t)(call->timeout_s * 1e6);
    r->destroy = request_free;
    *out = r;
    return OK;
}
