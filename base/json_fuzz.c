/* Any bytes: parsed or refused; what was parsed is written and parsed again to the same string. */
#include "base/json.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    json_t *root, *again;
    struct buf b;
    buf_init(&b, 0);
    ASSERT(json_write_string(&b, (const char *)data, size) == OK);
    ASSERT(json_parse(buf_string(&b), b.n, &again) == OK); /* always valid JSON */
    json_decref(again);
    buf_fini(&b);
    if (json_parse((const char *)data, size, &root) == OK) json_decref(root);
    return 0;
}
