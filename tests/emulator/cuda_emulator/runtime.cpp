// Threads of a block as fibers, their meetings, and every access to memory they make (__init__.py).
#include "deferred.h"
#include "races.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

emulator::Dim threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
namespace {

constexpr size_t STACK_BYTES = 128 << 10;
constexpr size_t SHARED_BYTES = 227 << 10;  // that a block may take, static and dynamic together
constexpr int BARRIERS = 16;

enum class State { READY, LOOKS, IN_WARP, IN_BLOCK, IN_CLUSTER, ENDED };

struct Thread {
  jmp_buf context;
  Dim index;
  int number;
  char* stack;
  bool started = false;
  State state = State::READY;
  Where where;  // it waits
  unsigned mask = 0;  // of its meeting with other lanes, and what it brought to it
  void* operand = nullptr;
  Act act = nullptr;
  bool orders = false;
  const void* seen_at = nullptr;  // by its last look at memory
  unsigned char seen[16];
  struct {  // its last plain store to shared memory
    size_t offset, bytes = 0;
    unsigned char before[16];
    uint32_t place;
  } store;
  std::vector<Work> open[ENGINES];  // the engines' open groups, and the closed ones that are not done
  std::vector<std::vector<Work>> closed[ENGINES];
  unsigned cluster_phase = 0;  // that it arrived for
};

struct Barrier {
  int come = 0, threads = 0;
  std::vector<Thread*> waiting;
  Clock clock;  // of those that have come
};

struct Phases {  // of a barrier in shared memory
  Clock open, done;
  bool foreign = false;  // threads of other blocks arrive: their clocks are not known
};

struct Block;

struct Cluster {
  std::vector<Block*> blocks;  // null: ended
  std::vector<std::pair<Block*, Thread*>> waiting;
  int come = 0, running = 0;
  unsigned phase = 0;
};

struct Block {
  Dim index;
  std::shared_ptr<Cluster> cluster;
  unsigned rank = 0;
  std::vector<Thread> threads;
  std::deque<Thread*> ready;
  std::vector<unsigned> waiting_lanes;  // of each warp
  Barrier barriers[BARRIERS];
  std::map<const void*, std::vector<Work>> deferred;  // by the barrier that it comes with
  std::map<const void*, Phases> phases;
  std::unique_ptr<Races> races;
  std::vector<unsigned char> shared;  // while another block runs
  char* stacks;
  int running;      // threads that have not ended
  size_t fruitless = 0;  // looks since something last happened
  size_t events = 0;
};

struct Buffer {
  uintptr_t begin, end;
};

extern "C" {
struct Launch {  // as kernel.py has it
  Dim grid, block, cluster;
  uint32_t shared_bytes;
  int32_t arguments_count, buffers_count;
  void** arguments;
  const size_t* argument_sizes;
  const Buffer* buffers;  // in ascending order
};
}

// One section is a block's shared memory: first (the runtime is linked first) the dynamic, then the static variables.
__attribute__((section("shared_memory"), aligned(1024))) unsigned char dynamic[SHARED_BYTES + 1024];
extern "C" unsigned char __start_shared_memory[], __stop_shared_memory[];
extern "C" __attribute__((visibility("hidden"))) char __ehdr_start, _end;  // of this library

const Kernel* kernel;
const Launch* launch;
Block* block;
Thread* self;
Block* loaded;  // whose shared memory stands in the section
jmp_buf scheduler;
std::string failure;
std::vector<char*> spare_stacks;

size_t dynamic_offset = 0;

// --- threads -----------------------------------------------------------------------------------------

void body();
void settle_store();

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

const char* name_of(const Where& where) {
  const char* slash = strrchr(where.file_name(), '/');
  return slash ? slash + 1 : where.file_name();
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

void release_if_complete(Barrier& barrier) {
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

std::string text(const char* format, ...) {
  char line[1024];
  va_list values;
  va_start(values, format);
  vsnprintf(line, sizeof line, format, values);
  va_end(values);
  return line;
}

std::string text(Dim at) { return text("(%u, %u, %u)", at.x, at.y, at.z); }

[[noreturn]] void stop(const std::string& what) {
  failure = what;
  _longjmp(scheduler, 2);
}

std::string who() {
  return text("%s, block %s, thread %s", kernel->name, text(block->index).c_str(), text(self->index).c_str());
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

// Where each warp stands.
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

// --- blocks ------------------------------------------------------------------------------------------

size_t static_bytes() { return __stop_shared_memory - dynamic - sizeof dynamic; }

std::unique_ptr<Block> start_block(Dim index) {
  auto fresh = std::make_unique<Block>();
  const Dim size = launch->block;
  fresh->index = index;
  fresh->running = size.x * size.y * size.z;
  fresh->threads.resize(fresh->running);
  fresh->waiting_lanes.resize((fresh->running + 31) / 32);
  fresh->shared.assign(__stop_shared_memory - __start_shared_memory, 0xff);
  fresh->races = std::make_unique<Races>(fresh->running, fresh->shared.size());
  if (spare_stacks.empty()) {
    void* room = mmap(nullptr, 1024 * STACK_BYTES, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED) return nullptr;
    spare_stacks.push_back(static_cast<char*>(room));
  }
  fresh->stacks = spare_stacks.back();
  spare_stacks.pop_back();
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

// Clusters run in order, one at a time; where one waits for another, the next starts beside it.
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
      if (!started[i]->deferred.empty())
        failure = text("%s: block %s ends with copies into its shared memory that nobody waited for", kernel->name,
                       text(started[i]->index).c_str());
      started[i]->cluster->blocks[started[i]->rank] = loaded = nullptr;
      spare_stacks.push_back(started[i]->stacks);
      started.erase(started.begin() + i);
    }
    if (events || !failure.empty()) continue;
    if (coming < clusters) {
      start_cluster(coming++, started);
      continue;
    }
    failure = text("%s: deadlock: every thread waits", kernel->name);
    for (const auto& each : started) failure += stand(*each);
  }
  for (const auto& each : started) spare_stacks.push_back(each->stacks);
  loaded = nullptr;
}

// --- memory ------------------------------------------------------------------------------------------

bool in_buffer(uintptr_t at, size_t bytes) {
  const Buffer *first = launch->buffers, *last = first + launch->buffers_count;
  const Buffer* behind = std::upper_bound(first, last, at, [](uintptr_t x, const Buffer& b) { return x < b.begin; });
  return behind != first && at + bytes <= behind[-1].end;
}

// Why a thread may not touch this; empty where it may.
std::string complaint(const void* address, size_t bytes) {
  const uintptr_t at = uintptr_t(address);
  if (at - uintptr_t(self->stack) < STACK_BYTES) return "";
  if (at - uintptr_t(dynamic) < sizeof dynamic) {
    const intptr_t offset = at - uintptr_t(dynamic) - dynamic_offset;
    if (offset >= 0 && offset + bytes <= launch->shared_bytes) return "";
    return text("offset %td of %u bytes of dynamic shared memory", offset, launch->shared_bytes);
  }
  if (at >= uintptr_t(&__ehdr_start) && at < uintptr_t(&_end)) return "";
  if (in_buffer(at, bytes)) return "";
  const Buffer* nearest = nullptr;
  intptr_t distance = 0;
  for (int i = 0; i < launch->buffers_count; ++i) {
    const Buffer& each = launch->buffers[i];
    const intptr_t off = at < each.begin ? intptr_t(at - each.begin) : intptr_t(at + bytes - each.end);
    if (!nearest || std::abs(off) < std::abs(distance)) nearest = &each, distance = off;
  }
  if (!nearest) return text("%p, and the kernel was given no tensor", address);
  return text("%p, %td bytes %s a tensor of %zu", address, std::abs(distance),
              distance < 0 ? "before" : "past the end of", size_t(nearest->end - nearest->begin));
}

// A place in the sources in 32 bits: an instruction (a return address) or a call (a source_location), in this library.
uint32_t place_of(void* from) { return static_cast<char*>(from) - &__ehdr_start; }
uint32_t place_of(Where where) { return (std::bit_cast<char*>(where) - &__ehdr_start) | 1u << 31; }

std::string text_of(uint32_t place) {
  if (!(place >> 31)) return text("@%x", place);  // kernel.py finds the line
  const Where where = std::bit_cast<Where>(&__ehdr_start + (place & ~(1u << 31)));
  return text("%s:%d", name_of(where), int(where.line()));
}

[[noreturn]] void complain(size_t bytes, bool write, uint32_t place, const std::string& about) {
  stop(text("%s at %s: %s %zu bytes at %s", who().c_str(), text_of(place).c_str(), write ? "writes" : "reads", bytes,
            about.c_str()));
}

void check_race(size_t offset, size_t bytes, bool write, uint32_t place) {
  const Races::Mark other = block->races->access(self->number, offset, bytes, write, place);
  if (other.time)
    complain(bytes, write, place,
             text("offset %zu of shared memory, a race: nothing orders it and an access by thread %u at %s", offset,
                  other.thread, text_of(other.place).c_str()));
}

void check(const void* address, size_t bytes, size_t alignment, bool write, uint32_t place) {
  const std::string wrong = complaint(address, bytes);
  if (!wrong.empty()) complain(bytes, write, place, wrong);
  if (uintptr_t(address) % alignment) complain(bytes, write, place, text("%p, which is not aligned", address));
}

// Where in shared memory, or past its end.
size_t shared_offset(const void* address) {
  return static_cast<const unsigned char*>(address) - __start_shared_memory;
}
bool is_shared(const void* address) {
  return shared_offset(address) < size_t(__stop_shared_memory - __start_shared_memory);
}

// A store counts from the next that its thread does: only then is it known whether it changed anything. One that did not
// is no race (threads may clear the same memory).
void settle_store() {
  auto& store = self->store;
  if (!store.bytes) return;
  const size_t bytes = std::exchange(store.bytes, 0);
  if (memcmp(store.before, __start_shared_memory + store.offset, bytes))
    check_race(store.offset, bytes, true, store.place);
  else
    block->races->write_same(self->number, store.offset, bytes, store.place);
}

void access(const void* address, size_t bytes, bool aligned, bool write, void* from) {
  if (!self || uintptr_t(address) - uintptr_t(self->stack) < STACK_BYTES) return;
  settle_store();
  check(address, bytes, aligned ? bytes : 1, write, place_of(from));
  if (!is_shared(address)) return;
  if (!write || bytes > sizeof self->store.before) return check_race(shared_offset(address), bytes, write, place_of(from));
  self->store.offset = shared_offset(address), self->store.bytes = bytes, self->store.place = place_of(from);
  memcpy(self->store.before, address, bytes);
}

}  // namespace

void meet_warp(unsigned mask, void* operand, Act act, bool orders, Where where) {
  const int warp = self->number / 32;
  settle_store();
  if (!(mask >> self->number % 32 & 1)) fail(where, "a lane that is not in its own mask %#x", mask);
  self->mask = mask, self->operand = operand, self->act = act, self->orders = orders, self->where = where;
  block->waiting_lanes[warp] |= 1u << self->number % 32;
  if (!complete_warp(warp, mask, *self)) pause(State::IN_WARP, where);
}

void meet_block(int number, int threads, bool wait, Where where) {
  Barrier& barrier = block->barriers[number];
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

void* remote_shared(const void* p, size_t bytes, uint32_t rank, Where where) {
  const auto& blocks = block->cluster->blocks;
  if (rank >= blocks.size()) fail(where, "block %u of a cluster of %zu", rank, blocks.size());
  if (!blocks[rank]) fail(where, "asks for shared memory of block %u of its cluster, which has ended", rank);
  check_bounds(p, bytes, false, where);
  unsigned char* const here = static_cast<unsigned char*>(const_cast<void*>(p));
  return blocks[rank] == loaded ? here : blocks[rank]->shared.data() + (here - __start_shared_memory);
}

void store_remote(void* p, const void* value, size_t bytes, uint32_t rank, Where where) {
  memcpy(remote_shared(p, bytes, rank, where), value, bytes);
  ++block->cluster->blocks[rank]->events;
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

void defer_until_looked_at(const void* barrier, uint32_t rank, Work work) {
  Block* const target = block->cluster->blocks[rank];
  if (!target) return;
  target->deferred[barrier].push_back(std::move(work));
  ++target->events;
}

void barrier_released(const void* barrier) { block->races->release(self->number, block->phases[barrier].open); }
void barrier_released_by_others(const void* barrier, uint32_t rank) {
  block->cluster->blocks[rank]->phases[barrier].foreign = true;
}
void barrier_phase_ended(const void* barrier) {
  Phases& phases = block->phases[barrier];
  phases.done = std::move(phases.open);
  phases.open.clear();
}
void barrier_acquired(const void* barrier) {
  const Phases& phases = block->phases[barrier];
  if (phases.foreign) block->races->acquire_all(self->number);
  else block->races->acquire(self->number, phases.done);
}
void forget_accesses(const void* shared, size_t bytes) { block->races->forget(shared_offset(shared), bytes); }

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

void fail(Where where, const char* format, ...) {
  char line[1024];
  va_list values;
  va_start(values, format);
  vsnprintf(line, sizeof line, format, values);
  va_end(values);
  stop(text("%s at %s:%d: %s", who().c_str(), name_of(where), int(where.line()), line));
}

void check_access(const void* address, size_t bytes, bool write, Where where) {
  settle_store();
  check(address, bytes, std::min<size_t>(bytes, 16), write, place_of(where));
  if (is_shared(address)) check_race(shared_offset(address), bytes, write, place_of(where));
}
void check_bounds(const void* address, size_t bytes, bool write, Where where) {
  check(address, bytes, std::min<size_t>(bytes, 16), write, place_of(where));
}

constexpr uint32_t WINDOW = 1024;  // where shared memory begins: no address is 0

uint32_t shared_address(const void* p) { return static_cast<const unsigned char*>(p) - dynamic + WINDOW; }

unsigned char* shared_pointer(uint32_t address) { return dynamic + (int64_t(address) - WINDOW); }

void* dynamic_shared(size_t alignment) {
  dynamic_offset = alignment < 1024 ? alignment : 0;
  return dynamic + dynamic_offset;
}

extern "C" __attribute__((visibility("default"))) const char* emulate(const Kernel* which, const Launch* how) {
  kernel = which, launch = how;
  gridDim = how->grid, blockDim = how->block;
  failure.clear();
  self = nullptr;
  const size_t threads = size_t(how->block.x) * how->block.y * how->block.z;
  if (!threads || threads > 1024) failure = text("%s: a block of %zu threads", which->name, threads);
  if (!how->grid.x || !how->grid.y || !how->grid.z) failure = text("%s: an empty grid", which->name);
  if (how->grid.y > 65535 || how->grid.z > 65535) failure = text("%s: a grid of %s", which->name, text(how->grid).c_str());
  if (static_bytes() + how->shared_bytes > SHARED_BYTES)
    failure = text("%s: %zu bytes of static and %u of dynamic shared memory; an SM has %zu", which->name,
                   static_bytes(), how->shared_bytes, SHARED_BYTES);
  if (how->arguments_count != which->parameters)
    failure = text("%s takes %d arguments, given: %d", which->name, which->parameters, how->arguments_count);
  for (int i = 0; i < how->arguments_count && failure.empty(); ++i)
    if (how->argument_sizes[i] != which->sizes[i])
      failure = text("argument %d of %s is %zu bytes there, %zu here", i, which->name, which->sizes[i],
                     how->argument_sizes[i]);
  const Dim grid = how->grid, size = how->cluster;
  if (grid.x % size.x || grid.y % size.y || grid.z % size.z || size.x * size.y * size.z > 16)
    failure = text("%s: a grid of %s in clusters of %s", which->name, text(grid).c_str(), text(size).c_str());
  if (failure.empty()) run_grid();
  self = nullptr;
  return failure.empty() ? nullptr : failure.c_str();
}

// --- what -fsanitize=thread calls at every load and store of the kernel ------------------------------------

extern "C" {
#define EMULATOR_ACCESS(n)                                                                                        \
  void __tsan_read##n(void* p) { access(p, n, true, false, __builtin_return_address(0)); }                       \
  void __tsan_write##n(void* p) { access(p, n, true, true, __builtin_return_address(0)); }                       \
  void __tsan_volatile_read##n(void* p) { access(p, n, true, false, __builtin_return_address(0)); }              \
  void __tsan_volatile_write##n(void* p) { access(p, n, true, true, __builtin_return_address(0)); }              \
  void __tsan_unaligned_read##n(void* p) { access(p, n, false, false, __builtin_return_address(0)); }            \
  void __tsan_unaligned_write##n(void* p) { access(p, n, false, true, __builtin_return_address(0)); }
EMULATOR_ACCESS(1)
EMULATOR_ACCESS(2)
EMULATOR_ACCESS(4)
EMULATOR_ACCESS(8)
EMULATOR_ACCESS(16)
void __tsan_read_range(void* p, size_t n) { access(p, n, false, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { access(p, n, false, true, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}

}  // namespace emulator
