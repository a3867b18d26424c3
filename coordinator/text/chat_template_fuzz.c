/* Any bytes as a chat template: compiled or refused, and what compiles is rendered under small
 * budgets with a conversation that has a little of everything. */
#include "coordinator/text/chat_template.h"

#include <stdint.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static const char CONTEXT[] =
    "{\"messages\":[{\"role\":\"system\",\"content\":\"be kind\"},{\"role\":\"user\",\"content\":"
    "\"h\\u00e9llo\"},{\"role\":\"assistant\",\"content\":null,\"tool_calls\":[{\"function\":"
    "{\"name\":\"f\",\"arguments\":{\"x\":[1,2.5,true]}}}]}],\"tools\":[{\"type\":\"function\"}],"
    "\"add_generation_prompt\":true,\"bos_token\":\"<s>\",\"eos_token\":\"</s>\",\"n\":7,"
    "\"nums\":[3,1,2],\"d\":{\"b\":1,\"a\":2},\"s\":\"text\"}";

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static json_t *context;
    struct chat_template *t = NULL;
    struct buf out = {0};
    const struct chat_template_limits limits = {.steps_max = 20000,
                                                .output_bytes_max = 1 << 16,
                                                .memory_bytes_max = 4 << 20,
                                                .depth_max = 200,
                                                .now_unix_s = 1752148800};
    if (!context) ASSERT(!json_parse(CONTEXT, sizeof CONTEXT - 1, &context));
    if (chat_template_compile((const char *)data, size, &t)) return 0;
    enum err e = chat_template_render(t, context, &limits, &out);
    ASSERT(!e || !out.n);
    ASSERT_CMP(out.n, <=, limits.output_bytes_max);
    buf_fini(&out);
    chat_template_destroy(t);
    return 0;
}
