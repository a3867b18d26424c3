/* Any bytes as text and as ids through fixed tokenizers of each kind: decoding at once and in a
 * stream must agree, and every text that comes out must be UTF-8. */
#include "base/utf8.h"
#include "coordinator/text/tokenizer.h"

#include <stdint.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Byte-level BPE with added tokens of every flag. */
static const char BYTE_LEVEL[] =
    "{\"added_tokens\":[{\"id\":20,\"content\":\"<s>\",\"special\":true,\"rstrip\":true},"
    "{\"id\":21,\"content\":\"ab\",\"single_word\":true,\"lstrip\":true,\"normalized\":true}],"
    "\"normalizer\":{\"type\":\"NFC\"},"
    "\"pre_tokenizer\":{\"type\":\"ByteLevel\",\"add_prefix_space\":false},"
    "\"decoder\":{\"type\":\"ByteLevel\"},"
    "\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"c\":2,\"\\u0120\":3,\"ab\":4,"
    "\"\\u0120a\":5,\"\\u00e9\":6,\"\\u00c3\":7,\"\\u00a9\":8,\"\\u00c3\\u00a9\":9,\"\\u010a\":10,"
    "\"\\u00ff\":11,\"\\u00f0\":12,\"\\u0141\":13},\"merges\":[\"a b\",\"\\u0120 a\","
    "\"\\u00c3 \\u00a9\"]}}";
/* SentencePiece's BPE with bytes. */
static const char SENTENCE_PIECE[] =
    "{\"normalizer\":{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Prepend\",\"prepend\":"
    "\"\\u2581\"},{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"\\u2581\"}]},"
    "\"decoder\":{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Replace\",\"pattern\":"
    "{\"String\":\"\\u2581\"},\"content\":\" \"},{\"type\":\"ByteFallback\"},{\"type\":\"Fuse\"},"
    "{\"type\":\"Strip\",\"content\":\" \",\"start\":1,\"stop\":1}]},"
    "\"model\":{\"type\":\"BPE\",\"unk_token\":\"?\",\"fuse_unk\":true,\"byte_fallback\":true,"
    "\"vocab\":{\"?\":0,\"a\":1,\"b\":2,\"\\u2581\":3,\"ab\":4,\"\\u2581a\":5,\"<0xC3>\":6,"
    "\"<0xA9>\":7,\"<0xE2>\":8,\"<0x82>\":9,\"<0xAC>\":10,\"<0x0A>\":11,\"abab\":12},"
    "\"merges\":[\"a b\",\"\\u2581 a\",\"ab ab\"]}}";
/* Unigram between blanks, with WordPiece's decoder. */
static const char UNIGRAM[] =
    "{\"normalizer\":{\"type\":\"BertNormalizer\"},\"pre_tokenizer\":{\"type\":\"Metaspace\"},"
    "\"decoder\":{\"type\":\"Metaspace\"},\"model\":{\"type\":\"Unigram\",\"unk_id\":0,"
    "\"vocab\":[[\"?\",0],[\"\\u2581\",-2],[\"a\",-3.5],[\"b\",-3],[\"ab\",-4],[\"\\u2581a\",-4.25]"
    ","
    "[\"aab\",-5],[\"e\",-3]]}}";

static const char *const FILES[] = {BYTE_LEVEL, SENTENCE_PIECE, UNIGRAM};

static struct tokenizer *tokenizer_of(size_t kind)
{
    static struct tokenizer *open[3];
    if (!open[kind]) ASSERT(!tokenizer_open_memory(span_of(FILES[kind]), NULL, &open[kind]));
    return open[kind];
}

static void decode_both(const struct tokenizer *t, const int32_t *ids, size_t n)
{
    struct buf whole = {0}, stream = {0};
    struct detokenizer d = {0};
    ASSERT(!tokenizer_decode(t, ids, n, false, &whole));
    ASSERT(!detokenizer_init(&d, t, false));
    for (size_t i = 0; i < n; i++) {
        ASSERT(!detokenizer_next(&d, ids[i], &stream));
        ASSERT_CMP(utf8_valid_prefix(buf_string(&stream), stream.n), ==, stream.n);
    }
    ASSERT(!detokenizer_flush(&d, &stream));
    ASSERT_CMP(utf8_valid_prefix(buf_string(&whole), whole.n), ==, whole.n);
    ASSERT_CMP(whole.n, ==, stream.n);
    ASSERT(!memcmp(buf_string(&whole), buf_string(&stream), whole.n));
    detokenizer_fini(&d);
    buf_fini(&whole);
    buf_fini(&stream);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct token_list ids = {0}, raw = {0};
    if (!size) return 0;
    const struct tokenizer *t = tokenizer_of(data[0] % 3);
    ASSERT(!tokenizer_encode(t, (const char *)data + 1, size - 1, data[0] >> 2, &ids));
    for (size_t i = 0; i < ids.n; i++)
        ASSERT(tokenizer_token_text(t, ids.ids[i]));
    decode_both(t, ids.ids, ids.n);
    for (size_t i = 1; i < size; i++)
        ASSERT(!token_list_add(&raw, (int32_t)data[i] % 24 - 1));
    decode_both(t, raw.ids, raw.n);
    token_list_fini(&ids);
    token_list_fini(&raw);
    return 0;
}
