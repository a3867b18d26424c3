/* The text of a tokenizer.json whose tokens are bytes. */
#pragma once
#include "base/buf.h"

/* Token id = byte; 256 ends, 257 and 258 frame chat messages. The characters are GPT-2's stand-ins
 * for bytes: printable ones as they are, the others from U+0100 on, in order. */
static inline void tokenizer_json(struct buf *out)
{
    buf_add_string(out, "{\"version\":\"1.0\",\"added_tokens\":[");
    static const char *const special[] = {"<|end|>", "<|im_start|>", "<|im_end|>"};
    for (int i = 0; i < 3; i++)
        buf_printf(out, "%s{\"id\":%d,\"content\":\"%s\",\"special\":true,\"single_word\":false,"
                        "\"lstrip\":false,\"rstrip\":false,\"normalized\":false}",
                   i ? "," : "", 256 + i, special[i]);
    buf_add_string(out, "],\"normalizer\":null,\"pre_tokenizer\":{\"type\":\"ByteLevel\","
                        "\"add_prefix_space\":false,\"trim_offsets\":true,\"use_regex\":false},"
                        "\"post_processor\":null,\"decoder\":{\"type\":\"ByteLevel\","
                        "\"add_prefix_space\":true,\"trim_offsets\":true,\"use_regex\":true},"
                        "\"model\":{\"type\":\"BPE\",\"dropout\":null,\"unk_token\":null,"
                        "\"continuing_subword_prefix\":null,\"end_of_word_suffix\":null,"
                        "\"fuse_unk\":false,\"byte_fallback\":false,\"vocab\":{");
    unsigned other = 0x100;
    for (unsigned b = 0; b < 256; b++) {
        bool plain = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || (b >= 174);
        buf_printf(out, "%s\"\\u%04x\":%u", b ? "," : "", plain ? b : other++, b);
    }
    buf_add_string(out, "},\"merges\":[]}}");
}
