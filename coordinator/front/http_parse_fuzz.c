/* Any bytes as an HTTP head and as a chunked body: no crash, no read beyond the end, and the same
 * result however the chunked body is cut into pieces. */
#include "coordinator/front/http_parse.h"

#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static enum err chunks_read(const uint8_t *data, size_t size, size_t step, struct buf *body)
{
    struct http_chunks c = {0};
    for (size_t at = 0; at < size && c.state != HTTP_CHUNK_DONE;) {
        size_t n = size - at < step ? size - at : step, taken = 0;
        TRY(http_chunks_read(&c, (const char *)data + at, n, 1 << 20, body, &taken));
        ASSERT(taken == n || c.state == HTTP_CHUNK_DONE);
        at += taken;
    }
    return c.state == HTTP_CHUNK_DONE ? OK : ERR_INVALID;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct http_head head;
    struct buf whole, pieces, path;
    buf_init(&whole, 0);
    buf_init(&pieces, 0);
    buf_init(&path, 0);
    size_t n = http_head_length((const char *)data, size);
    ASSERT_CMP(n, <=, size);
    if (n && http_head_parse((const char *)data, n, &head) == OK) {
        ASSERT(head.path.n > 0);
        http_percent_decode(head.path, &path);
        http_list_has(http_head_find(&head, "connection"), "close");
    }
    bool first = chunks_read(data, size, size ? size : 1, &whole) == OK;
    bool second = chunks_read(data, size, 1, &pieces) == OK;
    ASSERT(first == second);
    ASSERT(!first ||
           (whole.n == pieces.n && (!whole.n || !memcmp(whole.data, pieces.data, whole.n))));
    buf_fini(&whole);
    buf_fini(&pieces);
    buf_fini(&path);
    return 0;
}
