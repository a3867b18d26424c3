/* stub: ChatML until the real one lands */
#include "coordinator/text/chat_template.h"
#include "base/mem.h"
#include <string.h>
struct chat_template { char *source; };
enum err chat_template_compile(const char *source, size_t n, struct chat_template **out) { struct chat_template *t; TRY(MEM_NEW(&t)); t->source = mem_strndup(source, n); *out = t; return OK; }
void chat_template_destroy(struct chat_template *t) { if (t) { mem_free(t->source); mem_free(t); } }
bool chat_template_uses(const struct chat_template *t, const char *variable) { return strstr(t->source, variable) != NULL; }
enum err chat_template_render(const struct chat_template *t, const json_t *context, const struct chat_template_limits *limits, struct buf *out)
{
    (void)t; (void)limits;
    const json_t *m = json_object_get(context, "messages");
    for (size_t i = 0; i < json_array_size(m); i++)
        buf_printf(out, "<|im_start|>%s\n%s<|im_end|>\n", json_string_value(json_object_get(json_array_get(m, i), "role")), json_string_value(json_object_get(json_array_get(m, i), "content")));
    if (json_is_true(json_object_get(context, "add_generation_prompt"))) buf_add_string(out, "<|im_start|>assistant\n");
    return OK;
}
