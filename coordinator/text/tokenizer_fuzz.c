/* Any bytes as tokenizer.json: opened or refused, and what opens must encode and decode them. */
#include "coordinator/text/tokenizer.h"

#include <stdint.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { TEXT_BYTES_MAX = 512 };

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct tokenizer *t = NULL;
    struct token_list ids = {.limit = 4096};
    struct buf text = {0};
    if (tokenizer_open_memory((struct span){(const char *)data, size}, NULL, &t)) return 0;
    size_t n = size < TEXT_BYTES_MAX ? size : TEXT_BYTES_MAX;
    if (!tokenizer_encode(t, (const char *)data + (size - n), n,
                          TOKENIZER_ADD_SPECIAL | TOKENIZER_PARSE_SPECIAL, &ids))
        tokenizer_decode(t, ids.ids, ids.n, false, &text);
    token_list_fini(&ids);
    buf_fini(&text);
    tokenizer_close(t);
    return 0;
}
