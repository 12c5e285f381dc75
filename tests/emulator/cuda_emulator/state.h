// What is known of the launch that runs, its blocks and their threads.
#pragma once

#include <setjmp.h>

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "races.h"
#include "runtime.h"

namespace emulator {

using Work = std::function<void()>;

enum Engine { COPIES, PRODUCTS, STORES, ENGINES };  // whose work comes in groups: cp.async, wgmma, bulk stores

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
  unsigned cluster_phase = 0;  // that it arrived for
  bool waited = false;         // for the kernel ahead

  const void* seen_at = nullptr;  // by its last look at memory
  unsigned char seen[16];
  struct {  // its last plain store to shared memory
    size_t offset, bytes = 0;
    unsigned char before[16];
    uint32_t place;
  } store;
  std::vector<Work> open[ENGINES];  // the engines' open groups, and the closed ones that are not done
  std::vector<std::vector<Work>> closed[ENGINES];
};

struct NumberedBarrier {
  int come = 0, threads = 0;
  std::vector<Thread*> waiting;
  Clock clock;  // of those that have come
};

struct Phases {  // what an mbarrier orders
  Clock open, done;
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
  unsigned rank = 0;  // in its cluster
  std::vector<Thread> threads;
  std::deque<Thread*> ready;
  int running = 0;        // threads that have not ended
  size_t events = 0;      // all that brought some thread on
  size_t fruitless = 0;   // looks since the last of them
  std::vector<unsigned> waiting_lanes;  // of each warp
  NumberedBarrier barriers[BARRIERS];
  std::map<const void*, Phases> phases;               // by mbarrier
  std::map<const void*, std::vector<Work>> deferred;  // by the mbarrier that it is to tell
  std::vector<unsigned char> shared;  // while another block runs
  std::unique_ptr<Races> races;
  char* stacks;
};

struct Buffer {
  uintptr_t begin, end;
};

// What was done to a byte of a tensor, by the kernel ahead and by this one.
enum : unsigned char { READ_AHEAD = 1, WRITTEN_AHEAD = 2, READ = 4, WRITTEN = 8 };

struct Launch {  // as kernel.py has it
  Dim grid, block, cluster;
  uint32_t shared_bytes;
  int32_t arguments_count, buffers_count, last_block_first, programmatic;
  void** arguments;
  const size_t* argument_sizes;
  const Buffer* buffers;         // ascending
  unsigned char* const* traces;  // of each buffer's bytes
};

extern const Kernel* kernel;
extern const Launch* launch;
extern Block* block;   // that runs
extern Block* loaded;  // whose shared memory is in place
extern Thread* self;   // that runs; null outside of kernels

// A block's shared memory: one section of this library, the dynamic part first, then the static variables.
extern unsigned char dynamic[SHARED_BYTES + 1024];
extern "C" unsigned char __start_shared_memory[], __stop_shared_memory[];
inline size_t static_bytes() { return __stop_shared_memory - dynamic - sizeof dynamic; }

// The current thread's last store, which is judged once it is known whether it changed anything.
void settle_store();

[[noreturn]] void stop(const std::string& failure);
std::string who();  // kernel, block and thread
std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(Dim at);
const char* name_of(const Where& where);  // its file's

// Asynchronous work is done as late as it may, so that who does not wait for it sees old data: in groups that the
// current thread commits and waits for, or when a thread of the cluster's block `rank` looks at the mbarrier that it is
// to tell.
void defer(Engine engine, Work work);
void commit(Engine engine);
void wait_for(Engine engine, int pending);
void defer_until_looked_at(const void* barrier, Work work);
void do_deferred(const void* barrier);

// What an mbarrier orders: the current thread's past goes into its open phase; the phase ends; what came before its end
// becomes known to the current thread.
void barrier_released(const void* barrier);
void barrier_phase_ended(const void* barrier);
void barrier_acquired(const void* barrier);

}  // namespace emulator
