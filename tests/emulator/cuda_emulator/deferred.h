// Asynchronous work of the emulated GPU: done as late as it may, so that who does not wait for it sees old data.
#pragma once

#include <functional>

#include "runtime.h"

namespace emulator {

using Work = std::function<void()>;

enum Engine { COPIES, PRODUCTS, STORES, ENGINES };  // each has groups of its own: cp.async, wgmma, bulk stores

// For the current thread's open group of an engine; closing it; doing all but its newest `pending` closed groups.
void defer(Engine engine, Work work);
void commit(Engine engine);
void wait_for(Engine engine, int pending);

// To be done when some thread of the cluster's block `rank` next looks at the barrier that stands there.
void defer_until_looked_at(const void* barrier, uint32_t rank, Work work);
void do_deferred(const void* barrier);

// What a barrier in shared memory orders (races.h): the current thread's past goes into its open phase; the phase ends;
// what came before its end becomes known to the current thread.
void barrier_released(const void* barrier);
void barrier_released_by_others(const void* barrier, uint32_t rank);  // from another block, whose clocks are not known
void barrier_phase_ended(const void* barrier);
void barrier_acquired(const void* barrier);
void forget_accesses(const void* shared, size_t bytes);  // another block wrote there

}  // namespace emulator
