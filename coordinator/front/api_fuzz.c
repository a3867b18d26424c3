/* Any bytes as the body of /v1/completions, /v1/chat/completions and /tokenize: refused with words,
 * or a call whose every number is within its limits. */
#include "base/clock.h"
#include "coordinator/front/api.h"
#include "coordinator/front/bytes_tokenizer.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* What the front asks of the engine while it parses. */
struct engine_loop {
    int unused;
};
static struct engine_loop engine;
enum err engine_loop_submit(struct engine_loop *l, struct request *r)
{
    (void)l, (void)r;
    return ERR_NOT_READY;
}
void engine_loop_cancel(struct engine_loop *l, uint64_t id, int32_t choice, int how)
{
    (void)l, (void)id, (void)choice, (void)how;
}
void engine_loop_stats(struct engine_loop *l, struct engine_stats *out)
{
    (void)l;
    *out = (struct engine_stats){.context_max = 512, .vocab_size = 260, .n_groups_up = 1};
}
uint32_t engine_loop_retry_after_s(struct engine_loop *l)
{
    (void)l;
    return 1;
}
int64_t engine_loop_now_us(const struct engine_loop *l)
{
    (void)l;
    return 0;
}

static struct front front;

static void set_up(void)
{
    static const char template[] =
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if tools %}{{ tools | tojson }}{% endif %}{% if x is defined %}{{ x }}{% endif %}";
    struct buf json;
    buf_init(&json, 0);
    tokenizer_json(&json);
    struct span config = span_of("{\"eos_token\":\"<|end|>\"}");
    front.config.engine = &engine;
    front.config.names[0] = "tiny";
    front.config.n_names = 1;
    front.config.vocab_size = 260;
    front.config.context_max = 512;
    front.config.max_logprobs = 20;
    front.config.chat_template_source = template;
    front.config.defaults.sampling = (struct sampling_params){.temperature = 1, .top_p = 1};
    enum err e =
        tokenizer_open_memory((struct span){json.data, json.n}, &config, &front.config.tokenizer);
    ASSERT(!e);
    e = chat_template_compile(template, sizeof template - 1, &front.config.chat_template);
    ASSERT(!e);
    buf_fini(&json);
}

static void check_call(const struct api_call *call)
{
    const struct sampling_params *p = &call->sampling;
    ASSERT(p->temperature >= 0 && p->temperature <= 2 && p->top_p > 0 && p->top_p <= 1);
    ASSERT(call->n >= 1 && call->n <= API_N_MAX && call->n_prompts >= 1);
    ASSERT(p->n_stop_ids <= API_STOP_IDS_MAX && p->n_bias <= API_BIAS_MAX);
    for (uint32_t i = 0; i < call->n_prompts; i++) {
        struct request *r;
        if (api_request_create(&front, call, i, &r)) continue;
        ASSERT(r->n_tokens >= 1 && r->n_tokens + (uint64_t)r->max_tokens <= 512);
        for (uint32_t k = 0; k < r->n_tokens; k++)
            ASSERT(r->tokens[k] >= 0 && r->tokens[k] < 260);
        r->destroy(r);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static bool ready;
    struct api_call call;
    struct span body = {(const char *)data, size};
    if (!ready) set_up();
    ready = true;
    for (int kind = API_COMPLETIONS; kind <= API_CHAT; kind++) {
        api_call_init(&call, (enum api_kind)kind, &front);
        enum err e = kind == API_CHAT ? api_chat_parse(&front, body, &call)
                                      : api_completions_parse(&front, body, &call);
        if (!e)
            check_call(&call);
        else
            ASSERT(err_detail()[0] != 0);
        api_call_fini(&call);
    }
    json_t *root = NULL;
    struct buf text;
    buf_init(&text, 0);
    if (api_object_parse(body, &root) == OK) api_chat_render(&front, root, &text);
    json_decref(root);
    buf_fini(&text);
    return 0;
}
