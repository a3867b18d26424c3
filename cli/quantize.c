/* heddle quantize: a model's weights packed in 8 or 4 bits, once instead of at every start. */
#include "cli/verbs.h"
#include "worker/quantize.h"

#include <stdio.h>
#include <string.h>

int verb_quantize(struct conf *c, struct options *o)
{
    struct quantize_report report;
    struct quantize_config config = {
        .model_dir = o->model ? o->model : c->n_positionals ? c->positionals[0] : NULL,
        .out_dir = o->output,
        .format = o->quantization,
        .head_format = o->head_quantization,
        .n_threads = (int)o->threads,
        .dummy = !strcmp(o->load_format, "dummy"),
        .seed = (uint64_t)o->seed,
    };
    enum err e = OK;
    if (!config.model_dir) e = err_set(ERR_INVALID, "which model? heddle quantize MODEL --format int8|int4 --out DIR");
    else if (!config.out_dir) e = err_set(ERR_INVALID, "where to? --out DIR");
    else if (!strcmp(config.format, "none")) e = err_set(ERR_INVALID, "--format int8 or --format int4");
    if (!e) e = model_quantize(&config, &report);
    if (e) return verb_fail("quantize");
    printf("%s: %.2f GiB of %s weights (%.2f GiB before) in %.1f s\n", config.out_dir,
           (double)report.bytes_after / (1 << 30), config.format, (double)report.bytes_before / (1 << 30), report.seconds);
    return 0;
}
