/* Any bytes as a configuration file: options set or refused with a reason, never a crash. */
#include "base/conf.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

struct values {
    const char *text;
    int64_t number, bytes;
    bool flag;
};
static const struct conf_row rows[] = {
    {"text", NULL, CONF_STRING, offsetof(struct values, text), 0, 0, NULL, NULL, 1, "G", "h"},
    {"number", "n", CONF_INT, offsetof(struct values, number), 0, 9, "1", NULL, 1, "G", "h"},
    {"bytes", NULL, CONF_BYTES, offsetof(struct values, bytes), 0, 0, "1K", NULL, 1, "G", "h"},
    {"flag", NULL, CONF_BOOL, offsetof(struct values, flag), 0, 0, "true", NULL, 1, "G", "h"},
};

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct values v = {0};
    struct conf c;
    char path[64];
    int fd = memfd_create("conf", 0);
    ASSERT(fd >= 0 && write(fd, data, size) == (ssize_t)size);
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    ASSERT(conf_init(&c, rows, 4, NULL, 1, &v) == OK);
    enum err e = conf_read_yaml(&c, path);
    ASSERT(e ? *err_detail() != 0 : (v.number >= 0 && v.number <= 9));
    conf_fini(&c);
    close(fd);
    return 0;
}
