/* Weights as the CPU keeps them: checkpoint matrices packed into panels of 32 outputs.
 *
 * Each output row is gathered from its view as floats, then quantized and scattered into its lane
 * of its panel; see struct weight for the bytes. Knows nothing of activations. */
#include "base/mem.h"
#include "kernels/cpu/cpu.h"
#include "kernels/half.h"

#include <math.h>

const struct format_info format_infos[FORMATS] = {
    [WEIGHT_F32] = {1, 128, 0, 2, 5},
    [WEIGHT_F16] = {1, 64, 0, 2, 5},
    [WEIGHT_BF16] = {2, 128, 0, 2, 5},
    [WEIGHT_INT8] = {4, 128, 0, 2, 3},
    [WEIGHT_INT4] = {4, 64, GROUP_HEADER, GROUP_STEPS, 2},
    [WEIGHT_INT4_GROUPS] = {4, 64, GROUP_HEADER, 1, 2},
};

static const char *const format_names[FORMATS] = {"auto", "f32",  "f16", "bf16",
                                                  "int8", "int4", "fp8", "int4"};

/* Packing is the same arithmetic on every machine; only how many values at a time differs. */
#ifdef __SANITIZE_ADDRESS__
#define EVERY_ISA
#else
#if defined(__SANITIZE_THREAD__)
#define EVERY_ISA /* its resolvers would be watched before the sanitizer is there */
#else
#define EVERY_ISA __attribute__((target_clones("arch=x86-64-v4", "avx2", "default")))
#endif
#endif

static void pack_f32(uint8_t *panel, int lane, const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        memcpy(panel + i * 128 + lane * 4, &x[i], 4);
}

static void pack_f16(uint8_t *panel, int lane, const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        uint16_t h = f16_from_float(x[i]);
        memcpy(panel + i * 64 + lane * 2, &h, 2);
    }
}

/* Pairs of inputs go to their lane as one word. */
static void pack_bf16(uint8_t *panel, int lane, const float *x, int64_t n)
{
    uint8_t *at = panel + lane * 4;
    for (int64_t i = 0; i + 2 <= n; i += 2) {
        uint32_t word = bf16_from_float(x[i]) | (uint32_t)bf16_from_float(x[i + 1]) << 16;
        memcpy(at + i / 2 * 128, &word, 4);
    }
    if (n % 2) {
        uint16_t last = bf16_from_float(x[n - 1]);
        memcpy(at + n / 2 * 128, &last, 2);
    }
}

/* Nearest integer, ties to even, for |x| < 2^22; unlike nearbyintf it becomes two vector additions.
 */
static inline float round_even(float x)
{
    return (x + 12582912.0f) - 12582912.0f;
}

static inline float clamp(float x, float low, float high)
{
    return x < low ? low : x > high ? high : x;
}

EVERY_ISA static float largest_size(const float *x, int64_t n)
{
    float most[16] = {0}, max = 0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int k = 0; k < 16; k++) {
            float size = fabsf(x[i + k]);
            most[k] = size > most[k] ? size : most[k];
        }
    for (; i < n; i++)
        max = fabsf(x[i]) > max ? fabsf(x[i]) : max;
    for (int k = 0; k < 16; k++)
        max = most[k] > max ? most[k] : max;
    return max;
}

enum { ROUND_BLOCK = 256 };

EVERY_ISA static void round_int8(const float *x, int64_t n, float inverse, uint8_t out[ROUND_BLOCK])
{
    for (int64_t i = 0; i < n; i++)
        out[i] = (uint8_t)((int)round_even(clamp(x[i] * inverse, -127.0f, 127.0f)) + 128);
}

static void pack_int8(struct weight *w, int64_t row, uint8_t *panel, int lane, const float *x)
{
    float scale = largest_size(x, w->n_in) / 127.0f;
    float inverse = scale >= 0x1p-120f ? 1.0f / scale : 0.0f;
    uint8_t q[ROUND_BLOCK], *at = panel + lane * 4;
    w->scale[row] = inverse > 0 ? scale : 0.0f;
    for (int64_t i = 0; i < w->n_steps * 4; i += ROUND_BLOCK) {
        int64_t n = w->n_steps * 4 - i < ROUND_BLOCK ? w->n_steps * 4 - i : ROUND_BLOCK;
        int64_t n_known = w->n_in - i < n ? w->n_in - i : n;
        if (n_known < n) memset(q, 128, sizeof q); /* zeros */
        if (n_known > 0) round_int8(x + i, n_known, inverse, q);
        for (int64_t k = 0; k < n; k += 4)
            memcpy(at + (i + k) / 4 * 128, q + k, 4);
    }
}

/* Sum of squared errors when a group is rounded to multiples -8..7 of scale. Sixteen sums, so that
 * they can be taken at once. */
EVERY_ISA static float int4_error(const float *x, int64_t n, float scale)
{
    float inverse = 1.0f / scale, sums[16] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int k = 0; k < 16; k++) {
            float q = round_even(clamp(x[i + k] * inverse, -8.0f, 7.0f)), e = x[i + k] - q * scale;
            sums[k] += e * e;
        }
    for (; i < n; i++) {
        float q = round_even(clamp(x[i] * inverse, -8.0f, 7.0f)), e = x[i] - q * scale;
        sum += e * e;
    }
    for (int k = 0; k < 16; k++)
        sum += sums[k];
    return sum;
}

/* The scale of a group, as f16. -8 is one step farther than 7, so the largest value is laid on the
 * negative side first; then smaller scales are tried, which clip it a little and round the others
 * better. */
static float int4_scale(const float *x, int64_t n)
{
    float largest = 0, best = 0, best_error = INFINITY;
    for (int64_t i = 0; i < n; i++)
        if (fabsf(x[i]) > fabsf(largest)) largest = x[i];
    for (int i = 0; i < 8; i++) {
        float scale = f16_to_float(f16_from_float(largest / -8.0f * (1.05f - 0.05f * (float)i)));
        if (fabsf(scale) < 0x1p-24f || !isfinite(scale)) continue;
        float error = int4_error(x, n, scale);
        if (error < best_error) best_error = error, best = scale;
    }
    return best;
}

static void pack_int4(const struct weight *w, uint8_t *panel, int lane, const float *x)
{
    for (int64_t g = 0; g * GROUP_INPUTS < w->n_steps * 4; g++) {
        uint8_t *group = panel + g * (64 + GROUP_STEPS * 64);
        const float *from = x + g * GROUP_INPUTS;
        int64_t n =
            w->n_in - g * GROUP_INPUTS < GROUP_INPUTS ? w->n_in - g * GROUP_INPUTS : GROUP_INPUTS;
        float scale = int4_scale(from, n), inverse = scale != 0.0f ? 1.0f / scale : 0.0f;
        uint16_t half = f16_from_float(scale);
        memcpy(group + lane * 2, &half, 2);
        for (int64_t i = 0; i < GROUP_INPUTS; i++) {
            float q = i < n ? round_even(clamp(from[i] * inverse, -8.0f, 7.0f)) : 0.0f;
            uint8_t *byte = group + 64 + i / 8 * 128 + lane * 4 + i % 4,
                    nibble = (uint8_t)((int)q + 8);
            *byte = i % 8 < 4 ? (uint8_t)((*byte & 0xf0) | nibble)
                              : (uint8_t)((*byte & 0x0f) | nibble << 4);
        }
    }
}

void pack_row(struct weight *w, int64_t row, const float *inputs)
{
    uint8_t *panel = w->panels + (size_t)(row / PANEL_OUTPUTS) * w->panel_bytes;
    int lane = (int)(row % PANEL_OUTPUTS);
    switch (w->format) {
    case WEIGHT_F32:
        pack_f32(panel, lane, inputs, w->n_in);
        break;
    case WEIGHT_F16:
        pack_f16(panel, lane, inputs, w->n_in);
        break;
    case WEIGHT_BF16:
        pack_bf16(panel, lane, inputs, w->n_in);
        break;
    case WEIGHT_INT8:
        pack_int8(w, row, panel, lane, inputs);
        break;
    default:
        pack_int4(w, panel, lane, inputs);
    }
}

/* AUTO: the type that holds every part without loss. */
static enum weight_format format_auto(const struct matrix_view *parts, int n_parts)
{
    enum weight_format format = WEIGHT_AUTO;
    for (int i = 0; i < n_parts; i++) {
        enum weight_format one = parts[i].dtype == DTYPE_BF16  ? WEIGHT_BF16
                                 : parts[i].dtype == DTYPE_F16 ? WEIGHT_F16
                                                               : WEIGHT_F32;
        format = format == WEIGHT_AUTO || format == one ? one : WEIGHT_F32;
    }
    return format;
}

enum err weight_sizes(struct weight *w)
{
    if (w->n_in < 1 || w->n_out < 1 || w->n_in > WEIGHT_SIDE_MAX || w->n_out > WEIGHT_SIDE_MAX)
        FAIL(ERR_FORMAT, "a weight of %lld x %lld", (long long)w->n_out, (long long)w->n_in);
    const struct format_info *f = &format_infos[w->format];
    int64_t multiple = (int64_t)f->inputs_per_step * f->steps_multiple;
    if (w->format != WEIGHT_INT4_GROUPS) {
        w->n_steps = (w->n_in + multiple - 1) / multiple * f->steps_multiple;
        w->group_steps = w->format == WEIGHT_INT4 ? GROUP_STEPS : 0;
    }
    w->n_panels = (w->n_out + PANEL_OUTPUTS - 1) / PANEL_OUTPUTS;
    int64_t groups = f->header_bytes ? w->n_steps / w->group_steps : 0;
    size_t step_bytes = (size_t)w->n_steps * (size_t)f->step_bytes;
    w->panel_bytes = step_bytes + (size_t)groups * (size_t)f->header_bytes;
    if (!size_mul((size_t)w->n_panels, w->panel_bytes, &w->packed_bytes))
        FAIL(ERR_NO_MEMORY, "a weight of %lld x %lld", (long long)w->n_out, (long long)w->n_in);
    return OK;
}

static enum err weight_shape(struct weight *w, const struct matrix_view *parts, int n_parts)
{
    w->n_in = parts[0].cols;
    for (int i = 0; i < n_parts; i++) {
        if (parts[i].cols != w->n_in)
            FAIL(ERR_FORMAT, "part %d of a weight has %lld columns, the first has %lld", i,
                 (long long)parts[i].cols, (long long)w->n_in);
        if (parts[i].dtype != DTYPE_F32 && parts[i].dtype != DTYPE_F16 &&
            parts[i].dtype != DTYPE_BF16)
            FAIL(ERR_UNSUPPORTED, "a weight of type %s cannot be packed",
                 dtype_name(parts[i].dtype));
        w->n_out += parts[i].rows;
    }
    return weight_sizes(w);
}

enum err weight_alloc_scales(struct weight *w, bool with_bias)
{
    size_t lanes = (size_t)w->n_panels * PANEL_OUTPUTS;
    if (w->format == WEIGHT_INT8) TRY(mem_alloc_aligned(64, lanes * 4, (void **)&w->scale));
    if (w->format == WEIGHT_INT4_GROUPS)
        TRY(mem_alloc_aligned(64, lanes * (size_t)(w->n_steps / w->group_steps),
                              (void **)&w->zeros));
    if (with_bias) TRY(mem_alloc_aligned(64, lanes * 4, (void **)&w->bias));
    return OK;
}

enum err weight_alloc(struct backend *b, struct weight *w, bool with_bias)
{
    uint8_t *panels;
    TRY(slab_take(&cpu_of(b)->slabs, w->packed_bytes, &panels, &w->slab));
    w->panels = panels;
    return weight_alloc_scales(w, with_bias);
}

EVERY_ISA static void bf16_row(const uint8_t *row, int64_t n, float *out)
{
    for (int64_t i = 0; i < n; i++) {
        uint16_t half;
        memcpy(&half, row + 2 * i, 2);
        out[i] = bf16_to_float(half);
    }
}

static void view_row(const struct matrix_view *view, int64_t r, float *out)
{
    size_t bytes = dtype_bytes(view->dtype);
    const uint8_t *row = (const uint8_t *)view->data + (size_t)(r * view->row_stride) * bytes;
    if (view->data && view->col_stride == 1 && view->dtype == DTYPE_BF16) {
        bf16_row(row, view->cols, out);
        return;
    }
    for (int64_t c = 0; c < view->cols; c++)
        out[c] = view->data ? load_float(row + (size_t)(c * view->col_stride) * bytes, view->dtype)
                            : 0.0f;
}

struct pack_args {
    struct weight *w;
    const struct matrix_view *parts;
    float *inputs; /* [n_chunks][n_in] */
    int n_chunks;
};

/* A chunk is a range of whole panels, so that threads never share a byte. */
static void pack_chunk(const void *args, int chunk, void *scratch)
{
    const struct pack_args *a = args;
    float *inputs = a->inputs + (int64_t)chunk * a->w->n_in;
    int64_t row = a->w->n_panels * chunk / a->n_chunks * PANEL_OUTPUTS;
    int64_t end = a->w->n_panels * (chunk + 1) / a->n_chunks * PANEL_OUTPUTS;
    const struct matrix_view *part = a->parts;
    int64_t part_first = 0;
    (void)scratch;
    for (end = end < a->w->n_out ? end : a->w->n_out; row < end; row++) {
        while (row - part_first >= part->rows)
            part_first += part++->rows;
        view_row(part, row - part_first, inputs);
        pack_row(a->w, row, inputs);
    }
}

enum err cpu_weight_create(struct backend *b, const struct matrix_view *parts, int n_parts,
                           const float *bias, enum weight_format format, struct weight **out)
{
    enum err e = OK;
    struct weight *w = NULL;
    float *inputs = NULL;
    TRY_OUT(MEM_NEW(&w));
    w->format = format == WEIGHT_AUTO ? format_auto(parts, n_parts) : format;
    if ((int)w->format >= FORMATS || !format_infos[w->format].inputs_per_step ||
        w->format == WEIGHT_INT4_GROUPS)
        FAIL_OUT(ERR_UNSUPPORTED, "weight format %s is not supported on the CPU",
                 (unsigned)w->format < FORMATS ? format_names[w->format] : "?");
    TRY_OUT(weight_shape(w, parts, n_parts));
    TRY_OUT(weight_alloc(b, w, bias != NULL));
    TRY_OUT(activations_reserve(cpu_of(b), w));
    int n_chunks = pool_n_threads(cpu_of(b)->pool);
    TRY_OUT(MEM_NEW_ARRAY(w->n_in * n_chunks, &inputs));
    if (bias) memcpy(w->bias, bias, (size_t)w->n_out * 4);
    struct pack_args args = {w, parts, inputs, n_chunks};
    pool_run(cpu_of(b)->pool, &(struct pool_job){.compute = pack_chunk,
                                                 .args = &args,
                                                 .args_bytes = sizeof args,
                                                 .n_chunks = n_chunks});
    *out = w;
    w = NULL;
out:
    mem_free(inputs);
    cpu_weight_destroy(b, w);
    return e;
}

enum err cpu_table_create(struct backend *b, struct matrix_view table, struct weight **out)
{
    struct weight *w;
    (void)b;
    if (table.dtype != DTYPE_F32 && table.dtype != DTYPE_F16 && table.dtype != DTYPE_BF16)
        FAIL(ERR_UNSUPPORTED, "a table of type %s", dtype_name(table.dtype));
    TRY(MEM_NEW(&w));
    w->table = table;
    w->n_out = table.rows, w->n_in = table.cols;
    *out = w;
    return OK;
}

void cpu_weight_destroy(struct backend *b, struct weight *w)
{
    if (!w) return;
    pool_quiesce(cpu_of(b)->pool);
    slab_give(&cpu_of(b)->slabs, w->slab);
    mem_free(w->scale);
    mem_free(w->bias);
    mem_free(w->zeros);
    mem_free(w->order);
    mem_free(w);
}

size_t cpu_weight_bytes(const struct weight *w)
{
    size_t lanes = (size_t)w->n_panels * PANEL_OUTPUTS * 4;
    size_t zeros = w->zeros ? lanes / 4 * (size_t)(w->n_steps / w->group_steps) : 0;
    return w->packed_bytes + (w->scale ? lanes : 0) + (w->bias ? lanes : 0) + zeros +
           (w->order ? (size_t)w->n_steps * 16 : 0);
}
