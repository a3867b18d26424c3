/* Codes of a checkpoint into panels, exactly as they are.
 *
 * Where every zero point is 8 and groups are 128 inputs in their own order, that is the INT4
 * format; everything else is INT4_GROUPS, whose zero points lie beside the panels. Both kinds of
 * kernels sum a group's codes exactly before its scale, so what multiplies is (code - zero) * scale
 * without rounding. */
#include "base/mem.h"
#include "kernels/cpu/cpu.h"

#include <string.h>

enum { SLOTS_MAX = 4 * WEIGHT_SIDE_MAX };

static bool is_plain(const struct int4_matrix *m)
{
    return !m->zeros && !m->order && m->group == GROUP_INPUTS;
}

static enum err matrix_check(const struct int4_matrix *m)
{
    if (m->group != 32 && m->group != 64 && m->group != 128)
        FAIL(ERR_UNSUPPORTED, "4-bit weights in groups of %d", m->group);
    if (m->n_slots < 1 || m->n_slots > SLOTS_MAX || m->n_slots % m->group)
        FAIL(ERR_FORMAT, "%lld slots of 4-bit weights in groups of %d", (long long)m->n_slots,
             m->group);
    if (!m->order && m->n_slots < m->n_in)
        FAIL(ERR_FORMAT, "%lld slots for %lld inputs", (long long)m->n_slots, (long long)m->n_in);
    for (int64_t s = 0; m->order && s < m->n_slots; s++)
        if (m->order[s] < -1 || m->order[s] >= m->n_in)
            FAIL(ERR_FORMAT, "slot %lld takes input %d of %lld", (long long)s, m->order[s],
                 (long long)m->n_in);
    return OK;
}

/* One output: its nibbles to the lane of its panel, its scales and zeros to their places. */
static void row_place(struct weight *w, const struct int4_matrix *m, int64_t row)
{
    uint8_t *panel = w->panels + (size_t)(row / PANEL_OUTPUTS) * w->panel_bytes;
    int64_t n_groups = m->n_slots / m->group, lane = row % PANEL_OUTPUTS;
    const uint8_t *codes = m->codes + row * (m->n_slots / 2);
    for (int64_t g = 0; g < n_groups; g++, codes += m->group / 2) {
        uint8_t *group = panel + g * (GROUP_HEADER + m->group * 16);
        memcpy(group + lane * 2, m->scales + row * n_groups + g, 2);
        if (w->zeros)
            w->zeros[(row / PANEL_OUTPUTS * n_groups + g) * PANEL_OUTPUTS + lane] =
                m->zeros ? m->zeros[row * n_groups + g] : 8;
        for (int i = 0; i < m->group; i += 8) {
            const uint8_t *c = codes + i / 2; /* slots i .. i + 7: even step low, odd step high */
            uint8_t *to = group + GROUP_HEADER + i * 16 + lane * 4;
            to[0] = (uint8_t)((c[0] & 15) | c[2] << 4);
            to[1] = (uint8_t)(c[0] >> 4 | (c[2] & 0xf0));
            to[2] = (uint8_t)((c[1] & 15) | c[3] << 4);
            to[3] = (uint8_t)(c[1] >> 4 | (c[3] & 0xf0));
        }
    }
}

struct place_args {
    struct weight *w;
    const struct int4_matrix *m;
};

/* A chunk is one panel. */
static void panel_place(const void *args, int chunk, void *scratch)
{
    const struct place_args *a = args;
    int64_t row = (int64_t)chunk * PANEL_OUTPUTS, end = row + PANEL_OUTPUTS;
    (void)scratch;
    for (end = end < a->m->n_out ? end : a->m->n_out; row < end; row++)
        row_place(a->w, a->m, row);
}

static enum err order_keep(struct weight *w, const struct int4_matrix *m)
{
    if (!m->order) return OK;
    TRY(MEM_NEW_ARRAY(m->n_slots, &w->order));
    memcpy(w->order, m->order, (size_t)m->n_slots * sizeof *w->order);
    return OK;
}

enum err cpu_weight_create_int4(struct backend *b, const struct int4_matrix *m, const float *bias,
                                struct weight **out)
{
    struct cpu_backend *cpu = cpu_of(b);
    struct weight *w = NULL;
    enum err e = OK;
    TRY(matrix_check(m));
    TRY_OUT(MEM_NEW(&w));
    *w = (struct weight){.format = is_plain(m) ? WEIGHT_INT4 : WEIGHT_INT4_GROUPS,
                         .n_out = m->n_out,
                         .n_in = m->n_in,
                         .n_steps = m->n_slots / 4,
                         .group_steps = m->group / 4};
    TRY_OUT(weight_sizes(w));
    ASSERT_CMP(w->n_steps, ==, m->n_slots / 4);
    TRY_OUT(weight_alloc(b, w, bias != NULL));
    TRY_OUT(order_keep(w, m));
    TRY_OUT(activations_reserve(cpu, w));
    if (bias) memcpy(w->bias, bias, (size_t)w->n_out * 4);
    struct place_args args = {w, m};
    pool_run(cpu->pool, &(struct pool_job){.compute = panel_place,
                                           .args = &args,
                                           .args_bytes = sizeof args,
                                           .n_chunks = (int)w->n_panels});
    *out = w;
    w = NULL;
out:
    cpu_weight_destroy(b, w);
    return e;
}
