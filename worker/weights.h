/* Checkpoint -> this rank's weights on the backend: found by role, checked, sliced, packed.
 *
 * A slice or a transpose is only another view of the mapped file; the backend packs it once.
 * Knows files and roles; never steps or plans. */
#pragma once
#include "worker/model/model.h"
#include "worker/packed.h"

struct weights_options {
    const char *model_dir;
    bool dummy; /* values from the seed instead of files */
    uint64_t seed;
    enum weight_format format;      /* of matrices in the layers */
    enum weight_format head_format; /* of the output projection and of OPT's projections */
    int context_max;
    bool settles;  /* packed weights may be read from their file until model->settle has moved them */
    int n_threads; /* that may help to prepare what no backend packs; 0 = one */
    void (*progress)(void *ctx, uint64_t bytes_done, uint64_t bytes_total); /* or NULL */
    void *ctx;
};

/* Whole shares: config and group are given, everything else of *out is filled. Errors name the file
 * and the tensor; nothing stays allocated after one. */
enum err model_load(const struct weights_options *options, const struct model_config *config,
                    struct group group, struct backend *backend, struct model **out);
void model_unload(struct model *m); /* accepts NULL */

/* The type of the checkpoint's plain numbers: of its first tensor that has one. file: NULL = what
 * config.json says. */
enum dtype weights_dtype(const struct model_config *config, const struct safetensors *file);
/* What the fused weight whose first role this is is called in a packed file; expert: -1 = none. */
void weights_stem(enum role first, int layer, int expert, char out[PACKED_STEM_MAX]);
/* Digest of config.json, all tensors' headers and the formats: equal means same tokens. */
enum err model_digest(const struct weights_options *options, const struct model_config *config,
                      const struct safetensors *file, char out[33]);
/* Bytes that the matrices and tables of a rank will take on the device, before loading. */
void model_bytes_estimate(const struct model_config *config, struct group group,
                          const struct weights_options *options, enum dtype file_dtype,
                          uint64_t *out_weights, uint64_t *out_tables);
