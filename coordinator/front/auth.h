/* API keys: kept as SHA-256 digests, compared in constant time. Who may call a route is in the
 * table of routes; this part only says whose key was shown. */
#pragma once
#include "base/buf.h"

#include <stdint.h>

enum { AUTH_KEYS_MAX = 256 };
struct auth {
    unsigned n_keys; /* 0 = everybody may */
    unsigned char digests[AUTH_KEYS_MAX][32];
};

/* A key has 1 to 512 bytes. */
enum err auth_add(struct auth *a, struct span key);
/* Comma-separated keys. */
enum err auth_add_list(struct auth *a, const char *keys);
/* One key a line; empty lines and those that begin with '#' are skipped. */
enum err auth_add_file(struct auth *a, const char *path);
/* The index of the key, or -1. Takes the same time for every wrong key. */
int auth_find(const struct auth *a, struct span key);
/* A number that stands for the key, the same in every run; 0 when there are no keys. */
uint64_t auth_tenant(const struct auth *a, int key_index);
/* The token of "Bearer TOKEN" (any case), or an empty span. */
struct span auth_bearer(struct span authorization);
