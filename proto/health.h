/* grpc.health.v1.Health: Check, Watch and List, asked by load balancers and probes without a token.
 *
 *     n += health_methods(h, methods + n);   when the server's table is made
 *     health_changed(h);                     when a status may have changed: watchers hear at once
 *
 * Knows names and statuses; why a server is ready is the callback's business. */
#pragma once
#include "proto/rpc.h"

enum health_status { HEALTH_UNKNOWN, HEALTH_SERVING, HEALTH_NOT_SERVING, HEALTH_SERVICE_UNKNOWN };

struct health_config {
    /* The status of a service by name; HEALTH_SERVICE_UNKNOWN for a name that it does not know. Any
     * thread, must return at once. */
    enum health_status (*status)(void *ctx, const char *service);
    void *ctx;
    const char *const *services; /* [n_services] the names that List tells; must live */
    size_t n_services;
    uint32_t poll_ms; /* how often watched statuses are looked at without health_changed; 0 = 500 */
};

struct health;
enum { HEALTH_METHODS = 3, HEALTH_WATCHERS_MAX = 256 };
enum err health_create(const struct health_config *config, struct health **out);
/* After the server that has its methods is destroyed. Accepts NULL. */
void health_destroy(struct health *h);
size_t health_methods(struct health *h, struct rpc_method out[HEALTH_METHODS]);
void health_changed(struct health *h);
