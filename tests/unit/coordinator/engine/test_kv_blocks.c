/* Goal: no block is lost, shared by mistake or named too early. Method: single rules on small
 * managers, then a random walk compared with counts kept beside it. */
#include "base/mem.h"
#include "base/rand.h"
#include "coordinator/engine/kv_blocks.h"

#include <setjmp.h>
#include <stdarg.h>
#include <string.h>
// clang-format off
#include <cmocka.h>
// clang-format on

static struct hash128 key_of(uint64_t n)
{
    return hash_bytes(&n, sizeof n, 5);
}

static void freed_blocks_wait_for_their_step(void **state)
{
    struct kv_blocks kv;
    (void)state;
    assert_int_equal(kv_blocks_init(&kv, 2, 16), OK);
    uint32_t a = kv_blocks_take(&kv), b = kv_blocks_take(&kv);
    assert_int_equal(kv_blocks_take(&kv), KV_NONE);
    kv_blocks_unref(&kv, a, 7);
    kv_blocks_unref(&kv, b, 8);
    kv_blocks_acked(&kv, 6);
    assert_int_equal(kv_blocks_available(&kv), 0);
    kv_blocks_acked(&kv, 7);
    assert_int_equal(kv_blocks_take(&kv), a);
    assert_int_equal(kv_blocks_take(&kv), KV_NONE);
    kv_blocks_acked(&kv, 8);
    assert_int_equal(kv_blocks_take(&kv), b);
    kv_blocks_check(&kv);
    kv_blocks_fini(&kv);
}

static void found_in_limbo_and_freed_again_waits_anew(void **state)
{
    struct kv_blocks kv;
    uint32_t a, found, n_cached;
    struct hash128 key = key_of(1);
    (void)state;
    assert_int_equal(kv_blocks_init(&kv, 1, 16), OK);
    a = kv_blocks_take(&kv);
    kv_blocks_register(&kv, a, key);
    kv_blocks_unref(&kv, a, 3);
    assert_int_equal(kv_blocks_match(&kv, &key, 1, &n_cached, &found), 1);
    assert_int_equal(n_cached, 0); /* still held: it costs no available block */
    assert_int_equal(found, a);
    kv_blocks_ref(&kv, found);
    kv_blocks_unref(&kv, a, 5);
    kv_blocks_acked(&kv, 3);
    assert_int_equal(kv_blocks_available(&kv), 0);
    kv_blocks_check(&kv);
    kv_blocks_acked(&kv, 5);
    assert_int_equal(kv.n_cached, 1);
    kv_blocks_check(&kv);
    kv_blocks_fini(&kv);
}

static void leaves_are_evicted_before_their_prefix(void **state)
{
    struct kv_blocks kv;
    struct hash128 keys[4];
    uint32_t blocks[4], n_cached;
    (void)state;
    assert_int_equal(kv_blocks_init(&kv, 4, 16), OK);
    for (uint32_t i = 0; i < 4; i++) {
        keys[i] = key_of(i);
        blocks[i] = kv_blocks_take(&kv);
        kv_blocks_register(&kv, blocks[i], keys[i]);
    }
    for (uint32_t i = 4; i-- > 0;)
        kv_blocks_unref(&kv, blocks[i], 1); /* as a sequence gives them back */
    kv_blocks_acked(&kv, 1);
    for (uint32_t left = 4; left-- > 0;) { /* each block taken costs the last of the chain */
        assert_int_equal(kv_blocks_take(&kv), blocks[left]);
        assert_int_equal(kv_blocks_match(&kv, keys, 4, &n_cached, NULL), left);
        kv_blocks_check(&kv);
    }
    kv_blocks_fini(&kv);
}

static void the_first_of_equal_blocks_is_found(void **state)
{
    struct kv_blocks kv;
    (void)state;
    assert_int_equal(kv_blocks_init(&kv, 3, 16), OK);
    uint32_t a = kv_blocks_take(&kv), b = kv_blocks_take(&kv);
    kv_blocks_register(&kv, a, key_of(9));
    kv_blocks_register(&kv, b, key_of(9));
    assert_int_equal(kv_blocks_find(&kv, key_of(9)), a);
    kv_blocks_unref(&kv, b, 0);
    kv_blocks_acked(&kv, 0);
    assert_int_equal(kv.n_free, 2); /* the private one is worth nothing */
    kv_blocks_check(&kv);
    kv_blocks_fini(&kv);
}

enum { WALK_BLOCKS = 40, WALK_KEYS = 60 };

static void random_walk(void **state)
{
    struct kv_blocks kv;
    struct rand dice = rand_seeded(3);
    uint32_t refs[WALK_BLOCKS] = {0}, n;
    (void)state;
    assert_int_equal(kv_blocks_init(&kv, WALK_BLOCKS, 16), OK);
    int64_t made = mem_made();
    for (uint64_t step = 1; step < 60000; step++) {
        uint32_t block = (uint32_t)rand_below(&dice, WALK_BLOCKS);
        struct hash128 key = key_of(rand_below(&dice, WALK_KEYS));
        switch (rand_below(&dice, 5)) {
        case 0:
            n = kv_blocks_available(&kv);
            block = kv_blocks_take(&kv);
            assert_int_equal(block != KV_NONE, n > 0);
            if (block == KV_NONE) break;
            assert_int_equal(refs[block], 0); /* nobody's */
            refs[block] = 1;
            break;
        case 1:
        case 2:
            if (!refs[block]) break;
            refs[block]--;
            kv_blocks_unref(&kv, block, step + rand_below(&dice, 3));
            break;
        case 3:
            if (refs[block]) kv_blocks_register(&kv, block, key);
            break;
        default:
            if ((block = kv_blocks_find(&kv, key)) == KV_NONE) break;
            kv_blocks_ref(&kv, block);
            refs[block]++;
        }
        if (rand_below(&dice, 3) == 0) kv_blocks_acked(&kv, step - 1);
        for (uint32_t i = 0; i < WALK_BLOCKS; i++)
            assert_int_equal(kv.blocks[i].n_refs, refs[i]);
        if (step % 50 == 0) kv_blocks_check(&kv);
    }
    assert_int_equal(mem_made(), made);
    kv_blocks_fini(&kv);
}

static void creation_survives_each_failed_allocation(void **state)
{
    (void)state;
    int64_t live = mem_live();
    for (int64_t n = 1;; n++) {
        struct kv_blocks kv;
        mem_fail_at(n);
        enum err e = kv_blocks_init(&kv, 8, 16);
        mem_fail_at(0);
        if (!e) {
            kv_blocks_fini(&kv);
            assert_true(n > 4);
            break;
        }
        assert_int_equal(e, ERR_NO_MEMORY);
        assert_int_equal(mem_live(), live);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(freed_blocks_wait_for_their_step),
        cmocka_unit_test(found_in_limbo_and_freed_again_waits_anew),
        cmocka_unit_test(leaves_are_evicted_before_their_prefix),
        cmocka_unit_test(the_first_of_equal_blocks_is_found),
        cmocka_unit_test(random_walk),
        cmocka_unit_test(creation_survives_each_failed_allocation),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
