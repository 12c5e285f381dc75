// Threads of a block as fibers: how they take turns, meet, and wait for work of the engines.
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <new>

#include "state.h"

emulator::Dim threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

const Kernel* kernel;
const Launch* launch;
Block* block;
Block* loaded;
Thread* self;

namespace {

jmp_buf scheduler;
std::string failure;
std::vector<char*> spare_stacks;  // each of a block
std::vector<std::unique_ptr<Races>> spare_races;

void body();

[[noreturn]] void resume_next() {
  if (block->ready.empty() || block->fruitless > 2 * block->ready.size()) _longjmp(scheduler, 1);
  self = block->ready.front();
  block->ready.pop_front();
  threadIdx = self->index;
  self->state = State::READY;
  if (self->started) _longjmp(self->context, 1);
  self->started = true;
  ucontext_t fresh;
  getcontext(&fresh);
  fresh.uc_stack = {self->stack, 0, STACK_BYTES};
  fresh.uc_link = nullptr;
  makecontext(&fresh, body, 0);
  setcontext(&fresh);
  __builtin_unreachable();
}

void happened() { block->fruitless = 0, ++block->events; }

// The current thread cannot go on before it is put among the ready ones.
void pause(State state, Where where) {
  self->state = state, self->where = where;
  if (!_setjmp(self->context)) resume_next();
}

void wake(Thread* thread) {
  thread->state = State::READY;
  block->ready.push_back(thread);
}

Thread* warp_of(int warp) { return &block->threads[warp * 32]; }
int lanes_of(int warp) { return std::min<int>(32, block->threads.size() - warp * 32); }

unsigned running_lanes(int warp) {
  unsigned lanes = 0;
  for (int i = 0; i < lanes_of(warp); ++i) lanes |= unsigned(warp_of(warp)[i].state != State::ENDED) << i;
  return lanes;
}

bool same_place(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() && !strcmp(a.file_name(), b.file_name());
}

// Run the meeting of `mask` if all its lanes have come.
bool complete_warp(int warp, unsigned mask, const Thread& last) {
  const unsigned lanes = mask & running_lanes(warp);
  if ((block->waiting_lanes[warp] & lanes) != lanes) return false;
  void* operands[32] = {};
  for (int i = 0; i < 32; ++i) {
    if (!(lanes >> i & 1)) continue;
    const Thread& other = warp_of(warp)[i];
    if (other.mask != mask || !same_place(other.where, last.where))
      fail(last.where, "divergent warp: lane %d is at %s:%d with mask %#x, lane %d at %s:%d with mask %#x",
           last.number % 32, name_of(last.where), int(last.where.line()), mask, i, name_of(other.where),
           int(other.where.line()), other.mask);
    operands[i] = other.operand;
  }
  last.act(operands);
  if (last.orders) {
    std::vector<int> numbers;
    for (int i = 0; i < 32; ++i)
      if (lanes >> i & 1) numbers.push_back(warp * 32 + i);
    block->races->meet(numbers);
  }
  happened();
  block->waiting_lanes[warp] &= ~lanes;
  for (int i = 0; i < 32; ++i)
    if ((lanes >> i & 1) && &warp_of(warp)[i] != self) wake(&warp_of(warp)[i]);
  return true;
}

void release_if_complete(Cluster& cluster) {
  if (!cluster.come || cluster.come < cluster.running) return;
  happened();
  cluster.come = 0;
  ++cluster.phase;
  for (Block* each : cluster.blocks)
    if (each) each->races->meet_all();
  for (const auto& [its_block, thread] : cluster.waiting) {
    if (thread == self) continue;
    thread->state = State::READY;
    its_block->ready.push_back(thread);
  }
  cluster.waiting.clear();
}

void release_if_complete(NumberedBarrier& barrier) {
  const int threads = barrier.threads ? barrier.threads : block->running;
  if (!barrier.come || barrier.come < threads) return;
  happened();
  barrier.come = 0;
  if (threads == block->running) block->races->meet_all();
  for (Thread* each : barrier.waiting) {
    block->races->acquire(each->number, barrier.clock);
    if (each != self) wake(each);
  }
  barrier.waiting.clear();
  barrier.clock.clear();
}

void body() {
  kernel->call(launch->arguments);
  settle_store();
  if (!self->open[STORES].empty() || !self->closed[STORES].empty())
    stop(who() + " ends while the copy engine reads its shared memory");
  self->state = State::ENDED;
  --block->running;
  --block->cluster->running;
  happened();
  release_if_complete(block->barriers[0]);
  release_if_complete(*block->cluster);
  const int warp = self->number / 32;
  if (const unsigned waiting = block->waiting_lanes[warp]) {
    Thread& first = warp_of(warp)[__builtin_ctz(waiting)];
    complete_warp(warp, first.mask, first);
  }
  resume_next();
}

// Where each warp of a block stands.
std::string stand(const Block& stuck) {
  static const char* const NAMES[] = {"ready", "looking", "in a warp's meeting", "at a barrier", "in the cluster's",
                                      "ended"};
  std::string report;
  for (size_t first = 0; first < stuck.threads.size(); first += 32) {
    std::map<std::string, unsigned> places;
    for (size_t i = first; i < std::min(first + 32, stuck.threads.size()); ++i) {
      const Thread& each = stuck.threads[i];
      std::string place = NAMES[int(each.state)];
      if (each.state != State::ENDED && each.started)
        place += text(" (%s:%d)", name_of(each.where), int(each.where.line()));
      places[place] |= 1u << i % 32;
    }
    report += text("\n  block %s, warp %d:", text(stuck.index).c_str(), int(first / 32));
    for (const auto& [place, lanes] : places) report += text(" lanes %08x %s;", lanes, place.c_str());
  }
  return report;
}

// The first of what earlier blocks left, or a new one.
template <class T, class Make>
T reuse(std::vector<T>& spare, const Make& make) {
  if (spare.empty()) spare.push_back(make());
  T found = std::move(spare.back());
  spare.pop_back();
  return found;
}

char* new_stacks() {
  void* const room = mmap(nullptr, 1024 * STACK_BYTES, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (room == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(room);
}

std::unique_ptr<Block> start_block(Dim index) {
  auto fresh = std::make_unique<Block>();
  const Dim size = launch->block;
  fresh->index = index;
  fresh->running = size.x * size.y * size.z;
  fresh->threads.resize(fresh->running);
  fresh->waiting_lanes.resize((fresh->running + 31) / 32);
  fresh->shared.assign(__stop_shared_memory - __start_shared_memory, 0xff);  // NaN
  fresh->races = reuse(spare_races, [&] { return std::make_unique<Races>(fresh->running, fresh->shared.size()); });
  fresh->races->begin();
  fresh->stacks = reuse(spare_stacks, new_stacks);
  for (int i = 0; i < fresh->running; ++i) {
    Thread& each = fresh->threads[i];
    each.number = i;
    each.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    each.stack = fresh->stacks + i * STACK_BYTES;
    fresh->ready.push_back(&each);
  }
  return fresh;
}

using Blocks = std::deque<std::unique_ptr<Block>>;

// The blocks of a cluster begin together.
void start_cluster(unsigned number, Blocks& started) {
  const Dim size = launch->cluster, grid = launch->grid;
  const Dim clusters = {grid.x / size.x, grid.y / size.y, grid.z / size.z};
  const Dim first = {number % clusters.x * size.x, number / clusters.x % clusters.y * size.y,
                     number / clusters.x / clusters.y * size.z};
  auto cluster = std::make_shared<Cluster>();
  for (unsigned rank = 0; rank < size.x * size.y * size.z; ++rank) {
    auto fresh = start_block({first.x + rank % size.x, first.y + rank / size.x % size.y, first.z + rank / size.x / size.y});
    fresh->cluster = cluster, fresh->rank = rank;
    cluster->blocks.push_back(fresh.get());
    cluster->running += fresh->running;
    started.push_back(std::move(fresh));
  }
}

// Run a block until it ends or nothing more happens in it.
void run(Block& next) {
  if (loaded != &next) {
    if (loaded) loaded->shared.assign(__start_shared_memory, __stop_shared_memory);
    std::copy(next.shared.begin(), next.shared.end(), __start_shared_memory);
    loaded = &next;
  }
  block = &next;
  block->fruitless = 0;
  blockIdx = block->index;
  if (!_setjmp(scheduler)) resume_next();
}

// What a block leaves.
void end_block(Block& ended) {
  if (!ended.deferred.empty() && failure.empty())
    failure = text("%s: block %s ends with copies into its shared memory that nobody waited for", kernel->name,
                   text(ended.index).c_str());
  ended.cluster->blocks[ended.rank] = nullptr;
  spare_stacks.push_back(ended.stacks);
  spare_races.push_back(std::move(ended.races));
  loaded = nullptr;
}

// Clusters run in order (or against it), one at a time; where one waits for another, the next starts beside it.
void run_grid() {
  Blocks started;
  const Dim grid = launch->grid, size = launch->cluster;
  const unsigned clusters = grid.x / size.x * (grid.y / size.y) * (grid.z / size.z);
  for (unsigned coming = 0; failure.empty() && (coming < clusters || !started.empty());) {
    size_t events = 0;
    for (size_t i = 0; i < started.size() && failure.empty();) {
      const size_t before = started[i]->events;
      run(*started[i]);
      events += started[i]->events - before;
      if (started[i]->running) {
        ++i;
        continue;
      }
      end_block(*started[i]);
      started.erase(started.begin() + i);
    }
    if (events || !failure.empty()) continue;
    if (coming < clusters) {
      start_cluster(launch->last_block_first ? clusters - 1 - coming : coming, started);
      ++coming;
      continue;
    }
    failure = text("%s: deadlock: every thread waits", kernel->name);
    for (const auto& each : started) failure += stand(*each);
  }
  for (const auto& each : started) end_block(*each);
  for (char* stacks : spare_stacks) munmap(stacks, 1024 * STACK_BYTES);
  spare_stacks.clear();
  spare_races.clear();
}

// What is wrong with a launch, as a driver would say.
std::string refusal(const Kernel& which, const Launch& how) {
  const Dim grid = how.grid, size = how.block, cluster = how.cluster;
  const size_t threads = size_t(size.x) * size.y * size.z, blocks = size_t(grid.x) * grid.y * grid.z;
  if (!threads || threads > 1024) return text("%s: a block of %zu threads", which.name, threads);
  if (!blocks || grid.y > 65535 || grid.z > 65535) return text("%s: a grid of %s", which.name, text(grid).c_str());
  if (grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z || cluster.x * cluster.y * cluster.z > 16)
    return text("%s: a grid of %s in clusters of %s", which.name, text(grid).c_str(), text(cluster).c_str());
  if (static_bytes() + how.shared_bytes > SHARED_BYTES)
    return text("%s: %zu bytes of static and %u of dynamic shared memory; an SM has %zu", which.name, static_bytes(),
                how.shared_bytes, SHARED_BYTES);
  if (how.arguments_count != which.parameters)
    return text("%s takes %d arguments, given: %d", which.name, which.parameters, how.arguments_count);
  for (int i = 0; i < how.arguments_count; ++i)
    if (how.argument_sizes[i] != which.sizes[i])
      return text("argument %d of %s is %zu bytes there, %zu here", i, which.name, which.sizes[i], how.argument_sizes[i]);
  return "";
}

}  // namespace

void stop(const std::string& what) {
  failure = what;
  _longjmp(scheduler, 2);
}

void meet_warp(unsigned mask, void* operand, Act act, bool orders, Where where) {
  const int warp = self->number / 32;
  settle_store();
  if (!(mask >> self->number % 32 & 1)) fail(where, "a lane that is not in its own mask %#x", mask);
  self->mask = mask, self->operand = operand, self->act = act, self->orders = orders, self->where = where;
  block->waiting_lanes[warp] |= 1u << self->number % 32;
  if (!complete_warp(warp, mask, *self)) pause(State::IN_WARP, where);
}

void meet_block(int number, int threads, bool wait, Where where) {
  NumberedBarrier& barrier = block->barriers[number];
  settle_store();
  if (barrier.come && barrier.threads != threads)
    fail(where, "barrier %d is for %d threads here, for %d elsewhere", number, threads, barrier.threads);
  if (number == 0 && !barrier.waiting.empty() && !same_place(barrier.waiting[0]->where, where))
    fail(where, "divergent barrier: thread %d waits at %s:%d", barrier.waiting[0]->number,
         name_of(barrier.waiting[0]->where), int(barrier.waiting[0]->where.line()));
  barrier.threads = threads;
  ++barrier.come;
  if (threads) block->races->release(self->number, barrier.clock);
  happened();
  if (wait) {
    self->where = where;
    barrier.waiting.push_back(self);
  }
  const int awaited = threads ? threads : block->running;
  if (barrier.come >= awaited) release_if_complete(barrier);
  else if (wait) pause(State::IN_BLOCK, where);
}

uint32_t cluster_rank() { return block->rank; }
uint32_t cluster_size() { return block->cluster->blocks.size(); }

void cluster_arrive(Where) {
  settle_store();
  Cluster& cluster = *block->cluster;
  self->cluster_phase = cluster.phase + 1;
  ++cluster.come;
  happened();
  release_if_complete(cluster);
}

void cluster_wait(Where where) {
  Cluster& cluster = *block->cluster;
  if (!self->cluster_phase) fail(where, "waits for the cluster without having arrived");
  if (cluster.phase >= self->cluster_phase) return;
  cluster.waiting.emplace_back(block, self);
  pause(State::IN_CLUSTER, where);
}

void defer(Engine engine, Work work) { self->open[engine].push_back(std::move(work)); }

void commit(Engine engine) {
  self->closed[engine].push_back(std::move(self->open[engine]));
  self->open[engine].clear();
}

void wait_for(Engine engine, int pending) {
  auto& closed = self->closed[engine];
  while (closed.size() > size_t(pending)) {
    for (const Work& work : closed.front()) work();
    closed.erase(closed.begin());
  }
}

void defer_until_looked_at(const void* barrier, Work work) {
  block->deferred[barrier].push_back(std::move(work));
  ++block->events;
}

void do_deferred(const void* barrier) {
  const auto found = block->deferred.find(barrier);
  if (found == block->deferred.end()) return;
  const std::vector<Work> due = std::move(found->second);
  block->deferred.erase(found);
  for (const Work& work : due) work();
}

bool look(bool come, Where where) {
  settle_store();
  if (come) {
    happened();
  } else {
    ++block->fruitless;
    block->ready.push_back(self);
    pause(State::LOOKS, where);
  }
  return come;
}

void look_at(const void* address, size_t bytes, Where where) {
  bytes = std::min(bytes, sizeof self->seen);
  const bool seen = self->seen_at == address && !memcmp(self->seen, address, bytes);
  if (seen) look(false, where);
  self->seen_at = address;
  memcpy(self->seen, address, bytes);
}

static bool anybody_waited, opened_early;

void wait_for_kernel_ahead() { self->waited = anybody_waited = true; }

// Once every block has ended or called this, the kernel behind may start: beside the kernel ahead too, if that was not
// waited for.
void launch_kernel_behind() { opened_early |= launch->programmatic && !self->waited; }

// The kernel behind is to find what the one ahead does as if this one had done it.
static void pass_on_traces() {
  for (int i = 0; i < launch->buffers_count; ++i)
    for (size_t at = 0; at < launch->buffers[i].end - launch->buffers[i].begin; ++at)
      launch->traces[i][at] |= (launch->traces[i][at] & (READ_AHEAD | WRITTEN_AHEAD)) * (READ / READ_AHEAD);
}

extern "C" __attribute__((visibility("default"))) const char* emulate(const Kernel* which, const Launch* how) {
  kernel = which, launch = how;
  gridDim = how->grid, blockDim = how->block;
  anybody_waited = opened_early = false;
  failure = refusal(*which, *how);
  if (failure.empty()) run_grid();
  if (failure.empty() && how->programmatic && !anybody_waited)
    failure = text("%s may end before the kernel ahead: none of its threads waits", which->name);
  if (opened_early) pass_on_traces();
  self = nullptr;
  return failure.empty() ? nullptr : failure.c_str();
}

}  // namespace emulator
