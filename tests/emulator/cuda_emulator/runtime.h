// What the emulated GPU does for the thread that runs: meet others, look at memory, fail with a place (__init__.py).
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <utility>

namespace emulator {

using Where = std::source_location;  // of a call in the kernel: what reports name

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

// The lanes of `mask` that still run meet: the last to come runs `act` over all lanes' operands (null where a lane does
// not take part), then all go on. Lanes that meet at different places are an error. Only a meeting that `orders` makes
// what lanes did to memory before it known to all after it: a shuffle does not.
using Act = void (*)(void* const* lanes);
void meet_warp(unsigned mask, void* operand, Act act, bool orders, Where where);

// Barrier `number` of the block, complete when `threads` have come (0: all that still run). Who does not `wait` goes on.
void meet_block(int number, int threads, bool wait, Where where);

// A look at what another thread is to change: where it has not come yet, others run before this returns.
bool look(bool come, Where where);
// The same for memory: who sees at an address what he saw there before lets others run.
void look_at(const void* address, size_t bytes, Where where);

[[noreturn]] void fail(Where where, const char* format, ...) __attribute__((format(printf, 2, 3)));

// An access by a function that stands for PTX, by the thread itself or by an engine for it: must be in bounds, aligned,
// and no race where it is shared memory. Plain accesses are seen without being told (memory.cpp, __tsan_*).
enum class Access { LOAD, STORE, ENGINE_LOAD, ENGINE_STORE };
void check_access(const void* address, size_t bytes, Access access, Where where);
void check_bounds(const void* address, size_t bytes, Access access, Where where);  // only that
void fence_async_shared();

uint32_t shared_address(const void* p);  // in the window of the block's shared memory
unsigned char* shared_pointer(uint32_t address);
void* dynamic_shared(size_t alignment);  // on a multiple of it, and of no larger power of two

// --- the engines: what stands for PTX (engines.cpp) ---------------------------------------------------

enum class Type { F16, BF16 };

void load_matrices(uint32_t (&m)[4], uint32_t address, bool transposed, Where where);
void store_matrices(uint32_t address, const uint32_t (&m)[4], Where where);
uint32_t transpose_matrix(uint32_t rows, Where where);
void mma(Type type, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Where where);

struct WarpgroupProduct {  // m64nNk16: d (+)= a b
  Type type;
  int columns;
  bool accumulate, a_in_registers;
  float* d;          // [columns / 2]
  uint32_t a[4];     // of a_in_registers, where b is MN-major; else a is a descriptor too, and both are K-major
  uint64_t a_descriptor, b_descriptor;
};
void wgmma(const WarpgroupProduct& product, Where where);
void wgmma_commit(Where where);
void wgmma_wait(int pending, Where where);

void copy_async(uint32_t shared, const void* global, int bytes, bool valid, Where where);
void commit_copies();
void wait_copies(int pending);

// An mbarrier: 8 bytes of shared memory.
void barrier_init(uint64_t* barrier, int count, Where where);
void barrier_arrive(uint64_t* barrier, uint32_t expected_bytes, Where where);
bool barrier_passed(uint64_t* barrier, uint32_t parity, Where where);

using Coordinates = int[5];  // innermost first
void tma_load(void* shared, const void* map, uint64_t* barrier, const Coordinates& first, Where where);
void tma_store(const void* map, const void* shared, const Coordinates& first, Where where);
void commit_stores();
void wait_stores(int pending);
void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, Where where);

// --- programmatic dependent launch -------------------------------------------------------------------

void wait_for_kernel_ahead();
void launch_kernel_behind();

// --- clusters ----------------------------------------------------------------------------------------

uint32_t cluster_rank();
uint32_t cluster_size();
void cluster_arrive(Where where);
void cluster_wait(Where where);
void* remote_shared(const void* p, size_t bytes, uint32_t rank, Where where);  // p's place in another block
void push(void* p, const void* x, size_t bytes, uint64_t* barrier, uint32_t rank, Where where);

// --- kernels -----------------------------------------------------------------------------------------

struct Kernel {
  const char* name;
  void (*call)(void** arguments);
  const size_t* sizes;  // of its parameters
  int parameters;
};

template <auto KERNEL>
struct Entry;
template <class... A, void (*KERNEL)(A...)>
struct Entry<KERNEL> {
  static constexpr size_t SIZES[] = {sizeof(A)..., 0};
  static constexpr int PARAMETERS = sizeof...(A);

  template <class T>
  __attribute__((no_sanitize("thread"))) static T copy(const void* argument) {
    T x;
    __builtin_memcpy(&x, argument, sizeof x);
    return x;
  }
  template <size_t... I>
  __attribute__((no_sanitize("thread"))) static void with(void** arguments, std::index_sequence<I...>) {
    KERNEL(copy<A>(arguments[I])...);
  }
  __attribute__((no_sanitize("thread"))) static void call(void** arguments) {
    with(arguments, std::index_sequence_for<A...>{});
  }
};

}  // namespace emulator

extern emulator::Dim threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs
