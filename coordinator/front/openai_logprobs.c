/* Logprobs in OpenAI's two shapes: four parallel arrays (completions), one array of objects (chat).
 * Tokens that are not whole characters are written "bytes:\xe2\x80" in the first and told by
 * their bytes in the second. See openai.h. */
#include "base/mem.h"
#include "base/utf8.h"
#include "coordinator/front/openai.h"

#include <math.h>
#include <string.h>

enum { LOGPROB_LEAST = -9999 };

static double written(float logprob)
{
    return isnan(logprob) || logprob < LOGPROB_LEAST ? LOGPROB_LEAST : (double)logprob;
}

static struct span token_span(const struct front *f, int32_t id)
{
    const struct tokenizer *t = f->config.tokenizer;
    const char *piece = tokenizer_is_special(t, id) ? tokenizer_token_text(t, id) : NULL;
    return piece ? span_of(piece) : tokenizer_bytes(t, id);
}

/* The token as a JSON string, unambiguous even when it is half a character. */
static void token_write(const struct front *f, int32_t id, struct buf *out)
{
    struct span s = token_span(f, id);
    if (utf8_valid_prefix(s.data, s.n) == s.n) {
        json_write_string(out, s.n ? s.data : "", s.n);
        return;
    }
    buf_add_string(out, "\"bytes:");
    for (size_t i = 0; i < s.n; i++)
        buf_printf(out, "\\\\x%02x", (unsigned char)s.data[i]);
    buf_add_char(out, '"');
}

static void comma(struct buf *b)
{
    if (b->n) buf_add_char(b, ',');
}

/* {"token": logprob, …}: the chosen one always, and no name twice. */
static void tops_write(const struct front *f, const struct stream_token *t, struct buf *out)
{
    struct buf names[STREAM_TOP_MAX + 1];
    uint32_t n = 0;
    bool chosen = false;
    buf_add_char(out, '{');
    for (uint32_t i = 0; i <= t->n_top; i++) {
        bool last = i == t->n_top;
        if (last && chosen) break;
        int32_t id = last ? t->token : t->top_tokens[i];
        chosen |= id == t->token;
        buf_init(&names[n], 0);
        token_write(f, id, &names[n]);
        bool again = false;
        for (uint32_t k = 0; k < n; k++)
            again |= names[k].n == names[n].n && !memcmp(names[k].data, names[n].data, names[n].n);
        if (again) {
            buf_fini(&names[n]);
            continue;
        }
        if (n) buf_add_char(out, ',');
        buf_add(out, names[n].data, names[n].n);
        buf_printf(out, ":%.7g", written(last ? t->logprob : t->top_logprobs[i]));
        n++;
    }
    buf_add_char(out, '}');
    while (n)
        buf_fini(&names[--n]);
}

static void completion_add(struct openai_answer *a, struct openai_choice *c,
                           const struct stream_token *t, uint64_t offset)
{
    comma(&c->tokens);
    token_write(a->front, t->token, &c->tokens);
    comma(&c->values);
    comma(&c->tops);
    if (t->has_logprob) {
        buf_printf(&c->values, "%.7g", written(t->logprob));
        tops_write(a->front, t, &c->tops);
    } else {
        buf_add_string(&c->values, "null");
        buf_add_string(&c->tops, "null");
    }
    comma(&c->offsets);
    buf_printf(&c->offsets, "%llu", (unsigned long long)offset);
}

/* "token":…,"logprob":…,"bytes":… */
static void entry_write(const struct front *f, int32_t id, float logprob, struct buf *out)
{
    struct span s = token_span(f, id);
    buf_add_string(out, "\"token\":");
    json_write_string(out, s.n ? s.data : "", s.n);
    buf_printf(out, ",\"logprob\":%.7g,\"bytes\":", written(logprob));
    if (tokenizer_is_special(f->config.tokenizer, id) || !s.n) {
        buf_add_string(out, "null");
        return;
    }
    for (size_t i = 0; i < s.n; i++)
        buf_printf(out, "%c%u", i ? ',' : '[', (unsigned char)s.data[i]);
    buf_add_char(out, ']');
}

static void chat_add(struct openai_answer *a, struct openai_choice *c, const struct stream_token *t)
{
    struct buf *out = &c->content;
    comma(out);
    buf_add_char(out, '{');
    entry_write(a->front, t->token, t->has_logprob ? t->logprob : LOGPROB_LEAST, out);
    buf_add_string(out, ",\"top_logprobs\":[");
    for (uint32_t i = 0; i < t->n_top; i++) {
        buf_add_string(out, i ? ",{" : "{");
        entry_write(a->front, t->top_tokens[i], t->top_logprobs[i], out);
        buf_add_char(out, '}');
    }
    buf_add_string(out, "]}");
}

void openai_logprobs_add(struct openai_answer *a, struct openai_choice *c,
                         const struct stream_token *t)
{
    if (a->call.return_token_ids) {
        comma(&c->ids);
        buf_printf(&c->ids, "%d", t->token);
    }
    if (a->call.n_logprobs < 0) return;
    if (a->call.kind == API_CHAT)
        chat_add(a, c, t);
    else
        completion_add(a, c, t, c->base_chars + t->start_chars);
}

void openai_logprobs_write(struct openai_answer *a, struct openai_choice *c, struct buf *out)
{
    buf_add_string(out, "\"logprobs\":");
    if (a->call.n_logprobs < 0) {
        buf_add_string(out, "null");
    } else if (a->call.kind == API_CHAT) {
        buf_printf(out, "{\"content\":[%s],\"refusal\":null}", buf_string(&c->content));
        buf_clear(&c->content);
    } else {
        buf_printf(out, "{\"tokens\":[%s],\"token_logprobs\":[%s],", buf_string(&c->tokens),
                   buf_string(&c->values));
        buf_printf(out, "\"top_logprobs\":[%s],\"text_offset\":[%s]}", buf_string(&c->tops),
                   buf_string(&c->offsets));
        buf_clear(&c->tokens);
        buf_clear(&c->values);
        buf_clear(&c->tops);
        buf_clear(&c->offsets);
    }
    if (!a->call.return_token_ids) return;
    buf_printf(out, ",\"token_ids\":[%s]", buf_string(&c->ids));
    buf_clear(&c->ids);
}

static uint64_t count_chars(const struct buf *b)
{
    uint64_t n = 0;
    for (size_t i = 0; i < b->n; i++)
        n += ((unsigned char)b->data[i] & 0xc0) != 0x80;
    return n;
}

/* The prompt's tokens with their scores; the first has none. */
static void echo_logprobs(struct openai_answer *a, struct openai_choice *c, uint32_t prompt)
{
    const struct token_list *list = &a->call.prompts[prompt].tokens;
    const struct openai_scored *scored = &a->scored[prompt];
    struct detokenizer d;
    struct buf text;
    buf_init(&text, 0);
    if (detokenizer_init(&d, a->front->config.tokenizer, a->call.skip_special)) return;
    for (size_t i = 0; i < list->n; i++) {
        struct stream_token t = {.token = list->ids[i]};
        size_t from_end = list->n - i;
        if (from_end <= scored->n && i) t = scored->tokens[scored->n - from_end];
        t.token = list->ids[i];
        completion_add(a, c, &t, count_chars(&text));
        if (detokenizer_next(&d, list->ids[i], &text)) break;
    }
    detokenizer_fini(&d);
    buf_fini(&text);
}

void openai_echo_add(struct openai_answer *a, uint32_t index, struct buf *out_text)
{
    struct openai_choice *c = openai_choice_of(a, index);
    uint32_t prompt = index / (uint32_t)a->call.n;
    const struct api_prompt *p = &a->call.prompts[prompt];
    struct buf text;
    buf_init(&text, 0);
    if (p->text.data)
        buf_add(&text, p->text.data, p->text.n);
    else
        tokenizer_decode(a->front->config.tokenizer, p->tokens.ids, p->tokens.n,
                         a->call.skip_special, &text);
    if (a->call.n_logprobs >= 0) echo_logprobs(a, c, prompt);
    c->base_chars = count_chars(&text);
    buf_add(out_text, buf_string(&text), text.n);
    buf_fini(&text);
}
