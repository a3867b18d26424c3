/* Where tensors come from: a checkpoint's files, or numbers made from a seed.
 *
 * Asks by role and layer; answers with a view of exactly the role's shape, or an error naming file,
 * tensor and reason. Remembers what was asked for, so that the rest can be reported. */
#pragma once
#include "base/safetensors.h"
#include "kernels/tensor.h"
#include "worker/model/config.h"

enum { SOURCE_TEMPS_MAX = 8, SOURCE_NAME_MAX = 192 };
struct source {
    const struct model_config *config;
    struct safetensors *file; /* NULL = dummy */
    uint64_t seed;
    int expert;         /* whose matrices names mean, where a layer has several */
    const char *prefix; /* what this checkpoint puts before the stems */
    bool *used;         /* [count of tensors] */
    const struct st_tensor *taken[SOURCE_TEMPS_MAX];
    struct source_temp {
        void *mem;
        size_t bytes;
        bool lent;
    } temps[SOURCE_TEMPS_MAX]; /* copies behind views; those given back are used again, because new
                                  pages cost more than what is written to them */
    int n_temps, n_taken;
};

/* The file stays the caller's; NULL = dummy weights. */
enum err source_init(struct source *s, const struct model_config *config, struct safetensors *file,
                     uint64_t seed);
void source_fini(struct source *s);

/* The role's matrix [rows][columns] as the table of roles says, whatever way it is stored. */
enum err source_matrix(struct source *s, enum role role, int layer, struct matrix_view *out);
/* The role's vector, or its bias, as F32 [n] into out. */
enum err source_vector(struct source *s, enum role role, int layer, bool bias, int64_t n,
                       float *out);
/* Views given so far are no longer needed: frees copies, lets go of the file's pages. */
void source_release(struct source *s);
/* Takes the copy behind a view over, so that release does not free it. False when the view lies in
 * the file itself. */
bool source_keep(struct source *s, const void *data, void **out_mem, size_t *out_bytes);
/* The name of a role's tensor in this checkpoint, suffix included: ".weight" or ".bias". */
void source_name(const struct source *s, enum role role, int layer, const char *suffix,
                 char out[SOURCE_NAME_MAX]);
/* A tensor of exactly this shape, marked as asked for; its type, where it is F32, F16 or BF16; and
 * one element of such data. */
enum err source_tensor(struct source *s, const char *name, int n_dims, const int64_t *shape,
                       const struct st_tensor **out);
enum err source_dtype(const struct source *s, const struct st_tensor *t, enum dtype *out);
float source_element(const void *data, enum dtype dtype, int64_t i);
/* Says that a tensor of the file was asked for; NULL is none. */
void source_use(struct source *s, const struct st_tensor *t);
/* Whether the checkpoint holds the role at all. */
bool source_has(const struct source *s, enum role role);
/* After all was read: a tensor that nobody asked for is an error inside a computed layer, a warning
 * elsewhere; known leftovers (masks, rotary frequencies) are ignored. */
enum err source_check_unused(const struct source *s);
