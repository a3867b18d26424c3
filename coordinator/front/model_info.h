/* What the front needs to know of a model's folder besides its tokenizer: limits from config.json,
 * default sampling from generation_config.json. Files that are absent change nothing. */
#pragma once
#include "coordinator/front/front.h"

struct model_info {
    uint32_t vocab_size;  /* 0 = not said */
    uint32_t context_max; /* positions the model was made for, 0 = not said */
    struct front_defaults defaults;
};

/* ERR_FORMAT names the file and the field. */
enum err model_info_read(const char *model_dir, bool generation_config, struct model_info *out);
