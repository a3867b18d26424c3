/* Weights: from views of a checkpoint to packed matrices on the device, a few rows at a time. */
#include "base/mem.h"
#include "kernels/cuda/cuda.h"
#include "kernels/cuda/pack.h"

#include <string.h>

enum { CHUNK_BYTES = 8 << 20, K_PAD = 32 };

static enum err format_resolve(const struct cuda_backend *b, enum weight_format *format)
{
    static const char *const names[WEIGHT_FORMAT_COUNT] = {"auto", "f32",  "f16", "bf16",
                                                           "int8", "int4", "fp8", "int4"};
    if (*format == WEIGHT_AUTO) *format = WEIGHT_BF16; /* what the activations are in */
    bool need_library = *format == WEIGHT_F16 || *format == WEIGHT_INT8 || *format == WEIGHT_FP8;
    if (*format == WEIGHT_INT4_GROUPS)
        FAIL(ERR_UNSUPPORTED, "codes of a checkpoint come by another way");
    if (*format == WEIGHT_F32)
        FAIL(ERR_UNSUPPORTED,
             "weights in f32 are not supported on CUDA: bf16, f16, int8, int4, fp8");
    if (*format == WEIGHT_FP8 && b->capability < 90)
        FAIL(ERR_UNSUPPORTED, "weights in fp8 need sm_90, this GPU is sm_%d", b->capability);
    if (need_library && !b->lt)
        FAIL(ERR_UNSUPPORTED, "weights in %s need cuBLASLt, which could not be opened",
             names[*format]);
    return OK;
}

static int64_t bits_of(enum weight_format f)
{
    return f == WEIGHT_INT4 || f == WEIGHT_INT4_GROUPS ? 4
           : f == WEIGHT_INT8 || f == WEIGHT_FP8       ? 8
                                                       : 16;
}

static int64_t row_bytes(const struct weight *w)
{
    return w->n_in_padded * bits_of(w->format) / 8;
}

/* One chunk of rows on its way to the device. */
struct chunk {
    float *row;                 /* [n_in] */
    uint8_t *data;              /* [rows_max][row_bytes] */
    float *scales;              /* [rows_max] */
    uint16_t *groups;           /* [rows_max][n_in_padded / 128] */
    int64_t rows_max, n, first; /* rows in it, and the first one's index in the weight */
};

static void row_pack(const struct weight *w, struct chunk *c)
{
    uint8_t *to = c->data + c->n * row_bytes(w);
    uint16_t *half = (uint16_t *)to;
    switch (w->format) {
    case WEIGHT_INT8:
        c->scales[c->n] = pack_row_int8(c->row, w->n_in, w->n_in_padded, to);
        break;
    case WEIGHT_FP8:
        c->scales[c->n] = pack_row_fp8(c->row, w->n_in, w->n_in_padded, to);
        break;
    case WEIGHT_INT4:
        pack_row_int4(c->row, w->n_in, w->n_in_padded, to,
                      c->groups + c->n * (w->n_in_padded / INT4_GROUP));
        break;
    default:
        memset(to, 0, (size_t)row_bytes(w));
        for (int64_t i = 0; i < w->n_in; i++)
            half[i] = w->format == WEIGHT_F16 ? pack_f16(c->row[i]) : pack_bf16(c->row[i]);
    }
}

static enum err send(struct cuda_backend *b, void *to, const void *from, size_t bytes)
{
    TRY(cuda_check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, b->stream),
                   "uploading a weight"));
    return cuda_check(cudaStreamSynchronize(b->stream), "uploading a weight");
}

static enum err chunk_send(struct cuda_backend *b, const struct weight *w, struct chunk *c)
{
    size_t rows = (size_t)c->n, groups = (size_t)(w->n_in_padded / INT4_GROUP);
    if (rows)
        TRY(send(b, (uint8_t *)w->data + c->first * row_bytes(w), c->data,
                 rows * (size_t)row_bytes(w)));
    if (rows && w->scales) TRY(send(b, w->scales + c->first, c->scales, rows * sizeof(float)));
    if (rows && w->scales_16)
        TRY(send(b, (uint16_t *)w->scales_16 + (size_t)c->first * groups, c->groups,
                 rows * groups * sizeof(uint16_t)));
    c->first += c->n;
    c->n = 0;
    return OK;
}

/* A row that is already as the device wants it needs no detour over F32. */
static bool row_is_ready(const struct weight *w, const struct matrix_view *v)
{
    enum dtype same = w->format == WEIGHT_BF16  ? DTYPE_BF16
                      : w->format == WEIGHT_F16 ? DTYPE_F16
                                                : DTYPE_COUNT;
    return v->data && v->dtype == same && v->col_stride == 1;
}

static enum err parts_send(struct cuda_backend *b, const struct weight *w,
                           const struct matrix_view *parts, int n_parts, struct chunk *c)
{
    for (int p = 0; p < n_parts; p++) {
        const struct matrix_view *v = &parts[p];
        bool ready = row_is_ready(w, v);
        for (int64_t r = 0; r < v->rows; r++, c->n++) {
            if (c->n == c->rows_max) TRY(chunk_send(b, w, c));
            uint8_t *to = c->data + c->n * row_bytes(w);
            if (ready) {
                memcpy(to, (const uint8_t *)v->data + r * v->row_stride * 2, (size_t)w->n_in * 2);
                memset(to + w->n_in * 2, 0, (size_t)(w->n_in_padded - w->n_in) * 2);
            } else {
                pack_row_read(v, r, c->row);
                row_pack(w, c);
            }
        }
    }
    return chunk_send(b, w, c);
}

static enum err weight_fill(struct cuda_backend *b, const struct weight *w,
                            const struct matrix_view *parts, int n_parts)
{
    struct chunk c = {.rows_max = CHUNK_BYTES / (row_bytes(w) ? row_bytes(w) : 1)};
    enum err e = OK;
    if (c.rows_max < 1) c.rows_max = 1;
    TRY_OUT(MEM_NEW_ARRAY(w->n_in, &c.row));
    TRY_OUT(MEM_NEW_ARRAY(c.rows_max * row_bytes(w), &c.data));
    TRY_OUT(MEM_NEW_ARRAY(c.rows_max, &c.scales));
    TRY_OUT(MEM_NEW_ARRAY(c.rows_max * (w->n_in_padded / INT4_GROUP + 1), &c.groups));
    TRY_OUT(parts_send(b, w, parts, n_parts, &c));
out:
    mem_free(c.row);
    mem_free(c.data);
    mem_free(c.scales);
    mem_free(c.groups);
    return e;
}

static enum err bias_fill(struct cuda_backend *b, struct weight *w, const float *bias)
{
    uint16_t *half;
    size_t n = (size_t)w->n_out;
    TRY(cuda_alloc(b, n * 4, (void **)&w->bias));
    TRY(cuda_alloc(b, n * 2, &w->bias_16));
    TRY(send(b, w->bias, bias, n * 4));
    TRY(MEM_NEW_ARRAY(n, &half));
    for (size_t i = 0; i < n; i++)
        half[i] = pack_bf16(bias[i]);
    enum err e = send(b, w->bias_16, half, n * 2);
    mem_free(half);
    return e;
}

static enum err parts_check(const struct matrix_view *parts, int n_parts, struct weight *w)
{
    w->n_in = parts[0].cols;
    for (int p = 0; p < n_parts; p++) {
        enum dtype t = parts[p].dtype;
        if (parts[p].cols != w->n_in || parts[p].rows < 0)
            FAIL(ERR_INVALID,
                 "matrix %d of a stacked weight is %lld x %lld, the first has %lld columns", p,
                 (long long)parts[p].rows, (long long)parts[p].cols, (long long)w->n_in);
        if (t != DTYPE_F32 && t != DTYPE_F16 && t != DTYPE_BF16)
            FAIL(ERR_UNSUPPORTED, "a weight of type %s cannot be packed", dtype_name(t));
        w->n_out += parts[p].rows;
    }
    return OK;
}

static enum err weight_alloc(struct cuda_backend *b, struct weight *w)
{
    bool is_int4 = bits_of(w->format) == 4;
    if (w->format != WEIGHT_INT4_GROUPS) {
        int64_t pad = is_int4 ? INT4_GROUP : K_PAD;
        w->n_in_padded = (w->n_in + pad - 1) / pad * pad;
        w->group_shift = 7;
    }
    w->n_product = w->order ? w->n_in_padded : w->n_in;
    w->n_out_padded = w->format == WEIGHT_BF16 || is_int4 ? w->n_out : (w->n_out + 15) / 16 * 16;
    w->bytes = (size_t)(w->n_out_padded * row_bytes(w));
    TRY(cuda_alloc(b, w->bytes, &w->data));
    if (bits_of(w->format) == 8) {
        TRY(cuda_alloc(b, (size_t)w->n_out_padded * 4, (void **)&w->scales));
        w->bytes += (size_t)w->n_out_padded * 4;
    }
    if (is_int4) {
        size_t n = (size_t)(w->n_out * (w->n_in_padded >> w->group_shift));
        TRY(cuda_alloc(b, n * 2, &w->scales_16));
        if (w->format == WEIGHT_INT4_GROUPS) TRY(cuda_alloc(b, n, &w->zeros));
        w->bytes += w->zeros ? n * 3 : n * 2;
    }
    return OK;
}

enum err cuda_weight_create(struct backend *base, const struct matrix_view *parts, int n_parts,
                            const float *bias, enum weight_format format, struct weight **out)
{
    struct cuda_backend *b = cuda_of(base);
    struct weight *w;
    TRY(format_resolve(b, &format));
    TRY(MEM_NEW(&w));
    w->backend = b;
    w->format = format;
    enum err e;
    TRY_OUT(parts_check(parts, n_parts, w));
    TRY_OUT(weight_alloc(b, w));
    TRY_OUT(weight_fill(b, w, parts, n_parts));
    if (bias) TRY_OUT(bias_fill(b, w, bias));
    TRY_OUT(cuda_matmul_prepare(b, w));
out:
    if (e)
        cuda_weight_destroy(base, w);
    else
        *out = w;
    return e;
}

static enum err int4_check(const struct int4_matrix *m)
{
    if (m->group != 32 && m->group != 64 && m->group != 128)
        FAIL(ERR_UNSUPPORTED, "4-bit weights in groups of %d", m->group);
    if (m->n_slots < 1 || m->n_slots > INT32_MAX || m->n_slots % m->group ||
        (!m->order && m->n_slots < m->n_in))
        FAIL(ERR_FORMAT, "%lld slots of 4-bit weights in groups of %d for %lld inputs",
             (long long)m->n_slots, m->group, (long long)m->n_in);
    for (int64_t s = 0; m->order && s < m->n_slots; s++)
        if (m->order[s] < -1 || m->order[s] >= m->n_in)
            FAIL(ERR_FORMAT, "slot %lld takes input %d of %lld", (long long)s, m->order[s],
                 (long long)m->n_in);
    return OK;
}

/* Codes lie on the device as they came. */
static enum err int4_send(struct cuda_backend *b, struct weight *w, const struct int4_matrix *m)
{
    size_t groups = (size_t)(m->n_out * (m->n_slots / m->group));
    TRY(send(b, w->data, m->codes, (size_t)(m->n_out * m->n_slots / 2)));
    TRY(send(b, w->scales_16, m->scales, groups * 2));
    if (w->zeros && m->zeros) return send(b, w->zeros, m->zeros, groups);
    return w->zeros ? cuda_check(cudaMemsetAsync(w->zeros, 8, groups, b->stream), "zero points")
                    : OK;
}

enum err cuda_weight_create_int4(struct backend *base, const struct int4_matrix *m,
                                 const float *bias, struct weight **out)
{
    struct cuda_backend *b = cuda_of(base);
    bool plain = !m->zeros && !m->order && m->group == INT4_GROUP;
    struct weight *w;
    enum err e;
    TRY(int4_check(m));
    TRY(MEM_NEW(&w));
    *w = (struct weight){.backend = b,
                         .format = plain ? WEIGHT_INT4 : WEIGHT_INT4_GROUPS,
                         .n_out = m->n_out,
                         .n_in = m->n_in,
                         .n_in_padded = m->n_slots,
                         .group_shift = m->group == 128  ? 7
                                        : m->group == 64 ? 6
                                                         : 5};
    if (m->order) TRY_OUT(cuda_alloc(b, (size_t)m->n_slots * 4, (void **)&w->order));
    if (m->order) TRY_OUT(send(b, w->order, m->order, (size_t)m->n_slots * 4));
    TRY_OUT(weight_alloc(b, w));
    ASSERT_CMP(w->n_in_padded, ==, m->n_slots);
    TRY_OUT(int4_send(b, w, m));
    if (bias) TRY_OUT(bias_fill(b, w, bias));
    TRY_OUT(cuda_matmul_prepare(b, w));
out:
    if (e)
        cuda_weight_destroy(base, w);
    else
        *out = w;
    return e;
}

enum err cuda_table_create(struct backend *base, struct matrix_view table, struct weight **out)
{
    struct cuda_backend *b = cuda_of(base);
    struct weight *w;
    enum err e;
    TRY(MEM_NEW(&w));
    w->backend = b;
    w->format = WEIGHT_BF16;
    TRY_OUT(parts_check(&table, 1, w));
    w->n_in_padded = w->n_in; /* rows are read as they are, never multiplied */
    w->bytes = (size_t)(w->n_out * row_bytes(w));
    TRY_OUT(cuda_alloc(b, w->bytes, &w->data));
    TRY_OUT(weight_fill(b, w, &table, 1));
out:
    if (e)
        cuda_weight_destroy(base, w);
    else
        *out = w;
    return e;
}

void cuda_weight_destroy(struct backend *base, struct weight *w)
{
    if (!w) return;
    cuda_quiesce(cuda_of(base));
    cuda_free(w->backend, w->data);
    cuda_free(w->backend, w->scales);
    cuda_free(w->backend, w->scales_16);
    cuda_free(w->backend, w->zeros);
    cuda_free(w->backend, w->order);
    cuda_free(w->backend, w->bias);
    cuda_free(w->backend, w->bias_16);
    mem_free(w);
}

size_t cuda_weight_bytes(const struct weight *w)
{
    return w->bytes;
}
