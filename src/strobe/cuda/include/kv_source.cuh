// Where the rows of q, k and v stand: `at(i, valid)` is the address of row i's head_dim elements, and any address,
// not to be read, where it is not `valid`.
#pragma once

#include "types.cuh"

// Rows one stride apart.
template <typename T>
struct StridedRows {
  const T* base;
  i64 stride;

  __device__ __forceinline__ const T* at(int row, bool) const { return base + row * stride; }
};

// The queries of the HEADS heads that share a key head: row i is token i / HEADS, head i % HEADS.
template <typename T, int HEADS>
struct GroupedRows {
  const T* base;
  i64 token_stride, head_stride;

  __device__ __forceinline__ const T* at(int row, bool) const {
    return base + row / HEADS * token_stride + row % HEADS * head_stride;
  }
};

// Rows in pages of PAGE; `pages` is this sequence's row of the page table.
template <typename T, int PAGE>
struct PagedRows {
  const T* base;
  i64 page_stride, row_stride;
  const int* pages;

  __device__ __forceinline__ const T* at(int row, bool valid) const {
    return base + (valid ? __ldg(pages + row / PAGE) : 0) * page_stride + row % PAGE * row_stride;
  }
};
