// Tensor cores, copy engines and barriers in shared memory: what a PTX instruction does, in plain C++.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "state.h"

#include "device.h"
#include "include/convert.cuh"

float __fmul_rn(float a, float b) { return a * b; }
float __fadd_rn(float a, float b) { return a + b; }

namespace emulator {
namespace {

float value(Type type, uint32_t bits) {
  return type == Type::F16 ? f16_value(bits) : __uint_as_float(bits << 16);
}
float low(Type type, uint32_t pair) { return value(type, pair & 0xffff); }
float high(Type type, uint32_t pair) { return value(type, pair >> 16); }

// d [rows x columns] += a [rows x 16] b [columns x 16]
void multiply(float* d, const float* a, const float* b, int rows, int columns) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) {
      float sum = 0.f;
      for (int k = 0; k < 16; ++k) sum += a[i * 16 + k] * b[j * 16 + k];
      d[i * columns + j] += sum;
    }
}

// --- mma.sync, ldmatrix, movmatrix ---------------------------------------------------------------------

struct Matrices {
  uint32_t* m;
  const unsigned char* row;
  bool transposed;
};

struct Product {
  Type type;
  float* c;
  const uint32_t* a;
  uint32_t b[2];
};

// These instructions need every lane of the warp.
void expect_all(void* const* lanes) {
  for (int i = 0; i < 32; ++i)
    if (!lanes[i]) fail(Where::current(), "a warp-wide product or matrix move without lane %d, which has ended", i);
}

// Rows `lane / 4` (+ 8) and columns `lane % 4 * 2` + {0, 1} (+ 8) of an A operand.
void unpack_a(Type type, const uint32_t* a, int lane, float (*to)[16]) {
  for (int i = 0; i < 4; ++i) {
    float* at = &to[lane / 4 + i % 2 * 8][lane % 4 * 2 + i / 2 * 8];
    at[0] = low(type, a[i]), at[1] = high(type, a[i]);
  }
}

void mma_of_warp(void* const* lanes) {
  expect_all(lanes);
  float a[16][16], b[8][16], c[16][8];
  const Type type = static_cast<Product*>(lanes[0])->type;
  for (int lane = 0; lane < 32; ++lane) {
    const Product& mine = *static_cast<Product*>(lanes[lane]);
    const int row = lane / 4, pair = lane % 4 * 2;
    unpack_a(type, mine.a, lane, a);
    for (int half = 0; half < 2; ++half) {
      b[row][pair + half * 8] = low(type, mine.b[half]), b[row][pair + half * 8 + 1] = high(type, mine.b[half]);
      c[row + half * 8][pair] = mine.c[2 * half], c[row + half * 8][pair + 1] = mine.c[2 * half + 1];
    }
  }
  multiply(c[0], a[0], b[0], 16, 8);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      static_cast<Product*>(lanes[lane])->c[i] = c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

void matrices_of_warp(void* const* lanes) {
  expect_all(lanes);
  for (int i = 0; i < 4; ++i) {
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) memcpy(matrix[row], static_cast<Matrices*>(lanes[8 * i + row])->row, 16);
    for (int lane = 0; lane < 32; ++lane) {
      const Matrices& mine = *static_cast<Matrices*>(lanes[lane]);
      const int row = lane / 4, pair = lane % 4 * 2;
      const uint16_t first = mine.transposed ? matrix[pair][row] : matrix[row][pair];
      const uint16_t second = mine.transposed ? matrix[pair + 1][row] : matrix[row][pair + 1];
      mine.m[i] = first | uint32_t(second) << 16;
    }
  }
}

void store_matrices_of_warp(void* const* lanes) {
  expect_all(lanes);
  for (int i = 0; i < 4; ++i)
    for (int lane = 0; lane < 32; ++lane) {
      const unsigned char* row = static_cast<Matrices*>(lanes[8 * i + lane / 4])->row;
      memcpy(const_cast<unsigned char*>(row) + lane % 4 * 4, &static_cast<Matrices*>(lanes[lane])->m[i], 4);
    }
}

void transpose_of_warp(void* const* lanes) {
  expect_all(lanes);
  uint16_t matrix[8][8];
  for (int lane = 0; lane < 32; ++lane) memcpy(&matrix[lane / 4][lane % 4 * 2], lanes[lane], 4);
  for (int lane = 0; lane < 32; ++lane)
    *static_cast<uint32_t*>(lanes[lane]) =
        matrix[lane % 4 * 2][lane / 4] | uint32_t(matrix[lane % 4 * 2 + 1][lane / 4]) << 16;
}

// --- wgmma -------------------------------------------------------------------------------------------------

// Element (row, column) of an operand whose rows are SWIZZLE bytes apart in groups of 8 (PTX ISA, "Matrix Descriptor
// Format"); columns past a row's swizzled bytes stand in the next panel.
float element(Type type, uint64_t descriptor, int row, int column, Where where) {
  const uint32_t start = (descriptor & 0x3fff) << 4, panel_bytes = (descriptor >> 16 & 0x3fff) << 4;
  const uint32_t group_bytes = (descriptor >> 32 & 0x3fff) << 4, layout = descriptor >> 62;
  if (layout != 1 && layout != 2) fail(where, "a matrix descriptor of layout %u; emulated: 128 and 64 bytes", layout);
  const int swizzle = layout == 1 ? 128 : 64;
  uint32_t address = start + row / 8 * group_bytes + row % 8 * swizzle + column * 2 % swizzle +
                     column * 2 / swizzle * panel_bytes;
  address ^= address >> 3 & (swizzle - 16);
  uint16_t bits;
  check_access(shared_pointer(address), 2, Access::ENGINE_LOAD, where);
  memcpy(&bits, shared_pointer(address), 2);
  return value(type, bits);
}

struct Products {  // of one lane, to be done now
  std::vector<WarpgroupProduct> list;
  int warp;  // of its warpgroup
  Where where;
};

void products_of_warp(void* const* lanes) {
  expect_all(lanes);
  const Products& first = *static_cast<Products*>(lanes[0]);
  for (size_t n = 0; n < first.list.size(); ++n) {
    const WarpgroupProduct& op = first.list[n];
    float a[16][16];
    static float b[256][16], d[16][256];
    for (int lane = 0; lane < 32; ++lane) {
      const WarpgroupProduct& mine = static_cast<Products*>(lanes[lane])->list[n];
      if (op.a_in_registers) unpack_a(op.type, mine.a, lane, a);
      for (int i = 0; i < op.columns / 2; ++i)
        d[0][(lane / 4 + i / 2 % 2 * 8) * op.columns + i / 4 * 8 + lane % 4 * 2 + i % 2] =
            op.accumulate ? mine.d[i] : 0.f;
    }
    for (int k = 0; k < 16; ++k) {
      for (int row = 0; row < 16 && !op.a_in_registers; ++row)
        a[row][k] = element(op.type, op.a_descriptor, first.warp * 16 + row, k, first.where);
      for (int j = 0; j < op.columns; ++j)
        b[j][k] = op.a_in_registers ? element(op.type, op.b_descriptor, k, j, first.where)
                                    : element(op.type, op.b_descriptor, j, k, first.where);
    }
    multiply(d[0], a[0], b[0], 16, op.columns);
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < op.columns / 2; ++i)
        static_cast<Products*>(lanes[lane])->list[n].d[i] =
            d[0][(lane / 4 + i / 2 % 2 * 8) * op.columns + i / 4 * 8 + lane % 4 * 2 + i % 2];
  }
}

Products* gathering;  // what the current thread's deferred products are put into

// --- mbarrier ----------------------------------------------------------------------------------------------

struct Phase {
  int32_t bytes;    // expected and not yet come
  int16_t pending;  // arrivals
  uint16_t count_and_parity;

  int count() const { return count_and_parity & 0x7fff; }
  uint32_t parity() const { return count_and_parity >> 15; }
  bool end_if_complete() {
    if (pending || bytes) return false;
    count_and_parity ^= 0x8000;
    pending = count();
    return true;
  }
};

Phase& phase_of(uint64_t* barrier, Where where) {
  check_access(barrier, 8, Access::LOAD, where);  // initialised before, as barriers order it
  Phase& phase = *reinterpret_cast<Phase*>(barrier);
  if (phase.pending < 0) fail(where, "a barrier that is not initialised");
  return phase;
}

void bytes_came(uint64_t* barrier, uint32_t bytes, Where where) {
  Phase& phase = phase_of(barrier, where);
  phase.bytes -= bytes;
  if (phase.end_if_complete()) barrier_phase_ended(barrier);
}

void arrive(Phase& phase, uint32_t expected_bytes, Where where) {
  if (phase.pending <= 0) fail(where, "more arrivals than the barrier's %d", phase.count());
  phase.bytes += expected_bytes;
  --phase.pending;
}

struct TensorMap {  // as tensor_map.py has it
  uint64_t pointer, strides[5];
  uint32_t sizes[5];
  uint16_t box[5], element_bytes, rank, swizzle, nan;
};
static_assert(sizeof(TensorMap) <= 128);

// Call `move(place in the tensor, place in shared memory, bytes)` for every 16 bytes of a box; the first is null, and
// bytes fewer, where they stand outside the tensor.
template <class Move>
void walk_box(const TensorMap& map, uint32_t shared, const Coordinates& first, const Move& move) {
  const uint32_t span = map.swizzle ? map.swizzle - 16 : 0, step = 16 / map.element_bytes;
  Coordinates in_box = {};
  for (uint32_t to = shared; in_box[4] < map.box[4]; to += 16) {
    uint64_t from = map.pointer;
    bool inside = true;
    for (int i = 0; i < 5; ++i) {
      const int at = first[i] + in_box[i];
      inside &= at >= 0 && uint32_t(at) < map.sizes[i];
      from += at * map.strides[i];
    }
    const uint32_t left = (map.sizes[0] - first[0] - in_box[0]) * map.element_bytes;
    move(inside ? reinterpret_cast<unsigned char*>(from) : nullptr, shared_pointer(to ^ (to >> 3 & span)),
         inside ? std::min(16u, left) : 0);
    in_box[0] += step;
    for (int i = 0; i < 4 && in_box[i] >= map.box[i]; ++i) in_box[i] = 0, ++in_box[i + 1];
  }
}

uint32_t check_box(const TensorMap& map, uint32_t shared, const Coordinates& first, Where where) {
  if (shared % 128) fail(where, "a tensor copy at %#x in shared memory, off 128 bytes", shared);
  if (first[0] * map.element_bytes % 16) fail(where, "a tensor copy at column %d, off 16 bytes", first[0]);
  uint32_t bytes = map.element_bytes;
  for (int n : map.box) bytes *= n;
  return bytes;
}

struct Box {  // a copy to be done
  TensorMap map;
  uint32_t shared;
  Coordinates first;

  Box(const void* map, uint32_t shared, const Coordinates& at) : map(*static_cast<const TensorMap*>(map)), shared(shared) {
    std::copy(std::begin(at), std::end(at), first);
  }
};

}  // namespace

void load_matrices(uint32_t (&m)[4], uint32_t address, bool transposed, Where where) {
  Matrices mine{m, shared_pointer(address), transposed};
  check_access(mine.row, 16, Access::LOAD, where);
  meet_warp(~0u, &mine, matrices_of_warp, false, where);
}

void store_matrices(uint32_t address, const uint32_t (&m)[4], Where where) {
  Matrices mine{const_cast<uint32_t*>(m), shared_pointer(address), false};
  check_access(mine.row, 16, Access::STORE, where);
  meet_warp(~0u, &mine, store_matrices_of_warp, false, where);
}

uint32_t transpose_matrix(uint32_t rows, Where where) {
  meet_warp(~0u, &rows, transpose_of_warp, false, where);
  return rows;
}

void mma(Type type, float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Where where) {
  Product mine{type, c, a, {b0, b1}};
  meet_warp(~0u, &mine, mma_of_warp, false, where);
}

void wgmma(const WarpgroupProduct& product, Where where) {
  (void)where;
  defer(PRODUCTS, [product] { gathering->list.push_back(product); });
}

void wgmma_commit(Where where) {
  meet_warp(~0u, nullptr, [](void* const*) {}, false, where);
  commit(PRODUCTS);
}

void wgmma_wait(int pending, Where where) {
  Products mine{{}, int(threadIdx.x % 128 / 32), where};
  gathering = &mine;
  wait_for(PRODUCTS, pending);
  meet_warp(~0u, &mine, products_of_warp, true, where);
}

void copy_async(uint32_t shared, const void* global, int bytes, bool valid, Where where) {
  unsigned char* to = shared_pointer(shared);
  check_access(to, bytes, Access::STORE, where);
  if (valid) check_access(global, bytes, Access::LOAD, where);
  defer(COPIES, [=] {
    check_access(to, bytes, Access::STORE, where);  // written at any time from the call to the wait
    if (valid) memcpy(to, global, bytes);
    else memset(to, 0, bytes);
  });
}
void commit_copies() { commit(COPIES); }
void wait_copies(int pending) { wait_for(COPIES, pending); }

void barrier_init(uint64_t* barrier, int count, Where where) {
  check_access(barrier, 8, Access::STORE, where);
  *reinterpret_cast<Phase*>(barrier) = {0, int16_t(count), uint16_t(count)};
}

void barrier_arrive(uint64_t* barrier, uint32_t expected_bytes, Where where) {
  Phase& phase = phase_of(barrier, where);
  arrive(phase, expected_bytes, where);
  barrier_released(barrier);
  if (phase.end_if_complete()) barrier_phase_ended(barrier);
  look(true, where);
}

bool barrier_passed(uint64_t* barrier, uint32_t parity, Where where) {
  phase_of(barrier, where);
  do_deferred(barrier);
  const bool passed = phase_of(barrier, where).parity() != parity;
  if (passed) barrier_acquired(barrier);
  return look(passed, where);
}

void tma_load(void* shared, const void* map, uint64_t* barrier, const Coordinates& first, Where where) {
  const Box box(map, shared_address(shared), first);
  const uint32_t bytes = check_box(box.map, box.shared, first, where);
  // From here on nobody may be reading there.
  walk_box(box.map, box.shared, box.first, [=](const unsigned char* from, unsigned char* to, uint32_t size) {
    check_access(to, 16, Access::ENGINE_STORE, where);
    for (uint32_t i = 0; i < size; i += 2) check_bounds(from + i, std::min(2u, size), Access::ENGINE_LOAD, where);
  });
  barrier_released(barrier);
  defer_until_looked_at(barrier, [=] {
    walk_box(box.map, box.shared, box.first, [=](const unsigned char* from, unsigned char* to, uint32_t size) {
      memset(to, 0, 16);
      if (from) memcpy(to, from, size);
    });
    bytes_came(barrier, bytes, where);
  });
}

void tma_store(const void* map, const void* shared, const Coordinates& first, Where where) {
  const Box box(map, shared_address(shared), first);
  check_box(box.map, box.shared, first, where);
  walk_box(box.map, box.shared, box.first,
           [=](const unsigned char*, const unsigned char* from, uint32_t) { check_access(from, 16, Access::ENGINE_LOAD, where); });
  defer(STORES, [=] {
    walk_box(box.map, box.shared, box.first, [=](unsigned char* to, const unsigned char* from, uint32_t size) {
      check_access(from, 16, Access::ENGINE_LOAD, where);
      for (uint32_t i = 0; i < size; i += 2) check_bounds(to + i, std::min(2u, size), Access::ENGINE_STORE, where);
      if (to) memcpy(to, from, size);
    });
  });
}
void commit_stores() { commit(STORES); }
void wait_stores(int pending) { wait_for(STORES, pending); }

void bulk_copy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, Where where) {
  if (shared_address(shared) % 16 || uintptr_t(global) % 16 || bytes % 16)
    fail(where, "a bulk copy of %u bytes from %p to %#x; supported: multiples of 16", bytes, global, shared_address(shared));
  phase_of(barrier, where);
  for (uint32_t i = 0; i < bytes; i += 16) {
    check_access(static_cast<const char*>(global) + i, 16, Access::ENGINE_LOAD, where);
    check_access(static_cast<char*>(shared) + i, 16, Access::ENGINE_STORE, where);
  }
  barrier_released(barrier);
  defer_until_looked_at(barrier, [=] {
    memcpy(shared, global, bytes);
    bytes_came(barrier, bytes, where);
  });
}

// The work is the other block's: done when one of its threads looks.
void push(void* p, const void* x, size_t bytes, uint64_t* barrier, uint32_t rank, Where where) {
  const auto* const there = static_cast<Phase*>(remote_shared(barrier, 8, rank, where));
  if (there->pending < 0) fail(where, "tells a barrier of block %u that is not initialised", rank);
  if (uintptr_t(p) % bytes) fail(where, "a push of %zu bytes that is not aligned", bytes);
  check_bounds(p, bytes, Access::STORE, where);
  const auto* const first = static_cast<const unsigned char*>(x);
  const std::vector<unsigned char> value(first, first + bytes);
  block->cluster->blocks[rank]->deferred[barrier].push_back([=] {
    check_access(p, bytes, Access::STORE, where);
    memcpy(p, value.data(), bytes);
    barrier_released(barrier);
    bytes_came(barrier, bytes, where);
  });
  look(true, where);
}

}  // namespace emulator
