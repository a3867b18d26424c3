/* Goal: the operations agree with another engine's recorded inputs and outputs.
 * Method: folders op_goldens/NAME of the conformance data hold arrays (.npy) made upstream with
 * PyTorch; each is run at every instruction set and compared within the tolerance recorded there.
 */
#include "unit/kernels/cpu_test.h"

enum { PATH_BYTES = 1024, ARRAY_BYTES_MAX = 1 << 20 };

static const char *conformance;

struct array {
    float *x;
    uint16_t *raw; /* the halves of a BF16 array */
    int64_t n;
};

/* Reads NAME/FILE.npy (format 1.0) of f4, i8 or u2 (BF16 bits). */
static struct array read_npy(const char *folder, const char *file)
{
    static unsigned char bytes[ARRAY_BYTES_MAX];
    char path[PATH_BYTES];
    snprintf(path, sizeof path, "%s/op_goldens/%s/%s.npy", conformance, folder, file);
    FILE *f = fopen(path, "rb");
    if (!f) fail_msg("%s cannot be read", path);
    size_t size = fread(bytes, 1, sizeof bytes, f), head = 10 + (size_t)(bytes[8] | bytes[9] << 8);
    fclose(f);
    assert_true(size > head && !memcmp(bytes, "\x93NUMPY\x01", 7));
    const char *type = strstr((const char *)bytes + 10, "'descr': '");
    assert_non_null(type);
    type += 11;
    size_t item = type[1] == '8' ? 8 : type[1] == '2' ? 2 : 4;
    struct array a = {.n = (int64_t)((size - head) / item)};
    a.x = test_floats(NULL, a.n, 0);
    CHECK(MEM_NEW_ARRAY(a.n, &a.raw));
    for (int64_t i = 0; i < a.n; i++) {
        const unsigned char *at = bytes + head + (size_t)i * item;
        int64_t whole;
        memcpy(&whole, at, item == 8 ? 8 : 2);
        if (item == 2) memcpy(&a.raw[i], at, 2);
        a.x[i] = item == 8 ? (float)whole : load_float(at, item == 2 ? DTYPE_BF16 : DTYPE_F32);
    }
    return a;
}

static void array_free(struct array a)
{
    mem_free(a.x), mem_free(a.raw);
}

static void check(const char *folder, const char *file, const float *got, double tolerance)
{
    struct array want = read_npy(folder, file);
    for (int64_t i = 0; i < want.n; i++)
        if (!(fabs(got[i] - want.x[i]) <= tolerance * (1 + fabs(want.x[i]))))
            fail_msg("%s %s: element %lld is %g, should be %g", folder, file, (long long)i, got[i],
                     want.x[i]);
    assert_true(want.n > 0);
    array_free(want);
}

static void norms(struct backend *b)
{
    struct array x = read_npy("rmsnorm_f32_8x128", "x"),
                 w = read_npy("rmsnorm_f32_8x128", "weight");
    float out[8 * 128];
    struct norm_args args = {NORM_RMS, 1e-6f, w.x, NULL};
    b->ops->add_norm(b, test_tensor(x.x, 8, 128), (struct tensor){0}, &args,
                     test_tensor(out, 8, 128));
    check("rmsnorm_f32_8x128", "out", out, 1e-5);
    array_free(x), array_free(w);
    static const char fused[] = "rmsnorm_fused_residual_f32_8x128";
    struct array delta = read_npy(fused, "x"), residual = read_npy(fused, "residual_in");
    args.weight = (w = read_npy(fused, "weight")).x;
    b->ops->add_norm(b, test_tensor(residual.x, 8, 128), test_tensor(delta.x, 8, 128), &args,
                     test_tensor(out, 8, 128));
    check(fused, "out", out, 1e-5);
    check(fused, "residual_out", residual.x, 1e-5);
    array_free(delta), array_free(residual), array_free(w);
}

static void products(struct backend *b)
{
    struct array a = read_npy("matmul_bf16_16x64x32", "a"),
                 m = read_npy("matmul_bf16_16x64x32", "b");
    float out[16 * 32];
    struct weight *w;
    struct matrix_view view = {m.raw, DTYPE_BF16, 32, 64, 1, 32}; /* stored [64][32] */
    CHECK(b->ops->weight_create(b, &view, 1, NULL, WEIGHT_AUTO, &w));
    b->ops->matmul(b, test_tensor(out, 16, 32), test_tensor(a.x, 16, 64), w);
    check("matmul_bf16_16x64x32", "out", out, 1e-5);
    b->ops->weight_destroy(b, w);
    array_free(a), array_free(m);
    struct array x = read_npy("silu_and_mul_bf16_8x256", "x");
    b->ops->activate(b, test_tensor(out, 8, 128 / 2), test_tensor(x.x, 8, 128), ACTIVATION_SILU,
                     true);
    float wide[8 * 128];
    b->ops->activate(b, test_tensor(wide, 8, 128), test_tensor(x.x, 8, 256), ACTIVATION_SILU, true);
    check("silu_and_mul_bf16_8x256", "out", wide, 0.008);
    array_free(x);
}

static void embeddings(struct backend *b)
{
    struct array table = read_npy("embedding_bf16_32ids", "table"),
                 ids = read_npy("embedding_bf16_32ids", "ids");
    int32_t tokens[32];
    float out[32 * 32];
    struct weight *w;
    for (int i = 0; i < 32; i++)
        tokens[i] = (int32_t)ids.x[i];
    CHECK(b->ops->table_create(b, (struct matrix_view){table.raw, DTYPE_BF16, 64, 32, 32, 1}, &w));
    struct batch batch = {.n_tokens = 32, .token_ids = tokens};
    b->ops->embed(b, test_tensor(out, 32, 32), w, &batch);
    check("embedding_bf16_32ids", "out", out, 1e-5);
    b->ops->weight_destroy(b, w);
    array_free(table), array_free(ids);
}

struct rope_case {
    const char *folder;
    int tokens, n_heads, n_kv_heads, head_dim, rotary_dim;
    bool has_cache; /* recorded cos | sin of every position */
};
static const struct rope_case ropes[] = {
    {"rope_f32_pos_short", 8, 4, 2, 64, 32, false},
    {"long_rope_llama3_neox_f32_bands", 5, 2, 1, 24, 16, true},
    {"long_rope_yarn_neox_f32_truncate", 5, 2, 1, 16, 8, true}};

/* One sequence of `n` tokens with blocks in order, for one call of qkv_prepare or attend. */
struct steps {
    int32_t positions[64], slots[64], starts[2], length, blocks[64];
    struct batch batch;
};

static void steps_init(struct steps *s, int n)
{
    for (int i = 0; i < 64; i++)
        s->positions[i] = s->slots[i] = s->blocks[i] = i;
    s->starts[0] = 0, s->starts[1] = s->length = n;
    s->batch = (struct batch){.n_tokens = n,
                              .n_seqs = 1,
                              .blocks_per_seq_max = 64,
                              .positions = s->positions,
                              .seq_start = s->starts,
                              .context_len = &s->length,
                              .block_table = s->blocks,
                              .cache_slot = s->slots};
}

static void rotations(struct backend *b, const struct rope_case *c)
{
    struct array q = read_npy(c->folder, "q_in"), k = read_npy(c->folder, "k_in"),
                 at = read_npy(c->folder, "positions");
    int half = c->rotary_dim / 2, nq = c->n_heads * c->head_dim, nk = c->n_kv_heads * c->head_dim,
        width = nq + 2 * nk;
    int position_max = 0;
    for (int i = 0; i < c->tokens; i++)
        position_max = (int)fmaxf((float)position_max, at.x[i]);
    float *cosine = test_floats(NULL, (int64_t)(position_max + 1) * half, 0);
    float *sine = test_floats(NULL, (int64_t)(position_max + 1) * half, 0);
    struct array cache = c->has_cache ? read_npy(c->folder, "cos_sin_cache") : (struct array){0};
    for (int p = 0; p <= position_max; p++)
        for (int i = 0; i < half; i++) {
            double angle = p * pow(10000.0, -2.0 * i / c->rotary_dim);
            cosine[p * half + i] = c->has_cache ? cache.x[p * 2 * half + i] : (float)cos(angle);
            sine[p * half + i] =
                c->has_cache ? cache.x[p * 2 * half + half + i] : (float)sin(angle);
        }
    float *rows = test_floats(NULL, (int64_t)c->tokens * width, 0), got_q[4096], got_k[4096];
    struct steps s;
    steps_init(&s, c->tokens);
    for (int i = 0; i < c->tokens; i++) {
        s.positions[i] = (int32_t)at.x[i];
        memcpy(rows + i * width, q.x + i * nq, (size_t)nq * 4);
        memcpy(rows + i * width + nq, k.x + i * nk, (size_t)nk * 4);
    }
    struct kv_cache *kv;
    CHECK(b->ops->kv_create(
        b, &(struct kv_cache_args){1, c->n_kv_heads, c->head_dim, 16, 4, DTYPE_F32}, &kv));
    struct attention_args args = {.n_heads = c->n_heads,
                                  .n_kv_heads = c->n_kv_heads,
                                  .head_dim = c->head_dim,
                                  .rope_cos = cosine,
                                  .rope_sin = sine,
                                  .rotary_dim = c->rotary_dim,
                                  .group = c->n_heads / c->n_kv_heads};
    b->ops->qkv_prepare(b, test_tensor(rows, c->tokens, width), kv, &args, &s.batch);
    for (int i = 0; i < c->tokens; i++) {
        memcpy(got_q + i * nq, rows + i * width, (size_t)nq * 4);
        memcpy(got_k + i * nk, rows + i * width + nq, (size_t)nk * 4);
    }
    check(c->folder, "q_out", got_q, 2e-5);
    check(c->folder, "k_out", got_k, 2e-5);
    b->ops->kv_destroy(b, kv);
    array_free(q), array_free(k), array_free(at), array_free(cache);
    mem_free(cosine), mem_free(sine), mem_free(rows);
}

/* Norm of heads with weight 1 + w, rope of 4 of 8 dimensions, causal attention. */
static void dense_attention(struct backend *b)
{
    static const char folder[] = "dense_attention_f32_small";
    enum { T = 6, H = 4, KV = 2, D = 8, WIDTH = (H + 2 * KV) * D };
    struct array q = read_npy(folder, "q"), k = read_npy(folder, "k"), v = read_npy(folder, "v");
    struct array at = read_npy(folder, "positions"), qn = read_npy(folder, "q_norm_weight"),
                 kn = read_npy(folder, "k_norm_weight");
    float rows[T * WIDTH], out[T * H * D], cosine[64 * 2], sine[64 * 2];
    for (int i = 0; i < D; i++)
        qn.x[i] += 1, kn.x[i] += 1;
    for (int p = 0; p < 64; p++)
        for (int i = 0; i < 2; i++)
            cosine[p * 2 + i] = (float)cos(p * pow(10000, -i / 2.0)),
                           sine[p * 2 + i] = (float)sin(p * pow(10000, -i / 2.0));
    struct steps s;
    steps_init(&s, T);
    for (int t = 0; t < T; t++) {
        s.positions[t] = (int32_t)at.x[t];
        memcpy(rows + t * WIDTH, q.x + t * H * D, H * D * 4);
        memcpy(rows + t * WIDTH + H * D, k.x + t * KV * D, KV * D * 4);
        memcpy(rows + t * WIDTH + (H + KV) * D, v.x + t * KV * D, KV * D * 4);
    }
    struct kv_cache *kv;
    CHECK(b->ops->kv_create(b, &(struct kv_cache_args){1, KV, D, 16, 4, DTYPE_F32}, &kv));
    struct attention_args args = {.n_heads = H,
                                  .n_kv_heads = KV,
                                  .head_dim = D,
                                  .scale = 0.35355339f,
                                  .rope_cos = cosine,
                                  .rope_sin = sine,
                                  .rotary_dim = 4,
                                  .q_norm = qn.x,
                                  .k_norm = kn.x,
                                  .norm_epsilon = 1e-6f,
                                  .group = 2};
    b->ops->qkv_prepare(b, test_tensor(rows, T, WIDTH), kv, &args, &s.batch);
    b->ops->attend(b, test_tensor(out, T, H * D), test_tensor(rows, T, WIDTH), kv, &args, &s.batch);
    check(folder, "attn", out, 2e-4);
    b->ops->kv_destroy(b, kv);
    array_free(q), array_free(k), array_free(v), array_free(at), array_free(qn), array_free(kn);
}

static void all_goldens(void **state)
{
    (void)state;
    for (int isa = 0; isa < TEST_ISAS; isa++) {
        struct backend *b = test_open(test_isas[isa]);
        if (!b) continue;
        norms(b);
        products(b);
        embeddings(b);
        for (int i = 0; i < 3; i++)
            rotations(b, &ropes[i]);
        dense_attention(b);
        b->ops->close(b);
    }
}

int main(void)
{
    char path[PATH_BYTES];
    conformance = getenv("HEDDLE_CONFORMANCE");
    snprintf(path, sizeof path, "%s/op_goldens/rmsnorm_f32_8x128/x.npy",
             conformance ? conformance : "");
    FILE *f = fopen(path, "rb");
    if (!f) {
        printf("skipped: no op_goldens in HEDDLE_CONFORMANCE (%s)\n",
               conformance ? conformance : "not set");
        return 77;
    }
    fclose(f);
    const struct CMUnitTest tests[] = {cmocka_unit_test(all_goldens)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
