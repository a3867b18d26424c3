/* What the files that load a model share: the loader's state, and each other's parts of it.
 *
 * weights.c walks the layers; slices.c says which rows and columns are this rank's; vectors.c
 * brings plain floats to the device; packed_load.c takes weights from files of packed ones;
 * int4_load.c those that a checkpoint holds as 4-bit codes. */
#pragma once
#include "worker/packed.h"
#include "worker/source.h"
#include "worker/weights.h"

enum { WEIGHT_PARTS_MAX = 4 }; /* matrices that one weight is stacked of */

struct loader {
    const struct weights_options *options;
    struct model *m;
    struct source source;
    struct backend *backend;
    const struct backend_ops *ops;
    struct matrix_view embedding; /* stays readable: it is mapped or kept */
    float *bias;                  /* [bias_max] stacked biases of one fused weight */
    int64_t bias_max;
    uint64_t done, total;
    bool is_packed; /* the file holds packed weights */
    struct packed_file packed;
    int n_expanded; /* weights of codes that had to become plain numbers, the first's reason */
    const char *expanded_why;
    uint64_t expanded_bytes;
};

/* slices.c: this rank's rows or columns of a role. segment: 0, 1, 2 = q, k, v of SHARD_OUT_QKV. */
struct shard_range loader_slice(const struct model *m, enum role role, int segment);
struct matrix_view view_rows(struct matrix_view v, struct shard_range r);
struct matrix_view view_columns(struct matrix_view v, struct shard_range r);
bool role_is_shard_in(enum role role);
int role_segments(enum role role);

/* weights.c: tells the caller of model_load how far it is. */
void loader_advance(struct loader *l, uint64_t bytes);

/* vectors.c: floats to the device; they are released with the model. */
enum err loader_upload(struct loader *l, const float *host, size_t n, const float **out);
enum err loader_vector(struct loader *l, enum role role, int layer, bool bias, const float **out);
enum err loader_norm(struct loader *l, enum role role, int layer, struct norm_args *out);
enum err loader_rope(struct loader *l, const float **out_cos, const float **out_sin);

/* packed_load.c: a weight of a packed file, its bytes as they are where one rank has this device's
 * layout. */
enum err loader_packed_weight(struct loader *l, const enum role *of, int n_of, int layer,
                              enum weight_format format, struct weight **out);

/* int4_load.c: weights of which the checkpoint holds at least one role as 4-bit codes. bias: of the
 * whole stack, or NULL. */
bool loader_has_codes(const struct loader *l, const enum role *of, int n_of, int layer);
enum err loader_codes_weight(struct loader *l, const enum role *of, int n_of, int layer,
                             const float *bias, struct weight **out);
/* After all is loaded: one line in the log if some weights could not stay codes. */
void loader_codes_report(const struct loader *l);
