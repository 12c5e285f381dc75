// Accesses of a block's shared memory with no barrier between them: happens-before, by vector clocks.
//
// A thread's clock says how much of each other thread's past it knows of. What a barrier orders joins clocks; every two
// bytes of shared memory remember who wrote them last and two of those who read them since. An access is a race where
// an earlier one that it must not overtake is not known to its thread. Two readers of many are remembered: a race may
// be missed, but none is invented. (Flanagan and Freund 2009, FastTrack.)
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulator {

using Clock = std::vector<uint32_t>;  // of each thread of a block; what is missing is 0

class Races {
 public:
  Races(int threads, size_t bytes);

  struct Mark {
    uint32_t time = 0;  // of `thread`; 0: none
    uint32_t place = 0;  // what the caller gave with the access
    uint32_t thread = 0;
  };

  // An access by a thread; the earlier one that it races with, or an empty mark.
  Mark access(uint32_t thread, size_t offset, size_t bytes, bool write, uint32_t place);
  // A write of what stood there already: it races with nothing, and who knows of it may read.
  void write_same(uint32_t thread, size_t offset, size_t bytes, uint32_t place);
  // Nobody of this block was here.
  void forget(size_t offset, size_t bytes);

  // All that any thread did is known to all.
  void meet_all() { ++generation_; }
  // All that these threads did is known to each of them.
  void meet(const std::vector<int>& threads);
  // What a thread did so far goes into a barrier's clock; what is in one becomes known to a thread.
  void release(uint32_t thread, Clock& clock);
  void acquire(uint32_t thread, const Clock& clock);
  void acquire_all(uint32_t thread);

 private:
  struct Cell {
    uint32_t generation = 0;  // of an older one nothing is remembered
    Mark write, same, reads[2];  // `same`: a later write of what stood there
  };

  bool knows(uint32_t thread, const Mark& mark) const {
    const Clock& known = known_[thread];
    return mark.thread == thread || (mark.thread < known.size() && mark.time <= known[mark.thread]) || !mark.time;
  }

  Cell& cell(size_t i) {
    if (cells_[i].generation != generation_) cells_[i] = {generation_, {}, {}, {}};
    return cells_[i];
  }

  uint32_t generation_ = 1;
  Clock now_;                  // each thread's own time
  std::vector<Clock> known_;  // of the others', to each
  std::vector<Cell> cells_;
};

}  // namespace emulator
