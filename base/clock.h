/* Time as a value: monotonic microseconds, replaceable in tests and in the simulator. */
#pragma once
#include <stdint.h>

struct clock {
    int64_t (*now_us)(void *ctx);
    void *ctx;
};

int64_t clock_now_us(const struct clock *c);
struct clock clock_real(void);
int64_t clock_monotonic_us(void);
int64_t clock_monotonic_ns(void);
int64_t clock_unix_s(void);
void clock_sleep_us(int64_t us);
