#include "races.h"

#include <algorithm>

namespace emulator {
namespace {

void join(Clock& clock, const Clock& other) {
  if (clock.size() < other.size()) clock.resize(other.size());
  for (size_t i = 0; i < other.size(); ++i) clock[i] = std::max(clock[i], other[i]);
}

constexpr char RACE[] = "a race: nothing orders it and an access";
constexpr char NO_FENCE[] = "the async proxy, and no fence.proxy.async follows a store";

}  // namespace

Races::Races(int threads, size_t bytes) : now_(threads), fenced_(threads), known_(threads), cells_(bytes / 2 + 1) {}

void Races::begin() {
  first_ = ++generation_;
  std::fill(now_.begin(), now_.end(), 1);
  std::fill(fenced_.begin(), fenced_.end(), 0);
  for (Clock& known : known_) known.clear();
}

Races::Conflict Races::access(uint32_t thread, size_t offset, size_t bytes, Access access, uint32_t place) {
  const bool engine = access >= Access::ENGINE_LOAD, store = access == Access::STORE || access == Access::ENGINE_STORE;
  const Mark mine{now_[thread], generation_, place, uint16_t(thread), engine};
  for (size_t i = offset / 2; i < (offset + bytes) / 2; ++i) {
    Cell& at = cells_[i];
    const Mark& last = at.store;
    if (!knows(thread, last) && (store || !at.same.time || !knows(thread, at.same)))
      return {RACE, last.thread, last.place};
    if (engine && !last.engine && last.generation >= first_ && last.time >= fenced_[last.thread])
      return {NO_FENCE, last.thread, last.place};
    if (store) {
      for (const Mark& earlier : {at.same, at.loads[0], at.loads[1]})
        if (!knows(thread, earlier)) return {RACE, earlier.thread, earlier.place};
      at = {mine, {}, {}};
    } else {
      at.loads[knows(thread, at.loads[0]) ? 0 : 1] = mine;
    }
  }
  return {};
}

void Races::store_same(uint32_t thread, size_t offset, size_t bytes, uint32_t place) {
  const Mark mine{now_[thread], generation_, place, uint16_t(thread), false};
  for (size_t i = offset / 2; i < (offset + bytes) / 2; ++i) cells_[i].same = mine;
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

}  // namespace emulator
