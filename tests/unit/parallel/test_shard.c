/* Goal: slices cover everything exactly once, in order, balanced, for every number of ranks.
 * Method: exhaustive over ranks for real and awkward shapes; heads are checked against the
 * definition (query head h uses key/value head h / group). */
#include "parallel/shard.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <string.h>

#include <cmocka.h>

static void test_ranges_cover(void **state)
{
    (void)state;
    static const int64_t sizes[] = {1,     7,     172,   896,    4864,   8192,
                                    11008, 14336, 50257, 128256, 151936, 32000};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        for (int size = 1; size <= 16 && size <= sizes[i]; size++) {
            for (int64_t unit = 1; unit <= 128; unit *= 2) {
                int64_t at = 0;
                for (int rank = 0; rank < size; rank++) {
                    struct shard_range r = shard_rounded(sizes[i], unit, rank, size);
                    assert_int_equal(r.begin, at);
                    assert_true(shard_count(r) > 0);
                    at = r.end;
                }
                assert_int_equal(at, sizes[i]);
            }
        }
    }
}

static void test_rounded_prefers_round_and_balanced(void **state)
{
    (void)state;
    assert_int_equal(shard_rounded(8192, 128, 1, 4).begin, 2048);
    /* 4864 = 38 x 128: over 4 ranks 10 and 9 units are 5 % off, so whole groups are kept. */
    assert_int_equal(shard_rounded(4864, 128, 1, 4).begin % 128, 0);
    /* 50257 over 2: aligned begin, odd end. */
    assert_int_equal(shard_rounded(50257, 128, 1, 2).begin % 128, 0);
    assert_int_equal(shard_rounded(50257, 128, 1, 2).end, 50257);
    /* 172 over 3 cannot be even in larger units. */
    int64_t most = 0;
    for (int rank = 0; rank < 3; rank++) {
        int64_t n = shard_count(shard_rounded(172, 128, rank, 3));
        if (n > most) most = n;
    }
    assert_true(most <= 60);
}

static void test_heads(void **state)
{
    (void)state;
    static const int shapes[][2] = {{14, 2}, {8, 4},  {32, 8}, {12, 12}, {16, 1},
                                    {24, 3}, {28, 4}, {40, 8}, {1, 1}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        int n_heads = shapes[i][0], n_kv = shapes[i][1];
        for (int size = 1; size <= n_heads; size++) {
            int64_t at = 0;
            for (int rank = 0; rank < size; rank++) {
                struct shard_heads s = shard_heads(n_heads, n_kv, rank, size);
                assert_int_equal(s.q.begin, at);
                at = s.q.end;
                assert_true(shard_count(s.q) >= n_heads / size &&
                            shard_count(s.q) <= n_heads / size + 1);
                for (int64_t h = 0; h < shard_count(s.q); h++) {
                    int64_t global = (s.q.begin + h) / (n_heads / n_kv);
                    int64_t local = (h + s.head_offset) / s.group - s.kv_offset;
                    assert_true(local >= 0 && local < shard_count(s.kv));
                    assert_int_equal(s.kv.begin + local, global);
                }
            }
            assert_int_equal(at, n_heads);
        }
    }
}

static void test_kv_heads_repeat_when_ranks_outnumber_them(void **state)
{
    (void)state;
    for (int rank = 0; rank < 4; rank++) {
        struct shard_heads s = shard_heads(14, 2, rank, 4);
        assert_int_equal(shard_count(s.kv), 1);
        assert_int_equal(s.kv.begin, rank / 2);
    }
    assert_int_equal(shard_count(shard_heads(14, 2, 1, 3).kv), 2);
}

static void test_impossible_splits_are_refused(void **state)
{
    (void)state;
    assert_int_equal(shard_check(14, 2, 4864, 151936, 14), OK);
    assert_int_equal(shard_check(14, 2, 4864, 151936, 15), ERR_UNSUPPORTED);
    assert_non_null(strstr(err_detail(), "1 to 14"));
    assert_int_equal(shard_check(14, 2, 4864, 151936, 0), ERR_UNSUPPORTED);
    assert_int_equal(shard_check(14, 4, 4864, 151936, 2), ERR_UNSUPPORTED);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_ranges_cover),
        cmocka_unit_test(test_rounded_prefers_round_and_balanced),
        cmocka_unit_test(test_heads),
        cmocka_unit_test(test_kv_heads_repeat_when_ranks_outnumber_them),
        cmocka_unit_test(test_impossible_splits_are_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
