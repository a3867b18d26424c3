/* Goal: memory is counted, limits hold, and running out is an error that damages nothing.
 * Method: each allocation of a sequence fails in turn; what was there before must be unchanged. */
#include "base/arena.h"
#include "base/buf.h"
#include "base/mem.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
// clang-format off
#include <cmocka.h>
// clang-format on

static void sizes_are_checked(void **state)
{
    (void)state;
    void *p = NULL;
    assert_int_equal(mem_alloc_array(SIZE_MAX / 2, 3, &p), ERR_NO_MEMORY);
    assert_null(p);
    assert_int_equal(mem_alloc_aligned(4096, 10000, &p), OK);
    assert_int_equal((uintptr_t)p % 4096, 0);
    mem_free(p);
}

/* One round of work; returns the first error. */
static enum err work(struct arena *a, struct buf *b)
{
    void *p;
    for (int i = 0; i < 20; i++) {
        TRY(arena_alloc(a, 100, &p));
        TRY(buf_printf(b, "line %d\n", i));
    }
    return OK;
}

static void every_allocation_may_fail(void **state)
{
    (void)state;
    int64_t before = mem_live();
    int failures = 0;
    for (int64_t n = 1;; n++) {
        struct arena a;
        struct buf b;
        arena_init(&a, 256, 0);
        buf_init(&b, 0);
        mem_fail_at(n);
        enum err e = work(&a, &b);
        mem_fail_at(0);
        if (e) {
            assert_int_equal(e, ERR_NO_MEMORY);
            assert_true(b.n == 0 || b.data[b.n - 1] == '\n'); /* never half a line */
            failures++;
        }
        arena_fini(&a);
        buf_fini(&b);
        assert_int_equal(mem_live(), before);
        if (!e) break;
    }
    assert_true(failures > 5);
}

static void arena_keeps_its_chunks(void **state)
{
    (void)state;
    struct arena a;
    void *p;
    arena_init(&a, 1000, 5000);
    for (int round = 0; round < 3; round++) {
        int64_t made = mem_made();
        for (int i = 0; i < 40; i++) {
            assert_int_equal(arena_alloc(&a, 100, &p), OK);
            for (int k = 0; k < 100; k++) assert_int_equal(((char *)p)[k], 0);
            memset(p, 0xff, 100);
        }
        if (round) assert_int_equal(mem_made(), made); /* nothing new after the first round */
        arena_reset(&a);
    }
    assert_int_equal(arena_alloc(&a, 6000, &p), ERR_FULL);
    assert_int_equal(arena_alloc(&a, SIZE_MAX - 3, &p), ERR_NO_MEMORY);
    arena_fini(&a);
}

static void buf_limit_keeps_the_content(void **state)
{
    (void)state;
    struct buf b;
    buf_init(&b, 8);
    assert_int_equal(buf_add_string(&b, "12345"), OK);
    assert_int_equal(buf_add_string(&b, "6789"), ERR_TOO_BIG);
    assert_string_equal(buf_string(&b), "12345");
    assert_int_equal(buf_add_string(&b, "6"), ERR_TOO_BIG); /* the failure is remembered */
    buf_clear(&b);
    assert_int_equal(buf_add_string(&b, "12345678"), OK);
    buf_fini(&b);
}

static void files_are_named_in_errors(void **state)
{
    (void)state;
    struct buf b;
    buf_init(&b, 0);
    assert_int_equal(buf_read_file(&b, "/nonexistent/file", 0), ERR_NOT_FOUND);
    assert_non_null(strstr(err_detail(), "/nonexistent/file"));
    assert_int_equal(buf_read_file(&b, "/", 0), ERR_IO);
    assert_int_equal(buf_read_file(&b, "/dev/zero", 100), ERR_TOO_LONG);
    buf_fini(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sizes_are_checked),           cmocka_unit_test(every_allocation_may_fail),
        cmocka_unit_test(arena_keeps_its_chunks),      cmocka_unit_test(buf_limit_keeps_the_content),
        cmocka_unit_test(files_are_named_in_errors),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
