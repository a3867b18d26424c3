/* Runs a fuzz target without libFuzzer: every seed of a corpus folder, then a fixed number of
 * mutations of them from a fixed seed, so that each test run exercises every parser.
 *
 * usage: NAME_fuzz [CORPUS_DIR] ; HEDDLE_FUZZ_RUNS sets the number of mutations (default 2000). */
#include "base/buf.h"
#include "base/rand.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { SEEDS_MAX = 512, SEED_BYTES_MAX = 1 << 16 };
static struct buf seeds[SEEDS_MAX];
static int n_seeds;

static void load_corpus(const char *path)
{
    DIR *dir = path ? opendir(path) : NULL;
    for (struct dirent *entry; dir && (entry = readdir(dir)) && n_seeds < SEEDS_MAX;) {
        char file[4096];
        if (entry->d_name[0] == '.') continue;
        snprintf(file, sizeof file, "%s/%s", path, entry->d_name);
        buf_init(&seeds[n_seeds], 0);
        if (buf_read_file(&seeds[n_seeds], file, SEED_BYTES_MAX) == OK) n_seeds++;
    }
    if (dir) closedir(dir);
    if (!n_seeds) {
        buf_init(&seeds[0], 0);
        buf_add_string(&seeds[0], "seed");
        n_seeds = 1;
    }
}

/* Changes up to eight places: flips, overwrites, cuts, repeats, or splices from another seed. */
static size_t mutate(struct rand *r, uint8_t *bytes, size_t n, size_t size)
{
    static const uint8_t nasty[] = {0, 1, 0x7f, 0x80, 0xff, '"', '\\', '{', '}', '[', ']', '%', '\n', 0xed, 0xf4};
    for (uint64_t times = 1 + rand_below(r, 8); times; times--) {
        size_t at = n ? (size_t)rand_below(r, n) : 0;
        switch (rand_below(r, 6)) {
        case 0: if (n) bytes[at] ^= (uint8_t)(1u << rand_below(r, 8)); break;
        case 1: if (n) bytes[at] = nasty[rand_below(r, sizeof nasty)]; break;
        case 2: n = at; break;
        case 3: {
            size_t len = (size_t)rand_below(r, 32);
            if (at + len > n || n + len > size) break;
            memmove(bytes + at + len, bytes + at, n - at);
            n += len;
            break;
        }
        case 4: {
            struct buf *other = &seeds[rand_below(r, (uint64_t)n_seeds)];
            size_t len = other->n ? (size_t)rand_below(r, other->n) : 0;
            if (at + len > size) break;
            if (len) memcpy(bytes + at, other->data, len);
            if (at + len > n) n = at + len;
            break;
        }
        default: if (n >= 8) { uint64_t word = rand_next(r) >> rand_below(r, 64); memcpy(bytes + at % (n - 7), &word, 8); }
        }
    }
    return n;
}

int main(int argc, char **argv)
{
    const char *env = getenv("HEDDLE_FUZZ_RUNS");
    long runs = env ? strtol(env, NULL, 10) : 2000;
    load_corpus(argc > 1 ? argv[1] : NULL);
    for (int i = 0; i < n_seeds; i++)
        LLVMFuzzerTestOneInput((const uint8_t *)buf_string(&seeds[i]), seeds[i].n);
    struct rand r = rand_seeded(20);
    uint8_t *bytes = malloc(2 * SEED_BYTES_MAX);
    for (long i = 0; i < runs; i++) {
        struct buf *seed = &seeds[rand_below(&r, (uint64_t)n_seeds)];
        if (seed->n) memcpy(bytes, seed->data, seed->n);
        size_t n = mutate(&r, bytes, seed->n, 2 * SEED_BYTES_MAX);
        uint8_t *exact = malloc(n ? n : 1); /* exact size, so that AddressSanitizer sees one byte too far */
        memcpy(exact, bytes, n);
        LLVMFuzzerTestOneInput(exact, n);
        free(exact);
    }
    for (int i = 0; i < n_seeds; i++) buf_fini(&seeds[i]);
    free(bytes);
    printf("%d seeds, %ld mutations\n", n_seeds, runs);
    return 0;
}
