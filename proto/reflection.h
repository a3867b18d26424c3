/* gRPC server reflection, v1 and v1alpha: tells the services of a server and the descriptors of
 * their messages, so that grpcurl and the like need no files.
 *
 *     n += reflection_methods(r, methods + n);
 *     reflection_serve(r, methods, n);       the whole table: its services are what is listed
 *
 * The descriptors are those of serve.proto, health.proto and reflection.proto, put into the program
 * by the build. Knows descriptors; nothing of the services themselves. */
#pragma once
#include "proto/rpc.h"

struct reflection;
enum { REFLECTION_METHODS = 2 };
enum err reflection_create(struct reflection **out);
/* After the server that has its methods is destroyed. Accepts NULL. */
void reflection_destroy(struct reflection *r);
size_t reflection_methods(struct reflection *r, struct rpc_method out[REFLECTION_METHODS]);
void reflection_serve(struct reflection *r, const struct rpc_method *methods, size_t n_methods);
