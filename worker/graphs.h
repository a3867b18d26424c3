/* Decode steps recorded as graphs: one for each of a few sizes, to which smaller steps are padded.
 *
 * A step that is replayed costs the host three calls instead of some hundred. A size is first run
 * as it is, which loads kernels and joins peers, then recorded, then replayed for as long as the
 * group lives. Knows sizes and the backend's recording; never what is in a step. */
#pragma once
#include "kernels/backend.h"
#include "worker/model/decoder.h"
#include "worker/step.h"

enum { GRAPHS_MAX = 40, GRAPH_ROWS_MAX = 512, GRAPH_BYTES = 4 << 20 };

struct graph {
    int n_rows; /* of the padded step */
    bool warm, refused;
    void *recorded; /* NULL = not yet */
};
struct graphs {
    struct graph all[GRAPHS_MAX]; /* ascending n_rows */
    int n;                        /* 0 = every step runs as it is */
    uint64_t n_recorded, n_replayed;
};

/* How many sizes serve steps of up to n_rows_max rows, and which: 1, 2, 4, 8, then every 8th up to
 * 128, every 64th beyond, the last one n_rows_max itself or GRAPH_ROWS_MAX. */
int graph_sizes(int n_rows_max, int out[GRAPHS_MAX]);
/* n_rows_max 0: none. */
void graphs_init(struct graphs *g, int n_rows_max);
/* Forgets what was recorded. Graphs name the collective that they were recorded with: called before
 * it is closed. */
void graphs_drop(struct graphs *g, struct backend *b);
/* Pads the step and returns its size's place, or NULL where it has to run as it is. */
struct graph *graphs_prepare(struct graphs *g, struct step *s);
/* After batch_begin: the whole forward pass up to the logits [n_rows][vocab], by the graph if there
 * is one. */
enum err graph_forward(struct graphs *g, struct graph *graph, struct decoder *d,
                       const struct batch *batch, struct tensor *out_logits);
