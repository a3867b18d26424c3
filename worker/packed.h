/* Checkpoints of packed weights, as heddle quantize writes them: what they are called and whether
 * they are what they say. docs/quantize.md describes the files.
 *
 * Every weight of the forward pass (q, k and v as one, gate and up as one) is one tensor of bytes
 * in a device's own layout, with its scales and its bias beside it and a digest of all three in the
 * file's metadata; tables and vectors lie there as in any checkpoint. Knows files and names; never
 * ranks, and of devices only the name of a layout. */
#pragma once
#include "base/safetensors.h"
#include "kernels/backend.h"

enum { PACKED_STEM_MAX = 48, PACKED_NAME_MAX = 80 };
#define PACKED_FORMAT_KEY  "heddle.format" /* "packed-1" */
#define PACKED_FORMAT      "packed-1"
#define PACKED_LAYOUT_KEY  "heddle.layout"
#define PACKED_WEIGHTS_KEY "heddle.weights"
#define PACKED_HEAD_KEY    "heddle.head"
#define PACKED_DTYPE_KEY   "heddle.dtype"
#define PACKED_DIGEST_KEY  "heddle.digest." /* and the weight's stem */

struct packed_file {
    const char *layout;                     /* lives with the file */
    enum weight_format format, head_format; /* INT8 or INT4 */
    enum dtype dtype;                       /* of the checkpoint that was packed */
};

/* *out_packed: whether this is such a checkpoint at all; only then *out is written. */
enum err packed_read(const struct safetensors *file, bool *out_packed, struct packed_file *out);
/* "layers.3.qkv" of a layer's role, "layers.3.experts.7.up" of an expert's, "lm_head" of one that
 * has no layer; -1 = none. */
void packed_stem(const char *role, int layer, int expert, char out[PACKED_STEM_MAX]);
/* The tensors of one weight, checked for type and size; *out_digest is what the file says. */
struct packed_parts {
    const struct st_tensor *panels, *scale, *bias; /* NULL where there is none */
};
enum err packed_find(const struct safetensors *file, const char *stem, bool biased,
                     struct packed_weight *weight, struct packed_parts *out_parts,
                     struct hash128 *out_digest);
/* ERR_FORMAT where the bytes are not those that were written. */
enum err packed_verify(const struct safetensors *file, const struct packed_parts *parts,
                       struct hash128 want, struct hash128 have);
