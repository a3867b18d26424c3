/* Writing a record. A failed write ends the record, never the service. */
#include "coordinator/engine/record.h"
#include "base/hash.h"
#include "base/log.h"
#include "base/mem.h"
#include "coordinator/engine/record_format.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

struct record {
    FILE *file;
    struct buf payload;
};

static void put(struct buf *b, uint64_t v)
{
    char bytes[10];
    size_t n = 0;
    for (; v >= 0x80; v >>= 7)
        bytes[n++] = (char)(v | 0x80);
    bytes[n++] = (char)v;
    buf_add(b, bytes, n);
}

static void put_signed(struct buf *b, int64_t v)
{
    put(b, (uint64_t)v << 1 ^ (uint64_t)(v >> 63));
}
static void put_float(struct buf *b, float v)
{
    buf_add(b, &v, sizeof v);
}

static void put_words(struct buf *b, uint32_t n, const void *words)
{
    put(b, n);
    buf_add(b, words, (size_t)n * 4);
}

static void write_entry(struct record *r, enum record_kind kind)
{
    struct buf head;
    char kind_byte = (char)kind;
    buf_init(&head, 0);
    buf_add(&head, &kind_byte, 1);
    put(&head, r->payload.n);
    bool whole = !head.failed && !r->payload.failed &&
                 fwrite(head.data, 1, head.n, r->file) == head.n &&
                 fwrite(buf_string(&r->payload), 1, r->payload.n, r->file) == r->payload.n;
    buf_fini(&head);
    buf_clear(&r->payload);
    if (whole) return;
    log_error("record: %s; recording ends", errno ? strerror(errno) : "out of memory");
    fclose(r->file);
    r->file = NULL;
}

static bool is_open(struct record *r)
{
    return r && r->file;
}

#define PUT_CONFIG(field) put(&r->payload, (uint64_t)config->field);
#define PUT_INFO(field)   put(&r->payload, (uint64_t)info->field);

enum err record_open(const char *path, const struct engine_config *config, struct record **out)
{
    struct record *r;
    TRY(MEM_NEW(&r));
    r->file = fopen(path, "wb");
    if (!r->file) {
        mem_free(r);
        FAIL(ERR_IO, "%s: %s", path, strerror(errno));
    }
    buf_init(&r->payload, 0);
    fwrite(RECORD_MAGIC, 1, RECORD_MAGIC_BYTES, r->file);
    RECORD_CONFIG_FIELDS(PUT_CONFIG)
    write_entry(r, RECORD_CONFIG);
    *out = r;
    return OK;
}

void record_close(struct record *r)
{
    if (!r) return;
    if (r->file && fclose(r->file)) log_error("record: %s", strerror(errno));
    buf_fini(&r->payload);
    mem_free(r);
}

static void put_sampling(struct buf *b, const struct sampling_params *s)
{
    put_float(b, s->temperature);
    put_float(b, s->top_p);
    put_float(b, s->min_p);
    put_float(b, s->repetition_penalty);
    put_float(b, s->presence_penalty);
    put_float(b, s->frequency_penalty);
    put_signed(b, s->top_k);
    put(b, s->seed);
    put_signed(b, s->n_logprobs);
    put_signed(b, s->n_prompt_logprobs);
    put_signed(b, s->min_tokens);
    put_words(b, (uint32_t)s->n_bias, s->bias_tokens);
    put_words(b, (uint32_t)s->n_bias, s->bias_values);
    put_words(b, (uint32_t)s->n_stop_ids, s->stop_ids);
}

#define PUT_REQUEST(field) put_signed(&r->payload, (int64_t)request->field);

void record_submit(struct record *r, const struct request *request, int64_t now_us)
{
    if (!is_open(r)) return;
    put_signed(&r->payload, now_us);
    RECORD_REQUEST_FIELDS(PUT_REQUEST)
    put_float(&r->payload, request->length_penalty);
    put_words(&r->payload, request->n_tokens, request->tokens);
    put_sampling(&r->payload, &request->sampling);
    write_entry(r, RECORD_SUBMIT);
}

void record_cancel(struct record *r, uint64_t id, int32_t choice, int how, int64_t now_us)
{
    if (!is_open(r)) return;
    put_signed(&r->payload, now_us);
    put(&r->payload, id);
    put_signed(&r->payload, choice);
    put(&r->payload, (uint64_t)how);
    write_entry(r, RECORD_CANCEL);
}

void record_group_up(struct record *r, uint32_t group, const struct group_info *info,
                     int64_t now_us)
{
    if (!is_open(r)) return;
    put_signed(&r->payload, now_us);
    put(&r->payload, group);
    RECORD_INFO_FIELDS(PUT_INFO)
    write_entry(r, RECORD_GROUP_UP);
}

void record_group_down(struct record *r, uint32_t group, uint64_t epoch, int64_t now_us)
{
    if (!is_open(r)) return;
    put_signed(&r->payload, now_us);
    put(&r->payload, group);
    put(&r->payload, epoch);
    write_entry(r, RECORD_GROUP_DOWN);
}

void record_result(struct record *r, uint32_t group, const void *bytes, size_t n, int64_t now_us)
{
    if (!is_open(r)) return;
    put_signed(&r->payload, now_us);
    put(&r->payload, group);
    buf_add(&r->payload, bytes, n);
    write_entry(r, RECORD_RESULT);
}

void record_moved(struct record *r, uint32_t group, uint32_t rank, const void *bytes, size_t n,
                  int64_t now_us)
{
    if (!is_open(r)) return;
    put_signed(&r->payload, now_us);
    put(&r->payload, group);
    put(&r->payload, rank);
    buf_add(&r->payload, bytes, n);
    write_entry(r, RECORD_MOVED);
}

void record_step(struct record *r, int64_t now_us)
{
    if (!is_open(r)) return;
    put_signed(&r->payload, now_us);
    write_entry(r, RECORD_STEP);
}

void record_plan(struct record *r, uint32_t group, const void *bytes, size_t n)
{
    if (!is_open(r)) return;
    struct hash128 digest = hash_bytes(bytes, n, 0);
    put(&r->payload, group);
    put(&r->payload, n);
    buf_add(&r->payload, &digest, sizeof digest);
    write_entry(r, RECORD_PLAN);
    if (is_open(r)) fflush(r->file); /* a crash must not cost the steps before it */
}
