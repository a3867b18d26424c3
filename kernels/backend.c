/* Finds a backend by name; opens the CUDA plugin. Knows the table, not what is behind it. */
#include "kernels/backend.h"
#include "base/log.h"

#include <dlfcn.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

const char *dtype_name(enum dtype t)
{
    static const char *const names[DTYPE_COUNT] = {"f32", "f16", "bf16", "i32", "int8", "fp8"};
    return (unsigned)t < DTYPE_COUNT ? names[t] : "?";
}

/* The plugin lies in HEDDLE_PLUGIN_DIR, beside the program, or in ../lib/heddle. */
static void *plugin_load(void)
{
    char self[PATH_MAX], path[PATH_MAX + 64];
    const char *dir = getenv("HEDDLE_PLUGIN_DIR");
    ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    self[n > 0 ? n : 0] = 0;
    const char *here = dir ? dir : dirname(self);
    static const char *const places[] = {"%s/heddle_cuda.so", "%s/../lib/heddle/heddle_cuda.so"};
    for (size_t i = 0; i < sizeof places / sizeof *places; i++) {
        snprintf(path, sizeof path, i ? "%s/../lib/heddle/heddle_cuda.so" : "%s/heddle_cuda.so", here);
        if (!access(path, R_OK)) return dlopen(path, RTLD_NOW | RTLD_LOCAL);
    }
    return NULL;
}

static enum err cuda_open(const struct backend_options *options, struct backend **out)
{
    void *plugin = plugin_load();
    if (!plugin) {
        const char *why = dlerror();
        FAIL(ERR_DEVICE, "CUDA declined: heddle_cuda.so %s", why ? why : "not found beside the program");
    }
    const struct backend_ops *ops = dlsym(plugin, "heddle_backend_cuda");
    if (!ops) FAIL(ERR_DEVICE, "CUDA declined: heddle_cuda.so has no heddle_backend_cuda");
    if (ops->abi != BACKEND_ABI)
        FAIL(ERR_DEVICE, "CUDA declined: heddle_cuda.so has ABI %d, this program %d", ops->abi, BACKEND_ABI);
    return ops->open(options, out);
}

enum err backend_open(const char *name, const struct backend_options *options, struct backend **out)
{
    if (!strcmp(name, "cpu")) return backend_cpu.open(options, out);
    if (!strcmp(name, "cuda")) return cuda_open(options, out);
    if (strcmp(name, "auto")) FAIL(ERR_INVALID, "unknown device '%s': auto, cpu or cuda", name);
    if (cuda_open(options, out) == OK) return OK;
    log_info("device cpu: %s", err_detail());
    return backend_cpu.open(options, out);
}
