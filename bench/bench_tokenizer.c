/* How fast text becomes tokens and tokens text: MB/s of one thread, as rows of a CSV.
 *
 * usage: bench_tokenizer MODEL_DIR TEXT_FILE [SECONDS] */
#include "base/clock.h"
#include "coordinator/text/tokenizer.h"

#include <stdio.h>
#include <stdlib.h>

static void row(const char *what, const char *model, size_t bytes, size_t tokens, int64_t us)
{
    printf("%s,%s,%zu,%zu,%.2f,%.3f\n", what, model, bytes, tokens, (double)bytes / (double)us,
           (double)tokens / (double)us);
}

static enum err measure(const struct tokenizer *t, const char *model, const struct buf *text,
                        int64_t limit_us)
{
    struct token_list ids = {0};
    struct buf back = {0};
    int64_t encode_us = INT64_MAX, decode_us = INT64_MAX, began = clock_monotonic_us();
    enum err e = OK;
    while (!e && clock_monotonic_us() - began < limit_us) {
        ids.n = 0;
        buf_clear(&back);
        int64_t start = clock_monotonic_us();
        e = tokenizer_encode(t, buf_string(text), text->n, 0, &ids);
        int64_t middle = clock_monotonic_us();
        if (!e) e = tokenizer_decode(t, ids.ids, ids.n, false, &back);
        int64_t end = clock_monotonic_us();
        if (middle - start < encode_us) encode_us = middle - start;
        if (end - middle < decode_us) decode_us = end - middle;
    }
    if (!e) row("encode", model, text->n, ids.n, encode_us);
    if (!e) row("decode", model, back.n, ids.n, decode_us);
    token_list_fini(&ids);
    buf_fini(&back);
    return e;
}

int main(int argc, char **argv)
{
    struct tokenizer *t = NULL;
    struct buf text = {0};
    if (argc < 3) {
        fprintf(stderr, "usage: bench_tokenizer MODEL_DIR TEXT_FILE [SECONDS]\n");
        return 2;
    }
    int64_t start = clock_monotonic_us();
    enum err e = tokenizer_open(argv[1], &t);
    int64_t opened = clock_monotonic_us();
    if (!e) e = buf_read_file(&text, argv[2], 0);
    printf("what,model,bytes,tokens,mb_per_s,mtokens_per_s\n");
    if (!e) row("open", argv[1], 0, (size_t)tokenizer_vocab_size(t), opened - start);
    if (!e)
        e = measure(t, argv[1], &text, argc > 3 ? 1000000 * strtol(argv[3], NULL, 10) : 3000000);
    if (e) fprintf(stderr, "%s\n", err_detail());
    tokenizer_close(t);
    buf_fini(&text);
    return e != OK;
}
