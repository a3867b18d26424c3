/* Time. Knows nothing of deadlines. */
#include "base/clock.h"

#include <errno.h>
#include <time.h>

int64_t clock_monotonic_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

int64_t clock_monotonic_us(void) { return clock_monotonic_ns() / 1000; }

int64_t clock_unix_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return t.tv_sec;
}

static int64_t real_now(void *ctx)
{
    (void)ctx;
    return clock_monotonic_us();
}

struct clock clock_real(void) { return (struct clock){.now_us = real_now}; }
int64_t clock_now_us(const struct clock *c) { return c->now_us(c->ctx); }

void clock_sleep_us(int64_t us)
{
    struct timespec t = {.tv_sec = us / 1000000, .tv_nsec = us % 1000000 * 1000};
    while (nanosleep(&t, &t) && errno == EINTR) {}
}
