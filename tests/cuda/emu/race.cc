/* A race detector that knows what orders CUDA threads, and nothing else does.
 *
 * The kernels are compiled with the instrumentation of -fsanitize=thread, but its calls end here
 * (race_hooks.cc). ThreadSanitizer's own run time keeps a vector clock for each of up to 1024 fibers
 * and sees blocks one after another, so it cannot see two blocks race, and takes minutes. Here the
 * rules are those of the machine: two accesses of a launch are ordered when they are of one thread,
 * when all threads of the block met in between, or all lanes of the warp did; accesses of two blocks
 * never are. Unordered and one of them a plain write: a race. A copy in flight counts as a write
 * from its start. Before a thread has waited for the kernels before its own it may write nothing but
 * shared memory, and read nothing that any kernel has written. One cell for two bytes holds the last write and the last read; readers of
 * several lanes or warps are remembered as such, so nothing is forgotten but one of two bytes that
 * different threads write. What it does not know: orders made by atomics or fences alone. */
#include "race.h"
#include "cuda_emu.h"

#include <dlfcn.h>
#include <string>
#include <unordered_map>

namespace emu
{
bool race_watching;

enum { MANY_LANES = 1 << 14, MANY_WARPS = 1 << 15, PAGE = 4096 };
struct stamp {
    uint32_t grid, block, block_epoch, warp_epoch;
    uint16_t thread; /* or MANY_LANES | a thread of that warp, or MANY_WARPS */
    uint8_t bytes;   /* of the two, one bit each */
    bool atomic;
    const void *pc;
};
struct cell {
    stamp write, read;
};

static uint32_t grid, block_serial, block_epoch, warp_epochs[THREADS_MAX / WARP];
static uintptr_t shared_first, shared_end, stacks_first, stacks_end;
static std::vector<cell> shared_cells;
static std::unordered_map<uintptr_t, std::vector<cell>> &pages = *new std::unordered_map<uintptr_t, std::vector<cell>>;
static uintptr_t page_last;
static cell *page_cells;

void race_grid_begin()
{
    if (!race_watching) return;
    grid++;
    if (pages.size() > 1 << 15) pages.clear(), page_last = 0; /* 128 MiB of tensors: of past launches */
}

void race_block_begin(const void *shared, size_t shared_bytes, const void *stacks, size_t stacks_bytes)
{
    if (!race_watching) return;
    block_serial++;
    block_epoch = 0;
    memset(warp_epochs, 0, sizeof warp_epochs);
    shared_first = (uintptr_t)shared, shared_end = shared_first + shared_bytes;
    stacks_first = (uintptr_t)stacks, stacks_end = stacks_first + stacks_bytes;
    shared_cells.assign((shared_bytes + 1) / 2, cell{});
}

void race_block_met() { block_epoch++; }
void race_warp_met(int warp) { warp_epochs[warp]++; }

static bool ordered(const stamp &s, int thread)
{
    if (s.grid != grid) return true;
    if (s.block != block_serial) return false;
    if (s.block_epoch != block_epoch) return true;
    if (s.thread & MANY_WARPS) return false;
    int other = s.thread & (MANY_LANES - 1);
    if (other / WARP != thread / WARP) return false;
    return s.warp_epoch != warp_epochs[thread / WARP] || (s.thread == thread);
}

static std::string place(const void *pc)
{
    Dl_info info;
    char command[600], line[300] = "";
    if (!pc || !dladdr(pc, &info) || !info.dli_fname) return "?";
    snprintf(command, sizeof command, "addr2line -e '%s' %#zx 2>/dev/null", info.dli_fname,
             (uintptr_t)pc - (uintptr_t)info.dli_fbase - 1);
    FILE *f = popen(command, "r");
    if (f && fgets(line, sizeof line, f)) line[strcspn(line, "\n")] = 0;
    if (f) pclose(f);
    return line;
}

[[noreturn]] static void report(const stamp &before, bool before_writes, uintptr_t p, race_access kind, const void *pc)
{
    bool shared = p >= shared_first && p < shared_end;
    fprintf(stderr, "cuda emulation: race on %s memory %#zx: thread %d of block (%u,%u,%u) %s at %s\n",
            shared ? "shared" : "global", shared ? p - shared_first : p, current->linear, block_index.x, block_index.y,
            block_index.z, kind == RACE_READ ? "reads" : "writes", place(pc).c_str());
    fprintf(stderr, "  unordered with the %s by thread %d%s of %s at %s\n", before_writes ? "write" : "read",
            before.thread & (MANY_LANES - 1), before.thread & (MANY_LANES | MANY_WARPS) ? " and others" : "",
            before.block == block_serial ? "the same block" : "another block", place(before.pc).c_str());
    abort();
}

static cell *cells_of(uintptr_t p)
{
    if (p >= shared_first && p < shared_end) return &shared_cells[(p - shared_first) / 2];
    uintptr_t page = p / PAGE;
    if (page != page_last || !page_cells) {
        std::vector<cell> &cells = pages[page];
        if (cells.empty()) cells.resize(PAGE / 2);
        page_last = page, page_cells = cells.data();
    }
    return page_cells + p % PAGE / 2;
}

/* The readers of one stretch without a meeting are remembered together. */
static uint16_t readers(const stamp &before, int thread)
{
    bool same = before.grid == grid && before.block == block_serial && before.block_epoch == block_epoch;
    int other = before.thread & (MANY_LANES - 1);
    if (!same || before.thread == thread) return (uint16_t)thread;
    if (before.thread & MANY_WARPS || other / WARP != thread / WARP) return MANY_WARPS | (uint16_t)thread;
    return before.warp_epoch == warp_epochs[thread / WARP] ? MANY_LANES | (uint16_t)thread : (uint16_t)thread;
}

[[noreturn]] static void report_early(const stamp &before, uintptr_t p, race_access kind, const void *pc)
{
    fprintf(stderr, "cuda emulation: race on global memory %#zx: thread %d of block (%u,%u,%u) %s at %s\n", p,
            current->linear, block_index.x, block_index.y, block_index.z, kind == RACE_READ ? "reads" : "writes",
            place(pc).c_str());
    fprintf(stderr, "  before it has waited for the kernels before its own; last written at %s\n", place(before.pc).c_str());
    abort();
}

static void touch_pair(uintptr_t p, uint8_t bytes, race_access kind, const void *pc)
{
    int thread = current->linear;
    cell *c = cells_of(p);
    bool atomic = kind == RACE_ATOMIC, shared = p >= shared_first && p < shared_end;
    if (!current->waited && !shared && (kind != RACE_READ || c->write.grid)) report_early(c->write, p, kind, pc);
    stamp now{grid, block_serial, block_epoch, warp_epochs[thread / WARP], (uint16_t)thread, bytes, atomic, pc};
    if (c->write.bytes & bytes && !(atomic && c->write.atomic) && !ordered(c->write, thread))
        report(c->write, true, p, kind, pc);
    if (kind == RACE_READ) {
        bool other_block = c->read.grid == grid && c->read.block != block_serial;
        now.thread = other_block ? MANY_WARPS | (uint16_t)thread : readers(c->read, thread);
        if (other_block) now.block = 0; /* of several blocks: ordered with none */
        if (c->read.grid == grid) now.bytes |= c->read.bytes;
        if (c->read.grid == grid && c->read.block == 0) now.block = 0;
        c->read = now;
        return;
    }
    if (c->read.bytes & bytes && !ordered(c->read, thread)) report(c->read, false, p, kind, pc);
    c->write = now;
}

void race_touch(const void *at, size_t bytes, race_access kind, const void *pc)
{
    uintptr_t p = (uintptr_t)at, end = p + bytes;
    if (!race_watching || !current || (p >= stacks_first && p < stacks_end)) return;
    while (p < end) {
        uintptr_t next = std::min(end, (p | 1) + 1);
        uint8_t mask = (uint8_t)(((1u << (next - p)) - 1) << (p & 1));
        touch_pair(p & ~(uintptr_t)1, mask, kind, pc);
        p = next;
    }
}

void race_forget(const void *at, size_t bytes)
{
    uintptr_t p = (uintptr_t)at, end = p + bytes;
    for (; race_watching && p < end; p += 2) {
        auto it = pages.find(p / PAGE);
        if (it == pages.end() || it->second.empty()) p = (p / PAGE + 1) * PAGE - 2;
        else it->second[p % PAGE / 2] = {};
    }
}

void race_landed(const void *at, size_t bytes)
{
    if (!race_watching) return;
    int thread = current->linear;
    for (uintptr_t p = (uintptr_t)at, end = p + bytes; p < end; p += 2) {
        cell *c = cells_of(p);
        const void *pc = c->write.pc;
        c->write = {grid, block_serial, block_epoch, warp_epochs[thread / WARP], (uint16_t)thread, 3, false, pc};
    }
}
} // namespace emu
