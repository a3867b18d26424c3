/* Matrices of 4-bit codes in a checkpoint: GPTQ, AWQ and compressed-tensors as one form.
 *
 * A role's tensors are found and checked whole; then any rectangle of rows and inputs of them, in
 * any stack, becomes the one struct int4_matrix that backends take, or plain floats. Knows tensors
 * and their layouts (docs/quantize.md lists them); never ranks or devices. */
#pragma once
#include "worker/source.h"

/* The tensors of one role, checked: shapes, types, groups in range, finite scales. */
struct int4_tensors {
    enum quant_method method;
    const struct st_tensor *codes, *scales;
    const struct st_tensor *zeros; /* NULL = 8 everywhere */
    const struct st_tensor *order; /* group of each input; NULL = in their order */
    int64_t n_out, n_in, n_groups, group_size;
    bool zero_less_one, symmetric;
    bool exact; /* every scale is an f16 without rounding */
};

/* Whether the checkpoint holds the role as codes. */
bool int4_has(const struct source *s, enum role role, int layer);
enum err int4_find(struct source *s, enum role role, int layer, struct int4_tensors *out);
/* Columns [first, first + n) of output `row` as the floats that the codes stand for. */
void int4_row(const struct int4_tensors *t, int64_t row, int64_t first, int64_t n, float *out);

/* One by one: the group of an input, the zero point and the scale of an output and group. */
int32_t int4_group(const struct int4_tensors *t, int64_t in);
uint8_t int4_zero(const struct int4_tensors *t, int64_t out, int64_t group);
float int4_scale(const struct int4_tensors *t, int64_t out, int64_t group);
/* Codes of one input for outputs [first, first + n). */
void int4_codes(const struct int4_tensors *t, int64_t in, int64_t first, int64_t n, uint8_t *out);

/* Codes of inputs [in, in + n) of one output, n a multiple of 8, two to a byte, the even one in the
 * low half; false where they do not lie together in the file. */
bool int4_words(const struct int4_tensors *t, int64_t in, int64_t out, int n, uint8_t *codes);

/* Rows [first, first + n) of a role, as one part of a stack. */
struct int4_part {
    struct int4_tensors of;
    int64_t first, n;
};
/* A matrix and the memory that it lies in. */
struct int4_stack {
    struct int4_matrix matrix;
    uint8_t *codes, *zeros;
    uint16_t *scales;
    int32_t *order;
};
/* Stacks parts by rows, inputs [in_first, in_first + n_in) of each, by n_threads threads. All parts
 * must hold their inputs in the same groups: *out_same says whether they do, and only then *out is
 * written. */
enum err int4_stack(const struct int4_part *parts, int n_parts, int64_t in_first, int64_t n_in,
                    int n_threads, bool *out_same, struct int4_stack *out);
void int4_stack_fini(struct int4_stack *s);
