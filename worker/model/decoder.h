/* The one forward pass, for every architecture: token ids in, logits of the wanted rows out.
 *
 * All-reduce follows the output projection of attention and of the feed-forward, and nothing else;
 * logits are gathered from the vocabulary's slices. Knows a model, a batch and a collective; never
 * plans or requests. */
#pragma once
#include "worker/model/model.h"

struct decoder {
    struct model *model;
    struct collective *collective; /* of the group; set before the first step */
    struct kv_cache *kv;
    int n_tokens_max, logits_rows_max;
    /* Device memory, activation type: x, h, delta [n_tokens_max][hidden]; qkv, att and the
     * feed-forward's share one piece. embedded [n_tokens_max][embed_dim] where narrower. */
    void *x, *h, *delta, *scratch, *embedded;
    float *logits; /* device [logits_rows_max][vocab] */
    /* What the last decoder_forward left: rows of the residual stream and what is still to be
     * added. */
    struct tensor rows, rows_delta;
    int64_t collective_ns; /* spent in collectives since the last decoder_forward began */
};

enum err decoder_init(struct decoder *d, struct model *model, int n_tokens_max,
                      int logits_rows_max);
void decoder_fini(struct decoder *d); /* accepts zeroed memory */
/* Bytes that decoder_init will take on the device. */
uint64_t decoder_bytes(const struct model_config *c, struct group g, const struct backend *b,
                       int n_tokens_max, int logits_rows_max);
/* Bytes of the largest all-reduce and all-gather, for struct collective_options. */
void decoder_collective_sizes(const struct decoder *d, size_t *out_reduce, size_t *out_gather);

/* Runs all layers over the batch. Without rows_out the last layer stops when K and V are written.
 */
enum err decoder_forward(struct decoder *d, const struct batch *batch);
/* Logits [n][vocab] F32 of rows first .. first + n of batch->rows_out; n <= logits_rows_max. Each
 * row once. out_logits lies in memory of the decoder, valid until the next call. */
enum err decoder_logits(struct decoder *d, int first, int n, struct tensor *out_logits);
/* The token of the largest logit of each of those rows, ties to the lowest, as greedy sampling
 * takes it; the logits themselves are never written. Only where decoder_has_argmax. */
bool decoder_has_argmax(const struct decoder *d);
enum err decoder_argmax(struct decoder *d, int first, int n, int32_t *out_tokens);
