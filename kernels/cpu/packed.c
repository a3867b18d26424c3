/* Packed weights as bytes: shown to a writer of files, taken from a file, and read back as numbers.
 *
 * A file holds the bytes of struct weight as they lie in memory, so that taking them is one copy
 * into huge pages, made by all threads, each hashing what it has just copied. The digest is a hash
 * over the hashes of pieces, so that it comes out the same whoever hashed which piece. */
#include "base/mem.h"
#include "kernels/cpu/cpu.h"
#include "kernels/half.h"

#include <string.h>
#include <sys/mman.h>

enum { PIECE_BYTES = 1 << 20, PIECES_MORE = 3, PAGE_BYTES = 4096 };

static int n_pieces(const struct packed_weight *p)
{
    return (int)((p->panels_bytes + PIECE_BYTES - 1) / PIECE_BYTES);
}

static size_t piece_bytes(const struct packed_weight *p, int i)
{
    size_t rest = p->panels_bytes - (size_t)i * PIECE_BYTES;
    return rest < PIECE_BYTES ? rest : PIECE_BYTES;
}

/* Of pieces [n_pieces + PIECES_MORE]: those behind the panels' are filled here. Files keep the
 * result, so that it is made of XXH3 alone. */
static struct hash128 digest_end(const struct packed_weight *p, struct hash128 *pieces)
{
    static const struct hash128 none = {0, 0};
    struct hash128 *more = pieces + n_pieces(p);
    more[0] = (struct hash128){(uint64_t)p->n_out, (uint64_t)p->n_in};
    more[1] = p->scale ? hash_bytes(p->scale, p->n_lanes * sizeof(float), 0) : none;
    more[2] = p->bias ? hash_bytes(p->bias, p->n_lanes * sizeof(float), 0) : none;
    return hash_bytes(pieces, ((size_t)n_pieces(p) + PIECES_MORE) * sizeof *pieces,
                      p->format == WEIGHT_INT8 ? 8 : 4);
}

struct hash128 cpu_packed_digest(const struct packed_weight *p)
{
    struct hash128 *pieces, h = {0, 0};
    if (MEM_NEW_ARRAY(n_pieces(p) + PIECES_MORE, &pieces)) return h;
    for (int i = 0; i < n_pieces(p); i++)
        pieces[i] = hash_bytes((const char *)p->panels + (size_t)i * PIECE_BYTES, piece_bytes(p, i),
                               (uint64_t)i);
    h = digest_end(p, pieces);
    mem_free(pieces);
    return h;
}

void cpu_weight_export(const struct weight *w, struct packed_weight *out)
{
    *out = (struct packed_weight){.format = w->format,
                                  .n_out = w->n_out,
                                  .n_in = w->n_in,
                                  .panels = w->panels,
                                  .scale = w->scale,
                                  .bias = w->bias,
                                  .panels_bytes = w->packed_bytes,
                                  .n_lanes = (size_t)w->n_panels * PANEL_OUTPUTS};
}

static enum err sizes_of(const struct packed_weight *p, struct weight *out)
{
    if (p->format != WEIGHT_INT8 && p->format != WEIGHT_INT4)
        FAIL(ERR_UNSUPPORTED, "packed weights are int8 or int4");
    *out = (struct weight){.format = p->format, .n_out = p->n_out, .n_in = p->n_in};
    return weight_sizes(out);
}

enum err cpu_packed_sizes(struct packed_weight *p)
{
    struct weight w;
    TRY(sizes_of(p, &w));
    p->panels_bytes = w.packed_bytes;
    p->n_lanes = (size_t)w.n_panels * PANEL_OUTPUTS;
    return OK;
}

struct import_args {
    const struct packed_weight *from;
    uint8_t *to;
    struct hash128 *pieces;
};

static void import_piece(const void *args, int chunk, void *scratch)
{
    const struct import_args *a = args;
    size_t at = (size_t)chunk * PIECE_BYTES, n = piece_bytes(a->from, chunk);
    const uint8_t *from = (const uint8_t *)a->from->panels + at;
    uintptr_t page = (uintptr_t)from & ~(uintptr_t)(PAGE_BYTES - 1);
    (void)scratch;
    /* a hint: maps the piece's pages at once instead of one fault every few of them */
    madvise((void *)page, (uintptr_t)from + n - page, MADV_POPULATE_READ);
    memcpy(a->to + at, from, n);
    a->pieces[chunk] = hash_bytes(a->to + at, n, (uint64_t)chunk);
}

/* Everything of the weight but its panels. */
static enum err adopt_rest(struct backend *b, const struct packed_weight *p, struct weight *w)
{
    TRY(sizes_of(p, w));
    ASSERT(p->panels_bytes == w->packed_bytes && !p->scale == (p->format != WEIGHT_INT8));
    TRY(weight_alloc_scales(w, p->bias != NULL));
    if (p->scale) memcpy(w->scale, p->scale, p->n_lanes * sizeof(float));
    if (p->bias) memcpy(w->bias, p->bias, p->n_lanes * sizeof(float));
    return activations_reserve(cpu_of(b), w);
}

enum err cpu_weight_adopt(struct backend *b, const struct packed_weight *p, struct weight **out)
{
    struct weight *w;
    TRY(MEM_NEW(&w));
    enum err e = adopt_rest(b, p, w);
    w->panels = (uint8_t *)(uintptr_t)p->panels; /* only read */
    if (e)
        cpu_weight_destroy(b, w);
    else
        *out = w;
    return e;
}

/* Threads of the pool copy a weight that nobody uses yet; one of its own thread copies alone. */
static enum err panels_copy(struct backend *b, struct weight *w, struct pool *pool,
                            struct hash128 *out_digest)
{
    struct packed_weight from;
    struct hash128 *pieces;
    struct slab *slab;
    uint8_t *to;
    cpu_weight_export(w, &from);
    TRY(MEM_NEW_ARRAY(n_pieces(&from) + PIECES_MORE, &pieces));
    enum err e = slab_take(&cpu_of(b)->slabs, w->packed_bytes, &to, &slab);
    struct import_args args = {&from, to, pieces};
    if (!e && pool)
        pool_run(pool, &(struct pool_job){.compute = import_piece,
                                          .args = &args,
                                          .args_bytes = sizeof args,
                                          .n_chunks = n_pieces(&from)});
    for (int i = 0; !e && !pool && i < n_pieces(&from); i++)
        import_piece(&args, i, NULL);
    if (!e) {
        *out_digest = digest_end(&from, pieces);
        w->slab = slab;
        w->panels = to;
    }
    mem_free(pieces);
    return e;
}

enum err cpu_weight_settle(struct backend *b, struct weight *w, struct hash128 *out_digest)
{
    return panels_copy(b, w, NULL, out_digest);
}

enum err cpu_weight_import(struct backend *b, const struct packed_weight *p,
                           struct hash128 *out_digest, struct weight **out)
{
    struct weight *w;
    TRY(cpu_weight_adopt(b, p, &w));
    enum err e = panels_copy(b, w, cpu_of(b)->pool, out_digest);
    if (e)
        cpu_weight_destroy(b, w);
    else
        *out = w;
    return e;
}

/* --- back to numbers --- */

static void row_int8(const struct packed_weight *p, const uint8_t *panel, int64_t row, float *out)
{
    int lane = (int)(row % PANEL_OUTPUTS);
    for (int64_t i = 0; i < p->n_in; i++)
        out[i] = (float)(panel[i / 4 * 128 + lane * 4 + i % 4] - 128) * p->scale[row];
}

static void row_int4(const struct packed_weight *p, const uint8_t *panel, int64_t row, float *out)
{
    int lane = (int)(row % PANEL_OUTPUTS);
    for (int64_t i = 0; i < p->n_in; i++) {
        const uint8_t *group = panel + i / GROUP_INPUTS * (64 + GROUP_STEPS * 64);
        int64_t at = i % GROUP_INPUTS;
        uint8_t byte = group[64 + at / 8 * 128 + lane * 4 + at % 4];
        uint16_t half;
        memcpy(&half, group + lane * 2, 2);
        out[i] = (float)((at % 8 < 4 ? byte & 15 : byte >> 4) - 8) * f16_to_float(half);
    }
}

void cpu_packed_row(const struct packed_weight *p, int64_t row, float *out)
{
    size_t panel_bytes = p->panels_bytes / (p->n_lanes / PANEL_OUTPUTS);
    const uint8_t *panel = (const uint8_t *)p->panels + (size_t)(row / PANEL_OUTPUTS) * panel_bytes;
    if (p->format == WEIGHT_INT8)
        row_int8(p, panel, row, out);
    else
        row_int4(p, panel, row, out);
}
