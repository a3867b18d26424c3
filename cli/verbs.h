/* The verbs of the one program: each takes its parsed options and returns the exit code. */
#pragma once
#include "cli/options.h"

int verb_serve(struct conf *c, struct options *o);
int verb_coordinator(struct conf *c, struct options *o);
int verb_worker(struct conf *c, struct options *o);
int verb_chat(struct conf *c, struct options *o);
int verb_inspect(struct conf *c, struct options *o);
int verb_tokenize(struct conf *c, struct options *o);
int verb_plan(struct conf *c, struct options *o);
int verb_doctor(struct conf *c, struct options *o);
int verb_quantize(struct conf *c, struct options *o);

/* Ends a verb that cannot go on: one line with the cause, exit code 1. */
int verb_fail(const char *verb);
/* The cluster token from --cluster-token-file or --cluster-token; NULL = none. Lives in the conf. */
enum err verb_cluster_token(struct conf *c, const struct options *o, const char **out);
