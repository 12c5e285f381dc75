#include "races.h"

#include <algorithm>

namespace emulator {
namespace {

void join(Clock& clock, const Clock& other) {
  if (clock.size() < other.size()) clock.resize(other.size());
  for (size_t i = 0; i < other.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}

}  // namespace

Races::Races(int threads, size_t bytes) : now_(threads, 1), known_(threads), cells_(bytes / 2 + 1) {}

Races::Mark Races::access(uint32_t thread, size_t offset, size_t bytes, bool write, uint32_t place) {
  const Mark mine{now_[thread], place, thread};
  for (size_t i = offset / 2; i < (offset + bytes) / 2; ++i) {
    Cell& at = cell(i);
    if (!knows(thread, at.write) && (write || !at.same.time || !knows(thread, at.same))) return at.write;
    if (write) {
      for (const Mark& earlier : {at.same, at.reads[0], at.reads[1]})
        if (!knows(thread, earlier)) return earlier;
      at = {generation_, mine, {}, {}};
    } else {
      at.reads[knows(thread, at.reads[0]) ? 0 : 1] = mine;
    }
  }
  return {};
}

void Races::write_same(uint32_t thread, size_t offset, size_t bytes, uint32_t place) {
  for (size_t i = offset / 2; i < (offset + bytes) / 2; ++i) cell(i).same = {now_[thread], place, thread};
}

void Races::forget(size_t offset, size_t bytes) {
  std::fill(cells_.begin() + offset / 2, cells_.begin() + (offset + bytes) / 2, Cell{});
}

void Races::meet(const std::vector<int>& threads) {
  Clock all;
  for (int thread : threads) release(thread, all);
  for (int thread : threads) known_[thread] = all;
}

void Races::release(uint32_t thread, Clock& clock) {
  join(clock, known_[thread]);
  if (clock.size() <= thread) clock.resize(thread + 1);
  clock[thread] = now_[thread]++;
}

void Races::acquire(uint32_t thread, const Clock& clock) { join(known_[thread], clock); }

void Races::acquire_all(uint32_t thread) { join(known_[thread], now_); }

}  // namespace emulator
