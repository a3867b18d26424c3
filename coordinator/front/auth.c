/* See auth.h. */
#include "coordinator/front/auth.h"

#include <openssl/crypto.h>
#include <openssl/sha.h>
#include <string.h>
#include <strings.h>

enum { KEY_BYTES_MAX = 512 };

enum err auth_add(struct auth *a, struct span key)
{
    if (!key.n || key.n > KEY_BYTES_MAX)
        FAIL(ERR_INVALID, "an API key has 1 to %d bytes", KEY_BYTES_MAX);
    if (a->n_keys == AUTH_KEYS_MAX) FAIL(ERR_FULL, "more than %d API keys", AUTH_KEYS_MAX);
    SHA256((const unsigned char *)key.data, key.n, a->digests[a->n_keys++]);
    return OK;
}

static enum err add_separated(struct auth *a, const char *text, const char *separators, bool notes)
{
    while (*text) {
        size_t n = strcspn(text, separators);
        struct span key = {text, n};
        while (key.n && (*key.data == ' ' || *key.data == '\t'))
            key.data++, key.n--;
        while (key.n && strchr(" \t\r", key.data[key.n - 1]))
            key.n--;
        if (key.n && !(notes && *key.data == '#')) TRY(auth_add(a, key));
        text += n + (text[n] != 0);
    }
    return OK;
}

enum err auth_add_list(struct auth *a, const char *keys)
{
    return add_separated(a, keys, ",", false);
}

enum err auth_add_file(struct auth *a, const char *path)
{
    struct buf text;
    buf_init(&text, 0);
    enum err e = buf_read_file(&text, path, 1 << 20);
    unsigned before = a->n_keys;
    if (!e) e = add_separated(a, buf_string(&text), "\n", true);
    if (!e && a->n_keys == before) e = err_set(ERR_INVALID, "%s: no key in it", path);
    OPENSSL_cleanse(text.data, text.n);
    buf_fini(&text);
    return e;
}

int auth_find(const struct auth *a, struct span key)
{
    unsigned char digest[32];
    int found = -1;
    SHA256((const unsigned char *)(key.n ? key.data : ""), key.n, digest);
    for (unsigned i = 0; i < a->n_keys; i++)
        if (!CRYPTO_memcmp(digest, a->digests[i], sizeof digest)) found = (int)i;
    return found;
}

uint64_t auth_tenant(const struct auth *a, int key_index)
{
    uint64_t tenant = 0;
    if (key_index >= 0) memcpy(&tenant, a->digests[key_index], sizeof tenant);
    return tenant;
}

struct span auth_bearer(struct span authorization)
{
    if (authorization.n < 7 || strncasecmp(authorization.data, "Bearer ", 7))
        return (struct span){"", 0};
    struct span token = {authorization.data + 7, authorization.n - 7};
    while (token.n && *token.data == ' ')
        token.data++, token.n--;
    return token;
}
