/* heddle.v1.Heddle and grpc.health.v1.Health on a port of their own: the same calls, checks and
 * limits as HTTP, for services that speak gRPC. */
#pragma once
#include "coordinator/front/front.h"
#include "proto/rpc.h"

struct grpc_front;
struct grpc_front_config {
    struct front *front; /* its loops do the work */
    const char *host;    /* with port; or a whole address such as "local:NAME" and port -1 */
    int port;            /* 0 = any */
    struct rpc_tls tls;
};

enum err grpc_front_create(const struct grpc_front_config *config, struct grpc_front **out);
int grpc_front_port(const struct grpc_front *g);
/* Refuses new calls, does not wait. */
void grpc_front_drain(struct grpc_front *g);
/* Ends every call and closes the port. The front's loops must still run. Accepts NULL. */
void grpc_front_stop(struct grpc_front *g);
/* After front_stop. Accepts NULL. */
void grpc_front_destroy(struct grpc_front *g);
