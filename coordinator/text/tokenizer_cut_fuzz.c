/* Any bytes as tokenizer.json, built in both ways: what is accepted without the tree of the whole
 * document must be accepted with it, and be the same tokenizer. */
#include "coordinator/text/tokenizer_same.h"

#include <stdint.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct tokenizer_files whole = {0}, none = {0};
    struct tokenizer *cut = NULL, *other = NULL;
    struct span text = {(const char *)data, size};
    if (tokenizer_build_cut(&none, text, &cut)) return 0;
    ASSERT(!json_parse(text.data, text.n, &whole.json));
    ASSERT(!tokenizer_build(&whole, &other));
    ASSERT(same_tokenizer(cut, other));
    tokenizer_close(cut);
    tokenizer_close(other);
    json_decref(whole.json);
    return 0;
}
