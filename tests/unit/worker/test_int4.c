/* Goal: the weights read from GPTQ, AWQ and compressed-tensors checkpoints are the ones that were
 * written, bit for bit, in any slice that a rank may take; a damaged file is refused in one line
 * that names the tensor and the cause; memory is counted as it is taken. Method: goldens of
 * tools/golden_quant.py with a sum over the bits of each matrix; matrices of codes taken apart
 * again; goldens written anew with one thing changed. */
#include "base/buf.h"
#include "base/log.h"
#include "golden.h"
#include "kernels/half.h"
#include "ranks.h"
#include "worker/int4.h"
#include "worker/quantize.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>

#include <cmocka.h>

static const char *const models[] = {
    "gptq",       "gptq_zeros",   "gptq_v2", "gptq_order", "gptq_channel", "gptq_order_head",
    "gptq_mixed", "gptq_experts", "awq",     "awq_bias",   "packed4",      "packed4_zeros"};
enum { MODELS = 12, SIDE_MAX = 256 };
static char folder[64];

struct opened {
    struct golden golden;
    struct model_config config;
    struct safetensors *file;
    struct source source;
};

static void must(enum err e)
{
    if (e) fail_msg("%s: %s", err_name(e), err_detail());
}

static void open_model(const char *name, struct opened *o)
{
    golden_open(name, &o->golden);
    must(config_read(o->golden.dir, &o->config));
    must(safetensors_open(o->golden.dir, &o->file));
    must(source_init(&o->source, &o->config, o->file, 0));
}

static void close_model(struct opened *o)
{
    source_fini(&o->source);
    safetensors_close(o->file);
    golden_close(&o->golden);
}

/* Sum of bits(w[i]) * (2 i + 1) modulo 2^64, as the tool makes it. */
static uint64_t bits_sum(const struct int4_tensors *t)
{
    float row[SIDE_MAX];
    uint64_t sum = 0, at = 0;
    for (int64_t r = 0; r < t->n_out; r++) {
        int4_row(t, r, 0, t->n_in, row);
        for (int64_t i = 0; i < t->n_in; i++, at++) {
            uint32_t bits;
            memcpy(&bits, &row[i], 4);
            sum += bits * (2 * at + 1);
        }
    }
    return sum;
}

typedef void visitor(const struct int4_tensors *t, const char *stem, const json_t *sums);

/* Every role of every layer and expert that the file holds as codes. */
static size_t visit(struct opened *o, visitor *each)
{
    const json_t *sums = json_object_get(o->golden.json, "weights");
    size_t n = 0;
    for (int role = 0; role < ROLE_COUNT; role++) {
        if (!o->config.arch->names[role]) continue;
        int experts = strstr(o->config.arch->names[role], "experts") ? o->config.n_experts : 1;
        int layers = strchr(o->config.arch->names[role], '%') ? o->config.n_layers : 1;
        for (int i = 0; i < layers * experts; i++) {
            struct int4_tensors t;
            char stem[SOURCE_NAME_MAX];
            o->source.expert = i % experts;
            if (!int4_has(&o->source, (enum role)role, i / experts)) continue;
            must(int4_find(&o->source, (enum role)role, i / experts, &t));
            source_name(&o->source, (enum role)role, i / experts, "", stem);
            each(&t, stem, sums);
            n++;
        }
    }
    return n;
}

static void check_bits(const struct int4_tensors *t, const char *stem, const json_t *sums)
{
    char have[17];
    const char *want = json_string_value(json_object_get(sums, stem));
    assert_non_null(want);
    snprintf(have, sizeof have, "%016llx", (unsigned long long)bits_sum(t));
    if (strcmp(have, want)) fail_msg("%s: %s, should be %s", stem, have, want);
}

/* A stack of two overlapping ranges of rows, inputs [first, first + n), taken apart again. */
static void check_slice(const struct int4_tensors *t, int64_t first, int64_t n)
{
    const struct int4_part parts[2] = {{*t, 0, t->n_out / 2 + 3}, {*t, 8, t->n_out - 8}};
    struct int4_stack s;
    bool same;
    must(int4_stack(parts, 2, first, n, 2, &same, &s));
    assert_true(same);
    const struct int4_matrix *m = &s.matrix;
    assert_int_equal(m->n_out, parts[0].n + parts[1].n);
    assert_int_equal(m->n_in, n);
    for (int64_t row = 0; row < m->n_out; row++) {
        float want[SIDE_MAX], have[SIDE_MAX];
        int seen[SIDE_MAX] = {0};
        bool second = row >= parts[0].n;
        int4_row(t, second ? row - parts[0].n + 8 : row, first, n, want);
        for (int64_t slot = 0; slot < m->n_slots; slot++) {
            int64_t in = m->order ? m->order[slot] : slot < n ? slot : -1;
            int64_t group = row * (m->n_slots / m->group) + slot / m->group;
            uint8_t byte = m->codes[(row * m->n_slots + slot) / 2];
            int code = slot % 2 ? byte >> 4 : byte & 15, zero = m->zeros ? m->zeros[group] : 8;
            if (in < 0) continue;
            assert_in_range(in, 0, n - 1);
            seen[in]++;
            have[in] = (float)(code - zero) * f16_to_float(m->scales[group]);
        }
        for (int64_t i = 0; i < n; i++)
            if (seen[i] != 1) fail_msg("input %lld has %d slots", (long long)i, seen[i]);
        assert_memory_equal(have, want, (size_t)n * sizeof(float));
    }
    int4_stack_fini(&s);
}

static void check_slices(const struct int4_tensors *t, const char *stem, const json_t *sums)
{
    (void)sums;
    if (!t->exact) fail_msg("%s: scales are halves", stem);
    check_slice(t, 0, t->n_in);
    check_slice(t, 0, t->n_in / 2);
    check_slice(t, 32, t->n_in - 32);
    check_slice(t, 8, 56); /* off every border of groups */
    check_slice(t, 61, 3);
}

static void weights_are_those_written(void **state)
{
    (void)state;
    for (int i = 0; i < MODELS; i++) {
        struct opened o;
        open_model(models[i], &o);
        size_t n = json_object_size(json_object_get(o.golden.json, "weights"));
        assert_int_equal(visit(&o, check_bits), n);
        if (i % 3 != 2 || o.config.n_experts) visit(&o, check_slices);
        close_model(&o);
    }
}

/* Codes in groups of 128 in order, zero points 8: the format of our own; else the other. */
static void formats_chosen(void **state)
{
    static const struct {
        const char *model;
        int64_t first, n;
        int group;
        bool zeros, order;
    } cases[] = {
        {"gptq", 0, 256, 128, false, false},        {"gptq", 64, 128, 64, false, false},
        {"gptq", 96, 64, 32, false, false},         {"gptq", 120, 16, 32, false, true},
        {"gptq_zeros", 0, 256, 64, true, false},    {"gptq_zeros", 8, 100, 64, true, true},
        {"gptq_v2", 0, 256, 32, true, false},       {"gptq_order", 0, 256, 64, true, true},
        {"gptq_channel", 8, 56, 128, false, false}, {"awq", 128, 128, 128, true, false},
        {"packed4", 0, 256, 128, false, false},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct opened o;
        struct int4_part part = {.first = 0};
        struct int4_stack s;
        bool same;
        open_model(cases[i].model, &o);
        must(int4_find(&o.source, ROLE_W_DOWN, 0, &part.of));
        part.n = part.of.n_out;
        must(int4_stack(&part, 1, cases[i].first, cases[i].n, 1, &same, &s));
        if (s.matrix.group != cases[i].group || !s.matrix.zeros == cases[i].zeros ||
            !s.matrix.order == cases[i].order)
            fail_msg("case %zu: groups of %d", i, s.matrix.group);
        int4_stack_fini(&s);
        close_model(&o);
    }
}

/* --- damage --- */

/* One tensor of a file, changed: another shape, another type, other bytes, or left out. */
struct damage {
    const char *model, *tensor, *shape, *dtype;
    int value; /* of the first element of I32 or F16, -1 = as it is */
    bool gone;
    const char *says;
};

static void file_write(const char *name, const void *bytes, size_t n)
{
    char path[300];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "wb");
    assert_non_null(f);
    assert_int_equal(fwrite(bytes, 1, n, f), n);
    fclose(f);
}

static void shape_words(const struct st_tensor *t, char out[64])
{
    snprintf(out, 64, t->n_dims == 2 ? "%lld,%lld" : "%lld", (long long)t->shape[0],
             (long long)t->shape[t->n_dims - 1]);
}

static void weights_write(const struct damage *d, const struct safetensors *s)
{
    struct buf header, data;
    bool met = false;
    buf_init(&header, 0);
    buf_init(&data, 0);
    for (size_t i = 0; i < safetensors_count(s); i++) {
        const struct st_tensor *t = safetensors_at(s, i);
        bool is = !strcmp(t->name, d->tensor);
        char shape[64];
        met = met || is;
        if (is && d->gone) continue;
        shape_words(t, shape);
        size_t begin = data.n;
        buf_add(&data, t->data, t->bytes);
        if (is && d->value >= 0) {
            int32_t v = d->value;
            memcpy(data.data + begin, &v, t->dtype == ST_I32 ? 4 : 2);
        }
        buf_printf(&header, "%s\"%s\":{\"dtype\":\"%s\",\"shape\":[%s],\"data_offsets\":[%zu,%zu]}",
                   header.n ? "," : "{", t->name,
                   is && d->dtype ? d->dtype : st_dtype_name(t->dtype),
                   is && d->shape ? d->shape : shape, begin, data.n);
    }
    assert_true(met);
    buf_add_char(&header, '}');
    uint64_t n = header.n;
    struct buf file;
    buf_init(&file, 0);
    buf_add(&file, &n, 8);
    buf_add(&file, header.data, header.n);
    buf_add(&file, data.data, data.n);
    assert_int_equal(buf_err(&file), OK);
    file_write("model.safetensors", file.data, file.n);
    buf_fini(&header), buf_fini(&data), buf_fini(&file);
}

static void config_copy(const struct golden *g, const char *from, const char *to)
{
    char path[600];
    struct buf text, out;
    buf_init(&text, 0);
    buf_init(&out, 0);
    snprintf(path, sizeof path, "%s/config.json", g->dir);
    must(buf_read_file(&text, path, 0));
    const char *s = buf_string(&text), *at = from ? strstr(s, from) : s;
    assert_non_null(at);
    buf_add(&out, s, (size_t)(at - s));
    if (from) buf_add_string(&out, to);
    buf_add_string(&out, at + (from ? strlen(from) : 0));
    file_write("config.json", out.data, out.n);
    buf_fini(&text), buf_fini(&out);
}

static struct worker_config config_here(const char *dir)
{
    struct worker_config c;
    worker_config_default(&c);
    c.model_dir = dir;
    c.device = "cpu";
    c.n_threads = 1;
    c.n_sequences_max = 2;
    c.step_tokens_max = 64;
    c.kv_cache_bytes = 4 << 20;
    return c;
}

static void refused(const struct worker_config *c, const char *a, const char *b)
{
    struct worker *w = NULL;
    int64_t live = mem_live();
    assert_int_not_equal(worker_create(c, &w), OK);
    assert_null(w);
    assert_int_equal(mem_live(), live);
    if (!strstr(err_detail(), a) || !strstr(err_detail(), b))
        fail_msg("'%s' does not say '%s' and '%s'", err_detail(), a, b);
}

#define LAYER "model.layers.0."
static void damaged_files(void **state)
{
    static const struct damage cases[] = {
        {"gptq", LAYER "mlp.up_proj.qweight", "256,16", NULL, -1, false, "has shape [256, 16]"},
        {"gptq", LAYER "mlp.up_proj.qweight", NULL, "F32", -1, false, "stored as F32, not I32"},
        {"gptq", LAYER "self_attn.o_proj.scales", NULL, NULL, 0x7e00, false, "holds nan"},
        {"gptq", LAYER "self_attn.o_proj.scales", NULL, NULL, 0x7c00, false, "holds inf"},
        {"gptq", LAYER "self_attn.o_proj.scales", NULL, NULL, -1, true, "is missing"},
        {"gptq", LAYER "self_attn.o_proj.scales", NULL, "I16", -1, false, "stored as I16"},
        {"gptq", LAYER "self_attn.v_proj.qzeros", NULL, NULL, -1, true, "is missing"},
        {"gptq", LAYER "self_attn.v_proj.qzeros", "8,1", NULL, -1, false, "has shape [8, 1]"},
        {"gptq_order", LAYER "self_attn.q_proj.g_idx", NULL, NULL, 2, false,
         "input 0 into group 2 of 2"},
        {"gptq_order", LAYER "self_attn.q_proj.g_idx", NULL, NULL, INT32_MAX, false, "of 2"},
        {"gptq_order", LAYER "self_attn.q_proj.g_idx", NULL, NULL, -1, true, "has no 'g_idx'"},
        {"awq", LAYER "mlp.down_proj.qweight", "16,256", NULL, -1, false, "has shape [16, 256]"},
        {"packed4", LAYER "mlp.down_proj.weight_shape", NULL, "F64", -1, false, "not I64"},
        {"packed4_zeros", LAYER "mlp.down_proj.weight_zero_point", NULL, NULL, -1, true,
         "is missing"},
        {"packed4", LAYER "mlp.down_proj.weight_scale", NULL, NULL, 0x7fc0, false, "holds nan"},
    };
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        struct golden g;
        struct safetensors *s;
        golden_open(cases[i].model, &g);
        config_copy(&g, NULL, NULL);
        must(safetensors_open(g.dir, &s));
        weights_write(&cases[i], s);
        struct worker_config c = config_here(folder);
        const char *name = strrchr(cases[i].tensor, '.');
        refused(&c, cases[i].says, strstr(cases[i].says, "has no") ? "WQ" : name);
        safetensors_close(s);
        golden_close(&g);
    }
}

static void contradictions(void **state)
{
    struct golden g;
    struct safetensors *s;
    static const struct damage none = {"gptq", LAYER "mlp.up_proj.qweight", NULL, NULL, -1, false,
                                       ""};
    (void)state;
    golden_open("gptq", &g);
    must(safetensors_open(g.dir, &s));
    weights_write(&none, s);
    struct worker_config c = config_here(folder);
    config_copy(&g, "\"group_size\": 128", "\"group_size\": 96");
    refused(&c, "no multiple of 'group_size' 96", "model.layers.0.self_attn.q_proj");
    config_copy(&g, "\"group_size\": 128", "\"group_size\": 64"); /* the file has others */
    refused(&c, "has shape [1, 128]", "scales");
    config_copy(&g, NULL, NULL);
    c.quantization = "int8";
    refused(&c, "--quantization int8", "int4 weights made by gptq");
    struct quantize_config q = {
        .model_dir = g.dir, .out_dir = "/tmp/heddle-none", .format = "int8"};
    struct quantize_report report;
    q.out_dir = folder;
    char path[100];
    snprintf(path, sizeof path, "%s/model.safetensors", folder);
    remove(path);
    assert_int_equal(model_quantize(&q, &report), ERR_INVALID);
    assert_non_null(strstr(err_detail(), "quantized already, by gptq"));
    safetensors_close(s);
    golden_close(&g);
}

/* --- memory --- */

static void memory_is_counted(void **state)
{
    (void)state;
    for (int i = 0; i < MODELS; i++) {
        struct golden g;
        struct worker *w;
        golden_open(models[i], &g);
        struct worker_config c = config_here(g.dir);
        must(worker_create(&c, &w));
        double planned = (double)w->plan.weight_bytes, taken = (double)w->model->weight_bytes;
        assert_non_null(strstr(w->info.weight_format, "int4"));
        bool mixed = !strcmp(models[i], "gptq_mixed"); /* one matrix of codes is kept in 16 bits */
        if (planned > taken * 1.1 || planned < taken * (mixed ? 0.6 : 0.9))
            fail_msg("%s: %.0f bytes planned, %.0f taken", models[i], planned, taken);
        worker_destroy(w);
        golden_close(&g);
    }
}

static int setup(void **state)
{
    (void)state;
    snprintf(folder, sizeof folder, "/tmp/heddle-int4-XXXXXX");
    return mkdtemp(folder) ? 0 : -1;
}

static int teardown(void **state)
{
    char command[100];
    (void)state;
    snprintf(command, sizeof command, "rm -rf %s", folder);
    return system(command);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(weights_are_those_written),
        cmocka_unit_test(formats_chosen),
        cmocka_unit_test(damaged_files),
        cmocka_unit_test(contradictions),
        cmocka_unit_test(memory_is_counted),
    };
    log_set_level(LOG_ERROR);
    return cmocka_run_group_tests(tests, setup, teardown);
}
