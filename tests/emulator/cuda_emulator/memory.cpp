// Every access that a kernel makes to memory: in bounds, aligned, in shared memory no race, and none with the kernel ahead
// under programmatic launch: which may run until it is waited for.
#include <algorithm>
#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "state.h"

namespace emulator {

__attribute__((section("shared_memory"), aligned(1024))) unsigned char dynamic[SHARED_BYTES + 1024];

namespace {

extern "C" __attribute__((visibility("hidden"))) char __ehdr_start[], _end[];  // of this library

size_t dynamic_offset = 0;

// Where in shared memory; past all of it for what stands elsewhere.
size_t shared_offset(const void* address) {
  return static_cast<const unsigned char*>(address) - __start_shared_memory;
}
bool is_shared(const void* address) {
  return shared_offset(address) < size_t(__stop_shared_memory - __start_shared_memory);
}

bool in_own_stack(const void* address) { return uintptr_t(address) - uintptr_t(self->stack) < STACK_BYTES; }

// The tensor that these bytes are of, or null.
const Buffer* tensor_of(uintptr_t at, size_t bytes) {
  const Buffer *first = launch->buffers, *last = first + launch->buffers_count;
  const Buffer* behind = std::upper_bound(first, last, at, [](uintptr_t x, const Buffer& b) { return x < b.begin; });
  return behind != first && at + bytes <= behind[-1].end ? behind - 1 : nullptr;
}

bool may_touch(const void* address, size_t bytes) {
  const uintptr_t at = uintptr_t(address);
  if (at - uintptr_t(dynamic) < sizeof dynamic) {
    const size_t offset = at - uintptr_t(dynamic) - dynamic_offset;
    return offset < launch->shared_bytes && offset + bytes <= launch->shared_bytes;
  }
  const bool in_library = at >= uintptr_t(__ehdr_start) && at < uintptr_t(_end);  // constants, static shared memory
  return tensor_of(at, bytes) || in_library || in_own_stack(address);
}

// What stands at, or is nearest to, an address that may not be touched.
std::string surroundings(const void* address, size_t bytes) {
  const uintptr_t at = uintptr_t(address);
  if (at - uintptr_t(dynamic) < sizeof dynamic)
    return text("offset %td of %u bytes of dynamic shared memory", ptrdiff_t(at - uintptr_t(dynamic) - dynamic_offset),
                launch->shared_bytes);
  const Buffer* nearest = nullptr;
  ptrdiff_t distance = 0;
  for (int i = 0; i < launch->buffers_count; ++i) {
    const Buffer& each = launch->buffers[i];
    const ptrdiff_t off = at < each.begin ? at - each.begin : at + bytes - each.end;
    if (!nearest || std::abs(off) < std::abs(distance)) nearest = &each, distance = off;
  }
  if (!nearest) return text("%p, and the kernel was given no tensor", address);
  return text("%p, %td bytes %s a tensor of %zu", address, std::abs(distance),
              distance < 0 ? "before" : "past the end of", size_t(nearest->end - nearest->begin));
}

// A place in the sources in 32 bits: an instruction (a return address) or a call (a source_location), in this library.
constexpr uint32_t CALL = 1u << 31;
uint32_t place_of(void* from) { return static_cast<char*>(from) - __ehdr_start; }
uint32_t place_of(Where where) { return (std::bit_cast<char*>(where) - __ehdr_start) | CALL; }

std::string text_of(uint32_t place) {
  if (!(place & CALL)) return text("@%x", place);  // kernel.py finds the line
  const Where where = std::bit_cast<Where>(__ehdr_start + (place & ~CALL));
  return text("%s:%d", name_of(where), int(where.line()));
}

[[noreturn]] void complain(size_t bytes, Access access, uint32_t place, const std::string& about) {
  const char* const does = access == Access::LOAD || access == Access::ENGINE_LOAD ? "reads" : "writes";
  stop(text("%s at %s: %s %zu bytes at %s", who().c_str(), text_of(place).c_str(), does, bytes, about.c_str()));
}

// Keep what is done to a tensor for the kernel behind; before this thread has waited, nothing may meet the kernel ahead.
void check_order(const void* address, size_t bytes, Access access, uint32_t place) {
  const Buffer* const tensor = tensor_of(uintptr_t(address), bytes);
  if (!tensor) return;
  const bool stores = access == Access::STORE || access == Access::ENGINE_STORE;
  const bool early = launch->programmatic && !self->waited;
  unsigned char* const trace = launch->traces[tensor - launch->buffers] + (uintptr_t(address) - tensor->begin);
  for (size_t i = 0; i < bytes; ++i) {
    if (early && (trace[i] & WRITTEN_AHEAD || (stores && trace[i] & READ_AHEAD)))
      complain(bytes, access, place,
               text("%p, which a kernel ahead %s that may still run", address,
                    trace[i] & WRITTEN_AHEAD ? "writes" : "reads"));
    trace[i] |= stores ? WRITTEN : READ;
  }
}

void check(const void* address, size_t bytes, size_t alignment, Access access, uint32_t place) {
  if (!may_touch(address, bytes)) complain(bytes, access, place, surroundings(address, bytes));
  if (uintptr_t(address) % alignment) complain(bytes, access, place, text("%p, which is not aligned", address));
  check_order(address, bytes, access, place);
}

void check_race(size_t offset, size_t bytes, Access access, uint32_t place) {
  const Races::Conflict conflict = block->races->access(self->number, offset, bytes, access, place);
  if (conflict.what)
    complain(bytes, access, place,
             text("offset %zu of shared memory, %s by thread %u at %s", offset, conflict.what, conflict.thread,
                  text_of(conflict.place).c_str()));
}

// A load or store of the kernel, about to happen.
void plain_access(const void* address, size_t bytes, bool aligned, Access access, void* from) {
  if (!self || in_own_stack(address)) return;
  settle_store();
  check(address, bytes, aligned ? bytes : 1, access, place_of(from));
  if (!is_shared(address)) return;
  if (access == Access::LOAD || bytes > sizeof self->store.before)
    return check_race(shared_offset(address), bytes, access, place_of(from));
  self->store.offset = shared_offset(address), self->store.bytes = bytes, self->store.place = place_of(from);
  memcpy(self->store.before, address, bytes);
}

}  // namespace

// A store of what stands there already is no race: threads may clear the same memory.
void settle_store() {
  if (!self->store.bytes) return;
  const auto& store = self->store;
  const size_t bytes = std::exchange(self->store.bytes, 0);
  if (memcmp(store.before, __start_shared_memory + store.offset, bytes))
    check_race(store.offset, bytes, Access::STORE, store.place);
  else
    block->races->store_same(self->number, store.offset, bytes, store.place);
}

void check_access(const void* address, size_t bytes, Access access, Where where) {
  settle_store();
  check(address, bytes, std::min<size_t>(bytes, 16), access, place_of(where));
  if (is_shared(address)) check_race(shared_offset(address), bytes, access, place_of(where));
}

void check_bounds(const void* address, size_t bytes, Access access, Where where) {
  check(address, bytes, std::min<size_t>(bytes, 16), access, place_of(where));
}

void fence_async_shared() {
  settle_store();
  block->races->fence(self->number);
}

constexpr uint32_t WINDOW = 1024;  // where shared memory begins: no address is 0

uint32_t shared_address(const void* p) { return static_cast<const unsigned char*>(p) - dynamic + WINDOW; }

unsigned char* shared_pointer(uint32_t address) { return dynamic + (int64_t(address) - WINDOW); }

void* dynamic_shared(size_t alignment) {
  dynamic_offset = alignment < 1024 ? alignment : 0;
  return dynamic + dynamic_offset;
}

void* remote_shared(const void* p, size_t bytes, uint32_t rank, Where where) {
  const auto& blocks = block->cluster->blocks;
  if (rank >= blocks.size()) fail(where, "block %u of a cluster of %zu", rank, blocks.size());
  if (!blocks[rank]) fail(where, "asks for shared memory of block %u of its cluster, which has ended", rank);
  check_bounds(p, bytes, Access::LOAD, where);
  unsigned char* const here = static_cast<unsigned char*>(const_cast<void*>(p));
  return blocks[rank] == loaded ? here : blocks[rank]->shared.data() + (here - __start_shared_memory);
}

void barrier_released(const void* barrier) { block->races->release(self->number, block->phases[barrier].open); }
void barrier_phase_ended(const void* barrier) {
  Phases& phases = block->phases[barrier];
  phases.done = std::move(phases.open);
  phases.open.clear();
}
void barrier_acquired(const void* barrier) { block->races->acquire(self->number, block->phases[barrier].done); }

const char* name_of(const Where& where) {
  const char* slash = strrchr(where.file_name(), '/');
  return slash ? slash + 1 : where.file_name();
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

std::string who() {
  return text("%s, block %s, thread %s", kernel->name, text(block->index).c_str(), text(self->index).c_str());
}

void fail(Where where, const char* format, ...) {
  char line[1024];
  va_list values;
  va_start(values, format);
  vsnprintf(line, sizeof line, format, values);
  va_end(values);
  stop(text("%s at %s:%d: %s", who().c_str(), name_of(where), int(where.line()), line));
}

// --- what -fsanitize=thread calls at every load and store of the kernel ------------------------------------

extern "C" {
#define EMULATOR_ACCESSES(n)                                                                                      \
  void __tsan_read##n(void* p) { plain_access(p, n, true, Access::LOAD, __builtin_return_address(0)); }           \
  void __tsan_write##n(void* p) { plain_access(p, n, true, Access::STORE, __builtin_return_address(0)); }         \
  void __tsan_unaligned_read##n(void* p) { plain_access(p, n, false, Access::LOAD, __builtin_return_address(0)); } \
  void __tsan_unaligned_write##n(void* p) { plain_access(p, n, false, Access::STORE, __builtin_return_address(0)); }
EMULATOR_ACCESSES(1)
EMULATOR_ACCESSES(2)
EMULATOR_ACCESSES(4)
EMULATOR_ACCESSES(8)
EMULATOR_ACCESSES(16)
void __tsan_read_range(void* p, size_t n) { plain_access(p, n, false, Access::LOAD, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t n) { plain_access(p, n, false, Access::STORE, __builtin_return_address(0)); }
void __tsan_init() {}

// --- and -fsanitize=bounds, shift, integer-divide-by-zero at what C++ leaves undefined

struct Undefined {
  const char* file;
  uint32_t line, column;
};
[[noreturn]] static void undefined(const Undefined& at, const char* what) {
  stop(text("%s at %s:%u: %s", who().c_str(), at.file, at.line, what));
}
void __ubsan_handle_out_of_bounds(Undefined* at, void*) { undefined(*at, "an index past the end of an array"); }
void __ubsan_handle_shift_out_of_bounds(Undefined* at, void*, void*) { undefined(*at, "a shift by too many bits"); }
void __ubsan_handle_divrem_overflow(Undefined* at, void*, void*) { undefined(*at, "an integer divided by zero"); }
}

}  // namespace emulator
