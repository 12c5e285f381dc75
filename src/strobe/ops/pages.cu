// Copies of whole pages, within a cache or out of it.
#include "types.cuh"

using Words = uint4;  // 16 bytes: what a thread moves

struct Copy {
  const Words* source_pages;
  Words* target_pages;
  const i64 *source, *target;            // target null: 0, 1, 2, ...
  i64 page, source_layer, target_layer;  // in words
};

// grid (page / 256, pages, layers)
extern "C" __global__ void copy_pages(const __grid_constant__ Copy p) {
  const i64 word = i64(blockIdx.x) * blockDim.x + threadIdx.x, target = p.target ? p.target[blockIdx.y] : blockIdx.y;
  if (word < p.page)
    p.target_pages[blockIdx.z * p.target_layer + target * p.page + word] =
        p.source_pages[blockIdx.z * p.source_layer + p.source[blockIdx.y] * p.page + word];
}
