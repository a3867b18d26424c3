/* Where the instrumentation of -fsanitize=thread ends in the plugin that watches for races: every
 * access of a kernel goes to race.cc. The names are the compiler's. */
#include "race.h"

using emu::race_touch;
#define HERE __builtin_return_address(0)
#define HOOKS(n)                                                                                    \
    void __tsan_read##n(void *p) { race_touch(p, n, emu::RACE_READ, HERE); }                        \
    void __tsan_write##n(void *p) { race_touch(p, n, emu::RACE_WRITE, HERE); }                      \
    void __tsan_unaligned_read##n(void *p) { race_touch(p, n, emu::RACE_READ, HERE); }              \
    void __tsan_unaligned_write##n(void *p) { race_touch(p, n, emu::RACE_WRITE, HERE); }

#define ATOMICS(bits, type)                                                                         \
    type __tsan_atomic##bits##_fetch_add(volatile type *p, type v, int)                             \
    {                                                                                               \
        race_touch((void *)p, sizeof v, emu::RACE_ATOMIC, HERE);                                    \
        return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                          \
    }                                                                                               \
    type __tsan_atomic##bits##_exchange(volatile type *p, type v, int)                              \
    {                                                                                               \
        race_touch((void *)p, sizeof v, emu::RACE_ATOMIC, HERE);                                    \
        return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                         \
    }                                                                                               \
    type __tsan_atomic##bits##_load(const volatile type *p, int)                                    \
    {                                                                                               \
        race_touch((void *)p, sizeof(type), emu::RACE_ATOMIC, HERE);                                \
        return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                \
    }                                                                                               \
    void __tsan_atomic##bits##_store(volatile type *p, type v, int)                                 \
    {                                                                                               \
        race_touch((void *)p, sizeof v, emu::RACE_ATOMIC, HERE);                                    \
        __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                   \
    }                                                                                               \
    int __tsan_atomic##bits##_compare_exchange_strong(volatile type *p, type *expected, type v, int, int) \
    {                                                                                               \
        race_touch((void *)p, sizeof v, emu::RACE_ATOMIC, HERE);                                    \
        return __atomic_compare_exchange_n(p, expected, v, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);  \
    }                                                                                               \
    int __tsan_atomic##bits##_compare_exchange_weak(volatile type *p, type *expected, type v, int, int) \
    {                                                                                               \
        race_touch((void *)p, sizeof v, emu::RACE_ATOMIC, HERE);                                    \
        return __atomic_compare_exchange_n(p, expected, v, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);  \
    }

extern "C" {
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)
ATOMICS(32, uint32_t) ATOMICS(64, uint64_t)
void __tsan_read_range(void *p, size_t n) { race_touch(p, n, emu::RACE_READ, HERE); }
void __tsan_write_range(void *p, size_t n) { race_touch(p, n, emu::RACE_WRITE, HERE); }
void __tsan_vptr_read(void **) {}
void __tsan_vptr_update(void **, void *) {}
void __tsan_func_entry(void *) {}
void __tsan_func_exit(void) {}
void __tsan_init(void) { emu::race_watching = true; }
}
