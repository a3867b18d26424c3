/* Who touched which word last: races between the CUDA threads of one launch. See race.cc. */
#pragma once
#include <cstddef>
#include <cstdint>

namespace emu
{
/* A launch, a block begins: what came before is ordered; of other blocks of the launch nothing is. */
void race_grid_begin();
void race_block_begin(const void *shared, size_t shared_bytes, const void *stacks, size_t stacks_bytes);
/* All threads of the block, or all lanes of a warp, have met. */
void race_block_met();
void race_warp_met(int warp);
enum race_access { RACE_READ, RACE_WRITE, RACE_ATOMIC };
/* A thread touches memory; called by the compiler's instrumentation, and for copies in flight when
 * they start, because from then on they may land. pc: where, for the report. */
void race_touch(const void *p, size_t bytes, race_access kind, const void *pc);
/* The bytes of a copy that landed now belong to whoever waited for it. */
void race_landed(const void *p, size_t bytes);
/* Memory is given back: what comes to lie there has been written by no kernel. */
void race_forget(const void *p, size_t bytes);
extern bool race_watching; /* the plugin was built with instrumentation */
} // namespace emu
