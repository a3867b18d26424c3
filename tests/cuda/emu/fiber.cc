/* The scheduler of the emulation: fibers, barriers, warp operations, copies in flight.
 *
 * Compiled without sanitizers: it switches stacks, and tells ThreadSanitizer so by its fiber calls
 * when EMU_TSAN is set. x86-64 and aarch64. */
#include "cuda_emu.h"
#include "race.h"

#include <sys/mman.h>
#include <thread>

alignas(1024) thread_local unsigned char cuda_smem[SMEM_BYTES_MAX + SMEM_GUARD_BYTES];

#ifdef EMU_TSAN
extern "C" {
void *__tsan_get_current_fiber();
void *__tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void *);
void __tsan_switch_to_fiber(void *, unsigned);
void __tsan_acquire(void *);
void __tsan_release(void *);
void __tsan_read_range(void *, unsigned long);
void __tsan_write_range(void *, unsigned long);
}
#define TSAN(...) __VA_ARGS__
#else
#define TSAN(...)
#endif

extern "C" void emu_swap(void **save, void *to);
#if defined(__x86_64__)
asm(".text\n.globl emu_swap\n.hidden emu_swap\nemu_swap:\n"
    "push %rbp\npush %rbx\npush %r12\npush %r13\npush %r14\npush %r15\n"
    "mov %rsp,(%rdi)\nmov %rsi,%rsp\n"
    "pop %r15\npop %r14\npop %r13\npop %r12\npop %rbx\npop %rbp\nret\n");
enum { SAVED_WORDS = 6 };
#elif defined(__aarch64__)
asm(".text\n.globl emu_swap\n.hidden emu_swap\nemu_swap:\n"
    "sub sp,sp,#176\nstp x19,x20,[sp]\nstp x21,x22,[sp,#16]\nstp x23,x24,[sp,#32]\n"
    "stp x25,x26,[sp,#48]\nstp x27,x28,[sp,#64]\nstp x29,x30,[sp,#80]\n"
    "stp d8,d9,[sp,#96]\nstp d10,d11,[sp,#112]\nstp d12,d13,[sp,#128]\nstp d14,d15,[sp,#144]\n"
    "mov x9,sp\nstr x9,[x0]\nmov sp,x1\n"
    "ldp x19,x20,[sp]\nldp x21,x22,[sp,#16]\nldp x23,x24,[sp,#32]\n"
    "ldp x25,x26,[sp,#48]\nldp x27,x28,[sp,#64]\nldp x29,x30,[sp,#80]\n"
    "ldp d8,d9,[sp,#96]\nldp d10,d11,[sp,#112]\nldp d12,d13,[sp,#128]\nldp d14,d15,[sp,#144]\n"
    "add sp,sp,#176\nret\n");
#endif

namespace emu
{
__thread block *now;
__thread fiber *current;
__thread uint3 block_index, block_dim, grid_dim;
static const uint64_t STACK_CANARY = 0x5afe57ac5afe57acull;

[[noreturn]] static void die(const char *why)
{
    fprintf(stderr, "cuda emulation: %s in block (%u,%u,%u)\n", why, block_index.x, block_index.y, block_index.z);
    for (int i = 0; i < now->n_threads; i++) {
        const fiber &f = now->fibers[i];
        if (f.done || (i >= 4 && f.where == now->fibers[i - 1].where)) continue;
        fprintf(stderr, "  thread %d (%u,%u,%u) waits at %s\n", i, f.index.x, f.index.y, f.index.z,
                f.where ? f.where : "?");
    }
    abort();
}

/* The same warp first, so that a warp runs ahead of the others as far as it can. */
static fiber *pick()
{
    int linear = current ? current->linear : 0, warp = linear / WARP;
    uint32_t later = now->runnable[warp] & ~((2u << (linear % WARP)) - 1);
    if (later) return &now->fibers[warp * WARP + __builtin_ctz(later)];
    for (int k = 0; k <= now->n_warps; k++) {
        int w = (warp + k) % now->n_warps;
        if (now->runnable[w]) return &now->fibers[w * WARP + __builtin_ctz(now->runnable[w])];
    }
    return nullptr;
}

static void go(void **save)
{
    fiber *next = pick();
    if (!next) {
        if (now->n_live) die("deadlock (divergent barrier, wrong mask, or a copy never started)");
        current = nullptr;
        TSAN(__tsan_switch_to_fiber(now->main_tsan, 0);)
        emu_swap(save, now->main_stack_pointer);
        return;
    }
    if (next == current) return;
    current = next;
    TSAN(__tsan_switch_to_fiber(next->tsan, 1);)
    emu_swap(save, next->stack_pointer);
}

static void sleep_at(const char *where)
{
    fiber *me = current;
    me->where = where;
    now->runnable[me->linear / WARP] &= ~(1u << (me->linear % WARP));
    go(&me->stack_pointer);
}

static void release_barrier()
{
    now->n_at_barrier = 0;
    race_block_met();
    for (int i = 0; i < now->n_threads; i++)
        if (!now->fibers[i].done) now->runnable[i / WARP] |= 1u << (i % WARP);
}

void dependency_wait() { current->waited = true; }

void sync_threads(const char *where)
{
    TSAN(__tsan_release(&now->n_at_barrier);)
    if (now->n_at_barrier == 0) {
        now->barrier_where = where;
    } else if (now->barrier_where != where) {
        current->where = where;
        die("__syncthreads() reached at two different lines");
    }
    if (++now->n_at_barrier == now->n_live)
        release_barrier();
    else
        sleep_at(where);
    TSAN(__tsan_acquire(&now->n_at_barrier);)
}

/* Lane l receives elements (l/4, 2(l%4)) and the next of four 8x8 matrices; row r of matrix j is
 * where lane 8j + r points. PTX ISA, "Warp-level matrix load instruction: ldmatrix". */
static void perform_ldmatrix(fiber *lanes, bool transposed)
{
    for (int l = 0; l < WARP; l++)
        for (int j = 0; j < 4; j++) {
            auto at = [&](int r, int c) { return ((const uint16_t *)lanes[j * 8 + r].op.p)[c]; };
            int r = l / 4, c = l % 4 * 2;
            uint16_t low = transposed ? at(c, r) : at(r, c), high = transposed ? at(c + 1, r) : at(r, c + 1);
            ((uint32_t *)lanes[l].op.q)[j] = low | (uint32_t)high << 16;
        }
}

static float bf16_half(uint32_t word, int high)
{
    return __uint_as_float(high ? word & 0xffff0000u : word << 16);
}

/* PTX ISA, "Matrix fragments for mma.m16n8k16 with .bf16". */
static void perform_mma_bf16(fiber *lanes)
{
    float a[16][16], b[16][8];
    for (int l = 0; l < WARP; l++) {
        const emu_mma *x = (const emu_mma *)lanes[l].op.p;
        int g = l / 4, t = l % 4;
        for (int i = 0; i < 4; i++)
            for (int h = 0; h < 2; h++) a[g + (i & 1) * 8][t * 2 + h + (i >> 1) * 8] = bf16_half(x->a[i], h);
        for (int i = 0; i < 2; i++)
            for (int h = 0; h < 2; h++) b[t * 2 + h + i * 8][g] = bf16_half(x->b[i], h);
    }
    for (int l = 0; l < WARP; l++)
        for (int i = 0; i < 4; i++) {
            int r = l / 4 + (i >> 1) * 8, c = l % 4 * 2 + (i & 1);
            float sum = 0;
            for (int k = 0; k < 16; k++) sum += a[r][k] * b[k][c];
            ((float *)lanes[l].op.q)[i] += sum;
        }
}

static void perform(fiber *lanes, uint32_t mask, operation kind)
{
    uint64_t ballot = 0;
    if (kind == OP_LDMATRIX || kind == OP_LDMATRIX_TRANS) {
        perform_ldmatrix(lanes, kind == OP_LDMATRIX_TRANS);
        return;
    }
    if (kind == OP_MMA_BF16) {
        perform_mma_bf16(lanes);
        return;
    }
    for (uint32_t m = mask; m; m &= m - 1) {
        int l = __builtin_ctz(m);
        ballot |= lanes[l].op.in << l;
    }
    for (uint32_t m = mask; m; m &= m - 1) {
        pending &op = lanes[__builtin_ctz(m)].op;
        op.out = kind == OP_SHUFFLE ? lanes[op.source].op.in : ballot;
    }
}

static void check_agreement(fiber *lanes, uint32_t mask, operation kind, const char *where)
{
    for (uint32_t m = mask; m; m &= m - 1) {
        pending &op = lanes[__builtin_ctz(m)].op;
        current->where = where;
        if (op.kind != kind || op.mask != mask) die("warp operation: lanes disagree on the operation or its mask");
        if (kind == OP_SHUFFLE && !(mask >> op.source & 1)) die("shuffle from a lane outside the mask");
    }
}

uint64_t collective(uint32_t mask, operation kind, uint64_t in, int source, const void *p, void *q,
                    const char *where)
{
    fiber *me = current;
    int warp = me->linear / WARP, lane = me->linear % WARP;
    fiber *lanes = &now->fibers[warp * WARP];
    int have = std::min(now->n_threads - warp * WARP, (int)WARP);
    if (have < WARP) mask &= (1u << have) - 1;
    me->where = where;
    if (!(mask >> lane & 1)) die("warp operation: caller not in its mask");
    uint32_t &arrived = now->arrived[warp][__builtin_ctz(mask)];
    me->op = {mask, kind, source, in, 0, p, q};
    if (kind == OP_LDMATRIX || kind == OP_LDMATRIX_TRANS) {
        TSAN(__tsan_read_range((void *)p, 16);)
        race_touch(p, 16, RACE_READ, __builtin_return_address(0));
    }
    TSAN(__tsan_release(&arrived);)
    arrived |= 1u << lane;
    if (arrived == mask) {
        check_agreement(lanes, mask, kind, where);
        TSAN(__tsan_acquire(&arrived);)
        perform(lanes, mask, kind);
        TSAN(__tsan_release(&arrived);)
        arrived = 0;
        /* values go from lane to lane by the other operations too, but they order no memory */
        if (kind == OP_SYNCWARP) race_warp_met(warp);
        now->runnable[warp] |= mask;
    } else {
        sleep_at(where);
    }
    TSAN(__tsan_acquire(&arrived);)
    me->op.kind = OP_NONE;
    return me->op.out;
}

/* --- copies in flight ------------------------------------------------------------------------ */
static void land(const copy &c)
{
    TSAN(if (c.from_bytes) __tsan_read_range((void *)c.from, c.from_bytes); __tsan_write_range(c.to, c.bytes);)
    race_landed(c.to, (size_t)c.bytes);
    memset(c.to, 0, c.bytes);
    memcpy(c.to, c.from, c.from_bytes);
}
void copy_start(void *to, const void *from, int bytes, int from_bytes)
{
    if (((uintptr_t)to | (from_bytes ? (uintptr_t)from : 0)) & 15) die("cp.async not aligned to 16 bytes");
    volatile const char *touch = (const char *)from;
    if (from_bytes) (void)(touch[0], touch[from_bytes - 1]);
    race_touch(from, (size_t)from_bytes, RACE_READ, __builtin_return_address(0));
    race_touch(to, (size_t)bytes, RACE_WRITE, __builtin_return_address(0));
    current->open.push_back({to, from, bytes, from_bytes});
}
void copy_commit()
{
    current->groups.push_back(std::move(current->open));
    current->open.clear();
}
void copy_wait(int groups_left)
{
    auto &groups = current->groups;
    size_t n = (int)groups.size() > groups_left ? groups.size() - groups_left : 0;
    for (size_t i = 0; i < n; i++)
        for (auto &c : groups[i]) land(c);
    groups.erase(groups.begin(), groups.begin() + n);
}

/* An mbarrier turns its phase when all arrivals and all bytes of the phase are in. */
static void settle(mbarrier *b)
{
    if (b->pending || b->bytes) return;
    b->phase ^= 1;
    b->pending = b->count;
    for (int i = 0; i < now->n_threads; i++) /* waking one too many is harmless */
        if (!now->fibers[i].done && now->fibers[i].op.kind == OP_BARRIER_WAIT) now->runnable[i / WARP] |= 1u << (i % WARP);
}
void barrier_init(mbarrier *b, int count) { *b = {count, count, 0, 0}; }
void barrier_arrive(mbarrier *b, int bytes)
{
    TSAN(__tsan_release(b);)
    b->bytes += bytes;
    b->pending--;
    settle(b);
}
void bulk_start(void *to, const void *from, int bytes, mbarrier *b)
{
    if (((uintptr_t)to | (uintptr_t)from | (unsigned)bytes) & 15) die("bulk copy not aligned to 16 bytes");
    race_touch(from, (size_t)bytes, RACE_READ, __builtin_return_address(0));
    race_touch(to, (size_t)bytes, RACE_WRITE, __builtin_return_address(0));
    now->bulk.push_back({b, {to, from, bytes, bytes}});
}
void barrier_wait(mbarrier *b, int parity, const char *where)
{
    while (b->phase == parity) {
        bool any = false;
        for (size_t i = 0; i < now->bulk.size(); i++) {
            if (now->bulk[i].first != b) continue;
            copy c = now->bulk[i].second;
            now->bulk.erase(now->bulk.begin() + (long)i--);
            TSAN(__tsan_read_range((void *)c.from, c.bytes); __tsan_write_range(c.to, c.bytes);)
            race_landed(c.to, (size_t)c.bytes);
            memcpy(c.to, c.from, c.bytes);
            b->bytes -= c.bytes;
            any = true;
        }
        TSAN(if (any) __tsan_release(b);)
        if (any) settle(b);
        if (b->phase != parity) break;
        current->op.kind = OP_BARRIER_WAIT;
        sleep_at(where);
        current->op.kind = OP_NONE;
    }
    TSAN(__tsan_acquire(b);)
}

/* --- blocks and grids ------------------------------------------------------------------------ */
static void finish()
{
    fiber *me = current;
    if (!me->open.empty() || !me->groups.empty()) die("a thread ended with copies in flight");
    if (!me->waited) die("a thread ended without waiting for the kernels before its own");
    TSAN(__tsan_release(&now->n_threads);)
    me->done = true;
    now->n_live--;
    now->runnable[me->linear / WARP] &= ~(1u << (me->linear % WARP));
    if (now->n_live && now->n_at_barrier == now->n_live) release_barrier();
    go(&me->stack_pointer);
    abort();
}

static void trampoline()
{
    TSAN(__tsan_acquire(&now->n_live);)
    (*now->entry)();
    finish();
}

static void fiber_prepare(fiber *f, char *stack)
{
    f->where = "its start";
    f->done = f->waited = false;
    f->op.kind = OP_NONE;
    f->open.clear();
    f->groups.clear();
    *(uint64_t *)stack = STACK_CANARY;
    void **top = (void **)(stack + STACK_BYTES - 64);
#if defined(__x86_64__)
    *--top = nullptr;
    *--top = (void *)trampoline;
    top -= SAVED_WORDS;
#else
    top -= 22;
    top[11] = (void *)trampoline; /* x30 */
#endif
    f->stack_pointer = top;
    TSAN(if (!f->tsan) f->tsan = __tsan_create_fiber(0);) /* kept: making one costs a mapping */
}

static void run_block(dim3 dim, size_t smem_bytes)
{
    int n = (int)(dim.x * dim.y * dim.z);
    now->n_threads = now->n_live = n;
    now->n_warps = (n + WARP - 1) / WARP;
    now->n_at_barrier = 0;
    now->bulk.clear();
    memset(now->runnable, 0, sizeof now->runnable);
    memset(now->arrived, 0, sizeof now->arrived);
    memset(cuda_smem, 0xff, smem_bytes + SMEM_GUARD_BYTES);
    race_block_begin(cuda_smem, smem_bytes, now->stacks, (size_t)THREADS_MAX * STACK_BYTES);
    for (int i = 0; i < n; i++) {
        fiber *f = &now->fibers[i];
        f->linear = i;
        f->index = {i % dim.x, i / dim.x % dim.y, i / (dim.x * dim.y)};
        fiber_prepare(f, now->stacks + (size_t)i * STACK_BYTES);
        now->runnable[i / WARP] |= 1u << (i % WARP);
    }
    TSAN(__tsan_release(&now->n_live);)
    current = &now->fibers[0];
    TSAN(now->main_tsan = __tsan_get_current_fiber(); __tsan_switch_to_fiber(current->tsan, 0);)
    emu_swap(&now->main_stack_pointer, current->stack_pointer);
    current = nullptr;
    TSAN(__tsan_acquire(&now->n_threads);)
    for (int i = 0; i < n; i++)
        if (*(uint64_t *)(now->stacks + (size_t)i * STACK_BYTES) != STACK_CANARY) die("a thread's stack overflowed");
    for (int i = 0; i < SMEM_GUARD_BYTES; i++)
        if (cuda_smem[smem_bytes + i] != 0xff) die("a write behind the shared memory of the launch");
}

/* One block structure an OS thread, kept until the thread ends. */
struct workspace {
    block b = {};
    workspace()
    {
        b.stacks = (char *)mmap(nullptr, (size_t)THREADS_MAX * STACK_BYTES, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (b.stacks == MAP_FAILED) abort();
    }
    ~workspace()
    {
        TSAN(for (fiber &f : b.fibers) if (f.tsan) __tsan_destroy_fiber(f.tsan);)
        munmap(b.stacks, (size_t)THREADS_MAX * STACK_BYTES);
    }
};

void run_grid(dim3 grid, dim3 threads, size_t smem_bytes, const std::function<void()> &entry)
{
    const char *wanted = getenv("CUDA_EMU_THREADS");
    unsigned n_workers = wanted ? (unsigned)atoi(wanted) : 1, total = grid.x * grid.y * grid.z;
    if (race_watching) n_workers = 1; /* its cells are of one block at a time */
    race_grid_begin();
    std::atomic<unsigned> next{0};
    auto work = [&] {
        static thread_local workspace *mine;
        if (!mine) mine = new workspace; /* reachable from the thread; ends with the process */
        now = &mine->b;
        now->entry = &entry;
        block_dim = {threads.x, threads.y, threads.z};
        grid_dim = {grid.x, grid.y, grid.z};
        for (unsigned i; (i = next++) < total;) {
            block_index = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
            run_block(threads, smem_bytes);
        }
        if (n_workers > 1) {
            delete mine;
            mine = nullptr;
        }
    };
    if (n_workers <= 1 || total < 2) {
        work();
        return;
    }
    std::vector<std::thread> workers;
    for (unsigned i = 0; i < std::min(n_workers, total); i++) workers.emplace_back(work);
    for (auto &w : workers) w.join();
}
} // namespace emu

/* E4M3 of the OCP 8-bit floating point specification (OFP8, 2023): 1-4-3, bias 7, no infinity. */
float emu_fp8_decode(uint8_t v)
{
    int e = v >> 3 & 15, m = v & 7;
    float r = (v & 0x7f) == 0x7f ? NAN : e ? ldexpf(1.0f + m / 8.0f, e - 7) : ldexpf(m / 8.0f, -6);
    return v & 0x80 ? -r : r;
}
uint8_t emu_fp8_encode(float v)
{
    uint8_t sign = std::signbit(v) ? 0x80 : 0;
    float a = fabsf(v);
    if (v != v) return sign | 0x7f;
    if (a >= 448.0f) return sign | 0x7e;
    int e = a < 0x1p-6f ? -6 : ilogbf(a);
    float steps = nearbyintf(ldexpf(a, 3 - e)); /* ties to even; 16 steps carry into the next exponent */
    int whole = (int)steps;
    if (e == -6 && whole < 8) return sign | (uint8_t)whole;
    return sign | (uint8_t)(((e + 7) << 3) + whole - 8);
}
