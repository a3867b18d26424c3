/* Which sizes are recorded, when, and what happens where recording is refused. */
#include "worker/graphs.h"
#include "base/log.h"

#include <stdio.h>
#include <string.h>

int graph_sizes(int n_rows_max, int out[GRAPHS_MAX])
{
    int most = n_rows_max < GRAPH_ROWS_MAX ? n_rows_max : GRAPH_ROWS_MAX, n = 0;
    for (int size = 1; size < most && n < GRAPHS_MAX - 1; n++) {
        out[n] = size;
        size += size < 8 ? size : size < 128 ? 8 : 64;
    }
    if (most > 0) out[n++] = most;
    return n;
}

void graphs_init(struct graphs *g, int n_rows_max)
{
    int sizes[GRAPHS_MAX];
    memset(g, 0, sizeof *g);
    g->n = graph_sizes(n_rows_max, sizes);
    for (int i = 0; i < g->n; i++)
        g->all[i].n_rows = sizes[i];
}

void graphs_drop(struct graphs *g, struct backend *b)
{
    for (int i = 0; i < g->n; i++) {
        if (g->all[i].recorded) b->ops->graph_destroy(b, g->all[i].recorded);
        g->all[i].recorded = NULL;
        g->all[i].warm = false;
    }
}

struct graph *graphs_prepare(struct graphs *g, struct step *s)
{
    if (!g->n || s->batch.n_tokens > g->all[g->n - 1].n_rows || !step_is_decode(s)) return NULL;
    for (int i = 0; i < g->n; i++) {
        if (g->all[i].n_rows < s->batch.n_tokens) continue;
        if (g->all[i].refused) return NULL;
        step_pad(s, g->all[i].n_rows);
        return &g->all[i];
    }
    return NULL;
}

static enum err run(struct decoder *d, const struct batch *batch, struct tensor *out_logits)
{
    TRY(decoder_forward(d, batch));
    return decoder_logits(d, 0, batch->n_rows_out, out_logits);
}

static void refuse(struct graph *graph)
{
    log_info("steps of %d rows run without a graph: %s", graph->n_rows, err_detail());
    graph->refused = true;
}

/* Nothing runs while it is recorded. */
static enum err record(struct graphs *g, struct graph *graph, struct decoder *d,
                       const struct batch *batch)
{
    struct backend *b = d->model->backend;
    struct tensor logits;
    char why[256];
    TRY(b->ops->capture_begin(b));
    enum err e = run(d, batch, &logits);
    snprintf(why, sizeof why, "%s", e ? err_detail() : "");
    if (b->ops->capture_end(b, &graph->recorded) != OK) {
        if (!e) refuse(graph);
    } else if (e) {
        b->ops->graph_destroy(b, graph->recorded);
        graph->recorded = NULL;
    } else {
        g->n_recorded++;
    }
    return e ? err_set(e, "%s", why) : OK;
}

/* After an abort of the collective a replay would wait for peers that never come. */
static enum err peers_check(struct decoder *d)
{
    struct tensor none = {d->delta, d->model->backend->activation_dtype, 0, 1, 1};
    if (d->model->group.size == 1) return OK;
    return d->collective->ops->all_reduce_sum(d->collective, none, none);
}

enum err graph_forward(struct graphs *g, struct graph *graph, struct decoder *d,
                       const struct batch *batch, struct tensor *out_logits)
{
    struct backend *b = d->model->backend;
    int64_t vocab = d->model->config.vocab_size;
    if (graph->warm && !graph->recorded && !graph->refused) TRY(record(g, graph, d, batch));
    if (!graph->recorded) {
        graph->warm = true;
        return run(d, batch, out_logits);
    }
    TRY(peers_check(d));
    TRY(b->ops->replay(b, graph->recorded));
    g->n_replayed++;
    d->collective_ns = 0;
    *out_logits = (struct tensor){d->logits, DTYPE_F32, batch->n_rows_out, vocab, vocab};
    return OK;
}
