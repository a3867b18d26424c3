/* What the files of the CPU backend share: the device, weights, the KV cache, tables by ISA.
 *
 * The idea: one packed layout per weight format and per KV type whatever the instruction set; the
 * ISA chosen at open selects rows of kernels that read those layouts. The reference reads the same
 * layouts in plain C. Operations split into chunks that the pool runs; which thread runs a chunk,
 * and how many there are, never changes a bit of the result. */
#pragma once
#include "kernels/backend.h"
#include "kernels/cpu/pool.h"
#include "kernels/cpu/slab.h"

/* Sanitizers check the kernels of one and two rows; the taller ones repeat their pattern of
 * addresses many times over, unrolled, and would take minutes to compile with checks. */
#define KERNEL_UNCHECKED __attribute__((no_sanitize("address,undefined"), no_sanitize_thread))

enum cpu_isa {
    CPU_ISA_REFERENCE,
    CPU_ISA_AVX2,
    CPU_ISA_AVX512,
    CPU_ISA_VNNI,
    CPU_ISA_BF16,
    CPU_ISA_AMX,
    CPU_ISA_COUNT
};

enum {
    PANEL_OUTPUTS = 32,     /* outputs that one packed panel of a weight computes */
    GROUP_INPUTS = 128,     /* inputs that share a scale in INT4 */
    GROUP_STEPS = 32,       /* of 4 inputs each */
    GROUP_HEADER = 64,      /* bytes before the steps of a group: 32 f16 scales */
    PANEL_ROWS_MAX = 12,    /* rows of activations that one microkernel call takes at most */
    ACTIVATION_ROWS = 1024, /* rows packed at once; longer matmuls run in slices of this many */
    WEIGHT_SIDE_MAX =
        1 << 20, /* inputs or outputs of one weight; int32 sums are exact far beyond */
    HEAD_DIM_MAX = 1024,
    MATMUL_SCRATCH_BYTES = 256 << 10, /* of a chunk */
    OWN_ROWS_BYTES = 192 << 10,       /* behind it: activations that a thread packed for itself */
    NORM_SCRATCH_BYTES = 512 << 10,   /* rows of a row panel that were normed and are packed next */
    ATTENTION_PARTIAL_BYTES = 32 << 20, /* touched as far as long contexts need it */
    FORMATS = WEIGHT_FORMAT_COUNT,
};

/* A packed matrix: n_panels panels of 32 outputs, each n_steps steps long. A step is 4 bytes of a
 * packed activation row: 1 input (F32, F16), 2 (BF16), or 4 (INT8, INT4). Bytes of a step of a
 * panel, output-major: F32 [32] floats; F16 [32] halves; BF16 [32][2]; INT8 [32][4] of q + 128;
 * INT4 two steps share [32][4] bytes of q + 8, the even step in the low nibble, and a group of 32
 * steps begins with its 32 f16 scales. INT4_GROUPS is the same with groups of group_steps, codes as
 * the checkpoint has them, and their zero points beside the panels. Outputs and inputs beyond the
 * matrix are zeros. */
struct weight {
    enum weight_format format;
    int64_t n_out, n_in, n_panels, n_steps;
    size_t panel_bytes, packed_bytes;
    _Atomic(uint8_t *) panels; /* in slab; or in a file until weight_settle has copied it */
    struct slab *slab;         /* NULL: panels are not ours */
    float *scale;              /* INT8: [n_panels * 32], else NULL */
    float *bias;               /* [n_panels * 32] or NULL */
    int64_t group_steps;       /* INT4: GROUP_STEPS; INT4_GROUPS: 8, 16 or 32; else 0 */
    uint8_t *zeros;            /* INT4_GROUPS: [n_panels][n_steps / group_steps][32], else NULL */
    int32_t *order; /* INT4_GROUPS: [n_steps * 4] input of each slot or -1; NULL = as is */
    struct matrix_view table; /* of table_create; then nothing above is set */
};

/* Rows of a format: how inputs become steps; with fewer than prefetch_rows rows the hardware
 * fetches better alone. */
struct format_info {
    int inputs_per_step, step_bytes, header_bytes, steps_multiple, prefetch_rows;
};
extern const struct format_info format_infos[FORMATS];

/* Activations of one matmul, packed for a format: row panels of 1..rows_max rows, each
 * [n_steps][rows] words of 4 bytes. Sized at weight_create for the widest weight. */
struct activations {
    enum weight_format format;
    int n_rows, rows_max, n_row_panels;
    int panel_rows, n_taller; /* rows of a row panel; the first n_taller have one more */
    bool row_major;           /* AMX: words [n_rows][n_steps] instead */
    int64_t n_inputs, n_steps, n_groups;
    int64_t group_steps;  /* that share a correction */
    int32_t offset;       /* what the correction is made of */
    const int32_t *order; /* of the weight, or NULL */
    uint32_t *words;
    float *row_scale;    /* [n_rows]: INT8, INT4; else unused */
    int32_t *correction; /* INT8: [n_rows]; INT4: [n_rows][n_groups]: -offset * sum of the row */
};

/* One call of a microkernel: `rows` rows by one panel by n_steps steps. Accumulators start from
 * scratch unless first, and go back to scratch unless last; then they are scaled and stored. */
struct panel_call {
    const uint8_t *weights;
    const uint32_t *words;
    int64_t words_stride; /* row major: words between rows */
    int64_t n_steps;
    void *scratch; /* [rows][32] floats or int32 */
    bool first, last;
    const int32_t *correction; /* of the first row and group of this call */
    int64_t correction_stride;
    const float *row_scale, *column_scale;
    const float *bias; /* [32] or NULL */
    int64_t group_steps;
    const uint8_t *zeros; /* INT4_GROUPS: [groups][32] from the first group of this call on */
    float *out;
    int64_t out_stride;
    const uint8_t
        *prefetch; /* weights that are needed next: one line a step, `prefetch_bytes` apart */
    int64_t prefetch_bytes, prefetch_second; /* a second line that far from the first */
};
typedef void panel_kernel(const struct panel_call *call, int rows);
/* Packs a row panel: `rows` rows of floats, `stride` apart, into words [n_steps][rows], or, row
 * major, [rows][n_steps]. first: of the rows in row_scale and correction. */
typedef void quantize_kernel(const struct activations *a, const float *x, int64_t stride,
                             int64_t first, int rows, uint32_t *words);

/* The kernels of one ISA; a NULL entry falls back to the ISA below. */
struct matmul_kernels {
    panel_kernel *panel[FORMATS];
    int rows_max[FORMATS];
    bool row_major[FORMATS]; /* the panel kernel takes rows of words, see struct activations */
    quantize_kernel *pack_rows[FORMATS];
};
extern const struct matmul_kernels matmul_reference, matmul_avx2, matmul_avx512, matmul_vnni,
    matmul_bf16, matmul_amx;

/* Kernels of attention: see attention.h. */
struct chunk_call;
typedef void chunk_kernel(const struct chunk_call *call);
/* A query [n] as the chunk kernel reads it, in no more than 4 n bytes. */
typedef void query_kernel(void *to, const float *q, int n);
struct attention_kernels {
    chunk_kernel *chunk[DTYPE_COUNT]; /* by the cache's type; NULL: not in this ISA */
    int rows_max[DTYPE_COUNT];
    query_kernel *query[DTYPE_COUNT]; /* NULL: queries are read as they are */
};
extern const struct attention_kernels attention_avx2, attention_avx512, attention_vnni,
    attention_bf16;

/* Loops over one row, of one ISA; all of them give the same bits. See rows_kernels.h. */
struct row_kernels {
    void (*add)(float *x, const float *y, int64_t n); /* x += y */
    /* x += delta unless NULL, out = norm(x) */
    void (*norm)(float *x, const float *delta, const struct norm_args *args, float *out, int64_t n);
    void (*scale)(float *x, int64_t n, float by, float softcap);
    /* out[i] = act(gate[i]) * up[i], or act(gate[i]) when up is NULL; out may be gate */
    void (*activate)(float *out, const float *gate, const float *up, int64_t n,
                     enum activation kind);
    void (*blend)(float *x, const float *y, float keep, float more,
                  int64_t n); /* x keep + y more */
    void (*to_bf16)(uint16_t *out, const float *x, int64_t n);
    /* rotates the pairs (x[i], x[i + half]) by the angles of cosines c and sines s */
    void (*rotate_halves)(float *x, const float *c, const float *s, int64_t half);
    float (*largest)(const float *x, int64_t n); /* NaN counts as -inf, +inf as FLT_MAX */
    /* keep[i] = e^(a[i] - m), add[i] = e^(b[i] - m) with m the larger of a[i] and b[i] */
    void (*shares)(float *keep, float *add, const float *a, const float *b, int64_t n);
};
extern const struct row_kernels rows_plain, rows_avx2, rows_avx512;

struct cpu_backend {
    struct backend head;
    struct backend_options options;
    enum cpu_isa isa;
    struct pool *pool;
    struct slabs slabs;           /* of packed weights */
    struct matmul_kernels matmul; /* as chosen, no NULL among the formats it can do */
    struct activations activations;
    size_t words_bytes, correction_bytes;
    struct attention_kernels attention_kernels;
    const struct row_kernels *rows;
    const struct attention_kernels *attention; /* the above, or NULL: the reference */
    float *attention_partial; /* ATTENTION_PARTIAL_BYTES; matmul_argmax uses it too */
    int attention_span;  /* SPAN, see attention.h: results depend on it, so benchmarks alone set
                            others */
    int32_t *unit_start; /* [n_seqs_max + 1] */
    int n_seqs_max;
    int32_t *feedback; /* [n_slots_max] */
    void *moe_scratch; /* of the widest layer of experts */
    size_t moe_scratch_bytes;
    uint64_t ticket;
};

static inline struct cpu_backend *cpu_of(struct backend *b)
{
    return (struct cpu_backend *)b;
}

/* Of each (layer, head): the K of all blocks, then the V of all blocks. The K or V of a block is
 * its tiles. A tile is `tile` tokens, for I8 followed by their scales, so that all is one stream. K
 * tile: [head_dim / pair][tile][pair]. V tile: [tile / v_pair][head_dim][v_pair]. pair is 2 for
 * BF16 and 4 for I8 (operands of vdpbf16ps and vpdpbusd), else 1. */
struct kv_cache {
    struct kv_cache_args args;
    int tile, pair, v_pair, width, element_bytes; /* width: head_dim rounded up to pair */
    size_t half_bytes;                            /* K or V of one block and head */
    size_t v_offset;                              /* from a block's K to its V */
    size_t tile_bytes, scale_offset;              /* of a tile, and from one to its scales */
    size_t layer_bytes;
    uint8_t *data;
    size_t bytes;
    bool gathers; /* its beginnings lie in small pages until cpu_kv_settle has been there */
    /* Of cpu_kv_settle alone: beginnings gathered; bytes of every K or V of a layer and head that
     * have their pages, and those that ahead_part of them have by now. */
    int n_gathered, ahead_part;
    size_t ahead_bytes, ahead_next;
    const struct row_kernels *rows;
};

/* K of one head of one block; its V lies v_offset behind. */
static inline uint8_t *kv_head(const struct kv_cache *kv, int layer, int32_t block, int head)
{
    return kv->data + (size_t)layer * kv->layer_bytes + (size_t)head * 2 * kv->v_offset +
           (size_t)block * kv->half_bytes;
}

/* weight.c, pack.c */
enum err cpu_weight_create(struct backend *b, const struct matrix_view *parts, int n_parts,
                           const float *bias, enum weight_format format, struct weight **out);
enum err cpu_table_create(struct backend *b, struct matrix_view table, struct weight **out);
void cpu_weight_destroy(struct backend *b, struct weight *w);
size_t cpu_weight_bytes(const struct weight *w);
/* Memory for the panels, scales and bias of a weight whose shape is set; or for all but panels. */
enum err weight_alloc_scales(struct weight *w, bool with_bias);
enum err weight_alloc(struct backend *b, struct weight *w, bool with_bias);
/* Packs output `row` of the weight from n_in floats. */
void pack_row(struct weight *w, int64_t row, const float *inputs);
/* From format, n_out and n_in: everything else that says how large the weight is. */
enum err weight_sizes(struct weight *w);

/* int4.c: codes of a checkpoint into panels. */
enum err cpu_weight_create_int4(struct backend *b, const struct int4_matrix *matrix,
                                const float *bias, struct weight **out);

/* packed.c: struct weight as bytes of files. The name changes with the bytes. */
#define CPU_PACKED_LAYOUT "cpu-panels-1"
void cpu_weight_export(const struct weight *w, struct packed_weight *out);
enum err cpu_packed_sizes(struct packed_weight *p);
enum err cpu_weight_adopt(struct backend *b, const struct packed_weight *p, struct weight **out);
enum err cpu_weight_settle(struct backend *b, struct weight *w, struct hash128 *out_digest);
enum err cpu_weight_import(struct backend *b, const struct packed_weight *p,
                           struct hash128 *out_digest, struct weight **out);
struct hash128 cpu_packed_digest(const struct packed_weight *p);
void cpu_packed_row(const struct packed_weight *p, int64_t row, float *out);

/* activations.c: memory for the activations of such a weight */
enum err activations_reserve(struct cpu_backend *cpu, const struct weight *w);

/* matmul.c: the driver */
void cpu_matmul(struct backend *b, struct tensor out, struct tensor x, const struct weight *w);
void cpu_matmul_argmax(struct backend *b, struct tensor x, const struct weight *w,
                       int32_t *out_index, float *out_value);
void cpu_norm_matmul(struct backend *b, struct tensor out, const struct norm_input *in,
                     const struct weight *w);
/* The product of what activations_pack_once left in cpu->activations, for benchmarks: kernels apart
 * from packing. */
void cpu_packed_matmul(struct cpu_backend *cpu, struct tensor out, const struct weight *w);
void cpu_feed_forward(struct backend *b, struct tensor out, const struct norm_input *in,
                      const struct weight *up, const struct weight *down, struct tensor act,
                      enum activation kind);
void cpu_norm_matmul_argmax(struct backend *b, const struct norm_input *in, const struct weight *w,
                            int32_t *out_index, float *out_value);

/* elementwise.c */
void cpu_embed(struct backend *b, struct tensor out, const struct weight *table,
               const struct batch *batch);
void cpu_add_positions(struct backend *b, struct tensor x, const struct weight *table, int offset,
                       const struct batch *batch);
void cpu_add_norm(struct backend *b, struct tensor x, struct tensor delta,
                  const struct norm_args *args, struct tensor out);
void cpu_add(struct backend *b, struct tensor x, struct tensor y);
void cpu_scale(struct backend *b, struct tensor x, float by, float softcap);
void cpu_activate(struct backend *b, struct tensor out, struct tensor in, enum activation kind,
                  bool gated);
void cpu_gather(struct backend *b, struct tensor out, struct tensor x, const struct batch *batch);

/* kv.c */
size_t cpu_kv_bytes(struct backend *b, const struct kv_cache_args *args);
enum err cpu_kv_create(struct backend *b, const struct kv_cache_args *args, struct kv_cache **out);
/* kv_pages.c: what the first tokens will lie in, made now. kv->data is set and untouched. */
void kv_pages_begin(struct backend *b, struct kv_cache *kv);
bool cpu_kv_settle(struct backend *b, struct kv_cache *kv, int n_blocks);
void cpu_kv_destroy(struct backend *b, struct kv_cache *kv);
void cpu_kv_copy(struct backend *b, struct kv_cache *kv, const int32_t *src, const int32_t *dst,
                 int n);
void cpu_kv_save(struct backend *b, struct kv_cache *kv, int32_t block, void *host);
void cpu_kv_load(struct backend *b, struct kv_cache *kv, int32_t block, const void *host);
/* Writes K and V [head_dim] of one token; `last` = no later token of its sequence is in the cache.
 */
void kv_write(struct kv_cache *kv, int layer, int head, int32_t cache_slot, const float *k,
              const float *v, bool last);
float kv_read_k(const struct kv_cache *kv, const uint8_t *piece, int offset, int d);
float kv_read_v(const struct kv_cache *kv, const uint8_t *piece, int offset, int d);

/* attention.c */
void cpu_qkv_prepare(struct backend *b, struct tensor qkv, struct kv_cache *kv,
                     const struct attention_args *args, const struct batch *batch);
void cpu_attend(struct backend *b, struct tensor out, struct tensor qkv, struct kv_cache *kv,
                const struct attention_args *args, const struct batch *batch);

/* moe.c */
enum err cpu_moe_create(struct backend *b, const struct moe_args *args, struct moe **out);
void cpu_moe_destroy(struct backend *b, struct moe *m);
void cpu_moe_forward(struct backend *b, struct tensor out, struct tensor x, struct tensor scores,
                     struct moe *m);

/* sample.c */
size_t sample_scratch_bytes(int vocab_size);
void cpu_sample(struct backend *b, struct tensor logits, const struct sample_row *rows, int n_rows,
                struct sample_result *results);
