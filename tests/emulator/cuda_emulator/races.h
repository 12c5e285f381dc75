// Accesses of a block's shared memory with no barrier between them: happens-before, by vector clocks.
//
// A thread's clock says how much of each other thread's past it knows of. What a barrier orders joins clocks; every two
// bytes of shared memory remember who wrote them last and two of those who read them since. An access is a race where
// an earlier one that it must not overtake is not known to its thread. Two readers of many are remembered: a race may
// be missed, but none is invented. (Flanagan and Freund 2009, FastTrack.)
//
// The copy engine and wgmma go another way to shared memory (PTX ISA, "Async proxy"): they see what a thread stored
// only once that thread has fenced it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "runtime.h"

namespace emulator {

using Clock = std::vector<uint32_t>;  // of each thread of a block; what is missing is 0

class Races {
 public:
  Races(int threads, size_t bytes);
  void begin();  // a new block: nobody was anywhere

  struct Conflict {  // with an earlier access; none where `what` is null
    const char* what = nullptr;
    uint32_t thread = 0, place = 0;
  };

  // An access by, or on behalf of, a thread. `place` is what a conflict with it will tell.
  Conflict access(uint32_t thread, size_t offset, size_t bytes, Access access, uint32_t place);
  // A store of what stood there already: it races with nothing, and who knows of it may read.
  void store_same(uint32_t thread, size_t offset, size_t bytes, uint32_t place);

  // All that any thread did is known to all.
  void meet_all() { ++generation_; }
  // All that these threads did is known to each of them.
  void meet(const std::vector<int>& threads);
  // What a thread did so far goes into a barrier's clock; what is in one becomes known to a thread.
  void release(uint32_t thread, Clock& clock);
  void acquire(uint32_t thread, const Clock& clock);
  // What a thread stored so far is seen by the engines.
  void fence(uint32_t thread) { fenced_[thread] = ++now_[thread]; }

 private:
  struct Mark {
    uint32_t time = 0;  // of its thread; 0: none
    uint32_t generation = 0;
    uint32_t place = 0;
    uint16_t thread = 0;
    bool engine = false;
  };
  struct Cell {
    Mark store, same, loads[2];  // `same`: a later store of what stood there
  };

  bool knows(uint32_t thread, const Mark& mark) const {
    const Clock& known = known_[thread];
    return mark.generation != generation_ || mark.thread == thread ||
           (mark.thread < known.size() && mark.time <= known[mark.thread]);
  }

  uint32_t generation_ = 0;  // of older accesses everybody knows
  uint32_t first_ = 0;       // of this block
  Clock now_;                // each thread's own time
  Clock fenced_;             // its stores before then are fenced
  std::vector<Clock> known_;  // of the others' times, to each
  std::vector<Cell> cells_;
};

}  // namespace emulator
