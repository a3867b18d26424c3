/* The post-processors of a tokenizer file: which tokens stand before and after a text.
 *
 * Only the single-text form counts here, so all of them come down to two lists of ids. */
#pragma once
#include "base/json.h"
#include "coordinator/text/tokenizer.h"

struct post_processor {
    struct token_list before, after;
};

/* object is the file's "post_processor", null for none. */
enum err post_processor_read(const json_t *object, struct post_processor *out);
void post_processor_fini(struct post_processor *p); /* accepts zeroed memory */
